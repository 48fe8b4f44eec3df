"""
The real environments, end to end: BabyAI, FrozenLake, MiniWoB++ in Chromium, and the bases that read them.

Plain pytest does not collect this file, because the packages are optional:

    pip install -r requirements-envs.txt && apt-get install chromium chromium-driver
    python -m pytest tests/extra_envs.py
"""
import os, re, shutil, signal, subprocess, sys, time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import model
from buffer import Buffer
from envs import MARKER, is_held_out
from evaluate import episode_summary, held_out_seeds, play, record, scripted_agent
from pretrain import score_base, train_base
from pretrain.grid_questions import room_questions
from pretrain.page_questions import Page
from pretrain.questions import draw_from
from pretrain.recipes import RECIPES, Stage
from pretrain.sight import board_of
from pretrain.walls import draw_wall
from worlds.miniwob import MiniWoB
from worlds.players import mixed_reply
from worlds.registry import make

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TASKS = (
    "click-test",
    "click-test-2",
    "click-button",
    "click-dialog",
    "click-dialog-2",
    "click-link",
    "click-tab",
    "click-checkboxes",
    "click-option",
    "click-collapsible",
    "enter-text",
    "enter-password",
    "login-user",
    "focus-text",
    "focus-text-2",
    "use-slider",
)
MIXED = {"expert": 0.3, "random": 0.5, "malformed": 0.2}
EXPERT = {"expert": 1.0}

def play_episodes(name, mix, n, **kw):
    def make_env():
        return make(name, **kw)

    agent = scripted_agent(mix, np.random.default_rng(0))
    return list(play(make_env, agent, list(range(n)), 8, split="train"))


# ---- BabyAI and FrozenLake are played ----

@pytest.mark.parametrize(
    "name",
    [
        "BabyAI-GoToLocal-v0",
        "BabyAI-GoToRedBallGrey-v0:view",
        "BabyAI-PutNextLocal-v0",
        "BabyAI-GoTo-v0",
        "FrozenLake",
    ],
)
def test_the_expert_wins(name, capsys, tmp_path):
    """The whole path works: play, record, read back. minigrid's own messages are not heard."""
    played = play_episodes(name, EXPERT, 12, size=56)
    summary = episode_summary(played)
    assert summary["success"] == 1.0
    assert summary["valid"] == 1.0
    assert "rejected" not in capsys.readouterr().out
    buf = Buffer(str(tmp_path / "data"), create=True)
    record(played, buf)
    stats = Buffer(buf.folder).stats()
    row = buf.rows[0]
    assert stats["success"] == 1.0
    assert row["env"] == name
    assert buf.image(row["images_file_names"][0]).size == (56, 56)
    assert 0 < stats["episode_return"] <= 1

@pytest.mark.parametrize("name", ["BabyAI-GoToLocal-v0", "BabyAI-PickupLoc-v0", "BabyAI-OpenDoor-v0"])
def test_the_bot_copes_with_moves_of_others(name):
    """It wins far more often than random play, also with random and malformed turns in between."""
    assert episode_summary(play_episodes(name, MIXED, 20, size=56))["success"] >= 0.8

def test_a_bot_that_goes_in_circles_is_stopped():
    """Unlock-v0 with seed 63 hangs minigrid's bot inside of `replan`.

    A count stops it, not a clock, and the episode is lost.
    """
    env = make("BabyAI-Unlock-v0", size=64)
    env.reset(seed=0)
    env.level.reset(seed=63)
    env.bot = None
    env.bot_action = None
    while not env.over and not env.lost:
        env.step(f"{MARKER} {env.expert()}")
    assert "circles" in env.lost

def test_babyai_says_its_mission_and_holds_starts_out():
    env = make("BabyAI-GoToLocal-v0", size=64)
    obs, _ = env.reset(seed=0, options={"split": "test"})
    assert obs["text"].startswith("go to ")
    assert "turn left, turn right, go forward, pick up, drop, toggle" in obs["text"]
    assert env.max_turns == 64
    assert is_held_out(env.fingerprint())
    starts = set()
    for seed in held_out_seeds(env, 40):
        env.reset(seed=seed, options={"split": "test"})
        starts.add(env.fingerprint())
    assert len(starts) == 40
    before = env.fingerprint()
    env.step(f"{MARKER} turn left")
    assert env.fingerprint() != before
    assert "Last" not in env.prompt()

