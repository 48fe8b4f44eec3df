"""
Models that bring Python files of their own: the permission they need, and what they must offer, checked before they train. model.py calls this.

    python train.py config/numberline.py --model=FOLDER --trust_remote_code=True
"""
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor


def first_sentence(error):
    """The first sentence of a library's error, on one line."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")[:200]


def permission(path, error):
    """SystemExit if it was a permission not given that stopped the library. It is told True or False and so never asks on stdin."""
    if "trust_remote_code" in str(error):
        raise SystemExit(f"model={path!r} brings Python files of its own, which would be run on this machine with all your rights: read them, then set trust_remote_code=True.")


def pieces(net, path):
    """SystemExit names the first piece that the library's own models have and this one lacks."""
    for lacks, piece in ((not hasattr(net.get_output_embeddings(), "weight"), "get_output_embeddings() that gives the layer behind its logits: a critic reads what goes in there"),
                         (net.get_decoder() is net, "get_decoder() that gives its language model: the adapters go there"),
                         (not hasattr(net, "_update_model_kwargs_for_generation"), "generate() of the library's GenerationMixin: it rolls out")):
        if lacks:
            raise SystemExit(f"model={path!r} lacks a piece in its own code: no {piece}.")


def open_folder(path, dtype=torch.float32, trust_remote_code=False):
    """Open a folder or hub id of any image-text-to-text model -> (net, processor), or SystemExit with one sentence that says why not."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as e:
        permission(path, e)
        raise SystemExit(f"model={path!r} cannot be opened: no such folder with a config.json here, and the hub did not give it ({first_sentence(e)}).")
    known = type(config) in AutoModelForImageTextToText._model_mapping.keys()
    own = {} if known and type(config).__module__.startswith("transformers.") else getattr(config, "auto_map", None) or {}
    # a model that brings its code names it by one auto class or another (xGen-MM by one that is gone, Moondream as a language model): {ours: file.class}
    own = {"AutoModelForImageTextToText": own[k] for k in ("AutoModel", "AutoModelForCausalLM", "AutoModelForVision2Seq", "AutoModelForImageTextToText") if k in own}
    if not known and not own:
        raise SystemExit(f"model={path!r} is a {config.model_type!r} model, which takes no image and text: choose an image-text-to-text model such as LLaVA or Qwen2-VL.")
    if any(getattr(c, "is_encoder_decoder", False) for c in (config, getattr(config, "text_config", None))):
        raise SystemExit(f"model={path!r} writes with an encoder-decoder, and here prompt and reply are one sequence: choose its sister with a decoder only, such as blip2-opt for blip2-flan-t5.")
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
        if own:
            config.auto_map |= own
        net, report = AutoModelForImageTextToText.from_pretrained(path, **dict(config=config) if own else {}, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True)
    except Exception as e:  # a library has many words for a torn folder, and ImportError for a processor that needs torchvision
        permission(path, e)
        raise SystemExit(f"model={path!r} does not load: {first_sentence(e)}" + (" (in code of its own, perhaps written for another version of transformers)." if own else "."))
    if report["missing_keys"]:
        raise SystemExit(f"model={path!r} lacks {len(report['missing_keys'])} weights, {sorted(report['missing_keys'])[0]} for one: the folder is incomplete.")
    if own:
        pieces(net, path)
    return net, processor


@torch.no_grad()
def rehearse(vlm):
    """A short rollout and its replay on the training path must agree: a forward() that forgets the KV cache would train another policy than it plays, in silence. SystemExit with one sentence if they do not."""
    was_training = vlm.training
    vlm.eval()
    try:
        prompt = vlm.encode([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "1 2"}]}], [Image.new("RGB", (64, 64))])
        vlm.banned[vlm.eos] = True   # four tokens, whatever it would like to say
        (ids,), (kept,) = vlm.generate([prompt], 4, temperature=0)
        inputs, P, reply_ids, _ = vlm.collate([prompt], [ids])
        replay = vlm(inputs, P, len(reply_ids[0]))[0].log_softmax(-1).gather(2, reply_ids[..., None])[0, :, 0].tolist()
        vlm.banned[vlm.eos] = False
    except Exception as e:
        raise SystemExit(f"model={vlm.name!r} does not play a turn with its own code: {first_sentence(e)}.")
    vlm.train(was_training)
    if max(abs(a - b) for a, b in zip(replay, kept)) > (1e-2 if vlm.net.dtype == torch.float32 else 0.3):
        raise SystemExit(f"model={vlm.name!r} gives other probabilities token by token than at once: its own forward() does not use past_key_values, or pads and positions matter to it.")
