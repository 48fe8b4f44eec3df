"""
The card games: rules from positions set by hand, formulas, exact yardsticks, pictures.

    python -m pytest tests/test_cards.py
"""
import ast, operator
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement
from math import factorial

import numpy as np
import pytest

from env_helpers import count_changed_pixels, fresh, play_games, say
from worlds.cards import DRAWS, best_play, dealer_totals, formula_value, hand_value, reachable_values
from worlds.registry import make

# ---- formulas ----


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}

def value_by_python(node):
    """Compute a node of Python's own syntax tree in exact rationals; ValueError if it is no formula here."""
    if isinstance(node, ast.Expression):
        return value_by_python(node.body)
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    function = OPERATORS.get(type(getattr(node, "op", None)))
    if function and isinstance(node, ast.UnaryOp):
        return function(value_by_python(node.operand))
    if function and isinstance(node, ast.BinOp):
        return function(value_by_python(node.left), value_by_python(node.right))
    raise ValueError(ast.dump(node))


FORMULAS = {
    "8/(3-8/3)": 24,
    "3*8": 24,
    "1+2*3": 7,
    "(1+2)*3": 9,
    "2-3-4": -5,
    "8/2/2": 2,
    "2*-3": -6,
    "-(2+3)*4": -20,
    "+-+5": -5,
    "12": 12,
    "1 + 2": 3,
    " 3": 3,
    "3 ": 3,
    "3- -4": 7,
    "((7))": 7,
    "1/3": Fraction(1, 3),
    "6/(1-3/4)": 24,
    "0*(1-1)": 0,
}

@pytest.mark.parametrize("text, value", FORMULAS.items())
def test_evaluator_values(text, value):
    assert formula_value(text) == value
    assert value_by_python(ast.parse(text.strip(), mode="eval")) == value


MALFORMED = (
    ["", "+", "3+", "*3", "2**3", "8//2", "9**9**9**9", "1+*2", "3.5", "a", "٣", "²", "1" * 65]
    + ["(", ")", "()", "(3", "3)", "1)+(2", "3(4)", "(3)4", "(3)(4)", "1 2"]
    + ["1/0", "1/(2-2)", "3/0+"]
)

@pytest.mark.parametrize("text", MALFORMED)
def test_evaluator_malformed(text):
    assert formula_value(text) is None

def test_evaluator_is_bounded():
    """Python's eval would hang, overflow the stack or build a number of a thousand digits."""
    assert formula_value("9**9**9**9") is None
    assert formula_value("9" * 10_000) is None
    assert formula_value("(" * 60 + "1" + ")" * 60) == 1
    assert formula_value("(" * 2_000 + "1" + ")" * 2_000) is None
    assert formula_value("-" * 10_000 + "1") == 1
    assert formula_value("1" + "+1" * 2_000) == 2_001

def test_evaluator_agrees_with_python_on_random_formulas():
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(4000):
        text = "".join(rng.choice(list("123456789+-*/() "), size=rng.integers(1, 10)))
        try:
            expected = value_by_python(ast.parse(text.strip(), mode="eval"))
        except (SyntaxError, ZeroDivisionError, ValueError):
            expected = None
        assert formula_value(text) == expected, text
        checked += expected is not None
    assert checked > 300


# ---- EZPoints ----

CARDS = {
    "EZPoints": [(13, 0), (2, 1)],
    "Points24": [(8, 0), (3, 1), (8, 2), (3, 3)],
}

def test_ezpoints_steps_in_order():
    env = fresh("EZPoints", cards=CARDS["EZPoints"], formula=[])
    assert say(env, "2")[:3] == (0, False, False)
    assert env.formula == ["2"]
    # The only 2 is used up.
    assert say(env, "2")[:3] == (-1, False, False)
    assert env.formula == ["2", "blank"]
    # No card has a 7.
    assert say(env, "7")[:3] == (-1, False, False)
    assert env.formula == ["2", "blank", "blank"]
    say(env, "+", "10")
    assert env.text() == "Formula: 2 blank blank + 10"
    assert "blank" in env.prompt()
    # A blank inside the formula does no harm.
    reward, terminated, truncated, info = say(env, "=")
    assert (reward, terminated, truncated) == (10, True, False)
    assert info["success"]
    assert info["success_return"]


EZPOINTS_ENDS = [
    ("10 + 2", 10),
    ("+ 2 + 10", 10),
    ("2 * 10", -1),
    ("10", -1),
    ("", -1),
    ("10 2", -1),
    ("10 2 +", -1),
    ("blank 10 blank + 2", 10),
]

@pytest.mark.parametrize("formula, reward", EZPOINTS_ENDS)
def test_ezpoints_equals(formula, reward):
    env = fresh("EZPoints", cards=CARDS["EZPoints"], formula=formula.split())
    assert say(env, "=")[:3] == (reward, True, False)
    assert env.success == (reward > 0)

