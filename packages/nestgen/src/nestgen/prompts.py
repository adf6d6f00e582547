"""Captions of the images to draw: one prompt for all, a file of prompts, or the captions of a data set."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestgen import noise
from nestgen.errors import UserError
from nestgen.files import replacing
from nestgen.recipe import Recipe
from nestgen.sections import shape_name
from nestgen.sources import seal_of
from nestgen.store import Store, open_store


@dataclass(frozen=True)
class Prompts:
    """Embedded captions, and which of them each image gets.

    Of loose prompts (`featurize embed-text`) image i gets prompt i, over and over. Of a data set, which has
    `offsets`, the images go through its captioned pictures in an order drawn from the seed, and each gets one of its
    picture's captions, drawn from (seed, i).
    """

    text: Store
    offsets: Store | None
    prompt: str | None

    def rows_of(self, indices: Sequence[int], seed: int) -> np.ndarray:
        """The row of the embedding that each image gets; row 0 is the empty caption's."""
        if self.offsets is None:
            return 1 + np.asarray(indices, np.int64) % (self.text.rows - 1)
        bounds = self.offsets.load()
        counts = np.diff(bounds)
        captioned = np.flatnonzero(counts)
        order = noise.generator(seed, "sample/captioned", 0).permutation(captioned)
        pictures = order[np.asarray(indices, np.int64) % len(order)]
        u_B = noise.uniform(seed, "sample/caption", indices, ()).numpy()
        return bounds[pictures] + np.floor(u_B * counts[pictures]).astype(np.int64)

    def context(self, indices: Sequence[int], seed: int) -> Tensor:
        """Embedded captions (B, T, D), float32."""
        return torch.from_numpy(self.text.read(self.rows_of(indices, seed)).astype(np.float32))

    def describe(self) -> dict[str, Any]:
        """For the card of a run."""
        which = "one of each row" if self.offsets is not None else "prompt i of image i"
        digest = seal_of(self.text)["sha256"]
        return {"captions": which if self.prompt is None else self.prompt, "store_sha256": digest}


def open_prompts(root: Path, text: tuple[int, int], prompt: str | None = None) -> Prompts:
    """The embedded captions of a root, for denoisers of `text` (tokens, width). Raises UserError for a root of none."""
    store = open_store(root / "text" / f"{shape_name(text)}.zarr")
    offsets = root / "text" / "offsets.zarr"
    prompts = Prompts(store, open_store(offsets) if offsets.exists() else None, prompt)
    captions = store.rows - 1 if prompts.offsets is None else int(np.diff(prompts.offsets.load()).sum())
    if not captions:
        raise UserError(f"{store.path} has no captions but the empty one; name a root of others with --prompts")
    return prompts


def check_text(recipe: Recipe, asked: object) -> None:
    """Raises UserError where captions are asked of denoisers that take none."""
    if asked and recipe.denoiser.text is None:
        raise UserError(
            f"the denoisers of {recipe.file} take no captions (denoiser.text is null); leave the prompt out"
        )


def embed_prompt(recipe: Recipe, prompt: str) -> Path:
    """The root with one prompt's embedding, made by `featurize embed-text` and kept under prompts/.

    Raises UserError for an empty prompt, and where `featurize` is not installed or fails.
    """
    check_text(recipe, prompt or "empty")
    if not prompt.strip():
        raise UserError("the prompt is empty; leave --prompt out to draw without one")
    root = recipe.root / "prompts" / hashlib.sha256(prompt.encode()).hexdigest()[:16]
    assert recipe.denoiser.text is not None
    if (root / "text" / f"{shape_name(recipe.denoiser.text)}.seal.json").is_file():
        return root
    beside = Path(sys.executable).with_name("featurize")
    command = str(beside) if beside.is_file() else shutil.which("featurize")
    if command is None:
        raise UserError(
            "a prompt is embedded by `featurize embed-text`, which is not installed; install featurize, or embed prompts "
            "elsewhere and name their folder with --prompts"
        )
    with replacing(root / "prompts.txt") as draft:
        draft.write_text(" ".join(prompt.split()) + "\n", encoding="utf-8")
    made = subprocess.run(
        [command, "embed-text", "--prompts", str(root / "prompts.txt"), "--out", str(root)], stdout=subprocess.PIPE
    )
    if made.returncode:  # it has said why on stderr
        raise UserError(f"`featurize embed-text` could not embed the prompt (see above); its folder is {root}")
    return root
