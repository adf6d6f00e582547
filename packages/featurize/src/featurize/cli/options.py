"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featurize.errors import UserError
from featurize.io.yaml import parse_yaml

SMALL_STORE = 1 << 30  # bytes

recipe_option = click.option(
    "--recipe", type=click.Path(path_type=Path), help="Recipe file. [default: ./nested.yaml, if it is there]"
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(min=0),
    help="Worker processes; 0 works in this one. [default: one per GPU, else per core]",
)
decoders_option = click.option(
    "--decoders",
    type=click.IntRange(min=0),
    help="Processes that read and decode for each worker. [default: a GPU's share of the cores; none on a CPU]",
)
wait_option = click.option("--wait", is_flag=True, help="Wait until another run releases the store root, then go on.")
scheduler_option = click.option("--scheduler", metavar="ADDRESS", help="Use the Dask cluster at this address instead.")


def parse_model_args(text: str) -> dict[str, Any]:
    """`a=1,b=x` or a YAML (JSON) mapping."""
    try:
        parsed = parse_yaml(text, "--model-args")
        if isinstance(parsed, str) and "=" in parsed:
            pairs = [part.split("=", 1) for part in text.split(",")]
            parsed = {key.strip(): parse_yaml(value, key) for key, value in pairs}
    except (UserError, ValueError):
        parsed = None
    if not isinstance(parsed, dict) or not all(isinstance(key, str) for key in parsed):
        raise UserError(f"--model-args '{text}' can't be read; write img_size=64,patch_size=8.")
    return parsed
