"""
Environments: each shows a picture and a text, and takes an action as text.

    observation    {"image": picture(), "text": prompt()}    what the model sees
    reply          "I am below it. [action] +"               what the model writes
    parse_agent    "+"                                       the text behind the last marker
    parse_env      ("+",)                                    the action, None if it is invalid
    act            reward, terminated, truncated             the rules of the environment

From top to bottom: the text protocol, the kinds of action, `Env` (subclass it), NumberLine (the simplest
environment: copy it). The other environments are in worlds/; worlds/registry.py makes each of them from its
name, and yours from --env=my_env.py:MyEnv. worlds/players.py has the scripted players.

The games follow Gym Cards as the code of RL4VLM plays them, not its README: Zhai et al., arXiv 2405.10292.
Departures that concern every game (those of the card games are listed in worlds/cards.py):
 1. `reset(seed)` seeds; in the original it mostly does not. The last observation of an episode is a real
    picture. The drawings are our own.
 2. An invalid reply costs `penalty`, takes a turn and changes nothing. RL4VLM plays a random action instead,
    free of charge. An episode of invalid replies must end too, therefore every game has a turn limit.
 3. Two success rates are reported: `success` (the goal was reached) and RL4VLM's own, `success_return` (the
    rewards of the episode sum to more than 0; a malformed reply counts -1 here, whatever `penalty` says).
"""
import json, re, string, zlib

import numpy as np
from PIL import Image

from extras.check_rows import SLIP
from worlds.contract import Unplayable, check_outcome
from worlds.drawing import BLACK, BLUE, PAPER, RED, draw_text

MARKER = "[action]"


# ---- the text protocol ----

def parse_agent(reply):
    """Return the text behind the last marker, up to the end of its line; None without a marker.

    Whatever comes before the marker, a plan for example, is ignored.
    """
    if MARKER not in reply:
        return None
    behind = reply.rpartition(MARKER)[2]
    return behind.split("\n", 1)[0].strip()

def format_action(action):
    """Write a parsed action as text, in the only accepted way: ("type", 14, "abc") -> type 14 "abc"."""
    word, *arguments = action
    return " ".join([word, *(json.dumps(argument, ensure_ascii=False) for argument in arguments)])

def is_held_out(fingerprint, one_in=10):
    """Tell whether a start belongs to the test part: one start in ten does.

    This depends on what was dealt, not on the seed, so that no hand is in both parts.
    """
    return zlib.crc32(fingerprint.encode()) % one_in == 0


# ---- kinds of action: each one documents, parses, samples and (if finite) enumerates its actions ----

class Words:
    """One word of a list: Words("hit", "stand")."""

    def __init__(self, *words):
        self.list = list(words)

    def words(self):
        """List the texts of all actions; None if there is no end of them."""
        return list(self.list)

    def doc(self):
        """Describe the actions for the prompt."""
        if len(self.list) < 3:
            return " or ".join(self.list)
        has_phrase = any(" " in word for word in self.list)
        separator = ", " if has_phrase else " "
        return separator.join(self.list)

    def parse(self, text):
        """Return the action as a tuple, None if the text is not an action of this kind."""
        return (text,) if text in self.list else None

    def sample(self, rng):
        """Draw the text of a valid action."""
        return self.list[rng.integers(len(self.list))]

class Text:
    """Free text: anything except the empty text."""

    def words(self):
        return None

    def doc(self):
        return "any text"

    def parse(self, text):
        return (text,) if text else None

    def sample(self, rng):
        letters = rng.choice(list(string.ascii_lowercase), size=rng.integers(1, 8))
        return "".join(letters)

class Command:
    """A word with arguments: Command("click", int, int), Command("type", int, str).

    A str argument is written as in JSON, in double quotes. `names` are what the prompt calls the arguments.
    """

    # [0-9], because \d also matches the digits of other scripts. At most nine digits, because a model may
    # write endless ones and long numbers are slow to convert.
    patterns = {int: r"(-?[0-9]{1,9})", str: r'("(?:[^"\\]|\\.)*")'}
    placeholders = {int: "NUMBER", str: "TEXT"}

    def __init__(self, word, *types, names=()):
        self.word = word
        self.types = types
        self.names = names or [self.placeholders[kind] for kind in types]

    def words(self):
        if self.types:
            return None
        return [self.word]

    def doc(self):
        parts = [self.word]
        for name, kind in zip(self.names, self.types):
            quote = '"' if kind is str else ""
            parts.append(f"{quote}{name}{quote}")
        return " ".join(parts)

    def parse(self, text):
        """Return the action as a tuple of the word and its arguments, None if the text is no such command."""
        parts = [re.escape(self.word), *(self.patterns[kind] for kind in self.types)]
        match = re.fullmatch(" +".join(parts), text)
        if not match:
            return None
        try:
            action = (self.word, *map(json.loads, match.groups()))
            format_action(action).encode()
        except ValueError:
            # An unknown escape, a number like 007, or half a character: "\ud800" is legal JSON, but cannot
            # be written to a file.
            return None
        return action

    def sample(self, rng):
        action = [self.word]
        for kind in self.types:
            if kind is int:
                action.append(int(rng.integers(100)))
            else:
                action.append(Text().sample(rng))
        return format_action(action)