def test_max_turns_shortens_a_level():
    env = make("BabyAI-GoToLocal-v0", max_turns=9)
    env.reset(seed=0)
    assert env.max_turns == 9

def test_an_unknown_level_is_one_sentence():
    with pytest.raises(ValueError, match="'BabyAI-GotoLocal-v0' is unknown; nearest: BabyAI-GoToLocal"):
        make("BabyAI-GotoLocal-v0")

def test_a_partial_view_lists_the_last_actions():
    """A malformed reply did nothing, so it is not in the list."""
    env = make("BabyAI-GoToLocal-v0:view", size=56)
    obs, _ = env.reset(seed=0)
    assert obs["image"].size == (56, 56)
    assert "Last" not in obs["text"]
    for action in ("go forward", "turn left", "drop", "nonsense", "turn right"):
        obs = env.step(f"{MARKER} {action}")[0]
    assert "\nLast actions: turn left, drop in vain, turn right\n" in obs["text"]

@pytest.mark.parametrize("option", ["", ":view"])
def test_babyai_says_what_is_carried(option):
    """No picture of the map shows it."""
    env = make(f"BabyAI-GoToLocal-v0{option}", size=56)
    env.reset(seed=0)
    cells = env.level.grid.grid
    thing = next(cell for cell in cells if cell and cell.type != "wall")
    env.level.carrying = thing
    assert f"\nCarrying: {thing.color} {thing.type}\nActions" in env.prompt()
    env.level.carrying = None
    assert "Carrying" not in env.prompt()

def test_frozenlake_has_several_shortest_ways_and_holds_maps_out():
    env = make("FrozenLake")
    maps = {}
    for split in ("train", "test"):
        maps[split] = set()
        for seed in range(40):
            env.reset(seed=seed, options={"split": split})
            maps[split].add(env.fingerprint())
        assert len(maps[split]) > 20
    assert not maps["train"] & maps["test"]
    starts_with_two_ways = 0
    for seed in range(30):
        env.reset(seed=seed)
        best = [word for word in env.words() if env.optimal(word)]
        assert env.expert() in best
        starts_with_two_ways += len(best) == 2
    assert starts_with_two_ways > 3

def test_kill_ends_a_run_that_draws_with_pygame():
    """SDL had caught SIGTERM as soon as a lake was drawn: a run went on after `kill`."""
    code = """
import os, signal, time
from worlds.registry import make
env = make("FrozenLake")
env.reset(seed=0)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(1)
"""
    environment = {key: value for key, value in os.environ.items() if key != "SDL_NO_SIGNAL_HANDLERS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment)
    assert done.returncode == -signal.SIGTERM


# ---- questions about BabyAI's rooms ----

RGB = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "purple": (112, 39, 195),
    "yellow": (255, 255, 0),
    "grey": (100, 100, 100),
}

def cell_pixels(picture, column, row):
    """Return the pixels of a cell as (256, 3) floats; a cell is a patch of 16 pixels both ways."""
    left = 16 * column
    top = 16 * row
    cell = picture.crop((left, top, left + 16, top + 16))
    return np.asarray(cell, float).reshape(-1, 3)

def shows_colour(pixels, colour):
    direction = np.array(RGB[colour]) / np.linalg.norm(RGB[colour])
    likeness = (pixels @ direction) / (np.linalg.norm(pixels, axis=1) + 1e-9)
    is_bright = pixels.max(1) > 90
    return (likeness[is_bright] > 0.9).sum() > 10

@pytest.mark.parametrize("option", ["", ":view"])
def test_babyais_questions_are_about_the_picture(option):
    """Where a thing is said to be, its colour is seen; what is behind the agent is nowhere in its view."""
    env = make(f"Reading:BabyAI-GoToLocal-v0{option}", size=128)
    found = 0
    kinds = set()
    for seed in range(60):
        env.reset(seed=seed)
        _, asked = env.ask_world(env.rng)
        for kind, question, answer in asked:
            kinds.add((kind, answer == "nowhere"))
            if kind != "where" or answer == "nowhere":
                continue
            column, row = map(int, answer.split())
            colour = question.split()[3]
            assert shows_colour(cell_pixels(env.picture(), column, row), colour), (question, answer)
            found += 1
    assert found > 100
    assert (("where", True) in kinds) == (option == ":view")
    assert (("side", True) in kinds) == (option == ":view")

