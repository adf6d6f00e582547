"""The whole extraction beside the encoder's bare forward pass on ready tensors.

python -m benchmarks.extraction --source wds:/data/train-{000000..000009}.tar --out build/extraction.md

On a GPU: `--precision bfloat16 --workers 1 --decoders 16 --pictures 8192`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.photos import random_vae, random_vit, source_or_shards
from benchmarks.side_by_side import Contender, out_option, report, rounds_option, table, take_turns
from featurize.codecs import load_codec, parse_codec
from featurize.encoders import EncoderSpec, load_encoder
from featurize.execution.devices import views_per_batch
from featurize.execution.precision import inference
from featurize.extraction.extract import extract
from featurize.extraction.loader import INNER_BATCH
from featurize.images.crop import SQUARE, InputSpec, crop
from featurize.images.decode import decode
from featurize.recipe import read_request
from featurize.sources import list_images, read
from featurize.store.layout import log_path

FIT_SHARE = 8_192 / 1_281_167  # of the pictures are encoded twice: the default --basis-rows, of ImageNet
BARE, WHOLE = "bare forward pass", "featurize extract"

Use = list[tuple[datetime, float]]  # of a GPU: when, and the share of the time that a kernel ran


@click.command()
@click.option("--source", help="A SOURCE of `featurize extract`. [default: JPEGs of 500x375, generated]")
@click.option("--pictures", default=256, show_default=True, help="How many a round; fewer leave batches half empty.")
@click.option("--model", default="vit_base_patch16_224", show_default=True, help="A timm model, with random weights.")
@click.option("--levels", default="8x8x64,6x6x56,4x4x48,2x2x40", show_default=True, help="Levels derived.")
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--decoder", default="pillow", show_default=True, help="As in `featurize extract`; nvjpeg on a GPU.")
@click.option("--z0", default="pixels:32", show_default=True, metavar="CODEC:SIDE", help="Codec of z_0.")
@click.option("--z0-weights", help="Weights of a codec that has some. [default: Stable Diffusion's VAE, random]")
@click.option("--z0-precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--workers", type=click.IntRange(min=1), multiple=True, help="Also with so many, once they are running.")
@click.option(
    "--decoders", type=click.IntRange(min=0), help="Of each worker. [default: as `featurize extract` chooses]"
)
@rounds_option
@out_option
def main(
    source: str | None,
    pictures: int,
    model: str,
    levels: str,
    precision: str,
    decoder: str,
    z0: str,
    z0_weights: str | None,
    z0_precision: str,
    workers: tuple[int, ...],
    decoders: int | None,
    rounds: int,
    out: Path | None,
) -> None:
    """Pictures/s of everything `featurize extract` does in one process, and of the network alone in the same process:
    one thread each (or one GPU), weights loaded before. With --workers the rate is that from when each has done a block
    on, so that starting processes does not count."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="extraction-") as name:
        folder = Path(name)
        weights = random_vit(folder, model)
        source, what = source_or_shards(source, folder, pictures)
        if z0_weights is None and not z0.startswith("pixels"):
            z0_weights = str(random_vae(folder))
        spec = EncoderSpec(f"timm:{model}", str(weights), "{}", precision)
        encoder = load_encoder(spec, device)
        codec = load_codec(replace(parse_codec(z0, z0_weights, None, precision=z0_precision), device=device))
        x_BHWC = _ready(source, pictures, codec.input)
        x_BCHW = torch.from_numpy(_ready(source, pictures, InputSpec(encoder.input_size, encoder.interpolation)))
        x_BCHW = x_BCHW.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous().to(device)
        logs: dict[int, list[Path]] = {}
        used: dict[int, list[Use]] = {}

        batch = views_per_batch(device, INNER_BATCH, pictures)

        def bare(turn: int) -> None:
            for start in range(0, len(x_BCHW), batch):
                with inference(device, precision):
                    encoder.forward(x_BCHW[start : start + batch])
                if codec.name != "pixels":
                    codec.encode(x_BHWC[start : start + batch])
            if device != "cpu":
                torch.cuda.synchronize()

        def whole(turn: int | str, basis: str | None, workers: int = 0) -> None:
            root = folder / f"root-{turn}-{workers}"
            options = {
                "source": source, "out": str(root), "encoder": spec.name, "weights": str(weights), "precision": precision,
                "decoder": decoder, "limit": pictures, "basis": basis, "basis_tolerance": 1.0,
                "z0": z0, "z0_weights": z0_weights, "z0_precision": z0_precision,
            }  # fmt: skip
            with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), _watching(device) as use:
                extract(read_request(None, options, levels), workers, scheduler=None, decoders=decoders)
            if basis is not None:
                log = Path(shutil.move(log_path(root), folder / f"log-{turn}-{workers}.jsonl"))
                logs.setdefault(workers, []).append(log)
                used.setdefault(workers, []).append(use)
                shutil.rmtree(root)

        bare(0)  # warm
        # The fit encodes a fixed number of pictures, most of a few and a twentieth of ImageNet's: it is counted apart.
        whole("basis", None)
        contenders: dict[str, Contender] = {BARE: bare}
        for number in (0, *workers):
            contenders[_name(number)] = partial(whole, basis=str(folder / "root-basis-0"), workers=number)
        measured = take_turns(contenders, rounds)
        last = workers[-1] if workers else 0
        stages = _stages(logs[last])
        steady = {
            _name(number): statistics.median(_steady_rate(log, number) for log in logs[number]) for number in workers
        }
        busy = {
            _name(number): statistics.median(_use_between(*pair) for pair in zip(logs[number], used[number]))
            for number in logs
            if all(used[number])
        }

    rates = {name: pictures / one.wall for name, one in measured.items()} | steady
    by_cpu = measured[BARE].cpu / max(measured[WHOLE].cpu, 1e-9)
    lines = [
        (
            name,
            f"{rates[name]:.2f}",
            f"{rates[name] / rates[BARE]:.2f}",
            f"{pictures / max(one.cpu, 1e-9):.2f}",
            f"{one.spread:.0%}",
            *([f"{busy[name]:.0%}" if name in busy else ""] if busy else []),
        )
        for name, one in measured.items()
    ]
    shares = {"on the clock": rates[_name(last)] / rates[BARE]} | ({} if workers else {"by processor time": by_cpu})
    with_fit = ", ".join(f"{1 / (1 / share + FIT_SHARE):.2f} {how}" for how, share in shares.items())
    of_bare = ", ".join(f"{share:.2f} {how}" for how, share in shares.items())
    seconds = sum(stages.values())
    split = table(("stage", "share of its time"), [(stage, f"{part / seconds:.1%}") for stage, part in stages.items()])
    where = "cpu, one thread each" if device == "cpu" else torch.cuda.get_device_name(device)
    body = (
        f"{pictures} {what} through {model} in {precision} on {where}, medians of {rounds}; "
        f"levels {levels}, z_0 {z0} in {z0_precision}, decoder {decoder}. The basis is there already.\n\n"
        + table(
            (
                "",
                "pictures/s",
                "of bare",
                "pictures per second of processor time",
                "spread",
                *(["GPU in use"] if busy else []),
            ),
            lines,
        )
        + f"\n\n{_name(last)} is {of_bare} of bare; with the fit, which encodes 8,192 of ImageNet's 1,281,167 pictures "
        f"once more, by calculation {with_fit}."
        + "\n\nWhere the extraction's time goes (encode holds the network, the projection and the moments):\n\n"
        + split
        + "\n\nTarget: 0.9 or better."
    )
    report("Whole extraction beside the bare forward pass", body, ("torch", "timm", "pillow", "numpy"), out)


