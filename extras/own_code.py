"""
Models that bring Python files of their own: the permission they need, and what they must offer, checked before they train. model.py calls this.

    $ python train.py config/numberline.py --model=FOLDER --trust_remote_code=True
"""
import torch
from PIL import Image

from model import brief


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
        raise SystemExit(f"model={vlm.name!r} does not play a turn with its own code: {brief(e)}.")
    vlm.train(was_training)
    if max(abs(a - b) for a, b in zip(replay, kept)) > (1e-2 if vlm.net.dtype == torch.float32 else 0.3):
        raise SystemExit(f"model={vlm.name!r} gives other probabilities token by token than at once: its own forward() does not use past_key_values, or pads and positions matter to it.")
