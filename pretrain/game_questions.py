"""
Questions about the card games and NumberLine for pre-training, and the words that they are made of.

Each function draws a state of a game and returns [(kind, question, answer), ...], the caption first.
"""
import string

from envs import NumberLine
from worlds.cards import RANKS, Blackjack, EZPoints, Points24, deal_cards, hand_points, hand_value

PICTURE_QUESTION = "What is in the picture?"

# The games that the first base is asked about. A new game does not belong here: it would change the texts
# that the base and its tokenizer are made of.
GAMES = {"NumberLine": NumberLine, "EZPoints": EZPoints, "Points24": Points24, "Blackjack": Blackjack}

# ---- what texts to repeat are made of ----
QUESTION_WORDS = f"""
    {PICTURE_QUESTION} What is the target number? current Which larger, difference? are cards? first second
    third fourth card? values sum product of dealer show? your cards? Is there a soft ace? How many do you
    have? last item? value Repeat: yes no empty blank A J Q K End reply with an action, for example:
    Formula: Actions:
""".split()
NUMBERS = [str(number) for number in range(100)]
CHARACTERS = list(string.ascii_letters + string.digits + string.punctuation)
SYLLABLES = "th he in er an re on at en nd ti es or te of ed is it al ar".split()

def words_of_games():
    """Return the words of the games' goals, of their actions and of the questions about them, sorted."""
    words = set(QUESTION_WORDS)
    for game in GAMES.values():
        words.update(game.goal.split())
        words.update(game.kinds[0].doc().split())
    return sorted(words)


ATOMS = [words_of_games(), NUMBERS, CHARACTERS, SYLLABLES]

# Words about something else, for questions in the shape of play.
ACTION_WORDS = "turn left right go forward pick up drop toggle".split()
PLAY_WORDS = [word for word in sorted({*ATOMS[0], *ACTION_WORDS}) if word.isalpha()]


# ---- the questions ----
def number_line_questions(game, rng):
    """Draw a state of NumberLine and list the questions about it."""
    game.current, game.target = rng.integers(0, 6, 2).tolist()
    larger = "equal"
    if game.target > game.current:
        larger = "target"
    elif game.current > game.target:
        larger = "current"
    return [
        ("picture", PICTURE_QUESTION, game.caption()),
        ("target", "What is the target number?", game.target),
        ("current", "What is the current number?", game.current),
        ("larger", "Which is larger, target or current?", larger),
        ("difference", "What is the difference?", abs(game.target - game.current)),
    ]

def blackjack_questions(game, rng):
    """Draw a hand of Blackjack and list the questions about it."""
    game.player = deal_cards(rng, rng.integers(2, 6))
    game.dealer = deal_cards(rng, 2)
    game.stood = bool(rng.integers(2))
    points, has_ace = hand_points(game.player)
    total = hand_value(points, has_ace)
    own_cards = game.caption().split(" you ")[1]
    # Play needs the sum most, so it is asked three times as often.
    return [
        ("picture", PICTURE_QUESTION, game.caption()),
        ("dealer", "What does the dealer show?", RANKS[game.dealer[0][0]]),
        *[("your sum", "What is the sum of your cards?", total)] * 3,
        ("your cards", "What are your cards?", own_cards),
        ("soft ace", "Is there a soft ace?", "no" if total == points else "yes"),
        ("count", "How many cards do you have?", len(game.player)),
    ]

def points_questions(game, rng):
    """Draw cards and a formula of EZPoints or Points24 and list the questions about them."""
    is_ezpoints = isinstance(game, EZPoints)
    game.cards = deal_cards(rng, 2 if is_ezpoints else 4)
    # Half of the formulas are short, as in real play.
    length = rng.integers(game.limit + 2) if rng.integers(2) else rng.integers(5)
    items = [*game.words()[:-1], "blank"]
    game.formula = [items[i] for i in rng.integers(0, len(items), length)]
    ranks = [RANKS[rank] for rank, _ in game.cards]
    points = game.points()
    number = rng.integers(len(game.cards))
    nth = ("first", "second", "third", "fourth")[number]
    asked = [
        ("picture", PICTURE_QUESTION, game.caption()),
        ("cards", "What are the cards?", " ".join(ranks)),
        ("values", "What are the values of the cards?", " ".join(map(str, points))),
        ("card", f"What is the {nth} card?", ranks[number]),
        ("value", f"What is the value of the {nth} card?", points[number]),
    ]
    if 0 < len(game.formula) < 7:
        asked += [
            ("formula", f"{game.text()}\nWhat is the formula?", " ".join(game.formula)),
            ("last item", f"{game.text()}\nWhat is the last item?", game.formula[-1]),
        ]
    if is_ezpoints:
        asked += [
            ("sum", "What is the sum of the cards?", sum(points)),
            ("product", "What is the product of the cards?", points[0] * points[1]),
        ]
    return asked


GAME_QUESTIONS = {
    "NumberLine": number_line_questions,
    "EZPoints": points_questions,
    "Points24": points_questions,
    "Blackjack": blackjack_questions,
}
