"""
Build small random models of the families that the README lists, and the VLM that the tests make of them.

A model is written as the complete folder that a download from the hub would give: config, weights,
tokenizer, processor, and a chat template where the family has one. `model.load_model(folder)` opens it as
any other folder.

Processors that also read videos import torchvision, which we do not need. LLaVA-OneVision's and InternVL's
are opened without their part for videos (below). The Qwens and SmolVLM use a processor for pictures only,
which transformers offers under another name.
"""
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaddleOCRVLProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from model import VLM
from pretrain.tiny_nets import llava as tiny_llava

def without_videos(cls):
    """List the parts of a processor but for the one that reads videos."""
    return ["image_processor", "tokenizer"]


for video_processor in (LlavaOnevisionProcessor, InternVLProcessor):
    video_processor.get_attributes = classmethod(without_videos)

TEXTS = [
    "Picture of a card: 3 + 4 = ?",
    '{"thoughts": "The number is 5", "action": "+"}',
    "State the action. Possible actions: + - stop",
] * 4
VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
)
TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
CLIP = dict(VISION, image_size=32, patch_size=16, projection_dim=32)
SIGLIP = dict(VISION, model_type="siglip_vision_model", image_size=32, patch_size=16)
QFORMER = dict(VISION, encoder_hidden_size=32, cross_attention_frequency=1)
SQUARE = {"height": 32, "width": 32}
# The shapes that LLaVA-NeXT and OneVision cut a picture into.
GRID = [[32, 64], [64, 32], [64, 64]]

def tokenizer(special, pad, eos, bos=None, first=None, **names):
    """Train a byte-level BPE of about 300 tokens, the special ones first.

    It puts the token `first` before each text, as LLaMA's and Gemma's tokenizers put their bos.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    if first:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{first} $A",
            special_tokens=[(first, special.index(first))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        padding_side="left",
        extra_special_tokens=names,
    )

def llama_tokenizer():
    """Train a tokenizer as LLaVA-1.5's and LLaVA-NeXT's: <s> first, </s> last."""
    special = ["<pad>", "<s>", "</s>", "<image>"]
    return tokenizer(special, "<pad>", "</s>", bos="<s>", first="<s>", image_token="<image>")

def blip_tokenizer():
    """Train a tokenizer as BLIP-2's and InstructBLIP's, whose processors add the image token."""
    return tokenizer(["<pad>", "<s>", "</s>"], pad="<pad>", eos="</s>", bos="<s>", first="<s>")

def chat(before, image, after, cue, start=""):
    """Write a chat template: each message between `before` and `after`, and `cue` where the reply begins."""
    part = "{{ '" + image + "' if c['type'] == 'image' else c['text'] }}"
    content = "{% for c in m['content'] %}" + part + "{% endfor %}"
    messages = "{% for m in messages %}" + before + content + after + "{% endfor %}"
    return start + messages + "{% if add_generation_prompt %}" + cue + "{% endif %}"

def chatml(image):
    return chat("<|im_start|>{{ m['role'] }}\n", image, "<|im_end|>\n", "<|im_start|>assistant\n")


# -- the families: each builder returns (net, processor) ----------------------------------------------------

def scratch(**sizes):
    """The tiny LLaVA of the package, smaller still."""
    small = dict(hidden=64, layers=2, vision_hidden=32, vision_layers=1, image_size=32, patch=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_llava(TEXTS, **dict(vocab_size=300) | small | sizes)

def llava():
    """LLaVA-1.5: CLIP's last layer but one, and a LLaMA.

    No special token ends a turn in its template, so eos does.
    """
    tok = llama_tokenizer()
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE),
        tok,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat("{{ m['role'] | upper }}: ", "<image>\n", " ", "ASSISTANT:"),
    )
    text = dict(TEXT, model_type="llama", vocab_size=len(tok))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        image_token_index=3,
        text_config=dict(text, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    )
    return LlavaForConditionalGeneration(config), processor

def llava_next():
    """LLaVA-NeXT: a picture is a small copy of the whole and a grid of tiles, according to its shape.

    `image_sizes` says which of them are padding. The template is Mistral's.
    """
    tok = llama_tokenizer()
    before = "{% if m['role'] == 'user' %}[INST] {% endif %}"
    after = "{{ ' [/INST]' if m['role'] == 'user' else '</s>' }}"
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 32},
            crop_size=SQUARE,
            image_grid_pinpoints=GRID,
        ),
        tok,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat(before, "<image>\n", after, ""),
    )
    text = dict(TEXT, model_type="mistral", vocab_size=len(tok))
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        image_token_index=3,
        image_grid_pinpoints=GRID,
        text_config=dict(text, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    )
    return LlavaNextForConditionalGeneration(config), processor

def llava_onevision():
    """LLaVA-OneVision: tiles as in LLaVA-NeXT for one picture, none for several (`batch_num_images`).

    Its own processor, opened without videos.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    names = dict(image_token="<image>", video_token="<video>")
    tok = tokenizer(special, pad="<|endoftext|>", eos="<|im_end|>", **names)
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=GRID),
        tok,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>\n"),
    )
    config = LlavaOnevisionConfig(
        vision_config=dict(SIGLIP, vision_use_head=False),
        image_token_index=3,
        video_token_index=4,
        image_grid_pinpoints=GRID,
        text_config=dict(TEXT, model_type="qwen2", vocab_size=len(tok), tie_word_embeddings=True),
    )
    return LlavaOnevisionForConditionalGeneration(config), processor

