"""
Write model folders with the tensor names of published checkpoints, so that other programs open them.

    python -m extras.published_names FOLDER ...      # renames the tensors of folders that lie there

transformers 5 calls a tensor `vision_tower.embeddings...` that published LLaVA checkpoints, and vLLM, call
`vision_tower.vision_model.embeddings...`. It reads both. It writes the names that it has read, and its own
ones for a net that it has not read: so `publish_names` tells it which names are the published ones.
"""
import hashlib, os, shutil, sys, tempfile
from collections import Counter

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from extras.model_folders import first_sentence

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange
except ImportError:
    # a version of the library that has no such mappings writes the names that it has read
    get_model_conversion_mapping = None

# The parts of a model whose published names begin with a word that the library leaves out.
PREFIXES = ("vision_model", "text_model")

def publish_names(net):
    """Make `net.save_pretrained` write published names, also if the net was read by other names; return it.

    The library lists for each family how published names become its own, applies the list backwards when it
    writes, and leaves out the prefixes that it has not met when it read the net. They are put back here.
    """
    if get_model_conversion_mapping is None or not isinstance(net, PreTrainedModel):
        return net
    conversions = get_model_conversion_mapping(net, add_legacy=False)
    prefixes = [one for one in conversions if is_published_prefix(one)]
    used = getattr(net, "_weight_conversions", None)
    if used is None:
        # a net that was made and not read: what the library itself would take
        used = [one for one in conversions if not isinstance(one, PrefixChange)]
    # those of the innermost modules come last in the library's own list, too
    others = [one for one in used if not is_published_prefix(one)]
    net._weight_conversions = others + prefixes
    return net

def is_published_prefix(conversion):
    """Tell whether a conversion takes a prefix away that published checkpoints have."""
    return isinstance(conversion, PrefixChange) and conversion.prefix_to_remove in PREFIXES

def digests(file):
    """Count the tensors of a safetensors file by their content -> Counter of (dtype, shape, digest)."""
    counts = Counter()
    for tensor in load_file(file).values():
        raw = tensor.flatten().view(torch.uint8).numpy().tobytes()
        counts[str(tensor.dtype), tensor.shape, hashlib.sha256(raw).hexdigest()] += 1
    return counts

def names_in(file):
    """List the names of a safetensors file's tensors."""
    with safe_open(file, "pt") as tensors:
        return sorted(tensors.keys())

def rename(folder):
    """Rename the tensors of a model folder in one file -> number of changed names; the bits stay as they are.

    SystemExit with one sentence if the folder has no such file, or its tensors would not be the same.
    """
    file = os.path.join(folder, "model.safetensors")
    if not os.path.isfile(file):
        raise SystemExit(f"{folder!r} holds no model.safetensors: name a folder that holds a model in one "
                         "file.")
    before = names_in(file)
    try:
        net = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder!r} does not open as a vision-language model: {first_sentence(error)}.")
    with tempfile.TemporaryDirectory() as aside:
        publish_names(net).save_pretrained(aside)
        written = os.path.join(aside, "model.safetensors")
        if not os.path.exists(written) or digests(written) != digests(file):
            raise SystemExit(f"{folder!r} would not hold the same tensors under their published names: it is "
                             "left as it is.")
        changed = len(set(names_in(written)) - set(before))
        if changed:
            shutil.copyfile(written, file + ".tmp")
            os.replace(file + ".tmp", file)
    return changed

if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("Name at least one model folder: python -m extras.published_names FOLDER")
    for path in sys.argv[1:]:
        print(f"{path}: {rename(path)} names changed")
