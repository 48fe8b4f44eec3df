"""
Speed and memory, as ratios within one run: absolute times belong to a machine.

    python bench.py                      # the shipped tiny VLM on NumberLine
    python bench.py --model=/path/to/a/vlm --env=Blackjack
    python bench.py envs --env=NumberLine,BabyAI-GoToLocal-v0,miniwob/click-test-2-v1     # no model: turns a second under random play
"""
import os, resource, statistics, sys, tempfile, time

import numpy as np
import torch

import envs
from agent_rl import compute_loss
from buffer import Buffer, batch
from configurator import check_config, configure
from evaluate import environment, model_agent, play, record, scripted_agent
from model import build


def seconds(*functions, rounds=7):
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
        rates, make_env = [], environment(cfg)
        for n in (1, 4, 16):
            if make_env().workers:
                type(make_env()).workers = n                        # the cap is what is measured here
            for seeds in (range(n), range(episodes)):               # the first ones warm up: caches, browsers
                began = time.perf_counter()
                turns = sum(e["turns"] for e in play(make_env, scripted_agent({"random": 1.0}, np.random.default_rng(0)), list(seeds), n, split="train"))
            rates.append(turns / (time.perf_counter() - began))
        print(f"{cfg.env:<32}" + "".join(f"{rate:8.0f}" for rate in rates), flush=True)


def main(argv):
    alone = argv[:1] == ["envs"]
    cfg = check_config(configure(os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py"), argv[alone:]))
    if alone:
        return turns_a_second(cfg)
    make_env = environment(cfg)
    with tempfile.TemporaryDirectory() as folder:
        data, rng = Buffer(folder, create=True), np.random.default_rng(0)
        record(play(make_env, scripted_agent({"expert": 0.5, "random": 0.5}, rng), list(range(100)), split="train"), data)
        vlm = build(cfg, None, -1.0)
        parts = [(data, data.sample(rng, cfg.batch_size, cfg.window))]
        b = batch(parts, vlm, envs.MARKER, cfg.gamma)
        B, R = b["mask"].shape
        T = b["inputs"]["input_ids"].shape[1]
        print(f"{cfg.model} on {vlm.device}, {torch.get_num_threads()} threads, {cfg.env}: an update is {B} turns of {T} positions, {int(b['mask'].sum())} reply tokens")

        def update(loss):
            settings = type(cfg)(**{**vars(cfg), "actor_loss": loss})
            compute_loss(vlm, b, settings)[0].backward()
            vlm.zero_grad(set_to_none=True)
        heads = vlm.heads
        def sft():
            vlm.heads = torch.nn.ModuleList()  # no critic at all
            update("sft")
            vlm.heads = heads
        plain, full = seconds(sft, lambda: update("afsft"))
        print(f"update      AFSFT / SFT (forward, loss, backward)        {full / plain:5.2f}   {B / full:8.0f} turns/s")

        with torch.no_grad():
            cut, whole = seconds(lambda: vlm(b["inputs"], b["P"], R), lambda: vlm.net(**b["inputs"], use_cache=False).logits.float())
        print(f"forward     logits everywhere / at reply positions only  {whole / cut:5.2f}")

        rows, images = [data.rows[i] for i in range(cfg.num_envs)], [data.image(data.rows[i]["images_file_names"][0]) for i in range(cfg.num_envs)]
        act = model_agent(vlm, cfg.max_new_tokens, 1.0, torch.Generator(vlm.device).manual_seed(0))
        together, alone = seconds(lambda: act(None, rows, images), lambda: [act(None, [r], [im]) for r, im in zip(rows, images)], rounds=3)
        print(f"rollout     one prompt at a time / {cfg.num_envs} at once              {alone / together:5.2f}   {cfg.num_envs / together:8.0f} turns/s")

        env = make_env()
        def steps():
            env.reset(seed=0)
            for _ in range(20):
                env.reset() if env.over else env.step(f"{envs.MARKER} {env.sample(rng)}")
        stepping, = seconds(steps)
        print(f"environment a model's turn / an environment's step      {together / cfg.num_envs / (stepping / 21):5.1f}   {21 / stepping:8.0f} steps/s")
    print(f"memory      peak of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB"
          + (f", on the device {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB" if vlm.device.type == "cuda" else ""))


if __name__ == "__main__":
    main(sys.argv[1:])
