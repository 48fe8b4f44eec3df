"""
Settings of a script: the config block on top of it, then config files, then flags.

    cfg = configure(__file__, sys.argv[1:])                         # in the script
    $ python train.py config/numberline.py --lr=2e-3 --resume       # all files first, then all flags
    $ python train.py --help                                        # every key, its default, its comment

The feel is nanoGPT's configurator (bare assignments, files that look like Python, --key=value), but nothing is ever
executed: scripts and files are parsed, values are literals, and a mistake ends the run with one sentence.
A later value replaces an earlier one whole: dicts and lists are not merged.
"""
import ast, difflib, glob, io, operator, os, tokenize, types, warnings
from typing import Any, NamedTuple

BEGIN, END = "# --- config ---", "# --- end of config ---"
TAKES = {int: "a whole number such as 1000 or 1e6", float: "a finite number such as 0.5, 1e-3 or 1/3", bool: "True or False",
         str: "text in quotes", list: "a list such as [1, 2]", tuple: "a tuple such as (1, 2)", dict: "a dict such as {'a': 1}"}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}
BAD_LITERAL = (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) # unhashable key, 1/0, 10,000 minus signs

class Key(NamedTuple): # one assignment of a config block
    default: Any
    type: type
    comment: str
    heading: str

def show(text, width=100): # on one line of ASCII, however it was written: the logs of a cluster are not all UTF-8
    text = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in " ".join(text.split()))
    return text if len(text) <= width else text[:width - 3] + "..."

class ConfigError(SystemExit): # given a text, SystemExit prints it on stderr, returns 1, and shows no traceback
    def __init__(self, sentence): super().__init__(show(sentence, width=1000))

def nearest(word, names, otherwise="--help lists all keys"):
    close = difflib.get_close_matches(word.lower().replace("-", "_"), names, n=3, cutoff=0.5)
    return f"nearest: {', '.join(close)}" if close else otherwise

# -- values ------------------------------------------------------------------------------------------------------------
def literal(node):
    """The value of a syntax tree of literals and arithmetic on numbers; one of BAD_LITERAL for a name, a call, an overflow."""
    match node:
        case ast.Constant(value=None | bool() | str()): return node.value
        case ast.Constant(value=int() | float()): value = node.value
        case ast.List(elts=elts): return [literal(e) for e in elts]
        case ast.Tuple(elts=elts): return tuple(literal(e) for e in elts)
        case ast.Dict(keys=keys, values=values) if None not in keys: # a key that is None is the ** of {**a}
            pairs = {literal(k): literal(v) for k, v in zip(keys, values)}
            if len(pairs) < len(keys): raise ValueError("a key stands twice in this dict")
            return pairs
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand) if type(x := literal(operand)) in (int, float):
            value = -x if isinstance(node.op, ast.USub) else x
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            x, y = literal(left), literal(right)
            if {type(x), type(y)} - {int, float}: raise ValueError("arithmetic is for numbers only")
            # 9**9**9**9 would run for ever, so the bits of a power are bounded before it is computed
            if type(op) is ast.Pow and type(x) is type(y) is int and x.bit_length() * y > 1024: raise ValueError("this number is too large")
            value = ARITHMETIC[type(op)](x, y)
        case _: raise ValueError(f"{show(ast.unparse(node), 40)} is not a literal")
    if not abs(value) <= 1e308 or type(value) is complex: raise ValueError("this is not a finite real number") # `not <=` catches nan too
    return value

def fit(name, key, where, get):
    """What get() returns, as a value of the key's type; else a ConfigError that opens with `where`: the user's own words."""
    reason = ""
    try:
        value = get()
        if value is None and key.default is None: return None
        if key.type is float and type(value) is int: value = float(value)
        if key.type is int and type(value) is float and value.is_integer() and abs(value) <= 2**53: value = int(value) # exact up to there
        if key.type is str and type(value) is list and value and all(type(v) is str for v in value): value = ",".join(value) # several names
        if {key.type, type(value)} == {list, tuple}: value = key.type(value) # --layers=1,2 is a tuple to Python, a list to a person
        if type(value) is key.type: return value # `is`, not isinstance: True is an int to Python
    except SyntaxError: reason = "this is not a literal; "
    except BAD_LITERAL as e: reason = f"{show(str(e) or 'this is nested too deeply')}; "
    raise ConfigError(f"{where}: {reason}{name} takes {TAKES[key.type]}{' or None' * (key.default is None)} (default {show(repr(key.default))}).")

