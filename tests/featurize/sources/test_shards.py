"""Tar shards: samples by key however their members lie, in any order of shards, and damaged ones end in one sentence."""

from __future__ import annotations

import io
import itertools
import shutil
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from featurize.errors import UserError
from featurize.sources import Listing, index_cache, list_images, read
from featurize.sources.shards import expand
from tests.featurize.conftest import random_picture


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    random_picture(index, 8, 8).save(buffer, format="PNG")
    return buffer.getvalue()


def tar_of(path: Path, *members: tuple[str, bytes]) -> Path:
    """A plain tar file with these members, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def listed(*shards: Path) -> Listing:
    return list_images("wds:" + "::".join(map(str, shards)), "train", None)


def test_shards_give_pictures_labels_and_captions_by_key(shard: Path) -> None:
    pictures = list_images(f"wds:{shard}", "train", None).images
    assert [picture.key for picture in pictures] == [f"{index:04d}" for index in range(10)]
    assert [picture.label for picture in pictures] == [index % 2 for index in range(10)]
    assert pictures[3].captions == ("picture 3",)
    for picture, sample in zip(pictures, webdataset.WebDataset(str(shard), shardshuffle=False), strict=True):
        assert read(picture) == sample["jpg"]


def test_braces_expand_in_order_and_repeated_keys_take_the_shards_name(shard: Path, tmp_path: Path) -> None:
    for number in range(2):
        shutil.copy(shard, tmp_path / f"s-{number}.tar")
    listing = list_images(f"wds:{tmp_path}/s-{{0..1}}.tar", "train", None)
    assert len({picture.key for picture in listing.images}) == 20
    assert listing.images[10].key == "s-1/0000"
    assert "The key 0000 is in several shards" in listing.remarks[0]


def test_keys_with_dots_split_at_the_first(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    random_picture(0).save(buffer, format="PNG")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write(
            {"__key__": "folder.v2/name", "seg.png": buffer.getvalue(), "png": buffer.getvalue(), "txt": "two\nlines"}
        )
    (picture,) = list_images(f"wds:{tmp_path}/a.tar", "train", None).images
    assert (picture.key, picture.captions) == ("folder.v2/name", ("two lines",))


@pytest.mark.parametrize("kept", [0, 0.3, 0.5, 0.7])
def test_a_shard_that_ends_early_is_named(shard: Path, tmp_path: Path, kept: float) -> None:
    data = shard.read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match=r"cut\.tar ends early"):
        list_images(f"wds:{tmp_path}/cut.tar", "train", None)


def test_a_shard_cut_between_two_members_is_named(shard: Path, tmp_path: Path) -> None:
    pictures = list_images(f"wds:{shard}", "train", None).images
    end = pictures[5].offset + -(-pictures[5].size // 512) * 512
    (tmp_path / "cut.tar").write_bytes(shard.read_bytes()[:end])
    with pytest.raises(UserError, match=r"cut\.tar ends early"):
        list_images(f"wds:{tmp_path}/cut.tar", "train", None)


def test_members_that_lie_apart_are_joined_and_reported(tmp_path: Path) -> None:
    shard = tar_of(
        tmp_path / "a.tar", ("1.png", png(1)), ("2.png", png(2)), ("1.cls", b"5"), ("2.cls", b"6"), ("1.txt", b"one")
    )
    listing = listed(shard)
    assert [(p.key, p.label, p.captions) for p in listing.images] == [("1", 5, ("one",)), ("2", 6, ())]
    assert "3 samples do not lie together" in listing.remarks[0]
    assert "1 of 2 images have no caption (first: 2)" in listing.remarks[1]


def test_a_repeated_key_hides_no_picture(tmp_path: Path) -> None:
    shard = tar_of(
        tmp_path / "a.tar",
        ("1.png", png(1)),
        ("1.cls", b"1"),
        ("1.png", png(2)),
        ("1.cls", b"2"),
        ("2.png", png(3)),
        ("1.jpg", b"x"),
    )
    listing = listed(shard)
    assert [(p.key, p.label) for p in listing.images] == [("1", 1), ("1", 2), ("2", None), ("1", None)]
    assert "2 samples have a key that an earlier one" in listing.remarks[0]


def test_captions_without_a_picture_and_hidden_files_are_reported_or_passed_over(tmp_path: Path) -> None:
    shard = tar_of(
        tmp_path / "a.tar",
        ("1.txt", b"alone"),
        ("2.npy", b"x"),
        ("._3.png", b"mac"),
        ("3.png", png(3)),
        ("README", b"x"),
    )
    listing = listed(shard)
    assert [p.key for p in listing.images] == ["3"]
    assert listing.remarks == (
        f"1 samples have labels or captions and no picture, and were passed over (first: 1 in {shard}).",
        f"1 samples have files and no picture, and were passed over (first: 2 in {shard}).",
    )


def test_numbered_names_with_dots_are_not_one_sample(tmp_path: Path) -> None:
    members = [(f"d.x/photo.{n}.{e}", png(n) if e == "png" else b"%d" % n) for n in range(3) for e in ("png", "cls")]
    listing = listed(tar_of(tmp_path / "a.tar", *members))
    assert [(p.key, p.label) for p in listing.images] == [(f"d.x/photo.{n}", n) for n in range(3)]
    assert "keys with dots" in listing.remarks[0]


def test_annotations_of_all_kinds(tmp_path: Path) -> None:
    shard = tar_of(
        tmp_path / "a.tar",
        ("1.PNG", png(1)), ("1.JSON", b'{"caption": "a\\nb", "label": 3}'),
        ("2.png", png(2)), ("2.json", b'{"captions": ["x", " ", "y"], "label": true}'), ("2.cls", b" 7\n"),
        ("3.png", png(3)), ("3.cls", b"-1"), ("3.json", b"[1]"),
    )  # fmt: skip
    assert [(p.label, p.captions) for p in listed(shard).images] == [(3, ("a b",)), (7, ("x", "y")), (None, ())]
    with pytest.raises(UserError, match=r"sample '1' in .* can't be read"):
        listed(tar_of(tmp_path / "b.tar", ("1.png", png(1)), ("1.cls", b"cat")))


def test_a_damaged_header_in_the_middle_is_named(tmp_path: Path) -> None:
    shard = tar_of(tmp_path / "a.tar", *((f"{n}.png", png(n)) for n in range(4)))
    place = listed(shard).images[2].offset - tarfile.BLOCKSIZE
    data = bytearray(shard.read_bytes())
    data[place + 3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"after 2 members .the next header is damaged"):
        listed(shard)


def test_a_compressed_shard_is_named(tmp_path: Path) -> None:
    for mode, kind in (("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")):
        tarfile.open(tmp_path / "a.tar", mode).close()
        with pytest.raises(UserError, match=f"is compressed .{kind}."):
            listed(tmp_path / "a.tar")


def test_a_large_shard_is_scanned_once_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [(f"{n:04d}.{e}", b"%d" % n) for n in range(index_cache.WORTH_CACHING) for e in ("png", "cls")]
    shard = tar_of(tmp_path / "a.tar", *members, ("x.txt", b"alone"))
    first = listed(shard)
    with monkeypatch.context() as patch:
        patch.setattr("featurize.sources.tars.index._scan", None)
        assert listed(shard) == first
    assert "1 samples have labels or captions and no picture" in first.remarks[0]
    shard = tar_of(tmp_path / "a.tar", *members[2:], *members[:2], ("x.txt", b"alone"))
    again = listed(shard)
    assert (again.images[0].key, again.images[-1].label) == ("0001", 0)


def test_tars_in_a_tar_are_opened(tmp_path: Path) -> None:
    inner = [
        tar_of(tmp_path / f"{name}.tar", (f"{name}_1.png", png(i)), (f"{name}_2.png", png(i + 9)))
        for i, name in enumerate("ab")
    ]
    outer = tar_of(tmp_path / "outer.tar", *((path.name, path.read_bytes()) for path in inner))
    pictures = listed(outer).images
    assert [p.key for p in pictures] == ["a/a_1", "a/a_2", "b/b_1", "b/b_2"]
    assert [read(p) for p in pictures] == [png(0), png(9), png(1), png(10)]
    outer.write_bytes(outer.read_bytes().replace(inner[1].read_bytes()[-4096:], b"x" * 4096))
    with pytest.raises(UserError, match="damaged"):
        listed(outer)
    with pytest.raises(UserError, match=r"outer\.tar ends early .* \(b is empty\)"):
        listed(tar_of(outer, (inner[0].name, inner[0].read_bytes()), ("b.tar", b"")))


def test_a_folder_stands_for_its_shards_and_each_is_taken_once(shard: Path, tmp_path: Path) -> None:
    for name in ("b/1.tar", "a/1.tar"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(shard, tmp_path / name)
    listing = list_images(f"wds:{tmp_path}/b::{tmp_path}/a/*.tar::{tmp_path}/b/1.tar", "train", None)
    assert "1 shards are named more than once" in listing.remarks[0]
    assert [p.key for p in listing.images[9:11]] == ["b/1/0009", "a/1/0000"]


part = st.tuples(
    st.lists(st.text("abz019", min_size=1, max_size=3), min_size=2, max_size=4, unique=True), st.text("-_", max_size=1)
)


@settings(max_examples=40)
@given(st.lists(part, min_size=1, max_size=3), st.integers(0, 7), st.integers(0, 5))
def test_braces_and_numbers_expand_as_written(parts: list[tuple[list[str], str]], start: int, more: int) -> None:
    pattern = (
        "/none/"
        + "".join("{" + ",".join(words) + "}" + tail for words, tail in parts)
        + f"{{{start:03d}..{start + more:03d}}}.tar"
    )
    choices = [[word + tail for word in words] for words, tail in parts] + [
        [f"{n:03d}" for n in range(start, start + more + 1)]
    ]
    wanted = ["/none/" + "".join(choice) + ".tar" for choice in itertools.product(*choices)]
    assert expand(pattern)[0] == list(dict.fromkeys(wanted))


@given(
    names=st.sets(
        st.text("abAB01-_.", min_size=1, max_size=6).filter(lambda name: not name.startswith(".")),
        min_size=1,
        max_size=8,
    )
)
def test_wildcards_expand_sorted(tmp_path_factory: pytest.TempPathFactory, names: set[str]) -> None:
    folder = tmp_path_factory.mktemp("w")
    for name in names:
        (folder / f"{name}.tar").touch()
    wanted = sorted(str(folder / f"{name}.tar") for name in names)
    assert expand(f"{folder}/*.tar")[0] == wanted
    assert expand(str(folder))[0] == wanted


key = st.text("abcXYZ089_- é", min_size=1, max_size=8).filter(lambda k: k.strip() == k)


@settings(max_examples=25)
@given(folder=st.lists(key, max_size=2), names=st.lists(key, min_size=1, max_size=6, unique=True))
def test_keys_round_trip(tmp_path_factory: pytest.TempPathFactory, folder: list[str], names: list[str]) -> None:
    """The keys written by webdataset come back, in order, with each sample's own bytes, label and caption."""
    path = tmp_path_factory.mktemp("k") / "a.tar"
    keys = ["/".join([*folder, name]) for name in names]
    with webdataset.TarWriter(str(path)) as writer:
        for number, name in enumerate(keys):
            writer.write({"__key__": name, "png": png(number), "cls": number, "txt": f"caption {number}"})
    pictures = listed(path).images
    assert [(p.key, p.label, p.captions) for p in pictures] == [(k, n, (f"caption {n}",)) for n, k in enumerate(keys)]
    assert [read(p) for p in pictures] == [png(number) for number in range(len(keys))]


samples = st.lists(
    st.tuples(key, st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=5, unique_by=lambda s: s[0]
)


@settings(max_examples=25)
@given(samples=samples, random=st.randoms(use_true_random=False))
def test_any_order_of_members_gives_the_same_samples(
    tmp_path_factory: pytest.TempPathFactory, samples: list, random: object
) -> None:
    members = []
    for number, (name, *parts) in enumerate(samples):
        contents = {"png": b"picture %d" % number, "cls": b"%d" % number, "txt": b"caption %d" % number}
        members += [(f"{name}.{e}", c) for (e, c), there in zip(contents.items(), parts) if there]
    random.shuffle(members)  # type: ignore[attr-defined]
    path = tar_of(tmp_path_factory.mktemp("o") / "a.tar", *members)
    wanted = {
        name: (n if has_cls else None, (f"caption {n}",) if has_txt else ())
        for n, (name, has, has_cls, has_txt) in enumerate(samples)
        if has
    }
    if not wanted:
        with pytest.raises(UserError, match="holds no images"):
            listed(path)
        return
    assert {p.key: (p.label, p.captions) for p in listed(path).images} == wanted
