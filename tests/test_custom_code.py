"""Models that bring their own Python files: a folder with configuration, modeling and processing code of its own is loaded, trained, played and saved."""
import builtins, json, os, types

import pytest
import torch
import transformers.dynamic_module_utils as dynamic

import families, model
from agent_rl import compute_loss
from extras.model_folders import rehearse
from test_model import ask, picture, refuses

CONFIGURATION = '''
from transformers import LlamaConfig, PretrainedConfig

class SketchConfig(PretrainedConfig):
    model_type = "sketch"
    sub_configs = {"text_config": LlamaConfig}
    def __init__(self, text_config=None, patch=16, image_token_id=3, **kwargs):
        self.text_config = LlamaConfig(**text_config) if isinstance(text_config, dict) else text_config or LlamaConfig()
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

    def forward(self, input_ids, attention_mask=None, pixel_values=None, past_key_values=None, use_cache=None, **kwargs):
        x = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            p = self.config.patch
            patches = pixel_values.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
            x = x.masked_scatter((input_ids == self.config.image_token_id)[..., None], self.eye(patches))
        h = self.writer.model(inputs_embeds=x, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache)
        return CausalLMOutputWithPast(logits=self.writer.lm_head(h.last_hidden_state), past_key_values=h.past_key_values)
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
            out["pixel_values"] = torch.stack([torch.tensor(np.array(i.convert("RGB").resize((32, 32)))).permute(2, 0, 1) / 255.0 for row in images for i in row])
        return out
'''
TEMPLATE = ("{% for m in messages %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ '</s>' if m['role'] == 'assistant' else '>' }}{% endfor %}")
CFG = dict(actor_loss="afsft", mdp="token", bc_coef=0.3, af_coef=0.9, critic_coef=0.7, cql_coef=0.0, pess_coef=0.2, v_support=0.0, beta=-0.02, awr_temperature=0.5, gamma=0.9,
           gamma_token=1.0, trace="tree", lam=0.6, critic_detach=False)


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory):
    """The library copies the code into its cache: a cache of these tests' own. A question on stdin is a failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(builtins, "input", lambda *args: pytest.fail("the library asked on stdin"))
        yield


def write(folder, auto="AutoModelForImageTextToText", edit=lambda code: code):
    """The folder of a hub download; `edit` changes the modeling code. Weights are from the intact code."""
    folder.mkdir()
    tok = families.tokenizer(["<pad>", "<s>", "</s>", "<image>"], pad="<pad>", eos="</s>", bos="<s>", chat_template=TEMPLATE)
    text = dict(families.TEXT, vocab_size=len(tok), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    tok.save_pretrained(folder)
    for name, code in ("configuration", f"{CONFIGURATION}# {folder}"), ("modeling", MODELING), ("processing", PROCESSING):
        (folder / f"{name}_sketch.py").write_text(code)
    auto_map = {"AutoConfig": "configuration_sketch.SketchConfig", auto: "modeling_sketch.SketchModel"}
    (folder / "config.json").write_text(json.dumps(dict(model_type="sketch", text_config=text, auto_map=auto_map, architectures=["SketchModel"])))
    (folder / "processor_config.json").write_text(json.dumps(dict(processor_class="SketchProcessor", auto_map={"AutoProcessor": "processing_sketch.SketchProcessor"})))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    torch.manual_seed(0)
    cls = dynamic.get_class_from_dynamic_module("modeling_sketch.SketchModel", str(folder))
    config = dynamic.get_class_from_dynamic_module("configuration_sketch.SketchConfig", str(folder))
    net = cls(config(text_config=text))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    from safetensors.torch import save_file
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "modeling_sketch.py").write_text(edit(MODELING))
    return str(folder)


def opened(path, **settings):
    torch.manual_seed(0)
    vlm = model.VLM(*model.load_model(path, trust_remote_code=True), **dict(lora_r=4, lora_alpha=8, name=path) | settings)
    with torch.no_grad():
        for p in [m.lora_B for m in vlm.lora.values()] + [*vlm.heads.parameters(), *vlm.targets.parameters()]:
            p.normal_(std=0.3)
    return vlm


@pytest.mark.parametrize("lora_r", [4, 0])
@pytest.mark.parametrize("auto", ["AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM"])
def test_trains_plays_and_saves(tmp_path, auto, lora_r):
    """Whatever auto class its author chose: one update, a rollout that agrees with the training path, a save that comes back bit for bit."""
    vlm = opened(write(tmp_path / "sketch", auto), lora_r=lora_r)
    rehearse(vlm)
    assert vlm.training and not vlm.banned[vlm.eos]
    assert not lora_r or len(vlm.lora) == 14 and all(path.startswith("writer.model.layers.") for path in vlm.lora)
    prompts = [vlm.encode(ask(text), [picture(i)]) for i, text in enumerate(["3 + 4 = ?", "Possible actions: + - stop."])]
    ids, kept = vlm.generate(prompts, 5, generator=torch.Generator().manual_seed(1))
    inputs, P, reply_ids, mask = vlm.collate(prompts, ids)
    with torch.no_grad():
        logp = vlm(inputs, P, reply_ids.shape[1])[0].log_softmax(-1).gather(2, reply_ids[..., None])[..., 0]
    assert all((logp[b, :len(row)] - torch.tensor(row)).abs().max() < 1e-4 for b, row in enumerate(kept))
    zero = torch.zeros(2)
    batch = dict(inputs=inputs, P=P, reply_ids=reply_ids, mask=mask, span=mask, reward=zero + 1, terminated=zero + 1, next=torch.tensor([-1, -1]), return_to_go=zero, ep_return=zero)
    before = {k: v.clone() for k, v in vlm.state_dict().items()}
    loss, _ = compute_loss(vlm, batch, types.SimpleNamespace(**CFG))
    loss.backward()
    torch.optim.Adam([p for p in vlm.parameters() if p.requires_grad], lr=1e-2).step()
    moved = {k for k, v in vlm.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == ({k for k in before if ".lora_" in k or k.startswith("heads.")} if lora_r else {k for k in before if k.startswith(("net.", "heads."))})
    vlm.save(tmp_path / "saved")
    other = opened(vlm.name, lora_r=lora_r)
    other.load(str(tmp_path / "saved"))
    ours, theirs = vlm.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    if not lora_r:  # the code travels with the weights
        assert {"configuration_sketch.py", "modeling_sketch.py", "processing_sketch.py"} <= set(os.listdir(tmp_path / "saved"))
        again = model.VLM(*model.load_model(str(tmp_path / "saved"), trust_remote_code=True))
        assert again.generate(prompts, 4, temperature=0)[0] == vlm.generate(prompts, 4, temperature=0)[0]


def test_without_the_flag(tmp_path):
    """One sentence that says what the flag allows; the code has not run; nothing is asked. A processor's own code needs the flag too."""
    path = write(tmp_path / "sketch")
    for name in "configuration", "modeling", "processing":
        (tmp_path / "sketch" / f"{name}_sketch.py").write_text(f"raise SystemError('{name} ran')")
    for _ in range(2):
        refuses(path, lambda: model.load_model(path))
        with pytest.raises(SystemExit, match="Python files of its own, which would be run on this machine.*trust_remote_code=True"):
            model.load_model(path)
        families.build("idefics3", path)  # a family of the library: its weights, this processor
        (tmp_path / "sketch" / "processor_config.json").write_text(json.dumps(dict(processor_class="SketchProcessor", auto_map={"AutoProcessor": "processing_sketch.SketchProcessor"})))


