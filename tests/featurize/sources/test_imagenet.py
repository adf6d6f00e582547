"""ImageNet in every form people have it: the right label by wnid, subsets, and what is missing is said."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset

from featurize.errors import UserError
from featurize.sources import Listing, list_images, read
from featurize.sources import imagenet as imagenet_
from featurize.sources.class_lists import read_classes
from tests.featurize.conftest import random_picture

WNIDS = read_classes("imagenet")
HUNDRED = read_classes("imagenet100")


def jpeg(index: int) -> bytes:
    buffer = io.BytesIO()
    random_picture(index, 8, 8).save(buffer, format="JPEG")
    return buffer.getvalue()


def tree(root: Path, wnids: tuple[str, ...]) -> Path:
    """ImageNet's tree with two tiny pictures in the folder of each wnid."""
    content = jpeg(0)
    for wnid in wnids:
        (root / wnid).mkdir(parents=True)
        for number in (10026, 3):
            (root / wnid / f"{wnid}_{number}.JPEG").write_bytes(content)
    return root


def listed(address: object, split: str = "train", **options: object) -> Listing:
    return list_images(f"imagenet:{address}", split, options.pop("limit", None), **options)


def test_the_lists_of_classes_are_imagenets() -> None:
    from timm.data import ImageNetInfo

    assert list(WNIDS) == ImageNetInfo("imagenet-1k").label_names()
    assert (len(WNIDS), WNIDS[0], WNIDS[65], WNIDS[999]) == (1000, "n01440764", "n01751748", "n15075141")
    assert len(set(HUNDRED)) == 100
    assert set(HUNDRED) < set(WNIDS)
    assert {"n02869837", "n01749939", "n02090622"} < set(HUNDRED)  # the published list's first two and last


def test_the_whole_tree_is_labelled_in_standard_order_and_counted(tmp_path: Path) -> None:
    listing = listed(tree(tmp_path / "train", WNIDS).parent)
    assert [p.label for p in listing.images] == [label for label in range(1000) for _ in range(2)]
    assert [p.key for p in listing.images[:2]] == ["n01440764/n01440764_10026.JPEG", "n01440764/n01440764_3.JPEG"]
    assert listing.remarks == ("2,000 pictures are here; the train split of ImageNet-1k has 1,281,167.",)

    hundred = listed(tmp_path, classes="imagenet100")
    assert hundred.remarks == ()
    assert [p.key[:9] for p in hundred.images[::2]] == sorted(HUNDRED)
    assert [p.label for p in hundred.images] == [label for label in range(100) for _ in range(2)]
    assert listed(tmp_path, classes="imagenet100", limit=3).images == hundred.images[:3]

    (tmp_path / "two.txt").write_text(f"{WNIDS[7]} cock\n\n{WNIDS[3]}\ttiger shark\n")
    two = listed(tmp_path, classes=str(tmp_path / "two.txt"))
    assert [(p.key[:9], p.label) for p in two.images[::2]] == [(WNIDS[3], 0), (WNIDS[7], 1)]


def test_a_partial_tree_is_numbered_by_itself_or_as_the_whole_and_says_so(tmp_path: Path) -> None:
    tree(tmp_path / "val", (WNIDS[0], WNIDS[10]))
    listing = listed(tmp_path, "val")
    assert {p.label for p in listing.images} == {0, 1}
    assert "2 of ImageNet's 1000 classes are here" in listing.remarks[0]
    whole = listed(tmp_path, "val", classes="imagenet")
    assert {p.label for p in whole.images} == {0, 10}
    assert f"Classes without a folder in {tmp_path}/val: 998 of 1000 (first: {WNIDS[1]})" in whole.remarks[0]
    with pytest.raises(UserError, match=r"none of the folders of the classes in --classes .like .*, 100 in all"):
        listed(tmp_path, "val", classes="imagenet100")
    tree(tmp_path / "val" / ".." / "foreign", (WNIDS[0], "n99999999"))
    assert "not classes of ImageNet-1k: 1 of 2 (first: n99999999)" in listed(tmp_path / "foreign").remarks[0]


