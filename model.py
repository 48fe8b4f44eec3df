"""
The network: any open-weight vision-language model, LoRA on its language part, Q heads on its last hidden state.

Nothing here knows a model family. Three ideas carry all of it:
 1. one sequence = [prompt, left-padded to P | reply, right-padded to R], so the states before the reply's tokens stand at the
    same columns P-1 .. P+R-2 in every row, and are a plain slice;
 2. every model ends in `get_output_embeddings()`: a hook before it keeps that slice of the last hidden state, so that logits and Q are
    computed where the reply is and nowhere else, and, where the vocabulary is large, some states at a time;
 3. the library's own `generate` rolls out (KV cache, positions, caches of every kind); a logits processor does the sampling.

Letters: B rows, P prompt length, R reply length, V vocabulary, H hidden size, C critics, r LoRA rank.
"""
import contextlib, copy, functools, hashlib, inspect, json, os, re, types
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves, tree_map
from transformers import GenerationConfig, LogitsProcessor

from extras.model_folders import first_sentence, open_folder, rehearse
from pretrain.tiny_nets import llava


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
ROOT = os.path.dirname(os.path.abspath(__file__))
IMAGE_KEYS = ("image_token_id", "image_token_index", "image_token")  # the names that libraries gave the placeholder
FEATURES = ("pooler_output", "deepstack_features")  # what language models read of `get_image_features`; the second, a list for each layer: Qwen3-VL

# --------------------------------------------------------------------------------------------------------------- ranks

def ranks():
    """(rank, number of ranks) under torchrun, (0, 1) without."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(x):
    """-> list of every rank's x. All ranks must call it."""
    everyone = [x] * ranks()[1]
    if len(everyone) > 1:
        dist.all_gather_object(everyone, x)
    return everyone

# ---------------------------------------------------------------------------------------------------------------- LoRA

class LoRALinear(nn.Linear):
    """y = x W^T + b + alpha / r * x A^T B^T, with W and b frozen (Hu et al., arXiv 2106.09685). A Kaiming, B zero, both fp32.
    It *is* a Linear that shares the base's weight, so code that asks for `.weight` goes on working; nothing is ever merged."""
    enabled = True  # the off switch: False gives the reference policy

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, dtype=torch.float32, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, dtype=torch.float32, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=5 ** 0.5)
        self.scale, self.dropout = alpha / r, dropout

    def forward(self, x):
        y = super().forward(x)
        if not self.enabled:
            return y
        x = F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype)
        return y + F.linear(F.linear(x, self.lora_A) * self.scale, self.lora_B).to(y.dtype)


def add_lora(net, r, alpha, dropout, targets):
    """Replace each Linear of the language model whose *full path* matches the regex `targets`. Returns {path: module}.
    The language model is what `get_decoder()` returns: vision towers use the same leaf names (q_proj ...)."""
    decoder = net.get_decoder()
    inside = {id(m) for m in decoder.modules()} if decoder is not net else set()
    found = {path: m for path, m in net.named_modules()
             if isinstance(m, nn.Linear) and id(m) in inside and m is not net.get_output_embeddings() and re.fullmatch(targets, path)}
    if not found:
        raise SystemExit(f"lora_targets={targets!r} matches no linear layer of the language model; its layers are called like "
                         + ", ".join([p for p, m in net.named_modules() if isinstance(m, nn.Linear) and id(m) in inside][:3]) + ".")
    for path, base in found.items():
        parent, _, leaf = path.rpartition(".")
        setattr(net.get_submodule(parent), leaf, LoRALinear(base, r, alpha, dropout))
    return {path: net.get_submodule(path) for path in found}

# -------------------------------------------------------------------------------------------------------------- Q heads

class QHead(nn.Module):
    """Last hidden state (..., H) -> Q of every token (..., V). Starts as the constant `init`.
    'full': MLP, then a plain H x V layer. 'tied': MLP back to H, then the model's own frozen unembedding: 2 H^2 parameters."""

    def __init__(self, hidden, vocab, kind="full", init=0.0, unembedding=None):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU())
        self.out = nn.Linear(hidden, vocab if kind == "full" else hidden, bias=False)
        self.bias = nn.Parameter(torch.full((vocab if kind == "full" else 1,), float(init)))
        nn.init.zeros_(self.out.weight)
        self.unembedding = (lambda: unembedding) if kind == "tied" else None  # a function hides the tensor from parameters()

    def forward(self, h):
        x = self.out(self.mlp(h.float()))
        if self.unembedding is not None:
            x = F.linear(x.to(self.unembedding().dtype), self.unembedding().detach()).float()
        return x + self.bias

