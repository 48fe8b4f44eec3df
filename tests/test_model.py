"""
Check what the network promises, for the tiny LLaVA and for small random models of other families alike.

    python -m pytest tests/test_model.py -k gemma3
"""
import copy
import functools
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import AutoModel, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import conformance, families, model
from agent_rl import compute_loss
from configurator import configure
from extras.feature_cache import Inputs, count_bytes
from pretrain.tiny_nets import smolvlm
from test_agent_rl import settings

# PaliGemma's processor and NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TRAIN = str(Path(model.__file__).with_name("train.py"))
# Rounding makes differences of about 1e-6 of the largest value, a mistake makes more than 1e-2 of it. The
# room between them is for other processors, libraries and numbers of threads.
TOLERANCE = 1e-4
END = dict(
    scratch="<|end|>",
    llava="</s>",
    llava_next="</s>",
    llava_onevision="<|im_end|>",
    qwen2_vl="<|im_end|>",
    qwen2_5_vl="<|im_end|>",
    qwen3_vl="<|im_end|>",
    idefics3="<end_of_utterance>",
    smolvlm="<end_of_utterance>",
    paligemma="<eos>",
    gemma3="<end_of_turn>",
    internvl="<|im_end|>",
    blip2="</s>",
    instructblip="</s>",
)
# The path of the language model, where it is not this one.
LANGUAGE_PATH = "model.language_model."
OTHER_LANGUAGE_PATHS = dict(
    idefics3="model.text_model.",
    smolvlm="model.text_model.",
    blip2="language_model.model.",
    instructblip="language_model.model.",
)
# The prompts of the families without a chat template.
PLAIN = dict(
    paligemma="<image>" * 4 + "<bos>USER: a page ASSISTANT:\n",
    blip2="<image>" * 4 + "<s>USER: a page ASSISTANT:",
    instructblip="<image>" * 4 + "<s>USER: a page ASSISTANT:",
)
PAGES = ["3 + 4 = ?", "Possible actions: + - stop. State the action of this card, as JSON.", "é"]
every_family = pytest.mark.parametrize("family", families.FAMILIES)


# -- models, prompts, replies -------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """family -> its model folder, built once."""

    @functools.cache
    def build_folder(family):
        return families.build(family, tmp_path_factory.mktemp(family))

    return build_folder

@pytest.fixture(scope="session")
def opened(folder):
    """family -> (net, processor), opened once."""

    @functools.cache
    def open_family(family):
        return model.load_model(folder(family), device="cpu")

    return open_family

@pytest.fixture
def make(folder, opened):
    """make(family, ...) -> a VLM of the family's folder; all that it adds is random unless fresh=True."""

    def make_family(family="scratch", fresh=False, **settings):
        net, processor = opened(family)
        options = dict(name=folder(family)) | settings
        vlm = families.make_vlm(copy.deepcopy(net), processor, **options)
        if not fresh:
            families.randomise(vlm)
        return vlm.eval()

    return make_family

def ask(text, pictures=1):
    """Return the messages of a prompt with pictures and a text."""
    content = [{"type": "image", "text": None}] * pictures
    content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]

def seeded(seed):
    return torch.Generator().manual_seed(seed)

def picture(i):
    """Draw noise; pictures of even and odd number differ in size."""
    size = (32 + 16 * (i % 2), 32)
    pixels = torch.randint(256, (size[0] * size[1] * 3,), generator=seeded(i))
    return Image.frombytes("RGB", size, bytes(pixels.tolist()))

def encoded(vlm, pages=PAGES):
    """Encode pages, each with a picture of its own."""
    return [vlm.encode(ask(text), [picture(i)]) for i, text in enumerate(pages)]

def rolled(vlm, prompts=None, **how):
    """Sample replies -> (prompts, replies, log-probabilities), all three of different lengths."""
    if prompts is None:
        prompts = encoded(vlm)
    ids, logps = vlm.generate(prompts, 7, generator=seeded(1), **how)
    replies = [row[: 7 - 2 * b] for b, row in enumerate(ids)]
    logps = [row[: 7 - 2 * b] for b, row in enumerate(logps)]
    return prompts, replies, logps

@torch.no_grad()
def replay(vlm, prompts, replies):
    """Compute the logits (B, R, V) of replies in the training path."""
    inputs, P, ids, _ = vlm.collate(prompts, replies)
    logits, _ = vlm(inputs, P, ids.shape[1])
    return logits

def log_probabilities(logits, reply):
    """Compute log pi(a|s) of a reply's tokens, logits (R, V) -> list."""
    logp = logits.log_softmax(-1)
    return [float(logp[j, token]) for j, token in enumerate(reply)]

def gap(a, b):
    """Return the largest difference of two tensors or lists, relative to the largest value of the second."""
    a = torch.as_tensor(a)
    b = torch.as_tensor(b)
    difference = (a - b).abs().max()
    return float(difference / b.abs().max())

