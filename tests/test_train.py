"""
Test whole runs: data, training, checkpoints, resume, with a model of a few thousand weights on the CPU.

    python -m pytest tests/test_train.py
"""
import ast, copy, json, os, re, shutil, sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import evaluate, model, train
import worlds.cards
from buffer import Buffer
from configurator import configure, parse_block
from extras.flag_mistakes import REMOVED
from evaluate import play
from pretrain import questions
from small_runs import SMALL, all_finite, content, flags, metrics, numbers
from small_runs import one_sentence, read_json, replay, results, run, weights
from small_runs import straight, tiny  # noqa: F401  (fixtures)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRAIN = os.path.join(ROOT, "train.py")


# ---- memory ----

def test_a_dry_run_shows_the_memory_and_leaves_nothing(tiny, tmp_path, capsys):
    """Peak memory by part; micro-batches of one window, or checkpointed layers, take less."""

    def peaks(model, **changes):
        run(tmp_path / "out", model, dry_run=True, **changes)
        printed = capsys.readouterr().out
        lines = re.findall(r"^(\w+) +([0-9.]+) MiB", printed, re.M)
        return {name: float(mib) for name, mib in lines}

    whole = peaks(tiny, micro_batch=4)
    parts = peaks(tiny, micro_batch=1)
    assert list(whole) == ["weights", "adapters", "heads", "optimizer", "update", "rollout", "peak"]
    assert min(whole.values()) >= 0
    assert parts["update"] < 0.6 * whole["update"]
    assert parts["weights"] == whole["weights"] > 0

    # a model of several layers
    base = os.path.join(ROOT, "bases", "tiny-vlm")
    stored = peaks(base)
    recomputed = peaks(base, grad_checkpointing=True)
    assert recomputed["update"] < 0.7 * stored["update"]
    assert not os.path.exists(tmp_path / "out")

def test_checkpointed_layers_give_the_same_run(straight, tiny, tmp_path):
    """grad_checkpointing computes activations twice and changes no bit of what is learned."""
    twin = run(tmp_path / "twin", tiny, grad_checkpointing=True)
    assert metrics(twin) == metrics(straight)
    assert weights(twin) == weights(straight)

@pytest.mark.parametrize(
    "device, dtype, lora_r, half",
    [
        ("cuda", "auto", 2, True),
        ("cuda", "bfloat16", 2, True),
        ("cuda", "float32", 2, False),
        ("cuda", "auto", 0, False),
        ("cpu", "auto", 2, False),
    ],
)
def test_a_frozen_base_is_bfloat16_on_cuda(monkeypatch, device, dtype, lora_r, half):
    """Two bytes a weight are enough for weights that are not trained, unless dtype='float32'."""
    keys = dict(dtype=dtype, lora_r=lora_r)
    cfg = configure(TRAIN, flags(**keys), quiet=True)
    opened = []
    monkeypatch.setattr(model, "choose_device", lambda cfg: device)
    monkeypatch.setattr(model, "load_model", lambda *args: opened.append(args) or (None, None))
    monkeypatch.setattr(model, "check_base", lambda *args, **options: None)
    model.load_base(cfg)
    found = [value for value in opened[0] if isinstance(value, torch.dtype)]
    expected = torch.bfloat16 if half else torch.float32
    assert found == [expected]

def test_a_base_in_bfloat16(tiny):
    """Adapters and critics on it are float32."""
    keys = dict(model=tiny, device="cpu")
    cfg = configure(TRAIN, flags(**keys), quiet=True)
    net, processor = model.load_base(cfg)
    vlm = model.build(cfg, (net.to(torch.bfloat16), processor))
    trained = {p.dtype for p in vlm.parameters() if p.requires_grad}
    frozen = {p.dtype for p in vlm.net.parameters() if not p.requires_grad}
    assert trained == {torch.float32}
    assert frozen == {torch.bfloat16}

def test_a_run_on_a_base_in_bfloat16(tiny, tmp_path, monkeypatch):
    """All numbers are finite, and the checkpoint holds float32. On cuda this is the default."""
    load_base = model.load_base

    def load_half(*args):
        net, processor = load_base(*args)
        return net.to(torch.bfloat16), processor

    monkeypatch.setattr(train, "load_base", load_half)
    out = run(tmp_path / "half", tiny, dtype="bfloat16")
    assert all_finite(metrics(out))
    for name in ("adapter_model.safetensors", "q_head.safetensors"):
        saved = load_file(os.path.join(out, "ckpt", name))
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


