"""
Remember encoded prompts and vision features, so that neither is computed twice.

A frozen vision tower makes the same features of a picture each time, in updates and in rollouts.
`FeatureCache` replaces the net's own `get_image_features`: the net calls it as before, and the answer comes
from memory if the picture was there once. The cache must know which pictures are in a batch, so model.py
calls it in three places:

    features.tag(prompt)                    # a prompt was encoded
    features.tag_batch(inputs, prompts)     # prompts were joined as a batch
    with features.serving(inputs):          # the net runs on that batch
        net(**inputs)
"""
import contextlib, functools, hashlib, inspect, types
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map

# The fields of the library's result that language models read. Qwen3-VL adds the second to its first layers.
FEATURES = ("pooler_output", "deepstack_features")

def count_bytes(tensors):
    """Add up the bytes of all tensors in a dict of tensors, lists of tensors, ..."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(dict(tensors)))

class LRUCache(OrderedDict):
    """An LRU cache of tensor dicts, bounded by their size in MiB."""

    def __init__(self, mb):
        super().__init__()
        self.bytes = 0
        self.limit = mb * 2**20

    def get_or_compute(self, key, compute):
        """Return the value of a key, computed if it is missing; nothing is cached for the key None."""
        if key in self:
            self.move_to_end(key)
            return self[key]
        value = compute()
        if key is not None:
            self[key] = value
            self.bytes += count_bytes(value)
            while self.bytes > self.limit:
                _, oldest = self.popitem(last=False)
                self.bytes -= count_bytes(oldest)
        return value

class Pictures(NamedTuple):
    """The pictures of one prompt: all tensors that get_image_features() reads of it, and a hash of them."""

    key: bytes
    tensors: dict

class Inputs(dict):
    """Tensors for the net by argument name, of one prompt or of a batch.

    pictures: one `Pictures` per prompt that shows any, empty without a feature cache.
    """

    pictures = ()

class FeatureCache:
    """Answers a net's calls of get_image_features() from memory; with mb=0 it does nothing.

    The vision tower must be frozen. Each prompt's pictures are computed alone and without autocast, so the
    result does not depend on the batch that came first, nor on whether it was an update or a rollout.
    """

    def __init__(self, net, mb, name=""):
        self.cache = LRUCache(mb)
        # The pictures that the net is running on.
        self.batch = ()
        # The arguments of get_image_features(), and its type of result.
        self.parameters = []
        self.result_type = None
        if not mb:
            return
        # Take the innermost: a whole model hands the call on to one of its parts.
        owners = [module for module in net.modules() if hasattr(module, "get_image_features")]
        if not owners:
            raise SystemExit(f"model={name!r} has no get_image_features(), whose results "
                             f"vision_cache_mb={mb:g} would cache: set vision_cache_mb=0.")
        owner = owners[-1]
        self.original = types.MethodType(type(owner).get_image_features, owner)
        self.parameters = list(inspect.signature(self.original).parameters)

        # `wraps` keeps the signature, which the library's `generate` reads.
        @functools.wraps(self.original)
        def get_image_features(*args, **kwargs):
            return self.get_image_features(*args, **kwargs)

        owner.get_image_features = get_image_features

    def tag(self, prompt):
        """Note on an encoded prompt that it shows pictures, under a key that stands for their content.

        The key covers all that the vision part reads: also sizes, masks, and InstructBLIP's question.
        """
        if not self.parameters:
            return
        tensors = {name: prompt[name] for name in self.parameters if name in prompt}
        shapes = [(name, tensor.shape) for name, tensor in tensors.items()]
        content = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
        key = hashlib.sha1(repr(shapes).encode() + content).digest()
        prompt.pictures = [Pictures(key, tensors)]

    def tag_batch(self, inputs, prompts):
        """Note on a batch which pictures are in it, in the order of its rows."""
        inputs.pictures = [pictures for prompt in prompts for pictures in prompt.pictures]

    @contextlib.contextmanager
    def serving(self, inputs):
        """Answer get_image_features() for the pictures of this batch while the net runs on it."""
        self.batch = inputs.pictures
        try:
            yield
        finally:
            self.batch = ()

    def get_image_features(self, *args, **kwargs):
        """Stand in for the net's method: return the same type of result, with only `FEATURES` in it."""
        if not self.batch:
            return self.original(*args, **kwargs)
        call = dict(zip(self.parameters, args)) | kwargs
        device = next(value.device for value in call.values() if torch.is_tensor(value))
        found = []
        for pictures in self.batch:
            compute = functools.partial(self.compute, pictures, call, device)
            found.append(self.cache.get_or_compute(pictures.key, compute))

        joined = {}
        for name in found[0]:
            parts = [features[name] for features in found]
            if name == "deepstack_features":
                # One tensor per layer of the vision tower.
                joined[name] = [join(layer, device) for layer in zip(*parts)]
            else:
                joined[name] = join(parts, device)
        return self.result_type(**joined)

    def compute(self, pictures, call, device):
        """Compute one prompt's features with the other arguments of a call -> {field: CPU tensors}."""
        arguments = dict(call)
        for name in call:
            if name in pictures.tensors:
                arguments[name] = pictures.tensors[name].to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            result = self.original(**arguments)
        self.result_type = type(result)
        return {name: tree_map(copy_to_cpu, result[name]) for name in FEATURES if name in result}

def copy_to_cpu(tensor):
    """Copy a tensor to the CPU, even from the CPU: a view would keep the tensor behind it in memory."""
    return tensor.to("cpu", copy=True)

def join(parts, device):
    """Join features of several prompts on a device: tensors as one tensor, lists as one list."""
    if torch.is_tensor(parts[0]):
        return torch.cat(parts).to(device)
    return [tensor.to(device) for part in parts for tensor in part]
