"""
Says what each patch of a picture shows, and which features a perfect vision tower would give for it.

The ideal feature of a patch is the sum of three vectors of length 1: one for the name of what it shows, the
mean of its tokens' embeddings, brought to length 1; one for its column; and one for its row. A language model
learns to find things in such features before it is shown any picture. A tower learns from the names, columns
and rows of all patches at once, which is much more than the answer to a question tells it.
"""
import math, string
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pretrain.grid_questions import Room, tile_name
from pretrain.page_questions import Page
from pretrain.tiny_nets import FOCAL_CHANNELS
from worlds.gym import BabyAI
from worlds.miniwob import PAGE_SIZE, click_places

# Most patches show what lies between things, so it counts less in the loss.
BACKGROUND_WEIGHT = 0.1
# Names count most, a feature's length least.
PLACE_WEIGHT = 0.5
LENGTH_WEIGHT = 0.1
TINY = 1e-6  # nothing is divided by less
IGNORE = -100  # no label, for F.cross_entropy
# What walls are written with, see pretrain/walls.py. Which letters a text has counts little, because the loss
# adds up all letters.
LETTERS = string.ascii_letters + string.digits
SPELLING_WEIGHT = 0.3

class Board(NamedTuple):
    """What the patches of a picture show, row by row: the name, the column and the row of each.

    None is a name that nobody can know, or a place that is not defined.
    """

    names: tuple
    columns: tuple
    rows: tuple


# ---- boards ----
def room_board(world, side):
    """Return the Board of a BabyAI level whose cells are patches; patches outside of the level are unseen."""
    room = Room(world)
    names = []
    for row in range(side):
        for column in range(side):
            is_inside = column < room.grid.width and row < room.grid.height
            if (column, row) == (room.x, room.y):
                names.append(f"agent {room.direction()}")
            elif is_inside:
                names.append(room.what(column, row))
            else:
                names.append("unseen")
    return Board(tuple(names), *all_places(side))