def logit_gap(vlm, a, b):
    """Return the gap between logits of the tokens that can be sampled; the logits of the others are -1e9."""
    return gap(a[..., ~vlm.banned], b[..., ~vlm.banned])

def count_weights(module):
    return sum(param.numel() for param in module.parameters())

def librarys_inputs(vlm, text, image):
    """Return what transformers itself makes of a picture and a question.

    By the chat template, or without one by the processor from our plain prompt.
    """
    if vlm.processor.chat_template:
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        how = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        return dict(vlm.processor.apply_chat_template(messages, **how))
    inputs = dict(vlm.processor(text=[vlm.render(ask(text))], images=[[image]], return_tensors="pt"))
    inputs.pop("labels", None)
    return inputs

def refuses(path, action):
    """Check that an action ends with SystemExit and one sentence on one line that names the path."""
    with pytest.raises(SystemExit) as error:
        action()
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message and message.endswith(".")


# -- forward ------------------------------------------------------------------------------------------------

@every_family
def test_logits_are_the_librarys(make, family):
    """Cutting the hidden state before the unembedding gives the library's logits at the reply's positions."""
    vlm = make(family)
    prompts, replies, _ = rolled(vlm)
    inputs, P, ids, _ = vlm.collate(prompts, replies)
    R = ids.shape[1]
    with torch.no_grad():
        logits, hidden = vlm(inputs, P, R)
        full = vlm.net(**inputs).logits[:, P - 1 : P + R - 1]
    assert logits.shape == full.shape == (3, R, vlm.vocab_size)
    assert hidden.shape[:2] == (3, R)
    assert logit_gap(vlm, logits, full) < TOLERANCE
    assert logits.softmax(-1)[..., vlm.banned].max() == 0

@every_family
def test_left_padding_changes_nothing(make, family):
    """A row has the same logits and the same greedy reply alone and beside longer rows."""
    vlm = make(family)
    prompts, replies, _ = rolled(vlm)
    greedy, _ = vlm.generate(prompts, 6, temperature=0)
    together = replay(vlm, prompts, replies)
    for b, reply in enumerate(replies):
        n = len(reply)
        alone = replay(vlm, [prompts[b]], [reply])
        assert logit_gap(vlm, alone[0, :n], together[b, :n]) < TOLERANCE
        greedy_alone, _ = vlm.generate([prompts[b]], 6, temperature=0)
        assert greedy_alone == [greedy[b]]

@every_family
def test_two_pictures_in_one_prompt(make, record_property, family):
    """Both pictures count, and beside prompts with one picture each row is as it is alone.

    A processor that knows one picture refuses two: BLIP-2 once read the first of them only, and gave the
    second to the next row of the batch.
    """
    vlm = make(family)

    def two(i, j):
        return vlm.encode(ask("a page", 2), [picture(i), picture(j)])

    if family in families.ONE_PICTURE:
        record_property("known", "no")
        refuses(vlm.name, lambda: two(0, 1))
        return
    prompts = [two(0, 1), *encoded(vlm, PAGES[:1]), two(0, 3), two(5, 1)]
    _, replies, logps = rolled(vlm, prompts)
    replies = [replies[0], replies[1], replies[0], replies[0]]
    together = replay(vlm, prompts, replies)
    for b, reply in enumerate(replies):
        n = len(reply)
        alone = replay(vlm, [prompts[b]], [reply])
        assert logit_gap(vlm, alone[0, :n], together[b, :n]) < TOLERANCE
        if b < 2:
            assert gap(log_probabilities(alone[0], reply), logps[b]) < TOLERANCE
    # Rows 2 and 3 differ from row 0 in the second and in the first picture.
    assert logit_gap(vlm, together[2], together[0]) > 100 * TOLERANCE
    assert logit_gap(vlm, together[3], together[0]) > 100 * TOLERANCE

@every_family
def test_rows_without_a_picture(make, family):
    """A row without a picture is the same beside rows with one as alone.

    A batch that began with such a row once lost the pictures of all others, without an error. The Q-Formers
    and PaliGemma want a picture in every prompt, and say so.
    """
    vlm = make(family)
    if family in (*families.ONE_PICTURE, "paligemma"):
        refuses(vlm.name, lambda: vlm.encode(ask("a page", 0), []))
        return
    plain = vlm.encode(ask("a page", 0), [])
    prompts = [plain, *encoded(vlm, PAGES[:1]), plain]
    replies = [vlm.reply_ids("+")] * 3
    together = replay(vlm, prompts, replies)
    for b in range(2):
        alone = replay(vlm, [prompts[b]], [replies[b]])
        assert logit_gap(vlm, alone[0, :2], together[b, :2]) < TOLERANCE

@every_family
def test_picture_and_text_are_seen(make, family):
    """Another picture or another page gives other logits."""
    vlm = make(family)
    prompts = [
        vlm.encode(ask("State the action"), [picture(0)]),
        vlm.encode(ask("State the action"), [picture(2)]),
        vlm.encode(ask("State the card"), [picture(0)]),
    ]
    logits = replay(vlm, prompts, [[vlm.eos]] * 3)[:, 0]
    assert logit_gap(vlm, logits[1], logits[0]) > 100 * TOLERANCE
    assert logit_gap(vlm, logits[2], logits[0]) > 100 * TOLERANCE


