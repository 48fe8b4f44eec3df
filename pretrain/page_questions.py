"""
What a tiny VLM is asked about MiniWoB++'s pages before it has met any action syntax.
"""
import contextlib, re, string
from collections import Counter

from PIL import Image, ImageChops

from envs import MARKER
from worlds.miniwob import format_element

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
        self.shown = text and "\n".join(map(format_element, self.elements)), prompt, sheet, f"{fingerprint} {[e['box'] for e in self.elements]}"

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
        lines, made = page.text() or "\n".join(map(format_element, page.elements)), self.listing() if which < 68 else []
        if made:
            lines, boxes = "\n".join(map(format_element, made)), [e for e in made if e["role"] == "textbox"]
            if which >= 24 and boxes and self.draw(6) == 0:
                nth = self.draw(min(3, len(boxes)))
                return self.finish("it number made", f"Focus into the {('1st', '2nd', '3rd')[nth]} input textbox.\n{lines}", "Which number is it?", boxes[nth]["ref"], True)
            if which >= 52:
                field = dict(ref=self.draw(1, 60), role="textbox", value="", text="")
                made.insert(self.draw(len(made) + 1), field)
                word = self.pick(WORDS) if self.draw(4) else self.words(1, 4)
                return self.writing(self.pick(WRITTEN).format(word), "\n".join(format_element(e) for e in made if e is field or e["role"] != "textbox"), field["ref"], word)
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
        place, lines = lambda e: "{} {}".format(*page.places(e)[0]), page.text() or "\n".join(map(format_element, page.elements))
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
