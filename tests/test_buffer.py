"""
Test episodes on disk: what is written is read, a crash costs one episode, a bad folder is one sentence.

    python -m pytest tests/test_buffer.py
"""
import json, os

import numpy as np
import pytest
from PIL import Image

import buffer as buffer_module
import model
from buffer import KEYS, VERSION, Buffer, image_name, make_batch, make_row, reply_text
from extras.check_rows import check_prompts
from pretrain import tiny_nets

MARKER = "[action]"
REWARDS = [-1.0, 0.25, 2.0, 0.5]

def picture(n):
    """Make a small picture that differs for each n."""
    red = n % 256
    blue = n // 256
    return Image.new("RGB", (8, 8), (red, 7, blue))

def episode(name, turns, cut=False, replies=None, **last):
    """Make the rows and pictures of an episode; cut=True: a limit, hence a row with the last observation.

    last: fields of the last turn.
    """
    rows = []
    images = {}
    end = dict(terminated=not cut, truncated=cut) | last
    for k in range(turns + cut):
        obs = dict(image=picture(sum(map(ord, name)) + k), text=f"{name} turn {k}")
        images[image_name(obs["image"])] = obs["image"]
        if k == turns:
            success = end.get("success", False)
            rows.append(make_row(name, k, "Toy", 5, obs, source="end", success=success))
            continue
        fields = dict(source="script", action="go", reward=REWARDS[k % 4])
        if k == turns - 1:
            fields |= end
        reply = f"so {k} {MARKER} go"
        if replies:
            reply = replies[k]
        rows.append(make_row(name, k, "Toy", 5, obs, reply=reply, **fields))
    return rows, images

def filled(folder, *episodes):
    """Make a buffer with some episodes."""
    buf = Buffer(str(folder), create=True)
    if not episodes:
        episodes = [episode("a", 4), episode("b", 3, cut=True), episode("c", 1), episode("d", 6)]
    for rows, images in episodes:
        buf.append(rows, images)
    return buf

def raw(buf):
    """Read the bytes of a buffer's file."""
    with open(buf.file, "rb") as f:
        return f.read()

def refusal(call, folder):
    """Call what must end with one sentence about the folder, and return the sentence."""
    with pytest.raises(SystemExit) as error:
        call()
    text = error.value.code
    assert isinstance(text, str), text
    assert "\n" not in text, text
    assert text.endswith("."), text
    assert str(folder) in text, text
    return text


# ---- files ----

def test_round_trip(tmp_path):
    """Rows and pictures come back as they went in, from the same object and from a new one."""
    replies = ['\u00e9\u4e16 \u2028 "[action] go"\n', ""]
    rows, images = episode("a", 2, cut=True, replies=replies)
    rows[0] |= dict(reply_ids=[3, 1, 2], behaviour_logprobs=[-0.123457, -2.0, 0.0])
    buf = filled(tmp_path, (rows, images))
    for opened in (buf, Buffer(str(tmp_path))):
        assert opened.rows == rows
        assert opened.episodes == {"a": [0, 1, 2]}
        assert opened.torn_bytes == 0
        assert len(opened) == 3
        assert [reply_text(row) for row in opened.rows] == [*replies, None]
        for row in rows:
            name = row["images_file_names"][0]
            assert opened.image(name).tobytes() == images[name].tobytes()
            assert image_name(opened.image(name)) == name

def test_append_only(tmp_path):
    """An append keeps the bytes that were there before."""
    buf = Buffer(str(tmp_path), create=True)
    before = b""
    for n in range(4):
        if n == 2:
            buf = Buffer(str(tmp_path), create=True)
        buf.append(*episode(f"e{n}", n + 1))
        assert raw(buf).startswith(before)
        assert len(raw(buf)) > len(before)
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

        monkeypatch.setattr(buffer_module.os, "replace", wrap("replace", os.replace))
        monkeypatch.setattr(buffer_module.os, "fsync", wrap("fsync", os.fsync))
        monkeypatch.setattr(buffer_module, "open", wrap("open", open), raising=False)

    def append_survives(n):
        calls.clear()
        buf = filled(tmp_path / str(n), episode("a", 1))
        crash_at(n)
        try:
            buf.append(*episode("b", 3))
        except KeyboardInterrupt:
            return False
        finally:
            monkeypatch.undo()
        return True

    for n in range(1, 20):
        if append_survives(n):
            assert calls == ["open", "fsync", "replace"] * 3 + ["open", "fsync"]
            return
        after = Buffer(str(tmp_path / str(n)))
        for row in after.rows:
            after.image(row["images_file_names"][0])
    pytest.fail("append never reached its end")

