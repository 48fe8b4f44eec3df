"""
Make a tiny base from random weights: a LLaVA that reads pictures before it meets any action syntax.

    pip install -r requirements-envs.txt
    python -m pretrain.train_base tiny-vlm-worlds --out=out/bases

pretrain/recipes.py lists the bases and their stages. Each stage ends in a folder of its own, such as
out/bases/tiny-vlm-worlds-2-boards. Stop it at any time: the same command goes on behind the last of them. The
base itself is out/bases/tiny-vlm-worlds, in half precision.
"""
import math, os, sys, time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from configurator import configure
from envs import MARKER
from extras.flag_mistakes import ConfigError
from extras.published_names import publish_names
from extras.value_checks import check_out_dir, check_ranges
from extras.whole_files import replacing
from model import load_model
from pretrain.page_questions import MOST_LINES, Asker, Page
from pretrain.questions import corpus
from pretrain.recipes import RECIPES
from pretrain.sight import IGNORE, Board, Sight, board_of, random_board
from pretrain.tiny_nets import llava, with_focalnet
from pretrain.walls import WALLS, draw_wall
from worlds.registry import make, reading_names

# Updates of linear warm-up. Then a cosine ends at MIN_LR times the learning rate.
WARMUP = 30
MIN_LR = 0.1
MICRO_BATCH = 32
# So many answers go through the language model at once: questions of one length need little padding.
ANSWERS = 8
# A narrowed board grows when the mean loss falls below it.
FOUND = 0.5
LOG_EVERY = 50
# Most words of a list that is shown to be looked up in.
LISTED = 40
# So many pieces of it are to be repeated.
PIECES = 8
SIGHT = "sight.safetensors"

# --- config ---
out = 'out/bases'  # where the folders of the stages and of the base lie
seed = 0           # of the weights and of the questions
# --- end of config ---

# ---- questions ----
class Example(NamedTuple):
    """A question with its answer.

    board: what the picture shows, None without a picture. picture: None where the language model is shown
    the board's ideal features instead. in_loss: of an answer's tokens, "all", "numbers", "none", or
    "continued", which leaves out what begins a piece. letters: those of the picture, see Wall; None if
    nobody says where they are.
    """

    question: str
    answer: str
    board: Board = None
    picture: Image.Image = None
    in_loss: str = "all"
    letters: np.ndarray = None

def printable_texts(tokenizer):
    """List the texts of a tokenizer's tokens that can stand in a line of text, special ones left out."""
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(tokenizer))]
    # bytes of other alphabets are no text alone
    return [text for text in texts if text.strip() and text.isprintable() and "\ufffd" not in text]