def test_ezpoints_limit():
    env = fresh("EZPoints", cards=CARDS["EZPoints"], formula="+ + 2 + 10".split())
    # There are five items: a sixth one fits.
    assert say(env, "+")[:3] == (0, False, False)
    # Six items are too many, whatever the action. This rule comes before all others.
    for action in ("=", "2", "+", "9"):
        env = fresh("EZPoints", cards=CARDS["EZPoints"], formula="+ + + 2 + 10".split())
        reward, terminated, truncated, info = say(env, action)
        assert (reward, terminated, truncated) == (-1, False, True)
        assert not info["success"]
        assert len(env.formula) == 6

def test_ezpoints_deals():
    env = make("EZPoints")
    env.reset(seed=0)
    ranks = Counter()
    for _ in range(3000):
        env.reset()
        a, b = env.points()
        ranks.update(rank for rank, _ in env.cards)
        assert 12 in (a + b, a * b)
    assert min(ranks) == 2
    assert max(ranks) == 13
    assert {suit for _, suit in env.cards} <= set(range(4))
    # The second card is never a face, so a face is one of the twelve ranks of the first one.
    assert all(abs(ranks[rank] / 3000 - 1 / 12) < 0.02 for rank in (11, 12, 13))

def test_ezpoints_yardsticks():
    rng = np.random.default_rng(0)
    total, success, _, turns = play_games(make("EZPoints"), "expert", rng, 500)
    assert success.all()
    assert (total == 10).all()
    assert (turns == 4).all()
    total, success, _, turns = play_games(make("EZPoints"), "random", rng, 2500)
    assert abs(total.mean() + 4.19) < 0.15
    assert success.mean() < 0.004
    assert turns.max() <= 7

def chance_of_random_play(env, formula):
    """Return the exact probability that random play wins EZPoints from here."""
    if len(formula) > env.limit:
        return 0
    chance = 0.0
    blanks = 0
    for word in env.words():
        env.formula = list(formula)
        reward, terminated, _ = env.act((word,))
        if terminated:
            chance += (reward > 0) / 13
        elif env.formula[-1] == "blank":
            blanks += 1
        else:
            chance += chance_of_random_play(env, env.formula) / 13
    # All blanks lead to the same state.
    if blanks:
        chance += blanks / 13 * chance_of_random_play(env, [*formula, "blank"])
    return chance

def test_ezpoints_random_play_exactly():
    """Simulations of the original's code scatter around this number: 0.056 %, 0.061 %."""
    hands = Counter()
    for rank in range(2, 14):
        points = min(rank, 10)
        others = [12 - points, 12 - points]
        if points in (2, 3, 4, 6):
            others[0] = 12 // points
        for other in others:
            hands[tuple(sorted((points, other)))] += 1 / 24
    env = fresh("EZPoints")
    exact = 0
    for hand, weight in hands.items():
        env.cards = [(rank, 0) for rank in hand]
        exact += weight * chance_of_random_play(env, [])
    assert abs(exact - 0.000636) < 0.000001


# ---- Points24 ----

POINTS24_ENDS = [
    ("8 / ( 3 - 8 / 3 )", 10),
    ("8 * 3", -1),
    ("8 * 3 * ( 8 - 8 )", -1),
    ("8 / ( 3 - 8 / 3", -1),
    ("- 8 / ( - 3 + 8 / 3 )", 10),
    ("8 * * 3 + 8 + 3", -1),
    ("8 / / 3 + 8 + 3", -1),
    ("8 3 - 8 3", -1),
    ("blank 8 / ( 3 - 8 / blank 3 ) blank", 10),
]

@pytest.mark.parametrize("formula, reward", POINTS24_ENDS)
def test_points24_equals(formula, reward):
    env = fresh("Points24", cards=CARDS["Points24"], formula=formula.split())
    assert say(env, "=")[:3] == (reward, True, False)

@pytest.mark.parametrize("formula, reward", [("1 2 * 2 * 1", 10), ("1 blank 2 * 2 * 1", -1)])
def test_points24_digits_join_as_in_the_original(formula, reward):
    """White space parts them."""
    env = fresh("Points24", cards=[(1, 0), (2, 0), (2, 1), (1, 1)], formula=formula.split())
    assert say(env, "=")[0] == reward

def test_points24_limit_is_twenty_items():
    solution = "8 / ( 3 - 8 / 3 )".split()
    env = fresh("Points24", cards=CARDS["Points24"], formula=["+"] * 11 + solution)
    assert len(env.formula) == 20
    assert say(env, "=")[:3] == (10, True, False)
    env = fresh("Points24", cards=CARDS["Points24"], formula=["+"] * 12 + solution)
    assert say(env, "=")[:3] == (-1, False, True)
    env = fresh("Points24")
    assert say(env, *"+" * 21)[:3] == (0, False, False)
    assert say(env, "+")[:3] == (-1, False, True)

