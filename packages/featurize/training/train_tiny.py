"""Trains `tiny`, the encoder that ships with featurize, on scenes, and measures it against raw pixels.

One ViT, three linear heads that are thrown away afterwards: the main object's class from the mean token, the class
of every pixel of a patch from its token, and the patch's colours from its token. The labels make the features
semantic; the colours keep in them what a generator needs to know of a place besides its class.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import PIL
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import featurize
from featurize.scenes import CLASSES, draw_scene

PICTURE, PATCH = 64, 8
GRID = PICTURE // PATCH
MODEL = "vit_tiny_patch16_224"
MODEL_ARGS = {
    "img_size": PICTURE,
    "patch_size": PATCH,
    "embed_dim": 128,
    "depth": 5,
    "num_heads": 4,
    "class_token": False,
    "global_pool": "avg",
    "fc_norm": False,  # so that the final norm is on the tokens, before they are averaged
    "num_classes": 0,
}
WEIGHTS = Path(featurize.__file__).parent / "weights"


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, and is stored beside them."""

    scenes: int = 30000
    steps: int = 1000
    batch: int = 128
    lr: float = 2e-3
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    clip: float = 1.0
    label_smoothing: float = 0.1
    patch_weight: float = 1.0
    colour_weight: float = 0.5
    half_size: float = 0.5  # share of pictures seen at 32 px, resized up
    shift: int = 6  # pixels
    seed: int = 0


def draw(seed: int, split: str, size: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scenes first..last-1: pictures (n, size, size, 3) and class maps (n, size, size) uint8, labels (n,)."""
    scenes = [draw_scene(seed, split, index, size) for index in range(first, last)]
    return (
        np.stack([np.asarray(scene.image) for scene in scenes]),
        np.stack([scene.class_map for scene in scenes]),
        np.array([scene.label for scene in scenes]),
    )


def draw_all(
    count: int, size: int, split: str, seed: int, workers: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scenes 0..count-1: pictures (N, 3, size, size) and class maps (N, size, size) uint8, labels (N,)."""
    starts = range(0, count, 500)
    with ProcessPoolExecutor(workers) as pool:
        jobs = pool.map(partial(draw, seed, split, size), starts, [min(s + 500, count) for s in starts])
        parts = list(tqdm(jobs, total=len(starts), desc=f"draw {split} {size} px", unit="x500"))
    images, maps, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts))
    return images.permute(0, 3, 1, 2).contiguous(), maps, labels


def resize_up(x_BCHW: torch.Tensor) -> torch.Tensor:
    """To the encoder's input size as Pillow's bicubic does it."""
    return F.interpolate(x_BCHW, (PICTURE, PICTURE), mode="bicubic", antialias=True).clamp(-1, 1)


