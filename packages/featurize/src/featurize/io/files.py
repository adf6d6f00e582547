"""Paths on a local disk or in a bucket (through fsspec), and files written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from featurize.errors import UserError
from featurize.io.home import expand_home

NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}  # from file systems that can't sync folders


def resolve_path(address: str | Path) -> Path:
    """The path that an address names: a local one made absolute, or for `s3://bucket/root` and its like a UPath.

    A UPath has the methods of a Path and reaches its files through fsspec. Raises UserError for a protocol that is unknown
    or whose library is not installed.
    """
    text = str(address)
    if "://" not in text:
        return expand_home(text).resolve()
    from upath import UPath

    protocol = text.partition("://")[0]
    try:
        # Without s3fs's cache of listings, which does not see what other processes write.
        path = UPath(text, use_listings_cache=False)
        _ = path.fs  # fsspec imports the protocol's library here
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{text} can't be reached: {' '.join(str(error).split())}; install the fsspec library of {protocol}://."
        ) from None
    return cast(Path, path)


def is_local(path: Path) -> bool:
    """Whether the path is on a file system that this machine mounts."""
    return isinstance(path, Path)


@contextmanager
def atomic_write(path: Path, wait_for_name: bool = True, wait_for_content: bool = True) -> Iterator[Path]:
    """A temporary local path, which replaces `path` when the block ends without an error.

    The data is on the disk before the name is, so that a power cut leaves the old file or the new one, never half of it; with
    `wait_for_name` the new one, once this returns. Without `wait_for_content` it may leave half of it: for a file that is taken
    for none then. In a bucket an object appears whole by itself.
    """
    if not is_local(path):
        with tempfile.TemporaryDirectory(prefix="featurize-") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            path.write_bytes(temporary.read_bytes())
        return
    make_folder(path.parent)
    # Not by the number of the process, which is 1 in every container, and one of several threads.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with naming(path):
            yield temporary
            if wait_for_content:
                to_disk(temporary)
            os.replace(temporary, path)
            if wait_for_name:
                to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Give a file or an object another name in the same file system or bucket; nothing waits until the disk holds it."""
    if is_local(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    else:
        source.fs.mv(source.path, target.path)  # type: ignore[attr-defined]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that does not say of which file it is, as of a full disk, is said to be of `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def to_disk(path: Path) -> bool:
    """Wait until the disk holds a local file, or a folder's list of names; False where the file system can't sync folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC or not path.is_dir():
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def make_folder(folder: Path) -> None:
    """Make a local folder, with those above it; the disk holds the names of those that are new."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        to_disk(path.parent)


def write_json(path: Path, document: dict[str, Any], wait_for_name: bool = True, wait_for_content: bool = True) -> None:
    """As `atomic_write` does."""
    with atomic_write(path, wait_for_name, wait_for_content) as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def json_sha256(document: Any) -> str:
    """SHA-256 of a document as JSON with sorted keys: what it says, whatever its bytes."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError for a file that is damaged, OSError for one that is not there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(
            f"{path} is damaged (not valid JSON); remove it and run the command that made it again."
        ) from None


def remove_leftovers(root: Path) -> None:
    """Remove what killed processes left half-written below a local folder: temporary files of zarr and of `atomic_write`."""
    if is_local(root):
        for pattern in ("*.partial", ".*.tmp"):
            for path in root.rglob(pattern):
                path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder and what it holds, wherever it is."""
    for path in sorted(folder.rglob("*"), key=lambda path: len(path.parts), reverse=True):
        path.rmdir() if is_local(path) and path.is_dir() else path.unlink(missing_ok=True)
    if is_local(folder):
        folder.rmdir()
