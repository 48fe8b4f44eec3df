"""
Test playing, recording and measuring: agents, held-out starts, intervals, tables, the command line.

    python -m pytest tests/test_evaluate.py
"""
import os, shutil, time

import numpy as np
import pytest
import torch

import envs
import evaluate, train
from buffer import Buffer, reply_text
from evaluate import episode_summary, exploring_agent, held_out_seeds, play, record, scripted_agent, wilson
from small_runs import content, metrics, one_sentence, read_json, results, run
from small_runs import straight, tiny  # noqa: F401  (fixtures)
from worlds.players import scripted_reply
from worlds.registry import make

def make_number_line():
    """Make the simplest environment."""
    return make("NumberLine")

def expert(seed=0):
    """Make the agent that always wins."""
    return scripted_agent({"expert": 1.0}, np.random.default_rng(seed))

def played_rows(episodes):
    """List the rows of episodes that have a reply."""
    rows = []
    for episode in episodes:
        rows += [row for row in episode["rows"] if reply_text(row) is not None]
    return rows


# ---- the command line ----

def test_evaluate_prints_and_saves(straight, tmp_path, capsys, monkeypatch):
    """The table and eval.json are those of the checkpoint that the run ended with."""
    out = str(tmp_path / "run")
    shutil.copytree(straight, out)
    monkeypatch.setattr(envs.NumberLine, "max_turns", 3)
    evaluate.main([out])
    new = read_json(out, "eval.json")
    assert new["results"] == results(straight)
    assert new["checkpoint"].startswith(out)
    printed = capsys.readouterr().out
    for word in ("greedy", "sampled, T=1", "picture hidden", "goal reached", "summed reward > 0", "Wilson"):
        assert word in printed

def test_sampled_episodes_are_saved(straight, tmp_path, monkeypatch):
    """--save records what was sampled; sampling neither reads nor moves the global random stream."""
    out = str(tmp_path / "run")
    shutil.copytree(straight, out)
    monkeypatch.setattr(envs.NumberLine, "max_turns", 3)
    for noise, name in enumerate(("x", "y")):
        torch.manual_seed(noise)
        evaluate.main([out, "--episodes=5", "--q_weight=2", f"--save={tmp_path / name}"])
    assert content(tmp_path / "x") == content(tmp_path / "y")

    buf = Buffer(str(tmp_path / "x"))
    stats = buf.stats()
    assert stats["episodes"] == 5
    assert {row["source"] for row in buf.rows} <= {"model", "end"}
    sampled = results(out)["sampled, T=1"]
    for key in ("success", "episode_return", "valid"):
        assert stats[key] == pytest.approx(sampled[key])
    for row in buf.rows:
        if reply_text(row) is None:
            continue
        assert 0 < len(row["reply_ids"]) <= 3
        assert len(row["behaviour_logprobs"]) == len(row["reply_ids"])
        assert max(row["behaviour_logprobs"]) <= 0

def test_expert_records_a_folder(straight, tmp_path, capsys):
    """Any player's episodes are data to train on; the run's own evaluation stays.

    The same player and seed a second time into the same folder are refused.
    """
    before = content(straight)
    folder = str(tmp_path / "x")
    command = [straight, "--agent=expert", f"--save={folder}"]
    evaluate.main([*command, "--episodes=6"])
    assert "100.0 %" in capsys.readouterr().out
    assert content(straight) == before
    stats = Buffer(folder).stats()
    assert stats["episodes"] == 6
    assert stats["success"] == stats["success_return"] == stats["valid"] == 1.0
    one_sentence(lambda: evaluate.main([*command, "--episodes=6"]), folder, "another")
    evaluate.main([*command, "--episodes=2", "--seed=1"])
    assert len(Buffer(folder).episodes) == 8

