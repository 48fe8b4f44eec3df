"""
Turn conversations that others recorded into a folder of episodes.

    python -m extras.import_chats chats.json data/chats [folder of the pictures]
    python train.py --data=data/chats --actor_loss=sft

The file is a JSON list, or one JSON object per line. A conversation has the form of LLaVA or of TRL:

    {"image": "1.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...]}
    {"images": ["1.png"], "messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, ...]}

A content may also be a list of {"type": "image"} and {"type": "text", "text": ...}. Each reply becomes a turn
with all messages before it as its prompt. A conversation may have `system`, its first message, and `reward`
and `success`, of its last turn. It is imported whole, or refused by one sentence; then no folder is made.
"""
import contextlib, json, os, reprlib, shutil, sys

import envs
from buffer import Buffer, image_name, make_message_row
from extras.check_rows import check_row_reward, check_roles, check_row
from extras.pictures import PictureError, open_picture

LLAVA_ROLES = {"human": "user", "gpt": "assistant"}
# Fields that change what a model reads or learns, and that have no place in a row.
UNREAD_FIELDS = ("tools", "functions", "tool_calls", "tool_call_id", "function_call", "tool_choice")
UNREAD_FIELDS += ("documents", "video", "videos", "audio", "audios", "image_url", "history", "rewards")
UNREAD_FIELDS += ("prompt", "completion", "chosen", "rejected", "system_prompt", "instruction")
UNREAD_FIELDS += ("reasoning_content", "reasoning", "thinking", "chat_template", "chat_template_kwargs")
UNREAD_FIELDS += ("weight", "loss", "mask")
# Rows and pictures are written when they are this many, or this many pixels.
CHUNK_ROWS = 2000
CHUNK_PIXELS = 2**26


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

def is_given(value):
    """Tell whether a field has a value; some programs write every field, and leave most of them empty."""
    return value not in (None, "", [], {})

def one_of(record, *names):
    """Return the one field among several names that a record has; None if it has none."""
    present = [name for name in names if record.get(name) is not None]
    given = [name for name in present if is_given(record[name])]
    if len(given) > 1:
        raise ValueError(f"has both {given[0]!r} and {given[1]!r}: only one of them can be meant")
    return next((record[name] for name in given or present), None)

def check_fields(record, *more):
    """Refuse a field that would change a prompt or what is learned, and would be dropped here."""
    for name in (*UNREAD_FIELDS, *more):
        if is_given(record.get(name)):
            raise ValueError(f"has {name!r}, which has no place in a folder of episodes: take it out, or "
                             "write it into the messages")

def read_part(part):
    """Turn a part of a TRL message into one of ours."""
    if isinstance(part, dict):
        check_fields(part, "image", "url", "path", "base64", "system")
        if part.get("type") == "image" and part.get("text") in (None, ""):
            return image_part()
        if part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            return text_part(part["text"])
    raise ValueError(f"has a message that is neither text nor picture: {reprlib.repr(part)}")

def read_message(message):
    """Turn a LLaVA or TRL message into one of ours: {"role", "content": list of parts}.

    ValueError says what is wrong with it.
    """
    check_fields(message, "system", "reward", "success", "name", "image", "images")
    sender = one_of(message, "from", "role")
    role = LLAVA_ROLES.get(sender, sender) if isinstance(sender, str) else sender
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"has a message from an unknown role: {reprlib.repr(sender)}")
    content = one_of(message, "content", "value")
    if isinstance(content, str):
        parts = [text_part(content.strip("\n"))]
    elif isinstance(content, list):
        parts = [read_part(part) for part in content]
    else:
        raise ValueError(f"has a message that is neither text nor picture: {reprlib.repr(content)}")
    return dict(role=role, content=ROLE_PARTS[role](parts))

def user_parts(parts):
    """Put pictures where the user's text names them; leave out an empty text."""
    found = []
    for part in parts:
        text = part["text"]
        if text is not None and "<image>" in text:
            found += split_placeholders(text)
        elif text is None or text.strip():
            found.append(part)
    return found

def joined_text(parts):
    """Join the parts of a reply, or of a system message, as one text."""
    if any(part["type"] == "image" for part in parts):
        raise ValueError("has a picture in a message that is not the user's: only the user shows pictures")
    return [text_part("".join(part["text"] for part in parts))]


ROLE_PARTS = dict(user=user_parts, system=joined_text, assistant=joined_text)


# ---- one conversation ----

