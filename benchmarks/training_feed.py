"""How many samples a second the feed delivers, beside how many a training step of level 0 consumes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from unittest.mock import patch

import click
import numpy as np
import torch
import zarr
from accelerate import Accelerator

from benchmarks.side_by_side import out_option, report, rounds_option, table, take_turns
from benchmarks.train_step import recipe_of, trainer_of
from nestgen.recipe.recipe import load_recipe
from nestgen.training.batches import make_batch, open_training_data


def write_store(path: Path, values: np.ndarray, block: int, **attributes: object) -> None:
    """A sealed array, as docs/store-format.md says."""
    rows, views = values.shape[:2]
    common = {
        "format": "nested-store/1",
        "rows": rows,
        "block_rows": block,
        "keys_sha256": "0",
        "fingerprint": path.stem,
    }
    array = zarr.create_array(
        path,
        shape=values.shape,
        chunks=(block, *values.shape[1:]),
        dtype="<f2",
        compressors=None,
        attributes={**common, "views": views, **attributes},
    )
    array[:] = values
    blocks = [{}] * (-(-rows // block))
    path.with_suffix(".seal.json").write_text(json.dumps({**common, "blocks": blocks}))


@click.command()
@click.option("--rows", default=4096, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--batches", default=4, show_default=True, help="A round.")
@rounds_option
@out_option
def main(rows: int, batch: int, batches: int, rounds: int, out: Path | None) -> None:
    """COCO's z_0 (32x32x4 as moments) given z_1 (8x8x64), small."""
    with tempfile.TemporaryDirectory() as folder:
        root, rng = Path(folder), np.random.default_rng(0)
        codec = {"name": "vae", "size": 256, "moments": True, "scale": 0.23}
        store = {
            "vae/32x32x4": ((32, 32, 8), [32, 32, 4], {"codec": codec}),
            "tiny/8x8x64": ((8, 8, 64), [8, 8, 64], {}),
        }
        for name, (stored, latent, more) in store.items():
            values = rng.standard_normal((rows, 1, *stored), np.float32)
            write_store(root / "stores" / f"{name}.zarr", values, 256, latent_shape=latent, **more)
        (root / "nested.yaml").write_text(
            json.dumps(
                {
                    "features": {"out": "stores", "z0": "vae:256"},
                    "levels": [{"shape": "32x32x4"}, {"shape": "8x8x64", "sigma": 1.0}],
                    "training": {"batch": batch},
                }
            )
        )
        recipe = load_recipe(root / "nested.yaml")
        memory = open_training_data(recipe, 0)
        with patch("nestgen.training.batches.MEMORY_SHARE", 0.0):
            mapped = open_training_data(recipe, 0)
        trainer, noise = trainer_of(recipe_of("small", "no", 2, 2), 0, Accelerator())

        def deliver(feed: object, turn: int) -> None:
            for step in range(batches):
                make_batch(feed, turn * batches + step)  # type: ignore[arg-type]

        measured = take_turns(
            {
                "feed from memory": lambda turn: deliver(memory, turn),
                "feed from memory maps": lambda turn: deliver(mapped, turn),
                "training step": lambda turn: trainer.step(noise, turn),  # type: ignore[dict-item, return-value]
            },
            rounds,
        )
    consumed = len(noise.z_BCHW) / measured["training step"].cpu
    lines = [["training step", f"{consumed:.1f}", ""]]
    for name in ("feed from memory", "feed from memory maps"):
        delivered = batch * batches / measured[name].cpu
        lines.append([name, f"{delivered:.0f}", f"{delivered / consumed:.0f}x"])
    body = table(["", "samples a second of processor time", "of the step's"], lines)
    report(f"The feed of z_0 given z_1, {torch.get_num_threads()} thread(s)", body, ["torch", "zarr"], out)


if __name__ == "__main__":
    main()
