"""
Read a run that may be old, damaged, or somebody else's: its settings and its tables.

Nothing in a run's files is trusted. The settings are checked like those of a command line. They name a model,
and a model may bring code, but only a flag of this command line lets it run, see extras/model_folders.py.
"""
import os
from types import SimpleNamespace

from configurator import ConfigError, check_config, finite, fit, is_number, parse_block
from extras.flag_mistakes import show
from extras.old_runs import check_removed_keys, renew_values
from extras.whole_files import read_json, write_json
from model import LORA_ALPHA

# the keys of a run, and their defaults
TRAIN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")

def read_run_config(run, purpose="play"):
    """Read the settings that a run was trained with; a key that the run did not know has its default.

    purpose: "play", "report" or "resume". ConfigError if an old run cannot do that any more as it did.
    """
    file = os.path.join(run, "config.json")
    if not os.path.exists(file):
        raise ConfigError(f"{run!r} is no run folder: it has no config.json; train one with python train.py "
                          f"config/numberline.py --out_dir={run}")
    saved = read_json(file)
    check_removed_keys(run, saved, purpose)
    renew_values(saved)
    settings = {}
    for name, key in parse_block(TRAIN).items():
        value = saved.get(name, key.default)
        settings[name] = fit(name, key, f"{file}: {name}={show(repr(value))}", lambda: checked(value))
    if purpose != "resume" and settings["device"] == "cuda":
        # a run from a GPU can be looked at on a machine without one
        settings["device"] = "auto"
    if purpose != "resume":
        # only updates are compiled
        settings["compile"] = False
    # an old run's adapter keeps its alpha
    alpha = saved.get("lora_alpha", LORA_ALPHA)
    if not is_number(alpha) or not 0 < alpha <= 1e6:
        raise ConfigError(f"{file}: lora_alpha={show(repr(alpha))}: it must be a number above 0.")
    return check_config(SimpleNamespace(**settings, lora_alpha=alpha))

def distrust(run_cfg, cfg):
    """Take what a stranger's run may not decide from evaluate.py's own command line -> the run's settings.

    Its config.json names a model, and a model may bring code: only the person at the keyboard lets it run.
    """
    run_cfg.trust_remote_code = cfg.trust_remote_code
    run_cfg.device = cfg.device or run_cfg.device
    return run_cfg

def write_eval(run, content):
    """Write a run's eval.json; a run that cannot be written is evaluated all the same."""
    file = os.path.join(run, "eval.json")
    try:
        write_json(file, content)
    except OSError as error:
        print(f"{file} is not written ({error.strerror}): the table is printed here only.")

def checked(value):
    """Return a value of a JSON file; ValueError for NaN and Infinity, which are no JSON."""
    return finite(value) if is_number(value) else value

def offline_results(run):
    """Read what a run with two phases reached before it played itself: {name: summary}, empty for others."""
    file = os.path.join(run, "eval_offline.json")
    if not os.path.exists(file):
        return {}
    return read_json(file)
