"""Extractions of sources with refused pictures, and what their stores say: recorded by the commit before the one pass.

In a checkout of cde5d26, with its environment and this file: `PYTHONPATH=. python -m tests.featurize.extraction.refused` writes
refused.json. Elsewhere than on such a processor the test is skipped.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from featurize.extraction import targets
from featurize.extraction.extract import extract
from featurize.recipe import read_request

PICTURES = 120
ROWS_PER_BLOCK = 16
RECORDED = Path(__file__).with_name("refused.json")
# Percent of the pictures that are refused, and the rows that the basis is fitted on: a part of them, or all.
CASES = [(0, 48), (1, 48), (7, 48), (40, 48), (40, PICTURES)]


def write_source(folder: Path, percent: int) -> None:
    """Pictures of noise as PPM files, whose bytes no library decides; so many of them cut short."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    bad = set(random.permutation(PICTURES)[: -(-PICTURES * percent // 100)].tolist())
    for index in range(PICTURES):
        data = b"P6 20 18 255\n" + random.integers(0, 256, 20 * 18 * 3, dtype=np.uint8).tobytes()
        (folder / f"{index:03d}.ppm").write_bytes(data[:-9] if index in bad else data)


def extract_source(
    source: Path, root: Path, basis_rows: int | None, workers: int = 0, max_bad: int | str = "50%"
) -> None:
    """A small extraction; the caller sees to it that blocks have ROWS_PER_BLOCK rows."""
    options = {
        "source": f"folder:{source}", "out": str(root), "encoder": "tiny", "z0": "pixels:16", "views": 2, "max_bad": max_bad,
        "basis_tolerance": 1.0, "base_channels": 16,
    }  # fmt: skip
    if basis_rows is not None:
        options["basis_rows"] = basis_rows
    extract(read_request(None, options, "4x4x8,2x2x4"), workers=workers, scheduler=None)


def machine() -> dict[str, str]:
    """What decides roundings: a store made with others has other last bits."""
    return {name: version(name) for name in ("torch", "numpy", "scipy", "pillow")} | {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": ", ".join(_of_processor(name) for name in ("model name", "cpu family", "model", "stepping")),
    }


def _of_processor(name: str) -> str:
    """What /proc/cpuinfo says of it, "" where there is none: MKL and OpenBLAS choose by more than vector instructions."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def summary(root: Path) -> dict[str, Any]:
    """Digests of the lines of the ledger, of arrays and of basis and moments, and the measured numbers."""
    lines = pq.read_table(root / "rows.parquet").drop_columns(["source"]).to_pylist()
    says: dict[str, Any] = {"rows.parquet": hashlib.sha256(json.dumps(lines).encode()).hexdigest()}
    for path in sorted(root.rglob("*.safetensors")):
        says[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(root.rglob("*.seal.json")):
        seal = json.loads(path.read_text())
        attributes = seal["metadata"]["attributes"]
        says[str(path.relative_to(root))] = {
            name: seal.get(name, attributes.get(name))
            for name in ("sha256", "fingerprint", "keys_sha256", "rows", "block_rows", "mean", "std", "basis_drift", "features")
        }  # fmt: skip
    return says


def main() -> None:
    """Write refused.json beside this file."""
    targets.MAX_ROWS_PER_BLOCK = ROWS_PER_BLOCK
    stores = []
    with tempfile.TemporaryDirectory() as name:
        for percent, basis_rows in CASES:
            folder = Path(name) / f"{percent}-{basis_rows}"
            write_source(folder / "source", percent)
            extract_source(folder / "source", folder / "root", basis_rows)
            stores.append({"percent": percent, "basis_rows": basis_rows, "says": summary(folder / "root")})
    RECORDED.write_text(json.dumps({"machine": machine(), "stores": stores}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
