"""Pictures in folders: a flat one or any tree, with the labels and captions that lie beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

from tqdm import tqdm

from featurize.errors import UserError
from featurize.io.addresses import AT_ONCE, File, existing_folder, subfolders, walk
from featurize.sources.annotations import NOTES, Notes, read_notes, sidecar_caption
from featurize.sources.class_lists import read_classes
from featurize.sources.listing import EXTENSIONS, Listing, Query, SourceImage


def list_folder(query: Query) -> Listing:
    """Every picture below a folder, by sorted path. The folders right in it are the classes, in sorted order.

    A file of NOTES right in the folder gives labels or captions instead, and a `.txt` beside a picture is its caption.
    """
    root = existing_folder(query.address)
    classes = read_classes(query.classes) if query.classes else None
    return list_tree(
        root, classes if classes is not None else subfolders(root), query.limit, chosen=classes is not None
    )


def list_tree(root: str, classes: Sequence[str], limit: int | None, chosen: bool = False) -> Listing:
    """The pictures below `root`; the label of one in the folder `classes[i]` is i. With `chosen`, only of these folders."""
    remarks: list[str] = []
    folders = None
    if chosen:
        there = set(subfolders(root))
        folders = [name for name in classes if name in there]
        if not folders:
            raise UserError(
                f"{root} has none of the {len(classes)} classes' folders, like {classes[0]}; check --classes."
            )
        if len(folders) < len(classes):
            lost = next(name for name in classes if name not in there)
            remarks.append(
                f"{len(classes) - len(folders)} of the {len(classes)} classes have no folder in {root}: {lost}..."
            )
    others: Counter[str] = Counter()
    texts: dict[str, File] = {}
    notes_files: dict[str, File] = {}
    labels = {name: label for label, name in enumerate(classes)}

    def found() -> Iterator[SourceImage]:
        for path, file in walk(root, folders):
            stem, _, extension = path.rpartition(".")
            if extension.lower() in EXTENSIONS and stem:
                top, slash, _ = path.partition("/")
                yield SourceImage(path, file.address, 0, file.size, labels[top] if slash else None, (), file.version)
            elif path in NOTES:
                notes_files[path] = file
            elif extension == "txt":
                texts[stem] = file
            else:
                others[f".{extension}" if stem else path] += 1

    pictures = list(tqdm(islice(found(), limit), desc="listing", unit=" pictures", delay=2))
    whole = limit is None or len(pictures) < limit
    # A walk that stopped early, or went through some folders only, may not have come to the notes.
    notes = read_notes(root, notes_files if whole and folders is None else None)
    if notes is not None:
        pictures, told = _noted(pictures, notes, whole)
        remarks += told
    elif any(picture.key.rpartition(".")[0] in texts for picture in pictures):
        pictures, told = _with_sidecars(pictures, texts, whole)
        remarks += told
    elif texts:
        others[".txt"] += len(texts)
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(3))
        remarks.append(
            f"{others.total():,} files in {root} have no picture's extension and were passed over ({kinds})."
        )
    return Listing(tuple(pictures), tuple(remarks))


def _noted(pictures: list[SourceImage], notes: Notes, whole: bool) -> tuple[list[SourceImage], list[str]]:
    """The pictures with the labels and captions that the notes have under their path, with or without its extension."""
    noted = []
    unused = set(notes.named)
    for picture in pictures:
        name = next((n for n in (picture.key, picture.key.rpartition(".")[0]) if n in notes.named), None)
        unused.discard(name or "")
        label = notes.labels.get(name or "") if notes.labels else picture.label
        noted.append(replace(picture, label=label, captions=tuple(notes.captions.get(name or "", ()))))
    remarks = list(notes.remarks)
    if unused and whole:
        remarks.append(f"{len(unused):,} names in {', '.join(notes.files)} are of no picture (first: {min(unused)}).")
    return noted, remarks


def _with_sidecars(
    pictures: list[SourceImage], texts: dict[str, File], whole: bool
) -> tuple[list[SourceImage], list[str]]:
    beside = [texts.pop(picture.key.rpartition(".")[0], None) for picture in pictures]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        captions = pool.map(lambda file: sidecar_caption(file) if file else (), beside)
        captioned = [
            replace(picture, captions=captions_) for picture, captions_ in zip(pictures, captions, strict=True)
        ]
    first = min(texts, default="")
    remarks = [f"{len(texts):,} .txt files are beside no picture (first: {first}.txt)."] if texts and whole else []
    return captioned, remarks
