"""
Measure what recorded play costs at 1,000 to 1,000,000 turns.

    python bench.py scale

Folders are made in the temporary folder and removed; the largest is some 700 MB, and takes minutes to make.
Columns: seconds to open it, and what of them this process computed (less on a busy machine); growth of its
memory by that, in MB; milliseconds to draw 32 windows of 3 turns, to add an episode (which waits for the
disk), for the statistics, and for the lowest discounted return.
"""
import json, os, resource, shutil, statistics, sys, tempfile, time

import numpy as np
from PIL import Image

from buffer import Buffer, image_name, make_row

SIZES = (1_000, 10_000, 100_000, 1_000_000)
TURNS = 5
# of a row on disk
ROW_BYTES = 700
PROMPT = "Move the current number to the target number.\nActions: - or +\nEnd your reply with an action, for "
PROMPT += "example: [action] +"
COLUMNS = ("turns", "open s", "CPU s", "MB", "sample ms", "append ms", "stats ms", "lowest ms")

def synthetic_episode(name, images, rng):
    """Make the rows of an episode of TURNS turns; half of them reach the goal."""
    won = bool(rng.random() < 0.5)
    rows = []
    for turn in range(TURNS):
        is_last = turn == TURNS - 1
        obs = dict(image=images[rng.integers(len(images))], text=PROMPT)
        fields = dict(reply_ids=[11, 12, 13, 2], logprobs=rng.normal(-1, 0.1, 4).tolist(), action="+")
        fields |= dict(source="model", reward=float(rng.integers(-1, 2)), terminated=is_last)
        rows.append(make_row(name, turn, "Toy", 0, obs, "[action] +", **fields, success=won and is_last))
    return rows

def make_folder(folder, n_turns):
    """Make a folder of n_turns turns that share ten pictures."""
    rng = np.random.default_rng(0)
    images = [Image.new("RGB", (32, 32), (20 * k, 0, 0)) for k in range(10)]
    buffer = Buffer(folder, create=True)
    first = synthetic_episode("0", images, rng)
    buffer.append(first, {image_name(image): image for image in images})
    # Rows are copied under other names: making them anew would take longer than all that is measured.
    patterns = [json.dumps(row) for k in range(20) for row in synthetic_episode("NAME", images, rng)]
    with open(buffer.file, "a") as f:
        for n in range(TURNS, n_turns, TURNS):
            start = n % len(patterns)
            for line in patterns[start : start + TURNS]:
                f.write(line.replace("NAME", str(n // TURNS), 1) + "\n")

def resident_mb():
    """Return the memory of this process in MB; where the system does not tell, its peak."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * resource.getpagesize() / 1e6
    except OSError:
        # in bytes on macOS
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

def milliseconds(function, rounds=5):
    """Return the median time of a function."""
    times = []
    for k in range(rounds):
        began = time.perf_counter()
        function(k)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)

def measure_folder(folder):
    """Open a folder and measure -> the numbers of COLUMNS, without the first."""
    rng = np.random.default_rng(0)
    images = [Image.new("RGB", (32, 32), (0, 0, 0))]
    before = resident_mb()
    began = time.perf_counter()
    computed = time.process_time()
    buffer = Buffer(folder)
    computed = time.process_time() - computed
    seconds = time.perf_counter() - began
    growth = max(0.0, resident_mb() - before)

    def append(k):
        buffer.append(synthetic_episode(f"more-{k}", images, rng), {image_name(images[0]): images[0]})

    return (
        seconds,
        computed,
        growth,
        milliseconds(lambda k: buffer.sample(rng, 32, 3, 0.5)),
        milliseconds(append),
        milliseconds(lambda k: buffer.stats()),
        milliseconds(lambda k: buffer.lowest_return(0.9)),
    )

def print_scale(cfg=None, sizes=SIZES):
    """Print a line per size as it is measured.

    SystemExit if the disk has no room for the largest.
    """
    with tempfile.TemporaryDirectory() as home:
        needed = max(sizes) * ROW_BYTES * 1.2
        free = shutil.disk_usage(home)[2]
        if free < needed:
            raise SystemExit(f"{home} has {free / 1e6:.0f} MB free, and {max(sizes):,} turns need "
                             f"{needed / 1e6:.0f} MB: set TMPDIR to a folder with more room.")
        print(f"this process before: {resident_mb():.0f} MB")
        print("".join(f"{name:>11}" for name in COLUMNS), flush=True)
        for n_turns in sizes:
            folder = os.path.join(home, str(n_turns))
            make_folder(folder, n_turns)
            numbers = measure_folder(folder)
            print(f"{n_turns:>11}" + "".join(f"{number:>11.2f}" for number in numbers), flush=True)
            shutil.rmtree(folder)