def test_questions_for_a_score_are_about_held_out_starts_only():
    """What training draws is never held out, and what is held out for a score always is."""
    for wanted in (False, True):
        env = make("Reading:FrozenLake", size=64)
        env.is_held_out = wanted
        env.rng = np.random.default_rng(0)
        starts = []
        begin = env.world.start
        env.world.start = lambda: starts.append(begin()) or starts.append(env.world.fingerprint())
        for _ in range(20):
            env.walk(env.rng)
            assert is_held_out(starts[-1], env.world.one_in) == wanted

def test_a_question_that_is_never_asked_ends_with_a_sentence(monkeypatch):
    """Facing asks nothing about pages; looking for such a question once took for ever."""
    env = make("Facing:miniwob/click-test-v1", size=160)
    page = Page("Click.", [], None, "", "", Image.new("RGB", (160, 160), "white"), "")
    monkeypatch.setattr(env, "page", lambda rng: page)
    with pytest.raises(SystemExit, match="nothing of the kind is asked"):
        env.reset(seed=0)
    env.close()

@pytest.mark.parametrize("option", ["", ":view"])
def test_a_room_s_board_names_what_each_patch_shows(option):
    """The patch of a thing has its colour, that of the agent is red, and nothing else has any colour."""
    world = make(f"BabyAI-GoToLocal-v0{option}", size=128)
    seen = Counter()
    for seed in range(20):
        world.reset(seed=seed)
        board = board_of(world, RECIPES["tiny-vlm-worlds"])
        picture = world.picture()
        for name, column, row in zip(*board):
            pixels = cell_pixels(picture, column, row)
            colour, _, shape = name.partition(" ")
            seen[shape] += 1
            if colour == "agent":
                colour = "red"
            if shape:
                assert shows_colour(pixels, colour), name
            else:
                assert np.ptp(pixels, axis=1).max() < 30, name
    assert min(seen[shape] for shape in ("ball", "box", "key")) > 10

def test_a_lake_s_board_names_the_tiles():
    """Each tile is four patches, with the tile's place."""
    world = make("FrozenLake", size=128)
    for seed in range(20):
        world.reset(seed=seed)
        board = board_of(world, RECIPES["tiny-vlm-worlds"])
        lake = world.gym.unwrapped
        agent = divmod(int(lake.s), lake.ncol)
        patches = Counter(zip(*board))
        assert set(patches.values()) == {4}
        assert len(patches) == 16
        for name, column, row in patches:
            is_agent = (row, column) == agent
            assert name == ("agent" if is_agent else lake_tile(lake, column, row))

@pytest.mark.parametrize("option", ["", ":view"])
def test_the_agent_is_a_red_triangle(option):
    env = make(f"BabyAI-GoToRedBallGrey-v0{option}", size=128)
    env.reset(seed=1)
    column, row = (3, 6) if option else env.level.agent_pos
    pixels = cell_pixels(env.picture(), column, row)
    is_red = (pixels[:, 0] > 200) & (pixels[:, 1] < 120)
    assert is_red.sum() > 30

def places_with(level, is_wanted):
    """Return the places of a level, as arrays, whose cell fulfils a condition."""
    places = []
    for x in range(level.width):
        for y in range(level.height):
            if is_wanted(level.grid.get(x, y)):
                places.append(np.array((x, y)))
    return places

def sign_word(number, positive, negative):
    return ("neither", positive, negative)[int(np.sign(number))]

