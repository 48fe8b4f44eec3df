"""
A tiny MiniGPT-4: the vision tower and the language model of bases/tiny-vlm, with a new Q-Former between them.

    python -m pretrain.make_minigpt4 out/minigpt4    # the three sources in out/minigpt4-parts, and the model
    python train.py pretrain/config_tiny.py --model=out/minigpt4 --out_dir=out/minigpt4_tiny \
        --dtype=float32 --batch_size=32 --warmup_updates=20 --offline_updates=600 --data_episodes=20000
    python train.py config/numberline.py --model=out/minigpt4_tiny/model --out_dir=out/minigpt4_numberline

The sources are what a user downloads: a BLIP-2 folder, a LLaMA folder, the file with the projection.
extras/minigpt4.py puts them together by its own command line, as it does the published ones. As there, all
parts have been trained before. Tower and language model are tiny-vlm's. The Q-Former and the projection learn
here what tiny-vlm's own projector makes of a picture. The second command then teaches the whole to read.
"""
import os, subprocess, sys

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from model import load_model
from pretrain.questions import Reading
from pretrain.tiny_nets import rescale_weights

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BASE = os.path.join(ROOT, "bases", "tiny-vlm")
# The words of MiniGPT-4's prompt, and what tiny-vlm has in their place: its prompt is the picture, the
# question, a line that begins with ">", the answer, <|end|>.
WORDS = {"###": "<|end|>", "Human: ": "\n", "<Img>": "\n", "</Img>": "\n", "Assistant: ": ">"}
# the Q-Former, and its lessons
HIDDEN = 128
N_PICTURES = 3000
UPDATES = 400
BATCH_SIZE = 64
LR = 3e-3
WARMUP = 50

def draw_pictures(processor, count):
    """Draw pictures of the card games' questions -> pixels (count, 3, H, W), as the tower reads them."""
    questions = Reading()
    questions.rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        questions.start()
        pictures.append(questions.picture())
    return processor.image_processor(pictures, return_tensors="pt")["pixel_values"]


# ---- the vision tower ----

def tower_settings(clip):
    """Return the settings of the BLIP-2 tower that has the layers of a CLIP tower."""
    same = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "hidden_act",
        "layer_norm_eps",
    )
    return {name: getattr(clip, name) for name in same}

def fold_first_norm(clip, pixels):
    """Fold CLIP's normalisation before the first layer into its embeddings -> BLIP-2's tensors.

    It divides each token by its standard deviation, which differs a little from picture to picture. The mean
    over these pictures (N, 3, H, W) stands for it: one for each place, one for the patches' content.
    """
    norm = clip.pre_layrnorm
    tokens = clip.embeddings(pixels)
    scale = (tokens.var(-1, unbiased=False) + norm.eps).rsqrt().mean(0)
    patch = clip.embeddings.patch_embedding.weight
    patch = patch - patch.mean(0)
    places = clip.embeddings.position_embedding.weight
    places = places - places.mean(-1, keepdim=True)
    first = clip.embeddings.class_embedding
    first = first - first.mean()
    return {
        "patch_embedding.weight": patch * norm.weight[:, None, None, None] * scale[1:].mean(),
        "patch_embedding.bias": torch.zeros(len(patch)),
        "position_embedding": (places * norm.weight * scale[:, None] + norm.bias)[None],
        "class_embedding": (first * norm.weight * scale[0])[None, None],
    }

def rename_layer(tensors):
    """Give the tensors of a CLIP layer the names that BLIP-2 has for them."""
    tensors = dict(tensors)
    for kind in ("weight", "bias"):
        parts = []
        for letter in "qkv":
            parts.append(tensors.pop(f"self_attn.{letter}_proj.{kind}"))
        tensors[f"self_attn.qkv.{kind}"] = torch.cat(parts)
        tensors[f"self_attn.projection.{kind}"] = tensors.pop(f"self_attn.out_proj.{kind}")
    return tensors

@torch.no_grad()
def copy_tower(clip, tower, pixels):
    """Copy a CLIP tower to a BLIP-2 tower, in place.

    All is the same but for the first normalisation. BLIP-2 normalises at the end, and CLIP's patches are read
    without it, so that one starts out plain. pixels (N, 3, H, W): pictures of the kind that it will see.
    """
    tower.embeddings.load_state_dict(fold_first_norm(clip, pixels))
    for old, new in zip(clip.encoder.layers, tower.encoder.layers):
        new.load_state_dict(rename_layer(old.state_dict()))
    tower.post_layernorm.reset_parameters()


# ---- the Q-Former ----

def qformer_settings(width):
    """Return the settings of a Q-Former of one layer, which looks at patches of this width."""
    return Blip2QFormerConfig(
        vocab_size=8,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HIDDEN // 32,
        encoder_hidden_size=width,
        cross_attention_frequency=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )

