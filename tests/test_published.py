"""
Test that model folders carry the tensor names of published checkpoints, so that other programs open them.

    python -m pytest tests/test_published.py
"""
import os, shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from extras.published_names import names_in, publish_names, rename
from model import VLM, load_model
from pretrain import tiny_nets
from small_runs import run
from small_runs import tiny  # noqa: F401  (fixture)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# LLaVA-1.5's parts, by the names that its checkpoints and vLLM give them
PARTS = {"language_model.model", "multi_modal_projector", "vision_tower.vision_model"}
LAYER = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"

def parts_of(file):
    """Collect the parts of a LLaVA that a file's names begin with."""
    parts = set()
    for name in names_in(file):
        depth = 1 if name.startswith("multi_modal_projector") else 2
        parts.add(".".join(name.split(".")[:depth]))
    return parts

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A copy of the shipped base with the names that transformers 5 gives its tensors -> its folder."""
    folder = str(tmp_path_factory.mktemp("own") / "own")
    shutil.copytree(os.path.join(ROOT, "bases", "tiny-vlm"), folder)
    file = os.path.join(folder, "model.safetensors")
    tensors = {name.replace("vision_model.", ""): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder

@pytest.mark.parametrize("name", ["tiny-vlm", "tiny-vlm-grids", "tiny-vlm-worlds"])
def test_shipped_bases_have_published_names(name):
    """vLLM opens a LLaVA by these names only; it refused the bases when they had the library's own."""
    file = os.path.join(ROOT, "bases", name, "model.safetensors")
    assert parts_of(file) == PARTS
    assert LAYER in names_in(file)

def test_both_names_are_read(weights):
    """A folder with either kind of names is the same net, bit for bit."""
    nets = []
    for folder in (weights, "bases/tiny-vlm"):
        nets.append(load_model(folder)[0].state_dict())
    assert nets[0].keys() == nets[1].keys()
    for name, tensor in nets[0].items():
        assert torch.equal(tensor, nets[1][name]), name

def test_rename_keeps_the_bits(weights, tmp_path):
    """The command gives a folder the published names once, and its tensors stay as they are."""
    folder = str(tmp_path / "copy")
    shutil.copytree(weights, folder)
    shipped = os.path.join(ROOT, "bases", "tiny-vlm", "model.safetensors")
    assert rename(folder) > 0
    assert rename(folder) == 0
    file = os.path.join(folder, "model.safetensors")
    renamed = load_file(file)
    for name, tensor in load_file(shipped).items():
        assert renamed[name].dtype == tensor.dtype
        assert torch.equal(renamed[name], tensor), name
    assert names_in(file) == names_in(shipped)

def test_rename_refuses_what_is_no_model(tmp_path):
    with pytest.raises(SystemExit, match="holds no model.safetensors"):
        rename(str(tmp_path))

def saved_names(net, folder):
    """Save a net -> the names in its file."""
    net.save_pretrained(folder)
    return names_in(os.path.join(folder, "model.safetensors"))

def test_nets_are_saved_by_published_names(weights, tmp_path):
    """However a net was made, what is saved has these names: read by either kind of names, or made anew."""
    made, processor = load_model("scratch", ["a text", "another text"])
    read = load_model("bases/tiny-vlm")[0]
    own = load_model(weights)[0]
    for i, net in enumerate((made, read, own)):
        VLM(net, processor)
        names = saved_names(net, str(tmp_path / str(i)))
        assert LAYER in names
        assert "language_model.model.embed_tokens.weight" in names
    # a SmolVLM's names are published ones as the library writes them
    net, _ = tiny_nets.smolvlm(["a text", "another text"])
    before = saved_names(net, str(tmp_path / "before"))
    assert saved_names(publish_names(net), str(tmp_path / "after")) == before

def test_a_run_that_trains_all_weights_writes_published_names(tmp_path, tiny):  # noqa: F811
    """Checkpoint and model folder of lora_r=0 have them, and are read again without a missing weight."""
    out = run(tmp_path / "all", tiny, lora_r=0)
    for name in ("ckpt", "model"):
        folder = os.path.join(out, name)
        assert LAYER in names_in(os.path.join(folder, "model.safetensors"))
        _, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
