"""Each source lists its pictures in order with labels and captions, and bad ones end in one sentence."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from featurize.errors import UserError
from featurize.io.addresses import read_range
from featurize.sources import Listing, SourceImage, list_images, read, read_in_order
from tests.featurize.conftest import random_picture


def test_a_folder_tree_is_sorted_with_a_class_a_folder(picture_folder: Path) -> None:
    pictures = list_images(f"folder:{picture_folder}", "train", None).images
    assert [picture.key for picture in pictures] == sorted(picture.key for picture in pictures)
    assert all(picture.label == int(picture.key[6]) for picture in pictures)
    assert list_images(f"folder:{picture_folder}", "train", 7).images == pictures[:7]


def test_a_flat_folder_has_no_labels_and_other_files_are_remarked(tmp_path: Path) -> None:
    random_picture(0).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("x")
    listing = list_images(f"folder:{tmp_path}", "train", None)
    assert listing.images[0].label is None
    assert "1 files" in listing.remarks[0]


def coco(root: Path, *splits: str) -> Path:
    """COCO's layout with two images, of which one is there, and an image that the captions file lacks."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    document = {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "lost.jpg"}],
        "annotations": [
            {"image_id": 7, "caption": "a cat\n on a mat"},
            {"image_id": 9, "caption": "nothing"},
            *({"image_id": 7, "caption": f"caption {n}"} for n in range(5)),
        ],
    }
    for split in splits:
        (root / split).mkdir()
        for name in ("b.jpg", "stray.jpg"):
            Image.new("RGB", (8, 8)).save(root / split / name)
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(document))
    return root


def test_coco_ties_captions_by_id_and_lists_missing_pictures(tmp_path: Path) -> None:
    listing = list_images(f"coco:{coco(tmp_path, 'train2014')}", "train", None)
    assert listing.images[0].captions == ("a cat on a mat", *(f"caption {n}" for n in range(5)))
    assert (listing.images[1].key, listing.images[1].size) == ("lost", 0)
    told = " ".join(listing.remarks)
    assert "names 2 pictures; COCO's train2014 has 82,783" in told
    assert "1 captioned pictures" in told
    assert "1 files" in told and "stray.jpg" in told
    assert "1 of 2 images have no caption (first: lost)" in told
    with pytest.raises(UserError, match="captions_val2014"):
        list_images(f"coco:{tmp_path}", "val", None)


def test_cocos_counts_are_checked_against_the_published_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featurize.sources import coco as module

    assert module.COUNTS == {"train2014": 82783, "val2014": 40504, "train2017": 118287, "val2017": 5000}
    monkeypatch.setitem(module.COUNTS, "val2017", 2)
    told = " ".join(list_images(f"coco:{coco(tmp_path, 'val2017')}", "val", None).remarks)
    assert "COCO's val2017 has" not in told


def test_two_years_of_coco_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    coco(tmp_path, "val2014", "val2017")
    with pytest.raises(UserError, match=f"coco2014:{tmp_path} or coco2017:{tmp_path}"):
        list_images(f"coco:{tmp_path}", "val", None)
    for year in (2014, 2017):
        (first, _) = list_images(f"coco{year}:{tmp_path}", "val", None).images
        assert first.source == f"{tmp_path}/val{year}/b.jpg"


def test_a_damaged_captions_file_is_one_sentence(tmp_path: Path) -> None:
    path = coco(tmp_path, "val2014") / "annotations" / "captions_val2014.json"
    for text in (path.read_text()[:-20], '{"images": []}', "[]", '{"images": [{"id": 3}], "annotations": []}'):
        path.write_text(text)
        with pytest.raises(UserError, match="not a COCO captions file"):
            list_images(f"coco:{tmp_path}", "val", None)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("webdata:x", "of an unknown kind"),
        ("folder:https://example.org/pictures", "the web has no folders"),
        ("folder:ftps7://example.org/pictures", "Addresses with ftps7:"),
        ("folder:", "gives no address"),
        ("folder:/nowhere", "not there"),
        ("wds:/nowhere/{0..3}.tar", "not there"),
        ("scenes:huge", "needs a size"),
    ],
)
def test_a_wrong_source_is_one_sentence(source: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        list_images(source, "train", None)


def test_an_empty_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no images"):
        list_images(f"folder:{tmp_path}", "train", None)


def test_real_coco_and_imagenette(real_data: Path) -> None:
    coco = list_images(f"coco:{real_data}/coco", "val", None).images
    assert len(coco) == 80
    assert all(len(picture.captions) >= 5 and "\n" not in "".join(picture.captions) for picture in coco)
    tree = list_images(f"imagenet:{real_data}/imagenette", "val", None).images
    assert len(tree) == 200
    assert {picture.label for picture in tree} == set(range(10))
    shards = list_images(f"wds:{real_data}/imagenette64/val-{{000000..000003}}.tar", "train", None).images
    assert len(shards) == 3925


def test_readers_may_be_called_after_the_last_was_given(picture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(address: str, offset: int, size: int) -> bytes:
        time.sleep(0.01)
        return read_range(address, offset, size)

    monkeypatch.setattr("featurize.io.ranges.read_range", slowly)
    images = list_images(f"folder:{picture_folder}", "train", None).images
    readers = list(read_in_order(images))
    assert [reader() for reader in readers] == [read(image) for image in images]


def test_a_listings_digest_tells_every_change() -> None:
    pictures = tuple(SourceImage(f"{n}", f"/p/{n}.png", 0, n, n % 3, (f"caption {n}",), n) for n in range(5000))
    digest = Listing(pictures).sha256
    assert Listing(pictures, ("a remark",)).sha256 == digest
    for change in (
        {"key": "x"},
        {"source": "/q"},
        {"offset": 1},
        {"size": 9},
        {"label": None},
        {"captions": ()},
        {"version": "e"},
    ):
        for place in (0, 4999):
            other = [*pictures]
            other[place] = replace(other[place], **change)
            assert Listing(tuple(other)).sha256 != digest
    assert Listing(pictures[::-1]).sha256 != digest
