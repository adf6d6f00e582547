"""The recipe: one YAML file that describes an experiment, validated strictly (docs/recipe.md)."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from nestgen.errors import UserError
from nestgen.protocols import PROTOCOLS
from nestgen.protocols import Name as Protocol
from nestgen.remote import Remote, address
from nestgen.yaml12 import read_yaml

DEFAULT = Path("nested.yaml")


def parse_shape(text: object) -> object:
    """(h, w, c) of 'HxWxC'; anything else raises ValueError."""
    if isinstance(text, tuple):
        return text
    if not isinstance(text, str) or not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise ValueError("should be height x width x channels, such as 4x4x16")
    return tuple(int(part) for part in text.split("x"))


def parse_text(text: object) -> object:
    """(tokens, width) of 'TxD'; anything else raises ValueError."""
    if text is None or isinstance(text, tuple):
        return text
    if not isinstance(text, str) or not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise ValueError("should be tokens x width of the text store, such as 77x768, or null")
    return tuple(int(part) for part in text.split("x"))


def shape_name(shape: tuple[int, ...]) -> str:
    """'HxWxC' of (h, w, c)."""
    return "x".join(map(str, shape))


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Shape = Annotated[tuple[int, int, int], BeforeValidator(parse_shape)]
TextShape = Annotated[tuple[int, int] | None, BeforeValidator(parse_text)]
Range = Annotated[tuple[NonNegativeFloat, NonNegativeFloat], BeforeValidator(_as_tuple)]
Probability = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the recipe: frozen, nothing unknown, nothing converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Features(Section):
    """Where the stores are. The section's other keys are featurize's, which validates them."""

    model_config = ConfigDict(extra="ignore")

    out: Annotated[str, Field(min_length=1)]
    encoder: str = "tiny"
    z0: Annotated[str, Field(pattern=r"^(pixels|vae|taesd):[1-9]\d*$")] = "pixels:32"


class Level(Section):
    """One latent of the hierarchy."""

    shape: Shape
    sigma: NonNegativeFloat | Range = 0.0
    patch: PositiveInt = Field(default_factory=lambda data: 1 if min(data["shape"][:2]) < 4 else 2)
    shift: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _fits(self) -> Level:
        h, w, _ = self.shape
        if h % self.patch or w % self.patch:
            raise ValueError(f"has patch {self.patch}, which does not divide its {h}x{w} grid")
        if isinstance(self.sigma, tuple) and self.sigma[0] >= self.sigma[1]:
            raise ValueError(f"has sigma {list(self.sigma)}: a range rises, such as [0, 1.5]")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens down and across."""
        return self.shape[0] // self.patch, self.shape[1] // self.patch


class DenoiserOptions(Section):
    """What the denoisers of all levels have in common."""

    size: Literal["nano", "micro", "small", "medium", "large"] = "small"
    labels: NonNegativeInt = 0
    condition: Literal["replace", "residual"] = "replace"
    null_condition: Literal["zeros", "learned"] = "zeros"
    condition_on: Literal["above", "all"] = "above"
    sigma_told: bool = False
    text: TextShape = None
    qk_norm: bool = False


class ProcessOptions(Section):
    """The diffusion process, what of it the network predicts, and how its loss is weighted over time."""

    kind: Literal["discrete", "vp", "flow"] = "discrete"
    prediction: Literal["eps", "v", "velocity"] = Field(
        default_factory=lambda data: "velocity" if data.get("kind") == "flow" else "eps"
    )
    weighting: Literal["uniform", "min-snr"] = "uniform"

    @model_validator(mode="after")
    def _prediction_tells_the_latent(self) -> ProcessOptions:
        if (self.kind, self.prediction) == ("flow", "eps"):
            raise ValueError(
                "has prediction eps, which at the start of flow's sampling says nothing of the latent; "
                "set velocity or v, or another kind"
            )
        return self


