"""
Run folders that are damaged, in use, not a run at all, or a stranger's.
"""

import contextlib, functools, json, os, shutil, subprocess, sys, tempfile

import torch
from safetensors.torch import load_file, save_file

import evaluate
import train
from extras.run_folder import remove
from extras.whole_files import write_json
from failure_cases import Case
from small_runs import FEW, content, flags, make_tiny, read_json

KEYS = FEW | dict(
    out_dir="run",
    offline_updates=2,
    online_updates=2,
    eval_interval=2,
    data_episodes=4,
    eval_episodes=2,
    rollout_episodes=2,
    num_envs=2,
    max_turns=2,
)


# ---- runs ----


@functools.cache
def home():
    """Make the folder of the tiny model and of the runs that the cases copy, once."""
    folder = tempfile.TemporaryDirectory()
    make_tiny(os.path.join(folder.name, "tiny"))
    return folder


def argv(**changes):
    """Write a command line of train.py for a run in the folder `run`."""
    return flags(**KEYS | dict(model=os.path.join(home().name, "tiny")) | changes)


@functools.cache
def finished(**changes):
    """Train a tiny run once -> its folder, which no case may change."""
    name = os.path.join(home().name, f"run{len(os.listdir(home().name))}")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train.main(argv(**changes | dict(out_dir=name)))
    return name


# ---- commands ----


def go_on(**changes):
    """Resume the run in `run`, and extend it by two updates."""
    train.main(argv(**dict(resume=True, online_updates=4) | changes))
    return "goes on"


def look():
    """Evaluate the run in `run`."""
    evaluate.main(["run", "--episodes=1"])
    return "is evaluated"


def begin(**changes):
    """Start a new run in `run`."""
    train.main(argv(**changes))
    return "starts"


# ---- damage ----


def text(name, content):
    """Return what replaces the content of a file of the run."""

    def damage(run):
        with open(os.path.join(run, name), "w") as f:
            f.write(content)

    return damage


def cut(name, share=0.5):
    """Return what cuts a file."""

    def damage(run):
        file = os.path.join(run, name)
        os.truncate(file, int(os.path.getsize(file) * share))

    return damage


def flip(name):
    """Return what changes one byte in the middle of a file."""

    def damage(run):
        with open(os.path.join(run, name), "rb+") as f:
            f.seek(os.path.getsize(f.name) // 2)
            byte = f.read(1)[0]
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte ^ 1]))

    return damage


def without(*names):
    """Return what deletes files or folders."""
    return lambda run: remove(run, names)


def keys(name, **changes):
    """Return what changes keys of a JSON file."""

    def damage(run):
        file = os.path.join(run, name)
        write_json(file, read_json(file) | changes)

    return damage


def rows(name, edit):
    """Return what edits the list of lines of a file."""

    def damage(run):
        file = os.path.join(run, name)
        with open(file) as f:
            lines = f.readlines()
        with open(file, "w") as f:
            f.writelines(edit(lines))

    return damage


def old_state(run):
    """Make the checkpoint one of an older version, which lists no digests."""
    file = os.path.join(run, "ckpt", "state.json")
    state = read_json(file)
    write_json(file, dict(step=state["step"], replay_rows=state["replay_rows"]))


def unlisted(damage):
    """Return a damage to a checkpoint that lists no digests, and that no other can replace."""

    def both(run):
        damage(run)
        old_state(run)
        shutil.rmtree(os.path.join(run, "ckpt.old"))

    return both


def nan_weights(run):
    """Write a weight that is not a number into the adapter."""
    file = os.path.join(run, "ckpt", "adapter_model.safetensors")
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, file, metadata={"format": "pt"})


