"""
What a tiny VLM is asked about MiniWoB++'s pages before it has met any action syntax, and how it learns to answer: tiny-vlm-pages.

    pip install -r requirements-envs.txt && apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver
    mkdir -p out && git archive b2b105d tiny-vlm-pages | tar x -C out
    python -m pretrain.train_pages out/tiny-vlm-pages out/pages                     # the weights of an earlier base, a tokenizer of its own; --text=900 --sight=500 --both=660 updates

Three steps. Text alone: which number of a page's lines is the goal about. The tower (a Swin, arXiv 2103.14030) alone: which of the batch's texts stands in this patch, and where is its middle; that is CLIP's loss
(arXiv 2103.00020) with a patch in the place of a picture. Every patch is an example, where a question "Where is it?" is told two numbers. Then both together, with the patches' loss beside the answers': else the tower forgets.
"""
import math, os, sys, time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model import load_model
from pretrain.page_questions import SIDE, SIZE, TASKS, WORDS, Asker
from pretrain.questions import Reading
from worlds.miniwob import MiniWoB

# ---- a tower that reads ----
def visible_features(net, pixels):
    """What the language model is shown of pictures (B, 3, SIZE, SIZE) -> (B, patches, hidden), by the net's own path: a Swin's `last_hidden_state` has one more normalisation, which a LLaVA does not use."""
    features = net.model.get_image_features(pixel_values=pixels).pooler_output
    return features if torch.is_tensor(features) else torch.stack(list(features))


