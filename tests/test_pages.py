"""extras/pages.py: what is asked about web pages, and how a tower learns to read before a language model listens."""
import re
from collections import Counter

import numpy as np
import torch
from PIL import Image

from envs import MARKER, MiniWoB, format_element
from extras.pages import Asker, Page, Sight, answers_loss, labels, new_tower, retokenize, visible_features
from pretrain.tiny_nets import llava

WORDS = {"ONE": (255, 0, 0), "TWO": (0, 160, 0), "Ok": (0, 0, 255), "Cancel": (0, 0, 0)}      # each a colour, to be told apart in seconds
where = lambda e: MiniWoB.places(None, e)


def page(seed):
    """Two of the words anywhere, one below the other."""
    rng, sheet, elements = np.random.default_rng(seed), Image.new("RGB", (160, 160), "white"), []
    for i, word in enumerate(rng.permutation(list(WORDS))[:2].tolist()):
        x, y = int(rng.integers(100)), int(80 * i + rng.integers(40))
        sheet.paste(WORDS[word], (x, y, x + 60, y + 40))
        elements.append(dict(ref=i + 1, role="button", text=word, value=None, box=[x, y, 60, 40]))
    return Page(where, f"Click button {elements[0]['text']}.", elements, (1, ""), "\n".join(map(format_element, elements)), "", sheet, "")


def test_answers_are_on_the_page():
    """Moved, in pieces or as it is: what an answer names is where it says, has the number it says, and is what the goal is about; whatever the answer has to begin with."""
    kinds, silent, places, shown, cut, written = Counter(), Counter(), set(), 0, 0, 0
    for seed in range(1500):
        asker, now = Asker(np.random.default_rng(seed)), page(seed % 50)
        (lambda draw: None, now.move, now.scatter)[seed % 3](asker.draw)
        kind, question, answer = (asker.text if seed % 2 else asker.picture)(now)
        kinds[kind] += 1
        assert MARKER not in question and MARKER not in str(answer)
        end, answer = question.rpartition("\n")[2], str(answer)
        if "for example: " in end:                                          # another answer stands behind the beginning that is asked for
            example = end.rpartition("for example: ")[2]
            shown += example != answer
            cut += len(example.split()) < len(answer.split())               # at times but its beginning: how long an answer is, is for the question to say
            assert example.split()[0] == answer.split()[0] and len(example.split()) <= len(answer.split())
        assert answer.startswith(end.partition("Begin with: ")[2])
        colour = lambda text, x, y: now.picture().getpixel((int(x), int(y))) == WORDS[text]
        listed = {number: text for text, number in re.findall(r"'(.*)' \[(\d+)\]", question)}
        if kind == "places":
            found = re.findall(r"'(\w+)' (\d+) (\d+)", answer)
            places |= {at for _, *at in map(tuple, found) for at in [tuple(at)]}
            assert found and all(colour(*one) for one in found) and f"Which places have {', '.join(repr(text) for text, _, _ in found)}?" in end
        elif kind in ("it", "it made"):
            named = next(text for text in WORDS if re.search(rf"\b{text}\b", question.splitlines()[0]))
            silent[kind] += "Where is it?" not in end
            assert colour(named, *answer.split()[-2:])
            assert "Where is it?" in end or not listed                # where nothing is asked, lines mean the number and no lines the place
        elif kind == "numbers":
            assert all(listed[number] == text for text, number in re.findall(r"'([^']*)' (\d+)", answer)), (question, answer)
        elif kind == "it number":
            silent[kind] += "Which number is it?" not in end
            assert question.startswith(now.goal) and answer.split()[-1] == "1"
        elif kind == "it number made" and "textbox" not in question.splitlines()[0]:
            text = listed[answer.split()[-1]]
            assert f'"{text}"' in question or f" {text}." in question
        elif kind == "it text":                                             # alone, in quotes, or in quotes behind its field's number
            written += 1
            goal = re.search('"(.*)"', question.splitlines()[0])
            text = goal[1] if goal else "nothing"
            assert answer.endswith(f'"{text}"' if "in quotes" in end else text)
            assert "Which number" not in end or f"textbox '' [{answer[:-len(text) - 2].split()[-1]}]" in question
    assert min(kinds[kind] for kind in ("places", "it", "it made", "numbers", "it number", "it number made")) > 100 and len(places) > 40
    assert shown > 400 and written > 50 and shown / 10 < cut < shown / 2
    assert all(0.2 * kinds[kind] < silent[kind] < 0.7 * kinds[kind] for kind in ("it", "it made", "it number"))         # at times the goal is question enough


def test_what_occurs_twice_has_no_one_place():
    twice = page(0)
    twice.elements = [*twice.elements, {**twice.elements[0], "ref": 9}]
    asked = [Asker(np.random.default_rng(seed)).picture(twice) for seed in range(60)]
    name = twice.elements[0]["text"]
    assert all(f"{name!r}" not in question.rpartition("\n")[2] for kind, question, _ in asked if kind == "places")
    nothing = Page(where, "Click.", [], None, "", "", Image.new("RGB", (160, 160), "white"), "")
    assert Asker(np.random.default_rng(0)).picture(nothing) is None


def test_a_field_that_was_moved_is_no_longer_the_second():
    fields = [dict(ref=i, role="textbox", text="", value="", box=[10, 40 * i, 100, 20]) for i in (1, 2)]
    now = Page(where, "Focus into the 2nd input textbox.", fields, (2, ""), "lines", "", Image.new("RGB", (160, 160), "white"), "")
    now.scatter(Asker(np.random.default_rng(0)).draw)
    assert now.meant is None and now.text() != "lines"


