"""
What a vision-language model can do before it has met any action syntax: the pre-training tasks Reading and Captions (config/pretrain_*.py).
One question a turn about a random state of a random game or of a world, a sum, or a text to repeat; the reply is the answer, no marker.
"""
import re, string
from collections import Counter

import numpy as np

from envs import MARKER, Env, NumberLine, Text, is_held_out
from pretrain.page_questions import Asker, Page, alone, meant
from worlds.cards import RANKS, Blackjack, EZPoints, Points24, hand_value, deal_cards, hand_points
from worlds.gym import BabyAI, FrozenLake
from worlds.miniwob import MiniWoB

SEEN = "What is in the picture?"
# The games of the first base's questions. A new world is not one of them: it would change the texts of pre-training.
GAMES = {"NumberLine": NumberLine, "EZPoints": EZPoints, "Points24": Points24, "Blackjack": Blackjack}

ASKED = f"{SEEN} What is the target number? current Which larger, difference? are cards? first second third fourth card? values sum product of dealer " \
        "show? your cards? Is there a soft ace? How many do you have? last item? value Repeat: yes no empty blank A J Q K End reply with an action, for example:"
ATOMS = [sorted({w for c in GAMES.values() for w in f"{ASKED} {c.goal} Formula: Actions: {c.kinds[0].doc()}".split()}), [str(n) for n in range(100)],
         list(string.ascii_letters + string.digits + string.punctuation), "th he in er an re on at en nd ti es or te of ed is it al ar".split()]

WORDS = [word for word in sorted({*ATOMS[0], *"turn left right go forward pick up drop toggle".split()}) if word.isalpha()]