# -- generate -----------------------------------------------------------------------------------------------

@every_family
def test_greedy_replies_are_the_librarys(make, family):
    """Temperature 0 in a padded batch is the library's own greedy decoding of each prompt alone.

    The library is told to suppress the banned tokens.
    """
    vlm = make(family)
    replies, _ = vlm.generate(encoded(vlm), 6, temperature=0)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=6,
        eos_token_id=vlm.eos,
        pad_token_id=0,
        suppress_tokens=vlm.banned.nonzero()[:, 0].tolist(),
    )
    for i, text in enumerate(PAGES):
        inputs = librarys_inputs(vlm, text, picture(i))
        out = vlm.net.generate(**inputs, generation_config=config)
        assert out[0].tolist()[-len(replies[i]) :] == replies[i]

@every_family
def test_rollout_agrees_with_training(make, family):
    """The log-probabilities stored while sampling are those of the training path for the same ids.

    In training mode, too: a Q-Former's and OPT's own dropout of 0.1 once made the policy that learned another
    than the one that had played.
    """
    vlm = make(family).train()
    prompts, replies, logps = rolled(vlm)
    assert vlm.training
    inputs, P, ids, mask = vlm.collate(prompts, replies)
    R = ids.shape[1]
    with torch.no_grad():
        logits, _ = vlm(inputs, P, R)
    for b, reply in enumerate(replies):
        expected_mask = [1] * len(reply) + [0] * (R - len(reply))
        assert mask[b].tolist() == expected_mask
        assert inputs["attention_mask"][b, P:].tolist() == expected_mask
        assert gap(log_probabilities(logits[b], reply), logps[b]) < TOLERANCE

@every_family
def test_critic_guides_sampling(make, family):
    """With q_weight the policy is softmax((logits + q_weight * A) / temperature), A of the critics' mean."""
    vlm = make(family, n_critics=2)
    prompts, replies, logps = rolled(vlm, q_weight=2.0, temperature=0.7)
    inputs, P, ids, _ = vlm.collate(prompts, replies)
    with torch.no_grad():
        logits, hidden = vlm(inputs, P, ids.shape[1])
        q = vlm.q(hidden).mean(0)
    v = (logits.softmax(-1) * q).sum(-1, keepdim=True)
    guided_logits = logits + 2 * (q - v)
    for b, reply in enumerate(replies):
        guided = log_probabilities(guided_logits[b] / 0.7, reply)
        plain = log_probabilities(logits[b] / 0.7, reply)
        assert gap(plain, guided) > 100 * TOLERANCE
        assert gap(guided, logps[b]) < TOLERANCE

def test_sampling_follows_the_policy(make):
    """The first sampled token is as frequent as it is probable; temperature 0 takes the likeliest."""
    vlm = make()
    n = 400
    prompts = encoded(vlm, PAGES[:1]) * n
    replies, _ = vlm.generate(prompts, 1, generator=seeded(0))
    first = torch.tensor(replies)[:, 0]
    logits = replay(vlm, prompts[:1], [[vlm.eos]])
    p = logits[0, 0].softmax(-1)
    frequency = torch.bincount(first, minlength=len(p)) / n
    deviation = (p * (1 - p) / n).sqrt()
    assert ((frequency - p).abs() < 4 * deviation + 4 / n).all()
    greedy, _ = vlm.generate(prompts[:1], 1, temperature=0)
    assert greedy == [[int(p.argmax())]]

def test_random_stream_of_its_own(make):
    """A generator's seed decides the samples, and the global random stream does not move."""
    vlm = make()
    prompts = encoded(vlm)
    state = torch.get_rng_state()

    def play(seed):
        return vlm.generate(prompts, 8, generator=seeded(seed))

    assert play(3) == play(3)
    assert play(3) != play(4)
    assert torch.equal(state, torch.get_rng_state())

@every_family
def test_banned_tokens_are_never_said(make, folder, family):
    """Placeholder, pad and other special tokens are not sampled, even if their logit or their Q is huge.

    The end of the turn is.
    """
    vlm = make(family, fresh=True)
    with open(os.path.join(folder(family), "tokenizer.json")) as f:
        added = json.load(f)["added_tokens"]
    specials = {token["id"] for token in added if token["special"]}
    beyond_tokenizer = set(range(len(vlm.tokenizer), len(vlm.banned)))
    banned = set(vlm.banned.nonzero()[:, 0].tolist())
    assert banned == (specials | beyond_tokenizer) - {vlm.eos}
    assert model.find_image_token(vlm.net, vlm.processor) in banned

    unembedding = vlm.net.get_output_embeddings()
    unembedding.register_forward_hook(lambda module, args, out: out + 1e4 * vlm.banned)
    vlm.heads[0].bias.data += 1e4 * vlm.banned
    for how in (dict(temperature=0), dict(temperature=5.0), dict(q_weight=3.0)):
        replies, logps = vlm.generate(encoded(vlm), 8, generator=seeded(0), **how)
        assert banned.isdisjoint(token for reply in replies for token in reply)
        assert all(-50 < logp <= 0 for row in logps for logp in row)

    is_end = torch.arange(len(vlm.banned)) == vlm.eos
    unembedding.register_forward_hook(lambda module, args, out: out + 1e5 * is_end)
    assert vlm.generate(encoded(vlm), 8)[0] == [[vlm.eos]] * 3


