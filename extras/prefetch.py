"""
Build the next update's batches in a thread while a GPU computes the present one.

    ahead = Ahead(draw_windows, build_batches, cfg, vlm, data, replay)
    with ahead.take(step) as (windows, batches):    # built already, or now
        ...                                         # the update; meanwhile those of step + 1 are built

What is drawn is a function of the step and of the data, and nothing is built before a rollout that may add to
the data. So the same numbers come out with and without the thread, and an error surfaces at the same `take`.
The thread runs only inside of the with block, where nothing else reads the data. On the CPU there is none: it
would take a core from the update itself.
"""
import contextlib
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from extras.feature_cache import Inputs

DEVICES = ("cuda",)

def rollout_due(cfg, step):
    """Tell whether the agent plays before update `step`: once every updates_per_rollout online updates."""
    online = step - cfg.offline_updates
    return online >= 0 and online % cfg.updates_per_rollout == 0

class Ahead:
    """Draws and builds the batches of an update, one update ahead where that pays."""

    def __init__(self, draw, build, cfg, vlm, data, replay):
        """draw(cfg, step, data, replay) -> windows. build(cfg, vlm, windows) -> batches on the CPU."""
        self.draw = lambda step: draw(cfg, step, data, replay)
        self.build = lambda windows: build(cfg, vlm, windows)
        self.cfg = cfg
        self.step = None
        self.future = None
        self.pool = None
        self.is_pinning = vlm.device.type == "cuda"
        if vlm.device.type in DEVICES:
            self.pool = ThreadPoolExecutor(1, "batches", self.enter_thread, (vlm.device,))

    def enter_thread(self, device):
        """Choose the GPU in the thread, too: each thread begins with the first one."""
        if self.is_pinning:
            torch.cuda.set_device(device)

    def may_build(self, step):
        """Tell whether update `step` follows without a rollout in between."""
        is_last = step in (self.cfg.offline_updates + self.cfg.online_updates, self.cfg.stop_at)
        return self.pool and not is_last and not rollout_due(self.cfg, step)

    @contextlib.contextmanager
    def take(self, step):
        """Give (windows, batches) of update `step`; the next ones are built while the with block runs."""
        if self.future and self.step == step:
            work = self.future.result()
        else:
            work = self.draw_and_build(step)
        self.future = None
        if self.may_build(step + 1):
            self.step = step + 1
            self.future = self.pool.submit(self.build_pinned, step + 1)
        try:
            yield work
        finally:
            if self.future:
                # an error in the thread waits for its own update
                wait([self.future])

    def draw_and_build(self, step):
        """Draw and build the batches of update `step` -> (windows, batches)."""
        windows = self.draw(step)
        return windows, self.build(windows)

    def build_pinned(self, step):
        """Draw and build in memory from which a GPU copies by itself."""
        windows, batches = self.draw_and_build(step)
        if self.is_pinning:
            batches = [map_tensors(batch, torch.Tensor.pin_memory) for batch in batches]
        return windows, batches

def map_tensors(value, function):
    """Apply a function to the tensors of a batch, those of its inputs included."""
    if torch.is_tensor(value):
        return function(value)
    if not isinstance(value, dict):
        return value
    result = {key: map_tensors(part, function) for key, part in value.items()}
    if isinstance(value, Inputs):
        result = Inputs(result)
        result.pictures = value.pictures
    return result

def to_device(batch, device):
    """Copy a batch to the device; from pinned memory without waiting."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
