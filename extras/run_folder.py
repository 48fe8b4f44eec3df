"""
Keep a run safe on disk: what may be started in its folder, and checkpoints that can be trusted.

    .lock            held while a process writes into the folder; a dead process holds nothing
    .overwrite       there while an earlier run is being deleted
    config.json      and the other files: written aside, flushed, renamed, so that none is ever half a file
    data             recorded play, complete; data.partial-1, ...: of a start that ended before it was
    ckpt, ckpt.old   the newest checkpoint, and the one before it for the day on which the newest is damaged
    state.json       in a checkpoint: its update, digests of its files, what it saw of the recorded play
"""
import contextlib, hashlib, itertools, json, os, re, shutil
from types import SimpleNamespace

from configurator import ConfigError, check_config, finite, fit, is_number, parse_block
from extras.flag_mistakes import show
from extras.old_runs import check_removed_keys
from extras.whole_files import LOCKS, lock, read_json, sync_folder, write_json, write_whole, written_aside
from model import LORA_ALPHA

# the keys of a run, and their defaults
TRAIN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")
# What a run writes into its folder, and what `overwrite` may delete; replay-1, ... are those of other ranks.
RUN_FILES = ("config.json", "metrics.jsonl", "eval.json", "eval_offline.json", "meta.json")
RUN_FILES += ("ckpt", "ckpt.old", "ckpt.tmp", "ckpt.damaged", "data", "data.tmp")
RUN_FILES += ("replay", "model", "model.tmp", "report.html", "curves.svg")
MORE_RUN_FILES = re.compile(r"replay-\d+|data\.partial-\d+|[\w.]+\.(json|jsonl)\.tmp")
# A folder of recorded play has these files, and what a report on it adds.
DATA_FILES = re.compile(r"metadata\.jsonl(\.tmp)?|rewound\.jsonl|images|complete|\.lock|.+\.(html|svg|gif)")
# Without one of these a start has left nothing to go on from.
TRAINED = ("ckpt", "ckpt.old", "eval.json", "model")
# Settings that a resumed run may change, because they do not alter what is learned, ...
FREE_KEYS = ("out_dir", "resume", "overwrite", "stop_at", "device", "shard", "env_timeout")
FREE_KEYS += ("log_interval", "eval_interval", "eval_episodes", "trust_remote_code")
# ... or because they are the remedy for a run that does not learn.
REMEDY_KEYS = ("lr", "critic_lr", "grad_clip")


# ---- what is in a run's folder ----

def read_run_config(run, purpose="play"):
    """Read the settings that a run was trained with; a key that the run did not know has its default.

    purpose: "play", "report" or "resume". ConfigError if an old run cannot do that any more as it did.
    """
    file = os.path.join(run, "config.json")
    if not os.path.exists(file):
        raise ConfigError(f"{run!r} is no run folder: it has no config.json; train one with python train.py "
                          f"config/numberline.py --out_dir={run}")
    saved = read_json(file)
    check_removed_keys(run, saved, purpose)
    if saved.get("mdp") == "turn":
        # a key of old runs that has become a value of trace
        saved["trace"] = "turn"
    settings = {}
    for name, key in parse_block(TRAIN).items():
        value = saved.get(name, key.default)
        settings[name] = fit(name, key, f"{file}: {name}={show(repr(value))}", lambda: checked(value))
    if purpose != "resume" and settings["device"] == "cuda":
        # a run from a GPU can be looked at on a machine without one
        settings["device"] = "auto"
    # an old run's adapter keeps its alpha
    return check_config(SimpleNamespace(**settings, lora_alpha=saved.get("lora_alpha", LORA_ALPHA)))

def distrust(run_cfg, cfg):
    """Take what a stranger's run may not decide from evaluate.py's own command line -> the run's settings.

    Its config.json names a model, and a model may bring code: only the person at the keyboard lets it run.
    """
    run_cfg.trust_remote_code = cfg.trust_remote_code
    run_cfg.device = cfg.device or run_cfg.device
    return run_cfg

def write_eval(run, content):
    """Write a run's eval.json; a run that cannot be written is evaluated all the same."""
    file = os.path.join(run, "eval.json")
    try:
        write_json(file, content)
    except OSError as error:
        print(f"{file} is not written ({error.strerror}): the table is printed here only.")

def checked(value):
    """Return a value of a JSON file; ValueError for NaN and Infinity, which are no JSON."""
    return finite(value) if is_number(value) else value

