"""
Train a vision-language model to act, off-policy: offline on recorded play, then online on its own play.

    python train.py config/numberline.py                                     # the main job, a few minutes
    python train.py config/numberline.py --actor_loss=sft --out_dir=out/sft  # an ablation
    python train.py config/numberline.py --resume=True                       # continue after a stop
    python train.py --env=my_env.py:MyEnv                                    # your own environment
    torchrun --nproc_per_node=8 train.py config/numberline.py                # the same run on eight GPUs
    python train.py --help                                                   # every key
"""
import contextlib, datetime, functools, json, math, os, platform, sys, tempfile, time

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

import envs
from agent_rl import FBC_QUANTILE, clip_reward, compute_loss, has_target
from buffer import Buffer, make_batch
from configurator import check_config, configure
from evaluate import env_factory, evaluate_policy, full_evaluation
from evaluate import episode_summary, format_table, gather_episodes, recorded_summary
from evaluate import exploring_agent, model_agent, play, record, scripted_agent
from extras import checkpoints, run_folder
from extras.check_rows import check_prompts
from extras.prefetch import Ahead, rollout_due, to_device
from extras.read_run import offline_results
from extras.serving import collect, open_server
from extras.stopping import STOP, broken_off, explained
from extras.unlogged import Unlogged
from extras.value_checks import check_out_dir
from extras.whole_files import replacing, write_json
from extras.wandb_log import import_wandb, start_wandb
from model import build, gather, load_base
from worlds.calls import check_environment, make_or_refuse
from worlds.players import NEED_EXPERT, has_expert
from worlds.registry import is_file, make, reading_names, task_names

# --- config ---
# main settings
out_dir = 'out/run'  # folder for everything that this run writes
resume = False  # continue from the last checkpoint; more online_updates than before extend the run
overwrite = False  # delete the run that is in out_dir and start again
seed = 0  # every random draw is a function of (seed, purpose, step)
env = 'NumberLine'  # a world; 'NumberLine,EZPoints': several in turn; my_env.py:MyEnv: your own
size = 80  # side of the picture, pixels
max_turns: int = None  # turns until an episode is cut off; None: the environment's own limit
model = 'bases/tiny-vlm'  # folder or hub id of an image-text-to-text model; 'scratch': random weights
data = ''  # folder of recorded episodes; '': record data_episodes of scripted play
data_mix = {'expert': 0.3, 'random': 0.5, 'malformed': 0.2}  # players of a turn and their shares
expert_episodes = 0.0  # share of the recorded episodes that the expert plays alone
data_episodes = 600  # episodes to record
actor_loss = 'afsft'  # what is cloned. sft: all | afsft: A > beta | awr: by exp(A) | fbc: good episodes
offline_updates = 600  # updates on the recorded data
online_updates = 200  # updates on recorded data and the agent's own play
batch_size = 32  # windows per update
lr = 4e-3  # peak learning rate of the adapters, or of all weights if lora_r = 0
gamma = 0.9  # discount per turn
won_share: float = None  # share of windows from episodes that reached the goal; None: as they come
q_weight = 0.0  # rollouts and evaluations sample from pi * exp(q_weight * A)
explore = 0.0  # share of a rollout's turns that are random, for actions that no data shows
max_new_tokens = 20  # longest reply
eval_interval = 100  # updates between two checkpoints and short evaluations; 0: at the end only
eval_episodes = 300  # episodes per row of the final table
# ablations
trace = 'tree'  # tree: tree backup across turns | plain: TD(lambda) in a turn | turn: one value per reply
lam = 1.0  # decay of the trace per token; 0: one-token TD
beta = 0.0  # afsft clones a token if A > beta
filter_warmup = 50  # updates in which every token is cloned, because a young critic is noise
bc_coef = 0.0  # weight of plain cloning, in addition to the filtered loss
critic_coef = 3.0  # weight of the critic's loss
pess_coef = 0.5  # weight of the pull of all Q values to q_init; 0: none
q_init = -0.5  # value of an untrained Q head, to be below what good play returns
q_head = 'tied'  # tied: an MLP and the frozen unembedding | full: an MLP and a layer over the vocabulary
n_critics = 1  # Q heads; targets take the lowest of them
target_tau = 0.1  # step of the target heads' moving average per update
reward_clip = 1.0  # the critic learns from rewards cut to +-reward_clip; 0: as they are
penalty = -0.3  # reward of a reply that does not parse; the environment does not move
window = 3  # consecutive turns per window
offline_ratio = 0.25  # share of an online batch that comes from the recorded data
replay_episodes = 0  # online batches draw from this many latest episodes of the agent; 0: from all
rollout_episodes = 64  # whole episodes per rollout
updates_per_rollout = 20  # online updates between two rollouts
lora_r = 16  # rank of the adapters; 0: train all weights
lora_targets = '.*'  # regex over full module paths of the language model's linear layers
modules_to_save = ''  # regex of modules trained in full beside LoRA; with lora_r = 0: nothing else is
critic_lr = 2e-3  # peak learning rate of the Q heads
min_lr = 0.1  # the cosine schedule ends at min_lr * lr
warmup_updates = 20  # updates of linear warm-up
grad_clip = 1.0  # largest norm of the gradient
# machine
device = 'auto'  # auto | cpu | cuda
dtype = 'auto'  # auto | float32 | bfloat16 (autocast); auto: bfloat16 on cuda, float32 on the cpu
micro_batch = 32  # windows on the device at once
num_envs = 32  # environments that play at once
rollout_url = ''  # play rollouts on this vLLM server, see docs/serving.md; '': here
env_timeout = 120.0  # seconds that one call of an environment may take, then it is made anew; 0: any
grad_checkpointing = False  # less memory for about a third more time
compile = False  # compile the decoder layers for updates, meant for a GPU: minutes at the start
shard = False  # with torchrun: spread the frozen layers over the ranks (FSDP2)
vision_cache_mb = 0  # MiB for features of the frozen vision tower; 0: compute them every time
trust_remote_code = False  # run the Python files that come with the model folder
log_interval = 10  # updates between two lines of metrics.jsonl
stop_at = 0  # stop after this update, to be resumed; 0: run to the end
dry_run = False  # only measure the peak memory of an update and a rollout; writes nothing
# --- end of config ---

