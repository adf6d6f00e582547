"""Drawing down the hierarchy: each level given the one just drawn, all of it a function of (seed, image)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nestgen import noise
from nestgen.models import Model, check_labels
from nestgen.samplers import sample_level

# Gets the level, the number of the network call from 0, and the latent (B, C, H, W) that it predicted.
Callback = Callable[[int, int, Tensor], object]


def no_callback(level: int, call: int, x_BCHW: Tensor) -> None:
    """Does nothing."""


@torch.inference_mode()
def sample_below(
    models: Sequence[Model],
    indices: Sequence[int],
    seed: int,
    frozen: Mapping[int, Tensor],
    label_B: Tensor | None = None,
    callback: Callback = no_callback,
) -> dict[int, Tensor]:
    """Latents (B, C, H, W) by level: those frozen, and below them one drawn by each model that has none.

    Image i depends on (seed, i) alone: all noise is a function of (seed, level, i), whatever the depth of the
    hierarchy, the batch or what is frozen.
    """
    z = dict(frozen)
    for model in sorted(models, key=lambda model: model.level, reverse=True):
        if model.level in z:
            continue
        h, w, c = model.config.shape
        denoise = model.denoise(
            _condition(model, z.get(model.level + 1), indices, seed),
            None if label_B is None else label_B.to(model.device),
        )
        z[model.level] = sample_level(
            denoise,
            model.weights.process,
            noise.normal(seed, f"sample/z{model.level}", indices, (c, h, w)).to(model.device),
            model.sampling.steps,
            model.sampling.sampler,
            lambda call, x_BCHW, level=model.level: callback(level, call, x_BCHW),  # type: ignore[misc]
        )
    return z


def _condition(model: Model, above_BCHW: Tensor | None, indices: Sequence[int], seed: int) -> Tensor | None:
    """The level above, noised as in training; None at the top."""
    if not model.config.condition_shapes:
        return None
    assert above_BCHW is not None, f"z_{model.level + 1} is neither frozen nor drawn"
    noise_BCHW = noise.normal(seed, f"sample/condition/z{model.level + 1}", indices, above_BCHW.shape[1:])
    return (above_BCHW.cpu() + model.sampling.sigma * noise_BCHW).to(model.device)


def labels_of(models: Sequence[Model], indices: Sequence[int], seed: int, label: int | None) -> Tensor | None:
    """Class (B) of each image: the one asked for, else drawn from (seed, i); None for unconditional models.

    Raises UserError for a class that the models do not know.
    """
    check_labels(models, label)
    classes = models[0].labels
    if not classes:
        return None
    if label is not None:
        return torch.full((len(indices),), label)
    return (noise.uniform(seed, "sample/label", indices, ()) * classes).long()


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
