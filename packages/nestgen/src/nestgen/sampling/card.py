"""The card of a sampling run, and which levels of a sample folder still hold what it says."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestgen.errors import UserError
from nestgen.files import read_json, write_json
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import shape_name
from nestgen.sampling.conditions import ImageConditions
from nestgen.sampling.latents import open_latents, remove_latents, written_shape
from nestgen.sampling.trained import LevelSampler
from nestgen.text import first_difference


def make_card(
    recipe: Recipe, samplers: Sequence[LevelSampler], conditions: ImageConditions, count: int, batch: int
) -> dict[str, Any]:
    """The card of a sampling run: everything that decides its `count` images, plus batch size and versions."""
    codec = samplers[0].trained.meta["codec"]
    return {
        "recipe": recipe.name,
        "depth": len(samplers),
        "count": count,
        "seed": conditions.seed,
        "label": conditions.label,
        "text": None if conditions.prompts is None else conditions.prompts.describe(),
        "process": {"kind": recipe.process.kind, "prediction": recipe.process.prediction},
        "levels": json.loads(json.dumps([_level(sampler, conditions) for sampler in samplers])),  # as it will be read
        "codec": {key: value for key, value in codec.items() if key not in ("weights", "config")},
        "pictures": "png, rounded to the nearest uint8",
        "batch": batch,
        "versions": {name: importlib.metadata.version(name) for name in ("nestgen", "torch", "diffusers")},
    }


def read_card(recipe: Recipe, samples: Path) -> dict[str, Any]:
    """The card of a sample folder, sample.json. Raises UserError where there is none or it is another recipe's."""
    if not (samples / "sample.json").is_file():
        raise UserError(f"{samples} has no sample.json; run `nestgen sample --out {samples}` to its end")
    card = read_json(samples / "sample.json")
    theirs = [level["shape"] for level in card["levels"]]
    ours = [shape_name(level.shape) for level in recipe.levels][: len(theirs)]
    if card["recipe"] != recipe.name or theirs != ours:
        raise UserError(
            f"{samples} was sampled from {card['recipe']} with levels {', '.join(theirs)}, but {recipe.file} is "
            f"{recipe.name} with {', '.join(ours)}; name the right recipe with --recipe"
        )
    return card


def _level(sampler: LevelSampler, conditions: ImageConditions) -> dict[str, Any]:
    meta, settings, weak = sampler.trained.meta, sampler.settings, sampler.weak
    card = {"shape": shape_name(sampler.config.shape), "store_fingerprint": meta["stores"][f"z{sampler.level}"]}
    if conditions.frozen is not None and conditions.is_frozen(sampler.level):
        store = conditions.stores.get(sampler.level)
        card["frozen"] = conditions.frozen.describe(store)
        if store is not None:
            return card
    card |= {
        "sampler": settings.sampler,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "guidance_interval": None if settings.interval is None else list(settings.interval),
        "condition_sigma": settings.sigmas[0] if settings.sigmas else 0.0,
        "checkpoint_step": meta["step"],
        "checkpoint_sha256": sampler.trained.sha256,
    }
    if sampler.precision != "float32":
        card["precision"] = sampler.precision
    if len(settings.sigmas) > 1:
        card["further_sigmas"] = list(settings.sigmas[1:])
    if settings.internal_guidance is not None:
        card["internal_guidance"] = settings.internal_guidance.model_dump()
    if weak is not None:
        card["autoguide"] = {"scale": settings.autoguidance, "step": weak.meta["step"], "sha256": weak.sha256}
    return card


def _settings(card: Mapping[str, Any], level: int) -> dict[str, Any]:
    """Everything in a card that decides the latents of a level."""
    common = {key: card[key] for key in ("seed", "label", "text", "process")}
    return common | {f"z_{above}": card["levels"][above] for above in range(level, card["depth"])}


