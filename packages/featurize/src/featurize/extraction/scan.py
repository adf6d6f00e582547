"""The scan of a source: each image is decoded once and gets a row of the ledger, or the reason why it has none."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from featurize.errors import UserError
from featurize.execution.decoders import decoded
from featurize.execution.devices import decoders
from featurize.execution.tasks import Run
from featurize.extraction.loader import ROWS_PER_JOB
from featurize.extraction.reading import DENIED, Examined, first_look, readers
from featurize.images.crop import SQUARE, CropRule
from featurize.io.files import atomic_write, read_json, resolve_path, write_json
from featurize.recipe import OWN_BASIS, Features
from featurize.sources import Listing, SourceImage, list_images, numbered_as
from featurize.store.layout import draft_ledger_path, ledger_path
from featurize.store.ledger import (
    CONTENT_DIGEST,
    SCHEMA,
    UNJUDGED,
    Ledger,
    ledger_of,
    ledger_of_listing,
    read_ledger,
    read_ledger_metadata,
    read_table,
    write_ledger,
)

IMAGES_PER_TASK = 256
LINES_PER_BATCH = 4096
UNKNOWN = Examined()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scan:
    """A scan of listed images under way: what is known of each so far, by its position in the listing, and which are refused.

    `folder` is where it is kept, so that another run goes on with it; None where it is not.
    """

    root: Path
    images: Sequence[SourceImage]
    crop: CropRule
    max_bad: int | str
    strict: bool
    folder: Path | None = None
    known: dict[int, Examined] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)


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
    encode: Callable[[Path, Listing, CropRule], pa.Table] | None = None,
) -> Ledger:
    """Decode every image once and write the ledger, or take the one that is there.

    An image that can't be decoded is refused with its reason; with `strict` so is one that libjpeg warns of. More than
    `max_bad` of them (a count, or a share like `1%`) is an error, raised as soon as it is certain; so is a ledger of other
    images. `listing_arguments` are those that `list_images` was called with. Where there is no ledger yet, `encode` makes its
    lines, so that images are encoded while they are decoded for it.
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
    if old is None and encode is not None:
        table = encode(root, listing, crop)
    else:
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
    metadata = read_ledger_metadata(ledger_path(root))
    if UNJUDGED in metadata:
        raise UserError(
            f"{root} was begun with --decoder {metadata[UNJUDGED]}, which does not look for damaged JPEGs as --strict does; "
            "choose another --out."
        )
    if CONTENT_DIGEST not in metadata:
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
    under_way = Scan(root, images, crop, max_bad, strict)
    examine(under_way, run, range(len(images)))
    return finished_table(under_way)


def learn(scan: Scan, positions: Sequence[int], examined: Sequence[Examined | None]) -> None:
    """Enter what was found out about images (None: nothing that was not known), and keep it where the scan has a folder.

    Raises UserError as soon as more images than `max_bad` are refused.
    """
    new = {position: one for position, one in zip(positions, examined, strict=True) if one is not None}
    if not new:
        return
    _enter(scan, new)
    if scan.folder is not None:
        name = hashlib.sha256(repr(sorted(new)).encode()).hexdigest()[:16]
        lines = [[position, *astuple(one)] for position, one in new.items()]
        path = scan.folder / f"{name}.json"
        # `recall` passes over a damaged one.
        write_json(path, {"examined": lines}, wait_for_name=False, wait_for_content=False)
    if len(scan.refused) > allowed_bad(scan.max_bad, len(scan.images)):
        check_bad(scan)


def recall(scan: Scan) -> None:
    """Enter what earlier runs kept in the scan's folder. A file that a power cut damaged says nothing.

    Nor does a refusal for want of permission, which may be mended without a change of the listing: such files are tried again.
    """
    assert scan.folder is not None
    for path in sorted(scan.folder.glob("*.json")) if scan.folder.exists() else ():
        with suppress(UserError, OSError, KeyError, TypeError):
            kept = {position: Examined(*values) for position, *values in read_json(path)["examined"]}
            _enter(scan, {position: one for position, one in kept.items() if one.reason != DENIED})


def _enter(scan: Scan, new: Mapping[int, Examined]) -> None:
    scan.known.update(new)
    scan.refused.update(position for position, one in new.items() if one.refusal(scan.strict))


