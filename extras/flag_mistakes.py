"""
Say in one sentence what is wrong with a word of a command line; configurator.py calls this.
"""
import difflib, os

# A text processor makes one dash of two, en or em.
DASHES = "-\u2013\u2014"

# What other programs call train.py's keys. A synonym is suggested, it never works.
SYNONYMS = {
    "out_dir": "output_dir save_dir run_dir log_dir",
    "log_interval": "logging_steps log_freq log_every",
    "eval_interval": "eval_steps eval_freq eval_every save_steps save_interval",
    "model": "model_name model_name_or_path model_id base_model",
    "dtype": "bf16 fp16 precision mixed_precision torch_dtype",
    "shard": "fsdp deepspeed",
    "lora_r": "lora_rank rank peft use_lora",
    "lora_targets": "target_modules",
    "env": "env_id environment task game",
    "max_turns": "max_episode_steps horizon",
    "data": "dataset data_path",
    "actor_loss": "loss algo algorithm method",
    "beta": "advantage_threshold threshold",
    "gamma": "discount discount_factor",
    "lam": "lambda gae_lambda td_lambda",
    "target_tau": "tau polyak ema",
    "offline_updates": "epochs num_epochs num_train_epochs steps max_iters updates",
    "online_updates": "epochs num_epochs num_train_epochs total_timesteps updates",
    "batch_size": "bs train_batch_size",
    "micro_batch": "per_device_train_batch_size gradient_accumulation_steps",
    "lr": "learning_rate actor_lr",
    "critic_lr": "value_lr",
    "grad_clip": "max_grad_norm gradient_clipping",
    "replay_episodes": "buffer_size replay_size",
    "explore": "epsilon exploration",
}

# Keys that train.py once had, and what holds now.
REMOVED = {
    "af_coef": "filtered cloning has the weight 1, bc_coef adds plain cloning",
    "awr_temperature": "it is the constant AWR_TEMPERATURE in agent_rl.py",
    "cache_mb": "encoded prompts may take 4096 MiB",
    "ckpt_interval": "eval_interval serves both: a checkpoint is written at every short evaluation",
    "cql_coef": "pess_coef holds unseen tokens down",
    "critic_detach": "the critic always trains the adapters too, critic_coef weighs it",
    "eval_quick": "short evaluations play min(60, eval_episodes) episodes",
    "fbc_quantile": "it is the constant FBC_QUANTILE in agent_rl.py",
    "gamma_token": "gamma discounts turns, tokens are not discounted",
    "invalid": "an invalid reply is always answered with the reward `penalty`",
    "lora_alpha": "it is always 32",
    "lora_dropout": "it is always 0",
    "mdp": "trace='turn' is what mdp='turn' was",
    "reference": "published numbers are in docs/results.md",
    "reward_scale": "reward_clip bounds the rewards that the critic sees",
    "rollout_temperature": "rollouts sample at temperature 1, explore adds random turns",
    "timeout": "ranks wait 30 minutes for each other",
    "v_support": "V always sums over the whole vocabulary, pess_coef holds unseen tokens down",
    "wandb_project": "the environment variable WANDB_PROJECT switches Weights & Biases on",
    "weight_decay": "it is 0.01 where lora_r=0, and 0 with adapters",
    "weights": "a frozen base is bfloat16 on cuda unless dtype='float32'",
}

class ConfigError(SystemExit):
    """A user's mistake, as one sentence: Python prints it on stderr, exits with 1, and shows no traceback."""

    def __init__(self, sentence):
        super().__init__(show(sentence, width=1000))

def show(text, width=100):
    """Write a text on one line of ASCII, cut at a width: the logs of a cluster are not all UTF-8."""
    line = " ".join(text.split())
    line = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in line)
    if len(line) > width:
        return line[: width - 3] + "..."
    return line

def nearest(word, names, otherwise="--help lists all keys"):
    """Suggest up to three names that look like a word; return `otherwise` if none does."""
    close = difflib.get_close_matches(word.lower().replace("-", "_"), names, n=3, cutoff=0.5)
    if close:
        return f"nearest: {', '.join(close)}"
    return otherwise

def nearest_key(name, block):
    """Suggest keys of a block for a wrong name, by its meaning or else by its spelling."""
    word = name.lower().replace("-", "_")
    found = [key for key, synonyms in SYNONYMS.items() if key in block and word in synonyms.split()]
    if found and word not in block:
        return f"nearest: {', '.join(found)}"
    return nearest(name, block)

def unknown_key(where, name, block):
    """Return the ConfigError for a name that is no key; it starts with `where`, the user's own words."""
    is_train = "actor_loss" in block
    if is_train and name in REMOVED:
        return ConfigError(f"{where}: {name} was removed, {REMOVED[name]}; see docs/method.md.")
    return ConfigError(f"{where}: there is no key {name}; {nearest_key(name, block)}.")

def missing_value(argv, i, name, default):
    """Return the ConfigError for the flag argv[i] without a value; the next word may be the value."""
    after = ""
    if i + 1 < len(argv) and not argv[i + 1].startswith("--"):
        after = argv[i + 1].lstrip("=")
    words = f"{show(argv[i])} {after}".strip()
    value = after or show(repr(default))
    return ConfigError(f"{words}: {name} has no value, write --{name}={value}.")

def check_file_word(argv, i, block, files):
    """Raise a ConfigError if argv[i] cannot name a config file: it is a bad flag, or comes after a flag."""
    word = argv[i]
    shown = show(word) or "''"
    before = show(argv[i - 1]) if i else ""
    flags = [flag for flag in argv[:i] if flag.startswith("--")]
    name, equals, text = word.lstrip(DASHES).partition("=")

    if word.startswith("-") or (equals and not os.path.isfile(word)):
        flag = f"--{name or 'key'}"
        hint = ""
        # `--resume =true` has one space too many
        if flags and not name:
            flag = before
        if name and name not in block:
            hint = f" ({nearest_key(name, block)})"
        value = show(text) or "value"
        raise ConfigError(f"{shown}: a flag has two dashes and one =, write {flag}={value}{hint}.")

    if flags and not word.endswith(".py"):
        # `--resume false`, or `--note=two words` without quotes
        flag, _, start = before.partition("=")
        remedy = f"{flag}={shown}"
        if start:
            remedy = f'{flag}="{start} {shown}"'
        raise ConfigError(f"{before} {shown}: a space ends a flag, write {remedy}.")

    if not files:
        raise ConfigError(f"{shown}: this script takes no config files here, only --key=value.")
    if flags:
        raise ConfigError(f"{shown}: config files come before the flags, write it before {flags[0]}.")
