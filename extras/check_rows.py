"""
Check a folder of episodes row by row: types, numbers, messages, pictures, and that each episode is whole.

Buffer calls this for every row that it reads or writes. An error is a ValueError, whose text continues a
sentence that begins with the place of the row: "data/x/metadata.jsonl, line 3, has reward=nan: ...".
Fields of other names are left alone. A row as this program writes it is recognised by one regular expression,
some five times faster than it is parsed and checked; all other rows are parsed.
"""
import functools, json, os, re, reprlib
from typing import NamedTuple

VERSION = 1
# the fields that a row must have; a folder that lacks one of them was not written by this program
REQUIRED = dict(
    episode=str,
    turn=int,
    images_file_names=list,
    messages=list,
    reply_ids=list,
    valid=bool,
    reward=float,
    terminated=bool,
    truncated=bool,
    success=bool,
)
KEYS = tuple(REQUIRED)
# all fields
FIELDS = REQUIRED | dict(version=int, env=str, seed=int, behaviour_logprobs=list, source=str, action=str)
KINDS = list(FIELDS.values())
TEXTS = {name for name, kind in FIELDS.items() if kind is str}
TYPE_NAMES = {int: "a whole number", str: "a text", list: "a list", bool: "true or false", float: "a number"}
# Batches hold rewards in float32.
MAX_FLOAT32 = 3.4e38
# Some 50,000 tokens: more than a model reads or writes in a turn.
MAX_CHARACTERS = 200_000
# What a malformed reply counts in success_return, whatever an agent learns from (`penalty`).
SLIP = -1.0


# ---- one row ----

def split_blocks(f, n_bytes):
    """Yield an open file in blocks of whole lines; what follows the last line end comes last."""
    parts = []
    for block in iter(functools.partial(f.read, n_bytes), b""):
        lines, line_end, rest = block.rpartition(b"\n")
        if line_end:
            yield b"".join([*parts, lines, line_end])
            parts = []
        parts.append(rest)
    yield b"".join(parts)

def read_blocks(file, n_bytes=2**22):
    """Read metadata.jsonl in blocks of whole lines, bytes; what follows the last line end comes last.

    Nothing if it does not exist. SystemExit if it cannot be read.
    """
    if not os.path.lexists(file):
        return
    # A named pipe would hang.
    if not os.path.isfile(file):
        raise SystemExit(f"{file} is no file: this is no folder of recorded episodes.")
    try:
        with open(file, "rb") as f:
            yield from split_blocks(f, n_bytes)
    except OSError as error:
        raise SystemExit(f"{file} cannot be read: {error.strerror}.")

def parse_row(line):
    """Parse a line of metadata.jsonl, bytes, and check that it is a row."""
    try:
        # A Windows editor puts a mark before the first line.
        row = json.loads(line.decode("utf-8-sig"))
        missing = [key for key in KEYS if key not in row]
    except (ValueError, TypeError, RecursionError):
        raise ValueError("is not JSON: this is no folder of recorded episodes, or it was damaged")
    if missing or not isinstance(row, dict):
        raise ValueError(f"lacks {(missing or KEYS)[0]!r}: this is another program's dataset; import it "
                         "first (see README)")
    version = row.get("version", VERSION)
    if version not in range(1, VERSION + 1):
        raise ValueError(f"is of format version {reprlib.repr(version)}, this code reads up to {VERSION}: "
                         "update the code")
    check_row(row)
    return row

def check_row(row):
    """Check all that can be seen in one row alone."""
    # the quick way for the rows that this program writes
    if list(map(type, map(row.get, FIELDS))) != KINDS:
        for name in FIELDS.keys() & row.keys():
            check_type(name, row[name], FIELDS[name])
    check_row_reward(row["reward"])
    check_tokens(row["reply_ids"], row.get("behaviour_logprobs", []))
    for name in TEXTS & row.keys():
        check_row_text(row[name])
    n_images = check_messages(row["messages"])
    names = row["images_file_names"]
    if not set(map(type, names)) <= {str}:
        raise ValueError(f"has images_file_names={reprlib.repr(names)}: it must be a list of names")
    if len(names) != n_images:
        raise ValueError(f"shows {n_images} pictures in its messages but names {len(names)}")

