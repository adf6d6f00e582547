"""Folders of pictures with the labels and captions that people put beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurize.errors import UserError
from featurize.io.addresses import walk
from featurize.sources import Listing, list_images


def listed(root: Path, **options: object) -> Listing:
    return list_images(f"folder:{root}", "train", options.pop("limit", None), **options)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Five empty files that look like pictures: a listing opens none."""
    for name in ("a.jpg", "b.PNG", "c.d.webp", "sub/e.heic", "sub/f.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("header", ["file_name,label", "Filename, Label ,x", "label,path"])
def test_labels_csv_goes_over_the_folders(flat: Path, header: str) -> None:
    columns = [column.strip().lower() for column in header.split(",")]
    rows = [("a.jpg", 3), ("b", 0), ("./c.d.webp", 3), ("sub/f.jpeg", -1), ("none.png", 2)]
    lines = [
        ",".join(str(label) if c == "label" else "z" if c == "x" else name for c in columns) for name, label in rows
    ]
    (flat / "labels.csv").write_text("\ufeff" + "\n".join([header, *lines]) + "\n", encoding="utf-8")
    listing = listed(flat)
    assert [p.label for p in listing.images] == [3, 0, 3, None, None]
    assert "1 names in labels.csv are of no picture (first: none.png)" in listing.remarks[0]
    assert "2 of 5 images have no label (first: sub/e.heic)" in listing.remarks[1]
    # A limit cuts what is listed and not what is known of it.
    cut = listed(flat, limit=2)
    assert (cut.images, cut.remarks) == (listing.images[:2], ())


def test_named_labels_are_numbered_in_sorted_order_and_a_contradiction_is_named(flat: Path) -> None:
    (flat / "labels.csv").write_text("file,label\na.jpg,dog\nb.PNG,cat\nc.d.webp,dog\n")
    listing = listed(flat)
    assert [p.label for p in listing.images] == [1, 0, 1, None, None]
    assert "(cat = 0, dog = 1, ...)" in listing.remarks[0]
    (flat / "labels.csv").write_text("file,label\na.jpg,dog\na.jpg,dog\na.jpg,cat\n")
    with pytest.raises(UserError, match=r"Line 4 of .*labels\.csv gives a\.jpg the label cat, an earlier one dog"):
        listed(flat)


CAPTIONS = {
    "captions.txt (tabs)": "a.jpg#0\tOne, two\na.jpg#1\tthree\n\nb.PNG\tfour\r\nc.d.webp\t\n",
    "captions.txt (commas)": 'image,caption\na.jpg,"One, two"\na.jpg,three\nb.PNG,four\n',
    "captions.csv": 'image_name,comment\na.jpg,"One,\n two"\na.jpg,three\nb,four\n',
    "captions.jsonl": '{"file": "a.jpg", "captions": ["One, two", "three"]}\n\n{"key": "b", "caption": " four"}\n',
    "metadata.jsonl": '{"file_name": "a.jpg", "text": "One, two"}\n{"file_name": "a.jpg", "text": "three"}\n'
    '{"file_name": "b.PNG", "text": "four"}\n',
    "metadata.csv": 'file_name,text\na.jpg,"One, two"\na.jpg,three\nb.PNG,four\n',
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_captions_are_read_in_every_format(flat: Path, kind: str) -> None:
    (flat / kind.split()[0]).write_text(CAPTIONS[kind])
    listing = listed(flat)
    assert [p.captions for p in listing.images] == [("One, two", "three"), ("four",), (), (), ()]
    assert any("3 of 5 images have no caption (first: c.d.webp)" in remark for remark in listing.remarks)
    assert [p.label for p in listing.images] == [None, None, None, 0, 0]  # the folders still are the classes


def test_labels_and_captions_go_together(flat: Path) -> None:
    (flat / "labels.csv").write_text("file,label\na.jpg,1\nb.PNG,2\n")
    (flat / "captions.jsonl").write_text(json.dumps({"file": "a.jpg", "caption": "x\u2028y"}) + "\n")
    (first, second, *_) = listed(flat).images
    assert (first.label, first.captions, second.label, second.captions) == (1, ("x y",), 2, ())


def test_a_text_beside_a_picture_is_its_caption(flat: Path) -> None:
    (flat / "a.txt").write_text("a dog\non a log\n")
    (flat / "sub" / "f.txt").write_text("")
    (flat / "README.txt").write_text("about")
    listing = listed(flat)
    assert [p.captions for p in listing.images] == [("a dog on a log",), (), (), (), ()]
    assert "1 .txt files are beside no picture (first: README.txt)" in listing.remarks[0]
    (flat / "b.txt").write_text("a cat")
    for limit in (1, 2):  # the text of the last one comes after it
        assert [p.captions for p in listed(flat, limit=limit).images] == [("a dog on a log",), ("a cat",)][:limit]


def test_texts_beside_pictures_are_captions_where_no_table_has_any(flat: Path) -> None:
    (flat / "a.txt").write_text("a dog\n")
    (flat / "labels.csv").write_text("file,label\na.jpg,1\nb.PNG,2\n")
    (first, second, *_) = listed(flat).images
    assert (first.label, first.captions, second.label, second.captions) == (1, ("a dog",), 2, ())
    (flat / "captions.csv").write_text("file,caption\nb.PNG,a cat\n")
    listing = listed(flat)
    assert [p.captions for p in listing.images[:2]] == [(), ("a cat",)]
    assert any("1 files" in remark and "(1 .txt)" in remark for remark in listing.remarks)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("labels.csv", "a.jpg,3\n", "has no column named file_name or filename or file"),
        ("labels.csv", "", "has no column named"),
        ("labels.csv", "file,label\n,3\n", r"Line 2 of .*labels\.csv names no image"),
        ("captions.jsonl", '{"file": "a.jpg"\n', r"Line 1 of .*captions\.jsonl is not a JSON object"),
        ("captions.jsonl", '\n["a.jpg"]\n', "Line 2 of"),
        ("captions.txt", "a.jpg\tx\nb.jpg y\n", "Line 2 of .* has no tab"),
    ],
)
def test_notes_that_make_no_sense_are_one_sentence(flat: Path, name: str, text: str, sentence: str) -> None:
    (flat / name).write_text(text)
    with pytest.raises(UserError, match=sentence):
        listed(flat)


