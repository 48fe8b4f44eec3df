"""
Checkpoints that can be trusted: whole, checked, and with what they saw of the recorded play.

    ckpt           the newest
    ckpt.old       the one before it, for the day on which the newest is damaged
    state.json     in a checkpoint: its update, digests of its files, what it saw of the play
"""
import contextlib, hashlib, itertools, json, os, pickle, shutil, weakref

import torch

from configurator import ConfigError, is_number
from extras.whole_files import list_files, read_json, sync_folder, write_whole, written_aside
from model import gather, ranks

# {buffer: (bytes of its file, their digest so far)}
READ_SO_FAR = weakref.WeakKeyDictionary()


# ---- the play that a checkpoint has seen ----

def describe_play(buffer):
    """Return what a checkpoint notes about a buffer, {"rows", "digest"}; only what is new is read."""
    size, digest = READ_SO_FAR.get(buffer, (0, hashlib.sha1()))
    if os.path.exists(buffer.file):
        end = os.path.getsize(buffer.file) - buffer.torn_bytes
        with open(buffer.file, "rb") as f:
            f.seek(size)
            # in blocks: the file may be larger than the memory
            while block := f.read(min(end - size, 2**22)):
                digest.update(block)
                size = f.tell()
    READ_SO_FAR[buffer] = (size, digest)
    return dict(rows=len(buffer), digest=digest.hexdigest())

def refuse_play(folder, rows, noted):
    """End with one sentence about play that is not what a checkpoint saw. rows: how many are there now."""
    remedy = "put back what was there, or start a new run in another out_dir"
    if rows != noted["rows"]:
        raise SystemExit(f"{folder!r} holds {rows} rows, and the checkpoint has seen {noted['rows']}: "
                         f"{remedy}.")
    raise SystemExit(f"{folder!r} holds other rows than the checkpoint has seen: {remedy}.")

def check_data(data, noted):
    """Refuse to resume on other recorded play than the checkpoint saw. noted: see describe_play."""
    # old runs did not note it
    if noted and describe_play(data) != noted:
        refuse_play(data.folder, len(data), noted)

def check_replay(folder, noted):
    """Refuse to resume unless the agent's play begins with what the checkpoint saw.

    Rows behind it will be played again.
    """
    file = os.path.join(folder, "metadata.jsonl")
    digest = hashlib.sha1()
    n = 0
    if noted["rows"] and os.path.exists(file):
        with open(file, "rb") as f:
            for line in itertools.islice(f, noted["rows"]):
                digest.update(line)
                n += 1
    # old runs know the number only
    if n < noted["rows"] or noted["digest"] not in ("", digest.hexdigest()):
        refuse_play(folder, n, noted)


# ---- writing ----

def check_ranks_agree(data, vlm):
    """End with one sentence if the ranks hold different data or weights."""
    sums = []
    if ranks()[1] > 1:
        for p in vlm.parameters():
            # a sharded weight is a DTensor and not a plain Parameter
            if type(p) is torch.nn.Parameter:
                sums.append(float(p.detach().sum(dtype=torch.float64)))
    own = (len(data), sums)
    if any(other != own for other in gather(own)):
        raise SystemExit("The ranks do not hold the same data and weights: give all machines the same "
                         "model, data and versions; the last checkpoint is still there.")

def check_finite(vlm, step):
    """End with one sentence rather than save weights that are not finite."""
    trained = [p for p in vlm.parameters() if p.requires_grad]
    if not all(bool(p.isfinite().all()) for p in trained):
        raise SystemExit(f"The weights are not finite after update {step} and are not saved: go on from the "
                         "last checkpoint with a lower lr or critic_lr.")

