"""
Run two checkouts on this machine and compare what they write, byte by byte: a refactor must change nothing.

    python tests/same_run.py OLD NEW                              # every case, six minutes on two idle cores
    python tests/same_run.py OLD NEW --only=numberline,miniwob    # these cases
    python tests/same_run.py OLD NEW --out=out/same --keep        # keep all runs, in out/same/<side>/<case>

A case is a list of commands that runs once with each checkout. Two jobs run at a time.
The script prints one line per case and exits with 1 if anything differs. Runs that differ are kept.
It needs the optional packages (requirements-envs.txt) and Chromium. pytest does not collect it.
"""
import ast, atexit, fnmatch, functools, hashlib, importlib, json, multiprocessing
import multiprocessing.connection
import os, re, runpy, shutil, signal, struct, sys, tempfile, time
from typing import NamedTuple

JOBS = 2
STEP_LIMIT = 1200  # seconds

# Imported once and inherited by every run: it would take each of them ten seconds.
PRELOAD = """torch torch.distributed torch._dynamo numpy PIL.Image tqdm safetensors.torch
transformers.models.llava.modeling_llava transformers.models.llava.processing_llava
transformers.models.llama.modeling_llama transformers.models.clip.modeling_clip
transformers.models.clip.image_processing_pil_clip transformers.models.swin.modeling_swin
transformers.models.auto.modeling_auto transformers.models.auto.processing_auto
transformers.generation.utils gymnasium minigrid miniwob selenium.webdriver"""

# ---- what is expected to differ

# Keys of train.py that only one of the two has. A config.json may or may not name them.
REMOVED = """v_support reward_scale gamma_token cql_coef critic_detach af_coef weights timeout lora_dropout
lora_alpha rollout_temperature invalid reference eval_quick cache_mb fbc_quantile awr_temperature weight_decay
wandb_project ckpt_interval mdp env_timeout rollout_url modules_to_save
compile""".split()

# (files, lines in them or None for the whole file, reason)
EXPECTED = [
    ("*.err", None, "progress bars, warnings and the seconds they took"),
    ("*/meta.json", None, "the commit and the command line"),
    ("*/ckpt/optimizer.pt", None, "a zip archive; the case `resume` continues from it"),
    ("*/config.json", f"^({'|'.join(REMOVED)}): ", "these keys were removed or are new"),
    ("*/config.json", "^trace: ", "mdp='turn' has become trace='turn'; the metrics show that it acts"),
    ("*/state.json", "^(data|files|replay_digests|unlogged): ", "what a resumed run checks is new"),
    ("*/ckpt.old/*", None, "the checkpoint before the last one stays"),
    ("*/.lock", None, "one process at a time writes into a folder"),
    ("*/data/complete", None, "the marker names the settings that recorded the data"),
    ("*report.html", "Point at a token", "the hint beside the episodes was reworded"),
    ("*/adapter_config.json", "^base_model_name_or_path: ", "the shipped models moved to bases/"),
]

# Chromium may paint a pixel one shade lighter than the last time: these cases get a second try.
NOISY = ("miniwob", "pages")

# Scripts that became modules, and configs that moved: OLD's path, then NEW's.
MODULES = {
    "buffer.py": "extras/import_chats.py",
    "extras/scratch.py": "pretrain/tiny_nets.py",
}
CONFIGS = {
    "config/pretrain_tiny.py": "pretrain/config_tiny.py",
}

def removed_keys(keys):
    """Return values of removed keys that make OLD do what NEW always does."""
    never = 10 ** 6 * int(keys["log_interval"])
    decay = 0.0
    if keys["lora_r"] == "0":
        decay = 0.01
    return dict(
        # A checkpoint is written at every short evaluation.
        ckpt_interval=int(keys["eval_interval"]) or never,
        eval_quick=min(60, int(keys["eval_episodes"])),
        weight_decay=decay,
        # Published numbers stand in the docs, no longer under the final table.
        reference={},
    )


# ---- the cases

class Step(NamedTuple):
    """Describe one command: a script of OLD, its words, and the keys of train.py."""
    script: str
    words: str = ""
    keys: dict = {}
    ranks: int = 1
    by_old: bool = False

def parse_keys(text):
    """Split 'a=1 b=2' into {'a': '1', 'b': '2'}."""
    return dict(word.split("=", 1) for word in text.split())


