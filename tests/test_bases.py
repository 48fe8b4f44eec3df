"""Tests pretrain/train_base.py, sight.py and recipes.py: bases from random weights, without any world.

It also tests what the shipped bases can say.
"""
import inspect, math, os
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from envs import MARKER
from model import VLM, load_model
from pretrain import score_base, train_base
from pretrain.questions import Reading
from pretrain.recipes import RECIPES, Stage
from pretrain.sight import Board, Labels, Sight, add_up, all_places, random_board
from pretrain.tiny_nets import llava
from pretrain.train_base import (
    Example,
    Questions,
    answer_labels,
    answers_loss,
    learning_rate_at,
    micro_batches,
    part_loss,
    train_stage,
)
from worlds.registry import QUESTIONS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GRIDS = RECIPES["tiny-vlm-worlds"]
# Boards of nine patches with a few names.
SMALL = GRIDS._replace(side=3, places=3, size=48, names=("red ball", "blue key", "grey box", "flag"))

def small_net():
    """Build a net for pictures of nine patches -> (net, processor)."""
    words = " ".join([*SMALL.names, *SMALL.background])
    texts = [f"Which places have {words}? {words} 0 1 2, 2 1 0"] * 20
    return llava(texts, vocab_size=340, hidden=64, layers=2, image_size=48)

@cache
def small_tokenizer():
    """Return the tokenizer of small_net()."""
    return small_net()[1].tokenizer

def tiny(seed=0):
    """Build a net for pictures of nine patches -> (net, processor, sight)."""
    torch.manual_seed(seed)
    net, processor = small_net()
    return net, processor, Sight(net.get_input_embeddings(), processor.tokenizer, SMALL)

def small_boards(count, seed=0):
    """Draw boards of nine patches."""
    rng = np.random.default_rng(seed)
    return [random_board(rng, SMALL, 9)[0] for _ in range(count)]

def patch_counts(examples):
    """Count the patches of the examples that have a board."""
    boards = [example.board for example in examples if example.board]
    return [len(board.names) for board in boards]

def board_questions(stage, seed=0):
    """Make the Questions of a stage that needs no world; texts to repeat come from the card games."""
    questions = Questions(SMALL, stage, small_tokenizer(), seed)
    reading = Reading()
    reading.rng = questions.rng
    questions.readings = [reading]
    return questions


# ---- recipes ----

def test_each_stage_of_a_recipe_can_be_run():
    """Kinds are methods, environments ask questions, and what a board may show has a name of its own."""
    for recipe in RECIPES.values():
        for stage in recipe.stages:
            for kind in stage.kinds:
                assert inspect.isfunction(getattr(Questions, kind))
            for name in stage.asked:
                assert name.partition(":")[0] in QUESTIONS
            # A batch of one kind only would leave the others out.
            assert stage.batch >= len(stage.kinds)
        names = [stage.name for stage in recipe.stages]
        assert len(set(names)) == len(names)
        assert not set(recipe.names) & set(recipe.background)

def test_the_learning_rate_warms_up_and_decays():
    stage = Stage("x", ("board",), 1000, lr=2e-3)
    rates = [learning_rate_at(update, stage) for update in range(1000)]
    assert rates[0] < 1e-4
    assert max(rates) > 1.9e-3
    assert 2e-4 <= rates[-1] < 2.1e-4


# ---- boards ----

def test_a_board_shows_each_thing_once_where_the_answer_says():
    """The answer's places are those of the patches with the names, also where there are few patches."""
    rng = np.random.default_rng(0)
    seen = Counter()
    for patches in (2, 4, 9):
        for _ in range(100):
            board, places = random_board(rng, SMALL, patches, things=3)
            where = list(zip(board.columns, board.rows))
            assert len(board.names) == len(where) == len(set(where)) == patches
            assert len(places) == min(3, patches)
            shown = dict(zip(board.names, where))
            for name in SMALL.background:
                shown.pop(name, None)
            assert shown == places
            seen.update(places.values())
    # Things are everywhere.
    assert len(seen) == 9
    assert min(seen.values()) > 0.5 * max(seen.values())

