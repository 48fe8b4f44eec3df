"""
The network: any open-weight vision-language model, LoRA on its language part, Q heads on its last state.

There is almost no family-specific code. The design rests on three ideas:
 1. A sequence is [prompt, padded on the left to P | reply, padded on the right to R]. The states before
    the reply's tokens are then the columns P-1 .. P+R-2 of every row: a plain slice.
 2. Every model ends in `get_output_embeddings()`. A hook before it keeps that slice of the last hidden
    state, so logits and Q are computed at the reply's positions only, a chunk at a time if V is large.
 3. The library's own `generate` plays, because it knows each family's KV cache and positions. A logits
    processor does the sampling.

Letters: B rows, P prompt length, R reply length, V vocabulary, H hidden size, C critics, r LoRA rank.
"""
import bisect, contextlib, copy, json, os

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LogitsProcessor

from configurator import WITH_CRITIC
from extras.compiled import compile_layers, paused, try_layers
from extras.feature_cache import FeatureCache, Inputs, LRUCache
from extras.model_folders import find_end_of_turn, find_folder, find_image_token
from extras.model_folders import first_sentence, matching, open_folder, read_trained, rehearse
from extras.model_folders import special_tokens, try_turn
from extras.published_names import publish_names
from extras.saved_modules import SavedModules, find_saved_modules
from extras.sharding import shard_layers
from pretrain.tiny_nets import llava

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# LoRA's output is scaled by LORA_ALPHA / lora_r.
LORA_ALPHA = 32
PROMPT_CACHE_MB = 4096
SHORT_REPLY = 256  # tokens
NEVER = -1e9  # logit of a token that is not sampled
# A Q head tells similar states apart sooner if it is wide and begins with large weights (log, 2026-11-30).
Q_WIDTH = 1024  # hidden units, at least
Q_GAIN = 4.0  # times PyTorch's own first weights


# -- ranks --------------------------------------------------------------------------------------------------

def ranks():
    """Return (rank of this process, number of ranks) under torchrun, (0, 1) without it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

def gather(value):
    """Return the list of every rank's value; all ranks must call it."""
    values = [value] * ranks()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


# -- LoRA and Q heads ---------------------------------------------------------------------------------------

