"""How one level is sampled: what the recipe's `sampling` section says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nestgen.errors import UserError
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import FLOW_SAMPLERS, InternalGuidance, Interval, Sampler

# By kind of process: U-ViT's own on COCO (`discrete`) and on ImageNet (`vp`).
DEFAULT_SAMPLER: dict[str, Sampler] = {"discrete": "dpm++-single", "vp": "dpm-single", "flow": "heun"}


@dataclass(frozen=True)
class LevelSampling:
    """The settings of one level.

    `guidance` is s, None where nothing can be dropped (the unconditional top). It and `autoguidance` hold within
    `interval`, everywhere if that is None. `sigmas` are the noises on the levels that condition this one, the nearest
    first.
    """

    sampler: str
    steps: int
    guidance: float | None
    interval: Interval | None
    sigmas: tuple[float, ...]
    autoguidance: float = 0.0
    internal_guidance: InternalGuidance | None = None
    precision: Literal["float32", "bf16"] | None = None  # of the network; None is the device's own


def level_sampling(recipe: Recipe, level: int) -> LevelSampling:
    """The sampling settings of a level. Raises UserError for a sampler that the recipe's process does not have."""
    options, top = recipe.sampling, level + 1 == len(recipe.levels)
    sampler = options.of("sampler", level) or DEFAULT_SAMPLER[recipe.process.kind]
    if recipe.process.kind == "flow" and sampler not in FLOW_SAMPLERS:
        raise UserError(
            f"sampling.sampler of {recipe.file} is {sampler}, which a flow does not have; set {' or '.join(FLOW_SAMPLERS)}"
        )
    decay = options.guidance_decay ** (len(recipe.levels) - 1 - level)
    guided = not top or recipe.denoiser.labels or recipe.denoiser.text
    autoguide = options.of("autoguide", level)
    return LevelSampling(
        sampler=sampler,
        steps=options.of("steps", level),
        guidance=options.of("guidance", level) * decay if guided else None,
        interval=options.of("guidance_interval", level),
        sigmas=tuple(_sigma(recipe, above) for above in recipe.conditions(level)),
        autoguidance=autoguide.scale if autoguide else 0.0,
        internal_guidance=options.of("internal_guidance", level),
        precision=options.precision,
    )


def precision_on(device: str, settings: LevelSampling) -> Literal["float32", "bf16"]:
    """What a network computes in on a type of device: what the settings say, else bf16 on a GPU."""
    return settings.precision or ("bf16" if device == "cuda" else "float32")


def _sigma(recipe: Recipe, level: int) -> float:
    """Noise on a level before it conditions another: the sampling option, else as trained, of a range its lowest."""
    option, trained = recipe.sampling.of("sigma", level), recipe.levels[level].sigma
    if option is not None:
        return float(option)
    return trained[0] if isinstance(trained, tuple) else trained
