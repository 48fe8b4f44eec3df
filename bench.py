"""
Speed and memory, as ratios within one run: absolute times belong to a machine.

    python bench.py                      # the shipped tiny VLM on NumberLine
    python bench.py --model=/path/to/a/vlm --env=Blackjack
    python bench.py vocabulary           # a real model's vocabulary: memory of AFSFT against SFT
    python bench.py sizes --micro_batch=1   # published models: memory of an update by part, computed without their weights
    python bench.py envs --env=NumberLine,BabyAI-GoToLocal-v0,miniwob/click-test-2-v1     # no model: turns a second under random play
"""
import contextlib, os, resource, statistics, sys, tempfile, time

import numpy as np
import torch

import envs
from agent_rl import compute_loss
from buffer import Buffer, make_batch
from configurator import check_config, configure
from evaluate import env_factory, model_agent, play, record, scripted_agent
from extras.memory import measure_memory
from extras.sizes import print_sizes
from pretrain.questions import corpus
from pretrain.tiny_nets import llava
from model import build


def median_seconds(*functions, rounds=7):
    """Median time of each function; they take turns, so that a machine that slows down slows all of them."""
    times = [[] for _ in functions]
    for r in range(rounds + 1):
        for f, t in zip(functions, times):
            began = time.perf_counter()
            f()
            t.append(time.perf_counter() - began)
    return [statistics.median(t[1:]) for t in times]  # the first round warms up


def turns_a_second(cfg, episodes=48):
    """A line for each environment: random play, pictures included, with 1, 4 and 16 of them alive. Where stepping waits (a browser), threads step them all."""
    print(f"{'turns a second':<32}{'1':>8}{'4':>8}{'16':>8}")
    for cfg.env in cfg.env.split(","):
        rates, make_env = [], env_factory(cfg)
        for n in (1, 4, 16):
            if make_env().max_parallel:
                type(make_env()).max_parallel = n                        # the cap is what is measured here
            for seeds in (range(n), range(episodes)):               # the first ones warm up: caches, browsers
                began = time.perf_counter()
                turns = sum(e["turns"] for e in play(make_env, scripted_agent({"random": 1.0}, np.random.default_rng(0)), list(seeds), n, split="train"))
            rates.append(turns / (time.perf_counter() - began))
        print(f"{cfg.env:<32}" + "".join(f"{rate:8.0f}" for rate in rates), flush=True)


def vocabulary(cfg, words=151_936, hidden=1024):
    """Peak memory of an update with a real model's vocabulary, AFSFT against SFT: a random net of two layers, LoRA, the tied head. -> the ratio."""
    make_env, peaks = env_factory(cfg), {}
    with tempfile.TemporaryDirectory() as folder:
        data = Buffer(folder, create=True)
        record(play(make_env, scripted_agent({"random": 1.0}, np.random.default_rng(0)), list(range(cfg.batch_size)), split="train"), data)
        for loss in ("sft", "afsft"):
            print(f"\n{loss}, {words:,} words, hidden size {hidden:,}")
            torch.manual_seed(0)
            net, processor = llava(corpus(1000), hidden=hidden, layers=2)
            net.resize_token_embeddings(words, mean_resizing=False)
            settings = type(cfg)(**{**vars(cfg), "actor_loss": loss, "model": "random"})
            vlm = build(settings, (net, processor), -1.0)
            parts = measure_memory(vlm, torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad]), data, settings, contextlib.nullcontext)
            peaks[loss] = sum(parts[k] for k in parts if k != "rollout")
    print(f"\nmemory of an update, AFSFT / SFT  {peaks['afsft'] / peaks['sft']:.2f}")
    return peaks["afsft"] / peaks["sft"]


def main(argv):
    alone = {"envs": turns_a_second, "vocabulary": vocabulary, "sizes": print_sizes}.get(argv[0] if argv else "")
    cfg = check_config(configure(os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py"), argv[bool(alone):]))
    if alone:
        return alone(cfg)
    make_env = env_factory(cfg)
    with tempfile.TemporaryDirectory() as folder:
        data, rng = Buffer(folder, create=True), np.random.default_rng(0)
        record(play(make_env, scripted_agent({"expert": 0.5, "random": 0.5}, rng), list(range(100)), split="train"), data)
        vlm = build(cfg, None, -1.0)
        parts = [(data, data.sample(rng, cfg.batch_size, cfg.window))]
        b = make_batch(parts, vlm, envs.MARKER, cfg.gamma)
        B, R = b["mask"].shape
        T = b["inputs"]["input_ids"].shape[1]
        print(f"{cfg.model} on {vlm.device}, {torch.get_num_threads()} threads, {cfg.env}: an update is {B} turns of {T} positions, {int(b['mask'].sum())} reply tokens")

        def update(loss, vlm=vlm, b=b):
            settings = type(cfg)(**{**vars(cfg), "actor_loss": loss})
            compute_loss(vlm, b, settings)[0].backward()
            vlm.zero_grad(set_to_none=True)
        heads = vlm.heads
        def sft():
            vlm.heads = torch.nn.ModuleList()  # no critic at all
            update("sft")
            vlm.heads = heads
        plain, full = median_seconds(sft, lambda: update("afsft"))
        print(f"update      AFSFT / SFT (forward, loss, backward)        {full / plain:5.2f}   {B / full:8.0f} turns/s")

        with torch.no_grad():
            cut, whole = median_seconds(lambda: vlm(b["inputs"], b["P"], R), lambda: vlm.net(**b["inputs"], use_cache=False).logits.float())
        print(f"forward     logits everywhere / at reply positions only  {whole / cut:5.2f}")

        if cfg.lora_r:
            seen = build(type(cfg)(**{**vars(cfg), "vision_cache_mb": 4096}), None, -1.0)
            again = make_batch(parts, seen, envs.MARKER, cfg.gamma)
            anew, kept = median_seconds(lambda: update("afsft"), lambda: update("afsft", seen, again))
            print(f"vision      looked at anew / features from memory, update {anew / kept:5.2f}")

        rows, images = [data.rows[i] for i in range(cfg.num_envs)], [data.image(data.rows[i]["images_file_names"][0]) for i in range(cfg.num_envs)]
        act = model_agent(vlm, cfg.max_new_tokens, 1.0, torch.Generator(vlm.device).manual_seed(0))
        together, alone = median_seconds(lambda: act(None, rows, images), lambda: [act(None, [r], [im]) for r, im in zip(rows, images)], rounds=3)
        print(f"rollout     one prompt at a time / {cfg.num_envs} at once              {alone / together:5.2f}   {cfg.num_envs / together:8.0f} turns/s")

        env = make_env()
        def steps():
            env.reset(seed=0)
            for _ in range(20):
                env.reset() if env.over else env.step(f"{envs.MARKER} {env.sample(rng)}")
        stepping, = median_seconds(steps)
        print(f"environment a model's turn / an environment's step      {together / cfg.num_envs / (stepping / 21):5.1f}   {21 / stepping:8.0f} steps/s")
    print(f"memory      peak of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB"
          + (f", on the device {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB" if vlm.device.type == "cuda" else ""))


if __name__ == "__main__":
    main(sys.argv[1:])
