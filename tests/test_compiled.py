"""
Test compiled decoder layers: one graph a layer, the eager result, few recompilations.

    python -m pytest tests/test_compiled.py
"""
import json

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.exc import InvalidCxxCompiler
from transformers.models.llama.modeling_llama import LlamaMLP

import families, model
from configurator import configure
from extras import compiled, stopping
from extras.read_run import TRAIN, read_run_config
from small_runs import flags, make_tiny, metrics, one_sentence, run, weights
from small_runs import straight, tiny  # noqa: F401  (fixtures)
from test_model import ask, picture

@pytest.fixture(params=["eager"])
def counter(request, monkeypatch):
    """Compile without a compiler, and count the graphs. aot_eager traces the backward pass, too."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend(request.param)
    monkeypatch.setattr(compiled, "BACKEND", backend)
    yield backend
    torch._dynamo.reset()

def make_pair(tiny, recomputes=False, **settings):
    """Make the same VLM twice, the second one with compiled layers.

    recomputes: both compute activations again in the backward pass.
    """
    pair = []
    for _ in range(2):
        net, processor = model.load_model(tiny)
        if recomputes:
            net.gradient_checkpointing_enable(dict(use_reentrant=False))
        pair.append(families.make_vlm(net, processor, **settings).train())
    eager, fast = pair
    families.randomise(eager)
    fast.load_state_dict(eager.state_dict())
    compiled.compile_layers(fast)
    return eager, fast

def encode(vlm, texts):
    """Encode a prompt with a picture for each text."""
    prompts = []
    for i, text in enumerate(texts):
        prompts.append(vlm.encode(ask(text), [picture(i)]))
    return prompts

def gradient(vlm, texts, length):
    """Compute hidden states of replies, and the gradients of a weighted sum of them.

    Each number has a weight of its own: the last norm fixes the mean square, whose gradient is 0.
    """
    reply = [5] * length + [vlm.eos]
    prompts = encode(vlm, texts)
    inputs, P, ids, mask = vlm.collate(prompts, [reply] * len(texts))
    with vlm.autocast():
        hidden = vlm.states(inputs, P, ids.shape[1])[:, : length + 1].float()
    weights = torch.arange(hidden.numel()).sin().view_as(hidden)
    (hidden * weights).sum().backward()
    grads = [param.grad for param in vlm.net.parameters() if param.requires_grad]
    vlm.zero_grad(set_to_none=True)
    return [hidden.detach(), *grads]

def assert_equal(eager, fast, texts, length, tolerance=1e-3):
    """Assert that both VLMs compute the same, within a share of the largest number of each tensor."""
    for one, other in zip(gradient(eager, texts, length), gradient(fast, texts, length)):
        scale = float(one.abs().max())
        assert scale > 1e-3
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)

@pytest.fixture(scope="module")
def three_layers(tmp_path_factory):
    """Folder of a very small VLM with three decoder layers."""
    return make_tiny(tmp_path_factory.mktemp("three"), layers=3)

@pytest.mark.parametrize("counter", ["aot_eager"], indirect=True)
def test_all_layers_share_their_graphs_and_compute_the_same(three_layers, counter):
    """The first layer's input needs no gradient, the others' does: two graphs.

    fullgraph=True: a graph break would be an error.
    """
    eager, fast = make_pair(three_layers)
    assert_equal(eager, fast, ["a", "bb"], 3)
    assert counter.frame_count == 2
    assert list(eager.state_dict()) == list(fast.state_dict())

@pytest.mark.parametrize("counter", ["aot_eager"], indirect=True)
def test_layers_that_are_computed_again_are_compiled(three_layers, counter):
    """Gradient checkpointing is around the compiled layer."""
    eager, fast = make_pair(three_layers, recomputes=True)
    assert_equal(eager, fast, ["a", "bb"], 3)
    assert counter.frame_count >= 1

def test_layers_that_are_trained_in_full_are_compiled(three_layers, counter):
    eager, fast = make_pair(three_layers, modules_to_save=r".*layers\.1\..*")
    assert_equal(eager, fast, ["a", "bb"], 3)
    assert counter.frame_count >= 2

def test_layers_are_compiled_under_autocast(tiny, counter):
    """The adapters' own casts are in the graph."""
    eager, fast = make_pair(tiny)
    eager.bf16 = True
    fast.bf16 = True
    assert_equal(eager, fast, ["a", "bb"], 3, tolerance=0.1)
    assert counter.frame_count == 1

