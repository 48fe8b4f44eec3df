"""
What a tiny VLM is asked about MiniWoB++'s pages before it has met any action syntax, and how it learns to answer: tiny-vlm-pages.

    pip install -r requirements-envs.txt && apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver
    mkdir -p out && git archive b2b105d tiny-vlm-pages | tar x -C out
    python extras/pages.py out/tiny-vlm-pages out/pages                     # the weights of an earlier base, a tokenizer of its own; --text=900 --sight=500 --both=660 updates

Three steps. Text alone: which number of a page's lines is the goal about. The tower (a Swin, arXiv 2103.14030) alone: which of the batch's texts stands in this patch, and where is its middle; that is CLIP's loss
(arXiv 2103.00020) with a patch in the place of a picture. Every patch is an example, where a question "Where is it?" is told two numbers. Then both together, with the patches' loss beside the answers': else the tower forgets.
"""
import contextlib, math, os, re, string, sys, time
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import nn

from envs import MARKER, element_line

TASKS = ("click-test", "click-test-2", "click-button", "click-dialog", "click-dialog-2", "click-link", "click-tab", "focus-text-2", "enter-text", "click-collapsible")
SIZE, SIDE = 160, 10        # pixels of a picture, patches of 16 of them
GOALS = ('Click on the "{}" button.', 'Click on the link "{}".', 'Click the button in the dialog box labeled "{}".', "Click button {}.", "Click on {}.")
WRITTEN = ('Enter "{}" into the text field and press Submit.', 'Write "{}" into the field.', 'Enter "{}".')
WORDS = sorted(set("""a ac accumsan adipiscing aliquam aliquet amet ante arcu at auctor augue bibendum blandit commodo condimentum congue consectetur convallis cras curabitur cursus dapibus diam dictum dictumst dignissim dis dolor
donec dui duis efficitur egestas eget eleifend elit enim erat eros est et eu euismod facilisi facilisis fames faucibus felis fermentum fringilla fusce gravida habitant hac hendrerit iaculis id imperdiet in integer interdum ipsum justo
lacus laoreet lectus leo libero ligula lobortis lorem luctus maecenas magna malesuada massa mattis mauris metus mi molestie mollis montes morbi nam nascetur natoque nec neque netus nibh nisi non nulla nullam nunc odio orci ornare
parturient pellentesque penatibus pharetra phasellus placerat platea porta posuere praesent pretium proin pulvinar purus quam quis rhoncus ridiculus risus rutrum sagittis sapien scelerisque sed sem senectus sit sociis sodales
sollicitudin suscipit suspendisse tellus tempus tincidunt tortor tristique turpis ullamcorper ultrices urna ut varius vehicula vel velit venenatis vestibulum vitae vivamus viverra volutpat vulputate
submit okay ok yes no cancel next previous Submit Okay Ok Yes No Cancel Next Previous OK ONE TWO Close Delete Login Search Section Send Tab
Agustina Alan Annis Ashlea Augus Beaulah Bernardine Briana Chas Cheree Cierra Cristin Dannie Deneen Dolores Donovan Emile Enola Ignacio Jerald Jess Joye Juan Kanesha Karrie Kasie Keli Kenda Keneth Leonie Livia Lyda Macie
Marcella Michel Myron Nathalie Nieves Olin Renda Rex Riley Sergio Teodoro Thaddeus Tora Truman Tula Vanda Vina""".split()))
COMMON = "the a is it to of and or that this now here then so we you I next use end reply with an action for example number place text write".split()
POOLS = (WORDS, list(string.ascii_letters + string.digits + string.punctuation), COMMON, [str(n) for n in range(161)])

