"""
Measure speed and memory as ratios within one run: absolute times belong to a machine.

    python bench.py                                      # the shipped tiny VLM on NumberLine
    python bench.py --model=/path/to/a/vlm --env=Blackjack
    python bench.py vocabulary                           # memory of AFSFT against SFT with 151,936 words
    python bench.py sizes --micro_batch=1                # published models, computed without their weights
    python bench.py gpu                                  # published shapes on a GPU, beside PEFT
    python bench.py peer                                 # an update against TRL and PEFT
    python bench.py scale                                # recorded play of 1,000 to 1,000,000 turns
    python bench.py envs --env=NumberLine,BabyAI-GoToLocal-v0,miniwob/click-test-2-v1

All keys are train.py's.
"""
import contextlib, os, resource, statistics, sys, tempfile, time
from types import SimpleNamespace

import numpy as np
import torch

import envs
import train
from agent_rl import compute_loss
from buffer import Buffer, make_batch
from configurator import ConfigError, check_config, configure
from evaluate import env_factory, model_agent, play, record, scripted_agent
from extras.bench_gpu import print_gpu
from extras.bench_peer import compare_with_trl
from extras.bench_scale import print_scale
from extras.memory import measure_memory
from extras.sizes import print_sizes
from extras.timing import seconds_of
from model import build
from pretrain.questions import corpus
from pretrain.tiny_nets import llava

TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")

def median_seconds(*functions, rounds=7):
    """Return the median time of each function.

    They take turns, so that a machine that slows down slows all of them.
    """
    times = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, seconds in zip(functions, times):
            seconds.append(seconds_of(function))
    # the first round warms up
    return [statistics.median(seconds[1:]) for seconds in times]

def with_keys(cfg, **changes):
    """Copy settings with other values of some keys."""
    return SimpleNamespace(**{**vars(cfg), **changes})

def play_mix(make_env, mix, rng, n, num_envs=32):
    """Play n training episodes by scripted players, see worlds.playing.play."""
    return play(make_env, scripted_agent(mix, rng), list(range(n)), num_envs, split="train")


# ---- other benchmarks ----

def turns_a_second(cfg, episodes=48):
    """Print a line per environment: turns a second of random play, pictures included.

    1, 4 and 16 of them are open at once. Where stepping waits (a browser), threads step them all.
    """
    print(f"{'turns a second':<32}{'1':>8}{'4':>8}{'16':>8}")
    for name in cfg.env.split(","):
        make_env = env_factory(with_keys(cfg, env=name))
        rates = []
        for num_envs in (1, 4, 16):
            if make_env().max_parallel:
                # the environment's own cap is what is measured here
                type(make_env()).max_parallel = num_envs
            # the first episodes warm up caches and browsers
            for n in (num_envs, episodes):
                began = time.perf_counter()
                played = play_mix(make_env, {"random": 1.0}, np.random.default_rng(0), n, num_envs)
                turns = sum(episode["turns"] for episode in played)
            rates.append(turns / (time.perf_counter() - began))
        print(f"{name:<32}" + "".join(f"{rate:8.0f}" for rate in rates), flush=True)

def vocabulary(cfg, words=151_936, hidden=1024):
    """Print the peak memory of an update with a real model's vocabulary, and return AFSFT's over SFT's.

    The net is random and has two layers, LoRA and the tied head.
    """
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Buffer(folder, create=True)
        record(play_mix(env_factory(cfg), {"random": 1.0}, np.random.default_rng(0), cfg.batch_size), data)
        for loss in ("sft", "afsft"):
            print(f"\n{loss}, {words:,} words, hidden size {hidden:,}")
            torch.manual_seed(0)
            net, processor = llava(corpus(1000), hidden=hidden, layers=2)
            net.resize_token_embeddings(words, mean_resizing=False)
            settings = with_keys(cfg, actor_loss=loss, model="random")
            vlm = build(settings, (net, processor))
            optimizer = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad])
            parts = measure_memory(vlm, optimizer, data, settings, contextlib.nullcontext)
            peaks[loss] = sum(size for part, size in parts.items() if part != "rollout")
    ratio = peaks["afsft"] / peaks["sft"]
    print(f"\nmemory of an update, AFSFT / SFT  {ratio:.2f}")
    return ratio

def peer(cfg, episodes=100):
    """Print whole updates of ours beside TRL's and PEFT's, see extras/bench_peer.py."""
    with tempfile.TemporaryDirectory() as folder:
        data = Buffer(folder, create=True)
        record(play_mix(env_factory(cfg), cfg.data_mix, np.random.default_rng(0), episodes), data)
        return compare_with_trl(cfg, train, data)


# ---- the table ----

def forward_backward(vlm, batch, cfg, loss):
    """Run the forward and backward pass of an update, as actor_loss=loss does."""
    compute_loss(vlm, batch, with_keys(cfg, actor_loss=loss))[0].backward()
    vlm.zero_grad(set_to_none=True)

