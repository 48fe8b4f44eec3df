"""
Recorded data that is damaged, foreign or odd: what the user reads, or what it means.

The cases are run by tests/test_failures.py, see tests/failure_cases.py.
"""
import functools, io, json, os, struct, zlib

import numpy as np
from PIL import Image

import model
from buffer import Buffer, image_name, make_batch, make_row, reply_text
from extras.check_rows import MAX_CHARACTERS
from extras.pictures import MAX_PIXELS
from failure_cases import Case

MARKER = "[action]"
NAN = float("nan")
INFINITY = float("inf")


# ---- folders ----

def picture(n):
    """Make a small picture that differs for each n."""
    return Image.new("RGB", (8, 8), (n, 7, 0))

def good_rows():
    """Make six rows: episode a of two turns, b of two turns and cut off by a limit, c of one turn."""
    rows = []
    for name, turn, end in [
        ("a", 0, {}),
        ("a", 1, dict(terminated=True)),
        ("b", 0, {}),
        ("b", 1, dict(truncated=True)),
        ("b", 2, None),
        ("c", 0, dict(terminated=True)),
    ]:
        obs = dict(image=picture(len(rows)), text=f"{name} {turn}")
        if end is None:
            rows.append(make_row(name, turn, "Toy", 5, obs, source="end"))
            continue
        played = dict(reply=f"{MARKER} go", reply_ids=[5, 6], logprobs=[-0.5, -0.25], action="go")
        rows.append(make_row(name, turn, "Toy", 5, obs, **played, source="model", reward=1.0, **end))
    return rows

def good_folder(folder):
    """Record the good rows into a folder -> the name of its file."""
    buffer = Buffer(folder, create=True)
    buffer.append(good_rows(), {image_name(picture(n)): picture(n) for n in range(6)})
    return buffer.file

def write_lines(file, rows):
    """Write rows as the lines of a file."""
    with open(file, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)

def listing(folder):
    """List all paths of a folder, with the sizes of the files."""
    found = []
    for place, folders, files in os.walk(folder):
        paths = [os.path.join(place, name) for name in files]
        found += [(path, os.lstat(path).st_size) for path in paths]
        found += [os.path.join(place, name) for name in folders]
    return sorted(map(str, found))

def open_only(folder):
    """Open a folder of episodes; whatever the outcome, nothing in it changes."""
    before = listing(folder)
    try:
        return Buffer(folder)
    finally:
        assert listing(folder) == before

def refused(what, then, damage):
    """Make a case of a folder that is refused; damage(file) changes the file of good rows."""

    def make(folder):
        damage(good_folder(folder))
        return functools.partial(open_only, folder)

    return Case(what, then, make)

def refused_rows(what, then, change):
    """Make a case of rows that are refused; change(rows) changes the six good ones."""

    def damage(file):
        rows = good_rows()
        change(rows)
        write_lines(file, rows)

    return refused(what, then, damage)

def refused_field(what, then, line=2, **fields):
    """Make a case of one row whose fields have other values."""
    return refused_rows(what, f"line {line}, {then}", lambda rows: rows[line - 1].update(fields))

def refused_messages(what, then, change, line=2):
    """Make a case of one row whose messages are changed in place."""
    return refused_rows(what, f"line {line}, {then}", lambda rows: change(rows[line - 1]["messages"]))

def refused_bytes(what, then, content):
    """Make a case of a file of these bytes."""

    def damage(file):
        with open(file, "wb") as f:
            f.write(content)

    return refused(what, then, damage)

