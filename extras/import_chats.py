"""
Conversations that others recorded become a folder of episodes.

    python -m extras.import_chats chats.json data/chats [pictures]
"""
import json, os, shutil, sys

from PIL import Image

import envs
from buffer import Buffer, image_name, make_message_row


def chat_rows(chat, name, picture):
    """One conversation -> (rows, images), an episode whose turns have read all before them. `chat`: LLaVA's {image, conversations: [{from, value}]} or
    TRL's {images, messages: [{role, content}]}; `reward` and `success`, where given, are its last turn's. picture(path) opens one. ValueError says what is wrong."""
    said = chat.get("conversations") or chat.get("messages") if isinstance(chat, dict) else None
    if not isinstance(said, list) or not all(isinstance(m, dict) for m in said):
        raise ValueError("has neither `conversations` (LLaVA) nor `messages` (TRL)")
    paths = chat.get("images") or chat.get("image") or []
    images = [picture(path) for path in (paths if isinstance(paths, list) else [paths])]
    names, messages = [image_name(image) for image in images], []
    for m in said:
        role, content = m.get("role", {"human": "user", "gpt": "assistant"}.get(m.get("from"), m.get("from"))), m.get("content", m.get("value"))
        if isinstance(content, str):                        # in a question, <image> stands for the next picture
            pieces = content.split("<image>") if role == "user" else [content]
            content = [part for k, piece in enumerate(pieces) for part in [{"type": "image"}] * (k > 0) + [{"type": "text", "text": piece.strip("\n")}] * bool(piece.strip())]
        if role not in ("system", "user", "assistant") or not isinstance(content, list) or not all(isinstance(p, dict) and (p.get("type") == "image" or isinstance(p.get("text"), str)) for p in content):
            raise ValueError(f"has a message that is neither text nor picture, by nobody known: {json.dumps(m)[:80]}")
        messages.append(dict(role=role, content=[{"type": "image", "text": None} if p.get("type") == "image" else {"type": "text", "text": p["text"]} for p in content]))
    shown = lambda ms: sum(part["type"] == "image" for m in ms for part in m["content"])
    if messages and not shown(messages):                    # no placeholder: the pictures come first
        messages[0]["content"][:0] = [{"type": "image", "text": None} for _ in images]
    if shown(messages) != len(images):
        raise ValueError(f"shows {shown(messages)} pictures in its text but names {len(images)}")
    replies = [i for i, m in enumerate(messages) if i and m["role"] == "assistant" and m["content"]]
    if not replies:
        raise ValueError("has no reply")
    rows = [make_message_row(name, turn, "chat", 0, names[:shown(messages[:i])], messages[:i + 1], source="import", terminated=i == replies[-1],
                        action=envs.parse_agent(messages[i]["content"][0]["text"]) or "") for turn, i in enumerate(replies)]
    rows[-1] |= dict(reward=float(chat.get("reward") or 0.0), success=bool(chat.get("success")))
    return rows, dict(zip(names, images))


def import_chats(file, folder, pictures=""):
    """A JSON list or JSON lines of conversations -> a new Buffer in `folder`; paths of pictures are seen from `pictures`, or from where the file is.
    SystemExit with one sentence if one of them does not fit; then no folder is made."""
    if os.path.exists(folder):
        raise SystemExit(f"{folder!r} exists already: import into a new folder.")
    def picture(path):
        try:
            with Image.open(os.path.join(pictures or os.path.dirname(file), path.get("path") if isinstance(path, dict) else path)) as im:
                return im.convert("RGB")
        except (OSError, TypeError):
            raise ValueError(f"names a picture that does not open: {path!r}; say as the third argument which folder its path begins at")
    try:
        with open(file, encoding="utf-8") as f:
            text = f.read()
        chats = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as e:
        raise SystemExit(f"{file!r} is no JSON list and no JSON lines of conversations: {e}.")
    shutil.rmtree(folder + ".tmp", ignore_errors=True)
    out = Buffer(folder + ".tmp", create=True)
    for n, chat in enumerate(chats, 1):
        try:
            out.append(*chat_rows(chat, f"{os.path.basename(file)}-{n}", picture))
        except ValueError as e:
            raise SystemExit(f"{file}, conversation {n}, {e}.")
    os.rename(folder + ".tmp", folder)
    return Buffer(folder)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit("Say what to import and where to: python -m extras.import_chats chats.json data/chats [folder of the pictures]")
    stats = import_chats(*sys.argv[1:]).stats()
    print(f"{sys.argv[2]}: {stats['episodes']} conversations, {stats['turns']} replies; train on them with --data={sys.argv[2]} --actor_loss=sft")
