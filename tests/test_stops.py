"""
What ends a run early: signals, a full disk, numbers that are not finite, a second process.
"""
import os, shutil, signal, subprocess, sys

import pytest
import torch
from safetensors.torch import save_file

import train
from extras import checkpoints, stopping, whole_files
from small_runs import content, metrics, one_sentence, read_json, run, straight, tiny, weights  # noqa: F401

HERE = os.path.dirname(os.path.abspath(__file__))


# ---- signals ----

def signal_at(monkeypatch, function, call, number=signal.SIGTERM):
    """Let a call of one of train.py's functions be interrupted by a signal, as if from outside."""
    calls = []
    original = getattr(train, function)

    def interrupted(*args, **options):
        calls.append(function)
        if len(calls) == call:
            stopping.STOP.hear(number, None)
        return original(*args, **options)

    monkeypatch.setattr(train, function, interrupted)

# The first call of `play` records the data.
MOMENTS = [("update 1", 1), ("update 3", 3), ("look 6", 6), ("play 2", 4), ("play 3", 6)]

@pytest.mark.parametrize("moment, done", MOMENTS)
def test_a_signal_lets_the_run_save_and_stop(straight, tiny, tmp_path, monkeypatch, moment, done):
    """An update and a look are finished, a rollout is broken off; the resume ends with the same bytes."""
    function, call = moment.split()
    out = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_at(patch, function, int(call))
        one_sentence(lambda: run(out, tiny), f"update {done}", "--resume=True")
    assert read_json(out, "ckpt", "state.json")["step"] == done
    run(out, tiny, resume=True)
    assert metrics(out) == metrics(straight)
    assert weights(out) == weights(straight)
    assert content(out, "metadata.jsonl") == content(straight, "metadata.jsonl")

@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_stop_inside_a_line_of_metrics(tiny, tmp_path, stop):
    """A run may stop between two lines of metrics.jsonl: the checkpoint holds the sums of half a line."""
    one = run(tmp_path / "one", tiny, log_interval=4)
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, "update", stop)
        one_sentence(lambda: run(out, tiny, log_interval=4), f"update {stop}", "SIGTERM")
    run(out, tiny, log_interval=4, resume=True)
    assert metrics(out) == metrics(one)

def test_stop_at_inside_a_line_of_metrics(tiny, tmp_path):
    """So does a stop by stop_at: it once wrote a line of its own, which the undisturbed run has not."""
    one = run(tmp_path / "one", tiny, log_interval=4)
    out = run(tmp_path / "run", tiny, log_interval=4, stop_at=5)
    run(out, tiny, log_interval=4, resume=True)
    assert metrics(out) == metrics(one)

def test_a_signal_before_the_first_update(straight, tiny, tmp_path, monkeypatch):
    """There is no checkpoint yet, and the sentence says so; the same command starts again and just works."""
    out = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_at(patch, "make_optimizer", 1)
        one_sentence(lambda: run(out, tiny), "there is no checkpoint yet", "starts again")
    run(out, tiny)
    assert metrics(out) == metrics(straight)

