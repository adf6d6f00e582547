"""Files on this machine or remote ones: a path, or an address of fsspec like `s3://bucket/train-000000.tar`."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from glob import escape, glob
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import quote, unquote_to_bytes

import fsspec

from featurize.errors import UserError
from featurize.io.home import expand_home

T = TypeVar("T")

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
DEADLINE = 60.0  # seconds after which no further try is made
FIRST_WAIT = 0.5  # seconds: the second try comes within so many, at random; each further one within twice as many
LONGEST_WAIT = 10.0  # seconds
# What a disk or a network share says that may be well again when it is asked once more. A stale handle is one of a file
# that the server of an NFS share has lost sight of: opened again, it is found.
PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.EAGAIN,
}  # fmt: skip
WINDOW = 16 << 10  # bytes a request fetches ahead: a sample's annotations and the next header, not the next picture
AT_ONCE = 16  # requests side by side
MAX_TEXT = 1 << 30  # bytes of a text file that is read whole
LATIN1_HINT = "save it as UTF-8, for instance by `iconv -f LATIN1 -t UTF-8`"


@dataclass(frozen=True, slots=True)
class File:
    """A file that exists. `version` changes when its content does: the time of change in ns, or an ETag.

    `identity` tells a local file from another one that was put in its place with the same size and time.
    """

    address: str
    size: int
    version: int | str
    identity: tuple[int, ...] = ()
    is_plain: bool = True  # and not a FIFO or a device, which would not end when it is read


def address_of(path: str) -> str:
    """The address of a local path: the path itself, or where its bytes are not UTF-8, `file:/caf%E9.jpg`.

    So an address is text that Parquet and JSON can hold. It has no `//`, which keeps it apart from fsspec's addresses.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        return f"file:{quote(os.fsencode(path))}"
    return path


def local_path(address: str) -> str:
    """The path of an address on this machine, the inverse of `address_of`."""
    return os.fsdecode(unquote_to_bytes(address[5:])) if address.startswith("file:/") else address


def is_remote(address: str) -> bool:
    return "://" in address


def find(address: str) -> File:
    """Size and version of one file. Raises FileNotFoundError, and UserError for what is no plain file, like a FIFO."""
    if not is_remote(address):
        file = _file_of_status(address, os.stat(local_path(address)))
        if not file.is_plain:
            raise UserError(f"{address} is not a plain file; check its path.")
        return file
    return _file_of(address, with_retries(address, lambda: _file_system(address).info(address)))


def read_range(address: str, offset: int, size: int) -> bytes:
    """The bytes [offset, offset + size); of a local file fewer where it ends. Raises FileNotFoundError, OSError for a disk that
    fails for longer than DEADLINE, and UserError for a server that does."""
    if not is_remote(address):
        return with_retries(address, lambda: _read_local(address, offset, size))
    if size == 0:  # no range, but does it exist?
        find(address)
        return b""
    data = with_retries(address, lambda: _file_system(address).cat_file(address, start=offset, end=offset + size))
    if len(data) != size:
        raise UserError(
            f"{address} gave {len(data)} bytes instead of {size}: it has changed, or its server serves no byte ranges."
        )
    return data


def _read_local(address: str, offset: int, size: int) -> bytes:
    with open(local_path(address), "rb", buffering=0) as file:
        file.seek(offset)
        parts = []
        while size > 0 and (part := file.read(size)):
            parts.append(part)
            size -= len(part)
    return b"".join(parts)


def read_text(address: str) -> str:
    """A whole text file. Raises FileNotFoundError, and UserError for one that is not UTF-8, with the line."""
    size = find(address).size
    if size > MAX_TEXT:
        raise UserError(f"{address} has {size:,} bytes, too many for a text file; check its path.")
    data = read_range(address, 0, size)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"Line {line} of {address} is not UTF-8 text (byte 0x{data[error.start]:02X}); {LATIN1_HINT}."
        ) from None


