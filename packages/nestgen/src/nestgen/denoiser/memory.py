"""What fits into the memory of a machine or GPU, counted before a pass tries it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from nestgen.denoiser.config import DenoiserConfig
from nestgen.errors import UserError

HALF = 2  # bytes of a value in the smallest precision
# Values of a token's width that a pass holds for each block, at the least: in training the inputs of its two norms, of the
# attention and of the linear layers, of which one is four times as wide; without gradients only that one and the long skips.
TRAINED, CHECKPOINTED, SAMPLED = 10, 1, 4


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of the machine for the CPU."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total


def memory_name(device: torch.device) -> str:
    """`GPU`, or `machine` for the CPU."""
    return "GPU" if device.type == "cuda" else "machine"


def most_samples(config: DenoiserConfig, memory: int, *, training: bool, checkpointed: bool = False) -> int:
    """How many samples one pass can hold in `memory` bytes at the very most; far fewer fit where other things count.

    Counted are a few of the values that every token of every block needs, in half precision, and the latents.
    """
    token = HALF * config.dim
    blocks = (CHECKPOINTED if checkpointed else TRAINED) * config.depth if training else SAMPLED + config.depth // 2
    values = sum(math.prod(shape) for shape in (config.shape, *config.condition_shapes))
    return memory // (math.prod(config.grid) * token * blocks + HALF * values)


def check_batch(config: DenoiserConfig, samples: int, device: torch.device, setting: str, **pass_: bool) -> None:
    """Raises UserError for more samples in one pass than memory can hold; `setting` is what gives their number."""
    memory = memory_of(device)
    most = most_samples(config, memory, **pass_)
    if samples > most:
        raise UserError(
            f"{samples:,} samples in one pass do not fit into the memory of this {memory_name(device)}, {memory / 1e9:.0f} GB, "
            f"which holds fewer than {most + 1:,} of this denoiser; set {setting} to less than that"
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised it because memory was full; on a CPU it has no type of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def sampling_memory(samples: int, device: torch.device) -> Iterator[None]:
    """Raises UserError where a pass of so many samples, without gradients, does not fit into memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        less = (
            f"give --batch-size {max(1, samples // 2)} or fewer: the same command goes on"
            if samples > 1
            else "take another"
        )
        raise UserError(
            f"{samples} image(s) at a time do not fit into the memory of this {memory_name(device)}; {less}"
        ) from None
