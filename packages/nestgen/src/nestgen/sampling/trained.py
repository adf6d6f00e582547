"""The trained denoisers of a hierarchy, loaded for sampling and checked against the recipe and each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nestgen.denoiser.config import DenoiserConfig, denoiser_config
from nestgen.denoiser.uvit import Denoiser
from nestgen.diffusion.guidance import GuidedDenoiser
from nestgen.diffusion.process import Process, process_from_meta
from nestgen.errors import UserError
from nestgen.recipe.level_sampling import LevelSampling, level_sampling, precision_on
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import Autoguide, shape_name
from nestgen.runs.checkpoint import Checkpoint, checkpoint_folders, config_from_meta, newest, open_checkpoint
from nestgen.runs.folder import best_step


@dataclass(frozen=True)
class TrainedDenoiser:
    """A denoiser with the averaged weights of a checkpoint, the checkpoint's `meta`, and the weights' SHA-256."""

    denoiser: Denoiser
    process: Process
    meta: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class SavedDenoiser:
    """A denoiser on disk: a checkpoint, and the part of it that holds the averaged weights."""

    checkpoint: Checkpoint
    part: str = "ema"

    @property
    def meta(self) -> dict[str, Any]:
        """The checkpoint's `meta`."""
        return self.checkpoint.meta


@dataclass(frozen=True)
class SavedLevel:
    """The denoiser of a level on disk, and the weaker one of autoguidance, if any: all that a process needs to load it."""

    level: int
    denoiser: SavedDenoiser
    weak: SavedDenoiser | None = None


@dataclass(frozen=True)
class LevelSampler:
    """Samples one level: its denoiser D_l, its settings, and the weaker denoiser of autoguidance, if any."""

    level: int
    trained: TrainedDenoiser
    settings: LevelSampling
    weak: TrainedDenoiser | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a guidance that the denoisers do not have."""
        if self.settings.internal_guidance and not self.config.side_head:
            raise UserError(
                f"the denoiser of z_{self.level} has no side head for sampling.internal_guidance; set training.side_loss and "
                "train it, or remove the key"
            )
        if self.settings.autoguidance and self.weak is None:
            raise UserError(
                f"z_{self.level} has no weaker denoiser for sampling.autoguide: none was exported or loaded with it; set the "
                "key in the recipe of its run, or remove it"
            )

    @property
    def config(self) -> DenoiserConfig:
        """The denoiser's configuration."""
        return self.trained.denoiser.config

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.trained.denoiser.pos_embed.device

    @property
    def precision(self) -> Literal["float32", "bf16"]:
        """What the network computes in."""
        return precision_on(self.device.type, self.settings)

    def guided(
        self,
        conditions: Iterable[Tensor] = (),
        label_B: Tensor | None = None,
        context_BTD: Tensor | None = None,
    ) -> GuidedDenoiser:
        """The denoiser for one batch: noised latents (B, C, H, W) of the levels above, classes, embedded captions."""
        dtype = self.trained.denoiser.pos_embed.dtype
        return GuidedDenoiser(
            self.trained.denoiser,
            self.trained.process,
            self.settings,
            tuple(one_BCHW.to(self.device, dtype) for one_BCHW in conditions),
            None if label_B is None else label_B.to(self.device),
            None if context_BTD is None else context_BTD.to(self.device, dtype),
            None if self.weak is None else self.weak.denoiser,
            self.precision == "bf16",
        )


Step = int | Literal["best"] | None  # of a checkpoint; None is the newest


def find_levels(recipe: Recipe, runs: Path | None = None, step: Step = None) -> tuple[SavedLevel, ...]:
    """The checkpoints of every level, z_0 first; `runs` is the folder of the denoisers if not the recipe's.

    They are the newest, those of a step, or each level's best by its previews. Raises UserError for a level that is not
    trained, is of another hierarchy than the recipe's, or was trained on another store than the level above it.
    """
    runs = runs or run_dir(recipe, 0).parent
    levels = tuple(_find(recipe, level, runs, step) for level in range(len(recipe.levels)))
    for below in levels:
        for above in (levels[level] for level in recipe.conditions(below.level)):
            name = f"z{above.level}"
            if below.denoiser.meta["stores"][name] != above.denoiser.meta["stores"][name]:
                raise UserError(
                    f"{runs / run_dir(recipe, below.level).name} and {runs / run_dir(recipe, above.level).name} were "
                    f"trained on different stores of z_{above.level}; train the older one again"
                )
    return levels


def load_samplers(
    recipe: Recipe, device: torch.device, levels: Sequence[SavedLevel] | None = None
) -> tuple[LevelSampler, ...]:
    """The denoisers of every level, z_0 first, with the recipe's settings; by default those of `find_levels`.

    Raises UserError as `find_levels` does, and for weights that are gone or damaged.
    """
    return tuple(
        LevelSampler(
            saved.level,
            _load(saved.denoiser, device),
            level_sampling(recipe, saved.level),
            None if saved.weak is None else _load(saved.weak, device),
        )
        for saved in (find_levels(recipe) if levels is None else levels)
    )


