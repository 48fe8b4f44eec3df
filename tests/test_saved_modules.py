"""
Modules that are trained in full beside LoRA: which they are, their files, the policy without them.
"""
import copy, os, re, types

import pytest
import torch
from safetensors.torch import load_file

import families, model
from model import check_base
from small_runs import one_sentence, read_json, run, tiny, weights  # noqa: F401  (tiny is a fixture)
from test_model import encoded, every_family, folder, make, opened, replay  # noqa: F401  (fixtures)

PROJECTOR = ".*multi_modal_projector"

def outside_language(net):
    """Return a regex that matches one module with weights outside the language model, in full."""
    parts = set(net.get_decoder().modules())
    tables = {id(net.get_input_embeddings().weight), id(net.get_output_embeddings().weight)}
    for path, module in net.named_modules():
        ids = {id(param) for param in module.parameters()}
        if path and ids and not ids & tables and not parts & set(module.modules()):
            # A whole tower has parts that a batch does not use.
            if re.search("proj|connector|merger", path):
                return re.escape(path)
    raise AssertionError("no projector")

def first_logits(vlm):
    """Compute the logits of the first reply token of some prompts."""
    prompts = encoded(vlm)
    return replay(vlm, prompts, [[vlm.eos]] * len(prompts))

@every_family
def test_saved_and_loaded(make, opened, tmp_path, family):
    """A projector is trained beside LoRA, its file has PEFT's names, and it is read bit for bit.

    Without the adapters the policy is the base's.
    """
    pattern = outside_language(opened(family)[0])
    vlm = make(family, modules_to_save=pattern)
    [path] = vlm.saved.paths
    for name, param in vlm.net.named_parameters():
        is_trained = ".lora_" in name or name.startswith(f"{path}.")
        assert param.requires_grad == is_trained, name

    vlm.save(tmp_path)
    config = read_json(tmp_path, "adapter_config.json")
    assert config["modules_to_save"] == [path]
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    prefix = f"base_model.model.{path}."
    expected = {prefix + name for name in vlm.saved.paths[path].state_dict()}
    assert expected == {name for name in names if ".lora_" not in name}

    expected = first_logits(vlm)
    with vlm.reference():
        reference = first_logits(vlm)
    again = make(family, modules_to_save=pattern, fresh=True)
    base = first_logits(again)
    again.load(tmp_path)
    loaded = first_logits(again)
    with again.reference():
        unchanged = first_logits(again)
    assert torch.equal(loaded, expected)
    assert torch.equal(first_logits(vlm), expected)
    assert torch.equal(reference, base)
    assert torch.equal(unchanged, base)
    assert not torch.equal(expected, base)

def test_outermost_modules(opened):
    """A module counts once, however many of its parts match; what has no weights does not count."""
    net, _ = opened("scratch")
    find = model.find_saved_modules
    whole = "model.multi_modal_projector"
    assert list(find(net, f"{PROJECTOR}.*")) == [whole]
    assert list(find(net, r".*projector\.linear_1|.*projector\.act")) == [f"{whole}.linear_1"]
    assert find(net, "") == {}

def test_layers_trained_in_full_have_no_lora(make):
    """A layer of the language model has an adapter, or is trained in full, never both."""
    vlm = make("scratch", modules_to_save=r".*language_model\.layers\.1\..*")
    assert vlm.saved.paths and vlm.lora
    assert not any(".layers.1." in path for path in vlm.lora)
    adapted = [path for path, layer in vlm.net.named_modules() if isinstance(layer, model.LoRALinear)]
    assert set(adapted) == set(vlm.lora)

def test_small_steps_on_a_bfloat16_base(opened):
    """Steps that are too small for bfloat16 add up: the trained weights are float32."""
    net, processor = opened("scratch")
    net = copy.deepcopy(net).bfloat16()
    vlm = families.make_vlm(net, processor, modules_to_save=PROJECTOR).train()
    assert all(param.dtype == torch.float32 for _, _, param in vlm.saved.trained)
    weight = net.model.multi_modal_projector.linear_1.weight
    before = weight.detach().clone()
    prompts = encoded(vlm)
    replies = [[vlm.eos]] * len(prompts)
    inputs, P, ids, _ = vlm.collate(prompts, replies)
    R = ids.shape[1]
    optimizer = torch.optim.SGD([weight], lr=1e-6)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = vlm(inputs, P, R)
        logps = logits.log_softmax(-1)
        logps[..., vlm.eos].sum().backward()
        optimizer.step()
    moved = (weight - before).abs().max()
    # bfloat16 has eight bits: it does not tell such a weight from the next
    assert 0 < moved < before.abs().max() * 2**-10
    with vlm.reference():
        assert net.model.multi_modal_projector.linear_1.weight.dtype == torch.bfloat16

@pytest.mark.parametrize(
    "pattern, cache, words",
    [
        ("nothing_like_it", 0, ["modules_to_save='nothing_like_it'", "matches no module", "model."]),
        ("*_proj", 0, ["modules_to_save='*_proj'", "no regular expression"]),
        (".*embed_tokens", 0, ["modules_to_save='.*embed_tokens'", "embeddings"]),
        (".*", 0, ["modules_to_save='.*'", "embeddings"]),
        (PROJECTOR, 64, ["vision_cache_mb=64", "modules_to_save=", "set vision_cache_mb=0"]),
    ],
)
def test_patterns_that_cannot_be_meant(opened, pattern, cache, words):
    """A regex that cannot be meant is refused before anything is recorded."""
    keys = dict(model="m", size=32, lora_r=0)
    cfg = types.SimpleNamespace(**keys, modules_to_save=pattern, vision_cache_mb=cache, compile=False)
    net, processor = opened("scratch")
    one_sentence(lambda: check_base(cfg, net, processor), *words)

def test_cache_beside_language_layers(opened):
    """Features may be cached where only layers behind them are trained."""
    net, _ = opened("scratch")
    assert model.find_saved_modules(net, r".*language_model\.layers\.0\.mlp", vision_cache_mb=64)

def test_run_resumes(tiny, tmp_path):  # noqa: F811
    """A run with a trained projector, stopped and resumed, ends with the bytes of one that was not."""
    keys = dict(modules_to_save=PROJECTOR, eval_interval=2)
    straight = run(tmp_path / "straight", tiny, **keys)
    run(tmp_path / "halves", tiny, stop_at=4, **keys)
    halves = run(tmp_path / "halves", tiny, resume=True, **keys)
    assert weights(straight) == weights(halves)
    tensors = load_file(os.path.join(halves, "ckpt", "adapter_model.safetensors"))
    base = load_file(os.path.join(tiny, "model.safetensors"))
    for part in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"):
        name = f"multi_modal_projector.{part}"
        [first] = [tensor for key, tensor in base.items() if key.endswith(name)]
        assert not torch.equal(tensors[f"base_model.model.model.{name}"], first)

def test_nothing_else_is_trained(tiny, tmp_path):  # noqa: F811
    """With lora_r=0 the modules alone are trained, and the run writes a whole model."""
    keys = dict(lora_r=0, modules_to_save=PROJECTOR, actor_loss="sft", online_updates=0)
    out = run(tmp_path / "run", tiny, **keys)
    before, _ = model.load_model(tiny)
    after, _ = model.load_model(os.path.join(out, "ckpt"))
    after = dict(after.named_parameters())
    for name, param in before.named_parameters():
        assert torch.equal(param, after[name]) == ("multi_modal_projector" not in name), name
    assert os.path.isfile(os.path.join(out, "model", "config.json"))