def labels(page, names):
    """What stands in the upper and in the lower half of each patch of a page's picture (a line of text is eleven pixels high, so a patch has parts of two) -> (3, SIDE * SIDE, 2) int64: the text's place in `names`,
    which grows, + 1 (0 nothing, -100 what only shows a bit of something), then column and row, in steps of 4 pixels, of the place to click on it (-100 where there is none)."""
    ink, across, down = (np.asarray(page.picture().convert("L")) < 200).reshape(2 * SIDE, 8, SIDE, 16).any((1, 3)), np.arange(SIDE) * 16, np.arange(2 * SIDE) * 8
    out = np.stack([np.where(ink, -100, 0), *np.full((2, 2 * SIDE, SIDE), -100)])
    for e in page.elements:
        (left, top, w, h), text = e["box"], e["text"] or "textbox" * (e["role"] == "textbox")
        if 0 < len(text) <= 16 and left >= 0 and top >= 0:
            wide, high = np.minimum(left + w, across + 16) - np.maximum(left, across), np.minimum(top + h, down + 8) - np.maximum(top, down)
            x, y = page.places(e)[0]
            here = (high[:, None] >= 4) & (wide[None] >= 6) & (abs(across + 8 - x) <= 32)[None]
            out[0, here] = names.setdefault(text, len(names) + 1)
            if x % 4 == y % 4 == 0 and 0 <= x <= 160 and 0 <= y <= 160:
                out[1:, here] = [[x // 4], [y // 4]]
    return torch.from_numpy(out.reshape(3, SIDE, 2, SIDE).swapaxes(2, 3).reshape(3, -1, 2))


def new_tower(net):
    """The LLaVA `net`'s language model before a Swin and a projector with random weights: a picture of SIZE x SIZE becomes SIDE x SIDE tokens. Its windows and relative positions read a word alike wherever it stands."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SwinConfig
    from pretrain.tiny_nets import rescale_weights
    vision = SwinConfig(image_size=SIZE, patch_size=4, embed_dim=32, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=5, mlp_ratio=3.0, drop_path_rate=0.0, use_absolute_embeddings=True)
    new = rescale_weights(LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=net.config.text_config, image_token_index=net.config.image_token_id, vision_feature_layer=-1,
                                                          vision_feature_select_strategy="full", tie_word_embeddings=True)))
    nn.init.normal_(new.model.vision_tower.embeddings.position_embeddings, 0, 0.3)
    new.model.language_model.load_state_dict(net.model.language_model.state_dict())
    new.tie_weights()
    return new


class Sight(nn.Module):
    """What only the training of a tower needs: a head to the words' space, one for the patch's own column and row and the text's, a vector for "nothing"."""
    def __init__(self, net, tokenizer):
        super().__init__()
        hidden = net.config.text_config.hidden_size
        self.net, self.tokenizer = [net], tokenizer                       # a list hides it from parameters()
        self.head, self.place, self.nothing, self.scale = nn.Linear(hidden, 2 * hidden), nn.Linear(hidden, 2 * SIDE + 4 * 41), nn.Parameter(0.1 * torch.randn(1, hidden)), nn.Parameter(torch.tensor(2.0))
    def texts(self, names):
        words = self.net[0].get_input_embeddings().weight.detach()
        return F.normalize(torch.stack([words[self.tokenizer(name, add_special_tokens=False)["input_ids"]].mean(0) for name in names or ["textbox"]]), dim=-1)   # pages of nothing but long texts name none
    def loss(self, features, pages):
        """features (B, patches, hidden), what the language model is shown -> (cross-entropy over the pages' texts, 0.2 of that of their places, 0.1 of the patches'; share of the halves of patches with a text that are right)."""
        names = {}
        right, x, y = torch.stack([labels(page, names) for page in pages], 1)                                # (B, patches, 2) each
        logits = F.normalize(self.head(features).unflatten(-1, (2, -1)), dim=-1) @ torch.cat([F.normalize(self.nothing, dim=-1), self.texts(names)]).T * self.scale.exp()
        weight, at = torch.ones(logits.shape[-1]), torch.arange(SIDE * SIDE).repeat(len(right))
        weight[0] = 0.1                                             # most of a page is empty
        rows, columns, xs, ys = self.place(features).flatten(0, 1).split([SIDE, SIDE, 82, 82], -1)
        own, middle = F.cross_entropy(rows, at // SIDE) + F.cross_entropy(columns, at % SIDE), F.cross_entropy(xs.reshape(-1, 41), x.flatten()) + F.cross_entropy(ys.reshape(-1, 41), y.flatten())
        return F.cross_entropy(logits.flatten(0, 2), right.flatten(), weight) + 0.1 * own + 0.2 * middle, (logits.argmax(-1) == right)[right > 0].float().mean().item()

# ---- training ----
def retokenize(net, processor, texts):
    """The net with a tokenizer made of `texts`, in which the pages' words and numbers are a token each: what is looked for is then one thing, not three. A new token begins as the mean of those that spelled it."""
    from pretrain.tiny_nets import tokenizer
    old, words = processor.tokenizer, net.get_input_embeddings().weight.detach()
    new = tokenizer(texts, 1536, ["<|pad|>", "<|end|>", "<image>"], extra_special_tokens={"image_token": "<image>"})
    spelled = [words[[i] if i < 3 else old(new.decode([i]), add_special_tokens=False).input_ids] for i in range(len(new))]
    mean = torch.stack([rows.mean(0) * rows.norm(dim=-1).mean() / rows.mean(0).norm().clamp(min=1e-3) + 0.3 * words.std() * torch.randn(words.shape[1]) * (len(rows) > 1) for rows in spelled])
    net.resize_token_embeddings(len(new))
    net.get_input_embeddings().weight.data.copy_(mean)
    processor.tokenizer = new
    return net, processor


def corpus(asker, deal, n=12000):
    """Texts for the tokenizer: questions, answers, and prompts less the line that shows an action."""
    for i in range(n):
        page = deal()
        _, question, answer = asker.ask(page)
        yield from (question, answer, *([page.goal, page.prompt().rpartition("\n")[0], "End your reply with an action, for example:"] if i % 20 == 0 else []))
    yield from (text for word in WORDS for text in [f"'{word}'", f'"{word}"', f" {word}"] * 20)
    yield from (str(number) for number in range(161) for _ in range(50))


def answers_loss(net, tokenizer, asked, features=None):
    """asked: [(question, answer)], with features (B, patches, hidden) of their pictures or without pictures -> sum over the answers of cross-entropy / tokens ** 0.75: a short one counts nearly as much as a long one."""
    prompts = [tokenizer("<image>" * (SIDE * SIDE if features is not None else 0) + f"{question}\n>").input_ids for question, _ in asked]
    answers = [tokenizer(answer).input_ids + [tokenizer.eos_token_id] for _, answer in asked]
    P, R = max(map(len, prompts)), max(map(len, answers))
    ids, seen, labels = torch.full((len(asked), P + R), tokenizer.eos_token_id), torch.zeros(len(asked), P + R, dtype=torch.long), torch.full((len(asked), R), -100)
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        ids[i, P - len(prompt):P + len(answer)], seen[i, P - len(prompt):P + len(answer)], labels[i, :len(answer)] = torch.tensor(prompt + answer), 1, torch.tensor(answer)
    embedded = net.get_input_embeddings()(ids)
    if features is not None:
        embedded = embedded.masked_scatter((ids == net.config.image_token_id)[..., None], features.to(embedded.dtype))
    hidden = net.model.language_model(inputs_embeds=embedded, attention_mask=seen, use_cache=False).last_hidden_state[:, P - 1:-1]
    loss = F.cross_entropy(net.lm_head(hidden).float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).sum(1)
    return (loss / (labels >= 0).sum(1) ** 0.75).sum()


def main(folder, out, text=900, sight=500, both=660, batch=64, lr=2e-3, micro=16):
    net, processor = load_model(folder)
    if net.config.model_type != "llava" or processor.patch_size != 16:
        raise SystemExit(f"model={folder!r} is a {net.config.model_type!r} model: pages are read by a tiny LLaVA of 16-pixel tokens, such as tiny-vlm-pages.")
    torch.manual_seed(0)
    rng, began = np.random.default_rng(0), time.time()
    readers, asker = [Reading(MiniWoB(f"miniwob/{task}-v1", size=SIZE), size=SIZE) for task in TASKS], Asker(rng)
    often = [reader for reader, task in zip(readers, TASKS) for _ in range(1 + 3 * (task == "click-button"))]      # its crowds are the hardest to find one's way in
    deal = lambda: asker.pick(often).page(rng)
    net = net if net.config.vision_config.model_type == "swin" else new_tower(net)
    net, processor = retokenize(net, processor, corpus(asker, deal))
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    net.set_attn_implementation("eager")                                # the CPU's fused attention is slow backwards in bfloat16
    tower, heads = [p for name, p in net.named_parameters() if "vision_tower" in name or "projector" in name], Sight(net, processor.tokenizer)
    rest = [p for p in net.parameters() if not any(p is q for q in tower)]
    look = lambda pages: visible_features(net, processor.image_processor([page.picture() for page in pages], return_tensors="pt")["pixel_values"])
    for step, updates in (("text", text), ("sight", sight), ("both", both)):
        optimizer = torch.optim.AdamW(tower + rest + list(heads.parameters()), lr, weight_decay=0.01, betas=(0.9, 0.98))
        for update in range(updates):
            for group in optimizer.param_groups:                        # a warm-up, then a cosine down to a tenth
                group["lr"] = lr * min((update + 1) / 30, 0.1 + 0.45 * (1 + math.cos(math.pi * update / updates)))
            pages, loss, right = [deal() for _ in range(batch)], 0.0, []
            shown = [step == "sight" or step == "both" and i >= 0.2 * batch for i in range(batch)]
            asked = [("", "") if step == "sight" else asker.ask(page, 0.3 if show else 1.0)[1:] for page, show in zip(pages, shown)]
            order = sorted(range(batch), key=lambda i: (shown[i], len(asked[i][0])))         # like beside like: less padding
            for part in [order[i:i + micro] for show in (False, True) for of in [[i for i in order if shown[i] == show]] for i in range(0, len(of), micro)]:
                show, of = shown[part[0]], [pages[i] for i in part]
                with torch.autocast("cpu", torch.bfloat16):
                    features = look(of) if show else None
                    part_loss = answers_loss(net, processor.tokenizer, [asked[i] for i in part], features) / batch if step != "sight" else 0.0
                if show:
                    patches, share = heads.loss(features.float(), of)
                    part_loss, right = part_loss + patches * len(part) / batch, [*right, share]
                part_loss.backward()
                loss += part_loss.item()
            for params in (tower, rest, list(heads.parameters())):
                nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if update % 50 == 49 or update == updates - 1:
                print(f"{step} {update + 1}  loss {loss:.2f}" + (f"  patches right {100 * np.mean(right):.0f} %" if right else "") + f"  {time.time() - began:.0f} s", flush=True)
        net.save_pretrained(out), processor.save_pretrained(out)
    for reader in readers:
        reader.close()
    net.half().save_pretrained(out)


if __name__ == "__main__":
    steps = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[3:])
    if len(sys.argv) < 3 or not set(steps) <= {"text", "sight", "both", "batch"} or not all(n.isdigit() for n in steps.values()):
        raise SystemExit("Say whose weights to begin with, and where to: python -m pretrain.train_pages bases/tiny-vlm-pages FOLDER [--text=900 --sight=500 --both=660 --batch=64]")
    if os.path.exists(sys.argv[2]):
        raise SystemExit(f"{sys.argv[2]!r} exists already: name a new folder.")
    main(*sys.argv[1:3], **{k: int(n) for k, n in steps.items()})
