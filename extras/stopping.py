"""
Stop a run in an orderly way: a signal, a full disk.

    SIGINT (Ctrl-C), SIGTERM, SIGHUP    the run finishes its update, saves, and says how to go on
    a rollout                           is broken off, and played again after the resume
    before the first update             the run ends at once: there is nothing to save yet
"""
import contextlib, errno, os, re, signal, sys

from extras import run_folder
from extras.compiled import explain_compile_error, is_compile_error
from extras.whole_files import unlock_all
from model import ranks

class Stop:
    """The wish of a person or a scheduler that the run should stop: SIGINT (Ctrl-C), SIGTERM or SIGHUP.

    While `waits` is set, the run first finishes its update and saves. Otherwise it ends at once.
    """

    def __init__(self):
        self.signal = ""
        self.waits = False
        self.numbers = []
        self.hook = sys.unraisablehook

    def listen(self):
        """Take the signals from now on."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # nohup has switched SIGHUP off, and it stays off
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.hear)
                self.numbers.append(number)
        self.hook = sys.unraisablehook
        sys.unraisablehook = self.report

    def rest(self):
        """Forget what was heard, and let signals end the process by themselves."""
        for number in self.numbers:
            signal.signal(number, signal.SIG_DFL)
        sys.unraisablehook = self.hook
        self.numbers = []
        self.signal = ""
        self.waits = False

    def report(self, unraisable):
        """Report an exception that Python cannot raise, but not an interrupt: in a __del__ it gets lost.

        The signal is noted, so the run stops after its update.
        """
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self.hook(unraisable)

    def hear(self, number, frame):
        """Note a signal; the second Ctrl-C does not wait."""
        # torchrun repeats a signal by itself
        is_repeated = self.signal and number == signal.SIGINT and ranks()[1] == 1
        self.signal = signal.Signals(number).name
        if is_repeated or not self.waits:
            raise KeyboardInterrupt
        # print() could be in the middle of another print()
        os.write(2, f"\n{self.signal}: the run stops after this update; Ctrl-C ends it now.\n".encode())

    @contextlib.contextmanager
    def at_once(self):
        """Let a signal raise KeyboardInterrupt in a with block, in a run on one rank."""
        waited = self.waits
        self.waits = waited and ranks()[1] > 1
        try:
            yield
        finally:
            self.waits = waited


STOP = Stop()
if hasattr(os, "register_at_fork"):
    # a forked process, a worker of an environment, ends by the signals that its parent sends
    os.register_at_fork(after_in_child=STOP.rest)

# What the system says about a disk that cannot be written, where it does not name the file. Other errors may
# be those of a connection, or mistakes of this program.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)

def explain_error(error, way_on):
    """Write an error of the disk as one sentence: what, where, what to do."""
    place = error.filename or run_folder.CLAIMED.run
    where = f" ({place})" if place else ""
    remedy = "mend that"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "make room"
    return f"{error.strerror}{where}: {remedy}; {way_on()}."

def broken_off(error):
    """Return what ends the run: an interrupt, or a sentence about environments and how to go on."""
    if isinstance(error, SystemExit):
        return SystemExit(f"{str(error).rstrip('.')}; {run_folder.way_on()}.")
    return error

@contextlib.contextmanager
def explained(rank=0, way_on=run_folder.way_on):
    """Turn what ends a program from outside, a signal or a full disk, into one sentence on how to go on.

    way_on: writes the end of the sentence.
    """
    try:
        yield
    except KeyboardInterrupt:
        if rank > 0:
            raise SystemExit(1)
        raise SystemExit(f"Interrupted: {way_on()}.")
    except OSError as error:
        if not error.filename and error.errno not in DISK_ERRORS:
            raise
        raise SystemExit(explain_error(error, way_on))
    except FloatingPointError as error:
        raise SystemExit(f"{error}; {way_on()}.")
    except Exception as error:
        if re.search("out of memory|allocate memory", str(error)) and isinstance(error, RuntimeError):
            raise SystemExit("There is not enough memory: lower micro_batch or num_envs, set "
                             f"grad_checkpointing=True, or shorten the texts; {way_on()}.")
        if not is_compile_error(error):
            raise
        raise SystemExit(f"{explain_compile_error(error)}; {way_on()}.")
    finally:
        unlock_all()
        run_folder.CLAIMED.run = ""
        STOP.rest()
