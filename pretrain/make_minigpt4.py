"""
A tiny MiniGPT-4 with random weights: BLIP-2's parts, a projection and a LLaMA, 1.9 M parameters.

    python -m pretrain.make_minigpt4 out/minigpt4    # the three sources in out/minigpt4-parts, and the model
    python train.py pretrain/config_minigpt4.py      # it learns to read, see there

The sources are what a user downloads: a BLIP-2 folder, a LLaMA folder, the file with the projection.
extras/minigpt4.py puts them together by its own command line, as it does the published ones.
"""
import inspect, os, subprocess, sys

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from pretrain.questions import corpus
from pretrain.tiny_nets import (
    llama_settings,
    read_numbers,
    rescale_weights,
    train_tokenizer,
    vision_settings,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# the words of MiniGPT-4's prompt, which no question has
PROMPT = "###Human: <Img></Img> ###Assistant: "
N_TEXTS = 20_000

# the pictures, and the tower of bases/tiny-vlm
IMAGE_SIZE = 80
VISION = dict(hidden=96, layers=3, image_size=IMAGE_SIZE, patch=16)

def qformer_settings(hidden, layers):
    """Return the settings of the Q-Former: every layer looks at the picture."""
    return Blip2QFormerConfig(
        vocab_size=8,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        encoder_hidden_size=VISION["hidden"],
        cross_attention_frequency=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )

@torch.no_grad()
def draw_tower(net):
    """Draw the weights of the vision tower's input.

    The library's standard deviation for this tower is 1e-10, so no picture would matter.
    """
    embeddings = net.vision_model.embeddings
    embeddings.patch_embedding.weight.normal_(0, 0.036)
    embeddings.position_embedding.normal_(0, 0.7)

@torch.no_grad()
def point_at_patches(net):
    """Let each query start out looking at a patch of its own, in every layer of the Q-Former.

    A query is the key of its patch's place, and is compared with the keys as it is. With queries at random
    all of them see the same average of the picture at first. What a query takes from the picture gets three
    times its usual weight, and what it takes from other queries a third: otherwise less than a hundredth of
    a feature's variance is due to the picture, and hundreds of updates pass before it is noticed.
    """
    layers = net.qformer.encoder.layer
    key = layers[0].crossattention.attention.key.weight
    places = net.vision_model.embeddings.position_embedding[0, 1:]
    count = net.query_tokens.shape[1]
    patch = torch.arange(count) % len(places)
    net.query_tokens[0] = places[patch] @ key.T
    for layer in layers:
        attention = layer.crossattention.attention
        attention.key.weight.copy_(key)
        attention.query.weight.copy_(2 * torch.eye(len(key)))
        layer.crossattention.output.dense.weight.mul_(3)
        layer.attention.output.dense.weight.div_(3)

def blip2_net(queries, qformer):
    """Build a BLIP-2 with random weights; its language model is a stub that the converter leaves out."""
    stub = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=0,
        num_attention_heads=1,
    )
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**vision_settings(**VISION)),
        qformer_config=qformer,
        text_config=stub,
        num_query_tokens=queries,
    )
    net = rescale_weights(Blip2ForConditionalGeneration(config))
    draw_tower(net)
    point_at_patches(net)
    return net.eval()

def save_llama(folder, hidden, layers):
    """Write a LLaMA with random weights, and a tokenizer that knows the words of MiniGPT-4's prompt."""
    texts = [PROMPT + text for text in corpus(N_TEXTS)]
    tokenizer = train_tokenizer(texts, 768, ["<|pad|>", "<|end|>"])
    config = LlamaConfig(**llama_settings(len(tokenizer), hidden, layers))
    rescale_weights(LlamaForCausalLM(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

def save_parts(folder, hidden=128, layers=4, qformer_hidden=128, qformer_layers=2, queries=25):
    """Write BLIP-2, LLaMA and the projection with random weights -> their three paths."""
    blip2 = os.path.join(folder, "blip2")
    llama = os.path.join(folder, "llama")
    projection = os.path.join(folder, "projection.pth")

    blip2_net(queries, qformer_settings(qformer_hidden, qformer_layers)).save_pretrained(blip2)
    BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(blip2)
    save_llama(llama, hidden, layers)
    weight = torch.randn(hidden, qformer_hidden) * qformer_hidden**-0.5
    tensors = {"llama_proj.weight": weight, "llama_proj.bias": torch.zeros(hidden)}
    torch.save({"model": tensors}, projection)
    return blip2, llama, projection


USAGE = (
    "Name a new folder and, if you like, sizes: python -m pretrain.make_minigpt4 FOLDER "
    "[--hidden=128 --layers=4 --qformer_hidden=128 --qformer_layers=2 --queries=25]."
)

def main(argv):
    """Write the parts beside the folder and let the converter make the model: main(["out/minigpt4"])."""
    if not argv or argv[0].startswith("-"):
        raise SystemExit(USAGE)
    folder = argv[0]
    known = set(inspect.signature(save_parts).parameters) - {"folder"}
    sizes = read_numbers(argv[1:], known, USAGE)
    parts = f"{folder.rstrip('/')}-parts"
    for path in (folder, parts):
        if os.path.exists(path):
            raise SystemExit(f"{path!r} exists already: name a new folder.")
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    blip2, llama, projection = save_parts(os.path.abspath(parts), **sizes)
    command = [sys.executable, "-m", "extras.minigpt4"]
    command += [f"--blip2={blip2}", f"--llama={llama}", f"--minigpt4={projection}"]
    command += [f"--out={os.path.abspath(folder)}"]
    sys.exit(subprocess.run(command, cwd=ROOT).returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
