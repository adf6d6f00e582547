"""Data as other people have them, which once gave wrong labels, captions or rows: each kind with its right value."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest

from featurize.errors import UserError
from featurize.images.reasons import BadImage
from featurize.io.addresses import find
from featurize.sources import Listing, SourceImage, index_cache, list_images, read
from featurize.sources.shards import _short_names, expand
from tests.featurize.sources.test_shards import png, tar_of


def touch(root: Path, *names: str) -> Path:
    """Empty files: a listing opens no image."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(source: str, **options: object) -> Listing:
    return list_images(source, "train", options.pop("limit", None), **options)


def labels(listing: Listing) -> dict[str, int | None]:
    return {image.key: image.label for image in listing.images}


def captions(listing: Listing) -> dict[str, tuple[str, ...]]:
    return {image.key: image.captions for image in listing.images}


# --- labels ---------------------------------------------------------------------------------------------------------


def test_only_folders_with_pictures_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    touch(tmp_path, "hot dog/1.jpg", "hot/1.jpg", "tench/a/1.jpg", "__MACOSX/._1.jpg", "stores/s/rows.parquet")
    touch(tmp_path, "stores/s/sheet.png", "notes/readme.md", ".hidden/1.jpg")
    (tmp_path / "empty").mkdir()
    listing = listed(f"folder:{tmp_path}")
    # As ImageFolder sorts them; as parts of paths, "hot dog/" would come before "hot/".
    assert labels(listing) == {"hot dog/1.jpg": 1, "hot/1.jpg": 0, "tench/a/1.jpg": 2}
    assert listing.classes == ("hot", "hot dog", "tench")
    assert any("stores of featurize were passed over: 1 (first: stores/s)" in remark for remark in listing.remarks)
    assert any("which are no classes: 4 (first: __MACOSX)" in remark for remark in listing.remarks)
    for limit in (1, 2):
        assert listed(f"folder:{tmp_path}", limit=limit).images == listing.images[:limit]


def test_numbered_folders_are_remarked(tmp_path: Path) -> None:
    listing = listed(f"folder:{touch(tmp_path, *(f'{n}/x.png' for n in range(12)))}")
    assert labels(listing)["10/x.png"] == 2
    assert "sorted as text, as ImageFolder does it: the label of folder 10 is 2" in listing.remarks[0]
    assert not listed(f"folder:{touch(tmp_path / 'ten', *(f'{n}/x.png' for n in range(10)))}").remarks


@pytest.mark.parametrize(
    ("written", "right"), [("10.0", 10), (" 7 ", 7), ("-1.0", None), ("+3", 3), (str(2**63 - 1), 2**63 - 1)]
)
def test_labels_that_pandas_wrote_are_numbers(tmp_path: Path, written: str, right: int | None) -> None:
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "labels.csv").write_text(f"file_name,label\na.png,{written}\nb.png,2.0\n")
    assert labels(listed(f"folder:{tmp_path}")) == {"a.png": right, "b.png": 2}


@pytest.mark.parametrize("written", ["1.5", str(2**63), "9" * 400])
def test_numbers_that_are_no_labels_are_one_sentence(tmp_path: Path, written: str) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "labels.csv").write_text(f"file_name,label\na.png,{written}\n")
    with pytest.raises(
        UserError, match=r"Line 2 of .*labels\.csv gives the label .*, but it is .*; write whole numbers"
    ):
        listed(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("label", "right"),
    [
        ("207", 207),
        ("207.0", 207),
        ('"207"', 207),
        ('"207.0"', 207),
        ("-1", None),
        ("null", None),
        ("true", None),
        ('"cat"', None),
        ("[1]", None),
        (str(2**63), None),
    ],
)
def test_labels_in_json_of_a_shard(tmp_path: Path, label: str, right: int | None) -> None:
    shard = tar_of(tmp_path / "a.tar", ("1.png", png(1)), ("1.json", b'{"label": %s}' % label.encode()))
    listing = listed(f"wds:{shard}")
    assert listing.images[0].label == right
    assert bool(listing.remarks) == (right is None and label not in ("-1", "null"))


