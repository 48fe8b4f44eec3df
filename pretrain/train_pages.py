"""
Trains a tiny VLM to read MiniWoB++'s pages before it meets any action syntax: bases/tiny-vlm-pages.

    pip install -r requirements-envs.txt
    apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver
    mkdir -p out && git archive b2b105d tiny-vlm-pages | tar x -C out
    python -m pretrain.train_pages out/tiny-vlm-pages out/pages

It begins with the weights of an earlier base and makes a tokenizer of its own. Then there are three stages,
with --text=900 --sight=500 --both=660 updates:
 1. text: the language model alone. Which number of a page's lines is the goal about?
 2. sight: the vision tower alone, a Swin (arXiv 2103.14030). Which text of the batch is in this patch, and
    where is its middle? This is CLIP's loss (arXiv 2103.00020) with a patch in the place of a picture. Every
    patch is an example, while the answer to "Where is it?" teaches two numbers only.
 3. both together. The patches' loss stays beside the answers', because the tower forgets without it.
"""
import math, os, sys, time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, SwinConfig

from model import load_model
from pretrain.page_questions import PAGE_WORDS, Asker, Page
from pretrain.questions import Reading
from pretrain.tiny_nets import read_numbers, rescale_weights, train_tokenizer
from worlds.miniwob import PAGE_SIZE, MiniWoB, click_places

TASKS = (
    "click-test",
    "click-test-2",
    "click-button",
    "click-dialog",
    "click-dialog-2",
    "click-link",
    "click-tab",
    "focus-text-2",
    "enter-text",
    "click-collapsible",
)
# A picture has 10 x 10 patches of 16 x 16 pixels. Each is a token of the language model.
PATCH = 16
SIDE = PAGE_SIZE // PATCH
# Labels name places in steps of 4 pixels.
PLACE_STEP = 4
PLACES = PAGE_SIZE // PLACE_STEP + 1
IGNORE = -100  # no label, for F.cross_entropy

LEARNING_RATE = 2e-3
MICRO_BATCH = 16


# ---- a tower that reads ----
def visible_features(net, pixels):
    """Return the picture's part of the language model's input: (B, 3, 160, 160) -> (B, patches, hidden).

    It takes the net's own path. A Swin's `last_hidden_state` has one more normalisation, which a LLaVA does
    not use.
    """
    features = net.model.get_image_features(pixel_values=pixels).pooler_output
    if torch.is_tensor(features):
        return features
    return torch.stack(list(features))

