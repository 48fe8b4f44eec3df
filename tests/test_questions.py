"""
The questions of pre-training: Reading about the card games, its answers, its texts for the tokenizer.

    python -m pytest tests/test_questions.py

tests/extra_envs.py has the questions about BabyAI and FrozenLake, tests/test_pages.py those about web pages.
"""
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from env_helpers import GAMES, episode_log, walk
from envs import MARKER
from pretrain.questions import corpus
from pretrain.tiny_nets import train_tokenizer
from worlds.players import scripted_reply
from worlds.registry import make

ROOT = Path(__file__).resolve().parent.parent
RANKS = {"A": 1, "J": 11, "Q": 12, "K": 13}

def test_a_seed_decides_every_question():
    log = episode_log("Reading", 1)
    assert log == episode_log("Reading", 1)
    assert log != episode_log("Reading", 2)

def test_malformed_replies_do_not_parse():
    for env, rng in walk("Reading", 300):
        reply = scripted_reply("malformed", env, rng)
        assert env.parse(reply) is None, reply

def test_questions_are_mixed_and_hide_no_marker():
    env = make("Reading")
    env.reset(seed=0)
    kinds = Counter()
    for _ in range(3000):
        env.start()
        kinds[env.kind] += 1
        assert env.question
        assert MARKER not in env.question + env.answer
        assert env.answer == env.answer.strip() != ""
        if env.kind == "echo":
            assert env.question.endswith(f"Repeat:\n{env.answer}")
    assert 0.22 < kinds["echo"] / 3000 < 0.28
    assert kinds["arithmetic"] > 100
    assert len(kinds) > 18
    assert min(kinds.values()) > 15

def test_reading_is_answered_by_its_expert_only():
    env = make("Reading")
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(100):
        obs, _ = env.reset()
        assert obs["text"] == env.question
        reply = scripted_reply("expert", env, rng)
        _, reward, terminated, truncated, info = env.step(f" {reply}\n")
        assert (reward, terminated, truncated) == (1.0, True, False)
        assert info["success"]
        assert info["valid"]
        env.reset()
        assert env.step("something else")[1] == 0.0
    env.reset()
    assert env.step("  ")[4]["valid"] is False


# ---- the answers, computed from the state of the game ----

def answer_to_sum(env):
    """Compute "What is 12 - 7?", the last line of the question."""
    a, operator, b = env.question.split("\n")[-1][8:-1].split()
    a = int(a)
    b = int(b)
    return str({"+": a + b, "-": a - b, "*": a * b}[operator])

def larger_number(game):
    """Return which number of NumberLine is larger."""
    if game.target == game.current:
        return "equal"
    return "target" if game.target > game.current else "current"

def hand(game):
    """Return (value, whether an ace counts 11) of the player's hand in Blackjack."""
    points = [min(rank, 10) for rank, _ in game.player]
    is_soft = 1 in points and sum(points) <= 11
    return sum(points) + (10 if is_soft else 0), is_soft

def expected_answer(env):
    """Compute the answer to the present question; None for the kinds that are not checked."""
    game = env.game
    if env.kind == "arithmetic":
        return answer_to_sum(env)
    if env.kind == "NumberLine target":
        return str(game.target)
    if env.kind == "NumberLine picture":
        return f"target {game.target} current {game.current}"
    if env.kind == "NumberLine larger":
        return larger_number(game)
    if env.kind.endswith("Points values"):
        return " ".join(str(min(rank, 10)) for rank, _ in game.cards)
    if env.kind.endswith("Points formula"):
        return " ".join(game.formula)
    if env.kind.endswith("Points last item"):
        return game.formula[-1]
    if env.kind == "Blackjack your sum":
        return str(hand(game)[0])
    if env.kind == "Blackjack soft ace":
        return "yes" if hand(game)[1] else "no"
    return None

def test_reading_answers_are_right():
    env = make("Reading")
    env.reset(seed=1)
    kinds = set()
    for _ in range(4000):
        env.start()
        kinds.add(env.kind)
        expected = expected_answer(env)
        if expected is not None:
            assert env.answer == expected, env.question
        if env.kind in ("EZPoints cards", "Points24 cards"):
            ranks = [RANKS.get(word) or int(word) for word in env.answer.split()]
            assert ranks == [rank for rank, _ in env.game.cards]
        if env.kind.endswith("Points formula"):
            assert f"Formula: {env.answer}" in env.question
        if env.kind.endswith("Points last item"):
            assert f" {env.answer}\n" in env.question
        if env.kind == "Blackjack your sum":
            assert 2 <= len(env.game.player) <= 6
    assert kinds >= {
        "arithmetic",
        "NumberLine larger",
        "EZPoints product",
        "Points24 values",
        "Points24 formula",
        "EZPoints last item",
        "Blackjack soft ace",
    }

def test_a_world_without_questions_is_one_sentence():
    with pytest.raises(ValueError, match="'Reading:NumberLine': there are questions about BabyAI's levels"):
        make("Reading:NumberLine")


# ---- texts to repeat and the tokenizer ----

def test_a_text_to_repeat_has_the_same_tokens_in_question_and_reply():
    """What is copied has to be what the question shows.

    In "Repeat: abc" the text begins with a space, and so with another token than in the reply. On a line of
    its own it has the same tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "bases" / "tiny-vlm")
    env = make("Reading")
    env.reset(seed=0)
    for _ in range(200):
        _, question, answer = env.echo()
        ids = tokenizer(answer, add_special_tokens=False).input_ids
        question_ids = tokenizer(question, add_special_tokens=False).input_ids
        assert question_ids[-len(ids) :] == ids

def test_a_number_to_copy_has_the_same_token_everywhere():
    """The tokenizer that is trained here keeps a number apart from the space before it.

    Otherwise "link 'abc' [12]" and the answer " 12" have two tokens for one number, and a model could copy a
    number only if it knew both spellings by heart.
    """
    train = [f"[{n}] link 'abc' {n} {n + 100}" for n in range(100)] * 3
    tokenizer = train_tokenizer(train, 600, ["<|pad|>", "<|end|>"])
    for n in (7, 12, 99, 104):
        [token] = tokenizer(str(n), add_special_tokens=False).input_ids
        for text in (f"[{n}] link", f"click {n}", f"click {n} a", f"#{n}"):
            assert tokenizer(text, add_special_tokens=False).input_ids.count(token) == 1
    text = "click 104 56, [12]é"
    assert tokenizer.decode(tokenizer(text).input_ids) == text

def test_seeds_make_different_questions():
    env = make("Reading")
    questions = set()
    for seed in range(50):
        env.reset(seed=seed)
        questions.add((env.question, env.picture().tobytes()))
    assert len(questions) > 45

def test_texts_to_repeat_cover_ascii():
    env = make("Reading")
    env.reset(seed=49)
    echoes = "".join(env.echo()[2] for _ in range(2000))
    assert set(map(chr, range(33, 127))) <= set(echoes)

def test_corpus_is_reproducible_and_never_shows_the_marker():
    texts = list(corpus(400))
    assert len(texts) > 800
    assert texts == list(corpus(400))
    assert texts != list(corpus(400, seed=1))
    for text in texts:
        assert MARKER not in text
        assert "End your reply" not in text
    for name in GAMES:
        goal = make(name).goal
        assert any(goal in text for text in texts)
