"""
The report shows what was played and what the loss sees, and a model's words are never more than text.

    python -m pytest tests/test_report.py     # the page in a real browser: tests/extra_report.py
"""
import json, os, re, shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import envs
import evaluate
from agent_rl import compute_loss
from buffer import Buffer, image_name, make_batch, make_row, reply_text
from evaluate import play, record, scripted_agent
from extras.report import (
    choose_episodes,
    inspect_replies,
    page_data,
    write_gif,
    write_report,
)
from small_runs import one_sentence, read_json, results, run
from small_runs import straight, tiny  # noqa: F401  (fixtures)
from worlds.registry import make

HOSTILE = "</script><script>boom()</script><!-- <img src=x onerror=boom()> \u2028 & @DATA@ @ROWS@ [action] +"

class Page(HTMLParser):
    """What a browser takes for tags and for the text of scripts."""

    def __init__(self, html):
        super().__init__()
        self.html = html
        self.scripts = []
        self.tags = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, text):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += text

    def count_charts(self):
        return self.html.count('<svg class="chart"')

def read_report(folder):
    """Read the report of a folder -> (page, its data)."""
    with open(os.path.join(folder, "report.html"), encoding="utf-8") as f:
        page = Page(f.read())
    return page, json.loads(page.scripts[0])

def turns_of(data):
    """Return the turns of all episodes of a page."""
    return [turn for episode in data["episodes"] for turn in episode["turns"]]

def add_play(buf, name, mix, n, first_seed=0):
    """Append n episodes of scripted players to a buffer; their names begin with the game's."""
    players = scripted_agent(mix, np.random.default_rng(0))
    seeds = list(range(first_seed, first_seed + n))
    episodes = play(
        lambda: make(name),
        players,
        seeds,
        split="train",
        prefix=f"{name}-",
    )
    record(episodes, buf)

def record_play(folder, mix, n=12, name="NumberLine"):
    """Record n episodes of scripted players into a new folder."""
    buf = Buffer(str(folder), create=True)
    add_play(buf, name, mix, n)
    return buf

@pytest.fixture
def own(straight, tmp_path):  # noqa: F811
    """A copy of a trained run, to write into."""
    return shutil.copytree(straight, tmp_path / "run")


# ---- a run ----

def check_turn(turn, row, data):
    """Assert that a turn of the page shows a row of the buffer."""
    assert turn["reply"] == reply_text(row)
    assert turn["action"] == row["action"]
    assert turn["valid"] == row["valid"]
    assert turn["reward"] == row["reward"]
    assert data["texts"][turn["prompt"]] == row["messages"][0]["content"][1]["text"]
    assert all(data["pictures"][number].startswith("data:image/") for number in turn["pics"])
    tokens = turn["tokens"]
    assert [token[0] for token in tokens] == row["reply_ids"]
    # the probabilities with which the tokens were sampled
    sampled = np.exp(row["behaviour_logprobs"])
    assert [token[1] for token in tokens] == pytest.approx(sampled, rel=1e-3)
    for token in tokens:
        alternatives = [alternative[0] for alternative in token[6]]
        assert len(alternatives) == 10
        assert token[0] in alternatives
        assert all(str(alternative) in data["words"] for alternative in alternatives)

def test_the_report_of_a_run(own, monkeypatch, capsys):
    """It shows every episode that was played, and the evaluation is the same as without a report."""
    monkeypatch.setattr(envs.NumberLine, "max_turns", 3)
    evaluate.main([str(own), "--episodes=5", f"--save={own}/saved"])
    before = results(own)
    evaluate.main([str(own), "--episodes=5", "--report"])
    assert results(own) == before
    assert "report.html" in capsys.readouterr().out

    page, data = read_report(own)
    buf = Buffer(str(own / "saved"))
    assert [episode["name"] for episode in data["episodes"]] == list(buf.episodes)
    assert data["critic"]
    for episode in data["episodes"]:
        name = episode["name"]
        rows = [buf.rows[i] for i in buf.episodes[name]]
        assert episode["total"] == pytest.approx(buf.episode_return(name))
        assert episode["reached"] == rows[-1]["success"]
        assert len(episode["turns"]) == len(rows)
        for turn, row in zip(episode["turns"], rows):
            check_turn(turn, row, data)

    for name, summary in before.items():
        low, high = summary["success_95"]
        rate = f"{100 * summary['success']:.1f} <small>[{100 * low:.1f}, {100 * high:.1f}]"
        assert f'<th scope="row">{name}</th>' in page.html
        assert rate in page.html