# ---- runs and resumes ----

def test_the_run_learns_and_logs(straight, tiny, tmp_path):
    """Both phases are logged, all numbers are finite, and the same command gives the same run."""
    rows = metrics(straight)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["phase"] for row in rows] == ["offline"] * 4 + ["online"] * 4
    assert [row["step"] for row in rows if "rollout/valid" in row] == [5, 7]
    assert all_finite(rows)

    twin = run(tmp_path / "twin", tiny)
    assert metrics(twin) == rows
    assert weights(twin) == weights(straight)
    other = run(tmp_path / "other", tiny, seed=1)
    assert metrics(other) != rows
    assert weights(other) != weights(straight)

    table = results(straight)
    offline = ["offline, greedy", "offline, sampled, T=1"]
    assert list(table) == [*offline, "greedy", "sampled, T=1", "picture hidden, greedy"]
    assert all(summary["episodes"] == 3 for summary in table.values())

@pytest.mark.parametrize("stop", [2, 4, 5, 6])
def test_stop_and_resume_is_bit_identical(straight, tiny, tmp_path, stop):
    """Metrics, weights, optimizer and replay are those of the run that never stopped.

    It stops offline, between the phases, between the updates of a rollout, before a rollout.
    """
    out = run(tmp_path / "run", tiny, stop_at=stop)
    assert len(metrics(out)) == stop
    assert not os.path.exists(os.path.join(out, "eval.json"))
    run(out, tiny, resume=True)
    assert metrics(out) == metrics(straight)
    assert weights(out) == weights(straight)
    assert replay(out) == replay(straight)
    moments = ("optimizer.pt", "state.json")
    ends = [content(os.path.join(folder, "ckpt"), *moments) for folder in (out, straight)]
    assert ends[0] == ends[1]

def test_random_draws_inside_the_network_are_repeated(tiny, tmp_path, monkeypatch):
    """What the network draws in an update, for a dropout that you add, is the same after a resume."""
    draws = []
    compute_loss = train.compute_loss

    def drawing_loss(*args):
        draws.append(torch.rand(()).item())
        return compute_loss(*args)

    monkeypatch.setattr(train, "compute_loss", drawing_loss)
    run(tmp_path / "one", tiny, online_updates=0)
    uninterrupted = list(draws)
    draws.clear()
    run(tmp_path / "two", tiny, online_updates=0, stop_at=2)
    run(tmp_path / "two", tiny, online_updates=0, resume=True)
    assert draws == uninterrupted
    assert len(set(draws)) == len(draws) == 8

def test_a_finished_run_can_be_extended(straight, tiny, tmp_path):
    """More online_updates continue a finished run; its log, its replay and its offline table stay.

    The learning rate rises to the longer cosine. An extended run can be interrupted like any other.
    """
    out = str(tmp_path / "run")
    shutil.copytree(straight, out)
    finished = metrics(out)
    offline = read_json(out, "eval_offline.json")
    run(out, tiny, resume=True, online_updates=7, stop_at=9)
    run(out, tiny, resume=True, online_updates=7)
    rows = metrics(out)
    assert rows[:8] == finished
    assert [row["step"] for row in rows[8:]] == [9, 10, 11]
    assert rows[8]["lr"] > finished[-1]["lr"]
    assert weights(out) != weights(straight)
    table = results(out)
    assert {name: table[name] for name in offline} == offline

    before = content(out)
    one_sentence(lambda: run(out, tiny, resume=True, online_updates=4), "online_updates=4", "7")
    assert content(out) == before

def test_a_run_without_an_online_phase_cannot_be_extended(tiny, tmp_path):
    """Its final table is the offline one, which a resume would never write again."""
    out = run(tmp_path / "run", tiny, online_updates=0, offline_updates=1)
    before = content(out)

    def extend():
        run(out, tiny, resume=True, online_updates=4, offline_updates=1)

    one_sentence(extend, "online_updates=4", "0")
    assert content(out) == before

