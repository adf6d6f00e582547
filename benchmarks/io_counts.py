"""What an extraction asks of a disk, counted by strace: fsyncs a block, bytes a picture, readings of the base store.

git worktree add ../before cde5d26 && make -C ../before .venv
python -m benchmarks.io_counts --before ../before --source 'wds:../shared/data/imagenet-originals/*.tar' --out build/io_counts.md
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import click

from benchmarks.photos import random_vit, source_or_shards
from benchmarks.side_by_side import out_option, python_of, report, table

# In a process of its own, since each has another featurize.
CHILD = """
import json, sys
from featurize.extraction.extract import extract
from featurize.recipe import read_request
options, levels, workers = json.loads(sys.argv[1])
extract(read_request(None, options, levels), workers, None)
"""
CALLS = "fsync,fdatasync,syncfs,read,pread64,readv,write,pwrite64,writev,mmap"
# 123 fsync(7</tmp/x>) = 0, in two lines where another thread's call came between its beginning and its end
LINE = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\w+)")
BEGUN = re.compile(r"^(\d+) +(.*) <unfinished \.\.\.>$")
ENDED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>(.*)$")
KINDS = {  # of files in a store root, by the end of their path
    "chunks": r"\.zarr/c(/\d+){5}$|/labels\.zarr/c/\d+$",
    "records of blocks": r"\.blocks/\.?\d{6}\.json(\.\d+\.tmp)?$",
    "moments of blocks": r"\.blocks/\.?\d{6}\.moments",
    "what is known of pictures": r"first-pass/examined/\.?\w{16}\.json",
    "folders of chunks, at the seal": r"\.zarr/c(/\d+){0,4}$",
}
OTHER = "all else"


@dataclass
class Counts:
    """fsyncs by what was synced, bytes read and written, and bytes read of base stores' chunks."""

    fsyncs: Counter[str] = field(default_factory=Counter)
    read: int = 0
    written: int = 0
    base: int = 0


def kind_of(path: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, path)), OTHER)


def count(trace: Path, root: Path, source: str) -> Counts:
    """What a trace says of the files of a store root, and of reads from the source."""
    counts, begun = Counts(), {}
    for line in trace.read_text(errors="replace").splitlines():
        if match := BEGUN.match(line):
            begun[match[1]] = match[2]
            continue
        if (match := ENDED.match(line)) and match[1] in begun:
            line = f"{match[1]} {begun.pop(match[1])}{match[2]}"
        if (match := LINE.match(line)) is None:
            continue
        call, arguments, result = match.groups()
        opened = re.search(r"\d+<([^>]*)>", arguments)
        path = opened[1] if opened else ""
        ours = path.startswith(str(root))
        if call in ("fsync", "fdatasync", "syncfs") and ours:
            counts.fsyncs[kind_of(path)] += 1
        elif call == "mmap" and ours:
            size = int(arguments.split(", ")[1])
            counts.read += size
            counts.base += size * ("base.zarr/c/" in path)
        elif call in ("read", "pread64", "readv") and (ours or path.startswith(source)):
            counts.read += max(0, int(result))
            counts.base += max(0, int(result)) * ("base.zarr/c/" in path)
        elif call in ("write", "pwrite64", "writev") and ours:
            counts.written += max(0, int(result))
    return counts


@click.command()
@click.option("--before", type=click.Path(path_type=Path), help="A checkout of an earlier commit.")
@click.option("--source", help="A SOURCE of `featurize extract`. [default: JPEGs of 500x375, generated]")
@click.option("--pictures", default=192, show_default=True)
@click.option("--basis-rows", default=16, show_default=True, help="Of the pictures; these are read twice.")
@click.option("--model", default="vit_tiny_patch16_224", show_default=True, help="A timm model, with random weights.")
@click.option("--levels", default="8x8x64,6x6x56,4x4x48,2x2x40", show_default=True)
@out_option
def main(
    before: Path | None, source: str | None, pictures: int, basis_rows: int, model: str, levels: str, out: Path | None
) -> None:
    """One extraction each, in one process."""
    here = Path(__file__).resolve().parents[1]
    counted: dict[str, Counts] = {}
    with tempfile.TemporaryDirectory(prefix="io-counts-") as name:
        folder = Path(name)
        weights = random_vit(folder, model)
        source, what = source_or_shards(source, folder, pictures)
        files = str(Path(source.partition(":")[2].split("*")[0].split("{")[0]).resolve())
        for arm, checkout in (({"before": before} if before else {}) | {"now": here}).items():
            root = folder / arm
            options = {
                "source": source, "out": str(root), "encoder": f"timm:{model}", "weights": str(weights), "limit": pictures,
                "basis_rows": basis_rows, "basis_tolerance": 1.0, "z0": "pixels:32",
            }  # fmt: skip
            trace = folder / f"{arm}.strace"
            subprocess.run(
                ["strace", "-f", "-qq", "-y", "-s", "0", "--seccomp-bpf", "-o", trace, "-e", f"trace={CALLS}",
                 python_of(checkout), "-c", CHILD, json.dumps([options, levels, 0])],
                env=os.environ | {"PYTHONPATH": str(checkout / "packages/featurize/src"), "OMP_NUM_THREADS": "1"},
                check=True,
            )  # fmt: skip
            counted[arm] = count(trace, root, files)
            (base,) = root.glob("*/base.zarr")
            chunks = [path.stat().st_size for path in base.glob("c/**/*") if path.is_file()]
    arrays = len(levels.split(",")) + 3  # the base store, z_0, labels
    per_block = [(kind, *(f"{counts.fsyncs[kind] / len(chunks):.1f}" for counts in counted.values())) for kind in KINDS]
    totals = [
        (
            "together, a block of pictures",
            *(f"{sum(c.fsyncs[k] for k in KINDS) / len(chunks):.1f}" for c in counted.values()),
        ),
        ("all else, in the whole run", *(counts.fsyncs[OTHER] for counts in counted.values())),
    ]
    a_picture = [
        ("bytes read a picture", *(f"{counts.read / pictures:,.0f}" for counts in counted.values())),
        ("bytes written a picture", *(f"{counts.written / pictures:,.0f}" for counts in counted.values())),
        ("the base store is read, times", *(f"{counts.base / sum(chunks):.2f}" for counts in counted.values())),
    ]  # fmt: skip
    body = (
        f"{pictures} {what} through {model}, basis fitted on {basis_rows} of them; levels {levels}, z_0 pixels:32; {arrays} "
        f"arrays of {len(chunks)} blocks; one process.\n\n"
        + table(("fsyncs a block", *counted), per_block + totals)
        + "\n\n"
        + table(("", *counted), a_picture)
    )
    report("What an extraction asks of a disk", body, ("zarr", "numpy"), out)


if __name__ == "__main__":
    main()
