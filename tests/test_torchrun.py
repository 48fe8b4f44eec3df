"""
Several ranks: real processes, gloo, on the CPU. Few starts of many runs, because a start costs more than a run.
    python -m pytest tests/test_torchrun.py
    torchrun --nproc_per_node=2 tests/test_torchrun.py jobs.json        # what the tests start: each job is train.main's argv
"""
import json, os, re, shutil, signal, subprocess, sys, time
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import pytest
import torch
import envs, evaluate, model, train
from pretrain import tiny_nets as scratch
from pretrain.questions import corpus
from buffer import Buffer
from safetensors.torch import load_file

RUN = dict(data_episodes=24, offline_updates=20, online_updates=6, batch_size=8, window=2, micro_batch=4, num_envs=4, rollout_episodes=6, updates_per_rollout=2, eval_episodes=5, eval_quick=3,
           timeout=5, log_interval=1, ckpt_interval=22, eval_interval=0, max_new_tokens=3, filter_warmup=2, warmup_updates=1, device="cpu", lora_r=2)


def argv(out, tiny, **changes):
    return [f"--{k}={v}" for k, v in (RUN | dict(model=tiny, out_dir=out) | changes).items()]


def train_and_keep_gradients(args, turns):
    """train.main with episodes of at most so many turns; the gradients of all updates, as the optimizer gets them, go to <out_dir>.grads."""
    grads, clip = [], torch.nn.utils.clip_grad_norm_
    def keep(params, limit):
        grads.append(torch.cat([p.grad.flatten() for p in params]))
        return clip(params, limit)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(envs.NumberLine, "max_turns", turns)
        m.setattr(torch.nn.utils, "clip_grad_norm_", keep)
        train.launch(args)
    if train.RANK == 0:
        torch.save(grads, next(a for a in args if a.startswith("--out_dir="))[10:] + ".grads")


def losing_the_first_rollout(play):
    """`play`, whose first call loses every episode: what a dead browser does."""
    calls = []
    def losing(*args, **kwargs):
        calls.append(1)
        with pytest.MonkeyPatch.context() as m:
            if len(calls) == 1:
                m.setattr(envs.Env, "reset", lambda self, reset=envs.Env.reset, **how: (reset(self, **how), setattr(self, "lost", "broken on purpose"))[0])
            return iter(list(play(*args, **kwargs)))
    return losing


if __name__ == "__main__":                                                # a rank; rank 1's episodes end after one turn, and it may be told to die or to fall silent
    calls, loss, (what, when) = [], train.compute_loss, os.environ.get("FAULT", "none 0").split()
    def faulty(*args):
        calls.append(1)
        if train.RANK == 1 and what != "none" and len(calls) == int(when):
            os.kill(os.getpid(), signal.SIGKILL) if what == "kill" else time.sleep(600)
        return loss(*args)
    train.compute_loss = faulty
    with open(sys.argv[1]) as f:
        for job in json.load(f):
            with pytest.MonkeyPatch.context() as m:
                if train.RANK == 1 and any(word.endswith("/lost") for word in job):
                    m.setattr(train, "play", losing_the_first_rollout(train.play))
                train_and_keep_gradients(job, 1 if train.RANK == 1 else 3)
    sys.exit()


def start(folder, name, jobs, ranks=2, fault="none 0"):
    """torchrun on this file -> the process, which writes folder/name.log."""
    with open(os.path.join(folder, name + ".json"), "w") as f:
        json.dump(jobs, f)
    return torchrun(folder, name, ranks, os.path.abspath(__file__), os.path.join(folder, name + ".json"), fault=fault)


def torchrun(folder, name, ranks, *words, fault="none 0"):
    with open(os.path.join(folder, name + ".log"), "w") as log:
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *words], stdout=log, stderr=subprocess.STDOUT,
                                env=os.environ | dict(OMP_NUM_THREADS="1", FAULT=fault))


def metrics(out):
    with open(os.path.join(out, "metrics.jsonl")) as f:
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in f]


def weights(out):
    return {name: load_file(os.path.join(out, "ckpt", name)) for name in ("adapter_model.safetensors", "q_head.safetensors")}


def apart(a, b, keys=("nll", "td_error")):
    assert len(a) == len(b) and [r["tokens"] for r in a] == [r["tokens"] for r in b]
    return max(abs(x[k] - y[k]) for x, y in zip(a, b) for k in keys)


