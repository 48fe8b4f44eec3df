"""
Tiny vision-language models with random weights: 1.3 M parameters, 25 image tokens for a picture of 80 x 80.

    python -m pretrain.tiny_nets llava out/x    # or smolvlm: writes a complete folder, like one from the hub

llava is what --model=scratch builds. pretrain/config_tiny.py pre-trains it, docs/bases.md has the commands.
"""
import inspect, os, sys

import torch

# A question after its picture, a line that begins with ">", the answer, the token END.
CHAT = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}"
    "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ '\n>' }}"
    "{% else %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{{ 'END' }}"
    "{% endif %}"
    "{% endfor %}"
)

def train_tokenizer(texts, vocab_size, special, **names):
    """Train a byte-level BPE tokenizer on texts; it can read and write every other text, too.

    A number is the same token wherever it stands, behind a space or in "[13]". Otherwise a model could copy a
    number only if it knew its two spellings by heart.
    special: the pad token, the token that ends a turn, then any others. names: more special tokens by name.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=special[0],
        eos_token=special[1],
        padding_side="left",
        **names,
    )

def llama_settings(vocab_size, hidden, layers):
    """Return the settings of the language model, a Llama; token 0 pads, token 1 ends a turn."""
    return dict(
        model_type="llama",
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )

def vision_settings(hidden, layers, image_size, patch):
    """Return the settings that both vision towers share."""
    return dict(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        image_size=image_size,
        patch_size=patch,
    )

def rescale_weights(net):
    """Draw larger random weights for a net, in place, and return it.

    The library's standard deviation of 0.02 is meant for large models. With it, a small one needs thousands
    of updates before it tells places and digits apart.
    """
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith("position_embedding.weight"):
                weight.normal_(0, 0.7)
            elif name.endswith("embed_tokens.weight"):
                weight.normal_(0, 0.1)
            elif weight.dim() == 2 and "embeddings" not in name:
                weight.normal_(0, weight.shape[1] ** -0.5)
    return net

def llava(
    texts,
    vocab_size=768,
    hidden=128,
    layers=4,
    vision_hidden=96,
    vision_layers=3,
    image_size=80,
    patch=16,
):
    """Build a CLIP vision tower, a two-layer projector and a Llama -> (net, processor)."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    special = ["<|pad|>", "<|end|>", "<image>"]
    tokenizer = train_tokenizer(
        texts,
        vocab_size,
        special,
        extra_special_tokens={"image_token": "<image>"},
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("END", "<|end|>"),
    )
    vision = CLIPVisionConfig(
        projection_dim=vision_hidden,
        **vision_settings(vision_hidden, vision_layers, image_size, patch),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**llama_settings(len(tokenizer), hidden, layers)),
        image_token_index=special.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return rescale_weights(LlavaForConditionalGeneration(config)), processor

# Channels of a FocalNet's first stage. Each further stage has twice as many.
FOCAL_CHANNELS = 32

def with_focalnet(net, processor, image_size):
    """Put a FocalNet (arXiv 2203.11926) and a projector with random weights before a LLaVA's language model.

    A picture of 160 x 160 becomes 10 x 10 tokens. It is made of convolutions, so a letter is read alike
    wherever it is. A Swin learns letters much later (docs/log.md). Returns a new net and the processor, which
    is changed.
    """
    from transformers import FocalNetConfig, LlavaConfig, LlavaForConditionalGeneration

    depths = [2, 2, 2]
    vision = FocalNetConfig(
        image_size=image_size,
        patch_size=4,
        embed_dim=FOCAL_CHANNELS,
        depths=depths,
        focal_levels=[1, 2, 3],
        focal_windows=[3, 3, 3],
        use_conv_embed=True,
        mlp_ratio=3.0,
        drop_path_rate=0.0,
        # each stage doubles the channels; a LLaVA asks for those of the last
        hidden_size=FOCAL_CHANNELS * 2 ** (len(depths) - 1),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=net.config.text_config,
        image_token_index=net.config.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    new = rescale_weights(LlavaForConditionalGeneration(config))
    new.model.language_model.load_state_dict(net.model.language_model.state_dict())
    new.tie_weights()
    processor.vision_feature_select_strategy = "full"
    processor.num_additional_image_tokens = 0
    return new, processor

def smolvlm(
    texts,
    vocab_size=768,
    hidden=128,
    layers=4,
    vision_hidden=96,
    vision_layers=3,
    image_size=80,
    patch=16,
):
    """Build a SigLIP-like vision tower, one linear layer and a Llama -> (net, processor).

    A patch is a token: there is no pixel shuffle. The processor is Idefics3's, because SmolVLM's own imports
    torchvision for videos.
    """
    from transformers import Idefics3Processor, SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    special = ["<|pad|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>"]
    tokenizer = train_tokenizer(texts, vocab_size, special)
    # A picture of this size is neither resized nor cut into tiles.
    longest_edge = {"longest_edge": image_size}
    image_processor = SmolVLMImageProcessorPil(
        size=longest_edge,
        max_image_size=longest_edge,
        do_image_splitting=False,
    )
    processor = Idefics3Processor(
        image_processor,
        tokenizer,
        image_seq_len=(image_size // patch) ** 2,
        chat_template=CHAT.replace("END", "<end_of_utterance>"),
    )
    config = SmolVLMConfig(
        vision_config=vision_settings(vision_hidden, vision_layers, image_size, patch),
        text_config=llama_settings(len(tokenizer), hidden, layers),
        scale_factor=1,
        image_token_id=special.index("<image>"),
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return rescale_weights(SmolVLMForConditionalGeneration(config)), processor


FAMILIES = {"llava": llava, "smolvlm": smolvlm}
USAGE = (
    "Name a family, a new folder and, if you like, sizes: "
    f"python -m pretrain.tiny_nets {'|'.join(FAMILIES)} FOLDER "
    "[--hidden=128 --layers=4 --vision_hidden=96 --vision_layers=3]"
)

def read_numbers(words, known, usage):
    """Read words --name=number -> {name: number}; SystemExit with `usage` for any other word."""
    numbers = {}
    for word in words:
        name, _, number = word.lstrip("-").partition("=")
        if name not in known or not number.isdigit():
            raise SystemExit(usage)
        numbers[name] = int(number)
    return numbers

def main(argv):
    """Write the folder of a model with random weights: main(["llava", "out/x", "--hidden=64"])."""
    if len(argv) < 2 or argv[0] not in FAMILIES or argv[1].startswith("-"):
        raise SystemExit(USAGE)
    build_net = FAMILIES[argv[0]]
    folder = argv[1]
    known = set(inspect.signature(build_net).parameters) - {"texts"}
    sizes = read_numbers(argv[2:], known, USAGE)
    if os.path.exists(folder):
        raise SystemExit(f"{folder!r} exists already: name a new folder.")
    import transformers

    from extras.published_names import publish_names
    from pretrain.questions import corpus

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    net, processor = build_net(corpus(20_000), **sizes)
    publish_names(net).save_pretrained(folder)
    processor.save_pretrained(folder)
    count = sum(weight.numel() for weight in net.parameters())
    print(f"{folder}: {count:,} parameters, {len(processor.tokenizer)} words")


if __name__ == "__main__":
    main(sys.argv[1:])
