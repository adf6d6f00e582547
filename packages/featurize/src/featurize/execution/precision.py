"""The precision of a network's forward pass, and the device whose roundings it has."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# Between two devices, in the same precision: distance of a row as a share of its length. docs/precision.md has what is measured.
AGREEMENT = {"float32": 5e-3, "bfloat16": 5e-2}

_SWITCHES = threading.RLock()  # torch's are of the whole process, which on a GPU does two tasks at once


@contextmanager
def inference(device: str, precision: str) -> Iterator[None]:
    """Torch without gradients, in float32, or in bfloat16 for the layers that torch's autocast takes it for.

    float32 is float32 on every device: TF32, torch's default for a GPU's convolutions and some containers' for its products,
    is off while the block runs; in bfloat16, sums within a product stay in float32.
    """
    import torch

    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    half = precision == "bfloat16"
    with _SWITCHES:
        before = products.allow_tf32, products.allow_bf16_reduced_precision_reduction, convolutions.allow_tf32
        products.allow_tf32 = products.allow_bf16_reduced_precision_reduction = convolutions.allow_tf32 = False
        try:
            with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
                yield
        finally:
            products.allow_tf32, products.allow_bf16_reduced_precision_reduction, convolutions.allow_tf32 = before


def convert_weights(network: nn.Module, precision: str) -> None:
    """Convert once what autocast would convert for each batch: weights of linear layers and convolutions. Values stay the same.

    Not those that a module uses without calling the layer, as torch's attention does.
    """
    from torch import nn

    if precision == "bfloat16":
        for layer in network.modules():
            if type(layer) in (nn.Linear, nn.Conv2d):
                layer.bfloat16()


def device_name(device: str) -> str:
    """What of a device decides roundings: a GPU's model, or a processor's vector instructions (`CPU with AVX512`)."""
    import torch

    if device == "cpu":
        return f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name(device)
