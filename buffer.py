"""
Episodes on disk: replay buffer, offline dataset and Hugging Face image folder in one.

    folder/metadata.jsonl         one row per turn, append-only
    folder/images/<hash>.png      each picture once, named after its content

A row is one turn of an episode:

    version                       of this format
    episode, turn                 name of the episode, number of the turn in it
    env, seed                     where the episode was played, from which start
    images_file_names             the pictures that the messages show, in order
    messages                      the user's parts, then the assistant's reply
    reply_ids                     the sampled tokens of the reply; empty if a person or a script replied
    behaviour_logprobs            their log-probabilities under the policy that played
    source                        the player: model, expert, random, human, ...
    action, valid                 the action in the reply, and whether the reply could be parsed
    reward                        of this turn
    terminated, truncated         as in Gymnasium: the task ended | a limit cut the episode off
    success                       whether the goal is reached

A truncated episode has one more row: its last observation, without a reply. The value of that state is the
bootstrap. The index of all rows is in memory, the pictures are not. `datasets.load_dataset(folder)` opens the
folder as it is.
"""
import functools, hashlib, json, os

import numpy as np
import torch

# readers of the format import KEYS from here
from extras.check_rows import KEYS, VERSION  # noqa: F401
from extras.check_rows import EpisodeOrder, check_pictures, find_picture, list_pictures, parse_row
from extras.check_rows import read_content
from extras.pictures import PictureError, open_picture, verify_picture


# ---- rows ----

def image_name(image):
    """Name a picture after its content: equal pixels, equal name."""
    header = repr((image.mode, image.size)).encode()
    digest = hashlib.sha1(header + image.tobytes()).hexdigest()
    return f"images/{digest[:20]}.png"

def make_row(episode, turn, env, seed, obs, reply=None, **fields):
    """Build the row of one turn from an observation {"image", "text"} and the reply to it.

    Without a reply it is the last observation of an episode. fields: as in make_message_row.
    """
    # "text": null, so that Arrow reads image parts and text parts as one struct
    content = [{"type": "image", "text": None}, {"type": "text", "text": obs["text"]}]
    messages = [{"role": "user", "content": content}]
    if reply is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
    return make_message_row(episode, turn, env, seed, [image_name(obs["image"])], messages, **fields)

def make_message_row(episode, turn, env, seed, images, messages, logprobs=(), **fields):
    """Build a row from its messages.

    Every row is created here, so this function defines the schema. images: names of the pictures that the
    messages show. logprobs are rounded and stored as behaviour_logprobs. fields: the other fields by name.
    """
    row = dict(version=VERSION, episode=episode, turn=turn, env=env, seed=seed)
    row |= dict(images_file_names=images, messages=messages, reply_ids=[])
    row |= dict(behaviour_logprobs=[round(x, 6) for x in logprobs], source="", action="", valid=True)
    row |= dict(reward=0.0, terminated=False, truncated=False, success=False)
    return row | fields

def reply_text(row):
    """Return the assistant's text, or None if the row is a last observation."""
    last = row["messages"][-1]
    if last["role"] != "assistant":
        return None
    return last["content"][0]["text"]

def prompt_messages(row):
    """Return the messages of a row up to its own reply."""
    if reply_text(row) is None:
        return row["messages"]
    return row["messages"][:-1]

def prompt_texts(row):
    """Return the texts of all parts of the prompt of a row, an empty one for a picture."""
    return [part["text"] or "" for message in prompt_messages(row) for part in message["content"]]


# ---- the folder ----

