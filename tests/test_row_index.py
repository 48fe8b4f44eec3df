"""
Test the index of a folder of episodes: the quick way gives what a walk over all rows gives.

    python -m pytest tests/test_row_index.py
"""
import json, os, sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from buffer import Buffer, make_message_row, reply_text
from extras import row_index
from extras.bench_scale import print_scale
from extras.check_rows import outline_of, parse_row, read_blocks, recognise_row
from extras.import_chats import import_conversations
from extras.row_index import CACHED_ROWS

TEXTS = ["go", "", 'a "quoted" \\ [action] go\n', "\u00e9\u4e16", "\U0001f642", '"type": "image"', "x" * 300]
NUMBERS = [0.0, -1.0, 0.25, 1e-07, 3, -2.5e-05, 1e22]

def text_part(text):
    """Make a part of text."""
    return {"type": "text", "text": text}

def coin(rng):
    """Toss a coin."""
    return bool(rng.random() < 0.5)

def random_text(rng):
    """Choose one of the texts."""
    return str(rng.choice(TEXTS))

def random_messages(rng, has_reply):
    """Make messages of one to three questions without pictures, sometimes behind a system message."""
    messages = []
    if coin(rng):
        messages.append(dict(role="system", content=[text_part(random_text(rng))]))
    for k in range(rng.integers(1, 4)):
        if k > 0:
            messages.append(dict(role="assistant", content=[text_part(random_text(rng))]))
        parts = [text_part(random_text(rng)) for _ in range(rng.integers(3))]
        messages.append(dict(role="user", content=parts))
    if has_reply:
        messages.append(dict(role="assistant", content=[text_part(random_text(rng))]))
    return messages

def random_episode(rng, name):
    """Make the rows of an episode of one to six turns, won or lost, ended or cut off."""
    rows = []
    n_turns = int(rng.integers(1, 7))
    cut = coin(rng)
    won = coin(rng)
    env = str(rng.choice(["Toy", "Game"]))
    for turn in range(n_turns + cut):
        fields = dict(success=won and turn >= n_turns - 1)
        if turn < n_turns:
            tokens = rng.integers(300, size=rng.integers(4)).tolist()
            fields["reply_ids"] = tokens
            fields["logprobs"] = [-0.5 / (k + 1) for k in range(len(tokens))]
            fields["action"] = random_text(rng)
            fields["reward"] = NUMBERS[rng.integers(len(NUMBERS))]
            fields["valid"] = coin(rng)
        if turn == n_turns - 1:
            fields |= dict(terminated=not cut, truncated=cut)
        rows.append(make_message_row(name, turn, env, 5, [], random_messages(rng, turn < n_turns), **fields))
    return rows

def random_buffer(rng, folder, n):
    """Make a buffer of n random episodes, added in two appends."""
    buf = Buffer(str(folder), create=True)
    rows = []
    for k in range(n):
        if k == n // 2:
            buf.append(rows, {})
            rows = []
        rows += random_episode(rng, f"e{k}")
    buf.append(rows, {})
    return buf


# ---- reading ----

LETTERS = list('0123456789"{}[],:\\-.eEnutf \x00\x7f\xff')

def damaged(rng, line):
    """Change a line in one to three places: a letter is left out, doubled, replaced, or two are swapped."""
    letters = list(line)
    for _ in range(rng.integers(1, 4)):
        i = rng.integers(len(letters) - 1)
        j = rng.integers(len(letters) - 1)
        kind = rng.integers(4)
        if kind == 0:
            letters.pop(i)
        elif kind == 1:
            letters.insert(i, letters[i])
        elif kind == 2:
            letters[i] = str(rng.choice(LETTERS))
        else:
            letters[i], letters[j] = letters[j], letters[i]
    return "".join(letters)

def slow_outline(text):
    """Outline a line by parsing it; None if it is refused."""
    try:
        return outline_of(parse_row(text[:-1].encode("latin-1")), len(text))
    except ValueError:
        return None