@pytest.mark.parametrize("option", ["", ":view"])
def test_where_the_mission_leads(option):
    """"Where is it?" means the mission's thing, where there is one such thing.

    Its place and its side are compared with vectors of the level's own. Out of sight it is nowhere.
    """
    env = make("BabyAI-GoToLocal-v0" + option, size=64)
    sides = Counter()
    for seed in range(120):
        env.reset(seed=seed)
        level = env.level
        colour, shape = env.goal.split()[-2:]
        same = places_with(level, lambda cell: cell and (cell.color, cell.type) == (colour, shape))
        asked = room_questions(env, draw_from(env.rng))
        about_it = [question for question in asked if question[0].startswith("it")]
        assert all(question.startswith(env.goal) for _, question, _ in about_it)
        answers = {question.rpartition("\n")[2]: answer for _, question, answer in about_it}
        if len(same) > 1:
            # In the view, one of them may be alone in sight.
            assert option or not answers
            continue
        [place] = same
        ahead = int((place - level.agent_pos) @ level.dir_vec)
        right = int((place - level.agent_pos) @ level.right_vec)
        if not option or level.in_view(*place):
            side = sign_word(right, "right", "left")
            along = sign_word(ahead, "ahead", "behind")
            where = f"{3 + right} {6 - ahead}" if option else f"{place[0]} {place[1]}"
        else:
            side = along = where = "nowhere"
        assert answers["Is it left or right of the agent?"] == side
        assert answers["Is it ahead of the agent or behind?"] == along
        assert answers["Where is it?"] == where
        [named] = [answer for kind, _, answer in asked if kind == "places"]
        for part in named.split(", "):
            is_it = part.startswith(f"{colour} {shape} ")
            assert not is_it or part == f"{colour} {shape} {where}"
        sides[side] += 1
    assert min(sides["left"], sides["right"]) > 10
    assert not option or sides["nowhere"] > 10

def name_of(cell):
    if cell is None:
        return "nothing"
    return "wall" if cell.type == "wall" else f"{cell.color} {cell.type}"

def is_free_between(level, place):
    """Walk from the agent straight to a place and tell whether all cells between are empty."""
    step = np.sign(place - level.agent_pos)
    assert 0 in step
    here = level.agent_pos + step
    is_free = True
    while (here != place).any():
        is_free = is_free and level.grid.get(*map(int, here)) is None
        here = here + step
    return is_free

@pytest.mark.parametrize("option", ["", ":view"])
def test_what_is_beside_the_agent_and_in_the_way(option):
    """The answers agree with a walk over the level's own grid, from above and in the agent's view."""
    env = make("BabyAI-GoToLocal-v0" + option, size=64)
    seen = Counter()
    for seed in range(60):
        env.reset(seed=seed)
        level = env.level
        asked = room_questions(env, draw_from(env.rng))
        answers = {(kind, question): answer for kind, question, answer in asked}
        for word, step in (("left", -level.right_vec), ("right", level.right_vec)):
            beside = level.grid.get(*map(int, level.agent_pos + step))
            assert answers["beside", f"What is {word} of the agent?"] == name_of(beside)
        for (kind, question), answer in answers.items():
            thing = question.removeprefix("Is the way to the ").removesuffix(" free?")
            is_named = thing.count(" ") == 1 and thing[0].isalpha()
            if kind != "between" or not is_named:
                continue
            place, *others = places_with(level, lambda cell: name_of(cell) == thing)
            # Another thing of that name may be behind the agent's back.
            if not others:
                assert answer == ("yes" if is_free_between(level, place) else "no")
                seen[answer] += 1
    assert min(seen["yes"], seen["no"]) > 3


STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))

def distances_to(level, goals):
    """Return how many moves it takes from (x, y, facing) until a goal is right in front.

    Distances are relaxed backwards from the goals in the level's own grid.
    """
    distance = np.full((level.width, level.height, 4), np.inf)
    for goal in goals:
        for facing, step in enumerate(STEPS):
            x, y = goal - step
            distance[x, y, facing] = 0
    free = {(int(x), int(y)) for x, y in places_with(level, lambda cell: cell is None)}
    free = {(x, y) for x, y in free if 0 < x < level.width - 1 and 0 < y < level.height - 1}
    states = [(x, y, facing) for x, y in sorted(free) for facing in range(4)]
    for _ in range(60):
        after_a_turn = np.minimum(np.roll(distance, 1, 2), np.roll(distance, -1, 2))
        for x, y, facing in states:
            dx, dy = STEPS[facing]
            after = after_a_turn[x, y, facing]
            if level.grid.get(x + dx, y + dy) is None:
                after = min(after, distance[x + dx, y + dy, facing])
            distance[x, y, facing] = min(distance[x, y, facing], 1 + after)
    return distance