# ---- the environment ----

class Env:
    """Base class of all environments, with reset() and step() as in gymnasium.

    The state is plain attributes. To set up a position, call reset(), set them, then call observation().

    A subclass must define:
        name           what --env and the tables call it
        goal           first line of the prompt: what to do
        kinds          tuple of kinds of action: Words, Text, Command
        example        a valid action; the prompt shows it
        start()        draws a start state with self.rng
        act(action)    plays a parsed action, such as ("go",): sets self.success at the goal and returns
                       (reward, terminated, truncated): a finite number and two booleans
        picture()      the state as a PIL image: RGB, self.size x self.size
        fingerprint()  what was dealt, as text: decides whether the start is held out for tests

    It may define:
        expert()       the text of the best action: the players expert and biased need it to record data
        optimal(word)  True if this action is as good as the expert's: where several actions are best
        is_there(action)  False if a parsed action names what there is not: it counts as malformed then
        text()         what there is to observe beside the picture: the prompt shows it below the goal
        tag()          a group of episodes that evaluation reports apart
        caption()      the picture in words: for the questions of pre-training
        close()        releases at the end of an episode what is shared, such as a browser
        split          False: there are too few different starts to hold any out
        one_in         of this number of starts, one is held out
        max_turns      number of replies after which an episode is truncated
        marker         False: the whole reply is the action, without the marker [action]
        max_parallel   largest number of environments alive at once, each stepped in a thread of its own;
                       None: any number, without threads
        online         False: questions with one right answer, cloned offline; there is nothing to play

    For example:

        class Light(Env):
            name = "Light"
            goal = "Go when the light is green."
            kinds = (Words("go", "stop"),)
            example = "go"
            split = False

            def start(self):
                self.is_green = bool(self.rng.integers(2))

            def act(self, action):
                self.success = self.is_green == (action == ("go",))
                return int(self.success), True, False

            def picture(self):
                colour = "green" if self.is_green else "red"
                return Image.new("RGB", (self.size, self.size), colour)

            def fingerprint(self):
                return str(self.is_green)
    """

    name = ""
    goal = ""
    kinds = ()
    example = ""
    split = True
    one_in = 10
    max_turns = 10
    marker = True
    max_parallel = None
    online = True

    # Reason why the episode was abandoned (browser crash, stuck bot). worlds.playing drops such an episode.
    lost = ""

    def __init__(self, size=80, penalty=-0.3, max_turns=None):
        self.size = size
        self.penalty = penalty
        if max_turns:
            self.max_turns = max_turns
        self.rng = np.random.default_rng()
        self.over = True

    # what a subclass must define

    def start(self):
        raise NotImplementedError

    def act(self, action):
        raise NotImplementedError

    def picture(self):
        raise NotImplementedError

    def fingerprint(self):
        raise NotImplementedError

    # what a subclass may define

    def expert(self):
        raise Unplayable(f"env={self.name!r} has no expert(); give data_mix without expert and biased, or "
                         "write one.")

    def optimal(self, word):
        return word == self.expert()

    def is_there(self, action):
        return True

    def text(self):
        return ""

    def tag(self):
        return ""

    def close(self):
        pass

    # what stays as it is

    def reset(self, seed=None, options=None):
        """Begin an episode and return (observation, {}).

        seed: the seed of a new self.rng; None keeps the old one. options={"split": "train" | "test"}: draw
        only starts of that part. ValueError for another part, Unplayable if no start of that part is found.
        """
        split = (options or {}).get("split")
        if split not in (None, "train", "test"):
            raise ValueError(f"split={split!r}: use 'train', 'test' or None.")
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.lost = ""
        self.draw_start(split)
        self.turns = 0
        self.total = 0.0
        self.score = 0.0
        self.success = False
        self.over = False
        return self.observation(), {}

    def draw_start(self, split):
        """Draw starts until one belongs to the part `split`; None: any start does."""
        for _ in range(1000):
            self.start()
            if not split or not self.split:
                return
            if is_held_out(self.fingerprint(), self.one_in) == (split == "test"):
                return
        raise Unplayable(f"env={self.name!r}: none of 1000 starts belongs to the {split} part; with too few "
                         "different starts to hold any out, set split = False in its class.")

    def step(self, reply):
        """Play a reply and return (observation, reward, terminated, truncated, info).

        Every reply takes a turn, valid or not. info: valid, action (as text), success (the goal was reached),
        success_return (the rewards so far sum to more than 0, with SLIP for replies that do not parse).
        RuntimeError if the episode is over, BrokenContract if act() returns anything else than three values.
        """
        if self.over:
            raise RuntimeError(f"{self.name}: the episode is over or never began, call reset() first.")
        action = self.parse(reply)
        if action and not self.is_there(action):
            action = None
        info = {"valid": action is not None, "action": ""}
        if action:
            info["action"] = format_action(action)
            reward, terminated, truncated = check_outcome("act()", self.act(action))
        else:
            reward = self.penalty
            terminated = truncated = False
        self.turns += 1
        self.total += reward
        self.score += reward if info["valid"] else SLIP
        truncated = not terminated and (truncated or self.turns >= self.max_turns)
        self.over = terminated or truncated
        observation = self.observation()
        info["success"] = self.success
        info["success_return"] = self.score > 0
        return observation, float(reward), terminated, truncated, info

    def observation(self):
        """Return what the model sees."""
        return {"image": self.picture(), "text": self.prompt()}

    def prompt(self):
        """Write the text that goes with the picture: goal, text(), the actions, how to reply."""
        actions = " or ".join(kind.doc() for kind in self.kinds)
        lines = [
            self.goal,
            self.text(),
            f"Actions: {actions}",
            f"End your reply with an action, for example: {MARKER} {self.example}",
        ]
        return "\n".join(line for line in lines if line)

    def parse(self, reply):
        """Return the action in a reply, None if there is no valid one."""
        text = parse_agent(reply) if self.marker else reply.strip()
        return self.parse_env(text)

    def parse_env(self, text):
        """Return the action that a text (or None) spells, None if no kind of action accepts it."""
        for kind in self.kinds:
            action = kind.parse(text or "")
            if action:
                return action
        return None

    def words(self):
        """List the texts of all actions of the finite kinds."""
        words = []
        for kind in self.kinds:
            words.extend(kind.words() or [])
        return words

    def sample(self, rng):
        """Draw the text of a valid action."""
        kind = self.kinds[rng.integers(len(self.kinds))]
        return kind.sample(rng)


