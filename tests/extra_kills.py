"""
Kill runs, fill their disk, send them signals; go on as the program says; compare with a run in peace.

    python tests/extra_kills.py                        # every file operation of every kind of start, an hour
    python tests/extra_kills.py --each=20              # twenty of each
    python tests/extra_kills.py --each=20 --seed=3     # twenty others

Faults: SIGKILL in the middle of a file operation, SIGKILL at a moment, a full disk, SIGTERM at a moment.
Starts: a new run, a resumed run, a run that overwrites another one.
A run that cannot go on, ends with other bytes, loses or doubles a turn, or shows a traceback is a failure.
"""
import contextlib, json, os, random, shutil, signal, sys, tempfile, time, traceback

import torch

sys.path[:0] = [os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")]
import train
from extras.checkpoints import has_checkpoint
from faults import OPERATIONS, faults
from small_runs import FEW, content, flags, make_tiny, metrics

KEYS = FEW | dict(eval_interval=2, data_episodes=6, max_turns=3, eval_episodes=2, log_interval=3)

def argv(out, **changes):
    """Write the command line of a run; its out_dir is in the working directory."""
    return flags(**KEYS | dict(model="tiny", out_dir=out) | changes)

def child(words, log, fault):
    """Run train.py with a fault, in a process of its own: what follows the fork."""
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    # a shell's background jobs ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        with fault:
            train.launch(words)
        code = 0
    except SystemExit as error:
        print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def start(words, log, fault=contextlib.nullcontext(), after=None, number=signal.SIGKILL):
    """Run train.py in a fork -> (exit code, what it said). after: seconds until a signal is sent."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        child(words, log, fault)
    if after is not None:
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    with open(log, errors="replace") as f:
        said = f.read()
    return os.waitstatus_to_exitcode(status), said

def go_on(out):
    """Choose the flag that the program names in such a folder."""
    if os.path.exists(os.path.join(out, ".overwrite")):
        return dict(overwrite=True)
    if has_checkpoint(out):
        return dict(resume=True)
    return {}

def ends(out):
    """Read all that a run has to repeat: metrics, weights, optimizer, recorded and own play."""
    found = dict(metrics=metrics(out))
    for name in ("ckpt", "data", "replay"):
        folder = os.path.join(out, name)
        found[name] = content(folder, "adapter_model.safetensors", "q_head.safetensors", "optimizer.pt",
                              "metadata.jsonl", "state.json")
    for name in ("eval.json", "eval_offline.json"):
        with open(os.path.join(out, name)) as f:
            saved = json.load(f)
        found[name] = saved.get("results", saved)
    return found

def prepare(kind, out):
    """Make the folder from which a kind of start begins -> its flags."""
    shutil.rmtree(out, ignore_errors=True)
    if kind == "new":
        return {}
    shutil.copytree("stopped", out)
    if kind == "resumed":
        return dict(resume=True)
    return dict(overwrite=True)

def try_one(kind, what, expected, fault=contextlib.nullcontext(), **options):
    """Start with a fault, go on without one, compare -> one sentence for a failure, '' for none."""
    changes = prepare(kind, "run")
    code, said = start(argv("run", **changes), "first.log", fault, **options)
    if "Traceback" in said:
        return f"{kind}, {what}: traceback\n{said[-1500:]}"
    tries = 0
    while code != 0 or not os.path.exists(os.path.join("run", "eval.json")):
        tries += 1
        code, said = start(argv("run", **go_on("run")), "second.log")
        if tries == 3 or "Traceback" in said:
            return f"{kind}, {what}: does not go on\n{said[-1500:]}"
    found = ends("run")
    different = [name for name in expected if found[name] != expected[name]]
    if different:
        return f"{kind}, {what}: other {', '.join(different)}"
    return ""

def count_operations(kind):
    """Count the file operations of a start in peace -> (their number, its seconds)."""
    changes = prepare(kind, "run")
    reader, writer = os.pipe()
    began = time.time()

    @contextlib.contextmanager
    def counting():
        with faults():
            yield
        os.write(writer, str(OPERATIONS.count).encode())

    start(argv("run", **changes), "count.log", counting())
    return int(os.read(reader, 100)), time.time() - began

def trials(kind, each, rng):
    """List the faults of one kind of start: (what, options of try_one)."""
    n, seconds = count_operations(kind)
    numbers = list(range(1, n + 1))
    for mode in ("kill", "full"):
        chosen = sorted(rng.sample(numbers, min(each or n, n)))
        for at in chosen:
            yield f"{mode} at operation {at} of {n}", dict(fault=faults(at, mode))
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        for _ in range(each or 30):
            after = rng.uniform(0.05, seconds)
            yield f"{number.name} after {after:.2f} s", dict(after=after, number=number)

def try_all(kind, faults_of_kind, expected):
    """Try several faults of one kind of start -> one sentence each, '' for no failure."""
    found = []
    for what, options in faults_of_kind:
        found.append(try_one(kind, what, expected, **options))
        if found[-1]:
            print(found[-1], flush=True)
    print(f"{kind}: {len(found)} faults", flush=True)
    return found

def main(words):
    """Try all faults that the command line asks for; exit with 1 if one of them does harm."""
    numbers = dict(word.lstrip("-").split("=") for word in words)
    rng = random.Random(int(numbers.get("seed", 0)))
    each = int(numbers.get("each", 0))
    torch.set_num_threads(1)
    failures = []
    n = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_tiny("tiny")
        code, said = start(argv("peace"), "peace.log")
        assert code == 0, said
        expected = ends("peace")
        start(argv("stopped", stop_at=5), "stopped.log")
        for kind in ("new", "resumed", "overwriting"):
            found = try_all(kind, trials(kind, each, rng), expected)
            n += len(found)
            failures += filter(None, found)
        os.chdir("/")
    print(f"{n} faults, {len(failures)} failures")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main(sys.argv[1:])