def other_moments(run):
    """Write the optimizer state of another model."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    torch.save(optimizer.state_dict(), os.path.join(run, "ckpt", "optimizer.pt"))


class Trap:
    """An object whose pickle would write a file when it is read."""

    def __reduce__(self):
        return os.mkdir, ("trap",)


def pickled_code(run):
    """Write an optimizer state that would run code."""
    torch.save(Trap(), os.path.join(run, "ckpt", "optimizer.pt"))


def file_instead(name):
    """Return what puts a file in the place of a folder."""

    def damage(run):
        shutil.rmtree(os.path.join(run, name))
        text(name, "x")(run)

    return damage


# ---- cases ----


def damaged(what, then, damage, call, **changes):
    """Make the case of a finished run that is damaged before a command works on it."""

    def make(folder):
        run = os.path.join(folder, "run")
        shutil.copytree(finished(), run)
        damage(run)

        def act():
            said = call(**changes)
            assert not os.path.exists(os.path.join(folder, "trap"))
            return said

        return act

    return Case(what, then, make)


def config_cases():
    """List the cases of a damaged config.json: each command reads it in the same way."""
    damages = [
        ("config.json is missing", "is no run folder: it has no config.json", without("config.json")),
        ("config.json is cut", "config.json is damaged, it is no JSON", cut("config.json")),
        ("config.json is empty", "config.json is damaged, it is no JSON", text("config.json", "")),
        (
            "config.json is a list",
            "config.json is damaged, it holds no JSON object",
            text("config.json", "[]"),
        ),
        ("config.json is nested without end", "config.json is damaged", text("config.json", "[" * 10**5)),
        ("config.json holds bytes that are no text", "config.json is damaged", flip_to_bytes),
        (
            "a number in config.json is a text",
            "config.json: size='big': size takes a whole number",
            keys("config.json", size="big"),
        ),
        ("a text in config.json is a number", "env takes text", keys("config.json", env=7)),
        (
            "a number in config.json is NaN",
            "gamma takes a finite number",
            keys("config.json", gamma=float("nan")),
        ),
        ("a number in config.json is out of range", "size=5 is out of range", keys("config.json", size=5)),
        (
            "a choice in config.json is unknown",
            "actor_loss='ppo' is not known",
            keys("config.json", actor_loss="ppo"),
        ),
        (
            "the environment in config.json is unknown",
            "env='Nowhere' is unknown",
            keys("config.json", env="Nowhere"),
        ),
    ]
    for what, then, damage in damages:
        yield damaged(f"{what}; evaluate", then, damage, look)
    for what, then, damage in damages[:8]:
        yield damaged(f"{what}; resume", then, damage, go_on)


def flip_to_bytes(run):
    """Write bytes that are no UTF-8 into config.json."""
    with open(os.path.join(run, "config.json"), "wb") as f:
        f.write(b'{"env": "\xff\xfe"}')


def checkpoint_cases():
    """List the cases of a damaged checkpoint: the one before it is used, and the message says so."""
    weights = "ckpt/adapter_model.safetensors"
    damages = [
        ("the adapters are cut", "adapter_model.safetensors is damaged", cut(weights)),
        ("a byte of the adapters is changed", "adapter_model.safetensors is damaged", flip(weights)),
        ("the adapters are missing", "adapter_model.safetensors is missing", without(weights)),
        ("the critic is cut", "q_head.safetensors is damaged", cut("ckpt/q_head.safetensors")),
        ("the optimizer is cut", "optimizer.pt is damaged", cut("ckpt/optimizer.pt")),
        ("state.json is empty", "state.json is damaged", text("ckpt/state.json", "")),
        ("state.json is missing", "state.json is damaged", without("ckpt/state.json")),
        ("state.json names no update", "state.json is damaged", keys("ckpt/state.json", step="two")),
    ]
    for what, fault, damage in damages:
        yield damaged(
            f"{what}; resume", f"run/ckpt: {fault}; going on from run/ckpt.old, update 2", damage, go_on
        )
    for what, fault, damage in damages[:3]:
        yield damaged(f"{what}; evaluate", f"run/ckpt: {fault}; going on from run/ckpt.old", damage, look)

    both = (
        "holds no good checkpoint (run/ckpt: optimizer.pt is damaged; run/ckpt.old: optimizer.pt is missing)"
    )
    yield damaged("both checkpoints are damaged; resume", both, both_damaged, go_on)
    yield damaged(
        "there is no checkpoint; resume",
        "has no checkpoint to resume from: start without --resume",
        without("ckpt", "ckpt.old"),
        go_on,
    )
    yield damaged(
        "there is no checkpoint; evaluate", "holds no checkpoint", without("ckpt", "ckpt.old"), look
    )
    yield damaged("ckpt is a file; resume", "goes on", file_instead("ckpt"), go_on)
    yield damaged("a crash between two renames; resume", "goes on", without("ckpt"), go_on)


def old_checkpoint_cases():
    """List the cases of an old run's checkpoint: it lists no digests, its files are checked when read."""
    weights = "ckpt/adapter_model.safetensors"
    yield damaged(
        "an old run's adapters are cut; evaluate",
        "adapter_model.safetensors does not load",
        unlisted(cut(weights)),
        look,
    )
    yield damaged(
        "an old run's critic is missing; evaluate",
        "q_head.safetensors does not load",
        unlisted(without("ckpt/q_head.safetensors")),
        look,
    )
    yield damaged(
        "an old run's optimizer is cut; resume",
        "optimizer.pt does not load",
        unlisted(cut("ckpt/optimizer.pt")),
        go_on,
    )
    yield damaged(
        "an old run's optimizer is missing; resume",
        "optimizer.pt does not load",
        unlisted(without("ckpt/optimizer.pt")),
        go_on,
    )
    yield damaged(
        "an optimizer of another model; resume", "optimizer.pt does not load", unlisted(other_moments), go_on
    )
    yield damaged(
        "an optimizer that is a pickle with code; resume",
        "optimizer.pt does not load",
        unlisted(pickled_code),
        go_on,
    )
    yield damaged(
        "weights that are not finite; evaluate",
        "adapter_model.safetensors holds weights that are not " "finite",
        unlisted(nan_weights),
        look,
    )
    yield damaged(
        "weights that are not finite; resume",
        "adapter_model.safetensors holds weights that are not " "finite",
        unlisted(nan_weights),
        go_on,
    )


