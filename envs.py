"""
The text protocol and the environments: a picture and a text in, an action as text out.

    observation -> prompt() -> model -> "I am below it. [action] +" -> parse_agent() -> "+" -> parse_env() -> ("+",) -> act()

A new environment is one class of about 40 lines: copy NumberLine. The games here follow Gym Cards as RL4VLM's code (not its
README) plays them: Zhai et al., arXiv 2405.10292. Where we depart, and why:
 1. `reset(seed)` seeds (theirs mostly does not), the last observation of an episode is a real picture, the drawings are ours.
 2. An invalid reply costs `penalty`, is a turn, and moves nothing (invalid="random": RL4VLM's rule, a random action for free).
    Such an episode must end too, hence turn limits: EZPoints 10, Points24 30, Blackjack 12. NumberLine's 10 is the original's.
 3. Formulas are parsed, never given to Python's `eval`, and computed in exact rationals: 8/(3-8/3) is 24 (not so in floats),
    `**` and `//` are malformed. As in the original, digits join (1 2 is 12), signs may precede a number, a blank is white space.
 4. Blackjack shows ten points as 10, J, Q or K, a thirteenth each; the original has no 10. The odds are the same.
 5. Two success rules are reported: `success` (goal reached) and RL4VLM's own, `success_return` (summed reward > 0).
"""
import importlib, json, os, re, string, zlib
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARKER = "[action]"

# ---- the text protocol: a kind of action documents, parses, samples and (where finite) enumerates itself ----
class Words:                # one of a list of words: Words("hit", "stand")
    def __init__(self, *words): self.list = list(words)
    def words(self): return list(self.list)
    def doc(self): return (" or " if len(self.list) < 3 else ", " if any(" " in word for word in self.list) else " ").join(self.list)
    def parse(self, text): return (text,) if text in self.list else None
    def sample(self, rng): return self.list[rng.integers(len(self.list))]

class Text:                 # free text: anything but nothing
    def words(self): return None
    def doc(self): return "any text"
    def parse(self, text): return (text,) if text else None
    def sample(self, rng): return "".join(rng.choice(list(string.ascii_lowercase), size=rng.integers(1, 8)))

class Command:              # a word with arguments: Command("click", int, int), Command("type", int, str); a str as JSON writes it, in quotes
    # [0-9] because \d takes the digits of every script; at most nine, because a model's endless digits are slow to convert
    patterns = {int: r"(-?[0-9]{1,9})", str: r'("(?:[^"\\]|\\.)*")'}
    def __init__(self, word, *types, names=()): self.word, self.types, self.names = word, types, names or ["NUMBER" if t is int else "TEXT" for t in types]
    def words(self): return None if self.types else [self.word]
    def doc(self): return " ".join([self.word, *(name if t is int else f'"{name}"' for name, t in zip(self.names, self.types))])
    def sample(self, rng): return format_action((self.word, *(int(rng.integers(100)) if t is int else Text().sample(rng) for t in self.types)))
    def parse(self, text):
        match = re.fullmatch(" +".join([re.escape(self.word), *(self.patterns[t] for t in self.types)]), text)
        try:
            action = match and (self.word, *map(json.loads, match.groups()))
            return action if match and format_action(action).encode() else None
        except ValueError:      # an unknown escape, a number like 007, or half a character ("\ud800": legal JSON that cannot be written)
            return None

def format_action(action):      # the one way to write a parsed action: ("type", 14, "abc") -> type 14 "abc"
    return " ".join([action[0], *(json.dumps(arg, ensure_ascii=False) for arg in action[1:])])
def parse_agent(reply):     # the text behind the last marker, to the end of its line, or None: a plan may come before it
    return reply.rpartition(MARKER)[2].split("\n", 1)[0].strip() if MARKER in reply else None
def is_held_out(fingerprint, one_in=10):   # one start in ten is for tests only; by what was dealt, not by the seed: no hand is in both parts
    return zlib.crc32(fingerprint.encode()) % one_in == 0

