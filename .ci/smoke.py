"""Imports every module of both packages, then extracts 20 scenes, trains two denoisers for 3 steps and samples one image.

`make lowest` runs it with the lowest versions that the packages' pyproject.toml allow.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import tempfile
from pathlib import Path

import click

import featurize
import nestgen
from featurize.cli.main import commands as featurize_cli
from nestgen.cli.main import main as nestgen_cli

RECIPE = {
    "name": "smoke",
    "features": {
        "source": "scenes:32",
        "out": "stores/train",
        "encoder": "tiny",
        "z0": "vae:32",
        "z0_weights": "tiny",
        "limit": 20,
    },
    "levels": [{"shape": "8x8x8"}, {"shape": "2x2x8", "sigma": 0.5}],
    "denoiser": {"size": "nano"},
    "training": {"steps": 3, "batch": 8, "warmup": 1, "preview": 0},
    "sampling": {"steps": 2},
}
OPTIONAL = {"torch_fidelity", "tensorboard", "wandb", "s3fs", "aiohttp", "gcsfs"}  # the packages' extras


def import_all(package: object) -> int:
    """Import every module of a package; the number of modules. What needs an extra that is not installed is left out."""
    names = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]  # type: ignore[attr-defined]
    for name in names:
        if name.endswith("__main__"):  # runs the command line
            continue
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
    return len(names)


def run(command: click.Command, line: str) -> None:
    """Run a command line in this process. Raises what it raises."""
    print(f"$ {command.name or ''} {line}", flush=True)
    command.main(line.split(), standalone_mode=False)


def main() -> None:
    modules = import_all(featurize) + import_all(nestgen)
    print(f"{modules} modules imported")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("nested.yaml").write_text(json.dumps(RECIPE))
        run(featurize_cli, "extract --workers 0")
        for level in (0, 1):
            run(nestgen_cli, f"train --level {level}")
        run(nestgen_cli, "sample --count 1 --out samples")
        assert Path("samples/000000.png").is_file()
        os.chdir("/")


if __name__ == "__main__":
    main()