def log(folder, name):
    with open(os.path.join(folder, name + ".log")) as f:
        return f.read()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs. one: a rank; two: two; killed: rank 1 dies in update 24, two ranks go on; moved: killed's checkpoint, one rank to update 24, then two to the end; shard: two, with the layers
    sharded; deep: with activations computed twice, too; lost: rank 1 loses its first rollout; hung: rank 1 falls silent in update 3; wrong: a user's mistake."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    at = lambda name: os.path.join(folder, name)
    torch.manual_seed(0)
    net, processor = scratch.llava(list(corpus(200)), vocab_size=320, hidden=32, layers=2, vision_hidden=32, vision_layers=1)
    net.save_pretrained(at("tiny")), processor.save_pretrained(at("tiny"))
    first = dict(killed=start(folder, "kill", [argv(at("killed"), at("tiny"))], fault="kill 24"),
                 hung=start(folder, "hang", [argv(at("hung"), at("tiny"), ckpt_interval=2, timeout=0.5)], fault="hang 3"),
                 wrong=torchrun(folder, "wrong", 2, os.path.join(ROOT, "train.py"), *argv(at("wrong"), at("tiny"), batch_size=5)))
    train_and_keep_gradients(argv(at("one"), at("tiny")), 3)
    codes = {name: first[name].wait(900) for name in ("killed", "wrong")}
    shutil.copytree(at("killed"), at("moved"))
    before = len(metrics(at("killed")))
    train_and_keep_gradients(argv(at("moved"), at("tiny"), resume=True, stop_at=24), 3)
    shutil.copytree(at("moved"), at("alone"))
    codes["two"] = start(folder, "two", [argv(at("two"), at("tiny")), argv(at("killed"), at("tiny"), resume=True), argv(at("moved"), at("tiny"), resume=True),
                                         argv(at("shard"), at("tiny"), shard=True), argv(at("deep"), at("tiny"), shard=True, grad_checkpointing=True, stop_at=3),
                                         argv(at("lost"), at("tiny"), data_episodes=6, offline_updates=2, online_updates=4, ckpt_interval=6, offline_ratio=0.0)]).wait(900)
    assert codes["two"] == 0, log(folder, "two")
    codes["hung"] = first["hung"].wait(900)                               # its time-out ran meanwhile
    return folder, codes, before


def test_two_ranks_learn_as_one(runs):
    """Half the windows on each of two ranks: the gradients and, over twenty updates, the losses of one rank that has them all."""
    one, two = (os.path.join(runs[0], name) for name in ("one", "two"))
    grads = [torch.load(out + ".grads") for out in (one, two)]
    assert len(grads[0]) == len(grads[1]) == 26
    differ = [float((a - b).norm() / a.norm()) for a, b in zip(*grads)]    # 3e-7 of its length at first; later on the weights differ too, by what was rounded
    assert differ[0] < 1e-6 and max(differ[:10]) < 1e-5 and max(differ[:20]) < 1e-4
    assert apart(metrics(one)[:20], metrics(two)[:20]) < 1e-5 and metrics(one)[0]["nll"] != metrics(one)[19]["nll"]


def test_each_rank_plays_its_own_episodes(runs):
    """Rank 1's episodes are over after a turn, rank 0's after three: nobody hangs; together they play the starts that one rank plays; only its own rank's shard has them."""
    one, two = (os.path.join(runs[0], name) for name in ("one", "two"))
    alone, *shards = Buffer(os.path.join(one, "replay")), Buffer(os.path.join(two, "replay")), Buffer(os.path.join(two, "replay-1"))
    seeds = lambda buf: {name: buf.rows[turns[0]]["seed"] for name, turns in buf.episodes.items()}
    assert [len(buf.episodes) for buf in (alone, *shards)] == [18, 9, 9] and seeds(alone) == seeds(shards[0]) | seeds(shards[1])
    assert shards[0].stats()["turns"] > 9 == shards[1].stats()["turns"]
    rows = metrics(two)
    assert len(rows) == 26 and all(abs(r[k]) < 1e9 for r in rows for k in r if k != "phase") and [r["step"] for r in rows if "rollout/turns" in r] == [21, 23, 25]
    assert 1 < rows[20]["rollout/turns"] < 3                              # of both ranks
    results = json.load(open(os.path.join(two, "eval.json")))["results"]
    assert [r["episodes"] for r in results.values()] == [5] * 5


def test_a_rank_that_dies_ends_the_job_and_resume_goes_on(runs):
    """Killed in update 24, behind a rollout that no checkpoint has: the job fails and says which rank, and what comes after a resume is, bit for bit, the run that was never killed."""
    folder, codes, before = runs
    killed, two = os.path.join(folder, "killed"), os.path.join(folder, "two")
    assert codes["killed"] != 0 and re.search(r"rank +: 1", log(folder, "kill")) and "SIGKILL" in log(folder, "kill") and before == 23
    assert metrics(killed) == metrics(two)
    for shard in ("replay", "replay-1"):
        assert open(os.path.join(killed, shard, "metadata.jsonl")).read() == open(os.path.join(two, shard, "metadata.jsonl")).read()
    assert all(torch.equal(x, weights(two)[file][k]) for file, tensors in weights(killed).items() for k, x in tensors.items())


