"""Which level loses quality: each level's score given the true levels above it, and given the generated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nestgen.errors import UserError
from nestgen.files import replacing, write_json
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.card import Request, check_drawn_alike, describe
from nestgen.sampling.descent import device
from nestgen.sampling.real import Source, open_real
from nestgen.sampling.sample import draw_levels
from nestgen.sampling.trained import load_models
from nestgen.scoring.evaluate import reference_root, sample_card
from nestgen.scoring.frechet import between, fit
from nestgen.scoring.spaces import Space, level_space


def diagnose(recipe: Recipe, samples: Path, reference: Path | None, out: Path) -> None:
    """Writes how each level of a sample folder scores to OUT, a picture, and its numbers beside it as .json.

    For each level but the top, as many latents are drawn as the folder has, each given the levels above of a real
    picture of the reference; they are kept in the folder OUT without its ending, and not drawn again. The gap between
    their distance and that of the folder's own latents is what the generated condition costs; the gap to the floor
    what the level's own denoiser does. Raises UserError for samples drawn by other denoisers or settings than the
    recipe's.
    """
    card = sample_card(recipe, samples)
    recipe = recipe.depth(card["depth"])
    root = reference_root(recipe, reference)
    if (rows := open_real(recipe, 0, root).rows) < card["count"]:
        raise UserError(
            f"{root} has {rows} rows, and each of the {card['count']} samples needs one of its own; "
            "name a larger --reference, or diagnose a folder of fewer samples"
        )
    now = describe(recipe, load_models(recipe, device()), Request(card["count"], card["seed"], card["batch"]))
    check_drawn_alike(samples, card["levels"], now["levels"])
    levels: list[dict[str, Any]] = []
    for level in reversed(range(card["depth"])):
        generated = level_space(recipe, level, root, card, samples)
        count = len(generated.samples_ND)
        found: dict[str, Any] = {"level": level, "generated": _distance(generated)}
        found |= {"true": None, "gap": None, "floor": None}
        if generated.floor is not None:
            found["floor"] = between(fit(generated.floor(count)), generated.reference().gaussian)
        if level + 1 < card["depth"]:
            folder = out.with_suffix("") / f"z{level}-given-true"
            source = Source(freeze_from=level + 1, root=root)
            request = Request(count, card["seed"], card["batch"], card.get("label"), source)
            draw_levels(recipe, folder, request, lowest=level)
            found["true"] = _distance(level_space(recipe, level, root, card, folder))
            found["gap"] = found["generated"] - found["true"]
        levels.append(found)
        print(_line(found))
    write_json(out.with_suffix(".json"), {"samples": card, "reference": str(root), "levels": levels})
    _draw(levels, out)


def _distance(space: Space) -> float:
    return between(fit(space.samples_ND), space.reference().gaussian)


def _line(found: dict[str, Any]) -> str:
    parts = [f"z_{found['level']}: Fréchet distance {found['generated']:.4g}"]
    if found["true"] is not None:
        parts.append(f"given true levels above {found['true']:.4g} (gap {found['gap']:.4g})")
    if found["floor"] is not None:
        parts.append(f"real to real {found['floor']:.4g}")
    return ", ".join(parts)


def _draw(levels: list[dict[str, Any]], picture: Path) -> None:
    """Bars for each level, relative to the distance given generated levels above: levels have scales of their own."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(1.5 + 1.5 * len(levels), 3.2), layout="constrained")
    axes = figure.subplots()
    kinds = {"floor": "real to real", "true": "given true levels", "generated": "given generated levels"}
    for number, (key, name) in enumerate(kinds.items()):
        places = [place + 0.27 * (number - 1) for place, found in enumerate(levels) if found[key] is not None]
        heights = [found[key] / found["generated"] for found in levels if found[key] is not None]
        axes.bar(places, heights, 0.25, label=name)
    axes.set_xticks(range(len(levels)), [f"z_{one['level']}\n{one['generated']:.3g}" for one in levels])
    axes.set_ylabel("Fréchet distance /\nthat of the samples")
    figure.legend(loc="outside upper center", ncols=len(kinds), frameon=False, fontsize=8)
    with replacing(picture) as draft:
        figure.savefig(draft, dpi=120, format="png")
