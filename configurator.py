"""
Read the settings of a script: its config block, then config files, then flags.

    cfg = configure(__file__, sys.argv[1:])                       # in the script
    $ python train.py config/numberline.py --lr=2e-3 --resume     # all files first, then all flags
    $ python train.py --help                                      # every key, its default, its comment

Usage is that of nanoGPT's configurator: bare assignments, files that look like Python, --key=value. But
nothing is ever executed: scripts and files are parsed, and values are literals. A later value replaces an
earlier one as a whole; dicts and lists are not merged. A mistake ends the run with one sentence.
"""
import ast, glob, io, operator, os, textwrap, tokenize, types, warnings
from typing import Any, NamedTuple

from extras.flag_mistakes import DASHES, ConfigError, check_file_word, missing_value, nearest, show
from extras.flag_mistakes import unknown_key
from extras.value_checks import LARGEST, check_address, check_path, check_ranges, check_secrets
from extras.value_checks import check_tasks

BEGIN = "# --- config ---"
END = "# --- end of config ---"
HELP_COLUMNS = 120
FLAG_COLUMNS = 32
COMMAND_LINE = "the command line"

# The types that a key can have, and what a user writes for them.
TAKES = {
    int: "a whole number such as 1000 or 1e6",
    float: "a finite number such as 0.5, 1e-3 or 1/3",
    bool: "True or False",
    str: "text in quotes",
    list: "a list such as [1, 2]",
    tuple: "a tuple such as (1, 2)",
    dict: "a dict such as {'a': 1}",
}
ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}
SIGNS = {ast.USub: operator.neg, ast.UAdd: operator.pos}
# What a bad literal raises: an unhashable key, 1/0, ten thousand minus signs.
BAD_LITERAL = (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError)

class Key(NamedTuple):
    """One assignment of a config block."""

    default: Any
    type: type
    comment: str
    heading: str


# ---- values ----

def parse_source(source, mode="exec"):
    """Parse Python into a syntax tree, without warnings: a "\\d" would add a line to our one sentence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source, mode=mode)

def is_number(value):
    """Tell whether a value is an int or a float; True is neither."""
    return type(value) in (int, float)

def finite(value):
    """Return a number that is real and finite; raise ValueError for any other."""
    # `not <=` catches nan too
    if type(value) is complex or not abs(value) <= 1e308:
        raise ValueError("this is not a finite real number")
    return value

def calculate(op, x, y):
    """Compute x op y for two numbers; op is a key of ARITHMETIC."""
    if not (is_number(x) and is_number(y)):
        raise ValueError("arithmetic is for numbers only")
    # 9**9**9**9 would never finish, so the bits of a power are bounded before it is computed.
    if op is ast.Pow and type(x) is type(y) is int and x.bit_length() * y > 1024:
        raise ValueError("this number is too large")
    return finite(ARITHMETIC[op](x, y))

def literal(node):
    """Evaluate a syntax tree of literals and of arithmetic on numbers.

    Raises one of BAD_LITERAL for anything else: a name, a call, an overflow.
    """
    match node:
        case ast.Constant(value=None | bool() | str()):
            return node.value
        case ast.Constant(value=int() | float()):
            return finite(node.value)
        case ast.List(elts=items):
            return [literal(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(literal(item) for item in items)
        # a key that is None is the ** of {**a}
        case ast.Dict(keys=keys, values=values) if None not in keys:
            pairs = {literal(key): literal(value) for key, value in zip(keys, values)}
            if len(pairs) < len(keys):
                raise ValueError("a key occurs twice in this dict")
            return pairs
        case ast.UnaryOp(op=op, operand=operand) if type(op) in SIGNS:
            value = literal(operand)
            if is_number(value):
                return finite(SIGNS[type(op)](value))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            return calculate(type(op), literal(left), literal(right))
    raise ValueError(f"{show(ast.unparse(node), 40)} is not a literal")

def from_text(key, text):
    """Evaluate the right-hand side of a flag; the shell has usually removed its quotes."""
    if key.type is str:
        if text == "None" and key.default is None:
            return None
        if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
            return text[1:-1]
        return text
    if not text.strip():
        raise ValueError("there is no value after the =")
    text = {"true": "True", "false": "False"}.get(text, text.strip())
    return literal(parse_source(text, mode="eval").body)

def to_type(value, kind):
    """Convert a literal to a key's type where nothing is lost; return it unchanged otherwise."""
    given = type(value)
    if kind is float and given is int:
        return float(value)
    # a float is exact for whole numbers up to 2^53
    if kind is int and given is float and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    # several names in a list are the same as names with commas between them
    if kind is str and given is list and value and all(type(item) is str for item in value):
        return ",".join(value)
    # --layers=1,2 is a tuple to Python and a list to a person
    if {kind, given} == {list, tuple}:
        return kind(value)
    return value