def test_a_rank_that_falls_silent_ends_the_job(runs):
    """It lives, and does not come: the others wait for `timeout` minutes, then the job fails with a sentence; the checkpoint stands."""
    folder, codes, before = runs
    said = log(folder, "hang")
    assert codes["hung"] != 0 and len(metrics(os.path.join(folder, "hung"))) == 2 and "Rank 0 of 2 ends with the error below" in said and "imed out" in said and "--resume=True" in said
    assert model.latest_checkpoint(os.path.join(folder, "hung"))


def test_a_checkpoint_moves_between_numbers_of_ranks(runs):
    """Two ranks, then one, which takes in the other's shard, then two, of which the new one copies a shard: nothing that was played is lost, all that is shared is the same."""
    folder = runs[0]
    moved, two, alone = (os.path.join(folder, name) for name in ("moved", "two", "alone"))
    assert metrics(moved)[:22] == metrics(two)[:22] and len(metrics(moved)) == 26
    state = lambda out: json.load(open(os.path.join(out, "ckpt", "state.json")))
    names = lambda out, shard="replay": set(Buffer(os.path.join(out, shard)).episodes)
    of = lambda step: {f"{step}-{n}" for n in range(6)}
    assert state(alone) == dict(step=24, replay_rows=[len(Buffer(os.path.join(alone, "replay")))]) and names(alone) == of(20) | of(22)
    assert len(state(moved)["replay_rows"]) == 2
    assert names(moved) | names(moved, "replay-1") == of(20) | of(22) | of(24) and len(names(moved)) == len(names(moved, "replay-1")) == 15


def test_sharded_layers_learn_the_same(runs):
    """shard=True: the losses of shard=False, online too, and a checkpoint that a plain run opens."""
    two, shard, deep = (os.path.join(runs[0], name) for name in ("two", "shard", "deep"))
    assert apart(metrics(two), metrics(shard)) < 1e-4 > apart(metrics(two)[:3], metrics(deep))
    assert max(float((x - weights(shard)[file][k]).abs().max()) for file, tensors in weights(two).items() for k, x in tensors.items()) < 1e-4
    with pytest.MonkeyPatch.context() as m:
        m.setattr(envs.NumberLine, "max_turns", 2)
        evaluate.main([shard, "--episodes=2"])
    assert len(json.load(open(os.path.join(shard, "eval.json")))["results"]) == 5


def test_a_rank_that_lost_its_first_episodes_learns_from_recorded_ones(runs):
    """Its own buffer is empty: once an IndexError. Until an episode of its own is there it draws from the recorded data, and says so; the other rank and the collectives notice nothing."""
    lost, said = os.path.join(runs[0], "lost"), log(runs[0], "two")
    shards = [Buffer(os.path.join(lost, name)) for name in ("replay", "replay-1")]
    assert [sorted({name.partition("-")[0] for name in buf.episodes}) for buf in shards] == [["2", "4"], ["4"]]
    rows = metrics(lost)
    assert len(rows) == 6 and all(row["tokens"] > 0 for row in rows) and said.count("dropped, broken on purpose") == 3
    assert said.count("Rank 1 has no episode of its own yet: it learns from recorded ones.") == 1


def test_only_rank_0_prints(runs):
    """Each line once, a mistake of the user's too."""
    said = log(runs[0], "two")
    assert [len(re.findall(pattern, said, re.M)) for pattern in ("^model  ", "^schedule .*2 ranks", "^  offline_updates = ", "^picture hidden")] == [6, 6, 6, 5] and "Traceback" not in said
    assert log(runs[0], "wrong").count("batch_size=5 windows cannot be dealt evenly to 2 ranks: set a multiple of 2.") == 1 and runs[1]["wrong"] != 0
    assert not os.path.exists(os.path.join(runs[0], "wrong"))


def test_mistakes_are_said_in_a_sentence(tmp_path, monkeypatch):
    """Sharding without ranks, or of weights that are trained; fewer environments than ranks."""
    def sentence(changes, *words):
        with pytest.raises(SystemExit) as e:
            train.main(argv(str(tmp_path / "out"), str(tmp_path), **dict(eval_quick=9, eval_episodes=9) | changes))
        assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), e.value
    sentence(dict(shard=True), "shard", "torchrun")
    sentence(dict(shard=True, lora_r=0), "shard", "lora_r")
    sentence(dict(timeout=0), "timeout", "above 0")
    monkeypatch.setattr(train, "WORLD", 4)
    sentence(dict(eval_quick=3), "eval_quick=3", "4 ranks")
    sentence(dict(eval_quick=4, num_envs=2), "num_envs=2", "4 ranks")
    sentence(dict(eval_quick=4, rollout_episodes=3), "rollout_episodes=3", "4 ranks")
    sentence(dict(batch_size=6), "batch_size=6", "multiple of 4")