@pytest.mark.parametrize("label", [b"cat", b"1.5", b"", str(2**63).encode(), b"\xff"])
def test_a_cls_that_is_no_label_is_one_sentence(tmp_path: Path, label: bytes) -> None:
    shard = tar_of(tmp_path / "a.tar", ("1.png", png(1)), ("1.cls", label))
    with pytest.raises(UserError, match=r"The \.cls of sample '1' in .* can't be read, since it is"):
        listed(f"wds:{shard}")


def test_classes_have_spaces_in_their_names(real_data: Path, tmp_path: Path) -> None:
    touch(
        tmp_path,
        *(f"{name}/1.jpg" for name in ("golden retriever", "golden gate", "hot dog", "hot air balloon", "tench")),
    )
    first = listed(f"folder:{tmp_path}", classes=str(real_data / "faults" / "classes" / "sp1.txt"))
    assert labels(first) == {"golden retriever/1.jpg": 0, "tench/1.jpg": 1}
    second = listed(f"folder:{tmp_path}", classes=str(real_data / "faults" / "classes" / "sp2.txt"))
    assert second.classes == ("hot air balloon", "hot dog", "tench")
    (tmp_path / "words.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    touch(tmp_path, "n01443537/1.jpg")
    assert labels(listed(f"folder:{tmp_path}", classes=str(tmp_path / "words.txt"))) == {"n01443537/1.jpg": 1}


def test_float_labels_of_the_faults(real_data: Path, tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n}.png" for n in range(12)))
    shutil.copy(real_data / "faults" / "labels" / "float_labels.csv", tmp_path / "labels.csv")
    assert labels(listed(f"folder:{tmp_path}")) == {f"{n}.png": n for n in range(12)}


def test_tiny_imagenets_validation_folder_has_labels(tmp_path: Path) -> None:
    touch(tmp_path / "val", *(f"images/val_{n}.JPEG" for n in range(4)))
    wnids = ["n03444034", "n01443537", "n03444034", "n09193705"]
    lines = [f"val_{n}.JPEG\t{wnid}\t0\t32\t44\t62" for n, wnid in enumerate(wnids)]
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    listing = listed(f"folder:{tmp_path}/val")
    assert [image.label for image in listing.images] == [1, 0, 1, 2]
    assert listing.classes == ("n01443537", "n03444034", "n09193705")


# --- captions -------------------------------------------------------------------------------------------------------


def coco(root: Path, document: object) -> str:
    touch(root, "train2017/a.jpg", "train2017/b.jpg", "annotations/x")
    (root / "annotations" / "captions_train2017.json").write_text(json.dumps(document))
    return f"coco:{root}"


def test_coco_with_captions_that_are_none_and_ids_as_text(tmp_path: Path) -> None:
    document = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}, {"id": 1, "file_name": "a.jpg"}],
        "annotations": [
            {"image_id": "1", "caption": "one"},
            *({"image_id": 1, "caption": caption} for caption in (None, "", " ", 5, ["two"], "a\ud800b")),
            {"image_id": 2.0, "caption": "three"},
        ],
    }
    listing = listed(coco(tmp_path, document))
    assert captions(listing) == {"a": ("one", "two", "a\ufffdb"), "b": ("three",)}
    assert len(listing.images) == 2
    told = " ".join(listing.remarks)
    assert "4 captions are empty or are not text" in told
    assert "1 captions hold what is not Unicode text" in told
    assert "more than once, and were taken once (first: a.jpg)" in told
    document["images"].append({"id": 1, "file_name": "b.jpg"})  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"gives the id 1 to a\.jpg and to b\.jpg"):
        listed(coco(tmp_path, document))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("file_name,caption\na.jpg,A dog, running\n", r"Line 2 of .* has 3 fields and the first line 2"),
        ("file_name,caption\na.jpg,x\nb.jpg\n", r"Line 3 of .* has 1 fields"),
        ('file_name,caption\na.jpg,"A dog\nb.jpg,x\n', r"The row from line 2 on of .* is not valid CSV"),
        ('file_name,caption\nb.jpg,x\na.jpg,"A "dog"\n', r"The row from line 3 on of"),
        ("file_name,caption,caption\na.jpg,x,y\n", "has two columns named caption"),
    ],
)
def test_tables_that_would_lose_captions_are_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (touch(tmp_path, "a.jpg", "b.jpg") / "captions.csv").write_text(text)
    with pytest.raises(UserError, match=sentence):
        listed(f"folder:{tmp_path}")


