"""The scan of a source: each image is decoded once and gets a row of the ledger, or the reason why it has none."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from featurize.errors import UserError
from featurize.execution.devices import decoding_threads
from featurize.execution.tasks import Run, in_order
from featurize.extraction.reading import Reader, readers
from featurize.images.crop import SQUARE, CropRule
from featurize.images.decode import examine
from featurize.images.reasons import BadImage
from featurize.io.files import atomic_write, resolve_path
from featurize.recipe import OWN_BASIS, Features
from featurize.sources import Listing, SourceImage, list_images, numbered_as
from featurize.store.layout import draft_ledger_path, ledger_path
from featurize.store.ledger import (
    CONTENT_DIGEST,
    SCHEMA,
    Ledger,
    ledger_of,
    ledger_of_listing,
    read_ledger,
    read_ledger_metadata,
    read_table,
    write_ledger,
)

IMAGES_PER_TASK = 256

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Scanned:
    reason: str = ""
    sha256: str = ""
    width: int | None = None
    height: int | None = None
    mode: str | None = None
    warning: str = ""


def list_requested(features: Features) -> Listing:
    """The images of a request, and remarks. Labels number classes as the store does whose basis is taken, where that has them."""
    listing = list_images(str(features.source), features.split, features.limit, features.classes)
    if features.basis in (None, OWN_BASIS) or not listing.classes:
        return listing
    other = ledger_path(resolve_path(str(features.basis)))
    if not other.is_file():
        return listing
    stored = read_ledger(other.parent)
    if not stored.classes and (stored.labels >= 0).any():  # of featurize 0.1.0, or numbers from a file
        remark = f"The labels of {other.parent} have no names, so it is not checked that these number the same classes."
        return replace(listing, remarks=(*listing.remarks, remark))
    return numbered_as(listing, stored.classes)


def warn_of_shared_images(ledger: Ledger, root: Path) -> None:
    """Warn where images are also in the store `root`, whose basis is taken: they are not held out from it."""
    if not ledger_path(root).is_file():
        return
    shared = pc.sum(pc.is_in(ledger.table["sha256"], read_table(ledger_path(root), ["sha256"])["sha256"])).as_py()
    if shared:
        log.warning(
            "%d of %d pictures are also in %s, whose basis is taken: scores against them are not against held-out pictures.",
            shared, ledger.rows, root,
        )  # fmt: skip


def make_ledger(
    root: Path,
    source: str,
    listing: Listing,
    crop: CropRule,
    max_bad: int | str,
    run: Run,
    listing_arguments: Sequence[object] | None = None,
    strict: bool = False,
) -> Ledger:
    """Decode every image once and write the ledger, or take the one that is there.

    An image that can't be decoded is refused with its reason; with `strict` so is one that libjpeg warns of. More than
    `max_bad` of them (a count, or a share like `1%`) is an error, raised as soon as it is certain; so is a ledger of other
    images. `listing_arguments` are those that `list_images` was called with.
    """
    path = ledger_path(root)
    old = read_ledger_metadata(path) if path.exists() else None
    if old is not None:
        check_crop(root, old.get("crop", str(SQUARE)), crop)
        if (ledger := ledger_of_listing(root, listing)) is not None:
            return ledger
        if read_table(path, ["key"])["key"].to_pylist() != [image.key for image in listing.images]:
            raise _other_images(root, old)
        log.info("The files of the images in %s have other paths or times than before; they are read again.", path)
    table = scan(root, listing.images, crop, max_bad, run, strict)
    if old is not None and not _same_rows(table, read_table(path)):
        raise _other_images(root, old)
    ledger = ledger_of(table, source, str(crop), listing.classes)
    write_ledger(root, table, ledger, listing, listing_arguments)
    return ledger


def stored_crop(root: Path) -> str | None:
    """The rule that the boxes of a root's ledger were made by, where it has one."""
    path = ledger_path(root)
    return read_ledger_metadata(path).get("crop", str(SQUARE)) if path.is_file() else None


def check_crop(root: Path, stored: str, crop: CropRule) -> None:
    """Raises UserError where a root's boxes were made by another rule."""
    if stored != str(crop):
        raise UserError(
            f"The images of {root} are cropped by the rule '{stored}', not '{crop}', and a store root has one rule, so that all "
            "its grids agree; choose another --out, or the root's own --crop."
        )


def _other_images(root: Path, metadata: dict[str, str]) -> UserError:
    source = metadata.get("source", "an unknown source")
    return UserError(f"{root} already holds other pictures ({source}); choose another --out.")


def _same_rows(first: pa.Table, second: pa.Table) -> bool:
    return all(first[name].equals(second[name]) for name in ("row", "key", "label", "captions", "sha256", "box"))


def check_strict(root: Path, ledger: Ledger) -> None:
    """Raises UserError where a root holds images that --strict refuses, or does not say whether it does."""
    if CONTENT_DIGEST not in read_ledger_metadata(ledger_path(root)):
        raise UserError(
            f"{root} was begun by an earlier version, which did not look for damaged JPEGs; choose another --out."
        )
    if ledger.damaged:
        raise UserError(
            f"{root} already holds {ledger.damaged} pictures that libjpeg warns of, which --strict refuses; choose another --out."
        )


