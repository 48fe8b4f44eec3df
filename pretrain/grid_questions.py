"""
Questions about BabyAI's rooms and FrozenLake for pre-training: what is where, and which way leads there.

room_questions() and lake_questions() return [(kind, question, answer), ...], the caption first. A question
that is listed several times is asked more often. Their argument draw(n) draws an integer below n.
"""
import re
from collections import Counter

import numpy as np

from pretrain.game_questions import PICTURE_QUESTION, PLAY_WORDS

# East, south, west and north, in minigrid's order.
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
DIRECTIONS = ("east", "south", "west", "north")
WAYS = ("ahead", "left", "right", "here", "nowhere")


# ---- ways ----
def shortest_path(is_free, state, goals):
    """Return a shortest way as a tuple of 'ahead', 'left' and 'right', None if there is none.

    is_free(x, y): whether the agent can walk there. state: (x, y, facing). goals: a set of (x, y); the way
    ends where one of them is right in front of the agent. A turn costs a move.
    """
    ways = [(state, ())]
    visited = {state}
    # A breadth-first search: the list grows while the loop runs over it.
    for (x, y, facing), words in ways:
        dx, dy = STEPS[facing]
        in_front = (x + dx, y + dy)
        if in_front in goals:
            return words
        moves = [
            ("ahead", (*in_front, facing)),
            ("left", (x, y, (facing - 1) % 4)),
            ("right", (x, y, (facing + 1) % 4)),
        ]
        for word, after in moves:
            if after not in visited and (word != "ahead" or is_free(*in_front)):
                visited.add(after)
                ways.append((after, (*words, word)))
    return None

def first_word(path):
    """Return how a path begins, 'here' for an empty one, 'nowhere' for none."""
    if path is None:
        return "nowhere"
    return path[0] if path else "here"

def play_shaped_question(mission, ways, answer, draw):
    """Return (question, answer) in the shape of play, without its syntax.

    A model that is asked in one form only does not answer in another. So the sign before the answer, the list
    of ways and the example vary, and are often about something else.
    """

    def some_words(count, separator=" "):
        return separator.join(PLAY_WORDS[draw(len(PLAY_WORDS))] for _ in range(count))

    sign = "({<"[draw(3)] + some_words(1) + ")}>"[draw(3)]
    list_line = (
        f"Ways: {', '.join(ways)}",
        f"{some_words(1)}: {some_words(2 + draw(9), ', ')}",
        f"{some_words(1).capitalize()}: {some_words(4 + draw(9))}",
    )[draw(3)]
    reply = ("answer", "reply")[draw(2)]
    content = ("a way", "a word", some_words(2))[draw(3)]
    example = (ways[draw(len(ways))], some_words(1), some_words(2))[draw(3)]
    lines = [mission]
    if draw(4) > 0:
        lines.append(list_line)
    lines.append(f"End your {reply} with {content}, for example: {sign} {example}")
    return "\n".join(lines), f"{sign} {answer}"


# ---- BabyAI: what a picture shows ----
def cell_name(cell):
    """Name a cell of minigrid's grid: 'nothing', 'wall' or, for example, 'red ball'."""
    if cell is None:
        return "nothing"
    if cell.type == "wall":
        return "wall"
    return f"{cell.color} {cell.type}"

