"""Linear layers in float32 on a CPU that is not Intel's, through oneDNN.

torch gives float32 products to MKL, which takes AVX2 kernels on processors that are not Intel's; oneDNN, which torch is built
with too, takes AVX-512 ones. Measured on an EPYC that has them, one thread: 96 and 240 GFLOP/s for the layers of a ViT-B, and
1.8 times as many images/s for the whole network. On an Intel Xeon with AVX-512 MKL is the faster one: 1.1 times as many.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def on_onednn(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same network with its linear layers computed by oneDNN; for a float32 network on a CPU, without gradients.

    Where this torch can't do so, and where MKL is faster, the network itself.
    """
    if is_intel() or not has_onednn_linear():
        return forward

    def run(x_BCHW: Tensor) -> Tensor:
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention's own kernel would hide its layers
        try:
            with _OneDNN():
                return forward(x_BCHW)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)

    return run


def is_intel() -> bool:
    """Whether the processor is Intel's, as Linux or Python tells."""
    file = Path("/proc/cpuinfo")
    told = file.read_text(errors="replace") if file.is_file() else platform.processor()
    return "GenuineIntel" in told


@cache
def has_onednn_linear() -> bool:
    """Whether torch has the operator, tried on a 1x1 layer: it is private, so another torch may lack or change it."""
    one = torch.ones(1, 1)
    try:
        with torch.inference_mode():
            return torch.equal(_linear(one, 2 * one, one[0]), 3 * one)
    except (AttributeError, RuntimeError, TypeError):  # the operator is gone, not built, or takes other arguments
        return False


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNN(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.linear.default and args[0].dtype == torch.float32:
            x, weight, *bias = args
            return _linear(x, weight, bias[0] if bias else None)
        return func(*args, **(kwargs or {}))
