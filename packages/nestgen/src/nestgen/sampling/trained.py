"""The trained denoisers of a hierarchy, loaded for sampling and checked against the recipe and each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestgen.denoiser.config import DenoiserConfig, denoiser_config
from nestgen.denoiser.uvit import Denoiser
from nestgen.diffusion.process import Process, process_from_meta
from nestgen.diffusion.solvers import Denoise
from nestgen.errors import UserError
from nestgen.files import sha256_of
from nestgen.recipe.level_sampling import LevelSampling, level_sampling
from nestgen.recipe.recipe import Recipe, run_dir
from nestgen.recipe.sections import Autoguide, shape_name
from nestgen.runs.checkpoint import Checkpoint, checkpoints, denoiser_of, newest


@dataclass(frozen=True)
class Given:
    """What a batch of images is drawn given: the noised levels above, the nearest first; classes; embedded captions."""

    conditions: tuple[Tensor, ...] = ()  # (B, C, H, W)
    label_B: Tensor | None = None
    context_BTD: Tensor | None = None

    def arguments(self, sigmas: tuple[float, ...], batch: int, device: torch.device) -> dict[str, Any]:
        """As a denoiser takes them, nothing dropped."""
        sigma_BK = torch.tensor(sigmas, device=device).expand(batch, -1) if sigmas else None
        return {
            "condition": self.conditions or None,
            "label_B": self.label_B,
            "context_BTD": self.context_BTD,
            "sigma_BK": sigma_BK,
        }


@dataclass(frozen=True)
class Weights:
    """A denoiser as a checkpoint holds it."""

    denoiser: Denoiser
    process: Process
    meta: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class Model:
    """The denoiser D_l of one level, how it is sampled, and the worse one that guides it, if any."""

    level: int
    weights: Weights
    sampling: LevelSampling
    weak: Weights | None = None

    @property
    def config(self) -> DenoiserConfig:
        """Of the denoiser."""
        return self.weights.denoiser.config

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.weights.denoiser.pos_embed.device

    @property
    def labels(self) -> int:
        """How many classes it knows, which is also the null class; 0 for an unconditional model."""
        return self.config.labels

    def denoise(self, given: Given) -> Denoise:
        """The predicted latent, with guidance: of the outputs d of the networks,

        d(given) + s (d(given) - d(nothing)) + w (d(given) - weak(given)),

        the first two in one batch. The last term is autoguidance (Karras et al. 2024, arXiv 2406.02507). As the
        weights sum to 1, it does not matter whether the networks predict noise, velocity or the latent.
        """
        one = self.weights

        def denoise(z_BCHW: Tensor, t: Tensor) -> Tensor:
            s, w = self._strengths(float(t))
            told_B = one.process.time_embedding_input(t).to(z_BCHW.device).expand(len(z_BCHW))
            all_given = given.arguments(self.sampling.sigmas, len(z_BCHW), z_BCHW.device)
            if s:
                both = one.denoiser(z_BCHW.repeat(2, 1, 1, 1), told_B.repeat(2), **self._and_nothing(given, all_given))
                kept_BCHW, null_BCHW = both.chunk(2)
                out_BCHW = kept_BCHW + s * (kept_BCHW - null_BCHW)
            else:
                out_BCHW = kept_BCHW = one.denoiser(z_BCHW, told_B, **all_given)
            if w and self.weak is not None:
                out_BCHW = out_BCHW + w * (kept_BCHW - self.weak.denoiser(z_BCHW, told_B, **all_given))
            return one.process.latent(out_BCHW, z_BCHW, t)

        return denoise

    def _and_nothing(self, given: Given, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments twice, all dropped the second time."""
        label_B, context_BTD, sigma_BK = given.label_B, given.context_BTD, arguments["sigma_BK"]
        twice: dict[str, Any] = {"condition": tuple(torch.cat([one, one]) for one in given.conditions) or None}
        twice["sigma_BK"] = None if sigma_BK is None else sigma_BK.repeat(2, 1)
        twice["label_B"] = None if label_B is None else torch.cat([label_B, torch.full_like(label_B, self.labels)])
        twice["context_BTD"] = None
        if context_BTD is not None:
            null_BTD = self.weights.denoiser.null_context.expand_as(context_BTD)
            twice["context_BTD"] = torch.cat([context_BTD, null_BTD.to(context_BTD)])
        if given.conditions:
            batch, device = len(given.conditions[0]), given.conditions[0].device
            twice["keep_B"] = torch.arange(2 * batch, device=device) < batch
        return twice

    def _strengths(self, t: float) -> tuple[float, float]:
        """Of guidance and of autoguidance at a time."""
        interval = self.sampling.interval
        if interval is not None and not interval.low <= t <= interval.high:
            return 0.0, 0.0
        return self.sampling.guidance or 0.0, self.sampling.autoguidance


