"""Trains and samples one level with nestgen's public parts and a plain PyTorch loop: a script to copy and change.

It needs stores, which `featurize extract` makes. Those of `make demo` do; this trains their z_0 given z_1 in two minutes:

    python examples/train_one_level.py demo/stores/scenes-train/vae/8x8x6.zarr \\
        --condition demo/stores/scenes-train/tiny/2x2x32.zarr

The sheet shows real images, and below them samples given the true z_1 of the same images. Without --condition z_0 is the
only level. A level above z_0 is trained in the same way, but has no codec that turns it into images.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from nestgen.denoiser.config import SIZES, DenoiserConfig
from nestgen.denoiser.uvit import Denoiser
from nestgen.diffusion.guidance import GuidedDenoiser
from nestgen.diffusion.process import Process
from nestgen.diffusion.solvers import sample_level
from nestgen.images import draw_sheet, write_image
from nestgen.recipe.level_sampling import LevelSampling
from nestgen.runs import ema
from nestgen.sampling.decoder import load_decoder
from nestgen.stores.latent import to_latent
from nestgen.stores.store import Store, open_store

PROCESS = Process("discrete", prediction="v")
CONDITION_DROP = 0.15  # share of training samples without condition, for classifier-free guidance
SAMPLING = {"sampler": "dpm++-single", "steps": 20, "interval": None}


def read_latents(store: Store, rows: np.ndarray) -> Tensor:
    """The latents (B, C, H, W) of these rows as a denoiser sees them; of VAE moments a random posterior sample."""
    h, w, c = store.latent_shape
    values_BhwC = store.read(rows, views=np.zeros(len(rows), np.int64))
    return to_latent(values_BhwC, store.attributes.get("codec"), torch.randn(len(rows), c, h, w))


def add_condition_noise(condition_BCHW: Tensor, sigma: float) -> Tensor:
    """The level above as its denoiser's sample will look: N(z, sigma^2)."""
    return condition_BCHW + sigma * torch.randn_like(condition_BCHW)


def train(
    denoiser: Denoiser, level: Store, above: Store | None, sigma: float, steps: int, batch: int, lr: float
) -> dict[str, Tensor]:
    """Train the denoiser; the moving average of its weights."""
    average = {name: weight.detach().clone() for name, weight in denoiser.named_parameters()}
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.03)
    rng = np.random.default_rng(0)
    for step in range(steps):
        rows = rng.integers(level.rows, size=batch)
        z_BCHW = read_latents(level, rows)
        inputs = {}
        if above is not None:
            inputs["condition"] = add_condition_noise(read_latents(above, rows), sigma)
            inputs["keep_B"] = torch.rand(batch) >= CONDITION_DROP
        t_B = PROCESS.training_time(torch.rand(batch))
        eps_BCHW = torch.randn_like(z_BCHW)
        z_t_BCHW = PROCESS.add_noise(z_BCHW, eps_BCHW, t_B)
        output_BCHW = denoiser(z_t_BCHW, PROCESS.time_embedding_input(t_B), **inputs)
        loss = PROCESS.loss(output_BCHW, z_BCHW, eps_BCHW, t_B)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, weight in denoiser.named_parameters():
                average[name].lerp_(weight, 1 - ema.decay(0.995, step))
        if step % 100 == 0 or step + 1 == steps:
            click.echo(f"step {step + 1}: loss {loss.item():.4f}")
    return average


@torch.inference_mode()
def sample(denoiser: Denoiser, condition_BCHW: Tensor | None, count: int, sigma: float) -> Tensor:
    """Latents (count, C, H, W), given the level above."""
    h, w, c = denoiser.config.shape
    conditions = () if condition_BCHW is None else (add_condition_noise(condition_BCHW, sigma),)
    guidance = 1.0 if conditions else None  # there is nothing to guide by at the top
    settings = LevelSampling(**SAMPLING, guidance=guidance, sigmas=(sigma,) * len(conditions))
    guided = GuidedDenoiser(denoiser, PROCESS, settings, conditions)
    return sample_level(guided, PROCESS, torch.randn(count, c, h, w), settings.steps, settings.sampler)


@click.command()
@click.argument("level", type=click.Path(path_type=Path))
@click.option("--condition", type=click.Path(path_type=Path), help="Store of the level above.")
@click.option("--sigma", default=0.5, show_default=True, help="Noise on the condition.")
@click.option("--patch", default=2, show_default=True, help="Side of a token, in latent pixels.")
@click.option("--steps", default=1000, show_default=True)
@click.option("--batch", default=32, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--count", default=8, show_default=True, help="Number of samples.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("one-level.png"), show_default=True)
def main(
    level: Path,
    condition: Path | None,
    sigma: float,
    patch: int,
    steps: int,
    batch: int,
    lr: float,
    count: int,
    out: Path,
) -> None:
    """Train and sample the level of the store LEVEL, and write a sheet of images."""
    torch.manual_seed(0)
    store, above = open_store(level), None if condition is None else open_store(condition)
    dim, depth, heads = SIZES["nano"]
    shapes = () if above is None else (above.latent_shape,)
    denoiser = Denoiser(DenoiserConfig(store.latent_shape, patch, dim, depth, heads, shapes, condition="residual"))
    average = train(denoiser, store, above, sigma, steps, batch, lr)
    denoiser.load_state_dict(average, strict=False)  # not strict: buffers have no average
    rows = np.arange(count)
    real_BCHW = read_latents(store, rows)
    generated_BCHW = sample(denoiser, None if above is None else read_latents(above, rows), count, sigma)
    decode = load_decoder(store.attributes["codec"])
    write_image(draw_sheet([decode(real_BCHW), decode(generated_BCHW)], ["real", "sampled"]), out)
    click.echo(out)


if __name__ == "__main__":
    main()
