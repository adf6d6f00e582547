"""Previews of a denoiser in training: samples from its average, beside real ones, and the distance between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nestgen import randomness
from nestgen.denoiser.uvit import Denoiser
from nestgen.diffusion.guidance import GuidedDenoiser
from nestgen.diffusion.linear_part import with_linear_part
from nestgen.diffusion.process import level_process
from nestgen.diffusion.solvers import sample_level
from nestgen.errors import UserError
from nestgen.images import draw_sheet, write_image
from nestgen.recipe.level_sampling import level_sampling, precision_on
from nestgen.recipe.locations import resolve_path, store_path
from nestgen.recipe.recipe import Recipe
from nestgen.runs import loss_log, scores
from nestgen.runs.checkpoint import load_denoiser
from nestgen.sampling.decoder import load_decoder
from nestgen.scoring.frechet import frechet_distance
from nestgen.scoring.spaces import pool
from nestgen.stores.hierarchy import LevelStores, check_same_rows, known_labels
from nestgen.stores.latent import to_latent
from nestgen.stores.store import Store, open_store

SHOWN = 8  # images in a row
BATCH = 64  # samples at a time
REFERENCE = 2048  # real rows at most
BINS = 4  # parts of the time whose losses are told apart
HELD_OUT = "held-out.jsonl"


@dataclass(frozen=True)
class PreviewResult:
    """What a preview found, by name, and its sheet; nothing of a denoiser that has diverged."""

    numbers: dict[str, float]
    sheet: Image.Image | None = None


@dataclass(frozen=True)
class Preview:
    """Fixed noise, times and conditions of `training.preview` samples, and real latents to compare with.

    The conditions are the levels above of held-out rows where the recipe's evaluation.reference has them, with their
    labels (but no captions), else of training rows. They are noised as in training, and there is no guidance: a preview
    shows one denoiser.
    """

    recipe: Recipe
    level: int
    codec: dict[str, Any] | None  # of z_0
    noise_BCHW: Tensor
    condition: list[Tensor]  # noised, the nearest level first
    sigmas: tuple[float, ...]  # of that noise
    label_B: Tensor | None
    context_BTD: Tensor | None
    real_BCHW: Tensor  # of the same rows as the conditions
    reference_ND: np.ndarray

    def sample(self, folder: Path, step: int, device: torch.device) -> PreviewResult:
        """Samples on a device from the averaged weights of the newest checkpoint, that of `step`.

        Writes previews/<step>.png, a line of scores.jsonl with the Fréchet distance to the reference, and one of
        held-out.jsonl with the loss of these rows at fixed times and noise, the mean within each of BINS equal parts of
        the time.
        """
        started = time.perf_counter()
        denoiser, _ = load_denoiser(folder, device)
        with torch.inference_mode():
            z_BCHW = torch.cat([self._sampled(denoiser, rows, device).cpu() for rows in self._batches()])
            sums = torch.stack([self._losses(denoiser, rows, device).cpu() for rows in self._batches()]).sum(0)
        if not z_BCHW.isfinite().all():
            return PreviewResult({})
        distance = frechet_distance(_vectors(z_BCHW), self.reference_ND)
        scores.append(folder, step, distance)
        decode = _decoder(self.codec, device)
        rows = [decode(one[:SHOWN]) for one in (self.real_BCHW, z_BCHW)]
        sheet = draw_sheet(rows, ["real", f"step {step}"])
        write_image(sheet, folder / "previews" / f"{step:08d}.png")
        losses = (sums / len(self.noise_BCHW)).tolist()
        seconds = round(time.perf_counter() - started, 2)
        loss_log.append(folder / HELD_OUT, {"step": step, "loss": losses, "seconds": seconds})
        by_bin = {f"held_out_loss/{k / BINS:g}-{(k + 1) / BINS:g}": loss for k, loss in enumerate(losses)}
        return PreviewResult({"frechet_distance": distance, **by_bin, "preview_seconds": seconds}, sheet)

    def _batches(self) -> list[slice]:
        return [slice(first, first + BATCH) for first in range(0, len(self.noise_BCHW), BATCH)]

    def _sampled(self, denoiser: Denoiser, rows: slice, device: torch.device) -> Tensor:
        """Samples of some rows, without guidance."""
        process, settings = level_process(self.recipe, self.level), level_sampling(self.recipe, self.level)
        unguided = replace(settings, guidance=None, autoguidance=0.0, internal_guidance=None, sigmas=self.sigmas)
        condition, label_B, context_BTD = self._inputs(rows, device)
        half = precision_on(device.type, settings) == "bf16"
        denoise = GuidedDenoiser(denoiser, process, unguided, tuple(condition), label_B, context_BTD, autocast=half)
        return sample_level(denoise, process, self.noise_BCHW[rows].to(device), settings.steps, settings.sampler)

    def _losses(self, denoiser: Denoiser, rows: slice, device: torch.device) -> Tensor:
        """The sum of the losses of some rows (BINS), each at one time in every part of the time."""
        process = replace(level_process(self.recipe, self.level), logit_normal=None)
        condition, label_B, context_BTD = self._inputs(rows, device)
        z_BCHW, eps_BCHW = self.real_BCHW[rows].to(device), self.noise_BCHW[rows].to(device)
        sigma_BK = torch.tensor(self.sigmas, device=device).expand(len(z_BCHW), -1) if condition else None
        conditioning = denoiser.prepare(len(z_BCHW), condition or None, None, label_B, context_BTD, sigma_BK)
        numbers = range(rows.start, rows.start + len(z_BCHW))
        uniform_BN = randomness.uniform(self.recipe.seed, f"preview/z{self.level}/time", numbers, (BINS,))
        losses = []
        for uniform_B in ((torch.arange(BINS) + uniform_BN) / BINS).T:
            t_B = process.training_time(uniform_B)
            at = process.at(t_B)
            z_t_BCHW, time_B = process.add_noise(z_BCHW, eps_BCHW, at), at.time_embedding_input_B.to(device)
            outputs = denoiser(z_t_BCHW, time_B, conditioning=conditioning, all_outputs=True)
            outputs = with_linear_part(outputs, denoiser, process, z_t_BCHW, at, conditioning.given)
            losses.append(process.loss(outputs.prediction_BCHW, z_BCHW, eps_BCHW, t_B))
        return torch.stack(losses) * len(z_BCHW)

    def _inputs(self, rows: slice, device: torch.device) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        label_B, context_BTD = (
            None if one is None else one[rows].to(device) for one in (self.label_B, self.context_BTD)
        )
        return [one_BCHW[rows].to(device) for one_BCHW in self.condition], label_B, context_BTD


def open_preview(recipe: Recipe, level: int, stores: LevelStores) -> Preview:
    """Reads what previews need. Raises UserError for a reference that does not fit the levels."""
    count = recipe.training.preview
    level_sampling(recipe, level)  # refuses a sampler that the process does not have now, not at the first preview
    held_out = _held_out(recipe, level, stores)
    own = held_out[0] is stores.z
    rows = randomness.generator(recipe.seed, "preview/rows", 0).permutation(held_out[0].rows)
    chosen = np.resize(rows, count)

    def normal(name: str, channels: int, h: int, w: int) -> Tensor:
        return randomness.normal(recipe.seed, f"preview/z{level}/{name}", range(count), (channels, h, w))

    h, w, c = recipe.levels[level].shape
    condition: list[Tensor] = []
    sigmas = tuple(_middle(recipe.levels[number].sigma) for number in recipe.conditions(level))
    for k, (store, sigma) in enumerate(zip(held_out[1:], sigmas, strict=True)):
        noise = normal(f"condition/{k}", store.latent_shape[2], *store.latent_shape[:2])
        condition.append(to_latent(store.read(chosen, np.zeros_like(chosen)), None, None) + sigma * noise)
    label_B = context_BTD = None
    if stores.labels is not None:
        label_B = torch.from_numpy(stores.labels[chosen] if own else _labels(recipe, held_out[0])[chosen])
    if stores.captions is not None and own:
        uniform_N = randomness.uniform(recipe.seed, "preview/caption", range(count), ()).numpy()
        text_rows = stores.captions.sample(chosen, uniform_N)
        context_BTD = torch.from_numpy(stores.captions.text.read(text_rows).astype(np.float32))

    def real(rows: np.ndarray) -> Tensor:
        posterior = randomness.normal(recipe.seed, "preview/posterior", rows.tolist(), (c, h, w))
        stored = held_out[0].read(rows, np.zeros_like(rows))
        return to_latent(stored, held_out[0].attributes.get("codec"), posterior)

    reference = real(rows[:REFERENCE])
    codec = stores.z.attributes.get("codec")
    return Preview(
        recipe,
        level,
        codec,
        normal("noise", c, h, w),
        condition,
        sigmas,
        label_B,
        context_BTD,
        real(chosen),
        _vectors(reference),
    )


def _labels(recipe: Recipe, held_out: Store) -> np.ndarray:
    """Classes of held-out rows; the null class where there are none."""
    path = held_out.path.parent.parent / "labels.zarr"
    labels = open_store(path).load() if path.is_dir() else np.full(held_out.rows, -1)
    return known_labels(labels, recipe.denoiser.labels)


def _held_out(recipe: Recipe, level: int, own: LevelStores) -> list[Store]:
    """The stores of the level and of those that condition it, of held-out rows if the recipe names any."""
    training = [own.z, *own.above]
    if recipe.evaluation.reference is None:
        return training
    root = resolve_path(recipe.root, recipe.evaluation.reference)
    paths = [store_path(recipe, number, root) for number in (level, *recipe.conditions(level))]
    if not all(path.with_suffix(".seal.json").is_file() for path in paths):
        return training  # it may not be extracted yet
    stores = [open_store(path) for path in paths]
    for store, ours in zip(stores, training):
        check_same_rows(stores[0], store)
        if store.latent_shape != ours.latent_shape or store.attributes.get("mean") != ours.attributes.get("mean"):
            raise UserError(f"{store.path} is of another shape or basis than {ours.path}; extract it with --basis")
    return stores


def _middle(sigma: float | tuple[float, float]) -> float:
    return sum(sigma) / 2 if isinstance(sigma, tuple) else sigma


def _vectors(z_BCHW: Tensor) -> np.ndarray:
    return pool(z_BCHW.permute(0, 2, 3, 1).numpy())


def _decoder(codec: dict[str, Any] | None, device: torch.device) -> Callable[[Tensor], np.ndarray]:
    """From latents to images: the codec's where its weights are there, else the first three channels as colours."""
    if codec is None:
        return _channels_as_colours
    try:
        return load_decoder(codec, device=str(device))
    except (UserError, KeyError):  # its weights are elsewhere; sampling will say so
        return _channels_as_colours


def _channels_as_colours(z_BCHW: Tensor) -> np.ndarray:
    """uint8 (B, H, W, 3): values -2.5 to 2.5 of the first three channels, or grey for fewer, as dark to bright."""
    z_BCHW = z_BCHW[:, :3] if z_BCHW.shape[1] >= 3 else z_BCHW[:, :1].repeat(1, 3, 1, 1)
    return ((z_BCHW / 5 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
