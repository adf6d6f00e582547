"""The whole extraction beside the encoder's bare forward pass on ready tensors.

python -m benchmarks.extraction --source wds:/data/train-{000000..000009}.tar --out build/extraction.md
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

import click
import numpy as np
import torch

from benchmarks.photos import random_vit, write_shards
from benchmarks.side_by_side import out_option, report, rounds_option, table, take_turns
from featurize.encoders import EncoderSpec, load_encoder
from featurize.extract import extract
from featurize.pictures import crop, decode
from featurize.progress import LOG
from featurize.recipe import read_request
from featurize.sources import list_pictures, read

BATCH = 32
FIT_SHARE = 65_536 / 1_281_167  # of the pictures are encoded twice: the default --basis-rows, of ImageNet
BARE, WHOLE = "bare forward pass", "featurize extract"


@click.command()
@click.option("--source", help="A SOURCE of `featurize extract`. [default: JPEGs of 500x375, generated]")
@click.option("--pictures", default=256, show_default=True, help="How many a round; fewer leave batches half empty.")
@click.option("--model", default="vit_base_patch16_224", show_default=True, help="A timm model, with random weights.")
@click.option("--levels", default="8x8x64,6x6x56,4x4x48,2x2x40", show_default=True, help="Levels derived.")
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@rounds_option
@out_option
def main(
    source: str | None,
    pictures: int,
    model: str,
    levels: str,
    precision: str,
    rounds: int,
    out: Path | None,
) -> None:
    """Pictures/s of everything `featurize extract` does in one process, and of the network alone in the same process:
    one thread each (or one GPU), weights loaded before."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="extraction-") as name:
        folder = Path(name)
        weights = random_vit(folder, model)
        what = f"pictures of `{source}`"
        if source is None:
            write_shards(folder / "shards", pictures)
            source, what = f"wds:{folder / 'shards'}/*.tar", "generated JPEGs of 500x375"
        spec = EncoderSpec(f"timm:{model}", str(weights), "{}", precision)
        encoder = load_encoder(spec, device)
        x_BCHW = _ready(source, pictures, encoder.input_size, encoder.interpolation).to(device)
        logs: list[Path] = []

        def bare(turn: int) -> None:
            with (
                torch.inference_mode(),
                torch.autocast(x_BCHW.device.type, torch.bfloat16, enabled=precision != "float32"),
            ):
                for start in range(0, len(x_BCHW), BATCH):
                    encoder.forward(x_BCHW[start : start + BATCH])
            if device != "cpu":
                torch.cuda.synchronize()

        def whole(turn: int | str, basis: str | None) -> None:
            root = folder / f"root-{turn}"
            options = {
                "source": source, "out": str(root), "encoder": spec.name, "weights": str(weights), "precision": precision,
                "limit": pictures, "basis": basis, "basis_tolerance": 1.0, "z0": "pixels:32",
            }  # fmt: skip
            with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
                extract(read_request(None, options, levels), workers=0, scheduler=None)
            if basis is not None:
                logs.append(Path(shutil.move(root / LOG, folder / f"log-{turn}.jsonl")))
                shutil.rmtree(root)

        bare(0)  # warm
        # The fit encodes a fixed number of pictures, most of a few and a twentieth of ImageNet's: it is counted apart.
        whole("basis", None)
        measured = take_turns({BARE: bare, WHOLE: lambda turn: whole(turn, str(folder / "root-basis"))}, rounds)
        stages = _stages(logs)

    rates = {name: pictures / one.wall for name, one in measured.items()}
    by_cpu = measured[BARE].cpu / max(measured[WHOLE].cpu, 1e-9)
    lines = [
        (name, f"{rates[name]:.2f}", f"{pictures / max(one.cpu, 1e-9):.2f}", f"{one.spread:.0%}")
        for name, one in measured.items()
    ]
    shares = rates[WHOLE] / rates[BARE], by_cpu
    lines.append(("extraction / bare", *(f"{share:.2f}" for share in shares), ""))
    with_fit = (1 / (1 / share + FIT_SHARE) for share in shares)
    lines.append(("the same with the fit, computed", *(f"{share:.2f}" for share in with_fit), ""))
    seconds = sum(stages.values())
    split = table(("stage", "share of its time"), [(stage, f"{part / seconds:.1%}") for stage, part in stages.items()])
    body = (
        f"{pictures} {what} through {model} in {precision} on {device}, one thread, medians of {rounds}; "
        f"levels {levels}, z_0 pixels:32. The basis is there already; the last line adds its fit, which encodes "
        f"65,536 of ImageNet's 1,281,167 pictures once more.\n\n"
        + table(("", "pictures/s", "pictures per second of processor time", "spread"), lines)
        + "\n\nWhere the extraction's time goes (encode holds the network, the projection and the moments):\n\n"
        + split
        + "\n\nTarget: 0.9 or better."
    )
    report("Whole extraction beside the bare forward pass", body, ("torch", "timm", "pillow", "numpy"), out)


def _ready(source: str, count: int, side: int, interpolation: str) -> torch.Tensor:
    """The normalised tensors (count, 3, side, side) of the pictures' centred squares."""
    crops = []
    for picture in list_pictures(source, "train", count).pictures:
        image = decode(read(picture))
        short = min(image.size)
        left, upper = (image.width - short) // 2, (image.height - short) // 2
        crops.append(crop(image, (left, upper, left + short, upper + short), side, interpolation))
    if len(crops) < count:
        raise click.ClickException(f"{source} holds {len(crops)} pictures; give a smaller --pictures.")
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


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
