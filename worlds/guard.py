"""
Call environments: what one does wrong costs an episode, and not the run.

`each` is the one door. It makes calls and returns a Failure in the place of what a call should have returned:
an exception, a value of the wrong kind, or no answer within `env_timeout` seconds.

Python cannot stop a call that hangs. Therefore a worker thread makes the calls, and one that hangs is left
behind with its call. A call that holds Python's lock, such as a regular expression that never ends, holds up
this module too.
"""
import contextlib, ctypes, queue, signal, sys, threading, traceback
from collections import deque
from typing import NamedTuple

from worlds.contract import BrokenContract, Unplayable

# So many calls that hang are too many if nothing succeeds in between: each takes its time.
HANGS_IN_A_ROW = 5
TICK = 1.0  # seconds between two looks at a call
MESSAGE_COLUMNS = 300

# Workers that have nothing to do. They are used again, because some environments, such as one with a
# database, have to be called from the thread that made them.
IDLE = []

class Limits:
    """Hold what is one setting for the whole process, as socket.setdefaulttimeout is."""

    # how long one call may take; 0: as long as it likes, in the thread of the program
    seconds = 120.0

def set_timeout(seconds):
    """Set how long one call of an environment may take, in seconds; 0: as long as it likes."""
    if seconds < 0:
        raise SystemExit(f"env_timeout={seconds} must be at least 0; 0 waits for ever.")
    Limits.seconds = seconds


# ---- what went wrong ----

class Failure(NamedTuple):
    """What stands in the place of a value that an environment failed to return.

    cause       one line
    is_hang     whether it did not answer in time
    breaks_env  whether the environment has to be made anew; one that reports a loss itself has not
    """

    cause: str
    is_hang: bool = False
    breaks_env: bool = True

def one_line(text):
    """Write a text on one line that no terminal obeys: an environment's message may quote a model's reply."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    if len(line) > MESSAGE_COLUMNS:
        line = line[:MESSAGE_COLUMNS] + "..."
    return line

def in_user_file(frames):
    """Write the last line of a file of the user among the frames: " in line 12"; "" if there is none."""
    # such a file is a module under its full path, see registry.run_file
    lines = [frame.lineno for frame in frames if frame.filename in sys.modules]
    return f" in line {lines[-1]}" if lines else ""

def describe_error(error, path=""):
    """Write an exception as one line: its type, the last line of the user's file that it came from, its text.

    path: the file, if it is one that does not run. BrokenContract, and SystemExit from code of this project,
    are sentences of their own.
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = in_user_file(frames)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    if lines:
        place = f" in line {lines[-1]}"
    try:
        message = one_line(str(getattr(error, "msg", None) or error))
    except Exception:
        message = "its message cannot be read"
    is_sentence = isinstance(error, BrokenContract) or (isinstance(error, SystemExit) and not place)
    if is_sentence:
        return message
    return f"{type(error).__name__}{place}: {message}".rstrip(": ")

def attempt(function, job):
    """Call function(*job) -> what it returns, a Failure, or the exception Unplayable."""
    try:
        return function(*job)
    except Unplayable as error:
        return error
    except LeftBehind:
        raise
    except BaseException as error:
        # A KeyboardInterrupt in the main thread is Ctrl-C. A worker never gets that one.
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and isinstance(error, KeyboardInterrupt):
            raise
        return Failure(describe_error(error))


# ---- workers ----

class LeftBehind(BaseException):
    """What ends a worker that was left behind, as soon as it runs Python code again."""

class Batch:
    """Calls to make, and the place for their outcomes."""

    def __init__(self, function, jobs):
        self.function = function
        self.waiting = deque(enumerate(jobs))
        self.outcomes = [None] * len(jobs)
        self.hangs = 0
        # each worker that finds nothing more to do puts itself here
        self.finished = queue.SimpleQueue()

    def take(self):
        """Return the next (number, job), None if there is none."""
        with contextlib.suppress(IndexError):
            return self.waiting.popleft()

    def add_hang(self, number, failure):
        """Note a call that hangs; after too many, they all do."""
        self.outcomes[number] = failure
        self.hangs += 1
        if self.hangs == HANGS_IN_A_ROW:
            for number, _ in iter(self.take, None):
                self.outcomes[number] = failure

