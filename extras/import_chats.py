"""
Turn conversations that others recorded into a folder of episodes.

    python -m extras.import_chats chats.json data/chats [folder of the pictures]
    python train.py --data=data/chats --actor_loss=sft

The file is a JSON list, or one JSON object per line. A conversation has the form of LLaVA or of TRL:

    {"image": "1.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...]}
    {"images": ["1.png"], "messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, ...]}

A content may also be a list of {"type": "image"} and {"type": "text", "text": ...}. Each reply becomes a turn
with all messages before it as its prompt. A conversation may have `reward` and `success`, of its last turn.
"""
import json, os, shutil, sys

from PIL import Image

import envs
from buffer import Buffer, image_name, make_message_row

LLAVA_ROLES = {"human": "user", "gpt": "assistant"}


# ---- one message ----

def image_part():
    """Make the placeholder of a picture, as a row stores it."""
    return {"type": "image", "text": None}

def text_part(text):
    """Make a part of text, as a row stores it."""
    return {"type": "text", "text": text}

def split_placeholders(text):
    """Turn the text of a question into parts: <image> stands for the next picture."""
    parts = []
    for k, piece in enumerate(text.split("<image>")):
        if k > 0:
            parts.append(image_part())
        if piece.strip():
            parts.append(text_part(piece.strip("\n")))
    return parts

def is_part(part):
    """Tell whether this is a picture or a text, as TRL writes them."""
    if not isinstance(part, dict):
        return False
    return part.get("type") == "image" or isinstance(part.get("text"), str)

def read_message(message):
    """Turn a LLaVA or TRL message into one of ours: {"role", "content": list of parts}.

    ValueError says what is wrong with it.
    """
    sender = message.get("from")
    role = message.get("role", LLAVA_ROLES.get(sender, sender))
    content = message.get("content", message.get("value"))
    if isinstance(content, str) and role == "user":
        content = split_placeholders(content)
    elif isinstance(content, str):
        content = [text_part(content.strip("\n"))] if content.strip() else []
    is_known = role in ("system", "user", "assistant")
    if not is_known or not isinstance(content, list) or not all(map(is_part, content)):
        start = json.dumps(message)[:80]
        raise ValueError(f"has a message that is neither text nor picture, or from an unknown role: {start}")
    parts = []
    for part in content:
        is_image = part.get("type") == "image"
        parts.append(image_part() if is_image else text_part(part["text"]))
    return dict(role=role, content=parts)


# ---- one conversation ----

def count_images(messages):
    """Count the pictures that messages show."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])

def chat_rows(chat, name, open_image):
    """Turn one conversation into an episode -> (rows, {name: picture}).

    name: of the episode. open_image(path) -> PIL image. ValueError says what is wrong with the conversation.
    """
    raw_messages = None
    if isinstance(chat, dict):
        raw_messages = chat.get("conversations") or chat.get("messages")
    if not isinstance(raw_messages, list) or not all(isinstance(message, dict) for message in raw_messages):
        raise ValueError("has neither `conversations` (LLaVA) nor `messages` (TRL)")

    paths = chat.get("images") or chat.get("image") or []
    if not isinstance(paths, list):
        paths = [paths]
    images = [open_image(path) for path in paths]
    names = [image_name(image) for image in images]
    messages = [read_message(message) for message in raw_messages]

    # without a placeholder the pictures come first
    if messages and not count_images(messages):
        messages[0]["content"][:0] = [image_part() for _ in images]
    if count_images(messages) != len(images):
        raise ValueError(f"shows {count_images(messages)} pictures in its text but names {len(images)}")

    replies = []
    for i, message in enumerate(messages):
        if i > 0 and message["role"] == "assistant" and message["content"]:
            replies.append(i)
    if not replies:
        raise ValueError("has no reply")

    rows = []
    for turn, i in enumerate(replies):
        names_so_far = names[: count_images(messages[:i])]
        row = make_message_row(name, turn, "chat", 0, names_so_far, messages[: i + 1], source="import")
        row["action"] = envs.parse_agent(messages[i]["content"][0]["text"]) or ""
        rows.append(row)
    rows[-1]["terminated"] = True
    rows[-1]["reward"] = float(chat.get("reward") or 0.0)
    rows[-1]["success"] = bool(chat.get("success"))
    return rows, dict(zip(names, images))


# ---- a file of conversations ----

def read_chats(file):
    """Read a JSON list, or JSON lines, of conversations.

    SystemExit with one sentence if the file is neither.
    """
    try:
        with open(file, encoding="utf-8") as f:
            text = f.read()
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{file!r} is no JSON list and no JSON lines of conversations: {error}.")

def import_conversations(file, folder, pictures=""):
    """Import a file of conversations into a new folder -> its Buffer.

    Paths of pictures start at `pictures`, or else at the folder of the file. SystemExit with one sentence if
    a conversation does not fit; then no folder is made.
    """
    if os.path.exists(folder):
        raise SystemExit(f"{folder!r} exists already: import into a new folder.")
    home = pictures or os.path.dirname(file)

    def open_image(path):
        # `datasets` writes a picture as {"path": ..., "bytes": ...}
        relative = path.get("path") if isinstance(path, dict) else path
        try:
            with Image.open(os.path.join(home, relative)) as image:
                return image.convert("RGB")
        except (OSError, TypeError):
            raise ValueError(f"names a picture that does not open: {path!r}; give the folder where its path "
                             "starts as the third argument")

    chats = read_chats(file)
    # built aside and renamed: a conversation that does not fit leaves nothing behind
    shutil.rmtree(folder + ".tmp", ignore_errors=True)
    buffer = Buffer(folder + ".tmp", create=True)
    for n, chat in enumerate(chats, 1):
        try:
            rows, images = chat_rows(chat, f"{os.path.basename(file)}-{n}", open_image)
            buffer.append(rows, images)
        except ValueError as error:
            raise SystemExit(f"{file}, conversation {n}, {error}.")
    os.rename(folder + ".tmp", folder)
    return Buffer(folder)

def main(argv):
    """Import what the command line names, and say how to train on it."""
    if len(argv) not in (2, 3):
        raise SystemExit("Name the file and the new folder: python -m extras.import_chats chats.json "
                         "data/chats [folder of the pictures]")
    stats = import_conversations(*argv).stats()
    counts = f"{stats['episodes']} conversations, {stats['turns']} replies"
    print(f"{argv[1]}: {counts}; train on them with --data={argv[1]} --actor_loss=sft")


if __name__ == "__main__":
    main(sys.argv[1:])
