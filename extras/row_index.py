"""
Index a folder of episodes: where each row lies in the file, and the numbers that are asked for often.

A million rows are some 5 GB as Python objects and 0.1 GB here. The rows stay on disk, and are read when they
are needed. Sums are kept up to date as episodes are added, so that no question walks over all episodes.
"""
import bisect, json, os, threading, weakref
from array import array
from collections.abc import Mapping, Sequence

import numpy as np

from extras.check_rows import SLIP

# So many rows are in memory once they were read.
CACHED_ROWS = 8192


# ---- what an update draws ----

class WindowGroup:
    """Numbers the windows of a group of episodes from episode to episode, and draws from them.

    An episode of n turns has n + window - 1 windows, see Buffer.sample.
    """

    def __init__(self):
        # numbers of the episodes, ascending
        self.episodes = array("q")
        # turns before each of them, and at last the turns of all
        self.turns = array("q", [0])

    def add(self, episode, n_turns):
        """Add an episode."""
        self.episodes.append(episode)
        self.turns.append(self.turns[-1] + n_turns)

    def cut(self, n_episodes):
        """Forget the episodes from this number on."""
        n = bisect.bisect_left(self.episodes, n_episodes)
        del self.episodes[n:]
        del self.turns[n + 1 :]

    def count(self, oldest=0):
        """Count the episodes from the number `oldest` on."""
        return len(self.episodes) - bisect.bisect_left(self.episodes, oldest)

    def draw(self, rng, n, window, oldest=0):
        """Draw n windows of the episodes from `oldest` on -> list of (number of the episode, end)."""
        n_episodes = len(self.episodes)
        first = bisect.bisect_left(self.episodes, oldest)

        def last_window(k):
            """Count the windows of all episodes up to the k-th."""
            return self.turns[k + 1] - self.turns[first] + (k + 1 - first) * (window - 1)

        drawn = []
        for number in rng.integers(last_window(n_episodes - 1), size=n).tolist():
            k = bisect.bisect_right(range(n_episodes), number, lo=first, key=last_window)
            # 1 .. n_turns + window - 1
            drawn.append((self.episodes[k], last_window(k) - number))
        return drawn


# ---- the index ----