class TrainingOptions(Section):
    """How a denoiser is trained."""

    steps: PositiveInt = 300_000
    batch: PositiveInt = 256
    lr: PositiveFloat = 2e-4
    betas: Annotated[tuple[Decay, Decay], BeforeValidator(_as_tuple)] = (0.9, 0.9)
    weight_decay: NonNegativeFloat = 0.03
    warmup: NonNegativeInt = 5000
    ema: Decay = 0.9999
    condition_drop: Probability = 0.5
    label_drop: Probability = 0.1
    text_drop: Probability = 0.1
    clip: PositiveFloat | None = None
    precision: Literal["no", "bf16", "fp16", "auto"] = "no"
    accumulate: PositiveInt = 1
    compile: bool = False
    checkpoint_activations: bool = False
    shard: bool = False
    shuffle: PositiveInt | None = None
    checkpoint_every: PositiveInt = 5000
    keep: PositiveInt = 2
    preview: NonNegativeInt = 64
    ema_snapshots: PositiveInt | None = None
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_as_tuple)] = ()

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainingOptions:
        if self.batch % self.accumulate:
            raise ValueError(f"has batch {self.batch}, which does not divide into accumulate {self.accumulate} parts")
        return self


class Interval(NamedTuple):
    """Times of the process from `low` to `high`, within 0 and 1; sampling goes from 1 down to 0."""

    low: float
    high: float


def _as_interval(value: object) -> Interval | None:
    pair = value if isinstance(value, list | tuple) else ()
    if value is not None and not (len(pair) == 2 and all(isinstance(one, int | float) for one in pair)):
        raise ValueError("should be two times, such as [0.1, 0.8]")
    if value is not None and not 0 <= pair[0] <= pair[1] <= 1:
        raise ValueError("should be two times within 0 and 1, the lower one first")
    return None if value is None else Interval(*map(float, pair))


