"""
Checks the rules of style: how the code reads, how the tree is laid out, how long the texts are.

    python -m pytest tests/test_style.py    # one test per rule, over all files that git does not ignore
    python tests/test_style.py FILE...      # every violation in these files, and one line of figures per file
    python tests/test_style.py              # the same for all files, then the rules about the tree

A rule is a generator. A file rule takes a Source and yields (line, what to do). A tree rule takes a list of
Sources and yields (path, line, what to do). `FIRES` and `PASSES` hold small sources for each rule, because a
rule that cannot fail is worth nothing. The rules need `ast` and `tokenize` only; they import no file of ours.
"""
import ast, io, os, re, shutil, subprocess, sys, tokenize
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    "train.py",
    "model.py",
    "agent_rl.py",
    "envs.py",
    "buffer.py",
    "evaluate.py",
    "configurator.py",
]
TOP_LEVEL = {
    *SCRIPTS,
    "bench.py",
    "README.md",
    "LICENSE",
    "pytest.ini",
    ".gitignore",
    ".ci",
    "assets",
    "bases",
    "config",
    "docs",
    "extras",
    "pretrain",
    "tests",
    "worlds",
}
BEGIN = "# --- config ---"
END = "# --- end of config ---"

COLUMNS = 110
FUNCTION_LINES = 60
PARAMETERS = 8
NESTING = 3
TOKENS_PER_LINE = 11
CONDITIONALS_PER_100_LINES = 4  # nanoGPT, CleanRL and others: 1 to 3
COMMENT_COLUMNS = 40
KEY_COMMENT_COLUMNS = 100
UNDOCUMENTED_METHOD_LINES = 8
CONFIG_HEADER_LINES = 8
SCRIPTS_LINES = 3800
KEYS = 63
HELP_COLUMNS = 120
README_WORDS = 1700
WORDS_BEFORE_COMMAND = 120
DOCS_WORDS = 1500
SUBJECT_COLUMNS = 72
LAST_COMMIT_BEFORE_THE_RULES = "96a09c4"

# Split, so that this file does not contain them.
MARKERS = ["TO" + "DO", "FIX" + "ME", "X" + "XX"]
NO_VERBS = "a an the this what who whether if -> each every".split()
MUTATORS = {"append", "add", "pop", "update", "remove", "extend"}
COUNTED_TOKENS = {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
BLOCKS = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.With,
    ast.AsyncWith,
    ast.Try,
    getattr(ast, "TryStar", ast.Try),  # Python 3.11 and later
    ast.Match,
)


# -- sources ----------------------------------------------------------------------------------------

class Source(NamedTuple):
    """A Python file, read and parsed once."""

    path: str
    lines: list
    tree: ast.Module
    tokens: list

def parse(text, path="sample.py"):
    """Parse a source text; the path decides which rules are relaxed. Raises SyntaxError."""
    tree = ast.parse(text)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    return Source(path, text.removesuffix("\n").split("\n"), tree, tokens)

def tree_files(root, tracked_only=False):
    """List the files that git tracks or does not ignore, as paths relative to the root.

    Without git, list every file outside of hidden folders and out/.
    """
    command = ["git", "ls-files", "--cached"]
    if not tracked_only:
        command += ["--others", "--exclude-standard"]
    if shutil.which("git"):
        answer = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if answer.returncode == 0:
            return sorted(name for name in answer.stdout.splitlines() if (root / name).is_file())
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    skipped = re.compile(r"\.|out$|__pycache__$")
    return sorted(path.as_posix() for path in files if not any(map(skipped.match, path.parts[:-1])))

def read_tree(root):
    """Read all Python files of a checkout."""
    names = [name for name in tree_files(root) if name.endswith(".py")]
    return [parse((root / name).read_text(encoding="utf-8"), name) for name in names]

def is_test(source):
    """Tell whether a file belongs to the tests."""
    return Path(source.path).parent.name == "tests"

def is_config(source):
    """Tell whether a file holds settings only: config/*.py and pretrain/config_*.py."""
    path = Path(source.path)
    in_pretrain = path.parent.name == "pretrain" and path.name.startswith("config_")
    return path.parent.name == "config" or in_pretrain

def nodes(source, *types):
    """Return all nodes of some types, in the order of ast.walk."""
    return [node for node in ast.walk(source.tree) if isinstance(node, types)]

def comments(source):
    """Yield (token, whether code stands before it on its line) for each comment."""
    for token in source.tokens:
        if token.type == tokenize.COMMENT:
            line, column = token.start
            yield token, bool(source.lines[line - 1][:column].strip())