# ---- pages ----
class Page:
    """A page as it was read: what there is to ask does not need a browser any more."""
    def __init__(self, places, goal, elements, meant, *shown): self.places, self.goal, self.elements, self.meant, self.shown = places, goal, elements, meant, shown
    def text(self): return self.shown[0]
    def prompt(self): return self.shown[1]
    def picture(self): return self.shown[2]
    def fingerprint(self): return self.shown[3]
    def move(self, draw):
        """All that it shows, somewhere else where there is room: a page is slow to come by, a place is not."""
        text, prompt, picture, fingerprint = self.shown
        left, top, right, bottom = ImageChops.invert(picture).getbbox() or (0, 0, *picture.size)
        dx, dy = draw(-left, picture.width - right + 1), draw(-top, picture.height - bottom + 1)
        moved = Image.new("RGB", picture.size, "white")
        moved.paste(picture, (dx, dy))
        self.shown = text, prompt, moved, f"{fingerprint} {dx} {dy}"
        self.elements = [{**e, "box": [e["box"][0] + dx * 160 / picture.width, e["box"][1] + dy * 160 / picture.height, *e["box"][2:]]} for e in self.elements]
    def scatter(self, draw):
        """What it shows, cut out and put anywhere, the lines in the new order: a text can be found everywhere only by who has found it everywhere."""
        text, prompt, picture, fingerprint = self.shown
        scale, sheet, placed = picture.width / 160, Image.new("RGB", picture.size, "white"), []
        for e in self.elements:
            left, top, w, h = map(round, e["box"])
            for x, y in [(draw(161 - w), draw(161 - h)) for _ in range(10)] if 4 < w <= 120 and 4 < h <= 40 and 0 <= left <= 160 - w and 0 <= top <= 160 - h else ():
                if all(x + w <= l or l + wide <= x or y + h <= t or t + high <= y for l, t, wide, high in (other["box"] for other in placed)):
                    sheet.paste(picture.crop([round(v * scale) for v in (left, top, left + w, top + h)]), (round(x * scale), round(y * scale)))
                    placed.append({**e, "box": [x, y, w, h]})
                    break
        self.elements = sorted(placed, key=lambda e: e["box"][1::-1])
        if self.meant and any(e["ref"] == self.meant[0] and e["role"] == "textbox" for e in self.elements):
            self.meant = None                                       # "the 2nd textbox" is another one now
        self.shown = text and "\n".join(map(element_line, self.elements)), prompt, sheet, f"{fingerprint} {[e['box'] for e in self.elements]}"

def meant(world):
    """(number of the element that the goal is about next, the text to be written there) on a page; None if its task has no scripted player, or where that one presses a key."""
    with contextlib.suppress(ValueError):
        if found := re.match(r'(?:click|type) (\d+)(?: "(.*)")?$', world.expert()):
            return int(found[1]), found[2] or ""

def alone(names): return [name for name, n in Counter(names).items() if n == 1]