def test_boards_grow_when_their_things_are_found():
    """A narrowed stage begins with two patches and doubles them after ten updates with a small loss."""
    stage = Stage("x", ("board", "copying"), 100, batch=4, is_narrowed=True)
    questions = board_questions(stage)
    sizes = []
    for loss in [9.0] * 30 + [0.1] * 60:
        assert patch_counts(questions.draw()) == [questions.patches] * 2
        sizes.append(questions.patches)
        questions.widen(loss)
    # The last high losses are forgotten first.
    assert set(sizes[:31]) == {2}
    assert sorted(set(sizes)) == [2, 4, 8, 9]
    wide = board_questions(Stage("x", ("board",), 100, batch=4))
    wide.widen(0.0)
    assert patch_counts(wide.draw()) == [9] * 4

def test_any_token_is_repeated_but_no_action():
    """What no answer needs cannot be said any more, and the action syntax is made of such tokens."""
    questions = board_questions(Stage("x", ("any_tokens",), 100))
    # pieces of the marker, which may meet by chance
    questions.vocabulary = [*questions.vocabulary, *["[action", "]"] * 30]
    tokenizer = small_tokenizer()
    seen = Counter()
    for _ in range(2000):
        example = questions.any_tokens()
        assert example.question == f"Repeat:\n{example.answer}"
        assert MARKER not in example.answer
        assert example.answer == example.answer.strip() != ""
        seen.update(tokenizer(example.answer).input_ids)
    words = range(len(tokenizer))
    plain = [token for token in words if tokenizer(tokenizer.decode([token])).input_ids == [token]]
    texts = {token: tokenizer.decode([token]) for token in plain}
    # special tokens have no place in a text
    special = set(tokenizer.all_special_tokens)
    for token, text in texts.items():
        if text.isprintable() and text.strip() and text not in special:
            assert seen[token], f"{text!r} is never repeated"

def test_what_stood_behind_a_word_is_asked_for_and_no_guess():
    """A net that repeated whole texts looked nothing up in a list: it counted how far away a word was."""
    questions = board_questions(Stage("x", ("recalling",), 100, is_narrowed=True))
    questions.recipe = SMALL._replace(names=tuple("abcdefghijklmnop"))
    questions.names = 12
    tokenizer = small_tokenizer()
    starts = set()
    for _ in range(20):
        example = questions.recalling()
        shown = example.question.split()
        # four words for each patch
        assert len(shown) == len(set(shown)) == 8
        assert set(shown) <= set("abcdefghijkl")
        for piece in example.answer.split(", "):
            words = piece.split()
            start = shown.index(words[0])
            assert words == shown[start : start + len(words)]
            assert len(words) >= 2
            starts.add(start)
        _, labels = answer_labels(tokenizer, example)
        learned = "".join(tokenizer.decode([token]) for token in labels if token != -100)
        # neither commas nor the words that begin a piece: nobody can know them
        known = "".join(f" {word}" for piece in example.answer.split(", ") for word in piece.split()[1:])
        assert learned == known + tokenizer.eos_token
    assert starts == set(range(7))

def test_names_grow_with_the_boards():
    """With many names from the start nothing was found: there are a few at first, then twice as many."""
    stage = Stage("x", ("board",), 100, batch=8, is_narrowed=True, names=1)
    questions = board_questions(stage)
    seen = {}
    for _ in range(60):
        names = {name for example in questions.draw() for name in example.board.names}
        seen.setdefault(questions.names, set()).update(names & set(SMALL.names))
        questions.widen(0.1)
    assert {count: len(names) for count, names in seen.items()} == {1: 1, 2: 2, 4: 4}
    # a stage that names no number has all from the start
    assert board_questions(stage._replace(names=0)).names == len(SMALL.names)

def test_a_place_stands_right_behind_a_name():
    """Names that the worlds write in quotes have none on boards, and no space before them either."""
    stage = Stage("x", ("board",), 100)
    for is_quoted, between in ((False, ", "), (True, ",")):
        questions = board_questions(stage)
        questions.recipe = SMALL._replace(is_quoted=is_quoted)
        example = questions.board()
        shown = set(example.board.names) & set(SMALL.names)
        answers = example.answer.split(between)
        assert {answer.rsplit(maxsplit=2)[0] for answer in answers} == shown
        asked = example.question.removesuffix("?").removeprefix("Which places have")
        assert asked[0] == (":" if is_quoted else " ")
        assert set(asked[1:].split(between)) == shown

