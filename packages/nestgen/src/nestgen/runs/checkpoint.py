"""Checkpoints: safetensors and a JSON of what they belong to; one is whole or not there, also after a power cut.

A run's folder holds checkpoints/<step>/ with

    denoiser.safetensors    the weights, names as in U-ViT
    ema.safetensors         their average: what is sampled from
    optimizer.safetensors   AdamW's moments, `<name>.exp_avg` and `<name>.exp_avg_sq`, and `step`; Muon's
                            `<name>.momentum_buffer`
    power-*.safetensors     the power-function averages, if training.ema_snapshots is set (ema.py)
    meta.json               step, level, depth, denoiser (its configuration), process, levels (shape, sigma and
                            patch of each), stores (fingerprint by name: z0, z1, ..., labels, text, features),
                            codec (of z_0), seed, training, init (sha256 of the first weights' file), scaler, versions, files
                            (bytes of each), sha256 (of each) and meta_sha256 (of all other keys)

Version 0.1.0 recorded no digests; its checkpoints are read without them.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
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
from nestgen.files import free_bytes, json_sha256, make_folder, sha256_of, sync

FORMAT = "nestgen-checkpoint/2"
PARTS = ("denoiser", "ema", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, all of whose files are there and have their sizes."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return int(self.meta["step"])

    def load(self, part: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Tensors of one of `PARTS` by name. Raises UserError where its bytes are not those that were written."""
        file = self.path / f"{part}.safetensors"
        if file.name in self._digests and sha256_of(file) != self._digests[file.name]:
            raise _damaged(self.path, f"{file.name} is not what was written (its SHA-256 differs)")
        try:
            return load_file(file, device=str(device))
        except SafetensorError as error:
            raise _damaged(self.path, f"{file.name} cannot be read ({error})") from None

    def sha256(self, part: str) -> str:
        """SHA-256 of a part's file: the recorded one, which `load` checks, or else computed."""
        name = f"{part}.safetensors"
        return self._digests.get(name) or sha256_of(self.path / name)

    @property
    def _digests(self) -> dict[str, str]:
        return self.meta.get("sha256", {})


def save_checkpoint(
    run_dir: Path, parts: dict[str, dict[str, Tensor]], meta: dict[str, Any], keep: int, best: int | None = None
) -> None:
    """Writes checkpoints/<meta['step']>/, and once it is on the disk removes all but the last `keep` and step `best`.

    Raises UserError if it cannot be written; what was there stays.
    """
    write_checkpoint(run_dir, parts, meta)
    for old in checkpoint_folders(run_dir)[:-keep]:
        if int(old.name) != best:
            # Under another name first: a checkpoint of which half is removed is none. What a network file system does not
            # remove, as somebody reads it, must not end a training: the next checkpoint tries again.
            with suppress(OSError):
                os.replace(old, removed := old.with_suffix(".old.tmp"))
                shutil.rmtree(removed, ignore_errors=True)


def write_checkpoint(run_dir: Path, parts: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    """Writes a checkpoint under another name and renames it once its files are on the disk. Raises UserError."""
    folder = run_dir / "checkpoints"
    final = folder / f"{meta['step']:08d}"
    draft = final.with_suffix(".tmp")
    try:
        make_folder(folder)
        for leftover in folder.glob("*.tmp"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        draft.mkdir()
        for name, part in parts.items():
            tensors = {key: value.detach().cpu().contiguous() for key, value in part.items()}
            save_file(tensors, draft / f"{name}.safetensors")
            sync(draft / f"{name}.safetensors")
        files = sorted(draft.iterdir())
        document = {"format": FORMAT, **meta, "files": {file.name: file.stat().st_size for file in files}}
        document["sha256"] = {file.name: sha256_of(file) for file in files}
        document["meta_sha256"] = _sha256(document)
        (draft / "meta.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        sync(draft / "meta.json")
        sync(draft)
        os.replace(draft, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        there = checkpoint_folders(run_dir)
        remaining = f"that of step {int(there[-1].name)} is intact" if there else "there is none yet"
        raise UserError(
            f"cannot write the checkpoint of step {meta['step']} to {folder} ({error}); {remaining}: "
            "make room there and run the same command again"
        ) from None


def check_room(run_dir: Path, parameters: int, keep: int) -> None:
    """Raises UserError where the disk has no room for the checkpoints of a training: `keep`, and one that is being written.

    Each holds the weights, their average and two moments, in float32.
    """
    needed = 16 * parameters * max(1, keep + 1 - len(checkpoint_folders(run_dir)))
    if needed > (free := free_bytes(run_dir)):
        raise UserError(
            f"the checkpoints of {run_dir} take {needed / 1e9:,.3g} GB more, and its disk has {free / 1e9:,.3g} GB left; "
            "free some, or train with a smaller training.keep"
        )


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The folders of a run's checkpoints by step, the newest last."""
    return sorted((run_dir / "checkpoints").glob("[0-9]" * 8))


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint by its folder. Raises UserError if a file is missing or cut short, or meta.json is damaged."""
    try:
        meta = json.loads((path / "meta.json").read_bytes())
        if "meta_sha256" in meta and meta["meta_sha256"] != _sha256(meta):
            raise _damaged(path, "meta.json is not what was written (its SHA-256 differs)")
        if meta["format"] != FORMAT:
            raise UserError(f"{path} has format {meta['format']}, and this nestgen reads {FORMAT}")
        sizes = dict(meta["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"meta.json cannot be read ({type(error).__name__})") from None
    for name, size in sizes.items():
        if not (path / name).is_file():
            raise _damaged(path, f"{name} is missing")
        if (found := (path / name).stat().st_size) != size:
            raise _damaged(path, f"{name} has {found} bytes instead of {size}")
    return Checkpoint(path, meta)


def newest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint of a run. Raises UserError if it is damaged: an older one is not taken in its place."""
    folders = checkpoint_folders(run_dir)
    return open_checkpoint(folders[-1]) if folders else None


def _sha256(meta: dict[str, Any]) -> str:
    """SHA-256 of everything in a meta.json but this digest itself."""
    return json_sha256({key: value for key, value in meta.items() if key != "meta_sha256"})


def _damaged(path: Path, why: str) -> UserError:
    """The error of a damaged checkpoint, which says what would be used without it."""
    before = [one for one in checkpoint_folders(path.parent.parent) if one.name < path.name]
    instead = f"go on from step {int(before[-1].name)}" if before else "begin again"
    return UserError(f"{path} is damaged: {why}; restore it from a copy, or remove the folder to {instead}")


def config_from_meta(meta: dict[str, Any]) -> DenoiserConfig:
    """The configuration of the denoiser that a checkpoint's `meta` records."""
    return DenoiserConfig(**{key: _tuples(value) for key, value in meta["denoiser"].items()})


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def load_denoiser(run_dir: Path, device: torch.device | str = "cpu") -> tuple[Denoiser, dict[str, Any]]:
    """The newest checkpoint of a run: the denoiser with EMA weights in eval mode, and its `meta`."""
    checkpoint = newest(run_dir)
    if checkpoint is None:
        level = run_dir.name.split("-")[0].removeprefix("z")
        raise UserError(f"there is no trained denoiser in {run_dir}; run `nestgen train --level {level}`")
    denoiser = Denoiser(config_from_meta(checkpoint.meta))
    denoiser.load_state_dict(checkpoint.load("ema"))
    return denoiser.to(device).requires_grad_(False).eval(), checkpoint.meta
