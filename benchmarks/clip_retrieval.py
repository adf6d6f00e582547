"""The whole extraction beside clip-retrieval's inference: same shards, same open_clip network, same random weights.

python -m benchmarks.clip_retrieval --out build/clip_retrieval.md
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import open_clip
import torch

from benchmarks.peers import FOLDER, python_of
from benchmarks.photos import write_shards
from benchmarks.side_by_side import out_option, ratio, report, rounds_option, table, take_turns

OURS, THEIRS, HALF = "featurize extract", "clip-retrieval inference", "featurize extract, bfloat16"
SHARD = 32  # pictures
MODEL = "ViT-B-16-quickgelu"  # of open_clip: featurize's `clip`, and what peers/clip-retrieval.py names
BATCH_ON_GPU = 256  # theirs: clip-retrieval's default


@click.command()
@click.option("--pictures", default=768, show_default=True, help="Pictures of the long run.")
@click.option(
    "--start-pictures",
    default=256,
    show_default=True,
    help="Pictures of the short run, subtracted; fewer leave batches half empty.",
)
@click.option("--threads", default=os.cpu_count(), show_default=True, help="Threads, and workers, of each.")
@click.option("--bfloat16", is_flag=True, help="Measure featurize in bfloat16 too; on a GPU both are.")
@rounds_option
@out_option
def main(pictures: int, start_pictures: int, threads: int, bfloat16: bool, rounds: int, out: Path | None) -> None:
    """Pictures/s once running: a long run less a short one, so that starting up (imports, clip-retrieval's warming up with two
    batches of pictures and of texts) counts for neither; what starting takes is given apart."""
    with tempfile.TemporaryDirectory(prefix="clip-retrieval-") as name:
        folder = Path(name)
        checkpoint = folder / "clip.pt"
        torch.manual_seed(0)
        torch.save(open_clip.create_model(MODEL).state_dict(), checkpoint)
        shards = write_shards(folder / "shards", pictures, shard=SHARD)
        few = shards[: -(-start_pictures // SHARD)]
        start = SHARD * len(few)
        if start >= pictures:
            raise click.ClickException(f"--pictures must be more than {start}, the pictures of the short run.")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        # On a GPU clip-retrieval computes in bfloat16, whatever it is given, and ours chooses its number of workers.
        on_gpu = torch.cuda.is_available()
        equal, batch = ("bfloat16", BATCH_ON_GPU) if on_gpu else ("float32", SHARD)
        workers = [] if on_gpu else ["--workers", threads]
        bfloat16 = bfloat16 and equal != "bfloat16"

        def theirs(part: list[Path]) -> Callable[[int], None]:
            return lambda turn: _run(
                [python_of("clip-retrieval"), FOLDER / "clip-retrieval.py", checkpoint, folder / f"theirs-{turn}-{len(part)}",
                 batch, threads, *part], environment | {"PYTHONPATH": ""},
            )  # fmt: skip

        def ours(part: list[Path], precision: str) -> Callable[[int], None]:
            names = "::".join(map(str, part))
            rows = max(8, SHARD * len(part) // 20)  # 5%: eight times the share of ImageNet that the default takes
            return lambda turn: _run(
                [sys.executable, "-m", "featurize", "extract", f"wds:{names}", "--encoder", "clip", "--weights", checkpoint,
                 "--levels", "8x8x64", "--basis-rows", rows, "--basis-tolerance", 1, "--precision", precision,
                 *workers, "--out", folder / f"ours-{precision}-{turn}-{len(part)}"], environment,
            )  # fmt: skip

        contenders = {}
        for label, part in (("short", few), ("long", shards)):
            contenders[f"{THEIRS} {label}"] = theirs(part)
            contenders[f"{OURS} {label}"] = ours(part, equal)
            if bfloat16:
                contenders[f"{HALF} {label}"] = ours(part, "bfloat16")
        measured = take_turns(contenders, rounds)

    where = torch.cuda.get_device_name() if on_gpu else "cpu"
    lines = []
    seconds = {}
    for contender in [THEIRS, OURS, *([HALF] if bfloat16 else [])]:
        short, long = measured[f"{contender} short"], measured[f"{contender} long"]
        more = pictures - start
        wall, cpu = (long.wall - short.wall) / more, (long.cpu - short.cpu) / more
        seconds[contender] = wall, cpu
        lines.append(
            (
                contender,
                f"{1 / wall:.2f}",
                ratio(seconds[THEIRS][0], wall),
                f"{cpu:.3f}",
                ratio(seconds[THEIRS][1], cpu),
                f"{short.cpu - start * cpu:.1f}",
            )
        )
    head = (
        "", "pictures/s", "faster than clip-retrieval by", "processor seconds a picture", "by processor time",
        "processor seconds to start",
    )  # fmt: skip
    body = (
        f"JPEGs of 500x375 in webdataset shards, {MODEL} with random weights in {equal} on {where}, {threads} threads each; "
        f"{pictures} pictures less {start}, medians of {rounds}. featurize writes the 14x14 map on its basis (fitted on 5% of "
        f"the pictures), a level and z_0; clip-retrieval one vector of 512.\n\n{table(head, lines)}\n\n"
        "Target: 1.5x or better at equal precision."
    )
    report("Beside clip-retrieval's inference", body, ("torch", "open_clip_torch"), out)


def _run(command: list[object], environment: dict[str, str]) -> None:
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{command[1]} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    main()