def test_kaggles_layout_and_links_to_class_folders_are_followed(tmp_path: Path) -> None:
    tree(tmp_path / "ILSVRC/Data/CLS-LOC/train", WNIDS[:2])
    assert {p.label for p in listed(tmp_path).images} == {0, 1}
    (tmp_path / "linked").mkdir()
    for wnid in WNIDS[:2]:
        (tmp_path / "linked" / wnid).symlink_to(tmp_path / "ILSVRC/Data/CLS-LOC/train" / wnid)
    (tmp_path / "linked" / WNIDS[0] / "circle").symlink_to(tmp_path / "linked" / WNIDS[0])
    assert len(listed(tmp_path / "linked").images) == 4


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("", "is empty"), ("n01440764\nn01440764", "names n01440764 twice"), ("cat", "'cat', which is not a wnid")],
)
def test_a_wrong_list_of_classes_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    tree(tmp_path / "train", WNIDS[:1])
    (tmp_path / "list").write_text(text)
    with pytest.raises(UserError, match=sentence):
        listed(tmp_path, classes=str(tmp_path / "list"))
    with pytest.raises(UserError, match="give a file, or one of imagenet, imagenet100"):
        listed(tmp_path, classes="imagenet99")
    with pytest.raises(UserError, match="no class folders to choose"):
        list_images("scenes", "train", None, "imagenet100")


def test_another_tree_is_refused(picture_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found 'class-0'; use folder:"):
        listed(picture_folder)
    random_picture(0).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="neither folders named like n01440764 nor pictures"):
        listed(tmp_path)


# The first five validation pictures: their classes' places among the sorted wnids.
VAL = (65, 970, 230, 809, 516)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """The official validation folder with its first five pictures."""
    folder = tmp_path / "data" / "val"
    folder.mkdir(parents=True)
    for number in range(1, 6):
        (folder / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(jpeg(number))
    return folder


def write_devkit(folder: Path) -> None:
    """The development kit's two files, with class numbers in no sorted order, as the real ones, then other synsets."""
    import scipy.io

    folder.mkdir(parents=True)
    order = np.random.default_rng(0).permutation(1000)
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(i + 1, WNIDS[place], "a, b", 0) for i, place in enumerate(order)] + [(1001, "n00001740", "entity", 9)]
    synsets = np.array(rows, dtype=fields).reshape(-1, 1)
    scipy.io.savemat(folder / "meta.mat", {"synsets": synsets})
    numbers = [int(np.flatnonzero(order == place)[0]) + 1 for place in VAL]
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in numbers))


def test_the_flat_validation_folder_takes_its_labels_from_any_of_their_files(flat: Path) -> None:
    with pytest.raises(UserError, match=r"are not beside them; copy there LOC_val_solution\.csv"):
        listed(flat, "val")
    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 6)]
    above = flat.parent.parent

    def solution() -> None:
        lines = [f"{name},{WNIDS[place]} 1 2 3 4 {WNIDS[place]} 5 6 7 8 " for name, place in zip(names, VAL)]
        (above / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(lines)]) + "\n")

    def positions() -> None:
        (above / "data" / "val.txt").write_text("".join(f"{name}.JPEG {place}\n" for name, place in zip(names, VAL)))

    def wnids() -> None:
        path = flat.parent / "imagenet_2012_validation_synset_labels.txt"
        path.write_text("".join(f"{WNIDS[place]}\n" for place in VAL))

    def devkit() -> None:
        write_devkit(above / "ILSVRC2012_devkit_t12" / "data")

    for write, file in (
        (solution, "LOC_val_solution.csv"),
        (positions, "val.txt"),
        (wnids, "labels.txt"),
        (devkit, "truth.txt"),
    ):
        write()
        listing = listed(flat, "val")
        assert [p.label for p in listing.images] == list(VAL)
        assert listing.remarks[0].endswith(f"{file}.")
        assert "5 pictures are here; the val split of ImageNet-1k has 50,000" in listing.remarks[1]
        chosen = flat / "two.txt"
        chosen.write_text(f"{WNIDS[970]}\n{WNIDS[65]}\n")
        assert [(p.key[-6:], p.label) for p in listed(flat, "val", classes=str(chosen)).images] == [
            ("1.JPEG", 0),
            ("2.JPEG", 1),
        ]
        chosen.unlink()
        for path in above.rglob("*"):
            if path.suffix in (".csv", ".txt"):
                path.unlink()


def test_wrong_files_of_validation_labels_are_one_sentence(flat: Path) -> None:
    truth = flat / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("490\n361\n")
    with pytest.raises(UserError, match=r"copy meta\.mat"):
        listed(flat, "val")
    (flat / "meta.mat").write_bytes(b"no")
    with pytest.raises(UserError, match="does not explain the numbers"):
        listed(flat, "val")
    (flat / "imagenet_2012_validation_synset_labels.txt").write_text(f"{WNIDS[1]}\n{WNIDS[2]}\n")
    with pytest.raises(UserError, match="no label for ILSVRC2012_val_00000003"):
        listed(flat, "val")
    (flat / "imagenet_2012_validation_synset_labels.txt").write_text("65\n")
    with pytest.raises(UserError, match="not a file of validation labels"):
        listed(flat, "val")
    # Kaggle's val.txt numbers the pictures: that is no label.
    (flat / "imagenet_2012_validation_synset_labels.txt").unlink()
    truth.unlink()
    (flat / "val.txt").write_text("".join(f"ILSVRC2012_val_{n:08d} {n}\n" for n in range(1, 6)))
    with pytest.raises(UserError, match="are not beside them"):
        listed(flat, "val")


