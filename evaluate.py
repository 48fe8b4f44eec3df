"""
How well it went: success with intervals, return, share of valid actions; greedy and sampled, with the picture and without.

    python evaluate.py out/numberline                                   # a trained run, on held-out starts
    python evaluate.py out/numberline --episodes=1000 --temperature=0.5
    python evaluate.py out/numberline --agent=expert                    # another player on the same starts; --save=data/x records it, on training starts
    python evaluate.py --env=NumberLine --agent=human --save=data/me    # without a run; a config file works too: config/ezpoints.py --agent=...
    python evaluate.py --agent=openai --base_url=http://localhost:8000/v1 --model=NAME --env=NumberLine --episodes=200 --save=data/teacher
    python evaluate.py out/numberline --report                          # out/numberline/report.html to look at, a GIF a game, curves.svg
    python evaluate.py out/numberline/data --report                     # a folder of episodes, as that run's critic sees it
"""
import functools, json, math, os, sys, tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import envs
from buffer import Buffer, make_row
from configurator import ConfigError, check_config, configure, parse_block
from worlds.registry import make
from model import build, gather, latest_checkpoint, ranks

# --- config ---
episodes: int = None # episodes of each table row; None: the run's eval_episodes
agent = ''           # who plays: '' the run's model; openai: a model behind a server; human: a person at the terminal; expert, random, malformed, biased: a script
env = ''             # what `agent` plays where no run says so: the environment, and the side of its picture in pixels; '' and None: train.py's, or the config file's
size: int = None
save = ''            # folder to record into: an agent's episodes, then on training starts, or the model's sampled ones; '' records nothing
temperature = 1.0    # of the sampled row, of the server's model
q_weight: float = None # sample from pi * exp(q_weight * A), the critic corrects the policy at play; 0: the policy alone; None: as the run was trained
seed = 0             # of the sampling; the held-out starts do not depend on it
report = False       # write report.html: the table, the curves, and episodes with what the critic thinks of every token
report_episodes = 100 # at most that many on the page
critic = ''          # run folder whose critic judges a folder of episodes; '': the run that the folder lies in, if there is one
# agent=openai: any server of the chat-completions protocol (vLLM, SGLang, llama.cpp, a vendor)
base_url = ''        # for instance http://localhost:8000/v1
model = ''           # its name there
api_key_env = 'OPENAI_API_KEY' # the environment variable that holds the key, if the server wants one; the key itself is never written anywhere
max_tokens = 256     # of a reply
num_envs = 32        # episodes that an agent plays at once, so the number of requests at once (a person plays one)
timeout = 60.0       # seconds until an answer must be there, whole
retries = 6          # of a request that failed, after 1, 2, 4, ... seconds, or when the server says; then its episode is given up
# --- end of config ---

PLAYERS = ("expert", "random", "malformed", "biased")
TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")   # its config block has the settings of a run, and their defaults
TEST_SEEDS = 10 ** 6  # held-out starts are drawn by seeds from here on


