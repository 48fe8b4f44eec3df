"""
The text protocol and the environments: a picture and a text in, an action as text out.

    observation -> prompt() -> model -> "I am below it. [action] +" -> parse_agent() -> "+" -> parse_env() -> ("+",) -> act()

A new environment is one class of about 40 lines: copy NumberLine. The games here follow Gym Cards as RL4VLM's code (not its
README) plays them: Zhai et al., arXiv 2405.10292. Where we depart, and why:
 1. `reset(seed)` seeds (theirs mostly does not), the last observation of an episode is a real picture, the drawings are ours.
 2. An invalid reply costs `penalty`, is a turn, and moves nothing (invalid="random": RL4VLM's rule, a random action for free).
    Such an episode must end too, hence turn limits: EZPoints 10, Points24 30, Blackjack 12. NumberLine's 10 is the original's.
 3. Formulas are parsed, never given to Python's `eval`, and computed in exact rationals: 8/(3-8/3) is 24 (not so in floats),
    `**` and `//` are malformed. As in the original, digits join (1 2 is 12), signs may precede a number, a blank is white space.
 4. Blackjack shows ten points as 10, J, Q or K, a thirteenth each; the original has no 10. The odds are the same.
 5. Two success rules are reported: `success` (goal reached) and RL4VLM's own, `success_return` (summed reward > 0).
"""
import atexit, contextlib, difflib, importlib.util, io, json, os, re, shutil, signal, string, sys, threading, time, zlib
from collections import Counter
from fractions import Fraction
from functools import lru_cache, reduce
import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARKER = "[action]"
SEEN = "What is in the picture?"

# ---- the text protocol: a kind of action documents, parses, samples and (where finite) enumerates itself ----
class Words:                # one of a list of words: Words("hit", "stand")
    def __init__(self, *words): self.list = list(words)
    def words(self): return list(self.list)
    def doc(self): return (" or " if len(self.list) < 3 else ", " if any(" " in word for word in self.list) else " ").join(self.list)
    def parse(self, text): return (text,) if text in self.list else None
    def sample(self, rng): return self.list[rng.integers(len(self.list))]

class Text:                 # free text: anything but nothing
    def words(self): return None
    def doc(self): return "any text"
    def parse(self, text): return (text,) if text else None
    def sample(self, rng): return "".join(rng.choice(list(string.ascii_lowercase), size=rng.integers(1, 8)))

class Command:              # a word with arguments: Command("click", int, int), Command("type", int, str); a str as JSON writes it, in quotes
    # [0-9] because \d takes the digits of every script; at most nine, because a model's endless digits are slow to convert
    patterns = {int: r"(-?[0-9]{1,9})", str: r'("(?:[^"\\]|\\.)*")'}
    def __init__(self, word, *types, names=()): self.word, self.types, self.names = word, types, names or ["NUMBER" if t is int else "TEXT" for t in types]
    def words(self): return None if self.types else [self.word]
    def doc(self): return " ".join([self.word, *(name if t is int else f'"{name}"' for name, t in zip(self.names, self.types))])
    def sample(self, rng): return canonical((self.word, *(int(rng.integers(100)) if t is int else Text().sample(rng) for t in self.types)))
    def parse(self, text):
        match = re.fullmatch(" +".join([re.escape(self.word), *(self.patterns[t] for t in self.types)]), text)
        try:
            action = match and (self.word, *map(json.loads, match.groups()))
            return action if match and canonical(action).encode() else None
        except ValueError:      # an unknown escape, a number like 007, or half a character ("\ud800": legal JSON that cannot be written)
            return None

def canonical(action):      # the one way to write a parsed action: ("type", 14, "abc") -> type 14 "abc"
    return " ".join([action[0], *(json.dumps(arg, ensure_ascii=False) for arg in action[1:])])
def parse_agent(reply):     # the text behind the last marker, to the end of its line, or None: a plan may come before it
    return reply.rpartition(MARKER)[2].split("\n", 1)[0].strip() if MARKER in reply else None
def held_out(fingerprint, one_in=10):   # one start in ten is for tests only; by what was dealt, not by the seed: no hand is in both parts
    return zlib.crc32(fingerprint.encode()) % one_in == 0

class Env:
    """Gymnasium-style base class; the state is plain attributes: set them after reset(), then ask for observation(). A game adds
    start(): draws a start state with self.rng; act(action) -> reward, terminated, truncated, and sets self.success at the goal;
    picture() -> PIL image, RGB, size x size; fingerprint(): what was dealt, as text, decides the part of the split;
    expert(): a perfect player's action; and, if need be, text(): what there is to observe beside the picture, and
    optimal(word): is an action as good as the expert's, for games where several are."""
    name, goal, kinds, example, max_turns = "", "", (), "", 10
    marker, split = True, True      # False: the whole reply is the action; False: too few different starts to hold any out
    one_in, workers = 10, None      # the share of starts held out; how many may be alive at once, stepped by threads (None: any number, no threads)
    lost = ""                       # why the episode cannot be gone on with (a dead browser, a bot at its wits' end): `play` drops it

    def __init__(self, size=80, penalty=-1.0, invalid="penalty", max_turns=None):
        if invalid not in ("penalty", "random"):
            raise ValueError(f"invalid={invalid!r}: use 'penalty' (costs `penalty`, nothing moves) or 'random' (a random action is played).")
        self.size, self.penalty, self.invalid, self.over, self.rng = size, penalty, invalid, True, np.random.default_rng()
        if max_turns:
            self.max_turns = max_turns

    def reset(self, seed=None, options=None):       # options={"split": "train" | "test"} draws only starts of that part
        split = (options or {}).get("split")
        if split not in (None, "train", "test"):
            raise ValueError(f"split={split!r}: use 'train', 'test' or None.")
        self.rng = self.rng if seed is None else np.random.default_rng(seed)
        self.lost, tries = "", 1
        self.start()
        while split and self.split and held_out(self.fingerprint(), self.one_in) != (split == "test"):
            if (tries := tries + 1) > 1000:
                raise SystemExit(f"env={self.name!r}: no start of the {split} part in 1000: it has too few different ones to hold any out, say split = False in its class.")
            self.start()
        self.turns, self.total, self.success, self.over = 0, 0.0, False, False
        return self.observation(), {}

    def step(self, reply):                          # every reply is a turn, valid or not
        if self.over:
            raise RuntimeError(f"{self.name}: the episode is over or never began, call reset() first.")
        action = self.parse(reply)
        info = {"valid": action is not None, "action": canonical(action) if action else ""}
        if action is None and self.invalid == "random":
            action = self.parse_env(self.sample(self.rng))
        reward, terminated, truncated = self.act(action) if action else (self.penalty, False, False)
        self.turns, self.total = self.turns + 1, self.total + reward
        truncated = not terminated and (truncated or self.turns >= self.max_turns)
        self.over = terminated or truncated
        return self.observation(), float(reward), terminated, truncated, {**info, "success": self.success, "success_return": self.total > 0}

    def prompt(self):
        actions = "Actions: " + " or ".join(kind.doc() for kind in self.kinds)
        return "\n".join(filter(None, [self.goal, self.text(), actions, f"End your reply with an action, for example: {MARKER} {self.example}"]))

    def parse(self, reply): return self.parse_env(parse_agent(reply) if self.marker else reply.strip())
    def parse_env(self, text): return next(filter(None, (kind.parse(text or "") for kind in self.kinds)), None)
    def words(self): return [word for kind in self.kinds for word in kind.words() or []]
    def sample(self, rng): return self.kinds[rng.integers(len(self.kinds))].sample(rng)     # a valid action's text
    def observation(self): return {"image": self.picture(), "text": self.prompt()}
    def text(self): return ""
    def tag(self): return ""                        # a group of episodes that evaluation reports apart
    def close(self): pass                           # the episode is over: give back what others may use
    def optimal(self, word): return word == self.expert()

