"""
Share what the tests of whole runs need: a tiny VLM, a run of eight updates, and readers of what it wrote.

    from small_runs import run, straight, tiny  # noqa: F401  (straight and tiny are fixtures)
"""
import json, os

import numpy as np
import pytest
import torch

import envs
import train
from pretrain import tiny_nets
from pretrain.questions import corpus

# the size of the tiny VLM
SMALL = dict(
    vocab_size=320,
    hidden=32,
    layers=1,
    vision_hidden=32,
    vision_layers=1,
)
# four updates offline, four online, two rollouts
FEW = dict(
    data_episodes=8,
    offline_updates=4,
    online_updates=4,
    updates_per_rollout=2,
    rollout_episodes=4,
    num_envs=3,
    batch_size=4,
    micro_batch=2,
    window=2,
    warmup_updates=1,
    filter_warmup=2,
    lora_r=2,
    max_new_tokens=3,
    log_interval=1,
    eval_interval=0,
    eval_episodes=3,
    device="cpu",
)

def make_tiny(folder, **changes):
    """Save a very small LLaVA with random weights as a model folder; return the folder's name."""
    torch.manual_seed(0)
    texts = list(corpus(200))
    net, processor = tiny_nets.llava(texts, **SMALL | changes)
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a very small VLM with random weights."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))

@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """A run that nothing interrupts: what other runs are compared with. Do not write into it."""
    folder = tmp_path_factory.mktemp("runs")
    return run(folder / "straight", tiny)

def flags(**keys):
    """Write keys as a command line."""
    return [f"--{key}={value}" for key, value in keys.items()]

def run(out, model, **changes):
    """Train with few updates and episodes of at most three turns; return out_dir."""
    keys = FEW | dict(model=model, out_dir=out) | changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envs.NumberLine, "max_turns", 3)
        train.main(flags(**keys))
    return str(out)

def read_json(*path):
    """Read a JSON file."""
    with open(os.path.join(*path)) as f:
        return json.load(f)

def metrics(out):
    """Read metrics.jsonl without the clock."""
    rows = []
    with open(os.path.join(out, "metrics.jsonl")) as f:
        for line in f:
            row = json.loads(line)
            rows.append({key: value for key, value in row.items() if not key.startswith("time/")})
    return rows

def numbers(row):
    """Return the numbers of a row of metrics."""
    return {key: value for key, value in row.items() if key != "phase"}

def all_finite(rows):
    """Tell whether all numbers of the rows of metrics are finite."""
    for row in rows:
        if not all(map(np.isfinite, numbers(row).values())):
            return False
    return True

def results(out):
    """Read the table of eval.json -> {name: summary}."""
    return read_json(out, "eval.json")["results"]

def content(folder, *names):
    """Read all files of a folder, or those of some names -> {path in the folder: bytes}."""
    found = {}
    for place, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(place, name)
            if names and name not in names:
                continue
            with open(path, "rb") as f:
                found[path[len(str(folder)) :]] = f.read()
    return found

def weights(out):
    """Read what a run with adapters has learned -> {file: bytes}."""
    found = content(os.path.join(out, "ckpt"), "adapter_model.safetensors", "q_head.safetensors")
    assert len(found) == 2
    return found

def replay(out):
    """Read the rows of what a run has played -> {file: bytes}."""
    return content(os.path.join(out, "replay"), "metadata.jsonl")

def one_sentence(call, *words):
    """Assert that a call ends with one sentence in which the words occur."""
    with pytest.raises(SystemExit) as error:
        call()
    text = error.value.code
    assert isinstance(text, str), text
    assert "\n" not in text, text
    for word in words:
        assert word in text, text
