"""
Measure how well a player plays: success with intervals, return, share of valid actions.

    python evaluate.py out/numberline                     # a trained run, on held-out starts
    python evaluate.py out/numberline --episodes=1000 --temperature=0.5
    python evaluate.py out/numberline --report            # also report.html, curves.svg and a GIF per game
    python evaluate.py out/numberline/data --report       # recorded episodes, as that run's critic sees them

Another player plays the same starts, or with --save training starts, and is recorded:

    python evaluate.py out/numberline --agent=expert
    python evaluate.py --env=NumberLine --agent=human --save=data/me
    python evaluate.py --env=NumberLine --agent=openai --base_url=http://localhost:8000/v1 --model=NAME
"""
import functools, math, os, sys, tempfile
from collections import Counter

import numpy as np
import torch
from PIL import Image

from buffer import Buffer
from configurator import PLAYERS, ConfigError, check_config, configure
from extras.checkpoints import find_checkpoint, has_checkpoint
from extras.flag_mistakes import show
from extras.old_runs import keep_head_width
from extras.read_run import TRAIN, distrust, offline_results, read_run_config, write_eval
from extras.stopping import explained
from extras.value_checks import check_out_dir, check_path, check_ranges, check_secrets
from extras.whole_files import lock
from model import build, gather, ranks
from worlds.calls import check_environment, close_env, deal, draw_reply, make_or_refuse, must
from worlds.calls import report_hang, report_starts
from worlds.guard import Failure, each, set_timeout
from worlds.players import has_expert, scripted_reply
from worlds.playing import play, record
from worlds.registry import is_file, make, task_names

# --- config ---
episodes: int = None  # episodes per row of the table; None: the run's eval_episodes
agent = ''  # who plays. '': the run's model | openai | human | expert | random | malformed | biased
env = ''  # what the agent plays where no run or config file says so; my_env.py:MyEnv is a file of yours
size: int = None  # side of its picture in pixels; None: as in train.py or the config file
env_timeout: float = None  # seconds that one call of an environment may take; None: as in train.py
save = ''  # folder to record into: an agent's training starts, or the model's sampled episodes
temperature = 1.0  # of the sampled row, and of a server's model
q_weight: float = None  # play pi * exp(q_weight * A): the critic corrects; 0: pi alone; None: as trained
seed = 0  # of the sampling; the held-out starts do not depend on it
report = False  # write report.html: table, curves, episodes with what the critic thinks of each token
report_episodes = 100  # at most this many on the page
critic = ''  # run whose critic judges a folder of episodes; '': the run that the folder is part of
device: str = None  # auto | cpu | cuda; None: as trained
trust_remote_code = False  # run the Python files that come with a model; a run cannot give this permission
# agent=openai: any server of the chat-completions protocol (vLLM, SGLang, llama.cpp, a vendor)
base_url = ''  # for instance http://localhost:8000/v1
model = ''  # its name there
api_key_env = 'OPENAI_API_KEY'  # environment variable that holds the server's key; never written anywhere
max_tokens = 256  # of a reply
num_envs = 32  # episodes that an agent plays at once, and so requests at once; a person plays one
timeout = 60.0  # seconds until an answer must be complete
retries = 6  # of a failed request, after 1, 2, 4, ... seconds; then its episode is given up
# --- end of config ---

TEST_SEEDS = 10**6  # held-out starts have seeds from here on
AGENT = 4  # a random stream beside those of train.py
EVAL_ENVS = 64  # environments at once in an evaluation
WAYS = ("greedy", "sampled", "hidden")  # the rows of the table
# (keys, test, what the value must be)
RANGES = [
    ("episodes", lambda x: x is None or x >= 1, "at least 1"),
    ("episodes", lambda x: x is None or x <= 10**6, "at most 1,000,000"),
    ("num_envs max_tokens report_episodes", lambda x: x >= 1, "at least 1"),
    ("num_envs", lambda x: x <= 1000, "at most 1,000"),
    ("temperature", lambda x: x == 0 or 0.001 <= x <= 1000, "0 for the most likely reply, or 0.001 to 1000"),
    ("seed", lambda x: 0 <= x < 2**32, "at least 0, and below 2^32"),
    ("timeout", lambda x: 0 < x <= 86400, "above 0, and at most a day of 86,400 seconds"),
    ("retries", lambda x: 0 <= x <= 100, "at least 0, and at most 100"),
    ("device", lambda x: x in (None, "auto", "cpu", "cuda"), "auto, cpu, cuda or None"),
]