# ------------------------------------------------------------------------------------------------------------ the model

class LRUCache(OrderedDict):
    """Dicts of tensors by key, at most so many MiB of them: the one that was asked for the longest ago goes first."""
    def __init__(self, mb):
        super().__init__()
        self.bytes, self.limit = 0, mb * 2 ** 20

    def get(self, key, make):
        """What is kept by this key, or what make() gives, kept from now on (not if the key is None)."""
        value = self[key] if key in self else make()
        if key in self:
            self.move_to_end(key)
        elif key is not None:
            self[key], self.bytes = value, self.bytes + nbytes(value)
            while self.bytes > self.limit:
                self.bytes -= nbytes(self.popitem(last=False)[1])
        return value


class Inputs(dict):
    """Tensors of a prompt or of a batch of them. pictures: the prompts in it that show some, with their keys, if features are cached."""
    pictures = None


class VLM(nn.Module):
    """A vision-language model with adapters and critics.

    net, processor   what the Auto classes gave
    lora_r = 0       trains all weights of the net; otherwise the base is frozen
    q_head           'full' | 'tied'; n_critics heads and their EMA targets; n_critics = 0: none
    """

    def __init__(self, net, processor, lora_r=16, lora_alpha=32, lora_dropout=0.0, lora_targets=".*", q_head="full",
                 n_critics=1, q_init=0.0, cache_mb=4096, vision_cache_mb=0, name=""):
        super().__init__()
        self.net, self.processor, self.tokenizer, self.name = net, processor, processor.tokenizer, name
        self.lora, self.lora_config = {}, dict(r=lora_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout)
        for m in net.modules():  # a base's own dropout (a Q-Former's, OPT's) would let another policy learn than the one that played
            for key in [k for k, p in vars(m).items() if isinstance(p, float) and ("drop" in k or k == "p" and isinstance(m, nn.Dropout))]:
                setattr(m, key, 0.0)
        if lora_r:
            net.requires_grad_(False)
            self.lora = add_lora(net, lora_r, lora_alpha, lora_dropout, lora_targets)
        unembed = net.get_output_embeddings()
        (vocab, hidden), device = unembed.weight.shape, unembed.weight.device
        self.heads = nn.ModuleList(QHead(hidden, vocab, q_head, q_init, unembed.weight) for _ in range(n_critics)).to(device)
        self.targets, self.q_init = copy.deepcopy(self.heads).requires_grad_(False), q_init
        net.generation_config = GenerationConfig()  # a checkpoint's own top_k, penalties ... would bend the behaviour policy
        self.eos = find_end_of_turn(processor, net.config)
        # Placeholders and other special tokens may be read but never said: sampled, they would break the next forward pass.
        banned = (set(special_tokens(self.tokenizer)) | {find_image_token(net, processor)} | set(range(len(self.tokenizer), vocab))) - {self.eos}
        self.register_buffer("banned", torch.tensor([i in banned for i in range(vocab)], device=device), persistent=False)
        self.image_token = str(getattr(processor, "image_token", ""))
        self.neutral = sorted({*special_tokens(self.tokenizer).values(), self.tokenizer.decode([self.eos]), self.image_token} - {""}, key=len)[::-1]
        self._watch, self._hidden = None, None
        unembed.register_forward_pre_hook(self._cut)
        self._cache, self._features, self._seen = LRUCache(cache_mb), LRUCache(vision_cache_mb), None
        if vision_cache_mb:
            eyes = [m for m in net.modules() if hasattr(m, "get_image_features")][-1:]      # the innermost: a whole model hands the call on to its part
            if not eyes:
                raise SystemExit(f"model={name!r} has no get_image_features(), whose results vision_cache_mb would keep: set vision_cache_mb=0.")
            self._look = types.MethodType(type(eyes[0]).get_image_features, eyes[0])
            self._looks_at = list(inspect.signature(self._look).parameters)
            eyes[0].get_image_features = functools.wraps(self._look)(lambda *args, **kwargs: self._see(*args, **kwargs))    # `generate` reads its signature

    device = property(lambda self: self.banned.device)
    sharded, bf16 = False, False  # bf16: replies are generated under bfloat16 autocast, as they are learned from
    vocab_size = property(lambda self: len(self.banned))

    def _cut(self, unembed, args):
        """Before the unembedding. _watch is a slice: keep these columns of the hidden state and hand none on, their logits come later (`logits`); ...: keep all."""
        if self._watch is None:
            return args
        self._hidden = args[0] if self._watch is ... else args[0][:, self._watch]
        return args if self._watch is ... else (args[0][:, :0], *args[1:])

    def shard(self, device):
        """Each rank keeps a part of every layer's frozen weights (FSDP2): a layer is gathered where it is computed, and dropped again. The rest is whole on every rank:
        adapters and critics, so that gradients, moments and files are a plain run's; the unembedding, which tied critics and `logits` use outside of the net's own forward."""
        from torch.distributed.fsdp import fully_shard
        mesh = dist.init_device_mesh(device, (ranks()[1],))
        layers = max((m for m in self.net.get_decoder().modules() if isinstance(m, nn.ModuleList)), key=lambda m: sum(p.numel() for p in m.parameters()))
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params={p for p in layer.parameters() if p.requires_grad})
        fully_shard(self.net, mesh=mesh, ignored_params=set(self.net.parameters()))          # shards nothing: it fetches the next layer while one computes
        self.sharded = True
        return self.to(device)

    # -------------------------------------------------------------------------------------------------- text to tensors

    def encode(self, messages, images, key=None):
        """One prompt -> dict of tensors with batch dimension 1 (input_ids (1, T), attention_mask, pixel_values, ...).
        images: PIL images or functions that return one; they are called only if `key` is not in the cache of encoded prompts."""
        return self._cache.get(key, lambda: self._encode(messages, images))

    def _encode(self, messages, images):
        images = [image() if callable(image) else image for image in images]
        if len(images) != 1 and getattr(self.processor, "num_query_tokens", None):  # it would read the first and leave the others to the batch's next rows
            raise SystemExit(f"model={self.name!r} takes one picture a prompt, and a prompt here has {len(images)}: choose another model, such as LLaVA-OneVision or Qwen2-VL.")
        text = self.render(messages)
        bos = self.tokenizer.bos_token
        extra = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        try:
            enc = Inputs(self.processor(text=[text], images=[images] if images else None, return_tensors="pt", **extra))
        except ValueError as e:  # PaliGemma's, for one, wants a picture in every prompt
            raise SystemExit(f"model={self.name!r} cannot read a prompt with {len(images)} pictures: {first_sentence(e)}.")
        enc.pop("labels", None)  # some processors add them to every prompt; the loss is ours
        if self._features.limit:    # by content, and whatever else the vision part reads: sizes, masks, the question (InstructBLIP's)
            seen = {k: enc[k] for k in self._looks_at if k in enc}
            enc.pictures = [(hashlib.sha1(repr([(k, t.shape) for k, t in seen.items()]).encode() + b"".join(t.numpy().tobytes() for t in seen.values())).digest(), seen)] * bool(images)
        return enc

    def render(self, messages):
        """Messages -> prompt text. Page text that holds a special token is neutralised by a space after its first character."""
        def clean(text):
            for token in self.neutral:
                text = text.replace(token, token[0] + " " + token[1:])
            return text
        messages = [{**m, "content": [{**part, "text": clean(part["text"])} if part["type"] == "text" else {"type": "image"} for part in m["content"]]}
                    for m in messages[:len(messages) - (messages[-1]["role"] == "assistant")]]      # all but the reply itself
        if getattr(self.processor, "chat_template", None):
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # no template: image placeholders first (a Q-Former's processor puts them there on its own), then the text, then the cue
        # that LLaVA-1.5 and MiniGPT-4 descend from
        parts = [part for m in messages for part in m["content"]]
        own = getattr(self.processor, "num_query_tokens", None)
        return "".join(self.image_token for p in parts if p["type"] == "image" and not own) \
            + "USER: " + "\n".join(p["text"] for p in parts if p["type"] == "text") + " ASSISTANT:"

    def reply_ids(self, text, ids=None):
        """Token ids of a reply with its end-of-turn token. Stored ids are used as they are, if this tokenizer made them."""
        if ids and max(ids) < len(self.banned) and self.decode(ids) == text:
            return list(ids)
        return self.tokenizer(text, add_special_tokens=False).input_ids + [self.eos]

    def decode(self, ids):
        return self.tokenizer.decode([i for i in ids if i != self.eos], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def span(self, ids, start):
        """Which tokens of a reply reach behind character `start` of its text, the end-of-turn token included: list of 0 / 1."""
        return [int(len(self.decode(ids[:j + 1])) > start or i == self.eos) for j, i in enumerate(ids)]

    def collate(self, prompts, replies=None):
        """Encoded prompts and lists of reply ids -> (inputs of the net, P, reply_ids (B, R), mask (B, R))."""
        up = lambda n: -(-n // 4) * 4  # few different lengths: kernels are prepared anew for each shape
        P = up(max(p["input_ids"].shape[1] for p in prompts))
        R = up(max([len(r) for r in replies] + [1])) if replies is not None else 0
        reply_ids, mask = torch.full((len(prompts), R), self.eos), torch.zeros(len(prompts), R)
        for b, reply in enumerate(replies or []):
            reply_ids[b, :len(reply)], mask[b, :len(reply)] = torch.tensor(reply, dtype=torch.long), 1
        # Per token is what the family's `generate` lets grow with the reply; pictures and a Q-Former's own words (`qformer_input_ids`) do not.
        grown = self.net._update_model_kwargs_for_generation({}, {key: value for key, value in prompts[0].items() if key != "input_ids"})
        per_token = ["input_ids"] + [key for key, value in prompts[0].items() if key in grown and grown[key].shape != value.shape]
        inputs = Inputs()
        for key in dict.fromkeys(key for p in prompts for key in p):
            parts = [p[key] for p in prompts if key in p]  # a row without a picture has none to give
            if key in per_token:  # pad left
                fill = self.eos if key == "input_ids" else 0
                inputs[key] = torch.cat([F.pad(part, (P - part.shape[1], 0), value=fill) for part in parts])
            else:                 # pictures, a Q-Former's words: equal trailing shapes, padded right, then one after the other
                shape = [max(s) for s in zip(*(part.shape[1:] for part in parts))]
                inputs[key] = torch.cat([F.pad(part, [n for have, want in list(zip(part.shape[1:], shape))[::-1] for n in (0, want - have)]) for part in parts])
        if R:  # a reply's tokens carry what the family's `generate` gives a new token (a token type, for one)
            new = self.net._update_model_kwargs_for_generation({}, {key: inputs[key] for key in per_token if key != "input_ids"})
            new = {key: value[:, -1:].expand(-1, R) for key, value in new.items()} | dict(input_ids=reply_ids, attention_mask=mask.to(inputs["attention_mask"].dtype))
            inputs |= {key: torch.cat([inputs[key], value], 1) for key, value in new.items()}
        to = lambda t: t.to(self.device, non_blocking=True)
        inputs.update({k: to(v) for k, v in inputs.items()})
        inputs.pictures = [p for prompt in prompts for p in prompt.pictures] if self._features.limit else None
        return inputs, P, to(reply_ids), to(mask)

    # --------------------------------------------------------------------------------------------------------- networks

    def _see(self, *args, **kwargs):
        """Stands in for the library's get_image_features: what the frozen vision part makes of each prompt's pictures, from memory where it was computed before. Each prompt alone and without
        autocast, so that it does not matter who came first, nor for what. What it returns has the library's form, with nothing in it but what language models read."""
        if not self._seen:
            return self._look(*args, **kwargs)
        given = dict(zip(self._looks_at, args)) | kwargs
        def look(own):
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                out = self._look(**{k: own[k].to(self.device) if k in own else v for k, v in given.items()})
            self._form = type(out)
            return {k: tree_map(lambda t: t.to("cpu", copy=True), out[k]) for k in FEATURES if k in out}
        found = [self._features.get(key, lambda: look(own)) for key, own in self._seen]
        join = lambda parts: torch.cat(parts).to(self.device) if torch.is_tensor(parts[0]) else [t.to(self.device) for part in parts for t in part]
        return self._form(**{k: join(v) if k == FEATURES[0] else [join(layer) for layer in zip(*v)] for k in found[0] for v in [[f[k] for f in found]]})

    def states(self, inputs, P, R):
        """-> hidden (B, R, H): what the model knows before each reply token."""
        self._watch, self._seen = slice(P - 1, P + R - 1), inputs.pictures
        try:
            out = self.net(**inputs, use_cache=False)
        finally:
            self._watch = self._seen = None
        hidden, self._hidden = self._hidden, None
        if hidden is None or out.logits.shape[1]:
            raise SystemExit(f"model={self.name!r} computes its logits past get_output_embeddings(): neither critic nor policy can be read there.")
        return hidden

    def logits(self, hidden):
        """(..., H) -> (..., V), as the library's forward computes them of its last hidden state; banned tokens have probability 0."""
        logits, text = self.net.get_output_embeddings()(hidden).float(), self.net.config.get_text_config()
        logits = logits / (getattr(text, "logits_scaling", None) or 1.0)                     # Granite
        if cap := getattr(text, "final_logit_softcapping", None):                            # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits.masked_fill(self.banned, -1e9)

    def forward(self, inputs, P, R):
        """-> logits (B, R, V) and hidden (B, R, H) of the states before each reply token."""
        hidden = self.states(inputs, P, R)
        return self.logits(hidden), hidden

    def q(self, hidden, target=False):
        """-> (C, B, R, V)"""
        return torch.stack([head(hidden) for head in (self.targets if target else self.heads)])

    @torch.no_grad()
    def update_target(self, tau):
        """theta' <- (1 - tau) theta' + tau theta"""
        for slow, fast in zip(self.targets.parameters(), self.heads.parameters()):
            slow.lerp_(fast, tau)

    @contextlib.contextmanager
    def reference(self):
        """Within it the adapters are off: the policy before training."""
        for m in self.lora.values():
            m.enabled = False
        try:
            yield self
        finally:
            for m in self.lora.values():
                m.enabled = True

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens=32, temperature=1.0, generator=None, q_weight=0.0):
        """Encoded prompts -> for each a list of token ids (end-of-turn included, if it came in time) and of their log-probabilities.
        temperature 0 is greedy. Sampling is Gumbel-max, so that it has a random stream of its own. A sharded model generates on all ranks or on none, see `finish`."""
        if self.sharded:
            if not any(gather(prompts is not None)):
                return None
            prompts = self._prompts = prompts or self._prompts
        was_training = self.training
        self.eval()
        inputs, P, _, _ = self.collate(prompts)
        sampler = Sampler(self, temperature, generator, q_weight)
        self._watch, self._seen = ... if q_weight else None, inputs.pictures
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                out = self.net.generate(**inputs, logits_processor=[sampler], synced_gpus=self.sharded, generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=self.eos, pad_token_id=self.eos))
        finally:
            self._watch = self._seen = self._hidden = None
        self.train(was_training)
        new = out[:, -len(sampler.logps):]  # some families return the prompt too, some do not
        logps = torch.cat(sampler.logps, 1).tolist()
        ids = [row[:row.index(self.eos) + 1] if self.eos in row else row for row in new.tolist()]
        return ids, [lp[:len(row)] for lp, row in zip(logps, ids)]

    def finish(self):
        """Called where a rank has played to its end: a layer of a sharded model is gathered from all ranks, so it goes on with them, its last prompt for nothing, until all are there."""
        while self.sharded and self.generate(None, max_new_tokens=1, temperature=0.0):
            pass

    # ------------------------------------------------------------------------------------------------------------ files

    def save(self, folder):
        """Adapters in PEFT's layout (all weights as a model folder if lora_r = 0) and the critics beside them."""
        os.makedirs(folder, exist_ok=True)
        if self.lora:
            save_file({f"base_model.model.{path}.{ab}.weight": getattr(m, ab).detach().cpu().contiguous() for path, m in self.lora.items() for ab in ("lora_A", "lora_B")},
                      os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
            config = dict(peft_type="LORA", task_type="CAUSAL_LM", bias="none", inference_mode=True, base_model_name_or_path=self.name,
                          target_modules=list(self.lora), **self.lora_config)
            with open(os.path.join(folder, "adapter_config.json"), "w") as f:
                json.dump(config, f, indent=1)
        else:
            self.net.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        if len(self.heads):
            save_file({f"{kind}.{k}": v.cpu().contiguous() for kind in ("heads", "targets") for k, v in getattr(self, kind).state_dict().items()},
                      os.path.join(folder, "q_head.safetensors"), metadata={"format": "pt"})

    def load(self, folder):
        """What `save` wrote, exactly: a missing, foreign or misshapen tensor is an error and not a warning."""
        def fill(params, tensors, file):
            if set(params) != set(tensors) or any(params[k].shape != tensors[k].shape for k in params):
                wrong = sorted(k for k in set(params) | set(tensors) if k not in params or k not in tensors or params[k].shape != tensors[k].shape)
                raise SystemExit(f"{file} does not fit this model and its settings: {len(wrong)} tensors differ, {wrong[0]} for one; use the model, lora_* and q_head it was trained with.")
            with torch.no_grad():
                for k in params:
                    params[k].copy_(tensors[k])
        def read(file):
            try:
                return load_file(file)
            except (OSError, SafetensorError) as e:
                raise SystemExit(f"{file} does not load: {first_sentence(e)}.")
        file = os.path.join(folder, "adapter_model.safetensors" if self.lora else "model.safetensors")
        if self.lora:
            tensors, config = read(file), os.path.join(folder, "adapter_config.json")
            try:
                with open(config) as f:
                    alpha = json.load(f)["lora_alpha"]
            except (OSError, ValueError, KeyError) as e:
                raise SystemExit(f"{config} does not load: {first_sentence(e)}.")
            if alpha != self.lora_config["lora_alpha"]:     # the shapes would fit, the function would not
                raise SystemExit(f"{config} says lora_alpha={alpha}, these settings say {self.lora_config['lora_alpha']}: use the one it was trained with.")
            fill({f"base_model.model.{path}.{ab}.weight": getattr(m, ab) for path, m in self.lora.items() for ab in ("lora_A", "lora_B")}, tensors, file)
        else:
            saved, _ = load_model(folder, trust_remote_code=bool(getattr(self.net.config, "auto_map", None)))  # its code runs already
            fill(dict(self.net.named_parameters()), dict(saved.named_parameters()), file)
        if len(self.heads):
            file = os.path.join(folder, "q_head.safetensors")
            fill({f"{kind}.{k}": v for kind in ("heads", "targets") for k, v in getattr(self, kind).state_dict().items()}, read(file), file)


class Sampler(LogitsProcessor):
    """Bans, corrects by the critic (logits + q_weight * A), keeps the log-probabilities and draws: argmax(logp + Gumbel noise)."""

    def __init__(self, vlm, temperature, generator, q_weight):
        self.vlm, self.temperature, self.generator, self.q_weight, self.logps = vlm, temperature, generator, q_weight, []

    def __call__(self, ids, logits):
        logits = logits.float().masked_fill(self.vlm.banned, -1e9)
        if self.q_weight:
            q = self.vlm.q(self.vlm._hidden[:, -1]).mean(0)                          # (B, V)
            logits = logits + self.q_weight * (q - (logits.softmax(-1) * q).sum(-1, keepdim=True)).masked_fill(self.vlm.banned, 0)
        scores = logp = (logits / (self.temperature or 1.0)).log_softmax(-1)
        if self.temperature:
            u = torch.rand(logp.shape, generator=self.generator, device=self.generator.device if self.generator else logp.device).to(logp.device)
            scores = logp - torch.log(-torch.log(u.clamp(1e-20, 1 - 1e-7)))
        self.logps.append(logp.gather(1, scores.argmax(-1, keepdim=True)))          # of the token that `generate` will take: the whole (B, V) would be kept for every token
        return scores


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tree_leaves(dict(tensors)))