def both_damaged(run):
    """Damage both checkpoints."""
    cut("ckpt/optimizer.pt")(run)
    without("ckpt.old/optimizer.pt")(run)


def play_cases():
    """List the cases of recorded and own play that is not what the checkpoint saw."""
    data = "data/metadata.jsonl"
    own = "replay/metadata.jsonl"
    first_cheaper = edit_first('"reward": -1.0', '"reward": -0.5')
    return [
        damaged(
            "recorded data deleted; resume",
            "'run/data' holds 0 rows, and the checkpoint has seen ... put " "back what was there",
            without("data"),
            go_on,
        ),
        damaged(
            "recorded data shorter; resume",
            "'run/data' holds ... rows, and the checkpoint has seen",
            rows(data, drop_last),
            go_on,
        ),
        damaged(
            "a reward in the recorded data changed; resume",
            "'run/data' holds other rows than the checkpoint " "has seen",
            rows(data, first_cheaper),
            go_on,
        ),
        damaged(
            "the marker of the recorded data is gone; resume", "goes on", without("data/complete"), go_on
        ),
        damaged(
            "own play deleted; resume",
            "'run/replay' holds 0 rows, and the checkpoint has seen",
            without("replay"),
            go_on,
        ),
        damaged(
            "own play shorter; resume",
            "'run/replay' holds ... rows, and the checkpoint has seen",
            rows(own, drop_last),
            go_on,
        ),
        damaged("own play changed; resume", "'run/replay' holds other rows", rows(own, backwards), go_on),
    ]


