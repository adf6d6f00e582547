"""The whole extraction, ledger included, beside that of an earlier commit: processor time, and bytes read and written.

git worktree add ../before cde5d26 && make -C ../before .venv
python -m benchmarks.one_pass --before ../before --source 'wds:../shared/data/imagenet-originals/*.tar' --out build/one_pass.md
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import click

from benchmarks.photos import random_vit, source_or_shards
from benchmarks.side_by_side import out_option, python_of, report, rounds_option, table

# In a process of its own, since each has another featurize; what it imports does not count.
CHILD = """
import json, resource, sys, time
import scipy.linalg, timm, torch, zarr
from featurize.extraction import block
from featurize.extraction.extract import extract
from featurize.recipe import read_request
options, levels, workers = json.loads(sys.argv[1])

def spent():
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    counters = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
    return [sum(use.ru_utime for use in uses), sum(use.ru_stime for use in uses), time.perf_counter(),
            int(counters["rchar"]), int(counters["wchar"])]

before = spent()
extract(read_request(None, options, levels), workers, None)
print(json.dumps([after - start for start, after in zip(before, spent())]))
"""
COLUMNS = ("user s", "system s", "clock s", "bytes read", "bytes written")


@click.command()
@click.option("--before", required=True, type=click.Path(path_type=Path), help="A checkout of the earlier commit.")
@click.option("--source", help="A SOURCE of `featurize extract`. [default: JPEGs of 500x375, generated]")
@click.option("--pictures", default=256, show_default=True)
@click.option("--basis-rows", default=16, show_default=True, help="Of the pictures; these are decoded twice.")
@click.option("--model", default="vit_tiny_patch16_224", show_default=True, help="A timm model, with random weights.")
@click.option("--levels", default="8x8x64,6x6x56,4x4x48,2x2x40", show_default=True)
@rounds_option
@out_option
def main(
    before: Path,
    source: str | None,
    pictures: int,
    basis_rows: int,
    model: str,
    levels: str,
    rounds: int,
    out: Path | None,
) -> None:
    """One process and one thread each, in turns; medians."""
    here = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="one-pass-") as name:
        folder = Path(name)
        weights = random_vit(folder, model)
        source, what = source_or_shards(source, folder, pictures)
        spent: dict[str, list[list[float]]] = {"before": [], "now": []}
        for turn in range(rounds):
            for arm, checkout in sorted({"before": before, "now": here}.items(), reverse=bool(turn % 2)):
                options = {
                    "source": source, "out": str(folder / f"{arm}-{turn}"), "encoder": f"timm:{model}", "weights": str(weights),
                    "limit": pictures, "basis_rows": basis_rows, "basis_tolerance": 1.0, "z0": "pixels:32",
                }  # fmt: skip
                environment = {"PYTHONPATH": str(checkout / "packages/featurize/src"), "OMP_NUM_THREADS": "1"}
                done = subprocess.run(
                    [python_of(checkout), "-c", CHILD, json.dumps([options, levels, 0])],
                    env=os.environ | environment, capture_output=True, text=True,
                )  # fmt: skip
                if done.returncode:
                    raise click.ClickException(f"{checkout}: {done.stderr[-1000:]}")
                spent[arm].append(json.loads(done.stdout.splitlines()[-1]))
                click.echo(f"round {turn + 1}/{rounds}  {arm}: {spent[arm][-1][0]:.2f} s of user time", err=True)
    medians = {arm: [statistics.median(column) for column in zip(*turns)] for arm, turns in spent.items()}
    lines = [
        (arm, *(f"{value:.2f}" for value in values[:3]), *(f"{value / pictures:,.0f}" for value in values[3:]))
        for arm, values in medians.items()
    ]
    gain = medians["before"][0] / medians["now"][0]
    body = (
        f"{pictures} {what} through {model}, basis fitted on {basis_rows} of them; levels {levels}, z_0 pixels:32; one process, "
        f"one thread; medians of {rounds}.\n\n"
        + table(("", *COLUMNS[:3], *(f"{column} a picture" for column in COLUMNS[3:])), lines)
        + f"\n\nBy user time now is {gain:.2f} times as fast as before."
    )
    report("One pass beside the commit before", body, ("torch", "timm", "pillow", "numpy"), out)


if __name__ == "__main__":
    main()
