"""
Check models that bring their own Python files.

A folder with configuration, modeling and processing code of its own is opened, trained, played and saved.
"""
import builtins, json, os, sys

import pytest
import torch
import transformers.dynamic_module_utils as dynamic
from safetensors.torch import save_file

import families, model
from agent_rl import compute_loss
from extras.model_folders import rehearse, try_turn
from test_agent_rl import settings
from test_model import TOLERANCE, ask, gap, log_probabilities, picture, refuses, replay, seeded

CONFIGURATION = '''
from transformers import LlamaConfig, PretrainedConfig

class SketchConfig(PretrainedConfig):
    model_type = "sketch"
    sub_configs = {"text_config": LlamaConfig}
    def __init__(self, text_config=None, patch=16, image_token_id=3, **kwargs):
        if isinstance(text_config, dict):
            text_config = LlamaConfig(**text_config)
        self.text_config = text_config or LlamaConfig()
        self.patch, self.image_token_id = patch, image_token_id
        super().__init__(**kwargs)
'''
MODELING = '''
import torch
from torch import nn
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from .configuration_sketch import SketchConfig

class SketchModel(PreTrainedModel, GenerationMixin):
    config_class = SketchConfig
    def __init__(self, config):
        super().__init__(config)
        self.eye = nn.Linear(3 * config.patch ** 2, config.text_config.hidden_size)
        self.writer = LlamaForCausalLM(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.writer.get_input_embeddings()

    def get_output_embeddings(self):
        return self.writer.lm_head

    def get_decoder(self):
        return self.writer.model

    def forward(
        self, input_ids, attention_mask=None, pixel_values=None,
        past_key_values=None, use_cache=None, **kwargs
    ):
        x = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            p = self.config.patch
            patches = pixel_values.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5)
            features = self.eye(patches.flatten(3).flatten(0, 2))
            x = x.masked_scatter((input_ids == self.config.image_token_id)[..., None], features)
        h = self.writer.model(
            inputs_embeds=x, attention_mask=attention_mask,
            past_key_values=past_key_values, use_cache=use_cache,
        )
        logits = self.writer.lm_head(h.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=h.past_key_values)
'''
PROCESSING = '''
import numpy as np, torch
from transformers import ProcessorMixin

class SketchProcessor(ProcessorMixin):
    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"
    image_token = "<image>"
    def __init__(self, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, text=None, images=None, **kwargs):
        out = dict(self.tokenizer([t.replace("<image>", 4 * "<image>") for t in text], **kwargs))
        if images:
            pixels = [np.array(i.convert("RGB").resize((32, 32))) for row in images for i in row]
            out["pixel_values"] = torch.stack([torch.tensor(p).permute(2, 0, 1) / 255.0 for p in pixels])
        return out
'''
CODE = dict(configuration=CONFIGURATION, modeling=MODELING, processing=PROCESSING)
TEMPLATE = (
    "{% for m in messages %}"
    "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "{{ '</s>' if m['role'] == 'assistant' else '>' }}"
    "{% endfor %}"
)
PROCESSOR_CONFIG = dict(
    processor_class="SketchProcessor",
    auto_map={"AutoProcessor": "processing_sketch.SketchProcessor"},
)

