"""
The report: what stands on the page is what was played and what the loss sees, and nothing that a model says is more than text.
    python -m pytest tests/test_report.py           # the page in a real browser: tests/extra_report.py
"""
import json, os, re, shutil, sys
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree
import numpy as np
import pytest
import torch
from PIL import Image
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import envs, evaluate
from agent_rl import compute_loss
from worlds.registry import make
from buffer import Buffer, make_batch, image_name, make_row, reply_text
from evaluate import play, record, scripted_agent
from extras.report import choose, gif, inspect, page_data, write_report
from test_train import one_sentence, run, straight, tiny  # noqa: F401  (fixtures)

HOSTILE = "</script><script>boom()</script><!-- <img src=x onerror=boom()> \u2028 & @DATA@ @ROWS@ [action] +"


class Scripts(HTMLParser):
    """What a browser takes for tags and for the text of scripts."""
    def __init__(self, page):
        super().__init__()
        self.scripts, self.tags = [], []
        self.feed(page)
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
    def handle_data(self, text):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += text


def opened(folder):
    """(the page, its data)"""
    with open(os.path.join(folder, "report.html"), encoding="utf-8") as f:
        page = f.read()
    return page, json.loads(Scripts(page).scripts[0])


def recorded_summary(folder, mix, n=12, name="NumberLine"):
    buf = Buffer(str(folder), create=True)
    record(play(lambda: make(name), scripted_agent(mix, np.random.default_rng(0)), list(range(n)), split="train", prefix=f"{name}-"), buf)
    return buf


@pytest.fixture
def own(straight, tmp_path):
    """A copy of a trained run, to write into."""
    return shutil.copytree(straight, tmp_path / "run")


def test_a_run(own, monkeypatch, capsys):
    """Every episode that was played, its texts, its numbers; curves and GIF beside the page; and the same evaluation as without a report."""
    monkeypatch.setattr(envs.NumberLine, "max_turns", 3)
    evaluate.main([str(own), "--episodes=5", f"--save={own}/saved"])
    before = json.load(open(own / "eval.json"))["results"]
    evaluate.main([str(own), "--episodes=5", "--report"])
    assert json.load(open(own / "eval.json"))["results"] == before and "report.html" in capsys.readouterr().out
    page, data = opened(own)
    buf = Buffer(str(own / "saved"))
    assert [e["name"] for e in data["episodes"]] == list(buf.episodes) and data["critic"]
    for e in data["episodes"]:
        rows = [buf.rows[i] for i in buf.episodes[e["name"]]]
        assert [t["reply"] for t in e["turns"]] == [reply_text(r) for r in rows] and e["total"] == buf.episode_return(e["name"]) and e["reached"] == rows[-1]["success"]
        for t, row in zip(e["turns"], rows):
            assert [x[0] for x in t["tokens"]] == row["reply_ids"] and (t["action"], t["valid"], t["reward"]) == (row["action"], row["valid"], row["reward"])
            assert data["texts"][t["prompt"]] == row["messages"][0]["content"][1]["text"] and all(data["pictures"][p].startswith("data:image/") for p in t["pics"])
            assert [x[1] for x in t["tokens"]] == pytest.approx(np.exp(row["behaviour_logprobs"]), rel=1e-3)      # as it was sampled
            assert all(len(x[6]) == 10 and x[0] in [o[0] for o in x[6]] and str(o[0]) in data["words"] for x in t["tokens"] for o in x[6])
    for name, s in before.items():
        assert f'<th scope="row">{name}</th>' in page and f"{100 * s['success']:.1f} <small>[{100 * s['success_95'][0]:.1f}, {100 * s['success_95'][1]:.1f}]" in page
    assert page.count('<svg class="chart"') == 7 and "rollout/success_return" in page and "shaded: online" in page
    assert ElementTree.parse(own / "curves.svg").getroot().tag.endswith("svg")
    with Image.open(own / "NumberLine.gif") as im:
        assert im.n_frames == sum(map(len, buf.episodes.values())) and im.width >= 240


def test_nothing_is_loaded_from_anywhere(own):
    evaluate.main([str(own / "data"), "--report"])
    page, _ = opened(own / "data")
    assert "://" not in page and not [t for t, a in Scripts(page).tags if t in ("link", "img", "iframe") or "src" in a or "href" in a]
    assert [a["content"] for t, a in Scripts(page).tags if t == "meta" and "http-equiv" in a][0].startswith("default-src 'none'; img-src data:;")


