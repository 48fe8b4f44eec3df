"""
Make the runs behind the tables of comparison: each method on the same data, windows, updates and base.

    python -m extras.grid                              # what is recorded, begun and missing
    python -m extras.grid run                          # make the missing ones, two at once, one thread each
    python -m extras.grid run --only=biased --jobs=1   # those whose name contains a text

A run lies in out/grid and is named after its cell, such as biased_fbc_2. Its results go into
docs/results/runs.jsonl, and the tables are written again (extras/results.py). A run that was stopped goes on
from its last checkpoint, and one whose results are recorded is not made again: delete its lines to repeat it.
"""
import os, platform, re, signal, subprocess, sys, time
from typing import NamedTuple

from configurator import configure, parse_block
from extras import results
from extras.flag_mistakes import ConfigError
from extras.read_run import TRAIN

# --- config ---
only = ''         # a text that a run's name must contain; '': all runs
jobs = 2          # runs side by side, each with one thread
hours = 0.0       # begin no run after so many hours; 0: until all are made
out = 'out/grid'  # where the runs' folders lie
# --- end of config ---

METHODS = ("sft", "fbc", "awr", "afsft")
SEEDS = (0, 1, 2)
# One setting of the critic and of the filter for all worlds, train.py's defaults, whatever their configs say.
KEYS = "critic_coef pess_coef q_init target_tau beta reward_clip penalty".split()
SETTING = {key: parse_block(TRAIN)[key].default for key in KEYS}
# What differs is cloned; play is the policy's own, without the critic's help.
OFFLINE = "--online_updates=0 --q_weight=0"
# Play without a single whole episode of an expert, in which filtered cloning has little to choose from.
# Windows come as they are: to draw more of those that won would be a filter of its own.
LOW = "--expert_episodes=0 --data_mix={'expert':0.3,'random':0.5,'malformed':0.2} --won_share=None"
BIASED = "--expert_episodes=0 --data_mix={'biased':1.0} --won_share=None"
# In rooms a critic that learns from such play alone sees nothing yet after the 150 updates before the filter.
LONGER = "--offline_updates=600 --filter_warmup=300"
# The base that one command makes. GoToLocal's config has an older one.
MODEL = "--model=bases/tiny-vlm-worlds"
# What each table of comparison is about, and what is written behind train.py for it. Not every processor
# computes in bfloat16, so none does here.
WORLDS = {
    "mixed": "config/numberline.py",
    "random": "config/numberline_random.py",
    "biased": "config/numberline_biased.py",
    "ezpoints": "config/ezpoints.py --dtype=float32",
    "blackjack": "config/blackjack.py --dtype=float32",
    "lake": "config/frozenlake.py --dtype=float32",
    "rooms": f"config/babyai_gotolocal.py {MODEL} --dtype=float32",
    "pages": "config/miniwob.py --dtype=float32",
}
for world in ("lake", "rooms", "pages"):
    WORLDS[f"{world}_low"] = f"{WORLDS[world]} {LOW}"
    WORLDS[f"{world}_biased"] = f"{WORLDS[world]} {BIASED}"
for world in ("rooms_low", "rooms_biased"):
    WORLDS[world] += f" {LONGER}"
# Those that continue online by their config.
ONLINE = ("mixed", "ezpoints", "blackjack", "lake", "rooms", "pages")

# One key at a time from train.py's defaults: the keys, with seeds and worlds.
ABLATIONS = """
    beta=-0.05 beta=-0.2 beta=0.2 pess_coef=0.0 pess_coef=2.0 q_init=0.0 q_init=-1.5 critic_coef=1.0
    critic_coef=10.0 trace=plain trace=turn lam=0.0 lam=0.8 filter_warmup=0 filter_warmup=150 bc_coef=0.1
    gamma=0.9 penalty=-1.0 q_head=full n_critics=2 lora_r=4 window=1 q_weight=5.0
""".split()
# The worlds, with seeds and what their runs have beside. A run that is long enough forgives every setting:
# random play has 200 updates, biased play 300, and half of EZPoints' are left out.
ABLATED = {
    "random": ((0,), ""),
    "biased": ((0, 1, 2), ""),
    "ezpoints": ((0, 1), "--offline_updates=900"),
}

class Cell(NamedTuple):
    """One run. name: of its folder. experiment, variant: its place in docs/results. flags: of train.py."""

    name: str
    experiment: str
    variant: str
    seed: int
    flags: str

def setting_flags(**changed):
    """Write the setting as flags of train.py, with some keys changed."""
    return " ".join(f"--{key}={value}" for key, value in {**SETTING, **changed}.items())

def ablation_cells():
    """Return the runs with one key changed, offline.

    Where they are shorter than the grid's, one with nothing changed comes first, to be compared with.
    """
    found = []
    for world, (seeds, beside) in ABLATED.items():
        settings = ["", *ABLATIONS] if beside else ABLATIONS
        for seed in seeds:
            for setting in settings:
                changed = dict([setting.split("=")]) if setting else {}
                own = f"{WORLDS[world]} {beside} {setting_flags(**changed)} --online_updates=0 --seed={seed}"
                name = f"{world}_ablation_{setting or 'nothing'}_{seed}"
                found.append(Cell(name, f"ablation_{world}", setting, seed, " ".join(own.split())))
    return found

