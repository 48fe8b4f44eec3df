"""
The card games of Gym Cards: EZPoints, Points24, Blackjack; how they are drawn, formulas, blackjack's dynamic programming.
"""
from collections import Counter
from fractions import Fraction
from functools import lru_cache, reduce

from PIL import Image, ImageDraw

from envs import BLACK, RED, WHITE, Env, Words, draw_text

FELT = (38, 110, 80)
TRAY = (27, 84, 60)
RANKS, STEM = ["back", "A", *"23456789", "10", *"JQK"], [(0, 0), (0.35, 1), (-0.35, 1)]
SUITS = [([(-0.45, 0.3), (0.45, 0.3)], [[(-0.89, 0.08), (0, -1), (0.89, 0.08), (0, 0.5)], STEM]),      # (discs, polygons) of a spade,
         ([(-0.45, -0.35), (0.45, -0.35)], [[(-0.89, -0.13), (0, 1), (0.89, -0.13), (0, -0.5)]]),       # a heart,
         ([], [[(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]]),                                              # a diamond,
         ([(0, -0.5), (-0.5, 0.2), (0.5, 0.2), (0, 0)], [STEM])]                                        # a club

def draw_suit(draw, suit, x, y, r, colour):
    for dx, dy in SUITS[suit][0]:
        draw.ellipse([x + (dx - 0.49) * r, y + (dy - 0.49) * r, x + (dx + 0.49) * r, y + (dy + 0.49) * r], fill=colour)
    for polygon in SUITS[suit][1]:
        draw.polygon([(x + dx * r, y + dy * r) for dx, dy in polygon], fill=colour)

@lru_cache(maxsize=1024)
def card_sprite(rank, suit, width, height):
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
    draw_text(sprite, RANKS[rank] if rank else "", height * 0.66, colour, width * 0.08, height * 0.07, width * 0.84, height * 0.54)
    return sprite

def draw_cards(image, cards, x, y, width, height, step, s):
    for i, (rank, suit) in enumerate(cards):
        sprite = card_sprite(rank, suit, round(width * s), round(height * s))
        image.paste(sprite, (round((x + i * step) * s), round(y * s)), sprite)

# ---- formulas: a stack machine that takes one item at a time. It scores a finished formula, and tells the expert what a
# half-written one can still become. A frame (acc, term, op, x) is `acc + term op x`, one frame per open bracket; x is None
# while a number is awaited, a str while more digits may join, else a Fraction.
EMPTY = ((0, 1, "*", None),)
def apply_operator(a, op, b):        # None for a division by zero
    return a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b if b else None

def push_item(stack, item):
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
    if (term := apply_operator(term, op, Fraction(x))) is None:
        return None
    if item in ("*", "/", "+", "-"):
        return below + ((acc, term, item, None) if item in "*/" else (acc + term, 1 if item == "+" else -1, "*", None),)
    return below[:-1] + (below[-1][:3] + (acc + term,),) if item == ")" and below else None

def parse_formula(items):            # the stack of a whole formula
    return reduce(lambda stack, item: stack and push_item(stack, item), items, EMPTY)
def formula_value(items):
    """The exact value of a formula (items, or a text), None if it is malformed: evaluate("8/(3-8/3)") == 24."""
    stack = parse_formula(items)
    done = stack and len(stack) == 1 and stack[0][3] is not None and push_item(stack, "+")      # a + completes what stands before it
    return done[0][0] if done else None

def two_heaps(numbers):        # every way to sort the numbers into two heaps
    return {tuple(tuple(n for i, n in enumerate(numbers) if mask >> i & 1 == side) for side in (0, 1)) for mask in range(2 ** len(numbers))}

@lru_cache(maxsize=1000)
def reachable_values(numbers, operators):
    """The values of all formulas that use each number once. Each has an operator that is done last: two heaps, two smaller formulas."""
    heaps = [(one, two) for one, two in two_heaps(numbers) if one and two]
    return {apply_operator(a, op, b) for one, two in heaps for a in reachable_values(one, operators) for b in reachable_values(two, operators) for op in operators} - {None} \
        if heaps else {Fraction(n) for n in numbers}

@lru_cache(maxsize=50_000)
def final_values(stack, left, operators):
    """All values a half-written formula can still end with when it uses all numbers `left`."""
    below, (acc, term, op, x) = stack[:-1], stack[-1]
    if x is not None and (term := apply_operator(term, op, Fraction(x))) is None:
        return set()
    out = set()
    for inside, outside in two_heaps(left) if below else [(left, ())]:         # numbers for the innermost bracket, and for after it
        for factors, terms in two_heaps(inside):                               # numbers that join its last product, and that are added to that
            signs = op if x is None else [o for o in "*/" if o in operators]
            products = {term} if x is not None and not factors else {apply_operator(term, o, f) for o in signs for f in reachable_values(factors, operators)} - {None}
            tails = {apply_operator(acc, o, t) for o in "+-" if o in operators for t in reachable_values(terms, operators)} if terms else {acc}
            here = {a + b for a in products for b in tails}
            out |= set().union(*(final_values(below[:-1] + (below[-1][:3] + (v,),), outside, operators) for v in here)) if below else here
    return out

class Points(Env):
    """Write a formula from the cards' points, one item a turn; `=` ends it. What EZPoints and Points24 share."""
    wanted, limit = 0, 0        # the value to make; an episode is truncated once the formula has more items than this
    def act(self, action):
        item, (used, points) = action[0], self.used(self.formula)
        if len(self.formula) > self.limit:
            return -1, False, True
        if item == "=":
            self.success = used == points and formula_value(self.formula) == self.wanted
            return (10 if self.success else -1), True, False
        wrong = item.isdigit() and used[int(item)] >= points[int(item)]     # on no card, or its cards are used up
        self.formula.append("blank" if wrong else item)
        return -1 if wrong else 0, False, False
    def points(self): return [min(rank, 10) for rank, _ in self.cards]
    def used(self, formula): return Counter(int(item) for item in formula if item.isdigit()), Counter(self.points())
    def text(self): return "Formula: " + (" ".join(self.formula) or "empty")
    def fingerprint(self): return card_names(self.cards)
    def caption(self): return "cards " + " ".join(RANKS[rank] for rank, _ in self.cards)
    def optimal(self, word):
        """Can the formula with this item still be finished? Exact, but for brackets that no longer fit under the limit."""
        if word == "=":
            return self.expert() == "="
        stack, (used, points) = parse_formula([*self.formula, word]), self.used([*self.formula, word])
        if stack is None or used - points:
            return False
        left = tuple(sorted((points - used).elements()))
        needed = 2 * len(left) - (stack[-1][3] is None) + len(stack)        # this item, a number and an operator each, closing brackets
        return needed <= self.limit - len(self.formula) and self.wanted in final_values(stack, left, "".join(o for o in "+-*/" if o in self.words()))
    def expert(self):
        """The first item that keeps the formula alive; `=` when it is done, or cannot be saved: that ends it with the least loss."""
        stack, (used, points) = parse_formula(self.formula), self.used(self.formula)
        if stack is None or used == points and formula_value(self.formula) == self.wanted:
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
            draw_text(image, "_" if item == "blank" else item, 13 * s, WHITE, x * s, y * s, (wide - 0.5) * s, tall * s)
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
    def start(self): self.cards, self.formula = deal_cards(self.rng, 4), []
    def tag(self): return "solvable" if self.wanted in reachable_values(tuple(sorted(self.points())), "+-*/") else "unsolvable"

# ---- Blackjack ----
def deal_cards(rng, n): return [(int(rng.integers(1, 14)), int(rng.integers(4))) for _ in range(n)]               # (rank, suit), infinite deck
def card_names(cards): return " ".join(f"{rank}{'shdc'[suit]}" for rank, suit in cards)                         # for fingerprints
def hand_points(cards): return sum(min(rank, 10) for rank, _ in cards), any(rank == 1 for rank, _ in cards)      # (points, is there an ace)
def hand_value(points, ace): return points + 10 if ace and points <= 11 else points                             # an ace counts 11 if it can
DRAWS = [(points, 4 / 13 if points == 10 else 1 / 13) for points in range(1, 11)]

@lru_cache(maxsize=None)
def dealer_totals(points, ace):
    """{final total: probability} of a dealer who draws below 17 and stands on soft 17; a bust counts 0."""
    if (total := hand_value(points, ace)) >= 17:
        return {total if total <= 21 else 0: 1.0}
    ends = Counter()
    for draw, p in DRAWS:
        ends.update({end: p * q for end, q in dealer_totals(points + draw, ace or draw == 1).items()})
    return ends

@lru_cache(maxsize=None)
def best_play(points, ace, up, lose=-1.0):
    """Exact dynamic programming, (expected return, action) against the dealer's `up` card; lose=0 maximises the wins instead."""
    if (total := hand_value(points, ace)) > 21:
        return lose, "stand"
    stand = sum(p * (1 if total > end else lose if total < end else 0) for end, p in dealer_totals(up, up == 1).items())
    hit = sum(p * best_play(points + draw, ace or draw == 1, up, lose)[0] for draw, p in DRAWS)
    return max((stand, "stand"), (hit, "hit"))

class Blackjack(Env):
    """Beat the dealer. A perfect player wins 42.9 % of the hands, a random one 28.1 %: compare over thousands of hands."""
    name, goal, example = "Blackjack", "Blackjack: come closer to 21 than the dealer, but not over it.", "stand"
    kinds, max_turns = (Words("stand", "hit"),), 12
    def start(self): self.player, self.dealer, self.stood = deal_cards(self.rng, 2), deal_cards(self.rng, 2), False
    def act(self, action):
        if action == ("hit",):
            self.player += deal_cards(self.rng, 1)
            bust = hand_value(*hand_points(self.player)) > 21
            return (-1 if bust else 0), bust, False
        self.stood = True
        while hand_value(*hand_points(self.dealer)) < 17:
            self.dealer += deal_cards(self.rng, 1)
        mine, theirs = hand_value(*hand_points(self.player)), hand_value(*hand_points(self.dealer))
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
    def fingerprint(self): return card_names([*self.player[:2], self.dealer[0]])
    def caption(self): return " ".join(["dealer", RANKS[self.dealer[0][0]], "you", *(RANKS[rank] for rank, _ in self.player)])
    def expert(self): return best_play(*hand_points(self.player), min(self.dealer[0][0], 10))[1]

