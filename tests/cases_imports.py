"""
Conversations to import that are damaged, foreign or odd: what the user reads, or what they become.

The cases are run by tests/test_failures.py, see tests/failure_cases.py.
"""
import errno, json, os

import numpy as np
import pytest
from PIL import Image

from buffer import reply_text
from cases_data import LEVELS, has_64_levels, huge_png, listing, put_pipe, red_and_blue, red_on_top, turned
from cases_data import reply_tokens, tiny_vlm
from extras.import_chats import import_conversations
from failure_cases import Case

QUESTION = {"role": "user", "content": "Which way?"}
REPLY = {"role": "assistant", "content": "[action] +"}
SYSTEM = {"role": "system", "content": "You play cards."}
NUMBERED = {"type": "text", "text": "Which way?"}
MANY = 8000

def message(role, content):
    """Make a message as TRL writes it."""
    return {"role": role, "content": content}

def chat(*messages, **fields):
    """Make a conversation as TRL writes it: a question and a reply, unless messages are given."""
    return dict(messages=list(messages or (QUESTION, REPLY))) | fields

def write_input(folder, chats):
    """Write conversations, or bytes, beside a picture red.png -> name of the file."""
    Image.new("RGB", (8, 8), "red").save(os.path.join(folder, "red.png"))
    content = chats if isinstance(chats, bytes) else json.dumps(chats).encode()
    file = os.path.join(folder, "chats.json")
    with open(file, "wb") as f:
        f.write(content)
    return file

def import_or_leave_nothing(file, target):
    """Import a file; after a refusal all files and folders are as they were."""
    folder = os.path.dirname(file)
    before = listing(folder)
    try:
        return import_conversations(file, target)
    except SystemExit:
        assert listing(folder) == before
        raise

def refused(what, then, chats, prepare=None, target="new/out"):
    """Make a case of conversations that are refused; prepare(folder) adds what else there is."""

    def make(folder):
        file = write_input(folder, chats)
        if prepare:
            prepare(folder)
        return lambda: import_or_leave_nothing(file, os.path.join(folder, target))

    return Case(what, then, make)

def refused_chat(what, then, *messages, **fields):
    """Make a case of one conversation that is refused, behind one that is fine."""
    chats = [chat(), chat(*messages, **fields)]
    return refused(what, f"chats.json, conversation 2, {then}", chats)

def accepted(what, then, chats, check, prepare=None):
    """Make a case of conversations that are imported; check(buffer) verifies what they become."""

    def make(folder):
        file = write_input(folder, chats)
        if prepare:
            prepare(folder)

        def call():
            check(import_conversations(file, os.path.join(folder, "out")))
            assert not [path for path in listing(folder) if ".tmp" in path]
            return then

        return call

    return Case(what, then, make)


# ---- files and folders ----

def put_pipe_there(folder):
    """Put a named pipe in the place of the file."""
    put_pipe(os.path.join(folder, "chats.json"))

def make_target(folder):
    """Make the folder that is to be written."""
    os.makedirs(os.path.join(folder, "new", "out"))

def make_link(folder):
    """Make a link to nothing where the folder is to be written."""
    os.symlink("nowhere", os.path.join(folder, "out"))

def full_disk(folder):
    """Make a case's function: the disk is full as soon as the second picture is written."""
    Image.new("RGB", (8, 8), "blue").save(os.path.join(folder, "blue.png"))
    file = write_input(folder, [chat(image="red.png"), chat(image="blue.png")])
    real = os.replace

    def replace(source, target):
        if len(os.listdir(os.path.dirname(target))) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    def call():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", replace)
            import_or_leave_nothing(file, os.path.join(folder, "new", "out"))

    return call


FILES = [
    refused("a file that is empty", "chats.json' holds no conversations", b""),
    refused("a list that is empty", "chats.json' holds no conversations", []),
    refused("a file that is no JSON", "is no JSON list and no JSON lines of conversations", b"hello\n"),
    refused("a file that is no UTF-8", "is no JSON list and no JSON lines", b'[{"messages": "\xff"}]'),
    refused("lists within lists, 100,000 deep", "is no JSON list and no JSON lines", b"[" * 100_000),
    refused("a file that is a named pipe", "is no JSON list and no JSON lines", [], put_pipe_there),
    refused("a new folder that exists", "new/out' exists already", [chat()], make_target),
    refused("a new folder whose name is a link's", "out' exists already", [chat()], make_link, "out"),
    refused(
        "a new folder within a file", "cannot be written: Not a directory", [chat()], None, "red.png/out"
    ),
    Case("the disk is full", "new/out' cannot be written: No space left on device", full_disk),
]


# ---- conversations ----

def huge_picture(folder):
    """Write a picture of 16,000 x 16,000 pixels."""
    with open(os.path.join(folder, "huge.png"), "wb") as f:
        f.write(huge_png())


