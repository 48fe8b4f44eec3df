"""
Environments that fail, see failure_cases.py: every method, every kind of wrong value, every place to hang.

Most are MY_ENV in a file of the user's, with a few methods written anew.
"""
import contextlib, functools, os

import numpy as np

import evaluate, train
from buffer import Buffer
from evaluate import play, record, scripted_agent
from failure_cases import Case
from worlds.guard import Limits, set_timeout
from worlds.registry import make

# An episode has two turns. `side` is its start.
MY_ENV = '''
import sys, time
from PIL import Image
from envs import Env, Words

class Game(Env):
    name = "MyEnv"
    goal = "Say on."
    kinds = (Words("on", "off"),)
    example = "on"
    max_turns = 4
    split = False
    def start(self):
        self.side = int(self.rng.integers(4))
        self.played = 0
    def act(self, action):
        self.played += 1
        self.success = action == ("on",)
        return 1, self.played == 2, False
    def picture(self):
        return Image.new("RGB", (self.size, self.size), (60 * self.side, 100 * self.played, 0))
    def fingerprint(self):
        return str(self.side)
    def expert(self):
        return "on"

class MyEnv(Game):
    """As the game, but for what follows."""
'''
RAISES = "return 1 / 0"
HANGS = "time.sleep(20)"
LOOPS = "while True:\n        pass"
SECONDS = 0.5  # env_timeout
ZERO = "ZeroDivisionError in line ...: division by zero"
HUNG = f"no answer within env_timeout={SECONDS} seconds in line ..."

def seconds_for(parts):
    """Return the env_timeout of a case: short where something hangs, because a test waits for it."""
    code = "\n".join(parts.values())
    return SECONDS if HANGS in code or LOOPS in code else 60.0

def write_env(folder, parts):
    """Write my_env.py. parts: {"max_turns": a value, "close(self)": the body of a method}."""
    lines = [MY_ENV]
    for name, code in parts.items():
        if "(" in name:
            body = "\n".join(f"        {line}" for line in code.split("\n"))
            lines.append(f"    def {name}:\n{body}")
        else:
            lines.append(f"    {name} = {code}")
    with open(os.path.join(folder, "my_env.py"), "w") as f:
        f.write("\n".join(lines) + "\n")

def only_if(condition, code, *heads):
    """Write methods that are the game's, except that they run this code under a condition."""
    parts = {}
    for head in heads:
        call = head.replace("self, ", "").replace("self", "")
        parts[head] = f"if {condition}:\n    {code}\nreturn super().{call}"
    return parts

# two of eight episodes have side 2; they go wrong in their second turn
in_two_episodes = functools.partial(only_if, "self.side == 2 and self.played")

@contextlib.contextmanager
def timeout_put_back():
    """Leave env_timeout as it was: it is one setting for the whole process."""
    before = Limits.seconds
    try:
        yield
    finally:
        set_timeout(before)

def evaluate_env(agent, seconds, *flags):
    """Let an agent play the file by a command line; if that is refused, nothing was written."""
    argv = ["--env=my_env.py:MyEnv", f"--agent={agent}", "--episodes=8", f"--env_timeout={seconds}", *flags]
    with timeout_put_back():
        try:
            evaluate.main(argv)
        except SystemExit:
            assert not os.path.exists("recorded"), "something was written"
            raise