def fit(name, key, where, get):
    """Return what get() returns, as a value of the key's type.

    Otherwise raise a ConfigError that starts with `where`, the user's own words.
    """
    reason = ""
    try:
        value = to_type(get(), key.type)
        if value is None and key.default is None:
            return None
        # `is` and not isinstance: True is an int to Python
        if type(value) is key.type:
            return value
    except SyntaxError:
        reason = "this is not a literal; "
    except BAD_LITERAL as error:
        reason = f"{show(str(error) or 'this is nested too deeply')}; "
    takes = TAKES[key.type]
    if key.default is None:
        takes += " or None"
    raise ConfigError(f"{where}: {reason}{name} takes {takes} (default {show(repr(key.default))}).")


# ---- files ----

def read_python(path):
    """Read a Python file -> (text, syntax tree)."""
    try:
        with tokenize.open(path) as f:
            source = f.read()
        return source, parse_source(source)
    except OSError as error:
        raise ConfigError(f"{path}: this file cannot be read ({error.strerror}).")
    except SyntaxError as error:
        line = show((error.text or "").strip())
        raise ConfigError(f"{path}:{error.lineno or 1}: this is not Python: {line} ({show(error.msg)}).")
    except BAD_LITERAL as error:
        raise ConfigError(f"{path}: this is not Python ({error}).")

def assignments(path, source, nodes):
    """Yield (name, node, where) for each `name = value` or `name: type = value`.

    where: file, line and code, to start a sentence with. Any other statement raises ConfigError.
    """
    lines = {}
    # ast.get_source_segment would split the whole source again for every statement
    text = source.splitlines()
    for node in nodes:
        code = text[node.lineno - 1 : node.end_lineno]
        if len(code) == 1:
            # without the comment behind the code; columns count bytes
            code[0] = code[0].encode()[: node.end_col_offset].decode()
        where = f"{path}:{node.lineno}: {show(' '.join(code))}"
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        is_assignment = isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        if not is_assignment or len(targets) > 1 or not isinstance(targets[0], ast.Name):
            raise ConfigError(f"{where}: write `key = value` with a literal value, nothing else works here.")
        name = targets[0].id
        if name in lines:
            raise ConfigError(f"{where}: {name} is set on line {lines[name]} already, delete one of the two.")
        lines[name] = node.lineno
        yield name, node, where

