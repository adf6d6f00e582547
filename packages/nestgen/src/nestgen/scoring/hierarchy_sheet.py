"""Sheets that look into the hierarchy: levels frozen and the rest sampled, interpolations, and depths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from upath import UPath

from nestgen.files import write_json
from nestgen.images import draw_sheet, write_image
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.card import make_card
from nestgen.sampling.conditions import ImageConditions, Request, open_conditions
from nestgen.sampling.decoder import Decoder, load_decoder
from nestgen.sampling.descent import default_device, sample_images
from nestgen.sampling.frozen import FrozenSource, check_freeze_from
from nestgen.sampling.real import open_real, real_latents
from nestgen.sampling.trained import LevelSampler, SavedLevel, load_samplers
from nestgen.scoring.preservation import preservation_by_level

FROZEN = 4  # samples frozen in turn: one alone makes the variation too uncertain to see it fall


@dataclass(frozen=True)
class Row:
    """A row of a sheet, and its entry in the .json."""

    title: str
    images: np.ndarray  # uint8 (columns, height, width, 3)
    card: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SheetOptions:
    """What a sheet shows: by default samples with levels frozen to samples.

    freeze_from  freeze only the levels from this one up; None is each in turn
    root         the store root of the rows below
    row          freeze to this row
    interpolate  freeze to the way between these two rows
    over_depth   freeze nothing: the same seeds at every depth of the hierarchy
    """

    freeze_from: int | None = None
    root: Path | UPath | None = None
    row: int | None = None
    interpolate: tuple[int, int] | None = None
    over_depth: bool = False


@dataclass(frozen=True)
class Hierarchy:
    """The denoisers and the decoder that a sheet's images are made with."""

    recipe: Recipe
    samplers: tuple[LevelSampler, ...]
    decode: Decoder
    columns: int
    seed: int

    def frozen_levels(self, options: SheetOptions) -> list[range]:
        """The levels frozen in each row. Raises UserError for a level that cannot be frozen."""
        depth = len(self.samplers)
        if options.freeze_from is None:
            return [range(lowest, depth) for lowest in range(depth - 1, 0, -1)]
        check_freeze_from(self.recipe, options.freeze_from)
        return [range(options.freeze_from, depth)]

    def row_conditions(self, options: SheetOptions, row: int) -> ImageConditions:
        """Images with the class of a real row, and with every level frozen to it that any row of the sheet freezes."""
        lowest = min((levels.start for levels in self.frozen_levels(options)), default=1)
        request = Request(1, self.seed, 1, frozen=FrozenSource(lowest, options.root, row))
        return open_conditions(self.recipe, self.samplers, request)

    def decoded_row(self, options: SheetOptions, row: int) -> np.ndarray:
        """A real image as its z_0 decodes, (1, height, width, 3)."""
        assert options.root is not None
        fingerprint = self.samplers[0].trained.meta["stores"]["z0"]
        return self.decode(real_latents(open_real(self.recipe, 0, options.root, fingerprint), [row], self.seed))


def hierarchy_sheet(
    recipe: Recipe,
    out: Path,
    columns: int,
    seed: int,
    options: SheetOptions,
    vae: Path | None = None,
    preserved: Sequence[Path] = (),
    levels: Sequence[SavedLevel] | None = None,
) -> None:
    """Writes a sheet to `out` and, beside it as .json, how much the images of each row vary.

    `preserved` are score cards of samples with levels frozen to real rows: what they preserve of these stands at the
    row with the same levels frozen. `levels` are the denoisers, by default the newest of the recipe's run.
    """
    samplers = load_samplers(recipe, default_device(), levels)
    card = make_card(recipe, samplers, ImageConditions(seed), columns, columns)
    shares = preservation_by_level(preserved, card["levels"])
    decode = load_decoder(samplers[0].trained.meta["codec"], vae, str(default_device()))
    rows = _rows(Hierarchy(recipe, samplers, decode, columns, seed), options)
    for row in rows:
        if (frozen := row.card.get("frozen")) and frozen[0] in shares:
            row.card["kept"] = shares[frozen[0]]
    titles = ["\n".join([row.title, *_preserved(row)]) for row in rows]
    write_image(draw_sheet([row.images for row in rows], titles), out)
    write_json(out.with_suffix(".json"), {"rows": [row.card for row in rows], "samples": card})
    for row in rows:
        title = row.title.replace("\n", " ")
        print(", ".join([f"{title:<28} variation {row.card['variation']:.2f} of 255", *_preserved(row)]))


def _rows(hierarchy: Hierarchy, options: SheetOptions) -> list[Row]:
    if options.over_depth:
        return over_depth(hierarchy)
    if options.interpolate is not None:
        return interpolations(hierarchy, options, options.interpolate)
    if options.row is not None:
        return variations_of_row(hierarchy, options, options.row)
    return variations_of_samples(hierarchy, options)


