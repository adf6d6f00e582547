"""Sampling from Python: `NestedPipeline.from_run("runs/x").sample(8, seed=0).images`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nestgen.errors import UserError
from nestgen.recipe.level_sampling import level_sampling
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.sampling.conditions import Request, open_conditions
from nestgen.sampling.decoder import Decoder, load_decoder
from nestgen.sampling.descent import default_device, sample_images
from nestgen.sampling.trained import LevelSampler, load_samplers


@dataclass(frozen=True)
class Samples:
    """A batch of samples. `latents` are those of each level by its number, (B, C, H, W) on the CPU."""

    images: list[Image.Image]
    latents: dict[int, Tensor]


@dataclass(frozen=True)
class Step:
    """A network call, for callbacks: `latent_BCHW` is the latent of `level` that it predicted."""

    level: int
    step: int
    steps: int
    latent_BCHW: Tensor


@dataclass(frozen=True)
class NestedPipeline:
    """The trained denoisers of a hierarchy and its decoder, ready to sample; made by `from_run`."""

    recipe: Recipe
    samplers: tuple[LevelSampler, ...]
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
            raise UserError(
                f"{folder} is not a run: it has no z*/recipe.yaml; give runs/<name>, which `nestgen train` makes"
            )
        recipe = load_recipe(max(files, key=lambda file: file.stat().st_mtime))
        device = torch.device(device) if device is not None else default_device()
        if depth is None:
            depth = next(
                (one for one in range(len(recipe.levels), 0, -1) if _is_trained(recipe.depth(one), folder)), None
            )
        recipe = recipe.depth(depth or len(recipe.levels))
        samplers = load_samplers(recipe, device, folder)
        decode = load_decoder(samplers[0].trained.meta["codec"], None if vae is None else Path(vae), str(device))
        return cls(recipe, samplers, decode, device)

    def sample(self, count: int, seed: int = 0, **options: Any) -> Samples:
        """Images 0 to count - 1 of a seed, with the options of `batches`: those of `nestgen sample`."""
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
        """The images batch by batch, as they are sampled; image i depends on (seed, i), not on the batch.

        `label` is the class of all, by default sampled for each; `prompts` a root of embedded captions. `frozen` are
        latents of levels that are not sampled, (count, C, H, W) or (1, C, H, W) for all images. `callback` is called
        after each network call. Further keywords are keys of the recipe's section `sampling`: steps=20,
        guidance=[0.5, 1.0], sampler="heun", ... Raises UserError as the command does.
        """
        if "autoguide" in sampling:
            raise UserError("autoguide names further denoisers: set it in the recipe, before from_run loads them")
        recipe = self.recipe.with_sampling(sampling) if sampling else self.recipe
        samplers = [replace(one, settings=level_sampling(recipe, one.level)) for one in self.samplers]
        size = batch or recipe.sampling.batch
        request = Request(count, seed, size, label, prompts=None if prompts is None else Path(prompts))
        conditions = open_conditions(recipe, samplers, request)

        def report(level: int, call: int, latent_BCHW: Tensor) -> None:
            if callback is not None:
                callback(Step(level, call, samplers[level].settings.steps, latent_BCHW))

        for first in range(0, count, size):
            indices = range(first, min(first + size, count))
            latents = {
                level: z[list(indices)] if len(z) > 1 else z.expand(len(indices), *z.shape[1:])
                for level, z in (frozen or {}).items()
            }
            z = sample_images(samplers, indices, conditions, latents, report)
            images = [Image.fromarray(image) for image in self.decode(z[0])]
            yield Samples(images, {level: one.cpu() for level, one in z.items()})


def _is_trained(recipe: Recipe, folder: Path) -> bool:
    """Whether a run's folder has a denoiser for every level."""
    return all((folder / run_dir(recipe, level).name / "checkpoints").is_dir() for level in range(len(recipe.levels)))
