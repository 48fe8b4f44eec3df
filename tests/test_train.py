"""
The whole: data, training, resume, evaluation, end to end with a model of a few thousand weights; and the shape of the code base.
    python -m pytest tests/test_train.py
"""
import ast, glob, json, os, re, shutil, sys, time
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import envs, evaluate, model, train
from worlds.registry import make
from buffer import Buffer, reply_text
from configurator import check_config, configure, parse_block
from pretrain import questions as reading, tiny_nets as scratch
from pretrain.questions import corpus
from evaluate import exploring_agent, held_out_seeds, play, record, scripted_agent, episode_summary, wilson

CORE = "configurator envs model buffer agent_rl evaluate train".split()     # who may import whom: only what stands before it
SMALL = dict(vocab_size=320, hidden=32, layers=1, vision_hidden=32, vision_layers=1)
FEW = dict(data_episodes=8, offline_updates=4, online_updates=4, batch_size=4, window=2, micro_batch=2, num_envs=3, rollout_episodes=4, updates_per_rollout=2, eval_episodes=3,
           eval_quick=3, log_interval=1, ckpt_interval=8, eval_interval=0, max_new_tokens=3, filter_warmup=2, warmup_updates=1, device="cpu", lora_r=2, lora_dropout=0.1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a very small VLM with random weights."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(0)
    net, processor = scratch.llava(list(corpus(200)), **SMALL)
    net.save_pretrained(folder), processor.save_pretrained(folder)
    return folder


def run(out, tiny, **changes):
    """train.main with a few updates; episodes of at most three turns."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(envs.NumberLine, "max_turns", 3)
        train.main([f"--{k}={v}" for k, v in (FEW | dict(model=tiny, out_dir=out) | changes).items()])
    return str(out)


def metrics(out):
    """metrics.jsonl without the clock."""
    with open(os.path.join(out, "metrics.jsonl")) as f:
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in f]


def content(folder, *names):
    """{path: bytes} of all files, or of some."""
    paths = [os.path.join(d, f) for d, _, files in os.walk(folder) for f in files]
    return {p[len(str(folder)):]: open(p, "rb").read() for p in paths if not names or os.path.basename(p) in names}


def weights(out):
    found = content(os.path.join(out, "ckpt"), "adapter_model.safetensors", "q_head.safetensors")
    assert len(found) == 2
    return found


def one_sentence(call, *words):
    with pytest.raises(SystemExit) as e:
        call()
    text = e.value.code
    assert isinstance(text, str) and "\n" not in text and all(w in text for w in words), text


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """A run that nothing interrupts: what all others are compared with. Do not write into it."""
    return run(tmp_path_factory.mktemp("runs") / "straight", tiny)

# ------------------------------------------------------------------------------------------------------------- memory

def test_a_dry_run_shows_what_it_takes_and_leaves_nothing(tiny, tmp_path, capsys):
    """Peak memory by part; an update with a window at a time, or with checkpointed layers, takes less; out_dir is not made."""
    def peaks(**changes):
        run(tmp_path / "out", tiny, dry_run=True, n_critics=1, **changes)
        said = capsys.readouterr().out
        return {name: float(mib) for name, mib in re.findall(r"^(\w+) +([0-9.]+) MiB", said, re.M)}
    whole, half = peaks(micro_batch=4), peaks(micro_batch=1)
    deep, again = [peaks(model=os.path.join(ROOT, "tiny-vlm"), grad_checkpointing=way)["update"] for way in (False, True)]      # of several layers
    assert list(whole) == ["weights", "adapters", "heads", "update", "optimizer", "rollout", "peak"][:3] + ["optimizer", "update", "rollout", "peak"] and min(whole.values()) >= 0
    assert half["update"] < 0.6 * whole["update"] and again < 0.7 * deep and whole["weights"] == half["weights"] > 0
    assert not os.path.exists(tmp_path / "out")


def test_checkpointed_layers_give_the_same_run(straight, tiny, tmp_path):
    """grad_checkpointing computes activations twice and changes no bit of what is learned (dropout's draws are repeated)."""
    twin = run(tmp_path / "twin", tiny, grad_checkpointing=True)
    assert metrics(twin) == metrics(straight) and weights(twin) == weights(straight)


def test_a_base_in_bfloat16(tiny, tmp_path):
    """The frozen base takes two bytes a weight, adapters, critics and what is saved stay float32."""
    out, kept = run(tmp_path / "half", tiny, weights="bfloat16"), []
    assert all(np.isfinite(v) for r in metrics(out) for k, v in r.items() if k != "phase")
    for file in ("adapter_model.safetensors", "q_head.safetensors"):
        kept += load_file(os.path.join(out, "ckpt", file)).values()
    cfg = configure(os.path.join(ROOT, "train.py"), [f"--model={tiny}", "--weights=bfloat16", "--device=cpu"], quiet=True)
    vlm = model.build(cfg)
    assert {p.dtype for p in kept} == {torch.float32} and {p.dtype for p in vlm.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in vlm.net.parameters() if not p.requires_grad} == {torch.bfloat16}
    one_sentence(lambda: run(tmp_path / "all", tiny, weights="bfloat16", lora_r=0), "weights='bfloat16'", "lora_r")

# ------------------------------------------------------------------------------------------------------------- resume

def test_the_run_learns_and_logs(straight, tiny, tmp_path):
    """Both phases are logged, all numbers are finite, the weights move, and the same command gives the same run."""
    rows = metrics(straight)
    assert [(r["step"], r["phase"]) for r in rows] == [(n, "offline" if n <= 4 else "online") for n in range(1, 9)]
    assert all(np.isfinite(v) for r in rows for k, v in r.items() if k != "phase") and [("rollout/valid" in r) for r in rows] == [False] * 4 + [True, False] * 2
    twin = run(tmp_path / "twin", tiny)
    assert metrics(twin) == rows and weights(twin) == weights(straight)
    other = run(tmp_path / "other", tiny, seed=1)
    assert metrics(other) != rows and weights(other) != weights(straight)
    results = json.load(open(os.path.join(straight, "eval.json")))["results"]
    assert list(results) == ["offline, greedy", "offline, sampled, T=1", "greedy", "sampled, T=1", "picture hidden, greedy"] and all(r["episodes"] == 3 for r in results.values())


@pytest.mark.parametrize("stop", [2, 4, 5, 6])
def test_stop_and_resume_is_bit_identical(straight, tiny, tmp_path, stop):
    """Stopped offline, between the phases, in the middle of a rollout's updates, before a rollout: the metrics, the weights, the
    optimizer and the replay are those of the run that never stopped."""
    out = run(tmp_path / "run", tiny, stop_at=stop)
    assert len(metrics(out)) == stop and not os.path.exists(os.path.join(out, "eval.json"))
    run(out, tiny, resume=True)
    assert metrics(out) == metrics(straight) and weights(out) == weights(straight)
    assert content(os.path.join(out, "replay"), "metadata.jsonl") == content(os.path.join(straight, "replay"), "metadata.jsonl")
    assert content(out, "optimizer.pt", "state.json") == content(straight, "optimizer.pt", "state.json")


def test_a_run_that_has_ended_goes_on(straight, tiny, tmp_path):
    """More online updates than it was begun with: what was logged and played stands, the learning rate rises to the longer cosine, the offline phase's table is kept; interrupted, it goes on as any run."""
    out = str(tmp_path / "run")
    shutil.copytree(straight, out)
    ended, offline = metrics(out), json.load(open(os.path.join(out, "eval_offline.json")))
    run(out, tiny, resume=True, online_updates=7, stop_at=9)
    run(out, tiny, resume=True, online_updates=7)
    rows = metrics(out)
    assert rows[:8] == ended and [r["step"] for r in rows[8:]] == [9, 10, 11] and rows[8]["lr"] > ended[-1]["lr"] and weights(out) != weights(straight)
    results = json.load(open(os.path.join(out, "eval.json")))["results"]
    assert {k: results[k] for k in offline} == offline
    before = content(out)
    one_sentence(lambda: run(out, tiny, resume=True, online_updates=4), "online_updates=4", "7")
    assert content(out) == before


@pytest.mark.parametrize("stop", [2, 5])
def test_resume_after_a_crash(straight, tiny, tmp_path, stop):
    """A run that was killed long after its checkpoint, while writing three files at once and between two renames: what it logged and
    played after the checkpoint comes again, bit for bit. (A moved folder, too: out_dir is no setting of the method.)"""
    early, out = run(tmp_path / "early", tiny, stop_at=stop), str(tmp_path / "crashed")
    shutil.copytree(straight, out)
    shutil.rmtree(os.path.join(out, "ckpt"))
    shutil.copytree(os.path.join(early, "ckpt"), os.path.join(out, "ckpt.old"))
    shutil.copytree(os.path.join(early, "ckpt"), os.path.join(out, "ckpt.tmp"))
    os.remove(os.path.join(out, "ckpt.tmp", "state.json"))
    for name in ("metrics.jsonl", "replay/metadata.jsonl"):
        with open(os.path.join(out, name), "a") as f:
            f.write('{"step": 9, "torn')
    run(out, tiny, resume=True)
    assert metrics(out) == metrics(straight) and weights(out) == weights(straight)
    assert content(os.path.join(out, "replay"), "metadata.jsonl") == content(os.path.join(straight, "replay"), "metadata.jsonl")
    assert not os.path.exists(os.path.join(out, "ckpt.tmp")) and not os.path.exists(os.path.join(out, "ckpt.old"))


def test_clipped_and_scaled_rewards(straight, tiny, tmp_path):
    """reward_clip and reward_scale are for the critic's eyes: what was recorded stays as it was, what is learned from it does not."""
    out = run(tmp_path / "run", tiny, reward_clip=0.5, reward_scale=0.1, gamma=0.5)
    assert content(os.path.join(out, "data"), "metadata.jsonl") == content(os.path.join(straight, "data"), "metadata.jsonl")
    assert all(abs(r["return_observed"]) < 0.1 for r in metrics(out)) and max(abs(r["return_observed"]) for r in metrics(straight)) > 0.1
    assert json.load(open(os.path.join(out, "eval.json")))["results"].keys() == json.load(open(os.path.join(straight, "eval.json")))["results"].keys()


def test_evaluation_never_perturbs_training(straight, tiny, tmp_path):
    """An evaluation after every update changes no loss, no rollout and no weight."""
    out = run(tmp_path / "run", tiny, eval_interval=1)
    rows = metrics(out)
    assert ["eval/success" in r for r in rows] == [True] * 7 + [False]
    assert [{k: v for k, v in r.items() if not k.startswith("eval/")} for r in rows] == metrics(straight) and weights(out) == weights(straight)


def test_all_weights_resume(tiny, tmp_path):
    """lora_r=0: the checkpoint is a model folder, and resume is as exact."""
    one = run(tmp_path / "one", tiny, lora_r=0)
    two = run(tmp_path / "two", tiny, lora_r=0, stop_at=5)
    run(two, tiny, lora_r=0, resume=True)
    files = ("model.safetensors", "q_head.safetensors")
    assert metrics(one) == metrics(two) and content(os.path.join(one, "ckpt"), *files) == content(os.path.join(two, "ckpt"), *files)
    shared, saved = (load_file(os.path.join(one, folder, files[0])) for folder in ("model", "ckpt"))      # the folder to share has two bytes a weight
    assert set(shared) == set(saved) and all(shared[k].dtype == torch.float16 and torch.equal(shared[k], saved[k].half()) for k in saved)

# ------------------------------------------------------------------------------------------------------- every variant

@pytest.mark.parametrize("changes", [dict(actor_loss="sft"), dict(actor_loss="awr"), dict(actor_loss="fbc"), dict(mdp="turn"), dict(q_head="tied"), dict(n_critics=1), dict(v_support=0.1, critic_detach=True),
                                     dict(invalid="random", dtype="bfloat16"), dict(actor_loss="awr", q_head="tied", mdp="turn", lora_r=0), dict(offline_updates=0, online_updates=3, explore=0.5), dict(env="Reading", offline_updates=3, online_updates=0),
                                     dict(env="EZPoints"), dict(offline_ratio=0.0), dict(offline_ratio=1.0)], ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()))
def test_variants_run(tiny, tmp_path, changes):
    """Each key that switches the method or the task: three updates, finite numbers, a checkpoint that loads."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(envs.EZPoints, "max_turns", 3)
        out = run(tmp_path / "run", tiny, **dict(offline_updates=2, online_updates=1, filter_warmup=1) | changes)
        rows = metrics(out)
        assert len(rows) == 3 and all(np.isfinite(v) for r in rows for k, v in r.items() if k != "phase")
        assert ("td_error" in rows[0]) == (changes.get("actor_loss") not in ("sft", "fbc"))
        if len(changes) > 1 or "actor_loss" in changes:
            m.setattr(envs.NumberLine, "max_turns", 2)
            evaluate.main([out, "--episodes=2"])


def test_micro_batches_do_not_matter(straight, tiny, tmp_path):
    """The same run with other micro-batches: the same first losses but for rounding."""
    key = dict(stop_at=2, lora_dropout=0.0)
    one, four = (metrics(run(tmp_path / str(n), tiny, micro_batch=n, **key)) for n in (1, 4))
    for a, b in zip(one, four):
        assert {k: v for k, v in a.items() if k != "phase"} == pytest.approx({k: v for k, v in b.items() if k != "phase"}, rel=1e-3, abs=1e-4)


def test_a_run_with_cached_features(straight, tiny, tmp_path):
    """The same run but for rounding; and stopped and gone on with, when nothing is in memory any more, it is the same bit for bit."""
    seen, again = run(tmp_path / "seen", tiny, vision_cache_mb=1), run(tmp_path / "again", tiny, vision_cache_mb=1, stop_at=5)
    run(again, tiny, vision_cache_mb=1, resume=True)
    assert metrics(seen) == metrics(again) and weights(seen) == weights(again)
    for a, b in zip(metrics(seen), metrics(straight)):
        assert {k: v for k, v in a.items() if k != "phase"} == pytest.approx({k: v for k, v in b.items() if k != "phase"}, rel=1e-2, abs=1e-3)


def test_a_rank_without_an_episode_of_its_own(tiny, tmp_path, monkeypatch, capsys):
    """The first rollout lost all of this rank's episodes, not those of the others: once an IndexError. It learns from recorded ones until it has some, and says so."""
    others = []
    def losing(*args, **how):
        others[:] = list(play(*args, **how))
        return iter([] if how.get("prefix") == "4-" else others)
    monkeypatch.setattr(train, "play", losing)
    monkeypatch.setattr(train, "of_all_ranks", lambda played: others)
    out = run(tmp_path / "run", tiny, offline_ratio=0.0)
    assert len(metrics(out)) == 8 and all(row["tokens"] > 0 for row in metrics(out))
    assert {name.partition("-")[0] for name in Buffer(os.path.join(out, "replay")).episodes} == {"6"}
    assert capsys.readouterr().out.count("Rank 0 has no episode of its own yet: it learns from recorded ones.") == 1


def test_a_run_from_scratch(tmp_path, monkeypatch, capsys):
    """The story: `model='scratch'` trains its own tokenizer, and evaluate.py built another one, without texts, so that no such run could
    be evaluated. The model comes from the checkpoint."""
    monkeypatch.setattr(reading, "corpus", lambda n, **kw: corpus(100, **kw))
    real = scratch.llava
    monkeypatch.setattr(scratch, "llava", lambda texts, **kw: real(texts, **SMALL | kw))
    out = run(tmp_path / "run", "scratch", lora_r=0, env="Reading", actor_loss="sft", offline_updates=2, online_updates=0)
    evaluate.main([out, "--episodes=3"])
    assert "sampled" in capsys.readouterr().out

# ----------------------------------------------------------------------------------------------------------- bad input

def test_a_run_is_never_lost_by_accident(straight, tiny, tmp_path):
    """A refusal is one sentence, and nothing in the folder has changed: a second start, other settings, wrong keys."""
    out = str(tmp_path / "run")
    shutil.copytree(straight, out)
    before = content(out)
    for call, words in ((lambda: run(out, tiny), ("already holds a run", "--resume=True", "--overwrite=True")),
                        (lambda: run(out, tiny, resume=True, lr=0.5), ("lr=0.5", "0.004")),
                        (lambda: run(out, tiny, resume=True, offline_updates=5), ("offline_updates=5", "4")),
                        (lambda: run(out, tiny, resume=True, overwrite=True), ("overwrite",)),
                        (lambda: run(out, tiny, overwrite=True, lora_r=0, vision_cache_mb=9), ("vision_cache_mb=9", "lora_r=0")),
                        (lambda: run(out, tiny, overwrite=True, env="NumberLin"), ("env='NumberLin'", "NumberLine")),
                        (lambda: run(out, tiny, overwrite=True, actor_loss="ppo"), ("actor_loss='ppo'", "afsft")),
                        (lambda: run(out, tiny, overwrite=True, data=os.path.join(out, "data")), ("overwrite", "data=")),
                        (lambda: run(out, tiny, overwrite=True, datas="x"), ("datas", "data"))):
        one_sentence(call, *words)
        assert content(out) == before


def test_overwrite_deletes_the_run_and_nothing_else(straight, tiny, tmp_path):
    """A file that is not ours stays."""
    out = str(tmp_path / "run")
    shutil.copytree(straight, out)
    with open(os.path.join(out, "notes.txt"), "w") as f:
        f.write("mine")
    run(out, tiny, overwrite=True, stop_at=1)
    assert len(metrics(out)) == 1 and not os.path.exists(os.path.join(out, "eval.json")) and open(os.path.join(out, "notes.txt")).read() == "mine"


def test_bad_input(tiny, straight, tmp_path):
    """Nothing to resume, no such data, no such model, a folder of something else: one sentence each."""
    out = tmp_path / "new"
    one_sentence(lambda: run(out, tiny, resume=True), "no checkpoint", str(out))
    assert not os.path.exists(out)
    one_sentence(lambda: run(tmp_path / "a", tiny, data=str(tmp_path / "nowhere")), "nowhere", "does not exist")
    one_sentence(lambda: run(tmp_path / "b", str(tmp_path / "nomodel")), "nomodel")
    one_sentence(lambda: evaluate.main([str(tmp_path / "nowhere")]), "nowhere", "config.json")
    one_sentence(lambda: evaluate.main([]), "Name the run folder")
    one_sentence(lambda: evaluate.main([straight, "--episodes=0"]), "--episodes")
    one_sentence(lambda: evaluate.main([straight, "--agent=nobody"]), "nobody", "expert")
    one_sentence(lambda: evaluate.main([straight, "--episode=3"]), "episodes")
    sft = run(tmp_path / "sft", tiny, actor_loss="sft", offline_updates=1, online_updates=0)
    one_sentence(lambda: evaluate.main([sft, "--q_weight=1"]), "q_weight", "critic")
    one_sentence(lambda: run(tmp_path / "c", tiny, actor_loss="sft", q_weight=1.0), "q_weight", "critic")

# ---------------------------------------------------------------------------------------------------------- evaluation

def test_evaluate_prints_and_saves(straight, tiny, tmp_path, capsys):
    """The table and eval.json are of the checkpoint; --save records what was sampled; the critic can correct the play."""
    out = str(tmp_path / "run")
    shutil.copytree(straight, out)
    old = json.load(open(os.path.join(out, "eval.json")))["results"]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(envs.NumberLine, "max_turns", 3)
        evaluate.main([out])
        new = json.load(open(os.path.join(out, "eval.json")))
        assert new["results"] == old and new["checkpoint"].startswith(out)
        text = capsys.readouterr().out
        assert all(word in text for word in ("greedy", "sampled, T=1", "picture hidden", "goal reached", "summed reward > 0", "Wilson"))
        for folder, noise in (("x", 1), ("y", 2)):                       # sampling has its own stream: neither reads nor moves the global one
            torch.manual_seed(noise)
            evaluate.main([out, "--episodes=5", "--q_weight=2", f"--save={tmp_path / folder}"])
    assert content(tmp_path / "x") == content(tmp_path / "y")
    buf, results = Buffer(str(tmp_path / "x")), json.load(open(os.path.join(out, "eval.json")))["results"]
    assert buf.stats()["episodes"] == 5 and {r["source"] for r in buf.rows} <= {"model", "end"}
    assert {k: buf.stats()[k] for k in ("success", "episode_return", "valid")} == pytest.approx({k: results["sampled, T=1"][k] for k in ("success", "episode_return", "valid")})
    for row in buf.rows:
        if reply_text(row) is not None:
            assert 0 < len(row["reply_ids"]) == len(row["behaviour_logprobs"]) <= 3 and max(row["behaviour_logprobs"]) <= 0


def test_expert_records_a_folder(straight, tmp_path, capsys):
    """--agent=expert --save=folder: any player's episodes in the format that training reads; the run's own evaluation stays. A second time
    into the same folder is refused."""
    before, folder = content(straight), str(tmp_path / "x")
    evaluate.main([straight, "--agent=expert", "--episodes=6", f"--save={folder}"])
    assert "100.0 %" in capsys.readouterr().out and content(straight) == before
    stats = Buffer(folder).stats()
    assert (stats["episodes"], stats["success"], stats["success_return"], stats["valid"]) == (6, 1.0, 1.0, 1.0)
    one_sentence(lambda: evaluate.main([straight, "--agent=expert", "--episodes=6", f"--save={folder}"]), folder, "another")
    evaluate.main([straight, "--agent=expert", "--episodes=2", "--seed=1", f"--save={folder}"])
    assert len(Buffer(folder).episodes) == 8


@pytest.mark.parametrize("name", ["NumberLine", "EZPoints"])
def test_expert_is_perfect_and_malformed_runs_out(name, tmp_path):
    """What is played, what is recorded and what is summed up agree: an expert always wins, a player without syntax is cut off, and its
    last observation is stored behind its last turn."""
    make_env = lambda: make(name)
    for mix, wins in (({"expert": 1.0}, 1.0), ({"malformed": 1.0}, 0.0)):
        played = list(play(make_env, scripted_agent(mix, np.random.default_rng(0)), list(range(12)), num_envs=5, split="train"))
        buf = Buffer(str(tmp_path / str(wins)), create=True)
        assert record(iter(played), buf, chunk=5) == 12
        s, stats = episode_summary(played), Buffer(buf.folder).stats()
        assert s["success"] == stats["success"] == s["valid"] == wins and s["episodes"] == stats["episodes"] == 12
        assert s["episode_return"] == pytest.approx(stats["episode_return"]) and s["turns"] * 12 == stats["turns"]
        for turns in buf.episodes.values():
            rows = [buf.rows[i] for i in turns]
            assert [r["turn"] for r in rows] == list(range(len(rows))) and len({r["seed"] for r in rows}) == 1
            if wins:
                assert [r["terminated"] for r in rows] == [False] * (len(rows) - 1) + [True] and all(reply_text(r) is not None for r in rows)
            else:
                limit = make_env().max_turns
                assert len(rows) == limit + 1 and [r["truncated"] for r in rows] == [k == limit - 1 for k in range(limit + 1)] and not any(r["terminated"] for r in rows)
                assert [reply_text(r) is None for r in rows] == [False] * limit + [True] and len({str(r["images_file_names"]) for r in rows}) == 1


def test_wilson():
    """Against published values (Newcombe 1998, table I, and the closed forms at 0 and n)."""
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4)) and wilson(10, 10) == (pytest.approx(0.7225, abs=1e-4), 1.0)
    assert wilson(50, 100) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert wilson(15, 148) == (pytest.approx(0.0624, abs=1e-4), pytest.approx(0.1605, abs=1e-4))