RUN = parse_keys("""
    out_dir=run model=tiny-vlm device=cpu dtype=float32 lora_r=4 log_interval=2 eval_interval=4
    data_episodes=16 offline_updates=5 online_updates=5 batch_size=4 window=2 micro_batch=3
    warmup_updates=2 filter_warmup=1 num_envs=4 rollout_episodes=4 updates_per_rollout=2
    eval_episodes=4 max_turns=4 max_new_tokens=8
""")
CLONE = "actor_loss=sft online_updates=0 data_mix={'expert':1.0} window=1 eval_interval=0 "
BABYAI = "model=tiny-vlm-grids max_new_tokens=12 "
PAGES = "model=tiny-vlm-pages max_turns=3 data_episodes=6 num_envs=2 max_new_tokens=12 size=160 "
CLICKS = "env=miniwob/click-test-2-v1:element,miniwob/click-button-v1:coordinate "
ROOMS = (
    "env=Finding:BabyAI-GoToLocal-v0,"
    "Facing:BabyAI-OpenDoor-v0:view,"
    "Leading:BabyAI-GoToLocal-v0:view"
)
LAKES = "env=Captions:FrozenLake,Finding:FrozenLake,Leading:FrozenLake"

def train(text="", config="", ranks=1, by_old=False):
    """Describe a tiny training run."""
    return Step("train.py", config, RUN | parse_keys(text), ranks, by_old)

def evaluate(words):
    """Describe a run of evaluate.py."""
    return Step("evaluate.py", words)


CASES = {
    "numberline": [train("eval_interval=2", "config/numberline.py")],
    "defaults": [train("filter_warmup=3 grad_checkpointing=True seed=3")],
    "sft": [train("actor_loss=sft", "config/points24.py")],
    "fbc": [train("actor_loss=fbc data_episodes=40", "config/numberline.py")],
    "awr": [train("actor_loss=awr bc_coef=0.1 q_weight=1 critic_lr=0.05", "config/ezpoints.py")],
    "turn": [train("trace=turn", "config/blackjack.py")],
    "plain": [train("trace=plain lam=0.7 size=64", "config/numberline_random.py")],
    "tied_head": [train("q_head=tied q_init=-1 pess_coef=0 lora_targets=.*(q|v)_proj")],
    "full_head": [train("q_head=full bc_coef=0.5 critic_coef=1")],
    "two_critics": [train("n_critics=2 q_weight=2 env=EZPoints")],
    "biased": [train("won_share=0.8 reward_clip=0.5 explore=0.3", "config/numberline_biased.py")],
    "bfloat16": [train("dtype=bfloat16 online_updates=2 eval_interval=0")],
    "tasks": [train("env=NumberLine,EZPoints,Points24,Blackjack eval_episodes=8 num_envs=8")],
    "resume": [
        train("stop_at=4"),
        train("stop_at=8 resume=True"),
        train("resume=True"),
        train("resume=True online_updates=7"),
    ],
    "ranks": [
        train("stop_at=8", ranks=2),
        train("resume=True"),
    ],
    "shard": [train("shard=True offline_updates=2 online_updates=2 eval_interval=0", ranks=2)],
    "scratch": [train("model=scratch lora_r=0")],
    "reading": [
        train(CLONE + "lora_r=0 env=Captions model=scratch out_dir=captions", "config/pretrain_tiny.py"),
        train(CLONE + "lora_r=0 env=Reading model=captions/model", "config/pretrain_tiny.py"),
        evaluate("run --episodes=6"),
    ],
    "rooms": [train(CLONE + BABYAI + "lora_r=0 " + ROOMS, "config/pretrain_tiny.py")],
    "lakes": [train(CLONE + BABYAI + "lora_r=0 " + LAKES, "config/pretrain_tiny.py")],
    "pages": [train(CLONE + PAGES + "lora_r=0 env=Reading:miniwob/click-test-2-v1")],
    "babyai": [train(BABYAI + "replay_episodes=6", "config/babyai_gotolocal.py")],
    "frozenlake": [train("model=tiny-vlm-worlds max_new_tokens=12", "config/frozenlake.py")],
    "miniwob": [train(PAGES + CLICKS + "vision_cache_mb=100 eval_interval=0", "config/miniwob.py")],
    "tiny_nets": [
        Step("extras/scratch.py", "llava llava --hidden=32 --layers=2"),
        Step("extras/scratch.py", "smolvlm smolvlm --hidden=32 --layers=2"),
        train("model=smolvlm offline_updates=2 online_updates=0"),
    ],
    "chats": [
        Step("buffer.py", "chats.json chats"),
        Step("buffer.py", "chats.jsonl chats2 pictures"),
        train("data=chats actor_loss=sft online_updates=0 eval_interval=0"),
        train("data=chats2 out_dir=run2 online_updates=0 eval_interval=0"),
    ],
    "dry_run": [
        train("dry_run=True"),
        train("dry_run=True q_head=full lora_r=0 window=1"),
    ],
    "report": [
        train("env=NumberLine,EZPoints eval_interval=2"),
        evaluate("run --report --episodes=6 --seed=1 --save=saved"),
        evaluate("run --episodes=4 --temperature=0.5 --q_weight=1"),
        evaluate("saved --report --critic=run --report_episodes=3"),
        evaluate("run/data --report"),
    ],
    "agents": [
        evaluate("--env=EZPoints --agent=expert --episodes=8 --save=expert"),
        evaluate("expert --report"),
        evaluate("--env=NumberLine --agent=biased --episodes=8 --size=64"),
        evaluate("config/points24.py --agent=random --episodes=8 --save=random --seed=2"),
        evaluate("--env=Blackjack --agent=malformed --episodes=8"),
    ],
    "old_run": [
        train("stop_at=8", by_old=True),
        train("resume=True"),
        evaluate("run --report --episodes=4"),
    ],
}