@pytest.mark.parametrize("stop", [2, 5])
def test_resume_after_a_crash(straight, tiny, tmp_path, stop):
    """A run is killed long after its checkpoint, while writing three files and between two renames.

    What it logged and played after the checkpoint comes again, bit for bit. The folder has also been moved:
    out_dir is no setting of the method.
    """
    early = run(tmp_path / "early", tiny, stop_at=stop)
    out = str(tmp_path / "crashed")
    shutil.copytree(straight, out)
    shutil.rmtree(os.path.join(out, "ckpt"))
    for name in ("ckpt.old", "ckpt.tmp"):
        shutil.copytree(os.path.join(early, "ckpt"), os.path.join(out, name))
    os.remove(os.path.join(out, "ckpt.tmp", "state.json"))
    for name in ("metrics.jsonl", "replay/metadata.jsonl"):
        with open(os.path.join(out, name), "a") as f:
            f.write('{"step": 9, "torn')

    run(out, tiny, resume=True)
    assert metrics(out) == metrics(straight)
    assert weights(out) == weights(straight)
    assert replay(out) == replay(straight)
    assert not os.path.exists(os.path.join(out, "ckpt.tmp"))


# Keys that train.py had until commit 96a09c4, with their defaults: they are in the config.json of old runs.
OLD_KEYS = dict(
    af_coef=1.0,
    awr_temperature=0.3,
    cache_mb=512,
    ckpt_interval=100,
    cql_coef=0.0,
    critic_detach=False,
    eval_quick=60,
    fbc_quantile=0.7,
    gamma_token=1.0,
    invalid="penalty",
    lora_alpha=32,
    lora_dropout=0.0,
    reference={},
    reward_scale=1.0,
    rollout_temperature=1.0,
    timeout=30.0,
    v_support=0.0,
    wandb_project="",
    mdp="token",
    weight_decay=0.0,
    weights="auto",
)

def make_old(out):
    """Rewrite a run's config.json and state.json as an old version of train.py wrote them."""
    saved = read_json(out, "config.json") | OLD_KEYS | dict(model="tiny-vlm")
    # these keys are younger
    for key in ("env_timeout", "rollout_url", "modules_to_save", "compile"):
        del saved[key]
    assert len(saved) == 80
    with open(os.path.join(out, "config.json"), "w") as f:
        json.dump(saved, f)
    # before there were ranks, the number of rows was one number
    state = read_json(out, "ckpt", "state.json")
    state["replay_rows"] = sum(state["replay_rows"])
    with open(os.path.join(out, "ckpt", "state.json"), "w") as f:
        json.dump(state, f)

def test_an_old_run_is_resumed(tmp_path, monkeypatch):
    """Its config.json has 80 keys and model='tiny-vlm', which is bases/tiny-vlm now."""
    assert set(OLD_KEYS) == set(REMOVED)
    monkeypatch.chdir(ROOT)
    short = dict(offline_updates=2, online_updates=2)
    base = "bases/tiny-vlm"
    one = run(tmp_path / "one", base, **short)
    old = run(tmp_path / "old", base, stop_at=3, **short)
    make_old(old)
    run(old, base, resume=True, **short)
    assert metrics(old) == metrics(one)
    assert weights(old) == weights(one)
    assert replay(old) == replay(one)

    # the old name still names the same base
    make_old(old)
    run(old, "tiny-vlm", resume=True, **short)
    assert metrics(old) == metrics(one)

@pytest.mark.parametrize("key, value", [("invalid", "random"), ("cql_coef", 0.5)])
def test_an_old_run_that_cannot_continue_is_refused(straight, tiny, tmp_path, key, value):
    """A removed key that changed what is learned would be ignored in silence."""
    out = str(tmp_path / "run")
    shutil.copytree(straight, out)
    saved = read_json(out, "config.json")
    saved[key] = value
    with open(os.path.join(out, "config.json"), "w") as f:
        json.dump(saved, f)
    before = content(out)
    one_sentence(lambda: run(out, tiny, resume=True, online_updates=7), key, str(value))
    assert content(out) == before

def test_clipped_rewards(straight, tiny, tmp_path):
    """Only the critic sees rewards cut by reward_clip: the recorded data stay, what is learned does not."""
    out = run(tmp_path / "run", tiny, reward_clip=0.05, gamma=0.5)
    recorded = [content(os.path.join(folder, "data"), "metadata.jsonl") for folder in (out, straight)]
    assert recorded[0] == recorded[1]
    # at most 0.05 (1 + 0.5 + 0.25)
    assert all(abs(row["return_observed"]) < 0.1 for row in metrics(out))
    assert any(abs(row["return_observed"]) > 0.1 for row in metrics(straight))
    assert weights(out) != weights(straight)
    assert results(out).keys() == results(straight).keys()

