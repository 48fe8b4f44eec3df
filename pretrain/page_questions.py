"""
Questions about MiniWoB++'s pages for pre-training, before a tiny VLM meets any action syntax.

A Page is a copy of what a browser showed, an Asker draws questions about it. Some questions need the picture:
where is a text? Others need the page's lines only: which number has a text? Every answer is on the page.
"""
import contextlib, re, string
from collections import Counter

from PIL import Image, ImageChops

from envs import MARKER
from worlds.miniwob import PAGE_SIZE, click_places, format_element

GOALS = (
    'Click on the "{}" button.',
    'Click on the link "{}".',
    'Click the button in the dialog box labeled "{}".',
    "Click button {}.",
    "Click on {}.",
)
TYPING_GOALS = (
    'Enter "{}" into the text field and press Submit.',
    'Write "{}" into the field.',
    'Enter "{}".',
)
# The words that the pages show.
PAGE_WORDS = sorted(
    set(
        """
    a ac accumsan adipiscing aliquam aliquet amet ante arcu at auctor augue bibendum blandit commodo
    condimentum congue consectetur convallis cras curabitur cursus dapibus diam dictum dictumst dignissim
    dis dolor donec dui duis efficitur egestas eget eleifend elit enim erat eros est et eu euismod
    facilisi facilisis fames faucibus felis fermentum fringilla fusce gravida habitant hac hendrerit
    iaculis id imperdiet in integer interdum ipsum justo lacus laoreet lectus leo libero ligula lobortis
    lorem luctus maecenas magna malesuada massa mattis mauris metus mi molestie mollis montes morbi nam
    nascetur natoque nec neque netus nibh nisi non nulla nullam nunc odio orci ornare parturient
    pellentesque penatibus pharetra phasellus placerat platea porta posuere praesent pretium proin
    pulvinar purus quam quis rhoncus ridiculus risus rutrum sagittis sapien scelerisque sed sem senectus
    sit sociis sodales sollicitudin suscipit suspendisse tellus tempus tincidunt tortor tristique turpis
    ullamcorper ultrices urna ut varius vehicula vel velit venenatis vestibulum vitae vivamus viverra
    volutpat vulputate

    submit okay ok yes no cancel next previous Submit Okay Ok Yes No Cancel Next Previous OK ONE TWO Close
    Delete Login Search Section Send Tab

    Agustina Alan Annis Ashlea Augus Beaulah Bernardine Briana Chas Cheree Cierra Cristin Dannie Deneen
    Dolores Donovan Emile Enola Ignacio Jerald Jess Joye Juan Kanesha Karrie Kasie Keli Kenda Keneth Leonie
    Livia Lyda Macie Marcella Michel Myron Nathalie Nieves Olin Renda Rex Riley Sergio Teodoro Thaddeus
    Tora Truman Tula Vanda Vina
        """.split()
    )
)
COMMON_WORDS = """
    the a is it to of and or that this now here then so we you I next use end reply with an action for example
    number place text write
""".split()
# What texts beside the point are made of.
POOLS = (
    PAGE_WORDS,
    list(string.ascii_letters + string.digits + string.punctuation),
    COMMON_WORDS,
    [str(number) for number in range(PAGE_SIZE + 1)],
)
# Most elements of a made-up list, beside near-twins.
MOST_LINES = 11
# Where in POOLS a text without the words of the pages begins, and one without single characters, too.
FROM_CHARACTERS = 1
FROM_COMMON_WORDS = 2


# ---- small helpers ----
def unique(names):
    """Return the names that occur once, in their order."""
    return [name for name, count in Counter(names).items() if count == 1]

def named_elements(elements):
    """Return the elements with a number whose text occurs once."""
    texts = unique(element["text"] for element in elements if element["text"])
    return [element for element in elements if element["text"] in texts and element["ref"] > 0]

def join_lines(*lines):
    """Join the lines that are not empty."""
    return "\n".join(filter(None, lines))

def quoted(text):
    """Put a text in double quotes.

    Behind a single one, tokenizers take the beginning of "submit" for that of "it's".
    """
    return f'"{text}"'

