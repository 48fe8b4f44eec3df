"""
The text protocol, Env, NumberLine, the scripted players, environments by name and in a file of your own.

    python -m pytest tests/test_envs.py
"""
import ast
import inspect
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import envs
from env_helpers import GAMES, episode_log, fresh, play_games, say, walk
from envs import (
    MARKER,
    Command,
    Env,
    Text,
    Words,
    format_action,
    is_held_out,
    parse_agent,
)
from worlds.players import has_expert, mixed_reply, scripted_reply
from worlds.registry import QUESTIONS, make

ROOT = Path(envs.__file__).parent


# ---- the text protocol ----


def test_parse_agent_takes_the_line_behind_the_last_marker():
    assert parse_agent("[action] +") == "+"
    assert parse_agent("I think [action] - is bad, so [action]  move up \nand done") == "move up"
    assert parse_agent("[action]+\r\n") == "+"
    assert parse_agent("[action]") == ""
    assert parse_agent("[action]\n+") == ""
    assert parse_agent("+") is None
    assert parse_agent("[Action] +") is None


def test_words_are_parsed_exactly():
    words = Words("hit", "stand")
    assert words.parse("hit") == ("hit",)
    for text in ("Hit", "hit stand", ""):
        assert words.parse(text) is None
    assert words.words() == ["hit", "stand"]
    assert "hit or stand" in words.doc()
    rng = np.random.default_rng(0)
    assert {words.sample(rng) for _ in range(50)} == {"hit", "stand"}


def test_commands_are_parsed_with_their_arguments():
    click = Command("click", int)
    click_at = Command("click", int, int)
    write = Command("type", int, str)
    assert click.parse("click 13") == ("click", 13)
    assert click_at.parse("click 80 112") == ("click", 80, 112)
    assert click_at.parse("click 80") is None
    assert write.parse('type 14 "abc"') == ("type", 14, "abc")
    assert write.parse('type 14 "a \\"b\\" \\n c"') == ("type", 14, 'a "b" \n c')
    assert click.words() is None
    assert Command("wait").words() == ["wait"]
    assert click.doc().startswith("click ")
    assert '"' in write.doc()


def test_free_text_is_anything_but_nothing():
    text = Text()
    assert text.parse("any thing") == ("any thing",)
    assert text.parse("") is None
    assert text.words() is None


def test_samples_of_every_kind_parse_to_themselves():
    rng = np.random.default_rng(0)
    commands = [Command("click", int), Command("click", int, int), Command("type", int, str), Command("wait")]
    for kind in (Words("hit", "stand"), Text(), *commands):
        for _ in range(50):
            sample = kind.sample(rng)
            assert format_action(kind.parse(sample)) == sample


BROKEN_COMMANDS = [
    "click",
    "click x",
    "click 1.5",
    "click 1 2",
    "click " + "9" * 5000,
    "click ٣",
    "click ²",
    "click 007",
    "type 14 abc",
    "type 14 'abc'",
    'type 14 "abc',
    'type 14 "a" "b"',
    r'type 14 "\x"',
    r'type 14 "\ud800"',
    'type 14 "a\nb"',
    'type "a" 14',
    "type __import__('os') \"a\"",
]


@pytest.mark.parametrize("reply", BROKEN_COMMANDS)
def test_broken_commands_are_invalid(reply):
    assert Command("click", int).parse(reply) is None
    assert Command("type", int, str).parse(reply) is None


class Page(Env):
    """An environment with several kinds of action, which it only writes down."""

    name = "Page"
    goal = "Click."
    kinds = (Command("click", int), Command("type", int, str), Words("back"))
    example = "click 3"

    def start(self):
        self.log = []

    def act(self, action):
        self.log.append(action)
        return 0, False, False

    def picture(self):
        return Image.new("RGB", (self.size, self.size))

    def fingerprint(self):
        return "one"


