"""The mean and covariance of the rows that a denoiser is trained on, from which its linear part follows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from nestgen import randomness
from nestgen.denoiser.gaussian import MOST_VALUES, Gaussian
from nestgen.errors import UserError
from nestgen.recipe.sections import shape_name
from nestgen.stores.latent import to_latent
from nestgen.training.batches import TrainingData

MOST_ROWS = 16384  # that are read
BLOCK = 1024


def fit_gaussian(gaussian: Gaussian, data: TrainingData) -> None:
    """Fits a denoiser's linear part to the rows of its level and of those above, to MOST_ROWS of them, evenly spread.

    Raises UserError for levels too large for it, and for fewer rows than values.
    """
    recipe, stores = data.recipe, (data.stores.z, *data.stores.above)
    above = recipe.conditions(data.level)
    shapes = [recipe.levels[number].shape for number in (data.level, *above)]
    values = sum(int(np.prod(shape)) for shape in shapes)
    images = data.stores.z.rows * data.stores.z.views
    if values > min(MOST_VALUES, images):
        raise UserError(
            f"denoiser.gaussian of {recipe.file} needs a covariance of {' and '.join(map(shape_name, shapes))}, {values:,} "
            f"values: {MOST_VALUES:,} are the most, and {images:,} the rows in {stores[0].path}; remove the key, or set "
            "smaller levels"
        )
    count, sum_J, square_JJ = 0, torch.zeros(values).double(), torch.zeros(values, values).double()
    for rows_NJ in _rows(data, images):
        count, sum_J, square_JJ = count + len(rows_NJ), sum_J + rows_NJ.sum(0), square_JJ + rows_NJ.T @ rows_NJ
    mean_J = sum_J / count
    noise_K = torch.zeros(0)
    for one in above:
        sigma, shape = recipe.levels[one].sigma, recipe.levels[one].shape
        assert not isinstance(sigma, tuple)  # Recipe refuses a range
        noise_K = torch.cat([noise_K, torch.full((int(np.prod(shape)),), sigma)])
    gaussian.fit(mean_J, square_JJ / count - torch.outer(mean_J, mean_J), noise_K)


def _rows(data: TrainingData, images: int) -> Iterator[Tensor]:
    """Blocks of rows (N, J), float64: a level's values, then those of the levels above, as (C, H, W)."""
    stores, views = (data.stores.z, *data.stores.above), data.stores.z.views
    codec = stores[0].attributes.get("codec")
    h, w, c = stores[0].latent_shape
    chosen = np.unique(np.linspace(0, images - 1, min(images, MOST_ROWS)).astype(np.int64))
    for first in range(0, len(chosen), BLOCK):
        image = chosen[first : first + BLOCK]
        noise_BCHW = None
        if codec is not None and codec["moments"]:
            noise_BCHW = randomness.normal(data.recipe.seed, f"train/z{data.level}/moments", image.tolist(), (c, h, w))
        stored = [store.read(image // views, image % views) for store in stores]
        latents = [to_latent(stored[0], codec, noise_BCHW), *(to_latent(one, None, None) for one in stored[1:])]
        yield torch.cat([one_BCHW.double().flatten(1) for one_BCHW in latents], 1)