def _ready(source: str, count: int, spec: InputSpec) -> np.ndarray:
    """The images' centred squares, uint8 (count, side, side, 3)."""
    with ThreadPoolExecutor() as pool:  # a GPU waits for them
        images = list_images(source, "train", count).images
        crops = list(pool.map(lambda image: crop(decode(read(image)), SQUARE, spec), images))
    if len(crops) < count:
        raise click.ClickException(f"{source} holds {len(crops)} pictures; give a smaller --pictures.")
    return np.stack(crops)


def _name(workers: int) -> str:
    return f"{WHOLE}, {workers} worker{'s'[: workers > 1]}" if workers else WHOLE


def _blocks(log: Path) -> list[tuple[datetime, dict[str, Any]]]:
    """When each block was done, and what the log says of it."""
    entries = map(json.loads, log.read_text().splitlines())
    return [(datetime.fromisoformat(entry["time"]), entry) for entry in entries if entry["event"] == "block"]


def _steady_rate(log: Path, workers: int) -> float:
    """Pictures/s once each worker has done a block, to the last one's end."""
    blocks = _blocks(log)
    if len(blocks) <= workers:
        raise click.ClickException(f"{len(blocks)} blocks are too few for {workers} workers; give more --pictures.")
    pictures = sum(entry["pictures"] for _, entry in blocks[workers:])
    return pictures / (blocks[-1][0] - blocks[workers - 1][0]).total_seconds()


def _use_between(log: Path, use: Use) -> float:
    """Mean share of the time that the GPU had a kernel to run, between the first block's end and the last one's."""
    times = [time for time, _ in _blocks(log)]
    return statistics.fmean([share for time, share in use if times[0] <= time <= times[-1]] or [float("nan")])


@contextmanager
def _watching(device: str) -> Iterator[Use]:
    """What nvidia-smi says of the GPU, ten times a second; nothing of a processor."""
    use: Use = []
    if device == "cpu":
        yield use
        return
    ask = ["nvidia-smi", "--id=0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    process = subprocess.Popen(ask, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = process.stdout
    thread = threading.Thread(target=lambda: use.extend((datetime.now(UTC), float(line) / 100) for line in lines))
    thread.start()
    try:
        yield use
    finally:
        process.terminate()
        thread.join()


def _stages(logs: list[Path]) -> dict[str, float]:
    """Seconds a stage, summed over the runs' logs."""
    seconds: dict[str, float] = {}
    for log in logs:
        for line in log.read_text().splitlines():
            for stage, part in json.loads(line).get("seconds", {}).items():
                seconds[stage] = seconds.get(stage, 0.0) + part
    return seconds


if __name__ == "__main__":
    main()