class Reading(Env):
    """One question a turn about a random state of a random game, a sum, or a text to repeat. The reply is the answer, no marker."""
    name, kinds, marker, split, max_turns, only, pages = "Reading", (Text(),), False, False, 1, (), {}
    def __init__(self, world=None, **kw):             # Reading:BabyAI-GoToLocal-v0 asks about that world, not about the games
        super().__init__(**kw)
        self.world, self.atoms = world, ATOMS
        if self.world and not isinstance(self.world, (BabyAI, FrozenLake, MiniWoB)):
            raise ValueError(f"env={f'{self.name}:{world.name}'!r}: there are questions about BabyAI's levels, FrozenLake and MiniWoB++'s pages, and, without a world behind the name, about the card games.")
        if self.world:
            self.name, self.max_parallel = f"{self.name}:{world.name}", self.world.max_parallel
            self.atoms = [sorted({word for kind in self.world.kinds for word in kind.doc().replace(",", "").split()}), *ATOMS[1:]]
    def start(self):
        draw = lambda *args: self.rng.integers(*args).tolist()
        name, which = "" if self.world else list(GAMES)[self.rng.integers(4)], self.rng.random()
        self.game, asked = self.ask_world(self.rng) if self.world else self.ask(name, GAMES[name](self.size), draw)      # also draws the game's state
        if isinstance(self.game, Page):
            [(self.kind, self.question, self.answer)] = asked
            return
        if which < 0.25:
            name, asked = "", [self.echo()]
        elif which < 0.3 and not self.only:
            b, a = sorted(self.rng.integers(0, 25, size=2).tolist())
            sums = [(f"{a} + {b}", a + b), (f"{a} - {b}", a - b), (f"{a % 11} * {b % 11}", (a % 11) * (b % 11))]
            name, asked = "", [("arithmetic", f"What is {text}?", result) for text, result in sums]
        asked = [question for question in asked if question[0] in self.only] or asked
        first = which > (0.95 if self.world else 0.8) and not self.only     # the first one is the caption; a world's are so long that they would be most of the loss
        kind, question, answer = asked[0 if first else self.rng.integers(len(asked))]
        # as in play, the question is not always all there is: the goal, the state and something beside the point may come before it
        context = [self.game.goal, self.game.text(), self.echo()[2]]
        if self.only:                                    # the games' stages ask without
            context = context[:2 if self.world else 0]
        self.question = "\n".join([line for line in context if line and line not in question and self.rng.random() < 0.4] + [question])
        self.kind, self.answer = f"{name} {kind}".strip(), str(answer)
    def ask_world(self, rng):
        """A state a few random moves after a start that is not held out, and questions about it."""
        if self.world.max_parallel:
            asked = [""]
            while asked[0] == "" or self.only and asked[0] not in self.only:
                page = self.page(rng)
                asked = Asker(rng).ask(page)
            return page, [asked]
        self.walk(rng)
        return self.world, (rooms if isinstance(self.world, BabyAI) else lake)(self.world, lambda *args: rng.integers(*args).tolist())
    def page(self, rng):
        """A page, slow to come by, is one of 900, each dealt once, then shown as it is, moved, or in pieces."""
        world, draw = self.world, lambda *args: rng.integers(*args).tolist()
        number = draw(900)
        if (world.name, number) not in self.pages:
            self.walk(np.random.default_rng(number))
            self.pages[world.name, number] = world.goal, world.elements, meant(world), world.text(), world.prompt(), world.picture(), world.fingerprint()
        page = Page(world.places, *self.pages[world.name, number])
        (lambda draw: None, page.move, page.scatter, page.scatter)[draw(4)](draw)
        return page
    def walk(self, rng):
        world = self.world
        world.rng, world.over = rng, True
        while world.over:
            world.start()
            world.over, to_the_point = is_held_out(world.fingerprint(), world.one_in), isinstance(world, BabyAI) and rng.random() < 0.5
            for _ in range(0 if world.over else rng.integers(8 if to_the_point else 4)):             # who is on its way has other last actions than who walks at random
                world.over = world.over or any(world.act(world.parse_env(world.expert() if to_the_point else world.sample(rng)))[1:])     # it ended: back to a start
    def close(self):
        if self.world:
            self.world.close()
    def ask(self, name, game, draw):
        if name == "NumberLine":
            game.current, game.target = draw(0, 6, 2)
            larger = "target" if game.target > game.current else "current" if game.current > game.target else "equal"
            return game, [("picture", SEEN, game.caption()), ("target", "What is the target number?", game.target), ("current", "What is the current number?", game.current),
                    ("larger", "Which is larger, target or current?", larger), ("difference", "What is the difference?", abs(game.target - game.current))]
        if name == "Blackjack":
            game.player, game.dealer, game.stood = deal_cards(self.rng, draw(2, 6)), deal_cards(self.rng, 2), bool(draw(2))
            points, total = hand_points(game.player)[0], hand_value(*hand_points(game.player))
            return game, [("picture", SEEN, game.caption()), ("dealer", "What does the dealer show?", RANKS[game.dealer[0][0]]), *[("your sum", "What is the sum of your cards?", total)] * 3,
                    ("your cards", "What are your cards?", game.caption().split(" you ")[1]),
                    ("soft ace", "Is there a soft ace?", "no" if total == points else "yes"), ("count", "How many cards do you have?", len(game.player))]
        game.cards, items = deal_cards(self.rng, 2 if name == "EZPoints" else 4), [*game.words()[:-1], "blank"]
        game.formula = [items[i] for i in draw(0, len(items), draw(game.limit + 2) if draw(2) else draw(5))]    # half short: as in real play
        ranks, points, i = [RANKS[rank] for rank, _ in game.cards], game.points(), draw(len(game.cards))
        nth = ('first', 'second', 'third', 'fourth')[i]
        asked = [("picture", SEEN, game.caption()), ("cards", "What are the cards?", " ".join(ranks)), ("values", "What are the values of the cards?", " ".join(map(str, points))),
                 ("card", f"What is the {nth} card?", ranks[i]), ("value", f"What is the value of the {nth} card?", points[i])]
        if 0 < len(game.formula) < 7:
            asked += [("formula", f"{game.text()}\nWhat is the formula?", " ".join(game.formula)), ("last item", f"{game.text()}\nWhat is the last item?", game.formula[-1])]
        if name == "EZPoints":
            asked += [("sum", "What is the sum of the cards?", sum(points)), ("product", "What is the product of the cards?", points[0] * points[1])]
        return game, asked
    def echo(self):
        """A random text to repeat: copying has to be learned, and no question about a picture needs most of the tokens."""
        out = MARKER
        while MARKER in out:                                             # "[", "action", "]" may meet by chance
            pools = [self.atoms[i] for i in self.rng.integers(len(self.atoms), size=self.rng.integers(1, 7))]
            out = "".join(("", " ")[self.rng.integers(2)] + pool[self.rng.integers(len(pool))] for pool in pools).strip()
        return "echo", f"Repeat:\n{out}", out              # on a line of its own: there it has the same tokens as in the reply
    def act(self, action):
        self.success = action[0].strip() == self.answer
        return int(self.success), True, False
    def prompt(self): return self.question
    def picture(self): return self.game.picture()
    def fingerprint(self): return f"{self.question} {self.answer} {self.game.fingerprint()}"
    def tag(self): return self.kind
    def expert(self): return self.answer