def as_bytes(rows):
    """Write rows as the bytes of a file."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)

def replaced(old, new):
    """Write the good rows as bytes, and replace bytes in the second line."""
    lines = as_bytes(good_rows()).splitlines(keepends=True)
    assert old in lines[1]
    lines[1] = lines[1].replace(old, new)
    return b"".join(lines)


# ---- what takes the place of the file ----

def put_folder(file):
    """Put a folder in the place of the file."""
    os.remove(file)
    os.mkdir(file)

def put_pipe(file):
    """Put a named pipe in the place of a file: reading it would wait for ever."""
    os.remove(file)
    os.mkfifo(file)

def put_dead_link(file):
    """Put a link that leads nowhere in the place of the file."""
    os.remove(file)
    os.symlink("nowhere", file)


FILES = [
    refused("metadata.jsonl is missing", "has no metadata.jsonl in it", os.remove),
    refused("metadata.jsonl is a folder", "metadata.jsonl is no file", put_folder),
    refused("metadata.jsonl is a named pipe", "metadata.jsonl is no file", put_pipe),
    refused("metadata.jsonl is a link to nothing", "has no metadata.jsonl in it", put_dead_link),
    refused_bytes("an empty file", "holds no episodes", b""),
    refused_bytes("an empty line", "line 2, is not JSON", replaced(b'{"version"', b'\n{"version"')),
    refused_bytes(
        "a line that breaks off in the middle of the file", "line 2, is not JSON", replaced(b"}\n", b"\n")
    ),
    refused_bytes(
        "two rows in one line", "line 1, is not JSON", as_bytes(good_rows()).replace(b"\n", b"", 1)
    ),
    refused_bytes("bytes that are no UTF-8", "line 2, is not JSON", replaced(b"go", b"g\xff")),
    refused_bytes("zero bytes within a line", "line 2, is not JSON", replaced(b"go", b"\0\0")),
    refused_bytes("UTF-16", "line 1, is not JSON", as_bytes(good_rows()).decode().encode("utf-16")),
    refused_bytes("a picture named metadata.jsonl", "line 1, is not JSON", b"\x89PNG\r\n\x1a\n\x00\xff\n"),
    refused_bytes("lists within lists, 100,000 deep", "line 1, is not JSON", b"[" * 100_000 + b"\n"),
    refused_bytes(
        "a number of 5,000 digits", "line 2, is not JSON", replaced(b'"seed": 5', b'"seed": ' + b"5" * 5000)
    ),
    refused_bytes("a row that is a list", "line 1, lacks 'episode'", b"[1, 2]\n"),
    refused_bytes("a row that is null", "line 1, is not JSON", b"null\n"),
    refused_bytes(
        "another program's dataset", "line 1, lacks 'episode'", b'{"text": "x", "file_name": "x.png"}\n'
    ),
    refused_bytes(
        "half a character (a lone surrogate)",
        "line 2, has a text with half a character in it",
        replaced(b"a 1", b"\\ud800"),
    ),
    refused_field("a newer format", "is of format version 2, this code reads up to 1", version=2),
    refused_field("a version that is a text", "is of format version '1'", version="1"),
]


# ---- fields ----

def without(name):
    """Make a change that removes a field from the second row."""
    return lambda rows: rows[1].pop(name)


def large_rewards(rows):
    """Give both turns of an episode a reward that float32 can just hold."""
    for row in rows[:2]:
        row["reward"] = 3e38


FIELDS = [
    refused_rows("a row without its reward", "line 2, lacks 'reward'", without("reward")),
    refused_rows("a row without its messages", "line 2, lacks 'messages'", without("messages")),
    refused_field("an episode whose name is a number", "has episode=3: it must be a text", episode=3),
    refused_field("a turn that is a text", "has turn='1': it must be a whole number", turn="1"),
    refused_field("a turn that is a fraction", "has turn=1.5: it must be a whole number", turn=1.5),
    refused_field("a turn that is true", "has turn=True: it must be a whole number", turn=True),
    refused_field("valid that is 1", "has valid=1: it must be true or false", valid=1),
    refused_field(
        "terminated that is a text", "has terminated='true': it must be true or false", terminated="true"
    ),
    refused_field("truncated that is null", "has truncated=None: it must be true or false", truncated=None),
    refused_field("success that is a number", "has success=1.0: it must be true or false", success=1.0),
    refused_field("a seed that is a text", "has seed='5': it must be a whole number", seed="5"),
    refused_field("env that is null", "has env=None: it must be a text", env=None),
    refused_field("an action that is a list", "has action=['go']: it must be a text", action=["go"]),
    refused_field("a source that is an object", "has source={}: it must be a text", source={}),
    refused_field("a reward that is a text", "has reward='1': it must be a number", reward="1"),
    refused_field("a reward that is true", "has reward=True: it must be a number", reward=True),
    refused_field("a reward that is null", "has reward=None: it must be a number", reward=None),
    refused_field("a reward of NaN", "has reward=nan: it must be finite", reward=NAN),
    refused_field("a reward of -Infinity", "has reward=-inf: it must be finite", reward=-INFINITY),
    refused_field(
        "a reward beyond float32", "has reward=1e+39: it must be finite, and within float32", reward=1e39
    ),
    refused_field("a reward of 400 digits", "has reward=1000... it must be finite", reward=10**400),
    refused_rows(
        "rewards whose sum is beyond float32",
        "line 2, brings the rewards of its episode beyond float32",
        large_rewards,
    ),
    refused_field("reply_ids that are a text", "has reply_ids='56': it must be a list", reply_ids="56"),
    refused_field("a negative token", "has reply_ids that are no tokens", reply_ids=[5, -1]),
    refused_field("a token that is a fraction", "has reply_ids that are no tokens", reply_ids=[5, 6.0]),
    refused_field("a token that is true", "has reply_ids that are no tokens", reply_ids=[5, True]),
    refused_field(
        "fewer log-probabilities than tokens",
        "has 1 behaviour_logprobs for 2 reply_ids",
        behaviour_logprobs=[-0.5],
    ),
    refused_field(
        "a log-probability of NaN",
        "has behaviour_logprobs that are no finite numbers",
        behaviour_logprobs=[NAN, -1.0],
    ),
    refused_field(
        "a log-probability of -Infinity",
        "has behaviour_logprobs that are no finite numbers",
        behaviour_logprobs=[-INFINITY, -1.0],
    ),
    refused_field(
        "a log-probability that is a text",
        "has behaviour_logprobs that are no finite numbers",
        behaviour_logprobs=["-1", -1.0],
    ),
]


# ---- the order of the rows ----

def swap(i, j):
    """Make a change that swaps two rows."""

    def change(rows):
        rows[i], rows[j] = rows[j], rows[i]

    return change

def set_fields(i, **fields):
    """Make a change that sets fields of one row."""
    return lambda rows: rows[i].update(fields)


ORDER = [
    refused_rows(
        "turns in another order", "line 1, is turn 1 of episode 'a': turn 0 is missing here", swap(0, 1)
    ),
    refused_rows(
        "a turn is missing",
        "line 1, is turn 1 of episode 'a': turn 0 is missing here",
        lambda rows: rows.pop(0),
    ),
    refused_rows(
        "a turn is there twice",
        "line 2, is turn 0 of episode 'a': turn 1 is missing here",
        lambda rows: rows.insert(1, rows[0]),
    ),
    refused_field("a turn is left out", "is turn 7 of episode 'a': turn 1 is missing here", turn=7),
    refused_field("a negative turn", "is turn -1 of episode 'a': turn 0 is missing here", line=1, turn=-1),
    refused_rows(
        "two episodes interleaved",
        "line 2, belongs to episode 'b', before the end of episode 'a'",
        swap(1, 2),
    ),
    refused_rows(
        "an episode is there twice",
        "line 7, belongs to episode 'a', which is over",
        lambda rows: rows.extend(rows[:2]),
    ),
    refused_rows(
        "an episode goes on after its end",
        "line 2, belongs to episode 'a', which is over",
        set_fields(0, terminated=True),
    ),
    refused_rows(
        "an episode without an end",
        "line 3, belongs to episode 'b', before the end of episode 'a'",
        set_fields(1, terminated=False),
    ),
    refused_rows(
        "a turn after a truncated one",
        "line 2, has a reply, but the turn before it was truncated",
        set_fields(0, truncated=True),
    ),
    refused_rows(
        "a truncated episode without its last observation",
        "line 5, belongs to episode 'c', before the end of episode 'b'",
        lambda rows: rows.pop(4),
    ),
    refused_rows(
        "two last observations",
        "line 6, belongs to episode 'b', which is over",
        lambda rows: rows.insert(5, rows[4] | dict(turn=3)),
    ),
    refused_rows(
        "a last observation behind a turn that was not truncated",
        "line 5, has no reply, but the turn before it was not truncated",
        set_fields(3, truncated=False),
    ),
    refused_rows(
        "an episode that is only a last observation",
        "line 1, has no reply",
        lambda rows: rows[0]["messages"].pop(),
    ),
    refused_field(
        "a last observation with a reward",
        "is a last observation without a reply: it can have no reward",
        line=5,
        reward=1.0,
    ),
    refused_field(
        "a last observation that ends the episode again",
        "is a last observation without a reply",
        line=5,
        terminated=True,
    ),
    refused_field(
        "a last observation with tokens",
        "is a last observation without a reply",
        line=5,
        reply_ids=[5],
        behaviour_logprobs=[],
    ),
]


# ---- messages ----

def set_content(content, message=0):
    """Make a change that sets the content of a message."""
    return lambda messages: messages[message].update(content=content)

def text_part(text):
    """Make a part of text."""
    return {"type": "text", "text": text}


MESSAGES = [
    refused_field("messages that are a text", "has messages='hello': it must be a list", messages="hello"),
    refused_field("no messages", "has no message from 'user'", messages=[]),
    refused_field("a message that is a text", "has a message without role and content", messages=["hello"]),
    refused_messages(
        "a message without content",
        "has a message without role and content",
        lambda messages: messages[0].pop("content"),
    ),
    refused_messages(
        "a message with tool calls",
        "has a message without role and content",
        lambda messages: messages[1].update(tool_calls=[]),
    ),
    refused_messages(
        "an unknown role",
        "has message 1 from 'martian' where 'user' must speak",
        lambda messages: messages[0].update(role="martian", content=[text_part("x")]),
    ),
    refused_messages(
        "a role that is a list",
        "has a message that is no list of parts from a role",
        lambda messages: messages[0].update(role=["user"]),
    ),
    refused_messages(
        "the assistant speaks first",
        "has message 1 from 'assistant' where 'user' must speak",
        lambda messages: messages[0].update(role="assistant", content=[text_part("x")]),
    ),
    refused_messages(
        "two questions in a row",
        "has message 2 from 'user' where 'assistant' must speak",
        lambda messages: messages.insert(0, messages[0]),
    ),
    refused_messages(
        "a system message in the middle",
        "has message 2 from 'system' where 'assistant' must speak",
        lambda messages: messages.insert(1, dict(role="system", content=[text_part("x")])),
    ),
    refused_messages(
        "a content that is a text", "has a message that is no list of parts", set_content("hello")
    ),
    refused_messages(
        "a part that is a text",
        "has a part of a message that is neither text nor picture: 'hello'",
        set_content(["hello"]),
    ),
    refused_messages(
        "a part that is a video",
        "has a part of a message that is neither text nor picture",
        set_content([{"type": "video", "text": None}]),
    ),
    refused_messages(
        "a text that is null",
        "has a part of a message that is neither text nor picture",
        set_content([text_part(None)]),
    ),
    refused_messages(
        "a reply without a text", "has a reply that is not one part of text", set_content([], 1)
    ),
    refused_messages(
        "a reply of two parts",
        "has a reply that is not one part of text",
        set_content([text_part("a"), text_part("b")], 1),
    ),
    refused_messages(
        "a picture in a reply",
        "shows a picture in a message that is not the user's",
        set_content([{"type": "image", "text": None}], 1),
    ),
    refused_messages(
        "a reply of a million characters",
        f"has a text of 1,000,000 characters: the limit is {MAX_CHARACTERS:,}",
        set_content([text_part("x" * 10**6)], 1),
    ),
    refused_messages(
        "a prompt of a million characters",
        "has a text of 1,000,000 characters",
        set_content([{"type": "image", "text": None}, text_part("x" * 10**6)]),
    ),
    refused_messages(
        "more pictures named than shown",
        "shows 0 pictures in its messages but names 1",
        set_content([text_part("x")]),
    ),
    refused_field(
        "more pictures shown than named", "shows 1 pictures in its messages but names 0", images_file_names=[]
    ),
    refused_field(
        "a picture whose name is a number",
        "has images_file_names=[3]: it must be a list of names",
        images_file_names=[3],
    ),
]


# ---- pictures ----

def first_picture(file):
    """Return the path of the picture of the first row."""
    return os.path.join(os.path.dirname(file), image_name(picture(0)))

def write_picture(content):
    """Make a damage that replaces the first picture by these bytes."""

    def damage(file):
        with open(first_picture(file), "wb") as f:
            f.write(content)

    return damage

def link_outside(file):
    """Replace the first picture by a link to a picture outside of the folder."""
    path = first_picture(file)
    outside = os.path.join(os.path.dirname(file), "..", "secret.png")
    picture(0).save(outside)
    os.remove(path)
    os.symlink(os.path.abspath(outside), path)

def outside_name(file):
    """Let the first row name a picture outside of the folder."""
    picture(0).save(os.path.join(os.path.dirname(file), "..", "secret.png"))
    rows = good_rows()
    rows[0]["images_file_names"] = ["../secret.png"]
    write_lines(file, rows)

def in_subfolder(case):
    """Let a case work in a subfolder, where it has a neighbourhood of its own."""
    return case._replace(make=lambda folder: case.make(os.path.join(folder, "data")))

def damaged_picture(what, then, damage):
    """Make a case of a picture whose content is wrong: the folder opens, its pictures do not."""

    def make(folder):
        damage(good_folder(folder))
        return Buffer(folder).check_images

    return Case(what, f"metadata.jsonl, line 1, shows images/... which {then}", make)

def png(image, **options):
    """Write a picture as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG", **options)
    return file.getvalue()

