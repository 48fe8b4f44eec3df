"""
Write MiniGPT-4 as a model folder: BLIP-2's vision tower and Q-Former, MiniGPT-4's projection, and a LLaMA.

    python -m extras.minigpt4 --blip2=blip2-flan-t5-xxl --llama=vicuna-7b --minigpt4=FILE --out=minigpt4-7b
    python train.py config/numberline.py --model=minigpt4-7b

FILE is the published checkpoint (Zhu et al., arXiv 2304.10592), prerained_minigpt4_7b.pth. It holds one
linear layer, `llama_proj`; all other weights are those of BLIP-2 and Vicuna v0. It was trained on the
Q-Former of blip2-flan-t5-xxl: another BLIP-2 has the same sizes, but gives features that it cannot read.

The folder is a plain BLIP-2 of transformers. Memory: the LLaMA once, in the dtype of its files, and 2 GB; the
language model of the BLIP-2 is not read.
"""
import os, pickle, re, sys

import torch
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlamaConfig,
    LlavaProcessor,
)

from configurator import configure
from extras.model_folders import first_sentence

# --- config ---
blip2: str = None  # folder of BLIP-2; Salesforce/blip2-flan-t5-xxl for the published checkpoints
llama: str = None  # folder of the LLaMA; Vicuna v0 of 7B or 13B for the published checkpoints
minigpt4: str = None  # the published file, *.pth
out: str = None  # new folder to write
# --- end of config ---

WEIGHT = "llama_proj.weight"
BIAS = "llama_proj.bias"
IMAGE = "<image>"
# constants that the published files contain, too
CONSTANTS = r"position_ids|rotary_emb\.inv_freq|relative_position_index"

def load_or_exit(where, remedy, load, *args, **options):
    """Return load(*args, **options); if the library fails, SystemExit with one sentence."""
    # a damaged or foreign folder has many errors in the library
    try:
        return load(*args, **options)
    except Exception as error:
        raise SystemExit(f"{where} does not load: {remedy} ({first_sentence(error)}).")


# ---- the published file ----

def read_projection(file):
    """Read weight and bias of `llama_proj` from the published file -> (weight, bias).

    It is read as data only: a checkpoint that holds code is refused. SystemExit if it is another file.
    """
    where = f"minigpt4={file!r}"
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"{where}: there is no such file, download the checkpoint first.")
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise SystemExit(f"{where} does not load as plain tensors: give the published .pth file, whole "
                         f"({first_sentence(error)}).")
    if isinstance(tensors, dict):
        tensors = tensors.get("model", tensors)
    if not isinstance(tensors, dict):
        tensors = {}
    dimensions = [getattr(tensors.get(name), "ndim", None) for name in (WEIGHT, BIAS)]
    if dimensions != [2, 1]:
        raise SystemExit(f"{where} holds no linear layer {WEIGHT}, {BIAS}; it begins with "
                         f"{list(tensors)[:2]}: give MiniGPT-4's own checkpoint, not Vicuna's or BLIP-2's.")
    # LoRA of MiniGPT-v2, or a trained Q-Former: without them, the model would silently be another one
    others = sorted(name for name in tensors if name not in (WEIGHT, BIAS) and not re.search(CONSTANTS, name))
    if others:
        raise SystemExit(f"{where} holds {len(others)} tensors beside llama_proj, for instance {others[0]}: "
                         "only the version that trains llama_proj alone is supported, no MiniGPT-v2.")
    return tensors[WEIGHT], tensors[BIAS]


# ---- BLIP-2 and the LLaMA ----

def read_configs(blip2, llama):
    """Read the configs of the two folders -> (BLIP-2's, the LLaMA's); SystemExit if one is another model."""
    where = f"blip2={blip2!r}"
    remedy = "give a folder with a BLIP-2 of transformers"
    blip2_config = load_or_exit(where, remedy, AutoConfig.from_pretrained, blip2)
    if blip2_config.model_type != "blip-2":
        raise SystemExit(f"{where} is a {blip2_config.model_type!r} model: give a BLIP-2 folder such as "
                         "Salesforce/blip2-flan-t5-xxl.")
    where = f"llama={llama!r}"
    remedy = "give a folder with a LLaMA or Vicuna of transformers"
    llama_config = load_or_exit(where, remedy, AutoConfig.from_pretrained, llama)
    if type(llama_config) not in AutoModelForCausalLM._model_mapping.keys():
        raise SystemExit(f"{where} is a {llama_config.model_type!r} model, which writes no text: give a "
                         "LLaMA or Vicuna folder.")
    return blip2_config, llama_config

