"""
Feed environments with generated replies: whatever a model writes is a turn, and never an exception.

    python -m pytest tests/test_replies.py                                   # a few hundred for each
    REPLIES=100000 python -m pytest -s -k "not miniwob" tests/test_replies.py    # by hand: minutes
    REPLIES=3000 python -m pytest -s -k miniwob tests/test_replies.py
"""
import json, os, time

import numpy as np
import pytest

from buffer import make_row
from envs import MARKER
from worlds.calls import start_episode, take_turn
from worlds.registry import WORLDS, make

REPLIES = int(os.environ.get("REPLIES", 300))
NAMES = [*WORLDS, "BabyAI-GoToLocal-v0", "BabyAI-PutNextLocal-v0:view"]
PAGES = ["miniwob/enter-text-v1", "miniwob/click-checkboxes-v1:coordinate"]

# What replies are made of, beside the environment's own actions.
PIECES = r"""
é ² ٣ Ⅷ ０ ＋ − <image> <|pad|> <|end|> <|im_end|> </s> [INST] {{x}} {% %s {} {0.__class__} \ \u \ud800 \x00
' " ` <script> $(id) __import__('os') None True nan inf -inf 1e999 007 0x1 1_0 -0 999999999999999999999 ( )
** // / = click type press act 1 2 "a" [action action] [Action] [action] [action]: [action][action]
""".split()
PIECES += ["", " ", "\n", "\t", "\r", "\x00", "\u202e", "\ufeff", "\u2028", "\U0001f600"]
PIECES += ["press F1", 'type 1 "a"']
LONG = ["(", "9", "+", " ", "\n", "[", '"', "\\", MARKER, "1+", "a"]

def draw_piece(env, rng):
    """Draw an action of the environment, a strange text, or noise."""
    which = rng.random()
    if which < 0.4:
        return env.sample(rng)
    if which < 0.9:
        return PIECES[rng.integers(len(PIECES))]
    return "".join(map(chr, rng.integers(0, 0x3000, size=rng.integers(1, 12))))

def mutate(text, rng):
    """Delete, double or replace a few characters."""
    letters = list(text)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(len(letters) + 1))
        letters[place : place + int(rng.integers(3))] = PIECES[rng.integers(len(PIECES))][:2]
    return "".join(letters)

def draw_reply_text(env, rng):
    """Draw a reply: a valid one, nearly a valid one, a heap of pieces, or 20,000 characters of one kind."""
    which = rng.random()
    if which < 0.002:
        return f"{MARKER} " + LONG[rng.integers(len(LONG))] * int(rng.integers(1000, 20_000))
    if which < 0.2:
        return f"{MARKER} {env.sample(rng)}"
    if which < 0.5:
        return f"a plan {MARKER} {mutate(env.sample(rng), rng)}"
    text = " ".join(draw_piece(env, rng) for _ in range(rng.integers(1, 5)))
    if which < 0.7:
        return text
    return f"{MARKER} {text}"

def feed(env, n):
    """Play n generated replies -> (valid ones, episodes); raises whatever the environment raises."""
    rng = np.random.default_rng(0)
    valid = 0
    episodes = 0
    turn = None
    for _ in range(n):
        # a Failure is a browser that died, or a bot that gave up
        is_over = not hasattr(turn, "obs") or turn.terminated or turn.truncated
        if is_over:
            obs = start_episode(None, env, episodes, {"split": "train"}).obs
            episodes += 1
        reply = draw_reply_text(env, rng)
        turn = take_turn(env, dict(reply=reply))
        if hasattr(turn, "obs"):
            outcome = dict(reward=turn.reward, **turn.info)
            json.dumps(make_row("episode", 0, env.name, 0, obs, reply, source="model", **outcome)).encode()
            obs = turn.obs
            valid += turn.info["valid"]
    env.close()
    return valid, episodes

@pytest.mark.parametrize("name", NAMES + PAGES)
def test_no_reply_is_an_exception(name):
    """Each costs a turn, is recorded, and may be valid."""
    if name in PAGES and "REPLIES" not in os.environ:
        pytest.skip("needs Chromium: set REPLIES")
    try:
        env = make(name, size=64)
    except SystemExit as missing:
        pytest.skip(str(missing))
    began = time.perf_counter()
    valid, episodes = feed(env, REPLIES)
    seconds = time.perf_counter() - began
    print(f"\n{name}: {REPLIES:,} replies, {valid:,} valid, {episodes:,} episodes, {seconds:.0f} s")
    assert 0.1 * REPLIES < valid < 0.6 * REPLIES
