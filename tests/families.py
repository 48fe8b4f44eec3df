"""
Small random models of the families that the README lists, written as the complete folders that a hub download would give: config,
weights, tokenizer, processor, chat template where the family has one. `model.load_model(folder)` opens them by their path, like any other.

Processors that also read videos import torchvision, which we do not need. Two ways around it, said again at each builder:
LLaVA-OneVision's and InternVL's are opened without their part for videos (below); of the Qwens' and SmolVLM's, which transformers
offers under another name for pictures only, that other name stands in.
"""
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, CLIPVisionConfig, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor, Idefics3Config,
                          Idefics3ForConditionalGeneration, Idefics3Processor, InstructBlipConfig, InstructBlipForConditionalGeneration, InstructBlipProcessor, InternVLConfig,
                          InternVLForConditionalGeneration, InternVLProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration,
                          LlavaNextProcessor, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor, LlavaProcessor, PaddleOCRVLProcessor,
                          PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration,
                          Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration, SmolVLMConfig, SmolVLMForConditionalGeneration)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from pretrain.tiny_nets import llava as tiny_llava

for own in LlavaOnevisionProcessor, InternVLProcessor:  # all that they do with text and pictures is theirs
    own.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])

TEXTS = ["Picture of a card: 3 + 4 = ?", '{"thoughts": "The number is 5", "action": "+"}', "State the action. Possible actions: + - stop"] * 4
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
SIGLIP = dict(VISION, model_type="siglip_vision_model", image_size=32, patch_size=16)
SQUARE = {"height": 32, "width": 32}
GRID = [[32, 64], [64, 32], [64, 64]]  # the shapes that LLaVA-NeXT and OneVision cut a picture into


def tokenizer(special, pad, eos, bos=None, first=None, **names):
    """Byte-level BPE of about 300 tokens; the special ones come first. It puts the token `first` before each text, as LLaMA's and Gemma's put their bos."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=special))
    if first:
        bpe.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, special.index(first))])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=pad, eos_token=eos, bos_token=bos, padding_side="left", extra_special_tokens=names)


def chat(before, image, after, cue, start=""):
    """A chat template: each message between `before` and `after`, pictures as `image`, and `cue` where the reply begins."""
    return (start + "{% for m in messages %}" + before + "{% for c in m['content'] %}{{ '" + image + "' if c['type'] == 'image' else c['text'] }}{% endfor %}" + after
            + "{% endfor %}{% if add_generation_prompt %}" + cue + "{% endif %}")


def chatml(image):
    return chat("<|im_start|>{{ m['role'] }}\n", image, "<|im_end|>\n", "<|im_start|>assistant\n")


def scratch(**sizes):
    """The tiny LLaVA of the package, smaller still: (net, processor)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_llava(TEXTS, **dict(vocab_size=300, hidden=64, layers=2, vision_hidden=32, vision_layers=1, image_size=32, patch=16) | sizes)


def llava():
    """LLaVA-1.5: CLIP seen at its last layer but one, a LLaMA whose tokenizer puts <s> first; no special token ends a turn in its template, so eos does."""
    tok = tokenizer(["<pad>", "<s>", "</s>", "<image>"], pad="<pad>", eos="</s>", bos="<s>", first="<s>", image_token="<image>")
    processor = LlavaProcessor(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE), tok, patch_size=16, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=chat("{{ m['role'] | upper }}: ", "<image>\n", " ", "ASSISTANT:"))
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION, image_size=32, patch_size=16, projection_dim=32), image_token_index=3,
                         text_config=dict(TEXT, model_type="llama", vocab_size=len(tok), pad_token_id=0, bos_token_id=1, eos_token_id=2))
    return LlavaForConditionalGeneration(config), processor


def llava_next():
    """LLaVA-NeXT: a picture is a small copy of the whole and a grid of tiles, as many as its shape asks for; `image_sizes` says which are padding. Mistral's template."""
    tok = tokenizer(["<pad>", "<s>", "</s>", "<image>"], pad="<pad>", eos="</s>", bos="<s>", first="<s>", image_token="<image>")
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=GRID)
    template = chat("{% if m['role'] == 'user' %}[INST] {% endif %}", "<image>\n", "{{ ' [/INST]' if m['role'] == 'user' else '</s>' }}", "")
    processor = LlavaNextProcessor(images, tok, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template)
    config = LlavaNextConfig(vision_config=CLIPVisionConfig(**VISION, image_size=32, patch_size=16, projection_dim=32), image_token_index=3, image_grid_pinpoints=GRID,
                             text_config=dict(TEXT, model_type="mistral", vocab_size=len(tok), pad_token_id=0, bos_token_id=1, eos_token_id=2))
    return LlavaNextForConditionalGeneration(config), processor