def offline_results(run):
    """Read what a run with two phases reached before it played itself: {name: summary}, empty for others."""
    file = os.path.join(run, "eval_offline.json")
    if not os.path.exists(file):
        return {}
    return read_json(file)

def existing_files(run):
    """List what is in a folder of an earlier run."""
    if not os.path.isdir(run):
        return []
    found = [name for name in RUN_FILES if os.path.lexists(os.path.join(run, name))]
    found += [name for name in sorted(os.listdir(run)) if MORE_RUN_FILES.fullmatch(name)]
    # a folder beneath data, a teacher's for one, is somebody else's
    if "data" in found and not is_recorded(os.path.join(run, "data")):
        found.remove("data")
    return found

def is_recorded(folder):
    """Tell whether a folder holds recorded play."""
    return os.path.lexists(os.path.join(folder, "metadata.jsonl"))

def check_deletable(run, found, kept):
    """Refuse to delete a run that holds what is not its own, before anything is deleted.

    kept: {key: path} of the new run, which may lie in the old one.
    """
    for name in found:
        path = os.path.join(run, name)
        if os.path.islink(path):
            raise SystemExit(f"{path!r} is a link, and overwrite does not follow it: remove the link, or "
                             "choose another out_dir.")
        inside = os.path.realpath(path) + os.sep
        for key, value in kept.items():
            if value and (os.path.realpath(value) + os.sep).startswith(inside):
                raise SystemExit(f"{key}={value!r} is in the run that overwrite would delete: move it, or "
                                 "choose another out_dir.")
    if "data" in found:
        names = sorted(os.listdir(os.path.join(run, "data")))
        others = [name for name in names if not DATA_FILES.fullmatch(name)]
        if others:
            path = os.path.join(run, "data", others[0])
            raise SystemExit(f"{path!r} was not written by the run that overwrite would delete: move it, or "
                             "choose another out_dir.")

def delete_run(run, found):
    """Delete an earlier run's files; a marker stands until all are gone, so that a crash is noticed."""
    marker = os.path.join(run, ".overwrite")
    if found:
        write_whole(marker, "")
    for name in found:
        path = os.path.join(run, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.remove(path)
    if os.path.exists(marker):
        os.remove(marker)

def check_not_deleted(run):
    """Refuse a folder in which an earlier run was being deleted."""
    if os.path.exists(os.path.join(run, ".overwrite")):
        raise SystemExit(f"out_dir={run!r} was being deleted when that was interrupted: --overwrite=True "
                         "goes on with it and starts again.")

def check_new(run, found, records):
    """Refuse a new run in a folder that holds another one; a start without a checkpoint is none.

    records: the run will record play into its folder `data`.
    """
    check_not_deleted(run)
    trained = [name for name in TRAINED if name in found]
    if trained:
        raise SystemExit(f"out_dir={run!r} already holds a run ({trained[0]}): --resume=True "
                         "continues it, --overwrite=True deletes it, another --out_dir keeps it.")
    data = os.path.join(run, "data")
    if records and os.path.lexists(data) and not is_recorded(data):
        raise SystemExit(f"{data!r} is there and holds no play recorded by a run: move it, or choose another "
                         "out_dir.")

def check_same_settings(run, cfg):
    """Refuse to resume with other settings than the run's; print those that are changed on purpose."""
    old = read_run_config(run, "resume")
    for key in REMEDY_KEYS:
        before = getattr(old, key)
        value = getattr(cfg, key)
        if value != before:
            print(f"{key} was {show(repr(before))}, and is {value} from here on.")
    free = [*FREE_KEYS, *REMEDY_KEYS]
    # A finished run can be made longer. Without an online phase it cannot: its table is the offline one.
    if cfg.online_updates > old.online_updates > 0:
        free.append("online_updates")
    for key, value in json.loads(json.dumps(vars(cfg))).items():
        before = getattr(old, key)
        moved = key == "model" and value == f"bases/{before}"
        if key not in free and value != before and not moved:
            raise SystemExit(f"{key}={getattr(cfg, key)!r} but the run in {run!r} has "
                             f"{key}={show(repr(before))}: resume with the same settings, or start a new "
                             "out_dir.")


def claim(cfg, recipe):
    """Make out_dir and become its only writer -> the checkpoint to go on from, None for a new run.

    cfg: train.py's settings. recipe: see check_recipe. SystemExit with one sentence for what does not fit.
    """
    run = cfg.out_dir
    if cfg.resume and not has_checkpoint(run):
        raise SystemExit(f"out_dir={run!r} has no checkpoint to resume from: start without --resume.")
    os.makedirs(run, exist_ok=True)
    lock(run)
    if cfg.resume:
        check_not_deleted(run)
        check_same_settings(run, cfg)
        checkpoint = find_checkpoint(run)
        check_play(run, cfg.data, read_state(checkpoint))
        return checkpoint

    found = existing_files(run)
    if cfg.overwrite:
        check_deletable(run, found, dict(data=cfg.data, model=cfg.model))
        delete_run(run, found)
        return None
    check_new(run, found, records=not cfg.data)
    if not cfg.data and "data" in found:
        check_recipe(os.path.join(run, "data"), recipe)
    if "metrics.jsonl" in found:
        # a start that came to no checkpoint: this one begins again
        os.remove(os.path.join(run, "metrics.jsonl"))
    return None

def read_step(line):
    """Return the update that a line of metrics.jsonl is about, None if the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    is_whole = line.endswith("\n") and type(step) is int
    return step if is_whole else None

def rewind_metrics(file, step):
    """Cut metrics.jsonl at a checkpoint: the lines behind it will come again."""
    if not os.path.exists(file):
        print(f"{file} is missing: what it said about the first {step} updates is lost.")
        return
    kept = []
    with open(file, errors="replace") as f:
        for number, line in enumerate(f, 1):
            step_of_line = read_step(line)
            if step_of_line is None:
                print(f"{file}, line {number}, is damaged and is left out.")
            elif step_of_line <= step:
                kept.append(line)
    write_whole(file, "".join(kept))


# ---- recorded play ----

def replay_folder(run, rank):
    """Name the folder of a rank's own play."""
    return os.path.join(run, f"replay-{rank}" if rank else "replay")

def next_partial(folder):
    """Return the next free name for play of a start that was interrupted: data.partial-1, ..."""
    names = (f"{folder}.partial-{n}" for n in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))