def huge_png():
    """Write the header of a PNG file of 16,000 x 16,000 pixels, and nothing else."""
    header = struct.pack(">IIBBBBB", 16_000, 16_000, 8, 2, 0, 0, 0)
    found = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        found += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return found


NOISE = Image.fromarray(np.random.default_rng(0).integers(256, size=(32, 32, 3)).astype(np.uint8))
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"

PICTURES = [
    refused(
        "a picture is missing",
        "line 1, names a picture that is missing or no picture",
        lambda file: os.remove(first_picture(file)),
    ),
    refused(
        "a picture is a named pipe",
        "line 1, names a picture that is missing or no picture",
        lambda file: put_pipe(first_picture(file)),
    ),
    refused_field(
        "a picture is a folder", "names a picture that is missing or no picture", images_file_names=["images"]
    ),
    refused_field(
        "a zero byte in the name of a picture",
        "names a picture that is missing or no picture",
        images_file_names=["images/\0.png"],
    ),
    in_subfolder(
        refused(
            "a picture outside of the folder", "line 1, names a picture outside of its folder", outside_name
        )
    ),
    in_subfolder(
        refused(
            "a link to a picture outside of the folder",
            "line 1, names a picture outside of its folder",
            link_outside,
        )
    ),
    damaged_picture("an empty picture", "is missing or no picture", write_picture(b"")),
    damaged_picture(
        "a picture that is a text", "is missing or no picture", write_picture(b"<html>404</html>")
    ),
    damaged_picture("half a picture", "is missing or no picture", write_picture(png(NOISE)[:700])),
    damaged_picture(
        "a picture with a wrong byte",
        "is missing or no picture",
        write_picture(png(NOISE)[:600] + b"?" + png(NOISE)[601:]),
    ),
    damaged_picture(
        "a picture that would start another program (EPS)",
        "is missing or no picture",
        write_picture(POSTSCRIPT),
    ),
    damaged_picture(
        "a decompression bomb",
        f"has 16,000 x 16,000 pixels, more than the limit of {MAX_PIXELS:,}",
        write_picture(huge_png()),
    ),
]