class Questions:
    """Draw the examples of a stage: each of its `kinds` is the name of a method here."""

    # {(patches on a side, number): Wall}. All stages share them: a browser is slow.
    walls = {}

    def __init__(self, recipe, stage, tokenizer, seed):
        self.recipe = recipe
        self.stage = stage
        self.vocabulary = printable_texts(tokenizer)
        self.rng = np.random.default_rng(seed)
        made = {name: make(name, size=recipe.size) for name in dict.fromkeys(stage.asked)}
        self.readings = [made[name] for name in stage.asked]
        for reading in made.values():
            reading.rng = self.rng
        # how many patches a made-up board has, and how many names its things come from
        self.patches = 2 if stage.is_narrowed else recipe.side**2
        self.names = stage.names or len(recipe.names)
        self.recent_losses = []

    def next_reading(self):
        """Draw one of the stage's environments."""
        return self.readings[self.rng.integers(len(self.readings))]

    def copying(self):
        """Ask to repeat a text, without a picture."""
        _, question, answer = self.next_reading().echo()
        return Example(question, answer)

    def any_tokens(self):
        """Ask to repeat any printable tokens of the vocabulary, without a picture.

        Embeddings of tokens that no answer needs end up pointing the same way, so that none of them can
        become likely. An action syntax needs some of them (docs/log.md).
        """
        text = MARKER
        while MARKER in text:
            count = self.rng.integers(3, 12)
            chosen = self.rng.integers(len(self.vocabulary), size=count)
            text = "".join(self.vocabulary[i] for i in chosen).strip()
        return Example(f"Repeat:\n{text}", text)

    def recalling(self):
        """Show words, then ask to go on behind some of them, again and again.

        A net that has only repeated texts in their order goes by the distance between a word and its copy.
        Here the distance changes with every piece, so it has to look a word up and say what stood behind it.
        """
        known = self.recipe.names[: self.names]
        count = min(LISTED, 4 * self.patches)
        shown = [known[i] for i in self.rng.permutation(len(known))[:count]]
        pieces = []
        for _ in range(PIECES):
            start = self.rng.integers(len(shown) - 1)
            length = self.rng.integers(2, 9)
            pieces.append(" ".join(shown[start : start + length]))
        return Example(" ".join(shown), ", ".join(pieces), in_loss="continued")

    def numbers(self):
        """Show a list of elements, and ask for the numbers of some texts; the answer repeats the texts."""
        asker = Asker(self.rng)
        asked = None
        while not asked:
            # a list that names nothing once has nothing to ask for
            asked = asker.ask_listing(asker.listing(), which=0)
        _, question, answer = asked
        return Example(question, answer, in_loss="numbers")

    def target(self):
        """Show a goal and a list, and ask for the number of the element that the goal is about.

        The goal stands first, as in play, and nothing repeats its text: what to look up has to be found, too.
        """
        question, number = Asker(self.rng).plain_target(min(MOST_LINES, self.patches))
        return Example(question, str(number), in_loss="numbers")

    def board(self):
        """Ask where some things on a made-up board are.

        The language model learns their places only. It can copy names already. It finds a name sooner if the
        place follows at once, without a quote between them.
        """
        board, places = self.made_up_board()
        step = self.recipe.step
        answers = [f"{name} {step * column} {step * row}" for name, (column, row) in places.items()]
        if self.recipe.is_quoted:
            # without a space before a name, as behind a quote
            question = f"Which places have:{','.join(places)}?"
            answer = ",".join(answers)
        else:
            question = f"Which places have {', '.join(places)}?"
            answer = ", ".join(answers)
        return Example(question, answer, board, in_loss="numbers")

    def where(self):
        """Ask where a thing on a made-up board is; the answer does not repeat its name.

        So the model has to gather the words of the name from the question before it can look for it.
        """
        board, places = self.made_up_board()
        step = self.recipe.step
        names = list(places)
        name = names[self.rng.integers(len(names))]
        column, row = places[name]
        return Example(f"Where is the {name}?", f"{step * column} {step * row}", board)

    def made_up_board(self):
        """Draw a board with as many patches and names as the stage has come to -> (board, places)."""
        known = self.recipe._replace(names=self.recipe.names[: self.names])
        return random_board(self.rng, known, self.patches)

    def ideal(self):
        """Ask about a state of a world, which is shown as ideal features."""
        return self.state(has_picture=False)

    def sight(self):
        """Ask nothing about a state: what its patches show is enough to learn from."""
        return self.state()._replace(in_loss="none")

    def wall(self):
        """Show a page full of words, and ask nothing."""
        number = int(self.rng.integers(WALLS))
        key = (self.recipe.side, number)
        if key not in self.walls:
            world = self.next_reading().world
            self.walls[key] = draw_wall(world, np.random.default_rng(number), self.recipe)
        wall = self.walls[key]
        return Example("", "", wall.board, wall.picture, in_loss="none", letters=wall.letters)

    def letters(self):
        """Show such a page to a tower that has to tell letters apart before it can learn words."""
        return self.wall()._replace(board=None)

    def text(self):
        """Ask about a web page without its picture: its lines are enough for the answer."""
        page = self.next_reading().page(self.rng)
        _, question, answer = Asker(self.rng).ask(page, text_share=1.0)
        return Example(question, str(answer))

    def state(self, has_picture=True):
        """Ask about the picture of a state of a world; it is not drawn if it is not needed."""
        reading = self.next_reading()
        reading.start()
        shown = reading.game if isinstance(reading.game, Page) else reading.world
        board = board_of(shown, self.recipe)
        picture = reading.picture() if has_picture else None
        return Example(reading.question, reading.answer, board, picture)

    def widen(self, loss):
        """Double the patches of a narrowed board, and the names, once its things are found.

        loss: the mean over the examples of the last update, those without a board included.
        """
        self.recent_losses.append(loss)
        everything = self.recipe.side**2
        is_found = np.mean(self.recent_losses[-10:]) < FOUND and len(self.recent_losses) >= 10
        if is_found and self.patches < everything:
            self.patches = min(everything, 2 * self.patches)
            self.names = min(len(self.recipe.names), 2 * self.names)
            self.recent_losses = []
            print(f"{self.stage.name}: grown to {self.patches} patches, {self.names} names", flush=True)

    def draw(self):
        """Draw the examples of an update, similar ones beside each other."""
        kinds = [self.stage.kinds[i % len(self.stage.kinds)] for i in range(self.stage.batch)]
        examples = [getattr(self, kind)() for kind in kinds]
        return sorted(examples, key=lambda example: len(example.question))

    def close(self):
        for reading in set(self.readings):
            reading.close()