def special_tokens(tokenizer):
    """{id: text} of the control tokens: the named ones (pad, eos, ...) and all others that the tokenizer's file marks as special."""
    return {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special} | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))


def find_image_token(net, processor):
    """Id of the token that stands for an image in the text, by the config's or the processor's word; None if there is none."""
    ids = [getattr(net.config, k, None) for k in IMAGE_KEYS] + [getattr(processor, k, None) for k in IMAGE_KEYS]
    ids = [processor.tokenizer.convert_tokens_to_ids(str(getattr(i, "content", i))) if isinstance(i, str) or hasattr(i, "content") else i for i in ids]
    return next((i for i in ids if isinstance(i, int)), None)


def find_end_of_turn(processor, config):
    """Id of the token that ends an assistant's turn: the first token behind its text in the chat template that is special, or that
    the config of the language model names as its end (MiniGPT-4's `##` is a plain one); else the tokenizer's eos."""
    tok = processor.tokenizer
    if getattr(processor, "chat_template", None):
        chat = [{"role": r, "content": [{"type": "text", "text": "XQX"}]} for r in ("user", "assistant")]
        tail = processor.apply_chat_template(chat, tokenize=False).rpartition("XQX")[2]
        named, cut = getattr(config.get_text_config(), "eos_token_id", None), lambda text: tok(text, add_special_tokens=False).input_ids
        ends = {*special_tokens(tok), *(named if isinstance(named, list) else [named])}
        end = [i for i in cut("XQX" + tail)[len(cut("XQX")):] if i in ends]
        if end:
            return end[0]
    if tok.eos_token_id is None:
        raise SystemExit("The tokenizer has no end-of-turn token: set its eos_token.")
    return tok.eos_token_id


