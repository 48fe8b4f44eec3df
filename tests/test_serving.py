"""
Test rollouts that a server plays, over real HTTP: what is stored, and what happens when the server fails.

    python -m pytest tests/test_serving.py
"""
import os, socket, time

import numpy as np
import pytest
import torch

import train
from buffer import Buffer, reply_text
from configurator import ConfigError
from evaluate import load_run, read_run_config
from extras import serving
from fake_engine import change, engine, json_answer  # noqa: F401  (engine is a fixture)
from small_runs import FEW, flags, metrics, one_sentence, read_json, run
from small_runs import tiny  # noqa: F401  (fixture)

CHAT = "/v1/chat/completions"
LOAD = "/v1/load_lora_adapter"

def played_rows(out):
    """List the rows of a run's own play that have a reply."""
    buffer = Buffer(os.path.join(out, "replay"), create=True)
    return [row for row in buffer.rows if reply_text(row) is not None]

def rollout_lines(out):
    """List the lines of a run's metrics that belong to rollouts."""
    lines = metrics(out)
    return [line for line in lines if "rollout/server_failures" in line]

def is_policy(body):
    """Tell whether a request is one of a rollout, not of the trial at the start."""
    return body is not None and str(body.get("model", "")).startswith("rollout-")

def is_rollout(path, body):
    """Tell whether a request loads the adapters of a rollout, not those of the trial at the start."""
    name = (body or {}).get("lora_name", "")
    return path == LOAD and name.startswith("rollout-") and not name.startswith("rollout-trial")

# ---- a server that works ----

def test_ids_and_log_probabilities_of_the_server_are_stored(tiny, engine, tmp_path):  # noqa: F811
    """What is played on the server is what this policy would have played: ids, and their probabilities."""
    out = run(tmp_path / "out", tiny, rollout_url=engine.url, online_updates=2, max_new_tokens=4)
    rows = played_rows(out)
    assert len(rows) >= 4
    assert {row["source"] for row in rows} == {"model"}
    assert [line["rollout/server_failures"] for line in rollout_lines(out)] == [0]
    assert all(len(row["behaviour_logprobs"]) == len(row["reply_ids"]) > 0 for row in rows)
    # the policy of the first rollout is that of the last offline update
    requests = [body for path, body in engine.requests if path == CHAT and is_policy(body)]
    assert len(requests) == len(rows)
    assert engine.adapters == {}
    assert not os.path.exists(os.path.join(out, "served"))

def test_the_stored_probabilities_are_those_of_the_policy(tiny, engine, tmp_path):  # noqa: F811
    """The last adapters that the server was given, and the checkpoint behind them, agree on a reply."""
    out = run(tmp_path / "out", tiny, rollout_url=engine.url, offline_updates=3, online_updates=1, lr=1e-9)
    cfg = read_run_config(out)
    vlm, _ = load_run(out, cfg)
    buffer = Buffer(os.path.join(out, "replay"))
    rows = [i for i, row in enumerate(buffer.rows) if reply_text(row) is not None]
    for i in rows[:4]:
        row = buffer.rows[i]
        prompt = vlm.encode(row["messages"][:1], [buffer.image(row["images_file_names"][0])])
        ours = serving.reply_logprobs(vlm, prompt, row["reply_ids"])
        assert np.allclose(ours, row["behaviour_logprobs"], atol=1e-3)

def test_the_sampling_settings_are_those_of_the_policy(tiny, engine, tmp_path):  # noqa: F811
    """A folder's generation_config must not cut the distribution; what is never sampled is left out."""
    run(tmp_path / "out", tiny, rollout_url=engine.url, online_updates=1)
    body = next(body for path, body in engine.requests if path == CHAT and is_policy(body))
    wanted = dict(temperature=1.0, top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0, max_tokens=3)
    assert wanted.items() <= body.items()
    assert {int(i) for i in body["logit_bias"]} == engine.vlm.banned_ids
    assert set(body["logit_bias"].values()) == {serving.BAN}
    assert body["stop_token_ids"] == [engine.vlm.eos]