def _image_settings(card: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in a card that decides the images."""
    return {"codec": card["codec"], "pictures": card["pictures"], "z_0": _settings(card, 0)}


def check_folder(out: Path) -> None:
    """Raises UserError for a folder of anything else than samples."""
    if out.is_dir() and not (out / "latents").is_dir() and any(path.name != ".lock" for path in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no samples to go on with; sample into another folder")


def reconcile(out: Path, card: dict[str, Any], overwrite: bool) -> int:
    """Makes a folder ready for a run: if `overwrite`, removes the levels that other settings decided, and says so.

    Returns the rows of a block: those of the latents there, else the card's batch. Raises UserError for a folder with
    samples of other settings, unless they are to be overwritten, or with more of them than the card says.
    """
    depth = card["depth"]
    count = max((shape[0] for level in range(depth) if (shape := written_shape(out, level))), default=0)
    if count > card["count"]:
        raise UserError(f"{out} holds {count} samples and this run asks for {card['count']}; name another folder")
    if not overwrite:
        _refuse_other_settings(out, card)
    _remove_images(out, card, complete=count == card["count"])
    _remove_levels(out, card)
    blocks = [shape[1] for level in range(depth) if (shape := written_shape(out, level))]
    return blocks[0] if blocks else card["batch"]


def check_same_work(out: Path, card: dict[str, Any], user: str) -> int:
    """The rows of a block in a folder that `user` samples into. Raises UserError where a run is not for the same samples."""
    in_use = f"{out} is being sampled into by another process ({user})"
    if why := _other_settings(out, card):
        raise UserError(f"{in_use}, with other settings: {why}; wait for it, or sample into another folder")
    array = open_latents(out, card["depth"] - 1).array
    if array.shape[0] != card["count"]:
        raise UserError(f"{in_use}, which makes {array.shape[0]} samples; ask for as many, or wait for it")
    return array.chunks[0]


def _refuse_other_settings(out: Path, card: dict[str, Any]) -> None:
    """Raises UserError where the folder has latents or images that `reconcile` would remove."""
    there = any(out.glob("latents/z*.blocks/*.json")) or any(out.glob("[0-9]" * 6 + "*.png"))
    if there and (why := _other_settings(out, card)):
        raise UserError(
            f"{out} holds samples of other settings: {why}; sample into another folder, or give --overwrite to replace them"
        )


def _other_settings(out: Path, card: dict[str, Any]) -> str | None:
    """What differs between the folder's settings and a card's, at the highest level; None where nothing does."""
    records = {out / "latents/pictures.json": _image_settings(card)}
    records |= {out / f"latents/z{level}.json": _settings(card, level) for level in range(card["depth"])}
    differing = [path for path, settings in records.items() if _read(path) not in (settings, None)]
    if not differing:
        return None
    previous = _read(differing[-1])
    return first_difference(previous, records[differing[-1]]) if previous else f"{differing[-1]} is damaged"


def _remove_images(out: Path, card: dict[str, Any], complete: bool) -> None:
    """Removes images that other settings decided, and the card of a folder that is not what the new card says."""
    record = out / "latents" / "pictures.json"
    settings, previous = _image_settings(card), _read(record)
    if previous == settings and complete:
        return
    (out / "sample.json").unlink(missing_ok=True)
    if previous not in (settings, None):
        for image in out.glob("[0-9]" * 6 + "*.png"):
            image.unlink()


def _remove_levels(out: Path, card: dict[str, Any]) -> None:
    """Removes latents that other settings decided, then records the settings of all."""
    folder, depth = out / "latents", card["depth"]
    previous = [_read(folder / f"z{level}.json") for level in range(depth)]
    stale = [level for level in range(depth) if previous[level] != _settings(card, level)]
    changed = [level for level in stale if previous[level] is not None]
    if changed:
        top = max(changed)
        why = first_difference(previous[top] or {}, _settings(card, top))
        print(f"{out}: {'z_0 is' if top == 0 else f'z_{top} and below are'} sampled again, because {why}")
    deeper = [level for path in folder.glob("z*.json") if (level := int(path.stem.removeprefix("z"))) >= depth]
    for level in {*stale, *deeper}:
        remove_latents(out, level)
        (folder / f"z{level}.json").unlink(missing_ok=True)
    for level in stale:
        write_json(folder / f"z{level}.json", _settings(card, level))
    if _read(folder / "pictures.json") != _image_settings(card):
        write_json(folder / "pictures.json", _image_settings(card))


def check_same_settings(source: Path, theirs: Sequence[Any], ours: Sequence[Any]) -> None:
    """Raises UserError where samples are of other denoisers or settings: the cards of their levels, z_0 first.

    `source` is what holds the samples' card; `ours` are the levels' cards of the recipe as it is now.
    """
    before, after = ({f"z_{level}": card for level, card in enumerate(cards)} for cards in (theirs, ours))
    if before != after:
        raise UserError(
            f"the samples of {source} were made with other settings: {first_difference(before, after)}; give the --set "
            "and --sigma that they were made with, or sample again"
        )


def _read(path: Path) -> dict[str, Any] | None:
    """A record of the folder; None where there is none, and {} where it is damaged, so that it vouches for nothing."""
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except UserError:
        return {}