class Captions(Reading):
    """"What is in the picture?" and texts to repeat only, the first stage: what a picture holds has to be seen before it can be asked about. Also where several things are
    and which numbers several texts have: long answers, in which each finding is told at once whether it is right."""
    name, only = "Captions", ("picture", "places", "numbers")

class Finding(Reading):
    """Where a named thing is, and texts to repeat only: the stage before everything where there is something to find. Among other questions it is not learned."""
    name, only = "Finding", ("where", "where one", "it", "it number")

class Facing(Reading):
    """Where a named thing is, seen by the agent, whether the way is free, what it did last, and texts to repeat only: the stage after Finding."""
    name, only = "Facing", ("side", "ahead", "it side", "it ahead", "free", "beside", "between", "in vain", "turned")

class Leading(Reading):
    """Which way the shortest path to a named thing begins, around what is in the way, and texts to repeat only: the stage after Facing."""
    name, only = "Leading", ("way", "mission way", "mission told")

STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))          # east, south, west, north: minigrid's order

def path(free, state, goals):
    """The shortest way, as a tuple of 'ahead', 'left' and 'right', from state (x, y, facing) until one of the goals is right in front; a turn costs a move. None if there is none."""
    ways, seen = [(state, ())], {state}
    for (x, y, facing), words in ways:
        there = x + STEPS[facing][0], y + STEPS[facing][1]
        if there in goals:
            return words
        for word, after in (("ahead", (*there, facing)), ("left", (x, y, (facing - 1) % 4)), ("right", (x, y, (facing + 1) % 4))):
            if after not in seen and (word != "ahead" or free(*there)):
                seen.add(after)
                ways.append((after, (*words, word)))

def some(things, draw): return sorted(things, key=lambda _: draw(1 << 30))[:5]       # at most five, in any order

def told(mission, ways, answer, draw):
    """(question, answer) in the shape of play, without its syntax: what is asked in one form only is not called forth by another."""
    some_words = lambda n, between: between.join(WORDS[draw(len(WORDS))] for _ in range(n))
    sign = "({<"[draw(3)] + some_words(1, "") + ")}>"[draw(3)]
    listed = (f"Ways: {', '.join(ways)}", f"{some_words(1, '')}: {some_words(2 + draw(9), ', ')}", f"{some_words(1, '').capitalize()}: {some_words(4 + draw(9), ' ')}")[draw(3)]
    end = f"End your {('answer', 'reply')[draw(2)]} with {('a way', 'a word', some_words(2, ' '))[draw(3)]}, for example: {sign} {(ways[draw(len(ways))], some_words(1, ''), some_words(2, ' '))[draw(3)]}"
    return "\n".join([mission, *[listed] * (draw(4) > 0), end]), f"{sign} {answer}"

