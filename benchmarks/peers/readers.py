"""Runs in the readers' environment: writes the peers' formats, then reads rows on request.

python readers.py FOLDER STORE          FOLDER holds flat.npy; STORE is the sealed zarr array
stdin, a line each:  NAME SEED BATCHES BATCH     stdout: a line when it is done
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorstore
import webdataset
import zarr
from streaming import MDSWriter, StreamingDataset

Reader = Callable[[int, int, int], None]


def write_peers(folder: Path, rows: np.ndarray) -> None:
    kind = f"ndarray:{rows.dtype.name}:{','.join(map(str, rows.shape[1:]))}"
    with MDSWriter(out=str(folder / "mds"), columns={"z": kind}, progress_bar=False) as writer:
        for row in rows:
            writer.write({"z": row})
    (folder / "wds").mkdir()
    with webdataset.ShardWriter(str(folder / "wds" / "%06d.tar"), maxcount=4096, verbose=0) as shards:
        for index, row in enumerate(rows):
            buffer = io.BytesIO()
            np.save(buffer, row)
            shards.write({"__key__": f"{index:08d}", "z.npy": buffer.getvalue()})


def batches(seed: int, count: int, batch: int, rows: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(rows, size=batch) for _ in range(count)]


def readers(folder: Path, store: Path) -> dict[str, Reader]:
    flat = np.load(folder / "flat.npy", mmap_mode="r")
    rows = len(flat)
    by_zarr = zarr.open_array(str(store), mode="r")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store)}}
    by_tensorstore = tensorstore.open(spec, read=True).result()
    by_streaming = StreamingDataset(local=str(folder / "mds"), batch_size=1, shuffle=False)
    shards = sorted(map(str, (folder / "wds").glob("*.tar")))

    def each(take: Callable[[np.ndarray], np.ndarray]) -> Reader:
        def read(seed: int, count: int, batch: int) -> None:
            for chosen in batches(seed, count, batch, rows):
                got = take(chosen)
                assert got.shape == (batch, *flat.shape[1:])

        return read

    # No random access: the nearest it has is a shuffled stream, which goes on from call to call.
    data = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False)
    streams: dict[int, Iterator[tuple[np.ndarray]]] = {}

    def stream(seed: int, count: int, batch: int) -> None:
        if batch not in streams:
            pipe = data.shuffle(1024, initial=1024).decode().to_tuple("z.npy").batched(batch, partial=False)
            streams[batch] = iter(pipe.repeat())
            next(streams[batch])  # fills the shuffle buffer
        for _ in range(count):
            (got,) = next(streams[batch])
            assert got.shape == (batch, *flat.shape[1:])

    return {
        "memmap": each(lambda chosen: flat[chosen]),
        "zarr": each(lambda chosen: by_zarr.oindex[chosen]),
        "tensorstore": each(lambda chosen: by_tensorstore[chosen].read().result()),
        "streaming": each(lambda chosen: np.stack([by_streaming[int(row)]["z"] for row in chosen])),
        "webdataset": stream,
    }


def main() -> None:
    folder, store = Path(sys.argv[1]), Path(sys.argv[2])
    write_peers(folder, np.load(folder / "flat.npy", mmap_mode="r"))
    known = readers(folder, store)
    for read in known.values():
        read(0, 1, 256)  # opened, started, warm
    print("ready", flush=True)
    for line in sys.stdin:
        name, *numbers = line.split()
        known[name](*map(int, numbers))
        print("done", flush=True)


if __name__ == "__main__":
    main()
