"""
Look at a run that somebody else may have trained: evaluate.py trusts none of its files.

Its settings are checked like those of a command line. They name a model, and the model may bring code, but
only this command line can give the permission to run it, see extras/model_folders.py.
"""
import os

from configurator import check_values, fit, parse_block
from extras.run_folder import TRAIN, write_json

def distrust(run_cfg, run, cfg):
    """Check the settings of a run, take permission and device from evaluate.py's own -> the run's settings.

    ConfigError if a value is not one that train.py takes.
    """
    for name, key in parse_block(TRAIN).items():
        value = getattr(run_cfg, name)
        where = f"{os.path.join(run, 'config.json')}: {name}={value!r}"
        setattr(run_cfg, name, fit(name, key, where, lambda: value))
    check_values(run_cfg)
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
