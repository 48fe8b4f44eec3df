"""
Play whole episodes, several at a time, and record them: the loop between an agent and its environments.

    act(envs, rows, images) -> answers     an agent: the model, a script, a person, a server, see evaluate.py
    play(make_env, act, seeds)             yields each episode when it ends
    record(episodes, buffer)               appends them to a folder
"""
from tqdm import tqdm

from buffer import make_row
from extras.check_rows import check_row
from worlds.calls import Losses, close_env, make_or_refuse, start_episode, take_turn
from worlds.guard import Failure, each

class Episode:
    """One episode while it is played: its environment, what is observed there, its rows so far."""

    def __init__(self, env, number, seed, name):
        self.env = env
        self.number = number
        self.seed = seed
        self.name = name
        self.rows = []
        self.images = {}
        self.is_over = False
        # why the episode cannot be played to its end (an exception, a dead browser, no answer of a server)
        self.failure = None

    def begin(self, start):
        """Take the first observation."""
        if isinstance(start, Failure):
            self.failure = start
        else:
            self.env = start.env
            self.obs = start.obs

    def next_row(self, reply=None, **fields):
        """Build a row from the present observation."""
        return make_row(self.name, len(self.rows), self.env.name, self.seed, self.obs, reply, **fields)

    def add_row(self, row):
        """Append a row, and the picture that it shows, unless a folder of episodes could not hold it."""
        try:
            check_row(row)
        except ValueError as error:
            self.failure = Failure(f"a turn {error}")
            return
        self.rows.append(row)
        self.images[row["images_file_names"][0]] = self.obs["image"]

    def add_turn(self, answer, turn):
        """Record the agent's answer and what came of it, unless the turn failed."""
        if isinstance(turn, Failure):
            self.failure = turn
            return
        outcome = dict(action=turn.info["action"], valid=turn.info["valid"], reward=turn.reward)
        outcome |= dict(terminated=turn.terminated, truncated=turn.truncated)
        self.add_row(self.next_row(**answer, **outcome, success=turn.info["success"]))
        if self.failure:
            return
        self.obs = turn.obs
        self.is_over = turn.terminated or turn.truncated
        self.success_return = turn.info["success_return"]
        self.tag = turn.tag
        if len(self.rows) >= turn.max_turns and not self.is_over:
            self.failure = Failure(f"no end after max_turns={turn.max_turns} turns")

    def result(self):
        """Sum up an episode that is over: what `play` yields.

        A truncated one gets one more row, its last observation: the value there is the bootstrap.
        """
        last = self.rows[-1]
        result = dict(env=self.env.name, tag=self.tag, rows=self.rows, images=self.images)
        result |= dict(success=last["success"], success_return=self.success_return)
        result["episode_return"] = sum(row["reward"] for row in self.rows)
        result["turns"] = len(self.rows)
        result["valid"] = sum(row["valid"] for row in self.rows)
        if last["truncated"] and not last["terminated"]:
            self.add_row(self.next_row(source="end", success=last["success"]))
        return result

def make_envs(make_env, n):
    """Make one of n environments, at least one, and at most as many as may be alive at once.

    The others are None: each is made when its first episode begins.
    """
    first = make_or_refuse(make_env)
    n = min(n, first.max_parallel or n)
    return [first] + [None] * (n - 1)

def begin_episodes(episodes, make_env, split, n_threads):
    """Reset the environment of each episode to its start."""
    jobs = []
    for episode in episodes:
        options = {"split": split, "task": episode.number}
        jobs.append((make_env, episode.env, episode.seed, options))
    for episode, start in zip(episodes, each(start_episode, jobs, n_threads)):
        episode.begin(start)

def play_turn(episodes, act, n_threads):
    """Ask the agent about all observations at once, then let each environment take its reply."""
    envs = [episode.env for episode in episodes]
    rows = [episode.next_row() for episode in episodes]
    images = [episode.obs["image"] for episode in episodes]
    answers = act(envs, rows, images)
    turns = each(take_turn, zip(envs, answers), n_threads)
    for episode, answer, turn in zip(episodes, answers, turns):
        episode.add_turn(answer, turn)

def free_envs(ended, n_threads):
    """Close the environments that have failed -> those for the next episodes, None where one is made anew."""
    envs = []
    broken = []
    for episode in ended:
        is_broken = episode.failure and episode.failure.breaks_env
        if is_broken and episode.env is not None:
            broken.append(episode.env)
        envs.append(None if is_broken else episode.env)
    # nobody needs them any more: how this ends is all the same
    each(close_env, [(env,) for env in broken], n_threads)
    return envs

def play(make_env, act, seeds, num_envs=32, split="test", prefix="", bar=None, share=(0, 1)):
    """Play one episode per seed, num_envs at a time; yield each when it ends.

    act(envs, rows, images) returns a dict per environment: reply, source; reply_ids and logprobs of a model;
    `lost`, the reason, if there is no reply; or the Failure of an environment that it has called. split:
    "train" or "test", the part that starts are drawn from. prefix: of the episodes' names. bar: title of a
    progress bar. share=(rank, ranks): every ranks-th episode.

    Yields dicts: env, rows, images, success, success_return, episode_return, turns, valid (a count), tag.
    An episode whose environment fails, or whose reply is lost, is played once more, then dropped, counted and
    reported; an environment that fails is made anew. SystemExit after too many failures in a row.
    """
    rank, n_ranks = share
    # from the last to the first, so that pop() takes the first
    waiting = list(enumerate(seeds))[rank::n_ranks][::-1]
    idle = make_envs(make_env, min(num_envs, len(waiting)))
    n_threads = idle[0].max_parallel or 1
    playing = []
    losses = Losses(len(seeds))
    no_bar = None if bar else True
    with tqdm(total=len(waiting), desc=bar, disable=no_bar, leave=False) as progress:
        while waiting or playing:
            # Begin: each idle environment takes the next start.
            new = []
            while waiting and idle:
                number, seed = waiting.pop()
                new.append(Episode(idle.pop(), number, seed, f"{prefix}{number}"))
            begin_episodes(new, make_env, split, n_threads)
            playing += new

            # Play: one turn of each episode.
            begun = [episode for episode in playing if not episode.failure]
            if begun:
                play_turn(begun, act, n_threads)

            # End: yield the episodes that are over, play the lost ones again, free the environments.
            over = [episode for episode in playing if episode.is_over]
            lost = [episode for episode in playing if episode.failure]
            playing = [episode for episode in playing if not (episode.is_over or episode.failure)]
            if over:
                losses.end_streak()
            for episode in lost:
                waiting += losses.retry_or_drop(episode)
            for episode in over:
                yield episode.result()
                progress.update()
            idle += free_envs(over + lost, n_threads)

def record(episodes, buffer, chunk=200):
    """Append played episodes to a buffer, `chunk` at a time, and return their number.

    Those before an error or Ctrl-C are written.
    """
    n = 0
    waiting = []
    try:
        for n, episode in enumerate(episodes, 1):
            waiting.append(episode)
            if n % chunk == 0:
                append_episodes(waiting, buffer)
                waiting = []
    finally:
        # Ctrl-C may have come when the last chunk was just written
        append_episodes([one for one in waiting if one["rows"][0]["episode"] not in buffer.episodes], buffer)
    return n

def append_episodes(episodes, buffer):
    """Append several played episodes to a buffer."""
    rows = []
    images = {}
    for episode in episodes:
        rows += episode["rows"]
        images |= episode["images"]
    buffer.append(rows, images)
