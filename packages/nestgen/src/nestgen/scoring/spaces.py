"""The spaces in which samples are compared with real images: each level's latents, an encoder's, and Inception's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from upath import UPath

from nestgen import randomness
from nestgen.errors import UserError
from nestgen.files import sha256_of
from nestgen.images import read_images
from nestgen.recipe.locations import named_store_path, store_root
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import shape_name
from nestgen.sampling.latents import open_latents
from nestgen.sampling.real import check_comparable, open_real, real_latents
from nestgen.scoring.inception import digest_of, folder_features, load_inception, published_moments
from nestgen.scoring.statistics import MOST, Statistics, cached_statistics
from nestgen.stores.store import Store, open_store, read_seal

DIMENSIONS = 1024  # largest that a level is scored in; larger latents are average-pooled
BLOCK = 1024  # rows turned into vectors at a time

OfRows = Callable[[Store, np.ndarray], np.ndarray]  # vectors (N, D) of rows of a store


@dataclass(frozen=True)
class StoreVectors:
    """The vectors of a store's rows, which are read and computed as they are wanted."""

    store: Store
    of_rows: OfRows

    def __len__(self) -> int:
        return self.store.rows

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
        """Vectors (N, D) of some rows."""
        blocks = [rows[first : first + BLOCK] for first in range(0, len(rows), BLOCK)]
        return np.concatenate([self.of_rows(self.store, block) for block in blocks])


@dataclass(frozen=True)
class Space:
    """A space with the samples in it.

    `reference` computes the statistics of the real images, `origin` says what they are. Where the reference is not the
    training rows, `floor` computes so many vectors of training rows, and `floor_origin` says what those are. `about`
    goes into the score card.
    """

    name: str
    samples_ND: np.ndarray
    reference: Callable[[], Statistics]
    origin: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    floor: Callable[[int], np.ndarray] | None = None
    floor_origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedSamples:
    """The sample images encoded into a store root: by which encoder, and which of its levels (h, w, c) is compared."""

    root: Path | UPath
    encoder: str
    shape: tuple[int, int, int]

    def store_in(self, root: Path | UPath) -> Path | UPath:
        """The path of that level's store in some root."""
        return named_store_path(root, self.encoder, self.shape)


def level_space(recipe: Recipe, level: int, reference: Path | UPath, card: dict[str, Any], samples: Path) -> Space:
    """The latents of a level, as its denoiser sees them, against those of a store root."""
    fingerprint = card["levels"][level]["store_fingerprint"]

    def vectors(store: Store, rows: np.ndarray) -> np.ndarray:
        return pool(real_latents(store, rows.tolist(), recipe.seed).permute(0, 2, 3, 1).numpy())

    real = open_real(recipe, level, reference, fingerprint)
    same = reference.resolve() == store_root(recipe).resolve()
    training = None if same else open_real(recipe, level, store_root(recipe), fingerprint)
    samples_ND = pool(open_latents(samples, level).read_all())
    return _stores_space(recipe, f"z_{level}", samples_ND, real, training, vectors)


def encoder_space(
    recipe: Recipe, encoded: EncodedSamples, reference: Path | UPath, card: dict[str, Any], samples: Path
) -> Space:
    """A frozen encoder's features: of the sample images, against those of a store root."""
    store, real, training = open_encoded(recipe, encoded, reference)
    if store.rows != card["count"]:
        raise UserError(
            f"{store.path} has {store.rows} rows for {card['count']} samples; "
            f"extract folder:{samples} again into an empty root"
        )
    name = f"{encoded.encoder} {shape_name(encoded.shape)}"
    return _stores_space(recipe, name, features(store, np.arange(store.rows)), real, training, features)


def open_encoded(recipe: Recipe, encoded: EncodedSamples, reference: Path | UPath) -> tuple[Store, Store, Store | None]:
    """The stores of the encoder's features: of the samples, of the reference and, if they are others, of the training
    rows where these are encoded.
    """
    store, real = open_store(encoded.store_in(encoded.root)), open_store(encoded.store_in(reference))
    check_comparable(store, real)
    root, training = store_root(recipe), None
    if reference.resolve() != root.resolve() and encoded.store_in(root).is_dir():
        training = open_store(encoded.store_in(root))
        check_comparable(training, real)
    return store, real, training


def inception_space(recipe: Recipe, pictures: Path, weights: Path, samples: Path) -> Space:
    """Inception's features of the sample images against those of a folder of images, or published moments."""
    if not pictures.exists():
        raise UserError(f"there are no pictures {pictures}; --pictures is a folder of them, or an .npz of mu and sigma")
    moments = published_moments(pictures) if pictures.is_file() else None
    network = load_inception(weights, recipe.evaluation.inception)
    samples_ND = folder_features(samples, network)
    origin: dict[str, Any] = {"pictures": str(pictures), "sha256": digest_of(pictures), "rows": None}
    about = {
        "inception": recipe.evaluation.inception,
        "weights_sha256": sha256_of(weights),
        "dimensions": samples_ND.shape[1],
    }
    if moments is not None:
        return Space("Inception", samples_ND, lambda: Statistics(moments), origin, about)
    side = int(read_images(samples, 1).shape[1])
    key = {"space": "Inception", "reference": origin["sha256"], "side": side, **about}

    def vectors() -> np.ndarray:
        return folder_features(pictures, network, side)

    statistics = cached_statistics(statistics_folder(recipe), key, vectors, cache_vectors=True)
    assert statistics.vectors_MD is not None
    origin["rows"] = len(statistics.vectors_MD)
    return Space("Inception", samples_ND, lambda: statistics, origin, about)


def statistics_folder(recipe: Recipe) -> Path:
    """Where statistics of references are cached."""
    return recipe.root / "statistics"


def _stores_space(
    recipe: Recipe, name: str, samples_ND: np.ndarray, real: Store, training: Store | None, of_rows: OfRows
) -> Space:
    """A space whose real images are rows of a store."""

    def floor(count: int) -> np.ndarray:
        assert training is not None
        order = randomness.generator(recipe.seed, "evaluate/floor", 0).permutation(training.rows)
        return StoreVectors(training, of_rows)[order[:count]]

    about = {"dimensions": samples_ND.shape[1], "pooled_from": shape_name(real.latent_shape)}
    origin, folder = _origin(real), statistics_folder(recipe)
    # The digest is of the values as they are stored: z_0's scale, say, is in the fingerprint alone.
    key = {"space": name, "reference": origin["sha256"], "fingerprint": real.attributes["fingerprint"]}
    key |= {"rows": real.rows, "seed": recipe.seed, **about}
    if max(real.rows, len(samples_ND)) > MOST:
        about["kernel_rows"] = MOST
        key["kernel_rows"] = MOST
    return Space(
        name=name,
        samples_ND=samples_ND,
        reference=lambda: cached_statistics(folder, key, lambda: StoreVectors(real, of_rows)),
        origin=origin,
        about=about,
        floor=None if training is None else floor,
        floor_origin={} if training is None else _origin(training),
    )


def _origin(store: Store) -> dict[str, Any]:
    return {"store": str(store.path), "rows": store.rows, "sha256": read_seal(store.path)["sha256"]}


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
