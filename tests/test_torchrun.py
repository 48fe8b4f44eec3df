"""
Test several ranks: real processes on the CPU, connected by gloo.

    python -m pytest tests/test_torchrun.py

There are few starts of many runs, because a start takes longer than a run. tests/rank_jobs.py is what the
ranks execute.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

import envs
import evaluate, train
from extras import checkpoints
from buffer import Buffer
from fake_engine import Engine
from rank_jobs import train_and_save_gradients
from small_runs import FEW, flags, make_tiny, metrics, numbers, one_sentence, read_json, replay, results

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TESTS = os.path.join(ROOT, "tests")

# 20 updates offline, 6 online with a rollout before the 1st, 3rd and 5th; a checkpoint after 22
RUN = FEW | dict(
    data_episodes=24,
    offline_updates=20,
    online_updates=6,
    rollout_episodes=6,
    num_envs=4,
    batch_size=8,
    micro_batch=4,
    eval_interval=22,
    eval_episodes=5,
)

class Runs:
    """The folder of all runs, and what each start of torchrun printed and returned."""

    def __init__(self, folder):
        self.folder = folder
        self.codes = {}
        self.processes = {}

    def path(self, name):
        """Return the out_dir of a run."""
        return os.path.join(self.folder, name)

    def job(self, name, **changes):
        """Return the command line of a run."""
        keys = dict(model=self.path("tiny"), out_dir=self.path(name))
        return flags(**RUN | keys | changes)

    def start(self, name, *command, timeout_minutes=5, fault=""):
        """Start torchrun with two ranks; what they print goes to name.log."""
        environment = os.environ | dict(
            OMP_NUM_THREADS="1",
            PYTHONPATH=os.pathsep.join([ROOT, TESTS]),
            TIMEOUT_MINUTES=str(timeout_minutes),
            FAULT=fault,
        )
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        with open(self.path(f"{name}.log"), "w") as log:
            self.processes[name] = subprocess.Popen(
                [*torchrun, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def start_jobs(self, name, *jobs, **options):
        """Start two ranks that run some jobs in turn."""
        file = self.path(f"{name}.json")
        with open(file, "w") as f:
            json.dump(jobs, f)
        self.start(name, os.path.join(TESTS, "rank_jobs.py"), file, **options)

    def wait(self, name):
        """Wait for a start of torchrun to end."""
        self.codes[name] = self.processes[name].wait(900)

    def log(self, name):
        """Read what a start of torchrun printed."""
        with open(self.path(f"{name}.log")) as f:
            return f.read()

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs, by the name of their folder.

    one      a single rank
    two      two ranks
    killed   rank 1 dies in update 24, then two ranks resume
    moved    killed's checkpoint, one rank to update 24 (a copy is `alone`), then two ranks to the end
    shard    two ranks, with the layers sharded
    deep     the same with activations computed twice, three updates
    lost     rank 1 loses its first rollout
    served   two ranks, whose rollouts a server plays
    hung     rank 1 falls silent in update 3
    wrong    a user's mistake
    """
    runs = Runs(str(tmp_path_factory.mktemp("ranks")))
    make_tiny(runs.path("tiny"), layers=2)
    runs.start_jobs("kill", runs.job("killed"), fault="kill 24")
    runs.start_jobs("hang", runs.job("hung", eval_interval=2), fault="hang 3", timeout_minutes=0.5)
    runs.start("wrong", os.path.join(ROOT, "train.py"), *runs.job("wrong", batch_size=5))
    train_and_save_gradients(runs.job("one"), 3)
    runs.wait("kill")
    runs.wait("wrong")

    shutil.copytree(runs.path("killed"), runs.path("moved"))
    runs.lines_of_killed = len(metrics(runs.path("killed")))
    train_and_save_gradients(runs.job("moved", resume=True, stop_at=24), 3)
    shutil.copytree(runs.path("moved"), runs.path("alone"))
    short = dict(data_episodes=6, offline_updates=2, online_updates=4, eval_interval=0)
    runs.engine = Engine(runs.path("tiny"))
    threading.Thread(target=runs.engine.serve_forever, daemon=True).start()
    runs.start_jobs(
        "two",
        runs.job("two"),
        runs.job("killed", resume=True),
        runs.job("moved", resume=True),
        runs.job("shard", shard=True),
        runs.job("deep", shard=True, grad_checkpointing=True, stop_at=3),
        runs.job("served", rollout_url=runs.engine.url, **short),
        runs.job("lost", offline_ratio=0.0, **short),
    )
    runs.wait("two")
    runs.engine.shutdown()
    runs.engine.server_close()
    assert runs.codes["two"] == 0, runs.log("two")
    # its time-out ran meanwhile
    runs.wait("hang")
    return runs

