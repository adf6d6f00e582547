"""The spaces in which samples are compared with real pictures: each level's latents, an encoder's, and Inception's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch.nn import functional as F
from upath import UPath

from nestgen import randomness as noise
from nestgen.errors import UserError
from nestgen.files import sha256_of
from nestgen.recipe.recipe import Recipe, store_path
from nestgen.recipe.sections import Level, shape_name
from nestgen.sampling.latents import open_latents
from nestgen.sampling.real import check_comparable, open_real, real_latents, seal_of, training_root
from nestgen.scoring.inception import digest_of, features_of, load_inception, published_moments
from nestgen.scoring.statistics import Statistics, kept_statistics
from nestgen.stores.store import Store, open_store

DIMENSIONS = 1024  # at most; larger latents are average-pooled
BLOCK = 1024  # rows turned into vectors at a time

Vectors = Callable[[Store, np.ndarray], np.ndarray]  # of rows of a store, (N, D)


@dataclass(frozen=True)
class Space:
    """A space with the samples in it.

    `reference` gives the statistics of the real pictures, `origin` says what they are. `floor`, where the reference
    is not what the denoisers saw, gives so many vectors of what they saw; `floor_origin` says what those are.
    """

    name: str
    samples_ND: np.ndarray
    reference: Callable[[], Statistics]
    origin: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    floor: Callable[[int], np.ndarray] | None = None
    floor_origin: dict[str, Any] = field(default_factory=dict)


def level_space(recipe: Recipe, level: int, reference: Path, card: dict[str, Any], samples: Path) -> Space:
    """The latents of a level, as its denoiser sees them, against those of a store root."""
    fingerprint = card["levels"][level]["store_fingerprint"]

    def vectors(store: Store, rows: np.ndarray) -> np.ndarray:
        return pool(real_latents(store, rows.tolist(), recipe.seed).permute(0, 2, 3, 1).numpy())

    real = open_real(recipe, level, reference, fingerprint)
    same = reference.resolve() == training_root(recipe).resolve()
    trained_on = None if same else open_real(recipe, level, training_root(recipe), fingerprint)
    drawn = pool(open_latents(samples, level).read_all())
    return _of_stores(recipe, f"z_{level}", drawn, real, trained_on, vectors)


def encoder_space(
    recipe: Recipe, reference: Path, samples_store: Path, level_name: str, card: dict[str, Any], samples: Path
) -> Space:
    """A frozen encoder's features: the pictures encoded into a store root, against those of another."""
    encoded, real, trained_on = open_encoded(recipe, reference, samples_store, level_name)
    if encoded.rows != card["count"]:
        raise UserError(
            f"{encoded.path} has {encoded.rows} rows for {card['count']} samples; "
            f"extract folder:{samples} again into an empty root"
        )
    drawn = features(encoded, np.arange(encoded.rows))
    return _of_stores(recipe, f"{recipe.features.encoder} {level_name}", drawn, real, trained_on, features)


def open_encoded(
    recipe: Recipe, reference: Path, samples_store: Path, level_name: str
) -> tuple[Store, Store, Store | None]:
    """A level of the encoder's features: of the samples, the reference and, if another, the training rows."""
    try:
        level = Level.model_validate({"shape": level_name, "patch": 1})
    except ValidationError:
        raise UserError(
            f"{level_name} is no level; --level-shape is height x width x channels, such as 1x1x64"
        ) from None
    with_level = recipe.model_copy(update={"levels": (recipe.levels[0], level)})

    def path(root: Path) -> Path | UPath:
        return store_path(with_level, 1, root)

    encoded, real = open_store(path(samples_store)), open_store(path(reference))
    check_comparable(encoded, real)
    training, trained_on = training_root(recipe), None
    if reference.resolve() != training.resolve() and path(training).is_dir():
        trained_on = open_store(path(training))
        check_comparable(trained_on, real)
    return encoded, real, trained_on


