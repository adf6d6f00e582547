"""What a store root holds, in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from featurize.basis.svd import effective_rank
from featurize.store.layout import is_sealed, list_arrays, shape_name, written_blocks
from featurize.store.ledger import read_ledger
from featurize.store.metadata import ArrayMetadata
from featurize.store.read import read_sealed_metadata
from featurize.store.seal import read_seal


def describe(root: Path) -> str:
    """Lines about the ledger, then about each array below `root`. Raises UserError when it is not a store root."""
    ledger = read_ledger(root)
    labels = ledger.labels
    classes = len(np.unique(labels[labels >= 0]))
    captions = pc.sum(pc.list_value_length(ledger.table["captions"])).as_py() or 0
    lines = [
        f"{root}: {ledger.rows:,} rows from {ledger.source}; {ledger.refused:,} pictures refused; "
        f"{_count(classes, 'class', 'classes') or 'no labels'}; {_count(captions, 'caption', 'captions') or 'no captions'}."
    ]
    return "\n".join([*lines, *(_describe_array(path, root) for path in list_arrays(root))])


def _count(number: int, one: str, many: str) -> str:
    """`1 class`, `3 classes`, and nothing for none."""
    return f"{number:,} {one if number == 1 else many}" if number else ""


def _describe_array(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix()
    if not is_sealed(path):
        done = len(written_blocks(path))
        return f"  {name}: unfinished, {done} blocks are written; run the command that was making it again."
    array = read_sealed_metadata(path)
    kind = str(array.attributes["kind"])
    size = array.nbytes / 1e6
    head = f"  {name}: {_KINDS[kind]}, {shape_name(array.shape)} {array.dtype}, {size:,.1f} MB, sealed"
    return "\n".join([f"{head} {str(read_seal(path)['sha256'])[:12]}", *_details(array, path, kind)])


_KINDS = {
    "base": "base store",
    "level": "level",
    "z0": "z_0",
    "labels": "labels",
    "text": "captions",
    "offsets": "captions by row",
}


def _details(array: ArrayMetadata, path: Path, kind: str) -> list[str]:
    attributes = array.attributes
    indent = "      "
    if kind in ("labels", "offsets"):
        return []
    if kind == "text":
        encoder = attributes["provenance"]["encoder"]
        return [f"{indent}text encoder {encoder['name']}; row 0 is the empty caption's"]
    lines = []
    if array.shape[1] == 2:
        lines.append(f"{indent}two views: the picture and its horizontal flip")
    if kind == "z0":
        codec = attributes["codec"]
        what = "moments (means, log-variances)" if codec["moments"] else "values"
        lines.append(
            f"{indent}codec {codec['name']} of pictures {codec['size']} px a side, {what}, latent scale {codec['scale']}"
        )
        return lines
    shares = np.array(attributes["explained_variance"])
    lines.append(
        f"{indent}encoder {attributes['encoder']}; its {len(shares)} channels explain {shares.sum():.1%} of the variance "
        f"before pooling (the first {shares[0]:.1%}); effective rank {effective_rank(shares):.1f}"
    )
    if kind == "base":
        seal = read_seal(path)
        drift, features = seal["basis_drift"], seal["features"]
        basis = attributes["provenance"]["basis"]
        if "taken" in basis:
            lines.append(f"{indent}basis taken from another store ({basis['taken'][:12]})")
        else:
            lines.append(
                f"{indent}basis fitted on {basis['rows']:,} pictures; against all of them the largest principal angle is "
                f"{drift['largest_angle_degrees']:.3f} degrees and {drift['lost_variance']:.2e} of the variance is lost"
            )
        lines.append(
            f"{indent}over {features['tokens']:,} tokens: effective rank {features['effective_rank']:.1f}; the 0.1% farthest "
            f"from the mean make {features['outlier_share']:.1%} of the first channel's variance"
        )
    return lines
