"""The recipe: one YAML file that describes an experiment (docs/recipe.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeInt, PrivateAttr, ValidationError, model_validator

from nestgen.errors import UserError
from nestgen.recipe.messages import describe_error
from nestgen.recipe.sections import (
    PER_LEVEL,
    DenoiserOptions,
    EvaluationOptions,
    Features,
    Level,
    ProcessOptions,
    SamplingOptions,
    Section,
    TrainingOptions,
    as_tuple,
    shape_name,
)
from nestgen.recipe.yaml import read_yaml

DEFAULT = Path("nested.yaml")


class Recipe(Section):
    """A whole experiment. `levels` is the hierarchy, z_0 first; its length is L."""

    name: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]
    seed: NonNegativeInt = 0
    features: Features
    levels: Annotated[tuple[Level, ...], BeforeValidator(as_tuple), Field(min_length=1)]
    denoiser: DenoiserOptions = DenoiserOptions()
    process: ProcessOptions = ProcessOptions()
    training: TrainingOptions = TrainingOptions()
    sampling: SamplingOptions = SamplingOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    grid: dict[str, Any] | None = None  # the workflow's, which validates it (pipelines/workflow/plan.py)

    _file: Path = PrivateAttr(default=DEFAULT)
    _root: Path | None = PrivateAttr(default=None)

    @property
    def file(self) -> Path:
        """The file it was read from."""
        return self._file

    @property
    def root(self) -> Path:
        """The folder that paths in the recipe are relative to: that of its file, or another by `rooted`."""
        return self._file.parent if self._root is None else self._root

    def rooted(self, folder: Path) -> Recipe:
        """The recipe with its paths relative to another folder: a copy in a run means those of the experiment."""
        recipe = self.model_copy()
        recipe._root = folder
        return recipe

    @model_validator(mode="after")
    def _levels_agree(self) -> Recipe:
        z_0 = self.levels[0]
        if z_0.sigma:
            raise ValueError("levels[0].sigma: z_0 conditions nothing, so it has no sigma; remove the key")
        codec, side = self.features.z0.split(":")
        if codec == "pixels" and z_0.shape != (int(side), int(side), 3):
            raise ValueError(
                f"levels[0].shape is {shape_name(z_0.shape)}, but z_0 of features.z0 '{self.features.z0}' "
                f"is {side}x{side}x3"
            )
        self._check_lists()
        for number, level in enumerate(self.levels):
            if isinstance(level.sigma, tuple) and not self.denoiser.sigma_told:
                raise ValueError(
                    f"levels[{number}].sigma is a range, so the denoisers need the sigma as an input; "
                    "set denoiser.sigma_told: true"
                )
            if isinstance(level.sigma, tuple) and self.denoiser.gaussian:
                raise ValueError(
                    f"levels[{number}].sigma is a range, and denoiser.gaussian holds for one sigma; "
                    "set a number, or remove denoiser.gaussian"
                )
        return self

    def _check_lists(self) -> None:
        listed = {f"sampling.{key}": getattr(self.sampling, key) for key in PER_LEVEL}
        for key, values in (listed | {"training.micro_batch": self.training.micro_batch}).items():
            if len(values) not in (1, len(self.levels)):
                raise ValueError(
                    f"{key} lists {len(values)} values for {len(self.levels)} levels; give one, or one per level"
                )
        if len(self.levels) == len(self.sampling.sigma) > 1 and self.sampling.sigma[0]:
            raise ValueError("sampling.sigma[0]: z_0 conditions nothing, so it has no sigma; set it to 0 or null")

    def check_level(self, level: int) -> None:
        """Raises UserError for a level that the hierarchy does not have."""
        if not 0 <= level < len(self.levels):
            raise UserError(f"level {level} is not within 0..{len(self.levels) - 1}, the levels of {self.file}")

    def depth(self, depth: int) -> Recipe:
        """The recipe of the hierarchy's first `depth` levels."""
        if not 1 <= depth <= len(self.levels):
            raise UserError(f"depth {depth} is not within 1..{len(self.levels)}, the levels of {self.file}")
        cut = {
            "levels": self.levels[:depth],
            "training": self.training.cut(depth),
            "sampling": self.sampling.cut(depth),
        }
        return self.model_copy(update=cut)

    def with_sigmas(self, sigmas: Sequence[float]) -> Recipe:
        """The recipe with other condition noise: σ of levels 1, 2, ... Raises UserError for another number of them."""
        if len(sigmas) != len(self.levels) - 1:
            raise UserError(
                f"--sigma lists {len(sigmas)} values for the {len(self.levels) - 1} levels above z_0; give one for each"
            )
        if not all(0 <= sigma < math.inf for sigma in sigmas):
            raise UserError(f"--sigma is {', '.join(map(str, sigmas))}; each is a standard deviation, 0 or more")
        above = [level.model_copy(update={"sigma": sigma}) for level, sigma in zip(self.levels[1:], sigmas)]
        return self.model_copy(update={"levels": (self.levels[0], *above)})

    def with_sampling(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with other sampling options, by their keys. Raises UserError as `load_recipe` does."""
        return self._with("sampling", settings)

    def with_training(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with other training options, by their keys. Raises UserError as `load_recipe` does."""
        return self._with("training", settings)

    def _with(self, name: str, settings: Mapping[str, Any]) -> Recipe:
        section: Section = getattr(self, name)
        changed = {key: getattr(section, key) for key in section.model_fields_set} | dict(settings)
        data = {key: getattr(self, key) for key in self.model_fields_set} | {name: changed}
        recipe = parse_recipe(data, self.file)
        recipe._root = self._root
        return recipe

    def conditions(self, level: int) -> range:
        """The levels that condition a level's denoiser, the nearest first; none for the top of the hierarchy."""
        end = len(self.levels) if self.denoiser.condition_on == "all" else min(level + 2, len(self.levels))
        return range(level + 1, end)


def load_recipe(path: Path | None = None, name: str | None = None) -> Recipe:
    """Reads and validates a recipe; None is ./nested.yaml. Raises UserError with one sentence.

    One that has no name is called `name`, by default as its file.
    """
    file = path or DEFAULT
    if not file.is_file():
        hint = "name one with --recipe FILE" if path is None else "check the path given to --recipe"
        raise UserError(f"there is no recipe {file}; {hint} (docs/recipe.md shows one)")
    data = read_yaml(file)
    if not isinstance(data, dict):
        raise UserError(f"{file} is not a recipe: expected keys such as name, features and levels at the top")
    return parse_recipe({"name": name or file.stem, **data}, file)


def parse_recipe(data: Mapping[str, Any], file: Path) -> Recipe:
    """The recipe of a file's content. Raises UserError with one sentence."""
    try:
        recipe = Recipe.model_validate(data)
        recipe._file = file
        return recipe
    except ValidationError as error:
        raise UserError(f"{file}: {describe_error(error, data, Recipe)}") from None
