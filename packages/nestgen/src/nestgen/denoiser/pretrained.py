"""First weights from a file: a published U-ViT checkpoint, or the weights of another denoiser of this project.

The names of the weights are U-ViT's (github.com/baofff/U-ViT, libs/uvit.py and libs/uvit_t2i.py), so its `nnet.pth` and
`nnet_ema.pth` load as they are. What it does not have, the condition path and the embedding of sigma, starts as an
identity: the denoiser begins as the unconditional network of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from nestgen.denoiser.uvit import Denoiser
from nestgen.errors import UserError

ADDED = (  # to U-ViT, by this project
    "sites.",
    "sigma_embed.",
    "null_condition",
    "null_further.",
    "null_context",
    "side_norm.",
    "side_pred.",
    "align_conv.",
)


def read_weights(file: Path, denoiser: Denoiser) -> dict[str, Tensor]:
    """The weights of a file that fit a denoiser, by name. Raises UserError that lists what does not fit."""
    loaded = _read(file)
    expected = denoiser.state_dict()
    missing = [name for name in expected if name not in loaded and not name.startswith(ADDED)]
    unexpected = [name for name in loaded if name not in expected]
    mismatched = [
        f"{name} {list(loaded[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in loaded and loaded[name].shape != expected[name].shape
    ]
    faults = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("it lacks", missing), ("the denoiser has no", unexpected), ("it has", mismatched))
        if names
    ]
    if faults:
        raise UserError(
            f"{file} does not fit this level's denoiser: {'; '.join(faults)}; set denoiser.size, labels, text and qk_norm "
            "and the level's shape and patch to those of that network"
        )
    return {name: tensor.to(expected[name].dtype) for name, tensor in loaded.items()}


def uvit_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a denoiser's weights that U-ViT has, as in its `nnet.pth`."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(ADDED)}


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(f"there is no {file}; check the path given to --init")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)  # no code of a pickle is run
    except Exception as error:  # what a file that is something else raises is any of them
        # Not the message: torch's tells how to let a pickle run code.
        raise UserError(
            f"{file} cannot be read as weights ({type(error).__name__}); --init takes a torch state dict or safetensors"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} is not a state dict: expected tensors by name, as in U-ViT's nnet_ema.pth")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
