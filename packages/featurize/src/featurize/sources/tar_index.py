"""What one tar shard holds: its samples with their offsets, labels and captions, from headers and annotations alone."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from featurize.errors import UserError
from featurize.io.addresses import File, find, open_ranged, with_retries
from featurize.sources.index_cache import cached_index
from featurize.sources.listing import EXTENSIONS, Index, SourceImage

ANNOTATIONS = ("cls", "txt", "json")
END_OF_ARCHIVE = 2 * tarfile.BLOCKSIZE  # zero bytes
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A file in the shard; `text` is its content where that is an annotation."""

    name: str
    offset: int
    size: int
    text: bytes


@dataclass
class Sample:
    """Members with one key, by extension."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def image(self) -> Member | None:
        return next((self.members[extension] for extension in EXTENSIONS if extension in self.members), None)


def index_of(address: str) -> Index:
    """The index of the shard at an address. Raises UserError for one that is not there, compressed, cut short or damaged."""
    try:
        shard = find(address)
        return cached_index(shard, lambda: with_retries(address, lambda: _scan(shard)))
    except FileNotFoundError:
        raise UserError(f"The shard {address} is not there; check the path after wds:.") from None


def _scan(shard: File) -> Index:
    odd: Counter[str] = Counter()
    first: dict[str, str] = {}

    def note(what: str, where: str) -> None:
        odd[what] += 1
        first.setdefault(what, where)

    with open_ranged(shard) as file:
        members = list(_members(file, shard, 0, shard.size))
    samples = list(_runs(members, _split_at_first_dot))
    if samples and not any(sample.image for sample in samples):
        # Names like `photo.0001.jpg`: by webdataset's rule, all would be one sample `photo` without a picture.
        by_last_dot = list(_runs(members, _split_at_last_dot))
        if any(sample.image for sample in by_last_dot):
            samples = by_last_dot
            note(
                "shards have keys with dots, read up to the last dot and not, as webdataset does, to the first",
                samples[0].key,
            )
    images = []
    for sample in _joined(samples, note):
        image = sample.image
        if image is None:
            annotated = any(extension in sample.members for extension in ANNOTATIONS)
            what = "labels or captions" if annotated else "files"
            note(f"samples have {what} and no picture, and were passed over", sample.key)
            continue
        label, captions = _annotations(shard, sample)
        images.append(SourceImage(sample.key, shard.address, image.offset, image.size, label, captions, shard.version))
    return Index(tuple(images), tuple((what, count, first[what]) for what, count in odd.items()))


def _members(file: BinaryIO, shard: File, start: int, end: int, folder: str = "") -> Iterator[Member]:
    """The files in the archive between two offsets. A tar in it, as ImageNet's official one has for each class, is opened too."""
    file.seek(start)
    magic = file.read(6)
    kind = next((kind for mark, kind in COMPRESSED.items() if magic.startswith(mark)), None)
    if kind:
        raise UserError(
            f"The shard {shard.address} is compressed ({kind}), so no picture can be read out of it; unpack it."
        )
    file.seek(start)
    found = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (entry := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps them all, a kilobyte each
                if tar.offset > end:
                    raise tarfile.ReadError("unexpected end of data")
                if not entry.isfile() or entry.issparse():
                    continue
                found += 1
                name, offset, size = folder + entry.name, entry.offset_data, entry.size
                if name.endswith(".tar"):
                    yield from _members(file, shard, offset, offset + size, f"{name.removesuffix('.tar')}/")
                    continue
                text = b""
                if name.rpartition(".")[2].lower() in ANNOTATIONS:
                    file.seek(offset)
                    text = file.read(size)
                yield Member(name, offset, size, text)
            file.seek(tar.offset)
    except tarfile.TarError as error:
        # A file that is no tar at all also ends here, with nothing found.
        raise _cut_short(shard, found, str(error)) from None
    if file.tell() + END_OF_ARCHIVE > end:
        raise _cut_short(shard, found, "the end-of-archive mark is missing")
    if file.read(END_OF_ARCHIVE).strip(b"\0"):
        raise _cut_short(shard, found, "the next header is damaged")


def _cut_short(shard: File, found: int, problem: str) -> UserError:
    return UserError(
        f"The shard {shard.address} ends early or is damaged after {found} members ({problem}); copy it again, or leave "
        "it out."
    )


def _split_at_first_dot(name: str) -> tuple[str | None, str]:
    """(key, extensions) by webdataset's rule: the first dot of the name after the folders; its own module imports torch."""
    folder, slash, name = name.rpartition("/")
    stem, dot, extension = name.partition(".")
    return (folder + slash + stem if stem and dot else None), extension


def _split_at_last_dot(name: str) -> tuple[str | None, str]:
    stem, dot, extension = name.rpartition(".")
    return (stem if dot and not stem.endswith("/") and stem else None), extension


def _runs(members: Iterable[Member], split: Callable[[str], tuple[str | None, str]]) -> Iterator[Sample]:
    """Neighbours with one key. An extension that comes again begins another sample."""
    sample = None
    for member in members:
        key, extension = split(member.name)
        if key is None or key.rpartition("/")[2].startswith("."):
            continue  # no extension, or hidden, like the `._0001.jpg` that macOS adds
        extension = extension.lower()
        if sample is None or key != sample.key or extension in sample.members:
            if sample is not None:
                yield sample
            sample = Sample(key)
        sample.members[extension] = member
    if sample is not None:
        yield sample


def _joined(samples: Iterable[Sample], note: Callable[[str, str], None]) -> list[Sample]:
    """The samples, with members that lie apart from their sample put back to it: webdataset itself would not find them."""
    joined: list[Sample] = []
    by_key: dict[str, Sample] = {}
    for sample in samples:
        earlier = by_key.setdefault(sample.key, sample)
        if earlier is sample:
            joined.append(sample)
        elif earlier.members.keys() & sample.members.keys() or (earlier.image and sample.image):
            note("samples have a key that an earlier one of their shard has", sample.key)
            joined.append(sample)
        else:
            note("samples do not lie together in their shard; they were joined by key", sample.key)
            earlier.members.update(sample.members)
    return joined


def _annotations(shard: File, sample: Sample) -> tuple[int | None, tuple[str, ...]]:
    label: int | None = None
    captions: list[str] = []
    texts = {
        extension: m.text.decode("utf-8", "replace")
        for extension, m in sample.members.items()
        if extension in ANNOTATIONS
    }
    try:
        if "json" in texts:
            document = json.loads(texts["json"])
            if isinstance(document, dict):
                listed = document.get("captions") or document.get("caption") or []
                captions = [str(caption) for caption in listed] if isinstance(listed, list) else [str(listed)]
                label = document.get("label") if type(document.get("label")) is int else None
        if "txt" in texts:
            captions = [texts["txt"]]
        if "cls" in texts:
            label = int(texts["cls"])
    except ValueError as error:
        raise UserError(
            f"The annotations of sample '{sample.key}' in {shard.address} can't be read: {error}."
        ) from None
    one_line = (" ".join(caption.split()) for caption in captions)
    return None if label is None or label < 0 else label, tuple(caption for caption in one_line if caption)
