"""
Open a model folder or hub id, say in one sentence what is wrong with it, find its special tokens.

model.load_model is the door. A folder may bring Python files of its own, which run only with the user's
permission:

    python train.py config/numberline.py --model=FOLDER --trust_remote_code=True

Such code can lack a piece that the library's models have. `check_pieces` finds that when the folder is
opened, `rehearse` when the model has its adapters and before it trains. Without the permission no file of the
folder is executed: no Python, and no pickle, which can run code while it is read.
"""
import copy, json, os, re, subprocess, sys

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# The auto classes under which authors name their own model class, the best match first: xGen-MM uses one
# that is gone from the library, Moondream one for language models.
AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM", "AutoModel")

# What the library says, and what it means.
KNOWN_FAILURES = {
    "ignore_mismatched_sizes": "its weights have other shapes than its config.json says",
    "no file named model.safetensors": "it has no model.safetensors; a pickle such as pytorch_model.bin can "
                                       "run code, so it is read with trust_remote_code=True only",
}

# What lies beside a vision tower that extras/compose.py joins with a language model.
PROJECTOR_FILE = "projector.safetensors"
# Folders that a command makes, because they hold what a package brings.
MADE_BY = {
    "out/smollm2": "python -m extras.compose --lm=smollm2 --tower=bases/smollm2 --out=out/smollm2",
}

def find_folder(path):
    """Return the folder that a model's name means; a hub id is returned as it is.

    The shipped bases are found from any working directory, with or without bases/ before their name.
    """
    for folder in (path, os.path.join(ROOT, path), os.path.join(ROOT, "bases", path)):
        if os.path.isdir(folder):
            return folder
    return path

def open_folder(path, dtype=torch.float32, trust_remote_code=False):
    """Open any image-text-to-text model in a folder or on the hub -> (net, processor).

    SystemExit with one sentence if it cannot be opened, or does not hold a model that can act here.
    """
    check_is_model(path)
    try:
        return open_parts(path, dtype, trust_remote_code)
    # The library has many errors for a damaged folder, and ImportError for a missing torchvision.
    except Exception as error:
        check_permission(path, error)
        raise SystemExit(f"model={path!r} does not load: {first_sentence(error)}.")

def open_parts(path, dtype, trust_remote_code):
    """Open config, processor and net, and check that they fit each other -> (net, processor)."""
    config = open_config(path, trust_remote_code)
    custom_class = find_custom_class(config)
    check_kind(config, custom_class, path)
    check_decoder_only(config, path)
    options = dict(dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True)
    if not trust_remote_code:
        options["use_safetensors"] = True
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
        if custom_class:
            config.auto_map["AutoModelForImageTextToText"] = custom_class
            options["config"] = config
        net, report = AutoModelForImageTextToText.from_pretrained(path, **options)
    except Exception as error:
        check_permission(path, error)
        raise SystemExit(describe_failure(path, error, custom_class))
    check_weights(report, path)
    if custom_class:
        check_pieces(net, path)
    check_image_token(net, processor, path)
    check_vocabulary(net, processor.tokenizer, path)
    use_chat_template(processor)
    return net, processor

def open_config(path, trust_remote_code):
    """Read config.json, as an object of the library or of the folder's own code."""
    # without a folder of that name the library would ask the hub for it
    if path in MADE_BY and not os.path.isdir(path):
        raise SystemExit(f"model={path!r} is not there yet: make it with {MADE_BY[path]}.")
    if os.path.isfile(os.path.join(path, PROJECTOR_FILE)):
        raise SystemExit(f"model={path!r} holds a vision tower and a projector, without a language model: "
                         "put them together with python -m extras.compose (docs/bases.md).")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        check_permission(path, error)
        if os.path.isfile(os.path.join(path, "config.json")):
            raise SystemExit(f"model={path!r} has a config.json that does not load: "
                             f"{first_sentence(error)}.")
        raise SystemExit(f"model={path!r} cannot be opened: there is no such folder with a config.json here, "
                         f"and the hub did not give it ({first_sentence(error)}).")