DATA, SAMPLE, ROLLOUT, INIT = range(4)  # purposes of random streams
QUICK_EPISODES = 60  # episodes of a short evaluation
TIMEOUT_MINUTES = 30  # how long a rank waits for the others

# torchrun tells each process its rank, its rank on this machine, and the number of ranks
LAUNCHER = os.environ if dist.is_torchelastic_launched() else dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1)
RANK, LOCAL_RANK, WORLD = [int(LAUNCHER[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]

def stream(cfg, *purpose):
    """Make the random generator of a purpose and step: each has its own, so resuming is exact."""
    return np.random.default_rng([cfg.seed, *purpose])

def in_run(cfg, name):
    """Join out_dir and a file name."""
    return os.path.join(cfg.out_dir, name)

def settings(argv):
    """Read the block above, config files and flags; a mistake ends the run with one sentence."""
    cfg = configure(__file__, argv, quiet=RANK > 0)
    check_config(cfg)
    if not cfg.dry_run:
        check_out_dir(cfg.out_dir)
    join_ranks(cfg)
    import_wandb(RANK)
    return cfg

def checked_env(cfg):
    """Make the function that makes the run's environment, or end with one sentence if it does not fit."""
    make_env = env_factory(cfg)
    players = {"random"}
    if not cfg.data:
        players = {name for name, share in cfg.data_mix.items() if share > 0}
        if cfg.expert_episodes > 0:
            players.add("expert")
    env = check_environment(make_env, f"env={cfg.env!r}", sorted(players))
    if cfg.online_updates and not env.online:
        raise SystemExit(f"env={cfg.env!r} asks questions with one right answer and has no online phase: set "
                         "online_updates=0.")
    if players & set(NEED_EXPERT) and not has_expert(env):
        raise SystemExit(f"env={cfg.env!r} has no expert(), and data_mix or expert_episodes ask for one: set "
                         "data_mix={'random': 1.0} and expert_episodes=0, or write an expert().")
    return make_env

def open_base(cfg):
    """Load the base model -> (net, processor). model='scratch' also trains a tokenizer on questions."""
    torch.manual_seed(int(stream(cfg, INIT).integers(2**31)))
    texts = ()
    if cfg.model == "scratch":
        from pretrain.questions import corpus

        readings = [make(name) for name in reading_names(cfg.env)]
        texts = corpus(20_000, readings=readings)
    return load_base(cfg, texts)


# ---- ranks ----

def join_ranks(cfg):
    """Join the process group under torchrun; without torchrun do nothing.

    Keys count for all ranks together, so that a config means the same on one GPU and on eight.
    Only micro_batch and vision_cache_mb are per device.
    """
    if WORLD == 1:
        if cfg.shard:
            raise SystemExit("shard=True spreads a model over several ranks: start it as torchrun "
                             "--nproc_per_node=2 train.py ..., or leave shard out.")
        return
    if cfg.batch_size % WORLD:
        raise SystemExit(f"batch_size={cfg.batch_size} windows cannot be divided evenly among {WORLD} ranks: "
                         f"set a multiple of {WORLD}.")
    shared = ("eval_episodes", "num_envs", "rollout_episodes")
    for key in shared[: 3 if cfg.online_updates else 1]:
        if getattr(cfg, key) < WORLD:
            raise SystemExit(f"{key}={getattr(cfg, key)} is too few for {WORLD} ranks, which share them: set "
                             f"at least {WORLD}.")
    if cfg.device != "cpu" and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if LOCAL_RANK >= gpus:
            raise SystemExit("torchrun started more ranks on this machine than it has GPUs: use "
                             f"--nproc_per_node={gpus}.")
        torch.cuda.set_device(LOCAL_RANK)
    if not dist.is_initialized():
        # NCCL for tensors on GPUs, gloo for others
        dist.init_process_group(timeout=datetime.timedelta(minutes=TIMEOUT_MINUTES))

def sum_over_ranks(tensors):
    """Sum each tensor over the ranks, in place, in one message.

    This is how several GPUs agree on a gradient. There is no DDP around the network: the loss divides by
    counts over the whole update, so gradients are summed and not averaged, once per update and not once per
    backward pass. Adapters are a few MB.
    """
    if WORLD == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    sizes = [t.numel() for t in tensors]
    for t, total in zip(tensors, flat.split(sizes)):
        t.copy_(total.view_as(t))


# ---- the run folder ----

def open_run(cfg):
    """Make out_dir and become its only writer -> the checkpoint to go on from, None for a new run.

    Two runs are never mixed, and no run is lost: what does not fit is refused with one sentence.
    """
    checkpoint = None
    if RANK == 0:
        checkpoint = run_folder.claim(cfg, data_recipe(cfg))
    checkpoint = gather(checkpoint)[0]
    run_folder.enter(cfg, checkpoint)
    return checkpoint

def count(params):
    """Count the numbers in some tensors."""
    return sum(p.numel() for p in params)

def describe(cfg, argv, vlm, data, start):
    """Print what is about to run, and write config.json and meta.json."""
    if RANK > 0:
        return
    meta = dict(argv=argv, commit=run_folder.git_commit(), ranks=WORLD, threads=torch.get_num_threads())
    meta |= dict(python=platform.python_version(), torch=torch.__version__)
    meta |= dict(transformers=transformers.__version__, numpy=np.__version__)
    write_json(in_run(cfg, "config.json"), vars(cfg))
    write_json(in_run(cfg, "meta.json"), meta)

    actor, critic = trained_parameters(vlm)
    trained = f"{count(actor):,} trained"
    if vlm.lora:
        layers = sorted({path.rpartition(".")[2] for path in vlm.lora})
        trained += f" by LoRA r={cfg.lora_r} on {len(vlm.lora)} layers ({', '.join(layers)})"
    if vlm.saved.paths:
        trained += f", in full {', '.join(vlm.saved.paths)}"
    precision = "bfloat16 autocast" if vlm.bf16 else "float32"
    print(f"model    {cfg.model}: {count(vlm.net.parameters()):,} parameters, {trained}; {len(vlm.heads)} x "
          f"Q head {count(critic):,}, {precision} on {vlm.device}")
    stats = data.stats()
    print(f"data     {data.folder}: {stats['episodes']} episodes, {stats['turns']} turns; goal reached "
          f"{100 * stats['success']:.1f} %, summed reward > 0 {100 * stats['success_return']:.1f} %, return "
          f"{stats['episode_return']:.2f}, valid {100 * stats['valid']:.1f} %; lowest discounted return "
          f"{data.lowest_return(cfg.gamma):.2f}")
    lowest, highest = data.reward_range()
    if vlm.heads and cfg.reward_clip and max(-lowest, highest) > cfg.reward_clip:
        print(f"         rewards {lowest:g} to {highest:g}: the critic learns from them cut to "
              f"+-{cfg.reward_clip:g} (reward_clip)")
    schedule = f"{cfg.offline_updates} offline + {cfg.online_updates} online updates"
    if WORLD > 1:
        schedule += f" on {WORLD} ranks"
    if start:
        schedule += f", resumed at {start}"
    print(f"schedule {schedule}, {cfg.batch_size} windows x {cfg.window} turns each; seed {cfg.seed}, commit "
          f"{meta['commit'][:8]}")


# ---- data: what was recorded, and what the agent plays ----

def open_data(cfg, folder):
    """Open a folder of recorded episodes, and look at every picture once, before hours of work."""
    data = Buffer(folder, reward_fn=functools.partial(clip_reward, cfg=cfg))
    if RANK == 0:
        data.check_images()
    return data

def given_data(cfg):
    """Open the folder of episodes that cfg.data names; None if it names none."""
    if not cfg.data:
        return None
    return open_data(cfg, cfg.data)

def record_data(cfg, make_env, buffer):
    """Record data_episodes episodes of scripted players, on training starts."""
    seeds = stream(cfg, DATA, 0).integers(2**31, size=cfg.data_episodes)
    act = scripted_agent(cfg.data_mix, stream(cfg, DATA, 1), cfg.expert_episodes)
    options = dict(split="train", prefix="data-", bar="recording data")
    record(play(make_env, act, seeds.tolist(), **options), buffer)

def data_recipe(cfg):
    """List the settings that decide what is recorded, and the digests of the user's own environments."""
    keys = ("seed", "env", "size", "max_turns", "penalty", "data_mix", "expert_episodes", "data_episodes")
    recipe = {key: getattr(cfg, key) for key in keys}
    for task in filter(is_file, task_names(cfg.env)):
        file = task.rpartition(":")[0]
        recipe[file] = checkpoints.file_digest(file)
    return recipe

def scripted_data(cfg, make_env):
    """Open out_dir/data, where the play of scripted players is recorded once."""
    folder = in_run(cfg, "data")
    if not os.path.exists(folder) and (RANK == 0 or cfg.dry_run):
        with run_folder.recording(folder, data_recipe(cfg)) as aside:
            record_data(cfg, make_env, Buffer(aside, create=True))
    # The other ranks wait here. A barrier would time out where recording takes hours.
    while not os.path.exists(folder):
        time.sleep(0.2)
    return open_data(cfg, folder)

def open_replay(cfg, rows):
    """Open this rank's own play, as the checkpoint knows it.

    rows: how many rows each rank's folder had at the checkpoint; later ones are played again.
    Where the number of ranks has changed, rank k % WORLD takes in what rank k had, and a new rank copies
    another's. A rank writes to its own folder only and behind the checkpoint's rows, so a crash before the
    next checkpoint loses nothing.
    """
    folders = [run_folder.replay_folder(cfg.out_dir, rank) for rank in range(max(WORLD, len(rows)))]
    clip = functools.partial(clip_reward, cfg=cfg)
    replay = Buffer(folders[RANK], create=True, reward_fn=clip)
    replay.rewind(rows[RANK] if RANK < len(rows) else 0)
    replay.check_images()
    others = []
    if RANK < len(rows):
        others = range(RANK + WORLD, len(rows), WORLD)
    elif rows:
        others = [RANK % len(rows)]
    for rank in others:
        take_in(replay, Buffer(folders[rank], create=True), rows[rank])
    return replay

def take_in(replay, other, limit):
    """Copy the episodes among the first `limit` rows of another rank's play that are not there yet."""
    for name, turns in other.episodes.items():
        if turns[-1] >= limit or name in replay.episodes:
            continue
        rows = [other.rows[i] for i in turns]
        names = [name for row in rows for name in row["images_file_names"]]
        replay.append(rows, {name: other.image(name) for name in names})

def rollout(cfg, step, vlm, make_env, replay, server=None):
    """Play rollout_episodes with the present policy, append them to the replay -> numbers for the log.

    server: plays instead of the network here, see extras/serving.py; what it fails to play is left out.
    An exception if a signal or the environments broke it off: then nothing has been appended, and a resumed
    run plays it again.
    """
    seeds = stream(cfg, ROLLOUT, step).integers(2**31, size=cfg.rollout_episodes).tolist()
    generator = torch.Generator(vlm.device).manual_seed(seeds[RANK])
    act = model_agent(vlm, cfg.max_new_tokens, 1.0, generator, cfg.q_weight)
    if server:
        act = server.take_policy(vlm, step)
    if cfg.explore:
        act = exploring_agent(act, cfg.explore, np.random.default_rng(seeds[RANK]))
    options = dict(split="train", prefix=f"{step}-", share=(RANK, WORLD))
    try:
        with STOP.at_once():
            played = collect(play(make_env, act, seeds, cfg.num_envs // WORLD, **options))
    except (KeyboardInterrupt, SystemExit) as error:
        if server:
            server.release()
        if WORLD > 1:
            raise
        return error
    vlm.finish()
    record(played, replay)
    if not len(replay):
        # all episodes of this rank were lost
        print(f"Rank {RANK} has no episode of its own yet: it learns from recorded ones.")
    played = gather_episodes(played)
    if not server:
        return logged("rollout", episode_summary(played))
    server.release()
    summary = logged("rollout", episode_summary(played)) if played else {}
    return summary | server.numbers()

def draw_windows(cfg, step, data, replay):
    """Draw this rank's windows of an update -> list of (buffer, window).

    All ranks draw the same recorded windows and each takes its share. Own play comes from the rank's own
    replay.
    """
    online = step >= cfg.offline_updates
    rng = stream(cfg, SAMPLE, step)
    # the first number seeds torch, see update
    rng.integers(2**31)

    n_recorded = round(cfg.batch_size * cfg.offline_ratio) if online else cfg.batch_size
    windows = []
    if n_recorded:
        drawn = data.sample(rng, n_recorded, cfg.window, cfg.won_share)
        windows = [(data, window) for window in drawn[RANK::WORLD]]

    n_own = cfg.batch_size // WORLD - len(windows)
    if n_own:
        # a rank without play of its own learns from recorded play
        own = replay if len(replay) else data
        latest = math.ceil(cfg.replay_episodes / WORLD) if len(replay) else 0
        if RANK:
            rng = stream(cfg, SAMPLE, step, RANK)
        drawn = own.sample(rng, n_own, cfg.window, cfg.won_share, latest)
        windows += [(own, window) for window in drawn]

    # micro-batches of similar length need less padding
    if len(windows) > cfg.micro_batch:
        windows.sort(key=lambda part: max(len(part[0].prompt_text(row)) for row in part[1]))
    return windows


# ---- the update ----

def lr_at(step, cfg):
    """Compute the factor on the learning rates: linear warm-up, then a cosine down to min_lr."""
    if step < cfg.warmup_updates:
        return (step + 1) / cfg.warmup_updates
    total = cfg.offline_updates + cfg.online_updates
    done = (step - cfg.warmup_updates) / max(1, total - cfg.warmup_updates)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return cfg.min_lr + (1 - cfg.min_lr) * cosine

def trained_parameters(vlm):
    """List the parameters of the actor (adapters, or all weights) and of the critics."""
    actor = [p for p in vlm.net.parameters() if p.requires_grad]
    return actor, list(vlm.heads.parameters())

def make_optimizer(vlm, cfg):
    """Make AdamW with a group for the actor and one for the critics; LoRA has no weight decay."""
    actor, critic = trained_parameters(vlm)
    groups = [dict(params=actor, lr=cfg.lr, base=cfg.lr)]
    if critic:
        groups.append(dict(params=critic, lr=cfg.critic_lr, base=cfg.critic_lr))
    decay = 0.0 if cfg.lora_r else 0.01
    # one kernel for all parameters on a GPU
    fused = vlm.device.type == "cuda" or None
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=decay, fused=fused)

def build_agent(cfg, base, data, server=None):
    """Put adapters and critics on the base -> (vlm, optimizer).

    End if it cannot read the data's prompts, or the server that will play does not take such adapters.
    """
    vlm = build(cfg, base)
    check_prompts(data, vlm)
    if server:
        server.try_adapters(vlm)
    return vlm, make_optimizer(vlm, cfg)

def count_tokens(batches):
    """Count the reply tokens of an update, and those whose target is known, over all ranks."""
    tokens = sum(b["mask"].sum() for b in batches)
    critic_tokens = 0
    for b in batches:
        critic_tokens = critic_tokens + (b["mask"] * has_target(b)[:, None]).sum()
    sum_over_ranks([tokens, critic_tokens])
    return tokens, critic_tokens

def backward(cfg, step, vlm, batches, quantile):
    """Compute the gradient of an update, one micro-batch at a time -> infos of the micro-batches."""
    # the loss divides by the tokens of the whole update, so gradients do not depend on how it is split
    tokens, critic_tokens = count_tokens(batches)
    vlm.train()
    warm = step < cfg.filter_warmup
    infos = []
    for b in batches:
        with vlm.autocast():
            loss, info = compute_loss(vlm, b, cfg, warm, quantile, tokens, critic_tokens)
        loss.backward()
        infos.append(info | dict(loss=loss.detach()))
    return infos

def build_batches(cfg, vlm, windows):
    """Turn the windows of an update into its micro-batches, on the CPU."""
    batches = []
    for i in range(0, len(windows), cfg.micro_batch):
        parts = [(buffer, [window]) for buffer, window in windows[i : i + cfg.micro_batch]]
        batches.append(make_batch(parts, vlm, envs.MARKER, cfg.gamma, "cpu"))
    return batches

def update(cfg, step, vlm, optimizer, windows, quantile, unlogged, batches=None):
    """Make one optimizer step on the windows -> {grad_norm, lr}; the other metrics go to `unlogged`.

    batches: the windows as micro-batches, if they are built already. The device is waited for once.
    """
    batches = [to_device(batch, vlm.device) for batch in batches or build_batches(cfg, vlm, windows)]
    # what is random inside the network, such as a dropout that you add, depends on (seed, step, rank) alone
    torch.manual_seed(int(stream(cfg, SAMPLE, step).integers(2**31)) + RANK)

    # determine and set the learning rate for this update
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * lr_at(step, cfg)

    # forward and backward; sum the gradients over the ranks, clip them
    infos = backward(cfg, step, vlm, batches, quantile)
    actor, critic = trained_parameters(vlm)
    params = actor + critic
    if WORLD > 1:
        for p in params:
            # no window of this rank used it, a text without pictures for one
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        sum_over_ranks([p.grad for p in params] + [x for info in infos for x in info.values()])
    norm = torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip)
    numbers = dict(lr=optimizer.param_groups[0]["lr"])

    # step, unless that would spoil the weights
    loss = sum(info["loss"] for info in infos)
    norm, loss = torch.stack([norm, loss]).tolist()
    if math.isfinite(norm + loss):
        optimizer.step()
        vlm.update_target(cfg.target_tau)
        unlogged.infos += infos
        unlogged.in_a_row = 0
        unlogged.learned = True
        numbers = dict(grad_norm=norm, **numbers)
    else:
        unlogged.skip(cfg, step, windows)
    optimizer.zero_grad(set_to_none=True)
    return numbers


# ---- checkpoints ----

def save_checkpoint(cfg, step, vlm, optimizer, data, replay, unlogged):
    """Write a checkpoint, with all that a resumed run needs to end with the same bytes."""
    of_ranks = gather(checkpoints.describe_play(replay))
    if RANK > 0:
        return
    checkpoints.check_finite(vlm, step)
    state = dict(step=step, replay_rows=[noted["rows"] for noted in of_ranks])
    state["replay_digests"] = [noted["digest"] for noted in of_ranks]
    state |= dict(data=checkpoints.describe_play(data), unlogged=unlogged.state())
    with checkpoints.new_checkpoint(cfg.out_dir, state) as folder:
        vlm.save(folder)
        with open(os.path.join(folder, "optimizer.pt"), "wb") as f:
            torch.save(optimizer.state_dict(), f)

def restore(cfg, checkpoint, vlm, optimizer, data):
    """Load a checkpoint, if there is one, into vlm and optimizer -> (first update, replay, unlogged)."""
    if checkpoint is None:
        return 0, open_replay(cfg, []), Unlogged()
    state = checkpoints.read_state(checkpoint)
    checkpoints.check_data(data, state["data"])
    vlm.load(checkpoint)
    checkpoints.load_moments(os.path.join(checkpoint, "optimizer.pt"), vlm, optimizer)
    step = state["step"]
    if WORLD > 1:
        # every rank has read it: its folder may be renamed now
        dist.barrier()
    if RANK == 0:
        run_folder.rewind_metrics(in_run(cfg, "metrics.jsonl"), step)
        checkpoints.set_damaged_aside(cfg.out_dir, checkpoint)
    replay = open_replay(cfg, [noted["rows"] for noted in state["replay"]])
    return step, replay, Unlogged(**state["unlogged"])


# ---- logs and evaluations ----

@contextlib.contextmanager
def timed(clock, name):
    """Add the seconds of a with block to clock[name]."""
    began = time.time()
    yield
    clock[name] += time.time() - began

def logged(part, summary):
    """Pick the numbers of an episode_summary that go into metrics.jsonl, as {'rollout/success': ...}."""
    row = {}
    for key in ("success", "success_return", "episode_return", "valid", "turns"):
        row[f"{part}/{key}"] = summary[key]
    for env, one in summary.get("by_env", {}).items():
        row[f"{part}/{env}/success"] = one["success"]
    return row

def log(cfg, done, numbers, clock, wandb):
    """Append a row to metrics.jsonl, and to Weights & Biases if it runs; print some rows on the console."""
    if RANK > 0:
        return
    row = dict(step=done, phase="online" if done > cfg.offline_updates else "offline")
    row |= numbers
    for name, seconds in clock.items():
        row[f"time/{name}"] = round(seconds, 2)
    with open(in_run(cfg, "metrics.jsonl"), "a") as f:
        f.write(json.dumps(row) + "\n")
    if wandb:
        wandb.log(row, step=done)
    played = "rollout/success" in row or "eval/success" in row
    if played or done % (5 * cfg.log_interval) == 0:
        tqdm.write(console_line(row, clock))

def console_line(row, clock):
    """Format a row of metrics for the console."""
    values = {"td_error": "td", "v_mean": "V"}
    shares = {"pass_action": "pass", "pass_syntax": "syntax"}
    shares |= {"rollout/success": "| played", "rollout/success_return": "clean"}
    shares |= {"eval/success": "| eval", "eval/success_return": "clean", "eval/valid": "valid"}
    line = f"{row['step']:6d} {row['phase']:7s} nll {row.get('nll', math.nan):.3f}"
    for key, name in values.items():
        if key in row:
            line += f" {name} {row[key]:7.3f}"
    for key, name in shares.items():
        if key in row:
            line += f" {name} {100 * row[key]:5.1f}"
    seconds = " ".join(f"{name} {value:.0f}" for name, value in clock.items())
    return f"{line}  | s {seconds}"

def look(cfg, done, vlm, make_env):
    """Evaluate where it is due -> numbers for the log.

    A short evaluation goes with every checkpoint. A full one after the offline phase shows what the recorded
    data alone gave; it is written to eval_offline.json.
    """
    numbers = {}
    total = cfg.offline_updates + cfg.online_updates
    if checkpoint_due(cfg, done) and done < total:
        episodes = min(max(QUICK_EPISODES, WORLD), cfg.eval_episodes)
        numbers = logged("eval", evaluate_policy(vlm, make_env, cfg, episodes))
    if done == cfg.offline_updates and done < total:
        only = ("greedy", "sampled")
        results = full_evaluation(vlm, make_env, cfg, only=only, prefix="offline, ")
        if RANK == 0:
            write_json(in_run(cfg, "eval_offline.json"), results)
    return numbers

def reason_to_stop(cfg, done):
    """Say why the run stops after `done` updates, '' if it goes on: a signal to any rank, or stop_at."""
    signals = [name for name in gather(STOP.signal) if name]
    if signals:
        return signals[0]
    is_early = done == cfg.stop_at < cfg.offline_updates + cfg.online_updates
    return "stop_at" if is_early else ""

def leave(done, reason):
    """Say how to go on; a scheduler that has sent a signal reads from the exit code that there is more."""
    sentence = f"Stopped at update {done} as {reason} says; continue with --resume=True."
    if reason != "stop_at":
        raise SystemExit(sentence if RANK == 0 else 1)
    if RANK == 0:
        print(sentence)

def checkpoint_due(cfg, done):
    """Tell whether a checkpoint is due after `done` updates."""
    return cfg.eval_interval > 0 and done % cfg.eval_interval == 0

def final_evaluation(cfg, argv, vlm, make_env, data, clock):
    """Evaluate the trained agent, write eval.json, print the table."""
    # all is saved: a signal may end the run at once
    STOP.waits = False
    with timed(clock, "eval"):
        results = full_evaluation(vlm, make_env, cfg)
    results = offline_results(cfg.out_dir) | results
    if RANK > 0:
        return
    content = dict(checkpoint=in_run(cfg, "ckpt"), argv=argv, seed=cfg.seed, q_weight=cfg.q_weight)
    content["results"] = results
    write_json(in_run(cfg, "eval.json"), content)
    if not vlm.lora:
        # all weights were trained: a model folder to share, two bytes a weight
        with replacing(in_run(cfg, "model")) as aside:
            vlm.net.half().save_pretrained(aside)
            vlm.processor.save_pretrained(aside)
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in clock.items())
    starts = "held-out starts" if make_or_refuse(make_env).split else "starts that training also draws"
    print(f"\n{cfg.env}, {cfg.actor_loss}, seed {cfg.seed}: {sum(clock.values()):.0f} s ({seconds}); "
          f"{starts}, Wilson 95 % intervals")
    print(format_table({"the recorded data": recorded_summary(data.stats()), **results}))

def measure(cfg, argv, base, make_env, data):
    """Print the peak memory of an update and of a rollout, leaving nothing behind -> {part: bytes}."""
    from extras.memory import measure_memory

    with tempfile.TemporaryDirectory() as folder:
        cfg.out_dir = folder
        cfg.data_episodes = min(cfg.data_episodes, 64)
        data = data or scripted_data(cfg, make_env)
        vlm, optimizer = build_agent(cfg, base, data)
        describe(cfg, argv, vlm, data, 0)
        cfg.batch_size = cfg.batch_size // WORLD
        cfg.num_envs = max(1, cfg.num_envs // WORLD)
        with contextlib.redirect_stdout(sys.stdout if RANK == 0 else None):
            return measure_memory(vlm, optimizer, data, cfg, vlm.autocast)

@explained(RANK)
def main(argv):
    """Train as the settings say: play, learn, look, log, save."""
    # what can fail because of a user's mistake comes first, before anything is written
    cfg = settings(argv)
    make_env = checked_env(cfg)
    base = open_base(cfg)
    data = given_data(cfg)
    if cfg.dry_run:
        return measure(cfg, argv, base, make_env, data)
    server = open_server(cfg, base, make_env)
    checkpoint = open_run(cfg)

    # recorded play; adapters and critics on the base; the last checkpoint of a resumed run
    data = data or scripted_data(cfg, make_env)
    vlm, optimizer = build_agent(cfg, base, data, server)
    start, replay, unlogged = restore(cfg, checkpoint, vlm, optimizer, data)
    checkpoints.check_ranks_agree(data, vlm)
    describe(cfg, argv, vlm, data, start)
    wandb = start_wandb(cfg, RANK)

    total = cfg.offline_updates + cfg.online_updates
    quantile = data.return_quantile(FBC_QUANTILE)
    clock = dict(rollout=0.0, update=0.0, eval=0.0)
    ahead = Ahead(draw_windows, build_batches, cfg, vlm, data, replay)
    STOP.waits = True
    for step in tqdm(range(start, total), "updates", total, initial=start, disable=RANK > 0 or None):
        played = {}

        # play: the agent's own episodes
        if rollout_due(cfg, step):
            with timed(clock, "rollout"):
                played = rollout(cfg, step, vlm, make_env, replay, server)
            if isinstance(played, BaseException):
                save_checkpoint(cfg, step, vlm, optimizer, data, replay, unlogged)
                raise broken_off(played)

        # learn: one optimizer step on windows of recorded and own play
        with timed(clock, "update"):
            with ahead.take(step) as (windows, batches):
                step_row = update(cfg, step, vlm, optimizer, windows, quantile, unlogged, batches)

        # look: short evaluations on the way, a full one where the offline phase ends
        done = step + 1
        with timed(clock, "eval"):
            looked = look(cfg, done, vlm, make_env)

        # log: a line of metrics.jsonl, now and then one on the console
        if done % cfg.log_interval == 0 or played or looked or done == total:
            log(cfg, done, unlogged.take() | step_row | played | looked, clock, wandb)

        # save: a checkpoint, from which the run can be resumed exactly
        reason = reason_to_stop(cfg, done)
        if reason or done == total or checkpoint_due(cfg, done) and not unlogged.in_a_row:
            checkpoints.check_ranks_agree(data, vlm)
            save_checkpoint(cfg, done, vlm, optimizer, data, replay, unlogged)
        if reason:
            return leave(done, reason)

    # how well it went
    final_evaluation(cfg, argv, vlm, make_env, data, clock)

def launch(argv):
    """Run main, and explain an early end."""
    STOP.listen()
    try:
        main(argv)
    except SystemExit:
        # What all ranks find wrong is said once: torchrun ends the others when the first has ended.
        if LOCAL_RANK > 0:
            time.sleep(15)
        raise
    except Exception:
        if WORLD > 1:
            print(
                f"Rank {RANK} of {WORLD} ends with the error below. If a connection was closed or timed out, "
                f"another rank has died or was {TIMEOUT_MINUTES} minutes late: look for its message. "
                "The last checkpoint is still there, continue with --resume=True.",
                file=sys.stderr,
            )
        raise


if __name__ == "__main__":
    launch(sys.argv[1:])
    if WORLD > 1:
        dist.destroy_process_group()
