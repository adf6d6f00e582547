"""Sampling through the hierarchy: from the top level down, each given the one just drawn."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nestgen import noise
from nestgen.decode import Decoder, load_decoder
from nestgen.errors import UserError
from nestgen.files import read_json, write_json
from nestgen.latents import Latents, create_latents
from nestgen.models import Model, load_models
from nestgen.recipe import Recipe, shape_name
from nestgen.samplers import sample_level
from nestgen.sheet import draw_sheet, picture_path, read_pictures, write_picture

# Settings that a run may change when it goes on: no picture depends on them beyond rounding.
FREE = {"batch", "versions"}


@torch.inference_mode()
def sample_below(
    models: Sequence[Model],
    indices: Sequence[int],
    seed: int,
    frozen: Mapping[int, Tensor],
    label_B: Tensor | None = None,
    progress: Callable[[], object] = lambda: None,
) -> dict[int, Tensor]:
    """Latents (B, C, H, W) by level: those frozen, and below them one drawn by each model that has none.

    Image i depends on (seed, i) alone: all noise is a function of (seed, level, i), whatever the depth of the
    hierarchy, the batch or what is frozen.
    """
    z = dict(frozen)
    for model in sorted(models, key=lambda model: model.level, reverse=True):
        if model.level in z:
            continue
        h, w, c = model.denoiser.config.shape
        device = model.denoiser.pos_embed.device
        eps = model.eps(
            _condition(model, z.get(model.level + 1), indices, seed, device),
            None if label_B is None else label_B.to(device),
        )
        noise_BCHW = noise.normal(seed, f"sample/z{model.level}", indices, (c, h, w)).to(device)
        z[model.level] = sample_level(eps, model.process, noise_BCHW, model.steps, model.sampler, progress)
    return z


def _condition(
    model: Model, above_BCHW: Tensor | None, indices: Sequence[int], seed: int, device: torch.device
) -> Tensor | None:
    """The level above, noised as in training; None at the top."""
    if model.denoiser.config.condition_shape is None:
        return None
    assert above_BCHW is not None, f"z_{model.level + 1} is neither frozen nor drawn"
    noise_BCHW = noise.normal(seed, f"sample/condition/z{model.level + 1}", indices, above_BCHW.shape[1:])
    return (above_BCHW.cpu() + model.sigma * noise_BCHW).to(device)


def labels_of(models: Sequence[Model], indices: Sequence[int], seed: int, label: int | None) -> Tensor | None:
    """Class (B) of each image: the one asked for, else drawn from (seed, i); None for unconditional models.

    Raises UserError for a class that the models do not know.
    """
    classes = models[0].labels
    if label is not None and not 0 <= label < classes:
        knows = f"classes 0 to {classes - 1}" if classes else "no classes (denoiser.labels is 0)"
        raise UserError(f"there is no label {label}: the denoisers know {knows}")
    if not classes:
        return None
    if label is not None:
        return torch.full((len(indices),), label)
    return (noise.uniform(seed, "sample/label", indices, ()) * classes).long()


def sample(
    recipe: Recipe,
    out: Path,
    count: int,
    seed: int,
    batch: int,
    label: int | None = None,
    vae: Path | None = None,
) -> None:
    """Draws images 0 to count - 1 into `out`: 000000.png, ..., sample.json and latents/; and OUT-sheet.png.

    Goes on where an earlier run of the same settings stopped. Raises UserError for a folder of other settings.
    """
    models = load_models(recipe, device())
    labels = labels_of(models, range(count), seed, label)
    card = describe(recipe, models, count, seed, batch, label)
    decoder = load_decoder(models[0].meta["codec"], vae, str(device()))
    card = _settle(out, card)

    above: Latents | None = None
    for model in reversed(models):
        latents = create_latents(out, model.level, (count, *model.denoiser.config.shape), card["batch"])
        _draw_level(model, latents, above, seed, batch, labels)
        above = latents
    assert above is not None
    _write_pictures(decoder, above, out, batch)
    _finish(out, card)


def _draw_level(
    model: Model, latents: Latents, above: Latents | None, seed: int, batch: int, labels: Tensor | None
) -> None:
    """Draws the blocks of a level that are not there."""
    todo = [rows for rows in latents.blocks() if not latents.has(rows)]
    count = latents.array.shape[0]
    left = sum(map(len, todo))
    with tqdm(  # counts network calls, so that it moves within a batch; shows images
        desc=f"z_{model.level}",
        total=count * model.steps,
        initial=(count - left) * model.steps,
        unit=" images",
        unit_scale=1 / model.steps,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]",
    ) as bar:
        for rows in todo:
            above_BCHW = above.read(rows) if above else None
            parts = []
            for first in range(0, len(rows), batch):
                part = slice(first, first + batch)
                indices = rows[part]
                frozen = {} if above_BCHW is None else {model.level + 1: above_BCHW[part]}
                label_B = None if labels is None else labels[indices.start : indices.stop]
                z = sample_below([model], indices, seed, frozen, label_B, partial(bar.update, len(indices)))
                parts.append(z[model.level].cpu())
            latents.write(rows, torch.cat(parts))


def _write_pictures(decoder: Decoder, z_0: Latents, out: Path, batch: int) -> None:
    """Decodes the images whose pictures are not there."""
    for rows in tqdm(list(z_0.blocks()), desc="pictures", unit=" blocks"):
        if all(picture_path(out, index).is_file() for index in rows):
            continue
        indices = iter(rows)
        for z_BCHW in z_0.read(rows).split(batch):
            for picture, index in zip(decoder(z_BCHW), indices):
                write_picture(picture, picture_path(out, index))


def describe(
    recipe: Recipe, models: Sequence[Model], count: int, seed: int, batch: int, label: int | None
) -> dict[str, Any]:
    """The card of a sampling run: everything that decides its pictures, plus batch size and versions."""
    codec = models[0].meta["codec"]
    return {
        "recipe": recipe.name,
        "depth": len(models),
        "count": count,
        "seed": seed,
        "label": label,
        "process": recipe.process.kind,
        "sampler": recipe.sampling.sampler,
        "steps": recipe.sampling.steps,
        "levels": [
            {
                "shape": shape_name(model.denoiser.config.shape),
                "guidance": model.guidance,
                "condition_sigma": model.sigma,
                "checkpoint_step": model.meta["step"],
                "checkpoint_sha256": model.weights_sha256,
                "store_fingerprint": model.meta["stores"][f"z{model.level}"],
            }
            for model in models
        ],
        "codec": {key: value for key, value in codec.items() if key not in ("weights", "config")},
        "pictures": "png, rounded to the nearest uint8",
        "batch": batch,
        "versions": {name: importlib.metadata.version(name) for name in ("nestgen", "torch", "diffusers")},
    }


def _settle(out: Path, card: dict[str, Any]) -> dict[str, Any]:
    """Keeps the card of a new folder with its latents; of another one, returns the card kept there.

    Raises UserError if that one says otherwise.
    """
    path = out / "latents" / "settings.json"
    if not path.is_file():
        if out.is_dir() and any(path.name != "latents" for path in out.iterdir()):
            raise UserError(f"{out} is not empty and holds no samples to go on with; sample into another folder")
        write_json(path, card)
        return card
    kept = read_json(path)
    found = _flat(kept)
    for name, here in _flat(card).items():
        if name.split(".")[0] not in FREE and found.get(name) != here:
            raise UserError(
                f"{out} holds samples with {name} {found.get(name)}, and this run has {here}; "
                "sample into another folder, or remove this one"
            )
    return kept


def _finish(out: Path, card: dict[str, Any]) -> None:
    """Writes the sheet of the first pictures, then sample.json: a folder that has it is whole."""
    # The sheet stands beside the folder, which holds the samples and no other picture, so that it can be encoded.
    sheet = out.resolve().with_name(f"{out.resolve().name}-sheet.png")
    shown = min(card["count"], 64)
    if not sheet.is_file() or not (out / "sample.json").is_file():
        pictures = read_pictures(out, shown)
        write_picture(draw_sheet([pictures[first : first + 8] for first in range(0, shown, 8)]), sheet)
        write_json(out / "sample.json", card)
    print(f"{card['count']} samples of {card['depth']} level(s) in {out}, the first {shown} in {sheet}")


def _flat(document: Any, name: str = "") -> dict[str, Any]:
    """Leaves of a JSON document by their path: levels[0].guidance."""
    if isinstance(document, dict):
        items = [(f"{name}.{key}" if name else key, value) for key, value in document.items()]
    elif isinstance(document, list):
        items = [(f"{name}[{index}]", value) for index, value in enumerate(document)]
    else:
        return {name: document}
    return {path: leaf for key, value in items for path, leaf in _flat(value, key).items()}


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