def inception_space(recipe: Recipe, pictures: Path, weights: Path, samples: Path) -> Space:
    """Inception's features of the sample pictures against those of a folder of pictures, or published moments."""
    if not pictures.exists():
        raise UserError(f"there are no pictures {pictures}; --pictures is a folder of them, or an .npz of mu and sigma")
    moments = published_moments(pictures) if pictures.is_file() else None
    network = load_inception(weights)
    drawn = features_of(samples, network)
    side = recipe_side(samples)
    origin: dict[str, Any] = {"pictures": str(pictures), "sha256": digest_of(pictures), "rows": None}
    about = {"weights_sha256": sha256_of(weights), "dimensions": drawn.shape[1]}
    if moments is not None:
        return Space("Inception", drawn, lambda: Statistics(moments), origin, about)
    what = {"space": "Inception", "reference": origin["sha256"], "side": side, **about}

    def vectors() -> np.ndarray:
        return features_of(pictures, network, side)

    statistics = kept_statistics(statistics_folder(recipe), what, vectors, keep_vectors=True)
    assert statistics.vectors_MD is not None
    origin["rows"] = len(statistics.vectors_MD)
    return Space("Inception", drawn, lambda: statistics, origin, about)


def recipe_side(samples: Path) -> int:
    """Side of the pictures of a sample folder."""
    from nestgen.images import read_images

    return int(read_images(samples, 1).shape[1])


def statistics_folder(recipe: Recipe) -> Path:
    """Where statistics of references are kept."""
    return recipe.root / "statistics"


def _of_stores(
    recipe: Recipe, name: str, drawn_ND: np.ndarray, real: Store, trained_on: Store | None, vectors: Vectors
) -> Space:
    """A space whose real pictures are rows of a store."""

    def rows_of(store: Store, rows: np.ndarray) -> np.ndarray:
        blocks = [rows[first : first + BLOCK] for first in range(0, len(rows), BLOCK)]
        return np.concatenate([vectors(store, block) for block in blocks])

    def floor(count: int) -> np.ndarray:
        assert trained_on is not None
        order = noise.generator(recipe.seed, "evaluate/floor", 0).permutation(trained_on.rows)
        return rows_of(trained_on, order[:count])

    about = {"dimensions": drawn_ND.shape[1], "pooled_from": shape_name(real.latent_shape)}
    origin = _origin(real)
    what = {"space": name, "reference": origin["sha256"], "rows": real.rows, "seed": recipe.seed, **about}
    return Space(
        name=name,
        samples_ND=drawn_ND,
        reference=lambda: kept_statistics(statistics_folder(recipe), what, lambda: rows_of(real, np.arange(real.rows))),
        origin=origin,
        about=about,
        floor=None if trained_on is None else floor,
        floor_origin={} if trained_on is None else _origin(trained_on),
    )


def _origin(store: Store) -> dict[str, Any]:
    return {"store": str(store.path), "rows": store.rows, "sha256": seal_of(store)["sha256"]}


def features(store: Store, rows: np.ndarray) -> np.ndarray:
    """Features (N, D) of a level's rows as they were before standardisation."""
    stored = store.read(rows, np.zeros_like(rows)).astype(np.float64)
    return pool(stored * np.array(store.attributes["std"]) + np.array(store.attributes["mean"]))


def pool(z_NHWC: np.ndarray) -> np.ndarray:
    """Vectors (N, D): latents averaged over the smallest square windows that bring D to DIMENSIONS or less."""
    _, h, w, c = z_NHWC.shape
    sides = [side for side in range(1, gcd(h, w) + 1) if gcd(h, w) % side == 0]
    side = next((side for side in sides if h * w * c <= DIMENSIONS * side**2), sides[-1])
    z_NCHW = torch.from_numpy(z_NHWC).permute(0, 3, 1, 2)
    return F.avg_pool2d(z_NCHW, side).flatten(1).numpy()
