"""Peak memory and time of the scores of a reference of a million rows, in a space of 1,024 dimensions.

python -m benchmarks.score_memory --out build/score_memory.md
"""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import zarr

from benchmarks.side_by_side import out_option, report, table
from nestgen.scoring import statistics

BLOCK = 4096  # rows of a chunk on disk


@dataclass(frozen=True)
class Rows:
    """Vectors of a zarr array, read as they are wanted."""

    array: zarr.Array

    def __len__(self) -> int:
        return int(self.array.shape[0])

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
            return np.asarray(self.array[int(rows[0]) : int(rows[-1]) + 1], np.float32)
        chunks = np.split(rows, np.flatnonzero(np.diff(rows // BLOCK)) + 1)
        return np.concatenate([self[np.arange(one[0], one[-1] + 1)][one - one[0]] for one in chunks])


def random_rows(folder: Path, rows: int, dimensions: int) -> Rows:
    """Normal rows in float16, of a covariance that is not white."""
    array = zarr.create_array(
        folder / "rows.zarr", shape=(rows, dimensions), chunks=(BLOCK, dimensions), dtype="<f2", compressors=None
    )
    scale_D = np.linspace(0.1, 2, dimensions, dtype=np.float32)
    for first in range(0, rows, BLOCK):
        rng = np.random.default_rng(first)
        count = min(BLOCK, rows - first)
        array[first : first + count] = rng.standard_normal((count, dimensions), np.float32) * scale_D
    return Rows(array)


@click.command()
@click.option("--rows", default=1_281_167, show_default=True, help="Of the reference: ImageNet's.")
@click.option("--samples", default=50_000, show_default=True)
@click.option("--dimensions", default=1024, show_default=True)
@click.option("--most", default=statistics.MOST, show_default=True, help="Rows in the kernel and neighbour scores.")
@out_option
def main(rows: int, samples: int, dimensions: int, most: int, out: Path | None) -> None:
    """Statistics of random rows, then the scores of random samples against them: the process's peak memory after each."""
    statistics.MOST = most
    lines = []

    def done(what: str, started: float) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        lines.append((what, f"{time.process_time() - started:,.0f}", f"{peak:.2f}"))
        click.echo(f"{what}: {lines[-1][1]} s, peak {peak:.2f} GiB", err=True)

    build = Path("build").resolve()  # on a disk, where /tmp may be memory
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="score-memory-", dir=build) as name:
        started = time.process_time()
        reference_rows = random_rows(Path(name), rows, dimensions)
        done("rows made", started)
        started = time.process_time()
        reference = statistics.statistics_of(reference_rows)
        done(f"statistics: the Gaussian of all, kernel and neighbours of {min(most, rows):,}", started)
        x_ND = np.random.default_rng(1).standard_normal((samples, dimensions), np.float32)
        started = time.process_time()
        scores = statistics.measure(x_ND, reference)
        done(f"scores of {samples:,} samples", started)
    click.echo(scores, err=True)
    body = table(("step", "processor seconds", "peak so far, GiB"), lines)
    report(f"Scores of {rows:,} rows of {dimensions:,} dimensions", body, ("numpy", "torch", "zarr"), out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