CHATS = [
    refused_chat(
        "a picture that is missing", "names a picture that does not open: 'gone.png'", image="gone.png"
    ),
    refused_chat("a picture that is a number", "names a picture that is no path: 3", image=3),
    refused(
        "a decompression bomb",
        "conversation 1, names a picture that does not open: 'huge.png' has 16,000 x 16,000 pixels",
        [chat(image="huge.png")],
        huge_picture,
    ),
    refused_chat(
        "more pictures named than shown",
        "shows 1 pictures in its text but names 2",
        message("user", "<image>"),
        REPLY,
        images=["red.png", "red.png"],
    ),
    refused_chat(
        "`image` and `images`", "has both 'images' and 'image'", image="red.png", images=["red.png"]
    ),
    refused_chat(
        "a picture in a reply",
        "has a picture in a message that is not the user's",
        QUESTION,
        message("assistant", [{"type": "image"}, NUMBERED]),
        image="red.png",
    ),
    refused_chat(
        "a picture within a message",
        "has 'image', which has no place in a folder of episodes",
        message("user", [{"type": "image", "image": "red.png"}, NUMBERED]),
        REPLY,
    ),
    refused_chat(
        "a part that is a video",
        "has a message that is neither text nor picture",
        message("user", [{"type": "video"}]),
        REPLY,
    ),
    refused_chat(
        "a content that is null",
        "has a message that is neither text nor picture: None",
        message("user", None),
        REPLY,
    ),
    refused_chat(
        "an unknown role", "has a message from an unknown role: 'tool'", message("tool", "x"), REPLY
    ),
    refused_chat("no reply", "has no reply", QUESTION),
    refused_chat(
        "a last question without a reply", "ends with a question that has no reply", QUESTION, REPLY, QUESTION
    ),
    refused_chat(
        "the assistant speaks first",
        "has message 1 from 'assistant' where 'user' must speak",
        REPLY,
        QUESTION,
        REPLY,
    ),
    refused_chat(
        "two questions in a row",
        "has message 2 from 'user' where 'assistant' must speak",
        QUESTION,
        QUESTION,
        REPLY,
    ),
    refused_chat(
        "two replies in a row",
        "has message 3 from 'assistant' where 'user' must speak",
        QUESTION,
        REPLY,
        REPLY,
    ),
    refused_chat(
        "a system message in the middle",
        "has message 3 from 'system' where 'user' must speak",
        QUESTION,
        REPLY,
        SYSTEM,
        QUESTION,
        REPLY,
    ),
    refused_chat(
        "two system messages",
        "has message 2 from 'system' where 'user' must speak",
        SYSTEM,
        QUESTION,
        REPLY,
        system="Be brief.",
    ),
    refused_chat("a reward that is a text", "has reward='1': it must be a number", reward="1"),
    refused_chat("a reward that is true", "has reward=True: it must be a number", reward=True),
    refused_chat("a reward of NaN", "has reward=nan: it must be finite", reward=float("nan")),
    refused_chat("a reward beyond float32", "has reward=1e+39: it must be finite", reward=1e39),
    refused_chat("success that is a text", "has success='false': it must be true or false", success="false"),
    refused_chat("success that is a number", "has success=1: it must be true or false", success=1),
    refused_chat("a reward for each turn", "has 'rewards', which has no place", rewards=[1.0]),
    refused_chat(
        "a reward in a message", "has 'reward', which has no place", QUESTION, REPLY | dict(reward=1.0)
    ),
    refused_chat("tools", "has 'tools', which has no place in a folder of episodes", tools=[{"name": "f"}]),
    refused_chat("functions", "has 'functions', which has no place", functions=[{"name": "f"}]),
    refused_chat(
        "tool calls in a message",
        "has 'tool_calls', which has no place",
        QUESTION,
        REPLY | dict(tool_calls=[{"name": "f"}]),
    ),
    refused_chat(
        "reasoning beside a reply",
        "has 'reasoning_content', which has no place",
        QUESTION,
        REPLY | dict(reasoning_content="It is left."),
    ),
    refused_chat("`from` and `role`", "has both 'from' and 'role'", QUESTION | {"from": "human"}, REPLY),
    refused_chat(
        "a reply of a million characters",
        "has a text of 1,000,000 characters",
        QUESTION,
        message("assistant", "x" * 10**6),
    ),
    refused_chat(
        "half a character (a lone surrogate)",
        "has a text with half a character in it",
        QUESTION,
        message("assistant", "\ud800"),
    ),
    refused("a conversation that is a number", "conversation 2, has neither", [chat(), 3]),
]


# ---- what is right ----


def texts(row):
    """Return the roles and texts of a row's messages, a picture as None."""
    found = []
    for spoken in row["messages"]:
        found.append((spoken["role"], [part["text"] for part in spoken["content"]]))
    return found


def is_plain(buffer):
    """Assert that a buffer holds one question and its reply."""
    assert [texts(row) for row in buffer.rows] == [[("user", ["Which way?"]), ("assistant", ["[action] +"])]]


def is_joined(buffer):
    """Assert that a reply is whole, and its action found."""
    assert [reply_text(row) for row in buffer.rows] == ["It is red. [action] +"]
    assert buffer.rows[0]["action"] == "+"


