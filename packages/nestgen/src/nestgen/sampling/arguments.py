"""Arguments of the Python interface, checked: TypeError or ValueError, one sentence, before anything is sampled."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import SamplingOptions
from nestgen.sampling.trained import LevelSampler

Frozen = Mapping[int, Tensor | np.ndarray]

# Keys of the recipe's section `sampling` that are arguments of their own, under the names that diffusers has for them.
NAMED = {"guidance": "guidance_scale", "steps": "num_inference_steps"}


def whole_number(name: str, value: object, least: int) -> int:
    """A whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is {value!r}; give a whole number")
    if value < least:
        raise ValueError(f"{name} is {value}; give {least} or more")
    return int(value)


def step_argument(step: object) -> int | Literal["best"] | None:
    """The step of a checkpoint, "best", or None for the newest."""
    if step is None:
        return None
    return "best" if step == "best" else whole_number("step", step, 1)


def image_numbers(
    num_images: int | None, indices: Sequence[int] | None, prompt: str | Sequence[str] | None
) -> tuple[int, ...]:
    """The numbers of the images in their seed."""
    texts = [prompt or ""] if prompt is None or isinstance(prompt, str) else prompt
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(one, str) for one in texts):
        raise TypeError(f"prompt is {prompt!r}; give a text, or a list of texts")
    if indices is None:
        return tuple(range(len(texts) if num_images is None else whole_number("num_images", num_images, 1)))
    if num_images is not None:
        raise ValueError("num_images and indices exclude each other; give one")
    numbers = tuple(whole_number("a number of indices", index, 0) for index in indices)
    if not numbers:
        raise ValueError("indices is empty; give the number of an image")
    return numbers


def seed_of(recipe: Recipe, seed: int | None, generator: torch.Generator | None) -> int:
    """The seed of a call: given, drawn from a generator, or the recipe's."""
    if generator is None:
        return recipe.seed if seed is None else whole_number("seed", seed, 0)
    if seed is not None:
        raise ValueError("seed and generator exclude each other; give one")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; give a torch.Generator, or a number as seed")
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def label_number(label: int | str | None, names: Sequence[str]) -> int | None:
    """A class by its number or name."""
    if label is None:
        return None
    if not isinstance(label, str):
        return whole_number("label", label, 0)
    if label not in names:
        known = (
            f"the names are {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else "give its number"
        )
        raise ValueError(f"there is no class named {label!r}; {known}")
    return list(names).index(label)


def sampling_settings(
    recipe: Recipe,
    guidance_scale: float | Sequence[float] | None,
    sigma: float | Sequence[float] | None,
    num_inference_steps: int | Sequence[int] | None,
    further: Mapping[str, Any],
) -> dict[str, Any]:
    """The recipe's keys of `sampling` that some arguments set; `guidance_scale` is the recipe's guidance plus 1."""
    for key in further:
        if key in NAMED:
            raise TypeError(f"pipe() has no argument {key!r}; it is {NAMED[key]} here, as in diffusers")
        if key == "autoguide":
            raise ValueError("autoguide names further denoisers: set it in the recipe, before they are loaded")
        if key not in SamplingOptions.model_fields:
            known = [
                *SamplingOptions.model_fields,
                *NAMED.values(),
                "prompt",
                "num_images",
                "generator",
                "seed",
                "label",
            ]
            near = difflib.get_close_matches(key, [one for one in known if one not in NAMED], 1)
            raise TypeError(f"pipe() has no argument {key!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    settings = dict(further)
    if guidance_scale is not None:
        scales = _numbers("guidance_scale", guidance_scale)
        settings["guidance"] = [scale - 1 for scale in scales] if isinstance(scales, list) else scales - 1
    if sigma is not None:
        sigmas = _numbers("sigma", sigma)
        above = len(recipe.levels) - 1
        if isinstance(sigmas, list) and len(sigmas) != above:
            raise ValueError(
                f"sigma lists {len(sigmas)} values for {above} level(s) above z_0; give one number, or one each"
            )
        settings["sigma"] = [None, *(sigmas if isinstance(sigmas, list) else [sigmas] * above)]
    if num_inference_steps is not None:
        settings["steps"] = num_inference_steps if isinstance(num_inference_steps, int) else list(num_inference_steps)
    return settings


def _numbers(name: str, value: float | Sequence[float]) -> float | list[float]:
    """A number, or a list of them, as floats."""
    parts = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if any(isinstance(one, bool) or not isinstance(one, int | float | np.number) for one in parts):
        raise TypeError(f"{name} is {value!r}; give a number, or a list of numbers")
    numbers = [float(one) for one in parts]
    return numbers if isinstance(value, Sequence) else numbers[0]


def check_frozen(samplers: Sequence[LevelSampler], frozen: Frozen, count: int) -> dict[int, Tensor]:
    """Latents (count, C, H, W) of the frozen levels, float32, from those given: as many, or one for all images."""
    if not isinstance(frozen, Mapping):
        raise TypeError(f"frozen is a {type(frozen).__name__}; give latents by level, such as {{1: z_NCHW}}")
    latents = {}
    for level, value in frozen.items():
        if level not in range(1, len(samplers)):
            levels = f"1 to {len(samplers) - 1}" if len(samplers) > 1 else "none"
            raise ValueError(f"frozen has level {level!r}; the levels above z_0 are {levels}")
        if not isinstance(value, Tensor | np.ndarray):
            raise TypeError(f"frozen[{level}] is a {type(value).__name__}; give a tensor (N, C, H, W)")
        z_NCHW = torch.as_tensor(value).detach().to("cpu", torch.float32)
        h, w, c = samplers[level].config.shape
        if z_NCHW.shape[1:] != (c, h, w) or len(z_NCHW) not in (1, count):
            raise ValueError(
                f"frozen[{level}] has the shape {tuple(z_NCHW.shape)}; give ({count}, {c}, {h}, {w}), or 1 for all images"
            )
        if not z_NCHW.isfinite().all():
            raise ValueError(f"frozen[{level}] has values that are not finite")
        latents[level] = z_NCHW.expand(count, -1, -1, -1)
    return latents