@pytest.mark.parametrize("changes", [{}, dict(mdp="turn"), dict(v_support=0.5), dict(actor_loss="awr"), dict(beta=0.01)], ids=str)
def test_the_page_shows_what_the_loss_sees(straight, changes):
    """p, Q, V, A and f of the page add up to compute_loss's own sums over the same tokens."""
    cfg = SimpleNamespace(**{**json.load(open(os.path.join(straight, "config.json"))), **changes})
    vlm, _ = evaluate.load_run(straight, cfg)
    torch.manual_seed(0)
    for p in vlm.heads.parameters():                                        # a critic of four updates has no opinions yet
        p.data += 0.2 * torch.randn_like(p)
    buf = Buffer(os.path.join(straight, "data"))
    rows = [i for turns in list(buf.episodes.values())[:5] for i in turns]
    seen = inspect(buf, rows, vlm, cfg, chunk=3)
    b = make_batch([(buf, [rows])], vlm, envs.MARKER, cfg.gamma)
    with torch.no_grad():
        info = {k: float(x) for k, x in compute_loss(vlm, b, cfg)[1].items()}
    tokens = [(t, float(s)) for row, span in zip(rows, b["span"]) for t, s in zip(seen[row][1], span)]
    close = lambda x: pytest.approx(x, rel=1e-3, abs=1e-3)
    assert len(tokens) == info["tokens"] and -sum(np.log(t[1]) for t, _ in tokens) == close(info["nll"])
    assert sum(t[2] for t, _ in tokens) == close(info["q"]) and sum(t[3] for t, _ in tokens) == close(info["v"]) and sum(t[4] * s for t, s in tokens) == close(info["adv_span"])
    f = [(min(t[5], 1), s) for t, s in tokens]
    assert sum(x * s for x, s in f) == close(info["pass_span"]) and sum(x * (1 - s) for x, s in f) == close(info["pass_rest"]) and (0 < sum(x for x, _ in f) < len(f) or "mdp" in changes)
    assert sum(v for v, t in seen.values() if t) == close(info["predicted"])
    assert all(o[2] == close(t[2]) and o[1] == close(t[1]) for t, _ in tokens for o in t[6] if o[0] == t[0])      # the token among its alternatives


def test_calibration_compares_shaped_discounted_returns(own):
    """What was observed is what the critic was taught: clipped, scaled and discounted rewards."""
    config = json.load(open(own / "config.json")) | dict(reward_clip=0.5, reward_scale=3.0, gamma=0.5)
    json.dump(config, open(own / "config.json", "w"))
    evaluate.main([str(own / "data"), "--report"])
    for e in opened(own / "data")[1]["episodes"]:
        rewards = [3 * max(-0.5, min(0.5, t["reward"])) for t in e["turns"]]
        assert [t["go"] for t in e["turns"]] == [pytest.approx(sum(0.5 ** j * r for j, r in enumerate(rewards[k:])), abs=1e-3) for k in range(len(rewards))]


