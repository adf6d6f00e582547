"""Pictures in folders: any tree (`folder:`), and ImageNet's (`imagenet:`)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from featurize.errors import UserError
from featurize.sources import Listing, Picture, existing_folder

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


def list_folder(address: str, split: str, limit: int | None) -> Listing:
    """Every picture below a folder, by sorted path. The folders on the first level are the classes, in sorted order."""
    root = existing_folder(address)
    return _list_tree(root, limit)


def list_imagenet(address: str, split: str, limit: int | None) -> Listing:
    """ImageNet's tree `<wnid>/*.JPEG`, or a folder that holds it as `train/` and `val/`."""
    root = existing_folder(address)
    if (root / split).is_dir():
        root = root / split
    classes = [entry.name for entry in root.iterdir() if entry.is_dir()]
    strange = sorted(name for name in classes if not re.fullmatch(r"n\d{8}", name))
    if not classes or strange:
        found = f"'{strange[0]}'" if strange else "no folder"
        raise UserError(
            f"{root} is no ImageNet tree: its folders are named like n01440764, found {found}; use folder:{root}."
        )
    return _list_tree(root, limit)


def _list_tree(root: Path, limit: int | None) -> Listing:
    pictures: list[Picture] = []
    others = 0
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() not in EXTENSIONS:
                others += 1
                continue
            relative = path.relative_to(root)
            label = classes.index(relative.parts[0]) if len(relative.parts) > 1 else None
            pictures.append(Picture(relative.as_posix(), str(path), 0, path.stat().st_size, label))
            if len(pictures) == limit:
                return Listing(tuple(pictures))
    remarks = (f"{others} files in {root} have no picture's extension and were passed over.",) if others else ()
    return Listing(tuple(pictures), remarks)
