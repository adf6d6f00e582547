"""A linear layer that oneDNN computes where torch would take slower kernels: in float32, forward and backward, on a CPU that is
not Intel's.

torch gives float32 products to MKL, which takes AVX2 kernels on processors that are not Intel's; oneDNN, which torch is built
with too, takes AVX-512 ones. Measured on an EPYC that has them, one thread, the layers of U-ViT's small network: 110 and 240
GFLOP/s forward, 110 and 190 to 240 backward. On an Intel Xeon with AVX-512 MKL is the faster one: a training step of nano takes
0.9 of the time that it takes by oneDNN, one of small 0.85 to 0.9.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Linear(nn.Linear):
    """x W^T + b. Its weights are nn.Linear's."""

    def forward(self, x_BLD: Tensor, y_BLF: Tensor | None = None) -> Tensor:
        """(..., D) to (..., E); of [x, y] if there is a second tensor, by two products, so that these are not copied together."""
        if y_BLF is None:
            return linear(x_BLD, self.weight, self.bias)
        of_x_ED, of_y_EF = self.weight.split([x_BLD.shape[-1], y_BLF.shape[-1]], 1)
        return linear(y_BLF, of_y_EF, added_BLE=linear(x_BLD, of_x_ED, self.bias))


def linear(x_BLD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None, added_BLE: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., D) to (..., E), and `added`; the weight may be a part of a layer's."""
    if _suits(x_BLD):  # of a weight that is not contiguous oneDNN is a thousand times slower
        return _OneDNN.apply(x_BLD, weight_ED.contiguous(), bias_E, added_BLE)
    if added_BLE is None:
        return F.linear(x_BLD, weight_ED, bias_E)
    assert bias_E is None
    return torch.addmm(added_BLE.flatten(0, -2), x_BLD.flatten(0, -2), weight_ED.t()).view_as(added_BLE)


def gelu_linear(layer: nn.Linear, gelu: nn.GELU, x_BLD: Tensor) -> Tensor:
    """GELU(x W^T + b), (..., D) to (..., E): where no gradient is wanted oneDNN computes both in one pass over the values."""
    if _suits(x_BLD) and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x_BLD, layer.weight, layer.bias, "gelu", [], "none")
    return gelu(layer(x_BLD))


def _suits(x_BLD: Tensor) -> bool:
    is_float32 = x_BLD.dtype == torch.float32 and x_BLD.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return is_float32 and BY_ONEDNN and not torch.compiler.is_compiling()


class _OneDNN(torch.autograd.Function):
    # Without setup_context, for which torch looks up the signature of `forward` in every call.
    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, added_BLE: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BLD, weight_ED)
        out_BLE = _product(x_BLD, weight_ED, bias_E)
        return out_BLE if added_BLE is None else out_BLE.add_(added_BLE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLE: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, weight_ED = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_added = ctx.needs_input_grad
        grad_NE, x_ND = grad_BLE.flatten(0, -2), x_BLD.flatten(0, -2)
        return (
            _product(grad_BLE, weight_ED.t()) if wants_x else None,
            _outer(grad_NE, x_ND) if wants_weight else None,
            grad_NE.sum(0) if wants_bias else None,
            grad_BLE if wants_added else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _outer(grad_NE: Tensor, x_ND: Tensor) -> Tensor:
    """grad^T x by oneDNN, which first copies one of both into another order: the narrower one is to be that."""
    if grad_NE.shape[1] <= x_ND.shape[1]:
        return _product(grad_NE.t(), x_ND.t())
    return _product(x_ND.t(), grad_NE.t()).t()


def onednn_works() -> bool:
    """Whether the operator is there and right, tried on a 1x1 layer: it is torch's own, and may change or go."""
    one = torch.ones(1, 1, device="cpu")
    try:
        return torch.backends.mkldnn.is_available() and _product(one, one, one[0]).item() == 2
    except (AttributeError, TypeError, RuntimeError):  # not in this torch, other arguments, not built
        return False


def is_intel() -> bool:
    """Whether the processor is Intel's, as Linux or Python tells."""
    file = Path("/proc/cpuinfo")
    told = file.read_text(errors="replace") if file.is_file() else platform.processor()
    return "GenuineIntel" in told


BY_ONEDNN = onednn_works() and not is_intel()