def check_type(name, value, kind):
    """Check the type of a value: a whole number is fine as a float, true is no number."""
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"has {name}={reprlib.repr(value)}: it must be {TYPE_NAMES[kind]}")

def check_row_reward(reward):
    """Check that a reward is a finite number that fits a batch."""
    check_type("reward", reward, float)
    if not -MAX_FLOAT32 <= reward <= MAX_FLOAT32:
        raise ValueError(f"has reward={reprlib.repr(reward)}: it must be finite, and within float32")

def check_tokens(ids, logprobs):
    """Check the tokens of a reply and their log-probabilities; both may be missing."""
    if ids and (set(map(type, ids)) != {int} or min(ids) < 0):
        raise ValueError("has reply_ids that are no tokens: each must be a whole number from 0 on")
    if not logprobs:
        return
    if len(logprobs) != len(ids):
        raise ValueError(f"has {len(logprobs)} behaviour_logprobs for {len(ids)} reply_ids")
    is_number = set(map(type, logprobs)) <= {int, float}
    if not is_number or not all(-MAX_FLOAT32 <= logprob <= MAX_FLOAT32 for logprob in logprobs):
        raise ValueError("has behaviour_logprobs that are no finite numbers")

def check_row_text(text):
    """Check that a text can be tokenized and printed."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"has a text of {len(text):,} characters: the limit is {MAX_CHARACTERS:,}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"has a text with half a character in it (a lone surrogate): {ascii(text[:40])}")

def check_messages(messages):
    """Check the messages of a row -> number of the pictures that they show."""
    roles = []
    n_images = 0
    for message in messages:
        if type(message) is not dict or message.keys() != {"role", "content"}:
            raise ValueError(f"has a message without role and content: {reprlib.repr(message)}")
        role = message["role"]
        content = message["content"]
        if type(role) is not str or type(content) is not list:
            raise ValueError(f"has a message that is no list of parts from a role: {reprlib.repr(message)}")
        roles.append(role)
        for part in content:
            n_images += check_part(part, role)
    check_roles(tuple(roles))
    if role == "assistant" and (len(content) != 1 or content[0]["type"] != "text"):
        raise ValueError("has a reply that is not one part of text")
    return n_images

def check_part(part, role):
    """Check a part of a message; return whether it is a picture."""
    kind = None
    if type(part) is dict and part.keys() == {"type", "text"}:
        kind = part["type"]
        text = part["text"]
    if kind == "text" and type(text) is str:
        check_row_text(text)
        return False
    if kind != "image" or text is not None:
        raise ValueError(f"has a part of a message that is neither text nor picture: {reprlib.repr(part)} (a "
                         "picture has the type 'image' and the text null)")
    if role != "user":
        raise ValueError("shows a picture in a message that is not the user's: only the user shows pictures")
    return True

@functools.lru_cache
def check_roles(roles):
    """Check that user and assistant take turns, behind a system message at most, as chat templates want."""
    n_system = int(roles[:1] == ("system",))
    if len(roles) == n_system:
        raise ValueError("has no message from 'user'")
    for i, role in enumerate(roles[n_system:]):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise ValueError(f"has message {n_system + i + 1} from {reprlib.repr(role)} where {expected!r} "
                             "must speak: chat templates want them in turn, behind one from 'system' at most")


# ---- what the index takes from a row ----

class Outline(NamedTuple):
    """What the order of rows, windows and statistics need of a row."""

    episode: str
    turn: int
    env: str
    # pictures that it names
    names: list
    # (whether there is a system message, number of messages, number of pictures)
    kind: tuple
    has_reply: bool
    has_tokens: bool
    valid: bool
    reward: float
    terminated: bool
    truncated: bool
    success: bool
    # bytes of its line
    size: int

def outline_of(row, size):
    """Make the outline of a checked row."""
    messages = row["messages"]
    names = row["images_file_names"]
    return Outline(
        episode=row["episode"],
        turn=row["turn"],
        env=row.get("env", ""),
        names=names,
        kind=(messages[0]["role"] == "system", len(messages), len(names)),
        has_reply=messages[-1]["role"] == "assistant",
        has_tokens=bool(row["reply_ids"]),
        valid=row["valid"],
        reward=row["reward"],
        terminated=row["terminated"],
        truncated=row["truncated"],
        success=row["success"],
        size=size,
    )

def listed(item):
    """Make the pattern of a JSON list."""
    return rf"\[(?:{item}(?:, {item})*+)?+\]"


# Nothing here takes back what it has matched (*+, ?+), so a row that is not recognised costs no more.
PLAIN = r"[ !#-\[\]-~]*+"
HEX = "[0-9a-fA-F]"
# a character beyond 16 bits is written as two halves; no half stands alone
HALVES = rf"[dD][89abAB]{HEX}{{2}}\\u[dD][c-fC-F]{HEX}{{2}}"
ESCAPE = rf"\\(?:[\"\\/bfnrt]|u(?:(?![dD][89a-fA-F]){HEX}{{4}}|{HALVES}))"
TEXT = f'"{PLAIN}(?:{ESCAPE}{PLAIN})*+"'
WHOLE = r"(?:0|[1-9]\d{0,17})"
NUMBER = r"-?+(?:0|[1-9]\d{0,30}+)(?:\.\d++)?+(?:e-\d++)?+"
BOOL = "(true|false)"
PART = f'{{"type": "text", "text": {TEXT}}}'
PICTURE = '{"type": "image", "text": null}'
SYSTEM = f'{{"role": "system", "content": {listed(PART)}}}'
USER = f'{{"role": "user", "content": {listed(f"(?:{PICTURE}|{PART})")}}}'
REPLY = rf'{{"role": "assistant", "content": \[{PART}\]}}'
# in the order of make_message_row
PATTERNS = dict(
    version=str(VERSION),
    episode=f'"({PLAIN})"',
    turn=r"(0|[1-9]\d{0,8})",
    env=f'"({PLAIN})"',
    seed=f"-?+{WHOLE}",
    images_file_names=rf'\[((?:"{PLAIN}"(?:, "{PLAIN}")*+)?+)\]',
    messages=rf"(\[({SYSTEM}, )?+{USER}((?:, {REPLY}, {USER})*+)(, {REPLY})?+\])",
    reply_ids=f"({listed(WHOLE)})",
    behaviour_logprobs=f"({listed(NUMBER)})",
    source=TEXT,
    action=TEXT,
    valid=BOOL,
    reward=f"({NUMBER})",
    terminated=BOOL,
    truncated=BOOL,
    success=BOOL,
)
FIELD_PATTERNS = ", ".join(f'"{name}": {pattern}' for name, pattern in PATTERNS.items())
ROW = re.compile(f"{{{FIELD_PATTERNS}}}\n", re.ASCII)

def recognise_row(text, start):
    """Outline the row that begins at `start`, if it is written as this program writes rows; else None.

    text: lines, decoded as Latin-1, so that characters are bytes.
    """
    match = ROW.match(text, start)
    if match is None:
        return None
    episode, turn, env, pictures, messages, system, more, reply, tokens, logprobs, *others = match.groups()
    valid, reward, terminated, truncated, success = others
    names = pictures[1:-1].split('", "') if pictures else []
    # Within a text a quotation mark has a backslash before it, so these are counted outside of texts only.
    n_images = messages.count('"type": "image"')
    n_messages = 1 + (system is not None) + (reply is not None)
    if more:
        n_messages += more.count('"role": "')
    if n_images != len(names) or match.end() - start > MAX_CHARACTERS:
        return None
    if logprobs != "[]" and (tokens == "[]" or tokens.count(",") != logprobs.count(",")):
        return None
    fields = (
        episode,
        int(turn),
        env,
        names,
        (system is not None, n_messages, n_images),
        reply is not None,
        tokens != "[]",
        valid == "true",
        float(reward),
        terminated == "true",
        truncated == "true",
        success == "true",
        match.end() - start,
    )
    return Outline._make(fields)

def outline_lines(block):
    """Check the lines of metadata.jsonl, bytes -> the outline of each; ValueError for the first bad one.

    A last line without its end is left out.
    """
    text = block.decode("latin-1")
    n_bytes = block.rfind(b"\n") + 1
    start = 0
    while start < n_bytes:
        outline = recognise_row(text, start)
        if outline is None:
            end = block.index(b"\n", start) + 1
            outline = outline_of(parse_row(block[start : end - 1]), end - start)
        start += outline.size
        yield outline


# ---- the order of the rows ----

class EpisodeOrder:
    """Checks that rows come episode by episode, in the order of their turns, each episode with one end.

    name: of the episode whose end is still to come; None between two episodes
    """

    def __init__(self):
        self.name = None
        # outlines of its rows
        self.rows = []
        # summed absolute rewards
        self.total = 0
        # A limit has cut the episode off: its last observation is to come.
        self.is_cut = False
        # names of the episodes that are over
        self.over = set()

    def begin(self, name):
        """Begin an episode."""
        if name in self.over:
            raise ValueError(f"belongs to episode {reprlib.repr(name)}, which is over: it goes on after its "
                             "end, or is here twice")
        self.name = name
        self.rows = []
        self.total = 0
        self.is_cut = False

    def add(self, row):
        """Check a row against those before it. row: its outline."""
        if self.name is None:
            self.begin(row.episode)
        if row.episode != self.name:
            raise ValueError(f"belongs to episode {reprlib.repr(row.episode)}, before the end of episode "
                             f"{reprlib.repr(self.name)}")
        if row.turn != len(self.rows):
            raise ValueError(f"is turn {row.turn} of episode {reprlib.repr(self.name)}: turn "
                             f"{len(self.rows)} is missing here")
        self.rows.append(row)
        self.total += abs(row.reward)
        if self.total > MAX_FLOAT32:
            raise ValueError("brings the rewards of its episode beyond float32")
        if row.has_reply:
            self.add_turn(row)
        else:
            self.add_last_observation(row)

    def add_turn(self, row):
        """Check a row with a reply; it may be the end of its episode."""
        if self.is_cut:
            raise ValueError("has a reply, but the turn before it was truncated: only a last observation "
                             "may follow")
        self.is_cut = row.truncated and not row.terminated
        if row.terminated:
            self.end()

    def add_last_observation(self, row):
        """Check a row without a reply: it is the end of an episode that a limit cut off."""
        if not self.is_cut:
            raise ValueError("has no reply, but the turn before it was not truncated")
        if row.terminated or row.truncated or row.reward or row.has_tokens:
            raise ValueError("is a last observation without a reply: it can have no reward, no reply_ids and "
                             "no end of its own")
        self.end()

    def end(self):
        """End the episode."""
        self.over.add(self.name)
        self.name = None


# ---- pictures ----

def list_pictures(folder):
    """List the picture files of a folder of episodes by their names in rows, links left out."""
    home = os.path.join(folder, "images")
    if os.path.islink(home) or not os.path.isdir(home):
        return set()
    with os.scandir(home) as entries:
        return {f"images/{entry.name}" for entry in entries if entry.is_file(follow_symlinks=False)}

def find_picture(folder, name):
    """Return the path of a picture that a row names; a link may not lead out of the folder."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise ValueError(f"names a picture that is missing or no picture: {ascii(name)}")
    home = os.path.realpath(folder) + os.sep
    if not os.path.realpath(path).startswith(home):
        raise ValueError(f"names a picture outside of its folder: {ascii(name)}")
    return path

def check_pictures(names, folder, known):
    """Check that the pictures of a row exist; `known` holds the names found so far, and grows."""
    for name in names:
        if name not in known:
            find_picture(folder, name)
            known.add(name)


# ---- prompts ----

def check_prompts(buffer, vlm):
    """Encode one prompt of each kind: a model that cannot read one says so before it trains.

    Kinds differ in roles and in the number of pictures. SystemExit with one sentence, also if the model's
    chat template drops what the system or the user says.
    """
    for i in buffer.index.kinds.values():
        row = buffer.rows[i]
        messages = row["messages"]
        names = row["images_file_names"]
        vlm.encode_uncached(messages, [buffer.image(name) for name in names])
        prompt = vlm.render(messages)
        for message in messages:
            texts = [part["text"] for part in message["content"] if part["type"] == "text"]
            is_whole = all(vlm.neutralise_text(text).strip() in prompt for text in texts)
            if message["role"] != "assistant" and not is_whole:
                raise SystemExit(f"model={vlm.name!r} has a chat template that drops a message of the "
                                 f"{message['role']}, in line {i + 1} of {buffer.file}.")
