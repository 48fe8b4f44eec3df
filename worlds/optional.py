"""
Import optional packages, see requirements-envs.txt.
"""
import importlib, os

from worlds.contract import Unplayable

def require(env, package):
    """Import an optional package for an environment; Unplayable, with one sentence, if it is missing."""
    # Pictures only: no window, no sound, no greeting on the console.
    os.environ.update(PYGAME_HIDE_SUPPORT_PROMPT="1", SDL_VIDEODRIVER="dummy", SDL_AUDIODRIVER="dummy")
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = error.name or package
        raise Unplayable(f"env={env!r} needs the package {missing}: pip install -r requirements-envs.txt")
