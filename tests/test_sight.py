"""extras/sight.py: what a tower is taught before a language model listens."""
import numpy as np
import torch
from PIL import Image

from extras.reading import Page
from extras.scratch import llava
from extras.sight import Sight, labels, new_tower

WORDS = {"ONE": (255, 0, 0), "TWO": (0, 160, 0), "Ok": (0, 0, 255), "Cancel": (0, 0, 0)}      # each a colour, to be told apart in seconds


def page(seed):
    """Two of the words anywhere, one below the other."""
    rng, sheet, elements = np.random.default_rng(seed), Image.new("RGB", (160, 160), "white"), []
    for i, word in enumerate(rng.permutation(list(WORDS))[:2].tolist()):
        x, y = int(rng.integers(100)), int(80 * i + rng.integers(40))
        sheet.paste(WORDS[word], (x, y, x + 60, y + 40))
        elements.append(dict(ref=i + 1, role="button", text=word, value=None, box=[x, y, 60, 40]))
    return Page(None, "", elements, None, "", "", sheet, "")


def test_labels_name_what_stands_in_a_patch():
    names = {}
    sheet = Image.new("RGB", (160, 160), "white")
    sheet.paste((0, 0, 0), (32, 48, 80, 64))
    sheet.paste((0, 0, 0), (100, 100, 104, 104))                       # ink of nobody: neither a text nor nothing
    box = dict(ref=1, role="button", text="Ok", value=None, box=[32, 48, 48, 16])
    right = labels(Page(None, "", [box, {**box, "text": "much more text than a patch can say", "box": [0, 128, 160, 16]}], None, "", "", sheet, ""), names).reshape(10, 10)
    assert names == {"Ok": 1} and right[3, 2:5].tolist() == [1, 1, 1] and right[6, 6] == -100
    right[3, 2:5], right[6, 6] = 0, 0
    assert not right.any()


def test_a_tower_learns_which_word_stands_where():
    """Four words anywhere, a quarter is chance: a few seconds of training, and other ones are read. With the language model's own weights untouched."""
    torch.manual_seed(0)
    base, processor = llava(list(WORDS), image_size=160, vocab_size=300)
    net = new_tower(base)
    before = net.get_input_embeddings().weight.clone()
    assert torch.equal(before, base.get_input_embeddings().weight) and torch.equal(net.lm_head.weight, before)
    sight = Sight(net, processor.tokenizer)
    optimizer = torch.optim.AdamW(sight.parameters(), 2e-3)
    def batch(seeds):
        names = dict(zip(WORDS, range(1, 5)))
        shown = [page(seed) for seed in seeds]
        return processor.image_processor([p.picture() for p in shown], return_tensors="pt")["pixel_values"], torch.stack([labels(p, names) for p in shown]), list(names)
    with torch.no_grad():
        assert sight.loss(*batch(range(10 ** 6, 10 ** 6 + 32)))[1] < 0.6
    for step in range(30):
        optimizer.zero_grad()
        sight.loss(*batch(range(8 * step, 8 * step + 8)))[0].backward()
        optimizer.step()
    with torch.no_grad():
        share = sight.loss(*batch(range(10 ** 6, 10 ** 6 + 32)))[1]
    assert share > 0.7 and torch.equal(net.get_input_embeddings().weight, before), share