def load_models(recipe: Recipe, device: torch.device, runs: Path | None = None) -> tuple[Model, ...]:
    """The newest checkpoint of every level, z_0 first; `runs` is the folder of the denoisers if not the recipe's.

    Raises UserError for a level that is not trained, is of another hierarchy than the recipe's, or was trained
    on another store than the level above it.
    """
    runs = runs or run_dir(recipe, 0).parent
    models = tuple(_load(recipe, level, device, runs) for level in range(len(recipe.levels)))
    for below in models:
        for above in (models[level] for level in recipe.conditions(below.level)):
            name = f"z{above.level}"
            if below.weights.meta["stores"][name] != above.weights.meta["stores"][name]:
                raise UserError(
                    f"{runs / run_dir(recipe, below.level).name} and {runs / run_dir(recipe, above.level).name} were "
                    f"trained on different stores of z_{above.level}; train the older one again"
                )
    return models


def _load(recipe: Recipe, level: int, device: torch.device, runs: Path) -> Model:
    folder = runs / run_dir(recipe, level).name
    weights = _weights(_whole(newest(folder), folder, level), device)
    _check_same(recipe, level, weights.meta, folder)
    autoguide = recipe.sampling.of("autoguide", level)
    return Model(
        level=level,
        weights=weights,
        sampling=level_sampling(recipe, level),
        weak=_weak(autoguide, recipe, level, weights, runs) if autoguide and autoguide.scale else None,
    )


def _whole(checkpoint: Checkpoint | None, folder: Path, level: int) -> Checkpoint:
    if checkpoint is None:
        raise UserError(f"there is no trained denoiser in {folder}; run `nestgen train --level {level}`")
    return checkpoint


def _weights(checkpoint: Checkpoint, device: torch.device) -> Weights:
    denoiser = Denoiser(denoiser_of(checkpoint.meta))
    try:
        denoiser.load_state_dict(checkpoint.load("ema"))
        sha256 = sha256_of(checkpoint.path / "ema.safetensors")
    except FileNotFoundError:
        raise UserError(f"{checkpoint.path} is gone: it is being trained; sample once its training has ended") from None
    denoiser = denoiser.to(device).requires_grad_(False).eval()
    return Weights(denoiser, process_from_meta(checkpoint.meta), checkpoint.meta, sha256)


def _weak(autoguide: Autoguide, recipe: Recipe, level: int, strong: Weights, runs: Path) -> Weights:
    """The denoiser that a level is guided away from: it must see what the strong one sees."""
    name = run_dir(recipe, level).name
    folder = (runs if autoguide.run is None else runs.parent / autoguide.run) / name
    if autoguide.step is None:
        found = _whole(newest(folder), folder, level)
    else:
        steps = [one for one in checkpoints(folder) if isinstance(one, Checkpoint)]
        matching = [one for one in steps if one.step == autoguide.step]
        if not matching:
            there = ", ".join(str(one.step) for one in reversed(steps)) or "none"
            raise UserError(
                f"{folder} has no checkpoint of step {autoguide.step}, which sampling.autoguide names (it has {there}); "
                "name one of these, or train with a larger training.keep"
            )
        found = matching[0]
    for key in ("stores", "process", "codec"):
        if found.meta[key] != strong.meta[key]:
            raise UserError(
                f"{found.path} cannot guide {runs / name}: its {key} is another; train it on the same stores and process"
            )
    weak = _weights(found, strong.denoiser.pos_embed.device)
    if weak.sha256 == strong.sha256:
        raise UserError(f"{found.path} has the weights it should guide; name an earlier step or a smaller run")
    return weak


def _check_same(recipe: Recipe, level: int, meta: dict[str, Any], folder: Path) -> None:
    """The recipe must say what the checkpoint was trained with."""
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
    trained_config, wanted = asdict(denoiser_of(meta)), asdict(denoiser_config(recipe, level))
    pairs += [(f"the denoiser's {key}", trained_config[key], value) for key, value in wanted.items()]
    for name, trained, here in pairs:
        trained = tuple(trained) if isinstance(trained, list) else trained
        if trained != here:
            raise UserError(
                f"{folder} was trained with {name} {trained}, but in {recipe.file} it is {here}; "
                "mend the recipe, or give it another name and train again"
            )


def check_labels(models: Sequence[Model], label: int | None) -> None:
    """Raises UserError for a class that the models do not know."""
    classes = models[0].labels
    if label is not None and not 0 <= label < classes:
        knows = f"classes 0 to {classes - 1}" if classes else "no classes (denoiser.labels is 0)"
        raise UserError(f"there is no label {label}: the denoisers know {knows}")