def open_ranged(file: File) -> BinaryIO:
    """The file opened for reading at any offset; a remote one is fetched by ranges, a little ahead."""
    if not is_remote(file.address):
        return open(local_path(file.address), "rb")
    options: dict[str, Any] = {"block_size": WINDOW, "cache_type": "readahead", "size": file.size}
    return cast(BinaryIO, _file_system(file.address).open(file.address, "rb", **options))


def exists(address: str) -> bool:
    if is_remote(address):
        return bool(with_retries(address, lambda: _file_system(address).exists(address)))
    return Path(address).exists()


def is_folder(address: str) -> bool:
    if address.startswith(("http://", "https://")):
        return False
    if is_remote(address):
        return bool(with_retries(address, lambda: _file_system(address).isdir(address)))
    return Path(address).is_dir()


def existing_folder(address: str) -> str:
    """The address of a folder, without a slash at the end. Raises UserError where there is none."""
    if address.startswith(("http://", "https://")):
        raise UserError(f"{address} can't be listed, the web has no folders; put the images into shards and use wds:.")
    folder = address.rstrip("/") if is_remote(address) else str(expand_home(address).resolve())
    if not is_folder(folder):
        raise UserError(f"The folder {folder} is not there; check the path of SOURCE.")
    return folder


def matching(pattern: str) -> list[str]:
    """The files that a pattern with wildcards matches, sorted; the `.tar` files of a folder; any other address unchanged."""
    if not is_remote(pattern):
        pattern = str(expand_home(pattern).absolute())
        if Path(pattern).is_file():
            return [address_of(pattern)]
    if is_folder(pattern):
        pattern = f"{escape(pattern.rstrip('/'))}/*.tar"
    if not any(sign in pattern for sign in "*?[") or pattern.startswith(("http://", "https://")):
        return [pattern]
    if not is_remote(pattern):
        return [address_of(path) for path in sorted(glob(pattern))]
    system = _file_system(pattern)
    return sorted(system.unstrip_protocol(name) for name in with_retries(pattern, lambda: system.glob(pattern)))


def subfolders(root: str) -> list[str]:
    """Names of the folders directly in `root`, sorted."""
    return sorted(name for name, file in _entries(root) if file is None)


def walk(root: str, folders: list[str] | None = None) -> Iterator[tuple[str, File]]:
    """(path below `root`, file) of every file, sorted by that path. With `folders`, only of these, which are directly in `root`.

    Hidden files and folders are skipped; links to folders are followed, though not in circles. The folders are read
    side by side, because each answer of a network file system takes its time, and the size of each file is read once.
    """
    entries = (
        _entries(root) if folders is None else [(name, None) for name in sorted(folders, key=lambda name: f"{name}/")]
    )
    above = frozenset({root if is_remote(root) else os.path.realpath(root)})
    with ThreadPoolExecutor(AT_ONCE) as pool:
        parts: list[Any] = [file or pool.submit(_below, f"{root}/{name}", f"{name}/", above) for name, file in entries]
        try:
            for index, (name, _) in enumerate(entries):
                part, parts[index] = parts[index], None
                if isinstance(part, File):
                    yield name, part
                elif part is not None:
                    yield from part.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def with_retries(address: str, action: Callable[[], T]) -> T:
    """What the action gives, tried again for DEADLINE seconds: a disk or a network that hiccups must not end a run of days.

    The waits are random, so that workers that failed together do not come back together. Of a local address only what is
    among PASSING is tried again, and what the action raises at the end is raised. Of a remote one: FileNotFoundError, and
    UserError when there is no answer at the end or no permission.
    """
    import tenacity

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: _may_pass(address, error)),
        stop=tenacity.stop_before_delay(DEADLINE),
        wait=tenacity.wait_random_exponential(FIRST_WAIT, LONGEST_WAIT),
        reraise=True,
    )
    try:
        return retrying(action)
    except Exception as error:  # each file system has exceptions of its own
        if not is_remote(address) or isinstance(error, (FileNotFoundError, UserError)):
            raise
        if isinstance(error, PermissionError):
            raise UserError(f"{address} may not be read ({_short(error)}); check the credentials.") from None
        raise UserError(
            f"{address} can't be read ({_short(error)}), tried {retrying.statistics['attempt_number']} times in {DEADLINE:g} s; "
            "check address, network and credentials, and run the same command again, it goes on."
        ) from None


