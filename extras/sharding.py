"""
Spread a model that no single device can hold over the ranks of torchrun (FSDP2): `--shard=True`.
"""
import torch.distributed as dist
import torch.nn as nn

def count_numbers(module):
    """Count the numbers in a module's parameters."""
    return sum(param.numel() for param in module.parameters())

def find_layers(net):
    """Find the decoder layers: the largest stack of modules in the language model; [] without a stack."""
    stacks = [module for module in net.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    return list(max(stacks, key=count_numbers, default=[]))

def shard_layers(net, device, n_ranks):
    """Shard the frozen weights of the language model's layers, in place.

    A layer is gathered where it is computed, and dropped again. All else is whole on every rank: adapters and
    critics, so that gradients, moments and files are those of a plain run; and the unembedding, which tied
    critics and VLM.logits use outside of the net's own forward pass.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device, (n_ranks,))
    for layer in find_layers(net):
        trained = {
            param
            for param in layer.parameters()
            if param.requires_grad
        }
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    # This shards nothing more: it fetches the next layer while one computes.
    fully_shard(net, mesh=mesh, ignored_params=set(net.parameters()))
