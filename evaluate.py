"""
How well it went: success with intervals, return, share of valid actions; greedy and sampled, with the picture and without.

    python evaluate.py out/numberline                                   # a trained run, on held-out starts
    python evaluate.py out/numberline --episodes=1000 --temperature=0.5
    python evaluate.py out/numberline --agent=expert --save=data/x      # any player; --save records into the folder format
"""
import json, math, os, sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import envs
from buffer import Buffer, make_row
from configurator import ConfigError, configure, parse_block
from model import build, latest_checkpoint

# --- config ---
episodes: int = None # episodes of each table row; None: the run's eval_episodes
agent = ''           # who plays: '' the run's model, or one of expert, random, malformed, biased
save = ''            # folder to record the sampled episodes into; '' records nothing
temperature = 1.0    # of the sampled row
q_weight = 0.0       # adds q_weight * A to the logits: the critic corrects the policy at play; 0 is the plain policy
seed = 0             # of the sampling; the held-out starts do not depend on it
# --- end of config ---

PLAYERS = ("expert", "random", "malformed", "biased")
TEST_SEEDS = 10 ** 6  # held-out starts are drawn by seeds from here on


def wilson(k, n, z=1.96):
    """95 % interval of a share k / n (Wilson 1927): (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    p, c = k / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (p + z * z / (2 * n) - half) / c), min(1.0, (p + z * z / (2 * n) + half) / c)


def environment(run_cfg):
    """make_env of a run, for `play`: its environment, or its several."""
    return lambda: envs.make(run_cfg.env, size=run_cfg.size, penalty=run_cfg.penalty, invalid=run_cfg.invalid, max_turns=run_cfg.max_turns)


def held_out(env, n):
    """n seeds of starts that training never draws (all of them where a game is too small to hold some out), as many different
    ones as there are. A seed is not a state: starts are told apart by `env.fingerprint()`. Of several tasks seed i is task i's, modulo their number."""
    if tasks := getattr(env, "tasks", None):
        seeds = [held_out(task, -(-n // len(tasks))) for task in tasks]
        return [seeds[i % len(tasks)][i // len(tasks)] for i in range(n)]
    seeds, seen, tries = [], set(), 0
    while len(seeds) < n and tries < (4 * n if env.workers else 500 + 20 * n):     # where starts are slow to draw, some may come twice
        env.reset(seed=TEST_SEEDS + tries, options={"split": "test"})
        if env.fingerprint() not in seen:
            seen.add(env.fingerprint())
            seeds.append(TEST_SEEDS + tries)
        tries += 1
    env.close()
    return [seeds[i % len(seeds)] for i in range(n)]


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


def scripted_agent(mix, rng):
    """A player for `play`: each turn one of the scripted players, by its share in `mix`."""
    def act(envs_, rows, images):
        return [dict(zip(("reply", "source"), envs.mixture(mix, env, rng))) for env in envs_]
    return act


def play(make_env, act, seeds, num_envs=32, split="test", prefix="", bar=None):
    """Play one episode for each seed, num_envs at a time (of several tasks, each in turn); yields dicts (env, rows, images, success, success_return,
    episode_return, turns, valid, tag) as episodes end. act(envs, rows, images) -> list of dict(reply, source, [reply_ids, logprobs]).
    An episode whose environment is lost (a dead browser) is played once more, then dropped, counted and reported."""
    todo, live, lost = list(enumerate(seeds))[::-1], [], Counter()
    spare = [make_env()]
    spare += [make_env() for _ in range(min(num_envs, len(seeds), spare[0].workers or num_envs) - 1)]
    def begin(job):
        env, n, seed = job
        return SimpleNamespace(env=env, obs=env.reset(seed=seed, options={"split": split, "task": n})[0], seed=seed, n=n, name=f"{prefix}{n}", rows=[], images={})
    with tqdm(total=len(seeds), desc=bar, disable=None if bar else True, leave=False) as progress, ThreadPoolExecutor(spare[0].workers or 1) as pool:
        at_once = pool.map if spare[0].workers else map             # threads pay where a step waits for another process
        while todo or live:
            live += at_once(begin, [(spare.pop(), *todo.pop()) for _ in range(min(len(spare), len(todo)))])
            pending = [make_row(e.name, len(e.rows), e.env.name, e.seed, e.obs) for e in live]
            replies = act([e.env for e in live], pending, [e.obs["image"] for e in live])
            outcomes = at_once(lambda e, r: e.env.step(r["reply"]), live, replies)
            for e, row, r, (obs, reward, terminated, truncated, info) in zip(list(live), pending, replies, list(outcomes)):
                if e.env.lost:
                    lost[e.n] += 1
                    if lost[e.n] == 1:
                        todo.append((e.n, e.seed))
                    else:
                        tqdm.write(f"{e.env.name}, seed {e.seed}: dropped, {e.env.lost}; {sum(k > 1 for k in lost.values())} of {len(seeds)} episodes so far.")
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
    """Append played episodes to a buffer, some at a time; returns how many."""
    rows, images, n = [], {}, 0
    for n, e in enumerate(episodes, 1):
        rows, images = rows + e["rows"], images | e["images"]
        if n % chunk == 0:
            buffer.append(rows, images)
            rows, images = [], {}
    buffer.append(rows, images)
    return n


def summary(episodes):
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
        return out | dict(by_env={name: summary([e for e in episodes if e["env"] == name]) for name in names})
    tags = sorted({e["tag"] for e in episodes} - {""})
    if tags:
        groups = {t: [e for e in episodes if e["tag"] == t] for t in tags}
        out["by_tag"] = {t: dict(episodes=len(g), success=share("success", g) / len(g)) for t, g in groups.items()}
    return out


def evaluate(vlm, make_env, episodes, max_new_tokens, temperature=1.0, seed=0, q_weight=0.0, hide=False, num_envs=64, bar=None, buffer=None):
    """Play the held-out starts -> summary. Its random stream is its own: evaluation never perturbs training."""
    generator = torch.Generator(vlm.device).manual_seed(seed)
    act = model_agent(vlm, max_new_tokens, temperature, generator, q_weight, hide)
    played = list(play(make_env, act, held_out(make_env(), episodes), num_envs, prefix=f"eval{seed}-", bar=bar))
    if buffer is not None:
        record(played, buffer)
    return summary(played)


def full_evaluation(vlm, make_env, episodes, max_new_tokens, temperature=1.0, seed=0, q_weight=0.0, buffer=None, only=("greedy", "sampled", "hidden"), prefix=""):
    """The rows of the table: {name: summary}."""
    ways = dict(greedy=("greedy", dict(temperature=0.0)), sampled=(f"sampled, T={temperature:g}", dict(temperature=temperature, buffer=buffer)),
                hidden=("picture hidden, greedy", dict(temperature=0.0, hide=True)))
    return {prefix + name: evaluate(vlm, make_env, episodes, max_new_tokens, seed=seed, q_weight=q_weight, bar=name, **kw) for name, kw in (ways[k] for k in only)}


def table(results):
    """{name: summary} -> text, one aligned line each."""
    rows = [row for name, s in results.items() for row in ((name, s), *((f"  {env}", of) for env, of in s.get("by_env", {}).items()))]
    wide = max([28, *(len(name) + 1 for name, _ in rows)])
    lines = [f"{'':<{wide}}{'goal reached':>24}{'summed reward > 0':>26}{'return':>9}{'turns':>7}{'valid':>8}{'n':>6}"]
    for name, s in rows:
        cells = [f"{100 * s[k]:.1f} % [{100 * s[k + '_95'][0]:.1f}, {100 * s[k + '_95'][1]:.1f}]" if k + "_95" in s else f"{100 * s[k]:.1f} %" for k in ("success", "success_return")]
        lines.append(f"{name:<{wide}}{cells[0]:>24}{cells[1]:>26}{s['episode_return']:>9.3f}{s['turns']:>7.2f}{100 * s['valid']:>7.1f}%{s['episodes']:>6}")
        lines += [f"    {tag:<24}{100 * g['success']:>12.1f} %  of {g['episodes']}" for tag, g in s.get("by_tag", {}).items()]
    return "\n".join(lines)


def main(argv):
    run, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    cfg = configure(__file__, flags, files=False)
    if run is None:
        raise ConfigError("Name the run folder first: python evaluate.py out/numberline")
    file = os.path.join(run, "config.json")
    if not os.path.exists(file):
        raise ConfigError(f"{run!r} is no run folder: it has no config.json; train one with python train.py config/numberline.py --out_dir={run}")
    with open(file) as f:
        defaults = {name: key.default for name, key in parse_block(os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")).items()}
        run_cfg = SimpleNamespace(**defaults | json.load(f))    # a run from before a key existed has that key's default
    n = run_cfg.eval_episodes if cfg.episodes is None else cfg.episodes
    if n < 1 or cfg.temperature < 0:
        raise ConfigError("--episodes must be at least 1 and --temperature at least 0.")
    make_env = environment(run_cfg)
    buffer = Buffer(cfg.save, create=True) if cfg.save else None
    if cfg.agent:
        if cfg.agent not in PLAYERS:
            raise ConfigError(f"--agent={cfg.agent!r} is not known: leave it empty for the run's model, or choose one of {', '.join(PLAYERS)}.")
        act = scripted_agent({cfg.agent: 1.0}, np.random.default_rng(cfg.seed))
        played = list(play(make_env, act, held_out(make_env(), n), prefix=f"{cfg.agent}{cfg.seed}-", bar=cfg.agent))
        if buffer is not None:
            record(played, buffer)
        results = {cfg.agent: summary(played)}
    else:
        folder = latest_checkpoint(run)
        if run_cfg.model == "scratch":  # its tokenizer was trained by the run: take the whole model from there
            run_cfg.model = folder
        vlm = build(run_cfg)
        vlm.load(folder)
        if cfg.q_weight and not len(vlm.heads):
            raise ConfigError(f"--q_weight={cfg.q_weight} needs a critic, and actor_loss={run_cfg.actor_loss!r} trains none: leave it at 0.")
        results = full_evaluation(vlm, make_env, n, run_cfg.max_new_tokens, cfg.temperature, cfg.seed, cfg.q_weight, buffer)
        with open(os.path.join(run, "eval.json"), "w") as f:
            json.dump(dict(checkpoint=folder, argv=argv, seed=cfg.seed, q_weight=cfg.q_weight, results=results), f, indent=1)
    print(f"{run_cfg.env}, {run}: {n} episodes on {'held-out starts' if make_env().split else 'starts that training also draws'}, Wilson 95 % intervals\n{table(results)}")


if __name__ == "__main__":
    main(sys.argv[1:])