# ---- the loss of a batch ----
def see(net, pixels):
    """Return what a net makes of pictures (B, 3, size, size) -> (features, hidden states of its tower).

    features: (B, patches, hidden), the picture's part of the language model's input. It takes the net's own
    path, because some towers' `last_hidden_state` has one more normalisation, which a LLaVA does not use.
    """
    seen = net.model.get_image_features(pixel_values=pixels)
    features = seen.pooler_output
    if not torch.is_tensor(features):
        features = torch.stack(list(features))
    return features, seen.hidden_states

def answer_labels(tokenizer, example):
    """Return (the token ids of an answer with its end, the labels, with IGNORE where nothing is learned)."""
    ids = tokenizer(example.answer).input_ids + [tokenizer.eos_token_id]
    if example.in_loss == "all":
        return ids, ids
    texts = [tokenizer.decode([token]) for token in ids]
    flags = [text.strip().isdigit() for text in texts]
    if example.in_loss == "continued":
        flags = continued(texts)
    return ids, [token if flag else IGNORE for token, flag in zip(ids, flags)]

def continued(texts):
    """Tell of each token's text whether it goes on with a piece; commas lie between the pieces."""
    flags = []
    piece = ""
    for text in texts:
        is_comma = "," in text
        flags.append(bool(piece.strip()) and not is_comma)
        piece = "" if is_comma else piece + text
    return flags

def answers_loss(net, tokenizer, examples, features=None):
    """Return the sum over the answers of cross-entropy / labels ** 0.75.

    A short answer then counts nearly as much as a long one. examples: anything with question, answer and
    in_loss. features: (B, patches, hidden), or None for questions without pictures.
    """
    image = "<image>" * features.shape[1] if features is not None else ""
    prompts = [tokenizer(f"{image}{example.question}\n>").input_ids for example in examples]
    answers = [answer_labels(tokenizer, example) for example in examples]
    P = max(map(len, prompts))
    R = max(len(answer) for answer, _ in answers)
    # The prompts end at P, the answers begin there.
    ids = torch.full((len(examples), P + R), tokenizer.eos_token_id)
    mask = torch.zeros(len(examples), P + R, dtype=torch.long)
    labels = torch.full((len(examples), R), IGNORE)
    for i, (prompt, (answer, label)) in enumerate(zip(prompts, answers)):
        row = slice(P - len(prompt), P + len(answer))
        ids[i, row] = torch.tensor(prompt + answer)
        mask[i, row] = 1
        labels[i, : len(answer)] = torch.tensor(label)
    embedded = net.get_input_embeddings()(ids)
    if features is not None:
        is_image = ids == net.config.image_token_id
        embedded = embedded.masked_scatter(is_image[..., None], features.to(embedded.dtype))
    output = net.model.language_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    # The state before a token predicts it.
    logits = net.lm_head(output.last_hidden_state[:, P - 1 : -1]).float()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    count = (labels != IGNORE).sum(1).clamp(min=1)
    return (loss.view(labels.shape).sum(1) / count**0.75).sum()

