"""
Environments of gymnasium: a wrapper for any of them, FrozenLake, and the levels of BabyAI.

FrozenLake is the example to copy. An environment needs a name, a goal, the names of gymnasium's actions and
the id of the game. `fingerprint()` decides which starts are held out, `expert()` serves the scripted players.
"""
import contextlib, difflib, io, os, zlib

from PIL import Image

from envs import Env, Words
from worlds.optional import require

MAX_SEED = 2**31

# BabyAI's bot needs at most 8 searches to plan one turn. With more than 100 it goes in circles.
MAX_BOT_SEARCHES = 100
MAX_BOT_RESTARTS = 5

class Gym(Env):
    """Wrap a gymnasium environment that draws pictures and has named actions.

    The picture is what render() returns. The words of `kinds` name the actions 0, 1, ... in this order.
    """

    id = ""
    settings = {}  # more arguments of gymnasium.make

    def __init__(self, **kw):
        super().__init__(**kw)
        # Some games are drawn by pygame, which would otherwise swallow the signal of `kill`.
        os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")
        self.open()

    def open(self, **settings):
        """Make the gymnasium environment, with `settings` beside those of the class."""
        self.gym = require(self.name, "gymnasium").make(
            self.id,
            render_mode="rgb_array",
            disable_env_checker=True,
            **self.settings,
            **settings,
        )

    def start(self):
        self.gym.reset(seed=int(self.rng.integers(MAX_SEED)))

    def act(self, action):
        index = self.words().index(action[0])
        _, reward, terminated, truncated, _ = self.gym.step(index)
        self.success = bool(terminated and reward > 0)
        return float(reward), bool(terminated), bool(truncated)

    def picture(self):
        image = Image.fromarray(self.gym.render())
        if image.size == (self.size, self.size):
            return image
        return image.resize((self.size, self.size), Image.LANCZOS)

    def fingerprint(self):
        """Return a checksum of the picture.

        Override this where the picture does not show the whole state.
        """
        return str(zlib.crc32(self.gym.render().tobytes()))

class FrozenLake(Gym):
    """Walk from the upper left corner to the flag in the lower right one, around the holes.

    This is gymnasium's game without slipping. Every episode has a new random map of 4 x 4 tiles.
    """

    name = "FrozenLake"
    goal = "Walk over the ice to the flag, not into a hole."
    kinds = (Words("left", "down", "right", "up"),)
    example = "right"
    max_turns = 20
    id = "FrozenLake-v1"

    def start(self):
        frozen_lake = require(self.name, "gymnasium.envs.toy_text.frozen_lake")
        map_seed = int(self.rng.integers(MAX_SEED))
        self.open(is_slippery=False, desc=frozen_lake.generate_random_map(4, seed=map_seed))
        super().start()

    def fingerprint(self):
        """Return the map, as text."""
        return b"".join(self.gym.unwrapped.desc.ravel()).decode()

    def neighbour(self, tile, action):
        """Return (tile, reward, terminated) after the action with this index on a tile."""
        # The lake is not slippery: an action has exactly one outcome.
        [(_, after, reward, terminated)] = self.gym.unwrapped.P[tile][action]
        return after, reward, terminated

    def shortest_way(self, tile):
        """Return the actions of a shortest way from a tile to the flag, None if there is none."""
        ways = [(tile, [])]
        visited = {tile}
        # A breadth-first search: the list grows while the loop runs over it.
        for here, actions in ways:
            for index, word in enumerate(self.words()):
                after, reward, terminated = self.neighbour(here, index)
                if reward:
                    return [*actions, word]
                if not terminated and after not in visited:
                    visited.add(after)
                    ways.append((after, [*actions, word]))
        return None

    def expert(self):
        return self.shortest_way(self.gym.unwrapped.s)[0]

    def optimal(self, word):
        """Tell whether an action begins a shortest way; there may be several."""
        tile = self.gym.unwrapped.s
        after, reward, terminated = self.neighbour(tile, self.words().index(word))
        if terminated:
            return bool(reward)
        return len(self.shortest_way(after)) < len(self.shortest_way(tile))

class BotInCircles(Exception):
    """Say that BabyAI's bot would plan for ever."""

