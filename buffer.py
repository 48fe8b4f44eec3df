"""
What happened: episodes in one folder that is replay buffer, offline dataset and a Hugging Face image folder at once.

    folder/metadata.jsonl         one row a turn; append-only
    folder/images/<hash>.png      each picture once, named by its content

A row: version, episode, turn, env, seed, images_file_names, messages (user parts, then the assistant's text), reply_ids,
behaviour_logprobs, action, valid, reward, terminated, truncated, success, source (who played). An episode that was cut off by
a limit ends with one more row that holds the last observation and no reply: its value is the bootstrap.
The index lives in memory, the pictures do not. `datasets.load_dataset(folder)` opens it as it is.
"""
import functools, hashlib, json, os

import numpy as np
import torch
from PIL import Image

VERSION = 1
KEYS = ("episode", "turn", "images_file_names", "messages", "reply_ids", "valid", "reward", "terminated", "truncated", "success")


def image_name(image):
    """File name by content: equal pixels, equal name."""
    return "images/" + hashlib.sha1(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()[:20] + ".png"


def make_row(episode, turn, env, seed, obs, reply=None, reply_ids=None, logprobs=None, source="", **outcome):
    """One turn as it is stored; `outcome` holds action, valid, reward, terminated, truncated, success. Without a reply it is an episode's last
    observation. Image parts carry "text": null, so that Arrow sees one struct."""
    content = [{"type": "image", "text": None}, {"type": "text", "text": obs["text"]}]
    messages = [{"role": "user", "content": content}]
    if reply is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
    return make_message_row(episode, turn, env, seed, [image_name(obs["image"])], messages, reply_ids, logprobs, source, **outcome)


def make_message_row(episode, turn, env, seed, images, messages, reply_ids=None, logprobs=None, source="", **outcome):
    """A turn from its messages and the names of the pictures that they show: every row is made here."""
    row = dict(version=VERSION, episode=episode, turn=turn, env=env, seed=seed, images_file_names=images, messages=messages,
               reply_ids=reply_ids or [], behaviour_logprobs=[round(x, 6) for x in logprobs or []], source=source)
    return row | dict(action="", valid=True, reward=0.0, terminated=False, truncated=False, success=False) | outcome


def reply_text(row):
    """The assistant's text, None for a last observation."""
    return row["messages"][-1]["content"][0]["text"] if row["messages"][-1]["role"] == "assistant" else None


class Buffer:
    """Buffer(folder) opens what is there, or starts empty if create=True.

    rows        list of row dicts, in file order
    episodes    {episode id: list of row numbers in turn order}
    dropped     bytes of a torn last line (a crash while writing) that were left out
    shape       what the critic sees of a reward, a function: clipping, scaling; statistics show the rewards as they are
    Raises SystemExit with one sentence for a folder that is missing, empty, foreign or of a newer version."""

    def __init__(self, folder, create=False, shape=float):
        self.shape, self.folder, self.file = shape, folder, os.path.join(folder, "metadata.jsonl")
        self.rows, self.episodes, self.place, self.dropped = [], {}, [], 0
        if create:
            os.makedirs(os.path.join(folder, "images"), exist_ok=True)
        elif not os.path.exists(self.file):
            there = "has no metadata.jsonl in it" if os.path.isdir(folder) else "does not exist"
            raise SystemExit(f"data={folder!r} {there}: name a folder of recorded episodes, or leave `data` empty and let `data_mix` make one.")
        if os.path.exists(self.file):
            self._read()
        if not self.rows and not create:
            raise SystemExit(f"data={folder!r} holds no episodes: its metadata.jsonl is empty.")
        self.image = functools.lru_cache(maxsize=4096)(self._image)

    def _read(self):
        with open(self.file, "rb") as f:
            raw = f.read()
        good = raw.rfind(b"\n") + 1
        self.dropped = len(raw) - good
        if self.dropped:
            print(f"{self.file}: the last line is torn ({self.dropped} bytes, a crash while writing): left out.")
        for n, line in enumerate(raw[:good].splitlines(), 1):
            try:
                row = json.loads(line)
                missing = [k for k in KEYS if k not in row]
            except (ValueError, TypeError):
                raise SystemExit(f"{self.file}, line {n}, is not JSON: this is no folder of recorded episodes, or it was damaged.")
            if missing:
                raise SystemExit(f"{self.file}, line {n}, lacks {missing[0]!r}: this is another program's dataset; import it first (see README).")
            if row.get("version", VERSION) not in range(1, VERSION + 1):
                raise SystemExit(f"{self.file}, line {n}, is of format version {row['version']!r}, this code reads up to {VERSION}: update the code.")
            self._index(row)

    def _index(self, row):
        turns = self.episodes.setdefault(row["episode"], [])
        self.place.append((row["episode"], len(turns)))
        turns.append(len(self.rows))
        self.rows.append(row)

    def _image(self, name):
        path = os.path.join(self.folder, name)
        if not os.path.realpath(path).startswith(os.path.realpath(self.folder) + os.sep):
            raise SystemExit(f"{self.file} names a picture outside of its folder: {name!r}.")
        try:
            with Image.open(path) as im:
                return im.convert("RGB")
        except OSError:
            raise SystemExit(f"{path} is missing or no picture: the folder {self.folder!r} is incomplete, copy it again.")

    def append(self, rows, images):
        """Add whole episodes. images: {name: PIL image}; a picture is on disk before a row names it."""
        again = [row["episode"] for row in rows if row["episode"] in self.episodes]
        if again:  # two episodes of one name would be read as one
            raise SystemExit(f"{self.folder!r} holds an episode {again[0]!r} already: record into another folder, or with another seed.")
        for name, image in images.items():
            path = os.path.join(self.folder, name)
            if not os.path.exists(path):
                image.save(path + ".tmp", format="PNG", compress_level=1)
                os.replace(path + ".tmp", path)
        if self.dropped:
            with open(self.file, "rb+") as f:
                f.truncate(os.path.getsize(self.file) - self.dropped)
            self.dropped = 0
        with open(self.file, "ab") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            f.flush()
            os.fsync(f.fileno())
        for row in rows:
            self._index(row)

    def rewind(self, n):
        """Back to the first n rows (a resumed run plays the later ones again); what stood behind is kept in rewound.jsonl."""
        if n < len(self.rows):
            with open(os.path.join(self.folder, "rewound.jsonl"), "a") as f:
                f.writelines(json.dumps(row) + "\n" for row in self.rows[n:])
            with open(self.file + ".tmp", "w") as f:
                f.writelines(json.dumps(row) + "\n" for row in self.rows[:n])
            os.replace(self.file + ".tmp", self.file)
            self.__init__(self.folder, create=True, shape=self.shape)

    # ------------------------------------------------------------------------------------------------------- statistics

    def __len__(self):
        return len(self.rows)

    def episode_return(self, episode):
        return sum(self.rows[i]["reward"] for i in self.episodes[episode])

    def return_to_go(self, i, gamma):
        """Discounted sum of shaped rewards from row i to its episode's end."""
        episode, k = self.place[i]
        return sum(gamma ** j * self.shape(self.rows[t]["reward"]) for j, t in enumerate(self.episodes[episode][k:]))

    def lowest_return(self, gamma):
        """The lowest discounted return of any recorded turn: where a pessimistic critic starts."""
        return min(self.return_to_go(i, gamma) for i in range(len(self.rows)))

    def return_quantile(self, share):
        return float(np.quantile([self.episode_return(e) for e in self.episodes], share))

    def stats(self, episodes=None):
        """How good the recorded play is: success by both rules (goal reached; summed reward > 0), return, share of valid turns; by_env where several were played."""
        episodes = list(self.episodes) if episodes is None else episodes
        last = [self.rows[self.episodes[e][-1]] for e in episodes]
        played = [self.rows[i] for e in episodes for i in self.episodes[e] if reply_text(self.rows[i]) is not None]
        returns, names = [self.episode_return(e) for e in episodes], dict.fromkeys(row.get("env", "") for row in last)
        by_env = {name: self.stats([e for e, row in zip(episodes, last) if row.get("env", "") == name]) for name in names} if len(names) > 1 else None
        out = dict(episodes=len(last), turns=len(played), success=float(np.mean([r["success"] for r in last])),
                    success_return=float(np.mean([r > 0 for r in returns])), episode_return=float(np.mean(returns)), valid=float(np.mean([r["valid"] for r in played])))
        return out | dict(by_env=by_env) if by_env else out

    # ---------------------------------------------------------------------------------------------------------- batches

    def sample(self, rng, n, window, won=None, last=0):
        """n windows, each a list of up to `window` consecutive row numbers of one episode. A window may overhang an episode's first or last turn
        and is cut there: so every played turn is drawn equally often, whatever its place. A last observation comes with the turn before it.
        won: the share of windows from episodes that reached the goal, the others come from those that did not; None, or only one kind there: as they come.
        last: draw from the last so many episodes only; 0: from all."""
        turns = list(self.episodes.values())[-last:]
        played = np.array([len(t) - (reply_text(self.rows[t[-1]]) is None) for t in turns])
        reached = np.array([self.rows[t[-1]]["success"] for t in turns])
        kinds = [(np.ones_like(reached), n)] if won is None or reached.all() or not reached.any() else [(reached, round(won * n)), (~reached, n - round(won * n))]
        windows = []
        for kind, many in kinds:
            places = np.cumsum(kind * (played + window - 1))
            for u in rng.integers(places[-1], size=many):
                e = int(np.searchsorted(places, u, side="right"))
                end = int(places[e] - u)                                    # 1 .. played + window - 1
                cut = turns[e][max(0, end - window):min(end, int(played[e]))]
                windows.append(cut + turns[e][played[e]:] if end >= played[e] else cut)
        return windows

    def text(self, i):
        row = self.rows[i]
        return "".join(part["text"] or "" for m in row["messages"][:len(row["messages"]) - (reply_text(row) is not None)] for part in m["content"])

    def prompt(self, i, vlm):
        row = self.rows[i]
        return vlm.encode(row["messages"], [functools.partial(self.image, name) for name in row["images_file_names"]], key=(self.text(i), *row["images_file_names"]))


def make_batch(parts, vlm, marker, gamma):
    """Windows -> tensors. parts: list of (buffer, windows). Keys, for B turns and replies of up to R tokens:
    inputs, P, reply_ids (B, R), mask (B, R) 1 on reply tokens, span (B, R) 1 on the action behind the marker,
    reward (B,), terminated (B,), next (B,) the row that continues a turn, -1 if it is not in the batch, to_go (B,), ep_return (B,)."""
    prompts, replies, spans, rows, nexts = [], [], [], [], []
    for buf, windows in parts:
        for window in windows:
            for k, i in enumerate(window):
                row, text = buf.rows[i], reply_text(buf.rows[i])
                ids = [] if text is None else vlm.reply_ids(text, row["reply_ids"])
                prompts.append(buf.prompt(i, vlm))
                replies.append(ids)
                spans.append(vlm.span(ids, text.rfind(marker) + len(marker) if marker in text else len(text)) if ids else [])
                nexts.append(len(nexts) + 1 if k + 1 < len(window) else -1)
                rows.append((buf.shape(row["reward"]), row["terminated"], buf.return_to_go(i, gamma), buf.episode_return(row["episode"])))
    inputs, P, reply_ids, mask = vlm.collate(prompts, replies)
    span = torch.zeros_like(mask)
    for b, s in enumerate(spans):
        span[b, :len(s)] = torch.tensor(s, dtype=span.dtype)
    reward, terminated, return_to_go, ep_return = (torch.tensor(c, dtype=torch.float32, device=mask.device) for c in zip(*rows))
    return dict(inputs=inputs, P=P, reply_ids=reply_ids, mask=mask, span=span, reward=reward, terminated=terminated, return_to_go=return_to_go, ep_return=ep_return,
                next=torch.tensor(nexts, device=mask.device))
