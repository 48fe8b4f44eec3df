"""
Test runs that evaluate.py finds on disk: of older versions, and with an environment in a Python file.

    python -m pytest tests/test_foreign_runs.py
"""
import json
import os
import shutil

import pytest
import torch

import cases_models
import evaluate
from buffer import Buffer
from configurator import parse_block
from model import read_tensors
from small_runs import content, one_sentence, read_json, results, run
from small_runs import straight, tiny  # noqa: F401  (fixtures)
from test_train import OLD_KEYS

# executed, it leaves a file behind
ENV_FILE = '''
import pathlib

from envs import Env, NumberLine

pathlib.Path(__file__ + ".executed").touch()


class MyEnv(NumberLine):
    """A number line of the user's."""

    name = "MyEnv"
    max_turns = 2


class Mute(MyEnv):
    """The same without an expert."""

    expert = Env.expert
'''


def rewrite(out, **changes):
    """Change keys in the config.json of a run."""
    saved = read_json(out, "config.json") | changes
    with open(os.path.join(out, "config.json"), "w") as f:
        json.dump(saved, f)


@pytest.fixture
def own(straight, tmp_path):
    """A copy of a trained run, to write into."""
    return str(shutil.copytree(straight, tmp_path / "run"))


# ---- older versions ----


def test_an_old_run_is_evaluated(tmp_path, monkeypatch):
    """Its config.json has 80 keys and model="tiny-vlm", the old name of the base; the table is the same."""
    out = run(tmp_path / "run", "bases/tiny-vlm", offline_updates=1, online_updates=0)
    rewrite(out, **OLD_KEYS, model="tiny-vlm")
    # the keys of then, and four that are younger
    assert len(read_json(out, "config.json")) == 84
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("envs.NumberLine.max_turns", 3)
        before = results(out)
        # the base is found from any folder
        patch.chdir(tmp_path)
        evaluate.main([out])
        assert results(out) == before


def test_settings_of_an_old_run_are_the_keys_of_today(own):
    """Removed keys are left out, and a key that the run did not know has its default."""
    rewrite(own, **OLD_KEYS)
    saved = read_json(own, "config.json")
    del saved["explore"]
    with open(os.path.join(own, "config.json"), "w") as f:
        json.dump(saved, f)
    block = parse_block(evaluate.TRAIN)
    run_cfg = evaluate.read_run_config(own)
    assert list(vars(run_cfg)) == [*block, "lora_alpha"]
    assert run_cfg.explore == block["explore"].default
    assert run_cfg.lora_r == saved["lora_r"]


def test_an_old_run_that_plays_differently_is_refused(own):
    """Its table would be wrong in silence."""
    rewrite(own, **OLD_KEYS | dict(invalid="random"))
    before = content(own)
    one_sentence(lambda: evaluate.main([own]), own, "invalid='random'", "play", "meta.json")
    assert content(own) == before


def test_an_old_critic_began_at_the_lowest_return(own):
    """q_init=None meant that, which only a resumed run needs; reward_clip=None left rewards as they are."""
    rewrite(own, q_init=None, reward_clip=None)
    run_cfg = evaluate.read_run_config(own, "report")
    assert run_cfg.reward_clip == 0
    words = [own, "q_init=None", "meta.json"]
    one_sentence(lambda: evaluate.read_run_config(own, "resume"), *words)


def test_an_old_critic_is_as_wide_as_its_model(tiny, tmp_path, monkeypatch):
    """A Q head of today would not fit into its checkpoint: it keeps its width when it plays and goes on."""
    monkeypatch.setattr("model.Q_WIDTH", 32)
    out = run(tmp_path / "run", tiny, stop_at=6)
    assert read_tensors(os.path.join(out, "ckpt", "q_head.safetensors"))["heads.0.mlp.1.bias"].shape == (32,)
    monkeypatch.undo()
    evaluate.main([out, "--episodes=1", "--report"])
    run(out, tiny, resume=True)
    vlm, _ = evaluate.load_run(out, evaluate.read_run_config(out))
    assert vlm.heads[0].mlp[1].out_features == 32


