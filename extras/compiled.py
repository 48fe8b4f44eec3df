"""
Compile the decoder layers of a model for updates: `--compile=True`.

    try_layers(vlm, 80)             # before anything is written: what does not compile is refused
    compile_layers(vlm)             # in place: names in checkpoints stay as they are
    with paused(vlm.compiled):      # rollouts: the cache grows with each token, and with it the shapes
        vlm.net.generate(...)

One layer is one graph without breaks, and all layers share it. Lengths are rounded up, so that few shapes
appear. A second number of rows or a second length is compiled once more, then it is a symbol.
"""
import contextlib

import torch

from extras.model_folders import first_sentence, trial_prompt
from extras.sharding import find_layers

# Lengths of prompts and of replies are rounded up to multiples of these.
MULTIPLES = (64, 16)
# "inductor" writes kernels; tests use "aot_eager", which needs no compiler.
BACKEND = "inductor"
# Graphs of one layer: with and without adapters or padding, each for a first shape and for all shapes.
MAX_GRAPHS = 64

def check_compiler(device):
    """End with one sentence if this machine cannot compile for the device."""
    if BACKEND != "inductor":
        return
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            raise SystemExit("compile=True needs the package triton on a GPU, which comes with torch for "
                             "CUDA: install it, or set compile=False.")
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        if not is_compile_error(error):
            raise
        raise SystemExit("compile=True needs a C++ compiler, and there is none on this machine: install g++, "
                         "or set compile=False.")

def set_calls(layers, calls):
    """Set what each layer calls in place of its forward method; None: the method itself."""
    for layer, call in zip(layers, calls):
        layer._compiled_call_impl = call

def compile_layers(vlm, backend=None):
    """Compile the decoder layers of a VLM in place, when they run first.

    A layer that would break the graph raises an error then, see `explain_compile_error`.
    """
    check_compiler(vlm.device)
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    vlm.compiled = find_layers(vlm.net)
    if not vlm.compiled:
        raise SystemExit("compile=True: this model has no list of decoder layers: set compile=False.")
    vlm.multiples = MULTIPLES
    for layer in vlm.compiled:
        layer.compile(backend=backend or BACKEND, fullgraph=True)

@contextlib.contextmanager
def paused(layers):
    """Run the layers as they are, uncompiled, within a `with` block."""
    calls = [layer._compiled_call_impl for layer in layers]
    set_calls(layers, [None] * len(layers))
    try:
        yield
    finally:
        set_calls(layers, calls)

@torch.no_grad()
def try_layers(vlm, size):
    """Trace the layers on a prompt, without writing kernels; SystemExit with one sentence if that fails.

    size: the side of the picture, pixels.
    """
    compile_layers(vlm, "eager")
    inputs, P, _, _ = vlm.collate([trial_prompt(vlm, size)], [[vlm.eos]])
    try:
        vlm.states(inputs, P, 1)
    except Exception as error:
        if not is_compile_error(error):
            raise
        raise SystemExit(f"{explain_compile_error(error)}.")
    finally:
        set_calls(vlm.compiled, [None] * len(vlm.compiled))
        # its graphs would count against MAX_GRAPHS
        torch._dynamo.reset()

def is_compile_error(error):
    """Tell whether an exception comes from the compiler."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))

def explain_compile_error(error):
    """Write an exception of the compiler as one sentence, without its full stop."""
    return (f"compile=True: a decoder layer of this model does not compile ({first_sentence(error)}): set "
            "compile=False")