def sight_loss(sight, features, states, part):
    """Return (mean loss of what a tower shows of some pictures, its share of right patches or None)."""
    share = None
    loss = 0.0
    if part[0].board is not None:
        boards = [example.board for example in part]
        loss, share = sight.loss(features, boards)
    if part[0].letters is not None:
        # states[0] is what the tower's first stage begins with, states[1] what it hands on
        letters = torch.tensor(np.stack([example.letters for example in part]))
        loss = loss + sight.letters_loss(states[1], letters)
        if part[0].board is not None:
            loss = loss + sight.spelling_loss(states[-1], boards)
    return loss, share

def part_loss(net, processor, sight, part):
    """Return (summed loss of a micro-batch, its share of right patches or None)."""
    boards = [example.board for example in part]
    share = None
    features = None
    loss = 0.0
    if part[0].picture is not None:
        pictures = [example.picture for example in part]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        features, states = see(net, pixels)
        loss, share = sight_loss(sight, features, states, part)
        loss = loss * len(part)
    elif part[0].board is not None:
        features = sight.ideal(boards)
    if part[0].in_loss == "none":
        return loss, share
    for start in range(0, len(part), ANSWERS):
        few = slice(start, start + ANSWERS)
        shown = None if features is None else features[few]
        loss = loss + answers_loss(net, processor.tokenizer, part[few], shown)
    return loss, share

def micro_batches(examples):
    """Yield parts of a sorted batch; all examples of a part are shown and learned in the same way."""
    groups = {}
    for example in examples:
        has = (example.board is None, example.picture is None, example.letters is None)
        way = (*has, example.in_loss == "none")
        groups.setdefault(way, []).append(example)
    for way in sorted(groups):
        for start in range(0, len(groups[way]), MICRO_BATCH):
            yield groups[way][start : start + MICRO_BATCH]


# ---- training ----
def learning_rate_at(update, stage):
    """Return the learning rate: a warm-up, then a cosine."""
    warmup = (update + 1) / WARMUP
    cosine = MIN_LR + (1 - MIN_LR) / 2 * (1 + math.cos(math.pi * update / stage.updates))
    return stage.lr * min(warmup, cosine)

def parameter_groups(net, sight):
    """Return the parameters of (tower and projector, language model, sight), which are clipped apart."""
    tower = []
    language = []
    for name, weight in net.named_parameters():
        is_tower = "vision_tower" in name or "projector" in name
        group = tower if is_tower else language
        group.append(weight)
    return tower, language, list(sight.parameters())