def llava_onevision():
    """Tiles as in LLaVA-NeXT for one picture, none for several (`batch_num_images`). Its own processor, opened without videos."""
    tok = tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"], pad="<|endoftext|>", eos="<|im_end|>", image_token="<image>", video_token="<video>")
    images = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=GRID)
    processor = LlavaOnevisionProcessor(images, tok, num_image_tokens=4, vision_feature_select_strategy="full", chat_template=chatml("<image>\n"))
    config = LlavaOnevisionConfig(vision_config=dict(SIGLIP, vision_use_head=False), image_token_index=3, video_token_index=4, image_grid_pinpoints=GRID,
                                  text_config=dict(TEXT, model_type="qwen2", vocab_size=len(tok), tie_word_embeddings=True))
    return LlavaOnevisionForConditionalGeneration(config), processor


def qwen(config, net, vision, **text):
    """The Qwens: three-dimensional positions; pictures are a bag of patches with `image_grid_thw` beside them; tokenizer shorter than the embedding.
    Their own processors import torchvision for videos; PaddleOCR's does the same for pictures and nothing else."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tok = tokenizer(special, pad="<|endoftext|>", eos="<|endoftext|>", image_token="<|image_pad|>")
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 32 * 48})
    processor = PaddleOCRVLProcessor(images, tok, chat_template=chatml("<|vision_start|><|image_pad|><|vision_end|>"))
    text = dict(TEXT, vocab_size=320, rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=10000.0), **text)
    return net(config(text_config=text, vision_config=dict(depth=2, hidden_size=32, num_heads=2, patch_size=8, spatial_merge_size=2, **vision),
                      image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4, tie_word_embeddings=True)), processor


def qwen2_vl():
    return qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, dict(embed_dim=32, mlp_ratio=2))


def qwen2_5_vl():
    """Its vision tower attends within windows, in one layer of the two."""
    return qwen(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, dict(out_hidden_size=32, intermediate_size=64, window_size=32, fullatt_block_indexes=[1]))


def qwen3_vl():
    """Features of an early vision layer are added to the language model's first hidden states (deepstack)."""
    return qwen(Qwen3VLConfig, Qwen3VLForConditionalGeneration, dict(out_hidden_size=32, intermediate_size=64, num_position_embeddings=16, deepstack_visual_indexes=[0]), head_dim=16)


def idefics3(config=Idefics3Config, net=Idefics3ForConditionalGeneration, images=Idefics3ImageProcessorPil):
    """SmolVLM's first version goes by this name. The language model is `text_model`; five-dimensional pictures with a mask of their pixels, cut into tiles if large."""
    special = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>", *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2))]
    tok = tokenizer(special, pad="<|im_start|>", eos="<end_of_utterance>")
    images = images(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(images, tok, image_seq_len=4, chat_template=chat("<|im_start|>{{ m['role'] | capitalize }}:", "<image>", "<end_of_utterance>\n", "Assistant:"))
    return net(config(vision_config=dict(VISION, image_size=32, patch_size=8), scale_factor=2, image_token_id=3, pad_token_id=0,
                      text_config=dict(TEXT, model_type="llama", vocab_size=len(tok), pad_token_id=0))), processor


def smolvlm():
    """SmolVLM2, a class of its own in transformers. Its processor imports torchvision and num2words for videos; Idefics3's does the same for pictures."""
    return idefics3(SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil)


def paligemma():
    """Looks both ways within the prompt and only backwards in the reply (`token_type_ids`); no chat template; its processor writes <bos> behind the pictures."""
    tok = tokenizer(["<pad>", "<eos>", "<bos>"], pad="<pad>", eos="<eos>", bos="<bos>")
    images = SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, tok)
    config = PaliGemmaConfig(vision_config=dict(SIGLIP, projection_dim=32), projection_dim=32, hidden_size=32, image_token_index=processor.image_token_id,
                             text_config=dict(TEXT, model_type="gemma", head_dim=16, vocab_size=len(tok), pad_token_id=0))
    return PaliGemmaForConditionalGeneration(config), processor