def read_trained(net, folder):
    """Read the weights that `save_pretrained` wrote for a net -> a second net.

    The class and the config are those of the net. Those in the folder are not asked, so code beside the
    weights is not run.
    """
    options = dict(config=copy.deepcopy(net.config), dtype=torch.float32, use_safetensors=True)
    try:
        trained, report = type(net).from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:
        raise SystemExit(f"{folder}/model.safetensors does not load: {first_sentence(error)}.")
    check_weights(report, folder)
    for name, param in trained.named_parameters():
        if not param.isfinite().all():
            raise SystemExit(f"{folder}/model.safetensors holds weights that are not finite, for example "
                             f"{name}: take an earlier checkpoint.")
    return trained

def use_chat_template(processor):
    """Use the template of tokenizer_config.json where the processor has none of its own."""
    if not getattr(processor, "chat_template", None):
        processor.chat_template = getattr(processor.tokenizer, "chat_template", None)

def is_in_library(config):
    """Tell whether an image-text-to-text model is registered for a config."""
    return type(config) in AutoModelForImageTextToText._model_mapping.keys()

def find_custom_class(config):
    """Return "file.Class" of the model class in the folder's own code, None for a model of the library."""
    if is_in_library(config) and type(config).__module__.startswith("transformers."):
        return None
    auto_map = getattr(config, "auto_map", None) or {}
    return next((auto_map[name] for name in AUTO_CLASSES if name in auto_map), None)


# -- diagnoses: one sentence each ---------------------------------------------------------------------------

def first_sentence(error):
    """Return the first sentence of a library's error, on one line."""
    one_line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        return f"{one_line[:200]} is missing"
    return one_line.split(". ")[0].rstrip(".")[:200]

def check_is_model(path):
    """Refuse a folder that holds adapters: the library would open the model that it names elsewhere."""
    file = os.path.join(path, "adapter_config.json")
    if os.path.isfile(file):
        raise SystemExit(f"model={path!r} holds adapters and no model: name the model that they were trained "
                         "on, or evaluate their run.")

def check_permission(path, error):
    """Refuse a folder with its own code if the library failed because it had no permission to run it.

    The library is always given True or False for trust_remote_code, so it never asks on stdin.
    """
    if re.search("trust_remote_code|custom code", str(error)):
        raise SystemExit(f"model={path!r} brings Python files of its own, which would be run on this machine "
                         "with all your rights: read them, then set trust_remote_code=True.")

def check_kind(config, custom_class, path):
    """Refuse a model that does not take images and text."""
    if not is_in_library(config) and not custom_class:
        raise SystemExit(f"model={path!r} is a {config.model_type!r} model, which takes no image and text: "
                         "choose an image-text-to-text model such as LLaVA or Qwen2-VL.")

def check_decoder_only(config, path):
    """Refuse an encoder-decoder, which cannot read prompt and reply as one sequence."""
    configs = [config, getattr(config, "text_config", None)]
    if any(getattr(part, "is_encoder_decoder", False) for part in configs):
        raise SystemExit(f"model={path!r} writes with an encoder-decoder, and here prompt and reply are one "
                         "sequence: choose a variant with a decoder only, such as blip2-opt for "
                         "blip2-flan-t5.")

def describe_failure(path, error, custom_class):
    """Describe an error of the library while it read the processor or the weights."""
    for words, sentence in KNOWN_FAILURES.items():
        if words in str(error):
            return f"model={path!r} does not load: {sentence}."
    hint = ""
    if custom_class:
        hint = " (in code of its own, perhaps written for another version of transformers)"
    return f"model={path!r} does not load: {first_sentence(error)}{hint}."