def test_a_thing_is_asked_for_where_the_board_has_it():
    questions = board_questions(Stage("x", ("where",), 100, is_narrowed=True))
    questions.recipe = SMALL._replace(step=4)
    asked = set()
    for _ in range(50):
        example = questions.where()
        name = example.question.removeprefix("Where is the ").removesuffix("?")
        [i] = [i for i, other in enumerate(example.board.names) if other == name]
        assert example.answer == f"{4 * example.board.columns[i]} {4 * example.board.rows[i]}"
        assert example.in_loss == "all"
        asked.add((i, len(example.board.names)))
    # each of two patches
    assert asked == {(0, 2), (1, 2)}


# ---- features ----

def test_an_ideal_feature_is_name_column_and_row():
    """Two patches that show the same differ by their places only, and all three parts have length 1."""
    _, _, sight = tiny()
    board = Board(("red ball", "red ball", "flag"), (0, 2, 2), (1, 1, 1))
    [first, second, third] = sight.ideal([board])[0]
    unit = torch.nn.functional.normalize
    columns = unit(sight.columns, dim=-1)
    assert torch.allclose(first - second, columns[0] - columns[2], atol=1e-5)
    names = sight.name_vectors(["red ball", "flag"])
    assert torch.allclose(names.norm(dim=-1), torch.ones(2))
    assert torch.allclose(second - third, names[0] - names[1], atol=1e-5)

def test_each_token_of_a_name_counts_the_same():
    """Where colours had longer embeddings than shapes, all things of a colour looked alike."""
    net, processor, sight = tiny()
    before = sight.name_vectors(["red ball", "red key"])
    red = processor.tokenizer(" red", add_special_tokens=False).input_ids
    assert len(red) == 1
    with torch.no_grad():
        net.get_input_embeddings().weight[red] *= 5
    after = sight.name_vectors(["red ball", "red key"])
    assert torch.allclose(after, before, atol=1e-5)

def test_noisy_longer_or_misplaced_features_have_a_larger_loss():
    """What differs from the ideal in its name, its column or its row alone costs something, too."""
    _, _, sight = tiny()
    boards = small_boards(8)
    with torch.no_grad():
        ideal = sight.ideal(boards)
        best, share = sight.loss(ideal, boards)
        others = [ideal + 0.3 * torch.randn(ideal.shape), 2 * ideal, 0.0 * ideal]
        for part in Board._fields:
            moved = []
            for board in boards:
                backwards = getattr(board, part)[::-1]
                moved.append(board._replace(**{part: backwards}))
            others.append(sight.ideal(moved))
        losses, shares = zip(*[sight.loss(features, boards) for features in others])
    assert share == 1
    assert best < min(losses)
    assert all(map(math.isfinite, losses))
    # misplaced names are not right, and neither is nothing at all
    assert max(shares[2], shares[3]) < 0.3

def test_a_patch_without_a_label_teaches_nothing():
    """Its name or its place is unknown; a part in which nothing is known leaves the tower as it is."""
    _, _, sight = tiny()
    boards = [
        Board(("red ball", None, "nothing"), (0, None, 2), (1, None, 1)),
        Board(("flag", "wall", None), (None, None, 1), (None, None, 1)),
    ]
    features = torch.randn(2, 3, 64, requires_grad=True)
    loss, _ = sight.loss(features, boards)
    loss.backward()
    taught = features.grad.norm(dim=-1)
    [thing, no_label, nothing] = taught[0]
    assert no_label == 0
    assert 0 < nothing < thing
    # a place without a name teaches its place
    assert taught[1, 2] > 0
    none = (None, None, None)
    unknown = Board(none, none, none)
    loss, share = sight.loss(features, [unknown, unknown])
    assert loss == 0
    assert math.isnan(share)
    no_places = Board(("flag", "flag", "flag"), none, none)
    loss, _ = sight.loss(features, [no_places, no_places])
    assert torch.isfinite(loss)

