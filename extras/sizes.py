"""
What an update of a published model takes, computed without its weights: its config by hand, its tensors fake (they have shapes and no memory). `python bench.py sizes`.

Parameters, adapters, the tied Q head and its target, gradients and moments are counted; activations are what autograd keeps of the language model's forward pass under bfloat16 autocast,
counted too. Not in it: the vision tower's own forward pass (frozen, nothing of it is kept), logits and Qs of a few states (LOGITS in agent_rl.py), the CUDA context (about 0.5 GiB).
"""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from model import QHead, add_lora

GIB, WORDS = 2 ** 30, 100                                     # prompt and reply beside the picture, tokens
SIGLIP = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14)
BASE = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16, image_size=512)
CLIP = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=336, projection_dim=768, model_type="clip_vision_model")
WINDOWS = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, window_size=112, fullatt_block_indexes=[7, 15, 23, 31])

def text(hidden, inner, layers, heads, kv, vocab, tied=False, **more):
    return dict(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocab, tie_word_embeddings=tied, **more)

# name: (model type, the language model, the rest, published parameters in millions, tokens that it makes of a picture of 336 x 336)
PUBLISHED = {
    "SmolVLM-256M": ("idefics3", text(576, 1536, 30, 9, 3, 49280, model_type="llama"), dict(vision_config=BASE, scale_factor=4), 256.5, 17 * 64),
    "SmolVLM-500M": ("idefics3", text(960, 2560, 32, 15, 5, 49280, model_type="llama"), dict(vision_config=BASE, scale_factor=4), 507.5, 17 * 64),
    "SmolVLM-2.2B": ("idefics3", text(2048, 8192, 24, 32, 32, 49155, model_type="llama"), dict(vision_config=dict(SIGLIP, image_size=384), scale_factor=3), 2246.3, 17 * 81),
    "Qwen2-VL-2B": ("qwen2_vl", text(1536, 8960, 28, 12, 2, 151936, True), dict(vision_config=dict(hidden_size=1536)), 2209.0, 144),
    "Qwen2.5-VL-3B": ("qwen2_5_vl", text(2048, 11008, 36, 16, 2, 151936, True), dict(vision_config=dict(WINDOWS, out_hidden_size=2048)), 3754.6, 144),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", text(3584, 18944, 28, 28, 4, 152064), dict(vision_config=dict(WINDOWS, out_hidden_size=3584)), 8292.2, 144),
    "LLaVA-1.5-7B": ("llava", text(4096, 11008, 32, 32, 32, 32064, model_type="llama"), dict(vision_config=CLIP), 7063.4, 576),
    "LLaVA-1.5-13B": ("llava", text(5120, 13824, 40, 40, 40, 32064, model_type="llama"), dict(vision_config=CLIP), 13350.8, 576),
    "Gemma-3-4B": ("gemma3", text(2560, 10240, 34, 8, 4, 262208, True, head_dim=256), dict(vision_config=dict(SIGLIP, image_size=896, vision_use_head=False)), 4300.1, 256),
    "InternVL3-8B": ("internvl", text(3584, 18944, 28, 28, 4, 151674, model_type="qwen2"), dict(vision_config=dict(use_qk_norm=False)), 7944.4, 256),
}


def published(name):
    """The model's net, as fake as the mode around it; SystemExit if it does not have the published number of parameters, to 2 %."""
    kind, language, rest, millions, _ = PUBLISHED[name]
    with no_init_weights():
        net = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, text_config=language, tie_word_embeddings=language["tie_word_embeddings"], **rest), dtype=torch.bfloat16)
    net.tie_weights()
    count = sum(p.numel() for p in net.parameters()) / 1e6
    if abs(count / millions - 1) > 0.02:
        raise SystemExit(f"{name}: {count:,.1f} million parameters, published are {millions:,.1f}: its config here is wrong.")
    return net


def saved_bytes(net, B, T, half=True):
    """Bytes that autograd keeps of the language model's forward pass of (B, T) tokens, each storage once, weights not counted."""
    decoder, seen = net.get_decoder(), {}
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    def keep(t):
        if t.untyped_storage()._cdata not in own:
            seen[t.untyped_storage()._cdata] = (t.untyped_storage().nbytes(), t)               # held, so that no other takes its place
        return t
    x = torch.zeros(B, T, net.get_input_embeddings().weight.shape[1], dtype=net.dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = decoder(inputs_embeds=x, attention_mask=None, position_ids=torch.arange(T)[None].expand(B, T), use_cache=False)
    del out
    return sum(n for n, _ in seen.values())


def parts(net, r, B, T):
    """{part: bytes} of a net that nobody has touched yet: it gets adapters here."""
    net.requires_grad_(False)
    size = lambda params: sum({id(p): p.numel() * p.element_size() for p in params}.values())
    out = dict(weights=size(net.parameters()))
    adapters = [p for m in add_lora(net, r, 2 * r, 0.0, ".*").values() for p in (m.lora_A, m.lora_B)]
    unembed = net.get_output_embeddings().weight
    head = size(QHead(unembed.shape[1], unembed.shape[0], "tied", 0.0, unembed).parameters())
    load_run = size(adapters) + head
    out |= dict(adapters=size(adapters), head=2 * head, gradients=load_run, optimizer=2 * load_run, activations=saved_bytes(net, B, T))
    layers = max((m for m in net.get_decoder().modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    return out | dict(checkpointed=len(layers) * B * T * unembed.shape[1] * unembed.element_size() + out["activations"] // len(layers))


def print_sizes(cfg):
    """Prints the README's table."""
    r, B = cfg.lora_r, cfg.window * cfg.micro_batch
    print(f"computed, not measured; GiB; lora_r={r}, {B} turns at once ({cfg.micro_batch} x {cfg.window}), one picture of 336 x 336 and {WORDS} other tokens each\n")
    print("| model | parameters | tokens a turn | weights, bfloat16 | adapters | Q head and target | gradients | AdamW | activations / checkpointed | peak / checkpointed |\n|" + "---|" * 10)
    for name, (*_, tokens) in PUBLISHED.items():
        with FakeTensorMode():
            net = published(name)
            count = sum(p.numel() for p in net.parameters()) / 1e6
            p = parts(net, r, B, tokens + WORDS)
        fixed = sum(p[k] for k in ("weights", "adapters", "head", "gradients", "optimizer"))
        print(f"| {name} | {count:,.0f} M | {tokens + WORDS:,} | " + " | ".join(f"{p[k] / GIB:.2f}" for k in ("weights", "adapters", "head", "gradients", "optimizer"))
              + f" | {p['activations'] / GIB:.1f} / {p['checkpointed'] / GIB:.1f} | {(fixed + p['activations']) / GIB:.1f} / {(fixed + p['checkpointed']) / GIB:.1f} |", flush=True)
