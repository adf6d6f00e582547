"""Pictures of a shard behind a slow network: read ahead by large requests, beside a request for each.

python -m benchmarks.remote_reads --out build/remote_reads.md
"""

from __future__ import annotations

import http.server
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click

from benchmarks.photos import write_shards
from benchmarks.side_by_side import Contender, out_option, ratio, report, rounds_option, table, take_turns
from featurize.sources import list_images, read, read_in_order

EACH, AHEAD = "a request for each picture, one after another", "read ahead"


@click.command()
@click.option("--pictures", default=256, show_default=True, help="JPEGs of 500x375, in shards of 64.")
@click.option(
    "--latency", default=40.0, show_default=True, help="Milliseconds that the server sleeps before each answer."
)
@rounds_option
@out_option
def main(pictures: int, latency: float, rounds: int, out: Path | None) -> None:
    """An HTTP server of this process, which sleeps; the same bytes are read in both ways."""
    with tempfile.TemporaryDirectory(prefix="remote-") as name, _server(Path(name), latency / 1000) as (address, asked):
        shards = write_shards(Path(name), pictures)
        images = list_images("wds:" + "::".join(f"{address}/{shard.name}" for shard in shards), "train", None).images
        if [read(image) for image in images] != [reader() for reader in read_in_order(images)]:
            raise click.ClickException("the two ways read other bytes")
        size = sum(image.size for image in images) / len(images)
        requests: dict[str, int] = {}

        def counted(way: str, contender: Contender) -> Contender:
            def run(turn: int) -> None:
                asked.clear()
                contender(turn)
                requests[way] = len(asked)

            return run

        ways: dict[str, Contender] = {
            EACH: lambda turn: [read(image) for image in images].clear(),
            AHEAD: lambda turn: [len(reader()) for reader in read_in_order(images)].clear(),
        }
        measured = take_turns({way: counted(way, contender) for way, contender in ways.items()}, rounds)
    lines = [
        (
            way,
            f"{pictures / took.wall:,.0f}",
            ratio(measured[EACH].wall, took.wall),
            requests[way],
            f"{took.spread:.0%}",
        )
        for way, took in measured.items()
    ]
    body = (
        f"{pictures} pictures of {size / 1000:.0f} kB in {len(shards)} shards, {latency:g} ms before each answer, medians of "
        f"{rounds}; one process, one thread that takes the bytes.\n\n"
        + table(("way", "pictures/s", "times as many", "requests", "spread"), lines)
    )
    report("Reading behind a slow network", body, ("fsspec", "aiohttp"), out)


@contextmanager
def _server(folder: Path, latency: float) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the ranges that were asked for."""
    asked: list[str] = []

    class Slow(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            time.sleep(latency)
            super().do_HEAD()

        def do_GET(self) -> None:
            time.sleep(latency)
            wanted = self.headers.get("Range", "bytes=0-")
            asked.append(wanted)
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            with open(self.translate_path(self.path), "rb") as file:
                size = file.seek(0, 2)
                file.seek(int(first))
                data = file.read(int(last or size) + 1 - int(first))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{size}")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    main()