def wilson(k, n, z=1.96):
    """95 % interval of a share k / n (Wilson 1927): (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    p, c = k / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (p + z * z / (2 * n) - half) / c), min(1.0, (p + z * z / (2 * n) + half) / c)


def env_factory(run_cfg):
    """make_env of a run, for `play`: its environment, or its several."""
    return lambda: make(run_cfg.env, size=run_cfg.size, penalty=run_cfg.penalty, max_turns=run_cfg.max_turns)


def held_out_seeds(env, n):
    """n seeds of starts that training never draws (all of them where a game is too small to hold some out), as many different
    ones as there are. A seed is not a state: starts are told apart by `env.fingerprint()`. Of several tasks seed i is task i's, modulo their number."""
    if tasks := getattr(env, "tasks", None):
        named = Counter(task.name for task in tasks)             # who is named twice plays twice as many starts, not the same ones twice
        seeds = {task.name: iter(held_out_seeds(task, named[task.name] * -(-n // len(tasks)))) for task in tasks}
        return [next(seeds[tasks[i % len(tasks)].name]) for i in range(n)]
    seeds, seen, tries = [], set(), 0
    while len(seeds) < n and tries < (4 * n if env.max_parallel else 500 + 20 * n):     # where starts are slow to draw, some may come twice
        env.reset(seed=TEST_SEEDS + tries, options={"split": "test"})
        if env.fingerprint() not in seen:
            seen.add(env.fingerprint())
            seeds.append(TEST_SEEDS + tries)
        tries += 1
    env.close()
    return [seeds[i % len(seeds)] for i in range(n)]


@functools.lru_cache(maxsize=16)
def held_out_starts(make_env, n):
    """The held-out starts of a run's environment, drawn once: each evaluation plays the same, and a web page is slow to deal."""
    return held_out_seeds(make_env(), n)


def model_agent(vlm, max_new_tokens, temperature, generator, q_weight=0.0, hide=False):
    """A player for `play`: the VLM. hide=True shows it a grey picture, to see whether it looks."""
    def act(envs_, rows, images):
        if hide:
            images = [Image.new("RGB", im.size, (127, 127, 127)) for im in images]
        prompts = [vlm.encode(r["messages"], [im], key=(r["messages"][0]["content"][1]["text"], "hidden" if hide else r["images_file_names"][0]))
                   for r, im in zip(rows, images)]
        ids, logps = vlm.generate(prompts, max_new_tokens, temperature, generator, q_weight)
        return [dict(reply=vlm.decode(i), reply_ids=i, logprobs=lp, source="model") for i, lp in zip(ids, logps)]
    return act


def scripted_agent(mix, rng, alone=0.0):
    """A player for `play`: each turn one of the scripted players, by its share in `mix`; but a share `alone` of the episodes is the expert's from the first turn to the last."""
    def act(envs_, rows, images):
        for env in envs_:
            if not env.turns:
                env.mix = {"expert": 1.0} if alone and rng.random() < alone else mix
        return [dict(zip(("reply", "source"), envs.mixed_reply(env.mix, env, rng))) for env in envs_]
    return act


def exploring_agent(act, share, rng):
    """A player for `play`: `act`, but for a share of the turns, which are played at random: whoever learns off-policy may look beside its way."""
    def mixed(envs_, rows, images):
        return [dict(reply=envs.scripted_reply("random", env, rng), source="random") if rng.random() < share else r for env, r in zip(envs_, act(envs_, rows, images))]
    return mixed


def play(make_env, act, seeds, num_envs=32, split="test", prefix="", bar=None, share=(0, 1)):
    """Play one episode for each seed, num_envs at a time (of several tasks, each in turn); yields dicts (env, rows, images, success, success_return,
    episode_return, turns, valid, tag) as episodes end. act(envs, rows, images) -> list of dict(reply, source, [reply_ids, logprobs], [lost: why there is none]).
    An episode whose environment is lost (a dead browser), or a reply in it, is played once more, then dropped, counted and reported. share=(rank, ranks): every ranks-th episode."""
    todo, live, lost = list(enumerate(seeds))[share[0]::share[1]][::-1], [], Counter()
    spare = [make_env()]
    spare += [make_env() for _ in range(min(num_envs, len(todo), spare[0].max_parallel or num_envs) - 1)]
    def begin(job):
        env, n, seed = job
        return SimpleNamespace(env=env, obs=env.reset(seed=seed, options={"split": split, "task": n})[0], seed=seed, n=n, name=f"{prefix}{n}", rows=[], images={})
    with tqdm(total=len(todo), desc=bar, disable=None if bar else True, leave=False) as progress, ThreadPoolExecutor(spare[0].max_parallel or 1) as pool:
        at_once = pool.map if spare[0].max_parallel else map             # threads pay where a step waits for another process
        while todo or live:
            live += at_once(begin, [(spare.pop(), *todo.pop()) for _ in range(min(len(spare), len(todo)))])
            pending = [make_row(e.name, len(e.rows), e.env.name, e.seed, e.obs) for e in live]
            replies = act([e.env for e in live], pending, [e.obs["image"] for e in live])
            outcomes = at_once(lambda e, r: e.env.step(r["reply"]), live, replies)
            for e, row, r, (obs, reward, terminated, truncated, info) in zip(list(live), pending, replies, list(outcomes)):
                if why := r.pop("lost", "") or e.env.lost:
                    lost[e.n] += 1
                    if lost[e.n] == 1:
                        todo.append((e.n, e.seed))
                    else:
                        tqdm.write(f"{e.env.name}, seed {e.seed}: dropped, {why}; {sum(k > 1 for k in lost.values())} of {len(seeds)} episodes so far.")
                    live.remove(e), spare.append(e.env), e.env.close()
                    continue
                outcome = dict(action=info["action"], valid=bool(info["valid"]), reward=float(reward), terminated=bool(terminated), truncated=bool(truncated), success=bool(info["success"]))
                e.images[row["images_file_names"][0]] = e.obs["image"]
                e.rows.append(make_row(e.name, len(e.rows), e.env.name, e.seed, e.obs, **r, **outcome))
                e.obs = obs
                if terminated or truncated:
                    turns, valid, ret = len(e.rows), [x["valid"] for x in e.rows], sum(x["reward"] for x in e.rows)
                    if truncated and not terminated:  # its value is the bootstrap
                        last = make_row(e.name, len(e.rows), e.env.name, e.seed, obs, source="end", success=bool(info["success"]))
                        e.images[last["images_file_names"][0]] = obs["image"]
                        e.rows.append(last)
                    yield dict(env=e.env.name, rows=e.rows, images=e.images, success=bool(info["success"]), success_return=bool(info["success_return"]), episode_return=ret,
                               turns=turns, valid=sum(valid), tag=e.env.tag())
                    live.remove(e), spare.append(e.env), e.env.close()
                    progress.update()


def record(episodes, buffer, chunk=200):
    """Append played episodes to a buffer, some at a time; returns how many. Those before an error or Ctrl-C are kept."""
    rows, images, n = [], {}, 0
    try:
        for n, e in enumerate(episodes, 1):
            rows, images = rows + e["rows"], images | e["images"]
            if n % chunk == 0:
                buffer.append(rows, images)
                rows, images = [], {}
    finally:
        buffer.append(rows, images)
    return n


def episode_summary(episodes):
    """Episodes -> one dictionary of numbers; success rates with their Wilson 95 % intervals, by tag too where the environment has some, and
    by_env where several were played."""
    if not episodes:
        raise SystemExit("No episode could be played to its end: see above why each was dropped.")
    n, share = len(episodes), lambda key, of: sum(e[key] for e in of)
    out = dict(episodes=n, episode_return=share("episode_return", episodes) / n, turns=share("turns", episodes) / n,
               valid=share("valid", episodes) / share("turns", episodes))
    for key in ("success", "success_return"):
        out[key], out[key + "_95"] = share(key, episodes) / n, [round(x, 4) for x in wilson(share(key, episodes), n)]
    if len(names := dict.fromkeys(e["env"] for e in episodes)) > 1:
        return out | dict(by_env={name: episode_summary([e for e in episodes if e["env"] == name]) for name in names})
    tags = sorted({e["tag"] for e in episodes} - {""})
    if tags:
        groups = {t: [e for e in episodes if e["tag"] == t] for t in tags}
        out["by_tag"] = {t: dict(episodes=len(g), success=share("success", g) / len(g)) for t, g in groups.items()}
    return out


def gather_episodes(played):
    """Episodes that every rank played, for `summary`: without their rows and pictures, which stay where they are."""
    return [e for part in gather([e | dict(rows=[], images={}) for e in played]) for e in part]


def evaluate_policy(vlm, make_env, episodes, max_new_tokens, temperature=1.0, seed=0, q_weight=0.0, hide=False, num_envs=64, bar=None, buffer=None):
    """Play the held-out starts, each rank its share -> summary. Its random stream is its own: evaluation never perturbs training."""
    rank, world = ranks()
    generator = torch.Generator(vlm.device).manual_seed(seed + 10 ** 6 * rank)
    act = model_agent(vlm, max_new_tokens, temperature, generator, q_weight, hide)
    played = list(play(make_env, act, held_out_starts(make_env, episodes), num_envs, prefix=f"eval{seed}-", bar=None if rank else bar, share=(rank, world)))
    vlm.finish()
    if buffer is not None:
        record(played, buffer)
    return episode_summary(gather_episodes(played))


def full_evaluation(vlm, make_env, episodes, max_new_tokens, temperature=1.0, seed=0, q_weight=0.0, buffer=None, only=("greedy", "sampled", "hidden"), prefix=""):
    """The rows of the table: {name: summary}."""
    ways = dict(greedy=("greedy", dict(temperature=0.0)), sampled=(f"sampled, T={temperature:g}", dict(temperature=temperature, buffer=buffer)),
                hidden=("picture hidden, greedy", dict(temperature=0.0, hide=True)))
    return {prefix + name: evaluate_policy(vlm, make_env, episodes, max_new_tokens, seed=seed, q_weight=q_weight, bar=name, **kw) for name, kw in (ways[k] for k in only)}


def recorded_summary(stats):
    """Buffer.stats() as a row of the table: turns an episode, with intervals, and so for each environment of several."""
    n = stats["episodes"]
    row = stats | dict(turns=stats["turns"] / n) | {k + "_95": wilson(round(stats[k] * n), n) for k in ("success", "success_return")}
    return row | dict(by_env={name: recorded_summary(of) for name, of in stats["by_env"].items()}) if "by_env" in stats else row


def offline_results(run):
    """What a run with two phases had reached before it played itself: {name: summary}, empty for others."""
    file = os.path.join(run, "eval_offline.json")
    if not os.path.exists(file):
        return {}
    with open(file) as f:
        return json.load(f)


def format_table(results):
    """{name: summary} -> text, one aligned line each."""
    rows = [row for name, s in results.items() for row in ((name, s), *((f"  {env}", of) for env, of in s.get("by_env", {}).items()))]
    wide = max([28, *(len(name) + 1 for name, _ in rows)])
    lines = [f"{'':<{wide}}{'goal reached':>24}{'summed reward > 0':>26}{'return':>9}{'turns':>7}{'valid':>8}{'n':>6}"]
    for name, s in rows:
        cells = [f"{100 * s[k]:.1f} % [{100 * s[k + '_95'][0]:.1f}, {100 * s[k + '_95'][1]:.1f}]" if k + "_95" in s else f"{100 * s[k]:.1f} %" for k in ("success", "success_return")]
        lines.append(f"{name:<{wide}}{cells[0]:>24}{cells[1]:>26}{s['episode_return']:>9.3f}{s['turns']:>7.2f}{100 * s['valid']:>7.1f}%{s['episodes']:>6}")
        lines += [f"    {tag:<24}{100 * g['success']:>12.1f} %  of {g['episodes']}" for tag, g in s.get("by_tag", {}).items()]
    return "\n".join(lines)


def read_run_config(run):
    """A run's settings, as it was trained."""
    file = os.path.join(run, "config.json")
    if not os.path.exists(file):
        raise ConfigError(f"{run!r} is no run folder: it has no config.json; train one with python train.py config/numberline.py --out_dir={run}")
    with open(file) as f:
        defaults = {name: key.default for name, key in parse_block(TRAIN).items()}
        return SimpleNamespace(**defaults | json.load(f))      # a run from before a key existed has that key's default


def load_run(run, run_cfg):
    """A run's VLM as its last checkpoint has it -> (vlm, folder of the checkpoint)."""
    folder = latest_checkpoint(run)
    if run_cfg.model == "scratch":  # its tokenizer was trained by the run: take the whole model from there
        run_cfg.model = folder
    vlm = build(run_cfg)
    vlm.load(folder)
    return vlm, folder


def report_data(folder, cfg):
    """The report on a folder of episodes that somebody recorded."""
    if not cfg.report or cfg.agent or cfg.save or cfg.episodes:
        raise ConfigError(f"{folder!r} is a folder of recorded episodes, nobody plays here: look at it with python evaluate.py {folder} --report, its other keys are --report_episodes and --critic.")
    buf, around, vlm, run_cfg = Buffer(folder), os.path.normpath(os.path.join(folder, "..")), None, None
    run = cfg.critic or (around if os.path.exists(os.path.join(around, "config.json")) and latest_checkpoint(around, must=False) else None)
    if run:
        run_cfg = read_run_config(run)
        vlm, _ = load_run(run, run_cfg)
    results = {"the recorded episodes": recorded_summary(buf.stats())}
    print(format_table(results))
    from extras.report import write_report
    write_report(folder, buf, results, vlm, run, run_cfg, cfg.report_episodes)


def play_agent(cfg, make_env, n, buffer, aside):
    """Another player than the model plays, recorded if there is a buffer -> {name: summary}."""
    human, server, counts, played = cfg.agent == "human", cfg.agent == "openai", Counter(), []
    who = f"openai:{cfg.model}" if server else cfg.agent
    prefix = f"{who}/{cfg.seed}-"
    if buffer is not None and any(name.startswith(prefix) for name in buffer.episodes):         # said before the work, not after
        raise ConfigError(f"{buffer.folder!r} holds episodes of {who} with seed {cfg.seed} already: record into another folder, or with another --seed.")
    from extras.teachers import human_agent, openai_agent
    act = human_agent(aside) if human else openai_agent(cfg, counts) if server else scripted_agent({cfg.agent: 1.0}, np.random.default_rng(cfg.seed))
    if cfg.save:                    # data to train on: no held-out starts
        seeds, split = np.random.default_rng([cfg.seed, 4]).integers(2 ** 31, size=n).tolist(), "train"
    else:
        seeds, split = held_out_starts(make_env, n), "test"
    episodes = (played.append(e) or e for e in play(make_env, act, seeds, 1 if human else cfg.num_envs, split, prefix, None if human else who))
    try:
        list(episodes) if buffer is None else record(episodes, buffer, 1 if human or server else 200)
    except (EOFError, KeyboardInterrupt):
        print(f"\nStopped by you: {len(played)} of {n} episodes were finished.")
        if not played:
            raise SystemExit(1)
    finally:
        if counts:
            print(f"{cfg.base_url}: {', '.join(f'{k:,.0f} {what}' for what, k in counts.most_common())}; {len(played)} of {n} episodes")
    return {who: episode_summary(played)}


def main(argv):
    run, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    cfg = configure(__file__, flags, files=False)
    game, no_run = [f"--{k}={v}" for k, v in (("env", cfg.env), ("size", cfg.size)) if v], run is None or run.endswith(".py")
    if no_run and not (cfg.agent and (run or cfg.env)):
        raise ConfigError("Name the run folder first: python evaluate.py out/numberline; another player than its model can do without: --env=NumberLine --agent=expert")
    if no_run and cfg.report:
        raise ConfigError("--report is about a run or a folder of episodes: record with --save=data/x, then python evaluate.py data/x --report")
    if cfg.report_episodes < 1:
        raise ConfigError("--report_episodes must be at least 1.")
    if not no_run and os.path.exists(os.path.join(run, "metadata.jsonl")):
        return report_data(run, cfg)
    if cfg.critic:
        raise ConfigError(f"--critic={cfg.critic!r} is for a folder of episodes; a run is judged by its own critic, leave it out.")
    if cfg.agent not in ("", "openai", "human", *PLAYERS):
        raise ConfigError(f"--agent={cfg.agent!r} is not known: leave it empty for the run's model, or choose one of openai, human, {', '.join(PLAYERS)}.")
    if cfg.agent != "openai" and (cfg.base_url or cfg.model):
        raise ConfigError("--base_url and --model are a server's and its model's: they need --agent=openai.")
    if game and not no_run:
        raise ConfigError(f"{run!r} is played as it was trained: leave {' and '.join(game)} out, or name no run.")
    run_cfg = check_config(configure(TRAIN, [run] * bool(run) + game, quiet=True)) if no_run else read_run_config(run)
    n = run_cfg.eval_episodes if cfg.episodes is None else cfg.episodes
    if n < 1 or cfg.temperature < 0:
        raise ConfigError("--episodes must be at least 1 and --temperature at least 0.")
    if min(cfg.num_envs, cfg.max_tokens) < 1 or cfg.timeout <= 0 or cfg.retries < 0:
        raise ConfigError("--num_envs and --max_tokens must be at least 1, --timeout above 0, and --retries at least 0.")
    make_env = env_factory(run_cfg)
    try:
        split = make_env().split
    except ValueError as e:
        raise ConfigError(str(e))
    aside, vlm = tempfile.TemporaryDirectory(), None
    buffer = Buffer(cfg.save or aside.name, create=True) if cfg.save or cfg.report else None
    start = len(buffer or ())
    if cfg.agent:
        results = play_agent(cfg, make_env, n, buffer, aside.name)
    else:
        vlm, folder = load_run(run, run_cfg)
        cfg.q_weight = run_cfg.q_weight if cfg.q_weight is None else cfg.q_weight
        if cfg.q_weight and not len(vlm.heads):
            raise ConfigError(f"--q_weight={cfg.q_weight} needs a critic, and actor_loss={run_cfg.actor_loss!r} trains none: leave it at 0.")
        results = offline_results(run) | full_evaluation(vlm, make_env, n, run_cfg.max_new_tokens, cfg.temperature, cfg.seed, cfg.q_weight, buffer)
        with open(os.path.join(run, "eval.json"), "w") as f:
            json.dump(dict(checkpoint=folder, argv=argv, seed=cfg.seed, q_weight=cfg.q_weight, results=results), f, indent=1)
    where = "training starts" if cfg.agent and cfg.save else "held-out starts" if split else "starts that training also draws"
    print(f"{run_cfg.env}, {run or cfg.agent}: {list(results.values())[-1]['episodes']} episodes on {where}, Wilson 95 % intervals\n{format_table(results)}")
    if cfg.report:
        vlm = vlm or (load_run(run, run_cfg)[0] if latest_checkpoint(run, must=False) else None)
        from extras.report import write_report
        write_report(run, buffer, results, vlm, run, run_cfg, cfg.report_episodes, start)
    aside.cleanup()


if __name__ == "__main__":
    main(sys.argv[1:])