def test_each_rollout_has_a_name_of_its_own(tiny, engine, tmp_path):  # noqa: F811
    """A server keeps what it computed under a name: reused with other weights, it would answer stale."""
    for out in ("one", "two"):
        run(tmp_path / out, tiny, rollout_url=engine.url)
    names = [body["lora_name"] for path, body in engine.requests if path == LOAD and body["lora_name"]]
    # two runs with a trial and two rollouts each
    assert len(names) == len(set(names)) == 6

def test_explore_plays_beside_the_server(tiny, engine, tmp_path):  # noqa: F811
    out = run(tmp_path / "out", tiny, rollout_url=engine.url, explore=0.5)
    assert {row["source"] for row in played_rows(out)} == {"model", "random"}

def test_a_run_can_be_resumed_with_and_without_the_server(tiny, engine, tmp_path):  # noqa: F811
    """The address is no part of what is learned: a resumed run may have another one, or none."""
    out = run(tmp_path / "out", tiny, rollout_url=engine.url, stop_at=5)
    assert len(played_rows(out)) >= 4
    run(out, tiny, rollout_url=engine.url, stop_at=7, resume=True)
    run(out, tiny, resume=True)
    assert metrics(out)[-1]["step"] == 8

# ---- replies without ids ----

def without_ids(content):
    """Take ids out of an answer, as a server that is no vLLM does not tell them."""
    content.pop("prompt_token_ids")
    content["choices"][0].pop("token_ids")
    content["choices"][0].pop("logprobs")

def foreign_ids(content):
    content["choices"][0]["token_ids"] = [10**6]

def old_ids(content):
    content["choices"][0].pop("token_ids")

def infinite(content):
    for entry in content["choices"][0]["logprobs"]["content"]:
        entry["logprob"] = float("nan")

@pytest.mark.parametrize(
    "edit, source, has_ids, has_logprobs",
    [
        (without_ids, serving.RETOKENISED, False, False),
        (foreign_ids, serving.RETOKENISED, False, False),
        (old_ids, "model", True, True),
        (infinite, "model", True, False),
    ],
)
def test_replies_without_ids_are_marked(  # noqa: F811
    tiny, engine, tmp_path, edit, source, has_ids, has_logprobs
):
    """A reply whose ids cannot be had is tokenised again from its text, and its row says so."""

    def trouble(path, body):
        return change(engine.chat(body), edit) if path == CHAT else None

    engine.trouble = trouble
    out = run(tmp_path / "out", tiny, rollout_url=engine.url, online_updates=2)
    rows = played_rows(out)
    assert rows
    for row in rows:
        assert row["source"] == source
        assert bool(row["reply_ids"]) == has_ids
        assert bool(row["behaviour_logprobs"]) == has_logprobs
    # it has learned from them
    assert metrics(out)[-1]["step"] == 6

# ---- a server that fails during a run ----

def slow(handler):
    time.sleep(1.5)

