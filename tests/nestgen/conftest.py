"""Real, small sealed stores for nestgen's tests, written by zarr alone as docs/store-format.md says."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
import zarr

if TYPE_CHECKING:
    from nestgen.recipe.recipe import Recipe


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests run side by side: threads of tiny tensors would only wait for each other."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    torch.set_num_threads(1)


def write_store(
    path: Path, values: np.ndarray, *, kind: str, keys: list[str], block_rows: int = 8, **attributes: Any
) -> Path:
    """Writes and seals NAME.zarr with `values` (rows, ...); returns its path."""
    rows = len(values)
    views = values.shape[1] if values.ndim == 5 else 1
    common = {
        "format": "nested-store/1",
        "kind": kind,
        "rows": rows,
        "block_rows": block_rows,
        "keys_sha256": hashlib.sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest(),
        "fingerprint": hashlib.sha256(values.tobytes()).hexdigest(),
    }
    array = zarr.create_array(
        path,
        shape=values.shape,
        chunks=(block_rows, *values.shape[1:]),
        dtype=values.dtype,
        compressors=None,
        fill_value=-1 if values.dtype.kind == "i" else np.nan,
        config={"write_empty_chunks": True},
        attributes={**common, "views": views, "provenance": {}, "versions": {}, **attributes},
    )
    array[:] = values
    chunks = [
        path.joinpath("c", str(block), *["0"] * (values.ndim - 1)).read_bytes()
        for block in range(-(-rows // block_rows))
    ]
    blocks = [
        {
            "rows": [block * block_rows, min(rows, (block + 1) * block_rows)],
            "bytes": len(chunk),
            "sha256": hashlib.sha256(chunk).hexdigest(),
        }
        for block, chunk in enumerate(chunks)
    ]
    whole = hashlib.sha256("".join(block["sha256"] for block in blocks).encode()).hexdigest()
    path.with_suffix(".seal.json").write_text(json.dumps({**common, "blocks": blocks, "sha256": whole}))
    return path


@pytest.fixture
def store_writer() -> Callable[..., Path]:
    """`write_store`, for tests (conftest modules cannot be imported)."""
    return write_store


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[..., Path]:
    """Writes the stores of a hierarchy and a recipe nested.yaml for them below tmp_path; returns the recipe.

    `levels` are the recipe's entries, `rows` and `views` those of the stores, `classes` how many labels there
    are (0: every label is -1), `moments` makes z_0 a `vae` one of mean and log-variance. Further keywords are
    the recipe's sections. Rows are correlated across levels: a picture is a few random waves, the levels its
    averages in more and more random channels.
    """

    def write(
        *,
        levels: tuple[dict[str, Any], ...] = (
            {"shape": "8x8x3", "patch": 4},
            {"shape": "4x4x6", "sigma": 0.5},
            {"shape": "2x2x4", "sigma": 0.5},
        ),
        rows: int = 40,
        views: int = 1,
        classes: int = 0,
        moments: bool = False,
        block_rows: int = 8,
        keys: list[str] | None = None,
        **sections: Any,
    ) -> Path:
        rng = np.random.default_rng(0)
        keys = keys or [f"picture-{row}" for row in range(rows)]
        out = tmp_path / "stores" / "toy"
        shapes = [tuple(map(int, level["shape"].split("x"))) for level in levels]
        pictures = _waves(rng, rows, shapes[0])
        for level, (h, w, c) in enumerate(shapes):
            if level == 0:
                values = pictures if views == 1 else np.stack([pictures, pictures[:, :, ::-1]], 1)
                values = values.reshape(rows, views, h, w, c)
                codec: dict[str, Any] = {"name": "pixels", "size": h, "moments": False, "scale": 1.0}
                if moments:
                    values = np.concatenate([values, np.full_like(values, -6.0)], -1)
                    codec = {"name": "vae", "size": 8 * h, "moments": True, "scale": 0.5}
                folder, extra = codec["name"], {"kind": "z0", "codec": codec}
            else:
                values = _average(pictures, (h, w)) @ rng.normal(size=(shapes[0][2], c))
                values = np.stack([values, values[:, :, ::-1]], 1) if views == 2 else values[:, None]
                values = (values - values.mean((0, 1, 2, 3))) / values.std((0, 1, 2, 3))
                folder, extra = "tiny", {"kind": "level", "encoder": "tiny"}
            write_store(
                out / folder / f"{h}x{w}x{c}.zarr",
                values.astype("<f2"),
                keys=keys,
                block_rows=block_rows,
                latent_shape=[h, w, c],
                **extra,
            )
        labels = np.arange(rows, dtype="<i8") % classes if classes else np.full(rows, -1, "<i8")
        write_store(out / "labels.zarr", labels, kind="labels", keys=keys, block_rows=block_rows)
        side = shapes[0][0]
        recipe = {
            "name": "toy",
            "features": {"out": "stores/toy", "z0": f"vae:{8 * side}" if moments else f"pixels:{side}"},
            "levels": list(levels),
            "denoiser": {"size": "nano"},
            **sections,
            "training": {"preview": 0, **sections.get("training", {})},
        }
        path = tmp_path / "nested.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return write


def _waves(rng: np.random.Generator, rows: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Smooth random pictures (rows, h, w, c) within -1..1."""
    h, w, c = shape
    y, x = np.mgrid[:h, :w] / max(h, w)
    fy, fx, phase = rng.uniform(-1, 1, (3, rows, 1, 1, c)) * np.array([1, 1, np.pi]).reshape(3, 1, 1, 1, 1)
    return np.sin(2 * np.pi * (fy * y[..., None] + fx * x[..., None]) + phase)


