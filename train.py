"""
Train a vision-language model to act, off-policy: offline on recorded play, then online on its own.

    python train.py config/numberline.py                                       # the main job: a few minutes on two CPU cores
    python train.py config/numberline.py --actor_loss=sft --out_dir=out/sft    # an ablation
    python train.py config/numberline.py --resume=True                         # after a stop
    torchrun --nproc_per_node=8 train.py config/numberline.py                  # the same run on eight GPUs: all keys count for the ranks together
    python train.py --help                                                     # every key
"""
import contextlib, datetime, json, math, os, platform, re, shutil, subprocess, sys, tempfile, time

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

import envs
from agent_rl import FBC_QUANTILE, clip_reward, compute_loss, summarise
from buffer import Buffer, make_batch
from configurator import check_config, configure
from evaluate import env_factory, evaluate_policy, exploring_agent, full_evaluation, model_agent, gather_episodes, offline_results, play, record, recorded_summary, scripted_agent, episode_summary, format_table
from worlds.registry import make, reading_names
from model import build, gather, latest_checkpoint, load_base

# --- config ---
# run
out_dir = 'out/run'     # everything this run writes
resume = False          # go on from out_dir's last checkpoint; with more online_updates than it was begun with, beyond its end: the learning rate then rises to the longer cosine
overwrite = False       # start anew in an out_dir that holds a run, deleting it
seed = 0                # every random draw is a function of (seed, what for, step)
log_interval = 10       # updates between two lines of metrics.jsonl
eval_interval = 100     # updates between two short evaluations; 0: at the end only
stop_at = 0             # stop cleanly after this update, for machines with a time limit; 0: do not
dry_run = False         # only show what it takes: the longest batch forward, backward and in a rollout, peak memory by part
# model
model = 'bases/tiny-vlm'      # a hub id or local folder of any image-text-to-text model; 'scratch': the tiny one with random weights
trust_remote_code = False # run Python files that come with the model folder
device = 'auto'         # auto: cuda if there is one, else cpu
dtype = 'auto'          # float32 | bfloat16 (autocast); auto: bfloat16 on cuda, float32 on the cpu
grad_checkpointing = False # keep only the layers' inputs and compute the rest once more on the way back: less memory, about a third more time
shard = False           # torchrun: spread the frozen weights of the language model's layers over the ranks (FSDP2), for models that one device cannot hold
lora_r = 16             # rank; 0 trains all weights
lora_targets = '.*'     # regex over the full paths of the language model's linear layers
q_head = 'tied'         # tied: 2 H^2 parameters through the frozen unembedding: words that the model reads alike are valued alike | full: H x V
n_critics = 1           # of several the targets take the minimum: one more pessimism, against what is rare too
vision_cache_mb = 0     # memory for what the frozen vision part makes of each different picture: it is then looked at once, in updates and rollouts together; 0: every time
# environment
env = 'NumberLine'      # NumberLine | EZPoints | Points24 | Blackjack | FrozenLake | BabyAI-GoToLocal-v0 | miniwob/click-test-v1 | ..., or pre-training's
                        # Captions | Reading; several, played in turn: 'NumberLine,EZPoints', in a file also ['NumberLine', 'EZPoints']
