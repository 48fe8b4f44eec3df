"""
What happened since the last line of metrics.jsonl, updates that were skipped among it.
"""
import torch

from agent_rl import summarise
from extras.flag_mistakes import show
from extras.run_folder import way_on
from model import gather

# So many updates in a row without a finite gradient end a run; such a reward is their likely cause.
MAX_SKIPPED = 5
LARGE_REWARD = 1e6

class Unlogged:
    """What the next line of metrics.jsonl sums up.

    Checkpoints hold it, so that a resumed run repeats the line.

    infos      sums of the updates since the last line, see agent_rl.summarise
    skipped    updates of the whole run that were skipped
    in_a_row   those among them since the last one that was not
    """

    def __init__(self, infos=(), skipped=0, in_a_row=0):
        self.infos = []
        for info in infos:
            self.infos.append({key: torch.tensor(value) for key, value in info.items()})
        self.skipped = skipped
        self.in_a_row = in_a_row
        # whether this process has made an update
        self.learned = False

    def state(self):
        """Return plain numbers, from which __init__ makes the same again."""
        infos = []
        for info in self.infos:
            infos.append({key: float(value) for key, value in info.items()})
        return dict(infos=infos, skipped=self.skipped, in_a_row=self.in_a_row)

    def take(self):
        """Return the metrics of a line, and begin the next."""
        row = summarise(self.infos) if self.infos else {}
        if self.skipped:
            row["skipped"] = self.skipped
        self.infos = []
        return row

    def skip(self, cfg, step, windows):
        """Count an update whose loss or gradient is not finite, and name its rows; too many end the run."""
        self.skipped += 1
        self.in_a_row += 1
        rows = [(buffer, buffer.rows[i]) for buffer, window in windows for i in window]
        names = [show(f"{row['episode']} turn {row['turn']}") for _, row in rows]
        listed = names[:8]
        if len(names) > 8:
            listed.append(f"{len(names) - 8} more")
        print(f"Update {step + 1} is skipped, its loss or gradient is not finite. Its rows: "
              f"{', '.join(listed)}.")
        if self.in_a_row >= MAX_SKIPPED:
            rewards = [abs(buffer.reward_fn(row["reward"])) for buffer, row in rows]
            largest = max(rewards)
            # the other ranks have had other rows
            largest, place = max(gather((largest, names[rewards.index(largest)])))
            raise SystemExit(f"{MAX_SKIPPED} updates in a row, up to update {step + 1}, had a loss or "
                             f"gradient that is not finite, {self.find_cause(cfg, largest, place)}.")

    def find_cause(self, cfg, reward, place):
        """Say why updates are not finite, and what helps. reward: the largest, in the row `place`."""
        if reward > LARGE_REWARD:
            return (f"most likely by the reward {reward:g} in {place}: start anew with --overwrite=True and "
                    "--reward_clip=1, or with other data")
        if not self.learned:
            return ("and so had all since this start: the weights themselves are too large, start anew with "
                    "--overwrite=True and a lower lr and critic_lr")
        lower = f"--lr={cfg.lr / 4:g} --critic_lr={cfg.critic_lr / 4:g}"
        return f"most likely by the learning rate: set {lower}, which a resumed run may change; {way_on()}"
