"""
Ask a base questions about held-out states of its worlds, and count the right answers of each kind.

    python -m pretrain.score_base bases/tiny-vlm-worlds Finding:BabyAI-GoToLocal-v0:view Leading:FrozenLake

The states begin with starts that training never draws. An answer is right if it is the same text, greedily
decoded. --hide=True shows a grey picture instead: what is still right then was guessed, or needs no picture.
"""
import sys
from collections import Counter

import numpy as np
from PIL import Image
from tqdm import tqdm

from configurator import configure
from evaluate import wilson
from extras.flag_mistakes import ConfigError
from extras.value_checks import check_ranges
from model import VLM, load_model
from worlds.registry import QUESTIONS, make

# --- config ---
questions = 200  # for each environment
batch = 50       # questions at once
seed = 1         # of the states and of the questions
hide = False     # show a grey picture instead
# --- end of config ---

def ask(vlm, asked, hide):
    """Ask a model [(picture, question, answer), ...] -> whether each answer is right."""
    prompts = []
    for picture, question, _ in asked:
        if hide:
            picture = Image.new("RGB", picture.size, (127, 127, 127))
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompts.append(vlm.encode([{"role": "user", "content": content}], [picture]))
    longest = max(len(vlm.reply_ids(answer)) for _, _, answer in asked)
    replies, _ = vlm.generate(prompts, longest + 1, temperature=0.0)
    return [vlm.decode(reply).strip() == answer for reply, (_, _, answer) in zip(replies, asked)]

def draw(reading, count):
    """Draw questions about held-out states -> [(kind, picture, question, answer), ...]."""
    reading.is_held_out = True
    asked = []
    for _ in range(count):
        reading.start()
        asked.append((reading.kind, reading.picture(), reading.question, reading.answer))
    return asked

def score(vlm, reading, cfg):
    """Return {kind: (right, asked)} of an environment."""
    reading.rng = np.random.default_rng(cfg.seed)
    right = Counter()
    total = Counter()
    for start in tqdm(range(0, cfg.questions, cfg.batch), desc=reading.name, leave=False):
        asked = draw(reading, min(cfg.batch, cfg.questions - start))
        is_right = ask(vlm, [rest for _, *rest in asked], cfg.hide)
        for (kind, *_), flag in zip(asked, is_right):
            right[kind] += flag
            total[kind] += 1
    return {kind: (right[kind], total[kind]) for kind in total}

def percent(right, total):
    """Write a share with its Wilson interval."""
    low, high = wilson(right, total)
    return f"{100 * right / total:5.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {total}"

def make_readings(names, size):
    """Make the environments of questions; ConfigError for a name that does not ask about held-out states."""
    readings = []
    for name in names:
        kind, _, about = name.partition(":")
        if kind not in QUESTIONS:
            raise ConfigError(f"{name!r} asks no questions: write {', '.join(QUESTIONS)} before a world, "
                              "such as Finding:FrozenLake.")
        if not about or "," in name:
            raise ConfigError(f"{name!r} names no world or several: write one behind each kind of question, "
                              "such as Finding:FrozenLake; the card games hold no states out.")
        try:
            readings.append(make(name, size=size))
        except ValueError as error:
            raise ConfigError(str(error))
    return readings

def main(argv):
    """Print a table: a line for each kind of question of each environment."""
    words = [word for word in argv if not word.startswith("-")]
    flags = [word for word in argv if word.startswith("-")]
    cfg = configure(__file__, flags, files=False, quiet=True)
    if len(words) < 2:
        raise ConfigError("Name a base and what to ask: python -m pretrain.score_base bases/tiny-vlm-worlds "
                          "Finding:BabyAI-GoToLocal-v0:view")
    check_ranges(cfg, [("questions batch", lambda number: number >= 1, "1 or more")], "--")
    check_ranges(cfg, [("seed", lambda seed: seed >= 0, "0 or more")], "--")
    folder, *names = words
    net, processor = load_model(folder)
    vlm = VLM(net, processor, folder)
    # a tower takes pictures of one size
    readings = make_readings(names, net.config.vision_config.image_size)
    for name, reading in zip(names, readings):
        found = score(vlm, reading, cfg)
        for kind, (right, total) in sorted(found.items()):
            print(f"{name:<40} {kind:<14} {percent(right, total)}", flush=True)
        reading.close()


if __name__ == "__main__":
    main(sys.argv[1:])