def format_elements(elements):
    """Write elements as the prompt shows them, one a line."""
    return "\n".join(map(format_element, elements))

def textboxes(elements):
    """Return the text boxes among elements."""
    return [element for element in elements if element["role"] == "textbox"]

def click_place(element):
    """Return the place to click on an element as a text: "80 112"."""
    x, y = click_places(element)[0]
    return f"{x} {y}"


# ---- pages ----
def target_element(world):
    """Return (number of the element that the goal is about next, text to write there), or None.

    The scripted player of the environment knows it. None for a task without one, and where it presses a key.
    """
    with contextlib.suppress(ValueError):
        found = re.match(r'(?:click|type) (\d+)(?: "(.*)")?$', world.expert())
        if found:
            return int(found[1]), found[2] or ""
    return None

def copy_page(world):
    """Copy the page that an environment shows."""
    return Page(
        world.goal,
        world.elements,
        target_element(world),
        world.text(),
        world.prompt(),
        world.picture(),
        world.fingerprint(),
    )

class Page:
    """Hold a page as it was read: questions about it need no browser.

    elements: as worlds.miniwob.page_elements returns them. target: as target_element returns it. The rest is
    what the environment showed. move() and scatter() change the layout: loading a page is slow, moving its
    parts is not.
    """

    def __init__(self, goal, elements, target, text, prompt, picture, fingerprint):
        self.goal = goal
        self.elements = elements
        self.target = target
        self.shown_text = text
        self.shown_prompt = prompt
        self.image = picture
        self.identity = fingerprint

    def text(self):
        return self.shown_text

    def prompt(self):
        return self.shown_prompt

    def picture(self):
        return self.image

    def fingerprint(self):
        return self.identity

    def lines(self):
        """Return the elements as lines, also where the prompt shows the goal only."""
        return self.shown_text or format_elements(self.elements)

    def move(self, draw):
        """Move everything by the same distance, to a place where it fits."""
        width, height = self.image.size
        # The content is what is not white.
        left, top, right, bottom = ImageChops.invert(self.image).getbbox() or (0, 0, width, height)
        dx = draw(-left, width - right + 1)
        dy = draw(-top, height - bottom + 1)
        moved = Image.new("RGB", self.image.size, "white")
        moved.paste(self.image, (dx, dy))
        elements = []
        for element in self.elements:
            x, y, *size = element["box"]
            box = [x + dx * PAGE_SIZE / width, y + dy * PAGE_SIZE / height, *size]
            elements.append({**element, "box": box})
        self.elements = elements
        self.image = moved
        self.identity = f"{self.identity} {dx} {dy}"

    def scatter(self, draw):
        """Cut the elements out and put each anywhere, where it does not cover another.

        What does not fit is left out. The lines follow the new order, from top to bottom. A model finds a
        text everywhere only if it was taught to find it everywhere.
        """
        scale = self.image.width / PAGE_SIZE
        sheet = Image.new("RGB", self.image.size, "white")
        placed = []
        for element in self.elements:
            place = free_place(element, placed, draw)
            if place is None:
                continue
            x, y = place
            left, top, width, height = map(round, element["box"])
            corners = (left, top, left + width, top + height)
            piece = self.image.crop([round(value * scale) for value in corners])
            sheet.paste(piece, (round(x * scale), round(y * scale)))
            placed.append({**element, "box": [x, y, width, height]})
        self.elements = sorted(placed, key=lambda element: (element["box"][1], element["box"][0]))
        # "The 2nd textbox" is another one now.
        if self.target and self.target[0] in [box["ref"] for box in textboxes(self.elements)]:
            self.target = None
        if self.shown_text:
            self.shown_text = format_elements(self.elements)
        self.image = sheet
        self.identity = f"{self.identity} {[element['box'] for element in self.elements]}"

