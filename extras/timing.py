"""
Time a call on any device, for the benchmarks.
"""
import time

import torch

def wait_for_device():
    """Wait until a GPU has done what is queued."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()

def seconds_of(function):
    """Return the seconds that a call takes, what it queues on a GPU included."""
    wait_for_device()
    began = time.perf_counter()
    function()
    wait_for_device()
    return time.perf_counter() - began