# ---- NumberLine ----

class NumberLine(Env):
    """Walk to the target, one step a turn.

    The best play takes |target - current| turns, 2.28 on average, and returns 1. The limit of 10 turns is the
    original's.
    """

    name = "NumberLine"
    goal = "Move the current number to the target number."
    kinds = (Words("-", "+"),)
    example = "+"
    max_turns = 10
    # There are 30 starts. All of them are used for training and for evaluation.
    split = False

    def start(self):
        self.current, self.target = self.rng.integers(0, 6, size=2).tolist()
        if self.target == self.current:
            # 5, not 6, as in the original: (4, 4) becomes target 0 and (5, 5) becomes target 1.
            self.target = (self.target + 1) % 5

    def act(self, action):
        """Move by one between 0 and 5: 1 at the target, 0 for a step towards it, otherwise -1."""
        distance = abs(self.target - self.current)
        step = {"-": -1, "+": 1}[action[0]]
        self.current = min(5, max(0, self.current + step))
        self.success = self.current == self.target
        if self.success:
            return 1, True, False
        if abs(self.target - self.current) < distance:
            return 0, False, False
        return -1, False, False

    def picture(self):
        """Draw two lines of text on a grid of 5 x 5 cells; a digit fills a cell, which is one image patch."""
        image = Image.new("RGB", (self.size, self.size), PAPER)
        cell = self.size / 5
        draw_text(image, "Target:", 0.85 * cell, BLACK, 0, cell, 4 * cell, cell)
        draw_text(image, str(self.target), 1.2 * cell, RED, 4 * cell, cell, 0.9 * cell, cell)
        draw_text(image, "Current:", 0.85 * cell, BLACK, 0, 3 * cell, 4 * cell, cell)
        draw_text(image, str(self.current), 1.2 * cell, BLUE, 4 * cell, 3 * cell, 0.9 * cell, cell)
        return image

    def fingerprint(self):
        return f"{self.current} {self.target}"

    def caption(self):
        return f"target {self.target} current {self.current}"

    def expert(self):
        return "+" if self.target > self.current else "-"
