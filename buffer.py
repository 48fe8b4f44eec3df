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
bootstrap. A compact index of all rows is in memory, rows and pictures are read when they are needed.
`datasets.load_dataset(folder)` opens the folder as it is.
"""
import functools, hashlib, json, os

import numpy as np
import torch

# readers of the format import KEYS from here
from extras.check_rows import KEYS, VERSION  # noqa: F401
from extras.check_rows import EpisodeOrder, check_pictures, find_picture, list_pictures, outline_lines
from extras.check_rows import read_blocks
from extras.pictures import PictureError, open_picture, verify_picture
from extras.row_index import EpisodeRows, RowIndex, RowsOnDisk


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

def open_row_picture(file, name):
    """Open a picture that a row of this metadata.jsonl names, as RGB."""
    folder = os.path.dirname(file)
    try:
        return open_picture(find_picture(folder, name))
    except PictureError as error:
        raise SystemExit(f"{os.path.join(folder, name)} {error}.")
    except ValueError as error:
        raise SystemExit(f"{file} {error}.")

def store_picture(path, image, sync):
    """Write a picture as PNG, whole or not at all; sync=True waits until it is on the disk."""
    with open(path + ".tmp", "wb") as f:
        image.save(f, format="PNG", compress_level=1)
        if sync:
            f.flush()
            os.fsync(f.fileno())
    os.replace(path + ".tmp", path)

def measure_play(turns, won, returns, scores, valid, env):
    """Measure episodes from arrays with one item per episode, see RowIndex.columns."""
    return dict(
        episodes=len(turns),
        turns=int(turns.sum()),
        success=float(np.mean(won)),
        success_return=float(np.mean(scores > 0)),
        episode_return=float(np.mean(returns)),
        valid=float(valid.sum() / turns.sum()),
    )

class Buffer:
    """A folder of episodes: Buffer(folder) opens it, create=True starts an empty one if there is none.

    rows          list of rows, in file order; `i` below is a number in this list
    episodes      {name of an episode: list of its row numbers, in turn order}
    index         numbers of all rows and episodes, see extras/row_index.py
    torn_bytes    size of an incomplete last episode (a crash while writing) that was left out
    reward_fn     what the critic sees of a reward, such as a clipped one; statistics use the rewards as paid

    Every row is checked, see extras/check_rows.py. Raises SystemExit with one sentence for a folder that is
    missing, empty, damaged, of another program or of a newer version.
    """

    def __init__(self, folder, create=False, reward_fn=float):
        self.folder = folder
        self.file = os.path.join(folder, "metadata.jsonl")
        self.reward_fn = reward_fn
        # opens a picture that a row names, as RGB, and remembers the last 4096
        self.image = functools.lru_cache(maxsize=4096)(functools.partial(open_row_picture, self.file))
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
        self.index = RowIndex()
        self.rows = RowsOnDisk(self.file, self.index)
        self.episodes = EpisodeRows(self.index)
        pictures = list_pictures(self.folder)
        order = EpisodeOrder()
        number = 1
        end = 0
        try:
            for row in self._outline_rows():
                order.add(row)
                check_pictures(row.names, self.folder, pictures)
                if order.name is None:
                    end = self.index.add(order.rows, end)
                number += 1
        except ValueError as error:
            raise SystemExit(f"{self.file}, line {number}, {error}.")
        self._leave_out(self.n_bytes - end)

    def _outline_rows(self):
        """Outline all rows of the file, and count its bytes."""
        self.n_bytes = 0
        for block in read_blocks(self.file):
            self.n_bytes += len(block)
            yield from outline_lines(block)

    def _leave_out(self, torn_bytes):
        """Leave out the last bytes of the file, and say so."""
        self.torn_bytes = torn_bytes
        if torn_bytes:
            what = f"{torn_bytes} bytes without its end, a crash while writing"
            print(f"{self.file}: the last episode is torn ({what}) and is left out.")

    def check_images(self):
        """Check once that every picture opens; SystemExit names the first one that does not, and its line."""
        for name, i in self.index.pictures.items():
            try:
                verify_picture(find_picture(self.folder, name))
            except ValueError as error:
                raise SystemExit(f"{self.file}, line {i + 1}, shows {name}, which {error}.")

    def append(self, rows, images, sync=True):
        """Add whole episodes: their rows, and their pictures as {name: PIL image}.

        sync=False: the caller syncs the pictures, and a crash before that may leave half a picture.
        """
        lines = [json.dumps(row).encode() + b"\n" for row in rows]
        episodes = self._check_new(rows, lines, images)
        # A picture is on disk, whole, before a row names it.
        for name, image in images.items():
            path = os.path.join(self.folder, name)
            if not os.path.exists(path):
                store_picture(path, image, sync)
        self._cut_torn_line()
        with open(self.file, "ab") as f:
            before = f.tell()
            try:
                f.write(b"".join(lines))
                f.flush()
                os.fsync(f.fileno())
            except BaseException:
                # a full disk or Ctrl-C: all of the rows are there, or none
                os.truncate(self.file, before)
                raise
        for episode in episodes:
            before = self.index.add(episode, before)

    def _check_new(self, rows, lines, images):
        """Check rows before they are written -> their episodes: what is written here can be read again."""
        order = EpisodeOrder()
        pictures = set(images)
        episodes = []
        for row, line in zip(rows, lines):
            # two episodes of one name would be read as one
            if row["episode"] in self.episodes:
                raise SystemExit(f"{self.folder!r} holds an episode {row['episode']!r} already: record into "
                                 "another folder, or with another seed.")
            try:
                [outline] = outline_lines(line)
                order.add(outline)
                check_pictures(outline.names, self.folder, pictures)
            except ValueError as error:
                where = f"episode {row['episode']!r}, turn {row['turn']},"
                raise SystemExit(f"{self.folder!r} takes no row that cannot be read again: {where} {error}.")
            if order.name is None:
                episodes.append(order.rows)
        if order.name is not None:
            raise SystemExit(f"{self.folder!r} takes whole episodes: {order.name!r} has no end.")
        return episodes

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
        with open(os.path.join(self.folder, "rewound.jsonl"), "ab") as f:
            f.writelines(self.rows.read_bytes(i) for i in range(n, len(self)))
            f.flush()
            os.fsync(f.fileno())
        os.truncate(self.file, self.index.starts[n])
        self.rows.cache.clear()
        self._leave_out(self.index.cut(n))

    # ---- statistics ----

    def __len__(self):
        return len(self.rows)

    def episode_return(self, episode):
        """Sum the rewards of an episode, as they were paid."""
        return self.index.returns[self.index.numbers[episode]]

    def return_to_go(self, i, gamma):
        """Sum the discounted rewards from row i to the end of its episode, as the critic sees them."""
        end = self.index.first_rows[self.index.episode_of(i) + 1]
        total = 0
        for k, reward in enumerate(self.index.rewards[i:end]):
            total += gamma**k * self.reward_fn(reward)
        return total

    def lowest_return(self, gamma):
        """Return the lowest discounted return of any recorded turn: where a pessimistic critic starts."""
        return self.index.lowest_to_go(gamma, self.reward_fn)

    def reward_range(self):
        """Return the lowest and the highest reward of a turn as it was recorded; (0, 0) without turns."""
        rewards = self.index.rewards
        return min(rewards, default=0.0), max(rewards, default=0.0)

    def return_quantile(self, share):
        """Return the quantile of the episodes' returns at this share."""
        return float(np.quantile(np.array(self.index.returns), share))

    def stats(self):
        """Measure how good the recorded play is -> {name: number}, by_env too if several games were played.

        Success follows both rules: the goal was reached, and the summed reward is above 0. `valid` is the
        share of turns whose reply could be parsed.
        """
        columns = self.index.columns()
        result = measure_play(**columns)
        if len(self.index.envs) > 1:
            result["by_env"] = {}
            for env, number in self.index.envs.items():
                is_env = columns["env"] == number
                result["by_env"][env] = measure_play(**{name: x[is_env] for name, x in columns.items()})
        return result

    # ---- windows: what an update draws ----

    def _cut_window(self, episode, end, window):
        """Return the turns of an episode before `end`, at most `window` of them. episode: its number."""
        n_turns = self.index.n_turns(episode)
        row_numbers = self.index.rows_of(episode)
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
        oldest = max(0, len(self.episodes) - last) if last else 0
        lost, won_group = self.index.groups
        groups = [(self.index.everything, n)]
        if won is not None and lost.count(oldest) and won_group.count(oldest):
            n_won = round(won * n)
            groups = [(won_group, n_won), (lost, n - n_won)]

        windows = []
        for group, count in groups:
            drawn = group.draw(rng, count, window, oldest)
            windows += [self._cut_window(episode, end, window) for episode, end in drawn]
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

def make_batch(parts, vlm, marker, gamma, device=None):
    """Turn windows into the tensors of one forward pass, on the VLM's device or another one.

    parts: list of (buffer, windows). marker: the text before the action in a reply. gamma: discount per turn.
    Returns a dict, for B rows and replies of up to R tokens:

        inputs, P       of the net: prompts padded left to P columns, replies behind them
        reply_ids       (B, R) tokens of the replies
        mask            (B, R) 1 on them, 0 on the padding
        span            (B, R) 1 on the action, which follows the marker
        reward          (B,) as the critic sees it
        terminated      (B,)
        next            (B,) row of the batch that continues a turn; -1 if it is not in the batch
        chain           turns in the longest window
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
    inputs, P, reply_ids, mask = vlm.collate(prompts, replies, device)
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
        chain=max(len(window) for _, windows in parts for window in windows),
        return_to_go=column([buf.return_to_go(i, gamma) for buf, i in turns]),
        ep_return=column([buf.episode_return(buf.rows[i]["episode"]) for buf, i in turns]),
    )

if __name__ == "__main__":
    raise SystemExit("Conversations are imported by: python -m extras.import_chats chats.json data/chats")