@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["Name the run folder"]),
        (["nowhere"], ["nowhere", "config.json"]),
        (["RUN", "--episodes=0"], ["--episodes"]),
        (["RUN", "--agent=nobody"], ["nobody", "expert"]),
        (["RUN", "--episode=3"], ["episodes"]),
    ],
)
def test_wrong_flags_are_one_sentence(straight, flags, words):
    """A mistake names the flag and the remedy."""
    argv = [straight if flag == "RUN" else flag for flag in flags]
    one_sentence(lambda: evaluate.main(argv), *words)

def test_a_correction_needs_a_critic(tiny, tmp_path):
    """--q_weight is refused for a run that trained no critic."""
    out = run(tmp_path / "sft", tiny, actor_loss="sft", offline_updates=1, online_updates=0)
    one_sentence(lambda: evaluate.main([out, "--q_weight=1"]), "q_weight", "critic")

def test_the_critic_corrects_the_policy_wherever_the_run_plays(tiny, tmp_path, monkeypatch):
    """q_weight counts in rollouts and evaluations, and in evaluate.py, which can switch it off."""
    q_weights = []
    model_agent = evaluate.model_agent

    def watched_agent(vlm, max_new_tokens, temperature, generator, q_weight=0.0, hide=False):
        q_weights.append(q_weight)
        return model_agent(vlm, max_new_tokens, temperature, generator, q_weight, hide)

    monkeypatch.setattr(train, "model_agent", watched_agent)
    monkeypatch.setattr(evaluate, "model_agent", watched_agent)
    out = run(tmp_path / "run", tiny, q_weight=3.0)
    assert len(q_weights) > 4
    assert set(q_weights) == {3.0}
    assert read_json(out, "eval.json")["q_weight"] == 3.0
    for flags, expected in (([], 3.0), (["--q_weight=0"], 0.0)):
        q_weights.clear()
        evaluate.main([out, *flags])
        assert set(q_weights) == {expected}
        assert read_json(out, "eval.json")["q_weight"] == expected


# ---- playing and recording ----

def record_mix(mix, make_env, folder):
    """Let a scripted player play 12 episodes and record them -> (episodes, buffer)."""
    act = scripted_agent(mix, np.random.default_rng(0))
    played = list(play(make_env, act, list(range(12)), num_envs=5, split="train"))
    buf = Buffer(str(folder), create=True)
    assert record(iter(played), buf, chunk=5) == 12
    return played, buf

def assert_summaries_agree(played, buf, wins):
    """Assert that what was played, recorded and summed up is the same."""
    summary = episode_summary(played)
    stats = Buffer(buf.folder).stats()
    assert summary["success"] == stats["success"] == summary["valid"] == wins
    assert summary["episodes"] == stats["episodes"] == 12
    assert summary["episode_return"] == pytest.approx(stats["episode_return"])
    assert summary["turns"] * 12 == pytest.approx(stats["turns"])
    for row_numbers in buf.episodes.values():
        rows = [buf.rows[i] for i in row_numbers]
        assert [row["turn"] for row in rows] == list(range(len(rows)))
        assert len({row["seed"] for row in rows}) == 1

@pytest.mark.parametrize("name", ["NumberLine", "EZPoints"])
def test_the_expert_always_wins(name, tmp_path):
    """Its episodes end with a terminated turn, and every row has a reply."""
    played, buf = record_mix({"expert": 1.0}, lambda: make(name), tmp_path)
    assert_summaries_agree(played, buf, wins=1.0)
    for row_numbers in buf.episodes.values():
        rows = [buf.rows[i] for i in row_numbers]
        assert [row["terminated"] for row in rows] == [False] * (len(rows) - 1) + [True]
        assert all(reply_text(row) is not None for row in rows)