# ---- what is not written ----

def append_refused(what, then, change):
    """Make a case of rows that are not appended: nothing is written, no picture either."""

    def make(folder):
        good_folder(folder)
        buffer = Buffer(folder)
        rows = [row | dict(episode=row["episode"] + "2") for row in good_rows()]
        change(rows)

        def call():
            before = listing(folder)
            try:
                buffer.append(rows, {image_name(picture(99)): picture(99)})
            finally:
                assert listing(folder) == before
                assert len(buffer) == len(Buffer(folder)) == 6

        return call

    return Case(what, then, make)

def not_a_folder(folder):
    """Start a buffer in a folder whose name is a file's."""
    file = os.path.join(folder, "file")
    with open(file, "w"):
        pass
    return lambda: Buffer(file, create=True)


APPEND = [
    append_refused(
        "a reward of NaN is appended",
        "episode 'a2', turn 0, has reward=nan: it must be finite",
        set_fields(0, reward=NAN),
    ),
    append_refused(
        "a reward of infinity is appended",
        "episode 'b2', turn 1, has reward=inf: it must be finite",
        set_fields(3, reward=INFINITY),
    ),
    append_refused(
        "an episode without an end is appended",
        "takes whole episodes: 'c2' has no end",
        set_fields(5, terminated=False),
    ),
    append_refused(
        "an episode whose name is taken is appended",
        "holds an episode 'a' already",
        set_fields(0, episode="a"),
    ),
    Case("a new folder of episodes whose name is a file's", "cannot be a folder of episodes", not_a_folder),
]


