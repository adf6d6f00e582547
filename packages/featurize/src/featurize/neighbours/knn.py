"""What each level finds alike: a sheet of nearest neighbours, how often labels agree, which neighbours spaces share."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featurize.errors import UserError
from featurize.images.decode import Profile
from featurize.io.files import write_json
from featurize.neighbours.overlap import draw_overlap, overlap_matrix
from featurize.neighbours.pixels import profile_of, raw_features, raw_pixels, thumbnail
from featurize.neighbours.search import chance_agreement, label_agreement, search_process, without_copies
from featurize.neighbours.sheet import THUMBNAIL, Line, Panel, draw_sheet
from featurize.neighbours.spaces import PIXEL_SIDE, Space, encoder_spaces, image_spaces
from featurize.store.layout import base_path, encoder_folder
from featurize.store.ledger import Ledger, read_ledger

DUPLICATE    = 0.98  # correlation of pixels from which two images count as the same    # fmt: skip
MAX_COPIES   = 100  # of one image that are looked past, at most                          # fmt: skip
AGREEMENT_AT = 10  # neighbours a query
QUERIES      = 1000  # of the label agreement and the overlap                             # fmt: skip
PIXEL_ROWS   = 20_000  # up to so many images are decoded for the raw-pixel baseline    # fmt: skip


@dataclass(frozen=True)
class Compared:
    """An encoder's arrays in a store root."""

    root: Path
    encoder: str