def check_weights(report, path):
    """Refuse a folder that lacks weights; the library would fill them with random numbers."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise SystemExit(f"model={path!r} lacks {len(missing)} weights, for example {missing[0]}: the folder "
                         "is incomplete.")

def check_vocabulary(net, tokenizer, path):
    """Refuse a tokenizer with tokens that the net has no embedding for."""
    rows = min(len(layer.weight) for layer in (net.get_input_embeddings(), net.get_output_embeddings()))
    last = max(tokenizer.get_vocab().values())
    if last >= rows:
        raise SystemExit(f"model={path!r} has a tokenizer of another model: token {last} is beyond the "
                         f"{rows} rows of its embedding.")

def check_pieces(net, path):
    """Refuse a model of the folder's own code that lacks a piece of the library's models."""
    piece = None
    if not hasattr(net.get_output_embeddings(), "weight"):
        piece = "get_output_embeddings() that gives the layer behind its logits: a critic reads its input"
    elif net.get_decoder() is net:
        piece = "get_decoder() that gives its language model: the adapters go there"
    elif not hasattr(net, "_update_model_kwargs_for_generation"):
        piece = "generate() of the library's GenerationMixin: rollouts use it"
    if piece:
        raise SystemExit(f"model={path!r} lacks a piece in its own code: no {piece}.")

def check_image_token(net, processor, path):
    """Refuse a processor that knows no token for an image."""
    if not hasattr(processor, "tokenizer") or find_image_token(net, processor) is None:
        raise SystemExit(f"model={path!r} has a processor without an image token, so no picture can be shown "
                         "to it: its folder needs the model's own processor files.")


# -- special tokens -----------------------------------------------------------------------------------------

def special_tokens(tokenizer):
    """Return {id: text} of the control tokens: pad, eos, ... and all that the tokenizer marks as special."""
    marked = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    return marked | named

def find_image_token(net, processor):
    """Find the id of the token that stands for an image in the text; return None if there is none.

    Families store it in the config or in the processor, under three names, as an id or as a text.
    """
    for owner in (net.config, processor):
        for name in ("image_token_id", "image_token_index", "image_token"):
            token = getattr(owner, name, None)
            text = getattr(token, "content", token)
            if isinstance(text, str):
                token = processor.tokenizer.convert_tokens_to_ids(text)
            if isinstance(token, int):
                return token
    return None

def find_end_of_turn(processor, config):
    """Find the id of the token that ends an assistant's turn; SystemExit if there is none.

    In the chat template, it is the first token behind the assistant's text that is special, or that the
    language model's config names as its end (MiniGPT-4's `##` is a plain token). Without one it is eos.
    """
    tokenizer = processor.tokenizer
    if getattr(processor, "chat_template", None):
        text = "XQX"
        chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role in ("user", "assistant")]
        try:
            rendered = processor.apply_chat_template(chat, tokenize=False)
        # A template is a program: it can fail in any way.
        except Exception as error:
            raise SystemExit(f"The model's chat template does not work: {first_sentence(error)}.")
        _, found, tail = rendered.rpartition(text)
        if not found:
            tail = ""
        # Tokenize the tail together with the text, as it is in a chat.
        text_ids = tokenizer(text, add_special_tokens=False).input_ids
        ids = tokenizer(text + tail, add_special_tokens=False).input_ids
        ends = set(special_tokens(tokenizer))
        named = getattr(config.get_text_config(), "eos_token_id", None)
        ends.update(named if isinstance(named, list) else [named])
        for token in ids[len(text_ids) :]:
            if token in ends:
                return token
    if tokenizer.eos_token_id is None:
        raise SystemExit("The tokenizer has no end-of-turn token: set its eos_token.")
    return tokenizer.eos_token_id


# -- place of the adapters ----------------------------------------------------------------------------------

# What `matching` runs: Python's regexes have no time limit of their own.
MATCH = """import json, re, sys
pattern, paths = json.load(sys.stdin)
print(json.dumps([path for path in paths if re.fullmatch(pattern, path)]))
"""
MATCH_SECONDS = 10

def matching(targets, paths, key="lora_targets", example=r"'.*\.(q|v)_proj'"):
    """Return the paths that the regex `targets` matches in full; SystemExit if it is none, or never ends.

    The regex may be a stranger's, from the config.json of a run: a process of its own can be stopped.
    """
    if targets == ".*":
        return list(paths)
    try:
        re.compile(targets)
        command = [sys.executable, "-I", "-S", "-c", MATCH]
        options = dict(input=json.dumps([targets, list(paths)]), timeout=MATCH_SECONDS)
        answer = subprocess.run(command, capture_output=True, text=True, **options)
        return json.loads(answer.stdout)
    except subprocess.TimeoutExpired:
        reason = f"it takes more than {MATCH_SECONDS} s to match"
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        reason = first_sentence(error)
    raise SystemExit(f"{key}={targets!r} is no regular expression that can be used ({reason}): write "
                     f"for instance {example}.")


# -- rehearsal ----------------------------------------------------------------------------------------------

@torch.no_grad()
def try_turn(vlm, size=80, forward=True):
    """Show the model one picture and compute the logits of one token, before anything is recorded.

    size: the side of the picture, pixels. forward=False: prepare the prompt only.
    SystemExit with one sentence if a file of its folder stands in the way: a template that drops the picture,
    a processor that cuts it into another number of pieces, weights that are no numbers.
    """
    content = [{"type": "image"}, {"type": "text", "text": "1 2"}]
    messages = [{"role": "user", "content": content}]
    reason = ""
    try:
        text = vlm.render(messages)
        prompt = vlm.encode(messages, [Image.new("RGB", (size, size))])
        image_token = find_image_token(vlm.net, vlm.processor)
        if "'type'" in text or not (prompt["input_ids"] == image_token).any():
            reason = "its chat template shows no picture"
        elif forward:
            inputs, P, _, _ = vlm.collate([prompt], [[vlm.eos]])
            logits, _ = vlm(inputs, P, 1)
            if not torch.isfinite(logits).all():
                reason = "its logits are not finite"
    except Exception as error:
        reason = first_sentence(error)
    if reason:
        raise SystemExit(f"model={vlm.name!r} cannot answer a prompt with one picture: {reason}.")

def trial_prompt(vlm, size):
    """Encode a prompt with one picture, whose side is `size` pixels, and two numbers."""
    content = [{"type": "image"}, {"type": "text", "text": "1 2"}]
    return vlm.encode([{"role": "user", "content": content}], [Image.new("RGB", (size, size))])

@torch.no_grad()
def rehearse(vlm):
    """Check that the probabilities of a short rollout are those of the training path.

    A forward() that forgets the KV cache would train another policy than it plays, without an error.
    SystemExit with one sentence if they differ, or if the model cannot play at all.
    """
    was_training = vlm.training
    vlm.eval()
    try:
        rollout_logps, training_logps = play_and_replay(vlm)
    except Exception as error:
        raise SystemExit(f"model={vlm.name!r} does not play a turn with its own code: "
                         f"{first_sentence(error)}.")
    vlm.train(was_training)
    difference = max(abs(a - b) for a, b in zip(rollout_logps, training_logps))
    tolerance = 1e-2 if vlm.net.dtype == torch.float32 else 0.3
    if difference > tolerance:
        raise SystemExit(f"model={vlm.name!r} gives other probabilities token by token than at once: its own "
                         "forward() does not use past_key_values, or its result depends on padding and "
                         "positions.")

def play_and_replay(vlm):
    """Generate four tokens greedily -> their log-probabilities in the rollout and in the training path."""
    prompt = trial_prompt(vlm, 64)
    # With the end of the turn banned, the reply is as long as it can be.
    vlm.banned[vlm.eos] = True
    (ids,), (rollout_logps,) = vlm.generate([prompt], 4, temperature=0)
    inputs, P, reply_ids, _ = vlm.collate([prompt], [ids])
    with vlm.autocast():
        logits, _ = vlm(inputs, P, len(reply_ids[0]))
    logps = logits.log_softmax(-1).gather(2, reply_ids[..., None])
    vlm.banned[vlm.eos] = False
    return rollout_logps, logps[0, :, 0].tolist()