class BabyAI(Gym):
    """Play any BabyAI level (package minigrid): "BabyAI-GoToLocal-v0" or "BabyAI-GoToLocal-v0:view".

    Without :view the picture is the whole map. With :view it is what the agent sees: 7 x 7 cells in front of
    it, each as large as in the map of a room of 8 x 8 cells. The text then lists the last actions. It also
    names what the agent carries. The reward at the goal is 1 - 0.9 * step / limit. An episode ends at the
    level's own limit, or at max_turns if that is less.
    """

    kinds = (Words("turn left", "turn right", "go forward", "pick up", "drop", "toggle"),)
    example = "go forward"

    def __init__(self, name, **kw):
        self.name = name
        self.id, _, option = name.partition(":")
        self.is_view = option == "view"
        self.settings = {"agent_pov": self.is_view}
        # Importing minigrid registers its levels in gymnasium.
        require(name, "minigrid")
        levels = require(name, "gymnasium").registry
        if self.id not in levels or option not in ("", "view"):
            known = [level for level in levels if level.startswith("BabyAI-")]
            near = ", ".join(difflib.get_close_matches(self.id, known, n=2, cutoff=0))
            raise ValueError(f"env={name!r} is unknown; nearest: {near}; a level's name, with :view behind "
                             "it for what the agent sees.")
        super().__init__(**kw)
        self.turn_limit = kw.get("max_turns") or 10**9
        self.level = self.gym.unwrapped
        cells = 8
        if not self.is_view:
            cells = max(self.level.width, self.level.height)
        self.level.tile_size = max(4, self.size // cells)

    def start(self):
        """Draw a level with self.rng, and forget the actions and the bot of the last episode."""
        # minigrid prints the levels that it rejects.
        with contextlib.redirect_stdout(io.StringIO()):
            super().start()
        self.goal = self.level.mission
        self.max_turns = min(self.turn_limit, self.level.max_steps)
        self.past_actions = []
        self.bot = None
        self.bot_restarts = 0
        # The action that the bot would play in this state. None until the bot is asked.
        self.bot_action = None

    def act(self, action):
        """Play an action, and note whether it changed anything."""
        # The bot plans with what it has observed, so it has to see every state.
        if self.bot:
            self.expert()
        self.bot_action = None
        self.last_action = self.words().index(action[0])
        before = self.level.hash(32)
        outcome = super().act(action)
        is_in_vain = self.level.hash(32) == before
        self.past_actions.append(action[0] + (" in vain" if is_in_vain else ""))
        return outcome

    def text(self):
        """Return what the picture does not show: the last actions of a partial view, the carried object.

        An agent that sees a part only has to remember where it has looked: three turns to one side show all
        four directions.
        """
        lines = []
        if self.is_view and self.past_actions:
            lines.append(f"Last actions: {', '.join(self.past_actions[-3:])}")
        carried = self.level.carrying
        if carried:
            lines.append(f"Carrying: {carried.color} {carried.type}")
        return "\n".join(lines)

    def picture(self):
        if not self.is_view:
            return super().picture()
        return Image.fromarray(self.gym.render()).crop((0, 0, self.size, self.size))

    def fingerprint(self):
        """Return the mission and a hash of the grid, the agent's place and its direction."""
        return f"{self.goal} {self.level.hash(32)}"

    def expert(self):
        """Return the action of minigrid's bot, from any state and after moves of other players.

        The moves of others, or its own bugs, can make the bot fail. Then a new bot takes over. After too
        many failures, or if the bot goes in circles, the episode is `lost` and the example action returned.
        """
        while self.bot_action is None and not self.lost:
            try:
                self.bot_action = self.ask_bot()
            except BotInCircles:
                self.lost = "BabyAI's bot goes in circles"
            except Exception as error:
                # An assertion, an opened box, or action 6, which has no word: the bot believes it is done.
                self.bot = None
                self.bot_restarts += 1
                if self.bot_restarts > MAX_BOT_RESTARTS:
                    self.lost = f"BabyAI's bot gave up ({type(error).__name__})"
        return self.bot_action or self.example

    def ask_bot(self):
        """Return the bot's action in this state; raise BotInCircles, or whatever the bot raises."""
        if self.bot is None:
            self.start_bot()
        self.bot_searches = 0
        return self.words()[self.bot.replan(self.last_action)]

    def start_bot(self):
        """Make a new bot and count its searches.

        A new bot knows no earlier action. Without the count, `replan` may never return.
        """
        self.bot = require(self.name, "minigrid.utils.baby_ai_bot").BabyAIBot(self.level)
        self.last_action = None
        search = self.bot._breadth_first_search

        def counted_search(*args, **kw):
            self.bot_searches += 1
            if self.bot_searches > MAX_BOT_SEARCHES:
                raise BotInCircles
            return search(*args, **kw)

        self.bot._breadth_first_search = counted_search