def lake_board(world, side):
    """Return the Board of a FrozenLake, whose tiles are 2 x 2 patches; places are those of the tiles."""
    lake = world.gym.unwrapped
    agent_row, agent_column = divmod(int(lake.s), lake.ncol)
    patches = side // lake.ncol
    columns, rows = all_places(side)
    columns = tuple(column // patches for column in columns)
    rows = tuple(row // patches for row in rows)
    names = []
    for column, row in zip(columns, rows):
        is_agent = (column, row) == (agent_column, agent_row)
        names.append("agent" if is_agent else tile_name(lake, column, row))
    return Board(tuple(names), columns, rows)

def page_board(page, side, step):
    """Return the Board of a Page: each patch shows the text that covers most of it.

    Its place is the one to click on, in units of `step` pixels, in every patch up to two patches beside it.
    The place of an empty patch is its middle. A patch with a bit of something else has no name and no place.
    """
    patch = PAGE_SIZE // side
    all_columns, all_rows = all_places(side)
    dark = np.asarray(page.picture().convert("L")) < 200
    has_ink = dark.reshape(side, patch, side, patch).any((1, 3))
    names = [None if ink else "nothing" for ink in has_ink.flatten()]
    columns = []
    rows = []
    for name, column, row in zip(names, all_columns, all_rows):
        is_empty = name is not None
        columns.append((patch * column + patch // 2) // step if is_empty else None)
        rows.append((patch * row + patch // 2) // step if is_empty else None)
    covered = [0] * side**2
    for element in page.elements:
        text = element["text"]
        if not text and element["role"] == "textbox":
            text = "textbox"
        left, top, width, height = element["box"]
        if not 0 < len(text) <= 16 or left < 0 or top < 0:
            continue
        x, y = click_places(element)[0]
        is_on_a_step = x % step == 0 and y % step == 0 and max(x, y) <= PAGE_SIZE
        touched_columns = range(int(left) // patch, min(side, int(left + width) // patch + 1))
        touched_rows = range(int(top) // patch, min(side, int(top + height) // patch + 1))
        for row, column in product(touched_rows, touched_columns):
            i = side * row + column
            patch_left = patch * column
            patch_top = patch * row
            shown_width = min(left + width, patch_left + patch) - max(left, patch_left)
            shown_height = min(top + height, patch_top + patch) - max(top, patch_top)
            is_near = abs(patch_left + patch // 2 - x) <= 2 * patch
            if shown_width < 6 or shown_height < 4 or not is_near:
                continue
            if shown_width * shown_height <= covered[i]:
                continue
            covered[i] = shown_width * shown_height
            names[i] = text
            columns[i] = None
            rows[i] = None
            if is_on_a_step:
                columns[i] = int(x // step)
                rows[i] = int(y // step)
    return Board(tuple(names), tuple(columns), tuple(rows))

def board_of(shown, recipe):
    """Return the Board of a picture; shown: the world, or the Page of a browser."""
    if isinstance(shown, Page):
        return page_board(shown, recipe.side, recipe.step)
    if isinstance(shown, BabyAI):
        return room_board(shown, recipe.side)
    return lake_board(shown, recipe.side)

def all_places(side):
    """Return (columns, rows) of side x side patches, row by row."""
    columns = tuple(range(side)) * side
    rows = tuple(row for row in range(side) for _ in range(side))
    return columns, rows

def random_board(rng, recipe, patches, things=5):
    """Draw a Board with `things` things of different names anywhere -> (Board, {name: (column, row)}).

    patches: how many of a picture's patches there are. There is at most one thing for each. The place of a
    thing is the middle of its patch.
    """
    # how many places lie between the middles of two patches
    unit = recipe.places // recipe.side
    columns, rows = all_places(recipe.side)
    chosen = np.sort(rng.permutation(len(columns))[:patches])
    columns = tuple(unit * columns[i] + unit // 2 for i in chosen)
    rows = tuple(unit * rows[i] + unit // 2 for i in chosen)
    names = [recipe.background[i] for i in rng.integers(len(recipe.background), size=patches)]
    things = min(things, patches)
    where = rng.permutation(patches)[:things]
    which = rng.permutation(len(recipe.names))[:things]
    places = {}
    for i, number in zip(where, which):
        names[i] = recipe.names[number]
        places[names[i]] = (columns[i], rows[i])
    return Board(tuple(names), columns, rows), places


# ---- features ----
class Labels(NamedTuple):
    """What the patches of a batch show, as numbers, each (B, patches) int64; IGNORE where it is None."""

    names: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor

def number_labels(boards):
    """Number what the boards' patches show -> (list of the names, Labels)."""
    names = {}
    for board in boards:
        for name in board.names:
            if name is not None:
                names.setdefault(name, len(names))
    numbers = []
    columns = []
    rows = []
    for board in boards:
        numbers.append(with_ignored(map(names.get, board.names)))
        columns.append(with_ignored(board.columns))
        rows.append(with_ignored(board.rows))
    labels = Labels(torch.tensor(numbers), torch.tensor(columns), torch.tensor(rows))
    return list(names), labels

def with_ignored(numbers):
    """Put IGNORE where a number is None."""
    return [IGNORE if number is None else number for number in numbers]

class Sight(nn.Module):
    """Hold the vectors of columns and rows, and say how near a tower's features are to the ideal ones.

    words: the net's word embeddings, an nn.Embedding, which is not a part of this module.
    """

    def __init__(self, words, tokenizer, recipe):
        super().__init__()
        # A list hides the embeddings from parameters().
        self.words = [words]
        self.tokenizer = tokenizer
        self.background = recipe.background
        # In a question a name has other tokens behind a space than behind a quote.
        self.space = "" if recipe.is_quoted else " "
        hidden = words.weight.shape[1]
        self.columns = nn.Parameter(torch.randn(recipe.places, hidden))
        self.rows = nn.Parameter(torch.randn(recipe.places, hidden))
        # The inverse temperature of the softmaxes over cosines.
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        if recipe.reads_letters:
            # Behind its first stage a FocalNet has 20 x 20 states, one for 2 x 2 of a wall's cells.
            classes = 1 + len(LETTERS)
            self.letter_head = nn.Linear(2 * FOCAL_CHANNELS, 4 * classes)
            self.spelling_head = nn.Linear(4 * FOCAL_CHANNELS, len(LETTERS))

    def name_vectors(self, names):
        """Return the normalised mean of each name's words -> (names, hidden).

        Each token counts the same, however long its embedding is. The colours' embeddings had grown, the
        shapes' had shrunk, and a purple key was taken for the purple box (docs/log.md).
        """
        vectors = []
        for name in names:
            tokens = self.tokenizer(self.space + name, add_special_tokens=False)["input_ids"]
            words = F.normalize(self.words[0](torch.tensor(tokens)), dim=-1)
            vectors.append(words.mean(0))
        return F.normalize(torch.stack(vectors), dim=-1)

    def tables(self, names):
        """Return the vectors of length 1 of the names, of the columns and of the rows."""
        return self.name_vectors(names), F.normalize(self.columns, dim=-1), F.normalize(self.rows, dim=-1)

    def ideal(self, boards):
        """Return the ideal features of boards with the same number of patches -> (B, patches, hidden)."""
        names, labels = number_labels(boards)
        return add_up(self.tables(names), labels)

    def loss(self, features, boards):
        """Return (loss of a tower's features, share of the patches with a thing whose name is right).

        features: (B, patches, hidden). The loss is the cross-entropy of three softmaxes over cosines, with
        the names on these boards, all columns and all rows; one minus the cosine with the ideal feature; and
        the squared logarithm of the length's ratio to the ideal one. With the squared difference of the
        lengths, and background that counts in full, all patches became alike (docs/log.md).
        """
        names, labels = number_labels(boards)
        is_known = labels.names != IGNORE
        if not is_known.any():
            # nothing to learn from
            return 0.0 * features.sum(), math.nan
        tables = [table.detach() for table in self.tables(names)]
        is_background = torch.tensor([name in self.background for name in names])
        is_thing = is_known & ~is_background[labels.names.clamp(min=0)]
        patch_weights = torch.where(is_thing, 1.0, BACKGROUND_WEIGHT)
        unit = F.normalize(features, dim=-1)
        loss = 0.0
        for table, label, weight in zip(tables, labels, (1.0, PLACE_WEIGHT, PLACE_WEIGHT)):
            logits = unit @ table.T * self.log_scale.exp()
            losses = F.cross_entropy(logits.transpose(1, 2), label, reduction="none")
            loss = loss + weight * weighted_mean(losses, patch_weights, label != IGNORE)
        ideal = add_up(tables, labels)
        distances = 1 - F.cosine_similarity(features, ideal, dim=-1)
        loss = loss + weighted_mean(distances, patch_weights, is_known)
        lengths = features[is_known].norm(dim=-1).clamp(min=TINY) / ideal[is_known].norm(dim=-1)
        loss = loss + LENGTH_WEIGHT * lengths.log().square().mean()
        is_right = (unit @ tables[0].T).argmax(-1) == labels.names
        return loss, is_right[is_thing].float().mean().item()

    def letters_loss(self, states, letters):
        """Return the cross-entropy of a wall's letters, where none counts a tenth.

        states: (B, 400, 64), a tower's behind its first stage. letters: (B, 40, 40), see Wall.
        """
        B, count, _ = states.shape
        side = math.isqrt(count)
        logits = self.letter_head(states).view(B, side, side, 2, 2, -1)
        # -> (B, classes, side, 2, side, 2), in which 2 x 2 cells belong to a state
        logits = logits.permute(0, 5, 1, 3, 2, 4)
        logits = logits.reshape(B, -1, *letters.shape[1:])
        weights = torch.ones(1 + len(LETTERS))
        weights[0] = BACKGROUND_WEIGHT
        return F.cross_entropy(logits, letters, weights)

    def spelling_loss(self, states, boards):
        """Return the loss of saying which letters the text of each patch has, wherever they are.

        states: (B, patches, 128), a tower's last. It is 0 where no patch shows a text.
        """
        names = [name for board in boards for name in board.names]
        has_letter = torch.zeros(len(names), len(LETTERS))
        is_text = torch.zeros(len(names), dtype=torch.bool)
        for i, name in enumerate(names):
            if name is None or name in self.background:
                continue
            is_text[i] = True
            for letter in set(name).intersection(LETTERS):
                has_letter[i, LETTERS.index(letter)] = 1
        logits = self.spelling_head(states).flatten(0, 1)
        losses = F.binary_cross_entropy_with_logits(logits, has_letter, reduction="none")
        if not is_text.any():
            return 0.0 * losses.sum()
        return SPELLING_WEIGHT * losses[is_text].sum(-1).mean()

def weighted_mean(values, weights, mask):
    """Return the weighted mean of the values in the mask, 0 if it is empty; all have one shape."""
    weights = torch.where(mask, weights, 0.0)
    return (values * weights).sum() / weights.sum().clamp(min=TINY)

def add_up(tables, labels):
    """Add the vectors that Labels name, nothing where there is none -> (B, patches, hidden)."""
    total = 0.0
    for table, label in zip(tables, labels):
        # `table[label]` would let threads add up its gradient in any order
        total = total + F.embedding(label.clamp(min=0), table) * (label != IGNORE)[..., None]
    return total