# -- text ---------------------------------------------------------------------------------------------------

@every_family
def test_prompt_is_the_librarys(make, family):
    """A prompt is what the library makes of a chat by the family's template, tensor for tensor.

    Without a template it is our plain prompt behind the picture: `USER: ... ASSISTANT:`.
    """
    vlm = make(family)
    ours = vlm.encode(ask("a page"), [picture(1)])
    theirs = librarys_inputs(vlm, "a page", picture(1))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    if family in PLAIN:
        assert vlm.tokenizer.decode(ours["input_ids"][0]) == PLAIN[family]
    else:
        assert vlm.processor.chat_template

def test_a_q_formers_words_are_no_tokens_of_the_prompt(make):
    """InstructBLIP's question to its Q-Former is neither padded nor continued like a prompt.

    It once was when it happened to be as long as the prompt.
    """
    vlm = make("instructblip")
    [prompt] = encoded(vlm, PAGES[:1])
    longer = prompt["input_ids"].shape[1] - prompt["qformer_input_ids"].shape[1]
    same_length = Inputs(prompt)
    for key in ("qformer_input_ids", "qformer_attention_mask"):
        same_length[key] = pad(prompt[key], (0, longer), value=0)
    assert same_length["qformer_input_ids"].shape == same_length["input_ids"].shape
    usual = replay(vlm, [prompt], [[5, 6]])
    logits = replay(vlm, [same_length], [[5, 6]])
    assert logit_gap(vlm, logits[:, :2], usual[:, :2]) < TOLERANCE
    inputs, _, _, _ = vlm.collate([same_length], [[5, 6]])
    assert inputs["qformer_input_ids"].shape == same_length["input_ids"].shape

@every_family
def test_page_text_cannot_forge_tokens(make, family):
    """Special tokens in a text add none to the prompt.

    It has the same number of placeholders and control tokens as the prompt of a harmless page.
    """
    vlm = make(family)
    special = list(model.special_tokens(vlm.tokenizer))
    special.append(model.find_image_token(vlm.net, vlm.processor))

    def count(text):
        ids = vlm.encode(ask(text), [picture(0)])["input_ids"]
        return [(ids == token).sum() for token in special]

    harmless = count("a page")
    assert harmless[-1] > 0
    for token in [*vlm.reserved_texts, "<image>"]:
        assert count(token) == harmless
        assert count(f"a {token}{token} page") == harmless
        assert count(token[:2] + token + token[2:]) == harmless
        assert count(f"{token}\n{END[family]}") == harmless

@every_family
def test_the_end_of_turn_is_found(make, family):
    """It comes from the chat template (Qwen's eos is another token), or without one from the tokenizer."""
    vlm = make(family)
    assert vlm.tokenizer.convert_ids_to_tokens(vlm.eos) == END[family]
    assert not vlm.banned[vlm.eos]
    is_eos = vlm.eos == vlm.tokenizer.eos_token_id
    assert is_eos == ("qwen" not in family and family != "gemma3")

@every_family
def test_stored_reply_ids_are_used(make, family):
    """A recorded tokenization is used as it is, even if it is not the usual one or was cut short.

    Ids of another tokenizer are made again.
    """
    vlm = make(family)
    text = '{"action": "+"}'

    def tokenize(text):
        return vlm.tokenizer(text, add_special_tokens=False).input_ids

    letters = []
    for letter in text:
        letters += tokenize(letter)
    assert letters != tokenize(text)
    assert vlm.reply_ids(text, letters + [vlm.eos]) == letters + [vlm.eos]
    assert vlm.reply_ids(text, letters) == letters
    for foreign in (None, [], [10**6], tokenize("something else")):
        ids = vlm.reply_ids(text, foreign)
        assert ids == tokenize(text) + [vlm.eos]
        assert vlm.decode(ids) == text

@every_family
@pytest.mark.parametrize("text", ['{"action": "+"}', "é action: 🙂 stop", "no action"])
def test_span_is_what_stands_behind_the_marker(make, family, text):
    """The tokens that reach beyond the marker are marked, and the end of the turn."""
    vlm = make(family)
    start = text.index("action") + len("action")
    ids = vlm.reply_ids(text)
    assert ids[-1] == vlm.eos
    span = vlm.span(ids, start)
    first = span.index(1)
    assert span == [0] * first + [1] * (len(ids) - first)
    assert len(vlm.decode(ids[:first])) <= start
    assert first == len(ids) - 1 or len(vlm.decode(ids[: first + 1])) > start
    assert vlm.decode(ids[first:]).endswith(text[start:].strip())

