"""Trains the embedded VAE on scenes: 32x32 pixels to an 8x8x8 latent, in diffusers' AutoencoderKL layout."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from featurize.scenes import draw_scene

FOLDER = Path(__file__).parents[1] / "src" / "featurize" / "weights" / "tiny_vae"
SIDE = 32


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, besides the machine's rounding."""

    scenes: int = 8000
    steps: int = 1400
    batch: int = 48
    lr: float = 3e-3
    warmup: int = 50
    kl_weight: float = 1e-6
    edge_weight: float = 0.5
    ema: float = 0.995
    seed: int = 0


def build() -> AutoencoderKL:
    """The network with new weights."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        sample_size=SIDE,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def draw(count: int, split: str) -> Tensor:
    """Scenes as float32 (N, 3, 32, 32) in -1..1."""
    pictures = [
        np.asarray(draw_scene(0, split, index, SIDE).image) for index in tqdm(range(count), desc=f"draw {split}")
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def distance(x_BCHW: Tensor, y_BCHW: Tensor, edge_weight: float) -> Tensor:
    """Mean absolute difference of pixels, and of their differences to the right and below, which keep edges sharp."""
    edges = [F.l1_loss(x_BCHW.diff(dim=d), y_BCHW.diff(dim=d)) for d in (2, 3)]
    return F.l1_loss(x_BCHW, y_BCHW) + edge_weight * (edges[0] + edges[1])


def train(recipe: Recipe, pictures: Tensor) -> AutoencoderKL:
    """The VAE with its averaged weights."""
    torch.manual_seed(recipe.seed)
    vae = build().train()
    average = [weight.detach().clone() for weight in vae.parameters()]
    optimiser = torch.optim.AdamW(vae.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    progress = tqdm(range(recipe.steps), desc="train", unit="step", mininterval=5)
    for step in progress:
        rate = min((step + 1) / recipe.warmup, 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * rate
        x_BCHW = pictures[torch.randint(len(pictures), (recipe.batch,))]
        flip_B = torch.rand(recipe.batch) < 0.5
        x_BCHW = torch.where(flip_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)
        posterior = vae.encode(x_BCHW).latent_dist
        loss = distance(vae.decode(posterior.sample()).sample, x_BCHW, recipe.edge_weight)
        (loss + recipe.kl_weight * posterior.kl().mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(vae.parameters()), 1 - min(recipe.ema, (1 + step) / (10 + step)))
        if step % 20 == 0:
            progress.set_postfix_str(f"loss {loss.item():.4f} kl {posterior.kl().mean().item():.0f}")
    with torch.no_grad():
        for weight, mean in zip(vae.parameters(), average):
            weight.copy_(mean)
    return vae.eval()


@torch.inference_mode()
def measure(vae: AutoencoderKL, pictures: Tensor) -> dict[str, float]:
    """Latent scale (1 / std of the samples) and PSNR in dB of held-out pictures decoded from their means."""
    posterior = vae.encode(pictures).latent_dist
    decoded = vae.decode(posterior.mean).sample.clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (decoded - pictures).square().mean(dim=(1, 2, 3)))
    return {"scale": 1 / posterior.sample().std().item(), "psnr": psnr.mean().item()}


@click.command()
@click.option("--steps", default=Recipe.steps, show_default=True, help="Optimiser steps.")
@click.option("--threads", default=2, show_default=True, help="Threads of torch.")
@click.option("--out", default=FOLDER, type=click.Path(path_type=Path), help="Folder; the package's own if not given.")
def main(steps: int, threads: int, out: Path) -> None:
    """Train the embedded VAE and write config.json and its float16 weights."""
    torch.set_num_threads(threads)
    recipe = Recipe(steps=steps)
    vae = train(recipe, draw(recipe.scenes, "train"))
    state = {name: value.half().contiguous() for name, value in vae.state_dict().items()}
    vae.load_state_dict(state)  # measure what is stored
    scores = measure(vae, draw(1000, "val"))
    vae.register_to_config(scaling_factor=round(scores["scale"], 5))
    click.echo(json.dumps(scores))
    out.mkdir(parents=True, exist_ok=True)
    vae.save_config(out)
    save_file(state, out / "diffusion_pytorch_model.safetensors")
    card = {"recipe": asdict(recipe), "val_psnr": scores["psnr"], "torch": torch.__version__}
    (out / "training.json").write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    main()
