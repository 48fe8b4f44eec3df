"""
Compute what an update of a published model takes, without its weights.

    python bench.py sizes --micro_batch=1

Configs are written here by hand. Tensors are fake: they have shapes and no memory.

Counted are parameters, adapters, the tied Q head and its target, gradients and moments, and the activations:
what autograd stores of the language model's forward pass under bfloat16 autocast. Not counted are the vision
tower's forward pass (it is frozen, so nothing is stored), logits and Q values of a few states (MAX_LOGITS in
agent_rl.py), and the CUDA context (about 0.5 GiB).
"""
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from model import QHead, add_lora

GIB = 2**30
# tokens of prompt and reply beside the picture
TEXT_TOKENS = 100


# ---- published models ----

class Published(NamedTuple):
    """A published model: its config, and what is known of its size."""

    model_type: str
    language: dict
    rest: dict
    millions: float  # of parameters
    picture_tokens: int  # of a picture of 336 x 336

def language_config(hidden, inner, layers, heads, kv_heads, vocab, tied=False, **more):
    """Return the settings of a language model."""
    return dict(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        **more,
    )


SIGLIP_BASE = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    patch_size=16,
    image_size=512,
)
SIGLIP_SO400M = dict(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    patch_size=14,
)
CLIP_LARGE = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=14,
    image_size=336,
    projection_dim=768,
)
# Qwen2.5-VL's tower, with attention inside windows
WINDOWS = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    patch_size=14,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)

PUBLISHED = {
    "SmolVLM-256M": Published(
        "idefics3",
        language_config(576, 1536, 30, 9, 3, 49280, model_type="llama"),
        dict(vision_config=SIGLIP_BASE, scale_factor=4),
        millions=256.5,
        picture_tokens=17 * 64,
    ),
    "SmolVLM-500M": Published(
        "idefics3",
        language_config(960, 2560, 32, 15, 5, 49280, model_type="llama"),
        dict(vision_config=SIGLIP_BASE, scale_factor=4),
        millions=507.5,
        picture_tokens=17 * 64,
    ),
    "SmolVLM-2.2B": Published(
        "idefics3",
        language_config(2048, 8192, 24, 32, 32, 49155, model_type="llama"),
        dict(vision_config=SIGLIP_SO400M | dict(image_size=384), scale_factor=3),
        millions=2246.3,
        picture_tokens=17 * 81,
    ),
    "Qwen2-VL-2B": Published(
        "qwen2_vl",
        language_config(1536, 8960, 28, 12, 2, 151936, tied=True),
        dict(vision_config=dict(hidden_size=1536)),
        millions=2209.0,
        picture_tokens=144,
    ),
    "Qwen2.5-VL-3B": Published(
        "qwen2_5_vl",
        language_config(2048, 11008, 36, 16, 2, 151936, tied=True),
        dict(vision_config=WINDOWS | dict(out_hidden_size=2048)),
        millions=3754.6,
        picture_tokens=144,
    ),
    "Qwen2.5-VL-7B": Published(
        "qwen2_5_vl",
        language_config(3584, 18944, 28, 28, 4, 152064),
        dict(vision_config=WINDOWS | dict(out_hidden_size=3584)),
        millions=8292.2,
        picture_tokens=144,
    ),
    "LLaVA-1.5-7B": Published(
        "llava",
        language_config(4096, 11008, 32, 32, 32, 32064, model_type="llama"),
        dict(vision_config=CLIP_LARGE),
        millions=7063.4,
        picture_tokens=576,
    ),
    "LLaVA-1.5-13B": Published(
        "llava",
        language_config(5120, 13824, 40, 40, 40, 32064, model_type="llama"),
        dict(vision_config=CLIP_LARGE),
        millions=13350.8,
        picture_tokens=576,
    ),
    "Gemma-3-4B": Published(
        "gemma3",
        language_config(2560, 10240, 34, 8, 4, 262208, tied=True, head_dim=256),
        dict(vision_config=SIGLIP_SO400M | dict(image_size=896, vision_use_head=False)),
        millions=4300.1,
        picture_tokens=256,
    ),
    "InternVL3-8B": Published(
        "internvl",
        language_config(3584, 18944, 28, 28, 4, 151674, model_type="qwen2"),
        dict(vision_config=dict(use_qk_norm=False)),
        millions=7944.4,
        picture_tokens=256,
    ),
}

def count_millions(net):
    """Count the parameters of a net, in millions."""
    return sum(p.numel() for p in net.parameters()) / 1e6

