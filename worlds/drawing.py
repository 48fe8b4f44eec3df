"""
Draw text and playing cards in the small pictures of the games.

No system font and no picture of others is needed.
"""
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

WHITE = (255, 255, 255)
BLACK = (20, 20, 25)
RED = (205, 25, 40)
BLUE = (25, 70, 180)
PAPER = (250, 250, 247)

@lru_cache(maxsize=4096)
def text_mask(text, size, width):
    """Draw a text as a mask of mode "L", `size` pixels to the em, squeezed if it is wider than `width`.

    It is drawn four times as large and scaled down, in bold: thin strokes vanish in a picture of 80 pixels.
    """
    font = ImageFont.load_default(size=4 * size)
    bold = max(1, round(size * 0.12))
    width_4 = round(font.getlength(text)) + 2 * bold
    height_4 = round(5.2 * size)
    mask = Image.new("L", (width_4, height_4))
    # Centre the height of a digit, so that the baseline is the same with and without descenders.
    baseline = (mask.height - font.getbbox("0", anchor="ls")[1]) / 2
    draw = ImageDraw.Draw(mask)
    draw.text(
        (bold, baseline),
        text,
        fill=255,
        font=font,
        stroke_width=bold,
        anchor="ls",
    )
    # -(-n // 4) is a quarter, rounded up.
    natural_width = -(-mask.width // 4)
    height = -(-mask.height // 4)
    shrunk = (min(round(width), natural_width), height)
    return mask.resize(shrunk, Image.LANCZOS)

def draw_text(image, text, size, colour, x, y, width, height):
    """Draw a text in the middle of a box; all lengths are in pixels, (x, y) is the upper left corner."""
    mask = text_mask(text, round(size), width)
    left = round(x + (width - mask.width) / 2)
    top = round(y + (height - mask.height) / 2)
    image.paste(colour, (left, top), mask)


# ---- cards: (rank, suit), rank 1 to 13, suit 0 to 3 ----

RANKS = ["back", *"A 2 3 4 5 6 7 8 9 10 J Q K".split()]
EDGE = (150, 160, 155)
BACK = (50, 75, 160)
BACK_PATTERN = (150, 170, 230)

# A suit is drawn as discs, given by their centres, and polygons; coordinates run from -1 to 1.
DISC_RADIUS = 0.49
STEM = [(0, 0), (0.35, 1), (-0.35, 1)]
SPADE_TOP = [(-0.89, 0.08), (0, -1), (0.89, 0.08), (0, 0.5)]
HEART_BOTTOM = [(-0.89, -0.13), (0, 1), (0.89, -0.13), (0, -0.5)]
DIAMOND = [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]
SPADE_DISCS = [(-0.45, 0.3), (0.45, 0.3)]
HEART_DISCS = [(-0.45, -0.35), (0.45, -0.35)]
CLUB_DISCS = [(0, -0.5), (-0.5, 0.2), (0.5, 0.2), (0, 0)]
SPADES = 0
HEARTS = 1
DIAMONDS = 2
CLUBS = 3
SUITS = {
    SPADES: (SPADE_DISCS, [SPADE_TOP, STEM]),
    HEARTS: (HEART_DISCS, [HEART_BOTTOM]),
    DIAMONDS: ([], [DIAMOND]),
    CLUBS: (CLUB_DISCS, [STEM]),
}

def draw_suit(draw, suit, x, y, radius, colour):
    """Draw the symbol of a suit with its middle at (x, y)."""
    discs, polygons = SUITS[suit]
    for dx, dy in discs:
        left = x + (dx - DISC_RADIUS) * radius
        top = y + (dy - DISC_RADIUS) * radius
        right = x + (dx + DISC_RADIUS) * radius
        bottom = y + (dy + DISC_RADIUS) * radius
        draw.ellipse([left, top, right, bottom], fill=colour)
    for polygon in polygons:
        corners = [(x + dx * radius, y + dy * radius) for dx, dy in polygon]
        draw.polygon(corners, fill=colour)

@lru_cache(maxsize=1024)
def card_sprite(rank, suit, width, height):
    """Draw a card as an RGBA picture of width x height pixels; rank 0 is the back of a card.

    It is drawn four times as large and scaled down.
    """
    colour = RED if suit in (HEARTS, DIAMONDS) else BLACK
    w = 4 * width
    h = 4 * height
    sprite = Image.new("RGBA", (w, h))
    draw = ImageDraw.Draw(sprite)
    edge = max(1, w // 40)
    draw.rounded_rectangle(
        [0, 0, w - 1, h - 1],
        radius=w // 7,
        fill=WHITE,
        outline=EDGE,
        width=edge,
    )
    if rank:
        radius = min(w * 0.3, h * 0.15)
        draw_suit(draw, suit, w / 2, h * 0.79, radius, colour)
    else:
        margin = w // 9
        inner = [margin, margin, w - 1 - margin, h - 1 - margin]
        draw.rounded_rectangle(inner, radius=w // 10, fill=BACK)
        for i in range(15):
            x = w * (i % 3 + 1) / 4
            y = h * (i // 3 + 1) / 6
            draw_suit(draw, DIAMONDS, x, y, w / 11, BACK_PATTERN)
    sprite = sprite.resize((width, height), Image.LANCZOS)
    if rank:
        box = (width * 0.08, height * 0.07, width * 0.84, height * 0.54)
        draw_text(sprite, RANKS[rank], height * 0.66, colour, *box)
    return sprite

def draw_cards(image, cards, x, y, width, height, step, scale):
    """Draw cards in a row, `step` apart, the first with its upper left corner at (x, y).

    Lengths are in units of `scale` pixels. The games use 1/80 of the picture's side.
    """
    for i, (rank, suit) in enumerate(cards):
        size = (round(width * scale), round(height * scale))
        sprite = card_sprite(rank, suit, *size)
        left = round((x + i * step) * scale)
        top = round(y * scale)
        image.paste(sprite, (left, top), sprite)
