"""
The card games of Gym Cards: EZPoints, Points24 and Blackjack.

Four sections: dealing cards, formulas (their value, and what they can still become), the two games of
formulas, Blackjack with its exact best play. The rules are those of RL4VLM's code (Zhai et al., arXiv
2405.10292). envs.py lists the departures that concern every game; these concern the cards:
 1. Formulas are parsed, never given to Python's `eval`, and computed in exact rationals: 8/(3-8/3) is 24,
    which floats miss. `**` and `//` are malformed. As in the original, digits join (1 2 is 12), signs may
    precede a number, and a blank is white space.
 2. Our turn limits are EZPoints 10, Points24 30, Blackjack 12.
 3. Blackjack shows ten points as 10, J, Q or K, one thirteenth each. The original has no 10; the odds are the
    same.
"""
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageDraw

from envs import Env, Words
from worlds.drawing import RANKS, SPADES, WHITE, draw_cards, draw_text

FELT = (38, 110, 80)
TRAY = (27, 84, 60)

# ---- cards: (rank, suit), rank 1 to 13, suit 0 to 3 ----

def deal_cards(rng, n):
    """Draw n cards from an infinite deck."""
    cards = []
    for _ in range(n):
        rank = int(rng.integers(1, 14))
        suit = int(rng.integers(4))
        cards.append((rank, suit))
    return cards

def card_names(cards):
    """Write cards as text for a fingerprint: "1s 12h" is the ace of spades and the queen of hearts."""
    return " ".join(f"{rank}{'shdc'[suit]}" for rank, suit in cards)


# ---- formulas ----
# A stack machine reads a formula item by item: numbers, operators, brackets, blanks. The stack has one frame
# for what is outside all brackets and one more for each open bracket: "8 / ( 3 -" has two, one that awaits
# the bracket's value and one for the sum inside. The stack serves two purposes: the value of a finished
# formula (formula_value), and all values that a half-written one can still get (final_values), which tell the
# expert whether a formula can be saved. All arithmetic is in exact rationals.

class Frame(NamedTuple):
    """An unfinished sum, acc + term op number: after "1 - 2 * 3 /" acc is 1, term -6, op "/", number None.

    acc: the sum of all terms before the last one.
    term: the product of the last term's factors so far, with its sign.
    op: "*" or "/", how the number will join the term.
    number: None while a number is awaited, a str while more digits may join, a Fraction once it is complete.
    """

    acc: Fraction
    term: Fraction
    op: str
    number: Fraction | str | None


EMPTY = (Frame(0, 1, "*", None),)

# Bounds on the cost of a formula. Python's own `eval` hangs on 9**9**9**9.
MAX_DIGITS = 64
MAX_FRAMES = 64

def apply_operator(a, op, b):
    """Return `a op b`, None for a division by zero."""
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    if op == "*":
        return a * b
    return a / b if b else None

def push_item(stack, item):
    """Return the stack after one more item; None if the formula is malformed or divides by zero."""
    acc, term, op, number = stack[-1]
    below = stack[:-1]
    if item in ("blank", " "):
        # White space completes a number: no digit can join it any more.
        complete = None if number is None else Fraction(number)
        return below + (Frame(acc, term, op, complete),)
    if item.isascii() and item.isdigit():
        digits = number or ""
        if isinstance(number, Fraction) or len(digits) >= MAX_DIGITS:
            return None
        return below + (Frame(acc, term, op, digits + item),)
    if number is None:
        return push_before_number(stack, item)
    return push_behind_number(stack, item)

def push_before_number(stack, item):
    """Return the stack after an item where a number is awaited: an opening bracket or a sign.

    Anything else is malformed there, for example the second character of `**` and `//`.
    """
    if item == "(":
        return stack + EMPTY if len(stack) < MAX_FRAMES else None
    acc, term, op, _ = stack[-1]
    if item == "+":
        return stack
    if item == "-":
        return stack[:-1] + (Frame(acc, -term, op, None),)
    return None

def push_behind_number(stack, item):
    """Return the stack after an item behind a number: an operator or a closing bracket."""
    acc, term, op, number = stack[-1]
    below = stack[:-1]
    term = apply_operator(term, op, Fraction(number))
    if term is None:
        return None
    if item in ("*", "/"):
        return below + (Frame(acc, term, item, None),)
    if item in ("+", "-"):
        sign = 1 if item == "+" else -1
        return below + (Frame(acc + term, sign, "*", None),)
    if item == ")" and below:
        return close_bracket(below, acc + term)
    return None