def test_a_run_has_curves_and_a_gif(own, monkeypatch):
    monkeypatch.setattr(envs.NumberLine, "max_turns", 3)
    evaluate.main([str(own), "--episodes=5", "--report"])
    page, data = read_report(own)
    assert page.count_charts() == 7
    assert "rollout/success_return" in page.html
    assert "shaded: online" in page.html
    assert ElementTree.parse(own / "curves.svg").getroot().tag.endswith("svg")
    with Image.open(own / "NumberLine.gif") as im:
        assert im.n_frames == len(turns_of(data))
        assert im.width >= 240

def test_nothing_is_loaded_from_anywhere(own):
    evaluate.main([str(own / "data"), "--report"])
    page, _ = read_report(own / "data")
    assert "://" not in page.html
    policies = []
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe")
        assert not {"src", "href"} & set(attributes)
        if tag == "meta" and "http-equiv" in attributes:
            policies.append(attributes["content"])
    assert policies[0].startswith("default-src 'none'; img-src data:;")


# ---- what the loss sees ----

CHANGES = [
    {},
    dict(trace="turn"),
    dict(actor_loss="awr"),
    dict(beta=0.01),
]

@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_page_shows_what_the_loss_sees(straight, changes):  # noqa: F811
    """p, Q, V, A and f of the page add up to the sums that compute_loss makes over the same tokens."""
    cfg = evaluate.read_run_config(straight)
    vars(cfg).update(changes)
    vlm, _ = evaluate.load_run(straight, cfg)
    # a critic of four updates has no opinions yet
    torch.manual_seed(0)
    for p in vlm.heads.parameters():
        p.data += 0.2 * torch.randn_like(p)
    buf = Buffer(os.path.join(straight, "data"))
    rows = [i for turns in list(buf.episodes.values())[:5] for i in turns]
    replies = inspect_replies(buf, rows, vlm, cfg, chunk=3)
    batch = make_batch([(buf, [rows])], vlm, envs.MARKER, cfg.gamma)
    with torch.no_grad():
        _, info = compute_loss(vlm, batch, cfg)

    tokens = []
    spans = []
    for row, span in zip(rows, batch["span"].tolist()):
        tokens += replies[row][1]
        spans += span[: len(replies[row][1])]
    p, q, v, adv, f = np.array([token[1:6] for token in tokens]).T
    span = np.array(spans)
    passed = np.minimum(f, 1)
    first_values = [value for value, reply in replies.values() if reply]

    def is_close(number, key):
        return number == pytest.approx(float(info[key]), rel=1e-3, abs=1e-3)

    assert len(tokens) == int(info["tokens"])
    assert is_close(-np.log(p).sum(), "nll")
    assert is_close(q.sum(), "q")
    assert is_close(v.sum(), "v")
    assert is_close((adv * span).sum(), "adv_span")
    assert is_close((passed * span).sum(), "pass_span")
    assert is_close((passed * (1 - span)).sum(), "pass_rest")
    assert is_close(sum(first_values), "predicted")
    # the filter decides between tokens; turn-level advantages may all have one sign
    assert 0 < passed.sum() < len(passed) or changes.get("trace") == "turn"
    # the token among its alternatives
    for token in tokens:
        for number, its_p, its_q in token[6]:
            if number == token[0]:
                assert (its_p, its_q) == pytest.approx((token[1], token[2]), rel=1e-3, abs=1e-3)

