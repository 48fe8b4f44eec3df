"""
The table of published models: what is computed there is what a real net of the same shape takes.
    python -m pytest tests/test_sizes.py
"""
import contextlib, os, sys
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bench, envs, families, model
from buffer import Buffer, make_batch
from configurator import configure
from evaluate import env_factory, play, record, scripted_agent
from extras import sizes
from pretrain.tiny_nets import llava


def test_a_published_model_has_its_published_size(monkeypatch):
    """Fake tensors, real numbers; a config that is wrong is said in a sentence."""
    with FakeTensorMode():
        net = sizes.published("SmolVLM-256M")
        assert net.dtype == torch.bfloat16 and 256.4e6 < sum(p.numel() for p in net.parameters()) < 256.6e6
        monkeypatch.setitem(sizes.PUBLISHED, "SmolVLM-256M", (*sizes.PUBLISHED["SmolVLM-256M"][:3], 300.0, 1))
        with pytest.raises(SystemExit, match="256.5 million parameters, published are 300.0"):
            sizes.published("SmolVLM-256M")


def test_fake_and_real_nets_keep_the_same():
    """Bytes by part; activations grow with the batch, and with checkpointing they are less than half of it."""
    def parts(B):
        net = llava(families.TEXTS, vocab_size=300, hidden=64, layers=4, vision_hidden=32, vision_layers=1)[0]
        return sizes.parts(net.bfloat16(), 4, B, 24), net
    (real, net), (double, _) = parts(2), parts(4)
    with FakeTensorMode():
        assert sizes.parts(sizes.AutoModelForImageTextToText.from_config(net.config, dtype=torch.bfloat16), 4, 2, 24) == pytest.approx(real, rel=0.02)    # CPU kernels lay some out in another way
    load_run = sum(p.numel() * 4 for p in net.parameters() if p.requires_grad)
    assert real["adapters"] == load_run and real["optimizer"] == 2 * real["gradients"] == 2 * (load_run + real["head"] // 2)
    assert 1.9 < double["activations"] / real["activations"] < 2.1 and real["checkpointed"] < 0.5 * real["activations"]


def test_activations_are_those_of_a_dry_run(tmp_path):
    """Against the measured peak of an update, in float32 on the CPU; the peak has the eyes' features, logits and Qs too."""
    cfg = configure(os.path.join(ROOT, "train.py"), ["--batch_size=4", "--micro_batch=4", "--num_envs=2", "--max_new_tokens=2", "--device=cpu"], quiet=True)
    data = Buffer(str(tmp_path), create=True)
    record(play(env_factory(cfg), scripted_agent({"random": 1.0}, np.random.default_rng(0)), list(range(8)), split="train"), data)
    torch.manual_seed(0)
    vlm, shapes, collate = model.build(cfg, llava(families.TEXTS, vocab_size=300, hidden=128, layers=4), -1.0), [], model.VLM.collate
    with pytest.MonkeyPatch.context() as m, contextlib.redirect_stdout(None):
        m.setattr(model.VLM, "collate", lambda *args: shapes.append(collate(*args)) or shapes[-1])
        measured = bench.measure_memory(vlm, torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad]), data, cfg, contextlib.nullcontext)["update"]
    computed = sizes.saved_bytes(vlm.net, *shapes[0][0]["input_ids"].shape, half=False) + sum(4 * p.numel() for p in vlm.parameters() if p.requires_grad)
    assert 0.8 < computed / measured < 1.05