def close_bracket(below, value):
    """Return the stack after a closing bracket: its value is the number that the frame below awaits."""
    acc, term, op, _ = below[-1]
    return below[:-1] + (Frame(acc, term, op, value),)

def parse_formula(items):
    """Return the stack after a whole formula, a list of items or a text; None if it is malformed."""
    stack = EMPTY
    for item in items:
        stack = push_item(stack, item)
        if stack is None:
            return None
    return stack

def formula_value(items):
    """Return the exact value of a formula, None if it is malformed: formula_value("8/(3-8/3)") == 24."""
    stack = parse_formula(items)
    if stack is None or len(stack) > 1 or stack[0].number is None:
        return None
    # Another plus sign completes the sum in front of it.
    stack = push_item(stack, "+")
    return stack and stack[0].acc

def two_heaps(numbers):
    """Return the set of all ways to sort numbers into two heaps."""
    ways = set()
    for mask in range(2 ** len(numbers)):
        heaps = ([], [])
        for i, number in enumerate(numbers):
            heaps[mask >> i & 1].append(number)
        ways.add((tuple(heaps[0]), tuple(heaps[1])))
    return ways

def combine(left, operators, right):
    """Return the set of all values of `a op b`, a from `left`, b from `right`."""
    values = set()
    for a in left:
        for b in right:
            values.update(apply_operator(a, op, b) for op in operators)
    return values - {None}

@lru_cache(maxsize=1000)
def reachable_values(numbers, operators):
    """Return the values of all formulas that use each number exactly once.

    Such a formula has one operator that is applied last; on either side of it stands a smaller formula.
    """
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    values = set()
    for left, right in two_heaps(numbers):
        if left and right:
            left_values = reachable_values(left, operators)
            right_values = reachable_values(right, operators)
            values |= combine(left_values, operators, right_values)
    return values

@lru_cache(maxsize=50_000)
def final_values(stack, numbers, operators):
    """Return all values a half-written formula can still get if it goes on to use all `numbers`."""
    if len(stack) == 1:
        return sum_values(stack[-1], numbers, operators)
    below = stack[:-1]
    values = set()
    # Some of the numbers go into the innermost bracket, the others come after it.
    for inside, outside in two_heaps(numbers):
        for value in sum_values(stack[-1], inside, operators):
            values |= final_values(close_bracket(below, value), outside, operators)
    return values

def sum_values(frame, numbers, operators):
    """Return all values that the sum in a frame can get if it goes on to use all `numbers`.

    Whatever is written has the same value as acc + term op A + B, or acc + term op A - B, where A and B are
    formulas of some of the numbers each. So all ways to sort the numbers into A and B are enough.
    """
    acc, term, op, number = frame
    joins = [op]
    if number is not None:
        term = apply_operator(term, op, Fraction(number))
        if term is None:
            return set()
        joins = [sign for sign in "*/" if sign in operators]
    signs = [sign for sign in "+-" if sign in operators]
    values = set()
    for factors, terms in two_heaps(numbers):
        if number is not None and not factors:
            # The term is complete as it is.
            products = {term}
        else:
            products = combine({term}, joins, reachable_values(factors, operators))
        sums = {acc}
        if terms:
            sums = combine({acc}, signs, reachable_values(terms, operators))
        values |= combine(products, "+", sums)
    return values


# ---- EZPoints and Points24 ----