def qwen(config, net, vision, **text):
    """The Qwens: three-dimensional positions, and a tokenizer shorter than the embedding.

    Pictures are a bag of patches with `image_grid_thw` beside them. Their own processors import torchvision
    for videos; PaddleOCR's does the same for pictures and nothing else.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    tok = tokenizer(special, pad="<|endoftext|>", eos="<|endoftext|>", image_token="<|image_pad|>")
    size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 48}
    processor = PaddleOCRVLProcessor(
        Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size=size),
        tok,
        chat_template=chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    rope = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=10000.0)
    tower = dict(depth=2, hidden_size=32, num_heads=2, patch_size=8, spatial_merge_size=2)
    settings = config(
        text_config=dict(TEXT, vocab_size=320, rope_parameters=rope, **text),
        vision_config=dict(tower, **vision),
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=True,
    )
    return net(settings), processor

def qwen2_vl():
    return qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, dict(embed_dim=32, mlp_ratio=2))

def qwen2_5_vl():
    """Qwen2.5-VL: its vision tower attends within windows in one layer of the two."""
    vision = dict(out_hidden_size=32, intermediate_size=64, window_size=32, fullatt_block_indexes=[1])
    return qwen(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision)

def qwen3_vl():
    """Qwen3-VL: features of an early vision layer are added to the first hidden states (deepstack)."""
    vision = dict(
        out_hidden_size=32,
        intermediate_size=64,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    )
    return qwen(Qwen3VLConfig, Qwen3VLForConditionalGeneration, vision, head_dim=16)

def idefics3(
    config=Idefics3Config,
    net=Idefics3ForConditionalGeneration,
    image_processor=Idefics3ImageProcessorPil,
):
    """Idefics3, also the name of SmolVLM's first version; its language model is called `text_model`.

    Pictures are five-dimensional, with a mask of their pixels, and cut into tiles if they are large.
    """
    tiles = [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
    special = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
    tok = tokenizer(special + tiles, pad="<|im_start|>", eos="<end_of_utterance>")
    before = "<|im_start|>{{ m['role'] | capitalize }}:"
    processor = Idefics3Processor(
        image_processor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tok,
        image_seq_len=4,
        chat_template=chat(before, "<image>", "<end_of_utterance>\n", "Assistant:"),
    )
    settings = config(
        vision_config=dict(VISION, image_size=32, patch_size=8),
        scale_factor=2,
        image_token_id=3,
        pad_token_id=0,
        text_config=dict(TEXT, model_type="llama", vocab_size=len(tok), pad_token_id=0),
    )
    return net(settings), processor

def smolvlm():
    """SmolVLM2, a class of its own in transformers.

    Its processor imports torchvision and num2words for videos; Idefics3's does the same for pictures.
    """
    return idefics3(SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil)

def paligemma():
    """PaliGemma: attends both ways within the prompt, only backwards in the reply (`token_type_ids`).

    It has no chat template. Its processor writes <bos> behind the pictures.
    """
    tok = tokenizer(["<pad>", "<eos>", "<bos>"], pad="<pad>", eos="<eos>", bos="<bos>")
    image_processor = SiglipImageProcessorPil(size=SQUARE)
    image_processor.image_seq_length = 4
    processor = PaliGemmaProcessor(image_processor, tok)
    text = dict(TEXT, model_type="gemma", head_dim=16, vocab_size=len(tok), pad_token_id=0)
    config = PaliGemmaConfig(
        vision_config=dict(SIGLIP, projection_dim=32),
        projection_dim=32,
        hidden_size=32,
        image_token_index=processor.image_token_id,
        text_config=text,
    )
    return PaliGemmaForConditionalGeneration(config), processor

def gemma3():
    """Gemma 3: a picture's tokens attend to each other both ways, one layer has a sliding window.

    <bos> comes both from the template and from the tokenizer. The text for a picture, <start_of_image>, is
    not the placeholder of its features.
    """
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    special += ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    tok = tokenizer(
        special,
        pad="<pad>",
        eos="<eos>",
        bos="<bos>",
        first="<bos>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    template = chat(
        before="<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n",
        image="<start_of_image>",
        after="<end_of_turn>\n",
        cue="<start_of_turn>model\n",
        start="{{ bos_token }}",
    )
    image_processor = Gemma3ImageProcessorPil(size={"height": 64, "width": 64})
    processor = Gemma3Processor(image_processor, tok, image_seq_length=4, chat_template=template)
    text = dict(
        TEXT,
        head_dim=16,
        vocab_size=len(tok),
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
        pad_token_id=0,
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=dict(SIGLIP, image_size=64, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=5,
        eoi_token_index=6,
        image_token_index=7,
    )
    return Gemma3ForConditionalGeneration(config), processor

def internvl():
    """InternVL: a picture is one to four tiles and a thumbnail, all in the first dimension of `pixel_values`.

    Its own processor, opened without videos.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    tok = tokenizer(
        special,
        pad="<|endoftext|>",
        eos="<|im_end|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    processor = InternVLProcessor(
        GotOcr2ImageProcessorPil(size=SQUARE, max_patches=4),
        tok,
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\n"),
    )
    config = InternVLConfig(
        vision_config=dict(VISION, image_size=32, patch_size=8),
        image_token_id=5,
        image_seq_length=4,
        text_config=dict(TEXT, model_type="qwen2", vocab_size=len(tok), tie_word_embeddings=True),
    )
    return InternVLForConditionalGeneration(config), processor