def log_cases():
    """List the cases of damaged logs and tables, and of settings that have changed."""
    return [
        damaged(
            "metrics.jsonl is missing; resume",
            "metrics.jsonl is missing: what it said about the first 4 " "updates is lost",
            without("metrics.jsonl"),
            go_on,
        ),
        damaged(
            "a line of metrics.jsonl is damaged; resume",
            "metrics.jsonl, line 1, is damaged and is left out",
            rows("metrics.jsonl", lambda lines: ["{\n", *lines]),
            go_on,
        ),
        damaged(
            "eval_offline.json is damaged; evaluate",
            "eval_offline.json is damaged",
            text("eval_offline.json", "{"),
            look,
        ),
        damaged("lr changed; resume", "lr was 0.004, and is 0.001 from here on", nothing, go_on, lr=1e-3),
        damaged(
            "stop_at is behind the run; resume",
            "stop_at=2, and the run in 'run' is at update 4 already: name a later update",
            nothing,
            go_on,
            stop_at=2,
        ),
        damaged(
            "gamma changed; resume", "gamma=0.5 but the run in 'run' has gamma=0.9", nothing, go_on, gamma=0.5
        ),
    ]


def nothing(run):
    """Damage nothing."""


def add_episode(lines):
    """Add the first episode once more under another name."""
    first = [json.loads(line) for line in lines]
    first = [row for row in first if row["episode"] == first[0]["episode"]]
    return lines + [json.dumps(row | dict(episode="added")) + "\n" for row in first]


def drop_last(lines):
    """Leave the last line out."""
    return lines[:-1]


def backwards(lines):
    """Turn the order of the lines around."""
    return lines[::-1]


def edit_first(old, new):
    """Return what replaces a text in the first line that has it."""

    def edit(lines):
        k = next(k for k, line in enumerate(lines) if old in line)
        return [*lines[:k], lines[k].replace(old, new), *lines[k + 1 :]]

    return edit


# ---- folders that are in use, or are no run ----

OTHER_PROCESS = """
import fcntl, time
file = open("run/.lock", "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(600)
"""


def in_use(what, call):
    """Make the case of a command on a run that another process writes."""

    def make(folder):
        shutil.copytree(finished(), os.path.join(folder, "run"))
        words = [sys.executable, "-c", OTHER_PROCESS]
        other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "locked\n"

        def act():
            try:
                call()
            finally:
                other.kill()
                other.wait()

        return act

    return Case(what, "'run' is being written by ... wait for its end or stop it", make)


def linked_file(name):
    """Return what puts a link to somebody's file into a run."""

    def damage(run):
        with open("precious.txt", "w") as f:
            f.write("precious")
        path = os.path.join(run, name)
        if os.path.lexists(path):
            os.remove(path)
        os.symlink(os.path.abspath("precious.txt"), path)

    return damage


def look_and_keep():
    """Evaluate and report on a run with a link, and see that the file behind it is as it was."""
    evaluate.main(["run", "--episodes=1", "--report"])
    with open("precious.txt") as f:
        assert f.read() == "precious"
    return "the file behind the link is as it was"


def link_cases():
    """List the cases of a downloaded run with a link to a file of yours."""
    kept = "the file behind the link is as it was"
    for name in ("eval.json", "eval.json.tmp", "report.html", "curves.svg", "NumberLine.gif"):
        yield damaged(f"`{name}` is a link; evaluate with --report", kept, linked_file(name), look_and_keep)
    for name in ("metrics.jsonl", "config.json.tmp", "replay/metadata.jsonl"):
        then = f"'run/{name}' is a link, and a resumed run writes there"
        yield damaged(f"`{name}` is a link; resume", then, linked_file(name), go_on)
    yield damaged(
        "`.lock` is a link; resume", "'run/.lock' is a link: remove it", linked_file(".lock"), go_on
    )


def model_folder(run):
    """Make an out_dir that is a model folder."""
    shutil.copytree(os.path.join(home().name, "tiny"), run)


def begin_in_model(**changes):
    """Start in a model folder, and see that it is as it was."""
    before = content("run")
    try:
        begin(**changes)
    finally:
        assert content("run", *[name[1:] for name in before]) == before


