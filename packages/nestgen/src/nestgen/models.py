"""The trained denoisers of a hierarchy, loaded for sampling and checked against the recipe and each other."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestgen.checkpoint import load_denoiser, newest
from nestgen.denoiser import Denoiser, denoiser_config
from nestgen.errors import UserError
from nestgen.files import sha256_of
from nestgen.process import Process
from nestgen.recipe import Recipe, run_dir, shape_name
from nestgen.samplers import Eps


@dataclass(frozen=True)
class Model:
    """The denoiser D_l of one level, and how it is sampled.

    `sigma` is the noise on the level above before it conditions this one; `guidance` is s, None where nothing
    can be dropped: the unconditional top.
    """

    level: int
    denoiser: Denoiser
    process: Process
    sampler: str
    steps: int
    guidance: float | None
    sigma: float
    meta: dict[str, Any]  # of the checkpoint
    weights_sha256: str

    def eps(self, condition_BCHW: Tensor | None, label_B: Tensor | None) -> Eps:
        """The guided noise prediction: (1 + s) eps(z, condition, label) - s eps(z, null, null), in one batch."""
        s = self.guidance or 0.0

        def plain(z_BCHW: Tensor, told_B: Tensor) -> Tensor:
            return self.denoiser(z_BCHW, told_B, condition_BCHW, None, label_B)

        def guided(z_BCHW: Tensor, told_B: Tensor) -> Tensor:
            keep_B = torch.arange(2 * len(z_BCHW), device=z_BCHW.device) < len(z_BCHW)
            both = self.denoiser(
                torch.cat([z_BCHW, z_BCHW]),
                torch.cat([told_B, told_B]),
                None if condition_BCHW is None else torch.cat([condition_BCHW, condition_BCHW]),
                keep_B,
                None if label_B is None else torch.cat([label_B, torch.full_like(label_B, self.labels)]),
            )
            kept_BCHW, null_BCHW = both.chunk(2)
            return (1 + s) * kept_BCHW - s * null_BCHW

        return guided if s else plain

    @property
    def labels(self) -> int:
        """How many classes it knows, which is also the null class; 0 for an unconditional model."""
        return self.denoiser.config.labels


def load_models(recipe: Recipe, device: torch.device) -> tuple[Model, ...]:
    """The newest checkpoint of every level, z_0 first.

    Raises UserError for a level that is not trained, is of another hierarchy than the recipe's, or was trained
    on another store than the level above it.
    """
    models = tuple(_load(recipe, level, device) for level in range(len(recipe.levels)))
    for below, above in zip(models, models[1:]):
        name = f"z{above.level}"
        if below.meta["stores"][name] != above.meta["stores"][name]:
            raise UserError(
                f"{run_dir(recipe, below.level)} and {run_dir(recipe, above.level)} were trained on different "
                f"stores of z_{above.level}; train the older one again"
            )
    return models


def _load(recipe: Recipe, level: int, device: torch.device) -> Model:
    folder = run_dir(recipe, level)
    denoiser, meta = load_denoiser(folder, device)
    _check_same(recipe, level, meta, folder)
    checkpoint = newest(folder)
    if checkpoint is None or checkpoint.step != meta["step"]:
        raise UserError(f"{folder} is being trained; sample again once its training has ended")
    top = level + 1 == len(recipe.levels)
    return Model(
        level=level,
        denoiser=denoiser,
        process=Process(recipe.process.kind),
        sampler=recipe.sampling.sampler,
        steps=recipe.sampling.steps,
        guidance=None if top and not recipe.denoiser.labels else recipe.guidance(level),
        sigma=0.0 if top else recipe.levels[level + 1].sigma,
        meta=meta,
        weights_sha256=sha256_of(checkpoint.path / "ema.safetensors"),
    )


def _check_same(recipe: Recipe, level: int, meta: dict[str, Any], folder: Path) -> None:
    """The recipe must say what the checkpoint was trained with."""
    pairs: list[tuple[str, Any, Any]] = [("process.kind", meta["process"]["kind"], recipe.process.kind)]
    for index in range(level, min(level + 2, len(recipe.levels))):
        trained, here = meta["levels"][index], recipe.levels[index]
        pairs.append((f"levels[{index}].shape", shape_name(trained["shape"]), shape_name(here.shape)))
        if index > level:
            pairs.append((f"levels[{index}].sigma", trained["sigma"], here.sigma))
    wanted = asdict(denoiser_config(recipe, level))
    pairs += [(f"the denoiser's {key}", meta["denoiser"][key], value) for key, value in wanted.items()]
    for name, trained, here in pairs:
        trained = tuple(trained) if isinstance(trained, list) else trained
        if trained != here:
            raise UserError(
                f"{folder} was trained with {name} {trained}, but in {recipe.file} it is {here}; "
                "mend the recipe, or give it another name and train again"
            )
