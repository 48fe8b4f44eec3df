"""
Teaches a vision tower to read before a language model listens to it: which of the batch's texts stands in this patch?

    python extras/sight.py tiny-vlm-pages out/sight --updates=1000      # the language model of the first folder, and a new tower that reads MiniWoB++'s pages, in the second

The loss is CLIP's (arXiv 2103.00020) with a patch in the place of a picture: a patch's feature, of length 1, times the texts' mean word embeddings. Every patch of a picture is an example, and nothing has to be
written: a language model that is asked where a text stands is told two numbers a question, and learned no texts but those that always stand in the same place. The tower is a Swin (arXiv 2103.14030):
its windows and relative positions read a word alike wherever it stands. A new projector learns along, and must keep row and column, which the language model has to say.
"""
import os, sys, time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

TASKS = ("click-test-2", "click-button", "click-dialog", "click-dialog-2", "click-link", "click-tab", "focus-text-2", "enter-text", "click-collapsible")
SIZE, SIDE = 160, 10        # pixels of a picture, patches of 16 of them


def new_tower(net):
    """The LLaVA `net`'s language model before a Swin and a projector with random weights: a picture of SIZE x SIZE becomes SIDE x SIDE tokens."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SwinConfig
    from extras.scratch import awake
    vision = SwinConfig(image_size=SIZE, patch_size=4, embed_dim=32, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=5, mlp_ratio=3.0, drop_path_rate=0.0, use_absolute_embeddings=True)
    new = awake(LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=net.config.text_config, image_token_index=net.config.image_token_id, vision_feature_layer=-1,
                                                          vision_feature_select_strategy="full", tie_word_embeddings=True)))
    nn.init.normal_(new.model.vision_tower.embeddings.position_embeddings, 0, 0.3)
    new.model.language_model.load_state_dict(net.model.language_model.state_dict())
    new.tie_weights()
    return new


def labels(page, names):
    """What stands in each patch of a page's picture: the text's place in `names`, which grows, + 1; 0 nothing; -100 what only shows a bit of something. (SIDE * SIDE,) int64."""
    ink = (np.asarray(page.picture().convert("L")) < 200).reshape(SIDE, 16, SIDE, 16).any((1, 3))
    out, low = np.where(ink, -100, 0), np.arange(SIDE) * 16
    for e in page.elements:
        (left, top, w, h), text = e["box"], e["text"]
        if 0 < len(text) <= 16 and left >= 0 and top >= 0:
            wide, high = (np.minimum(start + long, low + 16) - np.maximum(start, low) for start, long in ((left, w), (top, h)))
            out[(high[:, None] >= min(8, 0.45 * h)) & (wide[None] >= 6)] = names.setdefault(text, len(names) + 1)
    return torch.from_numpy(out.reshape(-1))


class Sight(nn.Module):
    """Tower and projector of `net`, with what only their training needs: a head to the words' space, one for row and column, a vector for "nothing"."""
    def __init__(self, net, tokenizer):
        super().__init__()
        words = net.get_input_embeddings().weight.detach()
        self.tower, self.projector, self.words, self.tokenizer = net.model.vision_tower, net.model.multi_modal_projector, words.clone(), tokenizer
        self.head, self.place, self.nothing, self.scale = nn.Linear(words.shape[1], words.shape[1]), nn.Linear(words.shape[1], 2 * SIDE), nn.Parameter(0.1 * torch.randn(1, words.shape[1])), nn.Parameter(torch.tensor(2.0))
    def forward(self, pixels): return self.projector(self.tower(pixels).last_hidden_state).float()         # (B, patches, hidden)
    def texts(self, names): return F.normalize(torch.stack([self.words[self.tokenizer(name, add_special_tokens=False)["input_ids"]].mean(0) for name in names]), dim=-1)
    def loss(self, pixels, right, names):
        """-> (cross-entropy over the batch's texts + 0.1 of that of rows and columns, share of the patches with a text that are right). right: (B, patches), as `labels` says."""
        with torch.autocast("cpu", torch.bfloat16):
            feature = self(pixels)
        logits = F.normalize(self.head(feature), dim=-1) @ torch.cat([F.normalize(self.nothing, dim=-1), self.texts(names)]).T * self.scale.exp()
        weight, at = torch.ones(len(names) + 1), torch.arange(SIDE * SIDE).repeat(len(right))
        weight[0] = 0.1                                             # most of a page is empty
        rows, columns = self.place(feature).flatten(0, 1).split(SIDE, -1)
        where = F.cross_entropy(rows, at // SIDE) + F.cross_entropy(columns, at % SIDE)
        return F.cross_entropy(logits.flatten(0, 1), right.flatten(), weight) + 0.1 * where, (logits.argmax(-1) == right)[right > 0].float().mean().item()


def main(folder, out, updates=1000, batch=64, lr=2e-3):
    from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup
    from extras.reading import Captions
    from model import load_model
    net, processor = load_model(folder)
    if net.config.model_type != "llava" or processor.patch_size != 16:
        raise SystemExit(f"model={folder!r} is a {net.config.model_type!r} model: a new tower of 16-pixel tokens can be given to the tiny LLaVAs only, such as tiny-vlm-pages.")
    torch.manual_seed(0)
    net, rng, began = new_tower(net), np.random.default_rng(0), time.time()
    sight, readers = Sight(net, processor.tokenizer), [Captions(f"miniwob/{task}-v1", size=SIZE) for task in TASKS]
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    optimizer = torch.optim.AdamW(sight.parameters(), lr, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 50, updates, min_lr_rate=0.05)
    for update in range(updates):
        pages, names = [readers[rng.integers(len(readers))].page(rng) for _ in range(batch)], {}
        right = torch.stack([labels(page, names) for page in pages])
        pixels = processor.image_processor([page.picture() for page in pages], return_tensors="pt")["pixel_values"]
        loss, share = sight.loss(pixels, right, list(names))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(sight.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if update % 50 == 49:
            print(f"update {update + 1}  loss {loss.item():.2f}  patches right {100 * share:.0f} % of {len(names)} texts  {time.time() - began:.0f} s", flush=True)
    for reader in readers:
        reader.close()
    net.half().save_pretrained(out), processor.save_pretrained(out)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sizes = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[3:])
    if len(sys.argv) < 3 or not set(sizes) <= {"updates", "batch"} or not all(n.isdigit() for n in sizes.values()):
        raise SystemExit("Say whose language model, and where to: python extras/sight.py tiny-vlm-pages FOLDER [--updates=1000 --batch=64]")
    if os.path.exists(sys.argv[2]):
        raise SystemExit(f"{sys.argv[2]!r} exists already: name a new folder.")
    main(*sys.argv[1:3], **{k: int(n) for k, n in sizes.items()})
