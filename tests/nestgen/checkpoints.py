"""Checkpoints changed as a training would have written them, digests and all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from nestgen.runs.checkpoint import newest, write_checkpoint


def rewrite(
    run: Path,
    average: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    **meta: Any,
) -> None:
    """Changes the averaged weights of a run's newest checkpoint in place, and keys of its meta.json."""
    checkpoint = newest(run)
    assert checkpoint is not None
    parts = {name.removesuffix(".safetensors"): {} for name in checkpoint.meta["files"]}
    parts = {part: checkpoint.load(part) for part in parts}
    average(parts["ema"])
    shutil.rmtree(checkpoint.path)
    write_checkpoint(run, parts, checkpoint.meta | meta)
