"""FSDP: every process keeps a share of the weights, of their averages and of the optimiser's state.

Sharding is torch's own: Accelerate knows it on GPUs only, and passes over it on CPUs without a word.
"""

from __future__ import annotations

from torch import Tensor

from nestgen.denoiser.blocks import Block
from nestgen.denoiser.condition_path import Site
from nestgen.denoiser.uvit import Denoiser

# torch's modules for it are imported where they are needed: with them come sympy and seconds.


def shard(denoiser: Denoiser) -> None:
    """Shards a denoiser in place, block by block."""
    from torch.distributed.fsdp import fully_shard

    for module in denoiser.modules():
        if isinstance(module, Block | Site):
            fully_shard(module)
    fully_shard(denoiser)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may have a shard; then every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(other: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, sharded as another is, if it is."""
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