def count_images(messages):
    """Count the pictures that messages show."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])

def read_messages(chat):
    """Read all messages of a conversation, in an order that chat templates accept."""
    raw_messages = None
    if isinstance(chat, dict):
        raw_messages = one_of(chat, "conversations", "messages")
    if not isinstance(raw_messages, list) or not all(isinstance(message, dict) for message in raw_messages):
        raise ValueError("has neither `conversations` (LLaVA) nor `messages` (TRL)")
    check_fields(chat)
    messages = [read_message(message) for message in raw_messages]
    if is_given(chat.get("system")):
        messages.insert(0, read_message(dict(role="system", content=chat["system"])))
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[1:]:
        raise ValueError("has no reply")
    check_roles(tuple(roles))
    if roles[-1] == "user":
        raise ValueError("ends with a question that has no reply")
    return messages

def read_outcome(chat):
    """Read reward and success of a conversation."""
    reward = chat.get("reward")
    success = chat.get("success")
    if reward is None:
        reward = 0.0
    check_row_reward(reward)
    if not isinstance(success, bool | None):
        raise ValueError(f"has success={reprlib.repr(success)}: it must be true or false")
    return dict(reward=float(reward), success=bool(success), terminated=True)

def chat_rows(chat, name, open_image):
    """Turn one conversation into an episode -> (rows, {name: picture}).

    name: of the episode. open_image(path) -> PIL image. ValueError says what is wrong with the conversation.
    """
    messages = read_messages(chat)
    paths = one_of(chat, "images", "image")
    if not is_given(paths):
        paths = []
    if not isinstance(paths, list):
        paths = [paths]
    images = [open_image(path) for path in paths]
    names = [image_name(image) for image in images]

    # without a placeholder the pictures come first
    if not count_images(messages):
        question = next(message for message in messages if message["role"] == "user")
        question["content"][:0] = [image_part() for _ in images]
    if count_images(messages) != len(images):
        raise ValueError(f"shows {count_images(messages)} pictures in its text but names {len(images)}")

    rows = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        names_so_far = names[: count_images(messages[:i])]
        row = make_message_row(name, len(rows), "chat", 0, names_so_far, messages[: i + 1], source="import")
        reply = message["content"][0]["text"]
        row["action"] = envs.parse_agent(reply) or ""
        row["valid"] = bool(reply.strip())
        rows.append(row)
    rows[-1] |= read_outcome(chat)
    for row in rows:
        check_row(row)
    return rows, dict(zip(names, images))


# ---- a file of conversations ----

def read_chats(file):
    """Read a JSON list, or JSON lines, of conversations.

    SystemExit with one sentence if the file is neither.
    """
    # A named pipe would hang.
    if not os.path.isfile(file):
        raise SystemExit(f"{file!r} is no JSON list and no JSON lines of conversations: it is no file.")
    try:
        # A Windows editor puts a mark before the text.
        with open(file, encoding="utf-8-sig") as f:
            text = f.read()
        if text.lstrip().startswith("["):
            chats = json.loads(text)
        else:
            chats = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{file!r} is no JSON list and no JSON lines of conversations: {error}.")
    if not chats:
        raise SystemExit(f"{file!r} holds no conversations: it is empty.")
    return chats

def remove_empty(folder):
    """Remove a folder unless something is in it."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)

@contextlib.contextmanager
def new_folder(folder):
    """Give a new folder to write into, which gets its name at the end; after an error nothing is left."""
    missing = []
    parent = os.path.dirname(folder)
    while parent and not os.path.lexists(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    aside = f"{folder}.{os.getpid()}.tmp"
    try:
        with contextlib.ExitStack() as undo:
            for parent in reversed(missing):
                os.mkdir(parent)
                undo.callback(remove_empty, parent)
            os.mkdir(aside)
            undo.callback(shutil.rmtree, aside, ignore_errors=True)
            yield aside
            os.rename(aside, folder)
            undo.pop_all()
    except OSError as error:
        raise SystemExit(f"{folder!r} cannot be written: {error.strerror or error}.")

def import_conversations(file, folder, pictures=""):
    """Import a file of conversations into a new folder -> its Buffer.

    Paths of pictures start at `pictures`, or else at the folder of the file. SystemExit with one sentence if
    a conversation does not fit; then no folder is made.
    """
    folder = os.path.normpath(folder)
    if os.path.lexists(folder):
        raise SystemExit(f"{folder!r} exists already: import into a new folder.")
    home = pictures or os.path.dirname(file)

    def open_image(path):
        # `datasets` writes a picture as {"path": ..., "bytes": ...}
        relative = path.get("path") if isinstance(path, dict) else path
        if not isinstance(relative, str):
            raise ValueError(f"names a picture that is no path: {reprlib.repr(path)}")
        try:
            return open_picture(os.path.join(home, relative))
        except PictureError as error:
            raise ValueError(f"names a picture that does not open: {relative!r} {error} (it is looked for in "
                             f"{home or '.'!r}; a third argument names another folder)")

    chats = read_chats(file)
    with new_folder(folder) as aside:
        buffer = Buffer(aside, create=True)
        rows = []
        images = {}
        pixels = 0
        for n, chat in enumerate(chats, 1):
            try:
                new_rows, new_images = chat_rows(chat, f"{os.path.basename(file)}-{n}", open_image)
            except ValueError as error:
                raise SystemExit(f"{file}, conversation {n}, {error}.")
            rows += new_rows
            images |= new_images
            pixels += sum(image.width * image.height for image in new_images.values())
            # Each append waits for the disk, once.
            if len(rows) >= CHUNK_ROWS or pixels >= CHUNK_PIXELS or n == len(chats):
                buffer.append(rows, images, sync=False)
                rows = []
                images = {}
                pixels = 0
        # the pictures, before the folder gets its name
        os.sync()
    return Buffer(folder)

def main(argv):
    """Import what the command line names, and say how to train on it."""
    # a word such as --out=data/chats would become the name of a folder
    is_flag = any(word.startswith("-") for word in argv)
    if is_flag or len(argv) not in (2, 3):
        raise SystemExit("Name the file and the new folder: python -m extras.import_chats chats.json "
                         "data/chats [folder of the pictures]")
    stats = import_conversations(*argv).stats()
    counts = f"{stats['episodes']} conversations, {stats['turns']} replies"
    print(f"{argv[1]}: {counts}; train on them with --data={argv[1]} --actor_loss=sft")


if __name__ == "__main__":
    main(sys.argv[1:])
