"""What one tar shard holds: its samples with their offsets, labels and captions, from headers and annotations alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from featurize.errors import UserError
from featurize.io.addresses import File, find, with_retries
from featurize.sources.index_cache import cached_index
from featurize.sources.listing import EXTENSIONS, Index, SourceImage
from featurize.sources.outside_text import Oddities, caption_in, captions_in, label_of, parse_json
from featurize.sources.tars.members import ANNOTATIONS, Member, members_of

T = TypeVar("T")


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
    odd = Oddities()
    members = members_of(shard, odd)
    samples = list(_runs(members, _split_at_first_dot))
    if samples and not any(sample.image for sample in samples):
        # Names like `photo.0001.jpg`: by webdataset's rule, all would be one sample `photo` without a picture.
        by_last_dot = list(_runs(members, _split_at_last_dot))
        if any(sample.image for sample in by_last_dot):
            samples = by_last_dot
            odd.add(
                "shards have keys with dots, read up to the last dot and not, as webdataset does, to the first",
                samples[0].key,
            )
    images = []
    for sample in _joined(samples, odd):
        image = sample.image
        if image is None:
            annotated = any(extension in sample.members for extension in ANNOTATIONS)
            what = "labels or captions" if annotated else "files"
            odd.add(f"samples have {what} and no picture, and were passed over", sample.key)
            continue
        label, captions = _annotations(shard, sample, odd)
        images.append(SourceImage(sample.key, shard.address, image.offset, image.size, label, captions, shard.version))
    return Index(tuple(images), tuple((what, count, first) for what, (count, first) in odd.found.items()))


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


def _joined(samples: Iterable[Sample], odd: Oddities) -> list[Sample]:
    """The samples, with members that lie apart from their sample put back to it: webdataset itself would not find them."""
    joined: list[Sample] = []
    by_key: dict[str, Sample] = {}
    for sample in samples:
        earlier = by_key.setdefault(sample.key, sample)
        if earlier is sample:
            joined.append(sample)
        elif earlier.members.keys() & sample.members.keys() or (earlier.image and sample.image):
            odd.add("samples have a key that an earlier one of their shard has", sample.key)
            joined.append(sample)
        else:
            odd.add("samples do not lie together in their shard; they were joined by key", sample.key)
            earlier.members.update(sample.members)
    return joined


def _annotations(shard: File, sample: Sample, odd: Oddities) -> tuple[int | None, tuple[str, ...]]:
    """Label and captions of a sample: `.txt` and `.cls` go over the `.json`.

    A `.cls` that is no label and a `.json` that is no JSON are errors; a `.json` may hold anything else under `label`.
    """
    label: int | None = None
    captions: tuple[str, ...] = ()
    texts = {extension: sample.members[extension].text for extension in ANNOTATIONS if extension in sample.members}
    if "json" in texts:
        document = _parsed(shard, sample, "json", lambda: parse_json(texts["json"].decode("utf-8-sig", "replace")))
        if isinstance(document, dict):
            listed = document.get("captions") or document.get("caption")
            captions = captions_in(listed, sample.key, odd) if listed is not None else ()
            if document.get("label") is not None:
                try:
                    label = label_of(document["label"])
                except ValueError as error:
                    odd.add(f"labels in .json were passed over, since {error}", sample.key)
    if "txt" in texts:
        captions = caption_in(texts["txt"], sample.key, odd)
    if "cls" in texts:
        label = _parsed(shard, sample, "cls", lambda: label_of(texts["cls"].decode("utf-8-sig", "replace")))
    return label, captions


def _parsed(shard: File, sample: Sample, extension: str, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except ValueError as error:
        start = ascii(sample.members[extension].text[:20])[2:-1]
        raise UserError(
            f"The .{extension} of sample '{sample.key}' in {shard.address} can't be read, since {error}: it starts with "
            f"'{start}'; write it again, or leave it out of the shard."
        ) from None