def blip2():
    """BLIP-2: a Q-Former between the vision tower and an OPT, no chat template.

    Its processor writes the placeholders of one picture itself, in front of the text.
    """
    tok = blip_tokenizer()
    processor = Blip2Processor(BlipImageProcessorPil(size=SQUARE), tok, num_query_tokens=4)
    text = dict(
        model_type="opt",
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        vocab_size=len(tok),
    )
    config = Blip2Config(
        vision_config=dict(VISION, image_size=32, patch_size=16),
        num_query_tokens=4,
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        qformer_config=dict(QFORMER, vocab_size=8),
        text_config=dict(text, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    )
    return Blip2ForConditionalGeneration(config), processor

def instructblip():
    """InstructBLIP: BLIP-2 with a LLaMA, whose Q-Former reads the question, too (`qformer_input_ids`).

    The question for the Q-Former is in the ids of a tokenizer of its own.
    """
    tok = blip_tokenizer()
    reader = tokenizer(["[PAD]", "[CLS]", "[SEP]"], pad="[PAD]", eos="[SEP]", first="[CLS]")
    image_processor = BlipImageProcessorPil(size=SQUARE)
    processor = InstructBlipProcessor(image_processor, tok, reader, num_query_tokens=4)
    text = dict(TEXT, model_type="llama", vocab_size=len(tok))
    config = InstructBlipConfig(
        vision_config=dict(VISION, image_size=32, patch_size=16),
        num_query_tokens=4,
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        qformer_config=dict(QFORMER, vocab_size=len(reader)),
        text_config=dict(text, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    )
    return InstructBlipForConditionalGeneration(config), processor


BUILDERS = dict(
    scratch=scratch,
    llava=llava,
    llava_next=llava_next,
    llava_onevision=llava_onevision,
    qwen2_vl=qwen2_vl,
    qwen2_5_vl=qwen2_5_vl,
    qwen3_vl=qwen3_vl,
    idefics3=idefics3,
    smolvlm=smolvlm,
    paligemma=paligemma,
    gemma3=gemma3,
    internvl=internvl,
    blip2=blip2,
    instructblip=instructblip,
)
FAMILIES = list(BUILDERS)
# Their processors know one picture per prompt; two are refused in a sentence.
ONE_PICTURE = ("blip2", "instructblip")

def build(family, folder):
    """Write a family's tiny random model as a complete folder; return the folder's path."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, processor = BUILDERS[family]()
        if family != "scratch":
            widen_weights(net)
        net.float().save_pretrained(folder)
        processor.save_pretrained(folder)
    return str(folder)

@torch.no_grad()
def widen_weights(net):
    """Draw larger random weights: at the library's std of 0.02 layers this narrow pass almost nothing on."""
    for param in net.parameters():
        if param.dim() > 1:
            param.normal_(std=param[0].numel() ** -0.5)


# -- the VLM of the tests -----------------------------------------------------------------------------------

def make_vlm(net, processor, **settings):
    """Build a VLM with settings as in a config; by default with small adapters and one full critic.

    settings: lora_r, lora_targets, lora_alpha, modules_to_save; n_critics, q_head, q_init, q_width.
    The others go to VLM.
    """
    adapters = dict(lora_r=4, lora_targets=".*", lora_alpha=8, modules_to_save="")
    critics = dict(n_critics=1, q_head="full", q_init=0.0, q_width=0)
    options = {}
    for key, value in settings.items():
        group = next((group for group in (adapters, critics) if key in group), options)
        group[key] = value
    torch.manual_seed(0)
    vlm = VLM(net, processor, **options)
    if adapters["lora_r"] or adapters["modules_to_save"]:
        vlm.add_adapters(**adapters)
    if critics["n_critics"]:
        vlm.add_critics(**critics)
    return vlm

@torch.no_grad()
def randomise(vlm):
    """Draw random weights for all that starts as zero: the adapters' B, heads and targets. Return the VLM.

    Modules that are trained in full move away from the base, too.
    """
    up_projections = [layer.lora_B for layer in vlm.lora.values()]
    for _, _, param in vlm.saved.trained:
        param.add_(torch.randn_like(param), alpha=0.1)
    for param in [*up_projections, *vlm.heads.parameters(), *vlm.targets.parameters()]:
        param.normal_(std=0.3)
    return vlm
