"""An exported folder samples the same images where nothing is installed but nestgen and what it depends on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import numpy as np

from nestgen import NestedPipeline
from nestgen.images import read_images
from tests.nestgen.sharing.test_export import make_run

# As an environment with these distributions alone: importing any other installed module is an error.
ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from nestgen.cli.main import main
main()
"""


def required(distribution: str, seen: set[str]) -> Iterator[str]:
    """A distribution and everything that it requires, without extras."""
    name = re.sub(r"[-_.]+", "-", distribution).lower()
    if name in seen:
        return
    seen.add(name)
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:  # of another platform
        return
    yield name
    for line in lines:
        if "extra ==" not in line:
            yield from required(re.split(r"[^\w.-]", line)[0], seen)


def test_an_exported_folder_needs_nestgen_alone(trained: Callable[..., Path], tmp_path: Path) -> None:
    pipe = NestedPipeline.from_run(make_run(trained, tmp_path))
    pipe.save_pretrained(tmp_path / "elsewhere" / "model")
    allowed = set(required("nestgen", set()))
    absent = {
        module
        for module, owners in packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & allowed
    } | {"featurize"}
    assert {"featurize", "timm", "open_clip", "faiss", "dask", "pyarrow", "pytest"} <= absent
    assert not {"nestgen", "torch", "diffusers", "numpy"} & absent
    command = [sys.executable, "-c", f"ABSENT = {absent!r}\n{ALONE}"]
    words = ["sample", "--pretrained", "model", "--count", "3", "--seed", "4", "--out", "s"]
    environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *words], cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = read_images(tmp_path / "elsewhere" / "s", 3)
    np.testing.assert_array_equal(found, np.stack(pipe(num_images=3, seed=4).images))
