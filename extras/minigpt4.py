"""
MiniGPT-4 as a model folder: BLIP-2's eyes and Q-Former, MiniGPT-4's projection, a LLaMA behind it.

    python -m extras.minigpt4 --blip2=blip2-flan-t5-xxl --llama=vicuna-7b --minigpt4=prerained_minigpt4_7b.pth --out=minigpt4-7b
    $ python train.py config/numberline.py --model=minigpt4-7b

The published checkpoint (Zhu et al., arXiv 2304.10592) is one linear layer, `llama_proj`; all else is BLIP-2's and Vicuna v0's own.
It was trained on the Q-Former of blip2-flan-t5-xxl: another BLIP-2 has the same sizes and speaks another language.
The folder is a plain BLIP-2 of transformers. Memory: the LLaMA once, in the dtype of its files, and 2 GB; BLIP-2's own language model is not read.
"""
import os, pickle, re, sys

import torch

from configurator import configure
from extras.model_folders import first_sentence

# --- config ---
blip2: str = None    # folder of BLIP-2, Salesforce/blip2-flan-t5-xxl for the published checkpoints; any type of weight file
llama: str = None    # folder of the LLaMA, Vicuna v0 of 7B or 13B for the published checkpoints
minigpt4: str = None # the published file, *.pth
out: str = None      # folder to write, new
# --- end of config ---

BUFFERS = r"position_ids|rotary_emb\.inv_freq|relative_position_index"  # constants that the published files carry along
# ###Human: <Img><image>...</Img> text ###Assistant: reply###Human: ...      as in its second training stage; the sign between two turns stands once
TEMPLATE = """{{ 'FRONT' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '###' if loop.first or loop.previtem['role'] != 'assistant' else '' }}{{ 'Human: ' }}\
{% for c in m['content'] %}{{ 'PICTURE' if c['type'] == 'image' else c['text'] }}{{ ' ' }}{% endfor %}\
{% if add_generation_prompt or not loop.last %}{{ '###Assistant: ' }}{% endif %}{% elif m['role'] == 'assistant' %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{{ '###' }}\
{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}"""


def tried(what, remedy, load):
    """load(), or one sentence in place of the library's many."""
    try:
        return load()
    except Exception as e:  # a torn or foreign folder has many words in the library
        raise SystemExit(f"{what} does not load: {remedy} ({first_sentence(e)}).")


