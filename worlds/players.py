"""
Scripted players: expert, random, malformed, biased, and mixtures of them, to record data of any quality.
"""
import numpy as np

from envs import MARKER, Env

# The players that ask an expert().
NEED_EXPERT = ("expert", "biased")

def has_expert(env):
    """Tell whether an environment, each of them if it stands for several, defines expert()."""
    tasks = getattr(env, "tasks", [env])
    return all(getattr(task.expert, "__func__", None) is not Env.expert for task in tasks)

def wrong_word(env):
    """Return an action that is not optimal: the first one behind the expert's in the list of all actions.

    In one state it is always the same one. Where every action is optimal, return the expert's.
    """
    right = env.expert()
    words = env.words()
    after = 0
    if right in words:
        after = words.index(right) + 1
    for word in words[after:] + words[:after]:
        if not env.optimal(word):
            return word
    return right

def malformed_reply(env, word, rng):
    """Return a reply that does not parse, made from the valid action `word` in one of several ways."""
    broken = [word, f"[act] {word}", f"move {word}", MARKER]
    broken += [f"{MARKER} go", f"action: {word}", f"{MARKER} {word} {word}", f"{MARKER}\n{word}"]
    # What is broken for one environment may be valid for another.
    for i in rng.permutation(len(broken)):
        if env.parse(broken[i]) is None:
            return broken[i]
    return ""

def scripted_reply(player, env, rng):
    """Return one reply of a scripted player; ValueError for an unknown one.

    expert: the best action. random: any valid action. malformed: a reply that does not parse.
    biased: seven times in ten a wrong action, the same one at every visit of a state, otherwise the best one:
    an agent that clones the most frequent action always fails. SystemExit if expert or biased needs an
    expert() that the environment does not define.
    """
    prefix = f"{MARKER} " if env.marker else ""
    # Drawn whether the player uses it or not, so that recorded data stay the same.
    word = env.sample(rng)
    if player == "random":
        return prefix + word
    if player == "malformed":
        return malformed_reply(env, word, rng)
    if player == "expert":
        return prefix + env.expert()
    if player == "biased":
        if rng.random() < 0.3:
            return prefix + env.expert()
        return prefix + wrong_word(env)
    raise ValueError(f"player={player!r} is unknown; known are expert, random, biased, malformed.")

def mixed_reply(mix, env, rng):
    """Return (reply, player) of a player drawn anew each turn, with odds like {"expert": 1, "biased": 3}."""
    shares = np.array(list(mix.values()), float)
    player = list(mix)[rng.choice(len(mix), p=shares / shares.sum())]
    return scripted_reply(player, env, rng), player