def test_labels_name_what_stands_in_a_patch():
    """The text, and where to click on it, also in those of its patches that are not its middle."""
    names = {}
    sheet = Image.new("RGB", (160, 160), "white")
    sheet.paste((0, 0, 0), (32, 48, 80, 64))
    sheet.paste((0, 0, 0), (100, 100, 104, 104))                       # ink of nobody: neither a text nor nothing
    box = dict(ref=1, role="button", text="Ok", value=None, box=[32, 48, 48, 16])
    lines = [dict(ref=ref, role="link", text=text, value=None, box=[128, top, 32, 8]) for ref, text, top in ((2, "ONE", 0), (3, "TWO", 8))]
    right, x, y = labels(Page(where, "", [box, *lines, {**box, "text": "much more text than a patch can say", "box": [0, 128, 160, 16]}], None, "", "", sheet, ""), names).reshape(3, 10, 10, 2)
    assert names == {"Ok": 1, "ONE": 2, "TWO": 3} and (right[3, 2:5] == 1).all() and right[6, 6].tolist() == [-100, 0]
    assert (x[3, 2:5] == 14).all() and (y[3, 2:5] == 14).all() and (x[1:] >= 0).sum() == (y[1:] >= 0).sum() == 6         # 4 * 14: the middle of a patch, in both halves of three
    assert right[0, 8:].tolist() == [[2, 3], [2, 3]] and y[0, 8].tolist() == [1, 3]                                       # two lines share a patch
    right[3, 2:5], right[6, 6], right[0, 8:] = 0, 0, 0
    assert not right.any()


def test_a_tower_learns_which_word_stands_where():
    """Four words anywhere, a quarter is chance: a few seconds of training, and other ones are read. With the language model's own weights untouched."""
    torch.manual_seed(0)
    base, processor = llava(list(WORDS), image_size=160, vocab_size=300)
    net = new_tower(base)
    before = net.get_input_embeddings().weight.clone()
    assert torch.equal(before, base.get_input_embeddings().weight) and torch.equal(net.lm_head.weight, before)
    sight = Sight(net, processor.tokenizer)
    seeing = [*net.model.vision_tower.parameters(), *net.model.multi_modal_projector.parameters()]
    optimizer = torch.optim.AdamW([*seeing, *sight.parameters()], 2e-3)
    def loss(seeds):
        shown = [page(seed) for seed in seeds]
        pixels = processor.image_processor([p.picture() for p in shown], return_tensors="pt")["pixel_values"]
        with torch.autocast("cpu", torch.bfloat16):
            features = visible_features(net, pixels)
        return sight.loss(features.float(), shown)
    with torch.no_grad():
        assert loss(range(10 ** 6, 10 ** 6 + 32))[1] < 0.6
    for step in range(30):
        optimizer.zero_grad()
        loss(range(8 * step, 8 * step + 8))[0].backward()
        optimizer.step()
    with torch.no_grad():
        share = loss(range(10 ** 6, 10 ** 6 + 32))[1]
    assert share > 0.7 and torch.equal(net.get_input_embeddings().weight, before), share


def test_answers_are_scored_as_the_library_scores_them():
    """Each answer's cross-entropy by a forward pass of its own, without padding, divided by tokens ** 0.75; with a picture and without. (The tower was once taught through its last
    normalisation, which the whole net leaves out: what it had learned to read looked forgotten.)"""
    torch.manual_seed(0)
    base, processor = llava(list(WORDS), image_size=160, vocab_size=300)
    net, tok = new_tower(base).eval(), processor.tokenizer
    asked = [("What?", "Ok"), ("And what is in the picture?", "Cancel ONE")]
    pixels = torch.randn(2, 3, 160, 160)
    for show in (False, True):
        features = visible_features(net, pixels) if show else None
        expected = 0.0
        for i, (question, answer) in enumerate(asked):
            prompt, reply = tok("<image>" * 100 * show + f"{question}\n>").input_ids, tok(answer).input_ids + [tok.eos_token_id]
            given = dict(pixel_values=pixels[i:i + 1]) if show else {}
            logits = net(input_ids=torch.tensor([prompt + reply]), **given).logits[0, len(prompt) - 1:-1]
            expected += torch.nn.functional.cross_entropy(logits, torch.tensor(reply), reduction="sum") / len(reply) ** 0.75
        assert torch.allclose(answers_loss(net, tok, asked, features), expected, atol=1e-3)


def test_a_word_of_three_pieces_becomes_one():
    torch.manual_seed(0)
    net, processor = llava(["x"], image_size=160, vocab_size=300)
    old = processor.tokenizer("consectetur", add_special_tokens=False).input_ids
    net, processor = retokenize(net, processor, ["consectetur 12"] * 50)
    [new] = processor.tokenizer("consectetur", add_special_tokens=False).input_ids
    assert len(old) > 3 and net.get_input_embeddings().weight.shape[0] == net.lm_head.weight.shape[0] == len(processor.tokenizer) == net.config.text_config.vocab_size
    assert processor.tokenizer.decode([new]) == "consectetur" and processor.tokenizer.eos_token_id == 1 and torch.equal(net.lm_head.weight, net.get_input_embeddings().weight)
