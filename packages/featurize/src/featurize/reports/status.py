"""What of a recipe's stores is there: what `featurize` says without a command in a folder with a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from featurize.errors import UserError
from featurize.io.files import resolve_path
from featurize.io.lock import holder
from featurize.recipe import DEFAULT_RECIPE, Features, Request
from featurize.store.layout import (
    base_path,
    encoder_folder,
    is_sealed,
    ledger_path,
    level_path,
    list_arrays,
    written_blocks,
)
from featurize.store.ledger import read_ledger
from featurize.store.metadata import read_metadata, spec_or_none


def status(request: Request) -> str:
    """Lines about the ledger and each array that the recipe asks for, and the next command."""
    features = request.features
    root = resolve_path(features.out)
    lines = [f"{DEFAULT_RECIPE}: {features.source or 'no source'} into {root}", ""]
    if (lock := holder(root)) is not None:
        return "\n".join([*lines, f"An extraction is under way: {root} is {lock}.", "", _HELP])
    parts = list(_parts(request, root))
    lines += [f"{name:<12} {state}" for name, state, _ in parts]
    todo = next((command for *_, command in parts if command), "nestgen")
    return "\n".join([*lines, "", f"Next: {todo}{_DONE if todo == 'nestgen' else ''}", "", _HELP])


_HELP = "`featurize --help` lists all commands."
_DONE = "    (says where the training stands; `featurize knn-viz` shows what each level finds similar)"

# Name of a part, what there is of it, and the command that makes what is missing.
Parts = Iterator[tuple[str, str, str | None]]


def _parts(request: Request, root: Path) -> Parts:
    if not ledger_path(root).is_file():
        yield "images", "not listed yet", "featurize extract"
        return
    try:
        ledger = read_ledger(root)
    except UserError as error:
        yield "images", str(error), f"featurize repair {root}"
        return
    yield "images", f"{ledger.rows:,} rows, {ledger.refused:,} refused", None
    for name, array in _wanted(request, root):
        yield name, *_state(array, root)


def _wanted(request: Request, root: Path) -> Iterator[tuple[str, Path | None]]:
    """The arrays that a recipe asks for; None for a z_0 of which nothing is there, as only its weights tell its shape."""
    folder = encoder_folder(root, request.features.encoder)
    yield "base store", base_path(folder)
    yield "z_0", _z0(request.features, root)
    yield from ((f"z_{number}", level_path(folder, shape)) for number, shape in enumerate(request.levels, 1))
    if request.features.text is not None:
        yield "captions", next((path for path in list_arrays(root) if path.parent.name == "text"), None)


def _z0(features: Features, root: Path) -> Path | None:
    """An encoder of the codec's name has its arrays in the same folder; one that is damaged may be `z_0`."""
    folder = root / features.z0.partition(":")[0]
    specs = ((path, spec_or_none(path)) for path in list_arrays(root) if path.parent == folder)
    return next((path for path, spec in specs if spec is None or spec.kind == "z0"), None)


def _state(array: Path | None, root: Path) -> tuple[str, str | None]:
    """What there is of an array, and the command that makes the rest."""
    if array is None or array not in list_arrays(root):
        return "not there", "featurize extract"
    name = array.relative_to(root)
    if not is_sealed(array):
        return f"unfinished, {len(written_blocks(array))} blocks are written, in {name}", "featurize extract"
    try:
        size = read_metadata(array).nbytes
    except UserError as error:
        return str(error), f"featurize repair {root}"
    return f"{size / 1e6:,.1f} MB in {name}", None
