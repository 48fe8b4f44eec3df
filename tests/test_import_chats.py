"""
Test conversations that others recorded: imported whole, or refused by one sentence.

    python -m pytest tests/test_import_chats.py
"""
import json

import pytest
from PIL import Image

import model
from buffer import KEYS, Buffer, image_name, make_batch, reply_text
from extras.import_chats import import_conversations, main

MARKER = "[action]"
IMAGE = {"type": "image", "text": None}

def picture(n):
    """Make a small picture that differs for each n."""
    return Image.new("RGB", (8, 8), (n, 7, 0))

def text(content):
    """Make a part of text."""
    return {"type": "text", "text": content}

def ask(content):
    """Make a question as LLaVA writes it."""
    return {"from": "human", "value": content}

def say(content):
    """Make a reply as LLaVA writes it."""
    return {"from": "gpt", "value": content}

def turn(role, content):
    """Make a message as TRL writes it."""
    return {"role": role, "content": content}

@pytest.fixture
def chats(tmp_path):
    """write(rows) -> path of a file beside pictures 0.png .. 3.png; a list as JSON, a tuple as JSON lines."""
    (tmp_path / "pics").mkdir()
    for n in range(4):
        picture(n).save(tmp_path / "pics" / f"{n}.png")

    def write(rows):
        content = json.dumps(rows)
        if isinstance(rows, tuple):
            content = "\n".join(map(json.dumps, rows))
        file = tmp_path / "chats.json"
        file.write_text(content)
        return str(file)

    return write

@pytest.fixture
def imported(chats, tmp_path):
    """imported(rows, [folder of the pictures]) -> the buffer that they become."""

    def load(rows, *pictures):
        return import_conversations(chats(rows), str(tmp_path / "out"), *pictures)

    return load

