"""Captions of the images to sample: one prompt for all, a file of prompts, or the captions of a data set."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from upath import UPath

from nestgen import randomness
from nestgen.errors import UserError
from nestgen.files import atomic_write
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import shape_name
from nestgen.sampling.featurize_command import find_featurize
from nestgen.stores.store import Store, open_store, read_seal

OF_ROWS = "one of each row"  # what a run's card says of a data set's captions


@dataclass(frozen=True)
class Prompts:
    """Embedded captions, and which of them each image gets.

    Of the prompts of `featurize embed-text --prompts`, image i gets prompt i, starting over after the last. Of a data
    set, which has `offsets`, the images go through its captioned pictures in an order that depends on the seed, or have
    a row each, and each gets one of its picture's captions, sampled from (seed, i).
    """

    text: Store
    offsets: Store | None
    prompt: str | None

    def text_rows(self, indices: Sequence[int], seed: int, rows: Sequence[int] | None = None) -> np.ndarray:
        """The text row that each image gets; text row 0 is the empty caption's.

        `rows` are the data set's rows that the images have, if any; one without captions gets the empty caption.
        """
        if self.offsets is None:
            return 1 + np.asarray(indices, np.int64) % (self.text.rows - 1)
        bounds = self.offsets.load()
        counts = np.diff(bounds)
        if rows is None:
            order = randomness.generator(seed, "sample/captioned", 0).permutation(np.flatnonzero(counts))
            row_B = order[np.asarray(indices, np.int64) % len(order)]
        else:
            row_B = np.asarray(rows, np.int64)
        u_B = randomness.uniform(seed, "sample/caption", indices, ()).numpy()
        text_rows = bounds[row_B] + np.floor(u_B * counts[row_B]).astype(np.int64)
        return np.where(counts[row_B], text_rows, 0)

    def context(self, indices: Sequence[int], seed: int, rows: Sequence[int] | None = None) -> Tensor:
        """Embedded captions (B, T, D), float32, of `text_rows`."""
        return torch.from_numpy(self.text.read(self.text_rows(indices, seed, rows)).astype(np.float32))

    def belong_to(self, store: Store) -> bool:
        """Whether row r of the captions is the image of row r of a store."""
        return self.offsets is not None and self.offsets.attributes["keys_sha256"] == store.attributes["keys_sha256"]

    def describe(self) -> dict[str, Any]:
        """The entry of a run's card."""
        which = OF_ROWS if self.offsets is not None else "prompt i of image i"
        digest = read_seal(self.text.path)["sha256"]
        return {"captions": which if self.prompt is None else self.prompt, "store_sha256": digest}


def open_prompts(root: Path | UPath, text: tuple[int, int], prompt: str | None = None) -> Prompts:
    """The embedded captions of a root, for denoisers of `text` (tokens, width). Raises UserError for a root of none."""
    store = open_store(root / "text" / f"{shape_name(text)}.zarr")
    offsets = root / "text" / "offsets.zarr"
    prompts = Prompts(store, open_store(offsets) if offsets.exists() else None, prompt)
    captions = store.rows - 1 if prompts.offsets is None else int(np.diff(prompts.offsets.load()).sum())
    if not captions:
        raise UserError(f"{store.path} has no captions but the empty one; name a root of others with --prompts")
    return prompts


def check_takes_captions(recipe: Recipe) -> None:
    """Raises UserError for denoisers that take no captions."""
    if recipe.denoiser.text is None:
        raise UserError(
            f"the denoisers of {recipe.file} take no captions (denoiser.text is null); leave the prompt out"
        )


def check_encoder(prompts: Prompts, null_TD: Tensor, recipe: Recipe) -> None:
    """Raises UserError for captions of another text encoder than the training's: its empty caption is `null_TD`."""
    empty_TD = torch.from_numpy(prompts.text.read(np.array([0]))[0].astype(np.float32))
    if (empty_TD - null_TD.cpu()).abs().max() > 0.05 * null_TD.std():  # far above the rounding of another machine
        raise UserError(
            f"{prompts.text.path} was embedded by another text encoder than the captions that the denoisers of {recipe.file} "
            "were trained on; embed it again with the weights that features.text_weights named then"
        )


def embed_prompts(recipe: Recipe, prompts: Sequence[str]) -> Path:
    """The root with the embeddings of prompts, made once by `featurize embed-text` with the recipe's weights, below prompts/.

    Raises UserError for an empty prompt, and where `featurize` is not installed or fails.
    """
    check_takes_captions(recipe)
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("the prompt is empty; leave --prompt out to sample without one")
    weights = _text_weights(recipe)
    digest = hashlib.sha256("\n".join([*prompts, *weights]).encode()).hexdigest()
    root = recipe.root / "prompts" / digest[:16]
    assert recipe.denoiser.text is not None
    if (root / "text" / f"{shape_name(recipe.denoiser.text)}.seal.json").is_file():
        return root
    command = find_featurize()
    if command is None:
        raise UserError(
            "a prompt is embedded by `featurize embed-text`, which is not installed; install featurize, or embed prompts "
            "elsewhere and name their folder with --prompts"
        )
    with atomic_write(root / "prompts.txt") as draft:
        draft.write_text("".join(f"{' '.join(prompt.split())}\n" for prompt in prompts), encoding="utf-8")
    made = subprocess.run(
        [command, "embed-text", "--prompts", str(root / "prompts.txt"), "--out", str(root), *weights],
        stdout=subprocess.PIPE,
    )
    if made.returncode:  # it has said why on stderr
        raise UserError(f"`featurize embed-text` could not embed the prompt (see above); its folder is {root}")
    return root


def _text_weights(recipe: Recipe) -> list[str]:
    """The option with the text encoder's weights, if the recipe names any: a path is relative to it, as for featurize."""
    named = recipe.features.text_weights
    if named is None:
        return []
    path = recipe.root / named
    return ["--text-weights", str(path) if path.exists() else named]
