"""
What a run takes: `python train.py config/x.py --dry_run=True`.
"""
import numpy as np
import torch

import envs
from agent_rl import compute_loss
from buffer import make_batch, reply_text
from evaluate import model_agent


def peak_bytes(f, device):
    """Bytes that tensors take while f() runs, at most, beyond those that were there before. By the allocator's own count on cuda, by the profiler's record on the
    cpu: what a process holds there says more about its malloc than about the tensors."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        f()
    changes = sorted((event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return int(max(np.cumsum([0] + [n for _, n in changes])))


def measure_memory(vlm, optimizer, data, cfg, autocast):
    """train.py --dry_run=True: the longest batch forward, backward, one optimizer step and a rollout of the longest prompts; prints the peak by part -> {part: bytes}."""
    here = lambda t: t.to_local() if hasattr(t, "to_local") else t                                  # a sharded weight's part on this rank
    size = lambda tensors: sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in map(here, tensors)}.values())
    length = lambda i: sum(len(part["text"] or "") for m in data.rows[i]["messages"] for part in m["content"])
    by_length = sorted(range(len(data)), key=length, reverse=True)
    longest = (by_length * cfg.batch_size)[:cfg.batch_size]
    windows = [data.episodes[name][k:][:cfg.window] for name, k in (data.place[i] for i in longest)]
    def update():
        for i in range(0, len(windows), cfg.micro_batch):
            b = make_batch([(data, windows[i:i + cfg.micro_batch])], vlm, envs.MARKER, cfg.gamma)
            with autocast():
                loss = compute_loss(vlm, b, cfg)[0]
            loss.backward()
    adapters = [p for p in vlm.net.parameters() if p.requires_grad]
    vlm.train()
    parts = dict(weights=size([*vlm.net.parameters(), *vlm.net.buffers()]) - (size(adapters) if vlm.lora else 0), adapters=size(adapters) if vlm.lora else 0,
                 heads=size([*vlm.heads.parameters(), *vlm.targets.parameters()]))
    parts["update"] = peak_bytes(update, vlm.device)                                        # activations, and the gradients that stay
    parts["optimizer"] = peak_bytes(optimizer.step, vlm.device)
    optimizer.zero_grad(set_to_none=True)
    rows = [data.rows[i] for i in (longest * cfg.num_envs)[:cfg.num_envs] if reply_text(data.rows[i]) is not None]
    act = model_agent(vlm, cfg.max_new_tokens, 1.0, torch.Generator(vlm.device).manual_seed(0))
    def rollout():
        with autocast():
            act(None, rows, [data.image(row["images_file_names"][0]) for row in rows])
    parts["rollout"] = peak_bytes(rollout, vlm.device)
    fixed = sum(parts[k] for k in ("weights", "adapters", "heads", "optimizer"))
    for name, what in dict(weights="the net, frozen or not", adapters="LoRA", heads="critics and their targets", optimizer="AdamW's two moments", update=f"{cfg.batch_size} windows of "
                           f"{cfg.window} turns, {cfg.micro_batch} at once: activations, gradients", rollout=f"{len(rows)} turns at once, {cfg.max_new_tokens} new tokens").items():
        print(f"{name:<12}{parts[name] / 2 ** 20:10.1f} MiB   {what}")
    print(f"{'peak':<12}{(fixed + max(parts['update'], parts['rollout'])) / 2 ** 20:10.1f} MiB   of tensors on {vlm.device}" + (" (the program itself takes about 0.5 GiB more)" if vlm.device.type == "cpu" else
          f" of {torch.cuda.get_device_properties(0).total_memory / 2 ** 20:,.0f} MiB"))
    return parts
