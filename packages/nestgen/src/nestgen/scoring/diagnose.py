"""Which level loses quality: each level's score given the true levels above it, and given the generated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from upath import UPath

from nestgen.errors import UserError
from nestgen.files import atomic_write, write_json
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.captions import OF_ROWS
from nestgen.sampling.card import check_same_settings, make_card, read_card
from nestgen.sampling.conditions import ImageConditions, Request
from nestgen.sampling.descent import default_device
from nestgen.sampling.frozen import FrozenSource
from nestgen.sampling.real import open_real, reference_root
from nestgen.sampling.sample import sample_latents
from nestgen.sampling.trained import load_samplers
from nestgen.scoring.frechet import fit_gaussian, gaussian_distance
from nestgen.scoring.spaces import Space, level_space


def diagnose(recipe: Recipe, samples: Path, reference: Path | UPath | None, out: Path) -> None:
    """Writes how each level of a sample folder scores to OUT, a PNG, and its numbers beside it as .json.

    For each level but the top, as many latents are sampled as the folder has, each given the levels above of a real
    image of the reference, and a caption of it where the samples have captions; they stay in the folder OUT without its
    ending, and are not sampled again. The gap between their distance and that of the folder's own latents is what the
    generated condition costs; the gap to the floor what the level's own denoiser does. Raises UserError for samples of
    other denoisers or settings than the recipe's, and for captions that are not of a data set.
    """
    card = read_card(recipe, samples)
    recipe = recipe.depth(card["depth"])
    root = reference_root(recipe, reference)
    if (text := card.get("text")) and text["captions"] != OF_ROWS:
        raise UserError(
            f"the samples of {samples} have captions that no real images have ({text['captions']}); diagnose samples of "
            "captioned images, by `nestgen sample --prompts ROOT`"
        )
    if text and not (root / "text" / "offsets.zarr").is_dir():
        raise UserError(f"{root} has no captions of its images; make it by `featurize extract --text clip`")
    if (rows := open_real(recipe, 0, root).rows) < card["count"]:
        raise UserError(
            f"{root} has {rows} rows, and each of the {card['count']} samples needs one of its own; "
            "give a larger --reference, or diagnose a folder of fewer samples"
        )
    samplers = load_samplers(recipe, default_device())
    now = make_card(recipe, samplers, ImageConditions(card["seed"]), card["count"], card["batch"])
    check_same_settings(samples, card["levels"], now["levels"])
    levels: list[dict[str, Any]] = []
    for level in reversed(range(card["depth"])):
        levels.append(_diagnose_level(recipe, level, card, samples, root, out))
        print(_line(levels[-1]))
    write_json(out.with_suffix(".json"), {"samples": card, "reference": str(root), "levels": levels})
    _draw(levels, out)


def _diagnose_level(
    recipe: Recipe, level: int, card: dict[str, Any], samples: Path, root: Path | UPath, out: Path
) -> dict[str, Any]:
    """The distances of a level: of the samples, given true levels above (not for the top), and of real rows."""
    generated = level_space(recipe, level, root, card, samples)
    count = len(generated.samples_ND)
    entry: dict[str, Any] = {
        "level": level,
        "generated": _distance(generated, generated.samples_ND),
        "true": None,
        "gap": None,
        "floor": None,
    }
    if generated.floor is not None:
        entry["floor"] = _distance(generated, generated.floor(count))
    if level + 1 < card["depth"]:
        folder = out.with_suffix("") / f"z{level}-given-true"
        source = FrozenSource(freeze_from=level + 1, root=root)
        label, prompts = card.get("label"), root if card.get("text") else None
        # The folder is its own.
        request = Request(count, card["seed"], card["batch"], label, source, prompts, overwrite=True)
        sample_latents(recipe, folder, request, level)
        true = level_space(recipe, level, root, card, folder)
        entry["true"] = _distance(true, true.samples_ND)
        entry["gap"] = entry["generated"] - entry["true"]
    return entry


def _distance(space: Space, vectors_ND: np.ndarray) -> float:
    try:
        return gaussian_distance(fit_gaussian(vectors_ND), space.reference().gaussian)
    except ValueError as error:
        raise UserError(f"{len(vectors_ND)} vector(s) cannot be scored in {space.name}: {error}") from None


def _line(entry: dict[str, Any]) -> str:
    parts = [f"z_{entry['level']}: Fréchet distance {entry['generated']:.4g}"]
    if entry["true"] is not None:
        parts.append(f"given true levels above {entry['true']:.4g} (gap {entry['gap']:.4g})")
    if entry["floor"] is not None:
        parts.append(f"real to real {entry['floor']:.4g}")
    return ", ".join(parts)


def _draw(levels: list[dict[str, Any]], out: Path) -> None:
    """Bars for each level, relative to the distance given generated levels above: levels have scales of their own."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(1.5 + 1.5 * len(levels), 3.2), layout="constrained")
    axes = figure.subplots()
    kinds = {"floor": "real to real", "true": "given true levels", "generated": "given generated levels"}
    for number, (key, name) in enumerate(kinds.items()):
        x = [index + 0.27 * (number - 1) for index, entry in enumerate(levels) if entry[key] is not None]
        heights = [entry[key] / entry["generated"] for entry in levels if entry[key] is not None]
        axes.bar(x, heights, 0.25, label=name)
    axes.set_xticks(range(len(levels)), [f"z_{one['level']}\n{one['generated']:.3g}" for one in levels])
    axes.set_ylabel("Fréchet distance /\nthat of the samples")
    figure.legend(loc="outside upper center", ncols=len(kinds), frameon=False, fontsize=8)
    with atomic_write(out) as draft:
        figure.savefig(draft, dpi=120, format="png")