def told_way(env):
    """Return the one answer about the way to the mission's thing, None if it is not asked."""
    begin = "Which way does the shortest path to it begin?"
    answers = set()
    for kind, question, answer in room_questions(env, lambda n: 1):
        if kind == "mission told" or kind == "mission way" and question.endswith(begin):
            answers.add(answer.split()[-1])
    assert len(answers) < 2
    return answers.pop() if answers else None


MOVES = {"ahead": "go forward", "left": "turn left", "right": "turn right"}

@pytest.mark.parametrize(
    "name",
    [
        "BabyAI-GoToLocal-v0",
        "BabyAI-GoToLocal-v0:view",
        "BabyAI-PutNextLocal-v0",
        "BabyAI-OpenDoor-v0:view",
    ],
)
def test_an_agent_that_follows_the_answers_takes_the_shortest_way(name):
    """Which way leads to the mission's thing, asked and followed turn by turn, ends right in front of it.

    It leads around what is in the way, on the map in as few moves as there are.
    """
    env = make(name, size=64)
    is_view = name.endswith("view")
    detours = 0
    for seed in range(40):
        env.reset(seed=seed)
        level = env.level
        wanted = " ".join(env.goal.split(" next to ")[0].split()[-2:])
        goals = places_with(level, lambda cell: name_of(cell) == wanted)
        optimum = distances_to(level, goals)[(*level.agent_pos, level.agent_dir)]
        moves = 0
        word = told_way(env)
        while word in MOVES and moves < 60:
            env.act((MOVES[word],))
            moves += 1
            word = told_way(env)
        if word == "here":
            assert any((level.front_pos == goal).all() for goal in goals)
            assert moves == optimum or is_view and moves > optimum
            detours += moves > sum(abs(goals[0] - level.agent_pos)) > 0
        elif word == "nowhere":
            assert not moves
            assert is_view or optimum == np.inf
        else:
            assert word is None
    assert detours > 5


# ---- questions about FrozenLake ----

TILES = {"F": "ice", "S": "ice", "H": "hole", "G": "flag"}
COMPASS_STEPS = {"east": (1, 0), "south": (0, 1), "west": (-1, 0), "north": (0, -1)}
COMPASS_ACTIONS = {"west": 0, "south": 1, "east": 2, "north": 3}
ACTION_DIRECTIONS = {"left": "west", "down": "south", "right": "east", "up": "north"}

def lake_tile(lake, x, y):
    if not (0 <= x < 4 and 0 <= y < 4):
        return "nothing"
    return TILES[lake.desc[y, x].decode()]

def lake_holes(lake):
    holes = [f"{x} {y}" for y in range(4) for x in range(4) if lake_tile(lake, x, y) == "hole"]
    return ", ".join(holes) or "none"

def follow_to_the_flag(world, direction):
    """Walk as the answers say and return the number of steps; the agent is put back."""
    lake = world.gym.unwrapped
    start = lake.s
    steps = 0
    over = False
    while not over:
        steps += 1
        [(_, lake.s, reward, over)] = lake.P[lake.s][COMPASS_ACTIONS[direction]]
        if not over:
            direction = ACTION_DIRECTIONS[world.expert()]
    assert reward == 1
    lake.s = start
    return steps