class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update: y = x W^T + b + alpha / r * x A^T B^T.

    W and b are frozen. A starts Kaiming-uniform, B at zero, both in float32 (Hu et al., arXiv 2106.09685).
    It is a Linear with the base layer's own weight, so library code that reads `.weight` still works.
    Nothing is ever merged: with `enabled = False` it is the base layer again.
    """

    enabled = True

    def __init__(self, base, r, alpha):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight = base.weight
        self.bias = base.bias
        options = dict(dtype=torch.float32, device=base.weight.device)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.scale = alpha / r

    def forward(self, x):
        """Map x (..., in) to (..., out)."""
        y = super().forward(x)
        if not self.enabled:
            return y
        if not torch.is_autocast_enabled(x.device.type):
            # Autocast casts the weights to the dtype of x; without it, x takes that of the weights.
            x = x.to(self.lora_A.dtype)
        low_rank = F.linear(x, self.lora_A)
        update = F.linear(low_rank * self.scale, self.lora_B)
        return y + update.to(y.dtype)

def find_targets(net, targets):
    """Find each linear layer of the language model whose full path matches the regex -> {path: layer}.

    The language model is what `get_decoder()` returns: names alone do not tell it from a vision tower, which
    has a q_proj, too. The unembedding is no target. SystemExit if nothing matches.
    """
    decoder = net.get_decoder()
    language_parts = set(decoder.modules()) if decoder not in (None, net) else set()
    layers = {}
    for path, module in net.named_modules():
        if isinstance(module, nn.Linear) and module in language_parts:
            layers[path] = module
    unembedding = net.get_output_embeddings()
    matches = [path for path in matching(targets, layers) if layers[path] is not unembedding]
    if not matches:
        raise SystemExit(f"lora_targets={targets!r} matches no linear layer of the language model; its "
                         f"layers have names like {', '.join(list(layers)[:3])}.")
    return {path: layers[path] for path in matches}

def add_lora(net, r, alpha, targets, trained=()):
    """Put LoRA on the layers that `find_targets` finds, but for `trained` ones -> {path: LoRALinear}."""
    lora = {}
    for path, layer in find_targets(net, targets).items():
        if path in trained:
            continue
        parent, _, leaf = path.rpartition(".")
        lora[path] = LoRALinear(layer, r, alpha)
        setattr(net.get_submodule(parent), leaf, lora[path])
    return lora

class QHead(nn.Module):
    """Q of every token (..., V) from the last hidden state (..., H), at first the constant `init`.

    An MLP with M = max(H, width) hidden units. Behind it comes, for kind 'full', a plain M x V layer; for
    'tied' a layer back to H and the model's own unembedding, frozen: 2 H M parameters.
    """

    def __init__(self, hidden, vocab, kind="full", init=0.0, unembedding=None, width=Q_WIDTH):
        super().__init__()
        inner = max(hidden, width)
        self.mlp = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, inner), nn.GELU())
        self.mlp[1].weight.data *= Q_GAIN
        self.out = nn.Linear(inner, vocab if kind == "full" else hidden, bias=False)
        nn.init.zeros_(self.out.weight)
        self.bias = nn.Parameter(torch.full((vocab if kind == "full" else 1,), float(init)))
        self.unembedding = None
        if kind == "tied":
            # A function hides the tensor from parameters() and from deepcopy.
            self.unembedding = lambda: unembedding

    def forward(self, hidden):
        x = self.out(self.mlp(hidden.float()))
        if self.unembedding is not None:
            weight = self.unembedding().detach()
            x = F.linear(x.to(weight.dtype), weight).float()
        return x + self.bias


# -- sampling and padding -----------------------------------------------------------------------------------

class Sampler(LogitsProcessor):
    """Draws each next token within the library's greedy `generate`, and keeps its log-probability.

    The policy is softmax((logits + q_weight * A) / temperature) over the tokens that are not banned;
    temperature 0 is greedy. The draw is Gumbel-max: `generate` takes the token with the largest score, and
    the scores are logp + Gumbel noise.
    """

    def __init__(self, vlm, temperature, generator, q_weight):
        self.vlm = vlm
        self.temperature = temperature
        self.generator = generator
        self.q_weight = q_weight
        self.logps = []

    def __call__(self, ids, logits):
        logits = logits.float().masked_fill(self.vlm.banned, NEVER)
        if self.q_weight:
            logits = logits + self.q_weight * self.advantage(logits)
        logp = (logits / (self.temperature or 1.0)).log_softmax(-1)
        scores = logp
        if self.temperature:
            uniform = self.draw_uniform(logp).clamp(1e-20, 1 - 1e-7)
            scores = logp - torch.log(-torch.log(uniform))
        # Keep one number per row: all of logp (B, V) would stay in memory for every token of the reply.
        token = scores.argmax(-1, keepdim=True)
        self.logps.append(logp.gather(1, token))
        return scores

    def advantage(self, logits):
        """Compute A = Q - V (B, V) of the critics' mean in the current state, 0 for banned tokens."""
        q = self.vlm.q(self.vlm.hidden[:, -1]).mean(0)
        v = (logits.softmax(-1) * q).sum(-1, keepdim=True)
        return (q - v).masked_fill(self.vlm.banned, 0)

    def draw_uniform(self, like):
        """Draw uniform numbers in the shape of a tensor: rollouts have a random stream of their own."""
        device = self.generator.device if self.generator else like.device
        return torch.rand(like.shape, generator=self.generator, device=device).to(like.device)

def round_up(length, multiple):
    """Round a length up to a multiple, for fewer shapes: kernels are prepared again for each one."""
    return -(-length // multiple) * multiple

def pad_left(parts, length, value):
    """Join rows (1, T) of different lengths, padded on the left -> (B, length)."""
    return torch.cat([F.pad(part, (length - part.shape[1], 0), value=value) for part in parts])

def pad_right(parts):
    """Join tensors along their first dimension; zeros on the right make the other dimensions equal."""
    shapes = [part.shape[1:] for part in parts]
    sizes = [max(lengths) for lengths in zip(*shapes)]
    padded = []
    for part in parts:
        widths = []
        # F.pad starts at the last dimension.
        for have, want in zip(reversed(part.shape[1:]), reversed(sizes)):
            widths += [0, want - have]
        padded.append(F.pad(part, widths))
    return torch.cat(padded)


# -- files --------------------------------------------------------------------------------------------------

def write_tensors(tensors, file):
    """Write {name: tensor} as a safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})

def read_tensors(file):
    """Read a safetensors file -> {name: tensor}; SystemExit if it is missing, damaged or not finite."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"{file} does not load: {first_sentence(error)}.")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise SystemExit(f"{file} holds weights that are not finite, for example {name}: take an earlier "
                             "checkpoint.")
    return tensors