def write_chats(folder):
    """Write conversations in LLaVA's and in TRL's form, and their pictures, into a case's folder."""
    from PIL import Image
    os.makedirs(os.path.join(folder, "pictures"))
    for name, colour in (("red.png", (200, 30, 30)), ("blue.png", (20, 40, 220))):
        for place in (folder, os.path.join(folder, "pictures")):
            Image.new("RGB", (80, 80), colour).save(os.path.join(place, name))
    llava = dict(image="red.png", conversations=[
        {"from": "human", "value": "<image>\n  Which colour? \n"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "What to do?"},
        {"from": "gpt", "value": "[action] +"},
    ])
    picture = {"type": "image"}
    trl = dict(images=["red.png", "blue.png"], reward=1.0, success=True, messages=[
        {"role": "system", "content": "Compare."},
        {"role": "user", "content": [picture, picture, {"type": "text", "text": "Same?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
    ])
    with open(os.path.join(folder, "chats.json"), "w") as f:
        json.dump([llava, trl], f)
    with open(os.path.join(folder, "chats.jsonl"), "w") as f:
        for chat in (trl, llava):
            f.write(json.dumps(chat) + "\n")


# ---- running a case

@functools.lru_cache
def config_keys(checkout):
    """Return the names in the config block of a checkout's train.py."""
    with open(os.path.join(checkout, "train.py"), encoding="utf-8") as f:
        block = f.read().split("# --- config ---")[1].split("# --- end of config ---")[0]
    targets = [getattr(node, "target", None) or node.targets[0] for node in ast.parse(block).body]
    return {target.id for target in targets}

def located(checkout, word):
    """Return the place of a config file in a checkout; other words stay as they are."""
    for path in (CONFIGS.get(word, word), word):
        if path.endswith(".py") and os.path.exists(os.path.join(checkout, path)):
            return os.path.join(checkout, path)
    return word

def command(checkout, step):
    """Return what follows `python` on the command line: a script or -m and a module, then its arguments."""
    moved = MODULES.get(step.script, "")
    start = [os.path.join(checkout, step.script)]
    if moved and os.path.exists(os.path.join(checkout, moved)):
        start = ["-m", moved.removesuffix(".py").replace("/", ".")]
    if step.ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={step.ranks}"]
        start = torchrun + start
    words = [located(checkout, word) for word in step.words.split()]
    keys = dict(step.keys)
    if keys:
        known = config_keys(checkout)
        keys |= {name: value for name, value in removed_keys(keys).items() if name in known}
        if "mdp" in known and keys.get("trace") == "turn":
            keys["mdp"] = keys.pop("trace")
    return start + words + [f"--{name}={value}" for name, value in keys.items()]

def run_step(checkout, argv, log):
    """Run one command in this process, as `python` would, with its output in <log>.out and <log>.err."""
    signal.alarm(STEP_LIMIT)
    for number, file in ((1, f"{log}.out"), (2, f"{log}.err")):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.path[0] = checkout
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    finally:
        # multiprocessing leaves out the exit handlers, and one of them ends the browsers.
        atexit._run_exitfuncs()

def run_case(checkout, old, steps, folder):
    """Run a case's commands in turn, each in a process of its own; stop at the first that fails."""
    os.makedirs(folder)
    os.chdir(folder)
    write_chats(folder)
    for number, step in enumerate(steps, 1):
        where = checkout
        if step.by_old:
            where = old
        argv = command(where, step)
        process = multiprocessing.Process(target=run_step, args=(where, argv, f"step{number}"))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(1)

def run_jobs(jobs, function):
    """Call function(*args) for each {name: args} in a process, JOBS at a time.

    Yields (name, exit code, seconds) as they end.
    """
    waiting = list(jobs)
    running = {}
    while waiting or running:
        while waiting and len(running) < JOBS:
            name = waiting.pop(0)
            process = multiprocessing.Process(target=function, args=jobs[name])
            process.start()
            running[process.sentinel] = (name, process, time.time())
        for sentinel in multiprocessing.connection.wait(list(running)):
            name, process, began = running.pop(sentinel)
            process.join()
            yield name, process.exitcode, time.time() - began


# ---- comparing

def table_lines(text):
    """Return the final tables of a console output, and the memory of a dry run."""
    lines = []
    inside = False
    for line in text.splitlines():
        header = "goal reached" in line and "valid" in line and "%" not in line
        inside = header or inside and "%" in line
        memory = re.match(r"(\w+) +([\d.]+) MiB", line)
        if inside:
            lines.append(line)
        elif memory:
            lines.append(memory[0])
    return lines

def tensor_lines(raw):
    """Return one line for each tensor of a safetensors file; their order in the file does not matter.

    Source: github.com/huggingface/safetensors, "Format".
    """
    size, = struct.unpack("<Q", raw[:8])
    data = raw[8 + size:]
    lines = []
    for name, entry in sorted(json.loads(raw[8:8 + size]).items()):
        if name != "__metadata__":
            start, end = entry.pop("data_offsets")
            lines.append(f"{name}: {entry} {hashlib.sha1(data[start:end]).hexdigest()}")
    return lines

def metric_lines(text):
    """Return the lines of metrics.jsonl without their seconds."""
    rows = []
    for line in text.splitlines():
        row = json.loads(line).items()
        rows.append(json.dumps({key: value for key, value in row if not key.startswith("time/")}))
    return rows

def json_lines(text, name):
    """Return one line for each key of a JSON object; of an evaluation, only of its results."""
    content = json.loads(text)
    if name == "eval.json":
        content = content["results"]
    if not isinstance(content, dict):
        return [json.dumps(content)]
    return [f"{key}: {json.dumps(value)}" for key, value in sorted(content.items())]

def content_lines(path):
    """Return what counts in a file, as lines: the whole file for all but a few kinds."""
    name = os.path.basename(path)
    with open(path, "rb") as f:
        raw = f.read()
    if name.endswith(".safetensors"):
        return tensor_lines(raw)
    if b"\0" in raw:
        return [hashlib.sha1(raw).hexdigest()]
    text = raw.decode()
    if name.endswith(".out"):
        return table_lines(text)
    if name == "metrics.jsonl":
        return metric_lines(text)
    if name.endswith(".json"):
        return json_lines(text, name)
    return text.splitlines()

def expected(path, line=None):
    """Tell whether EXPECTED names a file, or a line in it."""
    for files, pattern, _ in EXPECTED:
        if fnmatch.fnmatch(path, files):
            if pattern is None or line is not None and re.search(pattern, line):
                return True
    return False

def files_in(folder):
    """Return the paths of all files in a folder that are to be compared."""
    found = set()
    for parent, _, names in os.walk(folder):
        found |= {os.path.relpath(os.path.join(parent, name), folder) for name in names}
    return {path for path in found if not expected(path)}

def same_line(a, b):
    """Compare two lines. Peak memory may move by 5 %: it depends on when a temporary tensor is freed."""
    if a == b:
        return True
    name_a, *size_a = a.split() or [""]
    name_b, *size_b = b.split() or [""]
    if name_a != name_b or size_a[1:] != ["MiB"] or size_b[1:] != ["MiB"]:
        return False
    return abs(float(size_a[0]) - float(size_b[0])) <= 0.05 * float(size_a[0])

def around(line, other, width=36):
    """Return the part of a line where it begins to differ from another."""
    start = len(os.path.commonprefix([line, other]))
    return line[max(0, start - width // 2):start + width // 2]

def compare_file(path, old, new):
    """Return where two versions of a file begin to differ, '' if they do not."""
    sides = [os.path.join(folder, path) for folder in (old, new)]
    for side, file in zip(("OLD", "NEW"), sides):
        if not os.path.exists(file):
            return f"{path} is missing in {side}"
    lines = [content_lines(file) for file in sides]
    a = [line for line in lines[0] if not expected(path, line)]
    b = [line for line in lines[1] if not expected(path, line)]
    for number, (x, y) in enumerate(zip(a, b), 1):
        if not same_line(x, y):
            return f"{path}, line {number}: {around(x, y)!r} became {around(y, x)!r}"
    if len(a) != len(b):
        return f"{path} has {len(a)} lines in OLD, {len(b)} in NEW"
    return ""

def compare_folders(old, new):
    """Return one sentence for each file that differs, the rows of metrics and data first."""
    paths = sorted(files_in(old) | files_in(new), key=lambda path: (not path.endswith(".jsonl"), path))
    found = [compare_file(path, old, new) for path in paths]
    return [sentence for sentence in found if sentence]

def last_words(folder):
    """Return which command of a failed case failed, and the last line that it wrote."""
    logs = sorted(name for name in os.listdir(folder) if re.fullmatch(r"step\d+\.err", name))
    if not logs:
        return "nothing was started"
    with open(os.path.join(folder, logs[-1]), encoding="utf-8", errors="replace") as f:
        lines = f.read().split("\n")
    texts = [line.strip() for line in lines if line.strip()]
    return f"{logs[-1]}: {(texts or ['no message'])[-1][:300]}"

def verdict(folders, codes):
    """Return the differences of a case as sentences; a command that fails is one, also if it fails twice."""
    ends = zip(("OLD", "NEW"), folders, codes)
    failed = [f"{side} fails, {last_words(folder)}" for side, folder, code in ends if code]
    return failed or compare_folders(*folders)


# ---- the script

def parse(argv):
    """Return (OLD, NEW, names of the cases, folder of the runs, whether to keep them)."""
    flags = [word for word in argv if word.startswith("--")]
    paths = [os.path.abspath(word) for word in argv if not word.startswith("--")]
    values = dict(flag.lstrip("-").partition("=")[::2] for flag in flags)
    if len(paths) != 2 or set(values) - {"only", "out", "keep"}:
        raise SystemExit(
            "Name two checkouts: python tests/same_run.py OLD NEW [--only=a,b] [--out=DIR] [--keep]")
    for path in paths:
        if not os.path.exists(os.path.join(path, "train.py")):
            raise SystemExit(f"{path!r} is no checkout of the project: it has no train.py.")
    names = [name for name in values.get("only", "").split(",") if name] or list(CASES)
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        raise SystemExit(f"There is no case {unknown[0]!r}; the cases are: {', '.join(CASES)}.")
    out = os.path.abspath(values.get("out") or tempfile.mkdtemp(prefix="same_run-"))
    return *paths, names, out, "keep" in values

def preload():
    """Import the libraries that the runs need, so that they need not do it one by one."""
    os.environ |= dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    for name in PRELOAD.split():
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"{name} is not there, cases that need it will fail: {error}")

def report(name, found, seconds):
    """Print the line of a case, and the first sentences about what differs."""
    word = "same"
    if found:
        word = f"DIFFERENT in {len(found)}"
    times = " + ".join(f"{side:.0f}" for side in seconds)
    print(f"{name:<12} {word:<16} {times} s", flush=True)
    for sentence in found[:5]:
        print(f"    {sentence}", flush=True)

def run_cases(names, old, new, out, keep):
    """Run cases and report each when both sides have ended; return the names of those that differ."""
    jobs = {}
    ended = {}
    different = []
    for name in names:
        for side, checkout in (("old", old), ("new", new)):
            folder = os.path.join(out, side, name)
            shutil.rmtree(folder, ignore_errors=True)
            jobs[name, side] = (checkout, old, CASES[name], folder)
    for job, code, seconds in run_jobs(jobs, run_case):
        ended[job] = code, seconds
        name = job[0]
        sides = (name, "old"), (name, "new")
        if not all(side in ended for side in sides):
            continue
        codes, times = zip(*(ended[side] for side in sides))
        folders = [jobs[side][-1] for side in sides]
        found = verdict(folders, codes)
        report(name, found, times)
        if found:
            different.append(name)
        elif not keep:
            for folder in folders:
                shutil.rmtree(folder)
    return different

def main(argv):
    """Run all cases, print a line for each; return 1 if one of them differs."""
    old, new, names, out, keep = parse(argv)
    began = time.time()
    preload()
    different = run_cases(names, old, new, out, keep)
    noisy = [name for name in different if name in NOISY]
    if noisy:
        print("once more, since a browser is not exact:")
        still = run_cases(noisy, old, new, out, keep)
        different = [name for name in different if name not in noisy or name in still]
    words = ", ".join(different) or "none"
    print(f"{len(names)} cases in {time.time() - began:.0f} s; different: {words}; folder: {out}")
    for folder in (os.path.join(out, "old"), os.path.join(out, "new"), out):
        if not os.listdir(folder):
            os.rmdir(folder)
    return bool(different)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