def build_blip2(net, queries):
    """Build a BLIP-2 with a LLaVA's tower settings, and random weights.

    Its language model is a stub that the converter leaves out.
    """
    clip = net.config.vision_config
    stub = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=0,
        num_attention_heads=1,
    )
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**tower_settings(clip)),
        qformer_config=qformer_settings(clip.hidden_size),
        text_config=stub,
        num_query_tokens=queries,
    )
    blip2 = Blip2ForConditionalGeneration(config)
    rescale_weights(blip2.qformer)
    blip2.query_tokens.data.normal_()
    return blip2.eval()

@torch.no_grad()
def llava_features(net, pixels):
    """Compute what a LLaVA's language model reads of pictures (N, 3, H, W) -> (N, patches, width)."""
    found = []
    for part in pixels.split(500):
        states = net.model.vision_tower(part, output_hidden_states=True).hidden_states
        # the class token is not read
        found.append(net.model.multi_modal_projector(states[-1][:, 1:]))
    return torch.cat(found)

def project(blip2, projection, pixels):
    """Compute what MiniGPT-4's language model reads of pictures -> (N, queries, width)."""
    with torch.no_grad():
        patches = blip2.vision_model(pixels).last_hidden_state
    queries = blip2.query_tokens.expand(len(pixels), -1, -1)
    found = blip2.qformer(query_embeds=queries, encoder_hidden_states=patches)
    return projection(found.last_hidden_state)

def teach_qformer(blip2, projection, pixels, features):
    """Teach Q-Former and projection to give these features (N, queries, width) of these pictures.

    It takes a minute, because no language model takes part. Features are learned at mean 0 and variance 1;
    the projection restores their size.
    """
    mean = features.mean((0, 1))
    scale = features.std()
    wanted = (features - mean) / scale
    params = [blip2.query_tokens, *blip2.qformer.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0)
    for step in range(UPDATES):
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / WARMUP, 1 - step / UPDATES)
        batch = torch.randint(len(pixels), (BATCH_SIZE,))
        loss = F.mse_loss(project(blip2, projection, pixels[batch]), wanted[batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"  Q-Former, update {step + 1}: {loss:.3f} of the variance is left", flush=True)
    with torch.no_grad():
        projection.weight.mul_(scale)
        projection.bias.mul_(scale).add_(mean)


# ---- the sources ----

@torch.no_grad()
def save_llama(folder, net, tokenizer):
    """Write the language model of a LLaVA, whose tokenizer gets the words of MiniGPT-4's prompt.

    A word starts out with the embedding of what was in its place.
    """
    language = LlamaForCausalLM(net.config.text_config)
    language.model.load_state_dict(net.model.language_model.state_dict())
    language.tie_weights()
    sources = [tokenizer.encode(source)[-1] for source in WORDS.values()]
    tokenizer.add_tokens(list(WORDS))
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = language.get_input_embeddings().weight
    for word, source in zip(WORDS, sources):
        table[tokenizer.convert_tokens_to_ids(word)] = table[source]
    # of two tokens with one embedding, none could become likely
    table[tokenizer.eos_token_id] = 0
    language.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

def save_parts(folder):
    """Write BLIP-2, LLaMA and the projection -> their three paths."""
    paths = [os.path.join(folder, name) for name in ("blip2", "llama", "projection.pth")]
    net, processor = load_model(BASE)
    pixels = draw_pictures(processor, N_PICTURES)
    features = llava_features(net, pixels)
    _, queries, width = features.shape

    blip2 = build_blip2(net, queries)
    copy_tower(net.model.vision_tower, blip2.vision_model, pixels[:100])
    projection = torch.nn.Linear(HIDDEN, width)
    teach_qformer(blip2, projection, pixels, features)

    blip2.save_pretrained(paths[0])
    side = net.config.vision_config.image_size
    BlipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(paths[0])
    save_llama(paths[1], net, processor.tokenizer)
    tensors = {"llama_proj.weight": projection.weight.data, "llama_proj.bias": projection.bias.data}
    torch.save({"model": tensors}, paths[2])
    return paths


USAGE = "Name a new folder: python -m pretrain.make_minigpt4 FOLDER."

def main(argv):
    """Write the parts beside the folder and let the converter make the model: main(["out/minigpt4"])."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise SystemExit(USAGE)
    folder = argv[0]
    parts = f"{folder.rstrip('/')}-parts"
    for path in (folder, parts):
        if os.path.exists(path):
            raise SystemExit(f"{path!r} exists already: name a new folder.")
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    blip2, llama, projection = save_parts(os.path.abspath(parts))
    command = [sys.executable, "-m", "extras.minigpt4"]
    command += [f"--blip2={blip2}", f"--llama={llama}", f"--minigpt4={projection}"]
    command += [f"--out={os.path.abspath(folder)}"]
    sys.exit(subprocess.run(command, cwd=ROOT).returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