def fill_parameters(params, tensors, file):
    """Copy a file's tensors into parameters of the same names; SystemExit unless all names and shapes fit."""
    wrong = []
    for name in sorted(params.keys() | tensors.keys()):
        if name not in params or name not in tensors or params[name].shape != tensors[name].shape:
            wrong.append(name)
    if wrong:
        raise SystemExit(f"{file} does not fit this model and its settings: {len(wrong)} tensors differ, for "
                         f"example {wrong[0]}; use the model, lora_* and q_head that it was trained with.")
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(tensors[name])

def check_alpha(file, alpha):
    """Refuse an adapter with another lora_alpha: its shapes would fit, its function would differ."""
    try:
        with open(file) as f:
            saved = json.load(f)["lora_alpha"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise SystemExit(f"{file} does not load: {first_sentence(error)}.")
    if saved != alpha:
        raise SystemExit(f"{file} says lora_alpha={saved}, this model has {alpha}: put lora_alpha={saved} "
                         "into the config.json of its run.")


# -- the model ----------------------------------------------------------------------------------------------

def switch_off_dropout(net):
    """Set every dropout rate to 0.

    A base's own dropout (a Q-Former's, OPT's) would train another policy than the one that played.
    """
    for module in net.modules():
        for name, value in list(vars(module).items()):
            is_rate = "drop" in name or (name == "p" and isinstance(module, nn.Dropout))
            if is_rate and isinstance(value, float):
                setattr(module, name, 0.0)

class VLM(nn.Module):
    """A vision-language model that plays and learns.

    As constructed, all weights of the net are trained and there is no critic. `add_adapters` freezes the
    net and adds LoRA, `add_critics` adds Q heads and their targets.

    net, processor     from `load_model`
    name               the model's name in messages and in adapter_config.json
    prompt_cache_mb    memory for encoded prompts, MiB
    vision_cache_mb    memory for features of a frozen vision tower, MiB; 0: they are computed each time
    """

    def __init__(self, net, processor, name="", prompt_cache_mb=PROMPT_CACHE_MB, vision_cache_mb=0):
        super().__init__()
        # What is saved can be opened by other programs.
        self.net = publish_names(net)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.name = name
        switch_off_dropout(net)
        self.lora = {}
        self.lora_config = {}
        self.saved = SavedModules()
        self.heads = nn.ModuleList()
        self.targets = nn.ModuleList()
        self.q_init = 0.0
        # bf16: replies are generated under bfloat16 autocast, as they are trained.
        self.bf16 = False
        self.sharded = False
        # compiled decoder layers; lengths of prompts and of replies are rounded up to these multiples
        self.compiled = []
        self.multiples = (4, 4)
        self.last_prompts = None

        # Special tokens are read, but never sampled: a placeholder would break the next forward pass.
        self.eos = find_end_of_turn(processor, net.config)
        # A checkpoint's own top_k, penalties, ... would change the sampling distribution.
        net.generation_config = GenerationConfig(eos_token_id=self.eos)
        unembedding = net.get_output_embeddings()
        self.vocab_size = len(unembedding.weight)
        specials = special_tokens(self.tokenizer)
        beyond_tokenizer = range(len(self.tokenizer), self.vocab_size)
        self.banned_ids = {*specials, *beyond_tokenizer, find_image_token(net, processor)} - {self.eos}
        mask = [i in self.banned_ids for i in range(self.vocab_size)]
        mask = torch.tensor(mask, device=unembedding.weight.device)
        self.register_buffer("banned", mask, persistent=False)
        # Texts that would become a special token in a prompt, the longest first.
        self.image_token = str(getattr(processor, "image_token", ""))
        reserved = {*specials.values(), self.tokenizer.decode([self.eos]), self.image_token} - {""}
        self.reserved_texts = sorted(reserved, key=len, reverse=True)
        # A Q-Former's processor takes one picture per prompt and writes its placeholders itself.
        self.has_q_former = bool(getattr(processor, "num_query_tokens", None))

        # What `keep_hidden` keeps, and where.
        self.hidden = None
        self.reply_columns = None
        self.critic_guides = False
        self.hook = unembedding.register_forward_pre_hook(self.keep_hidden)
        self.encoded_prompts = LRUCache(prompt_cache_mb)
        self.features = FeatureCache(net, vision_cache_mb, name)

    def add_adapters(self, lora_r=16, lora_targets=".*", lora_alpha=LORA_ALPHA, modules_to_save=""):
        """Freeze the net, but for `modules_to_save`, and put LoRA of rank `lora_r` on its language model."""
        self.net.requires_grad_(False)
        self.saved = SavedModules(find_saved_modules(self.net, modules_to_save))
        if not lora_r:
            return
        self.lora = add_lora(self.net, lora_r, lora_alpha, lora_targets, self.saved)
        # The names and the order in which PEFT writes them.
        self.lora_config = dict(r=lora_r, lora_alpha=lora_alpha, lora_dropout=0.0)

    def add_critics(self, n_critics=1, q_head="tied", q_init=0.0, q_width=Q_WIDTH):
        """Add Q heads that start at `q_init`, see QHead, and their slowly moving targets."""
        weight = self.net.get_output_embeddings().weight
        vocab, hidden = weight.shape
        heads = [QHead(hidden, vocab, q_head, q_init, weight, q_width) for _ in range(n_critics)]
        self.heads = nn.ModuleList(heads).to(weight.device)
        self.targets = copy.deepcopy(self.heads).requires_grad_(False)
        self.q_init = q_init

    @property
    def device(self):
        return self.banned.device

    def autocast(self):
        """Make the context in which the net computes: bfloat16 autocast, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def shard(self, device):
        """Spread the frozen layers over the ranks, see extras/sharding.py; return the VLM on its device."""
        shard_layers(self.net, device, ranks()[1])
        self.sharded = True
        return self.to(device)

    # -- prompt: text and pictures to tensors ---------------------------------------------------------------

    def encode(self, messages, images, key=None):
        """Encode a prompt -> tensors with batch dimension 1: input_ids (1, T), attention_mask, pixel_values.

        images: PIL images, or functions that return one. They are called only if the prompt is not cached
        under `key`. Without a key nothing is cached.
        """
        return self.encoded_prompts.get_or_compute(key, lambda: self.encode_uncached(messages, images))

    def encode_uncached(self, messages, images):
        """Encode a prompt without the cache; SystemExit if its number of pictures does not suit the model."""
        images = [image() if callable(image) else image for image in images]
        if self.has_q_former and len(images) != 1:
            # It would use the first picture and give the others to the next rows of the batch.
            raise SystemExit(f"model={self.name!r} takes one picture per prompt, and a prompt here has "
                             f"{len(images)}: choose another model, such as LLaVA-OneVision or Qwen2-VL.")
        text = self.render(messages)
        options = dict(images=[images] if images else None, return_tensors="pt")
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos):
            options["add_special_tokens"] = False
        try:
            prompt = Inputs(self.processor(text=[text], **options))
        except ValueError as error:
            # PaliGemma, for one, wants a picture in every prompt.
            raise SystemExit(f"model={self.name!r} cannot read a prompt with {len(images)} pictures: "
                             f"{first_sentence(error)}.")
        # Some processors add labels to every prompt, but the loss is ours.
        prompt.pop("labels", None)
        if images:
            self.features.tag(prompt)
        return prompt

    def render(self, messages):
        """Render messages as the text of a prompt; a reply at their end is left out."""
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        clean = []
        for message in messages:
            content = [self.neutralise(part) for part in message["content"]]
            clean.append({**message, "content": content})
        if getattr(self.processor, "chat_template", None):
            try:
                return self.processor.apply_chat_template(clean, add_generation_prompt=True, tokenize=False)
            # A template is a program of the model's folder: it may raise anything.
            except Exception as error:
                roles = ", ".join(message["role"] for message in clean)
                raise SystemExit(f"model={self.name!r} has a chat template that refuses a prompt of {roles}: "
                                 f"{first_sentence(error)}.")
        # Without a template: placeholders, text, and Vicuna's cue, which LLaVA-1.5 and MiniGPT-4 share.
        parts = [part for message in clean for part in message["content"]]
        pictures = "".join(self.image_token for part in parts if part["type"] == "image")
        if self.has_q_former:
            pictures = ""
        texts = "\n".join(part["text"] for part in parts if part["type"] == "text")
        return f"{pictures}USER: {texts} ASSISTANT:"

    def neutralise(self, part):
        """Neutralise the text of a part; a picture becomes the placeholder that templates know."""
        if part["type"] != "text":
            return {"type": "image"}
        return {**part, "text": self.neutralise_text(part["text"])}

    def neutralise_text(self, text):
        """Put a space into each special token in a text, so that neither a page nor a reply can forge one."""
        for token in self.reserved_texts:
            text = text.replace(token, token[0] + " " + token[1:])
        return text

    # -- reply: text to token ids and back ------------------------------------------------------------------

    def reply_ids(self, text, ids=None):
        """Return the token ids of a reply with its end-of-turn token.

        ids: the stored ids of the reply. They are returned as they are if this model can have sampled them.
        Otherwise the text is encoded, with its special tokens neutralised.
        """
        is_known = ids and min(ids) >= 0 and max(ids) < self.vocab_size
        if is_known and self.banned_ids.isdisjoint(ids) and self.eos not in ids[:-1]:
            if self.decode(ids) == text:
                return list(ids)
        ids = self.tokenizer(self.neutralise_text(text), add_special_tokens=False).input_ids
        # Some tokenizers find a special token where its text is not, after a change of letters for example.
        return [i for i in ids if i != self.eos and i not in self.banned_ids] + [self.eos]

    def decode(self, ids):
        """Return the text of a reply, without special tokens."""
        ids = [i for i in ids if i != self.eos]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def span(self, ids, start):
        """Mark the tokens of a reply that reach beyond character `start` of its text: a list of 0 and 1.

        The end-of-turn token is always marked.
        """
        if len(ids) <= SHORT_REPLY:
            marks = []
            for j, token in enumerate(ids):
                is_beyond = len(self.decode(ids[: j + 1])) > start
                marks.append(int(is_beyond or token == self.eos))
            return marks
        # That takes the square of the length. The text of a long reply grows with its tokens, but for a
        # character in several pieces, so this is a search in a sorted list.
        first = len(ids)
        if len(self.decode(ids)) > start:
            first = bisect.bisect(range(len(ids)), start, key=lambda j: len(self.decode(ids[: j + 1])))
        return [int(j >= first or token == self.eos) for j, token in enumerate(ids)]

    # -- batch ----------------------------------------------------------------------------------------------

    def collate(self, prompts, replies=None, device=None):
        """Join prompts and replies as one batch -> (inputs of the net, P, reply_ids (B, R), mask (B, R)).

        prompts: from `encode`. replies: a list of token ids per prompt; None: no replies, R = 0.
        device: where to put the batch; None: on the VLM's own device.
        """
        device = device or self.device
        # rollouts run uncompiled layers, so they keep the shortest padding
        multiple = self.multiples[0] if replies is not None else 4
        P = round_up(max(prompt["input_ids"].shape[1] for prompt in prompts), multiple)
        per_token = self.find_per_token_keys(prompts[0])
        inputs = Inputs()
        for key in dict.fromkeys(key for prompt in prompts for key in prompt):
            # A row without a picture has no pixels to give.
            parts = [prompt[key] for prompt in prompts if key in prompt]
            if key in per_token:
                padding = self.eos if key == "input_ids" else 0
                inputs[key] = pad_left(parts, P, padding)
            else:
                inputs[key] = pad_right(parts)
        reply_ids, mask = self.pad_replies(replies, len(prompts))
        if replies is not None:
            self.append_replies(inputs, per_token, reply_ids, mask)
        for key, tensor in inputs.items():
            inputs[key] = tensor.to(device, non_blocking=True)
        self.features.tag_batch(inputs, prompts)
        reply_ids = reply_ids.to(device, non_blocking=True)
        mask = mask.to(device, non_blocking=True)
        return inputs, P, reply_ids, mask

    def find_per_token_keys(self, prompt):
        """Return the inputs with one value per token: those that `generate` lets grow with the reply.

        Pictures and a Q-Former's own words (`qformer_input_ids`) do not grow.
        """
        others = {key: value for key, value in prompt.items() if key != "input_ids"}
        grown = self.net._update_model_kwargs_for_generation({}, dict(others))
        keys = [key for key in others if key in grown and grown[key].shape != others[key].shape]
        return ["input_ids", *keys]

    def pad_replies(self, replies, B):
        """Pad replies on the right with the end-of-turn token -> (reply_ids (B, R), mask (B, R))."""
        R = 0
        if replies is not None:
            R = round_up(max([len(reply) for reply in replies] + [1]), self.multiples[1])
        reply_ids = torch.full((B, R), self.eos)
        mask = torch.zeros(B, R)
        for b, reply in enumerate(replies or []):
            reply_ids[b, : len(reply)] = torch.tensor(reply, dtype=torch.long)
            mask[b, : len(reply)] = 1
        return reply_ids, mask

    def append_replies(self, inputs, per_token, reply_ids, mask):
        """Append the replies to the prompts, with all that `generate` gives a new token (its type, ...)."""
        others = {key: inputs[key] for key in per_token if key != "input_ids"}
        grown = self.net._update_model_kwargs_for_generation({}, others)
        R = reply_ids.shape[1]
        new = {key: value[:, -1:].expand(-1, R) for key, value in grown.items()}
        new["input_ids"] = reply_ids
        new["attention_mask"] = mask.to(inputs["attention_mask"].dtype)
        for key, value in new.items():
            inputs[key] = torch.cat([inputs[key], value], 1)

    # -- states, logits, Q ----------------------------------------------------------------------------------

    def keep_hidden(self, unembedding, args):
        """Keep the last hidden state on its way into the unembedding; registered as its forward pre-hook.

        In `states` keep the reply's columns and pass none on: their logits are computed later, by `logits`.
        Where a critic guides `generate` keep all, and pass all on.
        """
        hidden, *others = args
        if self.reply_columns is not None:
            self.hidden = hidden[:, self.reply_columns]
            return (hidden[:, :0], *others)
        if self.critic_guides:
            self.hidden = hidden
        return args

    def states(self, inputs, P, R):
        """Run the net on a batch -> hidden states (B, R, H), each before one reply token."""
        self.reply_columns = slice(P - 1, P + R - 1)
        try:
            with self.features.serving(inputs):
                out = self.net(**inputs, use_cache=False)
        finally:
            self.reply_columns = None
        hidden = self.hidden
        self.hidden = None
        if hidden is None or out.logits.shape[1]:
            raise SystemExit(f"model={self.name!r} computes its logits past get_output_embeddings(): neither "
                             "critic nor policy can be read there.")
        return hidden

    def logits(self, hidden):
        """Compute logits (..., V) of hidden states (..., H) as the library does; banned tokens get none."""
        logits = self.net.get_output_embeddings()(hidden).float()
        config = self.net.config.get_text_config()
        # Granite divides by a constant.
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
        # Gemma bounds them.
        cap = getattr(config, "final_logit_softcapping", None)
        if cap:
            logits = cap * torch.tanh(logits / cap)
        return logits.masked_fill(self.banned, NEVER)

    def forward(self, inputs, P, R):
        """Compute logits (B, R, V) and hidden states (B, R, H) before each reply token."""
        hidden = self.states(inputs, P, R)
        return self.logits(hidden), hidden

    def q(self, hidden, target=False):
        """Compute Q (C, ..., V) of hidden states (..., H) by every head, or by every target head."""
        heads = self.targets if target else self.heads
        return torch.stack([head(hidden) for head in heads])

    @torch.no_grad()
    def update_target(self, tau):
        """Move the target heads: theta' <- (1 - tau) theta' + tau theta."""
        for slow, fast in zip(self.targets.parameters(), self.heads.parameters()):
            slow.lerp_(fast, tau)

    @contextlib.contextmanager
    def reference(self):
        """Switch the adapters off within a `with` block: the policy before training."""
        self.saved.use_originals()
        for layer in self.lora.values():
            layer.enabled = False
        try:
            yield self
        finally:
            self.saved.use_trained()
            for layer in self.lora.values():
                layer.enabled = True

    # -- generate -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens=32, temperature=1.0, generator=None, q_weight=0.0):
        """Sample a reply to each encoded prompt -> (lists of token ids, lists of their log-probabilities).

        A reply ends with the end-of-turn token if it came in time. temperature 0 is greedy. With `q_weight`
        the critics guide the policy, see `Sampler`.
        A sharded model generates on all ranks or on none: a rank without prompts passes None, see `finish`.
        """
        if self.sharded:
            if not any(gather(prompts is not None)):
                return None
            prompts = prompts or self.last_prompts
            self.last_prompts = prompts
        was_training = self.training
        self.eval()
        inputs, P, _, _ = self.collate(prompts)
        sampler = Sampler(self, temperature, generator, q_weight)
        end = dict(eos_token_id=self.eos, pad_token_id=self.eos)
        config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, **end)
        options = dict(generation_config=config, logits_processor=[sampler], synced_gpus=self.sharded)
        self.critic_guides = q_weight != 0
        try:
            with self.autocast(), paused(self.compiled), self.features.serving(inputs):
                out = self.net.generate(**inputs, **options)
        finally:
            self.critic_guides = False
            self.hidden = None
        self.train(was_training)

        # Some families return the prompt, too. Cut the prompt off, and what follows the end of the turn.
        ids = []
        for row in out[:, -len(sampler.logps) :].tolist():
            if self.eos in row:
                row = row[: row.index(self.eos) + 1]
            ids.append(row)
        logps = torch.cat(sampler.logps, 1)
        if not logps.isfinite().all():
            raise FloatingPointError(f"model={self.name!r} gives probabilities that are not finite, its "
                                     "weights have grown without bound: learn with a lower lr or critic_lr")
        rows = logps.tolist()
        logps = [row[: len(reply)] for row, reply in zip(rows, ids)]
        return ids, logps

    def finish(self):
        """Keep on generating until all ranks have played to their end; call it after the last `generate`.

        A layer of a sharded model is gathered from all ranks, so a rank that is ready cannot leave. It
        repeats its last prompts and drops the replies.
        """
        while self.sharded and self.generate(None, max_new_tokens=1, temperature=0.0):
            pass

    # -- files ----------------------------------------------------------------------------------------------

    def adapter_tensors(self):
        """Return the adapters' parameters by the names that PEFT gives them."""
        tensors = self.saved.tensors()
        for path, layer in self.lora.items():
            tensors[f"base_model.model.{path}.lora_A.weight"] = layer.lora_A
            tensors[f"base_model.model.{path}.lora_B.weight"] = layer.lora_B
        return tensors

    def critic_tensors(self):
        """Return the parameters of heads and targets by the names that their file gives them."""
        heads = {f"heads.{name}": tensor for name, tensor in self.heads.state_dict().items()}
        targets = {f"targets.{name}": tensor for name, tensor in self.targets.state_dict().items()}
        return heads | targets

    def save_adapters(self, folder):
        """Write the adapters in PEFT's layout."""
        os.makedirs(folder, exist_ok=True)
        write_tensors(self.adapter_tensors(), os.path.join(folder, "adapter_model.safetensors"))
        config = dict(peft_type="LORA", task_type="CAUSAL_LM", bias="none", inference_mode=True)
        config["base_model_name_or_path"] = self.name
        config["target_modules"] = list(self.lora)
        if self.saved.paths:
            config["modules_to_save"] = list(self.saved.paths)
        config |= self.lora_config
        with open(os.path.join(folder, "adapter_config.json"), "w") as f:
            json.dump(config, f, indent=1)

    def save(self, folder):
        """Write the adapters, or without adapters the whole net, and the critics."""
        if self.lora:
            self.save_adapters(folder)
        else:
            self.net.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        if len(self.heads):
            write_tensors(self.critic_tensors(), os.path.join(folder, "q_head.safetensors"))

    def load(self, folder):
        """Read what `save` wrote, bit for bit; SystemExit unless every tensor's name and shape match."""
        if self.lora:
            file = os.path.join(folder, "adapter_model.safetensors")
            tensors = read_tensors(file)
            check_alpha(os.path.join(folder, "adapter_config.json"), self.lora_config["lora_alpha"])
            fill_parameters(self.adapter_tensors(), tensors, file)
        else:
            file = os.path.join(folder, "model.safetensors")
            saved = read_trained(self.net, folder)
            fill_parameters(dict(self.net.named_parameters()), dict(saved.named_parameters()), file)
        if len(self.heads):
            file = os.path.join(folder, "q_head.safetensors")
            fill_parameters(self.critic_tensors(), read_tensors(file), file)


# -- from a config to a model -------------------------------------------------------------------------------

def load_model(path, texts=(), dtype=torch.float32, device="cpu", trust_remote_code=False, image_size=80):
    """Open a hub id, a local folder, or 'scratch' (the tiny LLaVA with random weights) -> (net, processor).

    texts: what the tokenizer of 'scratch' is trained on; image_size: the side of its pictures, pixels.
    SystemExit with one sentence if it is not a model that can act here, see extras/model_folders.py.
    """
    if path == "scratch":
        net, processor = llava(texts, image_size=image_size)
        return net.to(device), processor
    net, processor = open_folder(find_folder(path), dtype, trust_remote_code)
    return net.to(device), processor

def choose_device(cfg):
    """Return the device that a config asks for: 'auto' is cuda if there is one, else cpu."""
    has_cuda = torch.cuda.is_available()
    if cfg.device == "cuda" and not has_cuda:
        raise SystemExit("device='cuda', but torch finds no CUDA device on this machine: use --device=cpu.")
    if cfg.device == "auto":
        return "cuda" if has_cuda else "cpu"
    return cfg.device

def check_base(cfg, net, processor, forward=True):
    """Refuse a model that cannot answer a prompt or take adapters, before anything is recorded."""
    trial = VLM(net, processor, cfg.model)
    try_turn(trial, cfg.size, forward)
    if cfg.compile:
        try_layers(trial, cfg.size)
    trial.hook.remove()
    find_saved_modules(net, cfg.modules_to_save, cfg.vision_cache_mb)
    if cfg.lora_r:
        find_targets(net, cfg.lora_targets)

def load_base(cfg, texts=()):
    """Load the (net, processor) that a config asks for."""
    device = choose_device(cfg)
    # A frozen base on a GPU is kept in half the memory.
    dtype = torch.float32
    if cfg.lora_r > 0 and device == "cuda" and cfg.dtype != "float32":
        dtype = torch.bfloat16
    # A model that is to be sharded may fit on no single device.
    home = device
    if cfg.shard and ranks()[1] > 1:
        home = "cpu"
    net, processor = load_model(cfg.model, texts, dtype, home, cfg.trust_remote_code, cfg.size)
    check_base(cfg, net, processor, forward=home == device)
    if cfg.grad_checkpointing:
        enable = getattr(net, "activation_checkpointing_enable", None)
        # The name in transformers up to 5.17.
        enable = enable or net.gradient_checkpointing_enable
        enable(dict(use_reentrant=False))
    if device == "cpu" and cfg.dtype == "bfloat16":
        # The CPU's fused attention has a very slow backward pass in bfloat16 (torch 2.13).
        net.set_attn_implementation("eager")
    return net, processor

def build(cfg, base=None):
    """Build the VLM that a config asks for, as it is before training.

    base: (net, processor), if `load_base` was called already.
    """
    net, processor = base or load_base(cfg)
    vlm = VLM(net, processor, cfg.model, vision_cache_mb=cfg.vision_cache_mb)
    # An old run has an alpha and a width of its own (extras/old_runs.py).
    if cfg.lora_r or cfg.modules_to_save:
        alpha = getattr(cfg, "lora_alpha", LORA_ALPHA)
        vlm.add_adapters(cfg.lora_r, cfg.lora_targets, alpha, cfg.modules_to_save)
    if cfg.actor_loss in WITH_CRITIC:
        vlm.add_critics(cfg.n_critics, cfg.q_head, cfg.q_init, getattr(cfg, "q_width", Q_WIDTH))
    vlm.bf16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and choose_device(cfg) == "cuda")
    if cfg.trust_remote_code:
        rehearse(vlm)
    if cfg.compile:
        compile_layers(vlm)
    if cfg.shard and ranks()[1] > 1:
        return vlm.shard(choose_device(cfg))
    return vlm