def test_a_tower_is_taught_without_changing_the_words():
    """The names' embeddings are a target for the tower; if they moved, they would come to meet it."""
    net, processor, sight = tiny()
    boards = small_boards(1)
    features = torch.randn(1, 9, 64, requires_grad=True)
    words = net.get_input_embeddings().weight
    loss, _ = sight.loss(features, boards)
    loss.backward()
    assert features.grad.abs().sum() > 0
    assert words.grad is None
    assert sight.columns.grad is None
    # From ideal features the language model learns, and words and places with it.
    sight.ideal(boards).square().sum().backward()
    assert words.grad is not None
    assert sight.columns.grad is not None

def test_threads_add_gradients_up_in_one_order():
    """Gradients are the same each time, so a base that was stopped ends with the weights of a whole one.

    Many patches show the same thing, and `table[label]` let two threads add to its gradient in any order.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    table = torch.randn(500, 128, requires_grad=True)
    numbers = torch.randint(50, (12, 64))
    labels = Labels(numbers, numbers, numbers)
    towards = torch.randn(12, 64, 128)
    gradients = []
    try:
        for _ in range(50):
            table.grad = None
            (add_up((table, table, table), labels) * towards).sum().backward()
            gradients.append(table.grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


# ---- the loss ----

def test_only_numbers_are_learned_from_a_board():
    _, processor, _ = tiny()
    tokenizer = processor.tokenizer
    example = Example("?", "red ball 0 1, flag 2 2", in_loss="numbers")
    ids, labels = answer_labels(tokenizer, example)
    learned = [tokenizer.decode([token]).strip() for token in labels if token != -100]
    assert learned == ["0", "1", "2", "2"]
    assert len(ids) == len(labels)
    ids, labels = answer_labels(tokenizer, example._replace(in_loss="all"))
    assert ids == labels
    assert ids[-1] == tokenizer.eos_token_id

def test_a_question_has_the_tokens_that_play_gives_it():
    """A base is asked in the very form of the chat template, or what it knows would not be used in play."""
    net, processor, _ = tiny()
    vlm = VLM(net, processor)
    content = [{"type": "image"}, {"type": "text", "text": "Where?"}]
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8))
    prompt = vlm.encode([{"role": "user", "content": content}], [picture])
    image = "<image>" * 9
    assert prompt["input_ids"].flatten().tolist() == processor.tokenizer(f"{image}Where?\n>").input_ids

def test_a_batch_is_cut_into_parts_of_one_kind():
    board = Board(("flag",), (0,), (0,))
    picture = Image.new("RGB", (48, 48))
    kinds = [
        Example("", "b"),
        Example("", "b", board),
        Example("", "b", board, in_loss="numbers"),
        Example("", "b", board, picture),
        Example("", "b", board, picture, "none"),
    ]
    examples = [kinds[i % 5]._replace(question="a" * i) for i in range(200)]
    seen = []
    for part in micro_batches(examples):
        ways = {(one.board is None, one.picture is None, one.in_loss == "none") for one in part}
        assert len(ways) == 1
        assert len(part) <= 32
        seen += [len(example.question) for example in part]
    assert sorted(seen) == list(range(200))

def test_a_tower_s_loss_stands_beside_that_of_the_answers():
    """A state's loss is that of its answer, from the tower's features, and that of its patches."""
    net, processor, sight = tiny()
    [board] = small_boards(1)
    state = Example("Where?", "0 1", board, Image.new("RGB", (48, 48), "red"))
    silent = state._replace(in_loss="none")
    unseen = state._replace(picture=None)
    with torch.no_grad():
        both, share = part_loss(net, processor, sight, [state])
        patches, same_share = part_loss(net, processor, sight, [silent])
        ideal, no_share = part_loss(net, processor, sight, [unseen])
        answer = answers_loss(net, processor.tokenizer, [state], sight.ideal([board]))
        blind, _ = part_loss(net, processor, sight, [Example("Where?", "0 1")])
    assert both > patches > 0
    assert share == same_share
    assert no_share is None
    assert torch.allclose(ideal, answer)
    assert not torch.allclose(blind, ideal)


# ---- the command lines ----

def test_a_mistake_is_named_before_anything_is_made(tmp_path):
    """Another word, a folder that cannot be written, a world that is missing: one sentence each."""
    out = f"--out={tmp_path / 'bases'}"
    for argv, sentence in (
        ([out], "Name one of tiny-vlm-worlds"),
        (["tiny-vlm-gird", out], "'tiny-vlm-gird' is no recipe"),
        (["tiny-vlm-worlds", "--out="], "names no folder"),
        (["tiny-vlm-worlds", f"--out={__file__}"], "is no folder"),
        (["tiny-vlm-worlds", out, "--seed=-1"], "--seed=-1 is out of range"),
        (["tiny-vlm-worlds", out, "--sed=1"], "there is no key sed"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            train_base.main(argv)
    assert not (tmp_path / "bases").exists()
    base = os.path.join(ROOT, "bases", "tiny-vlm")
    for argv, sentence in (
        ([base], "Name a base and what to ask"),
        ([base, "Find:FrozenLake"], "asks no questions"),
        ([base, "Finding"], "names no world or several"),
        ([base, "Finding:FrozenLake,Finding:FrozenLake"], "names no world or several"),
        ([base, "Finding:FrozenLak"], "FrozenLak"),
        ([base, "Finding:NumberLine"], "there are questions about BabyAI"),
        ([base, "Finding:FrozenLake", "--questions=0"], "--questions=0 is out of range"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            score_base.main(argv)


# ---- training ----

def test_names_are_found_on_boards_after_a_few_seconds(capsys):
    """The smallest case: one name among four patches. Who guesses loses 2 ln 2 / 2 ** 0.75 = 0.82."""
    net, processor, sight = tiny()
    stage = Stage("boards", ("board",), 150, batch=32, lr=3e-3)
    questions = board_questions(stage)
    questions.recipe = SMALL._replace(side=2)
    before = net.model.vision_tower.embeddings.patch_embedding.weight.clone()

    def draw():
        boards = []
        for _ in range(stage.batch):
            board, places = random_board(questions.rng, questions.recipe, 4, things=1)
            [(name, (column, row))] = places.items()
            answer = f"{name} {column} {row}"
            boards.append(Example(f"Which places have {name}?", answer, board, None, "numbers"))
        return boards

    questions.draw = draw
    train_stage(net, processor, sight, questions)
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 0.4
    # Without pictures the tower stays as it is.
    assert torch.equal(net.model.vision_tower.embeddings.patch_embedding.weight, before)

def test_places_are_named_from_the_upper_left():
    places = list(zip(*all_places(3)))
    assert places[:4] == [(0, 0), (1, 0), (2, 0), (0, 1)]


# ---- the shipped bases ----

def largest_probabilities(net, tokens, steps=1000):
    """Return the largest probability that a hidden state, found by gradient, gives each of the tokens."""
    net.float().requires_grad_(False)
    torch.manual_seed(0)
    # one hidden state for each token, before the last normalisation
    states = torch.randn(len(tokens), net.config.text_config.hidden_size, requires_grad=True)
    optimizer = torch.optim.Adam([states], 0.05)
    wanted = torch.tensor(tokens)
    for _ in range(steps):
        logits = net.lm_head(net.model.language_model.norm(states))
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    return (-losses).exp().tolist()

@pytest.mark.parametrize(("base", "actions"), [
    ("tiny-vlm", "1 + stand hit (a * b)"),
    ("tiny-vlm-worlds", "go forward turn left pick up toggle drop right down"),
    ("tiny-vlm-grids", "go forward turn left pick up toggle drop"),
    ("tiny-vlm-pages", "click 5 type press 12"),
])
def test_a_base_can_learn_to_say_any_action(base, actions):
    """A base had lost a token of the marker: a seventh of all sampled replies could not be parsed."""
    net, processor = load_model(os.path.join(ROOT, "bases", base))
    tokens = sorted(set(processor.tokenizer(f"{MARKER} {actions}").input_ids))
    for token, largest in zip(tokens, largest_probabilities(net, tokens)):
        assert largest > 0.98, (
            f"{processor.tokenizer.decode([token])!r} cannot have more than {largest:.3f}"
        )