def test_llava_conversations_become_episodes(imported, tmp_path):
    """A reply is a turn with all before it in its prompt; the pictures are those shown so far."""
    chat = [ask("<image>\nWhat is it?"), say(f"A line. {MARKER} +"), ask("Sure?"), say("Yes.")]
    comparison = [ask("Compare <image> and <image>."), say("No.")]
    buf = imported(
        [
            dict(id="x", image="pics/1.png", conversations=chat),
            dict(image=["pics/2.png", "pics/3.png"], conversations=comparison),
            dict(conversations=[ask("Hello"), say("Hi")]),
        ]
    )
    assert [len(rows) for rows in buf.episodes.values()] == [2, 1, 1]
    assert buf.rows == Buffer(str(tmp_path / "out")).rows
    one, two, three, four = buf.rows
    assert set(KEYS) <= set(one)
    assert not one["terminated"]
    assert two["terminated"]
    assert [reply_text(row) for row in buf.rows] == [f"A line. {MARKER} +", "Yes.", "No.", "Hi"]
    assert [row["action"] for row in buf.rows] == ["+", "", "", ""]
    assert one["messages"][0]["content"] == [IMAGE, text("What is it?")]
    assert two["messages"][:2] == one["messages"]
    assert one["images_file_names"] == [image_name(picture(1))]
    assert two["images_file_names"] == one["images_file_names"]
    kinds = [part["type"] for part in three["messages"][0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert four["images_file_names"] == []
    second = buf.image(three["images_file_names"][1])
    assert second.tobytes() == picture(3).tobytes()

def test_trl_rows_become_episodes(imported, tmp_path):
    """Contents are parts or text, pictures paths or what `datasets` writes, rewards optional."""
    parts = [turn("system", "Be brief."), turn("user", [{"type": "image"}, text("Where?")])]
    parts.append(turn("assistant", [text("Here.")]))
    plain = [turn("user", "Where?"), turn("assistant", "There.")]
    as_datasets_does = [{"path": "1.png", "bytes": None}]
    buf = imported(
        (
            dict(images=["0.png"], messages=parts, reward=2, success=True),
            dict(images=as_datasets_does, messages=plain),
        ),
        str(tmp_path / "pics"),
    )
    one, two = buf.rows
    assert [message["role"] for message in one["messages"]] == ["system", "user", "assistant"]
    assert one["reward"] == 2.0
    assert one["success"] is True
    # without a placeholder the picture comes first
    assert two["messages"][0]["content"] == [IMAGE, text("Where?")]
    assert two["reward"] == 0.0

def test_imported_conversations_train(imported):
    """The tiny VLM takes them: an earlier answer is part of the prompt, a reply of the row itself is not."""
    chat = [ask("<image>\nWhat?"), say("first"), ask("Again?"), say("second")]
    buf = imported([dict(image="pics/1.png", conversations=chat)])
    vlm = model.VLM(*model.load_model("bases/tiny-vlm"))
    prompt = vlm.render(buf.rows[1]["messages"])
    assert all(word in prompt for word in ("What?", "first", "Again?"))
    assert "second" not in prompt
    batch = make_batch([(buf, [[0, 1]])], vlm, MARKER, 0.9)
    lengths = [len(vlm.reply_ids(reply)) for reply in ("first", "second")]
    assert batch["mask"].sum(1).tolist() == lengths
    image_token = vlm.tokenizer.convert_tokens_to_ids("<image>")
    is_image = batch["inputs"]["input_ids"] == image_token
    assert is_image.sum(1).tolist() == [25, 25]

def test_the_command_says_how_to_train(chats, tmp_path, capsys):
    folder = str(tmp_path / "out")
    main([chats([dict(conversations=[ask("a"), say("b"), ask("c"), say("d")])]), folder])
    printed = capsys.readouterr().out
    assert f"{folder}: 1 conversations, 2 replies" in printed
    assert f"--data={folder} --actor_loss=sft" in printed
    with pytest.raises(SystemExit, match="Name the file and the new folder"):
        main(["chats.json"])
    # it became the name of a folder
    with pytest.raises(SystemExit, match="Name the file and the new folder"):
        main(["chats.json", f"--out={folder}"])


REFUSED = [
    ([{"a": 1}], "conversation 1, has neither"),
    ([3], "has neither"),
    ([dict(conversations=[ask("x")])], "no reply"),
    ([dict(conversations=[say("x")])], "no reply"),
    (
        [dict(image="gone.png", conversations=[ask("<image>"), say("x")])],
        "does not open: 'gone.png'",
    ),
    (
        [dict(image="pics/0.png", conversations=[ask("<image><image>"), say("x")])],
        "shows 2 pictures",
    ),
    (
        [dict(conversations=[{"from": "martian", "value": "x"}, say("x")])],
        "unknown role",
    ),
    (
        [dict(messages=[turn("user", [3]), turn("assistant", "x")])],
        "neither text nor picture",
    ),
    (
        [dict(conversations=[ask("a"), say("b")]), dict(conversations=[ask(None), say("b")])],
        "conversation 2,",
    ),
]

def refusal(call):
    """Call what must end with one sentence, and return it."""
    with pytest.raises(SystemExit) as error:
        call()
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence

@pytest.mark.parametrize("rows, words", REFUSED)
def test_foreign_conversations_are_one_sentence(imported, tmp_path, rows, words):
    assert words in refusal(lambda: imported(rows))
    assert not (tmp_path / "out").exists()

def test_an_import_never_mixes_with_other_files(chats, tmp_path):
    """A folder that exists is refused, and so is a file that holds no conversations."""
    file = chats([dict(conversations=[ask("a"), say("b")])])
    pictures = tmp_path / "pics"
    new = str(tmp_path / "new")
    assert "exists already" in refusal(lambda: import_conversations(file, str(pictures)))
    for bad in (tmp_path / "missing", pictures / "0.png"):
        assert "no JSON" in refusal(lambda: import_conversations(str(bad), new))