def test_an_append_that_ends_in_the_middle_adds_nothing(tmp_path, monkeypatch):
    """Ctrl-C or a full disk while rows are written: none of them is there, and they can be appended again.

    The story: they were on the disk, `record` appended them once more, and the folder was refused for ever.
    """
    buf = filled(tmp_path, episode("a", 1))
    before = raw(buf)
    real = os.fsync
    calls = []

    def interrupt(descriptor):
        calls.append(descriptor)
        real(descriptor)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        buf.append(*episode("b", 3))
    assert raw(buf) == before
    buf.append(*episode("b", 3))
    assert len(Buffer(str(tmp_path)).episodes) == 2

@pytest.mark.parametrize("whole_lines", [0, 1, 4])
def test_a_torn_last_episode(tmp_path, capsys, whole_lines):
    """An episode that a crash tore, in a line or between two, is left out and reported; an append heals it.

    The story: only half a line was left out, and the whole lines before it became an episode without an end.
    """
    whole = raw(filled(tmp_path / "x"))
    lines = whole.splitlines(keepends=True)
    # the last episode has six turns
    before = b"".join(lines[:-6])
    torn = b"".join(lines[-6 : -6 + whole_lines])
    following = lines[-6 + whole_lines]
    for cut in (0, 1, len(following) // 2, len(following) - 1):
        folder = tmp_path / str(cut)
        buf = filled(folder)
        with open(buf.file, "wb") as f:
            f.write(before + torn + following[:cut])
        capsys.readouterr()
        buf = Buffer(str(folder))
        assert buf.torn_bytes == len(torn) + cut
        assert len(buf) == 9
        assert ("torn" in capsys.readouterr().out) == bool(buf.torn_bytes)
        buf.append(*episode("e", 2))
        again = Buffer(str(folder))
        assert again.torn_bytes == 0
        assert again.rows == buf.rows
        assert len(again) == 11
        assert raw(again).startswith(before)

def test_a_picture_is_stored_once(tmp_path):
    """Equal pixels share a file, written once; different pixels, sizes or modes never share a name."""
    obs = dict(image=picture(1), text="t")
    name = image_name(obs["image"])
    buf = Buffer(str(tmp_path), create=True)
    stamps = set()
    for n in range(3):
        row = make_row(f"e{n}", 0, "Toy", 0, obs, reply="x", terminated=True)
        buf.append([row], {name: picture(1)})
        stamps.add(os.stat(tmp_path / name).st_mtime_ns)
    assert len(stamps) == 1
    assert len(os.listdir(tmp_path / "images")) == 1
    different = [
        picture(1),
        picture(2),
        Image.new("RGB", (4, 16), (1, 7, 0)),
        Image.new("L", (8, 8), 1),
        Image.new("L", (24, 8), 1),
    ]
    assert len({image_name(image) for image in different}) == len(different)

def test_an_episode_name_is_used_once(tmp_path):
    """An episode whose name is taken is refused, and nothing is written.

    The story: `evaluate.py --save=folder` twice gave both runs' episodes the same names, and each pair became
    one episode of twice the length whose first half never ended.
    """
    buf = filled(tmp_path)
    before = raw(buf)
    pictures = sorted(os.listdir(tmp_path / "images"))
    assert "'c'" in refusal(lambda: buf.append(*episode("c", 2)), tmp_path)
    assert raw(buf) == before
    assert len(buf) == 15
    after = sorted(os.listdir(tmp_path / "images"))
    assert after == pictures

def test_rewind(tmp_path):
    """It returns to the first n rows, writes the others to rewound.jsonl, and changes nothing at the end."""
    buf = filled(tmp_path)
    rows = list(buf.rows)
    before = raw(buf)
    buf.rewind(len(rows))
    assert raw(buf) == before
    assert not os.path.exists(tmp_path / "rewound.jsonl")
    buf.rewind(8)
    assert buf.rows == rows[:8]
    assert buf.rows == Buffer(str(tmp_path)).rows
    assert before.startswith(raw(buf))
    assert list(buf.episodes) == ["a", "b"]
    buf.append(*episode("c", 2))
    buf.rewind(0)
    assert len(buf) == 0
    assert raw(buf) == b""
    assert buf.episodes == {}
    assert len(Buffer(str(tmp_path), create=True)) == 0
    with open(tmp_path / "rewound.jsonl") as f:
        rewound = [json.loads(line) for line in f]
    assert rewound == rows[8:] + rows[:8] + episode("c", 2)[0]
    # the name is free again
    buf.append(*episode("c", 2))
    assert len(Buffer(str(tmp_path))) == 2


# ---- bad folders ----

GOOD = make_row("a", 0, "Toy", 0, dict(image=picture(0), text="t"), reply="x", terminated=True)

def line(row):
    """Write a row as a line of the file."""
    return json.dumps(row).encode() + b"\n"


BAD_FILES = [
    (None, "no metadata.jsonl"),
    (b"", "holds no episodes"),
    (b'{"torn', "holds no episodes"),
    (b"\x89PNG\r\n\x1a\n\x00\xff\n", "not JSON"),
    (b"hello\n", "not JSON"),
    (b"\n", "not JSON"),
    (b"null\n", "not JSON"),
    (b"3\n", "not JSON"),
    (b'{"text": "a caption", "file_name": "x.png"}\n', "lacks"),
    (b"[1, 2]\n", "lacks"),
    (line(GOOD | dict(version=VERSION + 1)), "version"),
    (line(GOOD | dict(version="2.0")), "version"),
]

@pytest.mark.parametrize("content, words", BAD_FILES)
def test_bad_folders(tmp_path, content, words):
    """A folder that is missing, empty, foreign, damaged or too new is one sentence; nothing is written."""
    if content is not None:
        (tmp_path / "metadata.jsonl").write_bytes(content)
    before = sorted(os.listdir(tmp_path))
    assert words in refusal(lambda: Buffer(str(tmp_path)), tmp_path)
    assert sorted(os.listdir(tmp_path)) == before
    assert "does not exist" in refusal(lambda: Buffer(str(tmp_path / "nowhere")), tmp_path)
    assert not os.path.exists(tmp_path / "nowhere")

def test_bad_pictures(tmp_path):
    """A picture that is missing, broken, or outside of the folder is one sentence at its first use."""
    home = tmp_path / "data"
    buf = filled(home)
    name = buf.rows[0]["images_file_names"][0]
    picture(0).save(tmp_path / "secret.png")
    picture(0).save(tmp_path / "data2.png")
    os.symlink(tmp_path / "secret.png", home / "images/link.png")
    outside = [
        "images/../../secret.png",
        str(tmp_path / "secret.png"),
        "../data2.png",
        "images/link.png",
    ]
    for bad in outside:
        assert "outside" in refusal(lambda: buf.image(bad), home)
    (home / name).write_bytes(b"no picture")
    for bad in (name, "images/gone.png"):
        assert "missing or no picture" in refusal(lambda: buf.image(bad), home)


# ---- windows ----

def is_turn(buf, i):
    """Tell whether a row is a turn, not a last observation."""
    return reply_text(buf.rows[i]) is not None

def test_windows(tmp_path):
    """A window holds consecutive turns of one episode, and every turn is drawn equally often.

    Once only the starts of windows were uniform, and a first turn came up a third as often as the others. A
    last observation comes with its turn only.
    """
    buf = filled(tmp_path)
    rng = np.random.default_rng(0)
    counts = {}
    for window in buf.sample(rng, 6000, 3):
        rows = [buf.rows[i] for i in window]
        assert {row["episode"] for row in rows} == {rows[0]["episode"]}
        first = rows[0]["turn"]
        assert [row["turn"] for row in rows] == list(range(first, first + len(rows)))
        turns = [i for i in window if is_turn(buf, i)]
        assert 1 <= len(turns) <= 3
        assert window[: len(turns)] == turns
        whole = buf.episodes[rows[0]["episode"]]
        if not is_turn(buf, whole[-1]) and turns[-1] == whole[-2]:
            assert window[-1] == whole[-1], "the bootstrap of a truncated turn"
        for i in turns:
            counts[i] = counts.get(i, 0) + 1
    every_turn = [i for i in range(len(buf)) if is_turn(buf, i)]
    assert sorted(counts) == every_turn
    assert len(every_turn) == 14
    assert max(counts.values()) / min(counts.values()) < 1.25, counts
    once = buf.sample(np.random.default_rng(4), 9, 2)
    again = buf.sample(np.random.default_rng(4), 9, 2)
    assert once == again
    # only what was played last
    for last in (1, 2):
        windows = buf.sample(rng, 200, 2, last=last)
        first_rows = [buf.rows[window[0]] for window in windows]
        latest = list(buf.episodes)[-last:]
        assert {row["episode"] for row in first_rows} == set(latest)

def test_windows_of_won_episodes(tmp_path):
    """`won` is the share of windows from episodes that reached the goal, if there are two kinds."""
    others = [episode("b", 3, cut=True), episode("c", 1), episode("d", 6)]
    buf = filled(tmp_path / "won", episode("a", 4, success=True), *others)

    def won_share(n, *share):
        windows = buf.sample(np.random.default_rng(0), n, 2, *share)
        names = [buf.rows[window[0]]["episode"] for window in windows]
        last_rows = [buf.rows[buf.episodes[name][-1]] for name in names]
        return np.mean([row["success"] for row in last_rows])

    assert 0 < won_share(2000) < 0.6
    for share in (0.0, 0.25, 1.0):
        assert won_share(400, share) == share
    # all are of one kind
    buf = filled(tmp_path / "lost", episode("a", 4), *others)
    plain = buf.sample(np.random.default_rng(0), 9, 2)
    assert buf.sample(np.random.default_rng(0), 9, 2, 0.5) == plain


# ---- batches ----

@pytest.fixture(scope="module")
def vlm():
    """A very small VLM with random weights."""
    texts = ["a turn 0 so 1 [action] go", "b turn 1"] * 50
    sizes = dict(vocab_size=300, hidden=32, layers=1, vision_hidden=32, vision_layers=1)
    return model.VLM(*tiny_nets.llava(texts, **sizes))

def double(reward):
    """Scale a reward, as a reward_fn."""
    return 2 * reward

def test_batch(tmp_path, vlm):
    """Masks, spans, successors and returns, each computed anew from the rows."""
    replies = ["plan [action] no\nthen [action] go", "no marker at all", "", "[action] go"]
    buf = filled(tmp_path, episode("a", 4, replies=replies), episode("b", 2, cut=True))
    other = filled(tmp_path / "two", episode("z", 3))
    parts = [(buf, [[0, 1, 2], [3], [4, 5, 6], [5]]), (other, [[1, 2]])]
    buf.reward_fn = double
    other.reward_fn = double
    batch = make_batch(parts, vlm, MARKER, gamma=0.5)
    turns = [(which, i) for which, windows in parts for window in windows for i in window]
    mask = batch["mask"]
    span = batch["span"]
    P = batch["P"]
    B, R = mask.shape
    assert B == len(turns) == 10
    assert batch["reply_ids"].shape == span.shape == (B, R)
    assert batch["next"].tolist() == [1, 2, -1, -1, 5, 6, -1, -1, 9, -1]
    rewards = {"a": [-1, 0.25, 2, 0.5], "b": [-1, 0.25, 0], "z": [-1, 0.25, 2]}
    for b, (which, i) in enumerate(turns):
        row = which.rows[i]
        name = row["episode"]
        turn = row["turn"]
        n = int(mask[b].sum())
        row_mask = mask[b].tolist()
        input_ids = batch["inputs"]["input_ids"][b].tolist()
        attention_mask = batch["inputs"]["attention_mask"][b].tolist()
        assert row_mask == [1] * n + [0] * (R - n)
        assert attention_mask[P:] == row_mask
        assert input_ids[P:] == batch["reply_ids"][b].tolist()
        assert f"{name} turn {turn}" in vlm.decode(input_ids[:P])
        is_end = name in "az" and turn == len(rewards[name]) - 1
        assert bool(batch["terminated"][b]) == is_end
        assert batch["reward"][b] == 2 * rewards[name][turn]
        to_go = sum(reward * 0.5**k for k, reward in enumerate(rewards[name][turn:]))
        assert batch["return_to_go"][b] == 2 * to_go
        assert batch["ep_return"][b] == sum(rewards[name])
        if reply_text(row) is None:
            # the last observation: no reply, but the bootstrap of row 5
            assert n == 0
            assert span[b].sum() == 0
            assert b == 6
            assert batch["next"][5] == 6
        else:
            ids = batch["reply_ids"][b, :n].tolist()
            check_reply(vlm, reply_text(row), ids, span[b].tolist())

def check_reply(vlm, text, ids, span):
    """Check the tokens of a reply, and the span: what follows the last marker, and the end of the turn."""
    n = len(ids)
    assert ids[-1] == vlm.eos
    assert vlm.decode(ids) == text
    assert span[n - 1] == 1
    assert sum(span[n:]) == 0
    _, marker, action = text.rpartition(MARKER)
    tail = vlm.decode([token for token, inside in zip(ids, span) if inside])
    assert tail == (action if marker else "")

def test_stored_ids_are_used(tmp_path, vlm):
    """Sampled tokens are trained on as they are, even if a tokenizer would cut the text in another way."""
    text = "so 1 [action] go"
    letters = [vlm.tokenizer(letter, add_special_tokens=False).input_ids for letter in text]
    spelled = sum(letters, [])
    assert len(spelled) > len(vlm.reply_ids(text))
    assert vlm.decode(spelled) == text
    rows, images = episode("a", 1, replies=[text])
    # cut off by max_new_tokens: no end of the turn either
    rows[0]["reply_ids"] = spelled
    buf = filled(tmp_path, (rows, images))
    batch = make_batch([(buf, [[0]])], vlm, MARKER, 0.9)
    n = len(spelled)
    reply_ids = batch["reply_ids"][0].tolist()
    span = batch["span"][0].tolist()
    assert reply_ids[:n] == spelled
    assert batch["mask"].sum() == n
    assert span[:n] == [0] * (n - 3) + [1] * 3

def slow_span(vlm, ids, start):
    """Mark the tokens that reach beyond a character by decoding every beginning of the reply."""
    marks = []
    for j, token in enumerate(ids):
        is_beyond = len(vlm.decode(ids[: j + 1])) > start
        marks.append(int(is_beyond or token == vlm.eos))
    return marks

def test_span_of_any_tokens(vlm):
    """The marks are those of the slow way for any tokens: characters in several pieces, broken ones, none."""
    rng = np.random.default_rng(0)
    plain = [i for i in range(vlm.vocab_size) if i not in vlm.banned_ids and i != vlm.eos]
    replies = [vlm.reply_ids(text) for text in ("", "\u00e9\u4e16 [action] \U0001f642", "[action] \u4e2d")]
    for _ in range(300):
        ids = rng.choice(plain, size=rng.integers(12)).tolist()
        replies += [ids, ids + [vlm.eos]]
    for ids in replies:
        for start in range(len(vlm.decode(ids)) + 2):
            assert vlm.span(ids, start) == slow_span(vlm, ids, start), (ids, start)

def test_a_long_reply_costs_few_decodings(vlm, monkeypatch):
    """The story: each token of a reply was a decoding of all before it, hours for a million characters."""
    ids = vlm.reply_ids("a plan " * 2000 + "[action] go")
    calls = []
    decode = vlm.decode

    def counting_decode(ids):
        calls.append(len(ids))
        return decode(ids)

    monkeypatch.setattr(vlm, "decode", counting_decode)
    span = vlm.span(ids, 2000 * 7 + len(MARKER))
    assert decode([token for token, inside in zip(ids, span) if inside]) == " go"
    assert len(calls) < 20

def test_what_a_model_cannot_have_sampled_is_encoded_anew(vlm):
    """Stored ids that are negative, unknown, special, or behind the end of the turn are another model's."""
    text = "so [action] go"
    ids = vlm.reply_ids(text)
    pad = vlm.tokenizer.convert_tokens_to_ids("<|pad|>")
    cut_off = ids[:-1]
    assert vlm.reply_ids(text, cut_off) == cut_off
    others = [
        [-1, *ids],
        [*ids, vlm.vocab_size],
        [pad, *ids],
        [*ids, pad],
        [vlm.eos, *ids],
        [*ids, vlm.eos],
    ]
    for stored in others:
        assert vlm.reply_ids(text, stored) == ids

def test_prompts_of_the_same_text_are_told_apart(tmp_path, vlm):
    """The story: a picture before a question and one behind it were one prompt in the cache."""
    [first], images = episode("a", 1)
    [second], _ = episode("b", 1)
    part, text = first["messages"][0]["content"]
    second["images_file_names"] = first["images_file_names"]
    second["messages"][0]["content"] = [text, part]
    buf = filled(tmp_path, ([first], images), ([second], images))
    before, behind = [buf.encode_prompt(i, vlm)["input_ids"].tolist() for i in (0, 1)]
    assert before != behind
    assert sorted(before[0]) == sorted(behind[0])

def test_a_picture_is_checked_before_a_run(tmp_path):
    """check_images names the picture and the first row that shows it; half a picture is found."""
    buf = filled(tmp_path)
    buf.check_images()
    name = buf.rows[3]["images_file_names"][0]
    content = (tmp_path / name).read_bytes()
    for n in range(0, len(content) - 4, 7):
        (tmp_path / name).write_bytes(content[:n])
        words = f"line 4, shows {name}, which is missing or no picture"
        assert words in refusal(buf.check_images, tmp_path)


REFUSING = "{{ raise_exception('Conversation roles must alternate') }}"
DROPPING = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content[-1].text }}{% endif %}{% endfor %}"

