"""
Run several jobs of train.py in one process: the program of each rank in tests/test_torchrun.py.

    torchrun --nproc_per_node=2 tests/rank_jobs.py jobs.json    # each job is the argv of train.main

A start of a process takes longer than a run, so a process makes many runs. Environment variables:

    FAULT              "kill 24" or "hang 3": rank 1 dies or sleeps in that update
    TIMEOUT_MINUTES    how long the ranks wait for each other
"""
import json, os, signal, sys, time

import pytest
import torch

import envs
import train

def train_and_save_gradients(argv, max_turns):
    """Run a job with episodes of at most max_turns turns.

    The gradients of all updates, as the optimizer gets them, go to <out_dir>.grads.
    """
    gradients = []
    clip = torch.nn.utils.clip_grad_norm_

    def save_and_clip(params, limit):
        gradients.append(torch.cat([p.grad.flatten() for p in params]))
        return clip(params, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envs.NumberLine, "max_turns", max_turns)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", save_and_clip)
        train.launch(argv)
    if train.RANK == 0:
        torch.save(gradients, out_dir(argv) + ".grads")

def out_dir(argv):
    """Find the value of --out_dir."""
    for word in argv:
        if word.startswith("--out_dir="):
            return word.partition("=")[2]
    raise ValueError("a job names its out_dir")

def losing_first(play):
    """Wrap `play`: its first call loses every episode, as with a dead browser."""
    calls = []
    reset = envs.Env.reset

    def reset_and_lose(env, *args, **options):
        found = reset(env, *args, **options)
        env.lost = "broken on purpose"
        return found

    def losing_play(*args, **options):
        calls.append(1)
        with pytest.MonkeyPatch.context() as patch:
            if len(calls) == 1:
                patch.setattr(envs.Env, "reset", reset_and_lose)
            return iter(list(play(*args, **options)))

    return losing_play

def faulty(compute_loss, fault):
    """Wrap compute_loss: rank 1 dies or sleeps in the update that the fault names."""
    kind, update = fault.split()
    calls = []

    def faulty_loss(*args):
        calls.append(1)
        if train.RANK == 1 and len(calls) == int(update):
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return compute_loss(*args)

    return faulty_loss

def run_job(argv):
    """Run a job. On rank 1 its episodes have one turn, and a job named `lost` loses its first rollout."""
    if train.RANK == 0:
        train_and_save_gradients(argv, max_turns=3)
        return
    with pytest.MonkeyPatch.context() as patch:
        if out_dir(argv).endswith("/lost"):
            patch.setattr(train, "play", losing_first(train.play))
        train_and_save_gradients(argv, max_turns=1)

def main(file):
    """Run the jobs of a file in turn, with the fault and the time-out of the environment variables."""
    train.TIMEOUT_MINUTES = float(os.environ["TIMEOUT_MINUTES"])
    if os.environ.get("FAULT"):
        train.compute_loss = faulty(train.compute_loss, os.environ["FAULT"])
    with open(file) as f:
        jobs = json.load(f)
    for argv in jobs:
        run_job(argv)


if __name__ == "__main__":
    main(sys.argv[1])
