"""
Spread a model that no single device can hold over the ranks of torchrun (FSDP2): `--shard=True`.
"""
import torch.distributed as dist
import torch.nn as nn

def count_numbers(module):
    """Count the numbers in a module's parameters."""
    return sum(param.numel() for param in module.parameters())

def shard_layers(net, device, n_ranks):
    """Shard the frozen weights of the language model's layers, in place.

    A layer is gathered where it is computed, and dropped again. All else is whole on every rank: adapters and
    critics, so that gradients, moments and files are those of a plain run; and the unembedding, which tied
    critics and VLM.logits use outside of the net's own forward pass.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device, (n_ranks,))
    decoder = net.get_decoder()
    stacks = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
    ]
    # the layers are the largest stack of modules
    layers = max(stacks, key=count_numbers)
    for layer in layers:
        trained = {
            param
            for param in layer.parameters()
            if param.requires_grad
        }
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    # This shards nothing more: it fetches the next layer while one computes.
    fully_shard(net, mesh=mesh, ignored_params=set(net.parameters()))
