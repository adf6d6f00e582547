"""Score cards side by side, if they may stand there; and the grid of depths and sigmas that a set of them makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nestgen.errors import UserError
from nestgen.files import atomic_write, read_json, write_json
from nestgen.text import short, table

# Keys of a score that say how it was measured. Scores of one space are comparable if all of these agree.
MEASURED = ("samples", "dimensions", "pooled_from", "kernel_rows", "inception", "weights_sha256")
UNSAID = {"inception": "tensorflow"}  # of cards that were written before there was another
FID = "Inception"  # the space whose Fréchet distance is called so
SHOWN = ("frechet_distance", "kid", "precision", "recall", "density", "coverage")


def read_cards(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The score cards of some files. Raises UserError for a file that is not one."""
    cards = []
    for path in paths:
        card = read_json(path)
        if not isinstance(card, dict) or not {"scores", "samples"} <= card.keys():
            raise UserError(f"{path} is not a score card; give files that `nestgen evaluate` wrote")
        cards.append(card)
    return cards


def check_comparable(paths: Sequence[Path], cards: Sequence[dict[str, Any]]) -> None:
    """Raises UserError, saying why, for cards whose scores must not stand side by side."""
    first = cards[0]
    of_spaces: dict[str, tuple[Path, dict[str, Any]]] = {}  # the first card that has a space, and its score there
    for path, card in zip(paths, cards):
        pairs = [
            ("evaluation protocol", first.get("protocol"), card.get("protocol")),
            ("image format and rounding", first["samples"]["pictures"], card["samples"]["pictures"]),
            ("class of the samples", first["samples"].get("label"), card["samples"].get("label")),
            ("captions of the samples", first["samples"].get("text"), card["samples"].get("text")),
            ("scale of z_0", _scale(first), _scale(card)),  # which the reference's digest leaves out
        ]
        _check_same(paths[0], path, pairs)
        if not {score["space"] for score in first["scores"]} & {score["space"] for score in card["scores"]}:
            raise UserError(f"{paths[0]} and {path} cannot be compared: they have no space in common")
        for score in card["scores"]:
            earlier, one = of_spaces.setdefault(score["space"], (path, score))
            where = f" in {score['space']}"
            pairs = [
                (f"{key}{where}", one.get(key, UNSAID.get(key)), score.get(key, UNSAID.get(key))) for key in MEASURED
            ]
            pairs.append((f"reference{where}", one["reference"]["sha256"], score["reference"]["sha256"]))
            _check_same(earlier, path, pairs)


def _check_same(one: Path, other: Path, pairs: Iterable[tuple[str, object, object]]) -> None:
    for what, before, now in pairs:
        if before != now:
            raise UserError(f"{one} and {other} cannot be compared: {what} is {short(before)} and {short(now)}")


def _scale(card: Mapping[str, Any]) -> float | None:
    """The scale of z_0, which samples and reference have in common; None in cards that do not say it."""
    return card["samples"].get("codec", {}).get("scale")


def inception_of(scores: Iterable[Mapping[str, Any]]) -> str | None:
    """`evaluation.inception` of the FIDs among scores; None without FIDs. Raises UserError where they differ."""
    kinds = sorted({score.get("inception", UNSAID["inception"]) for score in scores if score["space"] == FID})
    if len(kinds) > 1:
        raise UserError(
            f"the score cards have FIDs by Inception as in {' and '.join(kinds)}, which are not comparable; "
            "score all samples in one way with `nestgen evaluate`"
        )
    return kinds[0] if kinds else None


def compare(paths: Sequence[Path]) -> str:
    """A table for each space: a line a card, named by what the cards differ in."""
    cards = read_cards(paths)
    check_comparable(paths, cards)
    names = _names(paths, cards)
    tables = []
    for space in dict.fromkeys(score["space"] for card in cards for score in card["scores"]):
        lines = [
            (name, score) for name, card in zip(names, cards) for score in card["scores"] if score["space"] == space
        ]
        head = f"{space}: {lines[0][1]['samples']} samples, {lines[0][1]['dimensions']} dimensions"
        rows = [("", *SHOWN)] + [(name, *(_number(score.get(key)) for key in SHOWN)) for name, score in lines]
        floors = [score["floor"] for _, score in lines if "floor" in score]
        if floors:
            rows.append(("real to real", *(_number(floors[0].get(key)) for key in SHOWN)))
        tables.append(head + "\n" + table(rows))
    return "\n\n".join(tables)