def _average(pictures: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Block averages (rows, *grid, c); where the grid is no divisor, the nearest cells."""
    n, h, w, c = pictures.shape
    ys, xs = (np.arange(side) * cells // side for side, cells in ((h, grid[0]), (w, grid[1])))
    out = np.zeros((n, *grid, c))
    count = np.zeros(grid)
    for i, y in enumerate(ys):
        for j, x in enumerate(xs):
            out[:, y, x] += pictures[:, i, j]
            count[y, x] += 1
    return out / np.maximum(count, 1)[..., None]


@pytest.fixture
def trained(experiment: Callable[..., Path], little: None) -> Callable[..., Path]:
    """Like `experiment`, with a checkpoint of random weights for every level of every depth; sampling takes
    5 steps. The denoisers are little ones, their weights larger than a training's first ones, so that conditions and
    labels count.
    """

    def write(**settings: Any) -> Path:
        import torch

        from nestgen.denoiser.config import denoiser_config
        from nestgen.denoiser.uvit import Denoiser
        from nestgen.recipe.locations import run_dir
        from nestgen.recipe.recipe import load_recipe
        from nestgen.runs.checkpoint import save_checkpoint
        from nestgen.runs.folder import describe_run
        from nestgen.stores.hierarchy import open_level

        settings.setdefault("sampling", {"steps": 5})
        path = experiment(**settings)
        whole = load_recipe(path)
        for depth in range(1, len(whole.levels) + 1):
            recipe = whole.depth(depth)
            for level in range(depth):
                if (folder := run_dir(recipe, level)).is_dir():
                    continue
                torch.manual_seed(level)
                stores = open_level(recipe, level)
                denoiser = Denoiser(denoiser_config(recipe, level))
                for module in denoiser.modules():
                    if isinstance(module, torch.nn.Linear):
                        torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if stores.captions is not None:
                    null_TD = stores.captions.text.read(np.array([0]))[0]
                    denoiser.null_context.copy_(torch.from_numpy(null_TD.astype("f4")))
                weights = denoiser.state_dict()
                parts = {"denoiser": weights, "ema": weights, "optimizer": {"step": torch.tensor(7)}}
                meta = {**describe_run(recipe, level, stores), "step": 7, "scaler": None}
                save_checkpoint(folder, parts, meta, keep=1)
        return path

    return write


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its precision for the life of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Denoisers of size nano are smaller still in this process; SHRINK makes them so in another."""
    from nestgen.denoiser.config import SIZES
    from tests.nestgen.training_runs import LITTLE

    monkeypatch.setitem(SIZES, "nano", LITTLE)


@pytest.fixture
def toy(experiment: Callable[..., Path], little: None) -> Callable[..., Recipe]:
    """Recipes over the same two-level stores, with all that is random; keywords are training options."""
    from nestgen.recipe.recipe import load_recipe

    stores = experiment(
        levels=({"shape": "4x4x2"}, {"shape": "2x2x3"}),
        views=2,
        classes=3,
        moments=True,
        denoiser={"size": "nano", "labels": 3},
    )

    def write(name: str = "toy", seed: int = 0, sigma: float = 0.5, **training: object) -> Recipe:
        recipe = yaml.safe_load(stores.read_text())
        recipe["levels"][1]["sigma"] = sigma
        options = {"batch": 8, "lr": 1e-3, "warmup": 5, "clip": 1.0, "checkpoint_every": 10, "preview": 0, **training}
        file = stores.with_name(f"{name}.yaml")
        file.write_text(yaml.safe_dump({**recipe, "name": name, "seed": seed, "training": options}))
        return load_recipe(file)

    return write
