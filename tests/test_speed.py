"""
Test what can be counted of speed on any machine: casts, waits for the device, batches built ahead, encodings.

    python -m pytest tests/test_speed.py
"""
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import agent_rl, bench, model, train
from configurator import configure
from extras import bench_gpu, checkpoints, prefetch
from extras.feature_cache import Inputs
from small_runs import flags, metrics, replay, run, weights
from small_runs import straight, tiny  # noqa: F401  (fixtures)

CPU = torch.device("cpu")

class OperationCounter(TorchDispatchMode):
    """Count the operations that run, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


# ---- casts ----

def lora_layer(dtype):
    """Make a LoRA layer on a frozen base of a dtype, with a B that is not zero."""
    base = torch.nn.Linear(6, 5, bias=False, dtype=dtype).requires_grad_(False)
    layer = model.LoRALinear(base, 2, 32)
    torch.nn.init.normal_(layer.lora_B)
    return layer

def count_casts(layer, x):
    """Count the casts of a forward pass under autocast, and of its backward pass."""
    counter = OperationCounter()
    with counter:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        forward = counter.calls["_to_copy"]
        y.backward(torch.ones_like(y))
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == x.dtype
    return forward, counter.calls["_to_copy"] - forward

def test_a_layer_casts_its_master_weights_and_nothing_else():
    """The input went to float32 for A, and autocast brought it back: 4 casts, and 4 on the way back."""
    x = torch.randn(3, 6, dtype=torch.bfloat16, requires_grad=True)
    assert count_casts(lora_layer(torch.bfloat16), x) == (2, 2)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_autocast_the_update_is_computed_in_float32(dtype):
    layer = lora_layer(dtype)
    x = torch.randn(3, 6, dtype=dtype)
    low_rank = x.float() @ layer.lora_A.T * layer.scale
    update = (low_rank @ layer.lora_B.T).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight) + update)


# ---- batches built ahead ----

def test_batches_from_a_thread_change_no_byte(straight, tiny, tmp_path, monkeypatch):
    """Draws are functions of the step; nothing is built before the rollout that it may draw from."""
    threads = []
    draw = train.draw_windows

    def noted(cfg, step, data, replay):
        threads.append((step, threading.current_thread() is threading.main_thread()))
        return draw(cfg, step, data, replay)

    monkeypatch.setattr(prefetch, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(train, "draw_windows", noted)
    twin = run(tmp_path / "twin", tiny)
    assert metrics(twin) == metrics(straight)
    assert weights(twin) == weights(straight)
    assert replay(twin) == replay(straight)
    assert [step for step, _ in threads] == list(range(8))
    # The first update, and those that follow a rollout.
    assert [step for step, in_main in threads if in_main] == [0, 4, 6]

def make_ahead(draw):
    """Build ahead on the CPU; the batches of windows are their negative number. draw(step): the windows."""
    cfg = SimpleNamespace(offline_updates=4, online_updates=4, updates_per_rollout=2, stop_at=0)
    vlm = SimpleNamespace(device=CPU)

    def draw_windows(cfg, step, data, replay):
        return draw(step)

    def build_batches(cfg, vlm, windows):
        return -windows

    return prefetch.Ahead(draw_windows, build_batches, cfg, vlm, None, None)

def test_an_error_in_the_thread_waits_for_its_update(monkeypatch):
    def draw(step):
        if step == 3:
            raise SystemExit("step 3")
        return step

    monkeypatch.setattr(prefetch, "DEVICES", ("cpu",))
    ahead = make_ahead(draw)
    with ahead.take(2) as work:
        assert work == (2, -2)
    with pytest.raises(SystemExit, match="step 3"), ahead.take(3):
        pass

def test_a_step_before_which_the_agent_plays_is_not_built_ahead(monkeypatch):
    """A rollout comes before updates 4 and 6, and there is no update 8."""
    drawn = []

    def draw(step):
        drawn.append(step)
        return step

    monkeypatch.setattr(prefetch, "DEVICES", ("cpu",))
    ahead = make_ahead(draw)
    for step in (2, 3, 5, 7):
        with ahead.take(step) as work:
            assert work == (step, -step)
    assert drawn == [2, 3, 5, 7]

def test_the_cpu_has_no_thread():
    ahead = make_ahead(lambda step: step)
    with ahead.take(2):
        assert ahead.future is None

def test_a_batch_keeps_its_pictures_on_the_way_to_the_device():
    inputs = Inputs(input_ids=torch.ones(1, 2))
    inputs.pictures = ["picture"]
    sent = prefetch.to_device(dict(inputs=inputs, P=3), CPU)
    assert sent["inputs"].pictures == ["picture"]
    assert sent["P"] == 3


# ---- waits for the device ----

def test_the_loss_reads_no_number_from_the_device(tiny, tmp_path, monkeypatch):
    """Reading one waits for all that is queued; only the library does, in its forward pass."""
    waits = Counter()
    states = model.VLM.states
    compute_loss = agent_rl.compute_loss

    def library(*args):
        counter = OperationCounter()
        with counter:
            hidden = states(*args)
        waits["library"] += counter.calls["_local_scalar_dense"]
        return hidden

    def counted(*args):
        counter = OperationCounter()
        with counter:
            result = compute_loss(*args)
        waits["all"] += counter.calls["_local_scalar_dense"] + counter.calls["nonzero"]
        return result

    monkeypatch.setattr(train, "compute_loss", counted)
    run(tmp_path / "all", tiny, stop_at=3)
    monkeypatch.setattr(model.VLM, "states", library)
    monkeypatch.setattr(train, "compute_loss", compute_loss)
    run(tmp_path / "library", tiny, stop_at=3)
    assert waits["all"] <= waits["library"]

def test_the_chain_of_a_batch_is_what_its_rows_say(tiny, tmp_path, monkeypatch):
    compute_loss = train.compute_loss

    def checked(vlm, batch, *args):
        turns = 1
        longest = 1
        for following in batch["next"].tolist():
            turns = turns + 1 if following >= 0 else 1
            longest = max(longest, turns)
        assert batch["chain"] == longest
        return compute_loss(vlm, batch, *args)

    monkeypatch.setattr(train, "compute_loss", checked)
    run(tmp_path / "run", tiny, stop_at=4, window=3)

@pytest.mark.parametrize("written", [None, True])
def test_moments_are_loaded_for_this_device(tmp_path, written):
    """A run of a GPU, with its fused AdamW, continues on a CPU, and the other way round."""
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    group = dict(params=[param], lr=0.1, base=0.1)
    writer = torch.optim.AdamW([group], fused=written)
    writer.step()
    torch.save(writer.state_dict(), tmp_path / "optimizer.pt")
    reader = torch.optim.AdamW([dict(params=[param], lr=0.2, base=0.2)])
    checkpoints.load_moments(tmp_path / "optimizer.pt", SimpleNamespace(device=CPU), reader)
    reader.step()
    assert reader.param_groups[0]["fused"] is None
    assert reader.param_groups[0]["base"] == 0.2


# ---- encodings ----

def test_a_prompt_is_encoded_at_most_twice_a_run(tiny, tmp_path, monkeypatch):
    """Rollouts, updates and evaluations share what they have encoded."""
    seen = Counter()
    encode = model.VLM.encode

    def counted(vlm, messages, images, key=None):
        if key is not None and key not in vlm.encoded_prompts:
            seen[key] += 1
        return encode(vlm, messages, images, key)

    monkeypatch.setattr(model.VLM, "encode", counted)
    run(tmp_path / "run", tiny)
    assert len(seen) > 10
    assert max(seen.values()) <= 2


# ---- the benchmark ----

def bench_settings():
    """Return short settings of the benchmark."""
    return configure(bench.TRAIN, flags(device="cpu", max_new_tokens=2, lora_r=2), quiet=True)

def test_the_gpu_benchmark_runs_on_tiny_shapes(capsys, monkeypatch):
    """Without a GPU it counts what can be counted."""
    monkeypatch.setattr(bench_gpu, "ROUNDS", 1)
    [rows] = bench_gpu.print_gpu(bench_settings(), compiled=[False]).values()
    updates = [row for row in rows if "seconds" in row]
    assert [row["name"] for row in updates[:2]] == ["sft", "afsft"]
    assert all(row["casts"] > 0 and row["operations"] > 0 for row in updates)
    # PEFT, where it is installed, computes the same
    assert {row["tokens"] for row in updates} == {4 * 8}
    for row in updates:
        assert row["loss"] == pytest.approx(updates[0]["loss"], rel=1e-4)
        assert row["last_loss"] < row["loss"]
    names = [row["name"] for row in rows if "turns_a_second_32" in row]
    assert names == ["rollout, growing cache", "rollout, static cache"]
    printed = capsys.readouterr().out
    assert "bench_gpu.json" in printed
    ratios = bench_gpu.ratios_of(rows)
    assert ratios["AFSFT / SFT, seconds"] == updates[1]["seconds"] / updates[0]["seconds"]
    assert all(what in printed for what in ratios)

def test_a_row_that_does_not_fit_costs_that_row(capsys, monkeypatch):
    """A card of 24 GB ended in a traceback at the 7B's first row, before all others."""

    def too_large(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(bench_gpu, "measure_updates", too_large)
    [rows] = bench_gpu.print_gpu(bench_settings(), compiled=[False]).values()
    assert [row["name"] for row in rows] == ["rollout, growing cache", "rollout, static cache"]
    assert "does not fit into the memory of this GPU: CUDA out of memory." in capsys.readouterr().out

@pytest.mark.parametrize("name", ["gpu", "sizes"])
def test_the_benchmarks_of_adapters_need_some(name):
    """Without adapters they ended in tracebacks."""
    with pytest.raises(SystemExit, match="leave lora_r out"):
        bench.main([name, *flags(device="cpu", lora_r=0)])

def test_the_names_of_the_benchmarks_are_shown(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"bench.py {name}" in printed for name in bench.BENCHMARKS)
    with pytest.raises(SystemExit, match="no benchmark 'speed'"):
        bench.main(["speed"])

def test_the_static_cache_gives_the_same_tokens():
    shape = bench_gpu.ON_CPU["tiny"]
    vlm = bench_gpu.make_vlm(shape, bench_settings(), CPU, "sft")
    prompts = [bench_gpu.make_prompt(vlm, shape) for _ in range(3)]
    layers = set()
    replies = []

    def note_cache(net, args, kwargs):
        layers.add(type(kwargs["past_key_values"].layers[0]).__name__)

    vlm.net.register_forward_pre_hook(note_cache, with_kwargs=True)
    for cache in bench_gpu.CACHES:
        vlm.net.generation_config.cache_implementation = cache
        replies.append(vlm.generate(prompts, 6, temperature=0.0)[0])
    assert replies[0] == replies[1]
    assert layers == {"DynamicLayer", "StaticLayer"}