def _names(paths: Sequence[Path], cards: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each card: its file, and the settings that are not the same in all."""
    flat = [_settings(card["samples"]) for card in cards]
    keys = [
        key for key in dict.fromkeys(key for one in flat for key in one) if len({str(one.get(key)) for one in flat}) > 1
    ]
    return [
        ", ".join([str(path), *(f"{key} {short(one[key])}" for key in keys if key in one)])
        for path, one in zip(paths, flat)
    ]


def _settings(card: dict[str, Any]) -> dict[str, Any]:
    settings = {key: card.get(key) for key in ("recipe", "depth", "seed")}
    for number, level in enumerate(card["levels"]):
        for key in ("sampler", "steps", "guidance", "guidance_interval", "condition_sigma", "checkpoint_step"):
            if key in level:
                settings[f"z_{number} {key}"] = level[key]
        if "autoguide" in level:
            settings[f"z_{number} autoguide"] = level["autoguide"]["scale"]
    return settings


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def grid(paths: Sequence[Path], space: str | None, key: str, out: Path) -> str:
    """The paper's Table 1 from cards of several depths and sigmas: a line for each L, a column for each σ.

    σ is the noise on the top level of a card's hierarchy; several cards of one cell (seeds) are averaged, with their
    standard deviation. Draws it to `out` and writes its numbers beside it as .json; returns it as text.
    """
    cards = read_cards(paths)
    check_comparable(paths, cards)
    space = space or _last_common(cards)
    cells: dict[tuple[int, float | None], list[float]] = {}
    for path, card in zip(paths, cards):
        scores = [score for score in card["scores"] if score["space"] == space]
        if not scores or scores[0].get(key) is None:
            raise UserError(f"{path} has no {key} in {space}; it has {', '.join(s['space'] for s in card['scores'])}")
        depth = card["samples"]["depth"]
        sigma = card["samples"]["levels"][depth - 2].get("condition_sigma") if depth > 1 else None
        cells.setdefault((depth, sigma), []).append(scores[0][key])
    entries: list[dict[str, Any]] = [
        {"depth": depth, "sigma": sigma, "mean": _mean(values), "std": _std(values), "cards": len(values)}
        for (depth, sigma), values in sorted(cells.items(), key=lambda cell: (cell[0][0], cell[0][1] or 0.0))
    ]
    write_json(out.with_suffix(".json"), {"space": space, "score": key, "cells": entries})
    _draw(entries, f"{key.replace('_', ' ')} in {space}", out)
    sigmas = sorted({entry["sigma"] for entry in entries if entry["sigma"] is not None})
    rows = [("L", "", *(f"σ = {sigma:g}" for sigma in sigmas))]
    for depth in sorted({entry["depth"] for entry in entries}):
        line = {entry["sigma"]: entry for entry in entries if entry["depth"] == depth}
        rows.append((str(depth), *(_cell(line.get(sigma)) for sigma in (None, *sigmas))))
    return f"{key.replace('_', ' ')} in {space}\n{table(rows)}"


def _last_common(cards: Sequence[dict[str, Any]]) -> str:
    spaces = [[score["space"] for score in card["scores"]] for card in cards]
    common = (space for space in reversed(spaces[0]) if all(space in other for other in spaces))
    return next(common, spaces[0][-1])  # without one, the card that lacks this space is named


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _std(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return (sum((value - _mean(values)) ** 2 for value in values) / (len(values) - 1)) ** 0.5


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    spread = "" if entry["std"] is None else f" ± {entry['std']:.2g}"
    return _number(entry["mean"]) + spread


def _draw(entries: Sequence[dict[str, Any]], title: str, out: Path) -> None:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axes = figure.subplots()
    depths = sorted({entry["depth"] for entry in entries})
    for sigma in sorted({entry["sigma"] for entry in entries if entry["sigma"] is not None}):
        line = [entry for entry in entries if entry["sigma"] == sigma]
        errors = [entry["std"] or 0.0 for entry in line]
        axes.errorbar(
            [e["depth"] for e in line], [e["mean"] for e in line], errors, marker="o", capsize=3, label=f"σ = {sigma:g}"
        )
    for entry in entries:
        if entry["sigma"] is None:
            axes.errorbar([entry["depth"]], [entry["mean"]], [entry["std"] or 0.0], fmt="ks", label="L = 1")
    axes.set_xticks(depths, [f"L = {depth}" for depth in depths])
    axes.set_ylabel(title)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", frameon=False)  # beside the plot, so that it covers nothing
    axes.grid(alpha=0.3)
    with atomic_write(out) as draft:
        figure.savefig(draft, dpi=120, format="png")