def augment(
    images: torch.Tensor, maps: torch.Tensor, recipe: Recipe, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flip, shift, recolour, halve. uint8 (B, 3, H, W), (B, H, W) to floats in -1..1 and the class maps of those."""
    count = len(images)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=random)

    # One gather flips and shifts: for every picture the source row and column of each pixel, edges repeated.
    place = torch.arange(PICTURE)
    dy, dx = ((uniform(2) * 2 - 1) * recipe.shift).round().long().unbind(1)
    rows = (place + dy[:, None]).clamp(0, PICTURE - 1)
    columns = (place + dx[:, None]).clamp(0, PICTURE - 1)
    columns = torch.where(uniform(1) < 0.5, columns.flip(1), columns)
    each = torch.arange(count)[:, None, None]
    maps = maps[each, rows[:, :, None], columns[:, None, :]]
    moved_BHWC = images.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]
    x = moved_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1

    gain, offset = uniform(3, 1, 1) * 0.5 + 0.75, uniform(3, 1, 1) * 0.3 - 0.15
    x = (x * gain + offset).clamp(-1, 1)
    swapped = uniform() < 0.2
    x[swapped] = x[swapped][:, torch.randperm(3, generator=random)]
    halved = uniform() < recipe.half_size
    x[halved] = resize_up(F.avg_pool2d(x[halved], 2))
    return x, maps


def patches(x_BCHW: torch.Tensor, side: int) -> torch.Tensor:
    """(B, C, G * side, G * side) to (B, G * G, C * side * side)."""
    return F.unfold(x_BCHW, side, stride=side).transpose(1, 2)


def patch_targets(maps: torch.Tensor) -> torch.Tensor:
    """Class maps (B, 64, 64) to the share of each class, ground first, in each patch: (B, 64, 1 + K)."""
    labels = patches(maps[:, None].float(), PATCH).long()
    shares = torch.zeros(*labels.shape[:2], 1 + len(CLASSES))
    return shares.scatter_add_(2, labels, torch.full(labels.shape, 1 / PATCH**2))


def train(recipe: Recipe, workers: int) -> nn.Module:
    """The trained encoder, heads dropped."""
    images, maps, labels = draw_all(recipe.scenes, PICTURE, "train", recipe.seed, workers)
    torch.manual_seed(recipe.seed)
    random = torch.Generator().manual_seed(recipe.seed)
    encoder = timm.create_model(MODEL, **MODEL_ARGS)
    heads = nn.ModuleDict({
        "label": nn.Linear(encoder.embed_dim, len(CLASSES)),
        "patch": nn.Linear(encoder.embed_dim, 1 + len(CLASSES)),
        "colour": nn.Linear(encoder.embed_dim, 12),
    })  # fmt: skip
    parameters = [*encoder.parameters(), *heads.parameters()]
    decayed, kept = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed}, {"params": kept, "weight_decay": 0.0}],
        lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay,
    )  # fmt: skip

    def rate(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / (recipe.steps - recipe.warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    encoder.train()
    progress = tqdm(range(recipe.steps), desc="train", unit="step", mininterval=5)
    for step in progress:
        rows = torch.randint(recipe.scenes, (recipe.batch,), generator=random)
        x_BCHW, map_BHW = augment(images[rows], maps[rows], recipe, random)
        tokens_BTD = encoder.forward_features(x_BCHW)
        label_BK = heads["label"](tokens_BTD.mean(1))
        label_loss = F.cross_entropy(label_BK, labels[rows], label_smoothing=recipe.label_smoothing)
        patch_BTK, share_BTK = heads["patch"](tokens_BTD), patch_targets(map_BHW)
        patch_loss = F.cross_entropy(patch_BTK.transpose(1, 2), share_BTK.transpose(1, 2))
        colour_loss = F.mse_loss(heads["colour"](tokens_BTD), patches(F.avg_pool2d(x_BCHW, PATCH // 2), 2))
        loss = label_loss + recipe.patch_weight * patch_loss + recipe.colour_weight * colour_loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            hit = (label_BK.argmax(1) == labels[rows]).float().mean()
            progress.set_postfix_str(
                f"label {label_loss:.3f} ({hit:.0%}) patch {patch_loss:.3f} colour {colour_loss:.4f}"
            )
    return encoder.eval()


@torch.inference_mode()
def mean_tokens(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Mean-pooled patch tokens (N, D) of uint8 pictures (N, 3, size, size)."""
    chunks = [resize_up(part.float() / 127.5 - 1) for part in images.split(250)]
    return torch.cat([encoder(chunk) for chunk in tqdm(chunks, desc="encode", unit="x250")])


def knn_accuracy(
    train_ND: torch.Tensor, train_labels: torch.Tensor, val_ND: torch.Tensor, val_labels: torch.Tensor, k: int = 20
) -> float:
    """Share of the queries whose k nearest rows by cosine vote for the query's label."""
    similarity = F.normalize(val_ND, dim=1) @ F.normalize(train_ND, dim=1).T
    votes = F.one_hot(train_labels[similarity.topk(k).indices], len(CLASSES)).sum(1)
    return (votes.argmax(1) == val_labels).float().mean().item()


def measure(encoder: nn.Module, recipe: Recipe, rows: int, queries: int, workers: int) -> dict[str, object]:
    """20-NN accuracy of the encoder and of raw pixels, on the same pictures, at both sizes."""
    scores: dict[str, object] = {"k": 20, "similarity": "cosine", "train_rows": rows, "val_queries": queries}
    for size in (32, 64):
        images, _, labels = draw_all(rows, size, "train", recipe.seed, workers)
        val_images, _, val_labels = draw_all(queries, size, "val", recipe.seed, workers)
        pixels, val_pixels = (x.flatten(1).float() / 127.5 - 1 for x in (images, val_images))
        mean = pixels.mean(0)
        scores[f"{size}px"] = {
            "tiny": knn_accuracy(mean_tokens(encoder, images), labels, mean_tokens(encoder, val_images), val_labels),
            "raw pixels": knn_accuracy(pixels, labels, val_pixels, val_labels),
            "raw pixels, mean subtracted": knn_accuracy(pixels - mean, labels, val_pixels - mean, val_labels),
        }
    return scores


@click.command()
@click.option("--steps", default=Recipe.steps, show_default=True, help="Optimiser steps.")
@click.option("--scenes", default=Recipe.scenes, show_default=True, help="Scenes to draw and train on.")
@click.option("--rows", default=6000, show_default=True, help="Training scenes to find neighbours among.")
@click.option("--queries", default=2000, show_default=True, help="Held-out scenes to find neighbours of.")
@click.option("--threads", default=2, show_default=True, help="Threads of torch, processes that draw.")
@click.option("--out", default=WEIGHTS, type=click.Path(path_type=Path), help="Folder; the package's own if not given.")
def main(steps: int, scenes: int, rows: int, queries: int, threads: int, out: Path) -> None:
    """Train the embedded encoder and write tiny.safetensors and tiny.json."""
    torch.set_num_threads(threads)
    recipe = Recipe(steps=steps, scenes=scenes)
    encoder = train(recipe, threads)
    state = {name: value.half().contiguous() for name, value in encoder.state_dict().items()}
    encoder.load_state_dict(state)  # measure what is stored
    scores = measure(encoder, recipe, rows, queries, threads)
    click.echo(json.dumps(scores, indent=2))

    data = safetensors.torch.save(state)
    card = {
        "model": MODEL,
        "model_args": MODEL_ARGS,
        "input_size": PICTURE,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "classes": CLASSES,
        "knn": scores,
        "recipe": asdict(recipe),
        "script": "packages/featurize/training/train_tiny.py",
        "sha256": hashlib.sha256(data).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("tiny.safetensors", data), ("tiny.json", f"{json.dumps(card, indent=2)}\n".encode())):
        part = out / f"{name}.part"
        part.write_bytes(content)
        os.replace(part, out / name)


if __name__ == "__main__":
    main()