def test_cut_rewards_are_said(straight, tiny, tmp_path, capsys):
    """The critic learns from less than was recorded: nothing is dropped in silence."""
    run(tmp_path / "run", tiny, penalty=-2.5)
    said = "rewards -2.5 to 1: the critic learns from them cut to +-1 (reward_clip)"
    assert said in capsys.readouterr().out
    run(tmp_path / "all", tiny, penalty=-2.5, reward_clip=0)
    assert "cut to" not in capsys.readouterr().out

def test_evaluation_never_perturbs_training(straight, tiny, tmp_path, monkeypatch):
    """An evaluation and a checkpoint after every update change no loss, no rollout and no weight."""
    saved = []
    save_checkpoint = train.save_checkpoint

    def count_saves(cfg, step, *args):
        saved.append(step)
        save_checkpoint(cfg, step, *args)

    monkeypatch.setattr(train, "save_checkpoint", count_saves)
    out = run(tmp_path / "run", tiny, eval_interval=1)
    rows = metrics(out)
    # the last update has the full evaluation
    assert ["eval/success" in row for row in rows] == [True] * 7 + [False]
    assert saved == [1, 2, 3, 4, 5, 6, 7, 8]
    for row, expected in zip(rows, metrics(straight)):
        trained = {key: value for key, value in row.items() if not key.startswith("eval/")}
        assert trained == expected
    assert weights(out) == weights(straight)

@pytest.mark.parametrize("eval_episodes, episodes", [(300, 60), (7, 7)])
def test_short_evaluations_are_short(monkeypatch, eval_episodes, episodes):
    """They play at most 60 of the eval_episodes episodes, with each checkpoint but the last."""
    played = []
    summary = dict.fromkeys(("success", "success_return", "episode_return", "valid", "turns"), 0.5)

    def count_episodes(vlm, make_env, cfg, episodes):
        played.append(episodes)
        return summary

    monkeypatch.setattr(train, "evaluate_policy", count_episodes)
    cfg = SimpleNamespace(
        offline_updates=0,
        online_updates=6,
        eval_interval=2,
        eval_episodes=eval_episodes,
    )
    rows = [train.look(cfg, done, None, None) for done in range(1, 7)]
    assert played == [episodes, episodes]
    assert [row.get("eval/success") for row in rows] == [None, 0.5, None, 0.5, None, None]

def test_all_weights_resume(tiny, tmp_path):
    """lora_r=0: the checkpoint is a model folder, and a resume is as exact."""
    one = run(tmp_path / "one", tiny, lora_r=0)
    two = run(tmp_path / "two", tiny, lora_r=0, stop_at=5)
    run(two, tiny, lora_r=0, resume=True)
    files = ("model.safetensors", "q_head.safetensors")
    checkpoints = [content(os.path.join(out, "ckpt"), *files) for out in (one, two)]
    assert len(checkpoints[0]) == 2
    assert checkpoints[0] == checkpoints[1]
    assert metrics(one) == metrics(two)

    # the folder to share has two bytes a weight
    shared = load_file(os.path.join(one, "model", files[0]))
    saved = load_file(os.path.join(one, "ckpt", files[0]))
    assert set(shared) == set(saved)
    for name, tensor in shared.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, saved[name].half())


# ---- every variant ----

