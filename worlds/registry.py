"""
Environments by name.
"""
import difflib
import importlib
import importlib.util
import os

from envs import Env

WORLDS = {
    "NumberLine": "envs:NumberLine",
    "EZPoints": "worlds.cards:EZPoints",
    "Points24": "worlds.cards:Points24",
    "Blackjack": "worlds.cards:Blackjack",
    "FrozenLake": "worlds.gym:FrozenLake",
}
# families: the rest of the name says which level or which page
FAMILIES = {"BabyAI-": "worlds.gym:BabyAI", "miniwob/": "worlds.miniwob:MiniWoB"}
# questions with right answers, for pre-training: about the card games, or about the world named behind a colon
QUESTIONS = {
    name: f"pretrain.questions:{name}" for name in ("Reading", "Captions", "Finding", "Facing", "Leading")
}


class Tasks:
    """Several environments behind one: each episode is the next one's, or the one's that options={"task": i} names (modulo their number)."""
    def __init__(self, tasks):
        self.tasks, self.task, self.env = tasks, -1, tasks[0]
        self.split, self.max_parallel = any(t.split for t in tasks), min((t.max_parallel for t in tasks if t.max_parallel), default=None)
    def reset(self, seed=None, options=None):
        self.task = (options or {}).get("task", self.task + 1) % len(self.tasks)
        self.env = self.tasks[self.task]
        return self.env.reset(seed, options)
    def __getattr__(self, key): return getattr(self.env, key)       # all else is the present one's


def load_class(path):
    """Import "module:Class"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def load_file(file, name):
    """Import the class `name` of a Python file; the file is run. SystemExit with one sentence where that does not work."""
    where = f"env={f'{file}:{name}'!r}"
    if not os.path.isfile(file):
        raise SystemExit(f"{where}: there is no file {file!r} here; write --env=my_env.py:MyEnv.")
    spec = importlib.util.spec_from_file_location(os.path.basename(file).removesuffix(".py"), file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SystemExit(f"{where}: {file} does not run ({type(error).__name__}: {error}): correct it first.")
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Env)):
        classes = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, Env) and v is not Env]
        raise SystemExit(
            f"{where}: {file} has no class {name!r} that is an envs.Env; it has: {', '.join(classes) or 'none'}."
        )
    return found


def is_file(name):
    """Tell whether an environment is named by a Python file: my_env.py:MyEnv."""
    return name.rpartition(":")[0].endswith(".py") or name.endswith(".py")


def make(name, **kw):
    """Make an environment from its name, or several played in turn: make("NumberLine,EZPoints").

    kw: size, penalty, max_turns. A name is a key of WORLDS, a level or page of a FAMILY, QUESTIONS about one of these
    (Reading:BabyAI-GoToLocal-v0), or a class in a file of the user's (my_env.py:MyEnv), which is run.
    ValueError for an unknown name, SystemExit for a missing package or a bad file; one sentence each.
    """
    if "," in name:
        return Tasks([make(part.strip(), **kw) for part in name.split(",") if part.strip()])
    if is_file(name):
        file, _, cls = name.rpartition(":")
        return load_file(file, cls)(**kw)
    kind, _, about = name.partition(":")
    if kind in QUESTIONS:
        world = make(about, size=kw.get("size", 80)) if about else None
        return load_class(QUESTIONS[kind])(world, **kw)
    for prefix, path in FAMILIES.items():
        if name.startswith(prefix):
            return load_class(path)(name, **kw)
    if name in WORLDS:
        return load_class(WORLDS[name])(**kw)
    near = ", ".join(difflib.get_close_matches(name, WORLDS, n=2, cutoff=0))
    known = ", ".join(WORLDS)
    raise ValueError(
        f"env={name!r} is unknown; nearest: {near}; "
        f"known: {known}, BabyAI-GoToLocal-v0, miniwob/click-test-v1, my_env.py:MyEnv, ..."
    )


def reading_names(env):
    """Names of the Reading environments whose texts fit the tasks of `env`, each once: 'Captions:FrozenLake' -> ['Reading:FrozenLake']."""
    names = []
    for task in env.split(","):
        kind, colon, about = task.strip().partition(":")
        if kind in QUESTIONS:
            names.append("Reading" + colon + about)
    return list(dict.fromkeys(names or ["Reading"]))
