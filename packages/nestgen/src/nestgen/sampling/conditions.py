"""What decides the images of a sampling run besides the denoisers: seed, classes, captions and frozen levels.

All of it is a function of the seed and the image's number, so that image i is the same in any batch and process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from upath import UPath

from nestgen import randomness
from nestgen.errors import UserError
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.captions import Prompts, check_encoder, check_takes_captions, open_prompts
from nestgen.sampling.frozen import FrozenSource, open_frozen_stores
from nestgen.sampling.real import labels_of_rows
from nestgen.sampling.trained import LevelSampler
from nestgen.stores.store import Store


@dataclass(frozen=True)
class Request:
    """The settings of a sampling run that are not in the recipe.

    `prompts` is a root with embedded captions; `prompt` the one caption for all images, if it was embedded there.
    `overwrite` replaces what other settings or denoisers sampled into the folder.
    """

    count: int
    seed: int
    batch: int
    label: int | None = None
    frozen: FrozenSource | None = None
    prompts: Path | UPath | None = None
    prompt: str | None = None
    vae: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class ImageConditions:
    """The class, the caption and the frozen levels of each image of a seed.

    seed     of all noise, and of the classes and captions that are sampled
    classes  how many the denoisers know; 0 for denoisers without
    label    the class of all images; None for one sampled for each, or that of the row an image is frozen to
    frozen   what the levels from `frozen.freeze_from` up are taken from
    stores   of the levels that are frozen to real rows
    prompts  the captions; None for the empty one
    """

    seed: int
    classes: int = 0
    label: int | None = None
    frozen: FrozenSource | None = None
    stores: Mapping[int, Store] = field(default_factory=dict)
    prompts: Prompts | None = None

    def is_frozen(self, level: int) -> bool:
        """Whether a level is frozen to real rows or to image 0."""
        return self.frozen is not None and level >= self.frozen.freeze_from

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """Classes (B) int64; None for denoisers without classes. A row without a class has the null class."""
        if not self.classes:
            return None
        if self.label is not None:
            return torch.full((len(indices),), self.label)
        if self.frozen is not None and self.frozen.root is not None:
            first = self.stores[self.frozen.freeze_from]
            return labels_of_rows(self.frozen.root, first, self.frozen.rows(indices), self.classes)
        return (randomness.uniform(self.seed, "sample/label", self._sources(indices), ()) * self.classes).long()

    def context(self, indices: Sequence[int]) -> Tensor | None:
        """Embedded captions (B, T, D) float32, those of the rows that images are frozen to where they have any."""
        if self.prompts is None:
            return None
        rows = None
        if self.frozen is not None and any(map(self.prompts.belong_to, self.stores.values())):
            rows = self.frozen.rows(indices)
        return self.prompts.context(self._sources(indices), self.seed, rows)

    def _sources(self, indices: Sequence[int]) -> Sequence[int]:
        """The image whose class and caption each image has: image 0's for all, where levels are frozen to it."""
        to_image_0 = self.frozen is not None and self.frozen.root is None
        return [0] * len(indices) if to_image_0 else indices


def open_conditions(recipe: Recipe, samplers: Sequence[LevelSampler], request: Request) -> ImageConditions:
    """Opens the stores and captions of a run.

    Raises UserError for a class that the denoisers do not know, levels or rows that cannot be frozen to, and captions
    that the denoisers do not take or that are of another text encoder.
    """
    classes, text, label = recipe.denoiser.labels, recipe.denoiser.text, request.label
    if label is not None and not 0 <= label < classes:
        range_ = f"classes 0 to {classes - 1}" if classes else "no classes (denoiser.labels is 0)"
        raise UserError(f"there is no label {label}: the denoisers have {range_}")
    stores: Mapping[int, Store] = {}
    if request.frozen is not None:
        fingerprints = [sampler.trained.meta["stores"][f"z{sampler.level}"] for sampler in samplers]
        stores = open_frozen_stores(recipe, request.frozen, request.count, fingerprints)
    prompts = None
    if request.prompts is not None:
        check_takes_captions(recipe)
        assert text is not None
        prompts = open_prompts(request.prompts, text, request.prompt)
        check_encoder(prompts, samplers[0].trained.denoiser.null_context, recipe)
    return ImageConditions(request.seed, classes, label, request.frozen, stores, prompts)