def test_a_prompt_that_a_model_cannot_read_is_found_before_a_run(tmp_path, vlm, monkeypatch):
    """A chat template that refuses a prompt, or drops what the system says, is one sentence."""
    rows, images = episode("a", 2)
    part = dict(type="text", text="Be brief.")
    system = dict(role="system", content=[part])
    rows[1]["messages"].insert(0, system)
    buf = filled(tmp_path, (rows, images))
    check_prompts(buf, vlm)
    templates = [
        (REFUSING, "refuses a prompt of user"),
        (DROPPING, "drops a message of the system"),
    ]
    for template, words in templates:
        monkeypatch.setattr(vlm.processor, "chat_template", template)
        monkeypatch.setattr(vlm, "encode_uncached", lambda messages, images: vlm.render(messages))
        with pytest.raises(SystemExit, match=words):
            check_prompts(buf, vlm)

def test_every_key_that_is_read_is_required(tmp_path, vlm):
    """A row with the required keys alone can be sampled and counted; without any of them it is refused."""
    row = {key: GOOD[key] for key in KEYS}
    filled(tmp_path, ([GOOD], {image_name(picture(0)): picture(0)}))
    file = tmp_path / "metadata.jsonl"
    file.write_bytes(line(row))
    buf = Buffer(str(tmp_path))
    assert buf.stats()["episodes"] == 1
    windows = buf.sample(np.random.default_rng(0), 2, 2)
    assert make_batch([(buf, windows)], vlm, MARKER, 0.9)["mask"].sum() > 0
    for missing in KEYS:
        file.write_bytes(line({key: value for key, value in row.items() if key != missing}))
        assert repr(missing) in refusal(lambda: Buffer(str(tmp_path)), tmp_path)