def test_an_old_run_keeps_the_alpha_of_its_adapters(own):
    """lora_alpha was a key: a run with another value than today's constant plays as it was trained."""
    rewrite(own, **OLD_KEYS | dict(lora_alpha=16))
    file = os.path.join(own, "ckpt", "adapter_config.json")
    with open(file) as f:
        config = json.load(f)
    with open(file, "w") as f:
        json.dump(config | dict(lora_alpha=16), f)
    # an old checkpoint has no digests of its files
    cases_models.sign(os.path.join(own, "ckpt"))
    vlm, _ = evaluate.load_run(own, evaluate.read_run_config(own))
    assert {layer.scale for layer in vlm.lora.values()} == {16 / config["r"]}


@pytest.mark.parametrize(
    "key, value",
    [("gamma_token", 0.9), ("reward_scale", 0.1), ("v_support", 0.1), ("awr_temperature", 1.0)],
)
def test_an_old_run_with_other_values_plays_but_is_not_judged(own, key, value):
    """The policy is the same, but the page would show other values than the critic learned."""
    rewrite(own, **OLD_KEYS | {key: value})
    evaluate.main([own, "--episodes=1"])
    words = [f"{key}={value!r}", "report"]
    one_sentence(lambda: evaluate.main([own, "--episodes=1", "--report"]), *words)
    one_sentence(lambda: evaluate.main([os.path.join(own, "data"), "--report"]), *words)


@pytest.mark.parametrize("key, value", [("lora_dropout", 0.1), ("timeout", 5.0), ("weights", "float32")])
def test_other_removed_keys_do_not_matter(own, key, value):
    """They were about training, about the machine, or about rounding."""
    rewrite(own, **OLD_KEYS | {key: value})
    evaluate.main([own, "--episodes=1", "--report"])


# ---- environments in files ----


@pytest.fixture
def env_file(tmp_path, monkeypatch):
    """A file with environments, in the current folder."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my_env.py"
    file.write_text(ENV_FILE)
    return file


def was_executed(file):
    """Tell whether the file with environments was run, and forget it."""
    trace = file.with_name(file.name + ".executed")
    found = trace.exists()
    trace.unlink(missing_ok=True)
    return found


def test_an_environment_in_a_file_is_played(env_file, capsys):
    """--env=FILE:CLASS works without a run."""
    evaluate.main(["--env=my_env.py:MyEnv", "--agent=expert", "--episodes=3", "--save=x"])
    assert "my_env.py:MyEnv, expert: 3 episodes" in capsys.readouterr().out
    assert {row["env"] for row in Buffer("x").rows} == {"MyEnv"}


@pytest.mark.parametrize("agent", ["expert", "biased"])
def test_an_environment_without_an_expert_is_one_sentence(env_file, agent):
    """Both scripted players need expert(); a random one does not."""
    for name in ("my_env.py:Mute", "NumberLine,my_env.py:Mute"):
        command = [f"--env={name}", f"--agent={agent}"]
        one_sentence(lambda: evaluate.main(command), f"--agent={agent}", "expert()", name)
    evaluate.main(["--env=my_env.py:Mute", "--agent=random", "--episodes=2"])


@pytest.mark.parametrize("name", ["my_env.py:MyEnv", "NumberLine, my_env.py:MyEnv", "my_env.py"])
def test_a_run_does_not_run_a_file_by_itself(own, env_file, name):
    """A file that only the run's config.json names is not executed; the sentence says how to allow it."""
    rewrite(own, env=name)
    commands = [[own], [own, "--agent=random"], [own, "--report"], [own, "--env=my_env.py:Mute"]]
    for command in commands:
        flag = "--env=" + name.replace(" ", "")
        one_sentence(lambda: evaluate.main(command), own, repr(name), "read it", flag)
    assert not was_executed(env_file)
    # its recorded episodes do not need the environment
    evaluate.main([os.path.join(own, "data"), "--report"])
    assert not was_executed(env_file)


