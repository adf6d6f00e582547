"""Each source lists its pictures in order with labels and captions, and bad ones end in one sentence."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from featurize.errors import UserError
from featurize.sources import list_pictures, read

from .conftest import random_picture


def test_shards_give_pictures_labels_and_captions_by_key(shard: Path) -> None:
    pictures = list_pictures(f"wds:{shard}", "train", None).pictures
    assert [picture.key for picture in pictures] == [f"{index:04d}" for index in range(10)]
    assert [picture.label for picture in pictures] == [index % 2 for index in range(10)]
    assert pictures[3].captions == ("picture 3",)
    for picture, sample in zip(pictures, webdataset.WebDataset(str(shard), shardshuffle=False), strict=True):
        assert read(picture) == sample["jpg"]


def test_braces_expand_in_order_and_repeated_keys_take_the_shards_name(shard: Path, tmp_path: Path) -> None:
    for number in range(2):
        shutil.copy(shard, tmp_path / f"s-{number}.tar")
    listing = list_pictures(f"wds:{tmp_path}/s-{{0..1}}.tar", "train", None)
    assert len({picture.key for picture in listing.pictures}) == 20
    assert listing.pictures[10].key == "s-1/0000"
    assert "Keys repeat" in listing.remarks[0]


def test_keys_with_dots_split_at_the_first(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    random_picture(0).save(buffer, format="PNG")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write(
            {"__key__": "folder.v2/name", "seg.png": buffer.getvalue(), "png": buffer.getvalue(), "txt": "two\nlines"}
        )
    (picture,) = list_pictures(f"wds:{tmp_path}/a.tar", "train", None).pictures
    assert (picture.key, picture.captions) == ("folder.v2/name", ("two lines",))


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.7])
def test_a_shard_that_ends_early_is_named(shard: Path, tmp_path: Path, kept: float) -> None:
    data = shard.read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match=r"cut\.tar ends early"):
        list_pictures(f"wds:{tmp_path}/cut.tar", "train", None)


def test_a_shard_cut_between_two_members_is_named(shard: Path, tmp_path: Path) -> None:
    pictures = list_pictures(f"wds:{shard}", "train", None).pictures
    end = pictures[5].offset + -(-pictures[5].size // 512) * 512
    (tmp_path / "cut.tar").write_bytes(shard.read_bytes()[:end])
    with pytest.raises(UserError, match=r"cut\.tar ends early"):
        list_pictures(f"wds:{tmp_path}/cut.tar", "train", None)


def test_a_folder_tree_is_sorted_with_a_class_a_folder(picture_folder: Path) -> None:
    pictures = list_pictures(f"folder:{picture_folder}", "train", None).pictures
    assert [picture.key for picture in pictures] == sorted(picture.key for picture in pictures)
    assert all(picture.label == int(picture.key[6]) for picture in pictures)
    assert list_pictures(f"folder:{picture_folder}", "train", 7).pictures == pictures[:7]


def test_a_flat_folder_has_no_labels_and_other_files_are_remarked(tmp_path: Path) -> None:
    random_picture(0).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("x")
    listing = list_pictures(f"folder:{tmp_path}", "train", None)
    assert listing.pictures[0].label is None
    assert "1 files" in listing.remarks[0]


def test_imagenets_tree_is_taken_by_split_and_others_are_refused(tmp_path: Path, picture_folder: Path) -> None:
    for split in ("train", "val"):
        for number, wnid in enumerate(("n01440764", "n02102040")):
            (tmp_path / split / wnid).mkdir(parents=True)
            random_picture(number).save(tmp_path / split / wnid / f"{split}.JPEG", format="JPEG")
    pictures = list_pictures(f"imagenet:{tmp_path}", "val", None).pictures
    assert [(picture.key, picture.label) for picture in pictures] == [
        ("n01440764/val.JPEG", 0),
        ("n02102040/val.JPEG", 1),
    ]
    with pytest.raises(UserError, match="no ImageNet tree"):
        list_pictures(f"imagenet:{picture_folder}", "train", None)


def test_coco_ties_captions_by_id_and_lists_missing_pictures(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2014").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train2014" / "b.jpg")
    document = {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "lost.jpg"}],
        "annotations": [
            {"image_id": 7, "caption": "a cat\n on a mat"},
            {"image_id": 9, "caption": "nothing"},
            {"image_id": 7, "caption": "second"},
        ],
    }
    (tmp_path / "annotations" / "captions_train2014.json").write_text(json.dumps(document))
    listing = list_pictures(f"coco:{tmp_path}", "train", None)
    assert listing.pictures[0].captions == ("a cat on a mat", "second")
    assert (listing.pictures[1].key, listing.pictures[1].size) == ("lost", 0)
    assert "1 pictures have no caption" in listing.remarks[0]
    assert "1 captioned pictures" in listing.remarks[1]
    with pytest.raises(UserError, match="captions_val2014"):
        list_pictures(f"coco:{tmp_path}", "val", None)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("webdata:x", "of no known kind"),
        ("folder:", "names no place"),
        ("folder:/nowhere", "not there"),
        ("wds:/nowhere/{0..3}.tar", "not there"),
        ("scenes:huge", "needs a size"),
    ],
)
def test_a_wrong_source_is_one_sentence(source: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        list_pictures(source, "train", None)


def test_an_empty_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no pictures"):
        list_pictures(f"folder:{tmp_path}", "train", None)


def test_real_coco_and_imagenette(real_data: Path) -> None:
    coco = list_pictures(f"coco:{real_data}/coco", "val", None).pictures
    assert len(coco) == 80
    assert all(len(picture.captions) >= 5 and "\n" not in "".join(picture.captions) for picture in coco)
    tree = list_pictures(f"imagenet:{real_data}/imagenette", "val", None).pictures
    assert len(tree) == 200
    assert {picture.label for picture in tree} == set(range(10))
    shards = list_pictures(f"wds:{real_data}/imagenette64/val-{{000000..000003}}.tar", "train", None).pictures
    assert len(shards) == 3925
