"""
Replace files and folders as a whole, and let one process at a time write into a folder.

A file or a folder is written aside, flushed to the disk and renamed. A crash, a power cut or a full disk
leaves the old one or the new one, never half of one.
"""
import contextlib, errno, json, os, platform, shutil

from safetensors import SafetensorError

from extras.flag_mistakes import ConfigError, show

try:
    import fcntl
except ImportError:
    # Windows has no such locks: there the user sees to it that there is one writer
    fcntl = None

# folder: its lock file, which this process holds open
LOCKS = {}


# ---- files and folders ----

def sync_folder(folder):
    """Flush a folder's list of names, so that a rename in it survives a power cut."""
    if os.name == "nt":
        return
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems have no such flush
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)

def write_whole(file, text):
    """Replace a UTF-8 text file as a whole: after a crash or on a full disk the old one is still there."""
    aside = file + ".tmp"
    # what a crash has left, or a link to somebody's file that came with a downloaded run
    with contextlib.suppress(FileNotFoundError):
        os.remove(aside)
    try:
        with open(aside, "x", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise
    sync_folder(os.path.dirname(file))

def write_json(file, content):
    """Replace a JSON file as a whole."""
    write_whole(file, json.dumps(content, indent=1))

def read_json(file):
    """Read a JSON object -> dict; ConfigError with one sentence if it is missing or damaged."""
    try:
        with open(file, encoding="utf-8") as f:
            content = json.load(f)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}): copy the run again.")
    except (ValueError, RecursionError):
        raise ConfigError(f"{file} is damaged, it is no JSON: copy the run again.")
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is damaged, it holds no JSON object: copy the run again.")
    return content

def explain_writers(error, folder):
    """Return the OSError behind an error of the writers of tensors, which have names of their own for it."""
    if isinstance(error, SafetensorError):
        number = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
        return OSError(number, os.strerror(number), folder)
    if not isinstance(error, RuntimeError):
        return error
    cause = error
    while cause and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error

@contextlib.contextmanager
def written_aside(folder):
    """Write into folder.tmp in a with block; at its end all of it is on the disk, or none after an error."""
    aside = folder + ".tmp"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        os.makedirs(aside)
        yield aside
        sync_files(aside)
    except BaseException as error:
        # half of it on a full disk would take the room of everything else
        shutil.rmtree(aside, ignore_errors=True)
        raise explain_writers(error, folder) from None

def list_files(folder):
    """List the files of a folder and of those in it, by their paths from there."""
    found = []
    for place, _, names in os.walk(folder):
        found += [os.path.relpath(os.path.join(place, name), folder) for name in names]
    return sorted(found)

def let_read(folder):
    """Let all who may read a folder read its files: the writer of safetensors keeps them to its owner."""
    mode = os.stat(folder).st_mode & 0o666
    for name in list_files(folder):
        file = os.path.join(folder, name)
        # a file system without modes has nothing to change
        if mode & ~os.stat(file).st_mode:
            with contextlib.suppress(OSError):
                os.chmod(file, mode)

def sync_files(folder):
    """Flush the files of a folder to the disk."""
    let_read(folder)
    for name in list_files(folder):
        with open(os.path.join(folder, name), "rb+") as f:
            os.fsync(f.fileno())
    for place, _, _ in os.walk(folder):
        sync_folder(place)

@contextlib.contextmanager
def replacing(folder):
    """Replace a folder by what a with block writes aside."""
    with written_aside(folder) as aside:
        yield aside
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(aside, folder)
    sync_folder(os.path.dirname(folder))


# ---- one writer ----

def lock(folder):
    """Become the only process that writes into a folder, until `unlock` or the end of the process.

    SystemExit with one sentence if another process, on this machine or on one that shares the disk, does.
    """
    if fcntl is None or folder in LOCKS:
        return
    path = os.path.join(folder, ".lock")
    if os.path.islink(path):
        raise SystemExit(f"{path!r} is a link: remove it.")
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = show(file.read()) or "another process"
        file.close()
        raise SystemExit(f"{folder!r} is being written by {owner}: wait for its end or stop it, or choose "
                         "another folder.")
    except OSError as error:
        print(f"{folder!r} cannot be locked ({error.strerror}): see to it that nothing else writes there.")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    LOCKS[folder] = file

def unlock(folder):
    """Let other processes write into a folder again."""
    if folder in LOCKS:
        LOCKS.pop(folder).close()

def unlock_all():
    """Let other processes write into all folders that this one has locked."""
    for folder in list(LOCKS):
        unlock(folder)

def forget_locks():
    """Close the locks in a forked process, a worker of an environment: they belong to its parent."""
    for file in LOCKS.values():
        file.close()
    LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_locks)