def scan(
    root: Path, images: Sequence[SourceImage], crop: CropRule, max_bad: int | str, run: Run, strict: bool = False
) -> pa.Table:
    """A line for each image, all of them decoded. Raises UserError for more refused ones than `max_bad`."""
    parts = [images[start : start + IMAGES_PER_TASK] for start in range(0, len(images), IMAGES_PER_TASK)]
    batches: list[pa.RecordBatch] = []
    keys: set[str] = set()
    row = bad = 0
    with tqdm(total=len(images), desc="reading pictures", unit=" pictures", smoothing=0.1) as progress:
        for part, scanned in zip(parts, in_order(run(_scan_part, parts))):
            if strict:
                scanned = [replace(one, reason=one.reason or one.warning) for one in scanned]
            batches.append(_lines(part, scanned, crop, keys, row))
            row += len(part) - batches[-1]["row"].null_count
            bad += sum(bool(one.reason) for one in scanned)
            progress.update(len(part))
            progress.set_postfix_str(f"{bad} refused", refresh=False)
            if bad > allowed_bad(max_bad, len(images)):
                break
    table = pa.Table.from_batches(batches, SCHEMA)
    _check_bad(root, table, len(images), max_bad)
    return table


def allowed_bad(max_bad: int | str, images: int) -> int:
    """How many of so many images may be refused by `--max-bad`: a count, or a share like `1%` rounded down."""
    return int(Decimal(max_bad.rstrip("%")) * images / 100) if isinstance(max_bad, str) else max_bad


def _scan_part(images: Sequence[SourceImage]) -> list[_Scanned]:
    threads = decoding_threads()
    if not threads:
        return list(map(_scan_one, readers(images, False)))
    with ThreadPoolExecutor(threads) as pool:  # beside a GPU there are fewer workers than cores
        return list(pool.map(_scan_one, readers(images, False)))


def _scan_one(reader: Reader) -> _Scanned:
    try:
        data = reader()
        found = examine(data)
    except BadImage as error:
        return _Scanned(reason=str(error))
    except FileNotFoundError:
        return _Scanned(reason="the file is not there")
    except PermissionError:
        return _Scanned(reason="the file may not be read: permission is denied")
    return _Scanned("", hashlib.sha256(data).hexdigest(), *found.image.size, found.mode, found.warning)


def _lines(
    images: Sequence[SourceImage], scanned: Sequence[_Scanned], crop: CropRule, keys: set[str], row: int
) -> pa.RecordBatch:
    """The lines of some images, the first stored one being `row`; `keys` are those of earlier images and get these too.

    The reason of a stored image is what libjpeg warns of in its file, "" where it warns of nothing.
    """
    lines: list[dict[str, Any]] = []
    for image, one in zip(images, scanned, strict=True):
        reason = one.reason or ("an earlier picture has the same key" if image.key in keys else "")
        keys.add(image.key)
        lines.append(
            {
                "row": None if reason else row,
                "key": image.key,
                "source": image.source,
                "offset": image.offset,
                "size": image.size,
                "status": "refused" if reason else "ok",
                "reason": reason or one.warning,
                "label": image.label,
                "captions": list(image.captions),
                "sha256": one.sha256,
                "width": one.width,
                "height": one.height,
                "mode": one.mode,
                "box": list(crop.box(one.width, one.height)) if one.width and one.height else None,
            }
        )
        row += not reason
    return pa.RecordBatch.from_pylist(lines, schema=SCHEMA)


def _check_bad(root: Path, table: pa.Table, total: int, max_bad: int | str) -> None:
    """Raises UserError for too many refused pictures, with the reasons summed up and the lines left in a draft."""
    refused = [line for line in table.select(["key", "status", "reason"]).to_pylist() if line["status"] == "refused"]
    none_left = len(refused) == len(table) == total
    if not none_left and len(refused) <= allowed_bad(max_bad, total):
        return
    with atomic_write(draft_ledger_path(root)) as temporary:
        pq.write_table(table, temporary)
    of = f"{total}" if len(table) == total else f"the first {len(table)}"
    problem = (
        f"None of the {total} pictures can be read" if none_left else f"{len(refused)} of {of} pictures can't be read"
    )
    allowed = "" if none_left else f", more than --max-bad {max_bad} allows"
    remedy = "check SOURCE" if none_left else "fix them or raise --max-bad"
    raise UserError(
        f"{problem}{allowed}: {_summed_up(refused)}; {draft_ledger_path(root)} has a line for each; {remedy}."
    )


def _summed_up(refused: Sequence[dict[str, str]]) -> str:
    """The commonest reasons with how often and where first; numbers in them do not make two of one reason."""
    kinds = [re.sub(r"\d+", "N", line["reason"]) for line in refused]
    common = [
        f"{count} times '{refused[kinds.index(kind)]['reason']}' (first: {refused[kinds.index(kind)]['key']})"
        for kind, count in Counter(kinds).most_common(3)
    ]
    rest = len(set(kinds)) - len(common)
    return "; ".join(common) + (f"; and {rest} other reasons" if rest else "")
