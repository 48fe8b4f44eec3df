"""
Measure updates and rollouts of published shapes with random weights, side by side on one device.

    python bench.py gpu                 # on one card; without one, tiny shapes on the CPU
    python bench.py gpu --device=cpu

Updates: SFT, AFSFT, both with compile=True, and PEFT with the library's own loss (optional package). The
base, the adapters at the start, the turns and AdamW are the same, and so are the losses and tokens that are
shown.
On a GPU one row is measured after the other, and the shortest of some updates counts; on the CPU, where other
programs may run, all rows take turns. `share` is of the matrix peak that the same run measures: 4 N floating
point operations a position, because the N weights of the frozen decoder layers need no gradient.

Rollouts: replies to 1 and to 32 prompts, as train.py plays them and with the library's static cache, which it
compiles with CUDA graphs on a GPU. In both a row that has ended is padded until the longest reply has ended,
and prompts are not sorted by length: all are equally long here.

Without a GPU what can be counted is what counts: casts, operations, graphs and graph breaks. The numbers go
into a JSON file, too.
"""
import functools, gc, os, tempfile
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from agent_rl import compute_loss
from extras.compiled import check_compiler, compile_layers
from extras.feature_cache import Inputs
from extras.model_folders import first_sentence
from extras.sharding import count_numbers, find_layers
from extras.sizes import CLIP_LARGE, language_config
from extras.timing import seconds_of, wait_for_device
from extras.whole_files import write_json
from model import VLM, choose_device
from pretrain.questions import corpus
from pretrain.tiny_nets import llava

GIB = 2**30
# updates of a row that are timed
ROUNDS = 8
# the library's names of caches; None grows with each token, as in train.py
CACHES = (None, "static")

class Shape(NamedTuple):
    """A model's shape and its update."""

    language: dict
    vision: dict
    turns: int
    # turns of a micro-batch
    at_once: int
    # positions beside the picture, replies included
    text: int
    reply: int

SMALL_TOWER = dict(
    model_type="clip_vision_model",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    patch_size=8,
    image_size=80,
    projection_dim=64,
)
LLAVA_7B = language_config(4096, 11008, 32, 32, 32, 32064, model_type="llama")
SMOLLM2 = language_config(576, 1536, 30, 9, 3, 49152, tied=True, model_type="llama")
TINY = language_config(64, 128, 2, 4, 2, 1024, model_type="llama")
ON_GPU = {
    "LLaVA-1.5-7B": Shape(LLAVA_7B, CLIP_LARGE, 24, 12, 44, 16),
    "SmolLM2-135M": Shape(SMOLLM2, SMALL_TOWER, 96, 96, 76, 16),
}
ON_CPU = {"tiny": Shape(TINY, SMALL_TOWER, 4, 2, 28, 8)}

def half(device):
    """Return the dtype of frozen weights and of matrix products on a device."""
    if device.type == "cuda":
        return torch.bfloat16
    return torch.float32

def make_net(shape, image_token, device):
    """Make a net of a shape with random weights, each time the same; in half precision on a GPU."""
    torch.manual_seed(0)
    tied = shape.language["tie_word_embeddings"]
    vision = dict(vision_config=shape.vision, image_token_id=image_token)
    config = AutoConfig.for_model("llava", text_config=shape.language, tie_word_embeddings=tied, **vision)
    with torch.device(device), no_init_weights():
        net = AutoModelForImageTextToText.from_config(config, dtype=half(device))
    net.tie_weights()
    with torch.no_grad():
        for param in net.parameters():
            torch.nn.init.normal_(param, std=0.02)
    return net