def test_cache_of_encoded_prompts(make):
    """A hit returns the same tensors without drawing the picture; the oldest entry is dropped first."""
    mb = 0.05
    vlm = make(prompt_cache_mb=mb)
    drawn = []

    def draw():
        drawn.append(1)
        return picture(0)

    def get(key):
        return vlm.encode(ask("a page"), [draw], key=key)

    first = get("a")
    assert get("a") is first
    assert len(drawn) == 1
    cache = vlm.encoded_prompts
    capacity = int(mb * 2**20 // count_bytes(first))
    for key in range(3 * capacity):
        get(key)
        get("a")
        assert cache.bytes == sum(map(count_bytes, cache.values())) <= mb * 2**20
    assert get("a") is first
    assert len(cache) == capacity
    assert len(drawn) == 1 + 3 * capacity
    assert get(None) is not get(None)

    small = make(prompt_cache_mb=0)
    assert small.encode(ask("a page"), [picture(0)], key="a") is not None
    assert not small.encoded_prompts
    assert small.encoded_prompts.bytes == 0


# -- cached vision features ---------------------------------------------------------------------------------

def count_looks(vlm):
    """Return a list that grows by one with every call of the net's vision tower."""
    towers = []
    for path, module in vlm.net.named_modules():
        parent, _, leaf = path.rpartition(".")
        if leaf in ("vision_tower", "vision_model", "visual") and ".vision" not in parent:
            towers.append(module)
    calls = []
    towers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    return calls

@every_family
def test_cached_features_give_the_same_logits(make, family):
    """Updates and rollouts with cached features are what they are without the cache.

    Each prompt's pictures are computed once, whatever text they come with.
    """
    plain = make(family)
    vlm = make(family, vision_cache_mb=8)
    prompts = encoded(vlm)
    if family not in families.ONE_PICTURE:
        prompts.append(vlm.encode(ask("a page", 2), [picture(0), picture(3)]))
    _, replies, _ = rolled(plain, prompts)
    calls = count_looks(vlm)
    for _ in range(2):
        cached = replay(vlm, prompts, replies)
        usual = replay(plain, prompts, replies)
        assert logit_gap(vlm, cached, usual) < TOLERANCE
        assert len(calls) == len(prompts)

    other_text = vlm.encode(ask("another text"), [picture(0)])
    other_prompts = [other_text, *prompts[1:]]
    replies, logps = vlm.generate(other_prompts, 5, temperature=0)
    usual_replies, usual_logps = plain.generate(other_prompts, 5, temperature=0)
    assert replies == usual_replies
    for row, usual_row in zip(logps, usual_logps):
        assert gap(row, usual_row) < TOLERANCE
    # BLIP-2's own generate() runs the vision tower itself. InstructBLIP's features depend on the text.
    assert len(calls) == len(prompts) + (family in families.ONE_PICTURE)
    cache = vlm.features.cache
    assert len(cache) == len(prompts) + (family == "instructblip")
    assert cache.bytes == sum(map(count_bytes, cache.values()))

def test_cached_features_keep_to_their_memory(make):
    """The limit in bytes holds, the oldest entry is dropped first, logits and gradients stay the same."""
    # 4 tokens, 32 wide, 4 bytes: there is room for one picture.
    size = 4 * 32 * 4
    plain = make("gemma3")
    small = make("gemma3", vision_cache_mb=1.5 * size / 2**20)
    prompts = [small.encode(ask("a page"), [picture(i)]) for i in range(6)]
    calls = count_looks(small)
    grads = []
    for vlm in (plain, small):
        inputs, P, _, _ = vlm.collate(prompts, [[9, 8]] * 6)
        logits, _ = vlm(inputs, P, 2)
        logits[..., ~vlm.banned].sum().backward()
        adapters = vlm.adapter_tensors().values()
        grads.append(torch.cat([param.grad.flatten() for param in adapters]))
    assert (grads[0] - grads[1]).norm() < TOLERANCE * grads[0].norm()
    assert len(calls) == 6
    cache = small.features.cache
    assert len(cache) == 1
    assert cache.bytes == size <= cache.limit
    small.generate(prompts[-1:], 2)
    small.generate(prompts[:1], 2)
    assert len(calls) == 7


# -- tiny SmolVLM, gradient checkpointing -------------------------------------------------------------------

def test_the_tiny_smolvlm(tmp_path):
    """It is a complete folder with about as many weights as the tiny LLaVA.

    A picture of 80 x 80 is 25 tokens, and neither resized nor cut.
    """
    torch.manual_seed(0)
    for part in smolvlm(families.TEXTS):
        part.save_pretrained(tmp_path)
    vlm = model.VLM(*model.load_model(str(tmp_path), device="cpu"))
    image = picture(0).resize((80, 80))
    prompt = vlm.encode(ask("a page"), [image])
    pixels = torch.tensor(list(image.tobytes())).view(80, 80, 3).permute(2, 0, 1)
    assert torch.allclose(prompt["pixel_values"][0, 0], pixels / 127.5 - 1, atol=TOLERANCE)
    assert prompt["pixel_attention_mask"].all()
    image_token = model.find_image_token(vlm.net, vlm.processor)
    assert int((prompt["input_ids"] == image_token).sum()) == 25
    assert count_weights(vlm.net) < 1.4e6
    assert vlm.tokenizer.convert_ids_to_tokens(vlm.eos) == "<end_of_utterance>"
    assert len(vlm.tokenizer) == vlm.vocab_size
    prompts, replies, logps = rolled(vlm, [prompt])
    logits = replay(vlm, prompts, replies)
    assert gap(log_probabilities(logits[0], replies[0]), logps[0]) < TOLERANCE

def test_checkpointing_is_asked_for_by_the_librarys_present_name(folder, monkeypatch):
    """The former name warns that it will go; where it is the only one (transformers 5.17) it is used."""
    keys = [f"--model={folder('scratch')}", "--grad_checkpointing=True", "--device=cpu"]
    cfg = configure(TRAIN, keys, quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net, _ = model.load_base(cfg)
    assert any(getattr(module, "gradient_checkpointing", False) for module in net.modules())

    requests = []

    def former(self, gradient_checkpointing_kwargs=None, every_n_layers=1):
        requests.append(gradient_checkpointing_kwargs)

    monkeypatch.delattr(PreTrainedModel, "activation_checkpointing_enable", raising=False)
    monkeypatch.setattr(PreTrainedModel, "gradient_checkpointing_enable", former)
    model.load_base(cfg)
    assert requests == [dict(use_reentrant=False)]


# -- LoRA ---------------------------------------------------------------------------------------------------

def linear_layers(net):
    """List the paths of all linear layers."""
    return [path for path, module in net.named_modules() if isinstance(module, torch.nn.Linear)]

@every_family
def test_lora_is_on_the_language_model_only(make, family):
    """LoRA is on each linear layer that the language model has when it is built alone, and nowhere else.

    The vision tower, the Q-Former and the projector have none; all but LoRA is frozen.
    """
    vlm = make(family, fresh=True)
    prefix = OTHER_LANGUAGE_PATHS.get(family, LANGUAGE_PATH)
    alone = AutoModel.from_config(vlm.net.config.text_config)
    assert set(vlm.lora) == {prefix + path for path in linear_layers(alone)}
    assert len(vlm.lora) == (12 if family == "blip2" else 14)
    others = set(linear_layers(vlm.net)) - set(vlm.lora)
    assert any("vision" in path or "visual" in path for path in others)
    adapters = {id(param) for param in vlm.adapter_tensors().values()}
    trained = {id(param) for param in vlm.net.parameters() if param.requires_grad}
    assert trained == adapters
    assert len(adapters) == 2 * len(vlm.lora)
    assert len(make(family, lora_targets=r".*\.(q|v)_proj").lora) == 4
    refuses("nothing_like_it", lambda: make(family, lora_targets="nothing_like_it"))

@every_family
def test_reference_is_the_base(make, folder, family):
    """Fresh adapters change nothing; trained ones are W + alpha / r * B A.

    `reference` gives the base policy back, exactly and only within it.
    """
    net, _ = model.load_model(folder(family), device="cpu")

    @torch.no_grad()
    def policy_and_base(vlm):
        inputs, P, _, _ = vlm.collate(encoded(vlm), [[vlm.eos]] * 3)
        logits, _ = vlm(inputs, P, 1)
        base = net(**inputs).logits[:, P - 1 : P]
        return logits[..., ~vlm.banned], base[..., ~vlm.banned]

    fresh, base = policy_and_base(make(family, fresh=True))
    assert gap(fresh, base) < TOLERANCE
    vlm = make(family)
    trained, _ = policy_and_base(vlm)
    with vlm.reference():
        reference, _ = policy_and_base(vlm)
    assert torch.equal(reference, fresh)
    again, _ = policy_and_base(vlm)
    assert torch.equal(again, trained)
    assert gap(trained, base) > 100 * TOLERANCE

    with torch.no_grad():
        for path, layer in vlm.lora.items():
            net.get_submodule(path).weight += 8 / 4 * layer.lora_B @ layer.lora_A
    trained, merged = policy_and_base(vlm)
    assert gap(trained, merged) < TOLERANCE

@every_family
def test_one_step_moves_adapters_and_heads(make, family):
    """After one update of the whole loss every adapter and every head has moved, and nothing else."""
    vlm = make(family).train()
    prompts, replies, _ = rolled(vlm)
    before = {key: tensor.clone() for key, tensor in vlm.state_dict().items()}
    inputs, P, ids, mask = vlm.collate(prompts, replies)
    batch = dict(
        inputs=inputs,
        P=P,
        reply_ids=ids,
        mask=mask,
        span=mask,
        reward=torch.tensor([1.0, 0.0, -1.0]),
        terminated=torch.tensor([0.0, 1.0, 1.0]),
        next=torch.tensor([1, -1, -1]),
        chain=2,
        return_to_go=torch.tensor([1.0, 0.0, -1.0]),
        ep_return=torch.tensor([1.0, 1.0, -1.0]),
    )
    trained = [param for param in vlm.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    loss, _ = compute_loss(vlm, batch, settings())
    loss.backward()
    optimizer.step()
    after = vlm.state_dict()
    assert after.keys() == before.keys()
    for key in before:
        is_trained = ".lora_" in key or key.startswith("heads.")
        has_moved = not torch.equal(after[key], before[key])
        assert has_moved == is_trained, key


# -- Q heads ------------------------------------------------------------------------------------------------

@every_family
@pytest.mark.parametrize("kind", ["full", "tied"])
def test_q_starts_as_a_constant(make, family, kind):
    """Q of every token in every state is q_init, bit for bit, from heads and targets."""
    vlm = make(family, fresh=True, q_head=kind, n_critics=2, q_init=-3.25)
    width = vlm.net.get_output_embeddings().weight.shape[1]
    hidden = torch.randn(2, 3, width)
    for target in (False, True):
        q = vlm.q(hidden, target)
        assert q.shape == (2, 2, 3, len(vlm.banned))
        assert (q == -3.25).all()

@pytest.mark.parametrize("width", [0, 200])
def test_tied_head_borrows_the_unembedding(make, width):
    """A tied head has 2 H M parameters and none of vocabulary size, M the wider of H and q_width.

    The unembedding is not among them and gets no gradient through Q, but Q depends on it.
    """
    vlm = make(q_head="tied", lora_r=0, q_width=width)
    unembedding = vlm.net.get_output_embeddings().weight
    V, H = unembedding.shape
    M = max(H, width)
    own = list(vlm.heads.parameters())
    assert count_weights(vlm.heads) == 2 * H * M + 2 * H + M + 1
    assert not any(V in param.shape for param in own)
    assert not any(param is unembedding for param in [*own, *vlm.targets.parameters()])
    assert unembedding.requires_grad
    hidden = torch.randn(2, 3, H)
    q = vlm.q(hidden)
    q.square().sum().backward()
    assert unembedding.grad is None
    assert all(param.grad is not None for param in own)
    with torch.no_grad():
        unembedding *= 2
        assert not torch.allclose(vlm.q(hidden), q)
    full = make(q_head="full", q_width=width).heads
    assert count_weights(full) == H * M + 2 * H + M + M * V + V

@pytest.mark.parametrize("kind", ["full", "tied"])
def test_target_is_a_moving_average(make, kind):
    """theta' <- (1 - tau) theta' + tau theta: the heads stay, the targets take no gradient."""
    vlm = make(q_head=kind)
    old_targets = [param.clone() for param in vlm.targets.parameters()]
    old_heads = [param.clone() for param in vlm.heads.parameters()]
    vlm.update_target(0.1)
    for new, old, head in zip(vlm.targets.parameters(), old_targets, old_heads):
        assert torch.allclose(new, 0.9 * old + 0.1 * head, rtol=TOLERANCE, atol=1e-6)
        assert not torch.equal(new, old)
        assert not new.requires_grad
    for new, old in zip(vlm.heads.parameters(), old_heads):
        assert torch.equal(new, old)
    vlm.update_target(1.0)
    for target, head in zip(vlm.targets.parameters(), vlm.heads.parameters()):
        assert torch.equal(target, head)


# -- files --------------------------------------------------------------------------------------------------

SAVED_SETTINGS = [
    dict(q_head="full"),
    dict(q_head="tied", n_critics=2),
    dict(n_critics=0),
    dict(lora_r=0),
]

@every_family
@pytest.mark.parametrize("changes", SAVED_SETTINGS, ids=str)
def test_save_and_load(make, tmp_path, family, changes):
    """What was saved comes back bit for bit into a model with other random numbers."""
    vlm = make(family, **changes)
    other = make(family, fresh=True, **changes)
    if not vlm.lora:
        with torch.no_grad():
            for param in vlm.net.parameters():
                param.add_(torch.randn_like(param), alpha=0.1)
    vlm.save(tmp_path)
    other.load(tmp_path)
    expected = vlm.state_dict()
    found = other.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    prompts = encoded(vlm)
    assert other.generate(prompts, 4, temperature=0) == vlm.generate(prompts, 4, temperature=0)

def test_adapter_is_in_pefts_layout(make, tmp_path):
    """Names, shapes, metadata and config are as PEFT writes them."""
    vlm = make(name="some/model")
    vlm.save(tmp_path)
    # {name: (outputs, inputs)}
    leaves = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (64, 64),
        "self_attn.v_proj": (64, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (192, 64),
        "mlp.up_proj": (192, 64),
        "mlp.down_proj": (64, 192),
    }
    paths = []
    expected = {}
    for n in (0, 1):
        for leaf, (outputs, inputs) in leaves.items():
            path = f"model.language_model.layers.{n}.{leaf}"
            paths.append(path)
            expected[f"base_model.model.{path}.lora_A.weight"] = (4, inputs)
            expected[f"base_model.model.{path}.lora_B.weight"] = (outputs, 4)
    file = tmp_path / "adapter_model.safetensors"
    assert {key: tuple(tensor.shape) for key, tensor in load_file(file).items()} == expected
    with safe_open(file, "pt") as f:
        assert f.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config.pop("target_modules")) == sorted(paths)
    assert config == dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        bias="none",
        inference_mode=True,
        base_model_name_or_path="some/model",
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
    )

def test_a_foreign_adapter_is_refused(make, tmp_path):
    """Another rank, another head, a renamed, damaged or missing file: one sentence, and nothing is loaded."""
    make().save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    critics = tmp_path / "q_head.safetensors"
    refuses(file, lambda: make(lora_r=2).load(tmp_path))
    refuses(file, lambda: make(lora_targets=".*q_proj").load(tmp_path))
    refuses(file, lambda: make("qwen2_vl").load(tmp_path))
    refuses(tmp_path / "adapter_config.json", lambda: make(lora_alpha=5).load(tmp_path))
    refuses(critics, lambda: make(q_head="tied").load(tmp_path))
    refuses(critics, lambda: make(n_critics=2).load(tmp_path))
    tensors = load_file(file)
    renamed = {key.replace("language_model", "text_model"): tensor for key, tensor in tensors.items()}
    save_file(renamed, file)
    refuses(file, lambda: make().load(tmp_path))
    file.write_bytes(b"torn")
    refuses(file, lambda: make().load(tmp_path))
    refuses(tmp_path / "none", lambda: make().load(tmp_path / "none"))
    refuses(tmp_path / "none", lambda: make(lora_r=0).load(str(tmp_path / "none")))

def test_an_old_run_has_its_own_alpha(make, folder, tmp_path):
    """lora_alpha was a key once: the adapter of an old run loads with the value in the run's config."""
    make(q_head="tied").save(tmp_path)
    keys = [f"--model={folder('scratch')}", "--lora_r=4", "--q_head=tied", "--device=cpu"]
    cfg = configure(TRAIN, keys, quiet=True)
    cfg.q_width = 0
    refuses(tmp_path / "adapter_config.json", lambda: model.build(cfg).load(tmp_path))
    cfg.lora_alpha = 8
    vlm = model.build(cfg)
    vlm.load(tmp_path)
    assert all(layer.scale == 8 / 4 for layer in vlm.lora.values())

@every_family
def test_a_bad_model_is_refused(folder, tmp_path, family):
    """A folder with a file missing or damaged is refused in one sentence with its path."""
    for name in ("config.json", "model.safetensors", "processor_config.json", "tokenizer.json"):
        missing = tmp_path / f"{name}-missing"
        shutil.copytree(folder(family), missing)
        (missing / name).unlink()
        refuses(missing, lambda: model.load_model(str(missing)))
        torn = tmp_path / f"{name}-torn"
        shutil.copytree(folder(family), torn)
        content = (torn / name).read_bytes()
        (torn / name).write_bytes(content[: len(content) // 2])
        refuses(torn, lambda: model.load_model(str(torn)))

def edit_config(folder, **changes):
    """Change settings in the config.json of a model folder."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | changes))

def test_an_encoder_decoder_is_refused(tmp_path):
    """BLIP-2 and InstructBLIP also come with a T5, which does not read prompt and reply as one sequence.

    It is refused before the weights are read.
    """
    families.build("blip2", tmp_path)
    edit_config(tmp_path, text_config=dict(model_type="t5"))
    with pytest.raises(SystemExit, match="encoder-decoder"):
        model.load_model(str(tmp_path))
    refuses(tmp_path, lambda: model.load_model(str(tmp_path)))

def test_no_model_or_another_kind(folder, tmp_path):
    """No folder, a language model, a processor that knows no pictures, weights of another size."""
    nothing = tmp_path / "nothing"
    refuses(nothing, lambda: model.load_model(str(nothing)))
    refuses(tmp_path, lambda: model.load_model(str(tmp_path)))

    llama = tmp_path / "llama"
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **families.TEXT)).save_pretrained(llama)
    refuses(llama, lambda: model.load_model(str(llama)))

    blind = tmp_path / "blind"
    net, processor = model.load_model(folder("scratch"))
    net.save_pretrained(blind)
    processor.tokenizer.save_pretrained(blind)
    refuses(blind, lambda: model.load_model(str(blind)))

    narrow = tmp_path / "narrow"
    families.build("scratch", narrow)
    edit_config(narrow, text_config=dict(net.config.text_config.to_dict(), hidden_size=32))
    refuses(narrow, lambda: model.load_model(str(narrow)))

def test_each_column_of_the_conformance_table_is_a_test():
    """A test that is renamed would leave its column empty."""
    other_tests = Path(__file__).with_name("extra_formats.py").read_text()
    for name in conformance.PROPERTIES:
        assert name in globals() or f"def {name}(" in other_tests
