"""Random training reads: rows/s from a sealed store, beside a flat memory map and other formats.

python -m benchmarks.reads --out build/reads.md
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np
import zarr

from benchmarks.peers import peer_process, peers_option
from benchmarks.side_by_side import Contender, out_option, ratio, report, rounds_option, table, take_turns
from featurize.store.metadata import ArraySpec
from featurize.store.seal import seal
from featurize.store.write import prepare, write_block
from nestgen.stores.store import open_store

BLOCK_ROWS = 1024


@click.command()
@click.option("--rows", default=65_536, show_default=True, help="Rows of the store.")
@click.option("--batches", default=64, show_default=True, help="Batches a round.")
@click.option("--batch", default=256, show_default=True, help="Rows a batch.")
@peers_option
@rounds_option
@out_option
def main(rows: int, batches: int, batch: int, peers: bool, rounds: int, out: Path | None) -> None:
    """Random batches of 8x8x64 float16 rows, all files in the page cache, one thread asking."""
    with tempfile.TemporaryDirectory(prefix="reads-") as name:
        folder = Path(name)
        path = write_store(folder, rows)
        flat = np.load(folder / "flat.npy", mmap_mode="r")
        store, array = open_store(path), zarr.open_array(str(path), mode="r")
        flat_buffer = np.asarray(flat)

        def chosen(turn: int, number: int) -> np.ndarray:
            return np.random.default_rng([turn, number]).integers(rows, size=batch)

        views = np.zeros(batch, np.int64)
        np.testing.assert_array_equal(store.read(chosen(0, 0), views), flat[chosen(0, 0)][:, 0])
        per_batch = {
            "flat numpy memory map": lambda rows_B: flat_buffer[rows_B, 0],
            "nestgen's Store": lambda rows_B: store.read(rows_B, views),
            "zarr fancy indexing": lambda rows_B: array.oindex[rows_B],
        }

        # zarr takes seconds where the others take milliseconds: fewer batches, and the rate says it all.
        counts = {name: batches if name != "zarr fancy indexing" else max(1, batches // 16) for name in per_batch}

        def reader(name: str) -> Contender:
            def run(turn: int) -> None:
                for number in range(counts[name]):
                    assert len(per_batch[name](chosen(turn, number))) == batch

            return run

        contenders = {name: reader(name) for name in per_batch}
        with ExitStack() as stack:
            if peers:
                ask = stack.enter_context(peer_process("readers", folder, path))
                for title, (peer, share) in PEERS.items():
                    counts[title] = max(1, batches // share)
                    contenders[title] = lambda turn, peer=peer, title=title: ask(peer, turn, counts[title], batch)
            measured = take_turns(contenders, rounds)

    rates = {name: counts[name] * batch / one.wall for name, one in measured.items()}
    ours = rates["nestgen's Store"]
    cpu = {name: one.cpu / counts[name] for name, one in measured.items()}
    lines = [
        (
            name,
            f"{rate:,.0f}",
            ratio(ours, rate),
            ratio(cpu[name], cpu["nestgen's Store"]),
            f"{measured[name].spread:.0%}",
        )
        for name, rate in sorted(rates.items(), key=lambda item: -item[1])
    ]
    body = (
        f"Random batches of {batch} rows of 8x8x64 float16 from {rows:,} rows ({rows * 8192 / 2**20:,.0f} MiB, "
        "in the page cache), "
        f"medians of {rounds} rounds taken in turns.\n\n"
        + table(("reader", "rows/s", "Store is faster by", "by processor time", "spread"), lines)
        + "\n\nTargets: within 2x of the flat map, 20x zarr's fancy indexing. webdataset has no random access: a shuffled stream."
    )
    report("Random training reads", body, ("numpy", "zarr"), out)


PEERS = {
    "flat numpy memory map (peers' environment)": ("memmap", 1),
    "tensorstore, the same store": ("tensorstore", 8),
    "mosaicml-streaming (MDS)": ("streaming", 8),
    "webdataset, shuffled stream": ("webdataset", 4),
}


def write_store(folder: Path, rows: int) -> Path:
    """A sealed level of random values, one view, and the same rows in `flat.npy`."""
    shape, attributes = (rows, 1, 8, 8, 64), {"latent_shape": [8, 8, 64]}
    spec = ArraySpec(folder / "8x8x64.zarr", "level", shape, "float16", BLOCK_ROWS, "0" * 64, {}, attributes)
    flat = np.lib.format.open_memmap(folder / "flat.npy", "w+", np.float16, spec.shape)
    random = np.random.default_rng(0)
    for block in prepare(spec):
        part = spec.rows_of(block)
        values = random.standard_normal((len(part), *spec.shape[1:]), dtype=np.float32).astype(np.float16)
        flat[part.start : part.stop] = values
        write_block(spec, block, values)
    seal(spec)
    flat.flush()
    return spec.path


if __name__ == "__main__":
    main()