def keep_partial(folder):
    """Keep what an interrupted start has recorded in folder.tmp, if anything, under a name of its own."""
    aside = folder + ".tmp"
    file = os.path.join(aside, "metadata.jsonl")
    if os.path.exists(file) and os.path.getsize(file):
        name = next_partial(folder)
        os.rename(aside, name)
        print(f"What was recorded before the end is kept in {name}; --data={name} trains on it.")
    shutil.rmtree(aside, ignore_errors=True)

@contextlib.contextmanager
def recording(folder, recipe):
    """Record into a folder in a with block: it is there when it is complete, and not before.

    recipe: the settings that decide what is recorded; they become the marker `complete`.
    """
    keep_partial(folder)
    try:
        yield folder + ".tmp"
        write_json(os.path.join(folder + ".tmp", "complete"), recipe)
    except BaseException:
        keep_partial(folder)
        raise
    os.rename(folder + ".tmp", folder)
    sync_folder(os.path.dirname(folder))

def check_recipe(folder, recipe):
    """Refuse play in a run's folder that other settings recorded, or that lacks its marker."""
    marker = os.path.join(folder, "complete")
    if not os.path.exists(marker):
        raise SystemExit(f"{folder!r} holds play without the marker `complete`: train on it with "
                         f"--data={folder} and another out_dir, or delete it with --overwrite=True.")
    saved = {}
    if os.path.getsize(marker):
        saved = read_json(marker)
    for key, value in json.loads(json.dumps(recipe)).items():
        if saved.get(key, "unknown") != value:
            before = show(repr(saved.get(key, "unknown")))
            raise SystemExit(f"{folder!r} was recorded with {key}={before}, and now it is "
                             f"{show(repr(value))}: --overwrite=True deletes it, another --out_dir keeps it.")

def fingerprint(folder, rows):
    """Compute a digest of the first rows of a folder of episodes."""
    digest = hashlib.sha1()
    file = os.path.join(folder, "metadata.jsonl")
    if rows and os.path.exists(file):
        with open(file, "rb") as f:
            for line in itertools.islice(f, rows):
                digest.update(line)
    return digest.hexdigest()

def seen(buffer):
    """Describe the play that a checkpoint has seen: the number of rows and their digest."""
    return dict(rows=len(buffer), digest=fingerprint(buffer.folder, len(buffer)))