class Buffer:
    """A folder of episodes: Buffer(folder) opens it, create=True starts an empty one if there is none.

    rows          list of rows, in file order; `i` below is a number in this list
    episodes      {name of an episode: list of its row numbers, in turn order}
    positions     for each row: (name of its episode, its index in that episode)
    torn_bytes    size of an incomplete last episode (a crash while writing) that was left out
    reward_fn     what the critic sees of a reward, such as a clipped one; statistics use the rewards as paid

    Every row is checked, see extras/check_rows.py. Raises SystemExit with one sentence for a folder that is
    missing, empty, damaged, of another program or of a newer version.
    """

    def __init__(self, folder, create=False, reward_fn=float):
        self.folder = folder
        self.file = os.path.join(folder, "metadata.jsonl")
        self.reward_fn = reward_fn
        self.image = functools.lru_cache(maxsize=4096)(self._open_image)
        if create:
            self._make_folder()
        elif not os.path.exists(self.file):
            state = "has no metadata.jsonl in it" if os.path.isdir(folder) else "does not exist"
            raise SystemExit(f"data={folder!r} {state}: name a folder of recorded episodes, or leave `data` "
                             "empty and let `data_mix` make one.")
        self._read()
        if not self.rows and not create:
            raise SystemExit(f"data={folder!r} holds no episodes: its metadata.jsonl is empty, or breaks off "
                             "in the first one.")

    def _make_folder(self):
        try:
            os.makedirs(os.path.join(self.folder, "images"), exist_ok=True)
        except OSError as error:
            raise SystemExit(f"{self.folder!r} cannot be a folder of episodes: {error.strerror}.")

    def _read(self):
        """Read the file and build the index. A torn last episode is left out and reported."""
        self.rows = []
        self.episodes = {}
        self.positions = []
        self.torn_bytes = 0
        content = read_content(self.file)
        pictures = list_pictures(self.folder)
        order = EpisodeOrder()
        # The rows of an episode wait for its end.
        waiting = []
        position = 0
        end = 0
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            position += len(line) + 1
            try:
                row = parse_row(line)
                order.add(row)
                check_pictures(row["images_file_names"], self.folder, pictures)
            except ValueError as error:
                raise SystemExit(f"{self.file}, line {number}, {error}.")
            waiting.append(row)
            if order.name is None:
                self._index(waiting)
                waiting = []
                end = position
        self.torn_bytes = len(content) - end
        if self.torn_bytes:
            what = f"{self.torn_bytes} bytes without its end, a crash while writing"
            print(f"{self.file}: the last episode is torn ({what}) and is left out.")

    def _index(self, rows):
        for row in rows:
            row_numbers = self.episodes.setdefault(row["episode"], [])
            self.positions.append((row["episode"], len(row_numbers)))
            row_numbers.append(len(self.rows))
            self.rows.append(row)

    def _open_image(self, name):
        """Open a picture of the folder as RGB. Called as `image(name)`, which remembers the last 4096."""
        try:
            return open_picture(find_picture(self.folder, name))
        except PictureError as error:
            raise SystemExit(f"{os.path.join(self.folder, name)} {error}.")
        except ValueError as error:
            raise SystemExit(f"{self.file} {error}.")

    def check_images(self):
        """Check once that every picture opens; SystemExit names the first one that does not, and its line."""
        lines = {}
        for number, row in enumerate(self.rows, 1):
            for name in row["images_file_names"]:
                lines.setdefault(name, number)
        for name, number in lines.items():
            try:
                verify_picture(find_picture(self.folder, name))
            except ValueError as error:
                raise SystemExit(f"{self.file}, line {number}, shows {name}, which {error}.")

    def append(self, rows, images):
        """Add whole episodes: their rows, and their pictures as {name: PIL image}."""
        lines = [json.dumps(row) + "\n" for row in rows]
        self._check_new(rows, lines, images)
        # A picture is on disk, whole, before a row names it.
        for name, image in images.items():
            path = os.path.join(self.folder, name)
            if not os.path.exists(path):
                with open(path + ".tmp", "wb") as f:
                    image.save(f, format="PNG", compress_level=1)
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(path + ".tmp", path)
        self._cut_torn_line()
        with open(self.file, "ab") as f:
            before = f.tell()
            try:
                f.write("".join(lines).encode())
                f.flush()
                os.fsync(f.fileno())
            except BaseException:
                # a full disk or Ctrl-C: all of the rows are there, or none
                os.truncate(self.file, before)
                raise
        self._index(rows)

    def _check_new(self, rows, lines, images):
        """Check rows before they are written: what is written here can be read again."""
        order = EpisodeOrder()
        pictures = set(images)
        for row, line in zip(rows, lines):
            # two episodes of one name would be read as one
            if row["episode"] in self.episodes:
                raise SystemExit(f"{self.folder!r} holds an episode {row['episode']!r} already: record into "
                                 "another folder, or with another seed.")
            try:
                row = parse_row(line.encode())
                order.add(row)
                check_pictures(row["images_file_names"], self.folder, pictures)
            except ValueError as error:
                where = f"episode {row['episode']!r}, turn {row['turn']},"
                raise SystemExit(f"{self.folder!r} takes no row that cannot be read again: {where} {error}.")
        if order.name is not None:
            raise SystemExit(f"{self.folder!r} takes whole episodes: {order.name!r} has no end.")

    def _cut_torn_line(self):
        """Remove what a crash left of a line, so that the next line starts on its own."""
        if self.torn_bytes:
            with open(self.file, "rb+") as f:
                f.truncate(os.path.getsize(self.file) - self.torn_bytes)
            self.torn_bytes = 0

    def rewind(self, n):
        """Go back to the first n rows: a resumed run plays the later ones again.

        The rows after them are appended to rewound.jsonl, so that nothing is lost.
        """
        if n >= len(self.rows):
            return
        with open(os.path.join(self.folder, "rewound.jsonl"), "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in self.rows[n:])
        with open(self.file + ".tmp", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in self.rows[:n])
            f.flush()
            os.fsync(f.fileno())
        os.replace(self.file + ".tmp", self.file)
        self._read()

    # ---- statistics ----

    def __len__(self):
        return len(self.rows)

    def episode_return(self, episode):
        """Sum the rewards of an episode, as they were paid."""
        return sum(self.rows[i]["reward"] for i in self.episodes[episode])

    def return_to_go(self, i, gamma):
        """Sum the discounted rewards from row i to the end of its episode, as the critic sees them."""
        episode, position = self.positions[i]
        total = 0
        for k, j in enumerate(self.episodes[episode][position:]):
            total += gamma**k * self.reward_fn(self.rows[j]["reward"])
        return total

    def lowest_return(self, gamma):
        """Return the lowest discounted return of any recorded turn: where a pessimistic critic starts."""
        return min(self.return_to_go(i, gamma) for i in range(len(self.rows)))

    def return_quantile(self, share):
        """Return the quantile of the episodes' returns at this share."""
        return float(np.quantile([self.episode_return(episode) for episode in self.episodes], share))

    def stats(self, episodes=None):
        """Measure how good the recorded play is -> {name: number}, by_env too if several games were played.

        Success follows both rules: the goal was reached, and the summed reward is above 0. `valid` is the
        share of turns whose reply could be parsed.
        """
        if episodes is None:
            episodes = list(self.episodes)
        last_rows = [self.rows[self.episodes[episode][-1]] for episode in episodes]
        rows = [self.rows[i] for episode in episodes for i in self.episodes[episode]]
        turns = [row for row in rows if reply_text(row) is not None]
        returns = [self.episode_return(episode) for episode in episodes]
        result = dict(
            episodes=len(episodes),
            turns=len(turns),
            success=float(np.mean([row["success"] for row in last_rows])),
            success_return=float(np.mean([total > 0 for total in returns])),
            episode_return=float(np.mean(returns)),
            valid=float(np.mean([row["valid"] for row in turns])),
        )
        groups = {}
        for episode, row in zip(episodes, last_rows):
            groups.setdefault(row.get("env", ""), []).append(episode)
        if len(groups) > 1:
            result["by_env"] = {env: self.stats(group) for env, group in groups.items()}
        return result

    # ---- windows: what an update draws ----

    def _count_turns(self, row_numbers):
        """Count the turns of an episode: all its rows but a last observation."""
        has_last_observation = reply_text(self.rows[row_numbers[-1]]) is None
        return len(row_numbers) - has_last_observation

    def _cut_window(self, row_numbers, end, window):
        """Return the turns of an episode before `end`, at most `window` of them."""
        n_turns = self._count_turns(row_numbers)
        turns = row_numbers[max(0, end - window) : min(end, n_turns)]
        if end >= n_turns:
            # the last observation, if there is one
            turns = turns + row_numbers[n_turns:]
        return turns

    def sample(self, rng, n, window, won=None, last=0):
        """Draw n windows: lists of up to `window` consecutive row numbers of one episode.

        A window may overhang the first and the last turn of its episode, and is cut there. So every turn lies
        in the same number of windows and is drawn equally often. An episode of 4 turns has 6 windows of 3:

            turns          0 1 2 3
            end = 1   [. . 0]              cut to 0
            end = 2     [. 0 1]            cut to 0 1
            end = 3       [0 1 2]
            end = 4         [1 2 3]
            end = 5           [2 3 .]      cut to 2 3
            end = 6             [3 . .]    cut to 3

        A last observation has no reply. It comes with the turn before it, whose bootstrap it is.

        won: share of the windows that come from episodes that reached the goal; the others come from those
        that did not. None, or if all episodes are of one kind: as they come.
        last: draw from this many latest episodes only; 0: from all.
        """
        episodes = list(self.episodes.values())[-last:]
        n_turns = np.array([self._count_turns(row_numbers) for row_numbers in episodes])
        reached = np.array([self.rows[row_numbers[-1]]["success"] for row_numbers in episodes])

        if won is None or reached.all() or not reached.any():
            quotas = [(np.ones_like(reached), n)]
        else:
            n_won = round(won * n)
            quotas = [(reached, n_won), (~reached, n - n_won)]

        windows = []
        for is_in_group, count in quotas:
            # Number the windows of the group from episode to episode, and draw numbers.
            n_windows = np.where(is_in_group, n_turns + window - 1, 0)
            ends = np.cumsum(n_windows)
            for number in rng.integers(ends[-1], size=count):
                k = int(np.searchsorted(ends, number, side="right"))
                # 1 .. n_turns + window - 1
                end = int(ends[k] - number)
                windows.append(self._cut_window(episodes[k], end, window))
        return windows

    # ---- prompts ----

    def prompt_text(self, i):
        """Return all text of the prompt of row i, for sorting by length."""
        return "".join(prompt_texts(self.rows[i]))

    def encode_prompt(self, i, vlm):
        """Encode the prompt of row i; its pictures are opened only if the VLM has not cached it."""
        row = self.rows[i]
        names = row["images_file_names"]
        images = [functools.partial(self.image, name) for name in names]
        # The key tells where pictures and messages begin; for a picture and a text it is that of rollouts.
        text = "\0".join(prompt_texts(row)).lstrip("\0")
        roles = [message["role"] for message in prompt_messages(row)]
        if len(roles) > 1:
            names = [*names, *roles]
        return vlm.encode(row["messages"], images, key=(text, *names))


# ---- batches: windows as tensors ----

def tokenize_reply(row, vlm, marker):
    """Return the tokens of a reply, and 1 for each that belongs to the action; both empty without a reply.

    The action is what follows the last marker, up to and with the end of the turn. Without a marker it is the
    end of the turn alone.
    """
    text = reply_text(row)
    if text is None:
        return [], []
    ids = vlm.reply_ids(text, row["reply_ids"])
    if ids != row["reply_ids"]:
        # encoded anew, and so without special tokens
        text = vlm.neutralise_text(text)
    start = len(text)
    if marker in text:
        start = text.rfind(marker) + len(marker)
    return ids, vlm.span(ids, start)

def make_batch(parts, vlm, marker, gamma):
    """Turn windows into the tensors of one forward pass.

    parts: list of (buffer, windows). marker: the text before the action in a reply. gamma: discount per turn.
    Returns a dict, for B rows and replies of up to R tokens:

        inputs, P       of the net: prompts padded left to P columns, replies behind them
        reply_ids       (B, R) tokens of the replies
        mask            (B, R) 1 on them, 0 on the padding
        span            (B, R) 1 on the action, which follows the marker
        reward          (B,) as the critic sees it
        terminated      (B,)
        next            (B,) row of the batch that continues a turn; -1 if it is not in the batch
        return_to_go    (B,) discounted, as the critic sees it
        ep_return       (B,) summed rewards of the whole episode, as they were paid
    """
    # Flatten the windows. A turn is continued by the next row, except at the end of its window.
    turns = []
    nexts = []
    for buf, windows in parts:
        for window in windows:
            for i in window:
                turns.append((buf, i))
                nexts.append(len(turns))
            nexts[-1] = -1

    # Tokens: a prompt and a reply per row. A last observation has an empty reply.
    prompts = [buf.encode_prompt(i, vlm) for buf, i in turns]
    replies = []
    spans = []
    for buf, i in turns:
        ids, span = tokenize_reply(buf.rows[i], vlm, marker)
        replies.append(ids)
        spans.append(span)
    inputs, P, reply_ids, mask = vlm.collate(prompts, replies)
    span_mask = torch.zeros_like(mask)
    for b, span in enumerate(spans):
        span_mask[b, : len(span)] = torch.tensor(span, dtype=mask.dtype)

    # Rewards and returns: a number per row.
    def column(values):
        return torch.tensor(values, dtype=torch.float32, device=mask.device)

    rows = [buf.rows[i] for buf, i in turns]
    return dict(
        inputs=inputs,
        P=P,
        reply_ids=reply_ids,
        mask=mask,
        span=span_mask,
        reward=column([buf.reward_fn(buf.rows[i]["reward"]) for buf, i in turns]),
        terminated=column([row["terminated"] for row in rows]),
        next=torch.tensor(nexts, device=mask.device),
        return_to_go=column([buf.return_to_go(i, gamma) for buf, i in turns]),
        ep_return=column([buf.episode_return(buf.rows[i]["episode"]) for buf, i in turns]),
    )

if __name__ == "__main__":
    raise SystemExit("Conversations are imported by: python -m extras.import_chats chats.json data/chats")
