"""
Environments of gymnasium: any with a picture and named actions, FrozenLake, BabyAI's levels.
"""
import contextlib, difflib, io, os, zlib

from PIL import Image

from envs import Env, Words, require

class Gym(Env):
    """Any gymnasium environment with a picture and named actions: render() is the picture, the words of `kinds` are the actions 0, 1, ..."""
    id, settings = "", {}           # what goes to gymnasium.make, beside the render mode
    def __init__(self, **kw):
        super().__init__(**kw)
        os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")        # else pygame, which draws some of them, swallows `kill`
        self.open()
    def open(self, **settings):
        self.gym = require(self.name, "gymnasium").make(self.id, render_mode="rgb_array", disable_env_checker=True, **self.settings, **settings)
    def start(self): self.gym.reset(seed=int(self.rng.integers(2 ** 31)))
    def act(self, action):
        _, reward, terminated, truncated, _ = self.gym.step(self.words().index(action[0]))
        self.success = bool(terminated and reward > 0)
        return float(reward), bool(terminated), bool(truncated)
    def picture(self):
        image = Image.fromarray(self.gym.render())
        return image if image.size == (self.size, self.size) else image.resize((self.size, self.size), Image.LANCZOS)
    def fingerprint(self): return str(zlib.crc32(self.gym.render().tobytes()))      # right where the picture shows the whole state

class FrozenLake(Gym):
    """Gymnasium's frozen lake, not slippery, on a map that is dealt anew: from the upper left corner to the flag in the lower right one."""
    name, goal, example = "FrozenLake", "Walk over the ice to the flag, not into a hole.", "right"
    kinds, max_turns, id = (Words("left", "down", "right", "up"),), 20, "FrozenLake-v1"

    def start(self):                                    # draws a start state with self.rng
        draw = require(self.name, "gymnasium.envs.toy_text.frozen_lake").generate_random_map
        self.open(is_slippery=False, desc=draw(4, seed=int(self.rng.integers(2 ** 31))))
        super().start()

    def fingerprint(self):                              # what was dealt: decides which starts are held out
        return b"".join(self.gym.unwrapped.desc.ravel()).decode()

    def way(self, state):                               # the shortest one to the flag, in words
        ways, seen = [(state, [])], {state}
        for state, words in ways:
            for i, word in enumerate(self.words()):
                [(_, after, reward, over)] = self.gym.unwrapped.P[state][i]
                if reward:
                    return [*words, word]
                if not over and after not in seen:
                    seen.add(after)
                    ways.append((after, [*words, word]))

    def expert(self): return self.way(self.gym.unwrapped.s)[0]
    def optimal(self, word):                            # several ways may be as short
        [(_, after, reward, over)] = self.gym.unwrapped.P[self.gym.unwrapped.s][self.words().index(word)]
        return bool(reward) or not over and len(self.way(after)) < len(self.way(self.gym.unwrapped.s))

class BabyAI(Gym):
    """Any BabyAI level (package minigrid): "BabyAI-GoToLocal-v0" shows the whole map, "BabyAI-GoToLocal-v0:view" what the agent sees,
    7 x 7 cells in front of it, each as large as in the map of a room of 8 x 8, and says what it did last. What the agent carries is said, too. Reward 1 - 0.9 * step / limit at the goal; an episode ends at the level's own limit, or at max_turns if that is less."""
    kinds, example = (Words("turn left", "turn right", "go forward", "pick up", "drop", "toggle"),), "go forward"
    def __init__(self, name, **kw):
        self.name, (self.id, _, way) = name, name.partition(":")
        require(name, "minigrid")
        self.settings = dict(agent_pov=way == "view")
        gym = require(name, "gymnasium")
        if self.id not in gym.registry or way not in ("", "view"):
            near = difflib.get_close_matches(self.id, [i for i in gym.registry if i.startswith("BabyAI-")], n=2, cutoff=0)
            raise ValueError(f"env={name!r} is unknown; nearest: {', '.join(near)}; a level's name, with :view behind it for what the agent sees.")
        super().__init__(**kw)
        self.level, self.limit = self.gym.unwrapped, kw.get("max_turns") or 10 ** 9
        self.level.tile_size = max(4, self.size // (8 if way else max(self.level.width, self.level.height)))
    def start(self):
        with contextlib.redirect_stdout(io.StringIO()):             # minigrid prints the levels that it rejects
            super().start()
        self.goal, self.max_turns, self.bot, self.hint, self.renewed, self.done = self.level.mission, min(self.limit, self.level.max_steps), None, None, 0, []
    def act(self, action):
        if self.bot:
            self.expert()                                           # the bot plans by what it has seen: it has to see every state
        self.last, self.hint, before = self.words().index(action[0]), None, self.level.hash(32)
        out = super().act(action)
        self.done.append(action[0] + " in vain" * (self.level.hash(32) == before))
        return out
    def text(self):             # who sees but a part has to remember where it has looked: three turns to one side show all four; and what is carried stands on no map
        held, done = self.level.carrying, self.done[-3:] if self.settings["agent_pov"] else []
        return "\n".join(filter(None, [done and f"Last actions: {', '.join(done)}", held and f"Carrying: {held.color} {held.type}"]))
    def picture(self):
        return Image.fromarray(self.gym.render()).crop((0, 0, self.size, self.size)) if self.settings["agent_pov"] else super().picture()
    def fingerprint(self): return f"{self.goal} {self.level.hash(32)}"      # of the grid, the agent's place and direction
    def expert(self):
        """minigrid's bot, from any state and after moves that were not its own. What others did, or its bugs, can bring it to its wits' end: then a new one
        takes over, five times an episode, or the episode is lost. A plan can go in circles for ever: it needs at most 8 searches a turn, 100 are too many."""
        while self.hint is None and not self.lost:
            try:
                if self.bot is None:
                    self.bot, self.last = require(self.name, "minigrid.utils.baby_ai_bot").BabyAIBot(self.level), None
                    search = self.bot._breadth_first_search
                    self.bot._breadth_first_search = lambda *args, **kw: (next(self.searches), search(*args, **kw))[1]
                self.searches = iter(range(100))
                self.hint = self.words()[self.bot.replan(self.last)]            # IndexError: 6, it believes that it is done
            except StopIteration:
                self.lost = "BabyAI's bot goes in circles"
            except Exception as error:                                          # an assertion, an opened box
                self.bot, self.renewed = None, self.renewed + 1
                self.lost = f"BabyAI's bot gave up ({type(error).__name__})" if self.renewed > 5 else ""
        return self.hint or self.example

