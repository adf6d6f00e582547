"""Kernels and bytes of the elementwise work of a training step, counted on tensors without data as a GPU would do it uncompiled.

A call of `_foreach_...` is as many kernels as torch launches for it: one for each 64 tensors, or for each 320 pieces of 65,536
numbers, whichever is more (aten/src/ATen/native/cuda/MultiTensorApply.cuh, for lists of two tensors).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.side_by_side import out_option, report, table
from nestgen.denoiser import blocks
from nestgen.denoiser.config import SIZES, DenoiserConfig
from nestgen.denoiser.half_weights import HalfWeights
from nestgen.denoiser.uvit import Denoiser

PRODUCTS = {"_linear_pointwise", "mm", "addmm", "bmm", "convolution", "convolution_backward"}
VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "split", "split_with_sizes", "unbind"}
VIEWS |= {"detach", "alias", "select", "as_strided", "unsqueeze", "squeeze", "empty", "empty_like", "empty_strided"}
VIEWS |= {"device", "new_empty", "new_empty_strided", "lift_fresh", "_reshape_alias", "tensor_split"}
TENSORS, PIECES, PIECE = 64, 320, 65_536  # of a launch for lists of tensors, and numbers


class Count(TorchDispatchMode):
    """Counts operations that move values and are neither products nor attention."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in PRODUCTS | VIEWS and "attention" not in name:
            tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
            self.kernels[name] += _launches(result or args[0]) if name.startswith("_foreach") else 1
            self.bytes[name] += sum(one.numel() * one.element_size() for one in tensors)
        return result


def _launches(tensors: list[Tensor]) -> int:
    pieces = sum(-(-tensor.numel() // PIECE) for tensor in tensors)
    return max(-(-len(tensors) // TENSORS), -(-pieces // PIECES))


def count_step(config: DenoiserConfig, batch: int) -> Count:
    """A forward and a backward pass in bfloat16 by autocast, with flash attention and torch's norms in float32 as on CUDA."""
    attention, norm, truncated = blocks._attention, F.layer_norm, torch.nn.init.trunc_normal_

    def flash(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHLK.to(v_BHLK.dtype), k_BHLK.to(v_BHLK.dtype), v_BHLK
        )[0]
        return out

    blocks._attention = flash
    F.layer_norm = lambda x, *rest: norm(x.float() if torch.is_autocast_enabled("cpu") else x, *rest)
    torch.nn.init.trunc_normal_ = lambda tensor, **_: tensor
    try:
        with FakeTensorMode():
            denoiser, (h, w, c) = Denoiser(config), config.shape
            z_BCHW, time_B = torch.empty(batch, h, w, c).permute(0, 3, 1, 2), torch.empty(batch)
            above = [torch.empty(batch, h, w, c).permute(0, 3, 1, 2) for h, w, c in config.condition_shapes]
            keep_B = torch.empty(batch, dtype=torch.bool) if above else None
            with Count() as counted:
                with torch.autocast("cpu", torch.bfloat16):
                    out_BCHW = HalfWeights(denoiser)(z_BCHW, time_B, condition=above or None, keep_B=keep_B)
                (out_BCHW.float() - z_BCHW).square().mean().backward()
        return counted
    finally:
        blocks._attention, F.layer_norm, torch.nn.init.trunc_normal_ = attention, norm, truncated


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="small", show_default=True)
@click.option("--batch", default=256, show_default=True)
@out_option
def main(size: str, batch: int, out: Path | None) -> None:
    """A step of z_0 (32x32x4) given z_1 (8x8x64), COCO's."""
    dim, depth, heads = SIZES[size]
    counted = count_step(DenoiserConfig((32, 32, 4), 2, dim, depth, heads, ((8, 8, 64),)), batch)
    lines = [["all", sum(counted.kernels.values()), f"{sum(counted.bytes.values()) / 1e9:.1f}"]]
    lines += [[name, counted.kernels[name], f"{size / 1e9:.1f}"] for name, size in counted.bytes.most_common(12)]
    body = table(["operation", "kernels", "GB read and written"], lines)
    report(f"Elementwise work of a step of {size}, batch {batch}, bfloat16", body, ["torch"], out)


if __name__ == "__main__":
    main()