@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory):
    """Give the library a code cache of these tests' own, and fail if it asks a question on stdin."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic, "HF_MODULES_CACHE", cache)
        # Python would look into the cache that an earlier file's tests used.
        patch.syspath_prepend(cache)
        for name in list(sys.modules):
            if name.partition(".")[0] == "transformers_modules":
                patch.delitem(sys.modules, name)
        patch.setattr(builtins, "input", lambda *args: pytest.fail("the library asked on stdin"))
        yield

def write(folder, auto="AutoModelForImageTextToText", edits=()):
    """Write a folder as a download from the hub would be; return its path.

    auto: the auto class by which the model's author registers it. edits: pairs (old, new) for the modeling
    code; the weights are those of the code before.
    """
    folder.mkdir()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    tok = families.tokenizer(special, pad="<pad>", eos="</s>", bos="<s>")
    tok.save_pretrained(folder)
    for name, code in CODE.items():
        # The comment keeps the library from using the code of another test's folder.
        (folder / f"{name}_sketch.py").write_text(f"{code}# {folder}")
    text = dict(families.TEXT, vocab_size=len(tok), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = dict(
        model_type="sketch",
        text_config=text,
        auto_map={"AutoConfig": "configuration_sketch.SketchConfig", auto: "modeling_sketch.SketchModel"},
        architectures=["SketchModel"],
    )
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text(json.dumps(PROCESSOR_CONFIG))
    (folder / "chat_template.jinja").write_text(TEMPLATE)

    torch.manual_seed(0)
    net_class = dynamic.get_class_from_dynamic_module("modeling_sketch.SketchModel", str(folder))
    config_class = dynamic.get_class_from_dynamic_module("configuration_sketch.SketchConfig", str(folder))
    net = net_class(config_class(text_config=text))
    with torch.no_grad():
        for param in net.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    tensors = {key: tensor.contiguous() for key, tensor in net.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    code = MODELING
    for old, new in edits:
        assert old in code
        code = code.replace(old, new)
    (folder / "modeling_sketch.py").write_text(code)
    return str(folder)

def open_with_code(path, **changes):
    """Open a folder with permission to run its code -> a VLM with random adapters and critics."""
    net, processor = model.load_model(path, device="cpu", trust_remote_code=True)
    return families.randomise(families.make_vlm(net, processor, name=path, **changes))

def is_trained(key, lora_r):
    """Tell whether an update moves a tensor of the VLM: LoRA or all of the net, and the heads."""
    if key.startswith("heads."):
        return True
    if lora_r:
        return ".lora_" in key
    return key.startswith("net.")


AUTO_CLASSES = ["AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM"]

@pytest.mark.parametrize("lora_r", [4, 0])
@pytest.mark.parametrize("auto", AUTO_CLASSES)
def test_trains_plays_and_saves(tmp_path, auto, lora_r):
    """The model plays, learns and is saved, whatever auto class its author chose.

    The rollout agrees with the training path, one update moves what it should, and a save comes back bit for
    bit.
    """
    vlm = open_with_code(write(tmp_path / "sketch", auto), lora_r=lora_r)
    rehearse(vlm)
    assert vlm.training
    assert not vlm.banned[vlm.eos]
    if lora_r:
        assert len(vlm.lora) == 14
        assert all(path.startswith("writer.model.layers.") for path in vlm.lora)

    pages = ["3 + 4 = ?", "Possible actions: + - stop."]
    prompts = [vlm.encode(ask(text), [picture(i)]) for i, text in enumerate(pages)]
    replies, logps = vlm.generate(prompts, 5, generator=seeded(1))
    logits = replay(vlm, prompts, replies)
    for b, reply in enumerate(replies):
        assert gap(log_probabilities(logits[b], reply), logps[b]) < TOLERANCE

    inputs, P, reply_ids, mask = vlm.collate(prompts, replies)
    batch = dict(
        inputs=inputs,
        P=P,
        reply_ids=reply_ids,
        mask=mask,
        span=mask,
        reward=torch.ones(2),
        terminated=torch.ones(2),
        next=torch.tensor([-1, -1]),
        chain=1,
        return_to_go=torch.zeros(2),
        ep_return=torch.zeros(2),
    )
    before = {key: tensor.clone() for key, tensor in vlm.state_dict().items()}
    loss, _ = compute_loss(vlm, batch, settings())
    loss.backward()
    trained = [param for param in vlm.parameters() if param.requires_grad]
    torch.optim.Adam(trained, lr=1e-2).step()
    after = vlm.state_dict()
    for key in before:
        assert torch.equal(after[key], before[key]) != is_trained(key, lora_r), key

    vlm.save(tmp_path / "saved")
    other = open_with_code(vlm.name, lora_r=lora_r)
    other.load(str(tmp_path / "saved"))
    found = other.state_dict()
    assert found.keys() == after.keys()
    assert all(torch.equal(found[key], after[key]) for key in after)
    if not lora_r:
        # The code travels with the weights.
        files = set(os.listdir(tmp_path / "saved"))
        assert {f"{name}_sketch.py" for name in CODE} <= files
        again = model.VLM(*model.load_model(str(tmp_path / "saved"), trust_remote_code=True))
        expected, _ = vlm.generate(prompts, 4, temperature=0)
        assert again.generate(prompts, 4, temperature=0)[0] == expected

def test_without_the_flag(tmp_path):
    """One sentence says what the flag allows; no code has run, and nothing is asked on stdin."""
    folder = tmp_path / "sketch"
    path = write(folder)
    for name in CODE:
        (folder / f"{name}_sketch.py").write_text(f"raise SystemError('{name} ran')")

    def check():
        refuses(path, lambda: model.load_model(path))
        message = "Python files of its own, which would be run on this machine.*trust_remote_code=True"
        with pytest.raises(SystemExit, match=message):
            model.load_model(path)

    check()
    # A processor's own code needs the flag, too: a model of the library, with this processor.
    families.build("idefics3", path)
    (folder / "processor_config.json").write_text(json.dumps(PROCESSOR_CONFIG))
    check()


MISSING_PIECES = {
    "unembedding": ("def get_output_embeddings(self):", "def other(self):", "get_output_embeddings"),
    "decoder": ("def get_decoder(self):", "def other(self):", "get_decoder"),
    "generate": ("(PreTrainedModel, GenerationMixin)", "(PreTrainedModel)", "GenerationMixin"),
    "package": ("from torch import nn", "import no_such_package\nfrom torch import nn", "no_such_package"),
    "post_init": ("self.post_init()", "pass", "another version of transformers"),
}

@pytest.mark.parametrize("old, new, word", MISSING_PIECES.values(), ids=MISSING_PIECES)
def test_a_missing_piece_is_named(tmp_path, old, new, word):
    path = write(tmp_path / "sketch", edits=[(old, new)])
    refuses(path, lambda: model.load_model(path, trust_remote_code=True))
    with pytest.raises(SystemExit, match=word):
        model.load_model(path, trust_remote_code=True)


HIDDEN_FAULTS = {
    "no cache": (
        "past_key_values=past_key_values, ",
        "past_key_values=None, ",
        "past_key_values",
    ),
    "no argument": (
        "past_key_values=None, use_cache=None, **kwargs",
        "",
        "does not play a turn",
    ),
    "past the unembedding": (
        "self.writer.lm_head(h.last_hidden_state)",
        "nn.functional.linear(h.last_hidden_state, self.writer.lm_head.weight)",
        "get_output_embeddings",
    ),
}

@pytest.mark.parametrize("old, new, word", HIDDEN_FAULTS.values(), ids=HIDDEN_FAULTS)
def test_a_rehearsal_finds_what_loading_cannot(tmp_path, old, new, word):
    """A cache that is accepted and ignored would train another policy than it plays, without an error."""
    vlm = open_with_code(write(tmp_path / "sketch", edits=[(old, new)]))
    refuses(vlm.name, lambda: rehearse(vlm))
    with pytest.raises(SystemExit, match=word):
        rehearse(vlm)

def test_the_rehearsal_passes_the_librarys_families(tmp_path):
    """So does the trial of one prompt that every model answers when it is opened."""
    for family in families.FAMILIES:
        folder = families.build(family, tmp_path / family)
        net, processor = model.load_model(folder, device="cpu")
        vlm = families.make_vlm(net, processor)
        try_turn(vlm)
        rehearse(vlm)