def is_empty_turn(buffer):
    """Assert that the second turn has an empty reply, is invalid, and has the reward."""
    first, second = buffer.rows
    assert [reply_text(row) for row in buffer.rows] == ["[action] +", ""]
    assert (first["valid"], first["reward"]) == (True, 0.0)
    assert (second["valid"], second["reward"], second["terminated"]) == (False, -1.0, True)


def has_system_first(buffer):
    """Assert that the system speaks first, and that the user shows the picture."""
    question = ("user", [None, "Which way?"])
    assert texts(buffer.rows[0]) == [("system", ["You play cards."]), question, ("assistant", ["[action] +"])]
    prompt = tiny_vlm().render(buffer.rows[0]["messages"])
    assert prompt.index("You play cards.") < prompt.index("<image>") < prompt.index("Which way?")


def is_neutralised(buffer):
    """Assert that the replies keep their texts, and that their tokens are plain ones."""
    vlm = tiny_vlm()
    for i, token in enumerate(["<image>", "<|pad|>", "<|end|>"]):
        assert reply_text(buffer.rows[i]) == f"{token} [action] +"
        ids, action = reply_tokens(buffer, i + 1)
        assert vlm.banned_ids.isdisjoint(ids)
        assert ids.index(vlm.eos) == len(ids) - 1
        assert vlm.decode(action) == " +"


def first_pixels(buffer):
    """Return the pixels of the first row's picture."""
    return np.asarray(buffer.image(buffer.rows[0]["images_file_names"][0])).astype(int)


def odd_pictures(folder):
    """Write a picture that EXIF turns, and one of 16 bits."""
    red_and_blue().save(os.path.join(folder, "turned.png"), exif=turned())
    LEVELS.save(os.path.join(folder, "grey.png"))


def are_many(buffer):
    """Assert that all conversations are there, in their order."""
    assert [reply_text(row) for row in buffer.rows] == [f"[action] {n}" for n in range(MANY)]


def many():
    """Make many conversations without pictures."""
    return [chat(QUESTION, message("assistant", f"[action] {n}")) for n in range(MANY)]


def count_syncs(folder):
    """Make a case's function: many conversations wait for the disk a few times, not once each."""
    file = write_input(folder, many())
    syncs = []

    def call():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", syncs.append)
            are_many(import_conversations(file, os.path.join(folder, "out")))
        assert 1 <= len(syncs) <= 8
        return "they wait for the disk a few times"

    return call


def nothing_was_deleted(folder):
    """Make a case's function: a folder of a similar name is left alone."""
    other = os.path.join(folder, "out.tmp")
    os.mkdir(other)
    with open(os.path.join(other, "thesis.txt"), "w"):
        pass
    file = write_input(folder, [chat()])

    def call():
        import_conversations(file, os.path.join(folder, "out"))
        assert os.listdir(other) == ["thesis.txt"]
        return "it is left alone"

    return call


PARTS = [{"type": "text", "text": "It is red. "}, {"type": "text", "text": "[action] +"}]
TWO_TURNS = [QUESTION, REPLY, QUESTION, message("assistant", "")]
ONE = json.dumps(chat()).encode()
FORGED = [
    chat(QUESTION, message("assistant", f"{token} [action] +")) for token in ("<image>", "<|pad|>", "<|end|>")
]
UNREAD = dict(id=7, model="m", tools=None, functions=[], system="", rewards=None, image="", images=[])
RIGHT = [
    accepted("a byte order mark", "imported", b"\xef\xbb\xbf[" + ONE + b"]", is_plain),
    accepted("Windows line ends and empty lines", "imported", b"\r\n" + ONE + b"\r\n\r\n", is_plain),
    accepted("fields that are empty or say nothing to a model", "left out", [chat(**UNREAD)], is_plain),
    accepted("a reply of two parts", "one reply", [chat(QUESTION, message("assistant", PARTS))], is_joined),
    accepted(
        "an empty last reply", "an invalid turn with the reward", [chat(*TWO_TURNS, reward=-1)], is_empty_turn
    ),
    accepted(
        "a system message first, a picture without a placeholder",
        "the picture is the user's",
        [chat(SYSTEM, QUESTION, REPLY, images=["red.png"])],
        has_system_first,
    ),
    accepted(
        "LLaVA's `system`",
        "the first message",
        [chat(system="You play cards.", image="red.png")],
        has_system_first,
    ),
    accepted("control tokens in a reply", "neutralised when it is encoded", FORGED, is_neutralised),
    accepted(
        "a picture that EXIF turns",
        "as a viewer shows it",
        [chat(image="turned.png")],
        lambda buffer: red_on_top(first_pixels(buffer)),
        odd_pictures,
    ),
    accepted(
        "a picture of 16 bits",
        "its levels scaled to 8 bits",
        [chat(image="grey.png")],
        lambda buffer: has_64_levels(first_pixels(buffer)),
        odd_pictures,
    ),
    Case("8,000 conversations", "they wait for the disk a few times", count_syncs),
    Case("a folder named like the new one with .tmp", "it is left alone", nothing_was_deleted),
]

CASES = FILES + CHATS + RIGHT