def test_what_is_recognised_is_what_is_parsed():
    """The regular expression takes most rows of this program, and no line that the full check refuses."""
    rng = np.random.default_rng(0)
    rows = []
    for k in range(150):
        rows += random_episode(rng, f"e{k}")
    lines = [json.dumps(row) + "\n" for row in rows]
    recognised = 0
    for line in lines:
        outline = recognise_row(line, 0)
        recognised += outline is not None
        assert outline in (None, slow_outline(line)), line
        for _ in range(40):
            bad = damaged(rng, line[:-1]) + "\n"
            outline = recognise_row(bad, 0)
            if outline is not None:
                assert outline == slow_outline(bad), bad
    # a reward of 1e22 is parsed
    assert recognised > 0.5 * len(lines)

SPECIAL = [
    ('"reply_ids": []', '"reply_ids": [5]', True),
    ('"behaviour_logprobs": []', '"behaviour_logprobs": [-0.5]', False),
    ('"reply_ids": []', '"reply_ids": [05]', False),
    ('"reply_ids": []', '"reply_ids": [5.0]', False),
    ('"reward": 0.0', '"reward": 1e39', False),
    ('"reward": 0.0', '"reward": NaN', False),
    ('"images_file_names": []', '"images_file_names": ["x.png"]', False),
    ('"text": "go"', '"text": "\\ud83d"', False),
    ('"text": "go"', '"text": null', False),
    ('"text": "go"', '"text": "' + "x" * 200_001 + '"', False),
    ('"version": 1', '"version": 2', False),
    ('"seed": 5', '"seed": ' + "5" * 5000, False),
]

@pytest.mark.parametrize("old, new, is_right", SPECIAL)
def test_a_row_with_an_odd_value_is_not_recognised(old, new, is_right):
    """Each rule that the full check has holds for the quick one too."""
    messages = [dict(role="user", content=[text_part("go")])]
    line = json.dumps(make_message_row("a", 0, "Toy", 5, [], messages)) + "\n"
    assert old in line
    assert recognise_row(line, 0) == slow_outline(line)
    changed = line.replace(old, new)
    assert (slow_outline(changed) is not None) == is_right
    assert (recognise_row(changed, 0) is not None) == is_right

def test_blocks_are_whole_lines(tmp_path):
    """Blocks of any size have the same bytes; each but the last ends with a line."""
    file = tmp_path / "metadata.jsonl"
    content = b"one\n\nthree three three\nfour\n" + b"5" * 40 + b"\nrest"
    file.write_bytes(content)
    for size in range(1, 60):
        blocks = list(read_blocks(str(file), size))
        assert b"".join(blocks) == content
        assert blocks[-1] == b"rest"
        assert all(block.endswith(b"\n") for block in blocks[:-1])
    assert list(read_blocks(str(tmp_path / "nothing"))) == []

def test_rows_are_a_list_that_is_read_when_needed(tmp_path):
    """Numbers, negative numbers and slices work as in a list; what is read stays bounded."""
    rng = np.random.default_rng(0)
    rows = random_episode(rng, "a") + random_episode(rng, "b")
    buf = Buffer(str(tmp_path), create=True)
    buf.append(rows, {})
    assert list(buf.rows) == rows
    assert buf.rows[1:-1:2] == rows[1:-1:2]
    assert buf.rows[-1] == rows[-1]
    assert buf.rows[np.int64(0)] is buf.rows[0]
    for i in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            buf.rows[i]
    one = random_episode(rng, "c")[0] | dict(terminated=True)
    buf.append([one | dict(episode=f"e{k}") for k in range(CACHED_ROWS)], {})
    assert sum(1 for _ in buf.rows) == len(rows) + CACHED_ROWS
    assert len(buf.rows.cache) <= CACHED_ROWS

