"""
The environments: the protocol, every game's rules from states set by hand, the yardsticks, the scripted players, the pictures.
    python -m pytest tests/test_envs.py
"""
import ast, importlib.util, io, operator, os, sys
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement
from math import factorial
from types import SimpleNamespace
import numpy as np
import pytest
from PIL import Image, ImageChops
from transformers import AutoTokenizer
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import envs
from pretrain import tiny_nets as scratch
from pretrain.questions import corpus
from envs import ENVS, MARKER, Command, Env, Text, Words, best_play, format_action, formula_value, is_held_out, make, mixed_reply, parse_agent, scripted_reply

GAMES = list(ENVS)


def fresh(name, seed=0, **state):
    """A game at the start of an episode with some of its state set by hand."""
    env = make(name)
    env.reset(seed=seed)
    for key, value in state.items():
        assert hasattr(env, key)
        setattr(env, key, value)
    return env


def say(env, *actions):
    """Plays the actions, returns the last step's (reward, terminated, truncated, info)."""
    for action in actions:
        out = env.step(f"{MARKER} {action}")
    return out[1:]


def play(env, who, rng, episodes, seed=0, **options):
    """(returns, successes, successes by return, turns) of a scripted player."""
    rows = []
    for i in range(episodes):
        env.reset(seed=seed if i == 0 else None, **options)
        over, total = False, 0
        while not over:
            _, reward, terminated, truncated, info = env.step(scripted_reply(who, env, rng))
            over, total = terminated or truncated, total + reward
        rows.append((total, info["success"], info["success_return"], env.turns))
        assert info["success_return"] == (total > 0)
    return np.array(rows, float).T


# ---------------------------------------------------------------- the protocol

def test_parse_agent_takes_the_line_behind_the_last_marker():
    assert parse_agent("[action] +") == "+"
    assert parse_agent("I think [action] - is bad, so [action]  move up \nand done") == "move up"
    assert parse_agent("[action]+\r\n") == "+"
    assert parse_agent("[action]") == parse_agent("[action]\n+") == "" and parse_agent("+") is None and parse_agent("[Action] +") is None


def test_action_kinds_document_parse_sample_and_enumerate():
    rng = np.random.default_rng(0)
    words, click, at, write, text = Words("hit", "stand"), Command("click", int), Command("click", int, int), Command("type", int, str), Text()
    assert words.parse("hit") == ("hit",) and words.parse("Hit") is None and words.parse("hit stand") is None and words.parse("") is None
    assert words.words() == ["hit", "stand"] and click.words() is None and text.words() is None and Command("wait").words() == ["wait"]
    assert click.parse("click 13") == ("click", 13) and at.parse("click 80 112") == ("click", 80, 112) and at.parse("click 80") is None
    assert write.parse('type 14 "abc"') == ("type", 14, "abc") and write.parse('type 14 "a \\"b\\" \\n c"') == ("type", 14, 'a "b" \n c')
    assert text.parse("any thing") == ("any thing",) and text.parse("") is None
    assert "hit or stand" in words.doc() and click.doc().startswith("click ") and '"' in write.doc()
    for kind in (words, click, at, write, text, Command("wait")):
        for _ in range(50):
            sample = kind.sample(rng)
            assert format_action(kind.parse(sample)) == sample
    assert {words.sample(rng) for _ in range(50)} == {"hit", "stand"}


@pytest.mark.parametrize("reply", ["click", "click x", "click 1.5", "click 1 2", "click " + "9" * 5000, "click ٣", "click ²", "click 007", "type 14 abc", "type 14 'abc'",
                                   'type 14 "abc', 'type 14 "a" "b"', r'type 14 "\x"', r'type 14 "\ud800"', 'type 14 "a\nb"', 'type "a" 14', "type __import__('os') \"a\""])
def test_broken_commands_are_invalid(reply):
    assert Command("click", int).parse(reply) is None and Command("type", int, str).parse(reply) is None


def test_an_environment_may_mix_kinds():
    class Page(Env):
        name, goal, kinds, example = "Page", "Click.", (Command("click", int), Command("type", int, str), Words("back")), "click 3"
        def start(self): self.log = []
        def act(self, action): self.log.append(action); return 0, False, False
        def picture(self): return Image.new("RGB", (self.size, self.size))
        def fingerprint(self): return "one"
    env = Page()
    env.reset(seed=0)
    say(env, 'type 3 "é \\"x\\""')
    assert say(env, "click 14")[3] == {"valid": True, "action": "click 14", "success": False, "success_return": False} and env.log[0] == ("type", 3, 'é "x"')
    assert not say(env, "click a")[3]["valid"] and len(env.log) == 2
    assert {env.sample(np.random.default_rng(i)).split()[0] for i in range(20)} == {"click", "type", "back"}


@pytest.mark.parametrize("name", GAMES)
def test_five_values_and_their_types(name):
    env, rng = make(name, size=64), np.random.default_rng(0)
    obs, info = env.reset(seed=3)
    over = False
    while not over:
        assert isinstance(info, dict) and set(obs) == {"image", "text"} and obs["text"] == env.prompt()
        assert obs["image"].size == (64, 64) and obs["image"].mode == "RGB"
        obs, reward, terminated, truncated, info = env.step(scripted_reply("random", env, rng))
        assert type(reward) is float and type(terminated) is bool and type(truncated) is bool and not (terminated and truncated)
        assert set(info) == {"valid", "action", "success", "success_return"} and all(type(info[k]) is bool for k in ("valid", "success", "success_return"))
        over = terminated or truncated
    assert len(np.unique(np.asarray(obs["image"]))) > 10        # the last observation is a real picture
    with pytest.raises(RuntimeError, match="reset"):
        env.step(f"{MARKER} +")


def test_stepping_before_reset_and_wrong_arguments_say_so():
    with pytest.raises(RuntimeError, match="reset"):
        make("NumberLine").step(f"{MARKER} +")
    with pytest.raises(ValueError, match="'Numberline'.*NumberLine"):
        make("Numberline")
    with pytest.raises(ValueError, match="invalid='ignore'"):
        make("NumberLine", invalid="ignore")
    with pytest.raises(ValueError, match="split='val'"):
        make("EZPoints").reset(options={"split": "val"})
    with pytest.raises(ValueError, match="player='best'"):
        scripted_reply("best", fresh("EZPoints"), np.random.default_rng(0))