@pytest.mark.parametrize("name", ["NumberLine", "EZPoints"])
def test_malformed_play_is_truncated(name, tmp_path):
    """An episode without a valid action ends at the limit, and its last observation is stored."""
    played, buf = record_mix({"malformed": 1.0}, lambda: make(name), tmp_path)
    assert_summaries_agree(played, buf, wins=0.0)
    limit = make(name).max_turns
    for row_numbers in buf.episodes.values():
        rows = [buf.rows[i] for i in row_numbers]
        assert len(rows) == limit + 1
        assert not any(row["terminated"] for row in rows)
        assert [row["truncated"] for row in rows] == [False] * (limit - 1) + [True, False]
        assert [reply_text(row) is None for row in rows] == [False] * limit + [True]
        # nothing has moved
        assert len({str(row["images_file_names"]) for row in rows}) == 1

@pytest.mark.parametrize("name", ["NumberLine", "NumberLine,EZPoints"])
def test_the_expert_plays_a_share_of_the_episodes(name):
    """Whole episodes are the expert's, the others the mixture's; several tasks behave like one."""
    act = scripted_agent({"random": 0.5, "malformed": 0.5}, np.random.default_rng(0), 0.3)
    episodes = list(play(lambda: make(name), act, list(range(200)), 8, split="train"))
    by_expert = 0
    for episode in episodes:
        players = {row["source"] for row in played_rows([episode])}
        if players == {"expert"}:
            by_expert += 1
        else:
            assert players <= {"random", "malformed"}
    assert 0.2 < by_expert / len(episodes) < 0.4

def test_without_an_expert_nothing_more_is_drawn():
    """A share of 0 leaves the random stream as it is without a share: old recordings stay the same."""
    ends = []
    for share in ((), (0.0,)):
        rng = np.random.default_rng(0)
        act = scripted_agent({"random": 1.0}, rng, *share)
        list(play(make_number_line, act, [1, 2], split="train"))
        ends.append(rng.random())
    assert ends[0] == ends[1]

@pytest.mark.parametrize("share, low, high", [(0.0, 0.0, 0.0), (0.3, 0.2, 0.4), (1.0, 1.0, 1.0)])
def test_an_exploring_agent_plays_a_share_of_the_turns_at_random(share, low, high):
    """A policy that is sure of one action never sees the result of another; off-policy data may explore."""

    def always_plus(envs_, rows, images):
        answer = dict(reply="[action] +", reply_ids=[1], logprobs=[0.0], source="model")
        return [dict(answer) for _ in envs_]

    act = exploring_agent(always_plus, share, np.random.default_rng(0))
    rows = played_rows(play(make_number_line, act, list(range(60)), 8))
    explored = [row["source"] == "random" for row in rows]
    assert low <= np.mean(explored) <= high
    for row in rows:
        assert row["valid"]
        assert (row["reply_ids"] == [1]) == (row["source"] == "model")
    if share:
        assert {row["action"] for row in rows} == {"+", "-"}

def test_what_an_exploring_agent_draws():
    """One number for each turn, and one random reply where it explores: recorded runs stay the same."""
    games = [envs.NumberLine() for _ in range(20)]
    of_agent = np.random.default_rng(0)
    agent = exploring_agent(lambda envs_, rows, images: [{"reply": "mine"}] * 20, 0.5, of_agent)
    answers = [answer["reply"] for answer in agent(games, [], [])]
    rng = np.random.default_rng(0)
    expected = []
    for env in games:
        is_random = rng.random() < 0.5
        expected.append(scripted_reply("random", env, rng) if is_random else "mine")
    assert answers == expected
    assert of_agent.random() == rng.random()

class Flaky(envs.NumberLine):
    """Episodes are lost in their first turn: with seeds below 100 always, below 200 the first time."""

    broken = set()
    acting = 0
    most_acting = 0

    def reset(self, seed=None, options=None):
        self.seed = seed
        return super().reset(seed, options)

    def act(self, action):
        kind = type(self)
        kind.acting += 1
        kind.most_acting = max(kind.most_acting, kind.acting)
        time.sleep(0.002)
        kind.acting -= 1
        is_lost = self.seed < 100
        if self.seed < 200 and self.seed not in self.broken:
            is_lost = True
        if is_lost:
            self.lost = "broken on purpose"
            self.broken.add(self.seed)
        return super().act(action)