def shards(path: Path, samples: list[tuple[str, int | None]]) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for index, (key, label) in enumerate(samples):
            writer.write({"__key__": key, "jpg": jpeg(index), **({} if label is None else {"cls": label})})
    return path


def test_shards_are_labelled_by_cls_or_wnid_and_checked(tmp_path: Path) -> None:
    (tmp_path / "list").write_text(f"{WNIDS[9]}\n{WNIDS[5]}\n")
    for samples in ([("0001", 9), ("0002", 5), ("0003", 0)], [(f"{WNIDS[n]}_{n}", None) for n in (9, 5, 0)]):
        path = shards(tmp_path / "train-0.tar", samples)
        assert [p.label for p in listed(path).images] == [9, 5, 0]
        chosen = listed(f"{tmp_path}/train-{{0..0}}.tar", classes=str(tmp_path / "list"), limit=2).images
        assert [(p.key, p.label) for p in chosen] == [(samples[0][0], 1), (samples[1][0], 0)]
    with pytest.raises(UserError, match="number the classes in another way; use wds:"):
        listed(shards(tmp_path / "a.tar", [(f"{WNIDS[9]}_1", 9), (f"{WNIDS[5]}_1", 4)]))
    with pytest.raises(UserError, match="label 1000 of 0001"):
        listed(shards(tmp_path / "a.tar", [("0001", 1000)]))
    with pytest.raises(UserError, match="have no labels"):
        listed(shards(tmp_path / "a.tar", [("0001", None)]))
    with pytest.raises(UserError, match="holds no images"):
        listed(shards(tmp_path / "a.tar", []))


def test_the_official_tar_files_are_read_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet_, "COUNTS", {"train": 4, "val": 5})
    tree(tmp_path / "t", (WNIDS[0], WNIDS[8]))
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in (WNIDS[0], WNIDS[8]):
            with tarfile.open(tmp_path / f"{wnid}.tar", "w") as inner:
                for path in sorted((tmp_path / "t" / wnid).iterdir()):
                    inner.add(path, path.name)
            outer.add(tmp_path / f"{wnid}.tar", f"{wnid}.tar")
    listing = listed(tmp_path / "ILSVRC2012_img_train.tar")
    assert [(p.key, p.label) for p in listing.images[1:3]] == [
        ("n01440764/n01440764_3", 0),
        ("n01514859/n01514859_10026", 8),
    ]
    assert all(read(p) == jpeg(0) for p in listing.images)
    assert listing.remarks == ()
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in range(1, 6):
            (tmp_path / "one").write_bytes(jpeg(number))
            tar.add(tmp_path / "one", f"ILSVRC2012_val_{number:08d}.JPEG")
    write_devkit(tmp_path / "ILSVRC2012_devkit_t12" / "data")
    assert [p.label for p in listed(tmp_path / "ILSVRC2012_img_val.tar", "val").images] == list(VAL)
    far = "memory://data/ILSVRC2012_img_val.tar"
    fsspec.filesystem("memory").pipe_file(far, (tmp_path / "ILSVRC2012_img_val.tar").read_bytes())
    monkeypatch.chdir(tmp_path)  # whose labels are not those of images elsewhere
    with pytest.raises(UserError, match=r"images in memory://data can't be found, .* copy the images here"):
        listed(far, "val")


def test_real_pictures_of_ten_classes(real_data: Path, tmp_path: Path) -> None:
    listing = listed(f"{real_data}/imagenette", "val")
    assert len(listing.images) == 200
    assert "10 of ImageNet's 1000 classes are here" in listing.remarks[0]
    wanted = {wnid: WNIDS.index(wnid) for wnid in {p.key[:9] for p in listing.images}}
    whole = listed(f"{real_data}/imagenette", "val", classes="imagenet").images
    assert {p.key[:9]: p.label for p in whole} == wanted
    originals = listed(f"{real_data}/imagenet-originals/*.tar").images
    assert len({p.label for p in originals}) == len(originals) == 200