def examine(scan: Scan, run: Run, positions: Iterable[int]) -> None:
    """Decode those of some images of which nothing is known yet."""
    rest = [position for position in positions if position not in scan.known]
    parts = [rest[start : start + IMAGES_PER_TASK] for start in range(0, len(rest), IMAGES_PER_TASK)]
    tasks = ([scan.images[position] for position in part] for part in parts)
    with tqdm(total=len(rest), desc="reading pictures", unit=" pictures", smoothing=0.1, disable=not rest) as progress:
        for index, examined in run(_examine_part, tasks):
            learn(scan, parts[index], examined)
            progress.update(len(examined))
            progress.set_postfix_str(f"{len(scan.refused)} refused", refresh=False)


def _examine_part(images: Sequence[SourceImage]) -> list[Examined]:
    count = decoders()
    if not count:
        return _examine(images)
    jobs = [images[start : start + ROWS_PER_JOB] for start in range(0, len(images), ROWS_PER_JOB)]
    return [one for examined, _ in decoded(_examine, jobs, count) for one in examined]


def _examine(images: Sequence[SourceImage], slot: object = None) -> list[Examined]:
    return [first_look(reader).examined for reader in readers(images, [False] * len(images))]


def finished_table(scan: Scan) -> pa.Table:
    """The lines of all images. Raises UserError where too many of them are refused."""
    assert len(scan.known) == len(scan.images)
    table = table_of(scan, scan.known)
    refused = table["row"].null_count
    if refused > allowed_bad(scan.max_bad, len(table)) or refused == len(table):
        check_bad(scan)
    return table


def table_of(scan: Scan, known: Mapping[int, Examined]) -> pa.Table:
    """A line for each image, of which so much is `known`: one that is not has a row, and no digest.

    The reason of a stored image is what libjpeg warns of in its file, "" where it warns of nothing.
    """
    batches: list[pa.RecordBatch] = []
    keys: set[str] = set()
    row = 0
    for start in range(0, len(scan.images), LINES_PER_BATCH):
        images = scan.images[start : start + LINES_PER_BATCH]
        lines: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        for position, image in enumerate(images, start):
            one = known.get(position, UNKNOWN)
            reason = one.refusal(scan.strict) or ("an earlier picture has the same key" if image.key in keys else "")
            keys.add(image.key)
            box = list(scan.crop.box(one.width, one.height)) if one.width and one.height else None
            values = (
                None if reason else row, image.key, image.source, image.offset, image.size, "refused" if reason else "ok",
                reason or one.warning, image.label, list(image.captions), one.sha256, one.width, one.height, one.mode, box,
            )  # fmt: skip
            for column, value in zip(lines.values(), values, strict=True):
                column.append(value)
            row += not reason
        batches.append(pa.RecordBatch.from_pydict(lines, schema=SCHEMA))
    return pa.Table.from_batches(batches, SCHEMA)


def allowed_bad(max_bad: int | str, images: int) -> int:
    """How many of so many images may be refused by `--max-bad`: a count, or a share like `1%` rounded down."""
    return int(Decimal(max_bad.rstrip("%")) * images / 100) if isinstance(max_bad, str) else max_bad


def check_bad(scan: Scan) -> NoReturn:
    """Raises UserError for too many refused images, with the reasons summed up and the lines of all that are known in a draft."""
    table = table_of(scan, scan.known).take(sorted(scan.known))
    refused = [line for line in table.select(["key", "status", "reason"]).to_pylist() if line["status"] == "refused"]
    total, path = len(scan.images), draft_ledger_path(scan.root)
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary)
    none_left = len(refused) == total
    of = f"{total} pictures" if len(table) == total else f"the {len(table)} pictures that were tried"
    problem = f"None of the {total} pictures can be read" if none_left else f"{len(refused)} of {of} can't be read"
    allowed = "" if none_left else f", more than --max-bad {scan.max_bad} allows"
    remedy = "check SOURCE" if none_left else "fix them or raise --max-bad"
    raise UserError(f"{problem}{allowed}: {_summed_up(refused)}; {path} has a line for each; {remedy}.")


def _summed_up(refused: Sequence[dict[str, str]]) -> str:
    """The commonest reasons with how often and where first; numbers in them do not make two of one reason."""
    kinds = [re.sub(r"\d+", "N", line["reason"]) for line in refused]
    common = [
        f"{count} times '{refused[kinds.index(kind)]['reason']}' (first: {refused[kinds.index(kind)]['key']})"
        for kind, count in Counter(kinds).most_common(3)
    ]
    rest = len(set(kinds)) - len(common)
    return "; ".join(common) + (f"; and {rest} other reasons" if rest else "")