def check_seen(folder, before):
    """Refuse to resume on other play than the checkpoint saw. before: what `seen` gave then."""
    file = os.path.join(folder, "metadata.jsonl")
    rows = 0
    if os.path.exists(file):
        with open(file, "rb") as f:
            rows = sum(1 for _ in f)
    remedy = "put back what was there, or start a new run in another out_dir"
    if rows < before["rows"]:
        raise SystemExit(f"{folder!r} holds {rows} rows, and the checkpoint has seen {before['rows']}: "
                         f"{remedy}.")
    # old runs know the number only
    if before["digest"] and fingerprint(folder, before["rows"]) != before["digest"]:
        raise SystemExit(f"{folder!r} holds other rows than the checkpoint has seen: {remedy}.")


def check_play(run, data, state):
    """Refuse to resume unless recorded and own play are what a checkpoint saw. state: of the checkpoint."""
    if "data" in state:
        check_seen(data or os.path.join(run, "data"), state["data"])
    rows = state["replay_rows"]
    # one number before there were ranks
    rows = rows if isinstance(rows, list) else [rows]
    digests = state.get("replay_digests", [""] * len(rows))
    for rank, (n, digest) in enumerate(zip(rows, digests)):
        check_seen(replay_folder(run, rank), dict(rows=n, digest=digest))


# ---- checkpoints ----

def check_finite(vlm, step):
    """End with one sentence rather than save weights that are not finite."""
    trained = [p for p in vlm.parameters() if p.requires_grad]
    if not all(bool(p.isfinite().all()) for p in trained):
        raise SystemExit(f"The weights are not finite after update {step} and are not saved: lower lr or "
                         f"critic_lr; {way_on()}.")

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
        files = {name: file_digest(os.path.join(aside, name)) for name in sorted(os.listdir(aside))}
        write_whole(os.path.join(aside, "state.json"), json.dumps(state | dict(files=files)))
    if os.path.exists(ckpt):
        shutil.rmtree(ckpt + ".old", ignore_errors=True)
        os.rename(ckpt, ckpt + ".old")
    os.rename(aside, ckpt)
    sync_folder(run)

def read_state(folder):
    """Read state.json of a checkpoint; ConfigError if it is damaged."""
    state = read_json(os.path.join(folder, "state.json"))
    if type(state.get("step")) is not int or "replay_rows" not in state:
        raise ConfigError(f"{folder}/state.json is damaged, it names no update: copy the run again.")
    return state

def find_fault(folder):
    """Say what is wrong with a checkpoint -> '' if all of its files are as they were written."""
    try:
        files = read_state(folder).get("files", {})
    except ConfigError:
        return "state.json is damaged"
    for name, digest in files.items():
        path = os.path.join(folder, os.path.basename(name))
        if not os.path.isfile(path):
            return f"{name} is missing"
        if file_digest(path) != digest:
            return f"{name} is damaged"
    return ""

def has_checkpoint(run):
    """Tell whether a run has a checkpoint, good or damaged."""
    return any(os.path.exists(os.path.join(run, name, "state.json")) for name in ("ckpt", "ckpt.old"))

def find_checkpoint(run):
    """Return the folder of a run's newest good checkpoint, and say so if a newer one is damaged.

    SystemExit with one sentence if there is none.
    """
    faults = []
    for name in ("ckpt", "ckpt.old"):
        folder = os.path.join(run, name)
        if not os.path.isdir(folder):
            continue
        fault = find_fault(folder)
        if fault:
            faults.append(f"{folder}: {fault}")
            continue
        if faults:
            print(f"{faults[0]}; going on from {folder}, update {read_state(folder)['step']}.")
        return folder
    if faults:
        raise SystemExit(f"{run!r} holds no good checkpoint ({'; '.join(faults)}): copy the run again, or "
                         "train it anew.")
    raise SystemExit(f"{run!r} holds no checkpoint: let its training reach one first.")

def set_damaged_aside(run, checkpoint):
    """Make the checkpoint from which a run goes on its newest one; a damaged one is kept aside."""
    ckpt = os.path.join(run, "ckpt")
    if checkpoint == ckpt:
        return
    if os.path.exists(ckpt):
        shutil.rmtree(ckpt + ".damaged", ignore_errors=True)
        os.rename(ckpt, ckpt + ".damaged")
    os.rename(checkpoint, ckpt)

def way_on():
    """Say how to go on after an end that came too early."""
    # the run is the folder that this process has locked
    if not LOCKS:
        return "nothing was written"
    run = list(LOCKS)[0]
    for name in ("ckpt", "ckpt.old"):
        with contextlib.suppress(ConfigError):
            step = read_state(os.path.join(run, name))["step"]
            return f"the last checkpoint is that of update {step}, --resume=True goes on from there"
    return "there is no checkpoint yet, the same command without resume and overwrite starts again"