class Points(Env):
    """Write a formula from the points of the cards, one item a turn; `=` ends it.

    This class is what EZPoints and Points24 share. The state is `cards` and `formula`, a list of items.
    """

    # the value to make
    wanted = 0
    # an episode is truncated once its formula has more items than this
    limit = 0
    # layout of the picture, in units of 1/80 of its side: x, y, width, height and distance of the cards
    card_row = ()
    # upper edge of the tray that shows the formula, its number of columns and the height of its rows
    tray_top = 0
    tray_columns = 0
    tray_row = 0

    def act(self, action):
        """Write one item: 0, or -1 and a blank for a number that no card has left; `=` brings 10 or -1."""
        item = action[0]
        if len(self.formula) > self.limit:
            return -1, False, True
        if item == "=":
            self.success = self.is_solved()
            reward = 10 if self.success else -1
            return reward, True, False
        if item.isdigit() and self.formula.count(item) >= self.points().count(int(item)):
            # The number is on no card, or its cards are used up.
            self.formula.append("blank")
            return -1, False, False
        self.formula.append(item)
        return 0, False, False

    def points(self):
        """List the points of the cards: J, Q and K count 10."""
        return [min(rank, 10) for rank, _ in self.cards]

    def unused_points(self, formula):
        """Return the points that a formula leaves unused, sorted; None if it has numbers of no card."""
        unused = Counter(self.points())
        unused.subtract(int(item) for item in formula if item.isdigit())
        if min(unused.values()) < 0:
            return None
        return tuple(sorted(unused.elements()))

    def is_solved(self):
        """Tell whether the formula uses all cards and has the wanted value."""
        return self.unused_points(self.formula) == () and formula_value(self.formula) == self.wanted

    def text(self):
        return "Formula: " + (" ".join(self.formula) or "empty")

    def fingerprint(self):
        return card_names(self.cards)

    def caption(self):
        return "cards " + " ".join(RANKS[rank] for rank, _ in self.cards)

    def optimal(self, word):
        """Tell whether the formula can still be solved after this item.

        The answer is exact, except that brackets may need more items than the limit leaves.
        """
        if word == "=":
            return self.expert() == "="
        formula = [*self.formula, word]
        stack = parse_formula(formula)
        unused = self.unused_points(formula)
        if stack is None or unused is None:
            return False
        # Still to come: this item, the closing brackets, and an operator and a number for each unused card,
        # the first one without an operator if a number is awaited.
        needed = len(stack) + 2 * len(unused)
        if stack[-1].number is None:
            needed -= 1
        if needed > self.limit - len(self.formula):
            return False
        operators = "".join(op for op in "+-*/" if op in self.words())
        return self.wanted in final_values(stack, unused, operators)

    def expert(self):
        """Return the first item after which the formula can still be solved.

        It returns `=` for a solved formula, and for one that cannot be solved: to end it costs least. It
        never joins digits and never writes a sign.
        """
        stack = parse_formula(self.formula)
        if stack is None or self.is_solved():
            return "="
        is_number_awaited = stack[-1].number is None
        # The last word is `=`.
        for word in self.words()[:-1]:
            opens_operand = word.isdigit() or word == "("
            if opens_operand == is_number_awaited and self.optimal(word):
                return word
        return "="

    def picture(self):
        """Draw the cards, and below them the formula, every item in a place of its own.

        Separate places are easier to read than running text.
        """
        scale = self.size / 80
        image = Image.new("RGB", (self.size, self.size), FELT)
        draw_cards(image, self.cards, *self.card_row, scale)
        tray = [scale, self.tray_top * scale, 79 * scale, 79 * scale]
        ImageDraw.Draw(image).rounded_rectangle(tray, radius=3 * scale, fill=TRAY)
        width = 76 / self.tray_columns
        for i, item in enumerate(self.formula):
            x = 2 + i % self.tray_columns * 76 / self.tray_columns
            y = self.tray_top + 1 + i // self.tray_columns * self.tray_row
            box = (x * scale, y * scale, (width - 0.5) * scale, self.tray_row * scale)
            draw_text(image, "_" if item == "blank" else item, 13 * scale, WHITE, *box)
        return image

class EZPoints(Points):
    """Make 12 from two cards.

    Every hand can be solved. The best play takes four turns and returns 10.
    """

    name = "EZPoints"
    goal = "Make 12 from both cards. J Q K count 10. End with =."
    kinds = (Words(*map(str, range(1, 11)), "+", "*", "="),)
    example = "+"
    max_turns = 10
    wanted = 12
    limit = 5
    card_row = (3, 3, 34, 46, 40)
    tray_top = 54
    tray_columns = 6
    tray_row = 22

    def start(self):
        """Deal a first card of 2 to K and a second one that makes 12 with it, as a sum or as a product."""
        rank = int(self.rng.integers(2, 14))
        points = min(rank, 10)
        other = 12 - points
        if points in (2, 3, 4, 6) and self.rng.random() < 0.5:
            other = 12 // points
        self.cards = [(rank, int(self.rng.integers(4))), (other, int(self.rng.integers(4)))]
        if self.rng.random() < 0.5:
            self.cards.reverse()
        self.formula = []

class Points24(Points):
    """Make 24 from four cards.

    73.1 % of the deals can be solved. The others can only be lost cheaply.
    """

    name = "Points24"
    goal = "Make 24 from all four cards. J Q K count 10. End with =."
    kinds = (Words(*map(str, range(1, 11)), *"+-*/()="),)
    example = "+"
    max_turns = 30
    wanted = 24
    limit = 20
    card_row = (1, 2, 18.5, 31, 20)
    tray_top = 35.5
    tray_columns = 7
    tray_row = 14

    def start(self):
        self.cards = deal_cards(self.rng, 4)
        self.formula = []

    def tag(self):
        values = reachable_values(tuple(sorted(self.points())), "+-*/")
        return "solvable" if self.wanted in values else "unsolvable"


