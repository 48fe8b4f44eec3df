"""
Read an old run as it was, and refuse what it did and this version can no longer do.

train.py had more keys once. A run with the values below continues to work, and other removed keys have no
effect on a trained run.
"""
import os

from safetensors import SafetensorError, safe_open

from configurator import WITH_CRITIC
from extras.flag_mistakes import ConfigError
from model import Q_WIDTH

# The value that always holds now, by what another value would change: how the run plays, what its critic's
# values mean, how it continues to learn.
REMOVED_KEYS = dict(
    play=dict(invalid="penalty"),
    report=dict(gamma_token=1.0, reward_scale=1.0, v_support=0.0, awr_temperature=0.3),
    resume=dict(
        lora_alpha=32,
        cql_coef=0.0,
        critic_detach=False,
        af_coef=1.0,
        lora_dropout=0.0,
        rollout_temperature=1.0,
        fbc_quantile=0.7,
        weights="auto",
    ),
)
# what each purpose depends on
DEPENDS_ON = dict(play=["play"], report=["play", "report"], resume=["play", "report", "resume"])

def check_removed_keys(run, saved, purpose):
    """Raise ConfigError if a run cannot do something as it did when it was trained.

    saved: the content of its config.json. purpose: "play", "report" or "resume".
    """
    has_critic = saved.get("actor_loss", "afsft") in WITH_CRITIC
    if purpose == "resume" and has_critic and saved.get("q_init", 0.0) is None:
        raise ConfigError(f"{run!r} has q_init=None, the lowest discounted return of its data, which this "
                          "version does not look for: use the commit that its meta.json names.")
    for kind in DEPENDS_ON[purpose]:
        for key, value in REMOVED_KEYS[kind].items():
            if saved.get(key, value) != value:
                raise ConfigError(f"{run!r} has {key}={saved[key]!r}, and this version always has {value!r}, "
                                  f"so the run would not {purpose} the same way: use the commit that its "
                                  "meta.json names.")

def renew_values(saved):
    """Write the values of an old run's config.json in place as this version writes them."""
    if saved.get("mdp") == "turn":
        # a key that has become a value of trace
        saved["trace"] = "turn"
    if saved.get("reward_clip") is None:
        saved["reward_clip"] = 0.0
    if saved.get("q_init", 0.0) is None:
        # where the critic began does not matter to one that is trained
        saved["q_init"] = 0.0
def keep_head_width(cfg, folder):
    """Let Q heads be built as narrow as a checkpoint's: once they were as wide as the model.

    cfg gets the attribute `q_width` if they are. A file that cannot be read is refused when it is loaded.
    """
    file = os.path.join(folder, "q_head.safetensors")
    try:
        with safe_open(file, "pt") as tensors:
            (width,) = tensors.get_slice("heads.0.mlp.1.bias").get_shape()
    except (OSError, SafetensorError, ValueError):
        return
    if width < Q_WIDTH:
        cfg.q_width = width
