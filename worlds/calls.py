"""
What environments are asked to do in an episode, each through worlds.guard; what fails is counted.
"""
import contextlib
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from worlds.contract import Unplayable, check_info, check_max_turns, check_observation, check_outcome
from worlds.contract import check_max_parallel, check_text
from worlds.guard import HANGS_IN_A_ROW, Failure, each, one_line
from worlds.players import NEED_EXPERT, has_expert, mixed_reply

# So many dropped episodes are too many if none ends in between.
DROPS_IN_A_ROW = 10


# ---- what environments are asked to do ----

class Start(NamedTuple):
    """An environment at the start of an episode, and what is observed there."""

    env: Any
    obs: dict

class Turn(NamedTuple):
    """What comes of a reply. tag: the episode's, when it is over. max_turns: when it must be over."""

    obs: dict
    reward: float
    terminated: bool
    truncated: bool
    info: dict
    tag: str
    max_turns: int

def start_episode(make_env, env, seed, options):
    """Reset an environment to a start, after making it if it is None -> Start."""
    is_new = env is None
    if is_new:
        env = make_env()
    try:
        obs, _ = env.reset(seed=seed, options=options)
        check_text("name", env.name)
        check_max_turns(env)
        check_max_parallel(env)
        return Start(env, check_observation(env, obs))
    except BaseException:
        # nobody else knows it yet, and the first error is the one to tell
        if is_new:
            with contextlib.suppress(Exception):
                env.close()
        raise

def take_turn(env, answer):
    """Let an environment take an agent's answer -> Turn, or Failure; it is closed when its episode is over.

    answer: a dict with a reply, or with `lost`, the reason why there is none. A Failure is returned as it is.
    """
    if isinstance(answer, Failure):
        return answer
    lost = answer.pop("lost", "")
    if not lost:
        obs, reward, terminated, truncated, info = env.step(answer["reply"])
        lost = check_text("lost", env.lost)
    if lost:
        env.close()
        return Failure(one_line(lost), breaks_env=False)
    outcome = check_outcome("step()", (reward, terminated, truncated))
    obs = check_observation(env, obs)
    tag = ""
    if terminated or truncated:
        tag = check_text("tag()", env.tag())
        env.close()
    return Turn(obs, *outcome, check_info(info), tag, check_max_turns(env))

def close_env(env):
    """Close an environment."""
    env.close()

def read_fingerprint(env):
    """Ask an environment what was dealt."""
    return check_text("fingerprint()", env.fingerprint())

def deal(env, seed):
    """Reset an environment to a held-out start -> its fingerprint."""
    env.reset(seed=seed, options={"split": "test"})
    return read_fingerprint(env)

def draw_reply(env, mix, rng):
    """Let scripted players reply, see worlds.players -> an agent's answer."""
    reply, player = mixed_reply(mix, env, rng)
    return dict(reply=check_text("the reply of a scripted player", reply), source=player)


# ---- counting ----

class Losses:
    """Count the episodes that cannot be played to their end, of so many in total."""

    def __init__(self, total):
        self.total = total
        self.n_dropped = 0
        # {number of an episode: how often it was lost}
        self.tries = Counter()
        self.last = ""
        self.end_streak()

    def end_streak(self):
        """Count from 0 what fails in a row: an episode has been played to its end."""
        self.drops_in_a_row = 0
        self.hangs_in_a_row = 0

    def drop(self, what, failure):
        """Report that an episode is dropped; SystemExit after too many in a row."""
        self.n_dropped += 1
        self.drops_in_a_row += 1
        self.remedy = "correct the environment first"
        if not failure.breaks_env:
            self.remedy = "mend the cause first"
        self.last = f"{what}: dropped, {failure.cause}; {self.n_dropped} of {self.total} episodes so far"
        tqdm.write(f"{self.last}.")
        if self.drops_in_a_row >= DROPS_IN_A_ROW or self.hangs_in_a_row >= HANGS_IN_A_ROW:
            self.stop()

    def stop(self):
        """End the program with one sentence about the last loss."""
        raise SystemExit(f"{self.last}; none has ended in between: {self.remedy}.")

    def retry_or_drop(self, episode):
        """Return the start of a lost episode, to be played again; [] for one that is dropped instead."""
        failure = episode.failure
        what = f"seed {episode.seed}"
        if episode.env is not None:
            what = f"{episode.env.name}, {what}"
        self.tries[episode.number] += 1
        self.hangs_in_a_row += failure.is_hang
        if self.tries[episode.number] > 1 or self.hangs_in_a_row >= HANGS_IN_A_ROW:
            self.drop(what, failure)
            return []
        if failure.breaks_env:
            tqdm.write(f"{what}: played again, {failure.cause}.")
        return [(episode.number, episode.seed)]

def report_hang(env, failures):
    """End the program with one sentence if one of the failures is a hang: the environment is lost."""
    for failure in failures:
        if failure.is_hang:
            raise SystemExit(f"{env.name}: a held-out start cannot be dealt, {failure.cause}: correct the "
                             "environment first.")

def report_starts(env, failures, starts):
    """Report the held-out starts that could not be dealt; SystemExit with one sentence if none could."""
    if not failures:
        return
    text = f"{env.name}: {len(failures)} held-out starts cannot be dealt, {failures[-1].cause}"
    if not starts:
        raise SystemExit(f"{text}: correct the environment first.")
    tqdm.write(f"{text}.")


# ---- before a run ----

def refusing(make_env):
    """Make an environment; Unplayable, with the sentence of registry.make, if that does not work."""
    try:
        return make_env()
    except (ValueError, SystemExit) as error:
        raise Unplayable(str(error))

def make_or_refuse(make_env, where="env"):
    """Make an environment; SystemExit with one sentence if that does not work."""
    return must(where, refusing, make_env)

def must(where, function, *job):
    """Call function(*job) and return what it returns; SystemExit with one sentence if that is a Failure."""
    [outcome] = each(function, [job])
    if isinstance(outcome, Failure):
        raise SystemExit(f"{where}: {outcome.cause}: correct the environment first.")
    return outcome

def check_environment(make_env, where, players=("random",)):
    """Play a turn of each task, so that a mistake is found before anything is written -> the environment.

    where: begins the sentence of the SystemExit. players: scripted players that will play, see
    worlds.players; each takes the first turn of a training start, and a random one that of a held-out start.
    Those that need an expert are left out where there is none.
    """
    env = make_or_refuse(make_env, where)
    rng = np.random.default_rng(0)
    if not has_expert(env):
        players = [player for player in players if player not in NEED_EXPERT]
    parts = [("test", "random"), *(("train", player) for player in players)]
    for task in getattr(env, "tasks", [env]):
        for split, player in parts:
            must(where, start_episode, None, task, 0, {"split": split})
            must(where, read_fingerprint, task)
            answer = must(where, draw_reply, task, {player: 1.0}, rng)
            must(where, take_turn, task, answer)
            must(where, close_env, task)
    return env
