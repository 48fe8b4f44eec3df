"""
Recipes of bases: which questions a tiny VLM is asked from random weights on, in which order and for how long.

pretrain/train_base.py runs them. The order is what counts: a net that is asked everything at once reads
nothing (docs/log.md). Copying comes first. For the lines of a page it is followed by looking up: what stood
behind a word, then the number behind a text, then behind the text that a goal names. Then a name is found
among few patches, then among all, on boards that need no vision tower: the language model is shown the
features that a perfect tower would give it. At first the answer repeats the name, then only the question has
it. The worlds follow, still without pictures. Then the tower alone learns to show such features, and last
both learn together. A tower that has to name words learns letters before that, from pages that are full of
them.
"""
from typing import NamedTuple

from pretrain.page_questions import PAGE_WORDS
from worlds.miniwob import PAGE_SIZE

class Stage(NamedTuple):
    """One stage of a recipe.

    kinds: methods of pretrain/train_base.py's Questions, which take turns in a batch. asked: the environments
    of questions that take turns. batch: questions in an update. is_narrowed: the boards have two patches at
    first, and twice as many whenever their things are found. They must have all in the end. Lists have two
    lines then, or eight words to look up, and grow likewise. names: of so many things at first, which grow
    likewise; 0: of all.
    """

    name: str
    kinds: tuple
    updates: int
    asked: tuple = ()
    batch: int = 32
    lr: float = 2e-3
    is_narrowed: bool = False
    names: int = 0

class Recipe(NamedTuple):
    """What a base is made of.

    size: side of its pictures, pixels. words: size of its vocabulary. side: patches on a side of a picture.
    names, background: of things on made-up boards, and of what lies between them.
    step, places: a place is a number below `places`, and questions name it as that times `step`.
    is_quoted: whether questions about pictures write names in quotes, so that they begin without a space.
    tokens: words that are to be one token each.
    reads_letters: the vision tower is a FocalNet, whose convolutions read a letter alike wherever it is.
    """

    stages: tuple
    size: int
    words: int
    side: int
    names: tuple
    background: tuple
    step: int = 1
    places: int = 8
    is_quoted: bool = False
    tokens: tuple = ()
    reads_letters: bool = False


# A token that is not repeated now and then is lost: no hidden state can make it likely any more.
COPYING = ("copying", "any_tokens")
# While a net learns to find names, it would forget how to copy them.
BOARDS = ("board", "board", "board", "copying", "board", "board", "board", "any_tokens")
PAGE_BOARDS = (*("board",) * 7, "text", *("board",) * 7, "any_tokens")
WHERE = (*("where",) * 7, "any_tokens")
IDEAL = (*("ideal",) * 7, "any_tokens")
STATES = (*("state",) * 7, "any_tokens")


# ---- BabyAI's rooms and FrozenLake ----
LOCAL = "BabyAI-GoToLocal-v0:view"
MAP = "BabyAI-GoToLocal-v0"
GREY = "BabyAI-GoToRedBallGrey-v0:view"
PICKUP = "BabyAI-PickupLoc-v0:view"
DOOR = "BabyAI-OpenDoor-v0:view"
LAKE = "FrozenLake"

COLOURS = ("red", "green", "blue", "purple", "yellow", "grey")
SHAPES = ("ball", "box", "key", "door")
THINGS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

