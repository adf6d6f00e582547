"""Checkpoints: safetensors weights and a JSON of what they belong to, whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nestgen.denoiser import Denoiser


def load_denoiser(run_dir: Path, device: torch.device | str = "cpu") -> tuple[Denoiser, dict[str, Any]]:
    """The newest whole checkpoint of a run: the denoiser with EMA weights in eval mode, and its `meta`."""
    raise NotImplementedError  # N1: being written
