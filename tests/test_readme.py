"""
Test that README.md, docs/ and the config files say what is true of the files beside them.

    python -m pytest tests/test_readme.py
"""
import ast
import importlib.util
import os, re, shlex

import numpy as np
import pytest

import evaluate
from configurator import check_config, configure
from evaluate import episode_summary, play, scripted_agent
from small_runs import metrics, one_sentence, results, run
from small_runs import tiny  # noqa: F401  (a fixture)
from test_style import ROOT, SCRIPTS, import_graph, read_tree, tree_files
from worlds.registry import FAMILIES, QUESTIONS, make

README = "README.md"
PAGES = [README, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
# The log reports what was run once, with the names of that time.
CURRENT_PAGES = [page for page in PAGES if page != "docs/log.md"]
SOURCES = [name for name in tree_files(ROOT) if name.endswith(".py") and not name.startswith("tests/")]
CONFIGS = [name for name in SOURCES if re.match(r"config/|pretrain/config_", name)]

def read(name):
    """Read a text file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")

def section(page, heading):
    """Return the part of a page under a heading."""
    text = read(page)
    start = text.index(f"\n## {heading}")
    return text[start:].split("\n## ")[1]


# ---- commands ----

def code_lines(text):
    """Yield the lines of code in a page: fenced, indented, or between backticks."""
    fences = text.split("```")
    for block in fences[1::2]:
        yield from block.splitlines()
    for block in fences[0::2]:
        for line in block.splitlines():
            if line.startswith("    "):
                yield line
        # code between backticks may be wrapped
        for code in re.findall(r"`([^`]+)`", block):
            yield code.replace("\n", " ")

def page_text(name):
    """Return the text of a page, or the docstring of a Python file."""
    text = read(name)
    if name.endswith(".py"):
        text = ast.get_docstring(ast.parse(text)) or ""
    # a line that continues on the next one
    return re.sub(r"\\\n\s*", "", text)

def commands_in(name):
    """List the commands of a page that start Python or torchrun, as lists of words."""
    found = []
    for line in code_lines(page_text(name)):
        line = line.partition("  #")[0]
        # [what one may add], other flags, and a variable of the shell
        line = re.sub(r"\[[^]]*\]$| \.\.\.$", "", line.strip())
        line = line.replace("$F", "FrozenLake")
        for part in re.split(r"&&|\|", line):
            match = re.match(r"(?:\$ )?((?:python|torchrun) .*)", part.strip())
            if match:
                found.append(shlex.split(match.group(1)))
    return found

def script_and_arguments(words):
    """Split a command -> (the script, or the module behind -m; its arguments)."""
    program, *words = words
    if program == "torchrun":
        while words[0].startswith("--"):
            del words[0]
    elif words[0] == "-m":
        del words[0]
    return words[0], words[1:]

def check_command(words):
    """Raise SystemExit or AssertionError if a command cannot be meant."""
    script, argv = script_and_arguments(words)
    if not script.endswith(".py"):
        assert importlib.util.find_spec(script), f"there is no module {script}"
        return
    assert (ROOT / script).is_file(), f"there is no script {script}"
    if "--help" in argv:
        return
    if script == "evaluate.py":
        if argv and not argv[0].startswith("-"):
            del argv[0]
        configure(evaluate.__file__, argv, files=False, quiet=True)
    if script == "bench.py" and argv and argv[0] in ("envs", "gpu", "peer", "scale", "vocabulary", "sizes"):
        del argv[0]
    if script in ("train.py", "bench.py"):
        check_config(configure(str(ROOT / "train.py"), argv, quiet=True))

@pytest.mark.parametrize("name", [*CURRENT_PAGES, *SOURCES])
def test_every_command_is_accepted(name, monkeypatch):
    """Keys exist, values fit together, config files and modules are there."""
    monkeypatch.chdir(ROOT)
    for words in sorted(set(map(tuple, commands_in(name)))):
        check_command(words)

def test_the_commands_are_found():
    """The search for commands finds those that a reader sees."""
    count = {name: len(commands_in(name)) for name in CURRENT_PAGES}
    assert count[README] >= 12
    assert count["docs/data.md"] >= 10
    assert count["docs/models.md"] >= 10
    assert sum(count.values()) > 60
    assert ["python", "evaluate.py", "out/x", "--report"] in commands_in(README)
    assert len(commands_in("train.py")) == 6

@pytest.mark.parametrize(
    "command",
    [
        "python train.py config/nothing.py",
        "python train.py config/numberline.py --learning_rate=1",
        "python train.py --actor_loss=sft --q_weight=1",
        "python evaluate.py out/x --episode=3",
        "torchrun --nproc_per_node=8 nothing.py",
        "python -m extras.nothing",
    ],
)
def test_a_wrong_command_is_noticed(command, monkeypatch):
    """The check of commands can fail."""
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, AssertionError)):
        check_command(shlex.split(command))

def test_requirements_exist():
    """Every file that pip is told to read exists."""
    for page in CURRENT_PAGES:
        for name in re.findall(r"pip install -r (\S+?)[`\s]", read(page)):
            assert (ROOT / name).is_file()
    # .ci/run looks for this line
    assert "pip install -r requirements.txt && python -m pytest" in read(README)


# ---- configs ----

@pytest.mark.parametrize("name", CONFIGS)
def test_config_headers_name_their_command(name):
    """A config file is started by the command in its header."""
    assert ["python", "train.py", name] in [words[:3] for words in commands_in(name)]

@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_accepted(name):
    """Each names keys with values that fit together, and an environment that exists."""
    cfg = configure(str(ROOT / "train.py"), [str(ROOT / name)], quiet=True)
    check_config(cfg)
    try:
        evaluate.env_factory(cfg)()
    except SystemExit as error:
        # the package of this environment is optional, and the sentence says how to get it
        assert re.search("requirements-envs.txt|apt-get install", str(error))
        assert re.match("|".join([*FAMILIES, *QUESTIONS, "FrozenLake"]), cfg.env)


# ---- files and links ----

def test_the_table_of_files_is_complete():
    """Every name in it exists, and no script and no folder of code is missing."""
    table = section(README, "The files")
    named = []
    for row in re.findall(r"^\| (`.*?) \|", table, re.M):
        named += re.findall(r"`([^`]+)`", row)
    assert len(named) == len(set(named)) >= 14
    for name in named:
        path = ROOT / name
        assert path.is_dir() if name.endswith("/") else path.is_file(), name
    tracked = tree_files(ROOT, tracked_only=True)
    folders = {name.partition("/")[0] + "/" for name in tracked if "/" in name}
    assert {*SCRIPTS, "bench.py"} <= set(named)
    assert folders - {"assets/", ".ci/"} <= set(named)

def anchors(page):
    """List the anchors of a page's headings, as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", read(page), re.M):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        found.append(plain.replace(" ", "-"))
    return found

@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Relative links and pictures name existing files, and existing headings of pages."""
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (folder / name).resolve() if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path.relative_to(ROOT)), f"{page}: {target}"

@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder_is_left(page):
    """Nothing waits to be filled in."""
    assert not re.search(r"@[A-Z]+@|@@", read(page))

def reachable(graph, module):
    """Return the modules of ours that a module imports, directly or through others."""
    found = set()
    waiting = [module]
    while waiting:
        new = set(graph[waiting.pop()]) - found
        found |= new
        waiting += new
    return found

def test_imports_run_one_way():
    """Lazy imports and registry strings included; the absence of cycles is a rule of test_style.py."""
    graph = import_graph(read_tree(ROOT))
    below = {name: reachable(graph, name) for name in graph}
    assert not below["agent_rl"]
    # their own helpers only
    for name in ("buffer", "configurator"):
        assert all(helper.startswith("extras.") for helper in below[name]), name
    # what plays and what learns does not know who measures and who trains
    for name in ("envs", "model", "worlds.registry"):
        assert not below[name] & {"agent_rl", "buffer", "evaluate", "train"}, name
    for name in set(graph) - {"bench", "train"}:
        assert not below[name] & {"bench", "train"}, name


# ---- metrics ----

def test_every_metric_is_in_the_table(tiny, tmp_path):
    """What a run writes to metrics.jsonl and the table in docs/method.md are the same names."""
    text = section("docs/method.md", "Healthy curves")
    table = text[text.index("| metric |") :]
    rows = [row.split(" | ") for row in re.findall(r"^\| (`.*) \|$", table, re.M)]
    named = {name: row[1] for row in rows for name in re.findall(r"`([^`]+)`", row[0])}
    assert "tokens" in named

    out = run(tmp_path / "run", tiny, eval_interval=2)
    with open(os.path.join(out, "metrics.jsonl")) as f:
        logged = set(re.findall(r'"([\w/]+)":', f.read()))
    assert logged > set(metrics(out)[0])
    groups = {name.partition("/")[0] + "/*" for name in logged if "/" in name}
    single = {name for name in logged if "/" not in name}
    # these two are in the sentence above the table
    assert "`step`" in text and "`phase`" in text
    assert groups | single == {*named, "step", "phase"}
    for name in logged:
        group, _, part = name.partition("/")
        if group == "rollout":
            assert f"`{part}`" in named["rollout/*"]
    # each name has a meaning
    assert all(named.values())


# ---- the example of an environment ----

def example(page):
    """Return the class MyEnv that a page shows."""
    blocks = re.findall(r"```python\n(.*?)```", read(page), re.S)
    [code] = [block for block in blocks if "class MyEnv" in block]
    return code

@pytest.fixture
def my_env(tmp_path):
    """Save README's example as a file -> the name for --env."""
    file = tmp_path / "my_env.py"
    file.write_text(example(README), encoding="utf-8")
    return f"{file}:MyEnv"

def test_the_example_is_short():
    """It has at most 25 lines, and is the same in both places."""
    code = example(README)
    assert code.count("\n") <= 25
    assert code == example("docs/environments.md")
    assert "--env=my_env.py:MyEnv" in read(README)

def test_the_example_is_played(my_env):
    """The expert always reaches the goal, random play sometimes, and held-out starts exist."""
    rates = {}
    for player in ("expert", "random", "malformed"):
        act = scripted_agent({player: 1.0}, np.random.default_rng(0))
        episodes = list(play(lambda: make(my_env), act, list(range(40)), split="train"))
        summary = episode_summary(episodes)
        rates[player] = summary["success"]
        assert (summary["valid"] == 1) == (player != "malformed")
    assert rates["expert"] == 1
    assert 0.1 < rates["random"] < 0.9
    assert rates["malformed"] == 0
    env = make(my_env)
    observation, _ = env.reset(seed=0, options={"split": "test"})
    assert observation["image"].size == (80, 80)
    assert env.goal in observation["text"]

def test_the_example_is_trained_and_evaluated(my_env, tiny, tmp_path, capsys):
    """train.py and evaluate.py find the class in its file."""
    out = run(tmp_path / "run", tiny, env=my_env, max_turns=3)
    assert len(metrics(out)) == 8
    assert len(results(out)) == 5
    evaluate.main([f"--env={my_env}", "--agent=expert", "--episodes=5"])
    assert "100.0 %" in capsys.readouterr().out
    # a file is code: a run does not start it by itself
    one_sentence(lambda: evaluate.main([out]), "my_env.py", "--env=")
    evaluate.main([out, f"--env={my_env}", "--episodes=2"])