def wilson(k, n, z=1.96):
    """Compute the 95 % interval of a share k / n (Wilson 1927).

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    p = k / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


# ---- environments and starts ----

def env_factory(run_cfg):
    """Return the function that makes a run's environment, or its several, for `play`.

    From now on the run's env_timeout is that of all calls of environments.
    """
    set_timeout(run_cfg.env_timeout)

    def make_env():
        return make(run_cfg.env, size=run_cfg.size, penalty=run_cfg.penalty, max_turns=run_cfg.max_turns)

    return make_env

def held_out_seeds(env, n):
    """Draw n seeds of starts that training never plays, as many different starts as there are.

    Where a game is too small to hold some out, all its starts count. A seed is not a state: env.fingerprint()
    tells starts apart. Of several tasks, seed i belongs to task i modulo their number. A start that cannot be
    dealt is left out and reported; SystemExit if none can be dealt, or one hangs.
    """
    if getattr(env, "tasks", None):
        return held_out_task_seeds(env.tasks, n)
    max_tries = 500 + 20 * n
    if env.max_parallel:
        # starts are slow to draw, a web page for one: then some may come twice
        max_tries = 4 * n
    # {fingerprint: the first seed that deals it}
    starts = {}
    failures = []
    waiting = range(TEST_SEEDS, TEST_SEEDS + max_tries)
    while len(starts) < n and waiting:
        # no more than are still needed, because a start may be slow to deal
        seeds = waiting[: n - len(starts)]
        waiting = waiting[len(seeds) :]
        for seed, fingerprint in zip(seeds, each(deal, [(env, seed) for seed in seeds])):
            if isinstance(fingerprint, Failure):
                failures.append(fingerprint)
            else:
                starts.setdefault(fingerprint, seed)
        report_hang(env, failures)
    report_starts(env, failures, starts)
    must(env.name, close_env, env)
    seeds = list(starts.values())
    return [seeds[i % len(seeds)] for i in range(n)]

def held_out_task_seeds(tasks, n):
    """Draw n seeds for several tasks in turn; a task named twice has twice as many different starts."""
    counts = Counter(task.name for task in tasks)
    rounds = math.ceil(n / len(tasks))
    seeds = {task.name: iter(held_out_seeds(task, counts[task.name] * rounds)) for task in tasks}
    return [next(seeds[tasks[i % len(tasks)].name]) for i in range(n)]

@functools.lru_cache(maxsize=16)
def held_out_starts(make_env, n):
    """Draw the held-out seeds of a run's environment once: a web page is slow to deal."""
    return held_out_seeds(make_or_refuse(make_env), n)


# ---- agents: act(envs, rows, images) -> one dict per environment, see `play` ----

def model_agent(vlm, max_new_tokens, temperature, generator, q_weight=0.0, hide=False):
    """Make a player for `play`: the VLM; with hide=True it gets a grey picture, to see whether it looks."""

    def act(envs, rows, images):
        prompts = []
        for row, image in zip(rows, images):
            name = row["images_file_names"][0]
            if hide:
                name = "hidden"
                image = Image.new("RGB", image.size, (127, 127, 127))
            text = row["messages"][0]["content"][1]["text"]
            prompts.append(vlm.encode(row["messages"], [image], key=(text, name)))
        replies, logps = vlm.generate(prompts, max_new_tokens, temperature, generator, q_weight)
        turns = zip(replies, logps)
        return [dict(reply=vlm.decode(i), reply_ids=i, logprobs=lp, source="model") for i, lp in turns]

    return act