@pytest.fixture
def flaky(monkeypatch):
    """The class Flaky, without a memory of earlier tests."""
    monkeypatch.setattr(Flaky, "broken", set())
    monkeypatch.setattr(Flaky, "most_acting", 0)
    return Flaky

def test_lost_episodes_are_played_again_then_dropped(flaky, capsys):
    """Dropped episodes are counted and printed; without any episode left it is one sentence."""
    played = list(play(flaky, expert(), [300, 7, 150, 301], num_envs=2))
    assert sorted(episode["rows"][0]["seed"] for episode in played) == [150, 300, 301]
    assert all(episode["success"] for episode in played)
    printed = capsys.readouterr().out
    assert "seed 7: dropped, broken on purpose; 1 of 4 episodes" in printed
    assert printed.count("dropped") == 1

    nothing = list(play(flaky, expert(), [1]))
    one_sentence(lambda: episode_summary(nothing), "No episode")

def test_threads_step_slow_environments(flaky, monkeypatch):
    """`max_parallel` bounds how many are alive and steps them at once; what is played is the same."""

    def outcome(max_parallel):
        monkeypatch.setattr(flaky, "max_parallel", max_parallel)
        found = {}
        for episode in play(flaky, expert(), list(range(300, 330)), num_envs=8):
            rows = episode["rows"]
            name = rows[0]["episode"]
            found[name] = [
                (row["seed"], row["action"], row["reward"], row["images_file_names"]) for row in rows
            ]
        return found

    one_by_one = outcome(None)
    assert flaky.most_acting == 1
    assert outcome(3) == one_by_one
    assert 1 < flaky.most_acting <= 3


# ---- intervals and held-out starts ----

@pytest.mark.parametrize(
    "k, n, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_wilson(k, n, low, high):
    """Against published values (Newcombe 1998, table I) and the closed forms at 0 and n."""
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-4)

def test_wilson_stays_between_0_and_1():
    """The ends are exact, without a rounding error beyond them."""
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1

def test_all_starts_of_number_line_are_evaluated():
    """There are 30, too few to hold any out: each comes once before any comes twice."""
    env = make_number_line()
    seeds = held_out_seeds(env, 30)
    starts = set()
    for seed in seeds:
        env.reset(seed=seed, options={"split": "test"})
        starts.add(env.fingerprint())
    assert len(starts) == 30
    more = held_out_seeds(env, 65)
    assert more[:30] == more[30:60] == seeds

@pytest.mark.parametrize("name", ["EZPoints", "Points24", "Blackjack"])
def test_held_out_starts_are_different_and_never_trained_on(name):
    """What `play` deals from held-out seeds is 20 different starts; none of 400 training starts is one."""
    env = make(name)
    word = "stand" if name == "Blackjack" else "="
    tested = []

    def note_starts(envs_, rows, images):
        for played, row in zip(envs_, rows):
            if row["turn"] == 0:
                tested.append(played.fingerprint())
        return [dict(reply=f"[action] {word}", source="x") for _ in rows]

    episodes = list(play(lambda: make(name), note_starts, held_out_seeds(env, 20)))
    assert len(episodes) == len(tested) == len(set(tested)) == 20
    for seed in range(400):
        env.reset(seed=seed, options={"split": "train"})
        assert env.fingerprint() not in tested

def test_held_out_starts_are_drawn_once_per_run(monkeypatch):
    """The story: each evaluation had drawn them again, which takes seconds where a start is a web page."""
    drawn = []
    draw = evaluate.held_out_seeds

    def counting_draw(env, n):
        drawn.append(n)
        return draw(env, n)

    def make_ez_points():
        return make("EZPoints")

    def make_other():
        return make("NumberLine")

    monkeypatch.setattr(evaluate, "held_out_seeds", counting_draw)
    nine = draw(make("EZPoints"), 9)
    assert evaluate.held_out_starts(make_ez_points, 9) == nine
    assert evaluate.held_out_starts(make_ez_points, 9) == nine
    assert drawn == [9]
    assert evaluate.held_out_starts(make_other, 9) == draw(make("NumberLine"), 9)
    assert evaluate.held_out_starts(make_ez_points, 4) == nine[:4]
    assert drawn == [9, 9, 4]