def _for_each_level(value: object) -> tuple[object, ...]:
    """A list is one value per level; anything else, and a pair of numbers, holds for every level."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _intervals(value: object) -> tuple[object, ...]:
    pair = isinstance(value, list | tuple) and all(isinstance(one, int | float) for one in value)
    return (value,) if pair or value is None else _for_each_level(value)


PerLevel = BeforeValidator(_for_each_level)
Sampler = Literal["dpm++-single", "dpm++-multi", "unipc", "ddim", "euler", "heun"]
FLOW_SAMPLERS = ("euler", "ddim", "heun")  # the others divide by the signal, of which a flow has none at its start


class Autoguide(Section):
    """A worse denoiser of the same level to guide away from: of an earlier step, or of another run."""

    scale: NonNegativeFloat
    run: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")] | None = None
    step: PositiveInt | None = None

    @model_validator(mode="after")
    def _names_one(self) -> Autoguide:
        if self.run is None and self.step is None:
            raise ValueError("names no denoiser; give run (the name of a smaller one), step (an earlier one) or both")
        return self


class SamplingOptions(Section):
    """How pictures are drawn. All but `guidance_decay` and `batch` are one value, or one per level with z_0 first."""

    sampler: Annotated[tuple[Sampler | None, ...], PerLevel] = (None,)
    steps: Annotated[tuple[PositiveInt, ...], PerLevel] = (50,)
    guidance: Annotated[tuple[float, ...], PerLevel] = (1.0,)
    guidance_decay: Probability = 1.0
    guidance_interval: Annotated[
        tuple[Annotated[Any, BeforeValidator(_as_interval)], ...], BeforeValidator(_intervals)
    ] = (None,)
    sigma: Annotated[tuple[NonNegativeFloat | None, ...], PerLevel] = (None,)
    autoguide: Annotated[tuple[Autoguide | None, ...], PerLevel] = (None,)
    batch: PositiveInt = 64

    def of(self, key: str, level: int) -> Any:
        """The value of a key for one level."""
        values = getattr(self, key)
        return values[0 if len(values) == 1 else level]

    def cut(self, depth: int) -> SamplingOptions:
        """The options of the first `depth` levels."""
        return self.model_copy(update={key: getattr(self, key)[:depth] for key in PER_LEVEL})


PER_LEVEL = [key for key in SamplingOptions.model_fields if key not in ("guidance_decay", "batch")]


class EvaluationOptions(Section):
    """How many samples are scored, and against what."""

    protocol: Protocol | None = None
    count: PositiveInt = Field(
        default_factory=lambda data: PROTOCOLS[data["protocol"]].count if data.get("protocol") else 1000
    )
    reference: str | None = None
    pictures: str | None = None

    @model_validator(mode="after")
    def _protocol_fixes_the_count(self) -> EvaluationOptions:
        if self.protocol and self.count != PROTOCOLS[self.protocol].count:
            raise ValueError(
                f"has count {self.count}, but protocol {self.protocol} takes {PROTOCOLS[self.protocol].count} samples; "
                "leave count out"
            )
        return self


class Recipe(Section):
    """A whole experiment. `levels` is the hierarchy, z_0 first; its length is L."""

    name: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]
    seed: NonNegativeInt = 0
    features: Features
    levels: Annotated[tuple[Level, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    denoiser: DenoiserOptions = DenoiserOptions()
    process: ProcessOptions = ProcessOptions()
    training: TrainingOptions = TrainingOptions()
    sampling: SamplingOptions = SamplingOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    grid: dict[str, Any] | None = None  # the workflow's, which validates it (pipelines/grid.py)

    _file: Path = PrivateAttr(default=DEFAULT)

    @property
    def file(self) -> Path:
        """The file it was read from."""
        return self._file

    @property
    def root(self) -> Path:
        """Folder of the file: paths in the recipe are relative to it."""
        return self._file.parent

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
        self._check_sampling()
        for number, level in enumerate(self.levels):
            if isinstance(level.sigma, tuple) and not self.denoiser.sigma_told:
                raise ValueError(
                    f"levels[{number}].sigma is a range, so the denoisers must be told which sigma they were given; "
                    "set denoiser.sigma_told: true"
                )
        return self

    def _check_sampling(self) -> None:
        for key in PER_LEVEL:
            values = getattr(self.sampling, key)
            if len(values) not in (1, len(self.levels)):
                raise ValueError(
                    f"sampling.{key} lists {len(values)} values for {len(self.levels)} levels; "
                    "give one, or one per level"
                )
        if len(self.levels) == len(self.sampling.sigma) and self.sampling.sigma[0]:
            raise ValueError("sampling.sigma[0]: z_0 conditions nothing, so it has no sigma; set it to 0 or null")

    def depth(self, depth: int) -> Recipe:
        """The recipe of the hierarchy's first `depth` levels."""
        if not 1 <= depth <= len(self.levels):
            raise UserError(f"depth {depth} is not within 1..{len(self.levels)}, the levels of {self.file}")
        return self.model_copy(update={"levels": self.levels[:depth], "sampling": self.sampling.cut(depth)})

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
        sampling = {key: getattr(self.sampling, key) for key in self.sampling.model_fields_set} | dict(settings)
        data = {key: getattr(self, key) for key in self.model_fields_set} | {"sampling": sampling}
        recipe = _validated(data, self.file)
        recipe._file = self.file
        return recipe

    def conditions(self, level: int) -> range:
        """The levels that condition a level's denoiser, the nearest first; none for the top of the hierarchy."""
        end = len(self.levels) if self.denoiser.condition_on == "all" else min(level + 2, len(self.levels))
        return range(level + 1, end)


