"""Files written whole or not at all, that outlast a power cut, and their digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nestgen.errors import UserError

OWN_DIGEST = "document_sha256"  # of all else that a document says


def sync(path: Path) -> None:
    """Returns once a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises UserError with the path where the system refuses to write: a full disk says nothing of where it is."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write {path} ({reason}); make room there, or see who may write there, and run the same command again"
        ) from None


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, on the disk too."""
    new = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync(folder.parent)


def free_bytes(path: Path) -> int:
    """Bytes that are free on the disk of a path, which need not be there yet."""
    path = path.resolve()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free


@contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path in the same folder, which becomes `path` when the block ends without an error.

    After a power cut `path` is what it was or what was written. Not so if it is not `durable`: then it may be empty. Raises
    UserError where it cannot be written.
    """
    # Not by the number of the process, which is 1 in every container, and one of several threads.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    with writing(path):
        make_folder(path.parent)
        try:
            yield temporary
            if durable:
                sync(temporary)
            os.replace(temporary, path)
            if durable:
                sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def json_sha256(document: Any) -> str:
    """SHA-256 of a document as JSON with sorted keys: what it says, whatever its bytes."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def with_digest(document: dict[str, Any]) -> dict[str, Any]:
    """A document with the digest of all that it says, which `without_digest` compares; one that it has already goes."""
    said = {key: value for key, value in document.items() if key != OWN_DIGEST}
    return said | {OWN_DIGEST: json_sha256(json.loads(json.dumps(said)))}  # as it will be read: tuples are lists


def without_digest(document: dict[str, Any]) -> dict[str, Any]:
    """What a document says. Raises ValueError where that is not what was written; one without a digest is believed."""
    said = {key: value for key, value in document.items() if key != OWN_DIGEST}
    if OWN_DIGEST in document and document[OWN_DIGEST] != json_sha256(said):
        raise ValueError(f"its {OWN_DIGEST} differs")
    return said


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a document with its digest. Raises ValueError for NaN, which JSON does not have."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(with_digest(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a document, without its digest. Raises UserError for a file that is damaged or not there."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; check the path") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise UserError(f"{path} cannot be read: it is not JSON; was it cut off?") from None
    try:
        return without_digest(document) if isinstance(document, dict) else document
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); restore it from a copy, make it again, or, if you edited it, remove that key"
        ) from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
