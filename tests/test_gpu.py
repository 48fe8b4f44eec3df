"""
Check on a GPU what the other tests check on the CPU; without one these tests are skipped.

    python -m pytest -m gpu

The other tests do not see the GPU, see conftest.py. A plain `python -m pytest` runs these in a process of
their own, see tests/test_gpu_process.py.
"""
import pytest
import torch

import evaluate, families, model
from agent_rl import compute_loss
from configurator import configure
from extras.read_run import TRAIN
from small_runs import all_finite, flags, metrics, results, run
from small_runs import tiny  # noqa: F401  (fixture)
from test_agent_rl import settings
from test_model import ask, gap, log_probabilities, picture, replay, seeded

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

# Convolutions may calculate in TF32, which keeps ten bits.
TOLERANCE = 1e-2
PAGES = ["3 + 4 = ?", "Possible actions: + - stop."]

@pytest.fixture
def pair(tiny):
    """The same VLM twice, on the CPU and on the GPU."""
    here = families.make_vlm(*model.load_model(tiny))
    there = families.make_vlm(*model.load_model(tiny))
    families.randomise(here)
    there.load_state_dict(here.state_dict())
    return here.eval(), there.to(DEVICE).eval()

def encode(vlm):
    """Encode two prompts with pictures of different sizes."""
    return [vlm.encode(ask(text), [picture(i)]) for i, text in enumerate(PAGES)]

def update_batch(vlm, replies):
    """Make a batch of two turns that end their episodes, with a reward of 1."""
    inputs, P, reply_ids, mask = vlm.collate(encode(vlm), replies)
    ones = torch.ones(2, device=vlm.device)
    return dict(
        inputs=inputs,
        P=P,
        reply_ids=reply_ids,
        mask=mask,
        span=mask,
        reward=ones,
        terminated=ones,
        return_to_go=ones,
        ep_return=ones,
        next=torch.full((2,), -1, device=vlm.device),
        chain=1,
    )

def gradient(vlm, replies):
    """Compute the loss of a batch and its gradient -> (number, vector on the CPU)."""
    loss, _ = compute_loss(vlm, update_batch(vlm, replies), settings())
    loss.backward()
    trained = [param for param in vlm.parameters() if param.requires_grad]
    gradients = [param.grad.flatten() for param in trained]
    return loss.item(), torch.cat(gradients).cpu()

def test_loss_and_gradient_are_those_of_the_cpu(pair):
    here, there = pair
    replies = [[5, 9, here.eos], [7, here.eos]]
    loss, grad = gradient(here, replies)
    gpu_loss, gpu_grad = gradient(there, replies)
    assert gpu_loss == pytest.approx(loss, rel=TOLERANCE)
    assert (gpu_grad - grad).norm() < TOLERANCE * grad.norm()

def test_a_rollout_agrees_with_its_replay(pair):
    """The probabilities with which it played are those that the update computes."""
    _, there = pair
    prompts = encode(there)
    generator = torch.Generator(DEVICE).manual_seed(1)
    replies, logps = there.generate(prompts, 5, generator=generator)
    logits = replay(there, prompts, replies)
    for b, reply in enumerate(replies):
        assert gap(log_probabilities(logits[b], reply), logps[b]) < TOLERANCE

def test_a_generator_of_the_cpu_draws_for_the_gpu(pair):
    """The random stream may live on either device."""
    here, there = pair
    firsts = []
    for vlm in (here, there):
        replies, _ = vlm.generate(encode(vlm), 1, generator=seeded(1))
        firsts.append(replies)
    assert firsts[0] == firsts[1]

def test_auto_is_the_gpu_with_a_base_in_bfloat16(tiny):
    keys = flags(model=tiny, lora_r=2, device="auto")
    vlm = model.build(configure(TRAIN, keys, quiet=True))
    assert vlm.device.type == "cuda"
    assert vlm.bf16
    for param in vlm.net.parameters():
        expected = torch.float32 if param.requires_grad else torch.bfloat16
        assert param.dtype == expected

@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_run_learns_plays_and_resumes(tiny, tmp_path, dtype):
    """Its numbers are finite, and what it writes is evaluated on either device."""
    out = str(tmp_path / "run")
    keys = dict(device=DEVICE, dtype=dtype)
    run(out, tiny, stop_at=6, **keys)
    run(out, tiny, resume=True, **keys)
    rows = metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all_finite(rows)
    for device in (DEVICE, "cpu"):
        evaluate.main([out, "--episodes=2", f"--device={device}"])
        assert results(out)["greedy"]["episodes"] == 2

def test_a_run_of_the_cpu_is_resumed_on_the_gpu(tiny, tmp_path):
    out = run(tmp_path / "run", tiny, stop_at=6)
    run(tmp_path / "run", tiny, resume=True, device=DEVICE, dtype="auto")
    assert all_finite(metrics(out))

def test_a_run_with_compiled_layers_learns(tiny, tmp_path):
    """It takes a minute: kernels are written and compiled."""
    pytest.importorskip("triton")
    out = run(tmp_path / "run", tiny, device=DEVICE, compile=True, stop_at=3)
    assert len(metrics(out)) == 3
    assert all_finite(metrics(out))
