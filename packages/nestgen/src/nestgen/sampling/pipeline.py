"""Sampling from Python: `NestedPipeline.from_run("runs/x").sample(8, seed=0).images`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nestgen.errors import UserError
from nestgen.recipe.level_sampling import level_sampling
from nestgen.recipe.recipe import Recipe, load_recipe, run_dir
from nestgen.sampling import descent as draw
from nestgen.sampling.captions import check_text, open_prompts
from nestgen.sampling.decoder import Decoder, load_decoder
from nestgen.sampling.trained import Model, check_labels, load_models


@dataclass(frozen=True)
class Samples:
    """A batch of samples. `latents` are those of each level by its number, (B, C, H, W) on the CPU."""

    images: list[Image.Image]
    latents: dict[int, Tensor]


@dataclass(frozen=True)
class Step:
    """What a callback is told of each network call: `latent_BCHW` is the latent of `level` predicted by then."""

    level: int
    step: int
    steps: int
    latent_BCHW: Tensor


@dataclass(frozen=True)
class NestedPipeline:
    """The trained denoisers of a hierarchy and its decoder, ready to draw; made by `from_run`."""

    recipe: Recipe
    models: tuple[Model, ...]
    decode: Decoder
    device: torch.device

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        depth: int | None = None,
        device: str | torch.device | None = None,
        vae: str | Path | None = None,
    ) -> NestedPipeline:
        """Loads a run's folder, runs/<name>, which may have been moved: the recipe lies within.

        `depth` cuts the hierarchy to its first levels; by default it is the deepest whose denoisers are all there. The
        device is the GPU if there is one. `vae` is the file of the VAE's weights, if it is not where z_0's store said.
        Raises UserError for a folder without denoisers, of two hierarchies, or without the VAE's weights.
        """
        folder = Path(run)
        files = sorted(folder.glob("z*-*/recipe.yaml"))
        if not files:
            raise UserError(f"{folder} is no run: it has no z*/recipe.yaml; `nestgen train` makes runs/<name>")
        recipe = load_recipe(max(files, key=lambda file: file.stat().st_mtime))
        place = torch.device(device) if device is not None else draw.device()
        if depth is None:
            depth = next((one for one in range(len(recipe.levels), 0, -1) if _whole(recipe.depth(one), folder)), None)
        recipe = recipe.depth(depth or len(recipe.levels))
        models = load_models(recipe, place, folder)
        decode = load_decoder(models[0].weights.meta["codec"], None if vae is None else Path(vae), str(place))
        return cls(recipe, models, decode, place)

    def sample(self, count: int, seed: int = 0, **options: Any) -> Samples:
        """Images 0 to count - 1 of a seed, with the options of `batches`: the same that `nestgen sample` draws."""
        parts = list(self.batches(count, seed, **options))
        latents = {level: torch.cat([part.latents[level] for part in parts]) for level in parts[0].latents}
        return Samples([image for part in parts for image in part.images], latents)

    def batches(
        self,
        count: int,
        seed: int = 0,
        batch: int | None = None,
        label: int | None = None,
        prompts: str | Path | None = None,
        frozen: dict[int, Tensor] | None = None,
        callback: Callable[[Step], object] | None = None,
        **sampling: Any,
    ) -> Iterator[Samples]:
        """The images batch by batch, as they are drawn; image i depends on (seed, i), not on the batch.

        `label` is the class of all, by default drawn for each; `prompts` a root of embedded captions. `frozen` are
        latents of levels that are not drawn, (count, C, H, W) or (1, C, H, W) for all images. `callback` is called
        after each network call. Further keywords are keys of the recipe's section `sampling`: steps=20,
        guidance=[0.5, 1.0], sampler="heun", ... Raises UserError as the command does.
        """
        recipe = self.recipe.with_sampling(sampling) if sampling else self.recipe
        if "autoguide" in sampling:
            raise UserError("autoguide names further denoisers: set it in the recipe, before from_run loads them")
        models = tuple(replace(model, sampling=level_sampling(recipe, model.level)) for model in self.models)
        check_labels(models, label)
        check_text(recipe, prompts)
        text = recipe.denoiser.text
        captions = open_prompts(Path(prompts), text) if prompts is not None and text else None

        def told(level: int, call: int, latent_BCHW: Tensor) -> None:
            if callback is not None:
                callback(Step(level, call, models[level].sampling.steps, latent_BCHW))

        size = batch or recipe.sampling.batch
        for first in range(0, count, size):
            indices = range(first, min(first + size, count))
            kept = {
                level: z[list(indices)] if len(z) > 1 else z.expand(len(indices), *z.shape[1:])
                for level, z in (frozen or {}).items()
            }
            label_B = draw.labels_of(models, indices, seed, label)
            context_BTD = None if captions is None else captions.context(indices, seed)
            z = draw.sample_below(models, indices, seed, kept, label_B, context_BTD, told)
            pictures: np.ndarray = self.decode(z[0])
            yield Samples([Image.fromarray(one) for one in pictures], {level: one.cpu() for level, one in z.items()})


def _whole(recipe: Recipe, folder: Path) -> bool:
    """Whether a run's folder has a denoiser for every level."""
    return all((folder / run_dir(recipe, level).name / "checkpoints").is_dir() for level in range(len(recipe.levels)))
