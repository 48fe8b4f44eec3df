"""
Measure an update against TRL's SFTTrainer with PEFT: the same folder, turns, adapters and optimizer.

    pip install trl peft datasets accelerate
    python bench.py peer                             # 96 turns an update with bases/tiny-vlm
    python bench.py peer --model=/path/to/a/vlm --batch_size=8 --micro_batch=8

TRL, our SFT and our AFSFT take turns update by update in one process, so that a machine that slows down slows
all of them. A time is that of a whole update: batch from recorded turns, forward, backward, clipping, AdamW.
PEFT starts from the adapters that our SFT starts from, and its losses are shown beside ours. They agree if
both compute the same; ours are lower by what the model gives to placeholders, which no reply may contain.

Two figures say how much of the machine is used. The rate is compared with that of a large square product. And
the update's own products (linear layers, attention, convolutions) are run alone, with numbers at random: the
share of an update's time that they take. Small layers have thin products, which are slower than square ones.
"""
import contextlib, importlib, statistics, tempfile, time

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from buffer import prompt_messages, reply_text
from extras.timing import seconds_of, wait_for_device
from extras.unlogged import Unlogged
from model import build, load_base

PACKAGES = ("trl", "peft", "datasets", "accelerate")
WARM_UP = 3  # updates that are not timed
UPDATES = 12  # updates that are timed
# side of the square product that measures the matrix peak
SIDE = {"cpu": 2048, "cuda": 8192}

def import_peer():
    """Import the optional packages -> {name: module}; SystemExit with one sentence if one is missing."""
    modules = {}
    for name in PACKAGES:
        try:
            modules[name] = importlib.import_module(name)
        except ImportError as error:
            raise SystemExit(f"`bench.py peer` needs the package {error.name or name}: pip install "
                             f"{' '.join(PACKAGES)} (into an environment of its own).")
    return modules

def check_settings(cfg):
    """End with one sentence if the peer cannot do what the settings ask for."""
    if not cfg.lora_r:
        raise SystemExit("lora_r=0 trains all weights, and `bench.py peer` compares adapters: leave lora_r "
                         "out.")
    if cfg.batch_size % cfg.micro_batch:
        raise SystemExit(f"batch_size={cfg.batch_size} is no multiple of micro_batch={cfg.micro_batch}, and "
                         "TRL's batches have one size: set a micro_batch that divides it.")

def full_windows(data, rng, cfg):
    """Draw the batch_size windows of an update, each of exactly `window` turns with replies.

    TRL's batches have a fixed number of rows. SystemExit if no recorded episode is that long.
    """
    windows = []
    for _ in range(1000):
        for window in data.sample(rng, cfg.batch_size, cfg.window):
            replied = [reply_text(data.rows[i]) is not None for i in window]
            if len(window) == cfg.window and all(replied):
                windows.append(window)
        if len(windows) >= cfg.batch_size:
            return windows[: cfg.batch_size]
    raise SystemExit(f"window={cfg.window}: too few of the {len(data.episodes)} recorded episodes have so "
                     "many turns, set fewer.")


# ---- our side ----

class Ours:
    """Our update with one actor_loss: a VLM, its optimizer, and what was measured."""

    def __init__(self, cfg, trainer, data, updates):
        """trainer: the module train. updates: the windows of each update."""
        self.cfg = cfg
        self.trainer = trainer
        self.data = data
        self.updates = updates
        torch.manual_seed(0)
        self.vlm = build(cfg)
        self.optimizer = trainer.make_optimizer(self.vlm, cfg)
        self.seconds = []
        self.losses = []
        self.tokens = []

    def update(self, step):
        """Make one update as train.py does -> its metrics."""
        unlogged = Unlogged()
        windows = [(self.data, window) for window in self.updates[step]]
        self.trainer.update(self.cfg, step, self.vlm, self.optimizer, windows, 0.0, unlogged)
        return unlogged.take()

    def timed_update(self, step):
        """Make one update, and note its time, loss and number of reply tokens."""
        found = {}
        seconds = seconds_of(lambda: found.update(self.update(step)))
        self.seconds.append(seconds)
        self.losses.append(found["nll"])
        self.tokens.append(round(found["tokens"]))

    def count_flops(self):
        """Count the floating point operations of one more update."""
        with FlopCounterMode(display=False) as counter:
            self.update(len(self.updates) - 1)
        return counter.get_total_flops()

    def products(self):
        """Record the products of one more update -> Products."""
        products = Products(self.vlm.device)
        with products:
            self.update(len(self.updates) - 1)
        return products

