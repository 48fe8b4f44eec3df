"""
Play a trained agent on a real vLLM server, and compare it with the network here. Optional: vLLM is 3.5 GB.

    VLLM=venv/bin/vllm python -m pytest -q -s tests/extra_vllm.py    # trains first, some minutes
    VLLM=venv/bin/vllm RUN=out/numberline python -m pytest -q -s tests/extra_vllm.py

VLLM names the program `vllm` in an environment of its own (docs/serving.md); without it all is skipped. RUN
is a run on a shipped base. Both sides compute in float32, where log-probabilities agree to about 1e-5. The
limits leave room for other processors: 1e-2 for a log-probability, and greedy replies may differ only where
the best two tokens are that close.
"""
import os, shutil, socket, subprocess, time
import urllib.error
import urllib.request

import pytest
import torch

import evaluate
import train
from buffer import Buffer
from extras import serving
from extras.checkpoints import find_checkpoint
from extras.model_folders import find_folder
from worlds.playing import play

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VLLM = os.environ.get("VLLM") or shutil.which("vllm")
READY_SECONDS = 900
EPISODES = 60
NATS = 1e-2
# Enough to learn replies that parse; the comparison does not need a good player.
SHORT = ["--offline_updates=60", "--online_updates=0", "--eval_episodes=60", "--device=cpu"]

if not VLLM or not os.path.exists(VLLM):
    pytest.skip("no vLLM here: install it into an environment of its own and name its program, "
                "VLLM=venv/bin/vllm (docs/serving.md)", allow_module_level=True)

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a shipped base: that of RUN, or one that is trained now -> its folder."""
    if os.environ.get("RUN"):
        return os.environ["RUN"]
    out = str(tmp_path_factory.mktemp("runs") / "short")
    config = os.path.join(ROOT, "config", "numberline.py")
    train.main([config, *SHORT, f"--model={os.path.join(ROOT, 'bases', 'tiny-vlm')}", f"--out_dir={out}"])
    return out

def wait_until_ready(process, url, log):
    """Wait until a server answers; fail with the end of its log if it ends or takes too long."""
    end = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(2)
    with open(log, errors="replace") as f:
        pytest.fail("vLLM does not start:\n" + f.read()[-3000:])

@pytest.fixture(scope="module")
def url(trained, tmp_path_factory):
    """The address of a server with the base of the run, and its adapters as `agent`."""
    cfg = evaluate.read_run_config(trained)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = find_folder(cfg.model)
    command = [VLLM, "serve", base, "--served-model-name", "base", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    command += ["--logprobs-mode", "processed_logprobs"]
    command += ["--enable-lora", "--max-lora-rank", "16"]
    command += ["--lora-modules", f"agent={os.path.abspath(find_checkpoint(trained))}"]
    settings = dict(VLLM_ALLOW_RUNTIME_LORA_UPDATING="True", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    settings |= dict(VLLM_CPU_KVCACHE_SPACE="1", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2"))
    log = str(tmp_path_factory.mktemp("server") / "log")
    with open(log, "w") as f:
        process = subprocess.Popen(command, stdout=f, stderr=f, env=os.environ | settings)
    address = f"http://127.0.0.1:{port}/v1"
    try:
        wait_until_ready(process, address, log)
        yield address
    finally:
        process.terminate()
        process.wait(60)

@pytest.fixture(scope="module")
def agent(trained, url):
    """What the tests share: (settings of the run with this server, its VLM, make_env)."""
    cfg = evaluate.read_run_config(trained)
    cfg.rollout_url = url
    cfg.device = "cpu"
    vlm, _ = evaluate.load_run(trained, cfg)
    return cfg, vlm, evaluate.env_factory(cfg)

def play_on_server(agent, temperature, folder):
    """Play held-out starts by the adapters that the server was started with -> folder of episodes."""
    cfg, vlm, make_env = agent
    policy = serving.ServedPolicy(cfg, vlm, "agent")
    policy.settings["temperature"] = temperature
    buffer = Buffer(str(folder), create=True)
    starts = evaluate.held_out_starts(make_env, EPISODES)
    evaluate.record(play(make_env, policy, starts, 32), buffer)
    assert policy.failures == 0
    return buffer

def turns(buffer, vlm):
    """Collect what was said in a folder of episodes -> list of (prompt, row), each prompt with ids once."""
    found = []
    for row in buffer.rows:
        if row["source"] == "end":
            continue
        image = buffer.image(row["images_file_names"][0])
        found.append((vlm.encode(row["messages"][:1], [image]), row))
    return found

def test_greedy_replies_and_their_probabilities(agent, tmp_path):
    """Sixty episodes by the server's most likely replies: ours are the same, with the same probabilities."""
    _, vlm, _ = agent
    worst = 0.0
    n_other = 0
    found = turns(play_on_server(agent, 0.0, tmp_path / "greedy"), vlm)
    assert len({row["episode"] for _, row in found}) == EPISODES
    for prompt, row in found:
        [ids], [logprobs] = vlm.generate([prompt], agent[0].max_new_tokens, 0.0)
        served = row["behaviour_logprobs"]
        if ids != row["reply_ids"]:
            n_other += 1
            compare_where_they_part(vlm, prompt, ids, row["reply_ids"])
            continue
        worst = max(worst, *(abs(a - b) for a, b in zip(logprobs, served)))
    print(f"\n{len(found)} turns, {n_other} other replies, log-probabilities differ by at most {worst:.1e}")
    assert worst < NATS
    assert n_other <= len(found) // 50

