"""
Train some modules in full beside LoRA: `--modules_to_save='.*multi_modal_projector'`.

The word and the files are PEFT's (its ModulesToSaveWrapper): the adapter's folder holds the modules' weights
by their own names, and where the adapters are off the modules have their first weights again.

With lora_r=0 the modules are all that is trained, and the run writes the whole model.
"""
import torch
import torch.nn as nn

from extras.model_folders import matching

def find_saved_modules(net, pattern, vision_cache_mb=0):
    """Find the outermost modules with weights whose full path matches a regex -> {path: module}.

    SystemExit with one sentence if nothing matches, or if the match includes the embeddings.
    vision_cache_mb: nothing may be trained in front of what the feature cache remembers.
    """
    if not pattern:
        return {}
    modules = {}
    for path, module in net.named_modules():
        if path and next(module.parameters(), None) is not None:
            modules[path] = module
    found = {}
    # a module comes before its parts
    for path in matching(pattern, modules, "modules_to_save", "'.*multi_modal_projector'"):
        if not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = modules[path]
    if not found:
        outer = [path for path in modules if path.count(".") < 2]
        raise SystemExit(f"modules_to_save={pattern!r} matches no module with weights; there are for example "
                         f"{', '.join(outer[:4])}.")
    check_embeddings(net, pattern, found)
    check_cache(net, pattern, found, vision_cache_mb)
    return found

def check_embeddings(net, pattern, modules):
    """Refuse modules with the embeddings: they may be tied, and the critics read them as frozen."""
    tables = [net.get_input_embeddings().weight, net.get_output_embeddings().weight]
    for path, module in modules.items():
        if any(param is table for param in module.parameters() for table in tables):
            raise SystemExit(f"modules_to_save={pattern!r} matches {path}, which holds the embeddings, and "
                             "those stay frozen: write a narrower regex, such as '.*multi_modal_projector'.")

def check_cache(net, pattern, modules, vision_cache_mb):
    """Refuse a feature cache if a module outside the language model is trained."""
    language_parts = set(net.get_decoder().modules())
    outside = [path for path, module in modules.items() if module not in language_parts]
    if vision_cache_mb and outside:
        raise SystemExit(f"vision_cache_mb={vision_cache_mb:g} would cache features that "
                         f"modules_to_save={pattern!r} changes ({outside[0]}): set vision_cache_mb=0.")

def hold_weights(modules):
    """List the parameters of modules -> [(module that holds it, its name, parameter), ...]."""
    held = []
    for module in modules.values():
        for part in module.modules():
            held += [(part, name, param) for name, param in part._parameters.items() if param is not None]
    return held

class SavedModules(nn.Module):
    """The modules of a frozen net that are trained in full, and the weights that they had at first.

    The trained weights are float32, whatever the net's: an update can be smaller than what bfloat16 tells
    apart.
    """

    def __init__(self, modules=None):
        super().__init__()
        self.paths = dict(modules or {})
        self.trained = []
        originals = []
        for owner, name, param in hold_weights(self.paths):
            originals.append(nn.Parameter(param.detach().clone(), requires_grad=False))
            trained = nn.Parameter(param.detach().to(torch.float32, copy=True))
            setattr(owner, name, trained)
            self.trained.append((owner, name, trained))
        self.originals = nn.ParameterList(originals)

    def __contains__(self, path):
        """Tell whether a layer's path lies in one of the modules."""
        return any(path == outer or path.startswith(f"{outer}.") for outer in self.paths)

    def use_originals(self):
        """Put the first weights in place of the trained ones."""
        for (owner, name, _), original in zip(self.trained, self.originals):
            setattr(owner, name, original)

    def use_trained(self):
        """Put the trained weights back."""
        for owner, name, trained in self.trained:
            setattr(owner, name, trained)

    def tensors(self):
        """Return weights and buffers by the names that PEFT gives them."""
        tensors = {}
        for path, module in self.paths.items():
            for name, tensor in module.state_dict(keep_vars=True).items():
                tensors[f"base_model.model.{path}.{name}"] = tensor
        return tensors
