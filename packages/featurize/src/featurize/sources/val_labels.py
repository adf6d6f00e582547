"""The labels of ImageNet's validation images, which its tar file lacks, in the files people have them in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from featurize.errors import UserError
from featurize.io.addresses import read_text
from featurize.sources.class_lists import read_classes

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
SUBFOLDERS = (".", "data", "ILSVRC2012_devkit_t12/data")


@dataclass(frozen=True)
class ValLabels:
    """wnid of each validation image by its number, from 1 on, and the file that says so."""

    path: Path
    wnids: dict[int, str]


def find_val_labels(folder: Path) -> ValLabels | None:
    """The first file of labels in the folder, beside it or in one of the four folders above, or None.

    Raises UserError for one that is damaged.
    """
    readers = {
        "LOC_val_solution.csv": _from_kaggle,
        "imagenet_2012_validation_synset_labels.txt": _from_wnids,
        "val.txt": _from_positions,
        GROUND_TRUTH: _from_devkit,
    }
    for above in (folder, *folder.parents[:4]):
        for subfolder in SUBFOLDERS:
            for name, reader in readers.items():
                path = above / subfolder / name
                if path.is_file():
                    labels = reader(path)
                    if labels:
                        return ValLabels(path, labels)
    return None


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(str(path)).split("\n") if line.strip()]


def _number(name: str) -> int:
    return int(name.partition(".")[0].rpartition("_")[2])


def _damaged(path: Path, line: str) -> UserError:
    return UserError(
        f"{path} is not a file of validation labels: it has the line '{line[:60]}'; copy the original here."
    )


def _from_kaggle(path: Path) -> dict[int, str]:
    """Kaggle's `ILSVRC2012_val_00048981,n03995372 85 1 499 272`: a wnid and boxes."""
    line = ""
    wnids: dict[int, str] = {}
    for line in _lines(path)[1:]:
        try:
            name, prediction = line.split(",")
            wnids[_number(name)] = prediction.split()[0]
        except (ValueError, IndexError):
            raise _damaged(path, line) from None
    return wnids


def _from_wnids(path: Path) -> dict[int, str]:
    """A wnid a line, in the pictures' order."""
    lines = _lines(path)
    for line in lines:
        if not re.fullmatch(r"n\d{8}", line):
            raise _damaged(path, line)
    return dict(enumerate(lines, 1))


def _from_positions(path: Path) -> dict[int, str]:
    """Caffe's `ILSVRC2012_val_00000001.JPEG 65`: a name and the wnid's position in sorted order, from 0 on.

    Kaggle's `val.txt` has the names and running numbers, not labels, and a `val.txt` further up may be of other data:
    both give nothing.
    """
    wnids = read_classes("imagenet")
    pairs = [line.split() for line in _lines(path)]
    if not pairs or not pairs[0][0].startswith("ILSVRC2012_val_"):
        return {}
    positions: dict[int, int] = {}
    for pair in pairs:
        try:
            name, written = pair
            positions[_number(name)] = int(written)
        except ValueError:
            raise _damaged(path, " ".join(pair)) from None
    if all(number == position for number, position in positions.items()):
        return {}
    for number, position in positions.items():
        if not 0 <= position < len(wnids):
            raise _damaged(path, f"ILSVRC2012_val_{number:08d}.JPEG {position}")
    return {number: wnids[position] for number, position in positions.items()}


def _from_devkit(path: Path) -> dict[int, str]:
    """The development kit's `ILSVRC2012_ID` a line. These ids are in no sorted order: `meta.mat` beside it ties them to wnids."""
    import scipy.io

    meta = path.with_name("meta.mat")
    if not meta.is_file():
        raise UserError(
            f"{path} holds the development kit's own class numbers; copy meta.mat, which explains them, beside it."
        )
    lines = _lines(path)
    try:
        synsets = scipy.io.loadmat(meta, squeeze_me=True)["synsets"]
        wnids = {int(number): str(wnid) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"])}
        return {index: wnids[int(line)] for index, line in enumerate(lines, 1)}
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise UserError(
            f"{meta} does not explain the numbers in {path} ({type(error).__name__}); copy the originals here."
        ) from None
