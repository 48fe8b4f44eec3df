"""
The table of published models: what is computed there is what a real net of the same shape takes.

    python -m pytest tests/test_sizes.py
"""
import contextlib, os

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForImageTextToText

import families, model
from buffer import Buffer
from configurator import configure
from evaluate import env_factory, play, record, scripted_agent
from extras import sizes
from extras.memory import measure_memory
from pretrain.tiny_nets import llava

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

def test_a_published_model_has_its_published_size():
    """The numbers come from fake tensors."""
    with FakeTensorMode():
        net = sizes.published_net("SmolVLM-256M")
        assert net.dtype == torch.bfloat16
        assert 256.4 < sizes.count_millions(net) < 256.6

def test_a_wrong_config_is_one_sentence(monkeypatch):
    wrong = sizes.PUBLISHED["SmolVLM-256M"]._replace(millions=300.0)
    monkeypatch.setitem(sizes.PUBLISHED, "SmolVLM-256M", wrong)
    with FakeTensorMode():
        with pytest.raises(SystemExit, match="256.5 million parameters, published are 300.0"):
            sizes.published_net("SmolVLM-256M")

def small_net():
    """Build a small LLaVA with random weights in bfloat16."""
    net, _ = llava(
        families.TEXTS,
        vocab_size=300,
        hidden=64,
        layers=4,
        vision_hidden=32,
        vision_layers=1,
    )
    return net.bfloat16()

def test_fake_and_real_nets_take_the_same():
    """Bytes by part; activations grow with the batch, and checkpointing more than halves them."""
    net = small_net()
    real = sizes.update_parts(net, 4, 2, 24)
    with FakeTensorMode():
        fake_net = AutoModelForImageTextToText.from_config(net.config, dtype=torch.bfloat16)
        fake = sizes.update_parts(fake_net, 4, 2, 24)
    # CPU kernels store some tensors in another layout
    assert fake == pytest.approx(real, rel=0.02)

    adapters = sum(4 * p.numel() for p in net.parameters() if p.requires_grad)
    assert real["adapters"] == adapters
    assert real["gradients"] == adapters + real["head"] // 2
    assert real["optimizer"] == 2 * real["gradients"]

    double = sizes.update_parts(small_net(), 4, 4, 24)
    assert 1.9 < double["activations"] / real["activations"] < 2.1
    assert real["checkpointed"] < 0.5 * real["activations"]

def test_activations_are_those_of_a_dry_run(tmp_path, monkeypatch):
    """The computed peak is that of an update which is measured, in float32 on the CPU.

    The measured one also has the features of the pictures, logits and Q values.
    """
    flags = ["--batch_size=4", "--micro_batch=4", "--num_envs=2", "--max_new_tokens=2", "--device=cpu"]
    cfg = configure(os.path.join(ROOT, "train.py"), flags, quiet=True)
    data = Buffer(str(tmp_path), create=True)
    players = scripted_agent({"random": 1.0}, np.random.default_rng(0))
    record(play(env_factory(cfg), players, list(range(8)), split="train"), data)
    torch.manual_seed(0)
    base = llava(families.TEXTS, vocab_size=300, hidden=128, layers=4)
    vlm = model.build(cfg, base)
    trained = [p for p in vlm.parameters() if p.requires_grad]

    shapes = []
    collate = model.VLM.collate

    def noting_collate(*args):
        out = collate(*args)
        shapes.append(out[0]["input_ids"].shape)
        return out

    monkeypatch.setattr(model.VLM, "collate", noting_collate)
    optimizer = torch.optim.AdamW(trained)
    parts = measure_memory(vlm, optimizer, data, cfg, contextlib.nullcontext)
    gradients = sum(4 * p.numel() for p in trained)
    # the update is what is measured first
    computed = sizes.saved_bytes(vlm.net, *shapes[0], half=False) + gradients
    assert 0.8 < computed / parts["update"] < 1.05