def test_two_threads_read_the_same_rows(tmp_path, monkeypatch):
    """Only one thread at a time changes what is in memory: it grew beyond its limit, or failed."""
    monkeypatch.setattr(row_index, "CACHED_ROWS", 2)
    buf = random_buffer(np.random.default_rng(0), tmp_path, 4)
    rows = list(buf.rows)

    def read():
        return [list(buf.rows) == rows for _ in range(50)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            readers = [pool.submit(read) for _ in range(4)]
    finally:
        sys.setswitchinterval(interval)
    for reader in readers:
        assert all(reader.result())
    assert len(buf.rows.cache) <= 2

def test_a_file_that_shrinks_while_it_is_used_is_one_sentence(tmp_path):
    """What is not in memory must be in the file: another program that cuts it is named."""
    buf = random_buffer(np.random.default_rng(0), tmp_path, 4)
    os.truncate(buf.file, 10)
    with pytest.raises(SystemExit, match="line 2, was changed while it was in use"):
        buf.rows[1]


# ---- windows and statistics, by a walk over all rows ----

def count_turns(buf, rows):
    """Count the rows that have a reply."""
    replies = [reply_text(buf.rows[i]) for i in rows]
    return len(replies) - replies.count(None)

def slow_sample(buf, rng, n, window, won=None, last=0):
    """Draw windows as Buffer.sample does, by a walk over all episodes."""
    episodes = list(buf.episodes.values())[-last:]
    n_turns = np.array([count_turns(buf, rows) for rows in episodes])
    reached = np.array([buf.rows[rows[-1]]["success"] for rows in episodes])
    quotas = [(np.ones_like(reached), n)]
    if won is not None and reached.any() and not reached.all():
        n_won = round(won * n)
        quotas = [(reached, n_won), (~reached, n - n_won)]
    windows = []
    for is_in_group, count in quotas:
        ends = np.cumsum(np.where(is_in_group, n_turns + window - 1, 0))
        for number in rng.integers(ends[-1], size=count):
            k = int(np.searchsorted(ends, number, side="right"))
            end = int(ends[k] - number)
            rows = episodes[k]
            turns = rows[max(0, end - window) : min(end, n_turns[k])]
            if end >= n_turns[k]:
                turns = turns + rows[n_turns[k] :]
            windows.append(turns)
    return windows

def slow_stats(buf, names):
    """Measure episodes by a walk over their rows."""
    reached = []
    returns = []
    scores = []
    valid = []
    for name in names:
        rows = [buf.rows[i] for i in buf.episodes[name]]
        reached.append(rows[-1]["success"])
        returns.append(sum(row["reward"] for row in rows))
        turns = [row for row in rows if reply_text(row) is not None]
        valid += [row["valid"] for row in turns]
        scores.append(sum(row["reward"] if row["valid"] else -1.0 for row in turns))
    return dict(
        episodes=len(names),
        turns=len(valid),
        success=float(np.mean(reached)),
        success_return=float(np.mean(np.array(scores) > 0)),
        episode_return=float(np.mean(returns)),
        valid=float(np.mean(valid)),
    )

def clip(reward):
    """Clip a reward, as a reward_fn."""
    return max(-1.0, min(1.0, reward))


# number of windows, window, won, last
DRAWS = [
    (9, 1, None, 0),
    (9, 3, None, 0),
    (9, 3, 0.5, 0),
    (9, 2, 0.0, 3),
    (9, 4, 1.0, 5),
    (9, 3, 0.3, 999),
    (9, 3, None, 1),
]

def check_numbers(buf):
    """Compare windows and statistics with those of a walk, bit for bit."""
    for seed, args in enumerate(DRAWS):
        slow = slow_sample(buf, np.random.default_rng(seed), *args)
        assert buf.sample(np.random.default_rng(seed), *args) == slow
    stats = buf.stats()
    by_env = stats.pop("by_env", {})
    assert stats == slow_stats(buf, list(buf.episodes))
    groups = {}
    for name, rows in buf.episodes.items():
        last = buf.rows[rows[-1]]
        groups.setdefault(last["env"], []).append(name)
        rewards = [buf.rows[i]["reward"] for i in rows]
        assert buf.episode_return(name) == sum(rewards)
        assert buf.index.outcome(name) == (last["env"], last["success"])
    if len(groups) == 1:
        groups = {}
    assert list(by_env) == list(groups)
    for env, names in groups.items():
        assert by_env[env] == slow_stats(buf, names)
    assert buf.lowest_return(0.9) == min(buf.return_to_go(i, 0.9) for i in range(len(buf)))
    returns = [buf.episode_return(name) for name in buf.episodes]
    assert buf.return_quantile(0.7) == float(np.quantile(returns, 0.7))

@pytest.mark.parametrize("seed", range(12))
def test_the_index_gives_what_a_walk_gives(tmp_path, seed):
    """After appends, after opening anew, and after going back and playing on."""
    rng = np.random.default_rng(seed)
    buf = random_buffer(rng, tmp_path, int(rng.integers(2, 14)))
    buf.reward_fn = clip
    check_numbers(buf)
    opened = Buffer(str(tmp_path), reward_fn=clip)
    check_numbers(opened)
    buf.rewind(int(rng.integers(buf.index.first_rows[1], len(buf) + 1)))
    check_numbers(buf)
    buf.append(random_episode(rng, "new") + random_episode(rng, "newer"), {})
    check_numbers(buf)
    opened = Buffer(str(tmp_path), reward_fn=clip)
    assert opened.rows == buf.rows
    for name, column in vars(opened.index).items():
        if name not in ("everything", "groups"):
            assert getattr(buf.index, name) == column, name
    for one, other in zip(opened.index.groups, buf.index.groups):
        assert vars(one) == vars(other)

def test_going_back_into_an_episode_leaves_it_out(tmp_path, capsys):
    """A rewind to a row in the middle of an episode leaves out all of it, as a crash there would."""
    rng = np.random.default_rng(1)
    buf = random_buffer(rng, tmp_path, 8)
    number = next(k for k in range(1, 8) if len(buf.index.rows_of(k)) > 2)
    first = buf.index.first_rows[number]
    buf.rewind(first + 2)
    assert len(buf) == first
    assert "is torn" in capsys.readouterr().out
    opened = Buffer(str(tmp_path))
    assert opened.torn_bytes == buf.torn_bytes > 0
    assert opened.rows == buf.rows
    check_numbers(buf)


# ---- many conversations ----

def test_an_import_waits_for_the_disk_once_a_chunk(tmp_path, monkeypatch):
    """The story: each picture of 100,000 conversations was synced alone, a quarter of an hour of waiting."""
    chats = []
    for n in range(30):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / f"{n}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
        chats.append(dict(image=f"{n}.png", conversations=turns))
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    calls = []
    real = os.fsync

    def count(descriptor):
        calls.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", count)
    monkeypatch.setattr("extras.import_chats.CHUNK_ROWS", 10)
    buf = import_conversations(str(tmp_path / "chats.json"), str(tmp_path / "out"))
    assert len(buf.episodes) == 30
    assert 3 <= len(calls) <= 6
    buf.check_images()


# ---- the benchmark ----

def test_the_benchmark_prints_a_row_per_size(capsys):
    """At a hundred turns it takes a moment; the figures are positive."""
    print_scale(sizes=(100, 200))
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert [row[0] for row in table] == ["100", "200"]
    assert all(float(number) >= 0 for row in table for number in row[1:])

def test_the_benchmark_says_when_the_disk_is_too_small(monkeypatch):
    """A million turns need some 700 MB for a while."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: (0, 0, 10**6))
    with pytest.raises(SystemExit, match="MB"):
        print_scale(sizes=(10**6,))