def knn_viz(
    compared: Sequence[Compared],
    out: Path,
    queries: int,
    neighbours: int,
    max_rows: int | None,
    seed: int,
    index: str = "auto",
    raw: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the sheet `out`, the matrix `<out>-overlap.png` and the numbers beside them (`.json`); the numbers.

    `max_rows` rows (None: all), chosen by keyed hash, are compared with each other in every space, so the numbers are
    comparable; all `compared` must hold the same images. `index` is that of `neighbours.nearest`. With `raw` the rows
    are encoded again, and the encoder's features before the basis are a space as well; `raw` holds options that go over those
    the encoder was extracted with, like `weights`.
    """
    compared = list(dict.fromkeys(compared))
    ledger = _common_ledger(compared)
    icc = profile_of(base_path(encoder_folder(compared[0].root, compared[0].encoder)))
    if ledger.rows < 3:
        raise UserError(f"{compared[0].root} holds {ledger.rows} rows; neighbours need three at least.")
    chosen = _by_hash(ledger, seed)[:max_rows]
    rows = np.sort(chosen)
    labels, images = ledger.labels[rows], _image_numbers(ledger, rows)
    candidates = np.searchsorted(rows, chosen[:QUERIES])  # positions among the compared rows, in hash order
    measured = np.sort(candidates)
    shown = _various(candidates, labels, queries)
    count = min(AGREEMENT_AT, len(rows) - 1)

    with tempfile.TemporaryDirectory(prefix="knn-viz-") as folder, search_process() as nearest:
        spaces = _spaces(compared, ledger, rows, icc, raw, Path(folder))
        names = _names(spaces)
        everything = np.union1d(measured, shown)
        copies = min(MAX_COPIES, int(np.bincount(images)[images[everything]].max()))
        agreement: dict[str, float | None] = {}
        nearest_of: dict[str, np.ndarray] = {}
        indexes: dict[str, dict[str, Any]] = {}
        lines: dict[str, list[Line]] = {}
        pixels = Thumbnails(ledger, rows, icc)
        for name, space in zip(names, spaces, strict=True):
            # Twice too many for the sheet: there also images that nearly equal the query are left out.
            near = nearest(space, everything, max(AGREEMENT_AT, 2 * neighbours + 8) + copies, index)
            found = near.positions[np.searchsorted(everything, measured)]
            nearest_of[name] = without_copies(measured, found, images, count)
            agreement[name] = label_agreement(labels, measured, nearest_of[name])
            settings = {key: value for key, value in asdict(near.index).items() if value is not None}
            indexes[name] = settings | {"described": str(near.index)}
            line = pixels.without_copies(shown, near.positions[np.searchsorted(everything, shown)], neighbours)
            lines.setdefault(_panel(space, spaces), []).append(Line(space.name, line))

    overlap = overlap_matrix(nearest_of)
    draw_overlap(names, overlap, count, overlap_path(out))
    draw_sheet(
        [Panel(title, tuple(members)) for title, members in lines.items()],
        shown,
        lambda position: ledger.images[int(rows[position])],
        lambda position: pixels.thumbnail(position, THUMBNAIL),
        out,
        ledger.classes,
    )
    document = {
        "root": str(compared[0].root),
        "encoder": ",".join(dict.fromkeys(one.encoder for one in compared)),
        "rows": len(rows),
        "queries": len(measured),
        "neighbours": count,
        "label_agreement": agreement,
        "chance": chance_agreement(labels, images),
        "index": indexes,
        "overlap": {"spaces": names, "matrix": overlap.round(6).tolist()},
    }
    write_json(out.with_suffix(".json"), document)
    return document


def overlap_path(out: Path) -> Path:
    """Where the overlap matrix of the sheet `out` is drawn."""
    return out.with_name(f"{out.stem}-overlap.png")


def _common_ledger(compared: Sequence[Compared]) -> Ledger:
    first = read_ledger(compared[0].root)
    for root in dict.fromkeys(one.root for one in compared[1:]):
        if root != compared[0].root and read_ledger(root).keys_sha256 != first.keys_sha256:
            raise UserError(
                f"{compared[0].root} and {root} don't hold the same pictures, so their neighbours can't be compared; "
                "extract both from one source."
            )
    return first


def _spaces(
    compared: Sequence[Compared],
    ledger: Ledger,
    rows: np.ndarray,
    icc: Profile,
    raw: dict[str, Any] | None,
    folder: Path,
) -> list[Space]:
    spaces: list[Space] = []
    for one, group in zip(compared, _groups(compared), strict=True):
        if raw is not None:
            spaces.append(raw_features(one.root, one.encoder, raw, ledger, rows, folder))
        spaces += encoder_spaces(one.root, one.encoder, group, rows)
    image_based = [space for root in dict.fromkeys(one.root for one in compared) for space in image_spaces(root, rows)]
    image_based = list({space.name: space for space in image_based}.values())
    if all(space.name != "raw pixels" for space in image_based) and len(rows) <= PIXEL_ROWS:
        image_based.append(raw_pixels(ledger, rows, icc, folder))
    return spaces + image_based


def _groups(compared: Sequence[Compared]) -> list[str]:
    """What each is called: its encoder, after as many of the last parts of its root's path as tell them apart."""
    parts, names = 0, [one.encoder for one in compared]
    while len(set(names)) < len(names):
        parts += 1
        names = [f"{'/'.join(one.root.parts[-parts:])} {one.encoder}" for one in compared]
    return names


def _names(spaces: Sequence[Space]) -> list[str]:
    """What a space is called in the numbers: with its encoder's name only where there are several encoders."""
    encoders = {space.group for space in spaces} - {"pictures"}
    alone = len(encoders) == 1
    return [space.name if alone or space.group == "pictures" else f"{space.group} {space.name}" for space in spaces]


def _panel(space: Space, spaces: Sequence[Space]) -> str:
    """The title it stands under: a panel an encoder, and one for pictures where there are several encoders."""
    encoders = list(dict.fromkeys(other.group for other in spaces if other.group != "pictures"))
    return encoders[0] if len(encoders) == 1 else space.group


def _by_hash(ledger: Ledger, seed: int) -> np.ndarray:
    """All rows in an order that depends on their keys and the seed only."""
    digests = [sha256(f"{seed}:{key}".encode()).digest() for key in ledger.keys]
    return np.array(sorted(range(ledger.rows), key=digests.__getitem__))


def _various(candidates: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The first candidates, of as many different labels as there are."""
    _, first = np.unique(labels[candidates], return_index=True)
    leading = np.sort(first)
    others = np.setdiff1d(np.arange(len(candidates)), leading)
    return candidates[np.concatenate([leading, others])[:count]]


def _image_numbers(ledger: Ledger, rows: np.ndarray) -> np.ndarray:
    """(n,) a number for each image: rows whose files have the same bytes share it."""
    digests = ledger.table["sha256"].take(rows).combine_chunks()
    return digests.dictionary_encode().indices.to_numpy()


class Thumbnails:
    """Images at positions among the compared rows, each decoded when it is first used."""

    def __init__(self, ledger: Ledger, rows: np.ndarray, icc: Profile) -> None:
        self._image = lru_cache(maxsize=4096)(lambda position: thumbnail(ledger, int(rows[position]), THUMBNAIL, icc))

    def thumbnail(self, position: int, side: int) -> np.ndarray:
        image = self._image(int(position))
        return image if side == len(image) else np.asarray(Image.fromarray(image).resize((side, side)))

    def similarity(self, first: int, second: int) -> float:
        """Correlation of the two images' pixels."""
        a, b = (self.thumbnail(position, PIXEL_SIDE).astype(np.float64).ravel() for position in (first, second))
        a, b = a - a.mean(), b - b.mean()
        return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))

    def without_copies(self, queries: np.ndarray, neighbours_QK: np.ndarray, count: int) -> np.ndarray:
        """(Q, count) neighbours that are neither the query nor nearly the same picture; -1 where too few are left."""
        others_QK = np.full((len(queries), count), -1)
        for number, (query, neighbours) in enumerate(zip(queries, neighbours_QK, strict=True)):
            others: list[int] = []
            for other in neighbours[(neighbours >= 0) & (neighbours != query)]:
                if len(others) == count:
                    break
                if self.similarity(int(query), int(other)) < DUPLICATE:
                    others.append(int(other))
            others_QK[number, : len(others)] = others
        return others_QK