def state_cases():
    """List the cases of a state.json that describes no checkpoint."""
    changes = [
        dict(files=[]),
        dict(files=None),
        dict(replay_rows="abc"),
        dict(replay_rows=[None]),
        dict(replay_rows=[-1]),
        dict(replay_digests=5),
        dict(data={}),
        dict(data=[1]),
        dict(unlogged=dict(x=1)),
        dict(unlogged=dict(infos=5)),
        dict(step=-5),
    ]
    for change in changes:
        [(key, value)] = change.items()
        then = "run/ckpt: state.json is damaged; going on from run/ckpt.old"
        damage = keys("ckpt/state.json", **change)
        yield damaged(f"{key} in state.json is {value!r}; resume", then, damage, go_on)


def dead_lock(run):
    """Leave the lock file of a process that is gone."""
    text(".lock", "process 12345 on elsewhere")(run)


def prepared(what, then, prepare, call, **changes):
    """Make the case of a folder that is prepared by hand before a command works on it."""

    def make(folder):
        prepare(os.path.join(folder, "run"))
        return lambda: call(**changes)

    return Case(what, then, make)


def teacher_only(run):
    """Make an out_dir that holds nothing but somebody's recorded data."""
    shutil.copytree(os.path.join(finished(), "data"), os.path.join(run, "data", "teacher"))


def linked_data(run):
    """Make a run whose data folder is a link to a folder elsewhere."""
    shutil.copytree(finished(), run)
    shutil.move(os.path.join(run, "data"), "elsewhere")
    os.symlink(os.path.abspath("elsewhere"), os.path.join(run, "data"))


def with_teacher(run):
    """Make a run with somebody's folder beneath its data."""
    shutil.copytree(finished(), run)
    teacher_only(run)


def half_overwritten(run):
    """Make a run that was being deleted."""
    shutil.copytree(finished(), run)
    os.remove(os.path.join(run, "config.json"))
    text(".overwrite", "")(run)


def early_start(run):
    """Make what a start leaves that was killed before its first checkpoint."""
    shutil.copytree(finished(), run)
    without("ckpt", "ckpt.old", "eval.json")(run)


def early_without_marker(run):
    """Make the same, without the marker of its recorded data."""
    early_start(run)
    without("data/complete")(run)


def early_recording(run):
    """Make what a start leaves that was killed while it recorded."""
    shutil.copytree(os.path.join(finished(), "data"), os.path.join(run, "data.tmp"))
    without("data.tmp/complete")(run)


def begin_and_keep(**changes):
    """Start a run, and see that what an earlier start recorded is still there."""
    begin(**changes)
    assert os.path.exists("run/data.partial-1/metadata.jsonl")
    return "starts"


def overwrite_and_keep(**changes):
    """Overwrite a run, and see that nothing is deleted."""
    try:
        begin(overwrite=True, **changes)
    finally:
        assert os.path.exists("run/eval.json") or not os.path.exists("run/config.json")
        assert os.path.exists("elsewhere/metadata.jsonl") or not os.path.exists("elsewhere")


def start_beside_teacher():
    """Train on somebody's data beneath out_dir, and see that they stay."""
    begin(data="run/data/teacher")
    assert os.path.exists("run/data/teacher/metadata.jsonl")
    return "starts"


def overwrite_beside_teacher():
    """Start with overwrite where somebody's data are all there is, and see that they stay."""
    begin(data="run/data/teacher", overwrite=True)
    assert os.path.exists("run/data/teacher/metadata.jsonl")
    return "starts"