def block_comments(path, source):
    """Find a script's config block -> (first line, last line, {line: (text, column)} of its comments)."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            comments[line] = (token.string.strip(), column)
    marks = [line for line, comment in comments.items() if comment in ((BEGIN, 0), (END, 0))]
    if [comments[line][0] for line in marks] != [BEGIN, END]:
        raise ConfigError(f"{path}: a script needs one config block, between lines `{BEGIN}` and `{END}`.")
    begin, end = marks
    inside = {line: comment for line, comment in comments.items() if begin < line < end}
    return begin, end, inside

def read_default(name, node, where):
    """Read one assignment of a config block -> (default, type)."""
    try:
        default = literal(node.value)
    except BAD_LITERAL as error:
        raise ConfigError(f"{where}: {error}; a default is a literal.")
    kind = type(default)
    if isinstance(node, ast.AnnAssign):
        kind = {known.__name__: known for known in TAKES}.get(ast.unparse(node.annotation))
    if kind not in TAKES:
        known = ", ".join(known.__name__ for known in TAKES)
        raise ConfigError(f"{where}: annotate {name} with one of {known}, as in `{name}: float = None`.")
    return default, kind

def parse_block(path):
    """Read the config block of a script, without importing it -> {name: Key}, in its order.

    A comment in column 0 is the heading of the keys below it. An indented one continues its key's comment.
    """
    source, tree = read_python(path)
    begin, end, comments = block_comments(path, source)
    nodes = [node for node in tree.body if begin < node.lineno < end]
    found = list(assignments(path, source, nodes))
    code = {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}

    headings = {}
    key_comments = {}
    for line, (text, column) in comments.items():
        text = text.lstrip("#").strip()
        if column > 0 or line in code:
            key_comments[line] = text
        else:
            # a heading of several lines is one heading
            headings[line] = f"{headings.pop(line - 1, '')} {text}".strip()

    block = {}
    stops = [*(node.lineno for node in nodes[1:]), end]
    for (name, node, where), stop in zip(found, stops):
        comment = " ".join(text for line, text in key_comments.items() if node.lineno <= line < stop)
        above = [text for line, text in headings.items() if line < node.lineno]
        default, kind = read_default(name, node, where)
        key = Key(default, kind, comment, heading=(above or [""])[-1])
        block[name] = key._replace(default=fit(name, key, where, lambda: default))
    return block

def read_config_file(path, block):
    """Read a config file, an optional docstring and assignments of literals to keys -> {name: value}."""
    if not path.endswith(".py") or not os.path.isfile(path):
        folder = glob.escape(os.path.dirname(path) or "config")
        found = glob.glob(os.path.join(folder, "*.py"))
        existing = sorted(name.replace(os.sep, "/") for name in found)
        hint = "a config file ends in .py, a flag is --key=value"
        if existing:
            hint = nearest(path, existing, f"there are: {', '.join(existing[:5])}")
        raise ConfigError(f"{path or repr(path)}: there is no such config file; {hint}.")
    source, tree = read_python(path)
    nodes = tree.body
    if ast.get_docstring(tree) is not None:
        nodes = nodes[1:]
    values = {}
    for name, node, where in assignments(path, source, nodes):
        if name not in block:
            raise unknown_key(where, name, block)
        if name == "trust_remote_code":
            raise ConfigError(f"{where}: a file cannot give this permission, only the flag "
                              "--trust_remote_code=True can; delete the line.")
        values[name] = fit(name, block[name], where, lambda: literal(node.value))
    return values


# ---- help ----

def print_help(script, block):
    """Print the first paragraph of a script's docstring, then every key under its heading."""
    _, tree = read_python(script)
    title = ast.get_docstring(tree) or os.path.basename(script)
    for line in title.split("\n\n")[0].splitlines():
        print(show(line, width=HELP_COLUMNS))

    heading = None
    for name, key in block.items():
        if key.heading != heading:
            heading = key.heading
            print(f"\n{show(heading)}" if heading else "")
        flag = f"  --{name}={show(repr(key.default), width=70)}"
        if key.default is None:
            flag += f" ({key.type.__name__})"
        comment = show(key.comment, width=1000)
        # a flag that is too long for its column has its comment on the next line
        if len(flag) > FLAG_COLUMNS or not comment:
            print(flag)
            flag = ""
        if comment:
            start = f"{flag:{FLAG_COLUMNS}}  "
            indent = " " * len(start)
            print(textwrap.fill(comment, HELP_COLUMNS, initial_indent=start, subsequent_indent=indent))


# ---- the command line ----