def tensors(out):
    """Read the adapters and heads of a run's checkpoint -> {name: tensor}."""
    ckpt = os.path.join(out, "ckpt")
    adapters = load_file(os.path.join(ckpt, "adapter_model.safetensors"))
    heads = load_file(os.path.join(ckpt, "q_head.safetensors"))
    return adapters | heads

def assert_same_losses(rows, other_rows, tolerance):
    """Assert that two logs have the same tokens, and the same losses up to rounding."""
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in other_rows]
    for row, other in zip(rows, other_rows):
        for key in ("nll", "td_error"):
            assert row[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance)

def test_two_ranks_learn_as_one(runs):
    """Two ranks with half of the windows each have the gradients and the losses of one rank with all."""
    one = runs.path("one")
    two = runs.path("two")
    gradients = torch.load(one + ".grads")
    others = torch.load(two + ".grads")
    assert len(gradients) == len(others) == 26
    differences = [float((a - b).norm() / a.norm()) for a, b in zip(gradients, others)]
    # rounding only at first; later the weights differ, too
    assert differences[0] < 1e-5
    assert max(differences[:10]) < 1e-4
    assert max(differences[:20]) < 1e-3
    offline = metrics(one)[:20]
    assert_same_losses(offline, metrics(two)[:20], tolerance=1e-4)
    assert offline[0]["nll"] != offline[19]["nll"]

def start_seeds(buf):
    """Return {episode: seed of its start}."""
    return {name: buf.rows[row_numbers[0]]["seed"] for name, row_numbers in buf.episodes.items()}

def test_each_rank_plays_its_own_episodes(runs):
    """Together the ranks play the starts that one rank plays; each has its episodes in its own shard.

    Rank 1's episodes end after one turn, rank 0's after three: neither waits forever.
    """
    two = runs.path("two")
    one_rank = Buffer(os.path.join(runs.path("one"), "replay"))
    shards = [Buffer(os.path.join(two, name)) for name in ("replay", "replay-1")]
    assert [len(buf.episodes) for buf in (one_rank, *shards)] == [18, 9, 9]
    assert start_seeds(one_rank) == start_seeds(shards[0]) | start_seeds(shards[1])
    assert shards[0].stats()["turns"] > 9
    assert shards[1].stats()["turns"] == 9

    rows = metrics(two)
    assert len(rows) == 26
    for row in rows:
        assert all(abs(value) < 1e9 for value in numbers(row).values())
    assert [row["step"] for row in rows if "rollout/turns" in row] == [21, 23, 25]
    # of both ranks
    assert 1 < rows[20]["rollout/turns"] < 3
    assert [summary["episodes"] for summary in results(two).values()] == [5] * 5

def test_a_rank_that_dies_ends_the_job_and_it_can_be_resumed(runs):
    """The job fails and prints which rank died; after a resume it is the run that was never killed.

    It died in update 24, after a rollout that no checkpoint has.
    """
    killed = runs.path("killed")
    two = runs.path("two")
    log = runs.log("kill")
    assert runs.codes["kill"] != 0
    assert re.search(r"rank +: 1", log)
    assert "SIGKILL" in log
    assert runs.lines_of_killed == 23
    assert metrics(killed) == metrics(two)
    assert replay(killed) == replay(two)
    shards = [Buffer(os.path.join(out, "replay-1")).rows for out in (killed, two)]
    assert shards[0] == shards[1]
    expected = tensors(two)
    for name, tensor in tensors(killed).items():
        assert torch.equal(tensor, expected[name])

def test_a_rank_that_falls_silent_ends_the_job(runs):
    """The others wait until the time-out, then the job fails with a sentence; the checkpoint remains."""
    hung = runs.path("hung")
    log = runs.log("hang")
    assert runs.codes["hang"] != 0
    assert len(metrics(hung)) == 2
    assert "Rank 0 of 2 ends with the error below" in log
    assert "imed out" in log
    assert "--resume=True" in log
    assert checkpoints.find_checkpoint(hung)

def episode_names(step):
    """Name the episodes of the rollout before an update."""
    return {f"{step}-{number}" for number in range(RUN["rollout_episodes"])}

def test_a_checkpoint_moves_between_numbers_of_ranks(runs):
    """Two ranks, then one, then two: nothing that was played is lost, and what is shared is the same.

    The single rank takes in the other's shard; the new second rank copies a shard.
    """
    moved = runs.path("moved")
    single = runs.path("alone")
    rows = metrics(moved)
    assert len(rows) == 26
    assert rows[:22] == metrics(runs.path("two"))[:22]

    buf = Buffer(os.path.join(single, "replay"))
    state = read_json(single, "ckpt", "state.json")
    assert (state["step"], state["replay_rows"]) == (24, [len(buf)])
    assert set(buf.episodes) == episode_names(20) | episode_names(22)

    state = read_json(moved, "ckpt", "state.json")
    assert len(state["replay_rows"]) == len(state["replay_digests"]) == 2
    shards = [set(Buffer(os.path.join(moved, name)).episodes) for name in ("replay", "replay-1")]
    assert shards[0] | shards[1] == episode_names(20) | episode_names(22) | episode_names(24)
    assert len(shards[0]) == len(shards[1]) == 15

