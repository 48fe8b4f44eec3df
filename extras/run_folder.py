"""
Keep the folder of a run in order: what may be started there, and what an earlier start has left.

    .lock            held while a process writes into the folder; a dead process holds nothing
    .overwrite       there while an earlier run is being deleted
    config.json      and the other tables: replaced as a whole, see extras/whole_files.py
    data             recorded play, complete; data.partial-1, ...: of a start that ended before it was
    ckpt, ckpt.old   see extras/checkpoints.py
"""
import contextlib, itertools, json, os, re, shutil, subprocess
from types import SimpleNamespace

from configurator import ConfigError
from extras.checkpoints import check_replay, find_checkpoint, has_checkpoint, read_state, refuse_play
from extras.flag_mistakes import show
from extras.old_runs import keep_head_width
from extras.read_run import read_run_config
from extras.whole_files import lock, read_json, sync_folder, write_json, write_whole

# What a run writes into its folder, and what `overwrite` may delete; replay-1, ... are those of other ranks.
RUN_FILES = ("config.json", "metrics.jsonl", "eval.json", "eval_offline.json", "meta.json")
RUN_FILES += ("ckpt", "ckpt.old", "ckpt.tmp", "ckpt.damaged", "data", "data.tmp")
RUN_FILES += ("replay", "served", "model", "model.tmp", "report.html", "curves.svg")
MORE_RUN_FILES = re.compile(r"replay-\d+|data\.partial-\d+|[\w.]+\.(json|jsonl)\.tmp")
# A folder of recorded play has these files, and what a report on it adds.
DATA_FILES = re.compile(r"metadata\.jsonl(\.tmp)?|rewound\.jsonl|images|complete|\.lock|.+\.(html|svg|gif)")
# With one of these a run has come so far that it is not begun anew by accident.
TRAINED = ("ckpt", "ckpt.old", "eval.json", "model")
# Settings that a resumed run may change, because they do not alter what is learned, ...
FREE_KEYS = ("out_dir", "resume", "overwrite", "stop_at", "device", "shard", "compile", "env_timeout")
FREE_KEYS += ("log_interval", "eval_interval", "eval_episodes", "trust_remote_code", "rollout_url")
# ... or because they are the remedy for a run that does not learn.
REMEDY_KEYS = ("lr", "critic_lr", "grad_clip")
# the folder that this process writes, for the sentence that ends it
CLAIMED = SimpleNamespace(run="")


# ---- whose folder it is ----

def is_run(run):
    """Tell whether train.py has written into a folder; other programs have a config.json, too."""
    if has_checkpoint(run) or os.path.exists(os.path.join(run, ".overwrite")):
        return True
    file = os.path.join(run, "config.json")
    if not os.path.exists(file):
        return False
    try:
        return {"actor_loss", "offline_updates"} <= read_json(file).keys()
    except ConfigError:
        return os.path.exists(os.path.join(run, "metrics.jsonl"))

def is_recorded(folder):
    """Tell whether a folder holds recorded play."""
    return os.path.lexists(os.path.join(folder, "metadata.jsonl"))

def existing_files(run):
    """List what an earlier run has left in a folder.

    SystemExit with one sentence if no run has been there, and a file of such a name is.
    """
    if not os.path.isdir(run):
        return []
    found = [name for name in RUN_FILES if os.path.lexists(os.path.join(run, name))]
    found += [name for name in sorted(os.listdir(run)) if MORE_RUN_FILES.fullmatch(name)]
    # a folder beneath data, a teacher's for one, is somebody else's
    is_deleted = os.path.exists(os.path.join(run, ".overwrite"))
    if "data" in found and not is_deleted and not is_recorded(os.path.join(run, "data")):
        found.remove("data")
    if not is_run(run):
        # a start that ended while it recorded has left nothing else
        others = [name for name in found if not name.startswith("data")]
        if others:
            raise SystemExit(f"out_dir={run!r} holds {others[0]!r}, and no run of this program has written "
                             "there: choose another out_dir.")
    return found

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
        if os.path.isdir(path) and name.startswith(("data", "replay")):
            others = [inside for inside in sorted(os.listdir(path)) if not DATA_FILES.fullmatch(inside)]
            if others:
                path = os.path.join(path, others[0])
                raise SystemExit(f"{path!r} was not written by the run that overwrite would delete: move it, "
                                 "or choose another out_dir.")

def check_no_links(run):
    """Refuse a run with links where a resumed run writes; a link to recorded data is only read."""
    for name in existing_files(run):
        path = os.path.join(run, name)
        places = [path]
        if name.startswith("replay") and os.path.isdir(path):
            places += [os.path.join(path, inside) for inside in os.listdir(path)]
        links = [place for place in places if os.path.islink(place)]
        if links and name != "data":
            raise SystemExit(f"{links[0]!r} is a link, and a resumed run writes there: put what it leads to "
                             "in its place.")

