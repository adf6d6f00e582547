"""The trained denoisers of a hierarchy, loaded for sampling and checked against the recipe and each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestgen.checkpoint import Checkpoint, checkpoints, denoiser_of, newest
from nestgen.denoiser import Denoiser, DenoiserConfig, denoiser_config
from nestgen.errors import UserError
from nestgen.files import sha256_of
from nestgen.process import Process, trained_process
from nestgen.recipe import FLOW_SAMPLERS, Autoguide, Interval, Recipe, run_dir, shape_name
from nestgen.samplers import Denoise


@dataclass(frozen=True)
class LevelSampling:
    """How one level is drawn.

    `guidance` is s, None where nothing can be dropped (the unconditional top); it and `autoguidance` hold within
    `interval`, everywhere if that is None. `sigma` is the noise on the level above before it conditions this one.
    """

    sampler: str
    steps: int
    guidance: float | None
    interval: Interval | None
    sigma: float
    autoguidance: float = 0.0


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

    def denoise(self, condition_BCHW: Tensor | None, label_B: Tensor | None) -> Denoise:
        """The predicted latent, with guidance: of the outputs d of the networks,

        d(condition, label) + s (d(condition, label) - d(null, null)) + w (d(condition, label) - weak(condition, label)),

        the first two in one batch. The last term is autoguidance (Karras et al. 2024, arXiv 2406.02507). As the
        weights sum to 1, it does not matter whether the networks predict noise, velocity or the latent.
        """
        one = self.weights

        def guided(z_BCHW: Tensor, told_B: Tensor, s: float) -> tuple[Tensor, Tensor]:
            keep_B = torch.arange(2 * len(z_BCHW), device=z_BCHW.device) < len(z_BCHW)
            both = one.denoiser(
                torch.cat([z_BCHW, z_BCHW]),
                torch.cat([told_B, told_B]),
                None if condition_BCHW is None else torch.cat([condition_BCHW, condition_BCHW]),
                keep_B,
                None if label_B is None else torch.cat([label_B, torch.full_like(label_B, self.labels)]),
            )
            kept_BCHW, null_BCHW = both.chunk(2)
            return kept_BCHW + s * (kept_BCHW - null_BCHW), kept_BCHW

        def denoise(z_BCHW: Tensor, t: Tensor) -> Tensor:
            s, w = self._strengths(float(t))
            told_B = one.process.told(t).to(z_BCHW.device).expand(len(z_BCHW))
            if s:
                out_BCHW, kept_BCHW = guided(z_BCHW, told_B, s)
            else:
                out_BCHW = kept_BCHW = one.denoiser(z_BCHW, told_B, condition_BCHW, None, label_B)
            if w and self.weak is not None:
                out_BCHW = out_BCHW + w * (
                    kept_BCHW - self.weak.denoiser(z_BCHW, told_B, condition_BCHW, None, label_B)
                )
            return one.process.latent(out_BCHW, z_BCHW, t)

        return denoise

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
    for below, above in zip(models, models[1:]):
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


def level_sampling(recipe: Recipe, level: int) -> LevelSampling:
    """The recipe's sampling options for a level; raises UserError for a sampler that its process does not have."""
    options, top = recipe.sampling, level + 1 == len(recipe.levels)
    flow = recipe.process.kind not in ("discrete", "vp")
    sampler = options.of("sampler", level) or ("heun" if flow else "dpm++-single")
    if flow and sampler not in FLOW_SAMPLERS:
        raise UserError(
            f"sampling.sampler of {recipe.file} is {sampler}, which a flow does not have; set {' or '.join(FLOW_SAMPLERS)}"
        )
    coarse = options.guidance_decay ** (len(recipe.levels) - 1 - level)
    sigma = None if top else options.of("sigma", level + 1)
    autoguide = options.of("autoguide", level)
    return LevelSampling(
        sampler=sampler,
        steps=options.of("steps", level),
        guidance=None if top and not recipe.denoiser.labels else options.of("guidance", level) * coarse,
        interval=options.of("guidance_interval", level),
        sigma=0.0 if top else _lowest(recipe.levels[level + 1].sigma) if sigma is None else sigma,
        autoguidance=autoguide.scale if autoguide else 0.0,
    )


def _lowest(sigma: float | tuple[float, float]) -> float:
    return sigma[0] if isinstance(sigma, tuple) else sigma


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
    return Weights(denoiser, trained_process(checkpoint.meta), checkpoint.meta, sha256)


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
