"""
Questions for pre-training: what a vision-language model can do before it meets any action syntax.

Each environment asks one question a turn: about a random state of a card game or of a world, a sum, or a
text to repeat. The reply is the answer, without a marker. Reading asks all questions; Captions, Finding,
Facing and Leading are stages of pre-training, which ask some of them. pretrain/recipes.py and
pretrain/config_tiny.py use them.
"""
import copy

import numpy as np

from envs import MARKER, Env, Text, is_held_out
from pretrain.game_questions import ATOMS, GAME_QUESTIONS, GAMES
from pretrain.grid_questions import lake_questions, room_questions
from pretrain.page_questions import Asker, Page, copy_page
from worlds.contract import Unplayable
from worlds.gym import BabyAI, FrozenLake
from worlds.miniwob import MiniWoB

# How many pages of a task are loaded, which takes a tenth of a second each.
PAGES = 400
# So many draws in vain mean that there is nothing to draw.
MANY = 1000

def draw_from(rng):
    """Return a function draw(n) that draws an integer below n, or draw(low, high)."""

    def draw(*bounds):
        return int(rng.integers(*bounds))

    return draw

class Reading(Env):
    """Ask one question a turn: about a card game or a world, a sum, or a text to repeat.

    world: the environment behind the colon of "Reading:BabyAI-GoToLocal-v0"; None asks about the card games.
    After a reset, `game` is what the picture shows, and `kind`, `question` and `answer` are texts.
    """

    name = "Reading"
    kinds = (Text(),)
    marker = False
    split = False
    online = False
    max_turns = 1
    # The kinds of questions that a stage asks, beside texts to repeat. Without any, all are asked.
    topics = ()
    # Whether the questions are about held-out starts, to measure what was learned, or about all others.
    is_held_out = False
    # {(name of the world, is_held_out, number): Page}. All environments share it: pages are slow to load.
    pages = {}

    def __init__(self, world=None, **kw):
        super().__init__(**kw)
        self.world = world
        self.atoms = ATOMS
        if world is None:
            return
        self.name = f"{self.name}:{world.name}"
        if not isinstance(world, (BabyAI, FrozenLake, MiniWoB)):
            raise ValueError(f"env={self.name!r}: there are questions about BabyAI's levels, FrozenLake and "
                             "MiniWoB++'s pages, and, without a world behind the name, about the card "
                             "games.")
        self.max_parallel = world.max_parallel
        commands = " ".join(kind.doc() for kind in world.kinds).replace(",", "")
        self.atoms = [sorted(set(commands.split())), *ATOMS[1:]]

    def start(self):
        """Draw a state, and a question about it or about something else."""
        name = "" if self.world else list(GAMES)[self.rng.integers(4)]
        which = self.rng.random()
        if self.world:
            self.game, asked = self.ask_world(self.rng)
        else:
            self.game = GAMES[name](self.size)
            asked = GAME_QUESTIONS[name](self.game, self.rng)
        if isinstance(self.game, Page):
            # An Asker has finished the question.
            [(self.kind, self.question, self.answer)] = asked
            return
        if which < 0.25:
            name = ""
            asked = [self.echo()]
        elif which < 0.3 and not self.topics:
            name = ""
            asked = self.sums()
        asked = [question for question in asked if question[0] in self.topics] or asked
        # The first question asks for a caption. A world's captions are so long that they would make up most
        # of the loss, so they are asked less often.
        if which > (0.95 if self.world else 0.8) and not self.topics:
            kind, question, answer = asked[0]
        else:
            kind, question, answer = asked[self.rng.integers(len(asked))]
        self.question = "\n".join([*self.context(question), question])
        self.kind = f"{name} {kind}".strip()
        self.answer = str(answer)

    def context(self, question):
        """Draw lines to stand before a question: the goal, the state, something beside the point.

        As in play, the question is not always all there is.
        """
        texts = [self.game.goal, self.game.text(), self.echo()[2]]
        if self.topics and self.world:
            texts = texts[:2]
        elif self.topics:
            texts = []
        lines = []
        for text in texts:
            if text and text not in question and self.rng.random() < 0.4:
                lines.append(text)
        return lines

    def echo(self):
        """Ask to repeat a random text.

        Copying has to be learned, and no question about a picture needs most of the tokens.
        """
        if isinstance(self.world, MiniWoB):
            return Asker(self.rng).echo()
        text = MARKER
        # "[", "action" and "]" may meet by chance.
        while MARKER in text:
            count = self.rng.integers(1, 7)
            pools = [self.atoms[i] for i in self.rng.integers(len(self.atoms), size=count)]
            text = ""
            for pool in pools:
                text += ("", " ")[self.rng.integers(2)]
                text += pool[self.rng.integers(len(pool))]
            text = text.strip()
        # On a line of its own it has the same tokens as in the reply.
        return "echo", f"Repeat:\n{text}", text

    def sums(self):
        """Draw two numbers and ask for their sum, their difference and a product."""
        b, a = sorted(self.rng.integers(0, 25, size=2).tolist())
        c = a % 11
        d = b % 11
        return [
            ("arithmetic", f"What is {a} + {b}?", a + b),
            ("arithmetic", f"What is {a} - {b}?", a - b),
            ("arithmetic", f"What is {c} * {d}?", c * d),
        ]

    # ---- a world ----
    def ask_world(self, rng):
        """Draw a state of the world -> (what shows it, [(kind, question, answer), ...])."""
        if isinstance(self.world, MiniWoB):
            for _ in range(MANY):
                page = self.page(rng)
                asked = Asker(rng).ask(page)
                if not self.topics or asked[0] in self.topics:
                    return page, [asked]
            raise Unplayable(f"env={self.name!r}: nothing of the kind is asked about these pages; Captions, "
                             "Finding and Reading ask about pages.")
        self.walk(rng)
        if isinstance(self.world, BabyAI):
            return self.world, room_questions(self.world, draw_from(rng))
        return self.world, lake_questions(self.world, draw_from(rng))

    def page(self, rng):
        """Draw one of some pages as it is, moved, or in pieces; each is loaded once."""
        number = int(rng.integers(PAGES))
        key = (self.world.name, self.is_held_out, number)
        if key not in self.pages:
            self.walk(np.random.default_rng(number))
            self.pages[key] = copy_page(self.world)
        page = copy.copy(self.pages[key])
        draw = draw_from(rng)
        layout = draw(4)
        if layout == 1:
            page.move(draw)
        elif layout > 1:
            page.scatter(draw)
        return page

    def walk(self, rng):
        """Bring the world to a state a few moves after a start that is held out, or not."""
        world = self.world
        world.rng = rng
        for _ in range(MANY):
            world.lost = ""
            world.start()
            world.over = is_held_out(world.fingerprint(), world.one_in) != self.is_held_out
            # An agent on its way to the goal has other last actions than one that walks at random.
            follows_expert = isinstance(world, BabyAI) and rng.random() < 0.5
            if not world.over:
                self.make_moves(rng, follows_expert)
            if not world.over and not world.lost:
                return
        part = "held out" if self.is_held_out else "drawn in training"
        raise Unplayable(f"env={self.name!r}: none of {MANY} starts is {part}.")

    def make_moves(self, rng, follows_expert):
        """Play some moves, of the expert or at random, until the episode ends."""
        world = self.world
        for _ in range(rng.integers(8 if follows_expert else 4)):
            move = world.expert() if follows_expert else world.sample(rng)
            _, terminated, truncated = world.act(world.parse_env(move))
            world.over = terminated or truncated
            if world.over:
                return

    # ---- what an environment needs ----
    def act(self, action):
        self.success = action[0].strip() == self.answer
        return int(self.success), True, False

    def prompt(self):
        return self.question

    def picture(self):
        return self.game.picture()

    def fingerprint(self):
        return f"{self.question} {self.answer} {self.game.fingerprint()}"

    def tag(self):
        return self.kind

    def expert(self):
        return self.answer

    def close(self):
        if self.world:
            self.world.close()