def _may_pass(address: str, error: BaseException) -> bool:
    """Whether the same request may do better in a while."""
    if is_remote(address):
        return isinstance(error, Exception) and not isinstance(error, (FileNotFoundError, PermissionError, UserError))
    return isinstance(error, OSError) and error.errno in PASSING


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _file_system(address: str) -> Any:
    return _file_system_of(address.partition("://")[0])


@cache  # one a process: fsspec's own instances are one a thread
def _file_system_of(protocol: str) -> Any:
    try:
        # Without its cache of listings, which would not see that a file has changed.
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except ImportError:
        package = PACKAGES.get(protocol)
        fix = f"run `pip install {package}`" if package else "install what fsspec needs for it"
        raise UserError(f"To read {protocol}:// a package is missing: {fix}.") from None
    except ValueError:
        raise UserError(f"Addresses with {protocol}:// can't be read; use s3://, gs:// or https://.") from None


def _file_of(address: str, info: dict[str, Any]) -> File:
    if info.get("size") is None:
        raise UserError(
            f"The server of {address} does not say how long it is, so it can't be read in parts; copy it to this machine."
        )
    marks = (info.get(key) for key in ("ETag", "etag", "LastModified", "mtime", "updated", "created"))
    return File(address, info["size"], str(next((mark for mark in marks if mark), "")))


def _entries(folder: str) -> list[tuple[str, File | None]]:
    """(name, file or None for a folder) directly in a folder, sorted as the paths of all files below it would be."""
    found: list[tuple[str, File | None]] = []
    if is_remote(folder):
        for entry in with_retries(folder, lambda: _file_system(folder).ls(folder, detail=True)):
            address = _file_system(folder).unstrip_protocol(entry["name"].rstrip("/"))
            found.append(
                (address.rpartition("/")[2], None if entry["type"] == "directory" else _file_of(address, entry))
            )
    else:
        with os.scandir(folder) as entries:
            found = [(entry.name, _file_of_entry(entry)) for entry in entries]
    return sorted(
        (pair for pair in found if not pair[0].startswith(".")), key=lambda pair: pair[0] if pair[1] else f"{pair[0]}/"
    )


def _file_of_entry(entry: os.DirEntry[str]) -> File | None:
    address = address_of(entry.path)
    try:
        return None if entry.is_dir() else _file_of_status(address, entry.stat())
    except FileNotFoundError:  # a broken link: the ledger will say so
        return File(address, 0, 0)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return File(address, 0, 0, is_plain=False)  # a link in a circle


def _file_of_status(address: str, status: os.stat_result) -> File:
    identity = (status.st_ctime_ns, status.st_ino)
    return File(address, status.st_size, status.st_mtime_ns, identity, stat.S_ISREG(status.st_mode))


def _below(folder: str, prefix: str, above: frozenset[str]) -> list[tuple[str, File]]:
    """(prefix + path, file) of every file below a folder; `above` are the real folders on the way to it."""
    if is_remote(folder):
        system = _file_system(folder)
        found = with_retries(folder, lambda: system.find(folder, detail=True))
        start = len(system._strip_protocol(folder)) + 1
        pairs = [(prefix + name[start:], _file_of(system.unstrip_protocol(name), info)) for name, info in found.items()]
        return sorted((pair for pair in pairs if "/." not in f"/{pair[0]}"), key=lambda pair: pair[0])
    real = os.path.realpath(folder)
    if real in above:
        return []
    files: list[tuple[str, File]] = []
    for name, file in _entries(folder):
        if file is None:
            files += _below(os.path.join(folder, name), f"{prefix}{name}/", above | {real})
        else:
            files.append((prefix + name, file))
    return files