class Env:
    """Gymnasium-style base class; the state is plain attributes: set them after reset(), then ask for observation(). A game adds
    start(): draws a start state with self.rng; act(action) -> reward, terminated, truncated, and sets self.success at the goal;
    picture() -> PIL image, RGB, size x size; fingerprint(): what was dealt, as text, decides the part of the split;
    expert(): a perfect player's action; and, if need be, text(): what there is to observe beside the picture, and
    optimal(word): is an action as good as the expert's, for games where several are."""
    name, goal, kinds, example, max_turns = "", "", (), "", 10
    marker, split = True, True      # False: the whole reply is the action; False: too few different starts to hold any out
    one_in, max_parallel = 10, None      # the share of starts held out; how many may be alive at once, stepped by threads (None: any number, no threads)
    lost = ""                       # why the episode cannot be gone on with (a dead browser, a bot at its wits' end): `play` drops it

    def __init__(self, size=80, penalty=-1.0, max_turns=None):
        self.size, self.penalty, self.over, self.rng = size, penalty, True, np.random.default_rng()
        if max_turns:
            self.max_turns = max_turns

    def reset(self, seed=None, options=None):       # options={"split": "train" | "test"} draws only starts of that part
        split = (options or {}).get("split")
        if split not in (None, "train", "test"):
            raise ValueError(f"split={split!r}: use 'train', 'test' or None.")
        self.rng = self.rng if seed is None else np.random.default_rng(seed)
        self.lost, tries = "", 1
        self.start()
        while split and self.split and is_held_out(self.fingerprint(), self.one_in) != (split == "test"):
            if (tries := tries + 1) > 1000:
                raise SystemExit(f"env={self.name!r}: no start of the {split} part in 1000: it has too few different ones to hold any out, say split = False in its class.")
            self.start()
        self.turns, self.total, self.success, self.over = 0, 0.0, False, False
        return self.observation(), {}

    def step(self, reply):                          # every reply is a turn, valid or not
        if self.over:
            raise RuntimeError(f"{self.name}: the episode is over or never began, call reset() first.")
        action = self.parse(reply)
        info = {"valid": action is not None, "action": format_action(action) if action else ""}
        reward, terminated, truncated = self.act(action) if action else (self.penalty, False, False)
        self.turns, self.total = self.turns + 1, self.total + reward
        truncated = not terminated and (truncated or self.turns >= self.max_turns)
        self.over = terminated or truncated
        return self.observation(), float(reward), terminated, truncated, {**info, "success": self.success, "success_return": self.total > 0}

    def prompt(self):
        actions = "Actions: " + " or ".join(kind.doc() for kind in self.kinds)
        return "\n".join(filter(None, [self.goal, self.text(), actions, f"End your reply with an action, for example: {MARKER} {self.example}"]))

    def parse(self, reply): return self.parse_env(parse_agent(reply) if self.marker else reply.strip())
    def parse_env(self, text): return next(filter(None, (kind.parse(text or "") for kind in self.kinds)), None)
    def words(self): return [word for kind in self.kinds for word in kind.words() or []]
    def sample(self, rng): return self.kinds[rng.integers(len(self.kinds))].sample(rng)     # a valid action's text
    def observation(self): return {"image": self.picture(), "text": self.prompt()}
    def text(self): return ""
    def tag(self): return ""                        # a group of episodes that evaluation reports apart
    def close(self): pass                           # the episode is over: give back what others may use
    def optimal(self, word): return word == self.expert()

WHITE = (255, 255, 255)
BLACK = (20, 20, 25)
RED = (205, 25, 40)
BLUE = (25, 70, 180)