def test_an_environment_may_mix_kinds():
    env = Page()
    env.reset(seed=0)
    say(env, 'type 3 "é \\"x\\""')
    info = say(env, "click 14")[3]
    assert info == {"valid": True, "action": "click 14", "success": False, "success_return": False}
    assert env.log[0] == ("type", 3, 'é "x"')
    assert not say(env, "click a")[3]["valid"]
    assert len(env.log) == 2
    samples = [env.sample(np.random.default_rng(i)) for i in range(20)]
    assert {sample.split()[0] for sample in samples} == {"click", "type", "back"}


@pytest.mark.parametrize("name", GAMES)
def test_hostile_replies_are_just_invalid(name):
    rng = np.random.default_rng(0)
    noise = "".join(map(chr, rng.integers(1, 0xD7FF, size=5000)))
    actions = [
        "__import__('os')",
        "9" * 100_000,
        "٣",
        "²",
        "＋",
        "1_0",
        "+\x00",
        "0",
        "-1",
        "11",
        "**",
        "9**9**9**9",
        "(" * 100_000,
        "{}",
        "None",
    ]
    for reply in ["", MARKER * 1000, noise, *(f"{MARKER} {action}" for action in actions)]:
        env = fresh(name)
        assert not env.step(reply)[4]["valid"], reply[:30]