def test_sharded_layers_learn_the_same(runs, monkeypatch):
    """shard=True has the losses of shard=False, online too, and a checkpoint that a plain run opens."""
    two = runs.path("two")
    shard = runs.path("shard")
    rows = metrics(two)
    assert_same_losses(rows, metrics(shard), tolerance=1e-4)
    assert_same_losses(rows[:3], metrics(runs.path("deep")), tolerance=1e-4)
    torch.testing.assert_close(tensors(shard), tensors(two), rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(envs.NumberLine, "max_turns", 2)
    evaluate.main([shard, "--episodes=2"])
    assert len(results(shard)) == 5

def test_a_rank_that_lost_its_first_episodes_learns_from_recorded_ones(runs):
    """Until such a rank has an episode of its own, it draws from the recorded data, and says so.

    The story: its empty buffer had been an IndexError. The other rank does not notice anything.
    """
    lost = runs.path("lost")
    log = runs.log("two")
    rollouts = []
    for name in ("replay", "replay-1"):
        episodes = Buffer(os.path.join(lost, name)).episodes
        rollouts.append({episode.partition("-")[0] for episode in episodes})
    assert rollouts == [{"2", "4"}, {"4"}]
    rows = metrics(lost)
    assert len(rows) == 6
    assert all(row["tokens"] > 0 for row in rows)
    assert log.count("dropped, broken on purpose") == 3
    sentence = "Rank 1 has no episode of its own yet: it learns from recorded ones."
    assert log.count(sentence) == 1

def test_ranks_share_a_server(runs):
    """Rank 0 gives the server each policy once, and both ranks play with it at the same time."""
    served = runs.path("served")
    rows = [row for row in metrics(served) if "rollout/turns" in row]
    assert [row["step"] for row in rows] == [3, 5]
    assert [row["rollout/server_failures"] for row in rows] == [0, 0]

    turns = []
    for name in ("replay", "replay-1"):
        shard = Buffer(os.path.join(served, name))
        assert len(shard.episodes) == 6
        # the last observation of an episode that was cut short has no reply
        played = [row for row in shard.rows if row["source"] == "model"]
        assert all(len(row["reply_ids"]) == len(row["behaviour_logprobs"]) > 0 for row in played)
        turns.append(len(played))
    players = [body["model"] for path, body in runs.engine.requests if path.endswith("completions")]
    own = [name for name in players if name.startswith("rollout-")]
    assert len(own) == sum(turns)
    loaded = []
    for path, body in runs.engine.requests:
        if path.endswith("/load_lora_adapter") and body["lora_name"]:
            loaded.append(body["lora_name"])
    # the one that is tried before the run, and one for each rollout
    assert len(loaded) == len(set(loaded)) == 3
    assert set(own) == set(loaded[1:])
    assert not runs.engine.adapters
    assert not os.path.exists(os.path.join(served, "served"))

def test_only_rank_0_prints(runs):
    """Each line is printed once, a user's mistake too."""
    log = runs.log("two")
    # seven jobs, six of them with a table
    assert len(re.findall("^model  ", log, re.M)) == 7
    assert len(re.findall("^schedule .*2 ranks", log, re.M)) == 7
    assert len(re.findall("^  offline_updates = ", log, re.M)) == 7
    assert len(re.findall("^picture hidden", log, re.M)) == 6
    assert "Traceback" not in log

    sentence = "batch_size=5 windows cannot be divided evenly among 2 ranks: set a multiple of 2."
    assert runs.log("wrong").count(sentence) == 1
    assert runs.codes["wrong"] != 0
    assert not os.path.exists(runs.path("wrong"))

def test_mistakes_with_ranks_are_one_sentence(tmp_path, monkeypatch):
    """Sharding without ranks, or of weights that are trained; fewer environments than ranks."""

    def refuses(*words, **changes):
        keys = RUN | dict(model=tmp_path, out_dir=tmp_path / "out", eval_episodes=9) | changes
        one_sentence(lambda: train.main(flags(**keys)), *words)

    refuses("shard", "torchrun", shard=True)
    refuses("shard", "lora_r", shard=True, lora_r=0)
    monkeypatch.setattr(train, "WORLD", 4)
    refuses("eval_episodes=3", "4 ranks", eval_episodes=3)
    refuses("num_envs=2", "4 ranks", num_envs=2)
    refuses("rollout_episodes=3", "4 ranks", rollout_episodes=3)
    refuses("batch_size=6", "multiple of 4", batch_size=6)
