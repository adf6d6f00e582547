"""Every path of a store root, spelt here and nowhere else (docs/store-format.md)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

METADATA = "zarr.json"
SEAL = ".seal.json"


def ledger_path(root: Path) -> Path:
    """The ledger: one line for each image of the source."""
    return root / "rows.parquet"


def listing_path(root: Path) -> Path:
    """Which listing of the source the ledger was made of: by it a run sees that nothing has changed."""
    return root / "rows.listing.json"


def draft_ledger_path(root: Path) -> Path:
    """The ledger of a run that --max-bad stopped, as far as it came."""
    return root / "rows.draft.parquet"


def first_pass_folder(root: Path) -> Path:
    """What the first pass over a source has found out and encoded, until the ledger is whole and the blocks have their places."""
    return root / "first-pass"


def log_path(root: Path) -> Path:
    """What each extraction did, one JSON object a line."""
    return root / "extract.log.jsonl"


def labels_path(root: Path) -> Path:
    return root / "labels.zarr"


def encoder_folder(root: Path, encoder: str) -> Path:
    """The folder of an encoder's arrays."""
    return root / encoder.replace(":", "-").replace("/", "-")


def base_path(folder: Path) -> Path:
    """The base store in an encoder's folder."""
    return folder / "base.zarr"


def level_path(folder: Path, shape: tuple[int, ...]) -> Path:
    """The level of shape (h, w, c) in an encoder's folder, and `z_0` in a codec's."""
    return folder / f"{shape_name(shape)}.zarr"


def basis_path(folder: Path) -> Path:
    """The SVD basis in an encoder's folder."""
    return folder / "basis.safetensors"


def basis_parts_folder(folder: Path, fingerprint: str) -> Path:
    """Moments of the basis's fit, until it is done; `fingerprint` is that of the base store."""
    return folder / f"basis-{fingerprint[:12]}.parts"


def basis_part_path(parts: Path, images: str) -> Path:
    """The moments of one part of the basis's fit, in the folder of its parts; `images` is a digest of which it holds."""
    return parts / f"{images}.moments.safetensors"


def moments_path(folder: Path) -> Path:
    """The moments of all tokens of the base store in an encoder's folder."""
    return folder / "moments.safetensors"


def z0_path(root: Path, codec: str, latent_shape: tuple[int, int, int]) -> Path:
    return level_path(root / codec, latent_shape)


def text_path(root: Path, tokens: int, width: int) -> Path:
    """The embedded captions of a root, or the prompts of a folder."""
    return level_path(root / "text", (tokens, width))


def offsets_path(root: Path) -> Path:
    """Which text rows belong to which row of a root."""
    return root / "text" / "offsets.zarr"


def prompts_path(root: Path) -> Path:
    return root / "prompts.parquet"


def shape_name(shape: tuple[int, ...]) -> str:
    """`8x8x64`."""
    return "x".join(map(str, shape))


def root_of(array: Path) -> Path:
    """The store root of an array in an encoder's, a codec's or the text folder."""
    return array.parent.parent


def metadata_path(array: Path) -> Path:
    return array / METADATA


def chunk_path(array: Path, block: int, dimensions: int) -> Path:
    """The file, or object, of a block's chunk."""
    return array.joinpath("c", str(block), *["0"] * (dimensions - 1))


def seal_path(array: Path) -> Path:
    return array.with_suffix(SEAL)


def blocks_folder(array: Path) -> Path:
    """The records of an array that is not sealed yet."""
    return array.with_suffix(".blocks")


def record_path(array: Path, block: int) -> Path:
    return blocks_folder(array) / f"{block:06d}.json"


def metadata_copy_path(array: Path) -> Path:
    """The copy of an unfinished array's zarr.json, among its records."""
    return blocks_folder(array) / "zarr.json.copy"


def block_moments_path(array: Path, block: int) -> Path:
    """The moments of one block's tokens, until the base store is sealed."""
    return blocks_folder(array) / f"{block:06d}.moments.safetensors"


def is_sealed(array: Path) -> bool:
    return seal_path(array).is_file()


def has_metadata(array: Path) -> bool:
    """Whether an array has been created: a run that dies before its metadata is written leaves an empty folder at most."""
    return metadata_path(array).is_file()


def written_blocks(array: Path) -> set[int]:
    """The blocks of an unfinished array that have a record."""
    folder = blocks_folder(array)
    if not folder.exists():
        return set()
    names = (path.name for path in folder.iterdir())
    return {int(name.removesuffix(".json")) for name in names if name.endswith(".json") and name[0] != "."}


def list_roots(folder: Path) -> list[Path]:
    """The store roots at or below a folder, two folders deep."""
    return sorted(
        {path.parent for above in ("", "*/", "*/*/") for path in folder.glob(f"{above}{ledger_path(Path())}")}
    )


def list_arrays(root: Path) -> list[Path]:
    """The arrays below a root, a base store before the levels that come from it."""
    arrays = set(_found_arrays(root))
    return sorted(
        arrays, key=lambda path: (path.parent != root, str(path.parent), path != base_path(path.parent), path.name)
    )


def list_bases(root: Path) -> list[Path]:
    """The base stores of a root, one an encoder."""
    return [path for path in list_arrays(root) if path == base_path(path.parent)]


def _found_arrays(root: Path) -> Iterator[Path]:
    """The arrays of which there is a zarr.json, a seal, or records; some more than once."""
    for folder in ("", "*/"):
        yield from (path.parent for path in root.glob(f"{folder}*.zarr/{METADATA}"))
        yield from (path.with_name(f"{path.name.removesuffix(SEAL)}.zarr") for path in root.glob(f"{folder}*{SEAL}"))
        yield from (path.with_suffix(".zarr") for path in root.glob(f"{folder}*.blocks"))