def check_room_for_data(run, found):
    """Refuse a run that records play where its folder `data` is somebody else's."""
    data = os.path.join(run, "data")
    if os.path.lexists(data) and "data" not in found:
        raise SystemExit(f"{data!r} is there and holds no play recorded by a run: move it, or choose another "
                         "out_dir.")

def remove(run, names):
    """Delete files and folders of a run."""
    for name in names:
        path = os.path.join(run, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.remove(path)

def delete_run(run, found):
    """Delete an earlier run's files; a marker stays until `begin`, so that a crash is noticed."""
    if found:
        write_whole(os.path.join(run, ".overwrite"), "")
    remove(run, found)

def begin(run, cfg):
    """Make a folder that of a new run: from here on its config.json tells that it is one."""
    write_json(os.path.join(run, "config.json"), vars(cfg))
    marker = os.path.join(run, ".overwrite")
    if os.path.exists(marker):
        os.remove(marker)


# ---- what may be started ----

def check_not_deleted(run):
    """Refuse a folder in which an earlier run was being deleted."""
    if os.path.exists(os.path.join(run, ".overwrite")):
        raise SystemExit(f"out_dir={run!r} was being deleted when that was interrupted: --overwrite=True "
                         "goes on with it and starts again.")

def check_new(run, found):
    """Refuse a new run in a folder that holds another one; a start without a checkpoint is none."""
    check_not_deleted(run)
    trained = [name for name in TRAINED if name in found]
    if trained:
        resume = "--resume=True continues it, " if has_checkpoint(run) else ""
        raise SystemExit(f"out_dir={run!r} already holds a run ({trained[0]}): {resume}"
                         "--overwrite=True deletes it, another --out_dir keeps it.")

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

def check_play(run, data, state):
    """Refuse to resume without the play that a checkpoint saw. state: of the checkpoint.

    data: the folder of recorded episodes; '': that of the run. What is in it is checked when it is open.
    """
    folder = os.path.join(run, "data")
    if not data and not is_recorded(folder):
        refuse_play(folder, 0, state["data"] or dict(rows="its"))
    for rank, noted in enumerate(state["replay"]):
        check_replay(replay_folder(run, rank), noted)

def enter(cfg, checkpoint):
    """Let a rank know where its run writes and, if it goes on, how wide its Q heads are."""
    CLAIMED.run = cfg.out_dir
    if checkpoint:
        keep_head_width(cfg, checkpoint)

def check_resumed(run, cfg):
    """Find the checkpoint from which a run goes on; SystemExit with one sentence for what does not fit it."""
    check_not_deleted(run)
    check_no_links(run)
    check_same_settings(run, cfg)
    checkpoint = find_checkpoint(run)
    state = read_state(checkpoint)
    if 0 < cfg.stop_at <= state["step"]:
        raise SystemExit(f"stop_at={cfg.stop_at}, and the run in {run!r} is at update {state['step']} "
                         "already: name a later update, or leave stop_at out.")
    check_play(run, cfg.data, state)
    return checkpoint

def clear(run, cfg, recipe):
    """Make room for a new run: check all that is there, then delete what an earlier one has left."""
    found = existing_files(run)
    if cfg.overwrite:
        check_deletable(run, found, dict(data=cfg.data, model=cfg.model))
    else:
        check_new(run, found)
    if not cfg.data:
        check_room_for_data(run, found)
    if cfg.overwrite:
        delete_run(run, found)
        return
    if not cfg.data and "data" in found:
        check_recipe(os.path.join(run, "data"), recipe)
    # a start that came to no checkpoint: this one begins again, and what was played is kept
    remove(run, [name for name in found if not name.startswith(("data", "replay", "config"))])

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
        return check_resumed(run, cfg)
    clear(run, cfg, recipe)
    begin(run, cfg)
    return None

def way_on():
    """Say how to go on after an end that came too early."""
    run = CLAIMED.run
    if not run:
        return "nothing was written"
    if os.path.exists(os.path.join(run, ".overwrite")):
        return "--overwrite=True goes on with the deletion and starts again"
    for name in ("ckpt", "ckpt.old"):
        with contextlib.suppress(ConfigError):
            step = read_state(os.path.join(run, name))["step"]
            return f"the last checkpoint is that of update {step}, --resume=True goes on from there"
    return "there is no checkpoint yet, the same command without resume and overwrite starts again"


# ---- what a run notes about itself ----

def git_commit():
    """Get the commit of this code, 'unknown' without git."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        out = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return out.stdout.strip() or "unknown"

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