def results(a, b):
    """Return the results of one operation on two numbers, in either order."""
    values = {a + b, a * b, a - b, b - a}
    if b:
        values.add(a / b)
    if a:
        values.add(b / a)
    return values

def is_solvable(numbers, target=24):
    """Replace two numbers by a result until one is left. This is independent of the code under test."""
    if len(numbers) == 1:
        return numbers[0] == target
    for j in range(len(numbers)):
        for i in range(j):
            rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
            if any(is_solvable([*rest, value], target) for value in results(numbers[i], numbers[j])):
                return True
    return False

def deal_probability(points):
    """Return the probability to be dealt these points, in any order."""
    orders = factorial(len(points))
    for count in Counter(points).values():
        orders /= factorial(count)
    chances = [4 / 13 if point == 10 else 1 / 13 for point in points]
    return orders * np.prod(chances)

def expert_rewards(env):
    """Return (rewards, terminated) of the expert's play to the end of the episode."""
    rewards = []
    over = False
    while not over:
        reward, terminated, truncated = env.act((env.expert(),))
        rewards.append(reward)
        over = terminated or truncated
    return rewards, terminated

def test_points24_expert_solves_exactly_the_solvable_deals():
    env = fresh("Points24")
    share = 0
    for k, points in enumerate(combinations_with_replacement(range(1, 11), 4)):
        solvable = 24 in reachable_values(points, "+-*/")
        if solvable:
            share += deal_probability(points)
        if k % 24 == 0:
            env.cards = [(point, 0) for point in points]
            env.formula = []
            assert solvable == is_solvable([Fraction(point) for point in points]), points
            assert solvable == (env.expert() != "="), points
            rewards, terminated = expert_rewards(env)
            assert rewards[-1] == (10 if solvable else -1)
            assert terminated
            assert len(env.formula) <= 11
    assert abs(share - 0.731) < 0.0005

@pytest.mark.parametrize("name", ["EZPoints", "Points24"])
def test_expert_goes_on_from_any_half_written_formula(name):
    env = make(name)
    rng = np.random.default_rng(1)
    solvable = 0
    for seed in range(150):
        env.reset(seed=seed)
        for _ in range(rng.integers(0, 5)):
            word = env.expert() if rng.random() < 0.6 else env.sample(rng)
            if word != "=":
                env.act((word,))
        alive = env.expert() != "=" or formula_value(env.formula) == env.wanted
        rewards, _ = expert_rewards(env)
        wins = alive and len(env.formula) <= env.limit
        assert rewards[-1] == (10 if wins else -1)
        assert all(reward == 0 for reward in rewards[:-1])
        solvable += alive
    assert 20 < solvable < 150


# ---- Blackjack ----

# ranks of the player and of the dealer, and the reward for standing
STANDS = [
    ([10, 9], [10, 8], 1),
    ([10, 8], [10, 8], 0),
    ([10, 7], [10, 8], -1),
    ([13, 11], [12, 1], -1),
    ([1, 12], [10, 7], 1),
    ([1, 13], [1, 10], 0),
    ([1, 1], [10, 7], -1),
    ([10, 5, 1], [10, 7], -1),
    ([5, 5, 1], [1, 6], 1),
    ([2, 2], [1, 6], -1),
]

@pytest.mark.parametrize("player, dealer, reward", STANDS)
def test_blackjack_stand(player, dealer, reward):
    """A natural earns no bonus, an ace counts 11 where it can, the dealer stands on a soft 17 too."""
    player_cards = [(rank, 0) for rank in player]
    dealer_cards = [(rank, 1) for rank in dealer]
    env = fresh("Blackjack", player=player_cards, dealer=dealer_cards)
    result, terminated, truncated, info = say(env, "stand")
    assert (result, terminated, truncated) == (reward, True, False)
    assert info["success"] == (reward > 0)
    assert env.stood
    assert len(env.dealer) == 2

def test_blackjack_dealer_draws_below_17_and_loses_by_a_bust():
    busts = 0
    for seed in range(200):
        env = fresh("Blackjack", seed, player=[(10, 0), (2, 0)], dealer=[(10, 1), (6, 1)])
        reward = say(env, "stand")[0]
        total = 16 + min(env.dealer[2][0], 10)
        assert len(env.dealer) == 3
        assert reward == (1 if total > 21 else -1)
        busts += reward == 1
    assert abs(busts / 200 - 8 / 13) < 0.12