def with_settings(samplers: Sequence[LevelSampler], recipe: Recipe) -> tuple[LevelSampler, ...]:
    """Loaded denoisers with the sampling settings of another recipe of the same hierarchy."""
    return tuple(replace(one, settings=level_sampling(recipe, one.level)) for one in samplers)


def _find(recipe: Recipe, level: int, runs: Path, step: Step) -> SavedLevel:
    folder = runs / run_dir(recipe, level).name
    checkpoint = _of_step(folder, level, step, "that was asked for")
    _check_recipe(recipe, level, checkpoint.meta, folder)
    autoguide = recipe.sampling.of("autoguide", level)
    weak = _weak(autoguide, recipe, level, checkpoint, runs) if autoguide and autoguide.scale else None
    return SavedLevel(level, SavedDenoiser(checkpoint), None if weak is None else SavedDenoiser(weak))


def _of_step(folder: Path, level: int, step: Step, why: str) -> Checkpoint:
    """A checkpoint of a run; `why` says in a message where the step is from."""
    if step is None:
        checkpoint = newest(folder)
        if checkpoint is None:
            raise UserError(f"there is no trained denoiser in {folder}; run `nestgen train --level {level}`")
        return checkpoint
    if step == "best":
        step = best_step(folder)
        if step is None:
            raise UserError(f"{folder} has no previews, so none of its checkpoints is the best; name a step instead")
    path = folder / "checkpoints" / f"{step:08d}"
    if path.is_dir():
        return open_checkpoint(path)
    steps = ", ".join(str(int(one.name)) for one in checkpoint_folders(folder)) or "none"
    raise UserError(
        f"{folder} has no checkpoint of step {step}, {why} (it has {steps}); "
        "name one of these, or train with a larger training.keep"
    )


def _weak(autoguide: Autoguide, recipe: Recipe, level: int, strong: Checkpoint, runs: Path) -> Checkpoint:
    """The denoiser that a level is guided away from: its inputs must be those of the strong one."""
    name = run_dir(recipe, level).name
    folder = (runs if autoguide.run is None else runs.parent / autoguide.run) / name
    checkpoint = _of_step(folder, level, autoguide.step, "which sampling.autoguide names")
    theirs, ours = _inputs(checkpoint.meta), _inputs(strong.meta)
    for key, value in ours.items():
        if theirs[key] != value:
            raise UserError(
                f"{checkpoint.path} cannot guide {runs / name}: the two differ in {key}; train it on the same stores, with the "
                "same process and shift"
            )
    if checkpoint.sha256("ema") == strong.sha256("ema"):
        raise UserError(f"{checkpoint.path} has the weights it should guide; name an earlier step or a smaller run")
    return checkpoint


def _inputs(meta: dict[str, Any]) -> dict[str, Any]:
    """What decides a denoiser's inputs, by a checkpoint's `meta`; the features that it was aligned to are none."""
    stores = {name: fingerprint for name, fingerprint in meta["stores"].items() if name != "features"}
    shift = meta["levels"][meta["level"]]["shift"]
    return {"stores": stores, "process": meta["process"], "codec": meta["codec"], "shift": shift}


def _load(saved: SavedDenoiser, device: torch.device) -> TrainedDenoiser:
    checkpoint = saved.checkpoint
    try:
        return with_weights(saved.meta, checkpoint.load(saved.part), checkpoint.sha256(saved.part), device)
    except FileNotFoundError:
        raise UserError(f"{checkpoint.path} is gone: it is being trained; sample once its training has ended") from None


def with_weights(
    meta: dict[str, Any], weights: Mapping[str, Tensor], sha256: str, device: torch.device
) -> TrainedDenoiser:
    """The denoiser that a checkpoint's `meta` describes, with other averaged weights; computes in float32."""
    denoiser = Denoiser(config_from_meta(meta))
    denoiser.load_state_dict(weights)
    denoiser = denoiser.to(device).requires_grad_(False).eval()
    return TrainedDenoiser(denoiser, process_from_meta(meta), meta, sha256)


def _check_recipe(recipe: Recipe, level: int, meta: dict[str, Any], folder: Path) -> None:
    """Raises UserError where the recipe differs from what the checkpoint was trained with."""
    pairs: list[tuple[str, Any, Any]] = [
        (f"process.{key}", meta["process"].get(key), value) for key, value in recipe.process.model_dump().items()
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
    # `train --set` gives heads that the recipe does not name; what is sampled from is the checkpoint's configuration.
    heads = ("side_head", "aligned")
    pairs += [
        (f"the denoiser's {key}", trained_config[key], value) for key, value in wanted.items() if key not in heads
    ]
    for name, trained, here in pairs:
        trained = tuple(trained) if isinstance(trained, list) else trained
        if trained != here:
            raise UserError(
                f"{folder} was trained with {name} {trained}, but in {recipe.file} it is {here}; "
                "fix the recipe, or give it another name and train again"
            )
