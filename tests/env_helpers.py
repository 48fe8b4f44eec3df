"""
Helpers that the tests of the environments share: games in positions set by hand, scripted episodes.
"""
import numpy as np

from envs import MARKER
from worlds.players import scripted_reply
from worlds.registry import make

GAMES = ["NumberLine", "EZPoints", "Points24", "Blackjack"]

def fresh(name, seed=0, **state):
    """Make a game, begin an episode and set some of its state by hand."""
    env = make(name)
    env.reset(seed=seed)
    for key, value in state.items():
        assert hasattr(env, key)
        setattr(env, key, value)
    return env

def say(env, *actions):
    """Play actions and return (reward, terminated, truncated, info) of the last one."""
    for action in actions:
        out = env.step(f"{MARKER} {action}")
    return out[1:]

def play_games(env, player, rng, episodes, seed=0, **options):
    """Return (returns, successes, successes by return, turns) of a scripted player, an array each."""
    rows = []
    for i in range(episodes):
        env.reset(seed=seed if i == 0 else None, **options)
        over = False
        total = 0
        while not over:
            _, reward, terminated, truncated, info = env.step(scripted_reply(player, env, rng))
            over = terminated or truncated
            total += reward
        rows.append((total, info["success"], info["success_return"], env.turns))
        assert info["success_return"] == (total > 0)
    return np.array(rows, float).T

def episode_log(name, seed):
    """Return all that happens in four episodes of random play."""
    env = make(name)
    rng = np.random.default_rng(5)
    log = []
    for i in range(4):
        obs, _ = env.reset(seed=seed if i == 0 else None)
        over = False
        while not over:
            log.append((obs["image"].tobytes(), obs["text"]))
            obs, reward, terminated, truncated, info = env.step(scripted_reply("random", env, rng))
            log.append((reward, terminated, truncated, str(info)))
            over = terminated or truncated
    return log

def walk(name, n, seed=0):
    """Yield (env, rng) in n states of a game, as random and expert moves reach them."""
    env = make(name)
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    over = True
    for _ in range(n):
        if over:
            env.reset()
        yield env, rng
        player = ["random", "expert"][rng.integers(2)]
        _, _, terminated, truncated, _ = env.step(scripted_reply(player, env, rng))
        over = terminated or truncated

def count_changed_pixels(env, **state):
    """Count the pixels that change clearly when a piece of the state does; the state is put back."""
    before = env.picture()
    saved = {key: getattr(env, key) for key in state}
    for key, value in state.items():
        setattr(env, key, value)
    after = env.picture()
    for key, value in saved.items():
        setattr(env, key, value)
    difference = np.asarray(before).astype(int) - np.asarray(after)
    return int((abs(difference).max(-1) > 60).sum())
