"""The sections of a recipe and their keys: frozen values, validated strictly (docs/recipe.md)."""

from __future__ import annotations

import math
import re
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nestgen.recipe.protocols import PROTOCOLS, Inception
from nestgen.recipe.protocols import Name as Protocol


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


def check_codec(text: str) -> str:
    """'CODEC:SIDE' of one of our codecs, or of one that an installed package decodes; anything else raises ValueError."""
    name, _, side = text.partition(":")
    codecs = ("pixels", "vae", "taesd", *entry_points(group="nestgen.decoders").names)
    if name not in codecs or not re.fullmatch(r"[1-9]\d*", side):
        raise ValueError(f"should be a codec and the side in pixels, such as vae:256; codecs are {', '.join(codecs)}")
    return text


def check_preview(count: int) -> int:
    """0, or enough samples for a distance; 1 raises ValueError."""
    if count == 1:
        raise ValueError("should be 0, for no previews, or 2 samples or more, which have a distance to real ones")
    return count


def shape_name(shape: tuple[int, ...]) -> str:
    """'HxWxC' of (h, w, c)."""
    return "x".join(map(str, shape))


def as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Shape = Annotated[tuple[int, int, int], BeforeValidator(parse_shape)]
TextShape = Annotated[tuple[int, int] | None, BeforeValidator(parse_text)]
Range = Annotated[tuple[NonNegativeFloat, NonNegativeFloat], BeforeValidator(as_tuple)]
Probability = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


MOST_VALUES = 1 << 28  # of a latent: a gigabyte in float32


class Section(BaseModel):
    """A part of the recipe: frozen, nothing unknown, nothing converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Features(Section):
    """Where the stores are. The section's other keys are featurize's, which validates them."""

    model_config = ConfigDict(extra="ignore")

    out: Annotated[str, Field(min_length=1)]
    encoder: str = "tiny"
    text_weights: str | None = None
    base_channels: PositiveInt = 64
    z0: Annotated[str, AfterValidator(check_codec)] = "pixels:32"


Size = Literal["nano", "mini", "micro", "small", "medium", "large"]


class Level(Section):
    """One latent of the hierarchy."""

    shape: Shape
    sigma: NonNegativeFloat | Range = 0.0
    # Without a shape it does not matter: pydantic before 2.14 asks for the default of a level whose shape is an error.
    patch: PositiveInt = Field(default_factory=lambda data: 1 if min(data.get("shape", (4, 4))[:2]) < 4 else 2)
    shift: PositiveFloat = 1.0
    size: Size | None = None  # of this level's denoiser, where it is not denoiser.size

    @field_validator("shift", mode="before")
    @classmethod
    def _shift_of_the_shape(cls, shift: object, info: ValidationInfo) -> object:
        """`auto` as the number it stands for: sqrt(values / 4096), that of Zheng et al. 2025 (arXiv 2510.11690)."""
        return math.sqrt(math.prod(info.data["shape"]) / 4096) if shift == "auto" and "shape" in info.data else shift

    @model_validator(mode="after")
    def _fits(self) -> Level:
        h, w, _ = self.shape
        if math.prod(self.shape) > MOST_VALUES:
            raise ValueError(
                f"has shape {shape_name(self.shape)}, which is too large: {MOST_VALUES:,} values are the most"
            )
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

    size: Size = "small"
    init: Literal["identity", "uvit"] = "identity"
    positions: Literal["random", "sinusoids"] = "random"
    gaussian: bool = False
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
    prediction: Literal["eps", "v", "velocity", "x"] = Field(
        default_factory=lambda data: "velocity" if data.get("kind") == "flow" else "eps"
    )
    weighting: Literal["uniform", "min-snr"] = "uniform"
    logit_normal: Annotated[tuple[float, PositiveFloat], BeforeValidator(as_tuple)] | None = None

    @model_validator(mode="after")
    def _prediction_determines_the_latent(self) -> ProcessOptions:
        if (self.kind, self.prediction) == ("flow", "eps"):
            raise ValueError(
                "has prediction eps, which at the start of flow's sampling does not determine the latent; "
                "set velocity or v, or another kind"
            )
        return self


def _for_each_level(value: object) -> tuple[object, ...]:
    """A list is one value per level; anything else, and a pair of numbers, holds for every level."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


PerLevel = BeforeValidator(_for_each_level)


class Align(Section):
    """The loss that draws z_0's denoiser towards the stored features, and the share of the steps that have it."""

    weight: PositiveFloat = 0.5
    until: Annotated[float, Field(gt=0, le=1)] = 0.4