# ---- drawing: a picture is a few pastes of cached masks and sprites, drawn 4x too large and shrunk ----
FELT, TRAY, WHITE, BLACK, RED, BLUE = (38, 110, 80), (27, 84, 60), (255, 255, 255), (20, 20, 25), (205, 25, 40), (25, 70, 180)
RANKS, STEM = ["back", "A", *"23456789", "10", *"JQK"], [(0, 0), (0.35, 1), (-0.35, 1)]
SUITS = [([(-0.45, 0.3), (0.45, 0.3)], [[(-0.89, 0.08), (0, -1), (0.89, 0.08), (0, 0.5)], STEM]),      # (discs, polygons) of a spade,
         ([(-0.45, -0.35), (0.45, -0.35)], [[(-0.89, -0.13), (0, 1), (0.89, -0.13), (0, -0.5)]]),       # a heart,
         ([], [[(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]]),                                              # a diamond,
         ([(0, -0.5), (-0.5, 0.2), (0.5, 0.2), (0, 0)], [STEM])]                                        # a club

@lru_cache(maxsize=4096)
def letters(text, size, width):
    """An "L" mask, `size` pixels to the em, squeezed if wider than `width`; bold, because thin strokes vanish at 80 px."""
    font, bold = ImageFont.load_default(size=4 * size), max(1, round(size * 0.12))
    mask = Image.new("L", (round(font.getlength(text)) + 2 * bold, round(5.2 * size)))
    baseline = (mask.height - font.getbbox("0", anchor="ls")[1]) / 2        # centres digits and capitals, whatever hangs below
    ImageDraw.Draw(mask).text((bold, baseline), text, fill=255, font=font, stroke_width=bold, anchor="ls")
    return mask.resize((min(round(width), -(-mask.width // 4)), -(-mask.height // 4)), Image.LANCZOS)

def write(image, text, size, colour, x, y, width, height):      # in the middle of a box
    mask = letters(text, round(size), width)
    image.paste(colour, (round(x + (width - mask.width) / 2), round(y + (height - mask.height) / 2)), mask)

def draw_suit(draw, suit, x, y, r, colour):
    for dx, dy in SUITS[suit][0]:
        draw.ellipse([x + (dx - 0.49) * r, y + (dy - 0.49) * r, x + (dx + 0.49) * r, y + (dy + 0.49) * r], fill=colour)
    for polygon in SUITS[suit][1]:
        draw.polygon([(x + dx * r, y + dy * r) for dx, dy in polygon], fill=colour)

@lru_cache(maxsize=1024)
def card(rank, suit, width, height):
    """An RGBA card, no system font and no foreign picture needed; rank 0 is a card's back."""
    w, h, colour = 4 * width, 4 * height, RED if suit in (1, 2) else BLACK
    sprite = Image.new("RGBA", (w, h))
    draw = ImageDraw.Draw(sprite)
    draw.rounded_rectangle([0, 0, w - 1, h - 1], radius=w // 7, fill=WHITE, outline=(150, 160, 155), width=max(1, w // 40))
    if rank:
        draw_suit(draw, suit, w / 2, h * 0.79, min(w * 0.3, h * 0.15), colour)
    else:
        draw.rounded_rectangle([w // 9, w // 9, w - 1 - w // 9, h - 1 - w // 9], radius=w // 10, fill=(50, 75, 160))
        for i in range(15):
            draw_suit(draw, 2, w * (i % 3 + 1) / 4, h * (i // 3 + 1) / 6, w / 11, (150, 170, 230))
    sprite = sprite.resize((width, height), Image.LANCZOS)
    write(sprite, RANKS[rank] if rank else "", height * 0.66, colour, width * 0.08, height * 0.07, width * 0.84, height * 0.54)
    return sprite

def draw_cards(image, cards, x, y, width, height, step, s):
    for i, (rank, suit) in enumerate(cards):
        sprite = card(rank, suit, round(width * s), round(height * s))
        image.paste(sprite, (round((x + i * step) * s), round(y * s)), sprite)

# ---- NumberLine ----
class NumberLine(Env):
    """Walk to the target. The optimum takes |target - current| steps, 2.28 on average, and returns 1."""
    name, goal, example = "NumberLine", "Move the current number to the target number.", "+"
    kinds, max_turns, split = (Words("-", "+"),), 10, False         # 30 starts: all are trained on, all are evaluated
    def start(self):
        self.current, self.target = self.rng.integers(0, 6, size=2).tolist()
        if self.target == self.current:
            self.target = (self.target + 1) % 5                     # 5, not 6, as in the original: (4, 4) -> 0 and (5, 5) -> 1

    def act(self, action):
        before = abs(self.target - self.current)
        self.current = min(5, max(0, self.current + (1 if action == ("+",) else -1)))
        self.success = self.current == self.target
        return (1 if self.success else 0 if abs(self.target - self.current) < before else -1), self.success, False

    def picture(self):
        image, cell = Image.new("RGB", (self.size, self.size), (250, 250, 247)), self.size / 5
        for y, label, number, colour in ((cell, "Target:", self.target, RED), (3 * cell, "Current:", self.current, BLUE)):
            write(image, label, 0.85 * cell, BLACK, 0, y, 4 * cell, cell)
            write(image, str(number), 1.2 * cell, colour, 4 * cell, y, 0.9 * cell, cell)      # one digit = one patch of a 5 x 5 grid
        return image
    def fingerprint(self): return f"{self.current} {self.target}"
    def caption(self): return f"target {self.target} current {self.current}"
    def expert(self): return "+" if self.target > self.current else "-"

# ---- formulas: a stack machine that takes one item at a time. It scores a finished formula, and tells the expert what a
# half-written one can still become. A frame (acc, term, op, x) is `acc + term op x`, one frame per open bracket; x is None
# while a number is awaited, a str while more digits may join, else a Fraction.
EMPTY = ((0, 1, "*", None),)
def apply(a, op, b):        # None for a division by zero
    return a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b if b else None

def shift(stack, item):
    """The stack after one more item; None if the formula is malformed or divides by zero. Bounded: no power, 64 digits, 64 brackets."""
    below, (acc, term, op, x) = stack[:-1], stack[-1]
    if item in ("blank", " "):
        return below + ((acc, term, op, x and Fraction(x)),)
    if item.isascii() and item.isdigit():
        return None if isinstance(x, Fraction) or len(x or "") >= 64 else below + ((acc, term, op, (x or "") + item),)
    if item == "(":
        return stack + EMPTY if x is None and len(stack) < 64 else None
    if x is None:                                   # only a sign may stand where a number is awaited; `**` and `//` end here
        return below + ((acc, -term if item == "-" else term, op, None),) if item in ("+", "-") else None
    if (term := apply(term, op, Fraction(x))) is None:
        return None
    if item in ("*", "/", "+", "-"):
        return below + ((acc, term, item, None) if item in "*/" else (acc + term, 1 if item == "+" else -1, "*", None),)
    return below[:-1] + (below[-1][:3] + (acc + term,),) if item == ")" and below else None

def read(items):            # the stack of a whole formula
    return reduce(lambda stack, item: stack and shift(stack, item), items, EMPTY)
def evaluate(items):
    """The exact value of a formula (items, or a text), None if it is malformed: evaluate("8/(3-8/3)") == 24."""
    stack = read(items)
    done = stack and len(stack) == 1 and stack[0][3] is not None and shift(stack, "+")      # a + completes what stands before it
    return done[0][0] if done else None

def splits(numbers):        # every way to sort the numbers into two heaps
    return {tuple(tuple(n for i, n in enumerate(numbers) if mask >> i & 1 == side) for side in (0, 1)) for mask in range(2 ** len(numbers))}

@lru_cache(maxsize=1000)
def makeable(numbers, operators):
    """The values of all formulas that use each number once. Each has an operator that is done last: two heaps, two smaller formulas."""
    heaps = [(one, two) for one, two in splits(numbers) if one and two]
    return {apply(a, op, b) for one, two in heaps for a in makeable(one, operators) for b in makeable(two, operators) for op in operators} - {None} \
        if heaps else {Fraction(n) for n in numbers}

@lru_cache(maxsize=50_000)
def ends(stack, left, operators):
    """All values a half-written formula can still end with when it uses all numbers `left`."""
    below, (acc, term, op, x) = stack[:-1], stack[-1]
    if x is not None and (term := apply(term, op, Fraction(x))) is None:
        return set()
    out = set()
    for inside, outside in splits(left) if below else [(left, ())]:         # numbers for the innermost bracket, and for after it
        for factors, terms in splits(inside):                               # numbers that join its last product, and that are added to that
            signs = op if x is None else [o for o in "*/" if o in operators]
            products = {term} if x is not None and not factors else {apply(term, o, f) for o in signs for f in makeable(factors, operators)} - {None}
            tails = {apply(acc, o, t) for o in "+-" if o in operators for t in makeable(terms, operators)} if terms else {acc}
            here = {a + b for a in products for b in tails}
            out |= set().union(*(ends(below[:-1] + (below[-1][:3] + (v,),), outside, operators) for v in here)) if below else here
    return out

class Points(Env):
    """Write a formula from the cards' points, one item a turn; `=` ends it. What EZPoints and Points24 share."""
    wanted, limit = 0, 0        # the value to make; an episode is truncated once the formula has more items than this
    def act(self, action):
        item, (used, points) = action[0], self.used(self.formula)
        if len(self.formula) > self.limit:
            return -1, False, True
        if item == "=":
            self.success = used == points and evaluate(self.formula) == self.wanted
            return (10 if self.success else -1), True, False
        wrong = item.isdigit() and used[int(item)] >= points[int(item)]     # on no card, or its cards are used up
        self.formula.append("blank" if wrong else item)
        return -1 if wrong else 0, False, False
    def points(self): return [min(rank, 10) for rank, _ in self.cards]
    def used(self, formula): return Counter(int(item) for item in formula if item.isdigit()), Counter(self.points())
    def text(self): return "Formula: " + (" ".join(self.formula) or "empty")
    def fingerprint(self): return suited(self.cards)
    def caption(self): return "cards " + " ".join(RANKS[rank] for rank, _ in self.cards)
    def optimal(self, word):
        """Can the formula with this item still be finished? Exact, but for brackets that no longer fit under the limit."""
        if word == "=":
            return self.expert() == "="
        stack, (used, points) = read([*self.formula, word]), self.used([*self.formula, word])
        if stack is None or used - points:
            return False
        left = tuple(sorted((points - used).elements()))
        needed = 2 * len(left) - (stack[-1][3] is None) + len(stack)        # this item, a number and an operator each, closing brackets
        return needed <= self.limit - len(self.formula) and self.wanted in ends(stack, left, "".join(o for o in "+-*/" if o in self.words()))
    def expert(self):
        """The first item that keeps the formula alive; `=` when it is done, or cannot be saved: that ends it with the least loss."""
        stack, (used, points) = read(self.formula), self.used(self.formula)
        if stack is None or used == points and evaluate(self.formula) == self.wanted:
            return "="
        fits = [w for w in self.words()[:-1] if (w.isdigit() or w == "(") == (stack[-1][3] is None)]       # no joined digits, no signs
        return next(filter(self.optimal, fits), "=")
    def picture(self):
        s, image, two = self.size / 80, Image.new("RGB", (self.size, self.size), FELT), len(self.cards) == 2
        draw_cards(image, self.cards, *((3, 3, 34, 46, 40) if two else (1, 2, 18.5, 31, 20)), s)
        top, columns, tall = (54, 6, 22) if two else (35.5, 7, 14)          # every item has its place: easier to read than running text
        ImageDraw.Draw(image).rounded_rectangle([s, top * s, 79 * s, 79 * s], radius=3 * s, fill=TRAY)
        for i, item in enumerate(self.formula):
            x, y, wide = 2 + i % columns * 76 / columns, top + 1 + i // columns * tall, 76 / columns
            write(image, "_" if item == "blank" else item, 13 * s, WHITE, x * s, y * s, (wide - 0.5) * s, tall * s)
        return image

class EZPoints(Points):
    """Make 12 from two cards. Every hand can be solved; four steps and a return of 10 at best."""
    name, goal, example = "EZPoints", "Make 12 from both cards. J Q K count 10. End with =.", "+"
    kinds, max_turns, wanted, limit = (Words(*map(str, range(1, 11)), *"+*="),), 10, 12, 5
    def start(self):
        rank = int(self.rng.integers(2, 14))
        points = min(rank, 10)
        other = 12 // points if points in (2, 3, 4, 6) and self.rng.random() < 0.5 else 12 - points
        cards = [(r, int(self.rng.integers(4))) for r in (rank, other)]
        self.cards, self.formula = cards[::-1] if self.rng.random() < 0.5 else cards, []

class Points24(Points):
    """Make 24 from four cards. 73.1 % of the deals can be solved, the others only lost cheaply."""
    name, goal, example = "Points24", "Make 24 from all four cards. J Q K count 10. End with =.", "+"
    kinds, max_turns, wanted, limit = (Words(*map(str, range(1, 11)), *"+-*/()="),), 30, 24, 20
    def start(self): self.cards, self.formula = deal(self.rng, 4), []
    def tag(self): return "solvable" if self.wanted in makeable(tuple(sorted(self.points())), "+-*/") else "unsolvable"

# ---- Blackjack ----
def deal(rng, n): return [(int(rng.integers(1, 14)), int(rng.integers(4))) for _ in range(n)]               # (rank, suit), infinite deck
def suited(cards): return " ".join(f"{rank}{'shdc'[suit]}" for rank, suit in cards)                         # for fingerprints
def hand(cards): return sum(min(rank, 10) for rank, _ in cards), any(rank == 1 for rank, _ in cards)      # (points, is there an ace)
def best(points, ace): return points + 10 if ace and points <= 11 else points                             # an ace counts 11 if it can
DRAWS = [(points, 4 / 13 if points == 10 else 1 / 13) for points in range(1, 11)]

@lru_cache(maxsize=None)
def dealer_ends(points, ace):
    """{final total: probability} of a dealer who draws below 17 and stands on soft 17; a bust counts 0."""
    if (total := best(points, ace)) >= 17:
        return {total if total <= 21 else 0: 1.0}
    ends = Counter()
    for draw, p in DRAWS:
        ends.update({end: p * q for end, q in dealer_ends(points + draw, ace or draw == 1).items()})
    return ends

@lru_cache(maxsize=None)
def best_play(points, ace, up, lose=-1.0):
    """Exact dynamic programming, (expected return, action) against the dealer's `up` card; lose=0 maximises the wins instead."""
    if (total := best(points, ace)) > 21:
        return lose, "stand"
    stand = sum(p * (1 if total > end else lose if total < end else 0) for end, p in dealer_ends(up, up == 1).items())
    hit = sum(p * best_play(points + draw, ace or draw == 1, up, lose)[0] for draw, p in DRAWS)
    return max((stand, "stand"), (hit, "hit"))

class Blackjack(Env):
    """Beat the dealer. A perfect player wins 42.9 % of the hands, a random one 28.1 %: compare over thousands of hands."""
    name, goal, example = "Blackjack", "Blackjack: come closer to 21 than the dealer, but not over it.", "stand"
    kinds, max_turns = (Words("stand", "hit"),), 12
    def start(self): self.player, self.dealer, self.stood = deal(self.rng, 2), deal(self.rng, 2), False
    def act(self, action):
        if action == ("hit",):
            self.player += deal(self.rng, 1)
            bust = best(*hand(self.player)) > 21
            return (-1 if bust else 0), bust, False
        self.stood = True
        while best(*hand(self.dealer)) < 17:
            self.dealer += deal(self.rng, 1)
        mine, theirs = best(*hand(self.player)), best(*hand(self.dealer))
        self.success = mine > theirs or theirs > 21
        return (1 if self.success else 0 if mine == theirs else -1), True, False
    def picture(self):      # a card is as wide as a patch; the dealer's second card stays hidden to the end, as in the original
        s, image, rows = self.size / 80, Image.new("RGB", (self.size, self.size), FELT), -(-len(self.player) // 5)
        ImageDraw.Draw(image).rectangle([0, 0, self.size, 27.5 * s], fill=TRAY)
        draw_cards(image, [self.dealer[0], (0, 0)], 0.5, 2, 15, 23.5, 16, s)
        for i in range(rows):
            draw_cards(image, self.player[5 * i:5 * i + 5], 0.5, 30 + i * 25 / max(1, rows - 1), 15, 23.5, 16, s)
        return image
    # of the cards one can see: with the hidden one in it, hands that look alike would be in both parts of the split
    def fingerprint(self): return suited([*self.player[:2], self.dealer[0]])
    def caption(self): return " ".join(["dealer", RANKS[self.dealer[0][0]], "you", *(RANKS[rank] for rank, _ in self.player)])
    def expert(self): return best_play(*hand(self.player), min(self.dealer[0][0], 10))[1]

ENVS = {"NumberLine": NumberLine, "EZPoints": EZPoints, "Points24": Points24, "Blackjack": Blackjack}

# ---- environments of others: real, optional (requirements-envs.txt), imported only when asked for ----
def need(env, package):
    """An optional package, imported; where it is missing, one sentence instead of a traceback."""
    os.environ.update(PYGAME_HIDE_SUPPORT_PROMPT="1", SDL_VIDEODRIVER="dummy", SDL_AUDIODRIVER="dummy")   # pictures only: no window, no sound, no word
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SystemExit(f"env={env!r} needs the package {error.name or package}: pip install -r requirements-envs.txt")

class Gym(Env):
    """Any gymnasium environment with a picture and named actions: render() is the picture, the words of `kinds` are the actions 0, 1, ..."""
    id, settings = "", {}           # what goes to gymnasium.make, beside the render mode
    def __init__(self, **kw):
        super().__init__(**kw)
        os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")        # else pygame, which draws some of them, swallows `kill`
        self.open()
    def open(self, **settings):
        self.gym = need(self.name, "gymnasium").make(self.id, render_mode="rgb_array", disable_env_checker=True, **self.settings, **settings)
    def start(self): self.gym.reset(seed=int(self.rng.integers(2 ** 31)))
    def act(self, action):
        _, reward, terminated, truncated, _ = self.gym.step(self.words().index(action[0]))
        self.success = bool(terminated and reward > 0)
        return float(reward), bool(terminated), bool(truncated)
    def picture(self):
        image = Image.fromarray(self.gym.render())
        return image if image.size == (self.size, self.size) else image.resize((self.size, self.size), Image.LANCZOS)
    def fingerprint(self): return str(zlib.crc32(self.gym.render().tobytes()))      # right where the picture shows the whole state

class FrozenLake(Gym):
    """Gymnasium's frozen lake, not slippery, on a map that is dealt anew: from the upper left corner to the flag in the lower right one."""
    name, goal, example = "FrozenLake", "Walk over the ice to the flag, not into a hole.", "right"
    kinds, max_turns, id = (Words("left", "down", "right", "up"),), 20, "FrozenLake-v1"

    def start(self):                                    # draws a start state with self.rng
        draw = need(self.name, "gymnasium.envs.toy_text.frozen_lake").generate_random_map
        self.open(is_slippery=False, desc=draw(4, seed=int(self.rng.integers(2 ** 31))))
        super().start()

    def fingerprint(self):                              # what was dealt: decides which starts are held out
        return b"".join(self.gym.unwrapped.desc.ravel()).decode()

    def way(self, state):                               # the shortest one to the flag, in words
        ways, seen = [(state, [])], {state}
        for state, words in ways:
            for i, word in enumerate(self.words()):
                [(_, after, reward, over)] = self.gym.unwrapped.P[state][i]
                if reward:
                    return [*words, word]
                if not over and after not in seen:
                    seen.add(after)
                    ways.append((after, [*words, word]))

    def expert(self): return self.way(self.gym.unwrapped.s)[0]
    def optimal(self, word):                            # several ways may be as short
        [(_, after, reward, over)] = self.gym.unwrapped.P[self.gym.unwrapped.s][self.words().index(word)]
        return bool(reward) or not over and len(self.way(after)) < len(self.way(self.gym.unwrapped.s))

class BabyAI(Gym):
    """Any BabyAI level (package minigrid): "BabyAI-GoToLocal-v0" shows the whole map, "BabyAI-GoToLocal-v0:view" what the agent sees,
    7 x 7 cells in front of it, each as large as in the map of a room of 8 x 8, and says what it did last. What the agent carries is said, too. Reward 1 - 0.9 * step / limit at the goal; an episode ends at the level's own limit, or at max_turns if that is less."""
    kinds, example = (Words("turn left", "turn right", "go forward", "pick up", "drop", "toggle"),), "go forward"
    def __init__(self, name, **kw):
        self.name, (self.id, _, way) = name, name.partition(":")
        need(name, "minigrid")
        self.settings = dict(agent_pov=way == "view")
        gym = need(name, "gymnasium")
        if self.id not in gym.registry or way not in ("", "view"):
            near = difflib.get_close_matches(self.id, [i for i in gym.registry if i.startswith("BabyAI-")], n=2, cutoff=0)
            raise ValueError(f"env={name!r} is unknown; nearest: {', '.join(near)}; a level's name, with :view behind it for what the agent sees.")
        super().__init__(**kw)
        self.level, self.limit = self.gym.unwrapped, kw.get("max_turns") or 10 ** 9
        self.level.tile_size = max(4, self.size // (8 if way else max(self.level.width, self.level.height)))
    def start(self):
        with contextlib.redirect_stdout(io.StringIO()):             # minigrid prints the levels that it rejects
            super().start()
        self.goal, self.max_turns, self.bot, self.hint, self.renewed, self.done = self.level.mission, min(self.limit, self.level.max_steps), None, None, 0, []
    def act(self, action):
        if self.bot:
            self.expert()                                           # the bot plans by what it has seen: it has to see every state
        self.last, self.hint, before = self.words().index(action[0]), None, self.level.hash(32)
        out = super().act(action)
        self.done.append(action[0] + " in vain" * (self.level.hash(32) == before))
        return out
    def text(self):             # who sees but a part has to remember where it has looked: three turns to one side show all four; and what is carried stands on no map
        held, done = self.level.carrying, self.done[-3:] if self.settings["agent_pov"] else []
        return "\n".join(filter(None, [done and f"Last actions: {', '.join(done)}", held and f"Carrying: {held.color} {held.type}"]))
    def picture(self):
        return Image.fromarray(self.gym.render()).crop((0, 0, self.size, self.size)) if self.settings["agent_pov"] else super().picture()
    def fingerprint(self): return f"{self.goal} {self.level.hash(32)}"      # of the grid, the agent's place and direction
    def expert(self):
        """minigrid's bot, from any state and after moves that were not its own. What others did, or its bugs, can bring it to its wits' end: then a new one
        takes over, five times an episode, or the episode is lost. A plan can go in circles for ever: it needs at most 8 searches a turn, 100 are too many."""
        while self.hint is None and not self.lost:
            try:
                if self.bot is None:
                    self.bot, self.last = need(self.name, "minigrid.utils.baby_ai_bot").BabyAIBot(self.level), None
                    search = self.bot._breadth_first_search
                    self.bot._breadth_first_search = lambda *args, **kw: (next(self.searches), search(*args, **kw))[1]
                self.searches = iter(range(100))
                self.hint = self.words()[self.bot.replan(self.last)]            # IndexError: 6, it believes that it is done
            except StopIteration:
                self.lost = "BabyAI's bot goes in circles"
            except Exception as error:                                          # an assertion, an opened box
                self.bot, self.renewed = None, self.renewed + 1
                self.lost = f"BabyAI's bot gave up ({type(error).__name__})" if self.renewed > 5 else ""
        return self.hint or self.example

# ---- MiniWoB++: web pages in a real Chromium ----
AREA = (0, 50, 160, 210)        # of a page's 160 x 210 pixels; above it stands the goal, which the prompt has too: this way text is shown pixel for pixel at size 160
KEYS = {"Enter": "\ue007", "Tab": "\ue004", "Backspace": "\ue003", "ArrowLeft": "\ue012", "ArrowRight": "\ue014", "PageUp": "\ue00e", "PageDown": "\ue00f"}
ROLES = {"input_text": "textbox", "input_password": "textbox", "textarea": "textbox", "input_checkbox": "checkbox", "input_radio": "radio", "a": "link", "button": "button", "select": "select", "t": "text"}
PAGE = "const said = core.getUtterance(), over = WOB_DONE_GLOBAL; return [WOB_TASK_READY, over, WOB_RAW_REWARD_GLOBAL, said.utterance || said, over ? null : core.getDOMInfo()];"
DEAL = "if (window.jQuery) jQuery.fx.off = true; document.activeElement.blur(); core.EPISODE_MAX_TIME = 1e9; core.endEpisode(0); Math.seedrandom(arguments[0]); core.setDataMode('train'); core.startEpisodeReal(); "

def elements(dom):
    """What core.getDOMInfo() gives -> [dict(ref, role, text, value, focused, classes, box)] of what says something or takes input, in the page's order.
    box: left, top, width, height in the pixels of AREA. A piece of text that has no number of its own has a ref below 0."""
    inside = lambda node: " ".join(filter(None, [str(node.get("text") or ""), *map(inside, node.get("children", []))]))
    def walk(node):
        tag, children = node["tag"].lower(), node.get("children", [])
        whole = tag in ROLES or all(child["tag"] == "t" for child in children)
        text = inside(node) if whole else ""
        if not text and not tag.startswith("input_") and node.get("bgColor", "").startswith("rgb("):
            text = node["bgColor"]                                  # a coloured box or a slider's handle; transparent ones are only there for the layout
        if whole and (text or tag in ROLES or "value" in node or not isinstance(node.get("classes", ""), str)):    # the last: a shape in an SVG
            yield dict(ref=node["ref"], role=ROLES.get(tag, tag), text=text, value=node.get("value"), focused=bool(node.get("focused")), classes=str(node.get("classes", "")),
                       box=[node["left"], node["top"] - AREA[1], node["width"], node["height"]])
        for child in () if whole else children:
            yield from walk(child)
    return list(walk(dom))

def element_line(e):        # button 'ONE' [13] | checkbox off [5] | textbox 'abc' [7] | 'a piece of text'; who reads from left to right has to have seen the text to find its number behind it
    said = ("on" if e["value"] else "off") if type(e["value"]) is bool else repr(e["text"] if e["value"] is None else e["value"])
    return f"{e['role']} {said} [{e['ref']}]" if e["ref"] > 0 else said

def open_browser(env):
    """A headless Chromium with a window as wide as the tasks were made for, in a process group of its own, so that it can be ended when it hangs."""
    webdriver, found = need(env, "selenium.webdriver"), [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "chromedriver")]
    if not found[3] or not any(found[:3]):
        raise SystemExit(f"env={env!r} needs Chromium and its driver: apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, found))
    for flag in ("headless", "disable-gpu", "no-sandbox", "hide-scrollbars", "disable-dev-shm-usage"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(found[3], popen_kw={"start_new_session": True}))
    browser.command_executor.client_config.timeout = 20
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=500, height=240, deviceScaleFactor=1, mobile=False))
    BROWSERS.append(browser)
    return browser

def end_browser(browser):
    BROWSERS.remove(browser)
    with contextlib.suppress(OSError):                              # gone already
        os.killpg(browser.service.process.pid, signal.SIGKILL)
    browser.service.process.wait()

BROWSERS = []               # all that are open
atexit.register(lambda: [end_browser(browser) for browser in list(BROWSERS)])

class MiniWoB(Env):
    """Any MiniWoB++ task (package miniwob) in a real Chromium: "miniwob/click-test-2-v1" acts by number and by place; with :element behind it by the numbers
    in the text only, with :coordinate by places only (the text is then the task alone, the page is to be seen). Places are pixels of the page's
    area below the goal, 160 x 160, whatever the picture's size. A number that no element has and a place outside of the page parse, but cost the penalty. Reward: the page's own without
    its discount for time; `success`: all of it, 1. The page's clock is off, max_turns ends an episode; the last picture is the last before the page closed.
    A browser is lent to one episode at a time; one that dies, or does not answer for 20 s, is replaced, and its episode is `lost`."""
    max_turns, one_in, workers, idle = 20, 4, 4, []
    element = (Command("click", int, names=("ELEMENT",)), Command("type", int, str, names=("ELEMENT", "TEXT")))
    coordinate = (Command("click", int, int, names=("X", "Y")), Command("type", str, names=("TEXT",)))
    def __init__(self, name, **kw):
        super().__init__(**kw)
        page, _, self.way = name.removeprefix("miniwob/").partition(":")
        self.name, self.task, self.browser, self.shot = name, page.removesuffix("-v1"), None, Image.new("RGB", (160, 160))
        self.failures = (need(name, "selenium.common.exceptions").WebDriverException, need(name, "urllib3.exceptions").HTTPError, OSError)
        folder = os.path.join(os.path.dirname(getattr(importlib.util.find_spec("miniwob"), "origin", None) or need(name, "miniwob").__file__), "html", "miniwob")
        self.url, tasks = f"file://{folder}/{self.task}.html", sorted(file.removesuffix(".html") for file in os.listdir(folder))
        if self.task not in tasks or self.way not in ("", "element", "coordinate"):
            near = difflib.get_close_matches(self.task, tasks, n=2, cutoff=0)
            raise ValueError(f"env={name!r} is unknown; nearest: {', '.join(f'miniwob/{task}-v1' for task in near)}; with :element or :coordinate behind it, or nothing.")
        self.kinds = (*(self.element if self.way != "coordinate" else ()), *(self.coordinate if self.way != "element" else ()), Words(*(f"press {key}" for key in KEYS)))
        self.example = "click 80 112" if self.way == "coordinate" else "click 13"
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # an end by `kill` or `timeout`, too, takes the browsers with it

    def start(self):
        for attempt in range(3):
            try:
                self.browser = self.browser or (self.idle.pop() if self.idle else open_browser(self.name))
                if self.browser.current_url != self.url:
                    self.browser.get(self.url)
                self.browser.execute_cdp_cmd("Input.dispatchMouseEvent", dict(type="mouseMoved", x=0, y=0))     # no button glows under the last episode's pointer
                self.look(DEAL, int(self.rng.integers(2 ** 31)))
                return
            except self.failures as error:
                self.fail(error)
        raise SystemExit(f"env={self.name!r}: Chromium failed three times in a row: {self.lost}.")
    def look(self, script="", *args):
        """Runs a script in the page, then reads it -> (is the episode over, its reward)."""
        for wait in range(40):                                      # some pages come up slowly
            ready, over, reward, goal, dom = self.browser.execute_script((script if not wait else "") + PAGE, *args)
            if ready:
                break
            time.sleep(0.05)
        if not over:
            self.goal, self.elements, self.seen = goal, elements(dom), False
        return over, reward
    def fail(self, error):
        if self.browser:
            end_browser(self.browser)
        self.browser, self.lost = None, f"the browser failed ({type(error).__name__})"
    def close(self):
        if self.browser:
            self.idle.append(self.browser) if len(self.idle) < self.workers else end_browser(self.browser)
        self.browser = None

    def act(self, action):
        try:
            if not self.perform(action):
                return self.penalty, False, False
            over, reward = self.look()
        except self.failures as error:
            self.fail(error)
            return 0.0, False, True
        self.success = over and reward >= 1
        return (float(reward) if over else 0.0), over, False
    def perform(self, action):
        """Plays an action in the page; False if it names what is not there."""
        numbers, text = [a for a in action[1:] if type(a) is int], "".join(a for a in action[1:] if type(a) is str)
        keys = KEYS[action[0].removeprefix("press ")] if action[0].startswith("press ") else re.sub("[\ue000-\uf8ff]", "", text)      # those are control keys
        chain = need(self.name, "selenium.webdriver").ActionChains(self.browser, duration=0)
        if len(numbers) == 1:
            if numbers[0] not in [e["ref"] for e in self.elements if e["ref"] > 0]:
                return False
            self.browser.execute_script("core.elementClick(arguments[0]);", numbers[0])
        elif numbers:
            if not all(0 <= number < 160 for number in numbers):
                return False
            chain.w3c_actions.pointer_action.move_to_location(numbers[0] + AREA[0], numbers[1] + AREA[1]).click()
        if keys or len(numbers) == 2:
            chain.send_keys(keys).perform()
        return True

    def picture(self):
        if self.browser and not self.seen:
            try:
                self.shot, self.seen = Image.open(io.BytesIO(self.browser.get_screenshot_as_png())).convert("RGB").crop(AREA), True
            except self.failures as error:
                self.fail(error)
        return self.shot.resize((self.size, self.size), Image.LANCZOS)
    def text(self): return "" if self.way == "coordinate" else "\n".join(map(element_line, self.elements))
    def fingerprint(self): return f"{self.task} {self.goal} {zlib.crc32(repr([(e['role'], e['text'], e['value'], e['box']) for e in self.elements]).encode())}"
    def sample(self, rng):                                          # of the numbers and words that are there
        kind = self.kinds[rng.integers(len(self.kinds))]
        refs, words = [e["ref"] for e in self.elements if e["ref"] > 0] or [0], re.findall(r"\w+", self.goal)
        draw = dict(ELEMENT=lambda: int(rng.choice(refs)), X=lambda: int(rng.integers(160)), Y=lambda: int(rng.integers(160)), TEXT=lambda: str(rng.choice(words)))
        return kind.sample(rng) if isinstance(kind, Words) else canonical((kind.word, *(draw[name]() for name in kind.names)))

    def expert(self):
        """The next action of a scripted player; ValueError for a task that has none."""
        said, buttons = re.findall(r'"([^"]*)"', self.goal), [e for e in self.elements if e["role"] == "button"]
        boxes, texts = [e for e in self.elements if e["role"] == "textbox"], {"enter-text": said, "enter-password": 2 * said, "login-user": said}.get(self.task)
        if self.task in ("click-test", "click-test-2", "click-button", "click-dialog", "click-dialog-2", "click-link", "click-tab"):
            label = (said + re.findall(r"Tab #[0-9]+|ONE", self.goal) + ["Click Me!"])[0]
            return self.click(next(e for e in buttons + self.elements if e["text"] == ("Close" if label == "x" else label)))
        if self.task in ("click-checkboxes", "click-option"):
            wanted = re.match("Select (.*) and click", self.goal).group(1).split(", ")
            wrong = [box for box, label in zip(self.elements, self.elements[1:]) if box["role"] in ("checkbox", "radio") and box["value"] != (label["text"] in wanted)]
            return self.click(next((box for box in wrong if box["role"] == "checkbox" or not box["value"]), buttons[-1]))
        if texts:
            return next((self.type(box, text) for box, text in zip(boxes, texts) if box["value"] != text), self.click(buttons[-1]))
        if self.task in ("focus-text", "focus-text-2"):
            return self.click(boxes[int((re.findall("[0-9]", self.goal) or "1")[0]) - 1])
        if self.task == "click-collapsible":
            return self.click(buttons[-1] if any(e["role"] == "div" for e in self.elements) else self.elements[0])
        if self.task == "use-slider":
            handle, shown = self.elements[:2]
            gap = int(re.findall("-?[0-9]+", self.goal)[0]) - int(shown["text"])
            page = self.browser.execute_script("return $('#slider').slider('option', 'max') - $('#slider').slider('option', 'min')") // 5
            keys = ("PageDown", "PageUp") if 2 * abs(gap) > page > 1 else ("ArrowLeft", "ArrowRight")
            return self.click(buttons[-1]) if not gap else f"press {keys[gap > 0]}" if handle["focused"] else self.click(handle)
        raise ValueError(f"env={self.name!r} has no scripted expert: collect its data by a random player or a model, or write one in MiniWoB.expert.")
    def click(self, e):
        if self.way != "coordinate":
            return f"click {e['ref']}"
        over = [other["box"] for other in self.elements[self.elements.index(e) + 1:]]       # a place that no later element covers
        free = [(x, y) for x, y in self.places(e) if not any(l <= x <= l + w and t <= y <= t + h for l, t, w, h in over)]
        return "click {} {}".format(*(free or self.places(e))[0])
    def places(self, e):
        """In its middle, then its corners: one of 8, 24, 40, ..., the middles of the tiny VLM's patches, where such a one lies inside, else of 4, 12, 20, ...: few numbers to tell apart."""
        left, top, width, height = e["box"]
        step = lambda x, low, long: next((y for size in (16, 8, 4) for y in sorted(range(size // 2, 160, size), key=lambda y: abs(y - x)) if low < y < low + long - 1), round(x))
        return [(step(left + dx * width, left, width), step(top + dy * height, top, height)) for dx, dy in ((0.5, 0.5), (0.1, 0.2), (0.9, 0.2), (0.1, 0.8), (0.9, 0.8))]
    def type(self, e, text):
        if e["value"] and not text.startswith(e["value"]):          # somebody wrote something else: away with it
            return "press Backspace" if e["focused"] else self.click(e)
        action = text[len(e["value"]):]
        return canonical(("type", e["ref"], action)) if self.way != "coordinate" else canonical(("type", action)) if e["focused"] else self.click(e)

# ---- scripted players and the front door ----
def player(name, env, rng):
    """One reply of a scripted player: 'expert', 'random', 'malformed' (never parses) or 'biased': 70 % one wrong action, the same
    in every visit of a state, so that whoever clones the most frequent action always fails."""
    sign, word = f"{MARKER} " if env.marker else "", env.sample(rng)
    if name == "random":
        return sign + word
    if name == "expert" or name == "biased" and rng.random() < 0.3:
        return sign + env.expert()
    if name == "biased":
        words, right = env.words(), env.expert()
        after = words.index(right) + 1 if right in words else 0
        return sign + next((w for w in words[after:] + words[:after] if not env.optimal(w)), right)
    if name == "malformed":
        broken = [word, f"[act] {word}", f"move {word}", MARKER, f"{MARKER} go", f"action: {word}", f"{MARKER} {word} {word}", f"{MARKER}\n{word}"]
        return next((broken[i] for i in rng.permutation(len(broken)) if env.parse(broken[i]) is None), "")
    raise ValueError(f"player={name!r} is unknown; known are expert, random, biased, malformed.")

def mixture(mix, env, rng):
    """(reply, name) of a player drawn anew every turn: mixture({"expert": 0.25, "biased": 0.75}, env, rng)."""
    shares = np.array(list(mix.values()), float)
    name = list(mix)[rng.choice(len(mix), p=shares / shares.sum())]
    return player(name, env, rng), name

class Tasks:
    """Several environments behind one: each episode is the next one's, or the one's that options={"task": i} names (modulo their number)."""
    def __init__(self, tasks):
        self.tasks, self.task, self.env = tasks, -1, tasks[0]
        self.split, self.workers = any(t.split for t in tasks), min((t.workers for t in tasks if t.workers), default=None)
    def reset(self, seed=None, options=None):
        self.task = (options or {}).get("task", self.task + 1) % len(self.tasks)
        self.env = self.tasks[self.task]
        return self.env.reset(seed, options)
    def __getattr__(self, key): return getattr(self.env, key)       # all else is the present one's

READINGS = ("Reading", "Captions", "Finding", "Facing", "Leading")             # the pre-training tasks, in extras/reading.py

def make(name, **kw):
    """An environment by its name, or several: make("NumberLine,EZPoints"). kw: size, penalty, invalid, max_turns. ValueError for a name that
    is unknown; SystemExit where an optional package is missing; one sentence each."""
    if "," in name:
        return Tasks([make(part.strip(), **kw) for part in name.split(",") if part.strip()])
    known, (kind, _, world) = {**ENVS, "FrozenLake": FrozenLake}, name.partition(":")
    if kind in READINGS:                                 # pre-training's questions about the games, or about a world: Reading:BabyAI-GoToLocal-v0
        return getattr(importlib.import_module("extras.reading"), kind)(world, **kw)
    if name.startswith(("BabyAI-", "miniwob/")):
        return (BabyAI if name.startswith("BabyAI-") else MiniWoB)(name, **kw)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2, cutoff=0)
        raise ValueError(f"env={name!r} is unknown; nearest: {', '.join(near)}; known: {', '.join(known)}, BabyAI-GoToLocal-v0, miniwob/click-test-v1, ...")
    return known[name](**kw)