def file_digest(file):
    """Compute the digest of a file."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

@contextlib.contextmanager
def new_checkpoint(run, state):
    """Write a checkpoint into the folder that the with block gets.

    It takes its place when all of it is on the disk. The one before it becomes ckpt.old. state: what
    state.json holds, beside the digests of the files.
    """
    ckpt = os.path.join(run, "ckpt")
    with written_aside(ckpt) as aside:
        yield aside
        files = {name: file_digest(os.path.join(aside, name)) for name in list_files(aside)}
        write_whole(os.path.join(aside, "state.json"), json.dumps(state | dict(files=files)))
    if os.path.exists(ckpt):
        shutil.rmtree(ckpt + ".old", ignore_errors=True)
        os.rename(ckpt, ckpt + ".old")
    os.rename(aside, ckpt)
    sync_folder(run)
    shutil.rmtree(ckpt + ".damaged", ignore_errors=True)

def set_damaged_aside(run, checkpoint):
    """Make the checkpoint from which a run goes on its newest one; a damaged one is kept until the next."""
    ckpt = os.path.join(run, "ckpt")
    if checkpoint == ckpt:
        return
    if os.path.exists(ckpt):
        shutil.rmtree(ckpt + ".damaged", ignore_errors=True)
        os.rename(ckpt, ckpt + ".damaged")
    os.rename(checkpoint, ckpt)


# ---- reading ----

def is_play(noted):
    """Tell whether this is what describe_play returns."""
    if not isinstance(noted, dict):
        return False
    rows = noted.get("rows")
    return type(rows) is int and rows >= 0 and isinstance(noted.get("digest"), str)

def is_unlogged(noted):
    """Tell whether this is what extras.unlogged makes of a line of metrics that is not yet written."""
    if not isinstance(noted, dict) or not noted.keys() <= {"infos", "skipped", "in_a_row"}:
        return False
    infos = noted.get("infos", [])
    if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
        return False
    numbers = [noted.get("skipped", 0), noted.get("in_a_row", 0)]
    for info in infos:
        numbers += info.values()
    return all(map(is_number, numbers))

def read_state(folder):
    """Read state.json of a checkpoint -> {step, files, data, replay, unlogged}; ConfigError if it is damaged.

    data, replay: see describe_play, replay for each rank. Those of old runs are filled in.
    """
    file = os.path.join(folder, "state.json")
    state = read_json(file)
    rows = state.get("replay_rows")
    # one number before there were ranks
    rows = rows if isinstance(rows, list) else [rows]
    digests = state.get("replay_digests", [""] * len(rows))
    replay = []
    if isinstance(digests, list) and len(digests) == len(rows):
        replay = [dict(rows=n, digest=digest) for n, digest in zip(rows, digests)]
    files = state.get("files", {})
    unlogged = state.get("unlogged", {})
    data = state.get("data", dict(rows=0, digest=""))
    step = state.get("step")
    is_right = type(step) is int and step >= 0 and isinstance(files, dict) and is_unlogged(unlogged)
    if not is_right or not replay or not all(map(is_play, [data, *replay])):
        raise ConfigError(f"{file} is damaged, it does not describe a checkpoint: copy the run again.")
    return dict(step=state["step"], files=files, data=data if "data" in state else None, replay=replay,
                unlogged=unlogged)

def find_fault(folder, skip=()):
    """Say what is wrong with a checkpoint -> '' if all of its files are as they were written."""
    try:
        files = read_state(folder)["files"]
    except ConfigError:
        return "state.json is damaged"
    there = list_files(folder)
    for name, digest in files.items():
        if name in skip:
            continue
        if name not in there:
            return f"{name} is missing"
        if file_digest(os.path.join(folder, name)) != digest:
            return f"{name} is damaged"
    return ""

def has_checkpoint(run):
    """Tell whether a run has a checkpoint, good or damaged."""
    return any(os.path.exists(os.path.join(run, name, "state.json")) for name in ("ckpt", "ckpt.old"))

def find_checkpoint(run, skip=()):
    """Return the folder of a run's newest good checkpoint, and say so if a newer one is damaged.

    skip: files that are not needed. SystemExit with one sentence if there is none.
    """
    faults = []
    for name in ("ckpt", "ckpt.old"):
        folder = os.path.join(run, name)
        if not os.path.isdir(folder):
            continue
        fault = find_fault(folder, skip)
        if fault:
            faults.append(f"{folder}: {fault}")
            continue
        if name == "ckpt.old" and not faults:
            faults.append(f"{run}/ckpt is not there")
        if faults:
            print(f"{faults[0]}; going on from {folder}, update {read_state(folder)['step']}.")
        return folder
    if faults:
        raise SystemExit(f"{run!r} holds no good checkpoint ({'; '.join(faults)}): copy the run again, or "
                         "train it anew.")
    raise SystemExit(f"{run!r} holds no checkpoint: let its training reach one first.")

def load_moments(file, vlm, optimizer):
    """Load the state of AdamW; the learning rates stay those of the command line."""
    bases = [group["base"] for group in optimizer.param_groups]
    try:
        state = torch.load(file, map_location=vlm.device, weights_only=True)
        for group in state["param_groups"]:
            # a choice of this device, not of the one that wrote the file
            group["fused"] = optimizer.defaults["fused"]
        optimizer.load_state_dict(state)
    # a damaged zip archive has many errors, a stranger's pickle has its own
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise SystemExit(f"{file} does not load ({type(error).__name__}): copy the run again, or start anew.")
    for group, base in zip(optimizer.param_groups, bases):
        group["base"] = base
