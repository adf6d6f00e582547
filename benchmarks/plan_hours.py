"""The seconds that `featurize plan --measure` foretells beside those that the extraction then takes, in turns.

python -m benchmarks.plan_hours --data ../shared/data --out build/plan_hours.md
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import psutil

from benchmarks.photos import random_vit
from benchmarks.side_by_side import out_option, report, rounds_option, table
from featurize.extraction.extract import extract
from featurize.extraction.plan import measured_speed
from featurize.recipe import Request, read_request


def requests(data: Path, folder: Path, share: float) -> Iterator[tuple[str, Request, int]]:
    """(what it is, the request, its images): scenes, small photos and photos of ImageNet's size through a ViT-B."""
    tiny = {"encoder": "timm:vit_tiny_patch16_224", "weights": str(data / "weights" / "vit_tin.safetensors")}
    base = {"encoder": "timm:vit_base_patch16_224", "weights": str(random_vit(folder, "vit_base_patch16_224"))}
    cases: list[tuple[str, dict[str, Any], str, int]] = [
        ("scenes of 32 px, `tiny`", {"source": "scenes:32", "z0": "pixels:32"}, "4x4x16,2x2x32", 3000),
        (
            "photos of 64 px, ViT-tiny",
            tiny | {"source": f"wds:{data}/imagenette64/train-*.tar", "z0": "pixels:64"},
            "4x4x16,2x2x16",
            3000,
        ),
        (
            "ImageNet's originals, ViT-B/16 in bfloat16",
            base | {"source": f"wds:{data}/imagenet-originals/*.tar", "z0": "pixels:64", "precision": "bfloat16"},
            "8x8x64,4x4x48",
            160,
        ),
    ]
    for what, options, levels, most in cases:
        count = max(1, round(share * most))
        fixed = {
            "out": str(folder / what.split(",")[0].replace(" ", "-")),
            "limit": count,
            "basis_rows": max(32, count // 10),
        }
        yield what, read_request(None, options | fixed | {"basis_tolerance": 1.0}, levels), count


@click.command()
@click.option("--data", required=True, type=click.Path(path_type=Path), help="The folder of ../shared/data.")
@click.option("--share", default=1.0, show_default=True, help="Of the images.")
@click.option("--workers", default=0, show_default=True)
@rounds_option
@out_option
def main(data: Path, share: float, workers: int, rounds: int, out: Path | None) -> None:
    """One after the other, each recipe anew, with the load of the machine meanwhile."""
    lines = []
    with tempfile.TemporaryDirectory(prefix="plan-hours-") as name:
        for turn in range(rounds):
            for what, request, count in requests(data.resolve(), Path(name), share):
                out_of_turn = request.features.model_copy(update={"out": f"{request.features.out}-{turn}"})
                request = request.model_copy(update={"features": out_of_turn})
                speed = measured_speed(request, count, workers, None)
                foretold = speed.seconds(count, min(count, request.features.basis_rows))
                start = time.perf_counter()
                extract(request, workers, None)
                took = time.perf_counter() - start
                load = f"{psutil.getloadavg()[0]:.0f}"
                lines.append(
                    (
                        what,
                        f"{count:,}",
                        f"{speed.pictures:,}",
                        f"{foretold:.1f}",
                        f"{took:.1f}",
                        f"{foretold / took - 1:+.0%}",
                        load,
                    )
                )
                click.echo(" | ".join(lines[-1]), err=True)
    head = ("recipe", "images", "of the trial", "foretold, seconds", "took", "", "load")
    body = (
        f"{workers} workers (0: in one process); seconds on the clock.\n\n{table(head, lines)}\n\nTarget: within 25 %."
    )
    report("Hours foretold", body, ("torch", "timm", "numpy"), out)


if __name__ == "__main__":
    main()
