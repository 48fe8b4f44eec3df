"""
Check what an environment returns: what is wrong is named where it enters, not where it breaks something.
"""
import reprlib

import numpy as np
from PIL import Image

from extras.check_rows import MAX_CHARACTERS

# Rewards become float32 tensors, and those of an episode are summed.
LARGEST_REWARD = 1e30
# An episode must end: this is the highest max_turns.
MOST_TURNS = 10_000

class Unplayable(SystemExit):
    """One sentence that ends the program: this environment cannot be played here at all."""

class BrokenContract(Exception):
    """One sentence on what a method of an environment returned, and what it must return."""

    def __init__(self, what, value, must):
        super().__init__(f"{what} is {reprlib.repr(value)}: it must be {must}")

def is_bool(value):
    """Tell whether a value is True or False, of Python or of numpy."""
    return isinstance(value, (bool, np.bool_))

def check_bool(what, value):
    """Return True or False; BrokenContract for anything else."""
    if not is_bool(value):
        raise BrokenContract(what, value, "True or False")
    return bool(value)

def check_reward(what, reward):
    """Return a reward as a float; BrokenContract if it is no finite number that float32 can hold."""
    number = float("nan")
    if not isinstance(reward, (str, bytes)):
        try:
            number = float(reward)
        except (TypeError, ValueError, ArithmeticError, RuntimeError):
            pass
    # `not <=` catches nan too
    if not abs(number) <= LARGEST_REWARD:
        raise BrokenContract(what, reward, "a finite number, at most 1e30")
    return number

def check_outcome(method, outcome):
    """Return (reward, terminated, truncated); BrokenContract if these are not a number and two booleans."""
    if not isinstance(outcome, (tuple, list)) or len(outcome) != 3:
        raise BrokenContract(f"what {method} returns", outcome, "reward, terminated, truncated")
    reward, terminated, truncated = outcome
    return (
        check_reward(f"the reward of {method}", reward),
        check_bool(f"terminated of {method}", terminated),
        check_bool(f"truncated of {method}", truncated),
    )

def check_text(what, text):
    """Return a text; BrokenContract if it is none, or holds half a character, which no file can hold."""
    if not isinstance(text, str):
        raise BrokenContract(what, text, "a text")
    if len(text) > MAX_CHARACTERS:
        raise BrokenContract(what, text, f"at most {MAX_CHARACTERS:,} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BrokenContract(what, text, "a text without half characters (lone surrogates)")
    return text

def check_picture(picture, size):
    """Return a copy of a picture: what is drawn into the original later does not change the record."""
    if not isinstance(picture, Image.Image):
        raise BrokenContract("the picture", picture, "a PIL image")
    if picture.mode != "RGB" or picture.size != (size, size):
        given = (picture.mode, *picture.size)
        raise BrokenContract("the picture", given, f"RGB, {size} x {size}")
    return picture.copy()

def check_observation(env, obs):
    """Return an observation that is the record's own; BrokenContract if it is not image and text."""
    if not isinstance(obs, dict) or not {"image", "text"} <= obs.keys():
        raise BrokenContract("the observation", obs, "a dict of image and text")
    return dict(image=check_picture(obs["image"], env.size), text=check_text("the prompt", obs["text"]))

def check_max_turns(env):
    """Return the number of turns after which an episode is over; BrokenContract if it may never be."""
    limit = env.max_turns
    if not isinstance(limit, (int, np.integer)) or not 1 <= limit <= MOST_TURNS:
        raise BrokenContract("max_turns", limit, f"a whole number from 1 to {MOST_TURNS:,}")
    return int(limit)

def check_max_parallel(env):
    """Return how many environments may be alive at once, None for any number; BrokenContract for neither."""
    limit = env.max_parallel
    if limit is None or limit == 0:
        return None
    if not isinstance(limit, (int, np.integer)) or limit < 1:
        raise BrokenContract("max_parallel", limit, "a whole number above 0, or None")
    return int(limit)

def check_info(info):
    """Return what step() tells beside the rewards; BrokenContract if a part is missing or of another type."""
    names = ("valid", "action", "success", "success_return")
    if not isinstance(info, dict) or not set(names) <= info.keys():
        raise BrokenContract("the info of step()", info, f"a dict of {', '.join(names)}")
    return dict(
        valid=check_bool("valid", info["valid"]),
        action=check_text("action", info["action"]),
        success=check_bool("success", info["success"]),
        success_return=check_bool("success_return", info["success_return"]),
    )