def test_a_run_plays_a_file_that_the_command_line_names(own, env_file, capsys):
    """With --env equal to the run's, the run is played; other flags of the game stay refused."""
    rewrite(own, env="my_env.py:MyEnv")
    evaluate.main([own, "--env=my_env.py:MyEnv", "--episodes=2"])
    assert "my_env.py:MyEnv, " in capsys.readouterr().out
    assert was_executed(env_file)
    sized = [own, "--env=my_env.py:MyEnv", "--size=100"]
    one_sentence(lambda: evaluate.main(sized), "--size=100", "as it was trained")
    rewrite(own, env="NumberLine, my_env.py:MyEnv")
    evaluate.main([own, "--env=NumberLine,my_env.py:MyEnv", "--agent=random", "--episodes=2"])


@pytest.mark.parametrize("name", ["NumberLine", "EZPoints", "my_env.py:MyEnv"])
def test_another_run_is_played_as_it_was_trained(own, env_file, name):
    """--env does not go with a run whose environment is part of this program."""
    one_sentence(lambda: evaluate.main([own, f"--env={name}"]), f"--env={name}", "as it was trained")
    assert not was_executed(env_file)


# ---- code of strangers ----


def test_planted_code_runs_with_the_flag_only(tmp_path, monkeypatch):
    """The cases of docs/failures.md show that nothing runs; here the same Python runs, after the flag."""
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(cases_models.tiny(), tmp_path / "model")
    shutil.copytree(cases_models.trained(lora_r=2), tmp_path / "run")
    spy = tmp_path / "code_ran"
    cases_models.plant(str(model), str(spy))
    cases_models.need_model_code(str(model), str(spy))
    rewrite("run", model="model", trust_remote_code=True)
    one_sentence(lambda: evaluate.main(["run"]), "Python files", "trust_remote_code=True")
    assert not spy.exists()
    with pytest.raises(SystemExit):
        evaluate.main(["run", "--trust_remote_code=True"])
    assert spy.exists()


@pytest.mark.parametrize(
    "key, value, word",
    [
        ("lora_targets", r"(.*)*(.*)*(.*)*x", "to match"),
        ("lora_targets", "(", "regular expression"),
        ("n_critics", 10**6, "at most 1,000"),
        ("max_new_tokens", 10**6, "at most 32,768"),
        ("lora_r", 2.5, "whole number"),
        ("lr", float("nan"), "finite"),
        ("env", ["NumberLine", 3], "text in quotes"),
        ("env", ",", "without a name"),
        ("model", "a\nb", "cannot be printed"),
        ("data_mix", 3, "a dict"),
    ],
)
def test_settings_of_a_run_are_checked(own, key, value, word, monkeypatch):
    """A stranger's config.json can neither exhaust this machine nor let it hang."""
    monkeypatch.setattr("extras.model_folders.MATCH_SECONDS", 1)
    rewrite(own, **{key: value})
    before = content(own)
    one_sentence(lambda: evaluate.main([own, "--episodes=1"]), key, word)
    assert content(own) == before


def test_a_run_that_cannot_be_written_prints_its_table(own, capsys):
    """A read-only run: eval.json is a folder here, because a test may have all rights."""
    os.remove(os.path.join(own, "eval.json"))
    os.makedirs(os.path.join(own, "eval.json"))
    evaluate.main([own, "--episodes=2"])
    printed = capsys.readouterr().out
    assert "eval.json is not written (" in printed
    assert "goal reached" in printed

    os.makedirs(os.path.join(own, "report.html"))
    one_sentence(lambda: evaluate.main([own, "--episodes=2", "--report"]), "report.html")
    assert "goal reached" in capsys.readouterr().out


def test_a_run_of_a_gpu_is_evaluated_on_another_device(own):
    """The run says device='cuda'; it is evaluated on what there is, or on what this command line says."""
    rewrite(own, device="cuda")
    evaluate.main([own, "--episodes=1"])
    evaluate.main([own, "--episodes=1", "--device=cpu"])
    if not torch.cuda.is_available():
        wish = [own, "--episodes=1", "--device=cuda"]
        one_sentence(lambda: evaluate.main(wish), "device='cuda'", "--device=cpu")