def compare_where_they_part(vlm, prompt, ids, served):
    """Assert that two greedy replies part at two tokens that are equally likely, but for rounding."""
    first = next(i for i, (a, b) in enumerate(zip(ids, served)) if a != b)
    here = serving.reply_logprobs(vlm, prompt, ids[: first + 1])[first]
    there = serving.reply_logprobs(vlm, prompt, served[: first + 1])[first]
    assert abs(here - there) < NATS

def test_sampled_replies_and_their_probabilities(agent, tmp_path):
    """What the server samples has the probabilities that our policy gives it."""
    _, vlm, _ = agent
    worst = 0.0
    found = turns(play_on_server(agent, 1.0, tmp_path / "sampled"), vlm)
    for prompt, row in found:
        ours = serving.reply_logprobs(vlm, prompt, row["reply_ids"])
        worst = max(worst, *(abs(a - b) for a, b in zip(ours, row["behaviour_logprobs"])))
        assert vlm.banned_ids.isdisjoint(row["reply_ids"])
    print(f"\n{len(found)} turns, log-probabilities differ by at most {worst:.1e}")
    assert worst < NATS

def test_evaluate_plays_the_served_agent(trained, url, capsys):
    """The command of docs/serving.md scores the agent as its own table does."""
    flags = ["--agent=openai", f"--base_url={url}", "--model=agent", f"--episodes={EPISODES}"]
    evaluate.main([trained, *flags, "--temperature=0"])
    printed = capsys.readouterr().out
    print(printed)
    assert f"{EPISODES} episodes" in printed

def test_a_run_plays_its_rollouts_on_the_server(trained, url, tmp_path):
    """Adapters are loaded for each rollout, replies come with ids, and nothing is left on the server."""
    cfg = evaluate.read_run_config(trained)
    flags = [f"--model={cfg.model}", f"--rollout_url={url}", f"--out_dir={tmp_path / 'out'}", *SHORT]
    changes = {"--offline_updates=60": "--offline_updates=4", "--online_updates=0": "--online_updates=4"}
    flags = [changes.get(flag, flag) for flag in flags]
    config = os.path.join(ROOT, "config", "numberline.py")
    train.main([config, *flags, "--rollout_episodes=8", "--updates_per_rollout=2", "--batch_size=4"])
    rows = Buffer(str(tmp_path / "out" / "replay")).rows
    played = [row for row in rows if row["source"] != "end"]
    assert len(played) >= 16
    assert {row["source"] for row in played} == {"model"}
    assert all(len(row["behaviour_logprobs"]) == len(row["reply_ids"]) > 0 for row in played)
    with urllib.request.urlopen(f"{url}/models", timeout=30) as answer:
        assert b"rollout-" not in answer.read()
    assert torch.isfinite(torch.tensor([p for row in played for p in row["behaviour_logprobs"]])).all()
