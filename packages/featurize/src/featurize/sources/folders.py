"""Pictures in folders: a flat one or any tree, with the labels and captions that lie beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from featurize.errors import UserError
from featurize.io.addresses import AT_ONCE, File, existing_folder, subfolders, walk
from featurize.sources.annotations import ANNOTATION_FILES, annotate, read_annotations, read_sidecar
from featurize.sources.class_lists import read_classes
from featurize.sources.listing import EXTENSIONS, Listing, Query, SourceImage
from featurize.sources.outside_text import Oddities, caption_in, printable, same_form

STORE_MARK = "rows.parquet"  # in every store root: what lies there was made by featurize


def list_folder(query: Query) -> Listing:
    """Every image below a folder, by sorted path. The folders directly in it that hold images are the classes, in sorted order.

    A file of ANNOTATION_FILES directly in the folder gives labels or captions instead; where none gives captions, a `.txt` beside
    an image is its caption.
    """
    root = existing_folder(query.address)
    return list_tree(root, read_classes(query.classes) if query.classes else None, query.limit)


def list_tree(root: str, chosen: Sequence[str] | None, limit: int | None) -> Listing:
    """The pictures below `root`, labelled by the folders directly in it. With `chosen`, only of these folders, and the label of
    one in the folder `chosen[i]` is i."""
    remarks: list[str] = []
    folders = _folders_of(root, chosen, remarks) if chosen is not None else None
    tree = _walked(root, folders, limit)
    # A walk that stopped early, or went through some folders only, may not have come to the annotations.
    annotations = read_annotations(root, tree.annotation_files if tree.whole and folders is None else None)
    images, classes, more = _labelled(root, tree, chosen)
    remarks += more
    if annotations is not None:
        annotated = annotate(images, annotations, root, tree.whole)
        if annotated is None:  # the first images are not named; is any?
            listing = list_tree(root, chosen, None)
            return replace(listing, images=listing.images[:limit])
        images, more = annotated
        remarks += more
        classes = annotations.classes if annotations.labels else classes
    in_tables = annotations is not None and any(annotations.captions.values())
    if not in_tables and any(_stem(image) in tree.texts for image in images):
        images, more = _with_sidecars(images, tree)
        remarks += more
    elif tree.texts:
        tree.others[".txt"] += len(tree.texts)
    if tree.others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in tree.others.most_common(3))
        remarks.append(
            f"{tree.others.total():,} files in {root} have no picture's extension and were passed over ({kinds})."
        )
    return Listing(tuple(images), tuple(remarks), classes)


@dataclass
class _Tree:
    """What lies below a folder. The images' labels number the folders directly in it as `tops` does."""

    images: list[SourceImage] = field(default_factory=list)
    tops: dict[str, int] = field(default_factory=dict)
    texts: dict[str, File] = field(default_factory=dict)
    annotation_files: dict[str, File] = field(default_factory=dict)
    stores: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    whole: bool = True


def _walked(root: str, folders: list[str] | None, limit: int | None) -> _Tree:
    """Everything below `root`, or below some folders directly in it, up to the first images, `limit` of them, and what lies
    before the next one: the text beside the last."""
    tree = _Tree()
    with tqdm(desc="listing", unit=" pictures", delay=2) as progress:
        for path, file in walk(root, folders):
            stem, _, extension = path.rpartition(".")
            key = printable(path)
            if path in ANNOTATION_FILES:
                tree.annotation_files[path] = file
            elif not file.is_plain:
                tree.others["of no plain file"] += 1
            elif extension.lower() in EXTENSIONS and stem:
                if len(tree.images) == limit:
                    tree.whole = False
                    break
                top, slash, _ = path.partition("/")
                label = tree.tops.setdefault(top, len(tree.tops)) if slash else None
                tree.images.append(SourceImage(key, file.address, 0, file.size, label, (), file.version))
                progress.update()
            elif extension == "txt":
                tree.texts[printable(stem)] = file
            else:
                if path.rpartition("/")[2] == STORE_MARK and "/" in path:
                    tree.stores.append(key.rpartition("/")[0])
                tree.others[f".{printable(extension)}" if stem else key] += 1
    return tree