def scripted_agent(mix, rng, alone=0.0):
    """Make a player for `play`: scripted players, drawn anew for each turn.

    mix: {player: share}. alone: share of the episodes that the expert plays from the first turn to the last.
    """

    def act(envs, rows, images):
        for env, row in zip(envs, rows):
            if row["turn"] == 0:
                is_expert = alone and rng.random() < alone
                env.mix = {"expert": 1.0} if is_expert else mix
        return each(draw_reply, [(env, env.mix, rng) for env in envs])

    return act

def exploring_agent(act, share, rng):
    """Make a player for `play`: `act`, but a share of the turns is played at random."""

    def explore(env, answer):
        if rng.random() < share:
            return dict(reply=scripted_reply("random", env, rng), source="random")
        return answer

    def act_or_explore(envs, rows, images):
        return each(explore, zip(envs, act(envs, rows, images)))

    return act_or_explore


# ---- numbers ----

def episode_summary(episodes):
    """Sum up played episodes -> {name: number}; success rates with Wilson's 95 % intervals.

    by_env: a summary for each environment if there are several; by_tag: success for each tag, if any.
    """
    if not episodes:
        raise SystemExit("No episode could be played to its end: see above why each was dropped.")
    n = len(episodes)
    turns = sum(episode["turns"] for episode in episodes)
    summary = dict(episodes=n)
    summary["episode_return"] = sum(episode["episode_return"] for episode in episodes) / n
    summary["turns"] = turns / n
    summary["valid"] = sum(episode["valid"] for episode in episodes) / turns
    for key in ("success", "success_return"):
        count = sum(episode[key] for episode in episodes)
        summary[key] = count / n
        summary[key + "_95"] = [round(bound, 4) for bound in wilson(count, n)]

    by_env = group_by(episodes, "env")
    if len(by_env) > 1:
        summary["by_env"] = {env: episode_summary(group) for env, group in by_env.items()}
        return summary
    by_tag = {}
    for tag, group in sorted(group_by(episodes, "tag").items()):
        success = sum(episode["success"] for episode in group) / len(group)
        by_tag[tag] = dict(episodes=len(group), success=success)
    by_tag.pop("", None)
    if by_tag:
        summary["by_tag"] = by_tag
    return summary

def group_by(episodes, key):
    """Group episodes by one of their fields -> {value: episodes}."""
    groups = {}
    for episode in episodes:
        groups.setdefault(episode[key], []).append(episode)
    return groups

def recorded_summary(stats):
    """Turn Buffer.stats() into a row of the table: turns per episode, intervals; the same for by_env."""
    n = stats["episodes"]
    summary = stats | dict(turns=stats["turns"] / n)
    for key in ("success", "success_return"):
        summary[key + "_95"] = wilson(round(stats[key] * n), n)
    if "by_env" in stats:
        summary["by_env"] = {env: recorded_summary(of_env) for env, of_env in stats["by_env"].items()}
    return summary

def gather_episodes(played):
    """Collect the episodes of all ranks, for a summary; rows and pictures stay where they are."""
    numbers = [episode | dict(rows=[], images={}) for episode in played]
    return [episode for of_rank in gather(numbers) for episode in of_rank]

def rate_text(summary, key):
    """Format a success rate with its interval: 97.3 % [94.8, 98.6]."""
    low, high = summary[key + "_95"]
    return f"{100 * summary[key]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"

def format_table(results):
    """Format {name: summary} as text, one aligned line each; under it a line per environment and per tag."""
    rows = []
    for name, summary in results.items():
        rows.append((show(name), summary))
        for env, of_env in summary.get("by_env", {}).items():
            rows.append((f"  {show(env)}", of_env))
    width = max([28] + [len(name) + 1 for name, _ in rows])
    head = f"{'':<{width}}{'goal reached':>24}{'summed reward > 0':>26}"
    lines = [head + f"{'return':>9}{'turns':>7}{'valid':>8}{'n':>6}"]
    for name, summary in rows:
        success = rate_text(summary, "success")
        success_return = rate_text(summary, "success_return")
        lines.append(
            f"{name:<{width}}{success:>24}{success_return:>26}{summary['episode_return']:>9.3f}"
            f"{summary['turns']:>7.2f}{100 * summary['valid']:>7.1f}%{summary['episodes']:>6}"
        )
        for tag, of_tag in summary.get("by_tag", {}).items():
            lines.append(f"    {tag:<24}{100 * of_tag['success']:>12.1f} %  of {of_tag['episodes']}")
    return "\n".join(lines)