def load_model(path, texts=(), dtype=torch.float32, device="cpu", trust_remote_code=False, image_size=80):
    """Open a hub id, a local folder, or 'scratch' (the tiny LLaVA with random weights) -> (net, processor).

    The shipped bases are found by name from any working directory, with or without bases/ before it.
    SystemExit with one sentence if the folder does not hold a model that can act here, see extras/model_folders.py.
    """
    if path == "scratch":
        net, processor = llava(texts, image_size=image_size)
        return net.to(device), processor
    for folder in (path, os.path.join(ROOT, path), os.path.join(ROOT, "bases", path)):
        if os.path.isdir(folder):
            path = folder
            break
    net, processor = open_folder(path, dtype, trust_remote_code)
    if not hasattr(processor, "tokenizer") or find_image_token(net, processor) is None:
        raise SystemExit(f"model={path!r} has a processor without an image token, so no picture can be shown to it: its folder needs the model's own processor files.")
    return net.to(device), processor


def load_base(cfg, texts=()):
    """(net, processor) that a config asks for."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    half = cfg.lora_r > 0 and device == "cuda" and cfg.dtype != "float32"
    home = "cpu" if cfg.shard and ranks()[1] > 1 else device                              # what is to be sharded may fit no device
    net, processor = load_model(cfg.model, texts, torch.bfloat16 if half else torch.float32, home, cfg.trust_remote_code, cfg.size)
    if cfg.grad_checkpointing:
        on = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable      # what older transformers (5.17) call it
        on(dict(use_reentrant=False))
    if device == "cpu" and cfg.dtype == "bfloat16":
        net.set_attn_implementation("eager")  # the CPU's fused attention is seven times slower backwards in bfloat16 (torch 2.13)
    return net, processor


def build(cfg, base=None, q_init=0.0):
    """The VLM that a config asks for: its base with adapters and critics, as they are before training."""
    critics = cfg.n_critics if cfg.actor_loss in ("afsft", "awr") else 0
    vlm = VLM(*(base or load_base(cfg)), cfg.lora_r, lora_targets=cfg.lora_targets, q_head=cfg.q_head, n_critics=critics, q_init=q_init, vision_cache_mb=cfg.vision_cache_mb, name=cfg.model)
    vlm.bf16 = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and vlm.device.type == "cuda"
    if cfg.trust_remote_code:
        rehearse(vlm)
    return vlm.shard("cpu" if cfg.device == "cpu" or not torch.cuda.is_available() else "cuda") if cfg.shard and ranks()[1] > 1 else vlm


def latest_checkpoint(run, must=True):
    """A run's checkpoint folder; the older one if a crash fell between two renames; None if there is none (SystemExit if it must be there)."""
    found = [p for p in (os.path.join(run, "ckpt"), os.path.join(run, "ckpt.old")) if os.path.exists(os.path.join(p, "state.json"))]
    if must and not found:
        raise SystemExit(f"{run!r} holds no checkpoint: let its training reach one first.")
    return found[0] if found else None
