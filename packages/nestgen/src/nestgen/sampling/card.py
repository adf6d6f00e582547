"""What a sample folder was drawn with: the card of a run, and which levels of a folder still hold what it says."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestgen.errors import UserError
from nestgen.files import read_json, write_json
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import shape_name
from nestgen.sampling.captions import Prompts
from nestgen.sampling.latents import held, remove_latents
from nestgen.sampling.real import Source
from nestgen.sampling.trained import Model
from nestgen.stores.store import Store
from nestgen.text import first_difference


@dataclass(frozen=True)
class Request:
    """What is asked of a sampling run beside the recipe."""

    count: int
    seed: int
    batch: int
    label: int | None = None
    source: Source | None = None
    prompts: Path | None = None  # a root with embedded captions
    prompt: str | None = None  # or one for all, kept in that root
    vae: Path | None = None


def describe(
    recipe: Recipe,
    models: Sequence[Model],
    request: Request,
    stores: Mapping[int, Store] | None = None,
    prompts: Prompts | None = None,
) -> dict[str, Any]:
    """The card of a sampling run: everything that decides its pictures, plus batch size and versions.

    `stores` are those that levels are frozen to, `prompts` what the images are captioned with.
    """
    codec = models[0].weights.meta["codec"]
    return {
        "recipe": recipe.name,
        "depth": len(models),
        "count": request.count,
        "seed": request.seed,
        "label": request.label,
        "text": None if prompts is None else prompts.describe(),
        "process": {"kind": recipe.process.kind, "prediction": recipe.process.prediction},
        "levels": [_level(model, request.source, (stores or {}).get(model.level)) for model in models],
        "codec": {key: value for key, value in codec.items() if key not in ("weights", "config")},
        "pictures": "png, rounded to the nearest uint8",
        "batch": request.batch,
        "versions": {name: importlib.metadata.version(name) for name in ("nestgen", "torch", "diffusers")},
    }


def _level(model: Model, source: Source | None, store: Store | None) -> dict[str, Any]:
    meta, sampling = model.weights.meta, model.sampling
    card = {"shape": shape_name(model.config.shape), "store_fingerprint": meta["stores"][f"z{model.level}"]}
    if source is not None and model.level >= source.freeze_from:
        card["frozen"] = source.describe(store)
        if store is not None:
            return card
    card |= {
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "guidance_interval": None if sampling.interval is None else list(sampling.interval),
        "condition_sigma": sampling.sigmas[0] if sampling.sigmas else 0.0,
        "checkpoint_step": meta["step"],
        "checkpoint_sha256": model.weights.sha256,
    }
    if len(sampling.sigmas) > 1:
        card["further_sigmas"] = list(sampling.sigmas[1:])
    if model.weak is not None:
        weak = model.weak
        card["autoguide"] = {"scale": sampling.autoguidance, "step": weak.meta["step"], "sha256": weak.sha256}
    return card


def _settings(card: Mapping[str, Any], level: int) -> dict[str, Any]:
    """Everything in a card that decides the latents of a level."""
    common = {key: card[key] for key in ("seed", "label", "text", "process")}
    return common | {f"z_{above}": card["levels"][above] for above in range(level, card["depth"])}


def settle(out: Path, card: dict[str, Any]) -> int:
    """Makes a folder ready for a run: forgets the levels drawn otherwise, and says so. Returns its rows per block.

    Raises UserError for a folder that holds something else than samples, or more of them than asked for.
    """
    if out.is_dir() and not (out / "latents").is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no samples to go on with; sample into another folder")
    depth = card["depth"]
    held_count = max((shape[0] for level in range(depth) if (shape := held(out, level))), default=0)
    if held_count > card["count"]:
        raise UserError(f"{out} holds {held_count} samples and this run asks for {card['count']}; name another folder")
    kept = [_kept(out / "latents" / f"z{level}.json") for level in range(depth)]
    stale = [level for level in range(depth) if kept[level] != _settings(card, level)]
    decoding = {"codec": card["codec"], "pictures": card["pictures"], "z_0": _settings(card, 0)}
    drawn_otherwise = [level for level in stale if kept[level] is not None]
    if drawn_otherwise:
        top = max(drawn_otherwise)
        why = first_difference(kept[top] or {}, _settings(card, top))
        print(f"{out}: {'z_0 is' if top == 0 else f'z_{top} and below are'} drawn anew, because {why}")
    if _kept(out / "latents" / "pictures.json") != decoding or held_count != card["count"]:
        (out / "sample.json").unlink(missing_ok=True)
    if _kept(out / "latents" / "pictures.json") not in (decoding, None):
        for picture in out.glob("[0-9]" * 6 + "*.png"):
            picture.unlink()
    above = [int(path.stem.removeprefix("z")) for path in (out / "latents").glob("z*.json")]
    for level in {*stale, *(level for level in above if level >= depth)}:
        remove_latents(out, level)
        (out / "latents" / f"z{level}.json").unlink(missing_ok=True)
    for level in stale:
        write_json(out / "latents" / f"z{level}.json", _settings(card, level))
    if _kept(out / "latents" / "pictures.json") != decoding:
        write_json(out / "latents" / "pictures.json", decoding)
    blocks = [shape[1] for level in range(depth) if (shape := held(out, level))]
    return blocks[0] if blocks else card["batch"]


def check_drawn_alike(of: Path, theirs: Sequence[Any], ours: Sequence[Any]) -> None:
    """Raises UserError where samples were drawn by other denoisers or settings: cards of the levels, z_0 first.

    `of` is what holds the samples' card; `ours` are the levels' cards of the recipe as it is now.
    """
    before, after = ({f"z_{level}": card for level, card in enumerate(cards)} for cards in (theirs, ours))
    if before != after:
        raise UserError(
            f"the samples of {of} were drawn otherwise: {first_difference(before, after)}; give the --set and --sigma that they "
            "were drawn with, or draw them again"
        )


def _kept(path: Path) -> dict[str, Any] | None:
    """A card of the folder; None where there is none, or where it was cut off."""
    try:
        return read_json(path)
    except UserError:
        return None