class Room:
    """Hold what a BabyAI picture shows.

    Places are columns and rows of the picture, from the upper left. x, y, facing: the agent. things: [(name,
    column, row), ...], without walls and the agent. positions: {name: (column, row)} of the names that occur
    once. hidden: the names of things in the level that the picture does not show, because they are out of the
    agent's view.
    """

    def __init__(self, world):
        level = world.level
        self.level = level
        if world.is_view:
            self.grid, self.is_visible = level.gen_obs_grid()
            # The agent is in the middle of the lower edge and looks up.
            self.x = 3
            self.y = 6
            self.facing = DIRECTIONS.index("north")
        else:
            self.grid = level.grid
            self.is_visible = np.ones((level.width, level.height), bool)
            self.x, self.y = map(int, level.agent_pos)
            self.facing = level.agent_dir
        self.dx, self.dy = STEPS[self.facing]
        self.things = []
        for row in range(self.grid.height):
            for column in range(self.grid.width):
                name = self.what(column, row)
                if (column, row) != (self.x, self.y) and name not in ("unseen", "wall", "nothing"):
                    self.things.append((name, column, row))
        counts = Counter(name for name, _, _ in self.things)
        self.positions = {name: (column, row) for name, column, row in self.things if counts[name] == 1}
        existing = {cell_name(cell) for cell in level.grid.grid}
        self.hidden = sorted(existing - {"nothing", "wall"} - set(counts))

    def direction(self):
        """Name where the agent looks, in the picture."""
        return DIRECTIONS[self.facing]

    def what(self, column, row):
        """Name what is at a place; 'unseen' where the agent cannot look."""
        if not self.is_visible[column, row]:
            return "unseen"
        return cell_name(self.grid.get(column, row))

    def is_free(self, column, row):
        """Tell whether a place is in the picture and empty."""
        is_inside = 0 <= column < self.grid.width and 0 <= row < self.grid.height
        return is_inside and self.what(column, row) == "nothing"

    def from_agent(self, column, row):
        """Return how many steps (ahead, to the right) of the agent a place is."""
        across = column - self.x
        down = row - self.y
        return across * self.dx + down * self.dy, down * self.dx - across * self.dy

    def places(self):
        """Return {name: 'column row'} of the names that occur once, then {name: 'nowhere'} of hidden ones."""
        places = {name: f"{column} {row}" for name, (column, row) in self.positions.items()}
        return {**places, **dict.fromkeys(self.hidden, "nowhere")}

    def way_to(self, goals):
        """Return how the shortest path to one of some places begins, over what the picture shows."""
        return first_word(shortest_path(self.is_free, (self.x, self.y, self.facing), goals))

    def way_in_level(self, name):
        """Return how the shortest path to a thing begins, over the whole level."""
        level = self.level
        goals = set()
        for row in range(level.height):
            for column in range(level.width):
                if cell_name(level.grid.get(column, row)) == name:
                    goals.add((column, row))

        def is_free(column, row):
            return level.grid.get(column, row) is None

        state = (*map(int, level.agent_pos), level.agent_dir)
        return first_word(shortest_path(is_free, state, goals))


# ---- BabyAI: the questions ----
def yes_or_no(condition):
    """Return the answer 'yes' or 'no'."""
    return "yes" if condition else "no"

def side_word(steps, positive, negative):
    """Name a number of steps by its sign; None is 'nowhere'."""
    if steps is None:
        return "nowhere"
    if steps == 0:
        return "neither"
    return positive if steps > 0 else negative

def room_questions(world, draw):
    """Return all questions about the picture of a BabyAI level."""
    room = Room(world)
    asked = layout_questions(room, draw)
    asked += nearby_questions(room)
    asked += memory_questions(world)
    asked += several_places(room, draw)
    asked += mission_questions(room, world, draw)
    for name in room.hidden:
        asked += hidden_thing_questions(name)
    for name, column, row in room.things:
        asked.append(("thing", f"What is at {column} {row}?", name))
        asked += between_questions(room, name, column, row)
        asked += one_word_questions(room, name, column, row)
        if name in room.positions:
            asked += unique_thing_questions(room, name)
    return asked

def layout_questions(room, draw):
    """Ask what is where."""
    shape = ("ball", "box", "key", "door")[draw(4)]
    column = draw(room.grid.width)
    row = draw(room.grid.height)
    direction = room.direction()
    captions = [f"{name} {x} {y}" for name, x, y in room.things]
    captions.append(f"agent {room.x} {room.y} {direction}")
    shapes = Counter(name.split()[1] for name, _, _ in room.things)
    in_front = room.what(room.x + room.dx, room.y + room.dy)
    asked = [
        ("picture", PICTURE_QUESTION, ", ".join(captions)),
        ("front", "What is in front of the agent?", in_front),
        ("agent", "Where is the agent?", f"{room.x} {room.y}"),
        ("facing", "Which way does the agent look?", direction),
        ("count", f"How many things of the kind {shape} are there?", shapes[shape]),
    ]
    if (column, row) != (room.x, room.y):
        asked.append(("at", f"What is at {column} {row}?", room.what(column, row)))
    return asked

def nearby_questions(room):
    """Ask whether the way is free and what is beside the agent."""
    in_front = room.what(room.x + room.dx, room.y + room.dy)
    on_the_left = room.what(room.x + room.dy, room.y - room.dx)
    on_the_right = room.what(room.x - room.dy, room.y + room.dx)
    free = ("free", "Is the way ahead free?", yes_or_no(in_front == "nothing"))
    left = ("beside", "What is left of the agent?", on_the_left)
    right = ("beside", "What is right of the agent?", on_the_right)
    return [free] * 6 + [left, right] * 3