# ---- what is neutral ----

@functools.cache
def tiny_vlm():
    """Load the shipped tiny VLM, once."""
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
    return model.VLM(*model.load_model(os.path.join(root, "bases", "tiny-vlm")))

def neutral(what, then, content, check):
    """Make a case of a file of bytes that is accepted; check(buffer) verifies what it means."""

    def make(folder):
        with open(good_folder(folder), "wb") as f:
            f.write(content)

        def call():
            check(open_only(folder))
            return then

        return call

    return Case(what, then, make)

def changed(change):
    """Write the good rows as bytes, after a change."""
    rows = good_rows()
    change(rows)
    return as_bytes(rows)

def equal_rows(buffer):
    """Assert that a buffer holds the good rows."""
    assert buffer.rows == good_rows()

def two_turns():
    """Make the rows of one more episode, whose pictures are there already."""
    return [row | dict(episode="d") for row in good_rows()[:2]]

def first_rows(n):
    """Make a check: the buffer holds the first n good rows."""

    def check(buffer):
        assert buffer.rows == good_rows()[:n]
        # an append cuts off the rest
        buffer.append(two_turns(), {})
        assert len(Buffer(buffer.folder)) == n + 2

    return check

def reply_tokens(buffer, line=1):
    """Encode the row of a line -> its tokens, those of its action."""
    batch = make_batch([(buffer, [[line - 1]])], tiny_vlm(), MARKER, 0.9)
    ids = batch["reply_ids"][0][batch["mask"][0] > 0].tolist()
    span = batch["span"][0][batch["mask"][0] > 0].tolist()
    return ids, [token for token, inside in zip(ids, span) if inside]