def test_captions_of_the_faults(real_data: Path, tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n}.jpg" for n in range(12)))
    for name, sentence in (
        ("unquoted_commas", r"Line 2 of .*captions\.csv has 4 fields"),
        ("latin1", r"Line 2 of .*captions\.csv is not UTF-8 text \(byte 0xE9\); save it as UTF-8"),
    ):
        shutil.copy(real_data / "faults" / "captions" / f"{name}.csv", tmp_path / "captions.csv")
        with pytest.raises(UserError, match=sentence):
            listed(f"folder:{tmp_path}")


def test_captions_that_are_not_utf_8_are_replaced_with_a_remark(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "a.txt").write_bytes(b"un caf\xe9")
    (tmp_path / "b.txt").write_text("\ufeffun café")
    listing = listed(f"folder:{tmp_path}")
    assert captions(listing) == {"a.jpg": ("un caf\ufffd",), "b.jpg": ("un café",)}
    assert listing.remarks == (
        "1 captions hold what is not Unicode text, which was replaced by U+FFFD (first: a.jpg).",
    )
    shard = tar_of(
        tmp_path / "a.tar",
        ("1.png", png(1)),
        ("1.txt", b"caf\xe9"),
        ("2.png", png(2)),
        ("2.json", b'{"captions": ["\\ud800", null, "x"]}'),
    )
    listing = listed(f"wds:{shard}")
    assert captions(listing) == {"1": ("caf\ufffd",), "2": ("\ufffd", "x")}
    assert "2 captions hold what is not Unicode text" in listing.remarks[0]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_written_otherwise_are_the_same_name(tmp_path: Path, forms: tuple[str, str]) -> None:
    here, there = (unicodedata.normalize(form, "café") for form in forms)
    touch(tmp_path, f"{here}/1.jpg", "b/1.jpg")
    (tmp_path / "captions.csv").write_text(f"file_name,caption\n{there}/1.jpg,one\n")
    assert captions(listed(f"folder:{tmp_path}"))[f"{here}/1.jpg"] == ("one",)
    (tmp_path / "list.txt").write_text(f"{there}\nb\n")
    assert labels(listed(f"folder:{tmp_path}", classes=str(tmp_path / "list.txt"))) == {
        "b/1.jpg": 0,
        f"{here}/1.jpg": 1,
    }


def test_flickr8k_as_it_unpacks(tmp_path: Path) -> None:
    touch(tmp_path, "Images/1.jpg", "Images/2.jpg", "Images/3.jpg")
    (tmp_path / "captions.txt").write_text("image,caption\n1.jpg,one\n1.jpg,uno\n3.jpg,three\n")
    listing = listed(f"folder:{tmp_path}")
    assert captions(listing) == {"Images/1.jpg": ("one", "uno"), "Images/2.jpg": (), "Images/3.jpg": ("three",)}
    assert "they were matched by their last part" in listing.remarks[0]
    assert listed(f"folder:{tmp_path}", limit=2).images == listing.images[:2]
    touch(tmp_path, "More/1.jpg")
    with pytest.raises(UserError, match=r"by their last part they are not unique \(Images/1\.jpg and More/1\.jpg\)"):
        listed(f"folder:{tmp_path}")
    (tmp_path / "captions.txt").write_text("image,caption\n8.jpg,one\n9.jpg,uno\n")
    with pytest.raises(
        UserError, match=r"None of the 2 names in captions\.txt is of a picture in .* \(first: 8\.jpg\)"
    ):
        listed(f"folder:{tmp_path}")