def published_net(name):
    """Build a published model's net, as fake as the mode around it.

    SystemExit if its number of parameters differs from the published one by more than 2 %.
    """
    known = PUBLISHED[name]
    config = AutoConfig.for_model(
        known.model_type,
        text_config=known.language,
        tie_word_embeddings=known.language["tie_word_embeddings"],
        **known.rest,
    )
    with no_init_weights():
        net = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    net.tie_weights()
    millions = count_millions(net)
    if abs(millions / known.millions - 1) > 0.02:
        raise SystemExit(f"{name}: {millions:,.1f} million parameters, published are {known.millions:,.1f}: "
                         "its config here is wrong.")
    return net


# ---- what an update takes ----

def saved_bytes(net, B, T, half=True):
    """Count the bytes that autograd stores of the language model's forward pass of (B, T) tokens.

    Each storage counts once, weights do not count. half: under bfloat16 autocast.
    """
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            # the tensor is held, so that no other one gets its address
            saved[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    embeddings = net.get_input_embeddings().weight
    x = torch.zeros(B, T, embeddings.shape[1], dtype=net.dtype)
    positions = torch.arange(T)[None].expand(B, T)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        net.get_decoder()(
            inputs_embeds=x,
            attention_mask=None,
            position_ids=positions,
            use_cache=False,
        )
    return sum(n_bytes for n_bytes, _ in saved.values())

def bytes_of(params):
    """Sum the bytes of parameters; a parameter that comes twice counts once."""
    sizes = {id(p): p.numel() * p.element_size() for p in params}
    return sum(sizes.values())

def update_parts(net, r, B, T):
    """Compute what an update of B turns of T tokens takes -> {part: bytes}.

    The net gets LoRA adapters of rank r here. checkpointed: the activations with grad_checkpointing, which
    stores the input of each layer and computes one layer at a time again.
    """
    net.requires_grad_(False)
    parts = dict(weights=bytes_of(net.parameters()))
    adapters = []
    for layer in add_lora(net, r, 2 * r, ".*").values():
        adapters += [layer.lora_A, layer.lora_B]
    unembedding = net.get_output_embeddings().weight
    vocab, hidden = unembedding.shape
    head = bytes_of(QHead(hidden, vocab, "tied", 0.0, unembedding).parameters())
    trained = bytes_of(adapters) + head

    parts["adapters"] = bytes_of(adapters)
    # the head and its target
    parts["head"] = 2 * head
    parts["gradients"] = trained
    # AdamW's two moments
    parts["optimizer"] = 2 * trained
    parts["activations"] = saved_bytes(net, B, T)
    lists = [m for m in net.get_decoder().modules() if isinstance(m, torch.nn.ModuleList)]
    n_layers = max(map(len, lists))
    inputs = n_layers * B * T * hidden * unembedding.element_size()
    parts["checkpointed"] = inputs + parts["activations"] // n_layers
    return parts

def print_sizes(cfg):
    """Print the table of docs/models.md."""
    if not cfg.lora_r:
        raise SystemExit("lora_r=0 trains all weights, and `bench.py sizes` computes adapters: leave lora_r "
                         "out.")
    B = cfg.window * cfg.micro_batch
    print(f"computed, not measured; GiB; lora_r={cfg.lora_r}, {B} turns at once ({cfg.micro_batch} x "
          f"{cfg.window}), one picture of 336 x 336 and {TEXT_TOKENS} other tokens each\n")
    print("| model | parameters | tokens a turn | weights, bfloat16 | adapters | Q head and target | "
          "gradients | AdamW | activations / checkpointed | peak / checkpointed |")
    print("|" + "---|" * 10)
    for name, known in PUBLISHED.items():
        T = known.picture_tokens + TEXT_TOKENS
        with FakeTensorMode():
            net = published_net(name)
            millions = count_millions(net)
            parts = update_parts(net, cfg.lora_r, B, T)
        fixed = [parts[part] for part in ("weights", "adapters", "head", "gradients", "optimizer")]
        activations = parts["activations"]
        checkpointed = parts["checkpointed"]
        peak = sum(fixed) + activations
        low_peak = sum(fixed) + checkpointed
        cells = [
            name,
            f"{millions:,.0f} M",
            f"{T:,}",
            *(f"{size / GIB:.2f}" for size in fixed),
            f"{activations / GIB:.1f} / {checkpointed / GIB:.1f}",
            f"{peak / GIB:.1f} / {low_peak / GIB:.1f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