def read_flag(argv, i, block, origin):
    """Read the flag argv[i] -> (name, value). origin: {name: source} of the values before it."""
    word = argv[i]
    # a value of 5,000 characters must not push the remedy off the screen
    shown = show(word)
    name, equals, text = word.lstrip(DASHES).partition("=")
    if name not in block or word[2:3] == "-":
        raise unknown_key(shown, word[2:].partition("=")[0], block)
    if origin.get(name) == COMMAND_LINE:
        raise ConfigError(f"{shown}: {name} is given twice, delete one of the two.")
    key = block[name]
    if not equals and key.type is not bool:
        raise missing_value(argv, i, name, key.default)
    if not equals:
        text = "True"
    return name, fit(name, key, shown, lambda: from_text(key, text))

def configure(script, argv, files=True, quiet=False):
    """Return the settings of a script as a SimpleNamespace, in the order of its config block.

    argv is without the program's name. files=False refuses config files. quiet=True does not print what
    differs from the defaults. Raises ConfigError for a mistake, and SystemExit(0) after --help.
    """
    check_secrets(argv)
    block = parse_block(script)
    if {"-h", "--help"} & set(argv):
        print_help(script, block)
        raise SystemExit(0)

    values = {name: key.default for name, key in block.items()}
    origin = {}
    for i, word in enumerate(argv):
        if word.startswith("--"):
            name, value = read_flag(argv, i, block, origin)
            values[name] = value
            origin[name] = COMMAND_LINE
        else:
            check_file_word(argv, i, block, files)
            new = read_config_file(word, block)
            values |= new
            origin |= dict.fromkeys(new, word)

    for name, key in block.items():
        if values[name] != key.default and not quiet:
            value = show(repr(values[name]))
            print(f"  {name} = {value}  (default {show(repr(key.default))}, from {show(origin[name])})")
    return types.SimpleNamespace(**values)


# ---- the rules about train.py's keys ----

CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"),
    "q_head": ("full", "tied"),
    "actor_loss": ("sft", "afsft", "awr", "fbc"),
    "trace": ("tree", "plain", "turn"),
}
WITH_CRITIC = ("afsft", "awr")
PLAYERS = ("expert", "random", "malformed", "biased")

AT_LEAST_1 = """log_interval n_critics data_episodes batch_size window micro_batch num_envs
    rollout_episodes updates_per_rollout max_new_tokens eval_episodes"""
AT_LEAST_0 = """seed eval_interval stop_at lora_r vision_cache_mb bc_coef critic_coef pess_coef
    filter_warmup offline_updates online_updates warmup_updates replay_episodes q_weight"""