def evaluate_policy(
    vlm, make_env, run_cfg, episodes=None, temperature=1.0, hide=False, bar=None, buffer=None
):
    """Play the held-out starts, each rank its share -> summary.

    run_cfg: train.py's settings (eval_episodes, max_new_tokens, seed, q_weight). episodes: None for
    eval_episodes. temperature: 0 is greedy. hide: see model_agent. buffer: records the episodes.
    The random stream is its own, so an evaluation never perturbs training.
    """
    rank, n_ranks = ranks()
    seed = run_cfg.seed
    n = run_cfg.eval_episodes if episodes is None else episodes
    generator = torch.Generator(vlm.device).manual_seed(seed + 10**6 * rank)
    act = model_agent(vlm, run_cfg.max_new_tokens, temperature, generator, run_cfg.q_weight, hide)
    starts = held_out_starts(make_env, n)
    share = (rank, n_ranks)
    rank_bar = None if rank else bar
    options = dict(prefix=f"eval{seed}-", bar=rank_bar, share=share)
    played = list(play(make_env, act, starts, EVAL_ENVS, **options))
    # a sharded model generates on all ranks until the last one has finished
    vlm.finish()
    if buffer is not None:
        record(played, buffer)
    return episode_summary(gather_episodes(played))

def full_evaluation(vlm, make_env, run_cfg, temperature=1.0, only=WAYS, prefix="", buffer=None):
    """Evaluate in several ways -> the rows of the table, {prefix + name: summary}.

    temperature: of the sampled row, whose episodes the buffer records.
    """
    rows = dict(
        greedy=("greedy", dict(temperature=0.0)),
        sampled=(f"sampled, T={temperature:g}", dict(temperature=temperature, buffer=buffer)),
        hidden=("picture hidden, greedy", dict(temperature=0.0, hide=True)),
    )
    results = {}
    for way in only:
        name, options = rows[way]
        results[prefix + name] = evaluate_policy(vlm, make_env, run_cfg, bar=name, **options)
    return results


# ---- runs ----

def load_run(run, run_cfg):
    """Load a run's VLM from its last checkpoint -> (vlm, folder of the checkpoint)."""
    folder = find_checkpoint(run, skip=["optimizer.pt"])
    if run_cfg.model == "scratch":
        # the run trained its own tokenizer: take the whole model from the checkpoint
        run_cfg.model = folder
    keep_head_width(run_cfg, folder)
    vlm = build(run_cfg)
    vlm.load(folder)
    return vlm, folder


# ---- other players than the model ----

def make_agent(cfg, counts, folder):
    """Make the player that --agent names. counts: see OpenAIAgent. folder: see human_agent."""
    from extras.teachers import OpenAIAgent, human_agent

    if cfg.agent == "openai":
        return OpenAIAgent(cfg, counts)
    if cfg.agent == "human":
        return human_agent(folder)
    return scripted_agent({cfg.agent: 1.0}, np.random.default_rng(cfg.seed))

def play_agent(cfg, make_env, n, buffer, folder):
    """Let another player than the model play n episodes, recorded if there is a buffer -> {name: summary}."""
    is_human = cfg.agent == "human"
    name = f"openai:{cfg.model}" if cfg.agent == "openai" else cfg.agent
    prefix = f"{name}/{cfg.seed}-"
    # reported before the work, not after it
    recorded = buffer.episodes if buffer is not None else ()
    need(not any(episode.startswith(prefix) for episode in recorded),
         f"{cfg.save!r} holds episodes of {name} with seed {cfg.seed} already: record into another folder, "
         "or with another --seed.")
    counts = Counter()
    act = make_agent(cfg, counts, folder)
    if cfg.save:
        # data to train on: no held-out starts
        split = "train"
        seeds = np.random.default_rng([cfg.seed, AGENT]).integers(2**31, size=n).tolist()
    else:
        split = "test"
        seeds = held_out_starts(make_env, n)
    num_envs = 1 if is_human else cfg.num_envs
    bar = None if is_human else name
    played = []

    def playing():
        for episode in play(make_env, act, seeds, num_envs, split, prefix, bar):
            played.append(episode)
            yield episode

    # an episode that took a person's or a server's time is written at once
    chunk = 1 if cfg.agent in ("human", "openai") else 200
    try:
        if buffer is None:
            list(playing())
        else:
            record(playing(), buffer, chunk)
    except (EOFError, KeyboardInterrupt):
        print(f"\nStopped by you: {len(played)} of {n} episodes were finished.")
        if not played:
            raise SystemExit(1)
    finally:
        if counts:
            events = ", ".join(f"{count:,.0f} {event}" for event, count in counts.most_common())
            print(f"{cfg.base_url}: {events}; {len(played)} of {n} episodes")
    return {name: episode_summary(played)}


