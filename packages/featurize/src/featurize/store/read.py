"""Sealed arrays for reading, and rows of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurize.errors import UserError
from featurize.io.files import is_local, read_json
from featurize.store.layout import chunk_path, has_metadata, is_sealed, list_arrays, seal_path
from featurize.store.metadata import FORMAT, ArrayMetadata, read_metadata, rows_of_block

if TYPE_CHECKING:  # its import takes longer than asking again
    import zarr


def zarr_address(path: Path) -> dict[str, Any]:
    """The arguments by which zarr finds an array on a local disk or in a bucket."""
    options = {} if is_local(path) else dict(path.storage_options)  # type: ignore[attr-defined]
    return {"store": str(path)} | ({"storage_options": options} if options else {})


def open_array(path: Path, mode: Any = "r") -> zarr.Array:
    """The zarr array at a path of a local disk or of a bucket."""
    import zarr

    return zarr.open_array(**zarr_address(path), mode=mode)


def open_sealed(path: Path) -> zarr.Array:
    """A finished array for reading. Raises UserError as `read_sealed_metadata` does."""
    read_sealed_metadata(path)
    return open_array(path)


def read_sealed_metadata(path: Path) -> ArrayMetadata:
    """The metadata of a finished array. Raises UserError when it is missing, unfinished or damaged (of chunks only the sizes
    are compared)."""
    if not is_sealed(path):
        if not has_metadata(path):
            raise UserError(f"There is no store at {path}; `featurize extract` or `featurize levels` makes it.")
        raise UserError(f"The store {path} is unfinished; run the command that was making it again, it goes on.")
    metadata = read_metadata(path)
    if metadata.attributes.get("format") != FORMAT:
        raise UserError(f"{path} is not in the format {FORMAT}; make it again with this version of featurize.")
    sizes = dict(chunk_sizes(path))
    for block, record in enumerate(read_json(seal_path(path))["blocks"]):
        chunk = chunk_path(path, block, len(metadata.shape)).relative_to(path).as_posix()
        if sizes.get(chunk, 0) != record["bytes"]:
            raise UserError(
                f"The store {path} is damaged: {chunk} has {sizes.get(chunk, 0)} bytes instead of {record['bytes']}; "
                f"run `featurize repair` to fix it."
            )
    return metadata


def sealed_levels(folder: Path) -> list[Path]:
    """The sealed levels of an encoder's folder, from the finest grid to the coarsest."""
    levels = [path for path in sealed_arrays(folder.parent, "level") if path.parent == folder]
    return sorted(levels, key=_from_fine_to_coarse)


def sealed_arrays(root: Path, kind: str) -> list[Path]:
    """The sealed arrays of a root that are of one kind."""
    return [path for path in list_arrays(root) if is_sealed(path) and read_metadata(path).attributes["kind"] == kind]


def _from_fine_to_coarse(level: Path) -> tuple[int, int]:
    height, width, channels = map(int, level.stem.split("x"))
    return -height * width, -channels


def chunk_sizes(path: Path) -> Iterator[tuple[str, int]]:
    """(name below the array, bytes) of each of its files; of a bucket in one listing."""
    if is_local(path):
        yield from (
            (file.relative_to(path).as_posix(), file.stat().st_size) for file in path.rglob("c/**/*") if file.is_file()
        )
        return
    files = path.fs.find(path.path, detail=True)  # type: ignore[attr-defined]
    yield from ((name.partition(f"{path.name}/")[2], int(entry["size"])) for name, entry in files.items())


def read_rows(array: zarr.Array, rows: np.ndarray, view: int | None = None) -> np.ndarray:
    """The given rows (one view, or all), in the given order; of a local array only their pages are read."""
    rows_per_block = array.chunks[0]
    shape = array.shape[1:] if view is None else array.shape[2:]
    values = np.empty((len(rows), *shape), dtype=array.dtype)
    for block in np.unique(rows // rows_per_block):
        chosen = np.flatnonzero(rows // rows_per_block == block)
        within = rows[chosen] - int(block) * rows_per_block
        chunk = _mapped_block(array, int(block))
        values[chosen] = chunk[within] if view is None else chunk[within, view]
    return values


def read_block(array: zarr.Array, block: int) -> np.ndarray:
    """The rows of a block."""
    rows = rows_of_block(block, array.chunks[0], array.shape[0])
    return np.asarray(array[rows.start : rows.stop])


def _mapped_block(array: zarr.Array, block: int) -> np.ndarray:
    """A block of rows, mapped where it is a file on a local disk (chunks are uncompressed)."""
    from zarr.storage import LocalStore

    if isinstance(array.store, LocalStore):
        chunk = chunk_path(array.store.root / array.path, block, array.ndim)
        return np.asarray(np.memmap(chunk, array.dtype, "r", shape=array.chunks))
    return read_block(array, block)