def test_a_hostile_reply_stays_text(tmp_path):
    """Nothing that a model, a page or a folder says can end the script, open a tag, or take another part's place."""
    obs = dict(image=Image.new("RGB", (30, 40)), text=HOSTILE)
    buf = Buffer(str(tmp_path / "x"), create=True)
    buf.append([make_row("</script>", 0, "<b>game", 0, obs, HOSTILE, source="<i>", action="<u>", reward=1.0, terminated=True)], {image_name(obs["image"]): obs["image"]})
    write_report(buf.folder, buf, {"<s>row": buf.stats() | dict(turns=1.0)})
    page, data = opened(buf.folder)
    e = data["episodes"][0]
    assert (e["name"], e["env"], e["turns"][0]["reply"], data["texts"][e["turns"][0]["prompt"]]) == ("</script>", "<b>game", HOSTILE, HOSTILE)
    tags = [t for t, _ in Scripts(page).tags]
    assert tags.count("script") == 2 and not {"b", "i", "u", "s", "img"} & set(tags) and "\u2028" not in page
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(", Scripts(page).scripts[1])


def test_a_dataset_with_and_without_a_critic(own, tmp_path):
    """Inside a run's folder that run's critic judges it, elsewhere the one that is named; with none the page says so. No picture is added to the data."""
    there = set(os.listdir(own / "data"))
    evaluate.main([str(own / "data"), "--report"])
    assert opened(own / "data")[1]["critic"] and set(os.listdir(own / "data")) - there == {"report.html"}
    away = shutil.copytree(own / "data", tmp_path / "away")
    evaluate.main([str(away), "--report", "--report_episodes=4"])
    page, data = opened(away)
    assert "no trained run behind these episodes" in page and "4 of 8 episodes" in page and len(data["episodes"]) == 4 and not data["critic"]
    assert all(t["tokens"] is None and t["v"] is None for e in data["episodes"] for t in e["turns"])
    evaluate.main([str(away), "--report", f"--critic={own}"])
    assert opened(away)[1]["critic"] and opened(away)[1]["episodes"] == opened(own / "data")[1]["episodes"]


def test_a_run_without_a_critic(tiny, tmp_path):
    """Cloning alone: probabilities stand there, advantages do not."""
    out = run(tmp_path / "sft", tiny, actor_loss="sft", online_updates=0, offline_updates=8)
    evaluate.main([os.path.join(out, "data"), "--report"])
    page, data = opened(os.path.join(out, "data"))
    tokens = [t for e in data["episodes"] for x in e["turns"] for t in x["tokens"]]
    assert "trained no critic" in page and not data["critic"] and all(0 <= t[1] <= 1 and t[2:6] == [None] * 4 for t in tokens) and '<svg class="chart"' not in page
    evaluate.main([out, "--report", "--agent=random", "--episodes=2"])      # any player can be looked at
    assert len(opened(out)[1]["episodes"]) == 2 and os.path.exists(os.path.join(out, "NumberLine.gif"))


def test_mistakes_are_one_sentence(own, tmp_path):
    data = str(own / "data")
    one_sentence(lambda: evaluate.main([data]), data, "--report")
    one_sentence(lambda: evaluate.main([data, "--report", "--agent=expert"]), "nobody plays")
    one_sentence(lambda: evaluate.main([data, "--report", f"--critic={tmp_path}"]), str(tmp_path), "config.json")
    one_sentence(lambda: evaluate.main([str(own), "--report", "--critic=out/x"]), "--critic", "its own critic")
    one_sentence(lambda: evaluate.main([str(own), "--report", "--report_episodes=0"]), "--report_episodes", "at least 1")


def test_which_episodes_are_shown(tmp_path):
    """Evenly from every game's reached and missed ones, never more than asked for, and together they stand for all of them."""
    buf = recorded_summary(tmp_path / "x", {"expert": 1.0}, 30)
    for name, mix, n in (("EZPoints", {"expert": 0.8, "random": 0.2}, 20), ("Blackjack", {"random": 1.0}, 3)):
        record(play(lambda: make(name), scripted_agent(mix, np.random.default_rng(0)), list(range(n)), split="train", prefix=f"{name}-"), buf)
    for n in (1, 2, 7, 12, 40, 500):
        chosen = choose(buf, n)
        assert len(chosen) == min(n, 53) and [e for e in buf.episodes if e in chosen] == list(chosen)
        if n >= 7:
            assert sum(chosen.values()) == pytest.approx(53) and {e.split("-")[0] for e in chosen} == {"NumberLine", "EZPoints", "Blackjack"}
    assert set(choose(buf, 500)) == set(buf.episodes) and set(choose(buf, 99, start=buf.episodes["Blackjack-0"][0])) <= {f"Blackjack-{k}" for k in range(3)}


def test_a_page_never_grows_too_large(tmp_path):
    """Above its limit episodes are left out, and it says so."""
    buf = recorded_summary(tmp_path / "x", {"random": 1.0}, 40)
    data, points = page_data(buf, choose(buf, 40), limit=20e3)
    assert 1 < len(data["episodes"]) < 40 and len(json.dumps(data)) < 30e3 and points == []
    assert len(data["pictures"]) == len(set(data["pictures"]))              # each picture once


def test_gif_has_a_frame_for_every_row(tmp_path):
    """Each turn, and the last picture of an episode that was cut off; the last frame of an episode stays longer; pictures of all sizes."""
    for name, mix in (("NumberLine", {"malformed": 1.0}), ("EZPoints", {"expert": 1.0})):
        buf = recorded_summary(tmp_path / name, mix, 4, name)
        gif(buf, list(buf.episodes), str(tmp_path / f"{name}.gif"))
        with Image.open(tmp_path / f"{name}.gif") as im:
            times = [im.seek(k) or im.info["duration"] for k in range(im.n_frames)]
        assert times == [t for turns in buf.episodes.values() for t in [800] * (len(turns) - 1) + [2000]]
    buf = Buffer(str(tmp_path / "large"), create=True)
    obs = dict(image=Image.new("RGB", (1280, 720), "red"), text="x")
    buf.append([make_row("e", 0, "web", 0, obs, "a very long reply " * 20, valid=False)], {image_name(obs["image"]): obs["image"]})
    gif(buf, ["e"], str(tmp_path / "large.gif"))
    assert Image.open(tmp_path / "large.gif").size == (480, 270 + 44)


def test_several_games(tmp_path):
    """A run that played two games: a GIF each, an episode's game is its row's."""
    buf = recorded_summary(tmp_path / "x", {"expert": 1.0}, 4)
    record(play(lambda: make("EZPoints"), scripted_agent({"random": 1.0}, np.random.default_rng(0)), [1, 2, 3], prefix="ez-"), buf)
    write_report(buf.folder, buf, {"both": buf.stats() | dict(turns=2.0, by_tag={"NumberLine": dict(success=1.0, episodes=4)})}, run=buf.folder, n=6)
    page, data = opened(buf.folder)
    assert {(e["env"], e["name"].split("-")[0]) for e in data["episodes"]} == {("NumberLine", "NumberLine"), ("EZPoints", "ez")}
    assert {"NumberLine.gif", "EZPoints.gif", "report.html"} <= set(os.listdir(buf.folder)) and "<title>NumberLine, EZPoints" in page and '<tr class="tag">' in page