@pytest.mark.parametrize("name", GAMES)
def test_prompts_are_short_and_say_everything(name):
    env = fresh(name)
    prompt = env.prompt()
    assert len(prompt.split()) <= 45 and prompt.startswith(env.goal) and f"{MARKER} {env.example}" in prompt
    assert all(word in prompt.split() for word in env.words())
    assert env.parse(f"{MARKER} {env.example}") is not None
    assert env.parse(prompt) == (env.example,)           # a model that echoes its prompt plays the example, never something undocumented


@pytest.mark.parametrize("name", [*GAMES, "Reading"])
def test_a_seed_decides_everything(name):
    def episodes(seed):
        env, rng, log = make(name), np.random.default_rng(5), []
        for i in range(4):
            obs, _ = env.reset(seed=seed if i == 0 else None)
            over = False
            while not over:
                log.append((obs["image"].tobytes(), obs["text"]))
                obs, reward, terminated, truncated, info = env.step(scripted_reply("random", env, rng))
                log.append((reward, terminated, truncated, str(info)))
                over = terminated or truncated
        return log
    assert episodes(1) == episodes(1) and episodes(1) != episodes(2)


@pytest.mark.parametrize("name", ["EZPoints", "Points24", "Blackjack"])
def test_train_and_test_starts_are_disjoint(name):
    env, seen = make(name), {}
    for split in ("train", "test"):
        env.reset(seed=0)
        seen[split] = set()
        for _ in range(300):
            env.reset(options={"split": split})
            seen[split].add(env.fingerprint())
            assert is_held_out(env.fingerprint()) == (split == "test")
    assert not seen["train"] & seen["test"] and len(seen["test"]) > 30
    env.reset(seed=0)
    share = np.mean([is_held_out((env.reset(), env.fingerprint())[1]) for _ in range(1000)])
    assert 0.05 < share < 0.16


def test_the_hidden_card_does_not_decide_the_split():
    env = fresh("Blackjack")
    before = env.fingerprint()
    env.dealer[1] = (env.dealer[1][0] % 13 + 1, 0)
    assert env.fingerprint() == before


def test_number_line_has_all_its_starts_in_both_parts():
    env = make("NumberLine")
    env.reset(seed=0)
    starts = set()
    for _ in range(600):
        env.reset(options={"split": "test"})
        starts.add((env.current, env.target))
    assert len(starts) == 30


@pytest.mark.parametrize("name", GAMES)
def test_an_invalid_reply_costs_the_penalty_and_moves_nothing(name):
    env = make(name, penalty=-0.25)
    env.reset(seed=0)
    picture, text = env.picture().tobytes(), env.prompt()
    for turn in range(env.max_turns):
        obs, reward, terminated, truncated, info = env.step("no marker")
        assert reward == -0.25 and not info["valid"] and info["action"] == "" and not terminated and truncated == (turn == env.max_turns - 1)
        assert obs["image"].tobytes() == picture and obs["text"] == text


def test_invalid_random_plays_any_action_for_free():
    env = make("NumberLine", invalid="random")
    ends = []
    for seed in range(200):
        env.reset(seed=seed)
        env.current, env.target = 2, 5
        _, reward, _, _, info = env.step("no marker")
        ends.append((env.current, reward))
        assert not info["valid"] and info["action"] == ""
    counts = Counter(ends)
    assert set(counts) == {(1, -1.0), (3, 0.0)} and min(counts.values()) > 60


@pytest.mark.parametrize("name", GAMES)
def test_hostile_replies_are_just_invalid(name):
    rng = np.random.default_rng(0)
    hostile = [f"{MARKER} __import__('os')", f"{MARKER} " + "9" * 100_000, f"{MARKER} ٣", f"{MARKER} ²", f"{MARKER} ＋", f"{MARKER} 1_0", f"{MARKER} +\x00", "", MARKER * 1000,
               f"{MARKER} 0", f"{MARKER} -1", f"{MARKER} 11", f"{MARKER} **", f"{MARKER} 9**9**9**9", f"{MARKER} " + "(" * 100_000, f"{MARKER} {{}}", f"{MARKER} None",
               "".join(map(chr, rng.integers(1, 0xd7ff, size=5000)))]
    for reply in hostile:
        env = fresh(name)
        assert not env.step(reply)[4]["valid"], reply[:30]
    tree = ast.parse(open(envs.__file__).read())
    assert not {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)} & {"eval", "exec", "compile", "__import__"}


# ---------------------------------------------------------------- NumberLine

class Rolls:
    """A generator that deals the given numbers."""
    def __init__(self, *numbers): self.numbers = numbers
    def integers(self, *args, **kw): return np.array(self.numbers)


def test_number_line_start_rule():
    env = make("NumberLine")
    for current, target, after in ((4, 4, 0), (5, 5, 1), (0, 0, 1), (3, 3, 4), (2, 5, 5)):
        env.rng = Rolls(current, target)
        env.start()
        assert (env.current, env.target) == (current, after)


@pytest.mark.parametrize("current, target, action, reward, after, over", [
    (2, 5, "+", 0, 3, False), (2, 5, "-", -1, 1, False), (4, 5, "+", 1, 5, True), (1, 0, "-", 1, 0, True),
    (0, 3, "-", -1, 0, False), (5, 2, "+", -1, 5, False)])       # the last two: a clamped move does not shrink the distance
def test_number_line_moves(current, target, action, reward, after, over):
    env = fresh("NumberLine", current=current, target=target)
    assert say(env, action)[:3] == (reward, over, False) and env.current == after and env.success == over


def test_number_line_is_truncated_after_ten_turns():
    env = fresh("NumberLine", current=0, target=3)
    assert say(env, *"-" * 9)[1:3] == (False, False) and say(env, "-")[1:3] == (False, True) and env.total == -10
    env = fresh("NumberLine", current=0, target=1)
    say(env, *"-" * 9)
    assert say(env, "+")[:3] == (1, True, False)                 # reached on the last turn: terminated, not truncated