def rooms(world, draw):
    """[(kind, question, answer), ...] about a BabyAI level's picture. Places are columns and rows of what is shown, from the upper left."""
    view = world.settings["agent_pov"]
    grid, seen = world.level.gen_obs_grid() if view else (world.level.grid, np.ones((world.level.width, world.level.height), bool))
    (x, y), facing = ((3, 6), 3) if view else (tuple(map(int, world.level.agent_pos)), world.level.agent_dir)
    dx, dy = STEPS[facing]
    what = lambda i, j: "unseen" if not seen[i, j] else f"{cell.color} {cell.type}" if (cell := grid.get(i, j)) and cell.type != "wall" else "wall" if cell else "nothing"
    things = [(what(i, j), i, j) for j in range(grid.height) for i in range(grid.width) if (i, j) != (x, y) and what(i, j) not in ("unseen", "wall", "nothing")]
    hidden = {f"{cell.color} {cell.type}" for cell in world.level.grid.grid if cell and cell.type != "wall"} - {thing for thing, _, _ in things}
    side, along = [lambda n, words=words: "nowhere" if n is None else words[0] if n > 0 else words[1] if n < 0 else "neither" for words in (("right", "left"), ("ahead", "behind"))]
    looks, counts = ("east", "south", "west", "north")[facing], Counter(thing.split()[1] for thing, _, _ in things)
    kind, (i, j) = ("ball", "box", "key", "door")[draw(4)], (draw(grid.width), draw(grid.height))
    asked = [("picture", SEEN, ", ".join([*(f"{thing} {i} {j}" for thing, i, j in things), f"agent {x} {y} {looks}"])), ("front", "What is in front of the agent?", what(x + dx, y + dy)),
             ("agent", "Where is the agent?", f"{x} {y}"), ("facing", "Which way does the agent look?", looks), ("count", f"How many things of the kind {kind} are there?", counts[kind])]
    asked += [("at", f"What is at {i} {j}?", what(i, j))] * ((i, j) != (x, y)) + [("free", "Is the way ahead free?", "yes" if what(x + dx, y + dy) == "nothing" else "no")] * 6
    asked += [("beside", "What is left of the agent?", what(x + dy, y - dx)), ("beside", "What is right of the agent?", what(x - dy, y + dx))] * 3
    if world.text():
        turns = [done.split()[1] for done in world.done[-3:] if done.startswith("turn")]
        asked += [("in vain", f"{world.text()}\nDid the last one change anything?", "no" if world.done[-1].endswith("in vain") else "yes"),
                  ("turned", f"{world.text()}\nWhich way was the last turn?", turns[-1] if turns else "none")] * 5
    once = alone(thing for thing, _, _ in things)
    places = {**{thing: f"{i} {j}" for thing, i, j in things if thing in once}, **dict.fromkeys(sorted(hidden), "nowhere")}
    away = {thing: ((i - x) * dx + (j - y) * dy, (j - y) * dx - (i - x) * dy) for thing, i, j in things}        # (ahead, to the right)
    begins = lambda words: "nowhere" if words is None else (*words, "here")[0]
    way = lambda goals: begins(path(lambda i, j: 0 <= i < grid.width and 0 <= j < grid.height and what(i, j) == "nothing", (x, y, facing), goals))       # on what is seen
    if five := some(places, draw):
        asked += [("places", f"Which places have {', '.join(five)}?", ", ".join(f"{thing} {places[thing]}" for thing in five))]
    named = re.search(r"(?:the|a) ((?:\w+ )?(?:ball|box|key|door))( |$)", world.goal)
    meant = [thing for thing in {*away, *hidden} if named and thing.endswith(named[1])]
    mission = "\n".join(filter(None, [world.goal, world.text() if draw(2) else ""]))
    if len(meant) == 1 and meant[0] in places:                  # what the mission is about
        ahead, right = away.get(meant[0], (None, None))
        asked += [("it", f"{mission}\nWhere is it?", places[meant[0]])] * 4
        asked += [("it side", f"{mission}\nIs it left or right of the agent?", side(right)), ("it ahead", f"{mission}\nIs it ahead of the agent or behind?", along(ahead))] * 6
    if len(meant) == 1 and (meant[0] in places or not named[2]):
        goals, level = {(i, j) for thing, i, j in things if thing == meant[0]}, world.level
        if not goals and mission != world.goal:                 # out of sight: what it did last says where it has just seen it, and where it has looked in vain
            goals = {(i, j) for j in range(level.height) for i in range(level.width) if (cell := level.grid.get(i, j)) and f"{cell.color} {cell.type}" == meant[0]}
            answer = begins(path(lambda i, j: level.grid.get(i, j) is None, (*map(int, level.agent_pos), level.agent_dir), goals))
        else:
            answer = way(goals)
        asked += [("mission way", f"{mission}\nWhich way does the shortest path to it begin?", answer)] * 20
        asked += [("mission told", *told(mission, ("ahead", "left", "right", "here", "nowhere"), answer, draw))] * 60
    for thing in sorted(hidden):                                # behind the agent, where it sees its own view only
        asked += [("where", f"Where is the {thing}?", "nowhere"), ("side", f"Is the {thing} left or right of the agent?", "nowhere"), ("way", f"Which way does the shortest path to the {thing} begin?", "nowhere")]
    for thing, i, j in things:
        asked += [("thing", f"What is at {i} {j}?", thing)]
        if (i == x or j == y) and (apart := abs(i - x) + abs(j - y)) > 1:
            between = {what(x + k * (i - x) // apart, y + k * (j - y) // apart) for k in range(1, apart)}
            asked += [("between", f"Is the way to {i} {j} free?", "yes" if between == {"nothing"} else "no")] * 2
            if thing in once:
                asked += [("between", f"Is the way to the {thing} free?", "yes" if between == {"nothing"} else "no")] * 4
        for word in thing.split():                              # by one word of two, where that is enough: easier to find, and found first
            if sum(word in t.split() for t, _, _ in things) == 1:
                asked += [("where one", f"Where is the {word} one?", f"{i} {j}")] * 2
        if thing in once:
            ahead, right = away[thing]
            seen_from = f"{'ahead' if ahead >= 0 else 'behind'} {abs(ahead)} {'right' if right >= 0 else 'left'} {abs(right)}"
            asked += [("where", f"Where is the {thing}?", f"{i} {j}"), ("relative", f"Seen by the agent, where is the {thing}?", seen_from)] * 2
            asked += [("side", f"Is the {thing} left or right of the agent?", side(right)), ("ahead", f"Is the {thing} ahead of the agent or behind?", along(ahead))]
            asked += (2 if (answer := way({(i, j)})) == "ahead" else 6) * [("way", f"Which way does the shortest path to the {thing} begin?", answer)]
    return asked

def lake(world, draw):
    """[(kind, question, answer), ...] about FrozenLake's picture, the agent on any tile from which there is a way. Ways are points of the compass: its actions have other words."""
    lake, compass = world.gym.unwrapped, dict(left="west", down="south", right="east", up="north")
    n, what = lake.ncol, lambda i, j: dict(F="ice", S="ice", H="hole", G="flag")[lake.desc[j, i].decode()] if 0 <= i < n and 0 <= j < n else "nothing"
    ways = {s: compass[words[0]] for s in range(n * n) if lake.desc.ravel()[s] in b"SF" and (words := world.way(s))}
    around = [s for s, way in ways.items() if way != ("south" if s // n < n - 1 else "east")]       # where going south as far as that goes is not the way
    can = around if around and draw(2) else list(ways)
    lake.s = can[draw(len(can))]
    (y, x), holes = divmod(lake.s, n), [f"{i} {j}" for j in range(n) for i in range(n) if what(i, j) == "hole"]
    asked = [("picture", SEEN, ", ".join([f"agent {x} {y}", *(f"hole {hole}" for hole in holes)])), ("where", "Where is the agent?", f"{x} {y}"), ("places", "Which places have holes?", ", ".join(holes) or "none")]
    way = ways[lake.s]
    asked += [("way", f"{goal}Which way does the shortest path to the flag begin?", way) for goal in ("", world.goal + "\n")] * 2 + [("mission told", *told(world.goal, tuple(compass.values()), way, draw))] * 8
    for where, (dx, dy) in zip(("east", "south", "west", "north"), STEPS):
        asked += [("beside", f"What is {where} of the agent?", what(x + dx, y + dy))] * (4 if what(x + dx, y + dy) == "hole" else 1)
    return asked + [("at", f"What is at {i} {j}?", what(i, j)) for i, j in [(draw(n), draw(n))]]


def corpus(n, seed=0, readings=()):
    """Texts to train a tokenizer on: n questions and answers, with some of the games' prompts less the line that shows the marker.
    readings: the Reading environments whose questions they are; none: those about the card games."""
    rng, readings = np.random.default_rng(seed), list(readings) or [Reading()]
    for i in range(n // 10 if any(reading.max_parallel for reading in readings) else n):     # pages are slow to come by
        reading = readings[i % len(readings)]
        reading.rng = rng
        reading.start()
        yield from (reading.question, reading.answer, *([reading.game.prompt().rpartition("\n")[0]] if i % 8 == 0 else []))
    for reading in readings:
        reading.close()