@pytest.mark.parametrize(
    "changes",
    [
        dict(actor_loss="sft"),
        dict(actor_loss="awr"),
        dict(actor_loss="fbc"),
        dict(trace="turn"),
        dict(q_head="full"),
        dict(n_critics=2),
        dict(trace="plain", dtype="bfloat16"),
        dict(actor_loss="awr", q_head="full", trace="turn", lora_r=0),
        dict(offline_updates=0, online_updates=3, explore=0.5),
        dict(env="Reading", offline_updates=3, online_updates=0),
        dict(env="EZPoints"),
        dict(offline_ratio=0.0),
        dict(offline_ratio=1.0),
        dict(won_share=0.5, expert_episodes=0.5, replay_episodes=2),
    ],
    ids=lambda changes: " ".join(f"{key}={value}" for key, value in changes.items()),
)
def test_variants_run(tiny, tmp_path, monkeypatch, changes):
    """Each key that switches the method or the task: finite numbers, and a checkpoint that loads."""
    monkeypatch.setattr(worlds.cards.EZPoints, "max_turns", 3)
    keys = dict(offline_updates=2, online_updates=1, filter_warmup=1) | changes
    out = run(tmp_path / "run", tiny, **keys)
    rows = metrics(out)
    assert len(rows) == 3
    assert all_finite(rows)
    has_critic = changes.get("actor_loss") not in ("sft", "fbc")
    assert ("td_error" in rows[0]) == has_critic
    if len(changes) > 1 or "actor_loss" in changes:
        evaluate.main([out, "--episodes=2"])

@pytest.mark.parametrize(
    "changes",
    [
        dict(beta=5.0),
        dict(bc_coef=0.5),
        dict(critic_coef=1.0),
        dict(pess_coef=0.0),
        dict(q_init=0.0),
        dict(target_tau=0.0),
        dict(gamma=0.5),
        dict(lam=0.0),
        dict(lr=1e-3),
        dict(critic_lr=1e-4),
        dict(min_lr=0.9),
        dict(warmup_updates=3),
        dict(grad_clip=1e-6),
        dict(lora_targets=".*q_proj"),
        dict(penalty=-0.5),
        dict(max_turns=1),
        dict(size=60),
        dict(window=1),
        dict(won_share=1.0),
    ],
    ids=lambda changes: " ".join(changes),
)
def test_each_key_has_an_effect(straight, tiny, tmp_path, changes):
    """A key of the method changes what is learned in the first four updates."""
    out = run(tmp_path / "run", tiny, stop_at=4, **changes)
    assert metrics(out) != metrics(straight)[:4]

def test_the_filter_starts_after_its_warm_up(tiny, tmp_path):
    """The first filter_warmup updates clone every token; then a high beta lets nothing pass."""
    out = run(tmp_path / "run", tiny, beta=5.0, filter_warmup=2, stop_at=4)
    rows = metrics(out)
    assert [row["pass_action"] for row in rows] == [1, 1, 0, 0]
    assert [row["pass_syntax"] for row in rows] == [1, 1, 0, 0]

def assert_same_run(one, two, tolerance):
    """Assert that two runs logged the same numbers up to rounding."""
    for row, other in zip(metrics(one), metrics(two), strict=True):
        assert numbers(row) == pytest.approx(
            numbers(other),
            rel=tolerance,
            abs=tolerance / 10,
        )

def test_micro_batches_do_not_matter(tiny, tmp_path):
    """The same run with other micro-batches has the same first losses up to rounding."""
    one = run(tmp_path / "1", tiny, micro_batch=1, stop_at=2)
    four = run(tmp_path / "4", tiny, micro_batch=4, stop_at=2)
    assert_same_run(one, four, tolerance=1e-3)

def test_a_run_with_cached_features(straight, tiny, tmp_path):
    """The same run up to rounding. A resume, which starts with an empty cache, is the same bit for bit."""
    one = run(tmp_path / "one", tiny, vision_cache_mb=1)
    two = run(tmp_path / "two", tiny, vision_cache_mb=1, stop_at=5)
    run(two, tiny, vision_cache_mb=1, resume=True)
    assert metrics(one) == metrics(two)
    assert weights(one) == weights(two)
    assert_same_run(one, straight, tolerance=1e-2)

def test_a_rank_without_an_episode_of_its_own(tiny, tmp_path, monkeypatch, capsys):
    """A rank whose first rollout is lost, unlike those of the others, learns from recorded episodes.

    The story: it once ended with an IndexError. The rank prints what it does.
    """
    of_others = []

    def losing_play(*args, **options):
        of_others[:] = list(play(*args, **options))
        if options.get("prefix") == "4-":
            return iter([])
        return iter(of_others)

    monkeypatch.setattr(train, "play", losing_play)
    monkeypatch.setattr(train, "gather_episodes", lambda played: of_others)
    out = run(tmp_path / "run", tiny, offline_ratio=0.0)
    rows = metrics(out)
    assert len(rows) == 8
    assert all(row["tokens"] > 0 for row in rows)
    episodes = Buffer(os.path.join(out, "replay")).episodes
    assert {name.partition("-")[0] for name in episodes} == {"6"}
    sentence = "Rank 0 has no episode of its own yet: it learns from recorded ones."
    assert capsys.readouterr().out.count(sentence) == 1

