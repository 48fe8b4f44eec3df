"""
Environments by name: `make("NumberLine")`, `make("NumberLine,EZPoints")`, `make("my_env.py:MyEnv")`.

WORLDS, FAMILIES and QUESTIONS map names to "module:Class" strings. A module is imported when one of its
environments is made, so that nobody needs the optional packages of the others.
"""
import difflib, importlib
import importlib.util
import os, sys

from envs import Env
from worlds.guard import describe_error

WORLDS = {
    "NumberLine": "envs:NumberLine",
    "EZPoints": "worlds.cards:EZPoints",
    "Points24": "worlds.cards:Points24",
    "Blackjack": "worlds.cards:Blackjack",
    "FrozenLake": "worlds.gym:FrozenLake",
}
# Prefixes; the rest of the name is a level or a page.
FAMILIES = {
    "BabyAI-": "worlds.gym:BabyAI",
    "miniwob/": "worlds.miniwob:MiniWoB",
}
# Questions with right answers, for pre-training. "Reading" is about the card games, "Reading:FrozenLake" is
# about the world behind the colon.
QUESTIONS = {
    "Reading": "pretrain.questions:Reading",
    "Captions": "pretrain.questions:Captions",
    "Finding": "pretrain.questions:Finding",
    "Facing": "pretrain.questions:Facing",
    "Leading": "pretrain.questions:Leading",
}

# What a class in a file of the user must define. Its goal and its example may differ from state to state.
REQUIRED_METHODS = ("start", "act", "picture", "fingerprint")
REQUIRED_ATTRIBUTES = ("name", "kinds")

class Tasks:
    """Several environments behind one: each episode is an episode of the next one.

    reset(options={"task": i}) chooses number i, modulo how many there are. Everything else is passed on to
    the environment of the present episode.
    """

    def __init__(self, tasks):
        self.tasks = tasks
        self.task = -1
        self.env = tasks[0]
        self.split = any(task.split for task in tasks)
        self.online = all(task.online for task in tasks)
        limits = [task.max_parallel for task in tasks if task.max_parallel]
        self.max_parallel = min(limits, default=None)

    def reset(self, seed=None, options=None):
        number = (options or {}).get("task", self.task + 1)
        self.task = number % len(self.tasks)
        self.env = self.tasks[self.task]
        return self.env.reset(seed, options)

    def __getattr__(self, key):
        return getattr(self.env, key)

def load_class(path):
    """Import "module:Class"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


# ---- environments in files of the user ----

def is_file(name):
    """Tell whether a name leads to a Python file: my_env.py:MyEnv."""
    return name.rpartition(":")[0].endswith(".py") or name.endswith(".py")

def run_file(file, where):
    """Run a Python file, once in a process, and return its module.

    SystemExit with one sentence if there is no such file or it does not run; it begins with `where`.
    """
    # The full path is the module's name: sys.modules is the cache, classes in the file find their module
    # there (dataclasses look it up), and no other module is hidden.
    path = os.path.abspath(file)
    if path in sys.modules:
        return sys.modules[path]
    if not os.path.isfile(path):
        raise SystemExit(f"{where}: there is no file {file!r} here; write --env=my_env.py:MyEnv.")
    spec = importlib.util.spec_from_file_location(path, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path] = module
    # `import helper` finds helper.py beside the file; what this project and Python have comes first
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[path]
        reason = describe_error(error, path)
        raise SystemExit(f"{where}: {file} does not run ({reason}): correct it first.")
    return module

def load_file(file, name):
    """Run a Python file and return its class `name`, which must be an envs.Env and leave nothing open.

    SystemExit with one sentence if that does not work.
    """
    where = f"env={f'{file}:{name}'!r}"
    module = run_file(file, where)
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [value for value in vars(module).values() if isinstance(value, type)]
        here = [cls.__name__ for cls in classes if issubclass(cls, Env) and cls.__module__ == module.__name__]
        raise SystemExit(f"{where}: {file} has no class {name!r}; it has: {', '.join(here) or 'none'}.")
    if not issubclass(found, Env):
        raise SystemExit(f"{where}: {name} is no envs.Env: write class {name}(Env) instead.")
    for method in REQUIRED_METHODS:
        if getattr(found, method) is getattr(Env, method):
            raise SystemExit(f"{where}: {name} does not define {method}(): see the docstring of envs.Env.")
    return found

def make_from_file(name, **kw):
    """Make the environment that my_env.py:MyEnv names; SystemExit with one sentence if that does not work."""
    file, _, class_name = name.rpartition(":")
    if name.endswith(".py") or not class_name:
        file = name.rstrip(":")
        raise SystemExit(f"env={name!r} names no class of the file: write --env={file}:MyEnv.")
    env_class = load_file(file, class_name)
    try:
        env = env_class(**kw)
    except (Exception, SystemExit) as error:
        reason = describe_error(error)
        settings = ", ".join(kw)
        raise SystemExit(f"env={name!r}: {class_name}({settings}) fails ({reason}): correct its __init__.")
    for attribute in REQUIRED_ATTRIBUTES:
        if not getattr(env, attribute):
            raise SystemExit(f"env={name!r}: {class_name} has no {attribute}: see the docstring of envs.Env.")
    return env


# ---- any environment ----

def task_names(env):
    """Split the name of an environment into the names of its tasks."""
    return [task.strip() for task in env.split(",")]

def make(name, **kw):
    """Make an environment from its name, or several that take turns: make("NumberLine,EZPoints").

    kw: size, penalty, max_turns. A name is a key of WORLDS, a level or page of one of the FAMILIES, QUESTIONS
    about one of these (Reading:BabyAI-GoToLocal-v0), or a class in a file, which is run (my_env.py:MyEnv).
    ValueError for an unknown name, SystemExit for a missing package or a bad file; one sentence each.
    """
    if "," in name:
        return Tasks([make(task, **kw) for task in task_names(name) if task])
    kind, _, about = name.partition(":")
    if kind in QUESTIONS:
        world = None
        if about:
            world = make(about, size=kw.get("size", 80))
        return load_class(QUESTIONS[kind])(world, **kw)
    if is_file(name):
        return make_from_file(name, **kw)
    for prefix, path in FAMILIES.items():
        if name.startswith(prefix):
            return load_class(path)(name, **kw)
    if name in WORLDS:
        return load_class(WORLDS[name])(**kw)
    near = ", ".join(difflib.get_close_matches(name, WORLDS, n=2, cutoff=0))
    known = ", ".join(WORLDS)
    raise ValueError(f"env={name!r} is unknown; nearest: {near}; known: {known}, BabyAI-GoToLocal-v0, "
                     "miniwob/click-test-v1, my_env.py:MyEnv, ...")

def reading_names(env):
    """List the Reading environments whose texts fit the tasks of `env`, each once.

    "Captions:FrozenLake" -> ["Reading:FrozenLake"]
    """
    names = []
    for task in task_names(env):
        kind, colon, about = task.partition(":")
        if kind in QUESTIONS:
            names.append("Reading" + colon + about)
    return list(dict.fromkeys(names or ["Reading"]))
