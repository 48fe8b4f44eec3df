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
# How many walls there are. One takes a twentieth of a second.
WALLS = 2000

# Writes pieces of text over the page. Returns of each its text, its role, its box and those of its letters.
WRITE_SCRIPT = """
    const [pieces, top_edge] = arguments;
    const area = document.getElementById('area');
    area.innerHTML = '';
    for (const piece of pieces) {
        const node = document.createElement(piece.tag);
        node.textContent = piece.text;
        if (piece.tag == 'a') node.href = '#';
        node.style.cssText = 'position: fixed; white-space: nowrap; margin: 0';
        node.style.left = piece.x + 'px';
        node.style.top = piece.y + top_edge + 'px';
        area.appendChild(node);
    }
    return [...area.children].map(node => {
        const boxes = [...node.textContent].map((letter, i) => {
            const range = document.createRange();
            range.setStart(node.firstChild, i);
            range.setEnd(node.firstChild, i + 1);
            return range.getBoundingClientRect();
        });
        return [node.getBoundingClientRect(), ...boxes].map(
            found => [found.left, found.top - top_edge, found.width, found.height]);
    });
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
    """Draw words in lines -> [dict(tag, text, x, y)]: plain, as links and on buttons.

    Six of ten are words that pages show, the others are letters and digits at random.
    """
    pieces = []
    y = int(rng.integers(-4, 8))
    while y < PAGE_SIZE - 10:
        x = int(rng.integers(14))
        while x < PAGE_SIZE - 20:
            text = PAGE_WORDS[rng.integers(len(PAGE_WORDS))]
            if rng.random() > 0.6:
                count = rng.integers(1, 7)
                text = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=count))
            tag = ("button", "a", "span")[rng.integers(3)]
            pieces.append(dict(tag=tag, text=text, x=x, y=y))
            # a letter has some six pixels, the sides of a button have fourteen
            x += 6 * len(text) + 8 + int(rng.integers(10))
            if tag == "button":
                x += 14
        y += int(rng.integers(17, 26))
    return pieces

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

def draw_wall(world, rng, recipe):
    """Write a wall over a page of a MiniWoB environment, which is gone afterwards -> Wall."""
    world.rng = rng
    world.start()
    pieces = lay_words(rng)
    found = world.browser.execute_script(WRITE_SCRIPT, pieces, AREA[1])
    elements = []
    for piece, (box, *_) in zip(pieces, found):
        left, top, width, height = box
        is_whole = 0 <= top <= PAGE_SIZE - height and left + width <= PAGE_SIZE
        # what is cut off has no name
        text = piece["text"] if is_whole else ""
        elements.append(dict(ref=0, role=piece["tag"], text=text, box=box))
    world.screenshot_is_current = False
    picture = world.picture()
    letters = letter_cells((piece["text"], boxes) for piece, (_, *boxes) in zip(pieces, found))
    board = page_board(Page("", elements, None, "", "", picture, ""), recipe.side, recipe.step)
    # start() would take it for the task's page
    world.browser.get("about:blank")
    return Wall(picture, board, letters)