# ---- the command line ----

def need(is_right, sentence):
    """Raise ConfigError with the sentence unless a setting is right."""
    if not is_right:
        raise ConfigError(sentence)

def check_flags(cfg):
    """Check the flags that belong to playing, in any combination."""
    agents = ("openai", "human", *PLAYERS)
    need(not cfg.critic, f"--critic={cfg.critic!r} is for a folder of episodes; a run has its own critic.")
    need(cfg.agent in ("", *agents),
         f"--agent={cfg.agent!r} is not known: leave it empty for the run's model, or choose one of "
         f"{', '.join(agents)}.")
    is_server = cfg.agent == "openai"
    need(is_server or not (cfg.base_url or cfg.model), "--base_url and --model need --agent=openai.")
    if cfg.save:
        check_out_dir(cfg.save, "--save")

def read_game(target, is_run, cfg):
    """Read what to play -> settings with the keys of train.py.

    It is what a run was trained on, or what a config file, --env and --size say. A Python file of the user's
    is code: it is run only if this command line names it, never because a run's config.json does.
    """
    flags = [f"--{key}={vars(cfg)[key]}" for key in ("env", "size") if vars(cfg)[key] not in ("", None)]
    if not is_run:
        files = [target] if target else []
        return check_config(configure(TRAIN, files + flags, quiet=True))
    run_cfg = distrust(read_run_config(target, "report" if cfg.report else "play"), cfg)
    tasks = task_names(run_cfg.env)
    if any(map(is_file, tasks)):
        need(task_names(cfg.env) == tasks,
             f"{target!r} plays {run_cfg.env!r}, a Python file that would be run: read it, then name it: "
             f"--env={','.join(tasks)}")
        del flags[0]
    names = " and ".join(flags)
    need(not flags, f"{target!r} is played as it was trained: leave {names} out, or name no run.")
    return run_cfg

def check_env(run_cfg, cfg):
    """Try the environment out -> whether it holds starts out; SystemExit if it or a setting is wrong."""
    players = [cfg.agent] if cfg.agent in PLAYERS else ["random"]
    env = check_environment(env_factory(run_cfg), f"env={run_cfg.env!r}", players)
    need(cfg.agent not in ("expert", "biased") or has_expert(env),
         f"--agent={cfg.agent} needs an expert(), and env={run_cfg.env!r} has none: write one, or choose "
         "--agent=random.")
    return env.split

def report_folder(folder, cfg):
    """Write the report on a folder of recorded episodes, judged by the critic of a run if there is one."""
    played = (cfg.agent, cfg.save, cfg.episodes, cfg.env, cfg.size, cfg.base_url, cfg.model, cfg.q_weight)
    need(cfg.report and not any(played),
         f"{folder!r} is a folder of recorded episodes, nobody plays here: look at it with python "
         f"evaluate.py {folder} --report, its other keys are --report_episodes and --critic.")
    from extras.report import write_report

    buffer = Buffer(folder)
    run = cfg.critic or None
    parent = os.path.normpath(os.path.join(folder, ".."))
    is_in_run = os.path.exists(os.path.join(parent, "config.json"))
    if not run and is_in_run and has_checkpoint(parent):
        run = parent
    vlm = None
    run_cfg = None
    if run:
        run_cfg = distrust(read_run_config(run, "report"), cfg)
        vlm, _ = load_run(run, run_cfg)
    results = {"the recorded episodes": recorded_summary(buffer.stats())}
    print(format_table(results))
    write_report(folder, buffer, results, vlm, run, run_cfg, cfg.report_episodes)

