"""
Tiny vision-language models with random weights, to be pre-trained here (pretrain/config_tiny.py): 1.3 M parameters, 25 image tokens for a picture of 80 x 80.

    python -m pretrain.tiny_nets smolvlm out/smolvlm        # llava (what model='scratch' is) | smolvlm: a complete folder, like one from the hub
    python train.py pretrain/config_tiny.py --env=Captions --model=out/smolvlm --out_dir=out/smolvlm_captions --offline_updates=600 --data_episodes=30000
    python train.py pretrain/config_tiny.py --model=out/smolvlm_captions/model --out_dir=out/smolvlm_tiny --offline_updates=2000 --data_episodes=40000
    python train.py config/numberline.py --model=out/smolvlm_tiny/model
"""
import inspect, os, sys

import torch

CHAT = ("{% for m in messages %}{% if m['role'] == 'user' %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ '\n>' }}"
        "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{{ 'END' }}{% endif %}{% endfor %}")


def tokenizer(texts, vocab_size, special, **names):
    """Byte-level BPE trained on `texts`: every text can be read and written. A number is the same token wherever it stands, behind a space or in "[13]": else to copy
    one is to know its two spellings by heart. special: first the pad token, then the one that ends a turn, then the others."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[1], padding_side="left", **names)


def writer(vocab, hidden, layers):
    """The language model's settings, a Llama's; its end of turn is token 1."""
    return dict(model_type="llama", vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32,
                num_key_value_heads=hidden // 32, max_position_embeddings=4096, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None)


def rescale_weights(net):
    """Larger random weights: at the library's std of 0.02, meant for large models, a small one needs thousands of updates before it tells places and digits apart."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("position_embedding.weight"):
                p.normal_(0, 0.7)
            elif name.endswith("embed_tokens.weight"):
                p.normal_(0, 0.1)
            elif p.dim() == 2 and "embeddings" not in name:
                p.normal_(0, p.shape[1] ** -0.5)
    return net


def llava(texts, vocab_size=768, hidden=128, layers=4, vision_hidden=96, vision_layers=3, image_size=80, patch=16):
    """CLIP vision tower, two-layer projector, Llama -> (net, processor)."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    tok = tokenizer(texts, vocab_size, ["<|pad|>", "<|end|>", "<image>"], extra_special_tokens={"image_token": "<image>"})
    processor = LlavaProcessor(CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}), tok,
                               patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT.replace("END", "<|end|>"))
    vision = CLIPVisionConfig(hidden_size=vision_hidden, intermediate_size=3 * vision_hidden, num_hidden_layers=vision_layers, num_attention_heads=vision_hidden // 32,
                              image_size=image_size, patch_size=patch, projection_dim=vision_hidden)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**writer(len(tok), hidden, layers)), image_token_index=2, vision_feature_layer=-1,
                         vision_feature_select_strategy="default", tie_word_embeddings=True)
    return rescale_weights(LlavaForConditionalGeneration(config)), processor


def smolvlm(texts, vocab_size=768, hidden=128, layers=4, vision_hidden=96, vision_layers=3, image_size=80, patch=16):
    """SigLIP-like vision tower, one linear layer (a patch is a token: no pixel shuffle), Llama -> (net, processor). Idefics3's processor: SmolVLM's own imports torchvision for videos."""
    from transformers import Idefics3Processor, SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
    tok = tokenizer(texts, vocab_size, ["<|pad|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>"])
    side = {"longest_edge": image_size}                     # a picture of this size is neither resized nor cut into tiles
    processor = Idefics3Processor(SmolVLMImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False), tok, image_seq_len=(image_size // patch) ** 2,
                                  chat_template=CHAT.replace("END", "<end_of_utterance>"))
    vision = dict(hidden_size=vision_hidden, intermediate_size=3 * vision_hidden, num_hidden_layers=vision_layers, num_attention_heads=vision_hidden // 32,
                  image_size=image_size, patch_size=patch)
    config = SmolVLMConfig(vision_config=vision, text_config=writer(len(tok), hidden, layers), scale_factor=1, image_token_id=2, pad_token_id=0, tie_word_embeddings=True)
    return rescale_weights(SmolVLMForConditionalGeneration(config)), processor


FAMILIES = dict(llava=llava, smolvlm=smolvlm)

if __name__ == "__main__":
    make, sizes = FAMILIES.get((sys.argv + [""])[1]), dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[3:])
    if len(sys.argv) < 3 or not make or not set(sizes) <= set(inspect.signature(make).parameters) - {"texts"} or not all(n.isdigit() for n in sizes.values()):
        raise SystemExit(f"Say which, where to, and sizes if they should be others: python -m pretrain.tiny_nets {'|'.join(FAMILIES)} FOLDER [--hidden=128 --layers=4 --vision_hidden=96 --vision_layers=3]")
    if os.path.exists(sys.argv[2]):
        raise SystemExit(f"{sys.argv[2]!r} exists already: name a new folder.")
    import transformers
    from pretrain.questions import corpus
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    net, processor = make(corpus(20_000), **{k: int(n) for k, n in sizes.items()})
    net.save_pretrained(sys.argv[2]), processor.save_pretrained(sys.argv[2])
    print(f"{sys.argv[2]}: {sum(p.numel() for p in net.parameters()):,} parameters, {len(processor.tokenizer)} words")