def cells():
    """Return all runs, in the order in which they are made: seed 0 of everything first."""
    found = []
    for seed in SEEDS:
        for world, flags in WORLDS.items():
            for method in METHODS:
                own = f"{flags} {setting_flags()} --actor_loss={method} {OFFLINE} --seed={seed}"
                found.append(Cell(f"{world}_{method}_{seed}", f"grid_{world}", "", seed, own))
            if world in ONLINE:
                own = f"{flags} {setting_flags()} --q_weight=0 --seed={seed}"
                variant = "whole schedule"
                found.append(Cell(f"{world}_online_{seed}", f"grid_{world}", variant, seed, own))
    return found + ablation_cells()

def method_of(cell):
    """Return the actor_loss of a run."""
    found = re.search(r"--actor_loss=(\w+)", cell.flags)
    return found[1] if found else "afsft"

def command_of(cell):
    """Return the command of a run as it is typed in a shell, which would take the quotes out of a dict."""
    return "python train.py " + re.sub(r"({\S+})", r'"\1"', cell.flags)

def in_tables(cell, records):
    """Tell whether the results of a run are in docs/results/runs.jsonl."""
    wanted = (cell.experiment, method_of(cell), cell.variant, cell.seed)
    names = ("experiment", "method", "variant", "seed")
    return any(results.key_of(record, names) == wanted for record in records)

def folder_of(cell, cfg):
    """Return the folder of a run."""
    return os.path.join(cfg.out, cell.name)

def state_of(cell, cfg, records):
    """Tell what is there of a run: recorded, finished, begun or missing."""
    folder = folder_of(cell, cfg)
    if in_tables(cell, records):
        return "recorded"
    if os.path.exists(os.path.join(folder, "eval.json")):
        return "finished"
    if os.path.exists(os.path.join(folder, "config.json")):
        return "begun"
    return "missing"

def machine():
    """Name the processor and how runs share it, for the records."""
    name = platform.processor() or "a CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
        name = (names or [name])[0]
    return f"one thread of {os.cpu_count()} of {name}, other runs beside it"

# ---- making the runs ----
def start(cell, cfg, is_begun):
    """Begin a run or continue it, its output in a file beside its folder -> the process."""
    folder = folder_of(cell, cfg)
    argv = [sys.executable, "train.py", *cell.flags.split(), f"--out_dir={folder}"]
    if is_begun:
        has_checkpoint = os.path.isdir(os.path.join(folder, "ckpt"))
        argv.append("--resume=True" if has_checkpoint else "--overwrite=True")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(argv, cwd=results.ROOT, env=environment, stdout=log, stderr=log)

def add_to_tables(cell, cfg):
    """Put a finished run into the tables."""
    # of a run that was stopped, meta.json has the last command only
    names = dict(experiment=cell.experiment, variant=cell.variant, command=command_of(cell))
    names["hardware"] = machine()
    flags = [f"--{key}={value}" for key, value in names.items()]
    results.main(["add", folder_of(cell, cfg), *flags])

def run(cfg, wanted):
    """Make the runs that are missing, `jobs` at once; returns the names of those that failed."""
    os.makedirs(cfg.out, exist_ok=True)
    began = time.time()
    waiting = list(wanted)
    running = {}
    failed = []
    while waiting or running:
        is_late = cfg.hours and time.time() - began > 3600 * cfg.hours
        if is_late:
            waiting = []
        while waiting and len(running) < cfg.jobs:
            cell = waiting.pop(0)
            state = state_of(cell, cfg, results.read_records())
            if state in ("begun", "missing"):
                print(f"{time.strftime('%H:%M:%S')}  {cell.name}  {state}", flush=True)
                running[cell] = start(cell, cfg, state == "begun")
            elif state == "finished":
                add_to_tables(cell, cfg)
        time.sleep(1)
        for cell, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[cell]
            if process.returncode or state_of(cell, cfg, []) != "finished":
                failed.append(cell.name)
                log = f"{folder_of(cell, cfg)}.log"
                print(f"{cell.name} ended with {process.returncode}: see {log}", flush=True)
            else:
                add_to_tables(cell, cfg)
    return failed

def main(argv):
    """List the runs, or make those that are missing."""
    is_run = argv[:1] == ["run"]
    cfg = configure(__file__, argv[1:] if is_run else argv, files=False, quiet=True)
    wanted = [cell for cell in cells() if cfg.only in cell.name]
    if not wanted:
        raise ConfigError(f"No run has {cfg.only!r} in its name: python -m extras.grid lists them.")
    if cfg.jobs < 1:
        raise ConfigError(f"jobs={cfg.jobs} would make no run: set 1 or more.")
    if cfg.hours < 0:
        raise ConfigError(f"hours={cfg.hours} is over already: set a number above 0, or 0 for no limit.")
    if os.path.exists(cfg.out) and not os.path.isdir(cfg.out):
        raise ConfigError(f"out={cfg.out!r} is a file: name a folder.")
    if is_run:
        failed = run(cfg, wanted)
        sys.exit(f"Failed: {', '.join(failed)}." if failed else 0)
    records = results.read_records()
    # `python -m extras.grid | head` ends when head does
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for cell in wanted:
        print(f"{state_of(cell, cfg, records):<9} {cell.name:<22} {command_of(cell)}")


if __name__ == "__main__":
    main(sys.argv[1:])