def test_blackjack_hit():
    for seed in range(100):
        env = fresh("Blackjack", seed, player=[(10, 0), (6, 0)])
        reward, terminated, truncated, info = say(env, "hit")
        bust = 16 + min(env.player[2][0], 10) > 21
        assert (reward, terminated, truncated) == (-1 if bust else 0, bust, False)
        assert not info["success"]
        assert not env.stood
    # A soft 21 cannot bust: the ace falls back to 1.
    env = fresh("Blackjack", player=[(1, 0), (10, 0)])
    say(env, "hit")
    assert not env.over

def outcome(policy):
    """Return the exact probabilities (win, tie, loss) of a policy(points, ace, up) -> probability to hit."""

    @lru_cache(maxsize=None)
    def outcome_from(points, ace, up):
        value = hand_value(points, ace)
        if value > 21:
            return np.array([0, 0, 1.0])
        totals = dealer_totals(up, up == 1)
        win = sum(share for total, share in totals.items() if value > total)
        loss = sum(share for total, share in totals.items() if value < total)
        stand = np.array([win, totals.get(value, 0), loss])
        hit_share = policy(points, ace, up)
        if not hit_share:
            return stand
        hit = sum(share * outcome_from(points + draw, ace or draw == 1, up) for draw, share in DRAWS)
        return (1 - hit_share) * stand + hit_share * hit

    result = np.zeros(3)
    for a, share_a in DRAWS:
        for b, share_b in DRAWS:
            for up, share_up in DRAWS:
                result += share_a * share_b * share_up * outcome_from(a + b, 1 in (a, b), up)
    return result

def test_blackjack_exact_yardsticks():
    best_return = outcome(lambda *state: best_play(*state)[1] == "hit")
    assert abs(best_return[0] - best_return[2] + 0.0466) < 0.0001
    assert abs(best_return[0] - 0.429) < 0.0006
    most_wins = outcome(lambda *state: best_play(*state, lose=0.0)[1] == "hit")
    assert np.abs(most_wins - [0.432, 0.087, 0.482]).max() < 0.0006
    always_stand = outcome(lambda *state: 0)
    assert abs(always_stand[0] - 0.381) < 0.0006
    hit_below_17 = outcome(lambda points, ace, up: hand_value(points, ace) < 17)
    assert abs(hit_below_17[0] - 0.408) < 0.0006
    at_random = outcome(lambda points, ace, up: 0.5 if points <= 21 else 0)
    assert abs(at_random[0] - 0.281) < 0.0006

def test_blackjack_plays_as_computed():
    rng = np.random.default_rng(0)
    total, success, success_return, _ = play_games(make("Blackjack"), "expert", rng, 8000)
    assert abs(total.mean() + 0.0466) < 0.035
    assert abs(success.mean() - 0.429) < 0.02
    assert (success == success_return).all()
    rng = np.random.default_rng(0)
    total, success, _, _ = play_games(make("Blackjack"), "random", rng, 5000)
    assert abs(success.mean() - 0.281) < 0.025

def test_the_hidden_card_does_not_decide_the_split():
    env = fresh("Blackjack")
    before = env.fingerprint()
    rank, _ = env.dealer[1]
    env.dealer[1] = (rank % 13 + 1, 0)
    assert env.fingerprint() == before


# ---- pictures ----

sizes = pytest.mark.parametrize("size", [80, 300])

@sizes
def test_every_card_has_its_picture(size):
    env = make("EZPoints", size=size)
    env.reset(seed=0)
    pictures = set()
    for rank in range(1, 14):
        for suit in range(4):
            env.cards = [(rank, suit), (2, 0)]
            pictures.add(env.picture().tobytes())
    assert len(pictures) == 52

@sizes
@pytest.mark.parametrize("name", ["EZPoints", "Points24"])
def test_pictures_show_cards_and_formula(name, size):
    env = make(name, size=size)
    env.reset(seed=0)
    for formula in (["3"], ["blank"], ["3", "+"], ["+", "3"], ["10"] * env.limit):
        assert count_changed_pixels(env, formula=formula) > 10
    for i, (rank, suit) in enumerate(env.cards):
        cards = list(env.cards)
        cards[i] = (rank % 13 + 1, 3 - suit)
        assert count_changed_pixels(env, cards=cards) > 20

@sizes
def test_blackjack_pictures_hide_the_second_card_of_the_dealer(size):
    env = make("Blackjack", size=size)
    env.reset(seed=0)
    env.player = [(9, 0), (8, 1)]
    env.dealer = [(5, 2), (6, 3)]
    assert count_changed_pixels(env, player=[(9, 0), (8, 1), (2, 1)]) > 20
    assert count_changed_pixels(env, player=[(1, 0)] * 14) > 20
    assert count_changed_pixels(env, dealer=[(4, 2), (6, 3)]) > 20
    assert count_changed_pixels(env, dealer=[(5, 2), (7, 0)]) == 0
    assert count_changed_pixels(env, dealer=[(5, 2), (6, 3), (9, 1)], stood=True) == 0
