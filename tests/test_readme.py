"""What the README says is true of the files beside it."""
import os, re

import pytest

from configurator import check_config, configure, parse_block

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
    README = f.read()
CORE = ["train.py", "agent_rl.py", "model.py", "envs.py", "buffer.py", "evaluate.py", "configurator.py", "bench.py"]


def test_the_file_map_names_every_file_and_no_other():
    rows = re.findall(r"^\| `([\w./]+)` \|", README[README.index("## The files"):README.index("## What a run writes")], re.M)
    assert set(CORE) <= set(rows)
    assert all(os.path.exists(os.path.join(ROOT, row)) for row in rows)
    assert {f for f in os.listdir(ROOT) if f.endswith(".py")} <= set(rows)


def test_every_command_in_the_readme_is_accepted():
    commands = re.findall(r"python (train|evaluate|bench)\.py([^\n`#|]*)", README)
    assert len(commands) > 5
    for script, words in commands:
        argv = [w for w in words.split() if w != "..."]
        argv = argv[1:] if script == "bench" and argv[:1] in (["envs"], ["vocabulary"], ["sizes"]) else argv
        if script == "evaluate":
            argv = argv[1:] if argv and not argv[0].startswith("-") else argv
        if "--help" in argv:
            continue
        cfg = configure(os.path.join(ROOT, ("train" if script == "bench" else script) + ".py"),
                        [os.path.join(ROOT, w) if w.endswith(".py") else w for w in argv], quiet=True)
        assert script == "evaluate" or check_config(cfg) is cfg


def test_every_metric_in_the_readme_is_logged():
    """The dictionary of metrics and what the code writes are the same list."""
    section = README[README.index("| metric |"):README.index("## Your own environment")]
    named = set(re.findall(r"`([\w/*]+)`", " ".join(row.split("|")[1] for row in section.splitlines() if row.startswith("| `"))))
    with open(os.path.join(ROOT, "agent_rl.py")) as f:
        source = f.read()
    logged = set(re.findall(r"(\w+)=(?:per\(|s\[)", source[source.index("def summarise"):])) - {"tokens"}
    assert logged <= named, logged - named
    assert named - logged == {"rollout/*", "eval/*", "time/*", "grad_norm", "lr"}


def test_the_environment_in_the_readme_is_the_one_that_runs():
    """The example is short, compiles, and is the class that stands in envs.py, letter for letter (tests/extra_envs.py plays it: gymnasium is optional)."""
    code = re.search(r"```python\n(class .*?)```", README, re.S).group(1)
    assert code.count("\n") <= 40
    compile(code, "README.md", "exec")
    with open(os.path.join(ROOT, "envs.py")) as f:
        assert code in f.read()
    assert "config/frozenlake.py" in README


@pytest.mark.parametrize("name", sorted(f for f in os.listdir(os.path.join(ROOT, "config")) if f.endswith(".py")))
def test_config_headers_name_their_command(name):
    with open(os.path.join(ROOT, "config", name)) as f:
        assert f"python train.py config/{name}" in f.read()


def test_no_placeholder_is_left():
    assert "@@" not in README and set(parse_block(os.path.join(ROOT, "train.py")))