def test_a_number_sign_in_a_name_is_no_number_of_a_caption(tmp_path: Path) -> None:
    touch(tmp_path, "a#b.jpg", "c.jpg")
    (tmp_path / "captions.txt").write_text("a#b.jpg\tone\nc.jpg#0\ttwo\n")
    assert captions(listed(f"folder:{tmp_path}")) == {"a#b.jpg": ("one",), "c.jpg": ("two",)}


# --- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["p[1]", "x.tar.d", "a*", "{1,2}", "[", "{"])
def test_folders_with_signs_of_patterns_in_their_names(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    shard = tar_of(tmp_path / folder / "1.tar", ("1.png", png(1)))
    for address in (f"{tmp_path}/{folder}", f"{tmp_path}/{folder}/", str(shard)):
        assert expand(address)[0] == [str(shard)]
    touch(tmp_path / folder / "val", "n01440764/1.JPEG")
    assert len(listed(f"imagenet:{tmp_path}/{folder}/val").images) == 1


def test_braces_without_a_partner_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are not in pairs"):
        expand(f"{tmp_path}/x-{{000..0009.tar")


def test_names_of_shards_always_come_to_an_end() -> None:
    assert _short_names({"/a/x": None, "/a/x.tar": None}) == {"/a/x": "x", "/a/x.tar": "x.tar"}
    assert _short_names({"/a/x.tar": None, "/b/x.tar": None}) == {"/a/x.tar": "a/x", "/b/x.tar": "b/x"}
    assert _short_names({"/x.tar": None, "/a/x.tar": None}) == {"/x.tar": "//x", "/a/x.tar": "a/x"}


def test_a_shard_replaced_with_the_same_size_and_time_is_scanned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_cache, "WORTH_CACHING", 1)
    shard = tar_of(tmp_path / "a.tar", ("1.png", png(1)), ("1.cls", b"1"))
    before = find(str(shard))
    assert labels(listed(f"wds:{shard}")) == {"1": 1}
    other = tar_of(tmp_path / "b.tar", ("1.png", png(1)), ("1.cls", b"2"))
    os.utime(other, ns=(before.version, before.version))  # type: ignore[type-var]
    other.replace(shard)
    after = find(str(shard))
    assert (after.size, after.version) == (before.size, before.version)
    assert labels(listed(f"wds:{shard}")) == {"1": 2}


def test_fifos_devices_and_links_in_a_circle_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").symlink_to("/dev/zero")
    (tmp_path / "d.jpg").symlink_to("d.jpg")
    listing = listed(f"folder:{tmp_path}")
    assert [image.key for image in listing.images] == ["a.jpg"]
    assert "3 of no plain file" in listing.remarks[0]
    os.mkfifo(tmp_path / "captions.csv")
    with pytest.raises(UserError, match="is not a plain file"):
        listed(f"folder:{tmp_path}")
    with pytest.raises(UserError, match="is not a plain file"):
        listed(f"wds:{tmp_path}/b.jpg")


@pytest.mark.parametrize("kind", ["folder", "wds"])
def test_kinds_without_splits_refuse_one(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="has no splits, so --split val would take the very same images"):
        list_images(f"{kind}:{tmp_path}", "val", None)


def test_imagenets_training_split_is_no_validation_split(tmp_path: Path) -> None:
    touch(tmp_path / "train", "n01440764/1.JPEG")
    for place in (f"{tmp_path}/train", f"{tmp_path}/ILSVRC2012_img_train.tar"):
        with pytest.raises(UserError, match="is the training split by its name"):
            list_images(f"imagenet:{place}", "val", None)


def test_without_a_home_folder_shards_are_listed_uncached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tar_of(tmp_path / "a.tar", ("1.png", png(1)))
    for name in ("HOME", "FEATURIZE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_entry(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    assert len(listed(f"wds:{shard}").images) == 1
    with pytest.raises(UserError, match="home folder is not known; set HOME"):
        listed("folder:~/pictures")


def test_a_file_of_gigabytes_is_refused() -> None:
    with pytest.raises(BadImage, match=r"the file has 2\.0 GB"):
        read(SourceImage("a", "/none", 0, 2 * 10**9))