def cut(handler):
    """Hang up in the middle of an answer."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{")

@pytest.mark.parametrize(
    "answer, words",
    [
        ((500, {}, "broken"), "HTTP 500"),
        ((503, {"Retry-After": "9999"}, "full"), "HTTP 503"),
        ((404, {}, "no such model"), "HTTP 404"),
        ((400, {}, "too long"), "HTTP 400"),
        ((200, {}, "<html>"), "no JSON"),
        ((200, {}, "[]"), "no choices"),
        ((200, {}, '{"choices": [7]}'), "no choices"),
        ((200, {}, '{"choices": [{"message": {"content": null}, "token_ids": [true]}]}'), "no text"),
        (slow, "time-out"),
        (cut, "no JSON"),
    ],
)
def test_a_failing_server_costs_play_and_not_the_run(  # noqa: F811
    tiny, engine, tmp_path, capsys, monkeypatch, answer, words
):
    """One sentence, a count, and the updates learn from recorded play; the run ends as always."""
    monkeypatch.setattr(serving, "RETRIES", 1)
    if answer is slow:
        monkeypatch.setattr(serving, "TIMEOUT", 0.5)

    def trouble(path, body):
        return answer if path == CHAT and is_policy(body) else None

    engine.trouble = trouble
    out = run(tmp_path / "out", tiny, rollout_url=engine.url, num_envs=2)
    printed = capsys.readouterr().out
    assert printed.count("The rollout ends after 0 episodes") == 2
    assert words in printed
    lines = rollout_lines(out)
    assert len(lines) == 2
    assert all(line["rollout/server_failures"] >= 1 for line in lines)
    assert not any("rollout/success" in line for line in lines)
    assert played_rows(out) == []
    assert read_json(out, "eval.json")["results"]

def test_failures_that_pass_are_tried_again(tiny, engine, tmp_path):  # noqa: F811
    """Every second request fails: all episodes are played, and the failures are counted."""
    tries = []

    def trouble(path, body):
        if path != CHAT or not is_policy(body):
            return None
        tries.append(path)
        return (500, {}, "busy") if len(tries) % 2 else None

    engine.trouble = trouble
    out = run(tmp_path / "out", tiny, rollout_url=engine.url, num_envs=1, online_updates=2)
    [line] = rollout_lines(out)
    assert line["rollout/server_failures"] >= len(played_rows(out)) >= 4

def test_adapters_that_are_refused_cost_a_rollout(tiny, engine, tmp_path, capsys):  # noqa: F811
    """The next rollout asks again."""
    refused = []

    def trouble(path, body):
        if is_rollout(path, body) and not refused:
            refused.append(body)
            return json_answer(400, error=dict(message="rank 2 is too large"))
        return None

    engine.trouble = trouble
    out = run(tmp_path / "out", tiny, rollout_url=engine.url)
    assert "rank 2 is too large" in capsys.readouterr().out
    first, second = rollout_lines(out)
    assert first["rollout/server_failures"] == 1
    assert "rollout/success" not in first
    assert second["rollout/server_failures"] == 0
    assert "rollout/success" in second

def test_a_server_that_dies_in_a_rollout(tiny, engine, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Episodes that have ended are kept; without a server the run goes on to its end."""
    monkeypatch.setattr(serving, "RETRIES", 1)
    answered = []

    def trouble(path, body):
        if path == CHAT and is_policy(body):
            answered.append(path)
        # an episode has at most three turns, so one at least is over
        return cut if len(answered) > 4 else None

    engine.trouble = trouble
    out = run(tmp_path / "out", tiny, rollout_url=engine.url, num_envs=1)
    printed = capsys.readouterr().out
    assert "The rollout ends after" in printed
    assert "asks the server again" in printed
    rows = played_rows(out)
    assert 1 <= len({row["episode"] for row in rows}) < 4
    assert read_json(out, "eval.json")["results"]

def test_a_rollout_that_is_broken_off_leaves_nothing_on_the_server(  # noqa: F811
    tiny, engine, tmp_path, monkeypatch
):
    """The story: after Ctrl-C the adapters stayed loaded, and their folder stayed in the run's."""
    ask = serving.ServedPolicy.__call__

    def interrupted(policy, *args):
        if policy.cfg.model.startswith("rollout-"):
            raise KeyboardInterrupt
        return ask(policy, *args)

    monkeypatch.setattr(serving.ServedPolicy, "__call__", interrupted)
    out = tmp_path / "out"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(out, tiny, rollout_url=engine.url)
    loaded = [body for path, body in engine.requests if is_rollout(path, body)]
    assert len(loaded) == 1
    assert engine.adapters == {}
    assert not os.path.exists(out / "served")

def test_other_prompts_stop_the_run_before_it_learns(tiny, engine, tmp_path):  # noqa: F811
    """Another chat template would train on prompts that the policy never saw."""

    def trouble(path, body):
        if path != CHAT:
            return None
        return change(engine.chat(body), lambda content: content["prompt_token_ids"].insert(3, 9))

    engine.trouble = trouble
    out = tmp_path / "out"
    one_sentence(lambda: run(out, tiny, rollout_url=engine.url), "reads other prompts", "from token 3 on")
    assert not out.exists()

# ---- a server that does not fit, found before anything is written ----

def refused(out, model, url, *words, **changes):
    """Assert that a run ends with one sentence and leaves nothing."""
    one_sentence(lambda: run(out, model, rollout_url=url, **changes), *words)
    assert not os.path.exists(out)