def test_few_shapes_are_compiled(tiny, counter):
    """Replies and prompts of many lengths share a bucket, and the number of rows becomes a symbol."""
    eager, fast = make_pair(tiny)
    for rows in (2, 3, 5):
        for length in (1, 20):
            assert_equal(eager, fast, ["a b" * row for row in range(rows)], length)
    assert counter.frame_count <= 3

def test_the_base_without_adapters_has_graphs_of_its_own(tiny, counter):
    eager, fast = make_pair(tiny)
    for _ in range(2):
        assert_equal(eager, fast, ["a", "b"], 3)
        inputs, P, ids, _ = fast.collate(encode(fast, ["a", "b"]), [[5, fast.eos]] * 2)
        with fast.reference(), eager.reference():
            one = eager.states(inputs, P, ids.shape[1])
            other = fast.states(inputs, P, ids.shape[1])
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert counter.frame_count <= 3

def test_rollouts_compile_nothing(tiny, counter):
    """With compiled layers each new token would be a new shape."""
    eager, fast = make_pair(tiny)
    replies = []
    for vlm in (eager, fast):
        replies.append(vlm.generate(encode(vlm, ["a", "b"]), 5, temperature=0.0)[0])
    assert replies[0] == replies[1]
    assert counter.frame_count == 0

def test_a_run_with_compiled_layers_writes_the_same_files(straight, tiny, tmp_path, counter):
    """The names in its checkpoint are those of a run without, which can go on from it."""
    out = run(tmp_path / "out", tiny, compile=True, stop_at=3)
    assert counter.frame_count > 0
    frames = counter.frame_count
    assert weights(out).keys() == weights(straight).keys()
    run(out, tiny, compile=False, resume=True)
    assert counter.frame_count == frames
    assert len(metrics(out)) == len(metrics(straight))

def test_a_layer_that_breaks_the_graph_is_refused(tiny, tmp_path, monkeypatch):
    """Before anything is written, and without a compiler."""
    forward = LlamaMLP.forward

    def breaking(self, x):
        torch._dynamo.graph_break()
        return forward(self, x)

    monkeypatch.setattr(compiled, "check_compiler", lambda device: None)
    monkeypatch.setattr(LlamaMLP, "forward", breaking)
    one_sentence(lambda: run(tmp_path / "out", tiny, compile=True), "does not compile", "set compile=False")
    assert not (tmp_path / "out").exists()
    torch._dynamo.reset()

def test_an_evaluation_compiles_nothing(tmp_path):
    """A run from a machine with a compiler is looked at on one without."""
    cfg = configure(TRAIN, flags(compile=True), quiet=True)
    (tmp_path / "config.json").write_text(json.dumps(vars(cfg)))
    assert not read_run_config(str(tmp_path)).compile
    assert read_run_config(str(tmp_path), "resume").compile

def test_a_compiler_that_gives_up_during_an_update_is_explained():
    """Too many shapes raised an error of another kind than the others, and ended in a traceback."""

    def give_up():
        with stopping.explained():
            raise torch._dynamo.exc.FailOnRecompileLimitHit("too many graphs")

    one_sentence(give_up, "does not compile (too many graphs)", "compile=False")

def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr(torch._inductor.cpp_builder, "get_cpp_compiler", missing)
    one_sentence(lambda: compiled.check_compiler(torch.device("cpu")), "g++", "compile=False")