def from_text(key, text): # the right-hand side of a flag; the shell has usually taken its quotes
    if key.type is str:
        if text == "None" and key.default is None: return None
        return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" else text
    if not text.strip(): raise ValueError("there is no value after the =")
    return literal(parse({"true": "True", "false": "False"}.get(text, text.strip()), mode="eval").body)

def parse(source, mode="exec"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # a "\d" would add a line of Python's own to our one sentence
        return ast.parse(source, mode=mode)

# -- files -------------------------------------------------------------------------------------------------------------
def read(path): # (text, syntax tree) of a Python file
    try:
        with tokenize.open(path) as f: source = f.read()
        return source, parse(source)
    except OSError as e: raise ConfigError(f"{path}: this file cannot be read ({e.strerror}).")
    except SyntaxError as e: raise ConfigError(f"{path}:{e.lineno or 1}: this is not Python: {show((e.text or '').strip())} ({show(e.msg)}).")
    except BAD_LITERAL as e: raise ConfigError(f"{path}: this is not Python ({e}).")

def assignments(path, source, nodes):
    """Yields (name, node, where) for each `name = value` or `name: type = value`; any other statement is a ConfigError."""
    lines, text = {}, source.splitlines() # ast.get_source_segment splits the whole source anew for every statement
    for node in nodes:
        own = text[node.lineno - 1:node.end_lineno]
        if len(own) == 1: own[0] = own[0].encode()[:node.end_col_offset].decode() # without the comment behind it
        where = f"{path}:{node.lineno}: {show(' '.join(own))}"
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or len(targets) > 1 or not isinstance(targets[0], ast.Name) or node.value is None:
            raise ConfigError(f"{where}: write `key = value` with a literal value, nothing else can stand here.")
        name = targets[0].id
        if name in lines: raise ConfigError(f"{where}: {name} is set on line {lines[name]} already, delete one of the two.")
        lines[name] = node.lineno
        yield name, node, where

def parse_block(path):
    """{name: Key(default, type, comment, heading)} of a script's config block, in its order. The script is not imported.
    A comment from column 0 is the heading of the keys below it; a further-in comment line continues the key's own comment."""
    source, tree = read(path)
    comments = {t.start[0]: (t.string, t.start[1]) for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    marks = [n for n, (text, col) in comments.items() if col == 0 and text.strip() in (BEGIN, END)]
    if [comments[n][0].strip() for n in marks] != [BEGIN, END]: raise ConfigError(f"{path}: a script needs one config block, between the lines `{BEGIN}` and `{END}`.")
    inside = {n: (text.lstrip("#").strip(), col) for n, (text, col) in comments.items() if marks[0] < n < marks[1]}
    found = list(assignments(path, source, [node for node in tree.body if marks[0] < node.lineno < marks[1]]))
    code = {n for _, node, _ in found for n in range(node.lineno, node.end_lineno + 1)}
    headings, block = {}, {} # headings: last line -> text, of one or several lines
    for n, (text, col) in inside.items():
        if col == 0 and n not in code: headings[n] = f"{headings.pop(n - 1, '')} {text}".strip()
    for (name, node, where), stop in zip(found, [node.lineno for _, node, _ in found[1:]] + [marks[1]]):
        comment = " ".join(text for n, (text, col) in inside.items() if node.lineno <= n < stop and (col > 0 or n in code))
        heading = ([text for n, text in headings.items() if n < node.lineno] or [""])[-1]
        try: default = literal(node.value)
        except BAD_LITERAL as e: raise ConfigError(f"{where}: {e}; a default is a literal.")
        kind = {t.__name__: t for t in TAKES}.get(ast.unparse(node.annotation)) if isinstance(node, ast.AnnAssign) else type(default)
        if kind not in TAKES: raise ConfigError(f"{where}: annotate {name} with one of {', '.join(t.__name__ for t in TAKES)}, as in `{name}: float = None`.")
        key = Key(default, kind, comment, heading)
        block[name] = key._replace(default=fit(name, key, where, lambda: default))
    return block

def read_config_file(path, block):
    """{name: value} of a config file: assignments of literals to known keys, after an optional docstring."""
    if not path.endswith(".py") or not os.path.isfile(path):
        there = sorted(p.replace(os.sep, "/") for p in glob.glob(os.path.join(glob.escape(os.path.dirname(path) or "config"), "*.py")))
        hint = nearest(path, there, f"there are: {', '.join(there[:5])}" if there else "a config file ends in .py, a flag is --key=value")
        raise ConfigError(f"{path or repr(path)}: there is no such config file; {hint}.")
    source, tree = read(path)
    values = {}
    for name, node, where in assignments(path, source, tree.body[ast.get_docstring(tree) is not None:]):
        if name not in block: raise ConfigError(f"{where}: there is no key {name}; {nearest(name, block)}.")
        values[name] = fit(name, block[name], where, lambda: literal(node.value))
    return values

# -- the whole ---------------------------------------------------------------------------------------------------------
def print_help(script, block):
    for line in (ast.get_docstring(read(script)[1]) or os.path.basename(script)).split("\n\n")[0].splitlines(): print(show(line, width=1000))
    left = {name: f"  --{name}={show(repr(key.default))}" + f" ({key.type.__name__})" * (key.default is None) for name, key in block.items()}
    width = min(max(map(len, left.values()), default=0), 44) # one long default must not push all comments off the screen
    heading = None
    for name, key in block.items():
        if key.heading != heading: print(f"\n{show(key.heading)}")
        heading = key.heading
        print(f"{left[name]:{width}}  {show(key.comment, width=1000)}".rstrip())

def configure(script, argv, files=True, quiet=False):
    """The settings as a SimpleNamespace in the order of the script's block. argv is without the program's name.
    files=False refuses config files; quiet=True does not print what differs from the defaults. Raises ConfigError."""
    block = parse_block(script)
    if {"-h", "--help"} & set(argv):
        print_help(script, block)
        raise SystemExit(0)
    values, origin, flags = {name: key.default for name, key in block.items()}, {}, set()
    for i, arg in enumerate(argv):
        name, equals, text = arg.lstrip("-\u2013\u2014").partition("=") # en and em dash: pasted from a text processor
        said, before = show(arg) or "''", show(argv[i - 1]) if i else "" # a 5,000 character value must not push the remedy away
        if arg.startswith("--"):
            if name not in block or arg[2:3] == "-": raise ConfigError(f"{said}: there is no key {arg[2:].partition('=')[0]}; {nearest(name, block)}.")
            if name in flags: raise ConfigError(f"{said}: {name} is given twice, delete one of the two.")
            if not equals and block[name].type is not bool:
                after = argv[i + 1].lstrip("=") if i + 1 < len(argv) and not argv[i + 1].startswith("--") else ""
                raise ConfigError(f"{said} {after}".strip() + f": {name} has no value, write --{name}={after or show(repr(block[name].default))}.")
            values[name], origin[name] = fit(name, block[name], said, lambda: from_text(block[name], text if equals else "True")), "the command line"
            flags.add(name)
        elif arg.startswith("-") or (equals and not os.path.isfile(arg)):
            flag = before if flags and not name else f"--{name or 'key'}" # `--resume =true` has a space too many
            raise ConfigError(f"{said}: a flag has two dashes and one =, write {flag}={show(text) or 'value'}" + ("." if name in block or not name else f" ({nearest(name, block)})."))
        elif flags and not arg.endswith(".py"):
            flag, _, start = before.partition("=") # `--resume false`, or `--note=two words` without quotes
            raise ConfigError(f"{before} {said}: a space ends a flag, write " + (f'{flag}="{start} {said}".' if start else f"{flag}={said}."))
        elif not files: raise ConfigError(f"{said}: this script takes no config files here, only --key=value.")
        elif flags: raise ConfigError(f"{said}: config files come before the flags, write it before {next(a for a in argv if a.startswith('--'))}.")
        else:
            new = read_config_file(arg, block)
            values, origin = values | new, origin | {name: arg for name in new}
    for name, key in block.items():
        if values[name] != key.default and not quiet: print(f"  {name} = {show(repr(values[name]))}  (default {show(repr(key.default))}, from {show(origin[name])})")
    return types.SimpleNamespace(**values)

# -- cross-field rules -------------------------------------------------------------------------------------------------
CHOICES = dict(device=("auto", "cpu", "cuda"), dtype=("auto", "float32", "bfloat16"), q_head=("full", "tied"),
               actor_loss=("sft", "afsft", "awr", "fbc"), mdp=("token", "turn"), trace=("tree", "plain"))
AT_LEAST_1 = "log_interval n_critics data_episodes batch_size window micro_batch num_envs rollout_episodes updates_per_rollout max_new_tokens eval_episodes".split()
AT_LEAST_0 = "seed eval_interval stop_at lora_r vision_cache_mb offline_updates online_updates replay_episodes warmup_updates filter_warmup bc_coef critic_coef pess_coef q_weight".split()
POSITIVE = "lr critic_lr grad_clip".split()
SHARES = "expert_episodes explore gamma lam target_tau min_lr offline_ratio".split()

def check_config(cfg):
    """Every rule about the values of train.py's keys, alone and together; a ConfigError with one sentence, before anything is read or written."""
    def need(ok, sentence):
        if not ok: raise ConfigError(sentence)
    for name, allowed in CHOICES.items():
        value = getattr(cfg, name)
        need(value in allowed, f"{name}={value!r} is not known: choose {', '.join(allowed)}" + (f" ({nearest(value, allowed, '')})".replace(" ()", "") + "."))
    for names, ok, words in ((AT_LEAST_1, lambda x: x >= 1, "at least 1"), (AT_LEAST_0, lambda x: x >= 0, "at least 0"),
                             (POSITIVE, lambda x: x > 0, "above 0"), (SHARES, lambda x: 0 <= x <= 1, "between 0 and 1")):
        for name in names: need(ok(getattr(cfg, name)), f"{name}={getattr(cfg, name)!r} is out of range: it must be {words}.")
    need(cfg.reward_clip is None or cfg.reward_clip > 0, f"reward_clip={cfg.reward_clip} is out of range: it must be above 0, or None.")
    need(cfg.won_share is None or 0 <= cfg.won_share <= 1, f"won_share={cfg.won_share} is out of range: it must be between 0 and 1, or None.")
    need(28 <= cfg.size <= 2000, f"size={cfg.size} is out of range: a picture's side must be between 28 and 2000 pixels.")
    need(cfg.max_turns is None or cfg.max_turns > 0, f"max_turns={cfg.max_turns} is out of range: it must be at least 1, or None.")
    need(cfg.penalty <= 0, f"penalty={cfg.penalty} is above 0: it is the reward of a reply that does not parse, so it must be 0 or below.")
    need(cfg.offline_updates + cfg.online_updates > 0, "offline_updates and online_updates are both 0: there is nothing to do.")
    need(not cfg.q_weight or cfg.actor_loss in ("afsft", "awr"), f"q_weight={cfg.q_weight} needs a critic, and actor_loss={cfg.actor_loss!r} trains none: set q_weight=0.")
    need(not (cfg.resume and cfg.overwrite), "resume and overwrite are both True: one goes on with the run, the other deletes it; choose one.")
    need(cfg.model != "scratch" or cfg.lora_r == 0, f"model='scratch' has random weights, adapters on them (lora_r={cfg.lora_r}) learn nothing: set lora_r=0.")
    need(not cfg.vision_cache_mb or cfg.lora_r > 0, f"vision_cache_mb={cfg.vision_cache_mb} keeps what a frozen vision part sees, and lora_r=0 trains that part too: set lora_r above 0, or vision_cache_mb=0.")
    need(not cfg.shard or cfg.lora_r > 0, "shard=True shards weights that are frozen, and lora_r=0 trains them all: set lora_r above 0, or shard=False.")
    need(not (cfg.dry_run and cfg.resume), "dry_run and resume are both True: a dry run starts from nothing and leaves nothing; choose one.")
    need(cfg.eval_interval % cfg.log_interval == 0, f"eval_interval={cfg.eval_interval} is no multiple of log_interval={cfg.log_interval}: a resumed run could not repeat its metrics.")
    need(cfg.stop_at % cfg.log_interval == 0, f"stop_at={cfg.stop_at} is no multiple of log_interval={cfg.log_interval}: a resumed run could not repeat its metrics.")
    players = ("expert", "random", "malformed", "biased")
    for name, share in cfg.data_mix.items():
        need(name in players, f"data_mix has a player {name!r}: known are {', '.join(players)}.")
        need(type(share) in (int, float) and share >= 0, f"data_mix gives {name} the share {share!r}: it must be a number, at least 0.")
    need(cfg.data or sum(cfg.data_mix.values()) > 0, "data_mix has no share above 0: say who plays, for instance {'expert': 0.3, 'random': 0.7}.")
    return cfg
