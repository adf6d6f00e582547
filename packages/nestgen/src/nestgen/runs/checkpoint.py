"""Checkpoints: safetensors and a JSON of what they belong to; one is whole or not there.

A run's folder holds checkpoints/<step>/ with

    denoiser.safetensors    the weights, names as in U-ViT
    ema.safetensors         their average: what is sampled from
    optimizer.safetensors   AdamW's moments, `<name>.exp_avg` and `<name>.exp_avg_sq`, and `step`
    power-*.safetensors     the power-function averages, if training.ema_snapshots is set (ema.py)
    meta.json               step, level, depth, denoiser (its configuration), process, levels (shape, sigma and
                            patch of each), stores (fingerprint by name: z0, z1, ..., labels), codec (of z_0),
                            seed, training, init (sha256 of the first weights' file), scaler, versions, and files
                            (bytes of each)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nestgen.denoiser.config import DenoiserConfig
from nestgen.denoiser.uvit import Denoiser
from nestgen.errors import UserError

FORMAT = "nestgen-checkpoint/2"
PARTS = ("denoiser", "ema", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return int(self.meta["step"])

    def load(self, part: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Tensors of one of `PARTS` by name."""
        return load_file(self.path / f"{part}.safetensors", device=str(device))


def save_checkpoint(
    run_dir: Path, parts: dict[str, dict[str, Tensor]], meta: dict[str, Any], keep: int, best: int | None = None
) -> None:
    """Writes checkpoints/<meta['step']>/ under another name, renames it, then removes all but `keep` and step `best`.

    Raises UserError if it cannot be written; what was there stays.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"{meta['step']:08d}"
    draft = folder / f"{final.name}.tmp"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for name, part in parts.items():
            tensors = {key: value.detach().cpu().contiguous() for key, value in part.items()}
            save_file(tensors, draft / f"{name}.safetensors")
        files = {file.name: file.stat().st_size for file in sorted(draft.iterdir())}
        (draft / "meta.json").write_text(json.dumps({"format": FORMAT, **meta, "files": files}, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)  # there only if it was cut short
        os.replace(draft, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        last = newest(run_dir)
        remaining = f"that of step {last.step} is intact" if last else "there is none yet"
        raise UserError(
            f"cannot write the checkpoint of step {meta['step']} to {folder} ({error}); {remaining}: "
            "make room there and run the same command again"
        ) from None
    for old in sorted(folder.glob("[0-9]" * 8))[:-keep]:
        if int(old.name) != best:
            shutil.rmtree(old)


def checkpoints(run_dir: Path) -> Iterator[Checkpoint | Path]:
    """Newest first; a checkpoint that was cut short comes as its path."""
    for path in sorted((run_dir / "checkpoints").glob("[0-9]" * 8), reverse=True):
        try:
            meta = json.loads((path / "meta.json").read_text())
            whole = all((path / name).stat().st_size == size for name, size in meta["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            yield path
        elif meta["format"] != FORMAT:
            raise UserError(f"{path} has format {meta['format']}, and this nestgen reads {FORMAT}")
        else:
            yield Checkpoint(path, meta)


def newest(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run."""
    return next((one for one in checkpoints(run_dir) if isinstance(one, Checkpoint)), None)


def config_from_meta(meta: dict[str, Any]) -> DenoiserConfig:
    """The configuration of the denoiser that a checkpoint's `meta` records."""
    return DenoiserConfig(**{key: _tuples(value) for key, value in meta["denoiser"].items()})


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def load_denoiser(run_dir: Path, device: torch.device | str = "cpu") -> tuple[Denoiser, dict[str, Any]]:
    """The newest whole checkpoint of a run: the denoiser with EMA weights in eval mode, and its `meta`."""
    checkpoint = newest(run_dir)
    if checkpoint is None:
        level = run_dir.name.split("-")[0].removeprefix("z")
        raise UserError(f"there is no trained denoiser in {run_dir}; run `nestgen train --level {level}`")
    denoiser = Denoiser(config_from_meta(checkpoint.meta))
    denoiser.load_state_dict(checkpoint.load("ema"))
    return denoiser.to(device).requires_grad_(False).eval(), checkpoint.meta