def encoded_anew(buffer):
    """Assert that the reply of the first row is encoded from its text."""
    vlm = tiny_vlm()
    ids, action = reply_tokens(buffer)
    assert ids == vlm.reply_ids(f"{MARKER} go")
    assert vlm.decode(ids) == f"{MARKER} go"
    assert vlm.decode(action) == " go"

def no_special_tokens(buffer):
    """Assert that a reply has one special token, its last, and that its text and its action are right."""
    vlm = tiny_vlm()
    for token in ("<image>", "<|pad|>", "<|end|>"):
        text = f"{token} {MARKER} go{token}"
        assert reply_text(buffer.rows[0]) == f"<image><|pad|><|end|> {MARKER} go"
        ids = vlm.reply_ids(text)
        assert vlm.banned_ids.isdisjoint(ids)
        assert ids.index(vlm.eos) == len(ids) - 1
    ids, action = reply_tokens(buffer)
    assert vlm.banned_ids.isdisjoint(ids)
    assert vlm.decode(action) == " go"

def set_reply(text, **fields):
    """Make a change that sets the reply of the first row."""

    def change(rows):
        rows[0]["messages"][1]["content"] = [text_part(text)]
        rows[0] |= fields

    return change

def only_required(rows):
    """Remove the fields that a row may lack."""
    for row in rows:
        for name in ("version", "env", "seed", "behaviour_logprobs", "source", "action"):
            row.pop(name)

def no_last_observation(buffer):
    """Assert that the first episode has ended with its last turn."""
    assert buffer.rows[1]["terminated"]
    assert len(buffer.episodes["a"]) == 2


LINES = as_bytes(good_rows()).splitlines(keepends=True)
FOREIGN = dict(reply_ids=[900_000, 3], behaviour_logprobs=[])
FORGED = dict(reply_ids=[2, 0, 1], behaviour_logprobs=[])