class Worker(threading.Thread):
    """A thread that makes the calls of batches; as a daemon, it lets the program end while a call hangs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.batches = queue.SimpleQueue()
        # for the three fields below, and for the outcome of the call
        self.lock = threading.Lock()
        self.number = None
        self.seconds = 0.0
        self.is_left_behind = False
        self.start()

    def run(self):
        with contextlib.suppress(LeftBehind):
            while True:
                batch = self.batches.get()
                for number, job in iter(batch.take, None):
                    self.call(batch, number, job)
                batch.finished.put(self)

    def call(self, batch, number, job):
        """Make one call, and store its outcome unless the worker was left behind in the meantime."""
        self.number = number
        outcome = attempt(batch.function, job)
        with self.lock:
            if self.is_left_behind:
                raise LeftBehind
            batch.outcomes[number] = outcome
            self.number = None
            self.seconds = 0.0

    def is_overdue(self, seconds):
        """Add the time of one look to the call; if it has had its time, it is over.

        Looks are counted, and no clock is read: a program that was stopped and goes on has lost no time.
        """
        with self.lock:
            if self.number is None:
                return False
            self.seconds += seconds
            self.is_left_behind = self.seconds >= Limits.seconds
            return self.is_left_behind

    def leave_behind(self):
        """Give the thread up: its outcome no longer counts, and it ends when its call lets it."""
        with self.lock:
            self.is_left_behind = True
        thread = ctypes.c_ulong(self.ident)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(LeftBehind))

    def hang(self):
        """Describe a call that hangs, and where -> a Failure."""
        frame = sys._current_frames().get(self.ident)
        place = in_user_file(traceback.extract_stack(frame)) if frame else ""
        return Failure(f"no answer within env_timeout={Limits.seconds:g} seconds{place}", is_hang=True)

def exit_on_signal(number, frame):
    """Leave the program as Ctrl-C does, so that what is registered with atexit runs."""
    sys.exit(128 + number)

def exit_on_kill():
    """Let `kill` and `timeout` end the program as Ctrl-C does; a handler that somebody has set stays.

    An environment may have a process of its own, a browser for one, and end it by atexit. Only the main
    thread may set a handler.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, exit_on_signal)

def send(batch):
    """Give a batch to a worker that has nothing to do, and return that one."""
    worker = None
    # after a fork, threads are not alive
    while IDLE and not (worker and worker.is_alive()):
        worker = IDLE.pop()
    if not (worker and worker.is_alive()):
        exit_on_kill()
        worker = Worker()
    worker.batches.put(batch)
    return worker

def run_batch(batch, n_threads):
    """Let workers make the calls of a batch, and replace those that hang."""
    seconds = min(TICK, Limits.seconds / 4)
    busy = [send(batch) for _ in range(n_threads)]
    try:
        while busy:
            try:
                worker = batch.finished.get(timeout=seconds or None)
                busy.remove(worker)
                IDLE.append(worker)
            except queue.Empty:
                busy = [replace_overdue(worker, batch, seconds) for worker in busy]
    finally:
        # Some are busy after Ctrl-C.
        for worker in busy:
            worker.leave_behind()

def replace_overdue(worker, batch, seconds):
    """Return the worker, or another one if it hangs."""
    if not worker.is_overdue(seconds):
        return worker
    batch.add_hang(worker.number, worker.hang())
    worker.leave_behind()
    return send(batch)

def each(function, jobs, n_threads=1):
    """Call function(*job) for each job -> list of what the calls returned, or a Failure for one that failed.

    One thread makes the calls one after the other; more than one pay where calls wait for another process.
    Unplayable is raised here. With env_timeout=0 one thread is this one.
    """
    jobs = list(jobs)
    if n_threads == 1 and not Limits.seconds:
        outcomes = [attempt(function, job) for job in jobs]
    else:
        batch = Batch(function, jobs)
        run_batch(batch, min(n_threads, len(jobs)))
        outcomes = batch.outcomes
    for outcome in outcomes:
        if isinstance(outcome, Unplayable):
            raise outcome
    return outcomes
