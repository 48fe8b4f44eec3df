"""
Small random models of several architectures, written as the complete folders that a hub download would give: config, weights,
tokenizer, processor, chat template where the family has one. `model.load_model(folder)` opens them by their path, like any other.
"""
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, LlamaConfig,
                          PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor, PaddleOCRVLProcessor, PreTrainedTokenizerFast, Qwen2VLConfig,
                          Qwen2VLForConditionalGeneration)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import model

TEXTS = ["Picture of a card: 3 + 4 = ?", '{"thoughts": "The number is 5", "action": "+"}', "State the action. Possible actions: + - stop"] * 4
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def tokenizer(special, pad, eos, bos=None, **extra):
    """Byte-level BPE of about 300 tokens; the special ones come first."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=pad, eos_token=eos, bos_token=bos, padding_side="left", **extra)


def llava(**sizes):
    """The tiny LLaVA of the package, smaller still: (net, processor)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model.scratch(TEXTS, **dict(vocab_size=300, hidden=64, layers=2, vision_hidden=32, vision_layers=1, image_size=32, patch=16) | sizes)


def idefics3():
    """SmolVLM: the language model is `text_model`; five-dimensional pictures with a mask of their pixels."""
    special = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
    tok = tokenizer(special, pad="<|im_start|>", eos="<end_of_utterance>", bos="<|im_start|>")
    template = ("<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
                "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False)
    processor = Idefics3Processor(images, tok, image_seq_len=4, chat_template=template)
    config = Idefics3Config(vision_config=dict(VISION, image_size=32, patch_size=8), scale_factor=2, image_token_id=3, pad_token_id=0,
                            text_config=dict(TEXT, model_type="llama", vocab_size=len(tok), pad_token_id=0))
    return Idefics3ForConditionalGeneration(config), processor


def qwen2_vl():
    """Three-dimensional positions; pictures are a bag of patches with `image_grid_thw` beside them; tokenizer shorter than the embedding.
    Qwen's own processor imports torchvision for videos; PaddleOCR's does the same for pictures and nothing else."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tok = tokenizer(special, pad="<|endoftext|>", eos="<|endoftext|>", extra_special_tokens={"image_token": "<|image_pad|>"})
    template = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{{ '<|vision_start|><|image_pad|><|vision_end|>' if c['type'] == 'image' else c['text'] }}"
                "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 32 * 48})
    processor = PaddleOCRVLProcessor(images, tok, chat_template=template)
    text = dict(TEXT, vocab_size=320, rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=10000.0))
    config = Qwen2VLConfig(text_config=text, vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=8, spatial_merge_size=2),
                           image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4, tie_word_embeddings=True)
    return Qwen2VLForConditionalGeneration(config), processor


def blip2():
    """A Q-Former between the eyes and a LLaMA; no chat template; its processor writes the placeholders itself, in front of the text."""
    tok = tokenizer(["<pad>", "<s>", "</s>"], pad="<pad>", eos="</s>", bos="<s>")
    processor = Blip2Processor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tok, num_query_tokens=4)
    config = Blip2Config(vision_config=dict(VISION, image_size=32, patch_size=16), num_query_tokens=4, image_token_index=tok.convert_tokens_to_ids("<image>"),
                         qformer_config=dict(VISION, vocab_size=8, encoder_hidden_size=32, cross_attention_frequency=1),
                         text_config=dict(TEXT, model_type="llama", vocab_size=len(tok), pad_token_id=0, bos_token_id=1, eos_token_id=2))
    return Blip2ForConditionalGeneration(config), processor


def paligemma():
    """Looks both ways within the prompt and only backwards in the reply (`token_type_ids`); no chat template."""
    tok = tokenizer(["<pad>", "<eos>", "<bos>"], pad="<pad>", eos="<eos>", bos="<bos>")
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, tok)
    config = PaliGemmaConfig(vision_config=dict(VISION, model_type="siglip_vision_model", image_size=32, patch_size=16, projection_dim=32), projection_dim=32, hidden_size=32,
                             image_token_index=processor.image_token_id, text_config=dict(TEXT, model_type="gemma", head_dim=16, vocab_size=len(tok), pad_token_id=0))
    return PaliGemmaForConditionalGeneration(config), processor


BUILDERS = dict(llava=llava, idefics3=idefics3, qwen2_vl=qwen2_vl, blip2=blip2, paligemma=paligemma)
FAMILIES = list(BUILDERS)


def build(family, folder):
    """Write the family's tiny random model as a complete folder; returns the folder's path."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, processor = BUILDERS[family]()
        net.float().save_pretrained(folder)
        processor.save_pretrained(folder)
    return str(folder)