def test_questions_about_the_lake():
    """What is told of a tile is the map's.

    An agent that follows the directions comes to the flag in as few steps as there are, from any tile from
    which there is a way.
    """
    env = make("Reading:FrozenLake", size=64)
    lengths = set()
    for seed in range(40):
        env.reset(seed=seed)
        world, asked = env.ask_world(env.rng)
        lake = world.gym.unwrapped
        steps = len(world.shortest_way(lake.s))
        for kind, question, answer in asked:
            if kind == "at":
                x, y = map(int, question[:-1].split()[-2:])
                assert answer == lake_tile(lake, x, y)
            elif kind == "beside":
                dx, dy = COMPASS_STEPS[question.split()[2]]
                assert answer == lake_tile(lake, lake.s % 4 + dx, lake.s // 4 + dy)
            elif kind == "places":
                assert answer == lake_holes(lake)
            elif kind == "way":
                assert follow_to_the_flag(world, answer) == steps
                lengths.add(steps)
    assert len(lengths) > 3


# ---- the bases ----

SMALL_STAGES = (
    Stage("copying", ("copying",), 2, ("Reading:FrozenLake",), batch=4),
    Stage("boards", ("board", "copying"), 2, ("Reading:FrozenLake",), batch=4),
    Stage("asking", ("where",), 2, ("Reading:FrozenLake",), batch=4),
    Stage("finding", ("ideal",), 2, ("Finding:FrozenLake",), batch=4),
    Stage("sight", ("sight",), 2, ("Reading:FrozenLake",), batch=4),
    Stage("both", ("state",), 2, ("Leading:FrozenLake", "Facing:FrozenLake"), batch=4),
)

def test_a_base_is_made_from_nothing_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """Every stage leaves a folder; a run that begins behind one of them ends with the same weights.

    The base then opens as any other, is asked about held-out states, and is not written over. Nor does a run
    go on from stages that it would not have made.
    """
    small = RECIPES["tiny-vlm-worlds"]._replace(stages=SMALL_STAGES)
    monkeypatch.setitem(RECIPES, "tiny-vlm-worlds", small)
    whole = tmp_path / "whole"
    stopped = tmp_path / "stopped"
    train_base.main(["tiny-vlm-worlds", f"--out={whole}"])
    for folder in ("tiny-vlm-worlds-1-copying", "tiny-vlm-worlds-2-boards", "tiny-vlm-worlds-3-asking"):
        shutil.copytree(whole / folder, stopped / folder)
    train_base.main(["tiny-vlm-worlds", f"--out={stopped}"])
    assert f"goes on from {stopped}" in capsys.readouterr().out
    files = [folder / "tiny-vlm-worlds" / "model.safetensors" for folder in (whole, stopped)]
    first, second = [load_file(file) for file in files]
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    with pytest.raises(SystemExit, match="is there already"):
        train_base.main(["tiny-vlm-worlds", f"--out={whole}"])
    shutil.rmtree(stopped / "tiny-vlm-worlds")
    with pytest.raises(SystemExit, match="another seed or another recipe"):
        train_base.main(["tiny-vlm-worlds", f"--out={stopped}", "--seed=1"])
    # A world in a later stage changes the tokenizer of all.
    more = SMALL_STAGES[-1]._replace(asked=("Leading:BabyAI-GoToLocal-v0",))
    monkeypatch.setitem(RECIPES, "tiny-vlm-worlds", small._replace(stages=(*SMALL_STAGES, more)))
    with pytest.raises(SystemExit, match="another seed or another recipe"):
        train_base.main(["tiny-vlm-worlds", f"--out={stopped}"])
    base = str(whole / "tiny-vlm-worlds")
    score_base.main([base, "Leading:FrozenLake", "--questions=4", "--batch=2"])
    assert re.search(r"Leading:FrozenLake +(echo|way|mission told) .* of [1-4]\n", capsys.readouterr().out)

def test_a_wall_s_letters_are_where_the_browser_says():
    """Cells with a letter have ink; the same number gives the same wall, and pages follow as before."""
    recipe = RECIPES["tiny-vlm-pages"]
    world = make("miniwob/click-button-v1", size=160)
    walls = [draw_wall(world, np.random.default_rng(number), recipe) for number in (0, 1, 0)]
    world.start()
    assert "Click on the" in world.goal
    assert world.with_role("button")
    world.close()
    first, second, again = walls
    assert first.picture.tobytes() == again.picture.tobytes()
    assert first.board == again.board
    assert first.picture.tobytes() != second.picture.tobytes()
    for wall in (first, second):
        grey = np.asarray(wall.picture.convert("L"))
        has_ink = (grey < 150).reshape(40, 4, 40, 4).any((1, 3))
        is_letter = wall.letters > 0
        assert is_letter.sum() > 150
        assert has_ink[is_letter].mean() > 0.93
        assert has_ink[~is_letter].mean() < 0.4
        assert len(set(wall.board.names)) > 12

def test_walls_are_drawn_once_for_all_stages(monkeypatch):
    """The stage letters shows no board, the stage words shows one of the same picture."""
    monkeypatch.setattr(train_base, "WALLS", 1)
    monkeypatch.setattr(train_base.Questions, "walls", {})
    recipe = RECIPES["tiny-vlm-pages"]
    _, processor = model.load_model(os.path.join(ROOT, "bases", "tiny-vlm-pages"))
    shown = []
    for name in ("letters", "words"):
        [stage] = [stage for stage in recipe.stages if stage.name == name]
        questions = train_base.Questions(recipe, stage._replace(batch=2), processor.tokenizer, 0)
        shown += questions.draw()
        questions.close()
    assert [example.board is None for example in shown] == [True, True, False, False]
    assert len({id(example.picture) for example in shown}) == 1
    assert len({id(example.letters) for example in shown}) == 1

def share_of_right_answers(vlm, name, size, hide=False):
    """Ask 80 fresh questions, greedily; hide: with a black picture."""
    env = make(name, size=size)
    prompts = []
    answers = []
    for seed in range(10**6, 10**6 + 80):
        obs, _ = env.reset(seed=seed)
        kind = env.kind.split()[-1]
        # A black picture shows nothing, indeed. The others are answered from the lines alone.
        needs_no_picture = hide and kind in ("number", "named", "text")
        if kind == "echo" or env.answer == "nowhere" or needs_no_picture:
            continue
        picture = Image.new("RGB", (size, size)) if hide else obs["image"]
        content = [{"type": "image"}, {"type": "text", "text": obs["text"]}]
        prompts.append(vlm.encode([{"role": "user", "content": content}], [picture]))
        answers.append(env.answer)
    env.close()
    replies, *_ = vlm.generate(prompts, 24, temperature=0)
    return np.mean([vlm.decode(ids) == answer for ids, answer in zip(replies, answers)])

@pytest.mark.parametrize(
    "folder, size, bounds",
    [
        (
            "tiny-vlm-grids",
            128,
            {
                "Finding:BabyAI-GoToLocal-v0:view": 0.9,
                "Finding:BabyAI-GoToLocal-v0": 0.9,
                "Facing:BabyAI-GoToLocal-v0:view": 0.85,
            },
        ),
        (
            "tiny-vlm-worlds",
            128,
            {
                "Leading:FrozenLake": 0.85,
                "Leading:BabyAI-GoToLocal-v0:view": 0.8,
                "Facing:BabyAI-GoToLocal-v0:view": 0.85,
                "Finding:BabyAI-GoToLocal-v0:view": 0.9,
                "Finding:BabyAI-GoToLocal-v0": 0.9,
            },
        ),
        (
            "tiny-vlm-pages",
            160,
            {"Finding:miniwob/click-tab-v1": 0.75, "Finding:miniwob/click-dialog-2-v1": 0.75},
        ),
    ],
)
def test_the_shipped_bases_find_what_is_named(folder, size, bounds, monkeypatch):
    """Greedy replies name places on the map and in the view, ways over a lake, tabs and dialogs in pages.

    Pages are as they are or moved, not in pieces. Without the picture no place is found.
    """
    monkeypatch.setattr(Page, "scatter", lambda page, draw: None)
    torch.manual_seed(0)
    net, processor = model.load_model(os.path.join(ROOT, "bases", folder))
    vlm = model.VLM(net, processor).eval()
    for name, bound in bounds.items():
        assert share_of_right_answers(vlm, name, size) > bound, name
    first = list(bounds)[0]
    assert share_of_right_answers(vlm, first, size, hide=True) < 0.2


# ---- MiniWoB++ ----

@pytest.mark.parametrize("option", ["", ":element", ":coordinate"])
def test_the_scripted_player_solves_every_task(option, tmp_path):
    """16 tasks in one run, 3 episodes each, in real browsers; recorded and read back."""
    names = [f"miniwob/{task}-v1{option}" for task in TASKS]
    n = 3 * len(TASKS)
    agent = scripted_agent(EXPERT, np.random.default_rng(0))
    played = list(play(lambda: make(",".join(names), size=160), agent, list(range(n)), 16, split="train"))
    by_env = episode_summary(played)["by_env"]
    success = {name: summary["success"] for name, summary in by_env.items()}
    assert success == dict.fromkeys(names, 1.0)
    buf = Buffer(str(tmp_path / "data"), create=True)
    record(played, buf)
    assert len(Buffer(buf.folder).episodes) == n
    assert len(MiniWoB.idle) <= MiniWoB.max_parallel

def test_a_page_is_its_seeds():
    """The same seed gives the same page and pixels, whatever was played before.

    Another seed gives another page. Train and test pages differ.
    """
    env = make("miniwob/click-dialog-2-v1", size=210)
    rng = np.random.default_rng(0)

    def deal(seed, split=None):
        obs, _ = env.reset(seed=seed, options={"split": split})
        page = obs["image"].tobytes(), obs["text"], env.fingerprint()
        while not env.over:
            reply, _ = mixed_reply(MIXED, env, rng)
            env.step(reply)
        return page

    first = [deal(seed) for seed in (1, 2, 3)]
    assert first == [deal(seed) for seed in (1, 2, 3)]
    assert len(set(first)) == 3
    train = {deal(seed, "train")[2] for seed in range(5)}
    test = {deal(seed, "test")[2] for seed in range(5)}
    assert not train & test
    env.close()

def test_the_last_picture_is_real_and_turns_are_limited():
    env = make("miniwob/click-button-v1", size=160, max_turns=3)
    obs, _ = env.reset(seed=0)
    before = obs["image"].tobytes()
    obs, reward, terminated, _, info = env.step(f"{MARKER} {env.expert()}")
    assert (reward, terminated, info["success"]) == (1.0, True, True)
    assert obs["image"].tobytes() == before
    env.reset(seed=0)
    ends = [env.step(f"{MARKER} press Tab")[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    env.close()

def child_processes(pid):
    answer = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in answer.stdout.split()]

@pytest.mark.parametrize("what", ["browser", "driver"])
def test_a_killed_browser_does_not_end_the_run(what, capsys):
    """A browser dies in the middle of an episode.

    The episode is played again in a new one, nothing is missing, and no drop is reported.
    """
    killed = []
    expert = scripted_agent(EXPERT, np.random.default_rng(0))

    def kill_once_and_act(envs, rows, images):
        if not killed and rows[0]["turn"] == 1:
            driver = envs[0].browser.service.process.pid
            killed.extend(child_processes(driver) if what == "browser" else [driver])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        return expert(envs, rows, images)

    def make_env():
        return make("miniwob/enter-password-v1")

    played = list(play(make_env, kill_once_and_act, list(range(6)), split="train"))
    assert killed
    assert episode_summary(played)["success"] == 1.0
    assert len(played) == 6
    assert "dropped" not in capsys.readouterr().out

def living_processes(group):
    """Return the lines of `ps` about the processes of a group, without zombies."""
    answer = subprocess.run(["ps", "-eo", "pgid,stat"], capture_output=True, text=True)
    lines = [line.split() for line in answer.stdout.splitlines()[1:]]
    return [line for line in lines if int(line[0]) == group and "Z" not in line[1]]

@pytest.mark.parametrize("end", ["raise KeyboardInterrupt", "os.kill(os.getpid(), 15)\ntime.sleep(9)"])
@pytest.mark.parametrize("opener", ["reset()", "in_thread(reset)"])
def test_every_browser_is_ended_with_the_program(opener, end):
    """No Chromium is left behind by Ctrl-C or `kill`, be it opened in the main thread or in another one."""
    code = f"""
import os, threading, time
from worlds.registry import make

env = make("miniwob/click-test-v1")

def reset():
    env.reset(seed=0)

def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()

{opener}
print(env.browser.service.process.pid, flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    group = int(done.stdout)
    for _ in range(50):
        if not living_processes(group):
            break
        time.sleep(0.1)
    assert not living_processes(group)