@pytest.mark.parametrize("edit, word", [
    (lambda code: code.replace("def get_output_embeddings(self):", "def other(self):"), "get_output_embeddings"),
    (lambda code: code.replace("def get_decoder(self):", "def other(self):"), "get_decoder"),
    (lambda code: code.replace("(PreTrainedModel, GenerationMixin)", "(PreTrainedModel)"), "GenerationMixin"),
    (lambda code: code.replace("from torch import nn", "import no_such_package\nfrom torch import nn"), "no_such_package"),
    (lambda code: code.replace("self.post_init()", "pass"), "another version of transformers"),
], ids=["unembedding", "decoder", "generate", "package", "post_init"])
def test_a_missing_piece_is_named(tmp_path, edit, word):
    path = write(tmp_path / "sketch", edit=edit)
    refuses(path, lambda: model.load_model(path, trust_remote_code=True))
    with pytest.raises(SystemExit, match=word):
        model.load_model(path, trust_remote_code=True)


@pytest.mark.parametrize("edit, word", [
    (lambda code: code.replace("past_key_values=past_key_values, ", "past_key_values=None, "), "past_key_values"),
    (lambda code: code.replace("past_key_values=None, use_cache=None, **kwargs", ""), "does not play a turn"),
    (lambda code: code.replace("self.writer.lm_head(h.last_hidden_state)", "nn.functional.linear(h.last_hidden_state, self.writer.lm_head.weight)"), "get_output_embeddings"),
], ids=["no cache", "no argument", "past the unembedding"])
def test_a_rehearsal_finds_what_loading_cannot(tmp_path, edit, word):
    """A cache taken and forgotten would give other words than were trained, in silence."""
    vlm = opened(write(tmp_path / "sketch", edit=edit))
    refuses(vlm.name, lambda: rehearse(vlm))
    with pytest.raises(SystemExit, match=word):
        rehearse(vlm)


def test_the_rehearsal_passes_the_librarys_families(tmp_path):
    for family in families.FAMILIES:
        families.build(family, tmp_path / family)
        rehearse(model.VLM(*model.load_model(str(tmp_path / family))))
