"""
Test how environments are called: in which thread, how long, and what is left of a call that hangs.

What goes wrong in an environment, and what the user reads then, is in cases_worlds.py.
"""
import _thread, os, signal, subprocess, sys, threading, time

import numpy as np
import pytest

import envs
from buffer import Buffer
from evaluate import play, record, scripted_agent
from worlds import guard
from worlds.guard import Failure, each

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

@pytest.fixture
def timeout(monkeypatch):
    """Return a function that sets env_timeout for one test."""

    def set_seconds(seconds):
        monkeypatch.setattr(guard.Limits, "seconds", seconds)

    return set_seconds

def thread_of(*_):
    """Return the thread that makes this call."""
    return threading.current_thread()

def play_number_line(n=60):
    """Return the rows of scripted play."""
    mix = {"expert": 0.3, "random": 0.4, "malformed": 0.1, "biased": 0.2}
    agent = scripted_agent(mix, np.random.default_rng(0), 0.2)
    return [episode["rows"] for episode in play(envs.NumberLine, agent, list(range(n)), 8, split="train")]

def test_undisturbed_play_does_not_depend_on_the_watch(timeout):
    """The same rows with and without it: random numbers are drawn in the same order."""
    timeout(120.0)
    watched = play_number_line()
    timeout(0.0)
    assert play_number_line() == watched

def test_outcomes_keep_their_order():
    """Also where several threads make the calls."""
    jobs = [(i, 2) for i in range(100)]
    assert each(pow, jobs, 4) == each(pow, jobs) == [i**2 for i in range(100)]
    assert each(pow, []) == []

def test_one_thread_makes_all_calls(timeout):
    """An environment with a database may be called only from the thread that made it."""
    timeout(120.0)
    first = each(thread_of, [(1,), (2,)])
    again = each(thread_of, [(1,)])
    assert {*first, *again} == {first[0]}
    assert first[0] is not threading.current_thread()

def test_without_a_watch_it_is_the_thread_of_the_program(timeout):
    timeout(0.0)
    assert each(thread_of, [()]) == [threading.current_thread()]

def test_a_call_may_make_calls(timeout):
    """An environment that plays another one does not wait for itself."""
    timeout(5.0)
    assert each(each, [(pow, [(2, 3)])]) == [[8]]

def test_a_call_that_hangs_is_left_behind(timeout, capsys):
    """The others are made. When it wakes up, it prints nothing and changes nothing."""
    timeout(0.3)
    notes = []

    def call(i):
        if i == 1:
            time.sleep(0.8)
            print("a voice from the past")
            notes.append("late")
        return i

    outcomes = each(call, [(0,), (1,), (2,)])
    assert outcomes == [0, Failure("no answer within env_timeout=0.3 seconds", is_hang=True), 2]
    time.sleep(0.8)
    assert not notes
    assert "voice" not in capsys.readouterr().out

def test_an_endless_loop_ends(timeout):
    """It would take half of the processor for the rest of the run."""
    timeout(0.3)
    threads = []

    def loop():
        threads.append(threading.current_thread())
        while True:
            pass

    [failure] = each(loop, [()])
    assert failure.is_hang
    threads[0].join(10)
    assert not threads[0].is_alive()

def test_too_many_hanging_calls_are_not_waited_for(timeout):
    """After five the others are not tried: 64 of them would take two hours of two minutes each."""
    timeout(0.2)
    tried = []

    def call(i):
        tried.append(i)
        time.sleep(30)

    outcomes = each(call, [(i,) for i in range(64)])
    assert all(failure.is_hang for failure in outcomes)
    assert tried == [0, 1, 2, 3, 4]

def test_ctrl_c_works_while_a_call_hangs(timeout):
    """It does not wait for the call."""
    timeout(60.0)
    # a shell's background jobs ignore it
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, _thread.interrupt_main)
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        each(time.sleep, [(30,)])
    signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - began < 10
    timer.join()
    assert each(pow, [(2, 3)]) == [8]

@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 15)"])
def test_the_program_ends_while_a_call_hangs(end):
    """By itself, and by `kill` as by Ctrl-C: what is registered with atexit runs."""
    code = f"""
import atexit, os, time
from worlds import guard

atexit.register(print, "cleaned up")
guard.set_timeout(0.2)
print(guard.each(time.sleep, [(1000,)])[0].is_hang, flush=True)
{end}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.stdout == "True\ncleaned up\n"
    assert done.returncode == (143 if end else 0)
    assert not done.stderr

def test_a_forked_process_has_its_own_worker(timeout):
    """Threads do not live on in a fork: the idle worker of its parent would never answer."""
    timeout(120.0)
    each(pow, [(2, 3)])
    [worker] = guard.IDLE[-1:]
    worker.is_alive = lambda: False
    assert each(pow, [(2, 3)]) == [8]
    assert worker not in guard.IDLE

def test_a_turn_that_no_folder_can_hold_costs_its_episode(tmp_path, capsys):
    """A player's endless reply is dropped with its episode; the episodes around it are recorded."""
    calls = []

    def act(envs, rows, images):
        calls.append(len(rows))
        reply = "[action] +"
        if len(calls) < 3:
            reply = "x" * 10**6
        return [dict(reply=reply, source="model") for _ in envs]

    buffer = Buffer(str(tmp_path), create=True)
    assert record(play(envs.NumberLine, act, [1, 2, 3], 1, split="train"), buffer) == 2
    assert len(Buffer(str(tmp_path)).episodes) == 2
    assert "dropped, a turn has a text of 1,000,000 characters" in capsys.readouterr().out