def docstring_lines(source):
    """Return the numbers of the lines that docstrings occupy."""
    found = set()
    for node in ast.walk(source.tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        value = getattr(first, "value", None)
        text = getattr(value, "value", None)
        if isinstance(first, ast.Expr) and isinstance(value, ast.Constant) and isinstance(text, str):
            found.update(range(first.lineno, first.end_lineno + 1))
    return found

def code_lines(source):
    """Count the lines that are neither blank, nor a comment of their own, nor part of a docstring."""
    skipped = docstring_lines(source)
    for token, is_trailing in comments(source):
        if not is_trailing:
            skipped.add(token.start[0])
    return sum(bool(line.strip()) and number not in skipped for number, line in enumerate(source.lines, 1))

def count_tokens(source):
    """Count names, operators, numbers and strings.

    Python 3.12 and later split an f-string into several tokens. It counts as one, as it does before 3.12.
    """
    count = 0
    depth = 0
    for token in source.tokens:
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_END":
            depth -= 1
        if depth == 0 and (token.type in COUNTED_TOKENS or kind == "FSTRING_START"):
            count += 1
        if kind == "FSTRING_START":
            depth += 1
    return count

def tokens_per_line(source):
    """Return the density of a file: tokens per code line."""
    return count_tokens(source) / max(1, code_lines(source))

def function_length(node):
    """Count the lines of a function from its `def` to its end, docstring included."""
    return node.end_lineno - node.lineno + 1

def config_block(source):
    """Return the line numbers between the marks of the config block, an empty range without one."""
    marks = {token.string.strip(): token.start[0] for token, _ in comments(source) if token.start[1] == 0}
    return range(marks.get(BEGIN, 0) + 1, marks.get(END, 0))


# -- rules about one file ---------------------------------------------------------------------------

def columns(source):
    """Report lines of more than 110 columns."""
    for number, line in enumerate(source.lines, 1):
        if len(line) > COLUMNS:
            yield number, f"{len(line)} columns: break the line, {COLUMNS} are allowed"

def one_statement(source):
    """Report a second statement on a line, be it after a colon or a semicolon."""
    for token in source.tokens:
        if token.type == tokenize.OP and token.string == ";":
            yield token.start[0], "semicolon: write one statement per line"
    for node in nodes(source, ast.stmt):
        before = source.lines[node.lineno - 1].encode()[: node.col_offset].decode().strip()
        if before and not before.endswith(";"):
            yield node.lineno, f"`{before[:40]}` and its body on one line: put the body on its own line"

def statement_expressions(source):
    """Report expressions that serve as statements, and side effects in comprehensions."""
    unused = (ast.IfExp, ast.Tuple, ast.List, ast.BoolOp, *COMPREHENSIONS)
    for node in nodes(source, ast.Expr):
        if isinstance(node.value, unused):
            kind = type(node.value).__name__
            yield node.lineno, f"{kind} as a statement: write `if`, `for` or separate statements"
    for outer in nodes(source, *COMPREHENSIONS):
        for node in ast.walk(outer):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in MUTATORS:
                yield node.lineno, f".{node.func.attr}() in a comprehension: write a loop"

def tuple_assignments(source):
    """Report tuple assignments that neither unpack nor swap."""
    for node in nodes(source, ast.Assign):
        if not isinstance(node.value, (ast.Tuple, ast.List)):
            continue
        values = {ast.unparse(value) for value in node.value.elts}
        for target in node.targets:
            if not isinstance(target, (ast.Tuple, ast.List)):
                continue
            if {ast.unparse(name) for name in target.elts} != values:
                yield node.lineno, f"`{ast.unparse(target)} = ...` sets several names: one assignment each"

def named_lambdas(source):
    """Report a lambda that is given a name."""
    for node in nodes(source, ast.Assign, ast.AnnAssign, ast.NamedExpr):
        targets = getattr(node, "targets", None) or [node.target]
        if isinstance(node.value, ast.Lambda) and isinstance(targets[0], ast.Name):
            yield node.lineno, f"{targets[0].id} = lambda: write a function with `def`"

def nested_comprehensions(source):
    """Report a comprehension inside a comprehension."""
    for outer in nodes(source, *COMPREHENSIONS):
        if any(isinstance(node, COMPREHENSIONS) for node in ast.walk(outer) if node is not outer):
            yield outer.lineno, "comprehension inside a comprehension: write a loop, or name the inner one"

def is_boolean(node):
    """Tell whether an expression is a comparison, `and`, `or`, `not` or bool()."""
    is_not = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    is_bool = isinstance(node, ast.Call) and getattr(node.func, "id", None) == "bool"
    return isinstance(node, (ast.Compare, ast.BoolOp)) or is_not or is_bool

def boolean_multipliers(source):
    """Report a boolean as an operand of a multiplication."""
    for node in nodes(source, ast.BinOp, ast.AugAssign):
        operands = [getattr(node, field, None) for field in ("left", "right", "value")]
        if isinstance(node.op, ast.Mult) and any(map(is_boolean, operands)):
            yield node.lineno, "boolean as a multiplier: write `if`, or name the mask"

def function_lengths(source):
    """Report functions of more than 60 lines."""
    for node in nodes(source, *FUNCTIONS):
        if function_length(node) > FUNCTION_LINES:
            yield node.lineno, f"{node.name} has {function_length(node)} lines: split it at {FUNCTION_LINES}"

def parameters(source):
    """Report functions of more than 8 parameters; self is not counted, *args and **kw are."""
    for node in nodes(source, *FUNCTIONS):
        positional = [*node.args.posonlyargs, *node.args.args]
        if positional and positional[0].arg in ("self", "cls"):
            del positional[0]
        collected = [arg for arg in (node.args.vararg, node.args.kwarg) if arg]
        count = len(positional) + len(node.args.kwonlyargs) + len(collected)
        if count > PARAMETERS:
            yield node.lineno, f"{node.name} has {count} parameters: {PARAMETERS} are allowed"

def is_elif(parent, child):
    """Tell whether an `if` is the `elif` of its parent."""
    both = isinstance(parent, ast.If) and isinstance(child, ast.If)
    return both and child in parent.orelse and child.col_offset == parent.col_offset

def deepest_level(node, level=0):
    """Return the deepest level of blocks below a node. Functions inside it count for themselves."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFINITIONS):
            continue
        opens_level = isinstance(child, BLOCKS) and not is_elif(node, child)
        deepest = max(deepest, deepest_level(child, level + opens_level))
    return deepest

def nesting(source):
    """Report functions with more than 3 levels of blocks."""
    for node in nodes(source, *FUNCTIONS):
        level = deepest_level(node)
        if level > NESTING:
            message = f"{node.name} nests {level} levels, {NESTING} are allowed"
            yield node.lineno, f"{message}: leave early, or move a part out"

def density(source):
    """Report files of more than 11 tokens per code line."""
    average = tokens_per_line(source)
    if average > TOKENS_PER_LINE:
        yield 1, f"{average:.1f} tokens per code line: break long lines, name parts ({TOKENS_PER_LINE})"

def conditional_expressions(source):
    """Report files with more than 4 conditional expressions per 100 code lines; one is always allowed."""
    found = nodes(source, ast.IfExp)
    allowed = max(1, code_lines(source) * CONDITIONALS_PER_100_LINES // 100)
    if len(found) > allowed:
        places = " ".join(str(node.lineno) for node in found)
        yield found[0].lineno, f"{len(found)} conditional expressions, {allowed} allowed: see lines {places}"

def trailing_comments(source):
    """Report long comments behind code. The comment of a key may be longer: --help prints it."""
    block = config_block(source)
    for token, is_trailing in comments(source):
        line = token.start[0]
        allowed = KEY_COMMENT_COLUMNS if is_config(source) or line in block else COMMENT_COLUMNS
        length = len(token.string.lstrip("#").strip())
        if is_trailing and length > allowed:
            yield line, f"trailing comment of {length} columns: move it above the code ({allowed})"

def is_public(node):
    """Tell whether a node defines a public function or class."""
    return isinstance(node, DEFINITIONS) and not node.name.startswith("_")

def documented(source):
    """Yield (node, name, whether it needs a docstring) for what a reader can import."""
    stem = Path(source.path).stem
    if stem.startswith("_"):
        return
    yield source.tree, stem, True
    for node in filter(is_public, source.tree.body):
        yield node, node.name, True
        if not isinstance(node, ast.ClassDef):
            continue
        for method in filter(is_public, node.body):
            is_long = function_length(method) > UNDOCUMENTED_METHOD_LINES
            yield method, f"{node.name}.{method.name}", is_long

def docstring_faults(doc, is_function):
    """Yield what is wrong with the first line of a docstring."""
    first = (doc.splitlines() or [""])[0].strip()
    if not first[:1].isupper():
        yield "start with a capital"
    if not first.endswith("."):
        yield "end the first line with a period: it is one whole sentence"
    if re.search(r"(?<!e\.g)(?<!i\.e)[.!?] +[A-Z]", first):
        yield "put one sentence only on the first line"
    word = first.partition(" ")[0].strip(",:").lower()
    if is_function and word in NO_VERBS:
        yield f"start with a verb, not with {word!r}"

def docstrings(source):
    """Report missing docstrings and first lines that are not a sentence. Tests may go without."""
    if is_test(source):
        return
    for node, name, is_needed in documented(source):
        line = getattr(node, "lineno", 1)
        doc = ast.get_docstring(node)
        if doc is None:
            if is_needed:
                yield line, f"{name} has no docstring: say what it does, then shapes, units, errors"
            continue
        for fault in docstring_faults(doc, isinstance(node, FUNCTIONS)):
            yield line, f"docstring of {name}: {fault}"

def config_headers(source):
    """Report config files whose header has more than 8 lines of text."""
    header = (ast.get_docstring(source.tree) or "").splitlines()
    if is_config(source) and len(header) > CONFIG_HEADER_LINES:
        yield 1, f"header of {len(header)} lines: command, time and one number fit in {CONFIG_HEADER_LINES}"

def markers(source):
    """Report marks of unfinished work."""
    pattern = re.compile(rf"\b({'|'.join(MARKERS)})\b")
    for number, line in enumerate(source.lines, 1):
        if pattern.search(line):
            yield number, "mark of unfinished work: finish it, or file an issue"


FILE_RULES = [
    columns,
    one_statement,
    statement_expressions,
    tuple_assignments,
    named_lambdas,
    nested_comprehensions,
    boolean_multipliers,
    function_lengths,
    parameters,
    nesting,
    density,
    conditional_expressions,
    trailing_comments,
    docstrings,
    config_headers,
    markers,
]


# -- rules about the tree ---------------------------------------------------------------------------

def module_name(source):
    """Return the dotted name under which a file is imported from the root."""
    return source.path.removesuffix(".py").replace("/", ".")

def resolve(name, modules):
    """Return our module that a dotted name leads to, None for a foreign name."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None

def imported_from(node, package):
    """Yield the dotted names of a `from ... import ...`; relative ones start from the package."""
    base = node.module or ""
    if node.level:
        parents = package.split(".")[: 1 - node.level or None]
        base = ".".join([*parents, base]).strip(".")
    for alias in node.names:
        yield f"{base}.{alias.name}".strip(".")

def imports(source):
    """Yield (dotted name, line) of every import, import_module("...") and "module:Class" string."""
    for node in ast.walk(source.tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = imported_from(node, module_name(source).rpartition(".")[0])
        elif isinstance(node, ast.Call) and node.args:
            function = getattr(node.func, "attr", getattr(node.func, "id", None))
            name = getattr(node.args[0], "value", None)
            if function in ("import_module", "__import__") and isinstance(name, str):
                names = [name]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", node.value):
                names = [node.value.partition(":")[0]]
        for name in names:
            yield name, node.lineno

def import_graph(sources):
    """Return {module: {imported module: "path:line"}} of the modules outside of the tests."""
    ours = {module_name(source): source for source in sources if not is_test(source)}
    graph = {name: {} for name in ours}
    for name, source in ours.items():
        for imported, line in imports(source):
            target = resolve(imported, ours)
            if target and target != name:
                graph[name].setdefault(target, f"{source.path}:{line}")
    return graph

def shortest_cycle(graph, start):
    """Return the modules on a shortest way from a module back to itself, an empty list without one."""
    paths = [[start]]
    visited = set()
    for path in paths:
        for target in graph[path[-1]]:
            if target == start:
                return path
            if target not in visited:
                visited.add(target)
                paths.append([*path, target])
    return []

def import_cycles(sources):
    """Report import cycles, with the place of each import. Lazy imports and registry strings count."""
    graph = import_graph(sources)
    reported = set()
    for start in sorted(graph):
        cycle = shortest_cycle(graph, start)
        if not cycle or frozenset(cycle) in reported:
            continue
        reported.add(frozenset(cycle))
        places = [graph[a][b] for a, b in zip(cycle, [*cycle[1:], start])]
        path, _, line = places[0].rpartition(":")
        way = " -> ".join([*cycle, start])
        yield path, int(line), f"import cycle {way} ({', '.join(places)}): let imports run one way"

def top_level_names(sources):
    """Return {name: [(path, line, node)]} of the functions and classes at the top level of files."""
    found = defaultdict(list)
    for source in sources:
        for node in source.tree.body:
            if isinstance(node, DEFINITIONS):
                found[node.name].append((source.path, node.lineno, node))
    return found

def repeated_names(sources):
    """Report names that two files give to different functions or classes, and tests of one name."""
    ours = top_level_names(source for source in sources if not is_test(source))
    tests = top_level_names(source for source in sources if is_test(source))
    ours.pop("main", None)
    repeated = [(name, found) for name, found in ours.items() if len(found) > 1]
    for name, found in tests.items():
        if name.startswith("test_") and len(found) > 1:
            repeated.append((name, found))
    for name, found in repeated:
        places = ", ".join(f"{path}:{line}" for path, line, _ in found)
        path, line, _ = found[0]
        yield path, line, f"{name} is defined in several places ({places}): one name, one meaning"

def module_names(sources):
    """Report functions that share the name of a module."""
    ours = [source for source in sources if not is_test(source)]
    modules = {Path(source.path).stem: source.path for source in ours}
    for name, found in top_level_names(ours).items():
        for path, line, node in found:
            if name in modules and isinstance(node, FUNCTIONS):
                yield path, line, f"{name}() has the name of the module {modules[name]}: rename the function"


TREE_RULES = [import_cycles, repeated_names, module_names]


# -- rules about single files: they take text or numbers and yield sentences ------------------------

def config_keys(source):
    """Return {key: comment} of the config block. Indented comment lines continue the comment of a key."""
    block = config_block(source)
    kinds = (ast.Assign, ast.AnnAssign)
    keys = [node for node in source.tree.body if isinstance(node, kinds) and node.lineno in block]
    stops = [*(node.lineno for node in keys[1:]), block.stop]
    found = {}
    for node, stop in zip(keys, stops):
        target = getattr(node, "target", None) or node.targets[0]
        parts = []
        for token, is_trailing in comments(source):
            is_heading = token.start[1] == 0 and not is_trailing
            if node.lineno <= token.start[0] < stop and not is_heading:
                parts.append(token.string.lstrip("#").strip())
        found[ast.unparse(target)] = " ".join(parts)
    return found

def train_faults(source):
    """Yield what is too long in train.py: `main`, the config block, the comments of its keys."""
    mains = [node for node in source.tree.body if isinstance(node, FUNCTIONS) and node.name == "main"]
    if len(mains) != 1:
        yield f"{source.path} needs one function `main`"
    for node in mains:
        if function_length(node) > FUNCTION_LINES:
            yield f"main has {function_length(node)} lines, {FUNCTION_LINES} are allowed"
    keys = config_keys(source)
    if not 0 < len(keys) <= KEYS:
        yield f"the config block has {len(keys)} keys, 1 to {KEYS} are allowed"
    for name, comment in keys.items():
        if not comment:
            yield f"{name} has no comment"
        if len(comment) > KEY_COMMENT_COLUMNS:
            yield f"the comment of {name} has {len(comment)} columns, {KEY_COMMENT_COLUMNS} are allowed"

def help_faults(text):
    """Yield the lines of --help that are too wide."""
    for line in text.splitlines():
        if len(line) > HELP_COLUMNS:
            yield f"{len(line)} columns, {HELP_COLUMNS} are allowed: {line[:60]}..."

def words_before_command(text):
    """Count the words before the first `pip` or `python` command in a code block, None without one."""
    is_fenced = False
    words = 0
    for line in text.splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        is_code = is_fenced or line.startswith("    ")
        if is_code and re.match(r"\s*(\$ )?(pip|python)", line):
            return words
        words += len(line.split())
    return None

def readme_faults(text):
    """Yield what keeps a reader of the README from starting."""
    words = len(text.split())
    if words > README_WORDS:
        yield f"README.md has {words} words, {README_WORDS} are allowed: move the rest to docs/"
    before = words_before_command(text)
    if before is None or before > WORDS_BEFORE_COMMAND:
        allowed = WORDS_BEFORE_COMMAND
        yield f"README.md has {before} words before the first command, {allowed} are allowed"

def docs_faults(name, text):
    """Yield the length of a page of docs/ that is too long. The log and what is generated are free."""
    text = re.sub(r"<!-- (results|failures): .*?<!-- end of \1 -->", "", text, flags=re.DOTALL)
    words = len(text.split())
    if name != "log.md" and words > DOCS_WORDS:
        yield f"docs/{name} has {words} words, {DOCS_WORDS} are allowed"

def layout_faults(names):
    """Yield the top-level entries outside of the agreed layout."""
    for entry in sorted({name.partition("/")[0] for name in names}):
        if entry not in TOP_LEVEL and not re.fullmatch(r"requirements[a-z-]*\.txt", entry):
            yield f"{entry} does not belong at the top level: move it to a folder, or delete it"

def size_faults(sizes):
    """Yield the sum of the lines of the seven scripts, {name: lines}, when it is too high."""
    total = sum(sizes.values())
    if total > SCRIPTS_LINES:
        yield f"the seven scripts have {total} lines, {SCRIPTS_LINES} are allowed: {sizes}"

def subject_faults(subjects):
    """Yield the commits, as (hash, subject), whose subject is too long."""
    for commit, subject in subjects:
        if len(subject) > SUBJECT_COLUMNS:
            yield f"{commit}: subject of {len(subject)} columns, {SUBJECT_COLUMNS} are allowed: {subject}"


# -- the command for writers ------------------------------------------------------------------------

def file_findings(source, rules=FILE_RULES):
    """Return the sorted lines `file:line: rule: what to do` of the file rules."""
    found = set()
    for rule in rules:
        for line, message in rule(source):
            found.add((line, rule.__name__, message))
    return [f"{source.path}:{line}: {rule}: {message}" for line, rule, message in sorted(found)]

def tree_findings(sources, rules=TREE_RULES):
    """Return the lines `file:line: rule: what to do` of the tree rules."""
    found = []
    for rule in rules:
        for path, line, message in rule(sources):
            found.append(f"{path}:{line}: {rule.__name__}: {message}")
    return found

def figures(source):
    """Return one line that says where a file stands."""
    code = code_lines(source)
    conditionals = 100 * len(nodes(source, ast.IfExp)) / max(1, code)
    longest = max(nodes(source, *FUNCTIONS), key=function_length, default=None)
    text = f"{source.path}: {len(source.lines)} lines, {code} code lines, "
    text += f"{tokens_per_line(source):.1f} tokens per code line, "
    text += f"{conditionals:.1f} conditional expressions per 100 code lines"
    if longest:
        text += f", longest function {longest.name} ({function_length(longest)} lines)"
    return text

def main(paths):
    """Print the findings and figures of some files, or of the whole tree. Return the exit status."""
    found = []
    sources = []
    for path in paths or [name for name in tree_files(ROOT) if name.endswith(".py")]:
        # A path of the command line is relative to the current folder. Show it as the user wrote it.
        location = Path(path) if paths else ROOT / path
        try:
            sources.append(parse(location.read_text(encoding="utf-8"), path))
        except (SyntaxError, tokenize.TokenError) as error:
            found.append(f"{path}:{getattr(error, 'lineno', 1)}: this is not Python: {error}")
        except (OSError, ValueError) as error:
            found.append(f"{path}:1: this file cannot be read: {error}")
    for source in sources:
        found += file_findings(source)
    if not paths:
        found += tree_findings(sources)
    for line in [*found, *map(figures, sources)]:
        print(line)
    return int(bool(found))


# -- the tests over the tree ------------------------------------------------------------------------

def fail_on(findings):
    """Fail with a list of sentences, without a traceback."""
    findings = list(findings)
    if findings:
        pytest.fail(f"{len(findings)} to change:\n" + "\n".join(findings), pytrace=False)

@pytest.fixture(scope="module")
def sources():
    """Read the tree once for all rules."""
    return read_tree(ROOT)

@pytest.mark.parametrize("rule", FILE_RULES, ids=lambda rule: rule.__name__)
def test_each_file_follows(rule, sources):
    found = []
    for source in sources:
        found += file_findings(source, [rule])
    fail_on(found)

@pytest.mark.parametrize("rule", TREE_RULES, ids=lambda rule: rule.__name__)
def test_the_tree_follows(rule, sources):
    fail_on(tree_findings(sources, [rule]))

def test_train_py_tells_its_story_in_one_screen():
    fail_on(train_faults(parse((ROOT / "train.py").read_text(encoding="utf-8"), "train.py")))

def test_help_fits_in_a_terminal():
    command = [sys.executable, "train.py", "--help"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    assert "--out_dir" in answer.stdout
    fail_on(help_faults(answer.stdout))

def test_the_seven_scripts_are_read_in_an_afternoon():
    sizes = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in SCRIPTS}
    fail_on(size_faults(sizes))

def test_the_readme_is_short():
    fail_on(readme_faults((ROOT / "README.md").read_text(encoding="utf-8")))

def test_the_pages_of_docs_are_short():
    found = []
    for path in sorted((ROOT / "docs").glob("*.md")):
        found += docs_faults(path.name, path.read_text(encoding="utf-8"))
    fail_on(found)

def test_the_top_level_has_the_agreed_layout():
    """Untracked files are free: a user's my_env.py may lie beside train.py."""
    fail_on(layout_faults(tree_files(ROOT, tracked_only=True)))

def test_commit_subjects_are_short():
    """Skipped outside of a git checkout, and in a shallow clone that lacks the commit before the rules."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    command = ["git", "log", "--format=%h%x09%s", f"{LAST_COMMIT_BEFORE_THE_RULES}..HEAD"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if answer.returncode != 0:
        pytest.skip(f"the history since {LAST_COMMIT_BEFORE_THE_RULES} is not here")
    fail_on(subject_faults(line.split("\t", 1) for line in answer.stdout.splitlines()))


# -- the tests of the rules -------------------------------------------------------------------------

# Sources that a rule must report, by rule.
FIRES = {
    columns: ["x = '" + "a" * 110 + "'"],
    one_statement: [
        "if x: y = 1",
        "if x:\n    pass\nelse: y = 1",
        "for x in y: print(x)",
        "while x: f()",
        "def f(): return 1",
        "class A: x = 1",
        "class A(Exception): pass",
        "try: f()\nexcept E:\n    pass",
        "try:\n    f()\nexcept E: pass",
        "with f() as x: g(x)",
        "match x:\n    case 1: y = 1",
        "if (x and\n        y): z = 1",
        "x = 1; y = 2",
        "x = 1;",
        "if 'é': x = 1",
    ],
    statement_expressions: [
        "f() if x else g()",
        "f(), g()",
        "x and f()",
        "[f(), g()]",
        "[f(x) for x in y]",
        "{f(x) for x in y}",
        "{x: f(x) for x in y}",
        "(f(x) for x in y)",
        "n = sum(a.append(x) or 1 for x in y)",
        "z = [a.pop() for x in y]",
    ],
    tuple_assignments: [
        "a, b = 1, 2",
        "a, b = [], {}",
        "self.a, self.b = 1, 2",
        "a, b = [x, y]",
        "a = b, c = 1, 2",
        "a, b = b, a + b",
    ],
    named_lambdas: ["f = lambda x: x", "f: object = lambda: 0", "if (f := lambda: 0):\n    pass"],
    nested_comprehensions: [
        "z = [[x for x in y] for y in z]",
        "z = sum(x for x in [a for a in b])",
        "z = {k: max(v for v in w) for k, w in u}",
        "z = [x for x in y if any(a for a in x)]",
    ],
    boolean_multipliers: [
        "s = 's' * (n == 1)",
        "s = (a and b) * 2",
        "s = 's' * (not x)",
        "s = 's' * bool(x)",
        "s *= x > 1",
    ],
    function_lengths: ["def f():\n" + "    x = 1\n" * 60, "async def f():\n" + "    x = 1\n" * 60],
    parameters: [
        "def f(a, b, c, d, e, f, g, h, i):\n    pass",
        "def f(a, b, /, c, d, *e, f, g, h, **i):\n    pass",
        "class A:\n    def f(self, a, b, c, d, e, f, g, h, i):\n        pass",
    ],
    nesting: [
        "def f():\n for a in b:\n  if a:\n   while c:\n    with d:\n     e()",
        "def f():\n try:\n  pass\n except E:\n  if a:\n   match b:\n    case 1:\n     for c in d:\n      e()",
        "def f():\n if a:\n  pass\n else:\n  if b:\n   if c:\n    if d:\n     e()",
    ],
    density: ["x = a + b + c + d + e + f\n", "# a comment\n\nx = [1, 2, 3, 4, 5]\n"],
    conditional_expressions: ["x = 1 if a else 2\n" * 2, "x = 1 if a else 2\n" * 5 + "x = 1\n" * 100],
    trailing_comments: ["x = 1  # " + "a" * 41, f"{BEGIN}\nx = 1  # {'a' * 101}\n{END}"],
    docstrings: [
        "def f():\n    '''Return one.'''",
        "'''Compute one.'''\ndef f():\n    return 1",
        "'''Compute one.'''\nclass A:\n    pass",
        "'''compute one.'''",
        "'''Compute one'''",
        "'''Compute one. Or two.'''",
        "'''Compute one.'''\ndef f():\n    '''The one.'''",
        "'''Compute one.'''\nclass A:\n    '''One.'''\n    def f(self):\n" + "        x = 1\n" * 8,
    ],
    markers: [f"# {marker}: later" for marker in MARKERS],
}

# Sources that a rule must not report, by rule.
PASSES = {
    columns: ["x = '" + "a" * 104 + "'", "x = '" + "é" * 104 + "'"],
    one_statement: [
        "if x:\n    y = 1\nelif z:\n    y = 2\nelse:\n    y = 3",
        "@cache\ndef f():\n    return {1: 2, 3: lambda: 4}",
        "'é'\nx = '; if x: y'  # a; b",
        "try:\n    f()\nexcept E:\n    pass\nfinally:\n    g()",
    ],
    statement_expressions: [
        "'text'",
        "f(x for x in y)",
        "x = a if b else c",
        "yield_ = [f(x) for x in y]",
        "for x in y:\n    z.append([a for a in x])",
    ],
    tuple_assignments: [
        "a, b = b, a",
        "x[i], x[j] = x[j], x[i]",
        "a, b = f()",
        "a, *b = c",
        "a = 1, 2",
        "for a, b in c:\n    pass",
    ],
    named_lambdas: ["x = sorted(y, key=lambda z: -z)", "x = {'a': lambda: 0}"],
    nested_comprehensions: ["z = [x for y in z for x in y]", "a = [x for x in y]\nb = [x for x in a]"],
    boolean_multipliers: ["s = 's' * n", "s = x * mask", "s = (a == b) + 1"],
    function_lengths: ["def f():\n" + "    x = 1\n" * 59],
    parameters: [
        "def f(a, b, c, d, e, f, g, h):\n    pass",
        "class A:\n    def f(self, a, b, c, d, e, f, *g, **h):\n        pass",
    ],
    nesting: [
        "def f():\n for a in b:\n  if a:\n   c()\n  elif d:\n   while e:\n    g()\n  else:\n   h()",
        "def f():\n for a in b:\n  if a:\n   if c:\n    def g():\n     for d in e:\n      pass",
    ],
    density: ["x = a + b + c + d + e\n", "x = f'{a} {b} {c} {d} {e + 1} {f}'", "# a, b, c\nx = 1\n"],
    conditional_expressions: ["x = 1 if a else 2\n", "x = 1 if a else 2\n" * 4 + "x = 1\n" * 96],
    trailing_comments: [
        "x = 1  # " + "a" * 40,
        "# " + "a" * 100,
        f"{BEGIN}\nx = 1  # {'a' * 100}\n{END}",
    ],
    docstrings: [
        "'''\nTrain a model, e.g. SmolVLM.\n\nMore. And more.\n'''",
        "'''Compute one.'''\ndef f():\n    '''Return one.\n\n    And more.\n    '''",
        "'''Compute one.'''\ndef _f():\n    pass",
        "'''Compute one.'''\nclass A:\n    '''A pair of ones.'''\n    def f(self):\n        return 1",
    ],
    markers: ["# to do: nothing"],
}

@pytest.mark.parametrize("rule", FILE_RULES, ids=lambda rule: rule.__name__)
def test_each_rule_can_fail(rule):
    """Each rule reports what it forbids and nothing else."""
    if rule is not config_headers:
        assert rule in FIRES and rule in PASSES
    for text in FIRES.get(rule, []):
        assert list(rule(parse(text))), f"{rule.__name__} does not report:\n{text}"
    for text in PASSES.get(rule, []):
        assert not list(rule(parse(text))), f"{rule.__name__} reports:\n{text}"

def test_config_files_have_rules_of_their_own():
    long_header = "'''" + "A line.\n" * 9 + "'''\n"
    comment = f"x = 1  # {'a' * 100}"
    for path in ("config/numberline.py", "pretrain/config_tiny.py"):
        assert list(config_headers(parse(long_header, path)))
        assert not list(config_headers(parse(long_header.replace("A line.\n", "", 1), path)))
        assert not list(trailing_comments(parse(comment, path)))
        assert list(trailing_comments(parse(comment.replace("#", "# a"), path)))
    assert not list(config_headers(parse(long_header, "model.py")))
    assert not list(docstrings(parse("def f():\n    pass", "tests/test_model.py")))

def report(rule, files):
    """Return what a tree rule reports about {path: text}, as one text."""
    return "\n".join(tree_findings([parse(text, path) for path, text in files.items()], [rule]))

@pytest.mark.parametrize(
    "back",
    [
        "import worlds.cards",
        "from worlds import cards",
        "from worlds.cards import EZPoints",
        "def f():\n    import worlds.cards",
        "x = importlib.import_module('worlds.cards')",
        "WORLDS = {'EZPoints': 'worlds.cards:EZPoints'}",
    ],
)
def test_an_import_cycle_is_reported(back):
    files = {
        "envs.py": back,
        "worlds/cards.py": "from .gym import Gym",
        "worlds/gym.py": "import numpy\nfrom envs import World",
    }
    message = report(import_cycles, files)
    assert "envs -> worlds.cards -> worlds.gym -> envs" in message
    assert message.count("\n") == 0 and "worlds/gym.py:2" in message
    files["worlds/gym.py"] = "import numpy\nX = 'not envs:World'"
    assert not report(import_cycles, files)

def test_repeated_names_are_reported():
    assert report(repeated_names, {"a.py": "def f():\n    pass", "b.py": "class f:\n    pass"})
    assert report(repeated_names, {"tests/a.py": "def test_f():\n    pass\n" * 2})
    assert not report(repeated_names, {"a.py": "def main():\n    pass", "b.py": "def main():\n    pass"})
    helper = "def f():\n    pass"
    assert not report(repeated_names, {"tests/a.py": helper, "tests/b.py": helper})
    assert not report(repeated_names, {"a.py": "class A:\n    def f():\n        pass", "b.py": "f = 1"})
    evaluate = "def evaluate():\n    pass"
    assert report(module_names, {"evaluate.py": evaluate})
    assert report(module_names, {"evaluate.py": "", "extras/report.py": evaluate})
    assert not report(module_names, {"tests/evaluate.py": "", "extras/report.py": evaluate})
    assert not report(module_names, {"evaluate.py": "class A:\n    def evaluate():\n        pass"})

def test_the_config_block_of_train_is_measured():
    lines = [
        BEGIN,
        "# run",
        "a = 1  # one",
        "       # and more",
        "b: int = 2",
        "# model",
        "c = 3  # " + "c" * 101,
        END,
    ]
    block = "\n".join(lines) + "\n"
    source = parse(block + "def main():\n" + "    x = 1\n" * 60)
    assert config_keys(source) == {"a": "one and more", "b": "", "c": "c" * 101}
    faults = "\n".join(train_faults(source))
    assert "main has 61 lines" in faults and "b has no comment" in faults and "comment of c has 101" in faults
    keys = "".join(f"k{i} = 1  # one\n" for i in range(KEYS))
    short = f"{BEGIN}\n{keys}{END}\ndef main():\n    pass"
    assert not list(train_faults(parse(short)))
    assert f"{KEYS + 1} keys" in "".join(train_faults(parse(short.replace(END, f"x = 1  # one\n{END}"))))
    assert "0 keys" in "".join(train_faults(parse("def main():\n    pass")))

def test_texts_and_the_layout_are_measured():
    start = "word " * 120 + "\n```\npip install x\n```\n"
    assert not list(readme_faults("word\n\n    python train.py\n"))
    assert list(readme_faults("word\n\npython train.py\n"))
    assert list(readme_faults("more " + start)) and list(readme_faults(start + "word " * 1700))
    assert list(docs_faults("method.md", "word " * 1501)) and not list(docs_faults("log.md", "word " * 1501))
    block = "<!-- results: x -->\n" + "| word |\n" * 1501 + "<!-- end of results -->"
    assert not list(docs_faults("results.md", block))
    assert list(docs_faults("results.md", "word\n" * 1501))
    assert not list(layout_faults(["train.py", "requirements-envs.txt", "docs/log.md", ".ci/run"]))
    assert len(list(layout_faults(["LOG.md", "tiny-vlm/config.json", "tiny-vlm/model.safetensors"]))) == 2
    assert list(help_faults("a" * 121)) and not list(help_faults("a" * 120))
    assert list(size_faults({"a": 3801})) and not list(size_faults({"a": 3000, "b": 800}))
    assert list(subject_faults([("1", "a" * 73)])) and not list(subject_faults([("1", "a" * 72)]))

def test_an_f_string_is_one_token():
    """Python 3.12 splits f-strings; the figure is the same on every Python."""
    assert count_tokens(parse("x = f'{a!r:>{width}} {b[\"c\"]}' + 'd'")) == 5

def test_the_command_reports_and_returns_a_status(tmp_path, capsys):
    good = tmp_path / "good.py"
    bad = tmp_path / "bad.py"
    broken = tmp_path / "broken.py"
    good.write_text("'''Hold one number.'''\nx = 1\n")
    bad.write_text("'''Hold one number.'''\nx = 1; y = 2\n")
    broken.write_text("x = (\n")
    assert main([str(good)]) == 0
    assert capsys.readouterr().out.startswith(f"{good}: 2 lines, 1 code lines, 4.0 tokens per code line")
    assert main([str(good), str(bad), str(broken), str(tmp_path / "missing.py")]) == 1
    printed = capsys.readouterr().out
    assert f"{bad}:2: one_statement: semicolon" in printed
    assert f"{broken}:1: this is not Python" in printed and "missing.py:1: this file cannot" in printed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
