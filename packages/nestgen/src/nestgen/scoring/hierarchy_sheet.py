"""Looking into the hierarchy: sheets of levels frozen and the rest drawn anew, of walks, and of depths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nestgen.files import write_json
from nestgen.images import draw_sheet, write_image
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.card import Request, describe
from nestgen.sampling.decoder import Decoder, load_decoder
from nestgen.sampling.descent import device, labels_of, sample_below
from nestgen.sampling.real import (
    Source,
    check_freeze,
    frozen_levels,
    labels_of_rows,
    open_real,
    open_source,
    real_latents,
)
from nestgen.sampling.trained import Model, load_models
from nestgen.scoring.preservation import kept_by_level
from nestgen.stores.store import Store

FROZEN = 4  # samples frozen in turn: one alone makes the variation too uncertain to see it fall


@dataclass(frozen=True)
class Row:
    """A row of a sheet, and what is said of it in the .json."""

    title: str
    pictures: np.ndarray  # uint8 (columns, height, width, 3)
    card: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Look:
    """How to look: which levels freeze (all in turn, or from `freeze_from` up), and to what.

    To samples, if nothing else is said; to row `like` of the store root `root`; to the way between the rows `walk`; or
    to nothing, at every depth of the hierarchy (`over_depth`).
    """

    freeze_from: int | None = None
    root: Path | None = None
    like: int | None = None
    walk: tuple[int, int] | None = None
    over_depth: bool = False


@dataclass(frozen=True)
class View:
    """A hierarchy to look into: columns of pictures, drawn with the noise of images 0, 1, ... of a seed."""

    recipe: Recipe
    models: tuple[Model, ...]
    decode: Decoder
    columns: int
    seed: int

    def lowest_frozen(self, look: Look) -> list[int]:
        """The levels to freeze from, one row each. Raises UserError for a level that cannot be frozen."""
        if look.freeze_from is None:
            return list(range(len(self.models) - 1, 0, -1))
        check_freeze(self.recipe, look.freeze_from)
        return [look.freeze_from]

    def draw(self, images: Sequence[int], frozen: Mapping[int, Tensor], labels: Tensor | None) -> np.ndarray:
        """Pictures of images with some levels frozen."""
        return self.decode(sample_below(self.models, images, self.seed, frozen, labels)[0])

    def source(self, look: Look, row: int) -> tuple[Source, dict[int, Store]]:
        """A real picture's row, and the stores of all levels that may be frozen to it."""
        source = Source(min(self.lowest_frozen(look), default=1), look.root, row)
        fingerprints = [model.weights.meta["stores"][f"z{model.level}"] for model in self.models]
        return source, open_source(self.recipe, source, 1, fingerprints)


def hierarchy(
    recipe: Recipe,
    out: Path,
    columns: int,
    seed: int,
    look: Look,
    vae: Path | None = None,
    kept: Sequence[Path] = (),
) -> None:
    """Writes a sheet to `out` and, beside it as .json, how much the pictures of each row vary.

    `kept` are score cards of samples like real pictures, with levels frozen to them: what share keeps the pictures'
    class and colours stands at the row with the same levels frozen.
    """
    models = load_models(recipe, device())
    card = describe(recipe, models, Request(columns, seed, columns))
    shares = kept_by_level(kept, card)
    view = View(recipe, models, load_decoder(models[0].weights.meta["codec"], vae, str(device())), columns, seed)
    if look.over_depth:
        rows = over_depth(view)
    elif look.walk is not None:
        rows = walk(view, look, look.walk)
    elif look.like is not None:
        rows = like(view, look, look.like)
    else:
        rows = of_samples(view, look)
    for row in rows:
        if (frozen := row.card.get("frozen")) and frozen[0] in shares:
            row.card["kept"] = shares[frozen[0]]
    write_image(draw_sheet([row.pictures for row in rows], ["\n".join([row.title, *_kept(row)]) for row in rows]), out)
    write_json(out.with_suffix(".json"), {"rows": [row.card for row in rows], "samples": card})
    for row in rows:
        parts = [f"{row.title.replace(chr(10), ' '):<28} variation {row.card['variation']:.2f} of 255", *_kept(row)]
        print(", ".join(parts))


def of_samples(view: View, look: Look) -> list[Row]:
    """The paper's Figure 1: a row of free samples, then for each k one of samples with levels k and above frozen.

    Column i draws with the noise of image i of the seed; the sample frozen is image 0, so the first column is that
    image. The variation is averaged over freezing images 0, 1, ... in turn. With `freeze_from`, a row for each of
    these images instead, that image first.
    """
    columns, images = view.columns, list(range(view.columns))
    turns = min(columns, FROZEN)
    labels = labels_of(view.models, [0] * columns * turns, view.seed, None)  # all pictures share image 0's class
    z = sample_below(view.models, images, view.seed, {}, None if labels is None else labels[:columns])
    pictures = view.decode(z[0])
    rows = [Row("all drawn\nanew", pictures, {"frozen": [], "variation": variation(pictures)})]
    for lowest in tqdm(view.lowest_frozen(look), desc="rows", unit=" rows"):
        levels = list(range(lowest, len(view.models)))
        frozen = {level: z[level][:turns].repeat_interleave(columns, 0) for level in levels}
        by_turn = np.split(view.draw(images * turns, frozen, labels), turns)
        if look.freeze_from is None:
            mean = float(np.mean([variation(one) for one in by_turn]))
            rows.append(Row(_title(levels), by_turn[0], {"frozen": levels, "variation": mean}))
        else:
            for image, found in enumerate(by_turn):
                title = f"{_title(levels)}\nto image {image}"
                card = {"frozen": levels, "image": image, "variation": variation(found)}
                rows.append(Row(title, np.concatenate([pictures[image : image + 1], found]), card))
    return rows


