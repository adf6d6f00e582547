"""FSDP: every process has a shard of the weights, of their averages and of the optimiser's state.

Sharding is torch's own: Accelerate's works on GPUs only, and does nothing on CPUs without a word.
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


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may have a shard; then every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A full tensor, sharded as another one is, if that is sharded."""
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