def test_held_out_starts():
    """NumberLine: all 30 starts, each once. Card games: different starts as long as there are some, and none is ever dealt in training."""
    starts = {}
    env = make("NumberLine")
    for seed in (seeds := held_out_seeds(env, 30)):
        env.reset(seed=seed, options={"split": "test"})
        starts[env.fingerprint()] = starts.get(env.fingerprint(), 0) + 1
    assert len(starts) == 30 and set(starts.values()) == {1} and held_out_seeds(env, 65)[:30] == seeds == held_out_seeds(env, 65)[30:60]
    for name in ("EZPoints", "Points24", "Blackjack"):
        env, test, seen, n = make(name), [], set(), 20
        def act(envs_, rows, images):                                     # what `play` really deals from these seeds
            test.extend(e.fingerprint() for e, row in zip(envs_, rows) if row["turn"] == 0)
            return [dict(reply="[action] =" if name != "Blackjack" else "[action] stand", source="x")] * len(rows)
        assert len(list(play(lambda: make(name), act, held_out_seeds(env, n)))) == n
        for seed in range(400):
            env.reset(seed=seed, options={"split": "train"})
            seen.add(env.fingerprint())
        assert len(set(test)) == len(test) == n and not set(test) & seen, name

# -------------------------------------------------------------------------------------------------------- several tasks

