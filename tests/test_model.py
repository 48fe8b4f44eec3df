"""What the network promises, for the tiny LLaVA and for small random models of other families alike."""
import copy, functools, json, os, shutil, warnings

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, GenerationConfig, LlamaConfig, LlamaForCausalLM

import conformance, families, model, train
from agent_rl import compute_loss
from configurator import configure
from pretrain import tiny_nets as scratch
from test_agent_rl import settings

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor and NumPy 2
END = dict(scratch="<|end|>", llava="</s>", llava_next="</s>", llava_onevision="<|im_end|>", qwen2_vl="<|im_end|>", qwen2_5_vl="<|im_end|>", qwen3_vl="<|im_end|>",
           idefics3="<end_of_utterance>", smolvlm="<end_of_utterance>", paligemma="<eos>", gemma3="<end_of_turn>", internvl="<|im_end|>", blip2="</s>", instructblip="</s>")
LANGUAGE = dict.fromkeys(families.FAMILIES, "model.language_model.") | dict.fromkeys(("idefics3", "smolvlm"), "model.text_model.") | dict.fromkeys(("blip2", "instructblip"), "language_model.model.")
PLAIN = dict(paligemma="<image>" * 4 + "<bos>USER: a page ASSISTANT:\n", blip2="<image>" * 4 + "<s>USER: a page ASSISTANT:", instructblip="<image>" * 4 + "<s>USER: a page ASSISTANT:")
PAGES = ["3 + 4 = ?", "Possible actions: + - stop. State the action of this card, as JSON.", "é"]
every_family = pytest.mark.parametrize("family", families.FAMILIES)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """family -> its model folder, built once."""
    return functools.cache(lambda family: families.build(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="session")
def opened(folder):
    """family -> (net, processor), opened once."""
    return functools.cache(lambda family: model.load_model(folder(family)))


@pytest.fixture
def make(folder, opened):
    """make(family, ...) -> a VLM of what the family's folder holds; all that it adds is random unless fresh=True."""
    def make(family="scratch", fresh=False, **settings):
        torch.manual_seed(0)
        net, processor = opened(family)
        vlm = model.VLM(copy.deepcopy(net), processor, **dict(lora_r=4, lora_alpha=8, name=folder(family)) | settings)
        if not fresh:
            with torch.no_grad():
                for p in [m.lora_B for m in vlm.lora.values()] + [*vlm.heads.parameters(), *vlm.targets.parameters()]:
                    p.normal_(std=0.3)
        return vlm.eval()
    return make


def ask(text, pictures=1):
    return [{"role": "user", "content": [{"type": "image", "text": None}] * pictures + [{"type": "text", "text": text}]}]


def picture(i):
    """Noise; each i has a size of its own."""
    size = (32 + 16 * (i % 2), 32)
    return Image.frombytes("RGB", size, bytes(torch.randint(256, (size[0] * size[1] * 3,), generator=torch.Generator().manual_seed(i)).tolist()))


def encoded(vlm, pages=PAGES):
    return [vlm.encode(ask(text), [picture(i)]) for i, text in enumerate(pages)]


def librarys_inputs(vlm, text, image):
    """What transformers itself makes of a picture and a question: by the chat template, else by the processor from our plain prompt."""
    if vlm.processor.chat_template:
        chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        return dict(vlm.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"))
    inputs = dict(vlm.processor(text=[vlm.render(ask(text))], images=[[image]], return_tensors="pt"))
    inputs.pop("labels", None)
    return inputs


def rolled(vlm, prompts=None, **how):
    """Prompts of different lengths, sampled replies cut to different lengths, their log-probabilities."""
    prompts = prompts or encoded(vlm)
    ids, logps = vlm.generate(prompts, 7, generator=torch.Generator().manual_seed(1), **how)
    return prompts, [r[:7 - 2 * b] for b, r in enumerate(ids)], [r[:7 - 2 * b] for b, r in enumerate(logps)]


def refuses(path, action):
    """SystemExit with one line that names the path."""
    with pytest.raises(SystemExit) as error:
        action()
    assert str(path) in str(error.value) and "\n" not in str(error.value) and str(error.value).endswith(".")

# -------------------------------------------------------------------------------------------------------------- forward

@every_family
def test_logits_are_the_librarys(make, family):
    """Cutting the hidden state before the unembedding gives what the library's full forward gives at the reply's positions."""
    vlm = make(family)
    prompts, replies, _ = rolled(vlm)
    inputs, P, reply_ids, mask = vlm.collate(prompts, replies)
    R = reply_ids.shape[1]
    with torch.no_grad():
        logits, hidden = vlm(inputs, P, R)
        full = vlm.net(**inputs).logits[:, P - 1:P + R - 1]
    assert logits.shape == full.shape == (3, R, len(vlm.banned)) and hidden.shape[:2] == (3, R)
    assert (logits - full)[..., ~vlm.banned].abs().max() < 1e-5
    assert logits.softmax(-1)[..., vlm.banned].max() == 0


@every_family
def test_left_padding_changes_nothing(make, family):
    """A row alone, and beside longer rows: the same logits and the same greedy reply."""
    vlm = make(family)
    prompts, replies, _ = rolled(vlm)
    both, _ = vlm.generate(prompts, 6, temperature=0)
    with torch.no_grad():
        inputs, P, ids, _ = vlm.collate(prompts, replies)
        together, _ = vlm(inputs, P, ids.shape[1])
        for b in range(3):
            inputs, P, ids, _ = vlm.collate(prompts[b:b + 1], replies[b:b + 1])
            alone, _ = vlm(inputs, P, ids.shape[1])
            assert (alone[0] - together[b, :ids.shape[1]])[:len(replies[b])].abs().max() < 1e-4
            assert vlm.generate(prompts[b:b + 1], 6, temperature=0)[0][0] == both[b]


@every_family
def test_two_pictures_in_one_prompt(make, record_property, family):
    """Both are seen, and beside prompts with one picture each row stays as it is alone. A processor that knows one picture refuses two:
    BLIP-2 once read the first of them only, and gave the second to the next row of the batch."""
    vlm = make(family)
    two = lambda i, j: vlm.encode(ask("a page", 2), [picture(i), picture(j)])
    if family in families.ONE_PICTURE:
        record_property("known", "no")
        return refuses(vlm.name, lambda: two(0, 1))
    prompts, replies, kept = rolled(vlm, [two(0, 1), *encoded(vlm, PAGES[:1]), two(0, 3), two(5, 1)])
    replies = [replies[0]] + replies[1:2] + [replies[0]] * 2
    with torch.no_grad():
        inputs, P, ids, _ = vlm.collate(prompts, replies)
        together, _ = vlm(inputs, P, ids.shape[1])
        for b in range(4):
            inputs, P, ids, _ = vlm.collate(prompts[b:b + 1], replies[b:b + 1])
            alone = vlm(inputs, P, ids.shape[1])[0][0, :len(replies[b])].log_softmax(-1)
            assert (alone - together[b, :len(replies[b])].log_softmax(-1)).abs().max() < 1e-4
            if b < 2:
                assert (alone.gather(1, torch.tensor(replies[b])[:, None])[:, 0] - torch.tensor(kept[b])).abs().max() < 1e-4
    assert (together[0] - together[2]).abs().max() > 1e-4 and (together[0] - together[3]).abs().max() > 1e-4


@every_family
def test_rows_without_a_picture(make, family):
    """Beside rows with one they stay as they are alone. A batch that began with such a row once lost the pictures of all others, in silence.
    The Q-Formers and PaliGemma want a picture in every prompt, and say so."""
    vlm = make(family)
    if family in (*families.ONE_PICTURE, "paligemma"):
        return refuses(vlm.name, lambda: vlm.encode(ask("a page", 0), []))
    plain = vlm.encode(ask("a page", 0), [])
    prompts, replies = [plain, *encoded(vlm, PAGES[:1]), plain], [vlm.reply_ids("+")] * 3
    with torch.no_grad():
        inputs, P, ids, _ = vlm.collate(prompts, replies)
        together, _ = vlm(inputs, P, ids.shape[1])
        for b in range(2):
            inputs, P, ids, _ = vlm.collate(prompts[b:b + 1], replies[b:b + 1])
            assert (vlm(inputs, P, ids.shape[1])[0][0, :2] - together[b, :2]).abs().max() < 1e-4


@every_family
def test_picture_and_text_are_seen(make, family):
    """Another picture or another page: other logits."""
    vlm = make(family)
    prompts = [vlm.encode(ask("State the action"), [picture(0)]), vlm.encode(ask("State the action"), [picture(2)]), vlm.encode(ask("State the card"), [picture(0)])]
    inputs, P, _, _ = vlm.collate(prompts, [[vlm.eos]] * 3)
    with torch.no_grad():
        logits, _ = vlm(inputs, P, 1)
    assert (logits[0] - logits[1]).abs().max() > 1e-4 and (logits[0] - logits[2]).abs().max() > 1e-4

# ------------------------------------------------------------------------------------------------------------- generate

@every_family
def test_greedy_is_the_librarys(make, family):
    """Temperature 0 in a padded batch = the library's own greedy decoding of each prompt alone, banned tokens suppressed."""
    vlm = make(family)
    ours, _ = vlm.generate(encoded(vlm), 6, temperature=0)
    for i, text in enumerate(PAGES):
        out = vlm.net.generate(**librarys_inputs(vlm, text, picture(i)), generation_config=GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=vlm.eos, pad_token_id=0,
                                                                            suppress_tokens=vlm.banned.nonzero()[:, 0].tolist()))
        assert out[0].tolist()[-len(ours[i]):] == ours[i]


@every_family
def test_rollout_agrees_with_training(make, family):
    """Log-probabilities kept while sampling = those of the training path for the same ids, dropout configured or not.
    In training mode too: a Q-Former's and OPT's own dropout of 0.1 once made the policy that learned another than the one that had played."""
    vlm = make(family, lora_dropout=0.5).train()
    prompts, replies, kept = rolled(vlm)
    assert vlm.training
    for m in vlm.lora.values():
        m.dropout = 0.0
    inputs, P, ids, mask = vlm.collate(prompts, replies)
    with torch.no_grad():
        logp = vlm(inputs, P, ids.shape[1])[0].log_softmax(-1).gather(2, ids[..., None])[..., 0]
    for b, reply in enumerate(replies):
        assert mask[b].tolist() == inputs["attention_mask"][b, P:].tolist() == [1] * len(reply) + [0] * (len(mask[b]) - len(reply))
        assert (logp[b, :len(reply)] - torch.tensor(kept[b])).abs().max() < 1e-4


@every_family
def test_critic_guides_sampling(make, family):
    """With q_weight the policy is softmax((logits + q_weight * A) / temperature), A of the critics' mean."""
    vlm = make(family, n_critics=2)
    prompts, replies, kept = rolled(vlm, q_weight=2.0, temperature=0.7)
    inputs, P, ids, _ = vlm.collate(prompts, replies)
    with torch.no_grad():
        logits, hidden = vlm(inputs, P, ids.shape[1])
        q = vlm.q(hidden).mean(0)
        advantage = q - (logits.softmax(-1) * q).sum(-1, keepdim=True)
        guided = ((logits + 2 * advantage) / 0.7).log_softmax(-1).gather(2, ids[..., None])[..., 0]
        plain = (logits / 0.7).log_softmax(-1).gather(2, ids[..., None])[..., 0]
    for b, reply in enumerate(replies):
        assert (guided - plain)[b, :len(reply)].abs().max() > 1e-2
        assert (guided[b, :len(reply)] - torch.tensor(kept[b])).abs().max() < 1e-4


def test_sampling_follows_the_policy(make):
    """Frequencies of the first sampled token match its probability; temperature 0 takes the likeliest."""
    vlm = make()
    prompts = encoded(vlm, PAGES[:1]) * 400
    first = torch.tensor(vlm.generate(prompts, 1, generator=torch.Generator().manual_seed(0))[0])[:, 0]
    inputs, P, _, _ = vlm.collate(prompts[:1], [[vlm.eos]])
    with torch.no_grad():
        p = vlm(inputs, P, 1)[0][0, 0].softmax(-1)
    seen = torch.bincount(first, minlength=len(p)) / 400
    assert ((seen - p).abs() < 4 * (p * (1 - p) / 400).sqrt() + 4 / 400).all()
    assert vlm.generate(prompts[:1], 1, temperature=0)[0] == [[int(p.argmax())]]


def test_random_stream_of_its_own(make):
    """A generator's seed decides the samples, and the global stream is left as it was."""
    vlm = make()
    prompts, state = encoded(vlm), torch.get_rng_state()
    play = lambda seed: vlm.generate(prompts, 8, generator=torch.Generator().manual_seed(seed))
    assert play(3) == play(3) and play(3) != play(4)
    assert torch.equal(state, torch.get_rng_state())


@every_family
def test_banned_tokens_are_never_said(make, folder, family):
    """Placeholder, pad and other special tokens are not sampled even if their logit or their Q is huge; the end of the turn is."""
    vlm = make(family, fresh=True)
    with open(os.path.join(folder(family), "tokenizer.json")) as f:
        specials = {token["id"] for token in json.load(f)["added_tokens"] if token["special"]}
    assert set(vlm.banned.nonzero()[:, 0].tolist()) == (specials | set(range(len(vlm.tokenizer), len(vlm.banned)))) - {vlm.eos}
    assert vlm.banned[model.find_image_token(vlm.net, vlm.processor)]
    vlm.net.get_output_embeddings().register_forward_hook(lambda module, args, out: out + 1e4 * vlm.banned)
    vlm.heads[0].bias.data += 1e4 * vlm.banned
    for how in dict(temperature=0), dict(temperature=5.0), dict(q_weight=3.0):
        ids, logps = vlm.generate(encoded(vlm), 8, generator=torch.Generator().manual_seed(0), **how)
        assert not any(vlm.banned[i] for row in ids for i in row) and all(-50 < lp <= 0 for row in logps for lp in row)
    vlm.net.get_output_embeddings().register_forward_hook(lambda module, args, out: out + 1e5 * (torch.arange(len(vlm.banned)) == vlm.eos))
    assert vlm.generate(encoded(vlm), 8)[0] == [[vlm.eos]] * 3

# ----------------------------------------------------------------------------------------------------------------- text

@every_family
def test_prompt_is_the_librarys(make, family):
    """What the library makes of a chat by the family's template, tensor for tensor; without a template our plain prompt, behind the picture: `USER: ... ASSISTANT:`."""
    vlm = make(family)
    ours, theirs = vlm.encode(ask("a page"), [picture(1)]), librarys_inputs(vlm, "a page", picture(1))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert vlm.tokenizer.decode(ours["input_ids"][0]) == PLAIN[family] if family in PLAIN else vlm.processor.chat_template


def test_a_q_formers_words_are_no_tokens_of_the_prompt(make):
    """InstructBLIP's question to its Q-Former, when it happened to be as long as the prompt, was padded and prolonged by the reply like one."""
    vlm = make("instructblip")
    prompt, = encoded(vlm, PAGES[:1])
    longer = prompt["input_ids"].shape[1] - prompt["qformer_input_ids"].shape[1]
    pad = lambda key, value: torch.nn.functional.pad(prompt[key], (0, longer), value=value)
    same = prompt | dict(qformer_input_ids=pad("qformer_input_ids", 0), qformer_attention_mask=pad("qformer_attention_mask", 0))
    assert same["qformer_input_ids"].shape == same["input_ids"].shape
    with torch.no_grad():
        (a, _), (b, _) = (vlm(*vlm.collate([p], [[5, 6]])[:2], 2) for p in (prompt, same))
    assert (a - b)[..., ~vlm.banned].abs().max() < 1e-5
    assert vlm.collate([same], [[5, 6]])[0]["qformer_input_ids"].shape == same["input_ids"].shape


@every_family
def test_page_text_cannot_forge_tokens(make, family):
    """Text with special tokens in it adds none to the prompt: same number of placeholders and control tokens as a harmless page."""
    vlm = make(family)
    special = list(model.special_tokens(vlm.tokenizer)) + [model.find_image_token(vlm.net, vlm.processor)]
    count = lambda text: [(vlm.encode(ask(text), [picture(0)])["input_ids"] == i).sum() for i in special]
    harmless = count("a page")
    assert harmless[-1] > 0
    for token in [*vlm.neutral, "<image>"]:
        for text in token, f"a {token}{token} page", token[:2] + token + token[2:], f"{token}\n{END[family]}":
            assert count(text) == harmless


@every_family
def test_end_of_turn(make, family):
    """It comes from the chat template (Qwen's eos is another token), and from the tokenizer's eos where there is no template."""
    vlm = make(family)
    assert vlm.tokenizer.convert_ids_to_tokens(vlm.eos) == END[family]
    assert not vlm.banned[vlm.eos] and (vlm.eos == vlm.tokenizer.eos_token_id) == ("qwen" not in family and family != "gemma3")


@every_family
def test_stored_ids_are_used(make, family):
    """A recorded tokenisation is kept even if it is not the canonical one or was cut short; another tokenizer's is made anew."""
    vlm, text = make(family), '{"action": "+"}'
    one = lambda t: vlm.tokenizer(t, add_special_tokens=False).input_ids
    own = [i for letter in text for i in one(letter)]
    assert own != one(text) and vlm.reply_ids(text, own + [vlm.eos]) == own + [vlm.eos] and vlm.reply_ids(text, own) == own
    for foreign in None, [], [10 ** 6], one("something else"):
        assert vlm.reply_ids(text, foreign) == one(text) + [vlm.eos] and vlm.decode(vlm.reply_ids(text, foreign)) == text


@every_family
@pytest.mark.parametrize("text", ['{"action": "+"}', "é action: 🙂 stop", "no action"])
def test_span_is_what_stands_behind_the_marker(make, family, text):
    """Marked: exactly the tokens that reach behind the marker, and the end of the turn."""
    vlm = make(family)
    start = text.index("action") + len("action")
    ids = vlm.reply_ids(text)
    span = vlm.span(ids, start)
    first = span.index(1)
    assert span == [0] * first + [1] * (len(ids) - first) and ids[-1] == vlm.eos
    assert len(vlm.decode(ids[:first])) <= start and (first == len(ids) - 1 or len(vlm.decode(ids[:first + 1])) > start)
    assert vlm.decode(ids[first:]).endswith(text[start:].strip())


def test_cache_of_encoded_prompts(make):
    """A hit gives the same tensors without touching the picture; the size is bounded in bytes; the oldest goes first."""
    vlm, drawn = make(cache_mb=0.05), []
    def draw():
        drawn.append(1)
        return picture(0)
    get = lambda key: vlm.encode(ask("a page"), [draw], key=key)
    first = get("a")
    assert get("a") is first and len(drawn) == 1
    fits = int(0.05 * 2 ** 20 // model.nbytes(first))
    for k in range(3 * fits):
        get(k)
        get("a")
        assert vlm._cache.bytes == sum(map(model.nbytes, vlm._cache.values())) <= 0.05 * 2 ** 20
    assert get("a") is first and len(vlm._cache) == fits and len(drawn) == 1 + 3 * fits
    assert get(None) is not get(None)
    small = make(cache_mb=0)
    assert small.encode(ask("a page"), [picture(0)], key="a") is not None and not small._cache and small._cache.bytes == 0

# -------------------------------------------------------------------------------------------------- cached vision features

def looks(vlm):
    """Counts how many pictures' worth of calls the part of the net that looks gets: a list that grows."""
    calls, eyes = [], [m for name, m in vlm.net.named_modules() if name.rpartition(".")[2] in ("vision_tower", "vision_model", "visual") and ".vision" not in name.rpartition(".")[0]]
    eyes[0].register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@every_family
def test_cached_features_give_the_same_logits(make, family):
    """Updates and rollouts, with the features of the frozen vision part from memory: what they are without; each prompt's pictures are looked at once, by whatever text they come with."""
    plain, vlm = make(family), make(family, vision_cache_mb=8)
    two = () if family in families.ONE_PICTURE else (([picture(0), picture(3)], ask("a page", 2)),)
    pages = [([picture(i)], ask(text)) for i, text in enumerate(PAGES)] + [*two]
    prompts = [vlm.encode(messages, images) for images, messages in pages]
    _, replies, _ = rolled(plain, prompts)
    calls = looks(vlm)
    with torch.no_grad():
        for _ in range(2):
            inputs, P, ids, _ = vlm.collate(prompts, replies)
            cached, usual = vlm(inputs, P, ids.shape[1])[0], plain(model.Inputs(inputs), P, ids.shape[1])[0]
            assert (cached - usual)[..., ~vlm.banned].abs().max() < 1e-4 and len(calls) == len(prompts)
    again = [vlm.encode(ask("another text"), [picture(0)]), *prompts[1:]]
    played = [m.generate(again, 5, temperature=0) for m in (plain, vlm)]
    assert played[0][0] == played[1][0] and all(abs(a - b) < 1e-4 for x, y in zip(played[0][1], played[1][1]) for a, b in zip(x, y))
    assert len(calls) == len(prompts) + (family in families.ONE_PICTURE)     # BLIP-2's own generate looks for itself; InstructBLIP's eyes have read the text, and it is another one
    assert len(vlm._features) == len(prompts) + (family == "instructblip") and vlm._features.bytes == sum(map(model.nbytes, vlm._features.values()))


def test_cached_features_keep_to_their_memory(make):
    """The limit in bytes holds, the oldest goes first, and logits do not notice; a learner's gradient is what it is without."""
    plain, small = make("gemma3"), make("gemma3", vision_cache_mb=1.5 * 4 * 32 * 4 / 2 ** 20)    # room for one: 4 tokens, 32 wide, 4 bytes
    prompts = [small.encode(ask("a page"), [picture(i)]) for i in range(6)]
    calls, grads = looks(small), []
    for vlm in (plain, small):
        inputs, P, ids, _ = vlm.collate(prompts, [[9, 8]] * 6)
        vlm(inputs, P, 2)[0][..., ~vlm.banned].sum().backward()
        grads.append(torch.cat([p.grad.flatten() for m in vlm.lora.values() for p in (m.lora_A, m.lora_B)]))
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[0].norm() and len(calls) == 6
    assert len(small._features) == 1 and small._features.bytes == 4 * 32 * 4 <= small._features.limit
    small.generate(prompts[-1:], 2), small.generate(prompts[:1], 2)
    assert len(calls) == 7


def test_the_tiny_smolvlm(tmp_path):
    """A complete folder; a picture of 80 x 80 is 25 tokens, and neither resized nor cut; about as many weights as the tiny LLaVA."""
    torch.manual_seed(0)
    for part in scratch.smolvlm(families.TEXTS):
        part.save_pretrained(tmp_path)
    vlm = model.VLM(*model.load_model(str(tmp_path)), lora_r=0)
    image = picture(0).resize((80, 80))
    enc = vlm.encode(ask("a page"), [image])
    assert torch.allclose(enc["pixel_values"][0, 0], torch.tensor(list(image.tobytes())).view(80, 80, 3).permute(2, 0, 1) / 127.5 - 1, atol=1e-5) and enc["pixel_attention_mask"].all()
    assert int((enc["input_ids"] == model.find_image_token(vlm.net, vlm.processor)).sum()) == 25 and sum(p.numel() for p in vlm.net.parameters()) < 1.4e6
    assert vlm.tokenizer.convert_ids_to_tokens(vlm.eos) == "<end_of_utterance>" and len(vlm.tokenizer) == vlm.vocab_size
    prompts, replies, kept = rolled(vlm, [enc])
    inputs, P, ids, _ = vlm.collate(prompts, replies)
    assert (vlm(inputs, P, ids.shape[1])[0][0, :len(replies[0])].log_softmax(-1).gather(1, torch.tensor(replies[0])[:, None])[:, 0] - torch.tensor(kept[0])).abs().max() < 1e-4


def test_checkpointing_is_asked_for_by_the_librarys_present_name(folder, monkeypatch):
    """Its former name warns that it will go; where there is no other (transformers 5.17) it is used."""
    from transformers import PreTrainedModel
    cfg, asked = configure(train.__file__, [f"--model={folder('scratch')}", "--grad_checkpointing=True", "--device=cpu"], quiet=True), []
    on = lambda net: any(getattr(m, "gradient_checkpointing", False) for m in net.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert on(model.load_base(cfg)[0])
    monkeypatch.delattr(PreTrainedModel, "activation_checkpointing_enable", raising=False)
    monkeypatch.setattr(PreTrainedModel, "gradient_checkpointing_enable", lambda self, gradient_checkpointing_kwargs=None, every_n_layers=1: asked.append(gradient_checkpointing_kwargs))
    model.load_base(cfg)
    assert asked == [dict(use_reentrant=False)]

# ----------------------------------------------------------------------------------------------------------------- LoRA

@every_family
def test_lora_is_on_the_language_model_only(make, family):
    """On each linear layer that the language model has when it is built alone, and on none of the vision tower's, Q-Former's or projector's; everything else is frozen."""
    vlm = make(family, fresh=True)
    alone = AutoModel.from_config(vlm.net.config.text_config)
    assert set(vlm.lora) == {LANGUAGE[family] + path for path, m in alone.named_modules() if isinstance(m, torch.nn.Linear)}
    others = [path for path, m in vlm.net.named_modules() if isinstance(m, torch.nn.Linear) and path not in vlm.lora]
    assert len(vlm.lora) == (12 if family == "blip2" else 14) and any("vision" in path or "visual" in path for path in others)
    adapters = {id(p) for m in vlm.lora.values() for p in (m.lora_A, m.lora_B)}
    assert {id(p) for p in vlm.net.parameters() if p.requires_grad} == adapters
    assert len(make(family, lora_targets=r".*\.(q|v)_proj").lora) == 4
    refuses("nothing_like_it", lambda: make(family, lora_targets="nothing_like_it"))


@every_family
def test_reference_is_the_base(make, folder, family):
    """Fresh adapters change nothing; trained ones are W + alpha / r * B A; `reference` gives the base policy back, exactly and only within it."""
    net, _ = model.load_model(folder(family))
    def logits(vlm):
        inputs, P, _, _ = vlm.collate(encoded(vlm), [[vlm.eos]] * 3)
        with torch.no_grad():
            return vlm(inputs, P, 1)[0], net(**inputs).logits[:, P - 1:P].masked_fill(vlm.banned, -1e9)
    ours, base = logits(make(family, fresh=True))
    assert (ours - base).abs().max() < 1e-6
    fresh, vlm = ours, make(family)
    load_run, _ = logits(vlm)
    with vlm.reference():
        assert torch.equal(logits(vlm)[0], fresh)
    assert torch.equal(logits(vlm)[0], load_run) and (load_run - base).abs().max() > 1e-2
    with torch.no_grad():
        for path, m in vlm.lora.items():
            net.get_submodule(path).weight += 8 / 4 * m.lora_B @ m.lora_A
    ours, merged = logits(vlm)
    assert (ours - merged).abs().max() < 1e-4


@every_family
def test_one_step_moves_adapters_and_heads(make, family):
    """After one update of the whole loss, as train.py makes it, every adapter and every head has moved, nothing else has."""
    vlm = make(family).train()
    prompts, replies, _ = rolled(vlm)
    before = {k: v.clone() for k, v in vlm.state_dict().items()}
    inputs, P, ids, mask = vlm.collate(prompts, replies)
    of = lambda *values: torch.tensor(values)
    batch = dict(inputs=inputs, P=P, reply_ids=ids, mask=mask, span=mask, reward=of(1., 0., -1.), terminated=of(0., 1., 1.), next=of(1, -1, -1), return_to_go=of(1., 0., -1.), ep_return=of(1., 1., -1.))
    optimizer = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    loss, _ = compute_loss(vlm, batch, settings())
    loss.backward()
    optimizer.step()
    moved = {k for k, v in vlm.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if ".lora_" in k or k.startswith("heads.")}

# -------------------------------------------------------------------------------------------------------------- Q heads

@every_family
@pytest.mark.parametrize("kind", ["full", "tied"])
def test_q_starts_as_a_constant(make, family, kind):
    """Q of every token in every state is q_init, bit for bit, from heads and targets."""
    vlm = make(family, fresh=True, q_head=kind, n_critics=2, q_init=-3.25)
    hidden = torch.randn(2, 3, vlm.net.get_output_embeddings().weight.shape[1])
    for target in False, True:
        q = vlm.q(hidden, target)
        assert q.shape == (2, 2, 3, len(vlm.banned)) and (q == -3.25).all()


def test_tied_head_borrows_the_unembedding(make):
    """2 H^2 parameters and none of vocabulary size; the unembedding is not among them and gets no gradient through Q, but it counts."""
    vlm = make(q_head="tied", lora_r=0)
    unembed, own = vlm.net.get_output_embeddings().weight, list(vlm.heads.parameters())
    V, H = unembed.shape
    assert sum(p.numel() for p in own) == 2 * H * H + 3 * H + 1 and not any(V in p.shape for p in own)
    assert not any(p is unembed for p in own + list(vlm.targets.parameters())) and unembed.requires_grad
    hidden = torch.randn(2, 3, H)
    q = vlm.q(hidden)
    q.square().sum().backward()
    assert unembed.grad is None and all(p.grad is not None for p in own)
    with torch.no_grad():
        unembed *= 2
        assert not torch.allclose(vlm.q(hidden), q)
    assert sum(p.numel() for p in make(q_head="full").heads.parameters()) == H * H + 3 * H + H * V + V


@pytest.mark.parametrize("kind", ["full", "tied"])
def test_target_is_a_moving_average(make, kind):
    """theta' <- (1 - tau) theta' + tau theta, the heads stay, the targets take no gradient."""
    vlm = make(q_head=kind)
    old, new = [p.clone() for p in vlm.targets.parameters()], [p.clone() for p in vlm.heads.parameters()]
    vlm.update_target(0.1)
    for slow, a, fast, b in zip(vlm.targets.parameters(), old, vlm.heads.parameters(), new):
        assert torch.allclose(slow, 0.9 * a + 0.1 * b, atol=1e-6) and torch.equal(fast, b) and not slow.requires_grad and not torch.equal(slow, a)
    vlm.update_target(1.0)
    assert all(torch.equal(s, f) for s, f in zip(vlm.targets.parameters(), vlm.heads.parameters()))

# ---------------------------------------------------------------------------------------------------------------- files

@every_family
@pytest.mark.parametrize("settings", [dict(q_head="full"), dict(q_head="tied", n_critics=2), dict(n_critics=0), dict(lora_r=0)], ids=str)
def test_save_and_load(make, tmp_path, family, settings):
    """What was saved comes back bit for bit into a model with other random numbers."""
    vlm, other = make(family, **settings), make(family, fresh=True, **settings)
    if not vlm.lora:
        with torch.no_grad():
            for p in vlm.net.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
    vlm.save(tmp_path)
    other.load(tmp_path)
    ours, theirs = vlm.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert other.generate(encoded(other), 4, temperature=0) == vlm.generate(encoded(vlm), 4, temperature=0)


def test_adapter_is_in_pefts_layout(make, tmp_path):
    """Names, shapes, metadata and config as PEFT writes them."""
    vlm = make(name="some/model", lora_dropout=0.05)
    vlm.save(tmp_path)
    leaves = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 64), "self_attn.v_proj": (64, 64), "self_attn.o_proj": (64, 64),
              "mlp.gate_proj": (192, 64), "mlp.up_proj": (192, 64), "mlp.down_proj": (64, 192)}
    paths = {f"model.language_model.layers.{n}.{leaf}": shape for n in (0, 1) for leaf, shape in leaves.items()}
    expected = {f"base_model.model.{p}.lora_A.weight": (4, i) for p, (o, i) in paths.items()} | {f"base_model.model.{p}.lora_B.weight": (o, 4) for p, (o, i) in paths.items()}
    assert {k: tuple(v.shape) for k, v in load_file(tmp_path / "adapter_model.safetensors").items()} == expected
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config.pop("target_modules")) == sorted(paths)
    assert config == dict(peft_type="LORA", task_type="CAUSAL_LM", bias="none", inference_mode=True, base_model_name_or_path="some/model", r=4, lora_alpha=8, lora_dropout=0.05)


