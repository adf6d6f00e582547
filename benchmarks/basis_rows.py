"""How many images the basis is to be fitted on: angle and lost variance against the basis of all, and the time of the fit.

python -m benchmarks.basis_rows --source 'wds:../shared/data/imagenette64/train-*.tar' \
    --held-out 'wds:../shared/data/imagenette64/val-*.tar' --encoder timm:vit_tiny_patch16_224 \
    --weights ../shared/data/weights/vit_tin.safetensors --out build/basis_rows.md
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.side_by_side import out_option, report, table
from featurize.basis.moments import Moments, merge, merge_all, moments_of
from featurize.basis.svd import drift, fit
from featurize.encoders.registry import describe_encoder
from featurize.extraction.extract import extract
from featurize.extraction.fit import by_hash
from featurize.extraction.networks import encoder_spec
from featurize.recipe import read_request
from featurize.store.ledger import read_ledger
from featurize.store.read import open_array, read_rows

FITTED = 512  # images of the extraction's own basis
PART = 256  # images whose tokens are in memory at a time


def extracted(root: Path, source: str, networks: dict[str, Any], basis: Path | None = None) -> Path:
    """The base store of a source with all channels: its basis only turns the features, so others can be fitted on it."""
    options = networks | {
        "source": source, "out": str(root), "basis_rows": FITTED, "basis_tolerance": 1e9,
        "basis": None if basis is None else str(basis),
    }  # fmt: skip
    request = read_request(None, options, "1x1x1")
    channels = describe_encoder(encoder_spec(request.features)).channels
    extract(read_request(None, options | {"base_channels": channels}, "1x1x1"), 0, None)
    (base,) = root.glob("*/base.zarr")
    return base


def growing(base: Path, counts: Sequence[int]) -> Iterator[Moments]:
    """The moments of the tokens of the first so many images in the order in which a fit takes them."""
    array, rows = open_array(base), np.array(by_hash(read_ledger(base.parent.parent).keys))
    moments: Moments | None = None
    for first, last in zip([0, *counts], counts):
        parts = (rows[start : min(start + PART, last)] for start in range(first, last, PART))
        more = merge_all(moments_of(np.float32(read_rows(array, part)).reshape(-1, array.shape[-1])) for part in parts)
        moments = more if moments is None else merge(moments, more)
        yield moments


@click.command()
@click.option("--source", required=True, help="A SOURCE of `featurize extract`.")
@click.option("--held-out", help="Another, of which nothing is fitted.")
@click.option("--encoder", default="tiny", show_default=True)
@click.option("--weights", type=click.Path(path_type=Path))
@click.option("--keep", default=64, show_default=True, help="Channels of the base store.")
@click.option("--rows", default="128,512,2048,8192", show_default=True, help="Images that a basis is fitted on.")
@out_option
def main(
    source: str,
    held_out: str | None,
    encoder: str,
    weights: Path | None,
    keep: int,
    rows: str,
    out: Path | None,
) -> None:
    """Bases fitted on more and more images of one source."""
    with tempfile.TemporaryDirectory(prefix="basis-rows-") as name:
        networks = {"encoder": encoder, "z0": "pixels:8"} | ({"weights": str(weights)} if weights is not None else {})
        started = time.process_time()
        base = extracted(Path(name) / "fitted", source, networks)
        total, *_, channels = open_array(base).shape
        each = (time.process_time() - started) / (total + min(FITTED, total))
        counts = [*(count for count in map(int, rows.split(",")) if count < total), total]
        moments = list(growing(base, counts))
        others = None
        if held_out is not None:
            other = extracted(Path(name) / "held-out", held_out, networks, Path(name) / "fitted")
            (others,) = growing(other, [open_array(other).shape[0]])
    lines = []
    for count, part in zip(counts, moments):
        basis = fit(part)
        of_all = drift(basis, moments[-1], keep)
        of_others = [f"{drift(basis, others, keep)['lost_variance']:.1e}"] if others is not None else []
        lines.append(
            (
                f"{count:,}",
                f"{of_all['largest_angle_degrees']:.1f}",
                f"{of_all['lost_variance']:.1e}",
                *of_others,
                f"{count * each:,.1f}",
            )
        )
    head = ("images", "largest angle to that of all (degrees)", "variance lost, of all images")
    head += (("variance lost, of the held-out images",) if held_out else ()) + ("processor seconds to encode them",)
    body = (
        f"{total:,} images of `{source}` through {encoder}, {keep} of {channels} channels kept; variance lost is a share of what "
        f"the best {keep} directions keep" + (f"; `{held_out}` is held out" if others else "") + ".\n\n"
        + table(head, lines)
    )  # fmt: skip
    report("Images that the basis is fitted on", body, ("torch", "numpy"), out)


if __name__ == "__main__":
    main()
