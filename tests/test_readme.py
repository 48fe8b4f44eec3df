"""What the README says is true of the files beside it."""
import importlib.util, os, re

import numpy as np
import pytest

import envs
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


def test_the_environment_in_the_readme_works(tmp_path):
    """The example is complete: it imports, its expert wins, its pictures differ, it is found by name."""
    code = re.search(r"```python\n(from envs import.*?)```", README, re.S).group(1)
    assert code.count("\n") <= 40
    (tmp_path / "example.py").write_text(code)
    spec = importlib.util.spec_from_file_location("example", tmp_path / "example.py")
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        env, rng = envs.make("Thermostat"), np.random.default_rng(0)
        pictures = set()
        for seed in range(20):
            obs, _ = env.reset(seed=seed)
            over = False
            while not over:
                pictures.add(obs["image"].tobytes())
                obs, _, terminated, truncated, info = env.step(envs.player("expert", env, rng))
                over = terminated or truncated
            assert info["success"] and info["success_return"]
        assert len(pictures) >= 6 and "[action] warmer" in obs["text"]
    finally:
        envs.ENVS.pop("Thermostat", None)


@pytest.mark.parametrize("name", sorted(f for f in os.listdir(os.path.join(ROOT, "config")) if f.endswith(".py")))
def test_config_headers_name_their_command(name):
    with open(os.path.join(ROOT, "config", name)) as f:
        assert f"python train.py config/{name}" in f.read()


def test_no_placeholder_is_left():
    assert "@@" not in README and set(parse_block(os.path.join(ROOT, "train.py")))