def like(view: View, look: Look, row: int) -> list[Row]:
    """Variations of a real picture, which comes first in each row: its levels k and above, the rest drawn anew."""
    source, stores = view.source(look, row)
    images = list(range(view.columns))
    labels = labels_of_rows(view.recipe, source, stores[source.freeze_from], images)
    real = _decoded_row(view, look, row)
    rows = []
    for lowest in tqdm(view.lowest_frozen(look), desc="rows", unit=" rows"):
        levels = list(range(lowest, len(view.models)))
        frozen = frozen_levels({level: stores[level] for level in levels}, source, images, view.seed)
        pictures = view.draw(images, frozen, labels)
        card = {"frozen": levels, "row": row, "variation": variation(pictures)}
        rows.append(Row(f"{_title(levels)}\nto row {row}", np.concatenate([real, pictures]), card))
    return rows


def walk(view: View, look: Look, ends: tuple[int, int]) -> list[Row]:
    """From one real picture to another, which stand at the ends: levels k and above go the way, on great circles, all
    with the noise of image 0.
    """
    source, stores = view.source(look, ends[0])
    view.source(look, ends[1])  # is it there?
    shares = torch.linspace(0, 1, view.columns).tolist()
    images = [0] * view.columns
    labels = labels_of_rows(view.recipe, source, stores[source.freeze_from], images)
    first, last = (_decoded_row(view, look, row) for row in ends)
    rows = []
    for lowest in tqdm(view.lowest_frozen(look), desc="rows", unit=" rows"):
        levels = list(range(lowest, len(view.models)))
        frozen = {}
        for level in levels:
            a_CHW, b_CHW = real_latents(stores[level], ends, view.seed)
            frozen[level] = torch.stack([between(a_CHW, b_CHW, share) for share in shares])
        pictures = view.draw(images, frozen, labels)
        card = {"frozen": levels, "rows": list(ends), "variation": variation(pictures)}
        title = f"{_title(levels)}\nrow {ends[0]} to {ends[1]}"
        rows.append(Row(title, np.concatenate([first, pictures, last]), card))
    return rows


def between(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The point a share of the way from a to b on the great circle through them, its length interpolated too.

    Latents are about Gaussian, so half way along the straight line would lie where no latent does, too near to 0.
    """
    one, other = a.norm(), b.norm()
    cosine = (a.flatten() @ b.flatten() / (one * other).clamp_min(1e-12)).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle < 1e-4 or angle > torch.pi - 1e-4:  # no circle, or many
        return torch.lerp(a, b, share)
    direction = (torch.sin((1 - share) * angle) * a / one + torch.sin(share * angle) * b / other) / torch.sin(angle)
    return torch.lerp(one, other, share) * direction


def over_depth(view: View) -> list[Row]:
    """The same seeds at L = 1, 2, ...: the hierarchy's first L levels, each with the denoisers trained for it."""
    images = list(range(view.columns))
    rows = []
    for depth in range(1, len(view.models) + 1):
        models = load_models(view.recipe.depth(depth), device())
        labels = labels_of(models, images, view.seed, None)
        pictures = replace(view, models=models).draw(images, {}, labels)
        rows.append(Row(f"L = {depth}", pictures, {"depth": depth, "variation": variation(pictures)}))
    return rows


def _decoded_row(view: View, look: Look, row: int) -> np.ndarray:
    """A real picture as its z_0 decodes, (1, height, width, 3)."""
    assert look.root is not None
    fingerprint = view.models[0].weights.meta["stores"]["z0"]
    return view.decode(real_latents(open_real(view.recipe, 0, look.root, fingerprint), [row], view.seed))


def variation(pictures_NHWC: np.ndarray) -> float:
    """Standard deviation over the pictures, averaged over pixels and channels; in steps of 1/255."""
    return float(pictures_NHWC.astype(np.float64).std(axis=0).mean())


def _kept(row: Row) -> list[str]:
    """What samples keep of real pictures with these levels frozen to theirs, a line each."""
    shares = row.card.get("kept", {})
    named = {"class": "class kept", "colours": "colours kept"}
    return [f"{name} {100 * shares[key]:.0f} %" for key, name in named.items() if shares.get(key) is not None]


def _title(frozen: list[int]) -> str:
    return ", ".join(f"z_{level}" for level in frozen) + "\nfrozen"
