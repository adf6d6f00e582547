"""Weights in half precision by a few calls, where autocast casts each weight, and later its gradient, by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nestgen.denoiser.blocks import LayerNorm
from nestgen.denoiser.uvit import Denoiser, Outputs

LAST_LAYERS = "norm", "decoder_pred", "final_layer"  # which make the prediction in float32
AT_ONCE = 64  # weights: what one kernel of a GPU takes


class HalfWeights(nn.Module):
    """A denoiser whose blocks compute with copies of their weights in autocast's precision; its weights stay float32.

    The numbers are autocast's, bit for bit. Not all at once, so that some gradients are there, and can travel between processes,
    while others are computed.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        halved = [
            f"{module_name}.{name}"
            for module_name, module in denoiser.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | LayerNorm)
            and module_name not in LAST_LAYERS
            for name, _ in module.named_parameters()
        ]
        parts = [halved[first : first + AT_ONCE] for first in range(0, len(halved), AT_ONCE)]
        self.groups = [{name: denoiser.get_parameter(name) for name in names} for names in parts]

    def forward(self, z_BCHW: Tensor, time_B: Tensor, **inputs: Any) -> Tensor | Outputs:
        """What the denoiser gives, under autocast."""
        dtype, copies = torch.get_autocast_dtype(z_BCHW.device.type), dict[str, Tensor]()
        for weights in self.groups:
            copies |= zip(weights, _Cast.apply(dtype, *weights.values()))
        outputs: Tensor | Outputs = functional_call(self.denoiser, copies, (z_BCHW, time_B), inputs, tie_weights=False)
        return outputs


class _Cast(torch.autograd.Function):
    """Tensors in another precision, and their gradients in the first one."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)  # what has no part in the loss keeps no gradient
        return tuple(_cast(list(tensors), dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_cast([one for one in gradients if one is not None], ctx.dtype))
        return (None, *(None if one is None else next(cast) for one in gradients))


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, tensors)
    return copies