# ---- Blackjack ----

# points of a card and their probability in an infinite deck; an ace has 1 point here
DRAWS = [(points, 1 / 13) for points in range(1, 10)] + [(10, 4 / 13)]

def hand_points(cards):
    """Return (points with aces as 1, whether there is an ace)."""
    points = sum(min(rank, 10) for rank, _ in cards)
    has_ace = any(rank == 1 for rank, _ in cards)
    return points, has_ace

def hand_value(points, ace):
    """Return the value of a hand: an ace counts 11 if the hand stays at or below 21."""
    return points + 10 if ace and points <= 11 else points

@lru_cache(maxsize=None)
def dealer_totals(points, ace):
    """Return {final value: probability} of a dealer who has these points; a bust counts as 0.

    The dealer draws below 17 and stands on every 17, a soft one too.
    """
    value = hand_value(points, ace)
    if value > 21:
        return {0: 1.0}
    if value >= 17:
        return {value: 1.0}
    totals = Counter()
    for draw, probability in DRAWS:
        for total, share in dealer_totals(points + draw, ace or draw == 1).items():
            totals[total] += probability * share
    return totals

@lru_cache(maxsize=None)
def best_play(points, ace, up, lose=-1.0):
    """Return (expected return, action) of the best play against the dealer's card `up`, in points.

    Exact dynamic programming. A win counts 1, a tie 0, a loss `lose`: with lose=0 it maximises the wins.
    """
    value = hand_value(points, ace)
    if value > 21:
        return lose, "stand"
    stand = 0
    for total, probability in dealer_totals(up, up == 1).items():
        if value > total:
            stand += probability
        elif value < total:
            stand += probability * lose
    hit = 0
    for draw, probability in DRAWS:
        hit += probability * best_play(points + draw, ace or draw == 1, up, lose)[0]
    return max((stand, "stand"), (hit, "hit"))

class Blackjack(Env):
    """Beat the dealer.

    The best play wins 42.9 % of the hands, random play 28.1 %: compare agents on thousands of hands. The
    state is `player` and `dealer`, two lists of cards, and `stood`.
    """

    name = "Blackjack"
    goal = "Blackjack: come closer to 21 than the dealer, but not over it."
    kinds = (Words("stand", "hit"),)
    example = "stand"
    max_turns = 12

    def start(self):
        self.player = deal_cards(self.rng, 2)
        self.dealer = deal_cards(self.rng, 2)
        self.stood = False

    def act(self, action):
        """Draw a card, or let the dealer play: 1 for a win, 0 for a tie, -1 for a loss.

        There is no bonus for a natural.
        """
        if action == ("hit",):
            self.player += deal_cards(self.rng, 1)
            if hand_value(*hand_points(self.player)) > 21:
                return -1, True, False
            return 0, False, False
        self.stood = True
        while hand_value(*hand_points(self.dealer)) < 17:
            self.dealer += deal_cards(self.rng, 1)
        mine = hand_value(*hand_points(self.player))
        theirs = hand_value(*hand_points(self.dealer))
        self.success = mine > theirs or theirs > 21
        if self.success:
            return 1, True, False
        return 0 if mine == theirs else -1, True, False

    def picture(self):
        """Draw the dealer's up card and a card back, then the player's cards, five in a row.

        A card is as wide as an image patch. The dealer's second card stays hidden to the end, as in the
        original.
        """
        scale = self.size / 80
        image = Image.new("RGB", (self.size, self.size), FELT)
        ImageDraw.Draw(image).rectangle([0, 0, self.size, 27.5 * scale], fill=TRAY)
        back = (0, SPADES)
        draw_cards(image, [self.dealer[0], back], 0.5, 2, 15, 23.5, 16, scale)
        rows = -(-len(self.player) // 5)
        for i in range(rows):
            # Several rows share the room that is left: they overlap.
            y = 30 + i * 25 / max(1, rows - 1)
            draw_cards(image, self.player[5 * i : 5 * i + 5], 0.5, y, 15, 23.5, 16, scale)
        return image

    def fingerprint(self):
        # The hidden card is left out: with it, hands that look alike would be in both parts of the split.
        return card_names([*self.player[:2], self.dealer[0]])

    def caption(self):
        ranks = [RANKS[rank] for rank, _ in self.player]
        return " ".join(["dealer", RANKS[self.dealer[0][0]], "you", *ranks])

    def expert(self):
        points, ace = hand_points(self.player)
        up = min(self.dealer[0][0], 10)
        return best_play(points, ace, up)[1]
