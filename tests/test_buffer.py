"""
Episodes on disk: what is written is what is read, a crash costs at most its own line, and a bad folder is one sentence.
    python -m pytest tests/test_buffer.py
"""
import json, os, sys
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from PIL import Image
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import buffer as module
import model
from pretrain import tiny_nets as scratch
from buffer import KEYS, VERSION, Buffer, make_batch, image_name, make_row, reply_text

MARKER = "[action]"


def picture(n): return Image.new("RGB", (8, 8), (n % 256, 7, n // 256))


def episode(name, turns, cut=False, replies=None, **last):
    """Rows and pictures of `turns` played turns; cut=True: a time limit, hence a row with the last observation."""
    rows, images, end = [], {}, dict(terminated=not cut, truncated=cut) | last
    for k in range(turns + cut):
        obs = dict(image=picture(sum(map(ord, name)) + k), text=f"{name} turn {k}")
        images[image_name(obs["image"])] = obs["image"]
        if k == turns:
            rows.append(make_row(name, k, "Toy", 5, obs, source="end", success=end.get("success", False)))
            continue
        reply = replies[k] if replies else f"so {k} {MARKER} go"
        rows.append(make_row(name, k, "Toy", 5, obs, reply=reply, source="script", action="go", reward=[-1.0, 0.25, 2.0, 0.5][k % 4], **(end if k == turns - 1 else {})))
    return rows, images


def filled(folder, *episodes):
    buf = Buffer(str(folder), create=True)
    for e in episodes or [episode("a", 4), episode("b", 3, cut=True), episode("c", 1), episode("d", 6)]:
        buf.append(*e)
    return buf


def raw(buf):
    with open(buf.file, "rb") as f:
        return f.read()


def test_round_trip(tmp_path):
    """Rows and pictures come back as they went in, from the same object and from a new one."""
    rows, images = episode("a", 2, cut=True, replies=["\u00e9\u4e16 \u2028 \"[action] go\"\n", ""])
    rows[0] |= dict(reply_ids=[3, 1, 2], behaviour_logprobs=[-0.123457, -2.0, 0.0])
    buf = filled(tmp_path, (rows, images))
    for b in (buf, Buffer(str(tmp_path))):
        assert b.rows == rows and b.episodes == {"a": [0, 1, 2]} and b.dropped == 0 and len(b) == 3
        assert [reply_text(r) for r in b.rows] == ["\u00e9\u4e16 \u2028 \"[action] go\"\n", "", None]
        for row in rows:
            name = row["images_file_names"][0]
            assert b.image(name).tobytes() == images[name].tobytes() and image_name(b.image(name)) == name


def test_append_only(tmp_path):
    """Whatever is appended, the bytes that were there before stay."""
    buf, before = Buffer(str(tmp_path), create=True), b""
    for n in range(4):
        buf = Buffer(str(tmp_path), create=True) if n == 2 else buf
        buf.append(*episode(f"e{n}", n + 1))
        assert raw(buf).startswith(before) and len(raw(buf)) > len(before)
        before = raw(buf)


def test_pictures_are_on_disk_before_their_rows(tmp_path, monkeypatch):
    """A crash at any system call leaves no row without its picture, and no half a picture under its name."""
    calls = []
    def crash_at(n):
        def wrap(name, real):
            def call(*args, **kw):
                calls.append(name)
                if len(calls) == n:
                    raise KeyboardInterrupt
                return real(*args, **kw)
            return call
        monkeypatch.setattr(module.os, "replace", wrap("replace", os.replace))
        monkeypatch.setattr(module.os, "fsync", wrap("fsync", os.fsync))
        monkeypatch.setattr(module, "open", wrap("open", open), raising=False)
    rows, images = episode("b", 3)
    for n in range(1, 10):
        with monkeypatch.context():
            calls.clear()
            buf = filled(tmp_path / str(n), episode("a", 1))
            crash_at(n)
            try:
                buf.append(rows, images)
                assert calls == ["replace"] * 3 + ["open", "fsync"]
                return
            except KeyboardInterrupt:
                pass
            finally:
                monkeypatch.undo()
        after = Buffer(str(tmp_path / str(n)))
        for row in after.rows:
            after.image(row["images_file_names"][0])
    pytest.fail("append never came to its end")


def test_torn_last_line(tmp_path, capsys):
    """Half a line (a crash while writing) is left out and reported, wherever it broke; the next append heals the file."""
    whole = raw(filled(tmp_path / "x"))
    last = len(whole) - whole.rstrip(b"\n").rfind(b"\n") - 1
    for cut in (1, 2, last // 2, last - 1):
        folder = tmp_path / str(cut)
        buf = filled(folder)
        with open(buf.file, "wb") as f:
            f.write(whole[:-cut])
        buf = Buffer(str(folder))
        assert buf.dropped == last - cut and len(buf) == 14 and "torn" in capsys.readouterr().out
        buf.append(*episode("e", 2))
        again = Buffer(str(folder))
        assert again.dropped == 0 and again.rows == buf.rows and len(again) == 16 and raw(again).startswith(whole[:-last])


def test_windows(tmp_path):
    """A window holds consecutive turns of one episode; every played turn is drawn equally often, an episode's first turn as well as its last
    (once only the starts were uniform, and a first turn came up a third as often as the others); a last observation only behind its turn."""
    buf, rng, drawn = filled(tmp_path), np.random.default_rng(0), {}
    windows = buf.sample(rng, 6000, 3)
    for window in windows:
        rows = [buf.rows[i] for i in window]
        assert {r["episode"] for r in rows} == {rows[0]["episode"]}
        assert [r["turn"] for r in rows] == list(range(rows[0]["turn"], rows[0]["turn"] + len(rows)))
        played = [i for i in window if reply_text(buf.rows[i]) is not None]
        assert 1 <= len(played) <= 3 and window[:len(played)] == played
        follows = buf.episodes[rows[0]["episode"]]
        if reply_text(buf.rows[follows[-1]]) is None and played[-1] == follows[-2]:
            assert window[-1] == follows[-1], "the bootstrap of a truncated turn"
        for i in played:
            drawn[i] = drawn.get(i, 0) + 1
    every = [i for i, row in enumerate(buf.rows) if reply_text(row) is not None]
    assert sorted(drawn) == every and len(every) == 14
    assert max(drawn.values()) / min(drawn.values()) < 1.25, drawn
    assert buf.sample(np.random.default_rng(4), 9, 2) == buf.sample(np.random.default_rng(4), 9, 2)
    for last in (1, 2):
        assert {buf.rows[w[0]]["episode"] for w in buf.sample(rng, 200, 2, last=last)} == set(list(buf.episodes)[-last:])      # only what was played last


def test_windows_of_won_episodes(tmp_path):
    """`won` draws that share of the windows from episodes that reached the goal and the rest from the others (EZPoints' data wins a seventh of the hands:
    79 % instead of 0 after 400 updates); where there is only one kind, all come as they are."""
    buf = filled(tmp_path)
    buf.rows[next(iter(buf.episodes.values()))[-1]]["success"] = True
    won = lambda window: buf.rows[buf.episodes[buf.rows[window[0]]["episode"]][-1]]["success"]
    assert 0 < np.mean([won(w) for w in buf.sample(np.random.default_rng(0), 2000, 2)]) < 0.6
    for share in (0.0, 0.25, 1.0):
        assert np.mean([won(w) for w in buf.sample(np.random.default_rng(0), 400, 2, share)]) == share
    for row in buf.rows:
        row["success"] = False
    assert buf.sample(np.random.default_rng(0), 9, 2, 0.5) == buf.sample(np.random.default_rng(0), 9, 2)


@pytest.fixture(scope="module")
def vlm():
    texts = ["a turn 0 so 1 [action] go", "b turn 1"] * 50
    return model.VLM(*scratch.llava(texts, vocab_size=300, hidden=32, layers=1, vision_hidden=32, vision_layers=1), lora_r=0)


def test_batch(tmp_path, vlm):
    """Masks, spans, successors and returns, each computed anew from the rows."""
    replies = ["plan [action] no\nthen [action] go", "no marker at all", "", "[action] go"]
    buf = filled(tmp_path, episode("a", 4, replies=replies), episode("b", 2, cut=True))
    other = filled(tmp_path / "two", episode("z", 3))
    parts = [(buf, [[0, 1, 2], [3], [4, 5, 6], [5]]), (other, [[1, 2]])]
    buf.shape = other.shape = lambda reward: 2 * reward
    b = make_batch(parts, vlm, MARKER, gamma=0.5)
    flat = [(which, i) for which, windows in parts for w in windows for i in w]
    B, R = b["mask"].shape
    assert B == len(flat) == 10 and b["reply_ids"].shape == b["span"].shape == (B, R)
    assert b["next"].tolist() == [1, 2, -1, -1, 5, 6, -1, -1, 9, -1]
    rewards = {"a": [-1, 0.25, 2, 0.5], "b": [-1, 0.25, 0], "z": [-1, 0.25, 2]}
    for k, (which, i) in enumerate(flat):
        row = which.rows[i]
        name, turn, text = row["episode"], row["turn"], reply_text(row)
        n = int(b["mask"][k].sum())
        assert b["mask"][k].tolist() == [1] * n + [0] * (R - n)
        assert b["inputs"]["attention_mask"][k, b["P"]:].tolist() == b["mask"][k].tolist()
        assert b["inputs"]["input_ids"][k, b["P"]:].tolist() == b["reply_ids"][k].tolist()
        assert f"{name} turn {turn}" in vlm.decode(b["inputs"]["input_ids"][k, :b["P"]].tolist())
        assert b["reward"][k] == 2 * rewards[name][turn] and bool(b["terminated"][k]) == (name in "az" and turn == len(rewards[name]) - 1)
        assert b["to_go"][k] == 2 * sum(r * 0.5 ** j for j, r in enumerate(rewards[name][turn:])) and b["ep_return"][k] == sum(rewards[name])
        if text is None:                                                   # the last observation: no reply, but the bootstrap of row 5
            assert n == 0 and b["span"][k].sum() == 0 and k == 6 and b["next"][5] == 6
            continue
        ids = b["reply_ids"][k, :n].tolist()
        assert ids[-1] == vlm.eos and vlm.decode(ids) == text
        before, marker, action = text.rpartition(MARKER)
        tail = vlm.decode([t for t, s in zip(ids, b["span"][k].tolist()) if s])
        assert b["span"][k, n - 1] == 1 and b["span"][k, n:].sum() == 0
        assert tail == (action if marker else ""), "the span is what stands behind the last marker, and the end of the turn"


def test_stored_ids_are_used(tmp_path, vlm):
    """The tokens that were sampled are the tokens that are trained on, also where a tokenizer would cut the text in another way."""
    text = "so 1 [action] go"
    spelled = [i for c in text for i in vlm.tokenizer(c, add_special_tokens=False).input_ids]
    assert len(spelled) > len(vlm.reply_ids(text)) and vlm.decode(spelled) == text
    rows, images = episode("a", 1, replies=[text])
    rows[0]["reply_ids"] = spelled                                         # cut off by max_new_tokens: no end of turn either
    buf = filled(tmp_path, (rows, images))
    b = make_batch([(buf, [[0]])], vlm, MARKER, 0.9)
    assert b["reply_ids"][0, :len(spelled)].tolist() == spelled and b["mask"].sum() == len(spelled)
    assert b["span"][0, :len(spelled)].tolist() == [0] * (len(spelled) - 3) + [1] * 3


def test_a_picture_is_stored_once(tmp_path):
    """Equal pixels, one file, and an existing file is not written again; different pixels, sizes or modes never share a name."""
    obs = dict(image=picture(1), text="t")
    buf = Buffer(str(tmp_path), create=True)
    for n in range(3):
        buf.append([make_row(f"e{n}", 0, "Toy", 0, obs, reply="x", terminated=True)], {image_name(obs["image"]): picture(1)})
        stamp = os.stat(tmp_path / image_name(obs["image"])).st_mtime_ns
        assert n == 0 or stamp == first
        first = stamp
    assert len(os.listdir(tmp_path / "images")) == 1
    many = [picture(1), picture(2), Image.new("RGB", (4, 16), (1, 7, 0)), Image.new("L", (8, 8), 1), Image.new("L", (24, 8), 1)]
    assert len({image_name(im) for im in many}) == len(many)


def test_an_episode_name_is_used_once(tmp_path):
    """The story: `evaluate.py --save=folder` twice gave both runs' episodes the same names, and each pair became one episode of twice
    the length whose first half never ended. It is refused, and nothing is written."""
    buf = filled(tmp_path)
    before = raw(buf)
    with pytest.raises(SystemExit) as e:
        buf.append(*episode("c", 2))
    assert "'c'" in one_sentence(e, tmp_path) and raw(buf) == before and len(buf) == 15 and sorted(os.listdir(tmp_path / "images")) == sorted(os.listdir(tmp_path / "images"))


def one_sentence(error, folder):
    text = error.value.code
    assert isinstance(text, str) and "\n" not in text and text.endswith(".") and str(folder) in text, text
    return text


GOOD = dict(make_row("a", 0, "Toy", 0, dict(image=picture(0), text="t"), reply="x"))


@pytest.mark.parametrize("content, says", [
    (None, "no metadata.jsonl"), (b"", "holds no episodes"), (b'{"torn', "holds no episodes"), (b"\x89PNG\r\n\x1a\n\x00\xff\n", "not JSON"), (b"hello\n", "not JSON"),
    (b"\n", "not JSON"), (b"null\n", "not JSON"), (b"3\n", "not JSON"), (b'{"text": "a caption", "file_name": "x.png"}\n', "lacks"), (b"[1, 2]\n", "lacks"),
    (json.dumps(GOOD | dict(version=VERSION + 1)).encode() + b"\n", "version"), (json.dumps(GOOD | dict(version="2.0")).encode() + b"\n", "version")])
def test_bad_folders(tmp_path, content, says):
    """Missing, empty, foreign, damaged, from the future: SystemExit with one sentence that names the folder, and nothing is written into it."""
    if content is not None:
        (tmp_path / "metadata.jsonl").write_bytes(content)
    there = sorted(os.listdir(tmp_path))
    with pytest.raises(SystemExit) as e:
        Buffer(str(tmp_path))
    assert says in one_sentence(e, tmp_path) and sorted(os.listdir(tmp_path)) == there
    with pytest.raises(SystemExit) as e:
        Buffer(str(tmp_path / "nowhere"))
    assert "does not exist" in one_sentence(e, tmp_path) and not os.path.exists(tmp_path / "nowhere")


def test_every_key_that_is_read_is_asked_for(tmp_path, vlm):
    """A row with the required keys alone can be sampled and counted; without any one of them the folder is refused."""
    row = {k: GOOD[k] for k in KEYS}
    write = lambda row: (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    filled(tmp_path, ([GOOD], {image_name(picture(0)): picture(0)}))
    write(row)
    buf = Buffer(str(tmp_path))
    assert buf.stats()["episodes"] == 1 and make_batch([(buf, buf.sample(np.random.default_rng(0), 2, 2))], vlm, MARKER, 0.9)["mask"].sum() > 0
    for key in KEYS:
        write({k: v for k, v in row.items() if k != key})
        with pytest.raises(SystemExit) as e:
            Buffer(str(tmp_path))
        assert repr(key) in one_sentence(e, tmp_path)


def test_bad_pictures(tmp_path):
    """A picture that is gone, that is none, or whose path leaves the folder is one sentence at its first use."""
    buf = filled(tmp_path / "data")
    name = buf.rows[0]["images_file_names"][0]
    picture(0).save(tmp_path / "secret.png")
    picture(0).save(tmp_path / "data2.png")
    for bad in ("images/../../secret.png", str(tmp_path / "secret.png"), "../data2.png"):
        with pytest.raises(SystemExit) as e:
            buf.image(bad)
        assert "outside" in one_sentence(e, tmp_path / "data")
    os.symlink(tmp_path / "secret.png", tmp_path / "data/images/link.png")
    with pytest.raises(SystemExit) as e:
        buf.image("images/link.png")
    assert "outside" in one_sentence(e, tmp_path / "data")
    (tmp_path / "data" / name).write_bytes(b"no picture")
    for bad in (name, "images/gone.png"):
        with pytest.raises(SystemExit) as e:
            buf.image(bad)
        assert "missing or no picture" in one_sentence(e, tmp_path / "data")


def test_rewind(tmp_path):
    """Back to the first n rows; what is removed is kept in rewound.jsonl, and a rewind to where it stands changes nothing."""
    buf = filled(tmp_path)
    rows, before = list(buf.rows), raw(buf)
    buf.rewind(len(rows))
    assert raw(buf) == before and not os.path.exists(tmp_path / "rewound.jsonl")
    buf.rewind(8)
    assert buf.rows == rows[:8] == Buffer(str(tmp_path)).rows and before.startswith(raw(buf)) and list(buf.episodes) == ["a", "b"]
    buf.append(*episode("c", 2))
    buf.rewind(0)
    assert len(buf) == 0 and raw(buf) == b"" and buf.episodes == {} and len(Buffer(str(tmp_path), create=True)) == 0
    with open(tmp_path / "rewound.jsonl") as f:
        kept = [json.loads(line) for line in f]
    assert kept == rows[8:] + rows[:8] + episode("c", 2)[0]
    buf.append(*episode("c", 2))                                           # the name is free again
    assert len(Buffer(str(tmp_path))) == 2


def test_rewind_keeps_what_the_critic_sees_of_a_reward(tmp_path):
    """The story: a resumed run with reward_scale rewound its replay, and from then on learned from unscaled rewards."""
    filled(tmp_path)
    buf = Buffer(str(tmp_path), shape=lambda reward: 3 * reward)
    before = buf.return_to_go(0, 0.5)
    buf.rewind(8)
    assert buf.return_to_go(0, 0.5) == before != Buffer(str(tmp_path)).return_to_go(0, 0.5)


def test_stats(tmp_path):
    """Success by both rules, returns, valid share, to-go and quantile, on four episodes done by hand."""
    won, images = episode("won", 3, success=True)                          # -1 + .25 + 2 = 1.25: both rules
    slow = episode("slow", 2, success=True)[0]                             # -1 + .25 = -.75: goal only
    lucky = episode("lucky", 3, cut=True)[0]                               # 1.25 without the goal: return only
    lost = episode("lost", 1)[0]                                           # -1: neither
    lost[0]["valid"] = False
    pictures = images | episode("slow", 2)[1] | episode("lucky", 3, cut=True)[1] | episode("lost", 1)[1]
    buf = filled(tmp_path, (won + slow + lucky + lost, pictures))
    assert buf.stats() == dict(episodes=4, turns=9, success=0.5, success_return=0.5, episode_return=pytest.approx(0.1875), valid=pytest.approx(8 / 9))
    assert [buf.return_to_go(i, 0.5) for i in buf.episodes["won"]] == [-1 + 0.125 + 0.5, 1.25, 2.0] and buf.return_to_go(buf.episodes["lucky"][3], 0.5) == 0
    assert buf.lowest_return(0.5) == -1.0 and buf.return_quantile(1.0) == 1.25 and buf.return_quantile(0.0) == -1.0
    assert buf.return_quantile(0.5) == pytest.approx(0.25)


# ---------------------------------------------------------------- importing conversations

def ask(text): return {"from": "human", "value": text}
def say(text): return {"from": "gpt", "value": text}


@pytest.fixture
def chats(tmp_path):
    """write(rows) -> path of a file beside pictures 0.png .. 3.png; a list as JSON, a tuple as JSON lines."""
    (tmp_path / "pics").mkdir()
    for n in range(4):
        picture(n).save(tmp_path / "pics" / f"{n}.png")
    def write(rows):
        file = tmp_path / "chats.json"
        file.write_text(json.dumps(rows) if isinstance(rows, list) else "\n".join(map(json.dumps, rows)))
        return str(file)
    return write


def test_llava_conversations_become_episodes(chats, tmp_path):
    """A reply is a turn and has all before it in its prompt; the pictures are those shown so far."""
    file = chats([dict(id="x", image="pics/1.png", conversations=[ask("<image>\nWhat is it?"), say(f"A line. {MARKER} +"), ask("Sure?"), say("Yes.")]),
                  dict(image=["pics/2.png", "pics/3.png"], conversations=[ask("Compare <image> and <image>."), say("No.")]), dict(conversations=[ask("Hello"), say("Hi")])])
    buf = module.import_chats(file, str(tmp_path / "out"))
    assert [len(turns) for turns in buf.episodes.values()] == [2, 1, 1] and buf.rows == Buffer(str(tmp_path / "out")).rows
    one, two, three, four = buf.rows
    assert set(KEYS) <= set(one) and not one["terminated"] and two["terminated"]
    assert [reply_text(r) for r in buf.rows] == [f"A line. {MARKER} +", "Yes.", "No.", "Hi"] and [r["action"] for r in buf.rows] == ["+", "", "", ""]
    assert one["messages"][0]["content"] == [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    assert two["messages"][:2] == one["messages"] and two["images_file_names"] == one["images_file_names"] == [image_name(picture(1))]
    assert [p["type"] for p in three["messages"][0]["content"]] == ["text", "image", "text", "image", "text"] and four["images_file_names"] == []
    assert buf.image(three["images_file_names"][1]).tobytes() == picture(3).tobytes()


def test_trl_rows_become_episodes(chats, tmp_path):
    """Contents as parts or as text, pictures by path or as `datasets` writes them, a reward where a row has one."""
    parts = [{"type": "image"}, {"type": "text", "text": "Where?"}]
    file = chats((dict(images=["0.png"], messages=[dict(role="system", content="Be brief."), dict(role="user", content=parts), dict(role="assistant", content=[{"type": "text", "text": "Here."}])],
                       reward=2, success=True), dict(images=[{"path": "1.png", "bytes": None}], messages=[dict(role="user", content="Where?"), dict(role="assistant", content="There.")])))
    buf = module.import_chats(file, str(tmp_path / "out"), str(tmp_path / "pics"))
    assert [m["role"] for m in buf.rows[0]["messages"]] == ["system", "user", "assistant"] and (buf.rows[0]["reward"], buf.rows[0]["success"]) == (2.0, True)
    assert buf.rows[1]["messages"][0]["content"] == [{"type": "image", "text": None}, {"type": "text", "text": "Where?"}] and buf.rows[1]["reward"] == 0.0


def test_imported_conversations_train(chats, tmp_path):
    """The tiny VLM takes them: an earlier answer stands in the prompt, a reply of its own row does not."""
    buf = module.import_chats(chats([dict(image="pics/1.png", conversations=[ask("<image>\nWhat?"), say("first"), ask("Again?"), say("second")])]), str(tmp_path / "out"))
    vlm = model.VLM(*model.load_model("tiny-vlm"), n_critics=0)
    text = vlm.render(buf.rows[1]["messages"])
    assert "What?" in text and "first" in text and "Again?" in text and "second" not in text
    b = make_batch([(buf, [[0, 1]])], vlm, MARKER, 0.9)
    assert b["mask"].sum(1).tolist() == [len(vlm.reply_ids("first")), len(vlm.reply_ids("second"))]
    assert (b["inputs"]["input_ids"] == vlm.tokenizer.convert_tokens_to_ids("<image>")).sum(1).tolist() == [25, 25]


@pytest.mark.parametrize("rows, word", [
    ([{"a": 1}], "conversation 1, has neither"), ([3], "has neither"), ([dict(conversations=[ask("x")])], "no reply"), ([dict(conversations=[say("x")])], "no reply"),
    ([dict(image="gone.png", conversations=[ask("<image>"), say("x")])], "does not open: 'gone.png'"), ([dict(image="pics/0.png", conversations=[ask("<image><image>"), say("x")])], "shows 2 pictures"),
    ([dict(conversations=[{"from": "martian", "value": "x"}, say("x")])], "nobody known"), ([dict(messages=[dict(role="user", content=[3]), dict(role="assistant", content="x")])], "neither text nor picture"),
    ([dict(conversations=[ask("a"), say("b")]), dict(conversations=[ask(None), say("b")])], "conversation 2,")])
def test_foreign_conversations_are_one_sentence(chats, tmp_path, rows, word):
    with pytest.raises(SystemExit) as e:
        module.import_chats(chats(rows), str(tmp_path / "out"))
    assert word in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_an_import_never_mixes_with_what_is_there(chats, tmp_path):
    file = chats([dict(conversations=[ask("a"), say("b")])])
    for bad, word in ((lambda: module.import_chats(file, str(tmp_path / "pics")), "exists already"), (lambda: module.import_chats(str(tmp_path / "nix"), str(tmp_path / "o")), "no JSON"),
                      (lambda: module.import_chats(str(tmp_path / "pics" / "0.png"), str(tmp_path / "o")), "no JSON")):
        with pytest.raises(SystemExit) as e:
            bad()
        assert word in str(e.value)