def variations_of_samples(hierarchy: Hierarchy, options: SheetOptions) -> list[Row]:
    """The paper's Figure 1: a row of free samples, then for each k one of samples with levels k and above frozen.

    Column i has the noise of image i of the seed; the sample frozen is image 0, so the first column is that image. The
    variation is averaged over freezing images 0, 1, ... in turn. With `freeze_from`, a row for each of these images
    instead, that image first.
    """
    columns, images = hierarchy.columns, list(range(hierarchy.columns))
    turns = min(columns, FROZEN)
    conditions = ImageConditions(hierarchy.seed, hierarchy.recipe.denoiser.labels)
    label_B = conditions.labels([0])
    if label_B is not None:  # all images share image 0's class
        conditions = replace(conditions, label=int(label_B))
    z = sample_images(hierarchy.samplers, images, conditions)
    free = hierarchy.decode(z[0])
    rows = [Row("all sampled", free, {"frozen": [], "variation": variation(free)})]
    for levels in tqdm(hierarchy.frozen_levels(options), desc="rows", unit=" rows"):
        frozen = {level: z[level][:turns].repeat_interleave(columns, 0) for level in levels}
        again = sample_images(hierarchy.samplers, images * turns, conditions, frozen)
        by_turn = np.split(hierarchy.decode(again[0]), turns)
        if options.freeze_from is None:
            mean = float(np.mean([variation(one) for one in by_turn]))
            rows.append(Row(_title(levels), by_turn[0], {"frozen": list(levels), "variation": mean}))
            continue
        for image, resampled in enumerate(by_turn):
            card = {"frozen": list(levels), "image": image, "variation": variation(resampled)}
            shown = np.concatenate([free[image : image + 1], resampled])
            rows.append(Row(f"{_title(levels)}\nto image {image}", shown, card))
    return rows


def variations_of_row(hierarchy: Hierarchy, options: SheetOptions, row: int) -> list[Row]:
    """Variations of a real image, which comes first in each row: its levels k and above, the rest sampled."""
    conditions, images = hierarchy.row_conditions(options, row), range(hierarchy.columns)
    real = hierarchy.decoded_row(options, row)
    rows = []
    for levels in tqdm(hierarchy.frozen_levels(options), desc="rows", unit=" rows"):
        varied = hierarchy.decode(sample_images(hierarchy.samplers, images, _freeze_from(conditions, levels.start))[0])
        card = {"frozen": list(levels), "row": row, "variation": variation(varied)}
        rows.append(Row(f"{_title(levels)}\nto row {row}", np.concatenate([real, varied]), card))
    return rows


def interpolations(hierarchy: Hierarchy, options: SheetOptions, ends: tuple[int, int]) -> list[Row]:
    """From one real image to another, which stand at the ends: levels k and above are interpolated by `slerp`, the rest
    is sampled with the noise of image 0.
    """
    conditions, _ = (hierarchy.row_conditions(options, row) for row in ends)
    first, last = (hierarchy.decoded_row(options, row) for row in ends)
    shares = torch.linspace(0, 1, hierarchy.columns).tolist()
    rows = []
    for levels in tqdm(hierarchy.frozen_levels(options), desc="rows", unit=" rows"):
        frozen = {}
        for level in levels:
            a_CHW, b_CHW = real_latents(conditions.stores[level], ends, hierarchy.seed)
            frozen[level] = torch.stack([slerp(a_CHW, b_CHW, share) for share in shares])
        images = [0] * hierarchy.columns
        z = sample_images(hierarchy.samplers, images, _freeze_from(conditions, levels.start), frozen)
        between = hierarchy.decode(z[0])
        card = {"frozen": list(levels), "rows": list(ends), "variation": variation(between)}
        title = f"{_title(levels)}\nrow {ends[0]} to {ends[1]}"
        rows.append(Row(title, np.concatenate([first, between, last]), card))
    return rows


def _freeze_from(conditions: ImageConditions, level: int) -> ImageConditions:
    assert conditions.frozen is not None
    return replace(conditions, frozen=replace(conditions.frozen, freeze_from=level))


def over_depth(hierarchy: Hierarchy) -> list[Row]:
    """The same seeds at L = 1, 2, ...: the hierarchy's first L levels, each with the denoisers trained for it."""
    conditions, images = ImageConditions(hierarchy.seed, hierarchy.recipe.denoiser.labels), range(hierarchy.columns)
    rows = []
    for depth in range(1, len(hierarchy.samplers) + 1):
        samplers = load_samplers(hierarchy.recipe.depth(depth), default_device())
        sampled = hierarchy.decode(sample_images(samplers, images, conditions)[0])
        rows.append(Row(f"L = {depth}", sampled, {"depth": depth, "variation": variation(sampled)}))
    return rows


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The point a share of the way from a to b on the great circle through them, its length interpolated too.

    Latents are about Gaussian, so half way along the straight line would lie where no latent does, too near to 0.
    """
    length_a, length_b = a.norm(), b.norm()
    cosine = (a.flatten() @ b.flatten() / (length_a * length_b).clamp_min(1e-12)).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle < 1e-4 or angle > torch.pi - 1e-4:  # no circle, or many
        return torch.lerp(a, b, share)
    direction = torch.sin((1 - share) * angle) * a / length_a + torch.sin(share * angle) * b / length_b
    return torch.lerp(length_a, length_b, share) * (direction / torch.sin(angle))


def variation(images_NHWC: np.ndarray) -> float:
    """Standard deviation over the images, averaged over pixels and channels; in steps of 1/255."""
    return float(images_NHWC.astype(np.float64).std(axis=0).mean())


def _preserved(row: Row) -> list[str]:
    """What samples preserve of real images with these levels frozen to theirs, a line each."""
    shares = row.card.get("kept", {})
    names = {"class": "class preserved", "colours": "colours preserved"}
    return [f"{name} {100 * shares[key]:.0f} %" for key, name in names.items() if shares.get(key) is not None]


def _title(frozen: Sequence[int]) -> str:
    return ", ".join(f"z_{level}" for level in frozen) + "\nfrozen"