# ---- questions ----
class Asker:
    """Draws questions about pages, (kind, question, answer) each. As in play, something beside the point may stand between a page's lines and the end of the prompt, and the answer may have to begin with other words."""
    def __init__(self, rng): self.rng = rng
    def draw(self, *args): return int(self.rng.integers(*args))
    def pick(self, things): return things[self.draw(len(things))]
    def some(self, things, n=8): return [things[i] for i in self.rng.permutation(len(things))[:n]]
    def words(self, low, high, first=0):
        pools = [POOLS[self.draw(first, 4)] for _ in range(self.draw(low, high))]
        out = "".join(("", " ")[self.draw(4) > 0] + self.pick(pool) for pool in pools).strip()
        return out if MARKER not in out else "so"

    def finish(self, kind, before, ask, answer, may_be_silent=False):
        """-> (kind, prompt, reply). may_be_silent: the question is left out at times, the goal is question enough: its number where there are lines, its place where there are none.
        The reply may have to begin with certain words, which are told or shown, with another answer behind them: who has never been shown one says that behind them (in play 13, of "for example: click 13")."""
        lines, answer = [before] * bool(before), str(answer)
        lines += [self.words(3, 24, 1) for _ in range(self.draw(1, 3) if self.draw(2) else 0)]
        ask, told, begin, how = "" if may_be_silent and self.draw(2) else ask, self.draw(10), self.words(1, 5, 1), ""
        if told < 4:
            other = re.sub(r"[A-Za-z]+", lambda word: self.pick(WORDS), re.sub(r"\d+", lambda number: str(self.draw(161)), answer))
            other = other if self.draw(4) else other.split()[0]     # an example is not the shape of every answer
            lines += [" or ".join(f"{begin.split()[-1]} {self.words(1, 4, 1)}" for _ in range(self.draw(1, 4)))] * self.draw(2)
            how = f"{self.words(2, 9, 2)}, for example: {begin} {other}"
        elif told < 6:
            how = f"Begin with: {begin}"
        return kind, "\n".join(filter(None, [*lines, f"{ask} {how}".strip()])), f"{begin} {answer}" if how else answer

    def listing(self):
        """Elements of a page that nobody made: near-twins, pieces without a number, numbers of any size. To find a text among many has to be learned from many."""
        ref, role, out = self.draw(1, 15), self.pick(("mixed", "button", "span", "link")), []
        for _ in range(self.draw(2, 12)):
            ref += self.draw(1, 3)
            one = self.pick(WORDS) if self.draw(5) else self.words(1, 4)
            text, kind = one if self.draw(4) else " ".join(self.pick(WORDS) for _ in range(self.draw(2, 4))), role if role != "mixed" else self.pick(("button", "button", "link", "span", "div", "p", "textbox"))
            if kind == "textbox":
                out.append(dict(ref=ref, role=kind, value="" if self.draw(3) else self.pick(WORDS), text=""))
                continue
            out.append(dict(ref=ref if self.draw(5) or role == "button" else -1, role=kind, value=None, text=text))
            if self.draw(6) == 0:
                ref += 1
                out.append(dict(ref=ref, role=kind, value=None, text=text.capitalize() + "." * self.draw(2)))
        return out if self.draw(8) else self.some(out, len(out))

    def text(self, page):
        """From the goal and the lines alone."""
        which = self.draw(100)
        if which < 6:
            return "echo", f"Repeat:\n{(said := self.words(4, 30))}", said
        lines, made = page.text() or "\n".join(map(element_line, page.elements)), self.listing() if which < 68 else []
        if made:
            lines, boxes = "\n".join(map(element_line, made)), [e for e in made if e["role"] == "textbox"]
            if which >= 24 and boxes and self.draw(6) == 0:
                nth = self.draw(min(3, len(boxes)))
                return self.finish("it number made", f"Focus into the {('1st', '2nd', '3rd')[nth]} input textbox.\n{lines}", "Which number is it?", boxes[nth]["ref"], True)
            if which >= 52:
                field = dict(ref=self.draw(1, 60), role="textbox", value="", text="")
                made.insert(self.draw(len(made) + 1), field)
                word = self.pick(WORDS) if self.draw(4) else self.words(1, 4)
                return self.writing(self.pick(WRITTEN).format(word), "\n".join(element_line(e) for e in made if e is field or e["role"] != "textbox"), field["ref"], word)
            once = alone(e["text"] for e in made if e["text"])
            named = self.some([e for e in made if e["text"] in once and e["ref"] > 0])
            if named and which < 24:
                return self.finish("numbers", lines, f"Which numbers have {', '.join(repr(e['text']) for e in named)}?", ", ".join(f"{e['text']!r} {e['ref']}" for e in named))
            if named:
                return self.finish("it number made", f"{self.pick(GOALS).format(named[0]['text'])}\n{lines}", "Which number is it?", named[0]["ref"], True)
        if not page.meant or page.meant[0] not in [e["ref"] for e in page.elements]:
            return self.text(page)
        if page.meant[1] and self.draw(3) or self.draw(12) == 0:
            other = self.pick(WORDS) if page.meant[1] and self.draw(2) else page.meant[1]
            return self.writing(page.goal.replace(page.meant[1] or other, other), lines, page.meant[0], other)
        return self.finish("it number", f"{page.goal}\n{lines}", "Which number is it?", page.meant[0], True)

    def writing(self, goal, lines, number, text):
        """What is to be written into a field: alone, in quotes, or in quotes behind the field's number, which is how the question tells."""
        form = self.draw(3) if text else 0
        answer, ask = ((text or "nothing", "What is to be written?"), (f'"{text}"', "What, in quotes, is to be written?"), (f'{number} "{text}"', "Which number is it, and what, in quotes, is to be written?"))[form]
        return self.finish("it text", goal if form == 1 and self.draw(2) else f"{goal}\n{lines}", ask, answer)

    def ask(self, page, lines=0.3):
        """A share `lines` of the questions can be answered without the picture."""
        asked = self.picture(page) if self.rng.random() >= lines else None
        return asked or self.text(page)

    def picture(self, page):
        """From the picture; None if it shows nothing to ask about."""
        place, lines = lambda e: "{} {}".format(*page.places(e)[0]), page.text() or "\n".join(map(element_line, page.elements))
        shown = [e for e in page.elements if (0 < len(e["text"]) <= 16 or e["role"] == "textbox") and 0 <= e["box"][0] < 160 and 0 <= e["box"][1] < 160]
        once = alone(e["text"] for e in shown if e["text"])                 # what occurs twice has no one place
        named, boxes, which, before = self.some([e for e in shown if e["text"] in once]), sorted([e for e in shown if e["role"] == "textbox"], key=lambda e: e["box"][1]), self.draw(100), lines if self.draw(3) == 0 else ""
        if named and which < 45:
            return self.finish("places", before, f"Which places have {', '.join(repr(e['text']) for e in named)}?", ", ".join(f"{e['text']!r} {place(e)}" for e in named))
        if named and which < 70:
            return self.finish("it made", "\n".join(filter(None, [self.pick(GOALS).format(named[0]["text"]), before])), "Where is it?", place(named[0]), not before)
        if which < 92 and (found := [e for e in shown if page.meant and e["ref"] == page.meant[0]]):
            return self.finish("it", "\n".join(filter(None, [page.goal, before])), "Where is it?", place(found[0]), not before)
        if boxes:
            nth = self.draw(min(3, len(boxes)))
            return self.finish("nth", before, f"Where is textbox {nth + 1}?", place(boxes[nth]))
        return self.picture(page) if named else None