def seeds_of_sides(n):
    """Return n seeds whose starts have the sides 0, 1, 2, 3, 0, ..."""
    seeds = {side: [] for side in range(4)}
    for seed in range(50 * n):
        seeds[int(np.random.default_rng(seed).integers(4))].append(seed)
    return [seeds[i % 4][i // 4] for i in range(n)]

def play_env(seconds, n=8):
    """Record the expert's play of n starts -> the buffer, read back from its folder."""

    def make_env():
        return make("my_env.py:MyEnv", size=32)

    expert = scripted_agent({"expert": 1.0}, np.random.default_rng(0))
    buffer = Buffer("recorded", create=True)
    with timeout_put_back():
        set_timeout(seconds)
        try:
            record(play(make_env, expert, seeds_of_sides(n), 4, split="train"), buffer)
        finally:
            buffer = Buffer("recorded", create=True)
            check_whole(buffer)
    return buffer

def check_whole(buffer):
    """Assert that each recorded episode has both of its turns, and each row its picture."""
    for numbers in buffer.episodes.values():
        rows = [buffer.rows[i] for i in numbers]
        assert [row["terminated"] for row in rows] == [False, True]
        for row in rows:
            red, green, _ = buffer.image(row["images_file_names"][0]).getpixel((0, 0))
            assert red % 60 == 0
            assert green == 100 * row["turn"]


# ---- what is found before anything is written ----

def refused(what, parts, then, agent="random"):
    """Make a case: the environment is refused by one sentence."""

    def prepare(folder):
        write_env(folder, parts)
        return functools.partial(evaluate_env, agent, seconds_for(parts), "--save=recorded")

    return Case(what, f"env='my_env.py:MyEnv': {then}: correct the environment first.", prepare)

METHODS = [
    ("start(self)", "random"),
    ("act(self, action)", "random"),
    ("picture(self)", "random"),
    ("text(self)", "random"),
    ("fingerprint(self)", "random"),
    ("sample(self, rng)", "random"),
    ("expert(self)", "expert"),
    ("close(self)", "random"),
]

def in_every_method():
    """List a case for each method that raises, and for each that hangs."""
    cases = []
    for head, agent in METHODS:
        name = head.partition("(")[0]
        cases.append(refused(f"`{name}()` raises", {head: RAISES}, ZERO, agent))
        cases.append(refused(f"`{name}()` hangs", {head: HANGS}, HUNG, agent))
    return cases

def returns(head, value, sentence):
    """Write a method that returns a wrong value, and the sentence about it."""
    return {head: f"return {value}"}, sentence

ACT = "act(self, action)"
PICTURE = "picture(self)"
NUMBER = "it must be a finite number, at most 1e30"
BOOL = "it must be True or False"
THREE = "it must be reward, terminated, truncated"
TURNS = "it must be a whole number from 1 to 10,000"

WRONG_VALUES = {
    "a reward that is None": returns(ACT, "None, True, False", f"the reward of act() is None: {NUMBER}"),
    "a reward that is a text": returns(ACT, "'1', True, False", f"the reward of act() is '1': {NUMBER}"),
    "a reward of NaN": returns(ACT, "float('nan'), True, False", f"the reward of act() is nan: {NUMBER}"),
    "an infinite reward": returns(ACT, "-1e999, True, False", f"the reward of act() is -inf: {NUMBER}"),
    "a reward beyond float32": returns(ACT, "1e39, True, False", f"the reward of act() is 1e+39: {NUMBER}"),
    "a reward that is a list": returns(ACT, "[1], True, False", f"the reward of act() is [1]: {NUMBER}"),
    "`terminated` is None": returns(ACT, "1, None, False", f"terminated of act() is None: {BOOL}"),
    "`truncated` is a text": returns(ACT, "1, False, 'no'", f"truncated of act() is 'no': {BOOL}"),
    "`act()` returns two values": returns(ACT, "1, True", f"what act() returns is (1, True): {THREE}"),
    "`act()` returns nothing": returns(ACT, "None", f"what act() returns is None: {THREE}"),
    "`success` is a text": (
        {ACT: "self.success = 'no'\nreturn 1, True, False"},
        f"success is 'no': {BOOL}",
    ),
    "no picture": returns(PICTURE, "None", "the picture is None: it must be a PIL image"),
    "a picture that is an array": returns(
        PICTURE,
        "__import__('numpy').zeros((80, 80, 3))",
        "the picture is array(...): it must be a PIL image",
    ),
    "a picture of another size": returns(
        PICTURE,
        "Image.new('RGB', (64, 80))",
        "the picture is ('RGB', 64, 80): it must be RGB, 80 x 80",
    ),
    "a picture with transparency": returns(
        PICTURE,
        "Image.new('RGBA', (80, 80))",
        "the picture is ('RGBA', 80, 80): it must be RGB, 80 x 80",
    ),
    "`text()` returns bytes": returns(
        "text(self)",
        "b'x'",
        "TypeError: sequence item 1: expected str instance, bytes found",
    ),
    "half a character in `text()`": returns(
        "text(self)",
        "chr(0xd800)",
        "the prompt is ...: it must be a text without half characters (lone surrogates)",
    ),
    "`fingerprint()` is a number": returns(
        "fingerprint(self)",
        "5",
        "fingerprint() is 5: it must be a text",
    ),
    "`name` is a number": ({"name": "5"}, "name is 5: it must be a text"),
    "`kinds` are texts": ({"kinds": "('on',)"}, "AttributeError: 'str' object has no attribute ..."),
    "`max_turns` is None": ({"max_turns": "None"}, f"max_turns is None: {TURNS}"),
    "`max_turns` is a billion": ({"max_turns": "10**9"}, f"max_turns is 1000000000: {TURNS}"),
    "`sys.exit` in `close()`": ({"close(self)": "sys.exit('bye')"}, "SystemExit in line ...: bye"),
    "`act()` raises KeyboardInterrupt": ({ACT: "raise KeyboardInterrupt"}, "KeyboardInterrupt in line ..."),
    "a message of two lines": ({ACT: "raise ValueError('a\\nb')"}, "ValueError in line ...: a b"),
    "a message with a terminal's commands": (
        {ACT: "raise ValueError('\\x1b[2J' + chr(0xd800))"},
        "ValueError in line ...: ?[2J?",
    ),
    "an exception that cannot be printed": (
        {ACT: "class Odd(Exception):\n    def __str__(self):\n        return 5\nraise Odd"},
        "Odd in line ...: its message cannot be read",
    ),
}

def with_wrong_values():
    """List a case for each wrong value."""
    return [refused(what, parts, then) for what, (parts, then) in WRONG_VALUES.items()]

def train_env(*flags):
    """Train on the file; if that is refused, nothing was written."""
    with timeout_put_back():
        try:
            train.main(["--env=my_env.py:MyEnv", "--out_dir=run", f"--env_timeout={SECONDS}", *flags])
        finally:
            assert not os.path.exists("run"), "something was written"

def refused_by_train(what, parts, then, *flags):
    """Make a case: train.py refuses the environment by one sentence."""

    def prepare(folder):
        write_env(folder, parts)
        return functools.partial(train_env, *flags)

    return Case(what, f"env='my_env.py:MyEnv': {then}: correct the environment first.", prepare)

def said_otherwise(what, parts, then, agent="random", seconds=None):
    """Make a case of the command line with a sentence of its own."""
    if seconds is None:
        seconds = seconds_for(parts)

    def prepare(folder):
        write_env(folder, parts)
        return functools.partial(evaluate_env, agent, seconds)

    return Case(what, then, prepare)

REFUSED_OTHERWISE = [
    refused_by_train("`reset` hangs at the start of a run", {"reset(self, seed, options)": HANGS}, HUNG),
    refused_by_train("`expert()` raises at the start of a run", {"expert(self)": RAISES}, ZERO),
    refused_by_train(
        "`picture()` raises at the start of a dry run", {"picture(self)": RAISES}, ZERO, "--dry_run"
    ),
    said_otherwise(
        "`__init__()` raises",
        {"__init__(self, **kw)": RAISES},
        "env='my_env.py:MyEnv': MyEnv(size, penalty, max_turns) fails (ZeroDivisionError in line ...: "
        "division by zero): correct its __init__.",
    ),
    said_otherwise(
        "`__init__()` hangs",
        {"__init__(self, **kw)": HANGS},
        f"env='my_env.py:MyEnv': {HUNG}: correct the environment first.",
    ),
    said_otherwise(
        "too few starts to hold any out",
        {"split": "True", "fingerprint(self)": "return 'one'"},
        "env='MyEnv': none of 1000 starts belongs to the test part; with too few different starts to hold "
        "any out, set split = False in its class.",
    ),
    said_otherwise(
        "a negative `env_timeout`",
        {},
        "env_timeout=-1.0 must be at least 0; 0 waits for ever.",
        seconds=-1,
    ),
    said_otherwise(
        "some held-out starts cannot be dealt",
        {"start(self)": "super().start()\nif self.side == 2:\n    raise OSError('no map')"},
        "MyEnv: ... held-out starts cannot be dealt, OSError in line ...: no map. ... 8 episodes on",
        agent="expert",
    ),
]


# ---- what shows only while it plays ----

def dropped(what, parts, then, n=6):
    """Make a case: of eight episodes n are recorded, the others are dropped, and the cause is printed."""

    def prepare(folder):
        write_env(folder, parts)

        def call():
            assert len(play_env(seconds_for(parts)).episodes) == n
            return f"{n} of 8 episodes are recorded"

        return call

    return Case(what, f"{then} ... {n} of 8 episodes are recorded", prepare)

def stopped(what, parts, cause):
    """Make a case: playing stops, and what was played before is recorded."""

    def prepare(folder):
        written = only_if("self.side > 1 or self.played", *parts)
        write_env(folder, written)
        return functools.partial(play_env, seconds_for(written), 60)

    then = f"MyEnv, seed ...: dropped, {cause}; ... of 60 episodes so far; none has ended in between: "
    remedy = "mend the cause" if cause == "no answer" else "correct the environment"
    return Case(what, f"{then}{remedy} first.", prepare)

MIDDLE = [ACT, PICTURE, "text(self)", "expert(self)", "prompt(self)"]
TWO_DROPPED = "dropped, {}; 1 of 8 episodes so far. ... dropped, {}; 2 of 8 episodes so far."
NO_END = """obs, reward, terminated, truncated, info = super().step(reply)
self.over = self.side != 2 and self.over
return obs, reward, self.over, False, info"""
FAILS_ONCE = """if self.side == 2 and self.played and not hasattr(Game, "has_failed"):
    Game.has_failed = True
    return 1 / 0
return super().act(action)"""
ONE_ONLY = """super().__init__(**kw)
if hasattr(Game, "exists"):
    raise OSError("the licence is for one")
Game.exists = True"""

def in_the_middle():
    """List a case for each method that raises in the second turn of two episodes, or hangs there."""
    cases = []
    for head in MIDDLE:
        name = head.partition("(")[0]
        then = f"played again, {ZERO}. ... {TWO_DROPPED.format(ZERO, ZERO)}"
        cases.append(dropped(f"`{name}()` raises later", in_two_episodes(RAISES, head), then))
    for head in (ACT, "expert(self)"):
        name = head.partition("(")[0]
        then = f"played again, {HUNG}. ... {TWO_DROPPED.format(HUNG, HUNG)}"
        cases.append(dropped(f"`{name}()` hangs later", in_two_episodes(HANGS, head), then))
    return cases

def loses(what, parts, cause):
    """Make a case: two episodes are dropped for a cause."""
    return dropped(what, parts, TWO_DROPPED.format(cause, cause))

WHILE_IT_PLAYS = [
    loses("an endless loop", in_two_episodes(LOOPS, ACT), HUNG),
    loses(
        "a reward of NaN later",
        in_two_episodes("return float('nan'), True, False", ACT),
        f"the reward of act() is nan: {NUMBER}",
    ),
    loses("`tag()` raises", only_if("self.side == 2", RAISES, "tag(self)"), ZERO),
    loses(
        "`tag()` returns nothing",
        only_if("self.side == 2", "return None", "tag(self)"),
        "tag() is None: it must be a text",
    ),
    loses("`close()` raises later", only_if("self.side == 2", RAISES, "close(self)"), ZERO),
    loses("an episode that never ends", {"step(self, reply)": NO_END}, "no end after max_turns=4 turns"),
    dropped("an episode fails once", {ACT: FAILS_ONCE}, f"played again, {ZERO}.", n=8),
    dropped(
        "it can be made only once",
        {"__init__(self, **kw)": ONE_ONLY},
        "dropped, env='my_env.py:MyEnv': MyEnv(size) fails (OSError in line ...: the licence is for one)",
        n=2,
    ),
    stopped("every episode fails", (RAISES, ACT), ZERO),
    stopped("every episode hangs", (HANGS, ACT), HUNG),
    stopped("every episode is lost", ("self.lost = 'no answer'", ACT), "no answer"),
    stopped("`sys.exit` in every episode", ("sys.exit('bye')", ACT), "SystemExit in line ...: bye"),
]


# ---- what is no mistake ----

CANVAS = """if not hasattr(self, "canvas"):
    self.canvas = Image.new("RGB", (self.size, self.size))
self.canvas.paste(super().picture())
return self.canvas"""

OF_NUMPY = """import numpy
reward, terminated, truncated = super().act(action)
return numpy.float32(reward), numpy.bool_(terminated), truncated"""

def accepted(what, parts, then, **files):
    """Make a case: eight episodes are recorded as they were played, with files beside the environment's."""

    def prepare(folder):
        write_env(folder, parts)
        for name, text in files.items():
            with open(os.path.join(folder, f"{name}.py"), "w") as f:
                f.write(text)

        def call():
            assert len(play_env(seconds_for(parts)).episodes) == 8
            return then

        return call

    return Case(what, then, prepare)

ACCEPTED = [
    accepted(
        "it imports a file beside it",
        {"text(self)": "import texts_of_my_env\nreturn texts_of_my_env.TEXT"},
        "the file is found",
        texts_of_my_env="TEXT = 'red'\n",
    ),
    accepted(
        "a file beside it has the name of one of ours",
        {"text(self)": "import train\nreturn train.env"},
        "ours is meant",
        train="1 / 0\n",
    ),
    accepted("it always draws into one picture", {PICTURE: CANVAS}, "each is recorded as it was"),
    accepted("a reward and an end of numpy", {ACT: OF_NUMPY}, "they are a number and a boolean"),
]

CASES = [
    *in_every_method(),
    *with_wrong_values(),
    *REFUSED_OTHERWISE,
    *in_the_middle(),
    *WHILE_IT_PLAYS,
    *ACCEPTED,
]