def make_prompt(vlm, shape):
    """Make an encoded prompt: a picture, and words."""
    side = shape.vision["image_size"]
    pictures = (side // shape.vision["patch_size"]) ** 2
    image_token = vlm.net.config.image_token_id
    words = torch.randint(10, 200, (1, shape.text - shape.reply))
    ids = torch.cat([torch.full((1, pictures), image_token), words], 1)
    pixels = torch.randn(1, 3, side, side, dtype=vlm.net.dtype)
    return Inputs(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)

def make_update_batch(vlm, shape):
    """Make a micro-batch of windows of three turns."""
    B = shape.at_once
    replies = [[9] * (shape.reply - 1) + [vlm.eos]] * B
    torch.manual_seed(1)
    inputs, P, ids, mask = vlm.collate([make_prompt(vlm, shape) for _ in range(B)], replies)
    ones = torch.ones(B, device=vlm.device)
    nexts = torch.arange(1, B + 1, device=vlm.device)
    nexts[2::3] = -1
    nexts[-1] = -1
    batch = dict(inputs=inputs, P=P, reply_ids=ids, mask=mask, span=mask, chain=3, next=nexts)
    ended = (nexts < 0).float()
    return batch | dict(reward=ones, terminated=ended, return_to_go=ones, ep_return=ones)

def shortest(functions, rounds):
    """Return the shortest time of each function; they take turns, after a call of each that warms up."""
    seconds = [[seconds_of(function)] for function in functions]
    for _ in range(rounds):
        for function, own in zip(functions, seconds):
            own.append(seconds_of(function))
    return [min(own[1:]) for own in seconds]

def matrix_peak(device):
    """Measure the FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=half(device))
    return 2 * n**3 / shortest([lambda: a @ a], 20)[0]

def count_operations(function, device):
    """Count what a function does by the profiler: casts, operations, on a GPU kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        function()
        wait_for_device()
    counts = {"casts": 0, "operations": 0, "kernels": 0}
    for event in profile.events():
        counts["casts"] += event.name == "aten::_to_copy"
        counts["operations"] += event.name.startswith("aten::")
        counts["kernels"] += event.device_type != torch.autograd.DeviceType.CPU
    if device.type != "cuda":
        del counts["kernels"]
    return counts


# ---- updates ----

def make_vlm(shape, cfg, device, loss):
    """Make the VLM of a row of the table, with no token banned: PEFT bans none."""
    _, processor = llava(corpus(200))
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    vlm = VLM(make_net(shape, image_token, device), processor, "random")
    vlm.banned.zero_()
    vlm.add_adapters(cfg.lora_r)
    if loss == "afsft":
        vlm.add_critics(1, "tied", -1.0)
    vlm.bf16 = device.type == "cuda"
    return vlm.train()

def as_updater(module, shape, device, step):
    """Make the function of an update, which returns its mean loss.

    step(): computes a micro-batch -> (loss to be optimized, loss to be shown).
    """
    params = [param for param in module.parameters() if param.requires_grad]
    fused = device.type == "cuda" or None
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)

    def update():
        losses = []
        for _ in range(shape.turns // shape.at_once):
            loss, shown = step()
            loss.backward()
            losses.append(shown.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean()

    return update

class OurUpdate:
    """Our update with one loss, compiled or not."""

    def __init__(self, shape, cfg, device, loss, is_compiled):
        self.vlm = make_vlm(shape, cfg, device, loss)
        self.name = f"{loss}, compiled" if is_compiled else loss
        if is_compiled:
            compile_layers(self.vlm)
        self.batch = make_update_batch(self.vlm, shape)
        self.is_compiled = is_compiled
        settings = SimpleNamespace(**vars(cfg) | dict(actor_loss=loss))

        def step():
            with self.vlm.autocast():
                value, info = compute_loss(self.vlm, self.batch, settings)
            return value, info["nll"] / info["tokens"]

        self.update = as_updater(self.vlm, shape, device, step)
        self.tokens = int(self.batch["mask"].sum())

    def counts(self):
        """Return the graphs of compiled layers, and their breaks."""
        if not self.is_compiled:
            return {}
        breaks = sum(counters["graph_break"].values())
        return dict(graphs=counters["stats"]["unique_graphs"], graph_breaks=breaks)

class PeftUpdate:
    """PEFT's adapters on the library's forward pass with labels, on the same turns."""

    name = "PEFT + library"

    def __init__(self, shape, cfg, device):
        from peft import PeftModel

        vlm = make_vlm(shape, cfg, device, "sft")
        batch = make_update_batch(vlm, shape)
        inputs = dict(batch["inputs"])
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, batch["P"] :] = torch.where(batch["mask"] > 0, batch["reply_ids"], -100)
        self.tokens = int((labels[:, 1:] != -100).sum())
        image_token = vlm.net.config.image_token_id
        with tempfile.TemporaryDirectory() as folder:
            vlm.save(folder)
            del vlm
            gc.collect()
            net = make_net(shape, image_token, device)
            net = PeftModel.from_pretrained(net, folder, is_trainable=True).train()

        def step():
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = net(**inputs, labels=labels, use_cache=False).loss
            return loss, loss

        self.update = as_updater(net, shape, device, step)

    def counts(self):
        return {}

def has_peft():
    """Tell whether the package is there, and say so if not."""
    try:
        import peft  # noqa: F401
    except ImportError:
        print("PEFT is not installed (pip install peft): its row is left out.")
        return False
    return True

def can_compile(device):
    """Tell whether this machine can compile, and say so if not."""
    try:
        check_compiler(device)
    except SystemExit as error:
        print(f"The compiled rows are left out. {error}")
        return False
    return True

def list_makers(shape, cfg, device, compiled):
    """List functions that make the rows' updates."""
    makers = []
    for is_compiled in compiled:
        for loss in ("sft", "afsft"):
            makers.append(functools.partial(OurUpdate, shape, cfg, device, loss, is_compiled))
    if has_peft():
        makers.append(functools.partial(PeftUpdate, shape, cfg, device))
    return makers

def measure_updates(makers, shape, device, peak):
    """Measure rows of the table at once -> list of rows."""
    # a VLM and its hook hold each other: what the rows before have used is free after this only
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    sides = [make() for make in makers]
    first = []
    for side in sides:
        # each row compiles, and counts, graphs of its own
        torch._dynamo.reset()
        counters.clear()
        first.append(dict(loss=float(side.update()), **side.counts()))
    seconds = shortest([side.update for side in sides], ROUNDS)
    rows = []
    for side, found, best in zip(sides, first, seconds):
        row = dict(name=side.name, seconds=best, **found, last_loss=float(side.update()))
        row["tokens"] = side.tokens * (shape.turns // shape.at_once)
        if isinstance(side, OurUpdate):
            # without what lengths are rounded up by
            positions = shape.turns // shape.at_once * int(side.batch["inputs"]["attention_mask"].sum())
            frozen = sum(count_numbers(layer) for layer in find_layers(side.vlm.net))
            row["share"] = 4 * frozen * positions / best / peak
        if device.type == "cuda":
            row["gib"] = torch.cuda.max_memory_allocated() / GIB
        rows.append(row | count_operations(side.update, device))
    return rows


# ---- rollouts ----

def measure_rollouts(shape, cfg, device):
    """Measure replies to 1 and 32 prompts with both caches -> list of rows, turns a second."""
    vlm = make_vlm(shape, cfg, device, "sft")
    prompts = [make_prompt(vlm, shape) for _ in range(32)]
    rows = []
    for cache in CACHES:
        # read by the library's generate
        vlm.net.generation_config.cache_implementation = cache
        row = dict(name=f"rollout, {cache or 'growing'} cache")
        for n in (1, 32):
            torch.manual_seed(0)
            [best] = shortest([lambda: vlm.generate(prompts[:n], cfg.max_new_tokens)], 2)
            row[f"turns_a_second_{n}"] = n / best
        rows.append(row)
    return rows

def measure_shape(shape, cfg, device, peak, compiled):
    """Measure all rows of a shape, on a GPU one after the other, on the CPU in turns; yield lists of rows."""
    makers = list_makers(shape, cfg, device, compiled)
    groups = [[make] for make in makers] if device.type == "cuda" else [makers]
    measures = [functools.partial(measure_updates, group, shape, device, peak) for group in groups]
    measures.append(functools.partial(measure_rollouts, shape, cfg, device))
    for measure in measures:
        try:
            yield measure()
        except torch.cuda.OutOfMemoryError as error:
            # a smaller card still has the rows that fit
            print(f"A row does not fit into the memory of this GPU: {first_sentence(error)}.")

def find_row(rows, *names):
    """Find the fastest of the rows that bear one of some names; None if there is none."""
    found = [row for row in rows if row["name"] in names]
    return min(found, key=lambda row: row.get("seconds", 0.0), default=None)

def ratios_of(rows):
    """Compute what the rows of a shape are about -> {what: ratio}."""
    ratios = {}
    ours = find_row(rows, "afsft", "afsft, compiled")
    sft = find_row(rows, "sft", "sft, compiled")
    peft = find_row(rows, PeftUpdate.name)
    if ours and sft:
        ratios["AFSFT / SFT, seconds"] = ours["seconds"] / sft["seconds"]
        ratios["AFSFT, share of the matrix peak"] = ours["share"]
    if ours and peft:
        ratios["PEFT / AFSFT, seconds"] = peft["seconds"] / ours["seconds"]
        if "gib" in ours:
            ratios["AFSFT / PEFT, peak memory"] = ours["gib"] / peft["gib"]
    for row in rows:
        if row["name"].startswith("rollout"):
            many = row["turns_a_second_32"] / row["turns_a_second_1"]
            ratios[f"{row['name']}: 32 prompts at once / one at a time"] = many
    return ratios

def print_row_of(shape_name, row):
    """Print a row of the table."""
    cells = [f"{key} {value:.6g}" for key, value in row.items() if key != "name"]
    print(f"{shape_name:<14}{row['name']:<24}{'  '.join(cells)}", flush=True)

def print_gpu(cfg, compiled=(False, True)):
    """Print the table for this device, and write it as JSON after each row -> {shape: rows}."""
    if not cfg.lora_r:
        raise SystemExit("lora_r=0 trains all weights, and `bench.py gpu` measures adapters: leave lora_r "
                         "out.")
    device = torch.device(choose_device(cfg))
    if True in compiled and not can_compile(device):
        compiled = (False,)
    peak = matrix_peak(device)
    file = os.path.join(tempfile.mkdtemp(prefix="bench_gpu_"), "bench_gpu.json")
    print(f"{device}, matrix products {peak / 1e12:.2f} TFLOP/s; {file} has the rows, too")
    table = {}
    for name, shape in (ON_GPU if device.type == "cuda" else ON_CPU).items():
        table[name] = []
        for rows in measure_shape(shape, cfg, device, peak, compiled):
            for row in rows:
                print_row_of(name, row)
            table[name] += rows
            write_json(file, dict(device=str(device), peak=peak, table=table))
    print()
    for name, rows in table.items():
        for what, ratio in ratios_of(rows).items():
            print(f"{name:<14}{what:<60}{ratio:6.2f}")
    return table