def test_calibration_compares_clipped_discounted_returns(own):
    """The observed returns are those that the critic learns: of clipped and discounted rewards."""
    config = read_json(own, "config.json") | dict(reward_clip=0.5, gamma=0.5)
    (own / "config.json").write_text(json.dumps(config))
    evaluate.main([str(own / "data"), "--report"])
    for episode in read_report(own / "data")[1]["episodes"]:
        return_to_go = 0.0
        for turn in reversed(episode["turns"]):
            reward = max(-0.5, min(0.5, turn["reward"]))
            return_to_go = reward + 0.5 * return_to_go
            assert turn["go"] == pytest.approx(return_to_go, abs=1e-3)


# ---- what is text ----

def test_a_hostile_reply_stays_text(tmp_path):
    """Nothing that a model or a folder says can end the script, open a tag, or replace another part."""
    image = Image.new("RGB", (30, 40))
    row = make_row(
        "</script>",
        0,
        "<b>game",
        0,
        dict(image=image, text=HOSTILE),
        HOSTILE,
        source="<i>",
        action="<u>",
        reward=1.0,
        terminated=True,
    )
    buf = Buffer(str(tmp_path / "x"), create=True)
    buf.append([row], {image_name(image): image})
    write_report(buf.folder, buf, {"<s>row": buf.stats() | dict(turns=1.0)})
    page, data = read_report(buf.folder)
    episode = data["episodes"][0]
    turn = episode["turns"][0]
    assert (episode["name"], episode["env"]) == ("</script>", "<b>game")
    assert turn["reply"] == HOSTILE
    assert data["texts"][turn["prompt"]] == HOSTILE
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2
    assert not {"b", "i", "u", "s", "img"} & set(tags)
    assert "\u2028" not in page.html
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(", page.scripts[1])


# ---- folders of episodes ----

def test_a_dataset_with_and_without_a_critic(own, tmp_path):
    """A folder in a run is judged by that run, elsewhere by the run that is named, or by none."""
    files = set(os.listdir(own / "data"))
    evaluate.main([str(own / "data"), "--report"])
    _, judged = read_report(own / "data")
    assert judged["critic"]
    # no picture is added to the data
    assert set(os.listdir(own / "data")) - files == {"report.html"}

    elsewhere = shutil.copytree(own / "data", tmp_path / "elsewhere")
    evaluate.main([str(elsewhere), "--report", "--report_episodes=4"])
    page, data = read_report(elsewhere)
    assert "no trained run behind these episodes" in page.html
    assert "4 of 8 episodes" in page.html
    assert len(data["episodes"]) == 4 and not data["critic"]
    assert all(turn["tokens"] is None and turn["v"] is None for turn in turns_of(data))

    evaluate.main([str(elsewhere), "--report", f"--critic={own}"])
    _, data = read_report(elsewhere)
    assert data["critic"]
    assert data["episodes"] == judged["episodes"]

def test_a_run_without_a_critic(tiny, tmp_path):  # noqa: F811
    """Plain cloning has probabilities and no advantages."""
    out = run(tmp_path / "sft", tiny, actor_loss="sft", online_updates=0, offline_updates=8)
    evaluate.main([os.path.join(out, "data"), "--report"])
    page, data = read_report(os.path.join(out, "data"))
    assert "trained no critic" in page.html
    assert not data["critic"]
    assert page.count_charts() == 0
    for turn in turns_of(data):
        for token in turn["tokens"]:
            assert 0 <= token[1] <= 1
            assert token[2:6] == [None] * 4
    # other players have a report too
    evaluate.main([out, "--report", "--agent=random", "--episodes=2"])
    assert len(read_report(out)[1]["episodes"]) == 2
    assert os.path.exists(os.path.join(out, "NumberLine.gif"))

def test_wrong_flags_of_a_report_are_one_sentence(own, tmp_path):
    data = str(own / "data")
    run_folder = str(own)

    def refuses(*argv, words):
        one_sentence(lambda: evaluate.main(list(argv)), *words)

    refuses(data, words=[data, "--report"])
    refuses(data, "--report", "--agent=expert", words=["nobody plays"])
    refuses(data, "--report", f"--critic={tmp_path}", words=[str(tmp_path), "config.json"])
    refuses(run_folder, "--report", "--critic=out/x", words=["--critic", "its own critic"])
    refuses(run_folder, "--report", "--report_episodes=0", words=["--report_episodes", "at least 1"])


# ---- which episodes ----

def test_which_episodes_are_shown(tmp_path):
    """They come evenly from every game's successes and failures, and together they stand for all of them."""
    buf = record_play(tmp_path / "x", {"expert": 1.0}, 30)
    add_play(buf, "EZPoints", {"expert": 0.8, "random": 0.2}, 20)
    add_play(buf, "Blackjack", {"random": 1.0}, 3)
    for n in (1, 2, 7, 12, 40, 500):
        chosen = choose_episodes(buf, n)
        assert len(chosen) == min(n, 53)
        assert list(chosen) == [name for name in buf.episodes if name in chosen]
        if n >= 7:
            assert sum(chosen.values()) == pytest.approx(53)
            assert {name.split("-")[0] for name in chosen} == {"NumberLine", "EZPoints", "Blackjack"}
    assert set(choose_episodes(buf, 500)) == set(buf.episodes)
    first_row = buf.episodes["Blackjack-0"][0]
    assert set(choose_episodes(buf, 99, first_row)) <= {f"Blackjack-{k}" for k in range(3)}

def test_a_page_never_grows_too_large(tmp_path):
    """Episodes above the limit are left out, and each picture is stored once."""
    buf = record_play(tmp_path / "x", {"random": 1.0}, 40)
    data, points = page_data(buf, choose_episodes(buf, 40), limit=20e3)
    assert 1 < len(data["episodes"]) < 40
    assert len(json.dumps(data)) < 30e3
    assert points == []
    assert len(data["pictures"]) == len(set(data["pictures"]))


# ---- GIFs ----

@pytest.mark.parametrize("name, player", [("NumberLine", "malformed"), ("EZPoints", "expert")])
def test_a_gif_has_a_frame_for_every_row(name, player, tmp_path):
    """It shows each turn, and the last picture of an episode that was cut off; last frames stay longer."""
    buf = record_play(tmp_path / name, {player: 1.0}, 4, name)
    expected = []
    for turns in buf.episodes.values():
        expected += [800] * (len(turns) - 1) + [2000]
    file = str(tmp_path / f"{name}.gif")
    write_gif(buf, list(buf.episodes), file)
    durations = []
    with Image.open(file) as im:
        for k in range(im.n_frames):
            im.seek(k)
            durations.append(im.info["duration"])
    assert durations == expected

def test_a_gif_of_large_pictures_is_scaled_down(tmp_path):
    image = Image.new("RGB", (1280, 720), "red")
    obs = dict(image=image, text="x")
    buf = Buffer(str(tmp_path / "large"), create=True)
    row = make_row("e", 0, "web", 0, obs, "a very long reply " * 20, terminated=True)
    buf.append([row], {image_name(image): image})
    write_gif(buf, ["e"], str(tmp_path / "large.gif"))
    with Image.open(tmp_path / "large.gif") as im:
        assert im.size == (480, 270 + 44)

def test_several_games(tmp_path):
    """A run that played two games has a GIF for each; the game of an episode is that of its rows."""
    buf = record_play(tmp_path / "x", {"expert": 1.0}, 4)
    add_play(buf, "EZPoints", {"random": 1.0}, 3, first_seed=1)
    tags = {"NumberLine": dict(success=1.0, episodes=4)}
    summary = buf.stats() | dict(turns=2.0, by_tag=tags)
    write_report(buf.folder, buf, {"both": summary}, run=buf.folder, n=6)
    page, data = read_report(buf.folder)
    games = {(episode["env"], episode["name"].split("-")[0]) for episode in data["episodes"]}
    assert games == {("NumberLine", "NumberLine"), ("EZPoints", "EZPoints")}
    assert {"NumberLine.gif", "EZPoints.gif", "report.html"} <= set(os.listdir(buf.folder))
    assert "<title>NumberLine, EZPoints" in page.html
    assert '<tr class="tag">' in page.html
