"""Webdataset shards: tar files whose members with one key make one sample."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from glob import glob
from pathlib import Path

from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from featurize.errors import UserError
from featurize.sources import Listing, Picture

PICTURES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "gif", "tif", "tiff")
END_OF_ARCHIVE = 2 * tarfile.BLOCKSIZE  # zero bytes


def list_shards(address: str, split: str, limit: int | None) -> Listing:
    """The samples of local shards, in the order of the shards and of the members in them.

    `address` may hold braces (`train-{000000..000009}.tar`), wildcards and `::` between several. A sample's label is its
    `.cls`; its captions are the `.txt`, or `captions` (or `caption`) of its `.json`, which may hold a `label` as well.
    """
    pictures: list[Picture] = []
    bare = 0
    for shard in _expand(address):
        for key, members in _samples(shard):
            picture = next((extension for extension in PICTURES if extension in members), None)
            if picture is None:
                bare += 1
                continue
            offset, size = members[picture]
            label, captions = _annotations(shard, key, members)
            pictures.append(Picture(key, str(shard), offset, size, label, captions))
            if len(pictures) == limit:
                break
        if len(pictures) == limit:
            break
    remarks = [f"{bare} samples in the shards have no picture and were passed over."] if bare else []
    if len({picture.key for picture in pictures}) < len(pictures):
        # Some data sets number the samples anew in each shard.
        pictures = [replace(picture, key=f"{Path(picture.source).stem}/{picture.key}") for picture in pictures]
        remarks.append("Keys repeat, so the shard's name was put before each.")
    return Listing(tuple(pictures), tuple(remarks))


def _expand(address: str) -> list[Path]:
    shards: list[Path] = []
    for pattern in expand_urls(address):
        found = sorted(glob(pattern)) if any(sign in pattern for sign in "*?[") else [pattern]
        if not found:
            raise UserError(f"No shard is named like {pattern}; check the path after wds:.")
        shards += [Path(name).expanduser().resolve() for name in found]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"The shard {shard} is not there; check the path after wds:.")
    return shards


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {extension: (offset, size)}) for each run of members with one key."""
    current: str | None = None
    members: dict[str, tuple[int, int]] = {}
    for name, offset, size in _members(shard):
        key, extension = base_plus_ext(name)
        if key is None:
            continue
        if key != current:
            if current is not None:
                yield current, members
            current, members = key, {}
        members.setdefault(extension.lower(), (offset, size))
    if current is not None:
        yield current, members


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    found = 0
    size = shard.stat().st_size
    end = 0
    try:
        with tarfile.open(shard, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if end > size:
                    raise tarfile.ReadError("unexpected end of data")
                if member.isfile():
                    found += 1
                    yield member.name, member.offset_data, member.size
    except tarfile.TarError as error:
        # A file that is no tar at all also ends here, with nothing found.
        raise _cut_short(shard, found, str(error)) from None
    if size < end + END_OF_ARCHIVE:
        raise _cut_short(shard, found, "the end-of-archive mark is missing")


def _cut_short(shard: Path, found: int, problem: str) -> UserError:
    return UserError(
        f"The shard {shard} ends early or is damaged after {found} members ({problem}); bring a complete copy, or leave it out."
    )


def _annotations(shard: Path, key: str, members: dict[str, tuple[int, int]]) -> tuple[int | None, tuple[str, ...]]:
    def text(extension: str) -> str:
        offset, size = members[extension]
        with shard.open("rb") as file:
            file.seek(offset)
            return file.read(size).decode("utf-8", errors="replace")

    label: int | None = None
    captions: tuple[str, ...] = ()
    try:
        if "json" in members:
            document = json.loads(text("json"))
            if isinstance(document, dict):
                listed = document.get("captions") or document.get("caption") or []
                captions = (listed,) if isinstance(listed, str) else tuple(str(caption) for caption in listed)
                label = document.get("label") if isinstance(document.get("label"), int) else None
        if "txt" in members:
            captions = (" ".join(text("txt").split()),)
        if "cls" in members:
            label = int(text("cls"))
    except ValueError as error:
        raise UserError(f"The annotations of sample '{key}' in {shard} can't be read: {error}.") from None
    return label, captions