def projection(file):
    """The published file -> weight and bias of `llama_proj`. Read as data only: a checkpoint that holds code is refused."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"minigpt4={file!r}: there is no such file, download the checkpoint first.")
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as e:
        raise SystemExit(f"minigpt4={file!r} does not load as plain tensors: give the published .pth file, whole ({first_sentence(e)}).")
    tensors = tensors.get("model", tensors) if isinstance(tensors, dict) else None
    tensors = tensors if isinstance(tensors, dict) else {}
    names = ("llama_proj.weight", "llama_proj.bias")
    if [getattr(tensors.get(n), "ndim", None) for n in names] != [2, 1]:
        raise SystemExit(f"minigpt4={file!r} holds no linear layer {names[0]}, {names[1]}; it begins with {[*tensors][:2]}: give MiniGPT-4's own checkpoint, not Vicuna's or BLIP-2's.")
    more = sorted(n for n in tensors if n not in names and not re.search(BUFFERS, n))
    if more:  # LoRA of MiniGPT-v2, a Q-Former trained along: left out in silence the model would be another
        raise SystemExit(f"minigpt4={file!r} holds {len(more)} tensors beside llama_proj, {more[0]} for one: only the version that trains llama_proj alone is supported, no MiniGPT-v2.")
    return [tensors[n] for n in names]


def prompt_form(tok, image):
    """(chat template, id of the token that ends a turn). Both depend on how this tokenizer cuts text."""
    ids = lambda text, **how: tok(text, **how).input_ids
    # The original puts one <s> in front and tokenises what stands before and behind the picture apart, so that `###` and `</Img>` open a word.
    # LLaMA's tokenizer of today does so behind a special token only if there is a space.
    bos, head, tail = tok.bos_token or "", "###Human: <Img>", "</Img> a ###Assistant: "
    apart = [tok.bos_token_id] * bool(bos) + ids(head, add_special_tokens=False) + [tok.convert_tokens_to_ids(image)] + ids(tail, add_special_tokens=False)
    forms = [(front, gap) for front in dict.fromkeys(("", bos, bos + " ")) for gap in ("", " ")]
    fits = [(front, gap) for front, gap in forms if ids(front + head + image + gap + tail, add_special_tokens=not front) == apart]
    if not fits:
        print("  note: this tokenizer cuts the prompt in another way than the original's did")
    front, gap = (fits + [("", "")])[0]
    # behind a reply `###` is two tokens of LLaMA's, `##` and `#`: the first one ends the turn
    end = ids("a###", add_special_tokens=False)[len(ids("a", add_special_tokens=False))]
    return TEMPLATE.replace("FRONT", front).replace("PICTURE", f"<Img>{image}{gap}</Img>"), end


def convert(blip2, llama, minigpt4, out):
    """Three sources -> a folder that `model.load_model` opens. SystemExit with one sentence for whatever does not fit."""
    from transformers import AddedToken, AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, Blip2Config, Blip2ForConditionalGeneration, LlamaConfig, LlavaProcessor
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise SystemExit(f"out={out!r} is there already and not empty: name a new folder.")
    weight, bias = projection(minigpt4)
    eyes = tried(f"blip2={blip2!r}", "give a folder with a BLIP-2 of transformers", lambda: AutoConfig.from_pretrained(blip2))
    if eyes.model_type != "blip-2":
        raise SystemExit(f"blip2={blip2!r} is a {eyes.model_type!r} model: give a BLIP-2 folder such as Salesforce/blip2-flan-t5-xxl.")
    text = tried(f"llama={llama!r}", "give a folder with a LLaMA or Vicuna of transformers", lambda: AutoConfig.from_pretrained(llama))
    if type(text) not in AutoModelForCausalLM._model_mapping.keys():
        raise SystemExit(f"llama={llama!r} is a {text.model_type!r} model, which writes no text: give a LLaMA or Vicuna folder.")
    (wide, narrow), vision, qformer = weight.shape, eyes.vision_config.hidden_size, eyes.qformer_config.hidden_size
    if narrow == 4 * vision:
        raise SystemExit(f"minigpt4={minigpt4!r} reads {narrow} = 4 x {vision} numbers, four patches of the eye side by side: it is a version without Q-Former (Llama 2, MiniGPT-v2), "
                         "which BLIP-2's network cannot hold; take the Vicuna one.")
    for have, want, name, folder in (narrow, qformer, "blip2", blip2), (wide, text.hidden_size, "llama", llama):
        if have != want:
            raise SystemExit(f"minigpt4={minigpt4!r} projects {narrow} numbers to {wide}, but {name}={folder!r} has {want} where it has {have}: take the checkpoint and the folder of one size (7B, 13B).")
    if (eyes.text_config.model_type, eyes.text_config.hidden_size) != ("t5", 4096):
        print(f"  note: this BLIP-2 was trained with a {eyes.text_config.model_type}; the published MiniGPT-4 reads the Q-Former of blip2-flan-t5-xxl and would not understand this one's")

    tok = tried(f"llama={llama!r}", "its folder must hold a tokenizer", lambda: AutoTokenizer.from_pretrained(llama))
    language, report = tried(f"llama={llama!r}", "its folder must hold the weights, whole", lambda: AutoModelForCausalLM.from_pretrained(llama, dtype="auto", output_loading_info=True))
    # the rest of BLIP-2: a language model of nothing stands in for its own, whose tensors are then left in their files
    nothing = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=0, num_attention_heads=1)
    stub = Blip2Config(vision_config=eyes.vision_config, qformer_config=eyes.qformer_config, text_config=nothing, num_query_tokens=eyes.num_query_tokens)
    net, seen = tried(f"blip2={blip2!r}", "its folder must hold the weights of BLIP-2, whole", lambda: Blip2ForConditionalGeneration.from_pretrained(
        blip2, config=stub, dtype=language.dtype, ignore_mismatched_sizes=True, output_loading_info=True))
    bad = {k[0] if isinstance(k, tuple) else k for kind in ("missing_keys", "mismatched_keys") for k in seen[kind]}
    for name, folder, lost in ("blip2", blip2, {k for k in bad if not k.startswith("language_")}), ("llama", llama, report["missing_keys"]):
        if lost:
            raise SystemExit(f"{name}={folder!r} lacks {len(lost)} weights, {min(lost)} for one: download the whole folder.")

    images = tried(f"blip2={blip2!r}", "it needs its preprocessor_config.json", lambda: AutoImageProcessor.from_pretrained(blip2))
    # BLIP-2's processor puts the picture in front of the text and forgets chat templates. LLaVA's writes as many placeholders as it counts, where the template
    # has one: patches (none: a picture is smaller than 10^6 pixels) and additional tokens (all of them).
    tok.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    tok.save_pretrained(out)
    tok = AutoTokenizer.from_pretrained(out)  # what counts is how the saved one cuts text: LLaMA's forgets its `legacy` on the way
    template, end = prompt_form(tok, "<image>")
    processor = LlavaProcessor(images, tok, patch_size=10 ** 6, num_additional_image_tokens=eyes.num_query_tokens, vision_feature_select_strategy="full", chat_template=template)

    text, rows = language.config, language.get_input_embeddings().weight.shape[0]
    if len(tok) > rows:
        language.resize_token_embeddings(len(tok), mean_resizing=False)
        for table in language.get_input_embeddings(), language.get_output_embeddings():
            table.weight.data[rows:] = 0  # the placeholder's row is never read, and never said
    if text.tie_word_embeddings:  # BLIP-2 keeps the two tables apart, as LLaMA and Vicuna do
        language.get_output_embeddings().weight = torch.nn.Parameter(language.get_input_embeddings().weight.detach().clone())
    net.language_model, net.language_projection = language, torch.nn.Linear(narrow, wide, dtype=language.dtype)
    net.language_projection.load_state_dict(dict(weight=weight, bias=bias))
    text.tie_word_embeddings, text.eos_token_id = False, end
    net.config.text_config, net.config.image_token_index, net.config.dtype = text, processor.image_token_id, language.dtype
    net.save_pretrained(out)
    processor.save_pretrained(out)
    print(f"  {out}: {sum(p.numel() for p in net.parameters()):,} parameters, {language.dtype}, {eyes.num_query_tokens} tokens a picture, a turn ends in {tok.convert_ids_to_tokens(end)!r}")


if __name__ == "__main__":
    cfg = configure(__file__, sys.argv[1:], files=False, quiet=True)
    for key, value in vars(cfg).items():
        if not value:
            raise SystemExit(f"--{key} is missing: python -m extras.minigpt4 --blip2=FOLDER --llama=FOLDER --minigpt4=FILE.pth --out=FOLDER.")
    convert(**vars(cfg))
