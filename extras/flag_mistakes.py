"""
Say in one sentence what is wrong with a word of a command line; configurator.py calls this.
"""
import difflib, os, re, tempfile

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

# The largest number of any key: with it even x * y^2, a weight and a squared error, is finite in float32.
LARGEST = 1e12
# The longest name of a file, in bytes, and the longest list of environments.
LONGEST_NAME = 255
LONGEST_LIST = 2000

# What a server's key looks like: a vendor's prefix, or one long word of letters and digits.
SECRET_VALUE = re.compile(r"(sk|pk|rk|gsk|ghp|gho|github_pat|xai|nvapi|glpat)[-_](?=.*[0-9])[\w-]{8,}[^/\s]*"
                          r"|hf_[A-Za-z0-9]{20,}|AIza[\w-]{20,}|Bearer\b.*"
                          r"|(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9]{32,}"
                          r"|.*[?&](api_?key|key|token)=.+", re.I)
# An address with a user and a password in it.
SECRET_ADDRESS = re.compile(r".*://[^/\s]*@.*")
# Flags of other programs that take the key itself.
SECRET_NAME = re.compile(r"(.*_)?(api_?key|secret|secret_key|password)|key"
                         r"|(hf_|api_|auth_|access_)?token", re.I)
# A name that may be repeated.
SAFE_NAME = re.compile(r"[A-Za-z_]{1,24}")

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



# ---- values: secrets, paths, numbers ----

def check_secrets(argv):
    """Refuse a command line with a key or a password in it, without repeating it.

    The arguments are printed and stored in eval.json and meta.json.
    """
    previous = ""
    for word in argv:
        name, equals, value = word.lstrip(DASHES).partition("=")
        if not equals:
            # `--api_key sk-...`, or a key that stands alone
            name = previous
            value = word
        value = value.strip("'\" \n")
        name = name.replace("-", "_")
        # a folder may be called hf_experiment1
        is_folder = name in ("out_dir", "save") or os.path.exists(value)
        is_secret = SECRET_VALUE.fullmatch(value) and not is_folder
        is_secret = is_secret or SECRET_ADDRESS.fullmatch(value) or (value and SECRET_NAME.fullmatch(name))
        if name == "api_key_env" and not is_secret and value not in ("", "OPENAI_API_KEY", *os.environ):
            raise ConfigError("--api_key_env: the environment variable that it names is not set; the value "
                              "is not repeated here, because it may be the key itself.")
        if is_secret:
            where = f"--{name}" if SAFE_NAME.fullmatch(name) else "A word of the command line"
            raise ConfigError(f"{where}: this looks like a key or a password, and command lines are printed "
                              "and stored: put it into the environment variable OPENAI_API_KEY, or into the "
                              "one that --api_key_env names.")
        previous = "" if equals else word.lstrip(DASHES)

def check_path(key, path):
    """Refuse a path that cannot be meant: with an unprintable character, a name too long, or a ~."""
    if not path.isprintable():
        raise ConfigError(f"{key}={path!r} has a character that cannot be printed: write another path.")
    if path.startswith("~"):
        raise ConfigError(f"{key}={path!r}: a shell replaces ~ only where a word begins: write the path in "
                          "full, or use $HOME.")
    if any(len(name.encode()) > LONGEST_NAME for name in path.split("/")) or len(path) > 4000:
        raise ConfigError(f"{key}={show(path)!r} is too long for a path: write a shorter one.")

def check_out_dir(path, key="out_dir"):
    """Refuse a path at which no folder can be made or written, before any work is done."""
    if not path.strip():
        raise ConfigError(f"{key}={path!r} names no folder: write for instance {key}=out/run.")
    check_path(key, path)
    existing = os.path.abspath(path)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise ConfigError(f"{key}={path!r}: {existing!r} is no folder, so nothing can be written there: "
                          f"choose another {key}.")
    try:
        # Rights alone do not tell: a disk may be full, or a file system be read-only.
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"{key}={path!r}: {existing!r} cannot be written ({error.strerror}): choose "
                          f"another {key}.")

def check_tasks(env):
    """Refuse a list of environments that is endless or has an empty place: --env=NumberLine,,EZPoints."""
    if len(env) > LONGEST_LIST:
        raise ConfigError(f"env={show(env)!r} is longer than {LONGEST_LIST} characters: name fewer "
                          "environments.")
    if not all(name.strip() for name in env.split(",")):
        raise ConfigError(f"env={env!r} has a place without a name: write --env=NumberLine, or several with "
                          "one comma between them.")

def check_ranges(cfg, ranges, dashes=""):
    """Check that numbers are in their ranges, and none is larger than what float32 can calculate with.

    dashes: "--" where a key can only be a flag.
    """
    for name, value in vars(cfg).items():
        if isinstance(value, (int, float)) and not abs(value) <= LARGEST:
            raise ConfigError(f"{dashes}{name}={value!r} is out of range: no number may be beyond "
                              f"+-{LARGEST:g}.")
    for names, test, words in ranges:
        for name in names.split():
            value = getattr(cfg, name)
            if not test(value):
                raise ConfigError(f"{dashes}{name}={value!r} is out of range: it must be {words}.")


# ---- names and flags ----

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