@lru_cache(maxsize=4096)
def text_mask(text, size, width):
    """An "L" mask, `size` pixels to the em, squeezed if wider than `width`; bold, because thin strokes vanish at 80 px."""
    font, bold = ImageFont.load_default(size=4 * size), max(1, round(size * 0.12))
    mask = Image.new("L", (round(font.getlength(text)) + 2 * bold, round(5.2 * size)))
    baseline = (mask.height - font.getbbox("0", anchor="ls")[1]) / 2        # centres digits and capitals, whatever hangs below
    ImageDraw.Draw(mask).text((bold, baseline), text, fill=255, font=font, stroke_width=bold, anchor="ls")
    return mask.resize((min(round(width), -(-mask.width // 4)), -(-mask.height // 4)), Image.LANCZOS)

def draw_text(image, text, size, colour, x, y, width, height):      # in the middle of a box
    mask = text_mask(text, round(size), width)
    image.paste(colour, (round(x + (width - mask.width) / 2), round(y + (height - mask.height) / 2)), mask)

# ---- NumberLine ----
class NumberLine(Env):
    """Walk to the target. The optimum takes |target - current| steps, 2.28 on average, and returns 1."""
    name, goal, example = "NumberLine", "Move the current number to the target number.", "+"
    kinds, max_turns, split = (Words("-", "+"),), 10, False         # 30 starts: all are trained on, all are evaluated
    def start(self):
        self.current, self.target = self.rng.integers(0, 6, size=2).tolist()
        if self.target == self.current:
            self.target = (self.target + 1) % 5                     # 5, not 6, as in the original: (4, 4) -> 0 and (5, 5) -> 1

    def act(self, action):
        before = abs(self.target - self.current)
        self.current = min(5, max(0, self.current + (1 if action == ("+",) else -1)))
        self.success = self.current == self.target
        return (1 if self.success else 0 if abs(self.target - self.current) < before else -1), self.success, False

    def picture(self):
        image, cell = Image.new("RGB", (self.size, self.size), (250, 250, 247)), self.size / 5
        for y, label, number, colour in ((cell, "Target:", self.target, RED), (3 * cell, "Current:", self.current, BLUE)):
            draw_text(image, label, 0.85 * cell, BLACK, 0, y, 4 * cell, cell)
            draw_text(image, str(number), 1.2 * cell, colour, 4 * cell, y, 0.9 * cell, cell)      # one digit = one patch of a 5 x 5 grid
        return image
    def fingerprint(self): return f"{self.current} {self.target}"
    def caption(self): return f"target {self.target} current {self.current}"
    def expert(self): return "+" if self.target > self.current else "-"

def require(env, package):
    """An optional package, imported; where it is missing, one sentence instead of a traceback."""
    os.environ.update(PYGAME_HIDE_SUPPORT_PROMPT="1", SDL_VIDEODRIVER="dummy", SDL_AUDIODRIVER="dummy")   # pictures only: no window, no sound, no word
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SystemExit(f"env={env!r} needs the package {error.name or package}: pip install -r requirements-envs.txt")

# ---- scripted players and the front door ----
def scripted_reply(name, env, rng):
    """One reply of a scripted player: 'expert', 'random', 'malformed' (never parses) or 'biased': 70 % one wrong action, the same
    in every visit of a state, so that whoever clones the most frequent action always fails."""
    sign, word = f"{MARKER} " if env.marker else "", env.sample(rng)
    if name == "random":
        return sign + word
    if name == "expert" or name == "biased" and rng.random() < 0.3:
        return sign + env.expert()
    if name == "biased":
        words, right = env.words(), env.expert()
        after = words.index(right) + 1 if right in words else 0
        return sign + next((w for w in words[after:] + words[:after] if not env.optimal(w)), right)
    if name == "malformed":
        broken = [word, f"[act] {word}", f"move {word}", MARKER, f"{MARKER} go", f"action: {word}", f"{MARKER} {word} {word}", f"{MARKER}\n{word}"]
        return next((broken[i] for i in rng.permutation(len(broken)) if env.parse(broken[i]) is None), "")
    raise ValueError(f"player={name!r} is unknown; known are expert, random, biased, malformed.")

def mixed_reply(mix, env, rng):
    """(reply, name) of a player drawn anew every turn: mixture({"expert": 0.25, "biased": 0.75}, env, rng)."""
    shares = np.array(list(mix.values()), float)
    name = list(mix)[rng.choice(len(mix), p=shares / shares.sum())]
    return scripted_reply(name, env, rng), name

