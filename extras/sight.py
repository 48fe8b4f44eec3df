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


def new_tower(net, size=160, patch=4, dim=32, depths=(2, 2, 2)):
    """The LLaVA `net`'s language model before a Swin and a projector with random weights: a picture of size x size becomes (size / 16)^2 tokens."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SwinConfig
    from extras.scratch import awake
    vision = SwinConfig(image_size=size, patch_size=patch, embed_dim=dim, depths=list(depths), num_heads=[dim // 16 * 2 ** i for i in range(len(depths))], window_size=5, mlp_ratio=3.0,
                        drop_path_rate=0.0, use_absolute_embeddings=True)
    new = awake(LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=net.config.text_config, image_token_index=net.config.image_token_id, vision_feature_layer=-1,
                                                          vision_feature_select_strategy="full", tie_word_embeddings=True)))
    nn.init.normal_(new.model.vision_tower.embeddings.position_embeddings, 0, 0.3)
    new.model.language_model.load_state_dict(net.model.language_model.state_dict())
    new.tie_weights()
    return new


def labels(page, side, names):
    """What stands in each patch of a page's picture: the text's place in `names`, which grows, + 1; 0 nothing; -100 what only shows a bit of something. (side * side,) int64."""
    ink = (np.asarray(page.picture().convert("L")) < 200).reshape(side, 16, side, 16).any((1, 3))
    out, low = np.where(ink, -100, 0), np.arange(side) * 16
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
        self.head, self.place, self.nothing, self.scale = nn.Linear(words.shape[1], words.shape[1]), nn.Linear(words.shape[1], 20), nn.Parameter(0.1 * torch.randn(1, words.shape[1])), nn.Parameter(torch.tensor(2.0))
    def forward(self, pixels): return self.projector(self.tower(pixels).last_hidden_state).float()         # (B, patches, hidden)
    def texts(self, names): return F.normalize(torch.stack([self.words[self.tokenizer(name, add_special_tokens=False)["input_ids"]].mean(0) for name in names]), dim=-1)
    def loss(self, pixels, right, names):
        """-> (cross-entropy over the batch's texts + 0.1 of that of rows and columns, share of the patches with a text that are right). right: (B, patches), as `labels` says."""
        with torch.autocast("cpu", torch.bfloat16):
            feature = self(pixels)
        logits = F.normalize(self.head(feature), dim=-1) @ torch.cat([F.normalize(self.nothing, dim=-1), self.texts(names)]).T * self.scale.exp()
        weight, side = torch.ones(len(names) + 1), int(right.shape[1] ** 0.5)
        weight[0] = 0.1                                             # most of a page is empty
        at = torch.arange(side * side).repeat(len(right))
        rows, columns = self.place(feature).flatten(0, 1).split(10, -1)
        where = F.cross_entropy(rows, at // side) + F.cross_entropy(columns, at % side)
        return F.cross_entropy(logits.flatten(0, 1), right.flatten(), weight) + 0.1 * where, (logits.argmax(-1) == right)[right > 0].float().mean().item()


def main(model, out, updates=1000, batch=64, lr=2e-3):
    import model as nano
    from extras.reading import Captions
    net, processor = nano.load_model(model)
    if net.config.model_type != "llava" or processor.patch_size != 16:
        raise SystemExit(f"model={model!r} is a {net.config.model_type!r} model: a new tower of 16-pixel tokens can be given to the tiny LLaVAs only, such as tiny-vlm-pages.")
    torch.manual_seed(0)
    net, rng, began = new_tower(net), np.random.default_rng(0), time.time()
    side, sight, readers = 10, Sight(net, processor.tokenizer), [Captions(f"miniwob/{task}-v1", size=160) for task in TASKS]
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    optimizer = torch.optim.AdamW(sight.parameters(), lr, weight_decay=0.01, betas=(0.9, 0.95))
    for update in range(updates):
        pages, names = [readers[rng.integers(len(readers))].page(rng) for _ in range(batch)], {}
        right = torch.stack([labels(page, side, names) for page in pages])
        pixels = processor.image_processor([page.picture() for page in pages], return_tensors="pt")["pixel_values"]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (update + 1) / 50) * (0.05 + 0.475 * (1 + np.cos(np.pi * update / updates)))
        loss, share = sight.loss(pixels, right, list(names))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(sight.parameters(), 1.0)
        optimizer.step()
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
