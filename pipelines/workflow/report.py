"""Writes an experiment's images, loss curves and scores as one self-contained page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import jinja2
from PIL import Image

from nestgen.images import image_path
from nestgen.recipe.recipe import load_recipe
from workflow import pretrained, sentences
from workflow.charts import loss_curves, score_bars
from workflow.plan import read_plan
from workflow.pretrained import COUNT, FOLDER, Pretrained
from workflow.sentences import SpaceScores
from workflow.steps import scorer

TEMPLATE = Path(__file__).with_name("report.html.j2")
THUMBNAIL = 128  # pixels a side of an image in a row, at most
SHEET = 2400  # pixels a side of a sheet, at most
LOSSLESS = 2**19  # pixels up to which nothing is lost
REAL = Path("real")  # the folder of real images, and of the same decoded from z_0


@dataclass(frozen=True)
class Thumbnail:
    """A small image, what it is called, and where it lies."""

    address: str
    name: str
    file: Path


@dataclass(frozen=True)
class ImageRow:
    """Images side by side, and the sheet of more of the same kind, if there is one."""

    title: str
    images: tuple[Thumbnail, ...]
    sheet: str | None


@click.command()
@click.argument("cells", nargs=-1, required=True)
@click.option("--runs", type=click.Path(path_type=Path), required=True, help="Folder of the trained denoisers.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The page.")
@click.option("--pretrained", "names", multiple=True, help="A trained hierarchy whose images it opens with.")
def main(cells: tuple[str, ...], runs: Path, out: Path, names: tuple[str, ...]) -> None:
    """Write the report of the experiment in the working directory: CELLS are the best hierarchies of each depth."""
    cards = [json.loads(Path(f"samples/{cell}/evaluation.json").read_text()) for cell in cells]
    depths = [card["samples"]["depth"] for card in cards]
    hierarchy, knn = (json.loads(Path(name).read_text()) for name in ("hierarchy.json", "knn.json"))
    file = Path("nested.yaml")
    scores = score_table(cards)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        recipe=load_recipe(file),
        recipe_text=file.read_text(encoding="utf-8"),
        scorer=scorer(read_plan(file)).encoder,
        knn=knn,
        hierarchy=hierarchy,
        preserved=next((row["kept"] for row in hierarchy["rows"] if "kept" in row), None),
        spaces=scores,
        depths=depths,
        best=[(card["samples"]["depth"], _sigmas(card)) for card in cards],
        table=table(Path("table.json")),
        card=cards[-1]["samples"],
        say=sentences,
        image=image_address,
        rows=[*real_rows(REAL), *(sample_row(Path("samples") / cell, depth) for cell, depth in zip(cells, depths))],
        first=opening(names),
        losses=loss_curves(runs),
        bars=score_bars(scores, depths) if any(one.complete for one in scores) else "",
    )
    draft = out.with_name(f".{out.name}.tmp")
    draft.write_text(page, encoding="utf-8")
    draft.replace(out)


def score_table(cards: Sequence[dict[str, Any]]) -> list[SpaceScores]:
    """The distances of each space over the cards' depths, and their floor by the last card."""
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    for card in cards:
        for score in card["scores"]:
            lines.setdefault(score["space"], {})[card["samples"]["depth"]] = score
    depths = [card["samples"]["depth"] for card in cards]
    table = []
    for space, by_depth in lines.items():
        last = by_depth[max(by_depth)]
        distances = tuple(by_depth[depth]["frechet_distance"] if depth in by_depth else None for depth in depths)
        table.append(SpaceScores(space, last["dimensions"], distances, last.get("floor", {}).get("frechet_distance")))
    return table


def _sigmas(card: dict[str, Any]) -> list[float]:
    return [level["condition_sigma"] for level in card["samples"]["levels"][:-1]]


def table(path: Path) -> dict[str, Any] | None:
    """Scores over depths and σ: for each depth the mean and spread at each σ. None where only one σ was tried."""
    if not path.is_file():
        return None
    scores = json.loads(path.read_text())
    sigmas = sorted({cell["sigma"] for cell in scores["cells"] if cell["sigma"] is not None})
    lines: dict[int, dict[Any, Any]] = {}
    for cell in scores["cells"]:
        lines.setdefault(cell["depth"], {})[cell["sigma"]] = cell
    return {**scores, "sigmas": sigmas, "lines": lines}


@dataclass(frozen=True)
class Opening:
    """What a page opens with: images of hierarchies that were trained already, and what is known of them."""

    rows: tuple[ImageRow, ...]
    trained: str
    sheets: tuple[tuple[Path, str, str], ...]  # file, title, text
    scores: tuple[SpaceScores, ...]
    depths: tuple[int, ...]


SHEET_TEXTS = {
    "hierarchy": (
        "Levels of a sample frozen",
        "In each row the named levels are one sample's, and the rest is drawn anew.",
    ),
    "like": ("Levels of a real image frozen", "The first column is the image; in each row it lends the named levels."),
    "interpolate": (
        "From one real image to another",
        "In each row the named levels go from the left image's to the right one's.",
    ),
}


def opening(names: Sequence[str]) -> Opening | None:
    """The images in the folder `pretrained` of the named hierarchies; None without names."""
    if not names:
        return None
    found = pretrained.read(names)
    rows = [*real_rows(FOLDER / "real"), *(sample_row(FOLDER / one.stem, one.depth, COUNT) for one in found)]
    trained = "; ".join(f"L = {one.depth}, {_trained(one)}" for one in found)
    files = {name: FOLDER / f"{name}.png" for name in SHEET_TEXTS}
    sheets = tuple((file, *SHEET_TEXTS[name]) for name, file in files.items() if file.is_file())
    cards = [one.card for one in found if one.card is not None]
    scores = score_table(cards) if len(cards) == len(found) else []
    return Opening(tuple(rows), trained, sheets, tuple(scores), tuple(one.depth for one in found))


def _trained(one: Pretrained) -> str:
    """The steps of each level's training, from the top down."""
    metas = [level.denoiser.meta for level in one.exported.levels]
    each = [f"z_{level} {meta['step']:,} steps of {meta['training']['batch']}" for level, meta in enumerate(metas)]
    return ", ".join(reversed(each))


def sample_row(folder: Path, depth: int, count: int = 10) -> ImageRow:
    """The first samples of a folder, and the sheet of 64 of them."""
    files = [file for file in (image_path(folder, index) for index in range(count)) if file.is_file()]
    named = [Thumbnail(thumbnail_address(file), f"L = {depth}, image {int(file.stem)}", file) for file in files]
    return ImageRow(f"L = {depth}", tuple(named), image_address(folder.with_name(f"{folder.name}-sheet.png")))


def real_rows(folder: Path) -> list[ImageRow]:
    """Real images, and the same through the codec of z_0; those of `folder` that are there."""
    rows = []
    for name, title in (("images", "real"), ("decoded", "real, through the codec")):
        files = sorted((folder / name).glob("[0-9]*.png"))
        named = [Thumbnail(thumbnail_address(file), f"{title}, row {int(file.stem)}", file) for file in files]
        rows += [ImageRow(title, tuple(named), None)] if named else []
    return rows


def thumbnail_address(path: Path) -> str:
    """An image file as a data: URL, made smaller where it is larger than a thumbnail."""
    return image_address(path, THUMBNAIL)


def image_address(path: str | Path, side: int = SHEET) -> str:
    """An image file as a data: URL of WebP, no wider than `side`."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    if image.width > side:
        image = image.resize((side, max(1, round(image.height * side / image.width))), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=image.width * image.height <= LOSSLESS, quality=90)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
