"""Draws what the condition is worth at every sigma: the figure of docs/training.md.

    nestgen train --level 0 --recipe docs/figures/condition_and_sigma.yaml
    python docs/figures/condition_and_sigma.py

One denoiser that was told sigma serves them all: its loss on held-out rows given the true level above, given another
row's, and given none. Times and noise are the same for every point.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import torch
from matplotlib.figure import Figure

from nestgen import randomness
from nestgen.diffusion.process import level_process
from nestgen.recipe.locations import resolve_path, run_dir, store_path
from nestgen.recipe.recipe import load_recipe
from nestgen.runs.checkpoint import load_denoiser
from nestgen.stores.latent import to_latent
from nestgen.stores.store import open_store

HERE = Path(__file__).with_suffix(".yaml")


@click.command()
@click.option("--recipe", "file", type=click.Path(path_type=Path), default=HERE)
@click.option("--rows", default=1000, show_default=True, help="Held-out rows.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE.with_suffix(".png"))
@torch.inference_mode()
def main(file: Path, rows: int, out: Path) -> None:
    """Writes the picture, and its numbers beside it as .json."""
    recipe = load_recipe(file)
    assert recipe.evaluation.reference is not None, "evaluation.reference names the held-out rows"
    denoiser, meta = load_denoiser(run_dir(recipe, 0))
    process, root = level_process(recipe, 0), resolve_path(recipe.root, recipe.evaluation.reference)
    z_store, above = (open_store(store_path(recipe, level, root)) for level in (0, 1))
    rows = min(rows, z_store.rows)
    chosen, views = np.arange(rows), np.zeros(rows, np.int64)

    def normal(name: str, shape: tuple[int, int, int]) -> torch.Tensor:
        return randomness.normal(1, name, range(rows), (shape[2], *shape[:2]))

    shape, given = z_store.latent_shape, above.latent_shape
    z_BCHW = to_latent(z_store.read(chosen, views), z_store.attributes["codec"], normal("posterior", shape))
    true_BCHW = to_latent(above.read(chosen, views), None, None)
    eps_BCHW, added_BCHW = normal("eps", shape), normal("condition", given)
    t_B = process.training_time((torch.arange(rows, dtype=torch.float64) + 0.5) / rows)[
        randomness.generator(1, "t", 0).permutation(rows)
    ]
    z_t_BCHW, told_B = process.add_noise(z_BCHW, eps_BCHW, t_B), process.time_embedding_input(t_B)

    def loss(condition_BCHW: torch.Tensor | None, sigma: float) -> float:
        parts = []
        for part in torch.arange(rows).split(250):
            condition = None if condition_BCHW is None else condition_BCHW[part] + sigma * added_BCHW[part]
            sigma_BK = torch.full((len(part), 1), sigma)
            output = denoiser(z_t_BCHW[part], told_B[part], condition, sigma_BK=sigma_BK)
            parts.append(len(part) * process.loss(output, z_BCHW[part], eps_BCHW[part], t_B[part]).item())
        return sum(parts) / rows

    sigmas = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    shuffled_BCHW = true_BCHW.roll(rows // 2, 0)
    losses = {
        "its own z_1": [loss(true_BCHW, sigma) for sigma in sigmas],
        "another row's z_1": [loss(shuffled_BCHW, sigma) for sigma in sigmas],
        "none": [loss(None, 0.0)] * len(sigmas),
    }
    numbers = {"sigma": sigmas, "loss": losses, "rows": rows, "step": meta["step"]}
    out.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for (name, values), style in zip(losses.items(), ("o-", "s-", "--")):
        axes.plot(sigmas, values, style, label=f"given {name}", markersize=4)
    axes.set(xlabel="σ of the noise on z_1", ylabel=f"loss of z_0 on {rows} held-out scenes")
    axes.grid(alpha=0.3)
    axes.legend(loc="center")
    figure.savefig(out, dpi=110)
    click.echo(out)


if __name__ == "__main__":
    main()