def test_chosen_classes_of_a_folder(picture_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("class-2\nclass-0\n")
    listing = listed(picture_folder, classes=str(tmp_path / "list"))
    assert {(p.key[:7], p.label) for p in listing.images} == {("class-0", 0), ("class-2", 1)}
    assert len(listing.images) == 40


def test_links_and_hidden_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for name in ("._a.jpg", "a.jpg", "sub/b.jpg", "notes.md"):
        (root / name).touch()
    (root / ".cache").mkdir()
    (root / ".cache" / "c.jpg").touch()
    (root / "sub" / "up").symlink_to(root)
    (root / "lost.jpg").symlink_to(tmp_path / "nowhere")
    listing = listed(root)
    assert [p.key for p in listing.images] == ["a.jpg", "lost.jpg", "sub/b.jpg"]
    assert "1 files" in listing.remarks[0] and "1 .md" in listing.remarks[0]


name = st.text("ab.-_0", min_size=1, max_size=4).filter(lambda text: not text.startswith("."))


@settings(max_examples=30)
@given(paths=st.sets(st.lists(name, min_size=1, max_size=3).map("/".join), max_size=8))
def test_a_walk_is_sorted_and_whole(tmp_path_factory: pytest.TempPathFactory, paths: set[str]) -> None:
    root = tmp_path_factory.mktemp("walk")
    made = set()
    for path in sorted(paths):
        try:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()
        except OSError:  # a file where another path wants a folder
            continue
        if (root / path).is_file():
            made.add(path)
    found = [path for path, _ in walk(str(root))]
    assert found == sorted(made)
    assert all(file.size == os.stat(file.address).st_size for _, file in walk(str(root)))