def gemma3():
    """A picture's tokens see each other both ways (`token_type_ids`), a layer with a sliding window, <bos> both in the template and from the tokenizer;
    the word for a picture in the text (<start_of_image>) is not the placeholder of its features."""
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    tok = tokenizer(special, pad="<pad>", eos="<eos>", bos="<bos>", first="<bos>", boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    template = chat("<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n", "<start_of_image>", "<end_of_turn>\n", "<start_of_turn>model\n", start="{{ bos_token }}")
    processor = Gemma3Processor(Gemma3ImageProcessorPil(size={"height": 64, "width": 64}), tok, image_seq_length=4, chat_template=template)
    text = dict(TEXT, head_dim=16, vocab_size=len(tok), sliding_window=16, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16, pad_token_id=0)
    config = Gemma3Config(text_config=text, vision_config=dict(SIGLIP, image_size=64, vision_use_head=False), mm_tokens_per_image=4, boi_token_index=5, eoi_token_index=6, image_token_index=7)
    return Gemma3ForConditionalGeneration(config), processor


def internvl():
    """A picture is one to four tiles and a thumbnail, all in the first dimension of `pixel_values`. Its own processor, opened without videos."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    tok = tokenizer(special, pad="<|endoftext|>", eos="<|im_end|>", start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>")
    processor = InternVLProcessor(GotOcr2ImageProcessorPil(size=SQUARE, max_patches=4), tok, image_seq_length=4, chat_template=chatml("<IMG_CONTEXT>\n"))
    config = InternVLConfig(vision_config=dict(VISION, image_size=32, patch_size=8), image_token_id=5, image_seq_length=4,
                            text_config=dict(TEXT, model_type="qwen2", vocab_size=len(tok), tie_word_embeddings=True))
    return InternVLForConditionalGeneration(config), processor


QFORMER = dict(VISION, encoder_hidden_size=32, cross_attention_frequency=1)


def blip2():
    """A Q-Former between the eyes and an OPT; no chat template; its processor writes the placeholders of one picture itself, in front of the text."""
    tok = tokenizer(["<pad>", "<s>", "</s>"], pad="<pad>", eos="</s>", bos="<s>", first="<s>")
    processor = Blip2Processor(BlipImageProcessorPil(size=SQUARE), tok, num_query_tokens=4)
    text = dict(model_type="opt", hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512)
    config = Blip2Config(vision_config=dict(VISION, image_size=32, patch_size=16), num_query_tokens=4, image_token_index=tok.convert_tokens_to_ids("<image>"),
                         qformer_config=dict(QFORMER, vocab_size=8), text_config=dict(text, vocab_size=len(tok), pad_token_id=0, bos_token_id=1, eos_token_id=2))
    return Blip2ForConditionalGeneration(config), processor


def instructblip():
    """BLIP-2 with a LLaMA, whose Q-Former reads the question too, in the ids of a tokenizer of its own (`qformer_input_ids`)."""
    tok = tokenizer(["<pad>", "<s>", "</s>"], pad="<pad>", eos="</s>", bos="<s>", first="<s>")
    reader = tokenizer(["[PAD]", "[CLS]", "[SEP]"], pad="[PAD]", eos="[SEP]", first="[CLS]")
    processor = InstructBlipProcessor(BlipImageProcessorPil(size=SQUARE), tok, reader, num_query_tokens=4)
    config = InstructBlipConfig(vision_config=dict(VISION, image_size=32, patch_size=16), num_query_tokens=4, image_token_index=tok.convert_tokens_to_ids("<image>"),
                                qformer_config=dict(QFORMER, vocab_size=len(reader)),
                                text_config=dict(TEXT, model_type="llama", vocab_size=len(tok), pad_token_id=0, bos_token_id=1, eos_token_id=2))
    return InstructBlipForConditionalGeneration(config), processor


BUILDERS = {f.__name__: f for f in (scratch, llava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, idefics3, smolvlm, paligemma, gemma3, internvl, blip2, instructblip)}
FAMILIES = list(BUILDERS)
ONE_PICTURE = ("blip2", "instructblip")  # their processors know one picture a prompt; two are refused in a sentence


def build(family, folder):
    """Write the family's tiny random model as a complete folder; returns the folder's path."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, processor = BUILDERS[family]()
        with torch.no_grad():  # at the library's std of 0.02 layers this narrow pass next to nothing on, and no error would show
            for p in net.parameters():
                if p.dim() > 1 and family != "scratch":
                    p.normal_(std=p[0].numel() ** -0.5)
        net.float().save_pretrained(folder)
        processor.save_pretrained(folder)
    return str(folder)