# ---- several tasks ----

@pytest.fixture(scope="module")
def two_tasks(tiny, tmp_path_factory):
    """A run that plays NumberLine and EZPoints in turn."""
    out = tmp_path_factory.mktemp("tasks") / "run"
    return run(out, tiny, env="NumberLine,EZPoints", eval_episodes=5)

def test_several_tasks_are_recorded_in_turn(two_tasks):
    """Recorded data and replay have every second episode of each, and statistics of each."""
    for folder in ("data", "replay"):
        buf = Buffer(os.path.join(two_tasks, folder))
        assert len(buf.episodes) == 8
        for name, row_numbers in buf.episodes.items():
            number = int(name.rpartition("-")[2])
            env = ("NumberLine", "EZPoints")[number % 2]
            assert buf.rows[row_numbers[0]]["env"] == env
        stats = buf.stats()
        by_env = stats["by_env"]
        assert {env: of_env["episodes"] for env, of_env in by_env.items()} == dict(NumberLine=4, EZPoints=4)
        assert sum(of_env["turns"] for of_env in by_env.values()) == stats["turns"]

def test_several_tasks_are_evaluated_in_turn(two_tasks, capsys):
    """Each row of the table has a line per task, and rollouts log each task's success."""
    table = results(two_tasks)
    for summary in table.values():
        assert summary["episodes"] == 5
        counts = {env: of_env["episodes"] for env, of_env in summary["by_env"].items()}
        assert counts == dict(NumberLine=3, EZPoints=2)
    assert {"rollout/EZPoints/success", "rollout/NumberLine/success"} <= set(metrics(two_tasks)[4])
    printed = evaluate.format_table(table)
    assert printed.count("\n  EZPoints ") == printed.count("\n  NumberLine ") == 5
    evaluate.main([two_tasks, "--agent=expert", "--episodes=7"])
    assert "NumberLine,EZPoints" in capsys.readouterr().out

def test_the_table_of_several_tasks_is_printed(tiny, tmp_path, capsys):
    """train.py prints the recorded data and all five evaluations, each with its tasks."""
    keys = dict(offline_updates=1, online_updates=1, eval_episodes=2)
    run(tmp_path / "run", tiny, env="NumberLine,EZPoints", **keys)
    assert capsys.readouterr().out.count("\n  EZPoints ") == 6

def test_recorded_play_counts_turns_per_episode_of_each_task(two_tasks):
    """The story: the report had shown each task's total of turns beside the turns per episode of all."""
    stats = Buffer(os.path.join(two_tasks, "data")).stats()
    row = evaluate.recorded_summary(stats)
    assert row["turns"] == stats["turns"] / stats["episodes"]
    for name, of_env in row["by_env"].items():
        counts = stats["by_env"][name]
        assert of_env["turns"] == counts["turns"] / counts["episodes"] <= 10
        low, high = of_env["success_95"]
        assert low <= of_env["success"] <= high

def test_several_tasks_hold_out_their_own_starts():
    """Each task has the starts that it has alone; a task named twice has twice as many."""
    seeds = held_out_seeds(make("NumberLine,EZPoints"), 9)
    assert seeds[::2] == held_out_seeds(make("NumberLine"), 5)
    assert seeds[1::2] == held_out_seeds(make("EZPoints"), 4)
    seeds = held_out_seeds(make("EZPoints,NumberLine,EZPoints"), 9)
    assert len({*seeds[::3], *seeds[2::3]}) == 6