def test_environments_that_fail_do_not_cost_what_was_learned(straight, tiny, tmp_path, monkeypatch):
    """A rollout in which all fails is broken off as by a signal: the run saves, and can go on later."""
    out = str(tmp_path / "run")
    play = train.play
    calls = []

    def failing_play(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise SystemExit("NumberLine: it fails all the time: correct the environment first.")
        return play(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "play", failing_play)
        words = ("correct the environment first; the last checkpoint is that of update 6, --resume=True",)
        one_sentence(lambda: run(out, tiny), *words)
    run(out, tiny, resume=True)
    assert metrics(out) == metrics(straight)
    assert weights(out) == weights(straight)

def test_a_signal_in_a_destructor_is_not_lost(capfd):
    """Python cannot raise there: it printed a traceback."""
    stop = stopping.Stop()

    class Falling:
        def __del__(self):
            stop.hear(signal.SIGINT, None)

    stop.listen()
    try:
        Falling()
        assert stop.signal == "SIGINT"
    finally:
        stop.rest()
    assert capfd.readouterr().err == ""

def test_the_second_ctrl_c_does_not_wait():
    """The first one lets the update finish; whoever presses it again means it."""
    stop = stopping.Stop()
    stop.waits = True
    stop.hear(signal.SIGINT, None)
    assert stop.signal == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
        stop.hear(signal.SIGINT, None)

def test_nohup_is_obeyed(monkeypatch):
    """A signal that was switched off stays off; the others are heard."""
    set_up = []
    handlers = {signal.SIGHUP: signal.SIG_IGN}
    monkeypatch.setattr(signal, "getsignal", handlers.get)
    monkeypatch.setattr(signal, "signal", lambda number, handler: set_up.append(number))
    stopping.Stop().listen()
    assert set_up == [signal.SIGINT, signal.SIGTERM]

def test_kills_full_disks_and_signals():
    """A few of each, in real processes: nothing is lost, doubled or different (by hand: hundreds)."""
    words = [sys.executable, os.path.join(HERE, "extra_kills.py"), "--each=1"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 faults, 0 failures" in done.stdout


# A run whose environment has two workers; one is ended by its parent, the other outlives it.
FORKING = """
import os, signal, sys, time
sys.path[:0] = sys.argv[1:2]
from extras.stopping import STOP
from extras.whole_files import lock
STOP.listen()
STOP.waits = True
lock(sys.argv[2])
workers = []
for seconds in (60, 20):
    workers.append(os.fork())
    if workers[-1] == 0:
        os.close(1)
        os.close(2)
        time.sleep(seconds)
        os._exit(0)
os.kill(workers[0], signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(workers[0], 0)[1]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


# ---- numbers that are not finite ----

def infinite_at(patch, steps):
    """Make the loss infinite in the updates that begin at `steps`."""
    compute_loss = train.compute_loss
    backward = train.backward
    now = []

    def noted(cfg, step, *args):
        now.append(step)
        return backward(cfg, step, *args)

    def infinite_loss(*args):
        loss, info = compute_loss(*args)
        if now[-1] in steps:
            loss = loss * float("inf")
        return loss, info

    patch.setattr(train, "backward", noted)
    patch.setattr(train, "compute_loss", infinite_loss)

def test_an_update_that_is_not_finite_is_skipped(straight, tiny, tmp_path, monkeypatch, capsys):
    """Its rows are named, it is counted in metrics.jsonl, and the weights stay finite."""
    infinite_at(monkeypatch, [2, 3, 6])
    out = run(tmp_path / "run", tiny)
    rows = metrics(out)
    assert [row.get("skipped", 0) for row in rows] == [0, 0, 1, 2, 2, 2, 3, 3]
    assert ["nll" in row for row in rows] == [True, True, False, False, True, True, False, True]
    assert rows[:2] == metrics(straight)[:2]
    printed = capsys.readouterr().out
    assert "Update 3 is skipped, its loss or gradient is not finite. Its rows: data-" in printed

def test_skipped_updates_survive_a_resume(tiny, tmp_path, monkeypatch):
    """Their number goes on, and so does the row of them that ends a run."""
    infinite_at(monkeypatch, [1, 2])
    one = run(tmp_path / "one", tiny)
    two = run(tmp_path / "two", tiny, stop_at=2)
    run(two, tiny, resume=True)
    assert metrics(two) == metrics(one)
    assert weights(two) == weights(one)

def test_many_skipped_updates_end_the_run(tiny, tmp_path, monkeypatch):
    """The sentence names the likely cause, and its remedy works: a lower rate from the last checkpoint."""
    out = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        infinite_at(patch, range(2, 9))
        words = ("5 updates in a row, up to update 7", "--lr=0.001 --critic_lr=0.0005", "--resume=True")
        one_sentence(lambda: run(out, tiny, eval_interval=2), "that of update 2", *words)
    run(out, tiny, eval_interval=2, resume=True, lr=0.001, critic_lr=0.0005)
    assert read_json(out, "config.json")["lr"] == 0.001
    rows = metrics(out)
    assert rows[-1]["lr"] < 0.001
    assert "skipped" not in rows[-1]

def test_weights_that_have_blown_up_are_named_as_the_cause(tiny, tmp_path, monkeypatch):
    """Where no update since the start was finite, a lower rate does not help a resumed run any more."""
    infinite_at(monkeypatch, range(9))
    one_sentence(lambda: run(tmp_path / "run", tiny), "weights themselves are too large", "--overwrite=True")

def test_a_forked_worker_has_no_part_in_the_run(tmp_path):
    """It ends by the signal that its parent sends, and does not hold the lock when the parent is gone.

    The story: an environment with worker processes hung in close(), because they waited for their update.
    """
    words = [sys.executable, "-c", FORKING, os.path.dirname(HERE), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout == "-15\n", done.stderr
    whole_files.lock(str(tmp_path))
    whole_files.unlock(str(tmp_path))

def test_a_huge_reward_is_named_as_the_cause(tiny, tmp_path, monkeypatch):
    """A learning rate cannot mend a reward."""
    infinite_at(monkeypatch, range(9))

    def call():
        run(tmp_path / "run", tiny, penalty=-1e12, reward_clip=0, data_mix={"malformed": 1.0})

    one_sentence(call, "the reward 1e+12 in data-", "reward_clip")

def test_a_policy_that_has_diverged_is_named(straight, tiny, tmp_path, monkeypatch):
    """Its probabilities are not finite; the story: the replay was said to take no such row."""
    out = str(tmp_path / "run")
    shutil.copytree(straight, out)
    log_softmax = torch.Tensor.log_softmax

    def diverged(logits, *args):
        return log_softmax(logits, *args) * float("nan")

    monkeypatch.setattr(torch.Tensor, "log_softmax", diverged)
    words = ("probabilities that are not finite", "lower lr", "update 8", "--resume=True")
    one_sentence(lambda: run(out, tiny, resume=True, online_updates=7), *words)

def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path, monkeypatch):
    """A checkpoint that cannot be used would replace one that can."""
    optimizer_step = torch.optim.AdamW.step

    def spoil(optimizer):
        optimizer_step(optimizer)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    out = tmp_path / "run"
    one_sentence(lambda: run(out, tiny, stop_at=1), "not finite after update 1", "not saved")
    assert not checkpoints.has_checkpoint(out)


# ---- files ----

def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    """On a full disk the old content is still there, and nothing beside it."""
    file = str(tmp_path / "x.json")
    whole_files.write_json(file, dict(a=1))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        whole_files.write_json(file, dict(a=2))
    assert read_json(file) == dict(a=1)
    assert os.listdir(tmp_path) == ["x.json"]

def test_who_may_read_a_folder_may_read_its_weights(tmp_path):
    """Weights were readable by their owner only: a colleague and a server of another user could not."""
    plain = tmp_path / "plain"
    plain.write_text("")
    with whole_files.replacing(str(tmp_path / "run")) as aside:
        save_file({"w": torch.zeros(2)}, os.path.join(aside, "w.safetensors"))
    mode = (tmp_path / "run" / "w.safetensors").stat().st_mode
    assert mode & 0o666 == plain.stat().st_mode & 0o666

def test_one_process_writes_into_a_folder(tmp_path):
    """A second process is refused; the lock of a dead one does not count."""
    folder = str(tmp_path)
    hold = "import sys; sys.path[:0] = sys.argv[1:2]; from extras.whole_files import lock; lock(sys.argv[2])"
    words = [sys.executable, "-c", hold, os.path.dirname(HERE), folder]
    # what a process leaves that is gone
    (tmp_path / ".lock").write_text("process 12345 on elsewhere")
    whole_files.lock(folder)
    done = subprocess.run(words, capture_output=True, text=True)
    whole_files.unlock(folder)
    assert done.returncode == 1
    assert f"is being written by process {os.getpid()}" in done.stderr
    assert "Traceback" not in done.stderr