def test_a_run_from_scratch(tmp_path, monkeypatch, capsys):
    """evaluate.py takes the model of such a run from its checkpoint.

    The story: model='scratch' trains its own tokenizer. evaluate.py built another one, without texts, so
    that no such run could be evaluated.
    """
    corpus = questions.corpus
    llava = model.llava
    monkeypatch.setattr(questions, "corpus", lambda n, **options: corpus(100, **options))
    monkeypatch.setattr(model, "llava", lambda texts, **options: llava(texts, **SMALL | options))
    keys = dict(env="Reading", lora_r=0, actor_loss="sft", offline_updates=2, online_updates=0)
    out = run(tmp_path / "run", "scratch", **keys)
    evaluate.main([out, "--episodes=3"])
    assert "sampled" in capsys.readouterr().out

def test_weights_and_biases(tiny, tmp_path, monkeypatch):
    """WANDB_PROJECT logs each row there too; without the package it is one sentence."""
    short = dict(offline_updates=2, online_updates=0)
    logged = []
    started = []
    package = SimpleNamespace(
        init=lambda config, dir: started.append((config["seed"], dir)),
        log=lambda row, step: logged.append((step, copy.deepcopy(row))),
    )
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setitem(sys.modules, "wandb", package)
    out = run(tmp_path / "run", tiny, **short)
    assert started == [(0, out)]
    assert [step for step, _ in logged] == [1, 2]
    with open(os.path.join(out, "metrics.jsonl")) as f:
        assert [row for _, row in logged] == [json.loads(line) for line in f]

    # None makes the import fail
    monkeypatch.setitem(sys.modules, "wandb", None)
    one_sentence(lambda: run(tmp_path / "b", tiny, **short), "WANDB_PROJECT", "pip install wandb")


# ---- a user's mistakes ----

def test_a_run_is_never_lost_by_accident(straight, tiny, tmp_path):
    """A refusal is one sentence, and nothing in the folder has changed."""
    out = str(tmp_path / "run")
    shutil.copytree(straight, out)
    before = content(out)
    recorded = os.path.join(out, "data")

    def refuses(*words, **changes):
        one_sentence(lambda: run(out, tiny, **changes), *words)
        assert content(out) == before

    refuses("already holds a run", "--resume=True", "--overwrite=True")
    refuses("gamma=0.5", "0.9", resume=True, gamma=0.5)
    refuses("offline_updates=5", "4", resume=True, offline_updates=5)
    refuses("overwrite", resume=True, overwrite=True)
    refuses("vision_cache_mb=9", "lora_r=0", overwrite=True, lora_r=0, vision_cache_mb=9)
    refuses("env='NumberLin'", "NumberLine", overwrite=True, env="NumberLin")
    refuses("actor_loss='ppo'", "afsft", overwrite=True, actor_loss="ppo")
    refuses("overwrite", "data=", overwrite=True, data=recorded)
    refuses("datas", "data", overwrite=True, datas="x")

def test_overwrite_deletes_the_run_and_nothing_else(straight, tiny, tmp_path):
    """A file that the program has not written stays."""
    out = str(tmp_path / "run")
    shutil.copytree(straight, out)
    notes = tmp_path / "run" / "notes.txt"
    notes.write_text("mine")
    run(out, tiny, overwrite=True, stop_at=1)
    assert len(metrics(out)) == 1
    assert not os.path.exists(os.path.join(out, "eval.json"))
    assert notes.read_text() == "mine"


NO_EXPERT = '''
from PIL import Image
from envs import Env, Words

class Coin(Env):
    name = "Coin"
    goal = "Say heads."
    kinds = (Words("heads", "tails"),)
    example = "heads"
    split = False

    def start(self):
        pass

    def act(self, action):
        self.success = action == ("heads",)
        return int(self.success), True, False

    def picture(self):
        return Image.new("RGB", (self.size, self.size), "gold")

    def fingerprint(self):
        return ""
'''

