"""The trained denoisers of a hierarchy, loaded for sampling and checked against the recipe and each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestgen.denoiser.config import DenoiserConfig, denoiser_config
from nestgen.denoiser.uvit import Denoiser
from nestgen.diffusion.guidance import GuidedDenoiser
from nestgen.diffusion.process import Process, process_from_meta
from nestgen.errors import UserError
from nestgen.files import sha256_of
from nestgen.recipe.level_sampling import LevelSampling, level_sampling
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import Autoguide, shape_name
from nestgen.runs.checkpoint import Checkpoint, checkpoints, config_from_meta, newest


@dataclass(frozen=True)
class TrainedDenoiser:
    """A denoiser with the averaged weights of a checkpoint, the checkpoint's `meta`, and the weights' SHA-256."""

    denoiser: Denoiser
    process: Process
    meta: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class LevelSampler:
    """Samples one level: its denoiser D_l, its settings, and the weaker denoiser of autoguidance, if any."""

    level: int
    trained: TrainedDenoiser
    settings: LevelSampling
    weak: TrainedDenoiser | None = None

    @property
    def config(self) -> DenoiserConfig:
        """The denoiser's configuration."""
        return self.trained.denoiser.config

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.trained.denoiser.pos_embed.device

    def guided(
        self,
        conditions: Iterable[Tensor] = (),
        label_B: Tensor | None = None,
        context_BTD: Tensor | None = None,
    ) -> GuidedDenoiser:
        """The denoiser for one batch: noised latents (B, C, H, W) of the levels above, classes, embedded captions."""
        return GuidedDenoiser(
            self.trained.denoiser,
            self.trained.process,
            self.settings,
            tuple(one_BCHW.to(self.device) for one_BCHW in conditions),
            None if label_B is None else label_B.to(self.device),
            None if context_BTD is None else context_BTD.to(self.device),
            None if self.weak is None else self.weak.denoiser,
        )


def load_samplers(recipe: Recipe, device: torch.device, runs: Path | None = None) -> tuple[LevelSampler, ...]:
    """The newest checkpoint of every level, z_0 first; `runs` is the folder of the denoisers if not the recipe's.

    Raises UserError for a level that is not trained, is of another hierarchy than the recipe's, or was trained
    on another store than the level above it.
    """
    runs = runs or run_dir(recipe, 0).parent
    samplers = tuple(_load(recipe, level, device, runs) for level in range(len(recipe.levels)))
    for below in samplers:
        for above in (samplers[level] for level in recipe.conditions(below.level)):
            name = f"z{above.level}"
            if below.trained.meta["stores"][name] != above.trained.meta["stores"][name]:
                raise UserError(
                    f"{runs / run_dir(recipe, below.level).name} and {runs / run_dir(recipe, above.level).name} were "
                    f"trained on different stores of z_{above.level}; train the older one again"
                )
    return samplers


def _load(recipe: Recipe, level: int, device: torch.device, runs: Path) -> LevelSampler:
    folder = runs / run_dir(recipe, level).name
    trained = _read(_newest(folder, level), device)
    _check_recipe(recipe, level, trained.meta, folder)
    autoguide = recipe.sampling.of("autoguide", level)
    weak = _weak(autoguide, recipe, level, trained, runs) if autoguide and autoguide.scale else None
    return LevelSampler(level, trained, level_sampling(recipe, level), weak)


def _newest(folder: Path, level: int) -> Checkpoint:
    checkpoint = newest(folder)
    if checkpoint is None:
        raise UserError(f"there is no trained denoiser in {folder}; run `nestgen train --level {level}`")
    return checkpoint


def _read(checkpoint: Checkpoint, device: torch.device) -> TrainedDenoiser:
    denoiser = Denoiser(config_from_meta(checkpoint.meta))
    try:
        denoiser.load_state_dict(checkpoint.load("ema"))
        sha256 = sha256_of(checkpoint.path / "ema.safetensors")
    except FileNotFoundError:
        raise UserError(f"{checkpoint.path} is gone: it is being trained; sample once its training has ended") from None
    denoiser = denoiser.to(device).requires_grad_(False).eval()
    return TrainedDenoiser(denoiser, process_from_meta(checkpoint.meta), checkpoint.meta, sha256)


def _weak(autoguide: Autoguide, recipe: Recipe, level: int, strong: TrainedDenoiser, runs: Path) -> TrainedDenoiser:
    """The denoiser that a level is guided away from: its inputs must be those of the strong one."""
    name = run_dir(recipe, level).name
    folder = (runs if autoguide.run is None else runs.parent / autoguide.run) / name
    checkpoint = _newest(folder, level) if autoguide.step is None else _of_step(folder, autoguide.step)
    for key in ("stores", "process", "codec"):
        if checkpoint.meta[key] != strong.meta[key]:
            raise UserError(
                f"{checkpoint.path} cannot guide {runs / name}: its {key} is another; train it on the same stores and process"
            )
    weak = _read(checkpoint, strong.denoiser.pos_embed.device)
    if weak.sha256 == strong.sha256:
        raise UserError(f"{checkpoint.path} has the weights it should guide; name an earlier step or a smaller run")
    return weak


def _of_step(folder: Path, step: int) -> Checkpoint:
    there = [one for one in checkpoints(folder) if isinstance(one, Checkpoint)]
    for checkpoint in there:
        if checkpoint.step == step:
            return checkpoint
    steps = ", ".join(str(one.step) for one in reversed(there)) or "none"
    raise UserError(
        f"{folder} has no checkpoint of step {step}, which sampling.autoguide names (it has {steps}); "
        "name one of these, or train with a larger training.keep"
    )


def _check_recipe(recipe: Recipe, level: int, meta: dict[str, Any], folder: Path) -> None:
    """Raises UserError where the recipe differs from what the checkpoint was trained with."""
    pairs: list[tuple[str, Any, Any]] = [
        (f"process.{key}", meta["process"][key], value) for key, value in recipe.process.model_dump().items()
    ]
    pairs.append(
        (f"levels[{level}].shape", shape_name(meta["levels"][level]["shape"]), shape_name(recipe.levels[level].shape))
    )
    pairs.append((f"levels[{level}].shift", meta["levels"][level]["shift"], recipe.levels[level].shift))
    for index in recipe.conditions(level):
        trained, here = meta["levels"][index], recipe.levels[index]
        pairs.append((f"levels[{index}].shape", shape_name(trained["shape"]), shape_name(here.shape)))
        pairs.append((f"levels[{index}].sigma", trained["sigma"], here.sigma))
    trained_config, wanted = asdict(config_from_meta(meta)), asdict(denoiser_config(recipe, level))
    pairs += [(f"the denoiser's {key}", trained_config[key], value) for key, value in wanted.items()]
    for name, trained, here in pairs:
        trained = tuple(trained) if isinstance(trained, list) else trained
        if trained != here:
            raise UserError(
                f"{folder} was trained with {name} {trained}, but in {recipe.file} it is {here}; "
                "fix the recipe, or give it another name and train again"
            )