def test_number_line_yardsticks():
    rng = np.random.default_rng(0)
    total, goal, by_return, turns = play(make("NumberLine"), "expert", rng, 1500)
    assert goal.all() and by_return.all() and (total == 1).all() and abs(turns.mean() - 2.28) < 0.12
    total, goal, by_return, turns = play(make("NumberLine"), "random", rng, 4000)
    assert abs(by_return.mean() - 0.282) < 0.03 and abs(goal.mean() - 0.611) < 0.03 and abs(total.mean() + 2.49) < 0.2


# ---------------------------------------------------------------- formulas

def by_python(node):
    """A second opinion: Python's own syntax tree, computed in exact rationals; ValueError for what is no formula here."""
    match node:
        case ast.Expression(body=body): return by_python(body)
        case ast.Constant(value=int() as number): return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=x): return -by_python(x)
        case ast.UnaryOp(op=ast.UAdd(), operand=x): return by_python(x)
        case ast.BinOp(left=a, op=op, right=b):
            does = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}.get(type(op))
            if does: return does(by_python(a), by_python(b))
    raise ValueError(ast.dump(node))


@pytest.mark.parametrize("text, value", [("8/(3-8/3)", 24), ("3*8", 24), ("1+2*3", 7), ("(1+2)*3", 9), ("2-3-4", -5), ("8/2/2", 2), ("2*-3", -6), ("-(2+3)*4", -20), ("+-+5", -5),
                                         ("12", 12), ("1 + 2", 3), (" 3", 3), ("3 ", 3), ("3- -4", 7), ("((7))", 7), ("1/3", Fraction(1, 3)), ("6/(1-3/4)", 24), ("0*(1-1)", 0)])
def test_evaluator_values(text, value):
    assert formula_value(text) == value
    assert by_python(ast.parse(text.strip(), mode="eval")) == value


@pytest.mark.parametrize("text", ["", "+", "3+", "*3", "2**3", "8//2", "9**9**9**9", "(", ")", "()", "(3", "3)", "1)+(2", "3(4)", "(3)4", "(3)(4)", "1 2", "1/0", "1/(2-2)", "3/0+", "1+*2",
                                  "3.5", "a", "٣", "²", "1" * 65])
def test_evaluator_malformed(text):
    assert formula_value(text) is None


def test_evaluator_is_bounded():
    """None of these may hang, overflow the stack or build a number of a thousand digits: Python's own eval does one or the other."""
    assert formula_value("9**9**9**9") is None and formula_value("9" * 10_000) is None
    assert formula_value("(" * 60 + "1" + ")" * 60) == 1 and formula_value("(" * 2_000 + "1" + ")" * 2_000) is None
    assert formula_value("-" * 10_000 + "1") == 1 and formula_value("1" + "+1" * 2_000) == 2_001


def test_evaluator_agrees_with_python_on_random_formulas():
    rng, checked = np.random.default_rng(0), 0
    for _ in range(4000):
        text = "".join(rng.choice(list("123456789+-*/() "), size=rng.integers(1, 10)))
        try:
            expected = by_python(ast.parse(text.strip(), mode="eval"))
        except (SyntaxError, ZeroDivisionError, ValueError):
            expected = None
        ours = formula_value(text)
        assert ours == expected, text
        checked += expected is not None
    assert checked > 300


CARDS = {"EZPoints": [(13, 0), (2, 1)], "Points24": [(8, 0), (3, 1), (8, 2), (3, 3)]}


def test_ezpoints_steps_in_order():
    env = fresh("EZPoints", cards=CARDS["EZPoints"], formula=[])
    assert say(env, "2")[:3] == (0, False, False) and env.formula == ["2"]
    assert say(env, "2")[:3] == (-1, False, False) and env.formula == ["2", "blank"]      # used up
    assert say(env, "7")[:3] == (-1, False, False) and env.formula == ["2", "blank", "blank"]
    say(env, "+", "10")
    assert env.text() == "Formula: 2 blank blank + 10" and "blank" in env.prompt()
    reward, terminated, truncated, info = say(env, "=")                                   # a blank inside is harmless
    assert (reward, terminated, truncated) == (10, True, False) and info["success"] and info["success_return"]


@pytest.mark.parametrize("formula, reward", [(["10", "+", "2"], 10), (["+", "2", "+", "10"], 10), (["2", "*", "10"], -1), (["10"], -1), ([], -1), (["10", "2"], -1), (["10", "2", "+"], -1),
                                             (["blank", "10", "blank", "+", "2"], 10)])
def test_ezpoints_equals(formula, reward):
    env = fresh("EZPoints", cards=CARDS["EZPoints"], formula=formula)
    assert say(env, "=")[:3] == (reward, True, False) and env.success == (reward > 0)


def test_ezpoints_limit():
    env = fresh("EZPoints", cards=CARDS["EZPoints"], formula=["+", "+", "2", "+", "10"])
    assert say(env, "+")[:3] == (0, False, False)                                         # five items, a sixth fits
    for action in ("=", "2", "+", "9"):                                                   # six items: too long, whatever the action, before all other rules
        env = fresh("EZPoints", cards=CARDS["EZPoints"], formula=["+", "+", "+", "2", "+", "10"])
        reward, terminated, truncated, info = say(env, action)
        assert (reward, terminated, truncated) == (-1, False, True) and not info["success"] and len(env.formula) == 6


def test_ezpoints_deals():
    env, ranks = make("EZPoints"), Counter()
    env.reset(seed=0)
    for _ in range(3000):
        env.reset()
        a, b = env.points()
        ranks.update(rank for rank, _ in env.cards)
        assert 12 in (a + b, a * b)
    assert min(ranks) == 2 and max(ranks) == 13 and {suit for _, suit in env.cards} <= set(range(4))
    assert all(abs(ranks[r] / 3000 - 1 / 12) < 0.02 for r in (11, 12, 13))                # the second card is never a face