size = 80               # side of the picture, pixels
penalty = -1.0          # reward of a reply that does not parse; the environment does not move
max_turns: int = None   # an episode is cut off after so many turns; None: the environment's own limit
# data
data = ''               # folder of recorded episodes; '': record data_episodes by data_mix into out_dir/data
data_mix = {'expert': 0.3, 'random': 0.5, 'malformed': 0.2} # who plays a turn: expert, random, malformed, biased, and their shares
expert_episodes = 0.0   # share of the recorded episodes that the expert plays alone; data_mix plays the others
data_episodes = 600
# method
actor_loss = 'afsft'    # sft: clone all | afsft: clone where A > beta | awr: weigh by exp(A / awr_temperature) | fbc: clone the better episodes
mdp = 'token'           # token: an advantage a token | turn: one a reply
bc_coef = 0.0           # plain cloning, always on
critic_coef = 10.0      # the critic has to tell states apart before the filter can: it leads
pess_coef = 0.5         # pulls Q of the whole vocabulary to q_init: tokens that no data shows here stay low; 0: off
q_init: float = None    # where the head starts; None: the lowest discounted return in the data
beta = -0.05            # a token passes if A > beta
filter_warmup = 50      # updates in which everything passes
gamma = 0.9             # discount a turn
trace = 'tree'          # how a turn's outcome reaches its tokens. tree: as far as the policy would have said what was said | plain: TD(lambda)
lam = 1.0               # the trace's decay a token; 0: one-token TD
reward_clip: float = None # the critic sees rewards cut to +-reward_clip: a rare win of 10 would drown the slips of -1 that come before it; None: as they are
target_tau = 0.05       # EMA of the target heads
# optimisation
offline_updates = 600
online_updates = 200
batch_size = 32         # windows an update
won_share: float = None # share of the windows that comes from episodes that reached the goal, where those are rare and chance has no part in it; None: as they come
window = 3              # consecutive turns of an episode in a window
micro_batch = 32        # windows that are on the device at once
lr = 4e-3               # of the adapters (or of all weights)
critic_lr = 2e-3        # of the Q heads
min_lr = 0.1            # where the cosine ends, as a share of lr
warmup_updates = 20
grad_clip = 1.0
# online phase
num_envs = 32           # environments that play at once
rollout_episodes = 64   # whole episodes in a rollout
updates_per_rollout = 20
replay_episodes = 0     # an online batch draws from the last so many of its own episodes; 0: from all, what the policy has since left behind too
offline_ratio = 0.25    # share of an online batch that comes from the recorded data
q_weight = 0.0          # rollouts and evaluations sample from pi * exp(q_weight * A): the critic knows better before the filter has taught the policy; 0: the policy alone
explore = 0.0           # share of a rollout's turns that are played at random: what the policy never says, the filter cannot let pass
max_new_tokens = 20     # of a reply
# evaluation
eval_episodes = 300     # of each row of the final table
# --- end of config ---

OURS = ("config.json", "metrics.jsonl", "eval.json", "eval_offline.json", "meta.json", "ckpt", "ckpt.old", "ckpt.tmp", "data", "replay", "model", "report.html", "curves.svg")  # what `overwrite` may delete


RANK, LOCAL_RANK, WORLD = [int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] if dist.is_torchelastic_launched() else (0, 0, 1)  # torchrun's words


def join_ranks(cfg):
    """The process group and each rank's device. Keys count for all ranks together (but micro_batch and cache_mb, a device's own), so that a config means the same on one GPU and on eight. Without torchrun: nothing."""
    if WORLD == 1:
        if cfg.shard:
            raise SystemExit("shard=True spreads a model over several ranks: start it as torchrun --nproc_per_node=2 train.py ..., or leave shard out.")
        return
    if cfg.batch_size % WORLD:
        raise SystemExit(f"batch_size={cfg.batch_size} windows cannot be dealt evenly to {WORLD} ranks: set a multiple of {WORLD}.")
    for key in ("eval_episodes",) + ("num_envs", "rollout_episodes") * (cfg.online_updates > 0):
        if getattr(cfg, key) < WORLD:
            raise SystemExit(f"{key}={getattr(cfg, key)} is too few for {WORLD} ranks, which share them: set at least {WORLD}.")
    if cfg.device != 'cpu' and torch.cuda.is_available():
        if LOCAL_RANK >= torch.cuda.device_count():
            raise SystemExit(f"torchrun started more ranks on this machine than it has GPUs: --nproc_per_node={torch.cuda.device_count()}.")
        torch.cuda.set_device(LOCAL_RANK)
    if not dist.is_initialized():
        dist.init_process_group(timeout=datetime.timedelta(minutes=30))               # NCCL for tensors on GPUs, gloo for others