def memory_questions(world):
    """Ask about the list of last actions, where the text has one."""
    text = world.text()
    if not text:
        return []
    turns = [action.split()[1] for action in world.past_actions[-3:] if action.startswith("turn")]
    last_turn = turns[-1] if turns else "none"
    has_changed = yes_or_no(not world.past_actions[-1].endswith("in vain"))
    changed = ("in vain", f"{text}\nDid the last one change anything?", has_changed)
    turned = ("turned", f"{text}\nWhich way was the last turn?", last_turn)
    return [changed, turned] * 5

def sample_things(things, draw):
    """Draw at most five things, in any order."""
    return sorted(things, key=lambda thing: draw(1 << 30))[:5]

def several_places(room, draw):
    """Ask for the places of several things: a long answer, in which each place can be right or wrong."""
    places = room.places()
    names = sample_things(places, draw)
    if not names:
        return []
    answer = ", ".join(f"{name} {places[name]}" for name in names)
    return [("places", f"Which places have {', '.join(names)}?", answer)]

def mission_questions(room, world, draw):
    """Ask for the thing that the mission is about: its place, its side, the way to it.

    Nothing is asked where the mission may mean things of several names.
    """
    mission = world.goal
    text = world.text()
    if draw(2) and text:
        mission = f"{world.goal}\n{text}"
    found = re.search(r"(?:the|a) ((?:\w+ )?(?:ball|box|key|door))( |$)", world.goal)
    names = {name for name, _, _ in room.things} | set(room.hidden)
    targets = [name for name in names if found and name.endswith(found[1])]
    if len(targets) != 1:
        return []
    [target] = targets
    is_unique = target in room.places()
    is_end_of_mission = not found[2]
    asked = []
    if is_unique:
        asked += target_place_questions(room, mission, target)
    # Where the mission ends with the thing, any thing of that name will do.
    if is_unique or is_end_of_mission:
        answer = way_to_target(room, target, remembers=mission != world.goal)
        question = f"{mission}\nWhich way does the shortest path to it begin?"
        # "ahead" is the most frequent answer
        count = 10 if answer == "ahead" else 30
        asked += [("mission way", question, answer)] * count
        asked += [("mission told", *play_shaped_question(mission, WAYS, answer, draw))] * (3 * count)
    return asked

def way_to_target(room, target, remembers):
    """Return how the shortest path to the mission's thing begins.

    remembers: the question lists the last actions. They tell where the agent has just seen a thing that is
    out of sight now, and where it has looked in vain. So the answer is then the way in the room as it is.
    """
    goals = {(column, row) for name, column, row in room.things if name == target}
    if not goals and remembers:
        return room.way_in_level(target)
    return room.way_to(goals)

def target_place_questions(room, mission, target):
    """Ask for place and side of the thing that the mission is about."""
    ahead = None
    right = None
    if target in room.positions:
        ahead, right = room.from_agent(*room.positions[target])
    aside = side_word(right, "right", "left")
    along = side_word(ahead, "ahead", "behind")
    where = ("it", f"{mission}\nWhere is it?", room.places()[target])
    left_or_right = ("it side", f"{mission}\nIs it left or right of the agent?", aside)
    ahead_or_behind = ("it ahead", f"{mission}\nIs it ahead of the agent or behind?", along)
    return [where] * 4 + [left_or_right, ahead_or_behind] * 6

def hidden_thing_questions(name):
    """Ask for a thing that is out of the agent's view."""
    return [
        ("where", f"Where is the {name}?", "nowhere"),
        ("side", f"Is the {name} left or right of the agent?", "nowhere"),
        ("way", f"Which way does the shortest path to the {name} begin?", "nowhere"),
    ]

