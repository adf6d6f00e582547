"""Text from outside, whatever its bytes: a listing ends with images and remarks or with one sentence, and every image that is
listed has a line in the ledger, stored or refused."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from featurize.errors import UserError
from featurize.execution.tasks import run_here
from featurize.extraction.scan import make_ledger
from featurize.images.crop import SQUARE
from featurize.sources import Listing, list_images
from featurize.sources.annotations import ANNOTATION_FILES
from featurize.sources.class_lists import read_classes
from featurize.store.ledger import read_ledger
from tests.featurize.sources.test_shards import png

NewFolder = Callable[[], Path]
PNG = png(0)

# Text of all kinds of letters, lone surrogates as well; and what stands for a byte that is not UTF-8.
texts = st.text(st.characters(min_codepoint=1, exclude_characters="/"), max_size=12)
file_names = st.binary(min_size=1, max_size=12).map(lambda raw: raw.replace(b"\0", b"0").replace(b"/", b"."))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
lines = st.lists(
    st.binary(max_size=20)
    | st.sampled_from([b"file_name,label", b"a.jpg,1", b'a.jpg,"', b"b.jpg\tx", b'{"file": "a.jpg"}']),
    max_size=4,
).map(b"\n".join)


@pytest.fixture(scope="session")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> NewFolder:
    return lambda: tmp_path_factory.mktemp("any")


def check_sentence(error: UserError, words: str = "") -> None:
    """Text that can be printed, on one line."""
    assert str(error).encode().count(b"\n") == 0
    assert words in str(error)


def listed_and_stored(source: str, root: Path, **options: str) -> Listing | None:
    """The listing, where there is one, after a scan of it; each image in it has its line."""
    try:
        listing = list_images(source, "train", None, **options)
    except UserError as error:
        check_sentence(error)
        return None
    for text in (*listing.remarks, *listing.classes, *(image.key + image.source for image in listing.images)):
        text.encode()
    try:
        ledger = make_ledger(root, source, listing, SQUARE, "100%", run_here)
    except UserError as error:
        check_sentence(error, "pictures can be read")
        return listing
    lines = pq.read_table(root / "rows.parquet").to_pylist()
    assert [line["key"] for line in lines] == [image.key for image in listing.images]
    assert all((line["row"] is None) == (line["status"] == "refused") == bool(line["reason"]) for line in lines)
    assert ledger.rows + ledger.refused == len(listing.images)
    assert read_ledger(root).keys_sha256 == ledger.keys_sha256
    return listing


@settings(max_examples=40)
@given(names=st.lists(file_names, min_size=1, max_size=4, unique=True), folder=file_names)
@example(names=[b"caf\xe9"], folder=b"caf\xc3\xa9")
@example(names=[b"a\\xe9", b"a\xe9"], folder=b"\xff")
def test_file_names_of_any_bytes(new_folder: NewFolder, names: list[bytes], folder: bytes) -> None:
    """Every image of a tree is stored, wherever its name is UTF-8 or not, and is read by its address."""
    root, out = new_folder(), new_folder()
    below = os.path.join(os.fsencode(root), b"x" + folder)
    os.mkdir(below)
    for name in names:
        with open(os.path.join(below, b"x" + name + b".png"), "wb") as file:
            file.write(PNG)
    listing = listed_and_stored(f"folder:{root}", out)
    assert listing is not None and len(listing.images) == len(names)
    assert {image.label for image in listing.images} == {0}
    ledger = read_ledger(out)
    assert ledger.rows == len({image.key for image in listing.images})  # an escape that stands there already is refused


@settings(max_examples=40)
@given(names=st.lists(file_names | texts.map(lambda t: t.encode("utf-8", "replace")), min_size=1, max_size=4))
def test_tar_names_of_any_bytes(new_folder: NewFolder, names: list[bytes]) -> None:
    root, out = new_folder(), new_folder()
    with tarfile.open(root / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in names:
            entry = tarfile.TarInfo(
                "x" + (name.replace(b"\0", b"0") or b"0").decode("utf-8", "surrogateescape") + ".png"
            )
            entry.size = len(PNG)
            tar.addfile(entry, io.BytesIO(PNG))
    listed_and_stored(f"wds:{root}/a.tar", out)


@settings(max_examples=60)
@given(place=st.integers(0, 6 * 512 - 1), new=st.binary(min_size=1, max_size=14), repaired=st.booleans())
@example(place=124, new=b"\xff" * 12, repaired=True)  # a member of negative size, CVE-2025-8194
@example(place=124, new=b"\x80" + bytes(5) + b"\x05" + bytes(5), repaired=True)  # one of terabytes
def test_tars_of_any_bytes(new_folder: NewFolder, place: int, new: bytes, repaired: bool) -> None:
    """Headers with a true checksum as well: those are believed."""
    root, out = new_folder(), new_folder()
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in (("a.png", PNG), ("a.txt", b"one"), ("b.cls", b"1")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    raw = bytearray(data.getvalue())
    raw[place : place + len(new)] = new
    if repaired:
        start = place // 512 * 512
        header = raw[start : start + 512]
        header[148:156] = b" " * 8
        raw[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    (root / "a.tar").write_bytes(raw)
    listed_and_stored(f"wds:{root}/a.tar", out)


@settings(max_examples=60)
@given(name=st.sampled_from(ANNOTATION_FILES), content=lines | st.binary(max_size=60))
@example(name="captions.jsonl", content=b"[" * 100_000)
@example(name="labels.csv", content=b"file_name,label\na.png," + b"9" * 5000)
@example(name="labels.csv", content=b"file_name,label\na.png,9223372036854775808")
@example(name="captions.csv", content=b'file_name,caption\na.png,"' + b"x" * 200_000)
def test_tables_of_any_bytes(new_folder: NewFolder, name: str, content: bytes) -> None:
    root, out = new_folder(), new_folder()
    (root / "a.png").write_bytes(PNG)
    (root / name).write_bytes(content)
    listed_and_stored(f"folder:{root}", out)


@settings(max_examples=60)
@given(
    rows=st.lists(
        st.fixed_dictionaries({"file_name": st.just("a.png") | values}, optional={"label": values, "captions": values}),
        max_size=3,
    )
)
@example(rows=[{"file_name": "a\nb", "label": "x"}, {"file_name": "a\nb", "label": "y\nz"}])
def test_json_lines_of_any_values(new_folder: NewFolder, rows: list[dict[str, object]]) -> None:
    root, out = new_folder(), new_folder()
    (root / "a.png").write_bytes(PNG)
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    listed_and_stored(f"folder:{root}", out)


@settings(max_examples=60)
@given(
    images=st.lists(
        st.fixed_dictionaries(
            {"id": st.integers(0, 2) | values, "file_name": st.sampled_from(["a.png", "b.png"]) | values}
        ),
        max_size=3,
    )
    | values,
    annotations=st.lists(st.fixed_dictionaries({"image_id": st.integers(0, 2) | values, "caption": values}), max_size=3)
    | values,
)
def test_coco_of_any_values(new_folder: NewFolder, images: object, annotations: object) -> None:
    root, out = new_folder(), new_folder()
    (root / "annotations").mkdir()
    (root / "train2017").mkdir()
    (root / "train2017" / "a.png").write_bytes(PNG)
    document = {"images": images, "annotations": annotations}
    (root / "annotations" / "captions_train2017.json").write_text(json.dumps(document))
    listed_and_stored(f"coco:{root}", out)


@settings(max_examples=60)
@given(
    label=st.binary(max_size=8) | st.integers().map(lambda n: b"%d" % n),
    caption=st.binary(max_size=20),
    document=values | st.fixed_dictionaries({}, optional={"caption": values, "captions": values, "label": values}),
    parts=st.sets(st.sampled_from(["cls", "txt", "json"])),
)
@example(label=b"9223372036854775808", caption=b"", document=None, parts={"cls"})
def test_annotations_in_shards_of_any_bytes(
    new_folder: NewFolder, label: bytes, caption: bytes, document: object, parts: set[str]
) -> None:
    root, out = new_folder(), new_folder()
    contents = {"cls": label, "txt": caption, "json": json.dumps(document).encode()}
    with tarfile.open(root / "a.tar", "w") as tar:
        for name, content in {"png": PNG, **{part: contents[part] for part in sorted(parts)}}.items():
            entry = tarfile.TarInfo(f"a.{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    listed_and_stored(f"wds:{root}/a.tar", out)


@settings(max_examples=30)
@given(caption=st.binary(max_size=20))
def test_captions_beside_images_of_any_bytes(new_folder: NewFolder, caption: bytes) -> None:
    root, out = new_folder(), new_folder()
    (root / "a.png").write_bytes(PNG)
    (root / "a.txt").write_bytes(caption)
    listing = listed_and_stored(f"folder:{root}", out)
    assert listing is not None and len(listing.images) == 1


@settings(max_examples=40)
@given(content=st.lists(file_names, max_size=3).map(b"\n".join))
def test_class_lists_of_any_bytes(new_folder: NewFolder, content: bytes) -> None:
    root = new_folder()
    (root / "list.txt").write_bytes(content)
    try:
        names = read_classes(str(root / "list.txt"))
    except UserError as error:
        check_sentence(error)
        return
    assert list(names) == sorted(set(names)) and all(names)