# ---- a tower that reads ----
def shown_as(net, pixels):
    """What the language model is shown of pictures (B, 3, SIZE, SIZE) -> (B, patches, hidden), by the net's own path: a Swin's `last_hidden_state` has one more normalisation, which a LLaVA does not use."""
    features = net.model.get_image_features(pixel_values=pixels).pooler_output
    return features if torch.is_tensor(features) else torch.stack(list(features))


def labels(page, names):
    """What stands in the upper and in the lower half of each patch of a page's picture (a line of text is eleven pixels high, so a patch has parts of two) -> (3, SIDE * SIDE, 2) int64: the text's place in `names`,
    which grows, + 1 (0 nothing, -100 what only shows a bit of something), then column and row, in steps of 4 pixels, of the place to click on it (-100 where there is none)."""
    ink, across, down = (np.asarray(page.picture().convert("L")) < 200).reshape(2 * SIDE, 8, SIDE, 16).any((1, 3)), np.arange(SIDE) * 16, np.arange(2 * SIDE) * 8
    out = np.stack([np.where(ink, -100, 0), *np.full((2, 2 * SIDE, SIDE), -100)])
    for e in page.elements:
        (left, top, w, h), text = e["box"], e["text"] or "textbox" * (e["role"] == "textbox")
        if 0 < len(text) <= 16 and left >= 0 and top >= 0:
            wide, high = np.minimum(left + w, across + 16) - np.maximum(left, across), np.minimum(top + h, down + 8) - np.maximum(top, down)
            x, y = page.places(e)[0]
            here = (high[:, None] >= 4) & (wide[None] >= 6) & (abs(across + 8 - x) <= 32)[None]
            out[0, here] = names.setdefault(text, len(names) + 1)
            if x % 4 == y % 4 == 0 and 0 <= x <= 160 and 0 <= y <= 160:
                out[1:, here] = [[x // 4], [y // 4]]
    return torch.from_numpy(out.reshape(3, SIDE, 2, SIDE).swapaxes(2, 3).reshape(3, -1, 2))


def new_tower(net):
    """The LLaVA `net`'s language model before a Swin and a projector with random weights: a picture of SIZE x SIZE becomes SIDE x SIDE tokens. Its windows and relative positions read a word alike wherever it stands."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SwinConfig
    from extras.scratch import awake
    vision = SwinConfig(image_size=SIZE, patch_size=4, embed_dim=32, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=5, mlp_ratio=3.0, drop_path_rate=0.0, use_absolute_embeddings=True)
    new = awake(LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=net.config.text_config, image_token_index=net.config.image_token_id, vision_feature_layer=-1,
                                                          vision_feature_select_strategy="full", tie_word_embeddings=True)))
    nn.init.normal_(new.model.vision_tower.embeddings.position_embeddings, 0, 0.3)
    new.model.language_model.load_state_dict(net.model.language_model.state_dict())
    new.tie_weights()
    return new


class Sight(nn.Module):
    """What only the training of a tower needs: a head to the words' space, one for the patch's own column and row and the text's, a vector for "nothing"."""
    def __init__(self, net, tokenizer):
        super().__init__()
        hidden = net.config.text_config.hidden_size
        self.net, self.tokenizer = [net], tokenizer                       # a list hides it from parameters()
        self.head, self.place, self.nothing, self.scale = nn.Linear(hidden, 2 * hidden), nn.Linear(hidden, 2 * SIDE + 4 * 41), nn.Parameter(0.1 * torch.randn(1, hidden)), nn.Parameter(torch.tensor(2.0))
    def texts(self, names):
        words = self.net[0].get_input_embeddings().weight.detach()
        return F.normalize(torch.stack([words[self.tokenizer(name, add_special_tokens=False)["input_ids"]].mean(0) for name in names or ["textbox"]]), dim=-1)   # pages of nothing but long texts name none
    def loss(self, features, pages):
        """features (B, patches, hidden), what the language model is shown -> (cross-entropy over the pages' texts, 0.2 of that of their places, 0.1 of the patches'; share of the halves of patches with a text that are right)."""
        names = {}
        right, x, y = torch.stack([labels(page, names) for page in pages], 1)                                # (B, patches, 2) each
        logits = F.normalize(self.head(features).unflatten(-1, (2, -1)), dim=-1) @ torch.cat([F.normalize(self.nothing, dim=-1), self.texts(names)]).T * self.scale.exp()
        weight, at = torch.ones(logits.shape[-1]), torch.arange(SIDE * SIDE).repeat(len(right))
        weight[0] = 0.1                                             # most of a page is empty
        rows, columns, xs, ys = self.place(features).flatten(0, 1).split([SIDE, SIDE, 82, 82], -1)
        own, middle = F.cross_entropy(rows, at // SIDE) + F.cross_entropy(columns, at % SIDE), F.cross_entropy(xs.reshape(-1, 41), x.flatten()) + F.cross_entropy(ys.reshape(-1, 41), y.flatten())
        return F.cross_entropy(logits.flatten(0, 2), right.flatten(), weight) + 0.1 * own + 0.2 * middle, (logits.argmax(-1) == right)[right > 0].float().mean().item()

# ---- training ----
def respelled(net, processor, texts):
    """The net with a tokenizer made of `texts`, in which the pages' words and numbers are a token each: what is looked for is then one thing, not three. A new token begins as the mean of those that spelled it."""
    from extras.scratch import tokenizer
    old, words = processor.tokenizer, net.get_input_embeddings().weight.detach()
    new = tokenizer(texts, 1536, ["<|pad|>", "<|end|>", "<image>"], extra_special_tokens={"image_token": "<image>"})
    spelled = [words[[i] if i < 3 else old(new.decode([i]), add_special_tokens=False).input_ids] for i in range(len(new))]
    mean = torch.stack([rows.mean(0) * rows.norm(dim=-1).mean() / rows.mean(0).norm().clamp(min=1e-3) + 0.3 * words.std() * torch.randn(words.shape[1]) * (len(rows) > 1) for rows in spelled])
    net.resize_token_embeddings(len(new))
    net.get_input_embeddings().weight.data.copy_(mean)
    processor.tokenizer = new
    return net, processor


def corpus(asker, deal, n=12000):
    """Texts for the tokenizer: questions, answers, and prompts less the line that shows an action."""
    for i in range(n):
        page = deal()
        _, question, answer = asker.ask(page)
        yield from (question, answer, *([page.goal, page.prompt().rpartition("\n")[0], "End your reply with an action, for example:"] if i % 20 == 0 else []))
    yield from (text for word in WORDS for text in [f"'{word}'", f'"{word}"', f" {word}"] * 20)
    yield from (str(number) for number in range(161) for _ in range(50))


def answers_loss(net, tokenizer, asked, features=None):
    """asked: [(question, answer)], with features (B, patches, hidden) of their pictures or without pictures -> sum over the answers of cross-entropy / tokens ** 0.75: a short one counts nearly as much as a long one."""
    prompts = [tokenizer("<image>" * (SIDE * SIDE if features is not None else 0) + f"{question}\n>").input_ids for question, _ in asked]
    answers = [tokenizer(answer).input_ids + [tokenizer.eos_token_id] for _, answer in asked]
    P, R = max(map(len, prompts)), max(map(len, answers))
    ids, seen, labels = torch.full((len(asked), P + R), tokenizer.eos_token_id), torch.zeros(len(asked), P + R, dtype=torch.long), torch.full((len(asked), R), -100)
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        ids[i, P - len(prompt):P + len(answer)], seen[i, P - len(prompt):P + len(answer)], labels[i, :len(answer)] = torch.tensor(prompt + answer), 1, torch.tensor(answer)
    embedded = net.get_input_embeddings()(ids)
    if features is not None:
        embedded = embedded.masked_scatter((ids == net.config.image_token_id)[..., None], features.to(embedded.dtype))
    hidden = net.model.language_model(inputs_embeds=embedded, attention_mask=seen, use_cache=False).last_hidden_state[:, P - 1:-1]
    loss = F.cross_entropy(net.lm_head(hidden).float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).sum(1)
    return (loss / (labels >= 0).sum(1) ** 0.75).sum()


def main(folder, out, text=900, sight=500, both=660, batch=64, lr=2e-3, micro=16):
    from extras.reading import Reading
    from model import load_model
    net, processor = load_model(folder)
    if net.config.model_type != "llava" or processor.patch_size != 16:
        raise SystemExit(f"model={folder!r} is a {net.config.model_type!r} model: pages are read by a tiny LLaVA of 16-pixel tokens, such as tiny-vlm-pages.")
    torch.manual_seed(0)
    rng, began = np.random.default_rng(0), time.time()
    readers, asker = [Reading(f"miniwob/{task}-v1", size=SIZE) for task in TASKS], Asker(rng)
    often = [reader for reader, task in zip(readers, TASKS) for _ in range(1 + 3 * (task == "click-button"))]      # its crowds are the hardest to find one's way in
    deal = lambda: asker.pick(often).page(rng)
    net = net if net.config.vision_config.model_type == "swin" else new_tower(net)
    net, processor = respelled(net, processor, corpus(asker, deal))
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    net.set_attn_implementation("eager")                                # the CPU's fused attention is slow backwards in bfloat16
    tower, heads = [p for name, p in net.named_parameters() if "vision_tower" in name or "projector" in name], Sight(net, processor.tokenizer)
    rest = [p for p in net.parameters() if not any(p is q for q in tower)]
    look = lambda pages: shown_as(net, processor.image_processor([page.picture() for page in pages], return_tensors="pt")["pixel_values"])
    for step, updates in (("text", text), ("sight", sight), ("both", both)):
        optimizer = torch.optim.AdamW(tower + rest + list(heads.parameters()), lr, weight_decay=0.01, betas=(0.9, 0.98))
        for update in range(updates):
            for group in optimizer.param_groups:                        # a warm-up, then a cosine down to a tenth
                group["lr"] = lr * min((update + 1) / 30, 0.1 + 0.45 * (1 + math.cos(math.pi * update / updates)))
            pages, loss, right = [deal() for _ in range(batch)], 0.0, []
            shown = [step == "sight" or step == "both" and i >= 0.2 * batch for i in range(batch)]
            asked = [("", "") if step == "sight" else asker.ask(page, 0.3 if show else 1.0)[1:] for page, show in zip(pages, shown)]
            order = sorted(range(batch), key=lambda i: (shown[i], len(asked[i][0])))         # like beside like: less padding
            for part in [order[i:i + micro] for show in (False, True) for of in [[i for i in order if shown[i] == show]] for i in range(0, len(of), micro)]:
                show, of = shown[part[0]], [pages[i] for i in part]
                with torch.autocast("cpu", torch.bfloat16):
                    features = look(of) if show else None
                    part_loss = answers_loss(net, processor.tokenizer, [asked[i] for i in part], features) / batch if step != "sight" else 0.0
                if show:
                    patches, share = heads.loss(features.float(), of)
                    part_loss, right = part_loss + patches * len(part) / batch, [*right, share]
                part_loss.backward()
                loss += part_loss.item()
            for params in (tower, rest, list(heads.parameters())):
                nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if update % 50 == 49 or update == updates - 1:
                print(f"{step} {update + 1}  loss {loss:.2f}" + (f"  patches right {100 * np.mean(right):.0f} %" if right else "") + f"  {time.time() - began:.0f} s", flush=True)
        net.save_pretrained(out), processor.save_pretrained(out)
    for reader in readers:
        reader.close()
    net.half().save_pretrained(out)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    steps = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[3:])
    if len(sys.argv) < 3 or not set(steps) <= {"text", "sight", "both", "batch"} or not all(n.isdigit() for n in steps.values()):
        raise SystemExit("Say whose weights to begin with, and where to: python extras/pages.py tiny-vlm-pages FOLDER [--text=900 --sight=500 --both=660 --batch=64]")
    if os.path.exists(sys.argv[2]):
        raise SystemExit(f"{sys.argv[2]!r} exists already: name a new folder.")
    main(*sys.argv[1:3], **{k: int(n) for k, n in steps.items()})