def between_questions(room, name, column, row):
    """Ask whether the straight way to a thing is free, if there is one of at least two steps."""
    across = column - room.x
    down = row - room.y
    distance = abs(across) + abs(down)
    is_straight = across == 0 or down == 0
    if not is_straight or distance < 2:
        return []
    between = set()
    for step in range(1, distance):
        between.add(room.what(room.x + step * across // distance, room.y + step * down // distance))
    answer = yes_or_no(between == {"nothing"})
    asked = [("between", f"Is the way to {column} {row} free?", answer)] * 2
    if name in room.positions:
        asked += [("between", f"Is the way to the {name} free?", answer)] * 4
    return asked

def one_word_questions(room, name, column, row):
    """Ask for the place of a thing by one of its two words, where no other thing has that word.

    That is easier to find, and found first.
    """
    asked = []
    for word in name.split():
        if sum(word in other.split() for other, _, _ in room.things) == 1:
            asked += [("where one", f"Where is the {word} one?", f"{column} {row}")] * 2
    return asked

def unique_thing_questions(room, name):
    """Ask where a thing is, on the map and from the agent, and which way leads to it."""
    column, row = room.positions[name]
    ahead, right = room.from_agent(column, row)
    signs = (("behind", "ahead")[ahead >= 0], ("left", "right")[right >= 0])
    relative_place = f"{signs[0]} {abs(ahead)} {signs[1]} {abs(right)}"
    aside = side_word(right, "right", "left")
    along = side_word(ahead, "ahead", "behind")
    way = room.way_to({(column, row)})
    where = ("where", f"Where is the {name}?", f"{column} {row}")
    relative = ("relative", f"Seen by the agent, where is the {name}?", relative_place)
    left_or_right = ("side", f"Is the {name} left or right of the agent?", aside)
    ahead_or_behind = ("ahead", f"Is the {name} ahead of the agent or behind?", along)
    begins = ("way", f"Which way does the shortest path to the {name} begin?", way)
    # Most ways begin ahead.
    count = 2 if way == "ahead" else 6
    return [where, relative] * 2 + [left_or_right, ahead_or_behind] + [begins] * count


# ---- FrozenLake ----
# Ways are directions of the compass here, because left, down, right and up are actions.
COMPASS = {"left": "west", "down": "south", "right": "east", "up": "north"}
TILES = {b"S": "ice", b"F": "ice", b"H": "hole", b"G": "flag"}

def tile_name(lake, column, row):
    """Name a tile of gymnasium's lake; 'nothing' outside of it."""
    if not (0 <= column < lake.ncol and 0 <= row < lake.nrow):
        return "nothing"
    return TILES[lake.desc[row, column]]

def place_agent(world, draw):
    """Put the agent on a tile from which a way leads to the flag, and return where that begins.

    Half of the time it is a tile where the way is not simply south as far as that goes, then east.
    """
    lake = world.gym.unwrapped
    ways = {}
    for tile, letter in enumerate(lake.desc.ravel()):
        actions = world.shortest_way(tile) if letter in b"SF" else None
        if actions:
            ways[tile] = COMPASS[actions[0]]
    detours = []
    for tile, way in ways.items():
        is_above_last_row = tile // lake.ncol < lake.nrow - 1
        if way != ("south" if is_above_last_row else "east"):
            detours.append(tile)
    tiles = list(ways)
    if detours and draw(2):
        tiles = detours
    lake.s = tiles[draw(len(tiles))]
    return ways[lake.s]

def lake_questions(world, draw):
    """Put FrozenLake's agent somewhere, and return all questions about the picture."""
    way = place_agent(world, draw)
    lake = world.gym.unwrapped
    y, x = divmod(lake.s, lake.ncol)
    holes = []
    for row in range(lake.nrow):
        for column in range(lake.ncol):
            if tile_name(lake, column, row) == "hole":
                holes.append(f"{column} {row}")
    captions = [f"agent {x} {y}"]
    captions += [f"hole {hole}" for hole in holes]
    asked = [
        ("picture", PICTURE_QUESTION, ", ".join(captions)),
        ("where", "Where is the agent?", f"{x} {y}"),
        ("places", "Which places have holes?", ", ".join(holes) or "none"),
    ]
    question = "Which way does the shortest path to the flag begin?"
    asked += [("way", question, way), ("way", f"{world.goal}\n{question}", way)] * 2
    directions = tuple(COMPASS.values())
    asked += [("mission told", *play_shaped_question(world.goal, directions, way, draw))] * 8
    for direction, (dx, dy) in zip(DIRECTIONS, STEPS):
        tile = tile_name(lake, x + dx, y + dy)
        # A hole ends the episode, so it is asked about more often.
        count = 4 if tile == "hole" else 1
        asked += [("beside", f"What is {direction} of the agent?", tile)] * count
    column = draw(lake.ncol)
    row = draw(lake.nrow)
    asked.append(("at", f"What is at {column} {row}?", tile_name(lake, column, row)))
    return asked
