"""
bench.py peer: our side on tiny shapes, what it refuses, and TRL's numbers where TRL is installed.

    python -m pytest tests/test_bench_peer.py
"""
import importlib.util, sys

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

import bench
import train
from buffer import Buffer, reply_text
from configurator import check_config, configure
from evaluate import env_factory, record
from extras import bench_peer
from small_runs import flags, tiny  # noqa: F401  (a fixture)
from test_model import refuses

HAS_PEER = all(importlib.util.find_spec(name) for name in bench_peer.PACKAGES)
needs_peer = pytest.mark.skipif(not HAS_PEER, reason="TRL and PEFT are optional packages")
SMALL = dict(batch_size=4, micro_batch=2, window=2, lora_r=2, device="cpu")

def settings(model, **changes):
    """Read settings as bench.py does."""
    return check_config(configure(bench.TRAIN, flags(model=model, **SMALL | changes), quiet=True))

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Recorded play of NumberLine; half of the episodes are cut off, and end in a row without a reply."""
    folder = Buffer(str(tmp_path_factory.mktemp("peer") / "data"), create=True)
    cfg = settings("bases/tiny-vlm")
    record(bench.play_mix(env_factory(cfg), cfg.data_mix, np.random.default_rng(0), 12), folder)
    return folder

def draw(data, cfg):
    """Draw the windows of one update."""
    return bench_peer.full_windows(data, np.random.default_rng(0), cfg)

def test_windows_are_full(data):
    """TRL's batches have one size, so every window has all its turns, and each turn has a reply."""
    windows = draw(data, settings("bases/tiny-vlm"))
    assert len(windows) == 4
    for window in windows:
        assert len(window) == 2
        assert all(reply_text(data.rows[i]) for i in window)
        assert len({data.rows[i]["episode"] for i in window}) == 1
    # episodes have at most ten turns
    with pytest.raises(SystemExit, match="window=50"):
        draw(data, settings("bases/tiny-vlm", window=50))

def test_our_side_makes_the_updates_that_it_times(tiny, data):  # noqa: F811
    """It learns from the windows that it is given, and counts their tokens and operations."""
    cfg = settings(tiny, actor_loss="sft", lr=0.02, warmup_updates=0)
    windows = draw(data, cfg)
    side = bench_peer.Ours(cfg, train, data, [windows] * 4)
    for step in range(4):
        side.timed_update(step)
    assert side.losses[-1] < side.losses[0]
    count = 0
    for window in windows:
        for i in window:
            reply = reply_text(data.rows[i])
            count += len(side.vlm.reply_ids(reply))
    assert side.tokens == [count] * 4
    assert min(side.seconds) > 0
    with_critic = bench_peer.Ours(settings(tiny), train, data, [windows])
    assert with_critic.count_flops() > side.count_flops() > 0

def test_products_of_an_update_are_run_alone(tiny, data):  # noqa: F811
    """They have the operations of a whole update, and run again without the model."""
    cfg = settings(tiny, actor_loss="sft")
    side = bench_peer.Ours(cfg, train, data, [draw(data, cfg)])
    products = side.products()
    with FlopCounterMode(display=False) as counter:
        products.run()
    assert counter.get_total_flops() == side.count_flops() > 0
    products.timed_update(0)
    assert min(products.seconds) > 0

def test_rows_for_the_peer_are_the_same_turns(data):
    """In the same order, with the pictures, the whole prompt and the reply alone."""
    windows = draw(data, settings("bases/tiny-vlm"))
    rows = list(bench_peer.peer_rows(data, [windows]))
    turns = []
    for window in windows:
        turns += [data.rows[i] for i in window]
    assert len(rows) == len(turns) == 8
    for row, turn in zip(rows, turns):
        assert row["prompt"] + row["completion"] == turn["messages"]
        [reply] = row["completion"]
        assert reply["role"] == "assistant"
        assert len(row["images"]) == len(turn["images_file_names"])

def test_what_cannot_be_compared_is_refused(data, monkeypatch):
    """A missing package is named with the line that installs it, before anything is built."""
    with pytest.raises(SystemExit, match="lora_r=0"):
        bench_peer.check_settings(settings("bases/tiny-vlm", lora_r=0))
    with pytest.raises(SystemExit, match="micro_batch=3"):
        bench_peer.check_settings(settings("bases/tiny-vlm", micro_batch=3))
    monkeypatch.setitem(sys.modules, "trl", None)
    refuses("pip install trl peft datasets accelerate", lambda: bench.main(["peer", *flags(**SMALL)]))

@needs_peer
def test_the_peer_computes_the_same(tiny, monkeypatch, capsys):  # noqa: F811
    """Its losses are ours, update by update, and so are its reply tokens.

    Ours are a little lower: a reply contains no placeholders, and their share of random weights is two words
    of 320.
    """
    monkeypatch.setattr(bench_peer, "WARM_UP", 1)
    monkeypatch.setattr(bench_peer, "UPDATES", 3)
    bench.main(["peer", *flags(model=tiny, **SMALL)])
    lines = iter(capsys.readouterr().out.splitlines())
    while not next(lines).startswith("update "):
        pass
    theirs = next(lines).split()
    ours = next(lines).split()
    assert theirs[-1] == ours[-1]
    for place in (-2, -4, -5):
        loss = float(ours[place])
        assert float(theirs[place]) == pytest.approx(loss, rel=5e-3)