def patch_labels(page, names):
    """Label both halves of each patch of a page's picture -> (3, patches, 2) int64.

    A line of text is eleven pixels high, so the two halves of a patch can show parts of two lines. The first
    label is the text in it: its number in `names`, which grows; 0 for an empty half, -100 for one that only
    shows a bit of something. The second and the third label are column and row, in steps of 4 pixels, of the
    place to click on the text; -100 where there is none.
    """
    dark = np.asarray(page.picture().convert("L")) < 200
    # (rows of halves, columns)
    has_ink = dark.reshape(2 * SIDE, PATCH // 2, SIDE, PATCH).any((1, 3))
    labels = np.full((3, 2 * SIDE, SIDE), IGNORE)
    labels[0] = np.where(has_ink, IGNORE, 0)
    patch_left = np.arange(SIDE) * PATCH
    half_top = np.arange(2 * SIDE) * (PATCH // 2)
    for element in page.elements:
        left, top, width, height = element["box"]
        text = element["text"]
        if not text and element["role"] == "textbox":
            text = "textbox"
        if not 0 < len(text) <= 16 or left < 0 or top < 0:
            continue
        x, y = click_places(element)[0]
        # How much of the element each half shows, in pixels.
        shown_width = np.minimum(left + width, patch_left + PATCH) - np.maximum(left, patch_left)
        shown_height = np.minimum(top + height, half_top + PATCH // 2) - np.maximum(top, half_top)
        is_near = abs(patch_left + PATCH // 2 - x) <= 2 * PATCH
        here = (shown_height[:, None] >= 4) & (shown_width >= 6) & is_near
        labels[0, here] = names.setdefault(text, len(names) + 1)
        is_on_a_step = x % PLACE_STEP == 0 and y % PLACE_STEP == 0
        if is_on_a_step and 0 <= x <= PAGE_SIZE and 0 <= y <= PAGE_SIZE:
            labels[1, here] = x // PLACE_STEP
            labels[2, here] = y // PLACE_STEP
    by_patch = labels.reshape(3, SIDE, 2, SIDE).swapaxes(2, 3).reshape(3, -1, 2)
    return torch.from_numpy(by_patch)

def new_tower(net):
    """Put a LLaVA's language model behind a Swin and a projector with random weights -> a new net.

    A picture of 160 x 160 becomes 10 x 10 tokens. A Swin's windows and relative positions read a word alike
    wherever it is.
    """
    vision = SwinConfig(
        image_size=PAGE_SIZE,
        patch_size=4,
        embed_dim=32,
        depths=[2, 2, 2],
        num_heads=[2, 4, 8],
        window_size=5,
        mlp_ratio=3.0,
        drop_path_rate=0.0,
        use_absolute_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=net.config.text_config,
        image_token_index=net.config.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    new = rescale_weights(LlavaForConditionalGeneration(config))
    nn.init.normal_(new.model.vision_tower.embeddings.position_embeddings, 0, 0.3)
    new.model.language_model.load_state_dict(net.model.language_model.state_dict())
    new.tie_weights()
    return new

class PatchHeads(nn.Module):
    """Hold what only the training of a tower needs: heads on the patches' features.

    The text head maps both halves of a patch into the space of the word embeddings, in which `nothing` stands
    for an empty half. The place head names row and column of the patch, and the place of the text.
    """

    def __init__(self, net, tokenizer):
        super().__init__()
        hidden = net.config.text_config.hidden_size
        # A list hides the net from parameters().
        self.net = [net]
        self.tokenizer = tokenizer
        self.text_head = nn.Linear(hidden, 2 * hidden)
        self.place_head = nn.Linear(hidden, 2 * SIDE + 4 * PLACES)
        self.nothing = nn.Parameter(0.1 * torch.randn(1, hidden))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def text_vectors(self, names):
        """Return the normalised mean embedding of each text -> (names, hidden)."""
        embeddings = self.net[0].get_input_embeddings().weight.detach()
        vectors = []
        # Pages of nothing but long texts have no names.
        for name in names or ["textbox"]:
            tokens = self.tokenizer(name, add_special_tokens=False)["input_ids"]
            vectors.append(embeddings[tokens].mean(0))
        return F.normalize(torch.stack(vectors), dim=-1)

    def text_loss(self, features, labels, names):
        """Return (cross-entropy over the batch's texts, share of right halves among those with a text)."""
        halves = self.text_head(features).unflatten(-1, (2, -1))
        candidates = torch.cat([F.normalize(self.nothing, dim=-1), self.text_vectors(names)])
        logits = F.normalize(halves, dim=-1) @ candidates.T * self.scale.exp()
        weight = torch.ones(logits.shape[-1])
        # Most of a page is empty.
        weight[0] = 0.1
        loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), weight)
        is_right = logits.argmax(-1) == labels
        return loss, is_right[labels > 0].float().mean().item()

    def place_losses(self, features, x, y):
        """Return the cross-entropy of (the patches' own places, the places of the texts)."""
        logits = self.place_head(features).flatten(0, 1)
        rows, columns, xs, ys = logits.split([SIDE, SIDE, 2 * PLACES, 2 * PLACES], -1)
        patch = torch.arange(SIDE * SIDE).repeat(len(features))
        own = F.cross_entropy(rows, patch // SIDE) + F.cross_entropy(columns, patch % SIDE)
        x_loss = F.cross_entropy(xs.reshape(-1, PLACES), x.flatten())
        y_loss = F.cross_entropy(ys.reshape(-1, PLACES), y.flatten())
        return own, x_loss + y_loss

    def loss(self, features, pages):
        """Return (loss, share of the halves of patches with a text that are right).

        features: (B, patches, hidden), what visible_features returns for the pages' pictures.
        """
        names = {}
        labels = [patch_labels(page, names) for page in pages]
        # (B, patches, 2) each
        texts, x, y = torch.stack(labels, 1)
        text_loss, share = self.text_loss(features, texts, names)
        own_loss, place_loss = self.place_losses(features, x, y)
        return text_loss + 0.1 * own_loss + 0.2 * place_loss, share


# ---- words ----
def retokenize(net, processor, texts):
    """Give a net a tokenizer made of texts, in place -> (net, processor).

    The pages' words and numbers are then a token each: one thing to look for, not three. A new token begins
    as the mean of those that spelled it, with their length, and a little noise.
    """
    old = processor.tokenizer
    embeddings = net.get_input_embeddings().weight.detach()
    special = ["<|pad|>", "<|end|>", "<image>"]
    new = train_tokenizer(texts, 1536, special, extra_special_tokens={"image_token": "<image>"})
    vectors = []
    for token in range(len(new)):
        # The special tokens are the same ones in both.
        spelling = [token]
        if token >= len(special):
            spelling = old(new.decode([token]), add_special_tokens=False).input_ids
        rows = embeddings[spelling]
        mean = rows.mean(0)
        vector = mean * rows.norm(dim=-1).mean() / mean.norm().clamp(min=1e-3)
        noise = 0.3 * embeddings.std() * torch.randn(embeddings.shape[1])
        if len(rows) > 1:
            vector = vector + noise
        vectors.append(vector)
    net.resize_token_embeddings(len(new))
    net.get_input_embeddings().weight.data.copy_(torch.stack(vectors))
    processor.tokenizer = new
    return net, processor

def tokenizer_texts(asker, deal, n=12000):
    """Yield texts for the tokenizer: n questions and answers, some prompts, then words and numbers.

    A prompt comes without its last line, which shows an action. deal() draws a page.
    """
    for i in range(n):
        page = deal()
        _, question, answer = asker.ask(page)
        yield question
        yield answer
        if i % 20 == 0:
            yield page.goal
            yield page.prompt().rpartition("\n")[0]
            yield "End your reply with an action, for example:"
    for word in PAGE_WORDS:
        for _ in range(20):
            yield f"'{word}'"
            yield f'"{word}"'
            yield f" {word}"
    for number in range(PAGE_SIZE + 1):
        for _ in range(50):
            yield str(number)


# ---- training ----
class Example(NamedTuple):
    """Hold a question about a page; without its picture, the page's lines are enough for the answer."""

    page: Page
    has_picture: bool
    question: str
    answer: str

def draw_examples(asker, deal, stage, batch):
    """Draw the examples of an update, similar ones beside each other: less padding."""
    pages = [deal() for _ in range(batch)]
    examples = []
    for i, page in enumerate(pages):
        # Where both parts learn, a fifth of the questions comes without a picture.
        has_picture = stage == "sight" or (stage == "both" and i >= 0.2 * batch)
        question = ""
        answer = ""
        if stage != "sight":
            text_share = 0.3 if has_picture else 1.0
            _, question, answer = asker.ask(page, text_share)
        examples.append(Example(page, has_picture, question, answer))
    return sorted(examples, key=lambda example: (example.has_picture, len(example.question)))

def micro_batches(examples):
    """Yield parts of a sorted batch, those without a picture first.

    Both rounds cut the batch from its beginning. So in the last stage the first part comes twice, and may
    hold a few questions that lack their picture. This flaw stays because tiny-vlm-pages was made with it.
    """
    for has_picture in (False, True):
        count = sum(example.has_picture == has_picture for example in examples)
        for start in range(0, count, MICRO_BATCH):
            yield examples[start : start + MICRO_BATCH]

def answers_loss(net, tokenizer, asked, features=None):
    """Return the sum over the answers of cross-entropy / tokens ** 0.75.

    A short answer then counts nearly as much as a long one. asked: [(question, answer), ...]. features: (B,
    patches, hidden) of their pictures, or None for questions without pictures.
    """
    image = "<image>" * (SIDE * SIDE) if features is not None else ""
    prompts = [tokenizer(f"{image}{question}\n>").input_ids for question, _ in asked]
    answers = [tokenizer(answer).input_ids + [tokenizer.eos_token_id] for _, answer in asked]
    P = max(map(len, prompts))
    R = max(map(len, answers))
    # The prompts end at P, the answers begin there.
    ids = torch.full((len(asked), P + R), tokenizer.eos_token_id)
    mask = torch.zeros(len(asked), P + R, dtype=torch.long)
    labels = torch.full((len(asked), R), IGNORE)
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        row = slice(P - len(prompt), P + len(answer))
        ids[i, row] = torch.tensor(prompt + answer)
        mask[i, row] = 1
        labels[i, : len(answer)] = torch.tensor(answer)
    embedded = net.get_input_embeddings()(ids)
    if features is not None:
        is_image = ids == net.config.image_token_id
        embedded = embedded.masked_scatter(is_image[..., None], features.to(embedded.dtype))
    output = net.model.language_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    # The state before a token predicts it.
    logits = net.lm_head(output.last_hidden_state[:, P - 1 : -1]).float()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    tokens = (labels != IGNORE).sum(1)
    return (loss.view(labels.shape).sum(1) / tokens**0.75).sum()

def part_loss(net, processor, heads, part, stage, batch):
    """Return (loss of a micro-batch, its share of right patches or None); batch: examples of the update."""
    pages = [example.page for example in part]
    has_picture = part[0].has_picture
    features = None
    share = None
    loss = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        if has_picture:
            pictures = [page.picture() for page in pages]
            pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
            features = visible_features(net, pixels)
        if stage != "sight":
            asked = [(example.question, example.answer) for example in part]
            loss = answers_loss(net, processor.tokenizer, asked, features) / batch
    if has_picture:
        patches, share = heads.loss(features.float(), pages)
        loss = loss + patches * len(part) / batch
    return loss, share

def learning_rate_at(update, updates):
    """Return the learning rate: a warm-up, then a cosine down to a tenth."""
    warmup = (update + 1) / 30
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * update / updates))
    return LEARNING_RATE * min(warmup, cosine)

def parameter_groups(net, heads):
    """Return the parameters of (tower and projector, language model, heads), which are clipped apart."""
    tower = []
    language = []
    for name, weight in net.named_parameters():
        is_tower = "vision_tower" in name or "projector" in name
        group = tower if is_tower else language
        group.append(weight)
    return tower, language, list(heads.parameters())

def train_stage(net, processor, heads, stage, updates, draw_batch, began):
    """Train net and heads in place for a number of updates.

    draw_batch(stage): draws the examples of an update. began: when the training began, for the messages.
    """
    groups = parameter_groups(net, heads)
    weights = [weight for group in groups for weight in group]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(update, updates)
        examples = draw_batch(stage)
        total = 0.0
        shares = []
        for part in micro_batches(examples):
            loss, share = part_loss(net, processor, heads, part, stage, len(examples))
            loss.backward()
            total += loss.item()
            if share is not None:
                shares.append(share)
        for group in groups:
            nn.utils.clip_grad_norm_(group, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if update % 50 == 49 or update == updates - 1:
            right = f"  patches right {100 * np.mean(shares):.0f} %" if shares else ""
            seconds = time.time() - began
            print(f"{stage} {update + 1}  loss {total:.2f}{right}  {seconds:.0f} s", flush=True)

def train_on_pages(folder, out, text=900, sight=500, both=660, batch=64):
    """Train a base on pages, from the weights in a folder, and write it to the folder `out`.

    text, sight, both: updates of the three stages. SystemExit if the folder holds another kind of model.
    """
    net, processor = load_model(folder)
    if net.config.model_type != "llava" or processor.patch_size != PATCH:
        raise SystemExit(f"model={folder!r} is a {net.config.model_type!r} model: pages are read by a tiny "
                         "LLaVA of 16-pixel tokens, such as bases/tiny-vlm-pages.")
    began = time.time()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    asker = Asker(rng)
    readers = {}
    for task in TASKS:
        world = MiniWoB(f"miniwob/{task}-v1", size=PAGE_SIZE)
        readers[task] = Reading(world, size=PAGE_SIZE)
    # The crowded pages of click-button are the hardest, so they come four times as often.
    drawn_tasks = []
    for task in TASKS:
        drawn_tasks += [task] * (4 if task == "click-button" else 1)

    def deal():
        return readers[asker.pick(drawn_tasks)].page(rng)

    def draw_batch(stage):
        return draw_examples(asker, deal, stage, batch)

    if net.config.vision_config.model_type != "swin":
        net = new_tower(net)
    # Not a generator: the tokenizer's Rust code would hold back Ctrl-C and `kill` until the last page.
    texts = list(tokenizer_texts(asker, deal))
    net, processor = retokenize(net, processor, texts)
    processor.vision_feature_select_strategy = "full"
    processor.num_additional_image_tokens = 0
    # On a CPU, the backward pass of the fused attention is slow in bfloat16.
    net.set_attn_implementation("eager")
    heads = PatchHeads(net, processor.tokenizer)
    for stage, updates in (("text", text), ("sight", sight), ("both", both)):
        train_stage(net, processor, heads, stage, updates, draw_batch, began)
        net.save_pretrained(out)
        processor.save_pretrained(out)
    for reader in readers.values():
        reader.close()
    net.half().save_pretrained(out)


USAGE = (
    "Name the folder of the weights to begin with and a new folder: python -m pretrain.train_pages "
    "bases/tiny-vlm-pages FOLDER [--text=900 --sight=500 --both=660 --batch=64]"
)

def main(argv):
    """Read the command line and train."""
    if len(argv) < 2 or any(word.startswith("-") for word in argv[:2]):
        raise SystemExit(USAGE)
    folder, out = argv[:2]
    numbers = read_numbers(argv[2:], {"text", "sight", "both", "batch"}, USAGE)
    if os.path.exists(out):
        raise SystemExit(f"{out!r} exists already: name a new folder.")
    train_on_pages(folder, out, **numbers)


if __name__ == "__main__":
    main(sys.argv[1:])