def test_an_environment_without_an_expert(tiny, tmp_path):
    """Players that need an expert are refused before anything is written; the others train."""
    file = tmp_path / "coin.py"
    file.write_text(NO_EXPERT)
    out = tmp_path / "run"
    env = f"{file}:Coin"

    def refuses(**changes):
        keys = dict(env=env, online_updates=0) | changes
        one_sentence(lambda: run(out, tiny, **keys), "Coin", "expert()", "data_mix={'random': 1.0}")
        assert not out.exists()

    refuses()
    refuses(data_mix={"biased": 1.0})
    refuses(data_mix={"random": 1.0}, expert_episodes=0.5)
    others = {"random": 0.5, "malformed": 0.5, "expert": 0.0}
    keys = dict(env=env, data_mix=others, online_updates=0, offline_updates=1)
    recorded = os.path.join(run(out, tiny, **keys), "data")
    # recorded episodes need nobody to play them
    run(tmp_path / "two", tiny, env=env, data=recorded, online_updates=0, offline_updates=1)

def test_questions_have_no_online_phase(tiny, tmp_path):
    """Online updates on questions with one right answer are refused before anything is written."""
    out = tmp_path / "run"
    for env in ("Reading", "Captions", "NumberLine,Reading"):
        one_sentence(lambda: run(out, tiny, env=env), f"env={env!r}", "online_updates=0")
        assert not out.exists()

def test_mistakes_are_one_sentence(tiny, tmp_path):
    """Nothing to resume, no such data, no such model, a critic that is not trained."""
    out = tmp_path / "new"
    one_sentence(lambda: run(out, tiny, resume=True), "no checkpoint", str(out))
    nowhere = str(tmp_path / "nowhere")
    one_sentence(lambda: run(out, tiny, data=nowhere), "nowhere", "does not exist")
    one_sentence(lambda: run(out, nowhere), "nowhere")
    keys = dict(actor_loss="sft", q_weight=1.0)
    one_sentence(lambda: run(out, tiny, **keys), "q_weight", "critic")
    assert not os.path.exists(out)

def test_a_gradient_that_is_not_finite(tiny, tmp_path, monkeypatch):
    """The run ends with one sentence, before the weights are spoiled."""
    compute_loss = train.compute_loss

    def infinite_loss(*args):
        loss, info = compute_loss(*args)
        return loss * float("inf"), info

    monkeypatch.setattr(train, "compute_loss", infinite_loss)
    one_sentence(lambda: run(tmp_path / "run", tiny), "up to update 5", "not finite", "a lower lr")


# ---- the keys ----

def read_keys(name, *settings):
    """Return the attributes that a file reads of its settings: cfg.KEY."""
    with open(os.path.join(ROOT, f"{name}.py")) as f:
        tree = ast.parse(f.read())
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        # cfg.KEY or self.cfg.KEY
        owner = getattr(node.value, "id", None) or getattr(node.value, "attr", None)
        if owner in settings:
            found.add(node.attr)
    return found

def test_every_key_is_read_and_every_read_is_a_key():
    """No key is without effect, and none is read that does not exist.

    A rare branch would find that out at the end of a night.
    """
    keys = set(parse_block(TRAIN))
    used = set()
    for name in ("train", "agent_rl", "model", "extras/memory", "extras/prefetch", "extras/run_folder"):
        used |= read_keys(name, "cfg")
    for name in ("evaluate", "extras/report"):
        used |= read_keys(name, "run_cfg")
    # settings of the server are read there, too
    used |= read_keys("extras/serving", "cfg") & keys
    assert used == keys
    assert read_keys("configurator", "cfg") <= keys

    used = set()
    for name in ("evaluate", "extras/read_run", "extras/teachers"):
        used |= read_keys(name, "cfg")
    # settings of the run are read there, too
    assert used - keys <= set(parse_block(evaluate.__file__)) <= used

def test_the_keys_are_few_and_in_groups():
    """At most 63 keys in three groups, each under one heading; a removed key does not come back."""
    block = parse_block(TRAIN)
    assert len(block) <= 63
    headings = [key.heading for key in block.values()]
    groups = list(dict.fromkeys(headings))
    assert groups == ["main settings", "ablations", "machine"]
    # no group is in two places
    assert headings == sorted(headings, key=groups.index)
    assert all(headings.count(group) >= 10 for group in groups)
    assert not set(REMOVED) & set(block)