def train_stage(net, processor, sight, questions):
    """Train net and sight in place as a stage says, with a line of numbers every 50 updates."""
    stage = questions.stage
    groups = parameter_groups(net, sight)
    weights = [weight for group in groups for weight in group]
    optimizer = torch.optim.AdamW(weights, stage.lr, weight_decay=0.01, betas=(0.9, 0.98))
    began = time.time()
    losses = []
    shares = []
    for update in range(stage.updates):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(update, stage)
        examples = questions.draw()
        total = 0.0
        for part in micro_batches(examples):
            loss, share = part_loss(net, processor, sight, part)
            loss = loss / len(examples)
            loss.backward()
            total += loss.item()
            if share is not None:
                shares.append(share)
        for group in groups:
            nn.utils.clip_grad_norm_(group, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        questions.widen(total)
        if (update + 1) % LOG_EVERY == 0 or update + 1 == stage.updates:
            right = f"  patches right {100 * np.nanmean(shares):.0f} %" if shares else ""
            seconds = time.time() - began
            numbers = f"loss {np.mean(losses):.3f}{right}  {seconds:.0f} s"
            print(f"{stage.name} {update + 1}  {numbers}", flush=True)
            losses = []
            shares = []


# ---- the folders ----
def asked_by(recipe):
    """List the Reading environments of all stages, each once."""
    asked = {name: None for stage in recipe.stages for name in stage.asked}
    return reading_names(",".join(asked))

def new_net(recipe):
    """Build a net with random weights and a tokenizer of the recipe's texts -> (net, processor)."""
    readings = [make(name, size=recipe.size) for name in asked_by(recipe)]
    texts = list(corpus(6000, readings=readings))
    for token in recipe.tokens:
        texts += [f" '{token}'", f'"{token}"', f" {token}"] * 50
    net, processor = llava(texts, vocab_size=recipe.words, image_size=recipe.size)
    if recipe.reads_letters:
        return with_focalnet(net, processor, recipe.size)
    return net, processor

def origin_of(recipe, last, seed):
    """Describe what makes the folder of stage number `last`, as far as recipe and seed say it.

    The tokenizer depends on the environments of all stages.
    """
    until = recipe._replace(stages=recipe.stages[: last + 1])
    return f"{until}, tokenizer of {asked_by(recipe)}, seed {seed}"

def save_stage(net, processor, sight, folder, origin):
    """Write what a stage has made; the folder is there only when it is complete."""
    with replacing(folder) as aside:
        publish_names(net).save_pretrained(aside)
        processor.save_pretrained(aside)
        save_file(sight.state_dict(), os.path.join(aside, SIGHT), metadata={"origin": origin})

def finished_stages(recipe, folders, seed):
    """Return the number of the last stage that is there, 0 for none; earlier ones are not needed.

    ConfigError if another recipe or seed has made it, or if it is damaged.
    """
    there = [i for i, folder in enumerate(folders) if os.path.isdir(folder)]
    if not there:
        return 0
    last = max(there)
    try:
        with safe_open(os.path.join(folders[last], SIGHT), "pt") as file:
            origin = (file.metadata() or {}).get("origin")
    except (OSError, SafetensorError):
        raise ConfigError(f"{folders[last]!r} is not complete: delete it.")
    if origin != origin_of(recipe, last, seed):
        raise ConfigError(f"{folders[last]!r} was made with another seed or another recipe: name another "
                          "--out, or delete it.")
    return last + 1

def make_base(name, out, seed=0):
    """Make a base by its recipe, stage by stage, behind those that are in the folder `out` already.

    ConfigError if those were made with another seed or another recipe.
    """
    recipe = RECIPES[name]
    folders = [os.path.join(out, f"{name}-{i + 1}-{stage.name}") for i, stage in enumerate(recipe.stages)]
    done = finished_stages(recipe, folders, seed)
    torch.manual_seed(seed)
    if done:
        print(f"goes on from {folders[done - 1]}", flush=True)
        net, processor = load_model(folders[done - 1])
    else:
        net, processor = new_net(recipe)
    sight = Sight(net.get_input_embeddings(), processor.tokenizer, recipe)
    if done:
        sight.load_state_dict(load_file(os.path.join(folders[done - 1], SIGHT)))
    for i, stage in enumerate(recipe.stages):
        if i < done:
            continue
        torch.manual_seed(seed + i)
        questions = Questions(recipe, stage, processor.tokenizer, (seed, i))
        train_stage(net, processor, sight, questions)
        questions.close()
        if questions.patches < recipe.side**2 or questions.names < len(recipe.names):
            raise SystemExit(f"After all updates of the stage {stage.name}, {questions.names} things are "
                             f"found among {questions.patches} patches only: try another --seed.")
        save_stage(net, processor, sight, folders[i], origin_of(recipe, i, seed))
    with replacing(os.path.join(out, name)) as aside:
        publish_names(net.half()).save_pretrained(aside)
        processor.save_pretrained(aside)

def main(argv):
    """Make the base that the command line names."""
    words = [word for word in argv if not word.startswith("-")]
    flags = [word for word in argv if word.startswith("-")]
    cfg = configure(__file__, flags, files=False, quiet=True)
    if len(words) != 1 or words[0] not in RECIPES:
        said = f"{' '.join(words)!r} is no recipe: name" if words else "Name"
        raise ConfigError(f"{said} one of {', '.join(RECIPES)}, such as python -m pretrain.train_base "
                          f"{list(RECIPES)[0]} --out=out/bases")
    check_out_dir(cfg.out, "--out")
    check_ranges(cfg, [("seed", lambda seed: seed >= 0, "0 or more")], "--")
    if os.path.exists(os.path.join(cfg.out, words[0])):
        raise ConfigError(f"{os.path.join(cfg.out, words[0])!r} is there already: name another --out.")
    os.makedirs(cfg.out, exist_ok=True)
    try:
        make_base(words[0], cfg.out, cfg.seed)
    except KeyboardInterrupt:
        raise SystemExit("\nStopped by you: the same command goes on behind the last finished stage.")


if __name__ == "__main__":
    main(sys.argv[1:])