class TrainingOptions(Section):
    """How a denoiser is trained."""

    steps: PositiveInt = 300_000
    batch: PositiveInt = 256
    lr: PositiveFloat = 2e-4
    muon: PositiveFloat | None = None
    lr_decay: Literal["linear", "cosine", "inverse-sqrt"] | None = None
    betas: Annotated[tuple[Decay, Decay], BeforeValidator(as_tuple)] = (0.9, 0.9)
    weight_decay: NonNegativeFloat = 0.03
    warmup: NonNegativeInt = 5000
    ema: Decay = 0.9999
    ema_schedule: Literal["constant"] | None = None
    side_loss: PositiveFloat | None = None
    align: Align | None = None
    condition_drop: Probability = 0.5
    label_drop: Probability = 0.1
    text_drop: Probability = 0.1
    clip: PositiveFloat | None = None
    precision: Literal["no", "bf16", "fp16", "auto"] = "no"
    micro_batch: Annotated[tuple[PositiveInt | None, ...], PerLevel] = (None,)
    compile: bool | None = None  # None: on a GPU
    checkpoint_activations: bool = False
    shard: bool = False
    shuffle: PositiveInt | None = None
    checkpoint_every: PositiveInt = 5000
    keep: PositiveInt = 2
    preview: Annotated[NonNegativeInt, AfterValidator(check_preview)] = 64
    ema_snapshots: PositiveInt | None = None
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(as_tuple)] = ()

    @model_validator(mode="before")
    @classmethod
    def _accumulate_is_read(cls, data: Any) -> Any:
        """Recipes of 0.1.0 name the parts of a batch, `accumulate`, instead of the samples in one, `micro_batch`."""
        parts = data.get("accumulate") if isinstance(data, dict) else None
        batch = data.get("batch", cls.model_fields["batch"].default) if isinstance(data, dict) else None
        if type(parts) is not int or parts < 1 or type(batch) is not int:
            return data
        rest = {key: value for key, value in data.items() if key != "accumulate"}
        return rest if parts == 1 else {"micro_batch": -(-batch // parts), **rest}

    def cut(self, depth: int) -> TrainingOptions:
        """The options of the first `depth` levels."""
        return self.model_copy(update={"micro_batch": self.micro_batch[:depth]})

    def micro_batch_of(self, level: int) -> int | None:
        """Most samples in one forward pass of a level's denoiser; None for no limit."""
        return self.micro_batch[0 if len(self.micro_batch) == 1 else level]

    @model_validator(mode="after")
    def _muon_has_whole_gradients(self) -> TrainingOptions:
        if self.muon is not None and (self.shard or self.precision == "fp16"):
            raise ValueError(
                "has muon, which takes whole matrices and unscaled gradients; set shard: false and precision bf16 or no"
            )
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


def _intervals(value: object) -> tuple[object, ...]:
    pair = isinstance(value, list | tuple) and all(isinstance(one, int | float) for one in value)
    return (value,) if pair or value is None else _for_each_level(value)


Sampler = Literal["dpm-single", "dpm++-single", "dpm++-multi", "unipc", "ddim", "euler", "heun"]
FLOW_SAMPLERS = ("euler", "ddim", "heun")  # the others divide by the signal, of which a flow has none at its start


class Autoguide(Section):
    """A weaker denoiser of the same level to guide away from: an earlier step, or another run."""

    scale: NonNegativeFloat
    run: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")] | None = None
    step: PositiveInt | None = None

    @model_validator(mode="after")
    def _names_one(self) -> Autoguide:
        if self.run is None and self.step is None:
            raise ValueError("names no denoiser; give run (a run of a smaller denoiser), step (an earlier one) or both")
        return self


class InternalGuidance(Section):
    """Guidance away from what the denoiser's own side head says; w = `scale`, within the times of `interval`."""

    scale: Annotated[float, Field(ge=1)]
    interval: Annotated[Any, BeforeValidator(_as_interval)] = None


class SamplingOptions(Section):
    """How images are sampled. All but `guidance_decay`, `precision` and `batch` are one value, or one per level, z_0 first."""

    sampler: Annotated[tuple[Sampler | None, ...], PerLevel] = (None,)
    steps: Annotated[tuple[Annotated[PositiveInt, Field(le=10_000)], ...], PerLevel] = (50,)
    guidance: Annotated[tuple[float, ...], PerLevel] = (1.0,)
    guidance_decay: Probability = 1.0
    guidance_interval: Annotated[
        tuple[Annotated[Any, BeforeValidator(_as_interval)], ...], BeforeValidator(_intervals)
    ] = (None,)
    sigma: Annotated[tuple[NonNegativeFloat | None, ...], PerLevel] = (None,)
    autoguide: Annotated[tuple[Autoguide | None, ...], PerLevel] = (None,)
    internal_guidance: Annotated[tuple[InternalGuidance | None, ...], PerLevel] = (None,)
    precision: Literal["float32", "bf16"] | None = None
    batch: PositiveInt = 64

    def of(self, key: str, level: int) -> Any:
        """The value of a key for one level."""
        values = getattr(self, key)
        return values[0 if len(values) == 1 else level]

    def cut(self, depth: int) -> SamplingOptions:
        """The options of the first `depth` levels."""
        return self.model_copy(update={key: getattr(self, key)[:depth] for key in PER_LEVEL})


PER_LEVEL = [key for key in SamplingOptions.model_fields if key not in ("guidance_decay", "precision", "batch")]


class EvaluationOptions(Section):
    """How many samples are scored, and against what."""

    protocol: Protocol | None = None
    count: PositiveInt = Field(
        default_factory=lambda data: PROTOCOLS[data["protocol"]].count if data.get("protocol") else 1000
    )
    reference: str | None = None
    pictures: str | None = None
    inception: Inception = Field(
        default_factory=lambda data: PROTOCOLS[data["protocol"]].inception if data.get("protocol") else "tensorflow"
    )

    @model_validator(mode="after")
    def _agrees_with_the_protocol(self) -> EvaluationOptions:
        if self.protocol and self.count != PROTOCOLS[self.protocol].count:
            raise ValueError(
                f"has count {self.count}, but protocol {self.protocol} takes {PROTOCOLS[self.protocol].count} samples; "
                "leave count out"
            )
        if self.protocol and self.inception != PROTOCOLS[self.protocol].inception:
            raise ValueError(
                f"has inception {self.inception}, but protocol {self.protocol} takes "
                f"{PROTOCOLS[self.protocol].inception}; leave inception out"
            )
        return self
