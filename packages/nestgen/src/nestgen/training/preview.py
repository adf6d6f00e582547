"""Looking at a denoiser while it trains: samples from its average, beside real rows, and how far they are from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nestgen import randomness as noise
from nestgen.diffusion.process import level_process
from nestgen.diffusion.solvers import sample_level
from nestgen.errors import UserError
from nestgen.images import draw_sheet, write_image
from nestgen.recipe.level_sampling import level_sampling
from nestgen.recipe.recipe import Recipe, store_path
from nestgen.runs import loss_log as losses
from nestgen.runs.checkpoint import load_denoiser
from nestgen.sampling.decoder import load_decoder
from nestgen.scoring.frechet import frechet_distance
from nestgen.scoring.spaces import pool
from nestgen.stores.latent import to_latent
from nestgen.stores.remote import address
from nestgen.stores.store import Store, check_same_rows, open_store
from nestgen.training.feed import Feed

SHOWN = 8  # pictures in a row
BATCH = 64  # samples at a time
REFERENCE = 2048  # real rows at most


@dataclass(frozen=True)
class Preview:
    """Fixed noise and conditions of `training.preview` samples, and real latents to compare with.

    The conditions are the levels above of held-out rows where the recipe's evaluation.reference has them, with their
    labels (but no captions), else of training rows. They are noised as in training, and there is no guidance: what is
    looked at is one denoiser.
    """

    feed: Feed
    noise_BCHW: Tensor
    given: dict[str, Tensor | list[Tensor]]  # arguments of the denoiser
    real_BCHW: Tensor  # of the same rows as the conditions
    reference_ND: np.ndarray

    def draw(self, folder: Path, step: int) -> dict[str, float]:
        """Samples from the checkpoint of a step: writes previews/<step>.png and a line of scores.jsonl; returns scores."""
        denoiser, _ = load_denoiser(folder)
        process = level_process(self.feed.recipe, self.feed.level)
        sampling = level_sampling(self.feed.recipe, self.feed.level)
        parts = []
        for first in range(0, len(self.noise_BCHW), BATCH):
            part = slice(first, first + BATCH)
            given = {
                name: [one[part] for one in value] if isinstance(value, list) else value[part]
                for name, value in self.given.items()
            }

            def denoise(z_BCHW: Tensor, t: Tensor, given: dict[str, Tensor | list[Tensor]] = given) -> Tensor:
                told_B = process.time_embedding_input(t).expand(len(z_BCHW))
                return process.latent(denoiser(z_BCHW, told_B, **given), z_BCHW, t)

            with torch.inference_mode():
                parts.append(sample_level(denoise, process, self.noise_BCHW[part], sampling.steps, sampling.sampler))
        z_BCHW = torch.cat(parts)
        if not z_BCHW.isfinite().all():
            return {}
        distance = frechet_distance(_vectors(z_BCHW), self.reference_ND)
        losses.append(folder / "scores.jsonl", {"step": step, "frechet_distance": distance})
        picture = _picture_maker(self.feed)
        rows = [picture(one[:SHOWN]) for one in (self.real_BCHW, z_BCHW)]
        write_image(draw_sheet(rows, ["real", f"step {step}"]), folder / "previews" / f"{step:08d}.png")
        return {"frechet_distance": distance}


def open_preview(feed: Feed) -> Preview:
    """Reads what previews need. Raises UserError for a reference that does not fit the levels."""
    recipe, level, count = feed.recipe, feed.level, feed.recipe.training.preview
    level_sampling(recipe, level)  # refuses a sampler that the process does not have now, not at the first preview
    held_out = _held_out(feed)
    own = held_out[0] is feed.z
    rows = noise.generator(recipe.seed, "preview/rows", 0).permutation(held_out[0].rows)
    chosen = np.resize(rows, count)

    def normal(name: str, channels: int, h: int, w: int) -> Tensor:
        return noise.normal(recipe.seed, f"preview/z{level}/{name}", range(count), (channels, h, w))

    h, w, c = recipe.levels[level].shape
    given: dict[str, Tensor | list[Tensor]] = {}
    if len(held_out) > 1:
        sigmas = [_middle(recipe.levels[number].sigma) for number in recipe.conditions(level)]
        given["condition"] = [
            to_latent(store.read(chosen, np.zeros_like(chosen)), None, None)
            + sigma * normal(f"condition/{k}", store.latent_shape[2], *store.latent_shape[:2])
            for k, (store, sigma) in enumerate(zip(held_out[1:], sigmas))
        ]
        given["sigma_BK"] = torch.tensor(sigmas).expand(count, -1)
    if feed.labels is not None:
        given["label_B"] = torch.from_numpy(feed.labels[chosen] if own else _labels(recipe, held_out[0])[chosen])
    if feed.captions is not None and own:
        drawn = noise.uniform(recipe.seed, "preview/caption", range(count), ()).numpy()
        text_rows = feed.captions.draw(chosen, drawn)
        given["context_BTD"] = torch.from_numpy(feed.captions.text.read(text_rows).astype(np.float32))

    def real(of: np.ndarray) -> Tensor:
        posterior = noise.normal(recipe.seed, "preview/posterior", of.tolist(), (c, h, w))
        stored = held_out[0].read(of, np.zeros_like(of))
        return to_latent(stored, held_out[0].attributes.get("codec"), posterior)

    reference = real(rows[:REFERENCE])
    return Preview(feed, normal("noise", c, h, w), given, real(chosen[:SHOWN]), _vectors(reference))


def _labels(recipe: Recipe, like: Store) -> np.ndarray:
    """Classes of held-out rows; the null class where there are none."""
    path = like.path.parent.parent / "labels.zarr"
    labels = open_store(path).load() if path.is_dir() else np.full(like.rows, -1)
    return np.where((labels < 0) | (labels >= recipe.denoiser.labels), recipe.denoiser.labels, labels)


def _held_out(feed: Feed) -> list[Store]:
    """The stores of the level and of those that condition it, of held-out rows if the recipe names any."""
    recipe, own = feed.recipe, [feed.z, *feed.above]
    if recipe.evaluation.reference is None:
        return own
    root = address(recipe.root, recipe.evaluation.reference)
    paths = [store_path(recipe, number, root) for number in (feed.level, *recipe.conditions(feed.level))]
    if not all(path.with_suffix(".seal.json").is_file() for path in paths):
        return own  # it may not be extracted yet
    stores = [open_store(path) for path in paths]
    for store, ours in zip(stores, own):
        check_same_rows(stores[0], store)
        if store.latent_shape != ours.latent_shape or store.attributes.get("mean") != ours.attributes.get("mean"):
            raise UserError(f"{store.path} is of another shape or basis than {ours.path}; extract it with --basis")
    return stores


def _middle(sigma: float | tuple[float, float]) -> float:
    return sum(sigma) / 2 if isinstance(sigma, tuple) else sigma


def _vectors(z_BCHW: Tensor) -> np.ndarray:
    return pool(z_BCHW.permute(0, 2, 3, 1).numpy())


def _picture_maker(feed: Feed) -> Callable[[Tensor], np.ndarray]:
    """Pictures of latents: decoded where the codec's weights are at hand, else the first three channels as colours."""
    codec = feed.z.attributes.get("codec")
    if codec is None:
        return _channels_as_colours
    try:
        return load_decoder(codec)
    except (UserError, KeyError):  # its weights are elsewhere; sampling will say so
        return _channels_as_colours


def _channels_as_colours(z_BCHW: Tensor) -> np.ndarray:
    """uint8 (B, H, W, 3): values -2.5 to 2.5 of the first three channels, or grey for fewer, as dark to bright."""
    z_BCHW = z_BCHW[:, :3] if z_BCHW.shape[1] >= 3 else z_BCHW[:, :1].repeat(1, 3, 1, 1)
    return ((z_BCHW / 5 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