class Products(TorchDispatchMode):
    """The products of an update, recorded while it runs as a context, and run again without the rest."""

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.calls = []
        self.tensors = {}
        self.seconds = []

    def stand_in(self, tensor):
        """Return a tensor like this one with numbers at random, the same one for all of its shape."""
        key = (tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self.tensors:
            self.tensors[key] = torch.randn_like(tensor) if tensor.is_floating_point() else tensor.clone()
        return self.tensors[key]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Note a call if the counter of operations knows it as a product."""
        kwargs = kwargs or {}
        if function.overloadpacket in flop_registry:
            inputs = tree_map_only(torch.Tensor, self.stand_in, (args, kwargs))
            self.calls.append((function, *inputs))
        return function(*args, **kwargs)

    @torch.no_grad()
    def run(self):
        """Run all recorded products once."""
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)

    def timed_update(self, step):
        self.seconds.append(seconds_of(self.run))

class SquareProduct:
    """A product of two square matrices in the dtype of the matrix products: the peak of this machine."""

    def __init__(self, vlm):
        self.device = vlm.device
        dtype = torch.bfloat16 if vlm.bf16 else torch.float32
        self.side = SIDE[self.device.type]
        self.a = torch.randn(self.side, self.side, device=self.device, dtype=dtype)
        self.seconds = []

    def timed_update(self, step):
        self.seconds.append(seconds_of(lambda: self.a @ self.a))

    def rate(self):
        """Return floating point operations a second."""
        return 2 * self.side**3 / statistics.median(self.seconds[WARM_UP:])


# ---- the peer ----

def peer_rows(data, updates):
    """Yield the turns of all updates as TRL reads them, in order: images, prompt, completion."""
    for windows in updates:
        for window in windows:
            for i in window:
                row = data.rows[i]
                messages = prompt_messages(row)
                images = [data.image(name) for name in row["images_file_names"]]
                yield dict(images=images, prompt=messages, completion=row["messages"][len(messages) :])

def peer_settings(cfg, modules, folder, vlm, steps):
    """Return the SFTConfig that does what our update does: rate, AdamW, clipping, one row a turn."""
    return modules["trl"].SFTConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=cfg.micro_batch * cfg.window,
        gradient_accumulation_steps=cfg.batch_size // cfg.micro_batch,
        train_sampling_strategy="sequential",
        shuffle_dataset=False,
        max_length=None,
        completion_only_loss=True,
        learning_rate=cfg.lr,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.99,
        weight_decay=0.0,
        max_grad_norm=cfg.grad_clip,
        gradient_checkpointing=cfg.grad_checkpointing,
        bf16=vlm.bf16,
        use_cpu=vlm.device.type == "cpu",
        dataloader_pin_memory=vlm.device.type == "cuda",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

def count_labels(collate, tokens):
    """Wrap TRL's collator: append the number of tokens with a label of each batch to `tokens`."""

    def counting(examples):
        batch = collate(examples)
        tokens.append(int((batch["labels"] != -100).sum()))
        return batch

    return counting

def make_peer(cfg, modules, data, updates, first, folder):
    """Build TRL's trainer on the base and a copy of the adapters of `first` -> (trainer, token counts)."""
    first.vlm.save(folder)
    net, processor = load_base(cfg)
    net = modules["peft"].PeftModel.from_pretrained(net, folder, is_trainable=True)
    rows = modules["datasets"].Dataset.from_list(list(peer_rows(data, updates)))
    trainer = modules["trl"].SFTTrainer(
        model=net,
        args=peer_settings(cfg, modules, folder, first.vlm, len(updates)),
        train_dataset=rows,
        processing_class=processor,
    )
    tokens = []
    trainer.data_collator = count_labels(trainer.data_collator, tokens)
    return trainer, tokens

def run_interleaved(trainer, sides, device):
    """Let TRL train, and after each of its updates each of the sides make one -> seconds of TRL's updates.

    A time of TRL's is that between the end of ours and the end of its next update.
    """
    from transformers import TrainerCallback

    seconds = []

    class TakeTurns(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            wait_for_device()
            seconds.append(time.perf_counter() - self.began)
            for side in sides:
                side.timed_update(len(seconds) - 1)
            self.began = time.perf_counter()

    trainer.add_callback(TakeTurns())
    # it prints a dictionary an update
    with contextlib.redirect_stdout(None):
        trainer.train()
    return seconds


# ---- the table ----

def print_row(name, seconds, flops, peak, losses, tokens):
    """Print a line of the table: time, share of the peak, losses of the first and last update, tokens."""
    median = statistics.median(seconds[WARM_UP:])
    share = f"{100 * flops / median / peak:5.0f} %" if flops else "      -"
    print(f"{name:<22}{median:8.3f} {share}    {losses[0]:.5f} {losses[1]:.5f} ... {losses[-1]:.5f}    "
          f"{sum(tokens):8,d}")
    return median

def compare_with_trl(cfg, trainer, data):
    """Print the table for recorded data -> {name: median seconds of an update}. trainer: the module train."""
    check_settings(cfg)
    modules = import_peer()
    rng = np.random.default_rng(0)
    updates = [full_windows(data, rng, cfg) for _ in range(WARM_UP + UPDATES)]
    sides = {}
    for loss in ("sft", "afsft"):
        settings = type(cfg)(**{**vars(cfg), "actor_loss": loss, "warmup_updates": 0, "min_lr": 1.0})
        sides[loss] = Ours(settings, trainer, data, updates)
    sft = sides["sft"]
    product = SquareProduct(sft.vlm)
    # by a model of their own: the others have not made an update yet
    own_products = Ours(sft.cfg, trainer, data, updates).products()
    turns = cfg.batch_size * cfg.window
    versions = ", ".join(f"{name} {modules[name].__version__}" for name in PACKAGES[:2])
    print(f"{cfg.model} on {sft.vlm.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{versions}; {turns} turns an update, {UPDATES} updates, LoRA r={cfg.lora_r} on "
          f"{len(sft.vlm.lora)} layers")
    with tempfile.TemporaryDirectory() as folder:
        peer, tokens = make_peer(cfg, modules, data, updates, sft, folder)
        seconds = run_interleaved(peer, [*sides.values(), product, own_products], sft.vlm.device)
    losses = [row["loss"] for row in peer.state.log_history if "loss" in row]

    peak = product.rate()
    print(f"{'update':<22}{'seconds':>8} {'of peak':>7}    {'nll of updates 1, 2 ... last':<30}{'tokens':>8}")
    # one more batch may have been prepared than was used
    del tokens[len(seconds) * (cfg.batch_size // cfg.micro_batch) :]
    medians = {"trl": print_row("TRL SFTTrainer + PEFT", seconds, 0, peak, losses, tokens)}
    for loss, side in sides.items():
        row = (f"our {loss.upper()}", side.seconds, side.count_flops(), peak, side.losses, side.tokens)
        medians[loss] = print_row(*row)
    print(f"matrix peak {peak / 1e9:,.0f} GFLOP/s: a product of {product.side} x {product.side}, same run")
    alone = statistics.median(own_products.seconds[WARM_UP:])
    share = 100 * alone / medians["sft"]
    print(f"our SFT's own products alone take {alone:.3f} s, {share:.0f} % of its update")
    print(f"TRL / our SFT  {medians['trl'] / medians['sft']:.2f}")
    print(f"AFSFT / SFT    {medians['afsft'] / medians['sft']:.2f}")
    return medians