def compare_losses(vlm, batch, cfg):
    """Compare an update by AFSFT with one by SFT, which has no critic."""
    heads = vlm.heads

    def sft():
        vlm.heads = torch.nn.ModuleList()
        forward_backward(vlm, batch, cfg, "sft")
        vlm.heads = heads

    plain, full = median_seconds(sft, lambda: forward_backward(vlm, batch, cfg, "afsft"))
    rate = len(batch["mask"]) / full
    ratio = full / plain
    print(f"update      AFSFT / SFT (forward, loss, backward)        {ratio:5.2f}   {rate:8.0f} turns/s")

@torch.no_grad()
def compare_logits(vlm, batch):
    """Compare a forward pass with logits everywhere with one that has them at the reply only."""
    inputs = batch["inputs"]
    reply_only, everywhere = median_seconds(
        lambda: vlm(inputs, batch["P"], batch["mask"].shape[1]),
        lambda: vlm.net(**inputs, use_cache=False).logits.float(),
    )
    print(f"forward     logits everywhere / at reply positions only  {everywhere / reply_only:5.2f}")

def compare_vision(vlm, batch, parts, cfg):
    """Compare an update that computes the features of its pictures with one that has them in memory."""
    caching_vlm = build(with_keys(cfg, vision_cache_mb=4096))
    caching_batch = make_batch(parts, caching_vlm, envs.MARKER, cfg.gamma)
    computed, cached = median_seconds(
        lambda: forward_backward(vlm, batch, cfg, "afsft"),
        lambda: forward_backward(caching_vlm, caching_batch, cfg, "afsft"),
    )
    print(f"vision      looked at anew / features from memory, update {computed / cached:5.2f}")

def compare_rollouts(vlm, data, cfg):
    """Compare replies to prompts one at a time with replies at once -> seconds of a turn at once."""
    rows = data.rows[: cfg.num_envs]
    images = [data.image(row["images_file_names"][0]) for row in rows]
    generator = torch.Generator(vlm.device).manual_seed(0)
    act = model_agent(vlm, cfg.max_new_tokens, 1.0, generator)

    def one_by_one():
        for row, image in zip(rows, images):
            act(None, [row], [image])

    at_once, single = median_seconds(lambda: act(None, rows, images), one_by_one, rounds=3)
    ratio = f"{single / at_once:5.2f}   {cfg.num_envs / at_once:8.0f}"
    print(f"rollout     one prompt at a time / {cfg.num_envs} at once              {ratio} turns/s")
    return at_once / cfg.num_envs

def compare_steps(env, rng, seconds_of_turn):
    """Compare a turn of the model with a step of the environment; a reset counts as a step."""

    def steps():
        env.reset(seed=0)
        for _ in range(20):
            if env.over:
                env.reset()
            else:
                env.step(f"{envs.MARKER} {env.sample(rng)}")

    [seconds] = median_seconds(steps)
    ratio = f"{seconds_of_turn / (seconds / 21):5.1f}   {21 / seconds:8.0f}"
    print(f"environment a model's turn / an environment's step      {ratio} steps/s")

def print_peaks(device):
    """Print the peak memory of this process, and of the GPU if there is one."""
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    line = f"memory      peak of this process {process:.2f} GiB"
    if device.type == "cuda":
        line += f", on the device {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    print(line)

def print_table(cfg):
    """Print all ratios for one model and one environment."""
    make_env = env_factory(cfg)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        data = Buffer(folder, create=True)
        record(play_mix(make_env, {"expert": 0.5, "random": 0.5}, rng, 100), data)
        vlm = build(cfg)
        parts = [(data, data.sample(rng, cfg.batch_size, cfg.window))]
        batch = make_batch(parts, vlm, envs.MARKER, cfg.gamma)
        B, T = batch["inputs"]["input_ids"].shape
        reply_tokens = int(batch["mask"].sum())
        print(f"{cfg.model} on {vlm.device}, {torch.get_num_threads()} threads, {cfg.env}: an update is {B} "
              f"turns of {T} positions, {reply_tokens} reply tokens")

        compare_losses(vlm, batch, cfg)
        compare_logits(vlm, batch)
        if cfg.lora_r:
            compare_vision(vlm, batch, parts, cfg)
        seconds_of_turn = compare_rollouts(vlm, data, cfg)
        compare_steps(make_env(), rng, seconds_of_turn)
    print_peaks(vlm.device)


BENCHMARKS = {
    "gpu": print_gpu,
    "envs": turns_a_second,
    "peer": peer,
    "vocabulary": vocabulary,
    "sizes": print_sizes,
    "scale": print_scale,
}

def main(argv):
    """Run the benchmark that the first word names, without one the table."""
    benchmark = print_table
    word = argv[0] if argv else ""
    if word in BENCHMARKS:
        benchmark = BENCHMARKS[word]
        argv = argv[1:]
    elif word and not word.startswith("-") and not word.endswith(".py"):
        raise ConfigError(f"There is no benchmark {word!r}: name one of {', '.join(BENCHMARKS)}, or none.")
    if "--help" in argv or "-h" in argv:
        print(__doc__)
    cfg = check_config(configure(TRAIN, argv))
    benchmark(cfg)


if __name__ == "__main__":
    main(sys.argv[1:])
