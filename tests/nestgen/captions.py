"""Embedded captions for tests, and a `featurize` that embeds them."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Writer = Callable[..., Path]


def write_text(
    root: Path, write: Writer, captions: list[int] | None = None, count: int = 4, encoder: int = 0
) -> np.ndarray:
    """A root of embedded captions: loose ones, or so many a picture."""
    count = count if captions is None else sum(captions)
    values = np.random.default_rng(count).normal(size=(count + 1, 3, 8)).astype("<f2")
    values[0] = np.random.default_rng(encoder).normal(size=(3, 8))  # the empty caption's
    keys = [f"picture-{row}" for row in range(count if captions is None else len(captions))]
    write(root / "text" / "3x8.zarr", values, kind="text", keys=keys, null_row=0)
    if captions is not None:
        offsets = np.concatenate([[1], 1 + np.cumsum(captions)]).astype("<i8")
        write(root / "text" / "offsets.zarr", offsets, kind="labels", keys=keys)
    return values.astype(np.float32)


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A `featurize` on the path that does what `embed-text` is documented to do."""
    script = tmp_path / "bin" / "featurize"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\n{body}")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
