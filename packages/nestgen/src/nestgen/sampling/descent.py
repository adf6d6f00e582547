"""Drawing down the hierarchy: each level given the one just drawn, all of it a function of (seed, image)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nestgen import randomness as noise
from nestgen.diffusion.solvers import sample_level
from nestgen.sampling.trained import Given, Model, check_labels

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
    context_BTD: Tensor | None = None,
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
        given = Given(
            tuple(_conditions(model, z, indices, seed)),
            None if label_B is None else label_B.to(model.device),
            None if context_BTD is None else context_BTD.to(model.device),
        )
        z[model.level] = sample_level(
            model.denoise(given),
            model.weights.process,
            noise.normal(seed, f"sample/z{model.level}", indices, (c, h, w)).to(model.device),
            model.sampling.steps,
            model.sampling.sampler,
            lambda call, x_BCHW, level=model.level: callback(level, call, x_BCHW),  # type: ignore[misc]
        )
    return z


def _conditions(model: Model, z: Mapping[int, Tensor], indices: Sequence[int], seed: int) -> Iterator[Tensor]:
    """The levels above, the nearest first, noised as in training; none at the top."""
    for level, sigma in enumerate(model.sampling.sigmas, model.level + 1):
        assert level in z, f"z_{level} is neither frozen nor drawn"
        noise_BCHW = noise.normal(seed, f"sample/condition/z{level}", indices, z[level].shape[1:])
        yield (z[level].cpu() + sigma * noise_BCHW).to(model.device)


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