# ---- rewards and statistics ----

def test_rewind_keeps_what_the_critic_sees_of_a_reward(tmp_path):
    """The story: a resumed run rewound its replay, and then the critic saw rewards as they were paid."""
    filled(tmp_path)
    buf = Buffer(str(tmp_path), reward_fn=double)
    before = buf.return_to_go(0, 0.5)
    buf.rewind(8)
    assert buf.return_to_go(0, 0.5) == before
    assert before != Buffer(str(tmp_path)).return_to_go(0, 0.5)

def test_stats(tmp_path):
    """Success by both rules, returns, valid share, to-go and quantile, on four episodes done by hand."""
    # -1 + .25 + 2 = 1.25: both rules
    won = episode("won", 3, success=True)
    # -1 + .25 = -.75: goal only
    slow = episode("slow", 2, success=True)
    # 1.25 without the goal: return only
    lucky = episode("lucky", 3, cut=True)
    # -1: neither
    lost = episode("lost", 1)
    lost[0][0]["valid"] = False
    buf = filled(tmp_path, won, slow, lucky, lost)
    assert buf.stats() == dict(
        episodes=4,
        turns=9,
        success=0.5,
        success_return=0.5,
        episode_return=pytest.approx(0.1875),
        valid=pytest.approx(8 / 9),
    )
    to_go = [buf.return_to_go(i, 0.5) for i in buf.episodes["won"]]
    assert to_go == [-0.375, 1.25, 2.0]
    assert buf.return_to_go(buf.episodes["lucky"][3], 0.5) == 0
    assert buf.lowest_return(0.5) == -1.0
    assert buf.return_quantile(1.0) == 1.25
    assert buf.return_quantile(0.0) == -1.0
    assert buf.return_quantile(0.5) == pytest.approx(0.25)