def test_a_foreign_adapter_is_refused(make, tmp_path):
    """Another rank, another head, a renamed, lacking, torn or missing tensor file: one sentence, and nothing is half loaded in silence."""
    make().save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    refuses(file, lambda: make(lora_r=2).load(tmp_path))
    refuses(file, lambda: make(lora_targets=".*q_proj").load(tmp_path))
    refuses(file, lambda: make("qwen2_vl").load(tmp_path))
    refuses(tmp_path / "adapter_config.json", lambda: make(lora_alpha=5).load(tmp_path))
    refuses(tmp_path / "q_head.safetensors", lambda: make(q_head="tied").load(tmp_path))
    refuses(tmp_path / "q_head.safetensors", lambda: make(n_critics=2).load(tmp_path))
    tensors = load_file(file)
    save_file({k.replace("language_model", "text_model"): v for k, v in tensors.items()}, file)
    refuses(file, lambda: make().load(tmp_path))
    file.write_bytes(b"torn")
    refuses(file, lambda: make().load(tmp_path))
    refuses(tmp_path / "none", lambda: make().load(tmp_path / "none"))
    refuses(tmp_path / "none", lambda: make(lora_r=0).load(str(tmp_path / "none")))


@every_family
def test_a_bad_model_is_refused(folder, tmp_path, family):
    """A folder with a file missing or torn is refused in one sentence with its path, never with a traceback."""
    for name in "config.json", "model.safetensors", "processor_config.json", "tokenizer.json":
        for size in 0.5, 0:
            path = tmp_path / f"{name}-{size}"
            shutil.copytree(folder(family), path)
            raw = (path / name).read_bytes()
            (path / name).write_bytes(raw[:len(raw) // 2]) if size else (path / name).unlink()
            refuses(path, lambda: model.load_model(str(path)))


def test_an_encoder_decoder_is_refused(tmp_path):
    """BLIP-2 and InstructBLIP also come with a T5, which does not read prompt and reply as one sequence: said before the weights are read."""
    families.build("blip2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | dict(text_config=dict(model_type="t5"))))
    with pytest.raises(SystemExit, match="encoder-decoder"):
        model.load_model(str(tmp_path))
    refuses(tmp_path, lambda: model.load_model(str(tmp_path)))


def test_no_model_or_another_kind(folder, tmp_path):
    """Nothing there, a language model, a processor that knows no pictures, weights of another size."""
    refuses(tmp_path / "nothing", lambda: model.load_model(str(tmp_path / "nothing")))
    refuses(tmp_path, lambda: model.load_model(str(tmp_path)))
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **families.TEXT)).save_pretrained(tmp_path / "llama")
    refuses(tmp_path / "llama", lambda: model.load_model(str(tmp_path / "llama")))
    net, processor = model.load_model(folder("scratch"))
    net.save_pretrained(tmp_path / "blind")
    processor.tokenizer.save_pretrained(tmp_path / "blind")
    refuses(tmp_path / "blind", lambda: model.load_model(str(tmp_path / "blind")))
    for key, value in dict(text_config=dict(net.config.text_config.to_dict(), hidden_size=32)).items():
        families.build("scratch", tmp_path / key)
        config = json.loads((tmp_path / key / "config.json").read_text())
        (tmp_path / key / "config.json").write_text(json.dumps(config | {key: value}))
        refuses(tmp_path / key, lambda: model.load_model(str(tmp_path / key)))


def test_each_column_of_the_conformance_table_is_a_test():
    """Renamed, a test would leave its column empty."""
    with open(os.path.join(os.path.dirname(__file__), "extra_formats.py")) as f:
        others = f.read()
    assert all(name in globals() or f"def {name}(" in others for name in conformance.PROPERTIES)