FINDING = (
    *(f"Finding:{LOCAL}", f"Finding:{LOCAL}", f"Finding:{MAP}"),
    *(f"Finding:{PICKUP}", f"Finding:{DOOR}", f"Finding:{LAKE}"),
)
FACING = (
    *(f"Facing:{LOCAL}", f"Facing:{LOCAL}", f"Facing:{LOCAL}", f"Facing:{LOCAL}"),
    *(f"Facing:{PICKUP}", f"Facing:{DOOR}", f"Facing:{LAKE}", f"Facing:{LAKE}"),
    *(f"Finding:{LOCAL}", f"Finding:{LAKE}"),
)
LEADING = (
    *(f"Leading:{LOCAL}", f"Leading:{LOCAL}", f"Leading:{LOCAL}", f"Leading:{LOCAL}"),
    *(f"Leading:{GREY}", f"Leading:{PICKUP}", f"Leading:{PICKUP}", f"Leading:{DOOR}"),
    *(f"Leading:{LAKE}", f"Leading:{LAKE}", f"Leading:{LAKE}"),
    *(f"Facing:{LOCAL}", f"Facing:{DOOR}", f"Facing:{LAKE}"),
    *(f"Finding:{LOCAL}", f"Finding:{MAP}", f"Finding:{LAKE}"),
)
# The states that the tower alone sees: no question is asked about them.
SEEN = (*LEADING, f"Captions:{LOCAL}", f"Captions:{MAP}", f"Captions:{LAKE}")

GRIDS = Recipe(
    stages=(
        Stage("copying", COPYING, 800, (f"Reading:{LOCAL}", f"Reading:{LAKE}"), batch=64),
        Stage("boards", BOARDS, 2000, (f"Reading:{LOCAL}",), is_narrowed=True),
        Stage("asking", WHERE, 1000, (f"Reading:{LOCAL}",), is_narrowed=True),
        Stage("finding", IDEAL, 600, FINDING),
        Stage("facing", IDEAL, 1000, FACING),
        Stage("leading", IDEAL, 3000, LEADING),
        Stage("sight", ("sight",), 300, SEEN, batch=64),
        # Without captions: this late, long answers would be all that is learned.
        Stage("both", STATES, 1000, LEADING, lr=1e-3),
    ),
    size=128,
    words=768,
    side=8,
    names=(*THINGS, "hole", "flag", "agent"),
    background=("nothing", "wall", "unseen", "ice"),
)


# ---- MiniWoB++'s pages ----
RECALLING = (*("recalling",) * 7, "copying", *("recalling",) * 7, "any_tokens")
TASKS = (
    "click-test",
    "click-test-2",
    "click-button",
    "click-dialog",
    "click-dialog-2",
    "click-link",
    "click-tab",
    "focus-text-2",
    "enter-text",
    "click-collapsible",
)
READING = tuple(f"Reading:miniwob/{task}-v1" for task in TASKS)
# The crowded pages of click-button are the hardest, so they come four times as often.
CROWDED = (*READING, *("Reading:miniwob/click-button-v1",) * 3)

PAGES = Recipe(
    stages=(
        Stage("copying", COPYING, 800, READING[:1], batch=64),
        Stage("recalling", RECALLING, 700, READING[:1], is_narrowed=True, names=16),
        Stage("numbers", (*("numbers",) * 7, "any_tokens"), 500, READING[:1]),
        Stage("targets", (*("target",) * 7, "numbers"), 800, READING[:1], batch=128, is_narrowed=True),
        Stage("lists", (*("text",) * 7, "any_tokens"), 500, CROWDED),
        Stage("boards", PAGE_BOARDS, 1000, READING[:1], is_narrowed=True, names=16),
        Stage("placing", (*("ideal", "ideal", "text") * 3, "any_tokens"), 1000, CROWDED),
        # The tower alone learns here, from nothing but pictures: many small batches.
        Stage("letters", ("letters",), 400, READING[:1], batch=8, lr=1.2e-2),
        Stage("words", ("wall",), 3000, READING[:1], batch=8, lr=4e-3),
        Stage("sight", ("sight",), 500, CROWDED, batch=32),
        Stage("both", (*("state", "state", "state", "text") * 2, "any_tokens"), 800, CROWDED, lr=1e-3),
    ),
    size=PAGE_SIZE,
    words=1536,
    side=10,
    names=tuple(PAGE_WORDS),
    background=("nothing",),
    step=4,
    places=PAGE_SIZE // 4 + 1,
    is_quoted=True,
    tokens=(*PAGE_WORDS, *map(str, range(PAGE_SIZE + 1))),
    reads_letters=True,
)

RECIPES = {"tiny-vlm-worlds": GRIDS, "tiny-vlm-pages": PAGES}