SHARES = "expert_episodes gamma lam target_tau min_lr offline_ratio explore"
# (keys, test, what the value must be)
RANGES = [
    (AT_LEAST_1, lambda x: x >= 1, "at least 1"),
    (AT_LEAST_1, lambda x: x <= 10**7, "at most 10,000,000"),
    ("max_new_tokens lora_r", lambda x: x <= 2**15, "at most 32,768"),
    ("n_critics window", lambda x: x <= 1000, "at most 1,000"),
    ("seed", lambda x: x < 2**32, "below 2^32"),
    (AT_LEAST_0, lambda x: x >= 0, "at least 0"),
    (SHARES, lambda x: 0 <= x <= 1, "between 0 and 1"),
    ("lr critic_lr grad_clip", lambda x: x > 0, "above 0"),
    ("max_turns", lambda x: x is None or x >= 1, "at least 1, or None"),
    ("won_share", lambda x: x is None or 0 <= x <= 1, "between 0 and 1, or None"),
    ("reward_clip", lambda x: x >= 0, "0 or more"),
    ("size", lambda x: 28 <= x <= 2000, "between 28 and 2000 pixels"),
    ("penalty", lambda x: x <= 0, "0 or below, as the reward of a reply that does not parse"),
]
# (what is wrong, the sentence about it)
CONFLICTS = [
    (lambda cfg: cfg.offline_updates + cfg.online_updates == 0,
     "offline_updates and online_updates are both 0: there is nothing to do, set one above 0."),
    (lambda cfg: cfg.resume and cfg.overwrite,
     "resume and overwrite are both True: one continues the run, the other deletes it; choose one."),
    (lambda cfg: cfg.resume and cfg.dry_run,
     "dry_run and resume are both True: a dry run starts anew and leaves nothing; choose one."),
    (lambda cfg: cfg.q_weight and cfg.actor_loss not in WITH_CRITIC,
     "q_weight={q_weight} needs a critic, and actor_loss={actor_loss!r} trains none: set q_weight=0."),
    (lambda cfg: cfg.model == "scratch" and cfg.lora_r > 0,
     "model='scratch' has random weights, adapters on them (lora_r={lora_r}) learn nothing: set lora_r=0."),
    (lambda cfg: cfg.vision_cache_mb and cfg.lora_r == 0,
     "vision_cache_mb={vision_cache_mb} caches the features of a frozen vision part, and lora_r=0 trains "
     "that part too: set lora_r above 0, or vision_cache_mb=0."),
    (lambda cfg: cfg.shard and cfg.lora_r == 0,
     "shard=True shards frozen weights, and lora_r=0 trains them all: set lora_r above 0, or shard=False."),
    (lambda cfg: cfg.compile and cfg.shard,
     "compile and shard are both True: the hooks of sharded layers do not compile; choose one."),
    (lambda cfg: cfg.stop_at > cfg.offline_updates + cfg.online_updates,
     "stop_at={stop_at} is behind the last update, {offline_updates} + {online_updates}: set stop_at=0 to "
     "run to the end."),
    (lambda cfg: cfg.rollout_url and cfg.lora_r == 0,
     "rollout_url={rollout_url!r} gives a server the adapters of every rollout, and lora_r=0 has none: set "
     "lora_r above 0, or leave rollout_url out."),
    (lambda cfg: cfg.rollout_url and cfg.q_weight,
     "q_weight={q_weight} lets the critic correct each token, which a server cannot: set q_weight=0, or "
     "leave rollout_url out."),
    (lambda cfg: cfg.rollout_url and cfg.modules_to_save,
     "modules_to_save={modules_to_save!r} trains layers that a server's adapters do not have: leave "
     "rollout_url out, or modules_to_save."),
    (lambda cfg: not cfg.model.strip(),
     "model={model!r} names no model: write --model=bases/tiny-vlm, another folder, or a hub id."),
]

def check_data_mix(data_mix, must_play):
    """Check the players and their shares; must_play: somebody has to play, there is no recorded data."""
    for name, share in data_mix.items():
        if name not in PLAYERS:
            raise ConfigError(f"data_mix has a player {name!r}: known are {', '.join(PLAYERS)}.")
        if not is_number(share) or not 0 <= share <= LARGEST:
            raise ConfigError(f"data_mix gives {name} the share {share!r}: it must be a number, at least 0.")
    if must_play and sum(data_mix.values()) == 0:
        example = "{'expert': 0.3, 'random': 0.7}"
        raise ConfigError(f"data_mix has no share above 0: name the players, for instance {example}.")

def check_config(cfg):
    """Check the values of train.py's keys, alone and together, and return the settings.

    Raises a ConfigError for the first mistake, before anything is read or written.
    """
    for name, allowed in CHOICES.items():
        value = getattr(cfg, name)
        if value not in allowed:
            close = nearest(value, allowed, otherwise="")
            hint = f" ({close})" if close else ""
            raise ConfigError(f"{name}={value!r} is not known: choose {', '.join(allowed)}{hint}.")
    check_ranges(cfg, RANGES)
    check_tasks(cfg.env)
    for name in ("model", "data"):
        check_path(name, getattr(cfg, name))
    check_address("rollout_url", cfg.rollout_url)
    for is_wrong, sentence in CONFLICTS:
        if is_wrong(cfg):
            raise ConfigError(sentence.format(**vars(cfg)))
    check_data_mix(cfg.data_mix, must_play=not cfg.data)
    return cfg