def check_sizes(sources, weight, blip2_config, llama_config):
    """Exit with one sentence if the projection does not fit between the Q-Former and the LLaMA.

    sources: {"blip2", "llama", "minigpt4"} as the user wrote them. weight (LLaMA's width, Q-Former's width).
    """
    wide, narrow = weight.shape
    where = f"minigpt4={sources['minigpt4']!r}"
    vision = blip2_config.vision_config.hidden_size
    if narrow == 4 * vision:
        raise SystemExit(f"{where} reads {narrow} = 4 x {vision} numbers, four patches of the vision tower "
                         "side by side: it is a version without Q-Former (Llama 2, MiniGPT-v2), which "
                         "BLIP-2's network cannot hold; take the Vicuna one.")
    widths = {
        "blip2": (narrow, blip2_config.qformer_config.hidden_size),
        "llama": (wide, llama_config.hidden_size),
    }
    for name, (projected, actual) in widths.items():
        if projected != actual:
            raise SystemExit(f"{where} projects {narrow} numbers to {wide}, but {name}={sources[name]!r} has "
                             f"{actual} instead of {projected}: take the checkpoint and the folder of one "
                             "size (7B, 13B).")
    text_config = blip2_config.text_config
    if (text_config.model_type, text_config.hidden_size) != ("t5", 4096):
        print(f"  note: this BLIP-2 was trained with a {text_config.model_type}; the published MiniGPT-4 "
              "reads the Q-Former of blip2-flan-t5-xxl and would not understand this one's")

def check_complete(name, folder, missing):
    """Exit with one sentence if a folder lacks weights."""
    if missing:
        raise SystemExit(f"{name}={folder!r} lacks {len(missing)} weights, for instance {min(missing)}: "
                         "download the whole folder.")

def load_llama(folder):
    """Load the LLaMA in the dtype of its files."""
    language, report = load_or_exit(
        f"llama={folder!r}",
        "its folder must hold the weights, whole",
        AutoModelForCausalLM.from_pretrained,
        folder,
        dtype="auto",
        output_loading_info=True,
    )
    check_complete("llama", folder, report["missing_keys"])
    return language

def load_blip2(folder, config, dtype):
    """Load BLIP-2 with an empty language model in place of its own, whose weights stay in their files."""
    empty = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=0,
        num_attention_heads=1,
    )
    stub = Blip2Config(
        vision_config=config.vision_config,
        qformer_config=config.qformer_config,
        text_config=empty,
        num_query_tokens=config.num_query_tokens,
    )
    net, report = load_or_exit(
        f"blip2={folder!r}",
        "its folder must hold the weights of BLIP-2, whole",
        Blip2ForConditionalGeneration.from_pretrained,
        folder,
        config=stub,
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    # a mismatched key comes with its two shapes
    mismatched = {key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]}
    missing = {*report["missing_keys"], *mismatched}
    check_complete("blip2", folder, {key for key in missing if not key.startswith("language_")})
    return net


# ---- the prompt ----

# ###Human: <Img><image>...</Img> text ###Assistant: reply###Human: ...
# as in MiniGPT-4's second training stage. The sign ### between two turns comes once.
TEMPLATE = (
    "{{ 'FRONT' }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}"
    "{{ '###' if loop.first or loop.previtem['role'] != 'assistant' else '' }}{{ 'Human: ' }}"
    "{% for c in m['content'] %}{{ 'PICTURE' if c['type'] == 'image' else c['text'] }}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt or not loop.last %}{{ '###Assistant: ' }}{% endif %}"
    "{% elif m['role'] == 'assistant' %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{{ '###' }}"
    "{% else %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    "{% endif %}{% endfor %}"
)

def prompt_form(tokenizer):
    """Find the form of a prompt -> (chat template, id of the token that ends a turn).

    Both depend on how this tokenizer cuts text. The original puts one <s> in front, and cuts the text before
    and behind the picture separately, so that `###` and `</Img>` open a word. LLaMA's tokenizer of today does
    so behind a special token only if there is a space.
    """

    def ids(text, special=False):
        return tokenizer(text, add_special_tokens=special).input_ids

    bos = tokenizer.bos_token or ""
    head = "###Human: <Img>"
    tail = "</Img> a ###Assistant: "
    original = ids(head) + [tokenizer.convert_tokens_to_ids(IMAGE)] + ids(tail)
    if bos:
        original = [tokenizer.bos_token_id] + original

    found = None
    for front in dict.fromkeys(("", bos, bos + " ")):
        for gap in ("", " "):
            text = front + head + IMAGE + gap + tail
            if found is None and ids(text, special=not front) == original:
                found = (front, gap)
    if found is None:
        print("  note: this tokenizer cuts the prompt in another way than the original's did")
    front, gap = found or ("", "")
    template = TEMPLATE.replace("FRONT", front).replace("PICTURE", f"<Img>{IMAGE}{gap}</Img>")
    # behind a reply, LLaMA cuts `###` into two tokens, `##` and `#`: the first one ends the turn
    end = ids("a###")[len(ids("a"))]
    return template, end

