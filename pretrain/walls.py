"""
Draws walls: pages full of words, from which a vision tower learns letters first, then words.

A page of MiniWoB++ shows two or three texts, and a tower learned to tell a few of them apart without ever
coming to letters (docs/log.md). A wall has some 25 words, plain, as links and on buttons, in the style of the
tasks, and the browser says where each letter is.
"""
from typing import NamedTuple

import numpy as np
from PIL import Image

from pretrain.page_questions import PAGE_WORDS, Page
from pretrain.sight import LETTERS, Board, page_board
from worlds.miniwob import AREA, PAGE_SIZE

# A letter is looked for in cells of so many pixels: the smallest are six high and three wide.
CELL = 4
# How many walls there are, each drawn once.
WALLS = 2000
# The end of the address of a page that has been written over. The environment then loads its own page again.
MARK = "#wall"

# Writes lines of words over the page, each word behind the one before, until a line is full. Returns of each
# its tag, its text, its box and the boxes of its letters, a box as [left, top, width, height].
WRITE_SCRIPT = """
    const [lines, area_top, size, mark] = arguments;
    const area = document.getElementById('area');
    area.innerHTML = '';
    location.hash = mark;
    function box(thing) {
        const found = thing.getBoundingClientRect();
        return [found.left, found.top - area_top, found.width, found.height];
    }
    const written = [];
    let top = area_top;
    for (const line of lines) {
        top += line.gap;
        let left = 0, bottom = top;
        for (const word of line.words) {
            left += word.gap;
            if (left > size - 20 || top > area_top + size - 10) break;
            const node = document.createElement(word.tag);
            node.textContent = word.text;
            if (word.tag == 'a') node.href = '#';
            node.style.cssText = 'position: fixed; white-space: nowrap; margin: 0';
            node.style.left = left + 'px';
            node.style.top = top + 'px';
            area.appendChild(node);
            const boxes = [...word.text].map((letter, i) => {
                const range = document.createRange();
                range.setStart(node.firstChild, i);
                range.setEnd(node.firstChild, i + 1);
                return box(range);
            });
            written.push([word.tag, word.text, box(node), boxes]);
            const edges = node.getBoundingClientRect();
            left = edges.right;
            bottom = Math.max(bottom, edges.bottom);
        }
        top = bottom;
    }
    return written;
"""

class Wall(NamedTuple):
    """A page full of words.

    board: what its patches show. letters: (cells, cells) int64, for each cell of CELL x CELL pixels the
    letter in its middle, 1 for the first of LETTERS, 0 for none.
    """

    picture: Image.Image
    board: Board
    letters: np.ndarray

def lay_words(rng):
    """Draw lines of words, more than a page holds -> [dict(gap, words)], a word dict(gap, tag, text).

    gap: how many pixels lie before it. Six of ten are words that pages show, the others are letters and
    digits at random.
    """
    lines = []
    for _ in range(12):
        words = []
        for _ in range(12):
            text = PAGE_WORDS[rng.integers(len(PAGE_WORDS))]
            if rng.random() > 0.6:
                count = rng.integers(1, 7)
                text = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=count))
            tag = ("button", "a", "span")[rng.integers(3)]
            words.append(dict(gap=int(rng.integers(2, 14)), tag=tag, text=text))
        lines.append(dict(gap=int(rng.integers(8)), words=words))
    return lines

def letter_cells(texts_and_boxes):
    """Mark the letters of some texts; texts_and_boxes: [(text, boxes of its letters)] -> see Wall.letters."""
    side = PAGE_SIZE // CELL
    middles = CELL * np.arange(side) + CELL / 2
    cells = np.zeros((side, side), np.int64)
    for text, boxes in texts_and_boxes:
        for letter, (left, top, width, height) in zip(text, boxes):
            # Above and below a letter a line has room.
            is_row = (middles >= top + 0.2 * height) & (middles < top + 0.85 * height)
            is_column = (middles >= left) & (middles < left + width)
            cells[np.ix_(is_row, is_column)] = 1 + LETTERS.index(letter)
    return cells

def write_wall(world, lines):
    """Write words over a page of a MiniWoB environment -> (what the script returns, the picture).

    SystemExit if the browser fails three times in a row.
    """
    for _ in range(3):
        try:
            if not world.browser or not world.browser.current_url.endswith(MARK):
                world.rng = np.random.default_rng(0)
                world.start()
            written = world.browser.execute_script(WRITE_SCRIPT, lines, AREA[1], PAGE_SIZE, MARK)
            world.screenshot_is_current = False
            picture = world.picture()
            if world.screenshot_is_current:
                return written, picture
        except world.browser_errors as error:
            world.drop_browser(error)
    raise SystemExit(f"env={world.name!r}: Chromium failed three times in a row: {world.lost}.")

def draw_wall(world, rng, recipe):
    """Draw a wall in the browser of a MiniWoB environment, in place of its page -> Wall."""
    written, picture = write_wall(world, lay_words(rng))
    elements = []
    for tag, text, box, _ in written:
        left, top, width, height = box
        is_whole = top + height <= PAGE_SIZE and left + width <= PAGE_SIZE
        # what is cut off has no name
        shown = text if is_whole else ""
        elements.append(dict(ref=0, role=tag, text=shown, box=box))
    letters = letter_cells((text, boxes) for _, text, _, boxes in written)
    board = page_board(Page("", elements, None, "", "", picture, ""), recipe.side, recipe.step)
    return Wall(picture, board, letters)
