"""The basis: exact moments and eigh, beside sklearn's IncrementalPCA and Dask's svd_compressed, on the same tokens.

python -m benchmarks.basis_fit --out build/basis_fit.md
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import click
import dask
import dask.array as da
import numpy as np
import scipy.linalg

from benchmarks.peers import peer_process, peers_option
from benchmarks.side_by_side import Contender, out_option, ratio, report, rounds_option, table, take_turns
from featurize.basis.moments import merge_all, moments_of
from featurize.basis.svd import fit
from featurize.execution.devices import keep_memory

OURS = "featurize: exact moments, eigh"


def tokens_like_a_vits(count: int, channels: int, seed: int) -> np.ndarray:
    """float32 tokens (count, channels) with a spectrum that falls as 1/k, and one channel whose mean is 200 times its spread."""
    random = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(random.standard_normal((channels, channels)))
    scale = 1.0 / np.sqrt(np.arange(1, channels + 1))
    tokens = (random.standard_normal((count, channels), dtype=np.float32) * scale.astype(np.float32)) @ turn.T.astype(
        np.float32
    )
    tokens[:, 7] += 200 * tokens[:, 7].std()
    return tokens


@click.command()
@click.option("--tokens", default=100_352, show_default=True, help="Tokens: 196 for each picture of a ViT-B/16.")
@click.option("--channels", default=768, show_default=True, help="Width of the encoder.")
@click.option("--keep", default=64, show_default=True, help="Directions that are compared.")
@click.option("--dask/--no-dask", "with_dask", default=True, help="Measure Dask's svd_compressed as well.")
@peers_option
@rounds_option
@out_option
def main(tokens: int, channels: int, keep: int, with_dask: bool, peers: bool, rounds: int, out: Path | None) -> None:
    """Seconds to the first directions, and their error against a float64 LAPACK SVD of all centred tokens."""
    keep_memory()  # as every extraction does
    x_ND = tokens_like_a_vits(tokens, channels, 0)
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def ours(turn: int) -> None:
        basis = fit(merge_all(moments_of(part) for part in _parts(x_ND, 196 * 32)))
        found[OURS] = basis.components[:, :keep], basis.eigenvalues[:keep]

    def compressed(iterations: int, iterator: str = "power") -> Contender:
        def run(turn: int) -> None:
            x = da.from_array(x_ND, chunks=(196 * 64, channels))
            centred = x - x.mean(axis=0)
            with dask.config.set(scheduler="threads", num_workers=threads):
                _, s, v = da.linalg.svd_compressed(centred, keep, n_power_iter=iterations, iterator=iterator, seed=turn)
                s, v = dask.compute(s, v)
            found[f"Dask svd_compressed, {iterations} {iterator} iterations"] = v.T, s**2 / (tokens - 1)

        return run

    contenders: dict[str, Contender] = {OURS: ours}
    if with_dask:
        contenders |= {
            "Dask svd_compressed, 0 power iterations": compressed(0),
            "Dask svd_compressed, 4 power iterations": compressed(4),  # xeofs' choice
            # Enough to come near; plain power iterations overflow float32.
            "Dask svd_compressed, 25 QR iterations": compressed(25, "QR"),
        }
    with tempfile.TemporaryDirectory(prefix="basis-fit-") as folder, ExitStack() as stack:
        if peers:
            np.save(Path(folder) / "tokens.npy", x_ND)
            ask = stack.enter_context(peer_process("scikit-learn", folder))
            batch = 5 * channels  # sklearn's default
            theirs = f"sklearn IncrementalPCA, batches of {batch:,}"
            contenders[theirs] = lambda turn: ask(keep, batch)
        measured = take_turns(contenders, rounds)
        if peers:
            with np.load(Path(folder) / "found.npz") as arrays:
                found[theirs] = arrays["directions"], arrays["variances"]

    # By QR first: the singular values and right vectors of R are those of the whole matrix.
    centred = x_ND.astype(np.float64)
    centred -= centred.mean(axis=0)
    (triangle,) = scipy.linalg.qr(centred, mode="r", overwrite_a=True, check_finite=False)
    _, values, rows_VD = scipy.linalg.svd(triangle[:channels])
    best, variances = rows_VD[:keep].T, values[:keep] ** 2 / (tokens - 1)
    lines = []
    for name, one in measured.items():
        directions, eigenvalues = found[name]
        angle = np.degrees(scipy.linalg.subspace_angles(best, directions.astype(np.float64)).max())
        error = np.abs(eigenvalues - variances).max() / variances[0]
        lost = 1 - float((np.linalg.norm(centred_on(rows_VD, values, directions)) ** 2) / (values[:keep] ** 2).sum())
        lines.append(
            (
                name,
                f"{one.wall:.2f}",
                ratio(one.wall, measured[OURS].wall),
                ratio(one.cpu, measured[OURS].cpu),
                f"{angle:.1e}",
                f"{error:.1e}",
                f"{max(lost, 0):.1e}",
            )
        )
    head = (
        "fit", "seconds", "featurize is faster by", "by processor time",
        "subspace angle (degrees)", "variances' error (of the largest)", "variance lost",
    )  # fmt: skip
    body = (
        f"{tokens:,} float32 tokens of {channels} channels, the first {keep} directions, {threads} thread(s), "
        f"medians of {rounds}; "
        f"errors against a float64 LAPACK QR and SVD of all centred tokens.\n\n{table(head, lines)}\n\n"
        "Targets: 10x faster than both, at smaller error."
    )
    report("Fitting the basis", body, ("numpy", "scipy", "dask"), out)


def centred_on(rows_VD: np.ndarray, values: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """The centred tokens, as S V^T of their SVD, on other directions."""
    return (values[:, None] * rows_VD) @ directions.astype(np.float64)


def _parts(x_ND: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    for start in range(0, len(x_ND), rows):
        yield x_ND[start : start + rows]


if __name__ == "__main__":
    main()