def evaluate_run(run, run_cfg, make_env, temperature, buffer, argv):
    """Evaluate a run's model and write eval.json -> (vlm, {name: summary})."""
    vlm, checkpoint = load_run(run, run_cfg)
    q_weight = run_cfg.q_weight
    loss = run_cfg.actor_loss
    need(len(vlm.heads) or not q_weight,
         f"--q_weight={q_weight} needs a critic, and actor_loss={loss!r} trains none: leave it at 0.")
    before = offline_results(run)
    try:
        format_table(before)
    except (TypeError, KeyError, ValueError, AttributeError):
        raise ConfigError(f"{run}/eval_offline.json is damaged, it holds no table: delete it.")
    results = full_evaluation(vlm, make_env, run_cfg, temperature, buffer=buffer)
    results = before | results
    content = dict(checkpoint=checkpoint, argv=argv, seed=run_cfg.seed, q_weight=q_weight, results=results)
    write_eval(run, content)
    return vlm, results

@explained(way_on=lambda: "start the same command again")
def main(argv):
    """Evaluate a run, let another player play, or report on a folder of episodes, as the arguments say."""
    check_secrets(argv)
    target = None
    flags = argv
    if argv and not argv[0].startswith("-"):
        target, *flags = argv
    cfg = configure(__file__, flags, files=False)
    is_run = target is not None and not target.endswith(".py")
    need(is_run or (cfg.agent and (target or cfg.env)),
         "Name the run folder first: python evaluate.py out/numberline; another player than its model can "
         "do without: --env=NumberLine --agent=expert")
    need(is_run or not cfg.report,
         "--report is about a run or a folder of episodes: record with --save=data/x, then python "
         "evaluate.py data/x --report")
    check_ranges(cfg, RANGES, "--")
    check_path("folder", target or "")
    check_path("--critic", cfg.critic)
    if is_run and os.path.exists(os.path.join(target, "metadata.jsonl")):
        report_folder(target, cfg)
    else:
        check_flags(cfg)
        play_and_report(target, is_run, cfg, argv)

def play_and_report(target, is_run, cfg, argv):
    """Play held-out starts of a run, or of a config file or --env; print the table, write the report."""
    run_cfg = read_game(target, is_run, cfg)
    if cfg.env_timeout is not None:
        run_cfg.env_timeout = cfg.env_timeout
    has_held_out = check_env(run_cfg, cfg)
    make_env = env_factory(run_cfg)
    # The command line's settings replace those of the run.
    run_cfg.seed = cfg.seed
    if cfg.episodes is not None:
        run_cfg.eval_episodes = cfg.episodes
    if cfg.q_weight is not None:
        run_cfg.q_weight = cfg.q_weight

    with tempfile.TemporaryDirectory() as temporary:
        vlm = None
        buffer = None
        first_row = 0
        if cfg.save or cfg.report:
            os.makedirs(cfg.save or temporary, exist_ok=True)
            lock(cfg.save or temporary)
            buffer = Buffer(cfg.save or temporary, create=True)
            first_row = len(buffer)
        if cfg.agent:
            results = play_agent(cfg, make_env, run_cfg.eval_episodes, buffer, temporary)
        else:
            vlm, results = evaluate_run(target, run_cfg, make_env, cfg.temperature, buffer, argv)

        starts = "held-out starts" if has_held_out else "starts that training also draws"
        if cfg.agent and cfg.save:
            starts = "training starts"
        n = list(results.values())[-1]["episodes"]
        print(f"{run_cfg.env}, {target or cfg.agent}: {n} episodes on {starts}, Wilson 95 % intervals")
        print(format_table(results))
        if cfg.report:
            from extras.report import write_report

            if vlm is None and has_checkpoint(target):
                vlm, _ = load_run(target, run_cfg)
            write_report(target, buffer, results, vlm, target, run_cfg, cfg.report_episodes, first_row)


if __name__ == "__main__":
    main(sys.argv[1:])