def test_no_text_of_a_model_is_run():
    """No environment calls eval, exec, compile or __import__."""
    for file in [ROOT / "envs.py", *(ROOT / "worlds").glob("*.py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = {function.id for function in calls if isinstance(function, ast.Name)}
        assert not names & {"eval", "exec", "compile", "__import__"}, file


# ---- Env ----


@pytest.mark.parametrize("name", GAMES)
def test_five_values_and_their_types(name):
    env = make(name, size=64)
    rng = np.random.default_rng(0)
    obs, info = env.reset(seed=3)
    over = False
    while not over:
        assert isinstance(info, dict)
        assert set(obs) == {"image", "text"}
        assert obs["text"] == env.prompt()
        assert obs["image"].size == (64, 64)
        assert obs["image"].mode == "RGB"
        obs, reward, terminated, truncated, info = env.step(scripted_reply("random", env, rng))
        assert type(reward) is float
        assert type(terminated) is bool
        assert type(truncated) is bool
        assert not (terminated and truncated)
        assert set(info) == {"valid", "action", "success", "success_return"}
        assert all(type(info[key]) is bool for key in ("valid", "success", "success_return"))
        over = terminated or truncated
    # The last observation is a real picture.
    assert len(np.unique(np.asarray(obs["image"]))) > 10
    with pytest.raises(RuntimeError, match="reset"):
        env.step(f"{MARKER} +")


def test_stepping_before_reset_and_wrong_arguments_say_so():
    with pytest.raises(RuntimeError, match="reset"):
        make("NumberLine").step(f"{MARKER} +")
    with pytest.raises(ValueError, match="'Numberline'.*NumberLine"):
        make("Numberline")
    with pytest.raises(ValueError, match="split='val'"):
        make("EZPoints").reset(options={"split": "val"})
    with pytest.raises(ValueError, match="player='best'"):
        scripted_reply("best", fresh("EZPoints"), np.random.default_rng(0))


@pytest.mark.parametrize("name", GAMES)
def test_prompts_are_short_and_say_everything(name):
    env = fresh(name)
    prompt = env.prompt()
    assert len(prompt.split()) <= 45
    assert prompt.startswith(env.goal)
    assert f"{MARKER} {env.example}" in prompt
    assert all(word in prompt.split() for word in env.words())
    assert env.parse(f"{MARKER} {env.example}") is not None
    # A model that echoes its prompt plays the example.
    assert env.parse(prompt) == (env.example,)


@pytest.mark.parametrize("name", GAMES)
def test_a_seed_decides_everything(name):
    log = episode_log(name, 1)
    assert log == episode_log(name, 1)
    assert log != episode_log(name, 2)


@pytest.mark.parametrize("name", ["EZPoints", "Points24", "Blackjack"])
def test_train_and_test_starts_are_disjoint(name):
    env = make(name)
    starts = {}
    for split in ("train", "test"):
        env.reset(seed=0)
        starts[split] = set()
        for _ in range(300):
            env.reset(options={"split": split})
            starts[split].add(env.fingerprint())
            assert is_held_out(env.fingerprint()) == (split == "test")
    assert not starts["train"] & starts["test"]
    assert len(starts["test"]) > 30
    env.reset(seed=0)
    held_out = 0
    for _ in range(1000):
        env.reset()
        held_out += is_held_out(env.fingerprint())
    assert 0.05 < held_out / 1000 < 0.16


def test_too_few_starts_to_hold_any_out_is_one_sentence():
    """Every start of Page is the same one, and it belongs to one part only."""
    env = Page()
    part, other = ("test", "train") if is_held_out("one") else ("train", "test")
    env.reset(seed=0, options={"split": part})
    with pytest.raises(SystemExit, match=f"'Page'.*{other} part.*split = False"):
        env.reset(seed=0, options={"split": other})


@pytest.mark.parametrize("name", GAMES)
def test_an_invalid_reply_costs_the_penalty_and_moves_nothing(name):
    env = make(name, penalty=-0.25)
    env.reset(seed=0)
    picture = env.picture().tobytes()
    text = env.prompt()
    for turn in range(env.max_turns):
        obs, reward, terminated, truncated, info = env.step("no marker")
        assert reward == -0.25
        assert not info["valid"]
        assert info["action"] == ""
        assert not terminated
        assert truncated == (turn == env.max_turns - 1)
        assert obs["image"].tobytes() == picture
        assert obs["text"] == text


def test_max_turns_is_a_setting():
    env = make("NumberLine", max_turns=2)
    env.reset(seed=0)
    assert say(env, "x", "x")[1:3] == (False, True)
    assert make("NumberLine").max_turns == 10


# ---- NumberLine ----


class FixedNumbers:
    """A generator that returns the given numbers."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def integers(self, *args, **kw):
        return np.array(self.numbers)


@pytest.mark.parametrize("current, target, after", [(4, 4, 0), (5, 5, 1), (0, 0, 1), (3, 3, 4), (2, 5, 5)])
def test_number_line_start_rule(current, target, after):
    env = make("NumberLine")
    env.rng = FixedNumbers(current, target)
    env.start()
    assert (env.current, env.target) == (current, after)


MOVES = [
    (2, 5, "+", 0, 3, False),
    (2, 5, "-", -1, 1, False),
    (4, 5, "+", 1, 5, True),
    (1, 0, "-", 1, 0, True),
    # A move beyond the end of the line does not shrink the distance.
    (0, 3, "-", -1, 0, False),
    (5, 2, "+", -1, 5, False),
]


@pytest.mark.parametrize("current, target, action, reward, after, over", MOVES)
def test_number_line_moves(current, target, action, reward, after, over):
    env = fresh("NumberLine", current=current, target=target)
    assert say(env, action)[:3] == (reward, over, False)
    assert env.current == after
    assert env.success == over


@pytest.mark.parametrize("penalty", [0.0, -0.3, -1.0])
def test_an_episode_with_a_slip_is_not_clean(penalty):
    """Two agents that learn from other penalties are judged alike."""
    env = fresh("NumberLine", current=0, target=1, penalty=penalty)
    assert env.step("hello")[1] == penalty
    info = env.step(f"{MARKER} +")[-1]
    assert env.success and info["success"] and not info["success_return"]


def test_number_line_is_truncated_after_ten_turns():
    env = fresh("NumberLine", current=0, target=3)
    assert say(env, *"-" * 9)[1:3] == (False, False)
    assert say(env, "-")[1:3] == (False, True)
    assert env.total == -10
    env = fresh("NumberLine", current=0, target=1)
    say(env, *"-" * 9)
    # The target is reached on the last turn: the episode is terminated, not truncated.
    assert say(env, "+")[:3] == (1, True, False)


def test_number_line_has_all_its_starts_in_both_parts():
    env = make("NumberLine")
    env.reset(seed=0)
    starts = set()
    for _ in range(600):
        env.reset(options={"split": "test"})
        starts.add((env.current, env.target))
    assert len(starts) == 30


def test_number_line_yardsticks():
    rng = np.random.default_rng(0)
    total, success, success_return, turns = play_games(make("NumberLine"), "expert", rng, 1500)
    assert success.all()
    assert success_return.all()
    assert (total == 1).all()
    assert abs(turns.mean() - 2.28) < 0.12
    total, success, success_return, turns = play_games(make("NumberLine"), "random", rng, 4000)
    assert abs(success_return.mean() - 0.282) < 0.03
    assert abs(success.mean() - 0.611) < 0.03
    assert abs(total.mean() + 2.49) < 0.2


@pytest.mark.parametrize("size", [80, 300])
def test_number_line_pictures_show_the_state(size):
    env = make("NumberLine", size=size)
    env.reset(seed=0)
    pictures = set()
    for env.current in range(6):
        for env.target in range(6):
            pictures.add(env.picture().tobytes())
    assert len(pictures) == 36


# ---- scripted players ----


@pytest.mark.parametrize("name", GAMES)
def test_malformed_never_parses_and_varies(name):
    shapes = set()
    for env, rng in walk(name, 300):
        reply = scripted_reply("malformed", env, rng)
        assert env.parse(reply) is None, reply
        first = reply.replace(MARKER, "M").split(" ")[0]
        shapes.add(first + str(len(reply.split())))
    assert len(shapes) >= 5


@pytest.mark.parametrize("name", GAMES)
def test_every_other_player_is_valid(name):
    for env, rng in walk(name, 150):
        for player in ("expert", "random", "biased"):
            assert env.parse(scripted_reply(player, env, rng)) is not None


@pytest.mark.parametrize("name", GAMES)
def test_biased_majority_is_one_wrong_action(name):
    for env, rng in walk(name, 25):
        counts = Counter(scripted_reply("biased", env, rng) for _ in range(120))
        (common, n), *rest = counts.most_common()
        expert = f"{MARKER} {env.expert()}"
        assert common != expert
        assert 60 <= n <= 108
        assert [reply for reply, _ in rest] == [expert]
        assert not env.optimal(parse_agent(common))


@pytest.mark.parametrize("name", GAMES)
def test_random_is_uniform_and_leaves_the_game_alone(name):
    env = fresh(name)
    rng = np.random.default_rng(0)
    before = env.rng.bit_generator.state
    counts = Counter(env.parse(scripted_reply("random", env, rng))[0] for _ in range(4000))
    assert set(counts) == set(env.words())
    assert max(counts.values()) < 1.35 * min(counts.values())
    for player in ("expert", "biased", "malformed"):
        scripted_reply(player, env, rng)
    assert env.rng.bit_generator.state == before


def test_mixture_follows_its_shares():
    env = fresh("NumberLine")
    rng = np.random.default_rng(0)
    counts = Counter(mixed_reply({"expert": 1, "malformed": 3}, env, rng)[1] for _ in range(2000))
    assert set(counts) == {"expert", "malformed"}
    assert abs(counts["expert"] / 2000 - 0.25) < 0.04
    assert mixed_reply({"expert": 1.0}, env, rng) == (f"{MARKER} {env.expert()}", "expert")


def test_without_an_expert_two_players_are_missing():
    """One sentence says what to do, and has_expert() can be asked before anything is recorded."""
    env = Page()
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    assert not has_expert(env)
    for player in ("expert", "biased"):
        with pytest.raises(SystemExit) as error:
            scripted_reply(player, env, rng)
        assert str(error.value) == (
            "env='Page' has no expert(); give data_mix without expert and biased, or write one."
        )
    for player in ("random", "malformed"):
        valid = env.parse(scripted_reply(player, env, rng)) is not None
        assert valid == (player == "random")
    assert all(has_expert(make(name)) for name in GAMES)


# ---- environments by name ----


def test_several_tasks_take_turns():
    env = make("NumberLine, EZPoints,Blackjack", size=48)
    names = []
    for seed in range(4):
        env.reset(seed=seed)
        names.append(env.name)
    assert names == ["NumberLine", "EZPoints", "Blackjack", "NumberLine"]
    assert env.split
    env.reset(seed=5, options={"split": "train", "task": 7})
    same = fresh("EZPoints", 5)
    assert env.name == "EZPoints"
    assert env.prompt() == same.prompt()
    assert env.observation()["image"].size == (48, 48)
    say(env, "stand")
    assert env.turns == 1
    assert not hasattr(env, "no_such_thing")
    with pytest.raises(ValueError, match="'EZPoint' is unknown; nearest: EZPoints"):
        make("NumberLine,EZPoint")


def test_questions_are_not_for_online_play():
    assert all(make(name).online for name in [*GAMES, "NumberLine,EZPoints"])
    assert not any(make(name).online for name in QUESTIONS)
    assert not make("NumberLine,Reading").online


# ---- an environment in a file of your own ----

COIN = '''
from envs import Env, Words
from PIL import Image


class Coin(Env):
    name = "Coin"
    goal = "Say which side is up."
    kinds = (Words("heads", "tails"),)
    example = "heads"
    split = False

    def start(self):
        self.side = ["heads", "tails"][self.rng.integers(2)]

    def act(self, action):
        self.success = action == (self.side,)
        return int(self.success), True, False

    def picture(self):
        return Image.new("RGB", (self.size, self.size), "red" if self.side == "heads" else "blue")

    def fingerprint(self):
        return self.side
'''


@pytest.fixture
def write_file(tmp_path):
    """Return a function that writes a Python file and returns its path."""

    def write(text, name="my_env.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def refusal(name, **kw):
    """Return the one sentence with which an environment is refused."""
    with pytest.raises(SystemExit) as error:
        make(name, **kw)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.startswith(f"env={name!r}")
    return sentence


def test_an_environment_in_a_file_plays(write_file, monkeypatch):
    file = write_file(COIN)
    env = make(f"{file}:Coin", size=32, penalty=-0.5, max_turns=3)
    obs, _ = env.reset(seed=0)
    assert obs["image"].size == (32, 32)
    assert obs["text"].startswith("Say which side is up.\nActions: heads or tails\n")
    assert say(env, "edge")[:3] == (-0.5, False, False)
    assert say(env, env.side)[:3] == (1, True, False)
    assert env.online
    assert not has_expert(env)
    # The path may be relative, and the file may be one of several tasks.
    monkeypatch.chdir(Path(file).parent)
    assert make("my_env.py:Coin").name == "Coin"
    tasks = make("NumberLine,my_env.py:Coin")
    assert not has_expert(tasks)
    tasks.reset(seed=0, options={"task": 1})
    with pytest.raises(SystemExit, match="'Coin' has no expert"):
        scripted_reply("expert", tasks, np.random.default_rng(0))


def test_an_expert_in_a_file_plays(write_file):
    file = write_file(COIN + "\n    def expert(self):\n        return self.side\n")
    env = make(f"{file}:Coin")
    assert has_expert(env)
    _, success, _, turns = play_games(env, "expert", np.random.default_rng(0), 20)
    assert success.all()
    assert (turns == 1).all()


def test_the_example_in_the_docstring_of_env_plays(write_file):
    example = inspect.getdoc(Env).partition("For example:\n")[2]
    text = "from envs import Env, Words\nfrom PIL import Image\n" + textwrap.dedent(example)
    env = make(f"{write_file(text)}:Light")
    total, success, _, turns = play_games(env, "random", np.random.default_rng(1), 200)
    assert 0.35 < success.mean() < 0.65
    assert (total == success).all()
    assert (turns == 1).all()


def test_a_file_runs_once(write_file, tmp_path):
    log = tmp_path / "log.txt"
    file = write_file(f"open({str(log)!r}, 'a').write('run\\n')\n{COIN}")
    one = make(f"{file}:Coin")
    two = make(f"{file}:Coin")
    assert type(one) is type(two)
    assert log.read_text() == "run\n"


def test_a_file_may_define_dataclasses_and_hides_no_module(write_file):
    """Dataclasses look their module up by its name, which must not be that of a module of ours."""
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n" + COIN
    text += "\n\n@dataclass\nclass State:\n    side: str\n"
    file = write_file(text, "envs.py")
    assert make(f"{file}:Coin").name == "Coin"
    assert sys.modules["envs"] is envs


def test_a_file_that_is_not_there(tmp_path):
    assert "there is no file" in refusal(f"{tmp_path}/my_env.py:MyEnv")


@pytest.mark.parametrize("name", ["my_env.py", "my_env.py:"])
def test_a_file_without_a_class(name):
    assert "write --env=my_env.py:MyEnv" in refusal(name)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("x = 1\n\nclass MyEnv(:\n", "SyntaxError in line 3"),
        ("import no_such_package\n", "ModuleNotFoundError in line 1: No module named 'no_such_package'"),
        ("def f():\n    return 1 / 0\n\nf()\n", "ZeroDivisionError in line 2: division by zero"),
        ("raise ValueError('two\\nlines')\n", "ValueError in line 1: two lines"),
        ("import sys\nsys.exit(3)\n", "SystemExit in line 2: 3"),
    ],
)
def test_a_file_that_does_not_run(write_file, text, reason):
    file = write_file(text)
    sentence = refusal(f"{file}:MyEnv")
    assert "does not run" in sentence
    assert reason in sentence
    # It is tried again once it is corrected.
    Path(file).write_text(COIN)
    assert make(f"{file}:Coin").name == "Coin"


def test_a_class_that_is_not_there(write_file):
    file = write_file(COIN)
    assert refusal(f"{file}:Coins").endswith("has no class 'Coins'; it has: Coin.")
    file = write_file("x = 1\n", "empty.py")
    assert refusal(f"{file}:x").endswith("has no class 'x'; it has: none.")


def test_a_class_that_is_no_environment(write_file):
    file = write_file("class MyEnv:\n    pass\n")
    assert "MyEnv is no envs.Env: write class MyEnv(Env) instead" in refusal(f"{file}:MyEnv")


@pytest.mark.parametrize("method", ["start", "act", "picture", "fingerprint"])
def test_a_method_that_is_missing(write_file, method):
    file = write_file(COIN.replace(f"def {method}(", "def other("))
    assert f"Coin does not define {method}()" in refusal(f"{file}:Coin")


@pytest.mark.parametrize("attribute", ["name", "kinds"])
def test_an_attribute_that_is_missing(write_file, attribute):
    file = write_file(COIN.replace(f"    {attribute} =", "    other ="))
    assert f"Coin has no {attribute}" in refusal(f"{file}:Coin")


def test_a_constructor_that_fails(write_file):
    takes_nothing = "\n    def __init__(self):\n        super().__init__()\n"
    sentence = refusal(f"{write_file(COIN + takes_nothing)}:Coin", size=32)
    assert "Coin(size) fails (TypeError: " in sentence
    assert "unexpected keyword argument 'size'" in sentence


def test_a_constructor_that_fails_says_where(write_file):
    breaks = "\n    def __init__(self, **kw):\n        super().__init__(**kw)\n        self.side = {}['up']\n"
    line = len((COIN + breaks).splitlines())
    sentence = refusal(f"{write_file(COIN + breaks)}:Coin")
    assert f"Coin() fails (KeyError in line {line}: 'up'): correct its __init__." in sentence


def test_questions_about_a_file_are_refused(write_file):
    with pytest.raises(ValueError, match="there are questions about BabyAI's levels"):
        make(f"Reading:{write_file(COIN)}:Coin")