def run_dir(recipe: Recipe, level: int) -> Path:
    """Folder of a level's denoiser: runs/<name>/z<l>-given-z<l+1>-sigma<σ>, or z<l>-top for the top of it all.

    The noise on what it is given stands in the name, so that another σ trains another denoiser beside it.
    """
    given = [f"z{above}-sigma{sigma_name(recipe.levels[above].sigma)}" for above in recipe.conditions(level)]
    return recipe.root / "runs" / recipe.name / "-".join([f"z{level}", *(["given", *given] if given else ["top"])])


def sigma_name(sigma: float | tuple[float, float]) -> str:
    """'0.5' of 0.5, '0to1.5' of a range."""
    return "to".join(f"{one:g}" for one in (sigma if isinstance(sigma, tuple) else (sigma,)))


def store_root(recipe: Recipe) -> Path | Remote:
    """Where the recipe's stores are: a folder, or an address such as s3://bucket/stores."""
    return address(recipe.root, recipe.features.out)


def store_path(recipe: Recipe, level: int, root: Path | Remote | None = None) -> Path | Remote:
    """NAME.zarr of a level, below the recipe's store root or another one."""
    folder = recipe.features.z0.split(":")[0] if level == 0 else re.sub("[:/]", "-", recipe.features.encoder)
    root = store_root(recipe) if root is None else root
    return root / folder / f"{shape_name(recipe.levels[level].shape)}.zarr"


def load_recipe(path: Path | None = None) -> Recipe:
    """Reads and validates a recipe; None is ./nested.yaml. Raises UserError with one sentence."""
    file = path or DEFAULT
    if not file.is_file():
        hint = "name one with --recipe FILE" if path is None else "check the path given to --recipe"
        raise UserError(f"there is no recipe {file}; {hint} (docs/recipe.md shows one)")
    data = read_yaml(file)
    if not isinstance(data, dict):
        raise UserError(f"{file} holds no recipe: expected keys such as name, features and levels at the top")
    recipe = _validated({"name": file.stem, **data}, file)
    recipe._file = file
    return recipe


def _validated(data: Mapping[str, Any], file: Path) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        # An unknown key first: it is why another one is missing.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        raise UserError(f"{file}: {_sentence(first, data)}") from None


# What pydantic adds to a key's path where several types are allowed.
UNION_MEMBERS = ("float", "tuple[", "constrained-float", "function-before[")


def _sentence(error: Any, data: Any) -> str:
    """One validation error in words: the key by its path, what was expected, what was found."""
    path = []
    for part in error["loc"]:
        if str(part).startswith(UNION_MEMBERS):
            continue
        if isinstance(part, int) and not isinstance(data, list | tuple):
            continue  # the recipe has one value where a list may stand
        path.append(part)
        data = data.get(part) if isinstance(data, Mapping) else data[part] if isinstance(data, list | tuple) else None
    name = _dotted(path)
    if error["type"] == "extra_forbidden":
        return f"{name} is not a key; {_nearest(path)}"
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] == "model_type":
        return f"{name} should be a section of keys, found {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if error["type"] == "value_error" and isinstance(error["input"], dict):  # a rule over several keys
        return f"{name} {message}".strip()
    return f"{name} {message}, found {error['input']!r}"


def _dotted(path: list[Any]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


# The keys of each section, for suggestions; the top of the file is "".
_KEYS: dict[str, list[str]] = {
    "": list(Recipe.model_fields),
    "levels": list(Level.model_fields),
    **{
        name: list(field.annotation.model_fields)
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    },
    "autoguide": list(Autoguide.model_fields),
}


def _nearest(path: list[Any]) -> str:
    """The right key that an unknown one most likely stands for."""
    key = str(path[-1])
    keys = _KEYS[next((str(part) for part in reversed(path[:-1]) if part in _KEYS), "")]
    if near := difflib.get_close_matches(key, keys, 1):
        return f"did you mean {_dotted([*path[:-1], near[0]])}?"
    for section, others in _KEYS.items():
        if key in others:
            return f"did you mean {_dotted([section, key] if section else [key])}?"
    return f"the keys here are {', '.join(keys)}"