def free_place(element, placed, draw):
    """Draw a place (x, y) for an element apart from those that are placed already.

    None if none of ten draws is free, or if the element is too small, too large or not wholly in the picture.
    """
    left, top, width, height = map(round, element["box"])
    fits = 4 < width <= 120 and 4 < height <= 40
    if not fits or not 0 <= left <= PAGE_SIZE - width or not 0 <= top <= PAGE_SIZE - height:
        return None
    places = [(draw(PAGE_SIZE + 1 - width), draw(PAGE_SIZE + 1 - height)) for _ in range(10)]
    for x, y in places:
        if all(are_apart([x, y, width, height], other["box"]) for other in placed):
            return x, y
    return None

def are_apart(box, other):
    """Tell whether two boxes (left, top, width, height) do not overlap."""
    left, top, width, height = box
    other_left, other_top, other_width, other_height = other
    beside = left + width <= other_left or other_left + other_width <= left
    above = top + height <= other_top or other_top + other_height <= top
    return beside or above


# ---- questions ----
class Asker:
    """Draw questions about pages, each a tuple (kind, question, answer).

    ask() draws a question, picture() one that needs the picture, text() one that needs the lines only.
    finish() gives every question the shape of a prompt in play.
    """

    def __init__(self, rng):
        self.rng = rng

    def draw(self, *bounds):
        """Draw an integer: draw(high) or draw(low, high), without high."""
        return int(self.rng.integers(*bounds))

    def pick(self, things):
        """Draw one of some things."""
        return things[self.draw(len(things))]

    def sample(self, things, most=8):
        """Draw several of some things, in any order."""
        return [things[i] for i in self.rng.permutation(len(things))[:most]]

    def words(self, low, high, first_pool=0):
        """Draw a text of low to high - 1 pieces, each from one of the POOLS from first_pool on."""
        pools = [POOLS[self.draw(first_pool, len(POOLS))] for _ in range(self.draw(low, high))]
        text = ""
        for pool in pools:
            # Three in four pieces begin with a space.
            text += ("", " ")[self.draw(4) > 0]
            text += self.pick(pool)
        text = text.strip()
        # The marker of actions is not shown before play.
        return text if MARKER not in text else "so"

    def ask(self, page, text_share=0.3):
        """Draw a question; text_share is the share of those that can be answered without the picture."""
        asked = None
        if self.rng.random() >= text_share:
            asked = self.picture(page)
        return asked or self.text(page)

    # ---- questions that need the picture ----
    def picture(self, page):
        """Draw a question about the picture; None if it shows nothing to ask about."""
        visible = []
        for element in page.elements:
            has_name = 0 < len(element["text"]) <= 16 or element["role"] == "textbox"
            left, top, _, _ = element["box"]
            if has_name and 0 <= left < PAGE_SIZE and 0 <= top < PAGE_SIZE:
                visible.append(element)
        # A text that occurs twice has no one place.
        texts = unique(element["text"] for element in visible if element["text"])
        named = self.sample([element for element in visible if element["text"] in texts])
        boxes = sorted(textboxes(visible), key=lambda box: box["box"][1])
        which = self.draw(100)
        lines = page.lines() if self.draw(3) == 0 else ""
        if named and which < 45:
            return self.ask_places(named, lines)
        if named and which < 70:
            return self.ask_named_place(named[0], lines)
        targets = [element for element in visible if page.target and element["ref"] == page.target[0]]
        if which < 92 and targets:
            goal = join_lines(page.goal, lines)
            return self.finish("it", goal, "Where is it?", click_place(targets[0]), not lines)
        if boxes:
            number = self.draw(min(3, len(boxes)))
            question = f"Where is textbox {number + 1}?"
            return self.finish("nth", lines, question, click_place(boxes[number]))
        if named:
            return self.picture(page)
        return None

    def ask_places(self, named, lines):
        """Ask for the places of several texts: a long answer, in which each place can be right or wrong."""
        texts = ", ".join(quoted(element["text"]) for element in named)
        answer = ", ".join(f"{quoted(element['text'])} {click_place(element)}" for element in named)
        return self.finish("places", lines, f"Which places have {texts}?", answer)

    def ask_named_place(self, element, lines):
        """Ask for the place of a text in the shape of a goal that is about it."""
        goal = self.pick(GOALS).format(element["text"])
        before = join_lines(goal, lines)
        return self.finish("it made", before, "Where is it?", click_place(element), not lines)

    # ---- questions that need the lines only ----
    def echo(self, low=2, high=8):
        """Ask to repeat a text of low to high - 1 pieces."""
        text = self.words(low, high)
        return "echo", f"Repeat:\n{text}", text

    def text(self, page):
        """Draw a question about the goal and the lines, of the page or of a made-up list of elements."""
        which = self.draw(100)
        if which < 6:
            return self.echo(4, 30)
        lines = page.lines()
        while which < 68:
            # a list that names nothing once has nothing to ask for
            asked = self.ask_listing(self.listing(), which)
            if asked:
                return asked
        return self.ask_target(page, lines) or self.text(page)

    def ask_target(self, page, lines):
        """Ask for what the page's own goal is about; None if the page does not show it."""
        if not page.target or page.target[0] not in [element["ref"] for element in page.elements]:
            return None
        number, text = page.target
        is_typing = bool(text and self.draw(3)) or self.draw(12) == 0
        if not is_typing:
            before = f"{page.goal}\n{lines}"
            return self.finish("it number", before, "Which number is it?", number, True)
        new_text = text
        if text and self.draw(2):
            new_text = self.pick(PAGE_WORDS)
        goal = page.goal.replace(text or new_text, new_text)
        return self.ask_typing(goal, lines, number, new_text)

    def ask_typing(self, goal, lines, number, text):
        """Ask what is to be written into a field, in one of three forms, which the question names.

        The answer is the text alone, in quotes, or in quotes behind the number of the field.
        """
        form = self.draw(3) if text else 0
        question = (
            "What is to be written?",
            "What, in quotes, is to be written?",
            "Which number is it, and what, in quotes, is to be written?",
        )[form]
        answer = (text or "nothing", f'"{text}"', f'{number} "{text}"')[form]
        before = f"{goal}\n{lines}"
        # Nothing but the goal is needed for the text in quotes.
        if form == 1 and self.draw(2):
            before = goal
        return self.finish("it text", before, question, answer)

    # ---- questions about a made-up list: to find a text among many has to be learned from many ----
    def listing(self, most=MOST_LINES):
        """Draw a list of elements with near-twins, pieces without a number, and numbers of any size.

        most: elements, beside the twins.
        """
        ref = self.draw(1, 15)
        list_role = self.pick(("mixed", "button", "span", "link"))
        elements = []
        for _ in range(self.draw(2, most + 1)):
            ref += self.draw(1, 3)
            text = self.listed_text()
            role = list_role
            if role == "mixed":
                role = self.pick(("button", "button", "link", "span", "div", "p", "textbox"))
            if role == "textbox":
                value = "" if self.draw(3) else self.pick(PAGE_WORDS)
                elements.append(dict(ref=ref, role=role, value=value, text=""))
                continue
            has_ref = bool(self.draw(5)) or list_role == "button"
            elements.append(dict(ref=ref if has_ref else -1, role=role, value=None, text=text))
            if self.draw(6) == 0:
                # a near-twin: the same text with a capital and perhaps a period
                ref += 1
                twin = text.capitalize() + "." * self.draw(2)
                elements.append(dict(ref=ref, role=role, value=None, text=twin))
        if self.draw(8) == 0:
            return self.sample(elements, len(elements))
        return elements

    def listed_text(self):
        """Draw the text of an element: a word, some pieces, or two or three words."""
        text = self.pick(PAGE_WORDS) if self.draw(5) else self.words(1, 4)
        if self.draw(4) == 0:
            text = " ".join(self.pick(PAGE_WORDS) for _ in range(self.draw(2, 4)))
        return text

    def ask_listing(self, listing, which):
        """Draw a question about a list; None if it has no number whose text occurs once.

        which: 0 to 23 asks for the numbers of several texts, 24 to 51 for one, 52 to 67 for a text to write.
        """
        lines = format_elements(listing)
        boxes = textboxes(listing)
        if which >= 24 and boxes and self.draw(6) == 0:
            number = self.draw(min(3, len(boxes)))
            goal = f"Focus into the {('1st', '2nd', '3rd')[number]} input textbox."
            return self.ask_number(goal, lines, boxes[number])
        if which >= 52:
            return self.ask_new_field(listing)
        named = self.sample(named_elements(listing))
        if not named:
            return None
        if which >= 24:
            goal = self.pick(GOALS).format(named[0]["text"])
            return self.ask_number(goal, lines, named[0])
        texts = ", ".join(quoted(element["text"]) for element in named)
        answer = ", ".join(f"{quoted(element['text'])} {element['ref']}" for element in named)
        return self.finish("numbers", lines, f"Which numbers have {texts}?", answer)

    def plain_target(self, most):
        """Draw a goal about a made-up list of up to `most` elements -> (goal and list, number)."""
        named = []
        while not named:
            listing = self.listing(most)
            named = named_elements(listing)
        element = self.pick(named)
        goal = self.pick(GOALS).format(element["text"])
        return f"{goal}\n{format_elements(listing)}", element["ref"]

    def ask_number(self, goal, lines, element):
        """Ask for the number of the element that a goal is about."""
        before = f"{goal}\n{lines}"
        return self.finish("it number made", before, "Which number is it?", element["ref"], True)

    def ask_new_field(self, listing):
        """Put a text box into the list in place of all others, and ask what is to be written there."""
        field = dict(ref=self.draw(1, 60), role="textbox", value="", text="")
        listing.insert(self.draw(len(listing) + 1), field)
        text = self.pick(PAGE_WORDS) if self.draw(4) else self.words(1, 4)
        goal = self.pick(TYPING_GOALS).format(text)
        shown = [element for element in listing if element is field or element["role"] != "textbox"]
        return self.ask_typing(goal, format_elements(shown), field["ref"], text)

    # ---- the shape of a prompt ----
    def finish(self, kind, before, question, answer, may_be_silent=False):
        """Give a question the shape of a prompt in play, without its syntax -> (kind, prompt, reply).

        As in play, lines beside the point may stand between the page and the end of the prompt, and the reply
        may have to begin with certain words. These words are told, or shown in an example with another answer
        behind them. A model that has never seen such an example copies the answer, too: in play it says 13
        after "for example: click 13".
        may_be_silent: leave the question out at times, because the goal is question enough. It then means the
        number if there are lines, and the place if there are none.
        """
        answer = str(answer)
        lines = [before, *self.distracting_lines()]
        if may_be_silent and self.draw(2):
            question = ""
        form = self.draw(10)
        beginning = self.words(1, 5, FROM_CHARACTERS)
        how = ""
        if form < 4:
            example = self.example_answer(answer)
            lines += self.list_of_actions(beginning)
            request = self.words(2, 9, FROM_COMMON_WORDS)
            how = f"{request}, for example: {beginning} {example}"
        elif form < 6:
            how = f"Begin with: {beginning}"
        if how:
            answer = f"{beginning} {answer}"
        lines.append(f"{question} {how}".strip())
        return kind, join_lines(*lines), answer

    def distracting_lines(self):
        """Draw no line beside the point, one or two."""
        if not self.draw(2):
            return []
        return [self.words(3, 24, FROM_CHARACTERS) for _ in range(self.draw(1, 3))]

    def example_answer(self, answer):
        """Draw another answer of the same shape, at times its first word only.

        An example does not show how long every answer is: the question has to say that.
        """

        def other_number(match):
            return str(self.draw(PAGE_SIZE + 1))

        def other_word(match):
            return self.pick(PAGE_WORDS)

        example = re.sub(r"\d+", other_number, answer)
        example = re.sub(r"[A-Za-z]+", other_word, example)
        if self.draw(4) == 0:
            return example.split()[0]
        return example

    def list_of_actions(self, beginning):
        """Draw a line that lists some forms of a reply, or no line."""
        word = beginning.split()[-1]
        forms = [f"{word} {self.words(1, 4, FROM_CHARACTERS)}" for _ in range(self.draw(1, 4))]
        if not self.draw(2):
            return []
        return [" or ".join(forms)]