class Captions(Reading):
    """Ask "What is in the picture?" and for texts to repeat only: the first stage.

    A model has to see what a picture holds before it can be asked about it. The stage also asks where several
    things are and which numbers several texts have: long answers, in which each place can be right or wrong.
    """

    name = "Captions"
    topics = ("picture", "places", "numbers")

class Finding(Reading):
    """Ask where a named thing is, and for texts to repeat only.

    Among other questions it is not learned, so it has a stage of its own.
    """

    name = "Finding"
    topics = ("where", "where one", "it", "it number")

class Facing(Reading):
    """Ask where a thing is from the agent's position, whether the way is free, and what it did last.

    This stage follows Finding. It asks for texts to repeat, too.
    """

    name = "Facing"
    topics = (
        "side",
        "ahead",
        "it side",
        "it ahead",
        "free",
        "beside",
        "between",
        "in vain",
        "turned",
    )

class Leading(Reading):
    """Ask which way the shortest path to a named thing begins, around what is in the way.

    This stage follows Facing. It asks for texts to repeat, too.
    """

    name = "Leading"
    topics = ("way", "mission way", "mission told")

def corpus(n, seed=0, readings=()):
    """Yield texts to train a tokenizer on: n questions, their answers and some prompts.

    readings: the Reading environments to ask, in turn; without any, the one about the card games. If one of
    them is about pages, n // 10 questions are asked, because pages are slow to load. A prompt comes without
    its last line, which shows the marker.
    """
    rng = np.random.default_rng(seed)
    readings = list(readings) or [Reading()]
    if any(reading.max_parallel for reading in readings):
        n = n // 10
    for i in range(n):
        reading = readings[i % len(readings)]
        reading.rng = rng
        reading.start()
        yield reading.question
        yield reading.answer
        if i % 8 == 0:
            yield reading.game.prompt().rpartition("\n")[0]
    for reading in readings:
        reading.close()