def save_processor(blip2, llama, n_queries, out):
    """Save image processor, tokenizer and chat template -> (processor, id of the token that ends a turn).

    BLIP-2's own processor puts the picture in front of the text and forgets chat templates. LLaVA's writes as
    many placeholders as it counts, where the template has one: patches and additional tokens. Here it counts
    no patches, because a picture has fewer than 10^6 pixels, and the queries as additional tokens.
    """
    tokenizer = load_or_exit(
        f"llama={llama!r}",
        "its folder must hold a tokenizer",
        AutoTokenizer.from_pretrained,
        llama,
    )
    image_processor = load_or_exit(
        f"blip2={blip2!r}",
        "it needs its preprocessor_config.json",
        AutoImageProcessor.from_pretrained,
        blip2,
    )
    tokenizer.add_tokens([AddedToken(IMAGE, normalized=False, special=True)], special_tokens=True)
    tokenizer.save_pretrained(out)
    # The saved tokenizer is the one whose cuts count: LLaMA's loses its `legacy` when it is saved.
    tokenizer = AutoTokenizer.from_pretrained(out)
    template, end = prompt_form(tokenizer)
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=10**6,
        num_additional_image_tokens=n_queries,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    return processor, end


# ---- the whole ----

def fit_embeddings(language, n_tokens):
    """Give the LLaMA a row for the placeholder, and two tables of embeddings, as BLIP-2 needs them."""
    rows = language.get_input_embeddings().weight.shape[0]
    if n_tokens > rows:
        language.resize_token_embeddings(n_tokens, mean_resizing=False)
        # the placeholder is never read as a word and never written
        for table in (language.get_input_embeddings(), language.get_output_embeddings()):
            table.weight.data[rows:] = 0
    if language.config.tie_word_embeddings:
        copy = language.get_input_embeddings().weight.detach().clone()
        language.get_output_embeddings().weight = torch.nn.Parameter(copy)

def convert(blip2, llama, minigpt4, out):
    """Turn the three sources into a folder that `model.load_model` opens.

    SystemExit with one sentence if something does not fit; the folder is written when all of it does.
    """
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise SystemExit(f"out={out!r} exists already and is not empty: name a new folder.")
    weight, bias = read_projection(minigpt4)
    sources = dict(blip2=blip2, llama=llama, minigpt4=minigpt4)
    blip2_config, llama_config = read_configs(blip2, llama)
    check_sizes(sources, weight, blip2_config, llama_config)

    language = load_llama(llama)
    net = load_blip2(blip2, blip2_config, language.dtype)
    n_queries = blip2_config.num_query_tokens
    processor, end = save_processor(blip2, llama, n_queries, out)
    fit_embeddings(language, len(processor.tokenizer))

    wide, narrow = weight.shape
    net.language_model = language
    net.language_projection = torch.nn.Linear(narrow, wide, dtype=language.dtype)
    net.language_projection.load_state_dict(dict(weight=weight, bias=bias))
    language.config.tie_word_embeddings = False
    language.config.eos_token_id = end
    net.config.text_config = language.config
    net.config.image_token_index = processor.image_token_id
    net.config.dtype = language.dtype
    net.save_pretrained(out)
    processor.save_pretrained(out)
    count = sum(p.numel() for p in net.parameters())
    sign = processor.tokenizer.convert_ids_to_tokens(end)
    print(f"  {out}: {count:,} parameters, {language.dtype}, {n_queries} tokens per picture, a turn ends in "
          f"{sign!r}")

def main(argv):
    """Convert what the flags name; all four are needed."""
    cfg = configure(__file__, argv, files=False, quiet=True)
    for key, value in vars(cfg).items():
        if not value:
            raise SystemExit(f"--{key} is missing: python -m extras.minigpt4 --blip2=FOLDER --llama=FOLDER "
                             "--minigpt4=FILE.pth --out=FOLDER.")
    convert(**vars(cfg))


if __name__ == "__main__":
    main(sys.argv[1:])
