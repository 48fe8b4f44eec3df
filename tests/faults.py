"""
Let a process fail at a chosen file operation: it is killed there, or its disk is full from there on.

    with faults(7, "kill"): ...     the seventh operation is cut in half by SIGKILL
    with faults(7, "full"): ...     from the seventh on nothing can be written: OSError, no space left
    with faults(): ...              counts only: OPERATIONS.count
"""
import builtins, contextlib, errno, os, signal
from types import SimpleNamespace

import safetensors.torch
import torch

import model

OPERATIONS = SimpleNamespace(count=0, at=0, mode="", log=[])
# what can still be done on a full disk
FREE = ("replace", "rename", "remove", "fsync", "rmdir", "unlink")

def is_full():
    """Tell whether the disk is full by now."""
    return OPERATIONS.mode == "full" and 0 < OPERATIONS.at <= OPERATIONS.count

def step(name, half=None):
    """Count an operation, and fail if it is the chosen one. half: does half of it before a kill."""
    OPERATIONS.count += 1
    OPERATIONS.log.append(name)
    if OPERATIONS.at == 0 or OPERATIONS.count < OPERATIONS.at:
        return
    if OPERATIONS.mode == "kill":
        if half:
            half()
        os.kill(os.getpid(), signal.SIGKILL)
    if OPERATIONS.mode == "full" and name not in FREE:
        if half:
            half()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

class File:
    """A file opened for writing, whose first write is an operation."""

    def __init__(self, file):
        self.file = file
        self.is_new = True

    def write(self, content):
        """Write, or half of it."""

        def half():
            self.file.write(content[: len(content) // 2])
            self.file.flush()

        if self.is_new or is_full():
            step("write", half)
        self.is_new = False
        return self.file.write(content)

    def writelines(self, lines):
        """Write each line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

def is_watched(file):
    """Tell whether operations on a file count: only those in the folder where the run works."""
    return isinstance(file, (str, os.PathLike)) and os.path.abspath(file).startswith(os.getcwd() + os.sep)

def watched_open(open_file):
    """Make an open() whose files for writing are watched."""

    def open_watched(file, mode="r", *args, **options):
        if not set(mode) & set("wax+") or not is_watched(file):
            return open_file(file, mode, *args, **options)
        step("open")
        return File(open_file(file, mode, *args, **options))

    return open_watched

def watched(function, name):
    """Make a function of `os` whose calls are operations."""

    def call(*args, **options):
        if any(is_watched(value) for value in args) or name == "fsync":
            step(name)
        return function(*args, **options)

    return call

def watched_save(save, place):
    """Make a writer of tensors: argument number `place` names the file, of which a fault leaves a piece."""

    def call(*args, **options):
        file = args[place]

        def half():
            if isinstance(file, str):
                with open(file, "wb") as f:
                    f.write(b"half")

        step("save", half)
        return save(*args, **options)

    return call

@contextlib.contextmanager
def faults(at=0, mode=""):
    """Watch all file operations in a with block, and fail at number `at`."""
    OPERATIONS.count = 0
    OPERATIONS.at = at
    OPERATIONS.mode = mode
    OPERATIONS.log.clear()
    places = [(builtins, "open", watched_open(open))]
    for name in ("replace", "rename", "remove", "fsync", "mkdir", "rmdir", "unlink"):
        places.append((os, name, watched(getattr(os, name), name)))
    places.append((model, "save_file", watched_save(safetensors.torch.save_file, 1)))
    places.append((torch, "save", watched_save(torch.save, 1)))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, function in places:
            setattr(owner, name, function)
        yield OPERATIONS
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