def test_ezpoints_yardsticks():
    rng = np.random.default_rng(0)
    total, goal, _, turns = play(make("EZPoints"), "expert", rng, 500)
    assert goal.all() and (total == 10).all() and (turns == 4).all()
    total, goal, _, turns = play(make("EZPoints"), "random", rng, 2500)
    assert abs(total.mean() + 4.19) < 0.15 and goal.mean() < 0.004 and turns.max() <= 7

    def chance(env, formula):
        """A random player's exact chance to win from here; blanks are alike, so each is followed only once."""
        if len(formula) > env.limit:
            return 0
        out, blanks = 0.0, 0
        for word in env.words():
            env.formula = list(formula)
            reward, terminated, _ = env.act((word,))
            if terminated:
                out += (reward > 0) / 13
            elif env.formula[-1] == "blank":
                blanks += 1
            else:
                out += chance(env, env.formula) / 13
        return out + blanks / 13 * chance(env, [*formula, "blank"]) if blanks else out
    hands = Counter()
    for rank in range(2, 14):
        points = min(rank, 10)
        for other in ((12 // points, 12 - points) if points in (2, 3, 4, 6) else (12 - points,) * 2):
            hands[tuple(sorted((points, other)))] += 1 / 24
    env, exact = fresh("EZPoints"), 0
    for hand, weight in hands.items():
        env.cards = [(rank, 0) for rank in hand]
        exact += weight * chance(env, [])
    assert abs(exact - 0.000636) < 0.000001         # simulations of the original's code scatter around it: 0.056 %, 0.061 %

@pytest.mark.parametrize("formula, reward", [("8 / ( 3 - 8 / 3 )", 10), ("8 * 3", -1), ("8 * 3 * ( 8 - 8 )", -1), ("8 / ( 3 - 8 / 3", -1), ("- 8 / ( - 3 + 8 / 3 )", 10),
                                             ("8 * * 3 + 8 + 3", -1), ("8 / / 3 + 8 + 3", -1), ("8 3 - 8 3", -1), ("blank 8 / ( 3 - 8 / blank 3 ) blank", 10)])
def test_points24_equals(formula, reward):
    env = fresh("Points24", cards=CARDS["Points24"], formula=formula.split())
    assert say(env, "=")[:3] == (reward, True, False)


def test_points24_digits_join_as_in_the_original():
    env = fresh("Points24", cards=[(1, 0), (2, 0), (2, 1), (1, 1)], formula="1 2 * 2 * 1".split())
    assert say(env, "=")[0] == 10
    env = fresh("Points24", cards=[(1, 0), (2, 0), (2, 1), (1, 1)], formula="1 blank 2 * 2 * 1".split())
    assert say(env, "=")[0] == -1                                                         # white space parts them


def test_points24_limit_is_twenty_items():
    env = fresh("Points24", cards=CARDS["Points24"], formula=["+"] * 11 + "8 / ( 3 - 8 / 3 )".split())
    assert len(env.formula) == 20 and say(env, "=")[:3] == (10, True, False)
    env = fresh("Points24", cards=CARDS["Points24"], formula=["+"] * 12 + "8 / ( 3 - 8 / 3 )".split())
    assert say(env, "=")[:3] == (-1, False, True)
    env = fresh("Points24")
    assert say(env, *"+" * 21)[:3] == (0, False, False) and say(env, "+")[:3] == (-1, False, True)


def solvable(numbers, target=24):
    """Independent of the code under test: replace two numbers by a result until one is left."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i in range(len(numbers)):
        for j in range(len(numbers)):
            if i != j:
                a, b, rest = numbers[i], numbers[j], [n for k, n in enumerate(numbers) if k not in (i, j)]
                if any(solvable(rest + [c], target) for c in ([a - b] + ([a / b] if b else []) + ([a + b, a * b] if i < j else []))):
                    return True
    return False


def test_points24_expert_solves_exactly_the_solvable_deals():
    env = fresh("Points24")
    share = 0
    for k, points in enumerate(combinations_with_replacement(range(1, 11), 4)):
        can = 24 in envs.reachable_values(points, "+-*/")
        share += can * np.prod([(4 if p == 10 else 1) / 13 for p in points]) * factorial(4) / np.prod([factorial(c) for c in Counter(points).values()])
        if k % 24 == 0:
            env.cards, env.formula = [(p, 0) for p in points], []
            assert can == solvable([Fraction(p) for p in points]) == (env.expert() != "="), points
            reward = over = 0
            while not over:
                reward, terminated, truncated = env.act((env.expert(),))
                over = terminated or truncated
            assert (reward, terminated) == (10 if can else -1, True) and len(env.formula) <= 11
    assert abs(share - 0.731) < 0.0005


@pytest.mark.parametrize("name", ["EZPoints", "Points24"])
def test_expert_goes_on_from_any_half_written_formula(name):
    env, rng, saved = make(name), np.random.default_rng(1), 0
    for seed in range(150):
        env.reset(seed=seed)
        for _ in range(rng.integers(0, 5)):
            word = env.expert() if rng.random() < 0.6 else env.sample(rng)
            if word != "=":
                env.act((word,))
        alive = env.expert() != "=" or formula_value(env.formula) == env.wanted
        over, rewards = False, []
        while not over:
            reward, terminated, truncated = env.act((env.expert(),))
            rewards.append(reward)
            over = terminated or truncated
        assert rewards[-1] == 10 if alive and len(env.formula) <= env.limit else rewards[-1] == -1
        assert all(r == 0 for r in rewards[:-1])
        saved += alive
    assert 20 < saved < 150


# ---------------------------------------------------------------- Blackjack

@pytest.mark.parametrize("mine, dealers, reward", [([10, 9], [10, 8], 1), ([10, 8], [10, 8], 0), ([10, 7], [10, 8], -1), ([13, 11], [12, 1], -1), ([1, 12], [10, 7], 1),
                                                   ([1, 13], [1, 10], 0), ([1, 1], [10, 7], -1), ([10, 5, 1], [10, 7], -1), ([5, 5, 1], [1, 6], 1), ([2, 2], [1, 6], -1)])
def test_blackjack_stand(mine, dealers, reward):
    """No bonus for a natural; an ace counts 11 where it can; the dealer stands on every 17, a soft one too."""
    env = fresh("Blackjack", player=[(r, 0) for r in mine], dealer=[(r, 1) for r in dealers])
    result, terminated, truncated, info = say(env, "stand")
    assert (result, terminated, truncated) == (reward, True, False) and info["success"] == (reward > 0) and env.stood and len(env.dealer) == 2


def test_blackjack_dealer_draws_below_17_and_loses_by_a_bust():
    bust = 0
    for seed in range(200):
        env = fresh("Blackjack", seed, player=[(10, 0), (2, 0)], dealer=[(10, 1), (6, 1)])
        reward = say(env, "stand")[0]
        total = 16 + min(env.dealer[2][0], 10)
        assert len(env.dealer) == 3 and reward == (1 if total > 21 else -1)
        bust += reward == 1
    assert abs(bust / 200 - 8 / 13) < 0.12


def test_blackjack_hit():
    for seed in range(100):
        env = fresh("Blackjack", seed, player=[(10, 0), (6, 0)])
        reward, terminated, truncated, info = say(env, "hit")
        over = 16 + min(env.player[2][0], 10) > 21
        assert (reward, terminated, truncated) == (-1 if over else 0, over, False) and not info["success"] and not env.stood
    env = fresh("Blackjack", player=[(1, 0), (10, 0)])
    say(env, "hit")
    assert not env.over                                                                   # soft 21: an ace falls back to 1


def outcome(policy):
    """Exact (win, tie, lose) of a policy(points, ace, up) -> probability to hit."""
    @lru_cache(maxsize=None)
    def go(points, ace, up):
        total = envs.hand_value(points, ace)
        if total > 21:
            return np.array([0, 0, 1.0])
        ends, p = envs.dealer_totals(up, up == 1), policy(points, ace, up)
        stand = np.array([sum(q for e, q in ends.items() if total > e), ends.get(total, 0), sum(q for e, q in ends.items() if total < e)])
        return (1 - p) * stand + (p * sum(q * go(points + d, ace or d == 1, up) for d, q in envs.DRAWS) if p else 0)
    return sum(p * q * r * go(a + b, 1 in (a, b), up) for a, p in envs.DRAWS for b, q in envs.DRAWS for up, r in envs.DRAWS)


def test_blackjack_exact_yardsticks():
    expert = outcome(lambda *s: best_play(*s)[1] == "hit")
    assert abs(expert[0] - expert[2] + 0.0466) < 0.0001 and abs(expert[0] - 0.429) < 0.0006
    wins = outcome(lambda *s: best_play(*s, lose=0.0)[1] == "hit")
    assert np.abs(wins - [0.432, 0.087, 0.482]).max() < 0.0006
    assert abs(outcome(lambda *s: 0)[0] - 0.381) < 0.0006
    assert abs(outcome(lambda points, ace, up: envs.hand_value(points, ace) < 17)[0] - 0.408) < 0.0006
    assert abs(outcome(lambda *s: 0.5 if s[0] <= 21 else 0)[0] - 0.281) < 0.0006


def test_blackjack_plays_as_computed():
    total, goal, by_return, _ = play(make("Blackjack"), "expert", np.random.default_rng(0), 8000)
    assert abs(total.mean() + 0.0466) < 0.035 and abs(goal.mean() - 0.429) < 0.02 and (goal == by_return).all()
    total, goal, _, _ = play(make("Blackjack"), "random", np.random.default_rng(0), 5000)
    assert abs(goal.mean() - 0.281) < 0.025


# ---------------------------------------------------------------- scripted players

def walk(name, n, seed=0):
    """States of a game as random players meet them."""
    env, rng, over = make(name), np.random.default_rng(seed), True
    env.reset(seed=seed)
    for _ in range(n):
        if over:
            env.reset()
        yield env, rng
        _, _, terminated, truncated, _ = env.step(scripted_reply(["random", "expert"][rng.integers(2)], env, rng))
        over = terminated or truncated


@pytest.mark.parametrize("name", [*GAMES, "Reading"])
def test_malformed_never_parses_and_varies(name):
    seen = set()
    for env, rng in walk(name, 300):
        reply = scripted_reply("malformed", env, rng)
        assert env.parse(reply) is None, reply
        seen.add(reply.replace(MARKER, "M").split(" ")[0] + str(len(reply.split())))
    assert name == "Reading" or len(seen) >= 5


@pytest.mark.parametrize("name", GAMES)
def test_every_other_player_is_valid(name):
    for env, rng in walk(name, 150):
        for who in ("expert", "random", "biased"):
            assert env.parse(scripted_reply(who, env, rng)) is not None


@pytest.mark.parametrize("name", GAMES)
def test_biased_majority_is_one_wrong_action(name):
    for env, rng in walk(name, 25):
        counts = Counter(scripted_reply("biased", env, rng) for _ in range(120))
        (common, n), *rest = counts.most_common()
        expert = f"{MARKER} {env.expert()}"
        assert common != expert and 60 <= n <= 108 and [reply for reply, _ in rest] == [expert]
        assert not env.optimal(parse_agent(common))


@pytest.mark.parametrize("name", GAMES)
def test_random_is_uniform_and_leaves_the_game_alone(name):
    env, rng = fresh(name), np.random.default_rng(0)
    before = env.rng.bit_generator.state
    counts = Counter(env.parse(scripted_reply("random", env, rng))[0] for _ in range(4000))
    assert set(counts) == set(env.words()) and max(counts.values()) < 1.35 * min(counts.values())
    for who in ("expert", "biased", "malformed"):
        scripted_reply(who, env, rng)
    assert env.rng.bit_generator.state == before


def test_mixture_follows_its_shares():
    env, rng = fresh("NumberLine"), np.random.default_rng(0)
    counts = Counter(mixed_reply({"expert": 1, "malformed": 3}, env, rng)[1] for _ in range(2000))
    assert set(counts) == {"expert", "malformed"} and abs(counts["expert"] / 2000 - 0.25) < 0.04
    assert mixed_reply({"expert": 1.0}, env, rng) == (f"{MARKER} {env.expert()}", "expert")


# ---------------------------------------------------------------- pictures

def differ(env, **state):
    """How many pixels change when a piece of the state does."""
    before, kept = env.picture(), {key: getattr(env, key) for key in state}
    for key, value in state.items():
        setattr(env, key, value)
    after = env.picture()
    for key, value in kept.items():
        setattr(env, key, value)
    return int((np.asarray(ImageChops.difference(before, after)).max(-1) > 60).sum())


@pytest.mark.parametrize("size", [80, 300])
def test_pictures_show_the_state(size):
    pictures = set()
    env = make("NumberLine", size=size)
    env.reset(seed=0)
    for env.current in range(6):
        for env.target in range(6):
            pictures.add(env.picture().tobytes())
    assert len(pictures) == 36
    env = make("EZPoints", size=size)
    env.reset(seed=0)
    cards = set()
    for rank in range(1, 14):
        for suit in range(4):
            env.cards = [(rank, suit), (2, 0)]
            cards.add(env.picture().tobytes())
    assert len(cards) == 52
    for name in ("EZPoints", "Points24"):
        env = make(name, size=size)
        env.reset(seed=0)
        for formula in (["3"], ["blank"], ["3", "+"], ["+", "3"], ["10"] * env.limit):
            assert differ(env, formula=formula) > 10
        for i in range(len(env.cards)):
            assert differ(env, cards=[(r % 13 + 1, 3 - s) if k == i else (r, s) for k, (r, s) in enumerate(env.cards)]) > 20
    env = make("Blackjack", size=size)
    env.reset(seed=0)
    env.player, env.dealer = [(9, 0), (8, 1)], [(5, 2), (6, 3)]
    assert differ(env, player=[(9, 0), (8, 1), (2, 1)]) > 20 and differ(env, dealer=[(4, 2), (6, 3)]) > 20
    assert differ(env, dealer=[(5, 2), (7, 0)]) == 0 == differ(env, dealer=[(5, 2), (6, 3), (9, 1)], stood=True)      # the hole card stays hidden
    assert differ(env, player=[(1, 0)] * 14) > 20


# ---------------------------------------------------------------- Reading

def test_reading_is_answered_by_its_expert_only():
    env, rng = make("Reading"), np.random.default_rng(0)
    env.reset(seed=0)
    kinds = Counter()
    for i in range(3000):
        env.start()
        kinds[env.kind] += 1
        assert MARKER not in env.question + env.answer and env.question and env.answer == env.answer.strip() != ""
        assert env.kind != "echo" or env.question.endswith(f"Repeat:\n{env.answer}")
    assert 0.22 < kinds["echo"] / 3000 < 0.28 and kinds["arithmetic"] > 100 and len(kinds) > 18 and min(kinds.values()) > 15
    for i in range(100):
        obs, _ = env.reset()
        assert obs["text"] == env.question
        _, reward, terminated, truncated, info = env.step(f" {scripted_reply('expert', env, rng)}\n")
        assert (reward, terminated, truncated) == (1.0, True, False) and info["success"] and info["valid"]
        env.reset()
        assert env.step("something else")[1] == 0.0
    env.reset()
    assert env.step("  ")[3:][1]["valid"] is False


def test_reading_answers_are_right():
    env, seen = make("Reading"), set()
    env.reset(seed=1)
    for _ in range(4000):
        env.start()
        game, kind, answer = env.game, env.kind, env.answer
        seen.add(kind)
        if kind == "arithmetic":
            a, op, b = env.question.split("\n")[-1][8:-1].split()        # "What is 12 - 7?"
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op] == int(answer)
        elif kind == "NumberLine target":
            assert answer == str(game.target)
        elif kind == "NumberLine picture":
            assert answer == f"target {game.target} current {game.current}"
        elif kind == "NumberLine larger":
            assert answer in ("target", "current", "equal") and (answer == "target") == (game.target > game.current)
        elif kind.endswith("Points values"):
            assert answer.split() == [str(min(rank, 10)) for rank, _ in game.cards]
        elif kind in ("EZPoints cards", "Points24 cards"):
            assert [{"A": 1, "J": 11, "Q": 12, "K": 13}.get(w) or int(w) for w in answer.split()] == [rank for rank, _ in game.cards]
        elif kind.endswith("Points formula"):
            assert answer.split() == game.formula and f"Formula: {answer}" in env.question
        elif kind.endswith("Points last item"):
            assert answer == game.formula[-1] and f" {answer}\n" in env.question
        elif kind == "Blackjack your sum":
            points = [min(rank, 10) for rank, _ in game.player]
            assert int(answer) == sum(points) + (10 if 1 in points and sum(points) <= 11 else 0) and 2 <= len(points) <= 6
        elif kind == "Blackjack soft ace":
            points = [min(rank, 10) for rank, _ in game.player]
            assert answer == ("yes" if 1 in points and sum(points) <= 11 else "no")
    assert {"arithmetic", "NumberLine larger", "EZPoints product", "Points24 values", "Points24 formula", "EZPoints last item", "Blackjack soft ace"} <= seen


def test_a_text_to_repeat_has_the_same_tokens_in_question_and_reply():
    """In "Repeat: abc" the text begins with a space and so with another token than in the reply: what is copied was never quite what stood there,
    and 35 % were repeated right after 2,500 updates. On a line of its own it is the same."""
    tokenizer, env = AutoTokenizer.from_pretrained(os.path.join(ROOT, "tiny-vlm")), make("Reading")
    env.reset(seed=0)
    for _ in range(200):
        _, question, answer = env.echo()
        ids = tokenizer(answer, add_special_tokens=False).input_ids
        assert tokenizer(question, add_special_tokens=False).input_ids[-len(ids):] == ids


def test_a_number_to_copy_has_the_same_token_wherever_it_stands():
    """ "link 'abc' [12]", "which number has 'abc'?" and the answer " 12", which was another token than in the brackets: two spellings of every number to know by heart. The tokenizer that is trained here keeps a number apart from the space before it."""
    train = [f"[{n}] link 'abc' {n} {n + 100}" for n in range(100)] * 3
    words = scratch.tokenizer(train, 600, ["<|pad|>", "<|end|>"])
    for n in (7, 12, 99, 104):
        [token] = words(str(n), add_special_tokens=False).input_ids
        assert all(words(text.format(n), add_special_tokens=False).input_ids.count(token) == 1 for text in ("[{}] link", "click {}", "click {} a", "#{}"))
    assert words.decode(words("click 104 56, [12]é").input_ids) == "click 104 56, [12]é"


def test_reading_seeds_make_different_items_and_echo_covers_ascii():
    items = set()
    env = make("Reading")
    for seed in range(50):
        env.reset(seed=seed)
        items.add((env.question, env.picture().tobytes()))
    assert len(items) > 45
    echoes = "".join(env.echo()[2] for _ in range(2000))
    assert set(map(chr, range(33, 127))) <= set(echoes)


def test_corpus_is_reproducible_and_never_shows_the_marker():
    texts = list(corpus(400))
    assert texts == list(corpus(400)) != list(corpus(400, seed=1)) and len(texts) > 800
    assert not any(MARKER in text or "End your reply" in text for text in texts)
    for name in GAMES:
        assert any(ENVS[name].goal in text for text in texts)


# ---------------------------------------------------------------- several tasks, lost episodes, threads

def test_several_tasks_take_turns():
    env = make("NumberLine, EZPoints,Blackjack", size=48)
    names = [(env.reset(seed=i), env.name)[1] for i in range(4)]
    assert names == ["NumberLine", "EZPoints", "Blackjack", "NumberLine"] and env.split
    env.reset(seed=5, options={"split": "train", "task": 7})
    alone = fresh("EZPoints", 5)
    assert env.name == "EZPoints" and env.prompt() == alone.prompt() and env.observation()["image"].size == (48, 48)
    say(env, "stand")
    assert env.turns == 1 and not hasattr(env, "no_such_thing")
    with pytest.raises(ValueError, match="'EZPoint' is unknown; nearest: EZPoints"):
        make("NumberLine,EZPoint")


def test_max_turns_is_a_setting():
    env = make("NumberLine", max_turns=2)
    env.reset(seed=0)
    assert say(env, "x", "x")[1:3] == (False, True) and make("NumberLine").max_turns == 10


# ---------------------------------------------------------------- environments of others, with stand-ins for their packages

class Corridor:
    """A gymnasium environment: three steps to the right."""
    unwrapped = property(lambda self: self)
    def reset(self, seed=None): self.seed, self.at = seed, 0; return 0, {}
    def step(self, action):
        self.at = max(0, self.at + (1 if action == 1 else -1))
        return self.at, np.float64(self.at == 3), np.bool_(self.at == 3), False, {}
    def render(self): return np.full((20, 30, 3), 60 * self.at, np.uint8)


def test_gym_wraps_any_environment_with_a_picture_and_names(monkeypatch):
    made = []
    def gym_make(id, **settings): made.append((id, settings)); return Corridor()
    monkeypatch.setitem(sys.modules, "gymnasium", SimpleNamespace(make=gym_make))
    class Walk(envs.Gym):
        name, goal, example, kinds, max_turns, split = "Walk", "Go right.", "right", (Words("left", "right"),), 5, False
        id, settings = "Corridor-v3", {"length": 3}
        def expert(self): return "right"
    env = Walk(size=40)
    obs, _ = env.reset(seed=1)
    seed = env.gym.seed
    assert made == [("Corridor-v3", dict(render_mode="rgb_array", disable_env_checker=True, length=3))] and obs["image"].size == (40, 40)
    assert say(env, "left", "fly", "right", "right")[:3] == (0.0, False, False) and env.gym.at == 2
    reward, terminated, truncated, info = say(env, "right")
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True) and type(reward) is float and type(terminated) is bool
    before = env.fingerprint()
    env.reset(seed=1)
    assert env.gym.seed == seed and env.fingerprint() != before
    env.reset(seed=2)
    assert env.gym.seed != seed and scripted_reply("expert", env, np.random.default_rng(0)) == f"{MARKER} right"


@pytest.mark.parametrize("name", ["FrozenLake", "BabyAI-GoToLocal-v0", "miniwob/click-test-v1", "NumberLine,FrozenLake"])
def test_a_missing_package_is_one_sentence(monkeypatch, name):
    for package in ("gymnasium", "minigrid", "selenium", "selenium.common.exceptions"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match="needs the package .*pip install -r requirements-envs.txt") as e:
        make(name)
    assert "\n" not in str(e.value)


def node(ref, tag, *children, text=None, box=(0, 0, 10, 10), **more):
    return dict(ref=ref, tag=tag, children=list(children), bgColor="rgba(0, 0, 0, 0)", classes="", **dict(zip(("left", "top", "width", "height"), box)), **({} if text is None else {"text": text}), **more)


FORM = node(1, "BODY", node(2, "DIV", node(3, "LABEL", node(4, "INPUT_checkbox", value=False, box=(10, 60, 12, 12)), node(-1, "t", text="nThOE")),
                            node(5, "INPUT_text", value="ab", focused=True, box=(10, 80, 100, 20)), node(6, "BUTTON", node(7, "SPAN"), node(-2, "t", text="Close"), box=(10, 120, 40, 20)),
                            node(8, "DIV", node(-3, "t", text="two"), node(-4, "t", text="lines")), node(9, "DIV"), node(10, "DIV") | dict(bgColor="rgb(255, 0, 0)"), node(11, "BUTTON", text="it's")))


def test_a_page_as_lines():
    """What says something or takes input, with its number; what is there for the layout only is left out."""
    assert [envs.format_element(e) for e in envs.page_elements(FORM)] == ["checkbox off [4]", "'nThOE'", "textbox 'ab' [5]", "button 'Close' [6]", "div 'two lines' [8]",
                                                                   "div 'rgb(255, 0, 0)' [10]", "button \"it's\" [11]"]


class Stand:
    """Stands in for a browser: the form above; the button closes it with a reward of 1, number 11 breaks it."""
    current_url = ""
    def __init__(self): self.log, self.over, self.shots, self.service = [], False, 0, SimpleNamespace(process=SimpleNamespace(pid=2 ** 30, wait=lambda: None))
    def get(self, url): self.current_url = url
    def execute_cdp_cmd(self, *args): pass
    def get_screenshot_as_png(self):
        self.shots += 1
        data = io.BytesIO()
        Image.new("RGB", (500, 240), (self.shots, len(self.log), 7)).save(data, "PNG")
        return data.getvalue()
    def execute_script(self, script, *args):
        if "elementClick" in script:
            if args[0] == 11:
                raise OSError("gone")
            self.log.append(args[0])
            self.over = args[0] == 6
        elif script.startswith(envs.START_SCRIPT):
            self.over, self.seed = False, args[0]
        return [True, self.over, 1 if self.over else 0, f"Click {self.seed % 7}.", None if self.over else FORM]


@pytest.fixture
def page(monkeypatch, tmp_path):
    """make(name) -> a MiniWoB environment on a stand-in browser, env.browser."""
    sent = []
    class Chain:
        def __init__(self, browser, duration): self.at, self.w3c_actions = None, SimpleNamespace(pointer_action=self)
        def move_to_location(self, x, y): self.at = (x, y); return self
        def click(self): return self
        def send_keys(self, keys): self.keys = keys; return self
        def perform(self): sent.append((self.at, self.keys))
    folder = tmp_path / "html" / "miniwob"
    folder.mkdir(parents=True)
    (folder / "click-test.html").write_text("")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    for name, parts in (("selenium", {}), ("selenium.common", {}), ("selenium.common.exceptions", dict(WebDriverException=RuntimeError)), ("selenium.webdriver", dict(ActionChains=Chain)),
                        ("urllib3", {}), ("urllib3.exceptions", dict(HTTPError=OSError))):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**parts))
    monkeypatch.setattr(envs.MiniWoB, "idle", [Stand()])
    def make_page(name="miniwob/click-test-v1", **kw):
        env = make(name, **kw)
        env.reset(seed=0)
        env.sent = sent
        return env
    return make_page


def test_miniwob_acts_by_number_and_by_place(page):
    env = page(penalty=-0.25)
    assert env.prompt().startswith(f"Click {env.browser.seed % 7}.\ncheckbox off [4]\n") and 'click ELEMENT or type ELEMENT "TEXT" or click X Y or type "TEXT" or press Enter' in env.prompt()
    assert say(env, "click 4")[:3] == (0.0, False, False) and env.browser.log == [4]
    assert say(env, 'type 5 "abc"')[3]["valid"] and env.browser.log == [4, 5] and env.sent == [(None, "abc")]
    say(env, "click 80 112", 'type "x\ue009y"', "press Enter")                               # a control key inside of a text is left out
    assert env.sent[1:] == [((80, 162), ""), (None, "xy"), (None, "\ue007")]
    for nothing in ("click 77", "click 0", "click -1", 'type 9 "a"', "click 160 10", "click 10 160", "click 10 -1"):
        before = list(env.browser.log)
        assert say(env, nothing)[0] == -0.25 and env.browser.log == before
    assert env.step(f"{MARKER} click 77")[4]["valid"] and not env.step(f"{MARKER} press F1")[4]["valid"]
    picture = env.picture().tobytes()
    obs, reward, terminated, truncated, info = env.step(f"{MARKER} click 6")
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True) and obs["image"].tobytes() == picture     # the last real picture


@pytest.mark.parametrize("way, yes, no", [("element", ["click 4", 'type 5 "a"'], ["click 80 112", 'type "a"']), ("coordinate", ["click 80 112", 'type "a"'], ["click 4", 'type 5 "a"'])])
def test_miniwob_by_one_way_only(page, way, yes, no):
    env, rng = page(f"miniwob/click-test-v1:{way}"), np.random.default_rng(0)
    assert ("checkbox" in env.prompt()) == (way == "element") and env.parse(f"{MARKER} {env.example}")
    assert all(env.parse(f"{MARKER} {a}") for a in yes + ["press Tab"]) and not any(env.parse(f"{MARKER} {a}") for a in no)
    samples = [env.parse(scripted_reply("random", env, rng)) for _ in range(200)]
    assert all(samples) and len({a[0].split()[0] for a in samples}) == 3 and {a[1] for a in samples if a[0] == "click" and len(a) == 2} <= {4, 5, 6, 8, 10, 11}
    assert all(env.parse(scripted_reply("malformed", env, rng)) is None for _ in range(50))


def test_miniwob_survives_its_browser(page):
    """The browser dies in the middle: the episode is marked as lost and ends; the next one has another browser; close() gives it back."""
    env = page()
    old = env.browser
    envs.BROWSERS.append(old)
    reward, terminated, truncated, _ = say(env, "click 11")
    assert (terminated, truncated) == (False, True) and "browser failed (OSError)" in env.lost and env.browser is None and old not in envs.BROWSERS
    envs.MiniWoB.idle.append(Stand())
    env.reset(seed=1)
    assert not env.lost and env.browser is not old
    env.close()
    assert env.browser is None and len(envs.MiniWoB.idle) == 1


def test_miniwob_unknown_task(page):
    with pytest.raises(ValueError, match="'miniwob/click-tset-v1' is unknown; nearest: miniwob/click-test-v1"):
        make("miniwob/click-tset-v1")
    with pytest.raises(ValueError, match="has no scripted expert|unknown"):
        env = page()
        env.task = "email-inbox"
        env.expert()


def test_the_expert_avoids_what_covers_its_target(page):
    env = page("miniwob/click-test-v1:coordinate")
    env.elements = [dict(ref=4, role="button", text="ONE", value=None, box=[0, 60, 40, 20]), dict(ref=5, role="button", text="TWO", value=None, box=[10, 65, 60, 40])]
    x, y = map(int, env.click(env.elements[0]).split()[1:])
    assert 0 <= x <= 40 and 60 <= y <= 80 and not (x >= 10 and y >= 65)


def test_a_world_without_questions_is_one_sentence():
    with pytest.raises(ValueError, match="'Reading:NumberLine': there are questions about BabyAI's levels"):
        make("Reading:NumberLine")