def all_sum(tensors):
    """Sum each tensor over the ranks, in place, all in one message. No DDP around the net: the loss divides by counts over the whole update, so gradients are to be summed
    and not averaged, and once an update, not in each of its backward passes; the forward passes are not one call; and adapters are a few MB, nothing worth hiding behind the backward pass."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(total.view_as(t))


def lr_at(step, cfg):
    """Factor on the learning rates: linear warm-up, then a cosine down to min_lr over both phases; a function of the global step alone."""
    if step < cfg.warmup_updates:
        return (step + 1) / cfg.warmup_updates
    done = (step - cfg.warmup_updates) / max(1, cfg.offline_updates + cfg.online_updates - cfg.warmup_updates)
    return cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def open_run(cfg):
    """Make out_dir, or refuse: a run that stands there is neither mixed with nor lost."""
    shards = sorted(name for name in os.listdir(cfg.out_dir) if re.fullmatch(r"replay-\d+", name)) if os.path.isdir(cfg.out_dir) else []
    there = [name for name in (*OURS, *shards) if os.path.exists(os.path.join(cfg.out_dir, name))]
    if cfg.resume:
        if not latest_checkpoint(cfg.out_dir, must=False):
            raise SystemExit(f"out_dir={cfg.out_dir!r} has no checkpoint to resume from: start without --resume.")
        with open(os.path.join(cfg.out_dir, "config.json")) as f:
            old = json.load(f)
        free = ("out_dir", "resume", "overwrite", "stop_at", "log_interval", "eval_interval", "device", "eval_episodes", "shard",
                *["online_updates"] * (cfg.online_updates > old["online_updates"] > 0))    # without an online phase the table at the end is the offline one
        changed = [k for k, v in json.loads(json.dumps(vars(cfg))).items() if k not in free and old.get(k) != v]
        if changed:
            k = changed[0]
            raise SystemExit(f"{k}={getattr(cfg, k)!r} but the run in {cfg.out_dir!r} has {k}={old.get(k)!r}: resume with the same settings, or start a new out_dir.")
    elif there and not cfg.overwrite:
        raise SystemExit(f"out_dir={cfg.out_dir!r} already holds a run ({there[0]}): --resume=True goes on with it, --overwrite=True deletes it, another --out_dir keeps it.")
    else:
        for name in there:
            path = os.path.join(cfg.out_dir, name)
            for key in ("data", "model"):
                if getattr(cfg, key) and (os.path.realpath(getattr(cfg, key)) + os.sep).startswith(os.path.realpath(path) + os.sep):
                    raise SystemExit(f"{key}={getattr(cfg, key)!r} lies in the run that overwrite would delete: move it, or choose another out_dir.")
        for name in there:
            path = os.path.join(cfg.out_dir, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    os.makedirs(cfg.out_dir, exist_ok=True)


def open_replay(cfg, shape, saved=()):
    """This rank's shard of what the agent played: out_dir/replay, replay-1, ... saved: how many rows of each the checkpoint knows. Where the number of ranks has
    changed, rank k % WORLD takes in what rank k had, and a new rank copies another's. It writes to its own folder only, behind the checkpoint's rows: a crash before the next one loses nothing."""
    folder = lambda k: os.path.join(cfg.out_dir, f"replay-{k}" if k else "replay")
    replay = Buffer(folder(RANK), create=True, shape=shape)
    replay.rewind(saved[RANK] if RANK < len(saved) else 0)
    for k in range(RANK + WORLD, len(saved), WORLD) if RANK < len(saved) else [RANK % len(saved)] if saved else []:
        other = Buffer(folder(k), create=True)
        for name, turns in other.episodes.items():
            if turns[-1] < saved[k] and name not in replay.episodes:
                rows = [other.rows[i] for i in turns]
                replay.append(rows, {image: other.image(image) for row in rows for image in row["images_file_names"]})
    return replay


def save_checkpoint(cfg, step, vlm, optimizer, replay_rows):
    """Written aside and renamed: a crash leaves the old one or the new one."""
    ckpt = os.path.join(cfg.out_dir, "ckpt")
    shutil.rmtree(ckpt + ".tmp", ignore_errors=True)
    vlm.save(ckpt + ".tmp")
    torch.save(optimizer.state_dict(), os.path.join(ckpt + ".tmp", "optimizer.pt"))
    with open(os.path.join(ckpt + ".tmp", "state.json"), "w") as f:
        json.dump(dict(step=step, replay_rows=replay_rows), f)
    if os.path.exists(ckpt):
        shutil.rmtree(ckpt + ".old", ignore_errors=True)
        os.rename(ckpt, ckpt + ".old")
    os.rename(ckpt + ".tmp", ckpt)
    shutil.rmtree(ckpt + ".old", ignore_errors=True)


def git_commit():
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def main(argv):
    cfg = configure(__file__, argv, quiet=RANK > 0)
    check_config(cfg)
    join_ranks(cfg)
    say = print if RANK == 0 else lambda *text: None                       # of what all ranks know
    if cfg.dry_run:
        nowhere = tempfile.TemporaryDirectory()                            # gone with this function
        cfg.out_dir, cfg.data_episodes = nowhere.name, min(cfg.data_episodes, 64)
    make_env = env_factory(cfg)
    try:
        make_env()
    except ValueError as e:
        raise SystemExit(str(e))
    rng = lambda *what: np.random.default_rng([cfg.seed, *what])          # what: (purpose, step); streams never meet
    DATA, SAMPLE, ROLLOUT, INIT = range(4)
    path = lambda name: os.path.join(cfg.out_dir, name)
    torch.manual_seed(int(rng(INIT).integers(2 ** 31)))
    texts = ()
    if cfg.model == 'scratch':
        from pretrain.questions import corpus               # what its tokenizer is made of
        texts = corpus(20_000, readings=[make(name) for name in reading_names(cfg.env)])
    base = load_base(cfg, texts)                                           # what can fail by a user's mistake comes before anything is written
    shape = lambda reward: clip_reward(reward, cfg)
    offline = Buffer(cfg.data, shape=shape) if cfg.data else None
    if RANK == 0 or cfg.dry_run:
        open_run(cfg)
    if WORLD > 1:
        dist.barrier()

    # -- data: what was recorded (offline), what the agent plays itself (replay)
    if not cfg.data and not os.path.exists(path("data/complete")):
        if RANK == 0 or cfg.dry_run:
            shutil.rmtree(path("data"), ignore_errors=True)
            seeds = rng(DATA, 0).integers(2 ** 31, size=cfg.data_episodes).tolist()
            record(play(make_env, scripted_agent(cfg.data_mix, rng(DATA, 1), cfg.expert_episodes), seeds, split="train", prefix="data-", bar="recording data"), Buffer(path("data"), create=True))
            open(path("data/complete"), "w").close()
        while not os.path.exists(path("data/complete")):                   # the other ranks; no barrier, which would time out where recording takes hours
            time.sleep(0.2)
    offline = offline or Buffer(path("data"), shape=shape)
    stats = offline.stats()
    lowest, quantile = offline.lowest_return(cfg.gamma), offline.return_quantile(FBC_QUANTILE)

    # -- model
    vlm = build(cfg, base, lowest if cfg.q_init is None else cfg.q_init)
    actor, critic = [p for p in vlm.net.parameters() if p.requires_grad], list(vlm.heads.parameters())
    optimizer = torch.optim.AdamW([dict(params=actor, lr=cfg.lr, base=cfg.lr), dict(params=critic, lr=cfg.critic_lr, base=cfg.critic_lr)][:2 if critic else 1], betas=(0.9, 0.99), weight_decay=0.0 if cfg.lora_r else 0.01)
    autocast = lambda: torch.autocast(vlm.device.type, torch.bfloat16, enabled=vlm.bf16)

    start, saved = 0, ()
    if cfg.resume:
        ckpt = latest_checkpoint(cfg.out_dir)
        vlm.load(ckpt)
        optimizer.load_state_dict(torch.load(os.path.join(ckpt, "optimizer.pt"), map_location=vlm.device, weights_only=True))
        with open(os.path.join(ckpt, "state.json")) as f:
            state = json.load(f)
        start, saved = state["step"], np.atleast_1d(state["replay_rows"]).tolist()
        if RANK == 0:
            with open(path("metrics.jsonl")) as f:                         # what was logged behind the checkpoint will come again
                kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= start]
            with open(path("metrics.jsonl"), "w") as f:
                f.writelines(kept)
    replay = open_replay(cfg, shape, saved)
    def agree():                                                           # sums of all weights but the sharded ones, which are not `Parameter`s
        sums = [float(p.detach().sum(dtype=torch.float64)) for p in vlm.parameters() if type(p) is torch.nn.Parameter] if WORLD > 1 else []
        if any(other != (len(offline), sums) for other in gather((len(offline), sums))):
            raise SystemExit("The ranks do not hold the same data and weights: give all machines the same model, data and versions; the last checkpoint stands.")
    agree()

    # -- the derived facts
    total = cfg.offline_updates + cfg.online_updates
    count = lambda params: sum(p.numel() for p in params)
    kinds = {p.rpartition(".")[2] for p in vlm.lora}
    meta = dict(argv=argv, commit=git_commit(), ranks=WORLD, python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__, numpy=np.__version__, threads=torch.get_num_threads())
    say(f"model    {cfg.model}: {count(vlm.net.parameters()):,} parameters, {count(actor):,} trained" + (f" by LoRA r={cfg.lora_r} on {len(vlm.lora)} layers ({', '.join(sorted(kinds))})" if vlm.lora else " (all weights)")
          + f"; {len(vlm.heads)} x Q head {count(critic):,}, {'bfloat16 autocast' if vlm.bf16 else 'float32'} on {vlm.device}")
    say(f"data     {offline.folder}: {stats['episodes']} episodes, {stats['turns']} turns; goal reached {100 * stats['success']:.1f} %, summed reward > 0 {100 * stats['success_return']:.1f} %, "
          f"return {stats['episode_return']:.2f}, valid {100 * stats['valid']:.1f} %; lowest discounted return {lowest:.2f}")
    say(f"schedule {cfg.offline_updates} offline + {cfg.online_updates} online updates of {cfg.batch_size} windows x {cfg.window} turns; seed {cfg.seed}, commit {meta['commit'][:8]}"
          + (f"; {WORLD} ranks" if WORLD > 1 else "") + (f"; resumed at {start}" if start else ""))
    for name, content in (("config.json", vars(cfg)), ("meta.json", meta)) if RANK == 0 else ():
        with open(path(name), "w") as f:
            json.dump(content, f, indent=1)
    wandb = None
    if os.environ.get("WANDB_PROJECT") and RANK == 0:
        try:
            import wandb
        except ImportError:
            raise SystemExit("WANDB_PROJECT is set, which needs the package wandb: pip install wandb, or unset WANDB_PROJECT.")
        wandb.init(config=vars(cfg), dir=cfg.out_dir)

    if cfg.dry_run:
        from extras.memory import measure_memory
        cfg.batch_size, cfg.num_envs = cfg.batch_size // WORLD, max(1, cfg.num_envs // WORLD)
        with contextlib.redirect_stdout(sys.stdout if RANK == 0 else None):
            return measure_memory(vlm, optimizer, offline, cfg, autocast)

    # -- the loop
    clock, infos, vlm_began = dict(rollout=0.0, update=0.0, eval=0.0), [], time.time()
    def logged(part, s):
        return {f"{part}/{k}": s[k] for k in ("success", "success_return", "episode_return", "valid", "turns")} | {f"{part}/{env}/success": of["success"] for env, of in s.get("by_env", {}).items()}
    def timed(name, since): clock[name] += time.time() - since

    for step in tqdm(range(start, total), initial=start, total=total, disable=None if RANK == 0 else True, desc="updates"):
        online = step >= cfg.offline_updates
        extra = {}
        if online and (step - cfg.offline_updates) % cfg.updates_per_rollout == 0:
            t = time.time()
            seeds = rng(ROLLOUT, step).integers(2 ** 31, size=cfg.rollout_episodes).tolist()
            act = model_agent(vlm, cfg.max_new_tokens, 1.0, torch.Generator(vlm.device).manual_seed(seeds[RANK]), cfg.q_weight)
            act = exploring_agent(act, cfg.explore, np.random.default_rng(seeds[RANK])) if cfg.explore else act
            played = list(play(make_env, act, seeds, cfg.num_envs // WORLD, split="train", prefix=f"{step}-", share=(RANK, WORLD)))
            vlm.finish()
            record(played, replay)
            s = episode_summary(gather_episodes(played))
            if not len(replay):                                            # its browsers died, the other ranks' did not
                print(f"Rank {RANK} has no episode of its own yet: it learns from recorded ones.")
            extra = logged("rollout", s)
            timed("rollout", t)

        t = time.time()
        draw = rng(SAMPLE, step)
        torch.manual_seed(int(draw.integers(2 ** 31)) + RANK)              # LoRA dropout, if any
        n_offline = round(cfg.batch_size * cfg.offline_ratio) if online else cfg.batch_size
        windows = [(offline, w) for w in offline.sample(draw, n_offline, cfg.window, cfg.won_share)[RANK::WORLD]] if n_offline else []   # all ranks draw the same, each takes its share
        if n := cfg.batch_size // WORLD - len(windows):
            own, last = (replay, math.ceil(cfg.replay_episodes / WORLD)) if len(replay) else (offline, 0)
            windows += [(own, w) for w in own.sample(rng(SAMPLE, step, RANK) if RANK else draw, n, cfg.window, cfg.won_share, last)]
        if len(windows) > cfg.micro_batch:                                 # like beside like: less padding
            windows.sort(key=lambda part: max(len(part[0].text(i)) for i in part[1]))
        micro = [make_batch([(b, [w]) for b, w in windows[i:i + cfg.micro_batch]], vlm, envs.MARKER, cfg.gamma) for i in range(0, len(windows), cfg.micro_batch)]
        tokens = sum(m["mask"].sum() for m in micro)                       # of the whole update: gradients do not depend on the split
        critic_tokens = sum((m["mask"] * ((m["terminated"] > 0) | (m["next"] >= 0))[:, None]).sum() for m in micro)
        if WORLD > 1:
            all_sum([tokens, critic_tokens])
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * lr_at(step, cfg)
        vlm.train()
        step_infos = []
        for m in micro:
            with autocast():
                loss, info = compute_loss(vlm, m, cfg, step < cfg.filter_warmup, quantile, tokens, critic_tokens)
            loss.backward()
            step_infos.append(info)
        if WORLD > 1:
            for p in actor + critic:                                       # one that no window of this rank used, text without pictures for one
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            all_sum([p.grad for p in actor + critic] + [x for info in step_infos for x in info.values()])
        norm = torch.nn.utils.clip_grad_norm_(actor + critic, cfg.grad_clip)
        if not torch.isfinite(norm):
            raise SystemExit(f"The gradient is not finite at update {step + 1}: lower lr or critic_lr; the last checkpoint stands.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        vlm.update_target(cfg.target_tau)
        infos = infos + step_infos if RANK == 0 else []                    # who alone logs them
        timed("update", t)

        done = step + 1
        last = done == total or done == cfg.stop_at
        if cfg.eval_interval and done % cfg.eval_interval == 0 and not done == total:
            t = time.time()
            s = evaluate_policy(vlm, make_env, min(60, cfg.eval_episodes), cfg.max_new_tokens, seed=cfg.seed, q_weight=cfg.q_weight)
            extra |= logged("eval", s)
            timed("eval", t)
        if done == cfg.offline_updates and done < total:                   # what the recorded data alone gave
            t = time.time()
            results = full_evaluation(vlm, make_env, cfg.eval_episodes, cfg.max_new_tokens, seed=cfg.seed, q_weight=cfg.q_weight, only=("greedy", "sampled"), prefix="offline, ")
            if RANK == 0:
                with open(path("eval_offline.json"), "w") as f:
                    json.dump(results, f, indent=1)
            timed("eval", t)
        if RANK == 0 and (done % cfg.log_interval == 0 or extra or last):
            row = dict(step=done, phase="online" if online else "offline", **summarise(infos), grad_norm=float(norm), lr=optimizer.param_groups[0]["lr"], **extra,
                       **{f"time/{k}": round(v, 2) for k, v in clock.items()})
            with open(path("metrics.jsonl"), "a") as f:
                f.write(json.dumps(row) + "\n")
            if wandb:
                wandb.log(row, step=done)
            infos = []
            if extra or done % (5 * cfg.log_interval) == 0:
                show = lambda key, name, scale=1, form="7.3f": f" {name} {scale * row[key]:{form}}" if key in row else ""
                tqdm.write(f"{done:6d} {row['phase']:7s} nll {row['nll']:.3f}" + show("td_error", "td") + show("v_mean", "V") + show("pass_action", "pass", 100, "4.0f") + show("pass_syntax", "syntax", 100, "4.0f")
                           + show("rollout/success", "| played", 100, "5.1f") + show("rollout/success_return", "clean", 100, "5.1f") + show("eval/success", "| eval", 100, "5.1f")
                           + show("eval/success_return", "clean", 100, "5.1f") + show("eval/valid", "valid", 100, "5.1f") + "  | s " + " ".join(f"{k} {v:.0f}" for k, v in clock.items()))
        if cfg.eval_interval and done % cfg.eval_interval == 0 or last:
            agree()
            rows = gather(len(replay))
            if RANK == 0:
                save_checkpoint(cfg, done, vlm, optimizer, rows)
        if done == cfg.stop_at and done < total:
            say(f"Stopped at update {done} of {total} as stop_at says; go on with --resume=True.")
            return

    # -- how well it went
    t = time.time()
    results = offline_results(cfg.out_dir) | full_evaluation(vlm, make_env, cfg.eval_episodes, cfg.max_new_tokens, seed=cfg.seed, q_weight=cfg.q_weight)
    timed("eval", t)
    if RANK > 0:
        return
    with open(path("eval.json"), "w") as f:
        json.dump(dict(checkpoint=path("ckpt"), argv=argv, seed=cfg.seed, q_weight=cfg.q_weight, results=results), f, indent=1)
    print(f"\n{cfg.env}, {cfg.actor_loss}, seed {cfg.seed}: {time.time() - vlm_began:.0f} s ({', '.join(f'{k} {v:.0f}' for k, v in clock.items())}); {'held-out starts' if make_env().split else 'starts that training also draws'}, Wilson 95 % intervals")
    print(format_table({"the recorded data": recorded_summary(stats), **results}))
    if not vlm.lora:
        vlm.net.half().save_pretrained(path("model"))                      # a model folder to share, two bytes a weight
        vlm.processor.save_pretrained(path("model"))


def launch(argv):
    """main, and a last word where it ends early."""
    try:
        main(argv)
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted: the last checkpoint stands, go on with --resume=True." if RANK == 0 else 1)
    except SystemExit:
        time.sleep(15 * (LOCAL_RANK > 0))                                  # what all ranks find wrong is said once: torchrun ends the others when the first has ended
        raise
    except Exception:
        if WORLD > 1:
            print(f"Rank {RANK} of {WORLD} ends with the error below. If a connection was closed or timed out, another rank has died or did not come within `timeout` minutes: look for its words. "
                  "The last checkpoint stands, go on with --resume=True.", file=sys.stderr)
        raise


if __name__ == "__main__":
    launch(sys.argv[1:])
    if WORLD > 1:
        dist.destroy_process_group()