def test_no_server(tiny, tmp_path):  # noqa: F811
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refused(tmp_path / "out", tiny, f"http://127.0.0.1:{port}/v1", "does not answer", "start the server")

def test_a_server_without_updates_of_adapters(tiny, engine, tmp_path):  # noqa: F811
    engine.trouble = lambda path, body: json_answer(404, detail="Not Found") if path == LOAD else None
    refused(tmp_path / "out", tiny, engine.url, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True")

def test_a_server_of_something_else(tiny, engine, tmp_path):  # noqa: F811
    engine.trouble = lambda path, body: (200, {}, '{"data": 7}')
    refused(tmp_path / "out", tiny, engine.url, "lists no model")

def test_a_server_of_another_model(tiny, engine, tmp_path):  # noqa: F811
    """The prompts are the same, but what is likely there is not likely here."""

    def trouble(path, body):
        if path != CHAT:
            return None

        def edit(content):
            for entry in content["choices"][0]["logprobs"]["content"]:
                entry["logprob"] -= 2.0

        return change(engine.chat(body), edit)

    engine.trouble = trouble
    refused(tmp_path / "out", tiny, engine.url, "other probabilities", "serve the same folder")

def test_adapters_that_never_fit(tiny, engine, tmp_path, monkeypatch):  # noqa: F811
    """A rank above --max-lora-rank is told before hours of offline updates."""
    monkeypatch.setattr(serving, "RETRIES", 0)
    refusal = json_answer(500, error=dict(message="LoRA rank 2 is greater than max_lora_rank 1"))
    engine.trouble = lambda path, body: refusal if path == LOAD and body["lora_name"] else None
    one_sentence(lambda: run(tmp_path / "out", tiny, rollout_url=engine.url), "max_lora_rank")

def test_raw_log_probabilities_are_told(tiny, engine, tmp_path, capsys):  # noqa: F811
    """vLLM's default is what the model says before tokens are left out: a difference that the user reads."""

    def trouble(path, body):
        if path != CHAT or "allowed_token_ids" not in body:
            return None

        def edit(content):
            content["choices"][0]["logprobs"]["content"][0]["logprob"] = -3.0

        return change(engine.chat(body), edit)

    engine.trouble = trouble
    run(tmp_path / "out", tiny, rollout_url=engine.url, online_updates=1)
    assert "--logprobs-mode processed_logprobs" in capsys.readouterr().out

@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(rollout_url="localhost:8000"), ["no address of a server", "http://localhost:8000/v1"]),
        (dict(rollout_url="http://x", lora_r=0), ["rollout_url", "lora_r=0"]),
        (dict(rollout_url="http://x", q_weight=1), ["rollout_url", "q_weight=1"]),
    ],
)
def test_settings_that_do_not_fit(changes, words, tmp_path):
    with pytest.raises(ConfigError) as error:
        train.settings(flags(**FEW | dict(out_dir=tmp_path / "out") | changes))
    assert all(word in str(error.value) for word in words)

def test_an_offline_run_asks_no_server(tiny, tmp_path):  # noqa: F811
    """A run without an online phase needs none, so that an ablation may keep the key."""
    run(tmp_path / "out", tiny, rollout_url="http://127.0.0.1:9", online_updates=0)

def test_answers_that_are_no_answers():
    """Whatever a server sends is read, and never trusted."""
    for text in ("", "[]", "{}", '{"choices": {}}', '{"choices": [[]]}', "7", "[" * 10**5):
        assert serving.first_choice(text) == {}
        assert serving.prompt_ids(text) is None
    for choice in ({}, dict(logprobs=7), dict(logprobs=dict(content=[7]))):
        assert serving.token_entries(choice) == []
        assert serving.log_probabilities(choice, 2) == ()
    assert serving.ids_of_tokens(dict(logprobs=dict(content=[dict(token="token_id:7")]))) == [7]
    assert serving.ids_of_tokens(dict(logprobs=dict(content=[dict(token="a")]))) == []
    assert torch.tensor(serving.BAN).exp() < 1e-30
