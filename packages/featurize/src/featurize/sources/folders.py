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
from featurize.sources.annotations import ANNOTATION_FILES, Annotations, read_annotations, sidecar_caption
from featurize.sources.class_lists import read_classes
from featurize.sources.listing import EXTENSIONS, Listing, Query, SourceImage


def list_folder(query: Query) -> Listing:
    """Every image below a folder, by sorted path. The folders directly in it are the classes, in sorted order.

    A file of ANNOTATION_FILES directly in the folder gives labels or captions instead; a `.txt` beside an image is its caption.
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
    annotation_files: dict[str, File] = {}
    labels = {name: label for label, name in enumerate(classes)}

    def found() -> Iterator[SourceImage]:
        for path, file in walk(root, folders):
            stem, _, extension = path.rpartition(".")
            if extension.lower() in EXTENSIONS and stem:
                top, slash, _ = path.partition("/")
                yield SourceImage(path, file.address, 0, file.size, labels[top] if slash else None, (), file.version)
            elif path in ANNOTATION_FILES:
                annotation_files[path] = file
            elif extension == "txt":
                texts[stem] = file
            else:
                others[f".{extension}" if stem else path] += 1

    images = list(tqdm(islice(found(), limit), desc="listing", unit=" pictures", delay=2))
    whole = limit is None or len(images) < limit
    # A walk that stopped early, or went through some folders only, may not have come to the annotations.
    annotations = read_annotations(root, annotation_files if whole and folders is None else None)
    if annotations is not None:
        images, more_remarks = _annotated(images, annotations, whole)
        remarks += more_remarks
    elif any(image.key.rpartition(".")[0] in texts for image in images):
        images, more_remarks = _with_sidecars(images, texts, whole)
        remarks += more_remarks
    elif texts:
        others[".txt"] += len(texts)
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(3))
        remarks.append(
            f"{others.total():,} files in {root} have no picture's extension and were passed over ({kinds})."
        )
    return Listing(tuple(images), tuple(remarks))


def _annotated(images: list[SourceImage], annotations: Annotations, whole: bool) -> tuple[list[SourceImage], list[str]]:
    """The images with the labels and captions that the annotations give for their path, with or without its extension."""
    annotated = []
    unused = set(annotations.named)
    for image in images:
        name = next((n for n in (image.key, image.key.rpartition(".")[0]) if n in annotations.named), None)
        unused.discard(name or "")
        label = annotations.labels.get(name or "") if annotations.labels else image.label
        annotated.append(replace(image, label=label, captions=tuple(annotations.captions.get(name or "", ()))))
    remarks = list(annotations.remarks)
    if unused and whole:
        remarks.append(
            f"{len(unused):,} names in {', '.join(annotations.files)} are of no picture (first: {min(unused)})."
        )
    return annotated, remarks


def _with_sidecars(
    images: list[SourceImage], texts: dict[str, File], whole: bool
) -> tuple[list[SourceImage], list[str]]:
    beside = [texts.pop(image.key.rpartition(".")[0], None) for image in images]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        captions = pool.map(lambda file: sidecar_caption(file) if file else (), beside)
        captioned = [replace(image, captions=captions_) for image, captions_ in zip(images, captions, strict=True)]
    first = min(texts, default="")
    remarks = [f"{len(texts):,} .txt files are beside no picture (first: {first}.txt)."] if texts and whole else []
    return captioned, remarks
