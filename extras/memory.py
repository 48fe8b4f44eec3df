"""
Measure the memory that a run takes, by part, before it starts.

    python train.py config/numberline.py --dry_run=True
"""
import numpy as np
import torch

import envs
from agent_rl import compute_loss
from buffer import make_batch, reply_text
from evaluate import model_agent

MIB = 2**20

def peak_bytes(function, device):
    """Return the most bytes that tensors take while function() runs, beyond what was there.

    On cuda the allocator counts. On the CPU the profiler records: what the process holds there says more
    about its malloc than about the tensors.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    changes = []
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
    changes.sort()
    return int(max(np.cumsum([0] + [n_bytes for _, n_bytes in changes])))


# ---- weights ----

def weight_bytes(vlm):
    """Return the bytes of the weights on this rank: {"weights", "adapters", "heads"}."""
    net = tensor_bytes([*vlm.net.parameters(), *vlm.net.buffers(), *vlm.saved.parameters()])
    adapters = 0
    if vlm.lora:
        adapters = tensor_bytes(p for p in vlm.net.parameters() if p.requires_grad)
    heads = tensor_bytes([*vlm.heads.parameters(), *vlm.targets.parameters()])
    return dict(weights=net - adapters, adapters=adapters, heads=heads)

def tensor_bytes(tensors):
    """Sum the bytes of tensors; shared memory counts once, of a sharded tensor only this rank's part."""
    by_address = {}
    for tensor in tensors:
        if hasattr(tensor, "to_local"):
            tensor = tensor.to_local()
        by_address[tensor.data_ptr()] = tensor
    return sum(tensor.numel() * tensor.element_size() for tensor in by_address.values())


# ---- the largest batches ----

def repeat_to(items, n):
    """Return n items: the first ones, or all of them again and again."""
    return (items * n)[:n]

def longest_rows(data, n):
    """Return the numbers of the n rows with the longest texts, longest first, repeated if too few."""

    def text_length(i):
        parts = [part for message in data.rows[i]["messages"] for part in message["content"]]
        return sum(len(part["text"] or "") for part in parts)

    by_length = sorted(range(len(data)), key=text_length, reverse=True)
    return repeat_to(by_length, n)

def windows_from(data, row_numbers, window):
    """Return the window that starts at each of these rows."""
    windows = []
    for i in row_numbers:
        row = data.rows[i]
        windows.append(data.episodes[row["episode"]][row["turn"] :][:window])
    return windows

def run_update(vlm, data, windows, cfg, autocast):
    """Run all forward and backward passes of an update."""
    for start in range(0, len(windows), cfg.micro_batch):
        micro = windows[start : start + cfg.micro_batch]
        batch = make_batch([(data, micro)], vlm, envs.MARKER, cfg.gamma)
        with autocast():
            loss, _ = compute_loss(vlm, batch, cfg)
        loss.backward()

def run_rollout(vlm, data, rows, cfg, autocast):
    """Reply to the prompts of some rows at once."""
    generator = torch.Generator(vlm.device).manual_seed(0)
    act = model_agent(vlm, cfg.max_new_tokens, 1.0, generator)
    images = [data.image(row["images_file_names"][0]) for row in rows]
    with autocast():
        act(None, rows, images)


# ---- the table ----

def print_parts(parts, cfg, n_prompts, device):
    """Print one line per part, and the peak: what stays, and the larger one of update and rollout."""
    update = f"{cfg.batch_size} windows of {cfg.window} turns, {cfg.micro_batch} at once"
    meanings = dict(
        weights="the net, frozen or not",
        adapters="LoRA",
        heads="critics and their targets",
        optimizer="AdamW's two moments",
        update=f"{update}: activations, gradients",
        rollout=f"{n_prompts} turns at once, {cfg.max_new_tokens} new tokens",
    )
    for name, meaning in meanings.items():
        print(f"{name:<12}{parts[name] / MIB:10.1f} MiB   {meaning}")
    permanent = sum(parts[name] for name in ("weights", "adapters", "heads", "optimizer"))
    peak = permanent + max(parts["update"], parts["rollout"])
    if device.type == "cpu":
        total = " (the program itself takes about 0.5 GiB more)"
    else:
        total = f" of {torch.cuda.get_device_properties(0).total_memory / MIB:,.0f} MiB"
    print(f"{'peak':<12}{peak / MIB:10.1f} MiB   of tensors on {device}{total}")

def measure_memory(vlm, optimizer, data, cfg, autocast):
    """Measure and print the peak memory of a run by part -> {part: bytes}.

    The longest batch goes forward and backward, the optimizer takes one step, and the model replies to the
    longest prompts. data: a Buffer. autocast(): returns the context in which the run computes.
    """
    vlm.train()
    parts = weight_bytes(vlm)
    longest = longest_rows(data, cfg.batch_size)

    # Activations, and the gradients that stay.
    windows = windows_from(data, longest, cfg.window)
    parts["update"] = peak_bytes(lambda: run_update(vlm, data, windows, cfg, autocast), vlm.device)
    parts["optimizer"] = peak_bytes(optimizer.step, vlm.device)
    optimizer.zero_grad(set_to_none=True)

    rows = [data.rows[i] for i in repeat_to(longest, cfg.num_envs)]
    rows = [row for row in rows if reply_text(row) is not None]
    parts["rollout"] = peak_bytes(lambda: run_rollout(vlm, data, rows, cfg, autocast), vlm.device)
    print_parts(parts, cfg, len(rows), vlm.device)
    return parts