NEUTRAL = [
    neutral("Windows line ends", "the same rows", b"".join(LINES).replace(b"\n", b"\r\n"), equal_rows),
    neutral("a byte order mark", "the same rows", b"\xef\xbb\xbf" + b"".join(LINES), equal_rows),
    neutral(
        "a torn last line", "the last episode is torn ... is left out", b"".join(LINES)[:-9], first_rows(5)
    ),
    neutral(
        "a last episode without its last rows",
        "the last episode is torn ... is left out",
        b"".join(LINES[:4]),
        first_rows(2),
    ),
    neutral(
        "zero bytes at the end, after a power cut",
        "the last episode is torn ... is left out",
        b"".join(LINES[:5]) + b"\0" * 99,
        first_rows(5),
    ),
    neutral("a whole number as a reward", "the same reward", changed(set_fields(1, reward=1)), equal_rows),
    neutral("rows that lack what a row may lack", "they are read", changed(only_required), encoded_anew),
    neutral(
        "terminated and truncated at once",
        "the task ended",
        changed(set_fields(1, truncated=True)),
        no_last_observation,
    ),
    neutral(
        "tokens of another tokenizer",
        "the reply is encoded anew",
        changed(set_reply(f"{MARKER} go", **FOREIGN)),
        encoded_anew,
    ),
    neutral(
        "tokens that no model samples",
        "the reply is encoded anew",
        changed(set_reply(f"{MARKER} go", **FORGED)),
        encoded_anew,
    ),
    neutral(
        "control tokens in a reply",
        "they are neutralised",
        changed(set_reply(f"<image><|pad|><|end|> {MARKER} go")),
        no_special_tokens,
    ),
]


# ---- pictures as a viewer shows them ----

def read_picture(what, then, image, check, **options):
    """Make a case of a picture in another form, written with `options`; check(array) verifies its pixels."""

    def make(folder):
        file = io.BytesIO()
        image.save(file, **dict(format="PNG") | options)
        write_picture(file.getvalue())(good_folder(folder))
        buffer = Buffer(folder)

        def call():
            buffer.check_images()
            check(np.asarray(buffer.image(buffer.rows[0]["images_file_names"][0])).astype(int))
            return then

        return call

    return Case(what, then, make)

def turned():
    """Make the EXIF tag of a picture that a camera took upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif

def red_on_top(pixels):
    """Assert that a picture is 4 x 8, red on top, blue below."""
    assert pixels.shape == (8, 4, 3)
    assert pixels[0, 2].tolist() == [255, 0, 0]
    assert pixels[7, 2].tolist() == [0, 0, 255]

def is_white_and_red(pixels):
    """Assert that the left half of a picture is white, and the right half red."""
    assert (pixels[:, 0] == 255).all()
    assert (pixels[:, -1] == [255, 0, 0]).all()

def has_64_levels(pixels):
    """Assert that a picture has 64 grey levels from 0 to 245."""
    assert len(np.unique(pixels)) == 64
    assert pixels.min() == 0
    assert pixels.max() == 245

def is_red(pixels):
    """Assert that a picture is red."""
    assert (pixels == [255, 0, 0]).all()

def is_grey(pixels):
    """Assert that a picture is a light grey: half of black on white."""
    assert abs(pixels - 127).max() <= 1

def is_noise(pixels):
    """Assert that a picture has the pixels with which it was stored."""
    assert (pixels == np.asarray(NOISE)).all()

def red_and_blue():
    """Make a picture of 8 x 4, red on the left, blue on the right."""
    image = Image.new("RGB", (8, 4), "red")
    image.paste("blue", (4, 0, 8, 4))
    return image

def half_transparent():
    """Make a picture whose left half is transparent black, and whose right half is red."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (4, 0, 8, 4))
    return image


LEVELS = Image.fromarray((np.arange(64) * 1000).astype(np.uint16).reshape(8, 8))
SHOWN = [
    read_picture(
        "a picture that EXIF turns", "as a viewer shows it", red_and_blue(), red_on_top, exif=turned()
    ),
    read_picture("a picture of 16 bits", "its levels scaled to 8 bits", LEVELS, has_64_levels),
    read_picture("transparency", "on white", half_transparent(), is_white_and_red),
    read_picture("grey with transparency", "on white", Image.new("LA", (4, 4), (0, 128)), is_grey),
    read_picture("a palette with transparency", "on white", half_transparent().quantize(4), is_white_and_red),
    read_picture("CMYK", "as RGB", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), is_red, format="TIFF"),
    read_picture(
        "an animation",
        "its first frame",
        Image.new("RGB", (8, 8), "red"),
        is_red,
        format="GIF",
        save_all=True,
        append_images=[Image.new("RGB", (8, 8), "blue")],
    ),
    read_picture("a picture as this program writes it", "the same pixels", NOISE, is_noise),
]

CASES = FILES + FIELDS + ORDER + MESSAGES + PICTURES + APPEND + NEUTRAL + SHOWN