def test_several_tasks_in_one_run(tiny, tmp_path, capsys):
    """--env=A,B: recorded, rolled out and evaluated in turn; results of each and of all; what is held out is held out by each game's own starts."""
    out = run(tmp_path / "run", tiny, env="NumberLine,EZPoints", eval_episodes=5)
    for folder, n in (("data", 8), ("replay", 8)):
        buf = Buffer(os.path.join(out, folder))
        first = [buf.rows[turns[0]] for turns in buf.episodes.values()]
        assert {(int(row["episode"].rpartition("-")[2]) % 2, row["env"]) for row in first} == {(0, "NumberLine"), (1, "EZPoints")} and len(first) == n
        stats = buf.stats()
        assert {k: of["episodes"] for k, of in stats["by_env"].items()} == dict(NumberLine=n // 2, EZPoints=n // 2) and sum(of["turns"] for of in stats["by_env"].values()) == stats["turns"]
    for name, s in json.load(open(os.path.join(out, "eval.json")))["results"].items():
        assert {k: of["episodes"] for k, of in s["by_env"].items()} == dict(NumberLine=3, EZPoints=2) and s["episodes"] == 5, name
    assert {"rollout/EZPoints/success", "rollout/NumberLine/success"} <= set(metrics(out)[4])
    assert capsys.readouterr().out.count("\n  EZPoints ") == 6
    evaluate.main([out, "--agent=expert", "--episodes=7"])
    assert "NumberLine,EZPoints" in capsys.readouterr().out
    env = make("NumberLine,EZPoints")
    seeds = held_out_seeds(env, 9)
    assert seeds[::2] == held_out_seeds(make("NumberLine"), 5) and seeds[1::2] == held_out_seeds(make("EZPoints"), 4)
    assert len(set(held_out_seeds(make("EZPoints,NumberLine,EZPoints"), 9)[::3] + held_out_seeds(make("EZPoints,NumberLine,EZPoints"), 9)[2::3])) == 6   # the same twice are not more starts


def test_recorded_play_counts_turns_an_episode_for_each_task(tiny, tmp_path, capsys):
    """The report of a folder of several tasks had shown each task's turns in total beside the turns an episode of all."""
    out = run(tmp_path / "run", tiny, env="NumberLine,EZPoints", eval_episodes=5)
    stats = Buffer(os.path.join(out, "data")).stats()
    row = evaluate.recorded_summary(stats)
    assert row["turns"] == stats["turns"] / stats["episodes"]
    for name, of in row["by_env"].items():
        assert of["turns"] == stats["by_env"][name]["turns"] / stats["by_env"][name]["episodes"] <= 10 and of["success_95"][0] <= of["success"] <= of["success_95"][1]


def test_held_out_starts_are_drawn_once_a_run(monkeypatch):
    """Each evaluation had dealt them anew: seconds each where a start is a web page."""
    drawn = []
    monkeypatch.setattr(evaluate, "held_out", lambda env, n: drawn.append(n) or held_out_seeds(env, n))
    one, two = (lambda: make("EZPoints")), (lambda: make("NumberLine"))
    assert evaluate.held_out_starts(one, 9) == evaluate.held_out_starts(one, 9) == held_out_seeds(one(), 9) and drawn == [9]
    assert evaluate.held_out_starts(two, 9) == held_out_seeds(two(), 9) and evaluate.held_out_starts(one, 4) == held_out_seeds(one(), 4) and drawn == [9, 9, 4]


class Flaky(envs.NumberLine):
    """Its episodes are lost in their first turn: those of seeds below 100 always, of seeds below 200 the first time."""
    broken, alive, most = set(), 0, 0
    def act(self, action):
        type(self).alive += 1
        type(self).most = max(self.most, self.alive)
        time.sleep(0.002)
        type(self).alive -= 1
        if self.seed < 100 or self.seed < 200 and self.seed not in self.broken:
            self.lost = "broken on purpose"
            self.broken.add(self.seed)
        return super().act(action)
    def reset(self, seed=None, options=None):
        self.seed = seed
        return super().reset(seed, options)


def test_lost_episodes_are_played_again_then_dropped_and_reported(capsys, monkeypatch):
    monkeypatch.setattr(Flaky, "broken", set())
    expert = lambda: scripted_agent({"expert": 1.0}, np.random.default_rng(0))
    played = list(play(Flaky, expert(), [300, 7, 150, 301], num_envs=2))
    assert sorted(e["rows"][0]["seed"] for e in played) == [150, 300, 301] and all(e["success"] for e in played)
    said = capsys.readouterr().out
    assert "seed 7: dropped, broken on purpose; 1 of 4 episodes" in said and said.count("dropped") == 1
    one_sentence(lambda: episode_summary(list(play(Flaky, expert(), [1]))), "No episode")


def test_threads_step_what_waits(monkeypatch):
    """`workers` caps how many are alive and steps them at once; what is played does not depend on it."""
    monkeypatch.setattr(Flaky, "broken", set())
    monkeypatch.setattr(Flaky, "most", 0)
    agent = lambda: scripted_agent({"expert": 1.0}, np.random.default_rng(0))
    def outcome(max_parallel, cls=Flaky):
        monkeypatch.setattr(cls, "workers", max_parallel)
        return {e["rows"][0]["episode"]: [(row["seed"], row["action"], row["reward"], row["images_file_names"]) for row in e["rows"]] for e in play(cls, agent(), list(range(300, 330)), num_envs=8)}
    alone = outcome(None)
    assert Flaky.most == 1
    assert outcome(3) == alone and 1 < Flaky.most <= 3

# -------------------------------------------------------------------------------------------------- shape of the code base

def tree(name):
    with open(os.path.join(ROOT, f"{name}.py")) as f:
        return ast.parse(f.read())


def read_keys(name, *of):
    """The attributes that a file reads of its settings: cfg.KEY."""
    return {n.attr for n in ast.walk(tree(name)) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in of}


def test_every_key_is_read_and_every_read_is_a_key():
    """No key without effect, and no key that is read but does not exist (a rare branch would find out at the end of a night)."""
    keys = set(parse_block(os.path.join(ROOT, "train.py")))
    used = read_keys("train", "cfg") | read_keys("agent_rl", "cfg") | read_keys("model", "cfg") | read_keys("evaluate", "run_cfg") | read_keys("extras/report", "run_cfg")
    assert used == keys and read_keys("configurator", "cfg") <= keys
    assert read_keys("evaluate", "cfg") | read_keys("extras/teachers", "cfg") == set(parse_block(os.path.join(ROOT, "evaluate.py")))


def test_imports_run_one_way():
    """train -> evaluate -> agent_rl -> buffer, model -> envs, configurator: no file imports one that stands above it."""
    for name in CORE:
        inside = {a.name for n in ast.walk(tree(name)) if isinstance(n, ast.Import) for a in n.names} | {n.module for n in ast.walk(tree(name)) if isinstance(n, ast.ImportFrom)}
        assert inside & set(CORE) <= set(CORE[:CORE.index(name)]), name
        alone = dict(configurator=set(), envs=set(), model=set(), agent_rl=set(), buffer={"envs"})
        assert inside & set(CORE) <= alone.get(name, set(CORE)), f"{name} stands alone"


def test_the_core_stays_small():
    """All of it can be read in an afternoon."""
    assert sum(len(open(os.path.join(ROOT, f"{name}.py")).readlines()) for name in CORE) <= 2800


@pytest.mark.parametrize("file", sorted(glob.glob(os.path.join(ROOT, "config", "*.py"))), ids=os.path.basename)
def test_configs_parse(file):
    """Each config file names existing keys with values that fit together, and an environment that exists."""
    cfg = configure(os.path.join(ROOT, "train.py"), [file], quiet=True)
    check_config(cfg)
    try:
        evaluate.env_factory(cfg)()
    except SystemExit as e:                                               # an environment whose package is optional says so
        assert re.search("requirements-envs.txt|apt-get install", str(e)) and cfg.env.startswith(("BabyAI-", "miniwob/", "FrozenLake", *envs.QUESTIONS))
    assert re.search(rf"python train.py .*{os.path.basename(file)}", open(file).read()), "its docstring says how to run it"


def test_the_critic_corrects_the_policy_wherever_the_run_plays(tiny, tmp_path, monkeypatch):
    """q_weight counts in rollouts and evaluations, and in evaluate.py, which can take it away again."""
    seen, plain = [], evaluate.model_agent
    def watched(vlm, max_new_tokens, temperature, generator, q_weight=0.0, hide=False):
        seen.append(q_weight)
        return plain(vlm, max_new_tokens, temperature, generator, q_weight, hide)
    for module in (train, evaluate):
        monkeypatch.setattr(module, "model_agent", watched)
    out = run(tmp_path / "run", tiny, q_weight=3.0)
    assert len(seen) > 4 and set(seen) == {3.0} and json.load(open(os.path.join(out, "eval.json")))["q_weight"] == 3.0
    for said, is_ in (([], 3.0), (["--q_weight=0"], 0.0)):
        seen.clear()
        evaluate.main([out, *said])
        assert set(seen) == {is_} == {json.load(open(os.path.join(out, "eval.json")))["q_weight"]}


def test_the_expert_plays_a_share_of_the_episodes_alone():
    """expert_episodes: whole episodes are its own, the others are the mixture's, in one environment behind several names, too; without it nothing is drawn."""
    for name in "NumberLine", "NumberLine,EZPoints":
        rng = np.random.default_rng(0)
        played = list(play(lambda: make(name), scripted_agent({"random": 0.5, "malformed": 0.5}, rng, 0.3), list(range(200)), 8, split="train"))
        players = [{row["source"] for row in e["rows"] if reply_text(row) is not None} for e in played]
        assert all(p == {"expert"} or p <= {"random", "malformed"} for p in players) and 0.2 < np.mean([p == {"expert"} for p in players]) < 0.4
    streams = [np.random.default_rng(0) for _ in range(2)]
    for rng, alone in zip(streams, ((), (0.0,))):
        list(play(lambda: make("NumberLine"), scripted_agent({"random": 1.0}, rng, *alone), [1, 2], split="train"))
    assert len({rng.random() for rng in streams}) == 1


def test_who_explores_plays_a_share_of_the_turns_at_random():
    """A player sure of one action never sees what another would bring; off-policy learning may look."""
    always = lambda envs_, rows, images: [dict(reply="[action] +", reply_ids=[1], logprobs=[0.0], source="model") for _ in envs_]
    for share, low, high in ((0.0, 0, 0), (0.3, 0.2, 0.4), (1.0, 1, 1)):
        act = exploring_agent(always, share, np.random.default_rng(0))
        rows = [row for e in play(lambda: make("NumberLine"), act, list(range(60)), 8) for row in e["rows"] if row["source"] != "end"]
        assert low <= np.mean([row["source"] == "random" for row in rows]) <= high
        assert all((row["reply_ids"] == [1]) == (row["source"] == "model") and row["valid"] for row in rows)
        assert share == 0 or {row["action"] for row in rows} == {"+", "-"}