def folder_cases():
    """List the cases of folders that are in use, half deleted, half begun, or somebody else's."""
    return [
        in_use("another process writes the run; resume", go_on),
        in_use("another process writes the run; overwrite", lambda: begin(overwrite=True)),
        in_use("another process writes the run; start", begin),
        damaged("the lock of a dead process; resume", "goes on", dead_lock, go_on),
        damaged(
            "a second start in a run's folder",
            "already holds a run (ckpt): --resume=True continues it, " "--overwrite=True deletes it",
            nothing,
            begin,
        ),
        prepared(
            "killed in the middle of an overwrite; start",
            "was being deleted when that was interrupted: " "--overwrite=True goes on with it",
            half_overwritten,
            begin,
        ),
        prepared(
            "killed in the middle of an overwrite; resume", "was being deleted", half_overwritten, go_on
        ),
        prepared(
            "killed in the middle of an overwrite; overwrite",
            "starts",
            half_overwritten,
            begin,
            overwrite=True,
        ),
        prepared("killed before the first checkpoint; the same start", "starts", early_start, begin),
        prepared(
            "killed before the first checkpoint; resume",
            "has no checkpoint to resume from: start without " "--resume",
            early_start,
            go_on,
        ),
        prepared(
            "killed before the first checkpoint; a start with another seed",
            "'run/data' was recorded with " "seed=0, and now it is 1",
            early_start,
            begin,
            seed=1,
        ),
        prepared(
            "recorded data without their marker; start",
            "'run/data' holds play without the marker",
            early_without_marker,
            begin,
        ),
        prepared(
            "killed while recording; start",
            "What was recorded before the end is kept in " "run/data.partial-1 ... starts",
            early_recording,
            begin_and_keep,
        ),
    ]


def foreign_cases():
    """List the cases of folders that hold what is not the run's own."""
    return [
        prepared(
            "out_dir holds only data/teacher; start with them", "starts", teacher_only, start_beside_teacher
        ),
        prepared(
            "out_dir holds only data/teacher; overwrite", "starts", teacher_only, overwrite_beside_teacher
        ),
        prepared(
            "out_dir holds only data/teacher; start without them",
            "'run/data' is there and holds no play " "recorded by a run",
            teacher_only,
            begin,
        ),
        prepared(
            "a teacher's folder beneath the run's data; overwrite",
            "'run/data/teacher' was not written by " "the run that overwrite would delete",
            with_teacher,
            overwrite_and_keep,
        ),
        prepared(
            "the run's data folder is a link; overwrite",
            "'run/data' is a link, and overwrite does not " "follow it",
            linked_data,
            overwrite_and_keep,
        ),
        damaged(
            "the new run's data are in the run; overwrite",
            "data='run/data' is in the run that overwrite " "would delete",
            nothing,
            begin,
            overwrite=True,
            data="run/data",
        ),
    ]


def stranger_cases():
    """List the cases of what other programs and hands have written."""
    return [
        prepared(
            "out_dir is a model folder; start",
            "holds 'config.json', and no run of this program has " "written there",
            model_folder,
            begin_in_model,
        ),
        prepared(
            "out_dir is a model folder; overwrite",
            "holds 'config.json', and no run of this program has " "written there",
            model_folder,
            begin_in_model,
            overwrite=True,
        ),
        damaged(
            "a whole episode was added to the recorded data; resume",
            "'run/data' holds ... rows, and the " "checkpoint has seen",
            rows("data/metadata.jsonl", add_episode),
            go_on,
        ),
        damaged(
            "eval_offline.json holds no table; evaluate",
            "eval_offline.json is damaged, it holds no table",
            text("eval_offline.json", '{"x": {"success": 1}}'),
            look,
        ),
        damaged(
            "lora_alpha in config.json is a text; evaluate",
            "lora_alpha='x': it must be a number",
            keys("config.json", lora_alpha="x"),
            look,
        ),
        damaged(
            "notes in the run's replay; overwrite",
            "'run/replay/notes.txt' was not written by the run",
            text("replay/notes.txt", "mine"),
            begin,
            overwrite=True,
        ),
        Case(
            "the run is a file; evaluate", "is no run folder", lambda folder: text("run", "x")(folder) or look
        ),
    ]


CASES = [*config_cases(), *checkpoint_cases(), *old_checkpoint_cases(), *play_cases(), *log_cases()]
CASES += [*folder_cases(), *foreign_cases(), *stranger_cases(), *link_cases(), *state_cases()]