def _folders_of(root: str, chosen: Sequence[str], remarks: list[str]) -> list[str]:
    """The folders of chosen classes that are there. Raises UserError where there is none."""
    there = {same_form(name): name for name in subfolders(root)}
    folders = [there[name] for name in chosen if name in there]
    if not folders:
        raise UserError(
            f"{root} has none of the folders of the classes in --classes (like {chosen[0]}, {len(chosen):,} in all); check them."
        )
    if len(folders) < len(chosen):
        lost = next(name for name in chosen if name not in there)
        remarks.append(
            f"Classes without a folder in {root}: {len(chosen) - len(folders)} of {len(chosen)} (first: {lost})."
        )
    return folders


def _labelled(
    root: str, tree: _Tree, chosen: Sequence[str] | None
) -> tuple[list[SourceImage], tuple[str, ...], list[str]]:
    """The images, labelled by their classes, the classes' names, and remarks."""
    remarks: list[str] = []
    images = tree.images
    if tree.stores:
        inside = tuple(f"{store}/" for store in tree.stores)
        images = [image for image in images if not image.key.startswith(inside)]
        remarks.append(
            f"Folders that are stores of featurize were passed over: {len(inside)} (first: {tree.stores[0]})."
        )
    if chosen is not None:
        names = list(chosen)
        order = {name: number for number, name in enumerate(chosen)}
        labels = {old: order[same_form(top)] for top, old in tree.tops.items()}
    else:
        used = {image.label for image in images} if tree.stores else set(tree.tops.values())
        found = sorted(top for top, label in tree.tops.items() if label in used)
        if not tree.whole and found:  # folders that sort before those seen, and that the walk has not come to
            earlier = [name for name in subfolders(root) if name < found[-1] and name not in tree.tops]
            found = sorted([*found, *(name for name in earlier if holds_images(root, name))])
        labels = {tree.tops[top]: number for number, top in enumerate(found) if top in tree.tops}
        names = [printable(top) for top in found]
        remarks += _remarks_on_classes(root, names, tree.whole and bool(tree.tops))
    if any(old != new for old, new in labels.items()):
        images = [image if image.label is None else replace(image, label=labels[image.label]) for image in images]
    return images, tuple(names) if labels else (), remarks


def holds_images(root: str, folder: str) -> bool:
    """Whether there is an image anywhere in a folder directly in `root`."""
    return any(path.rpartition(".")[2].lower() in EXTENSIONS for path, _ in walk(root, [folder]))


def _remarks_on_classes(root: str, names: list[str], whole: bool) -> list[str]:
    remarks = []
    if whole and (empty := [name for name in map(printable, subfolders(root)) if name not in names]):
        remarks.append(f"Folders in {root} without a picture, which are no classes: {len(empty)} (first: {empty[0]}).")
    if all(name.isdecimal() for name in names) and [*map(int, names)] != sorted(map(int, names)):
        at = next(number for number, name in enumerate(names) if int(name) != number)
        remarks.append(
            f"The classes' folders are named by numbers, but sorted as text, as ImageFolder does it: the label of folder "
            f"{names[at]} is {at}. A labels.csv numbers them otherwise."
        )
    return remarks


def _with_sidecars(images: list[SourceImage], tree: _Tree) -> tuple[list[SourceImage], list[str]]:
    """The images with the captions in the text files beside them, and remarks."""
    beside = [tree.texts.pop(_stem(image), None) for image in images]
    odd = Oddities()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        texts = pool.map(lambda file: read_sidecar(file) if file else b"", beside)
        captioned = [
            replace(image, captions=caption_in(text, image.key, odd)) for image, text in zip(images, texts, strict=True)
        ]
    remarks = odd.remarks
    if tree.texts and tree.whole:
        remarks.insert(0, f"{len(tree.texts):,} .txt files are beside no picture (first: {min(tree.texts)}.txt).")
    return captioned, remarks


def _stem(image: SourceImage) -> str:
    """The image's key without its extension, as `_Tree.texts` names what lies beside it."""
    return image.key.rpartition(".")[0]