class RowIndex:
    """Numbers of all rows and episodes, in compact arrays.

        starts, sizes       of each row: its first byte in the file, its bytes
        rewards             of each row, as they were paid
        names, numbers      of each episode: its name; the place of each name
        first_rows          of each episode: its first row; at last the number of all rows
        returns, n_valid    of each episode: its summed reward, its turns that could be parsed
        scores              of each episode: its summed reward if a malformed reply costs SLIP
        won, env            of each episode: whether it reached the goal, number of its environment
        envs                {environment: its number}, in the order in which they appeared
        everything, groups  windows of all episodes; of the lost and of the won ones
        pictures, kinds     {name of a picture, kind of prompt: first row that has it}
    """

    def __init__(self):
        self.starts = array("q")
        self.sizes = array("q")
        self.rewards = array("d")
        self.names = []
        self.numbers = {}
        self.first_rows = array("q", [0])
        self.returns = array("d")
        self.scores = array("d")
        self.n_valid = array("q")
        self.won = array("b")
        self.env = array("q")
        self.envs = {}
        self.everything = WindowGroup()
        self.groups = (WindowGroup(), WindowGroup())
        self.pictures = {}
        self.kinds = {}

    def add(self, rows, position):
        """Add an episode -> the byte behind it. rows: its outlines. position: its first byte in the file."""
        number = len(self.names)
        last = rows[-1]
        self.names.append(last.episode)
        self.numbers[last.episode] = number
        for i, row in enumerate(rows, len(self.starts)):
            self.starts.append(position)
            position += row.size
            if row.kind not in self.kinds:
                self.kinds[row.kind] = i
            for name in row.names:
                if name not in self.pictures:
                    self.pictures[name] = i
        rewards = [row.reward for row in rows]
        self.rewards.extend(rewards)
        self.sizes.extend([row.size for row in rows])
        self.first_rows.append(len(self.starts))

        turns = rows if last.has_reply else rows[:-1]
        self.returns.append(sum(rewards))
        self.scores.append(sum([row.reward if row.valid else SLIP for row in turns]))
        self.n_valid.append(sum([row.valid for row in turns]))
        self.won.append(last.success)
        self.env.append(self.envs.setdefault(last.env, len(self.envs)))
        self.everything.add(number, len(turns))
        self.groups[last.success].add(number, len(turns))
        return position

    def cut(self, n_rows):
        """Forget the rows from n_rows on, and the episode that they tear -> bytes of it that are left."""
        n_bytes = self.starts[n_rows]
        number = self.episode_of(n_rows)
        n_rows = self.first_rows[number]
        torn_bytes = n_bytes - self.starts[n_rows]
        for name in self.names[number:]:
            del self.numbers[name]
        for column in (self.starts, self.sizes, self.rewards):
            del column[n_rows:]
        for column in (self.names, self.returns, self.scores, self.n_valid, self.won, self.env):
            del column[number:]
        del self.first_rows[number + 1 :]
        for group in (self.everything, *self.groups):
            group.cut(number)
        n_envs = max(self.env, default=-1) + 1
        self.envs = {env: k for env, k in self.envs.items() if k < n_envs}
        self.pictures = {name: i for name, i in self.pictures.items() if i < n_rows}
        self.kinds = {kind: i for kind, i in self.kinds.items() if i < n_rows}
        return torn_bytes

    def episode_of(self, i):
        """Return the number of the episode that has row i."""
        return bisect.bisect_right(self.first_rows, i) - 1

    def rows_of(self, number):
        """List the rows of an episode."""
        return list(range(self.first_rows[number], self.first_rows[number + 1]))

    def n_turns(self, number):
        """Count the turns of an episode: all its rows but a last observation."""
        return self.everything.turns[number + 1] - self.everything.turns[number]

    def outcome(self, name):
        """Return the environment of an episode, and whether it reached the goal."""
        number = self.numbers[name]
        return list(self.envs)[self.env[number]], bool(self.won[number])

    def columns(self):
        """Return what statistics need, as arrays with one item per episode."""
        return dict(
            turns=np.diff(np.array(self.everything.turns)),
            won=np.array(self.won, dtype=bool),
            returns=np.array(self.returns),
            scores=np.array(self.scores),
            valid=np.array(self.n_valid),
            env=np.array(self.env),
        )

    def lowest_to_go(self, gamma, reward_fn):
        """Return the lowest discounted return of any row, with rewards as reward_fn changes them."""
        rewards, inverse = np.unique(np.array(self.rewards), return_inverse=True)
        rewards = np.array([reward_fn(reward) for reward in rewards.tolist()], dtype=float)[inverse]
        first_rows = np.array(self.first_rows)
        ends = np.repeat(first_rows[1:], np.diff(first_rows))
        totals = np.zeros(len(rewards))
        rows = np.arange(len(rewards))
        k = 0
        # All rows add their k-th reward at once, those whose episode is that long.
        while len(rows):
            totals[rows] += gamma**k * rewards[rows + k]
            k += 1
            rows = rows[rows + k < ends[rows]]
        return float(totals.min())


# ---- what looks like a list and a dict ----

class EpisodeRows(Mapping):
    """Looks like {name of an episode: list of its row numbers}, in the order of the file."""

    def __init__(self, index):
        self.index = index

    def __getitem__(self, name):
        return self.index.rows_of(self.index.numbers[name])

    def __iter__(self):
        return iter(self.index.names)

    def __len__(self):
        return len(self.index.names)

    def __contains__(self, name):
        return name in self.index.numbers

class RowsOnDisk(Sequence):
    """Looks like a list of the rows of a file, each read when it is needed.

    Rows are not to be changed: they are read anew after a while.
    """

    def __init__(self, file, index):
        self.file = file
        self.index = index
        self.descriptor = None
        self.cache = {}
        # extras/prefetch.py reads in a thread, while a skipped update may name its rows
        self.lock = threading.Lock()

    def __len__(self):
        return len(self.index.starts)

    def __eq__(self, other):
        return list(self) == list(other)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        row = self.cache.get(i)
        if row is not None:
            return row
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        if i < 0:
            return self[len(self) + i]
        row = self._load(i)
        with self.lock:
            if len(self.cache) >= CACHED_ROWS:
                # the one that was read first
                del self.cache[next(iter(self.cache))]
            self.cache[i] = row
        return row

    def read_bytes(self, i):
        """Read the line of row i, a whole number from 0 on."""
        if self.descriptor is None:
            self.descriptor = os.open(self.file, os.O_RDONLY)
            weakref.finalize(self, os.close, self.descriptor)
        return os.pread(self.descriptor, self.index.sizes[i], self.index.starts[i])

    def _load(self, i):
        try:
            return json.loads(self.read_bytes(i).decode("utf-8-sig"))
        except (OSError, ValueError) as error:
            raise SystemExit(f"{self.file}, line {i + 1}, was changed while it was in use: {error}.")
