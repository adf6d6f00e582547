"""Proof, before the first GPU hour, that a loaded encoder computes what it should: `featurize check-encoder`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

import numpy as np

from featurize.checkpoints.files import read_checkpoint, sha256_of, sidecar
from featurize.encoders.encoder import Encoder, EncoderSpec, encode
from featurize.encoders.registry import load_encoder
from featurize.io.files import read_json

GOLDEN_TOLERANCE = 2e-3  # of the features' standard deviation: libraries and processors differ by less, GELUs by more


@dataclass(frozen=True)
class Finding:
    """One line of the report; `passed` is None where nothing could be proven."""

    subject: str
    passed: bool | None
    words: str


def check_encoder(spec: EncoderSpec, device: str) -> Iterator[Finding]:
    """Load the encoder and examine it: keys, activation, pictures, outputs, places, and golden features where known.

    Raises UserError where it can't be loaded: a wrong file ends here.
    """
    encoder = load_encoder(spec, device)
    yield _keys(encoder)
    yield _activation(encoder)
    official = (
        f"its own evaluation's is '{encoder.official_crop}'" if encoder.official_crop else "it publishes no other"
    )
    yield Finding(
        "pictures", True,
        f"{encoder.input_size} px, {encoder.interpolation}, mean {_triple(encoder.mean)}, std {_triple(encoder.std)}; "
        f"crop 'square', {official}",
    )  # fmt: skip
    size = encoder.input_size
    pictures = np.stack([golden_picture(size), np.roll(golden_picture(size), size // 3, axis=1), _noise(size)])
    f_BHWD = _features(encoder, pictures, device, spec.precision)
    yield _outputs(encoder, f_BHWD)
    yield _places(encoder, device, spec.precision)
    yield _golden(encoder, f_BHWD[0], spec)


def _keys(encoder: Encoder) -> Finding:
    if encoder.weights is None:
        return Finding("keys", True, "it has no weights")
    tensors, digest = len(read_checkpoint(encoder.weights)), sha256_of(encoder.weights)[:12]
    words = f"every tensor the network has is in {encoder.weights} ({tensors} entries, SHA-256 {digest}...)"
    return Finding("keys", True, words)


def golden_picture(size: int) -> np.ndarray:
    """(size, size, 3) uint8: waves of three directions, from a formula, so that it is the same everywhere."""
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in ((3, 1, 0.0), (1, -4, 1.0), (5, 5, 2.0))]
    return np.rint(127.3 + 110 * np.stack(waves, axis=-1)).astype(np.uint8)


def golden_values(f_HWD: np.ndarray) -> list[float]:
    """What is compared: four channels at three places, then mean and standard deviation of all."""
    height, width, _ = f_HWD.shape
    places = [(0, 0), (height // 2, width // 3), (height - 1, width - 1)]
    values = [float(value) for i, j in places for value in f_HWD[i, j, :4]]
    return [*values, float(f_HWD.mean()), float(f_HWD.std())]


def brightest_cell(encoder: Encoder, row: int, column: int, device: str, precision: str) -> tuple[int, int]:
    """The cell of the map that changes most when a bright square is put into the middle of cell (row, column)."""
    size, (height, width) = encoder.input_size, encoder.grid
    pictures = np.full((2, size, size, 3), 90, dtype=np.uint8)
    y, x = (2 * row + 1) * size // (2 * height), (2 * column + 1) * size // (2 * width)
    reach = max(1, size // (4 * max(height, width)))
    pictures[1, max(0, y - reach) : y + reach, max(0, x - reach) : x + reach] = 255
    f_BHWD = _features(encoder, pictures, device, precision)
    change_HW = np.linalg.norm(f_BHWD[1] - f_BHWD[0], axis=-1)
    found = np.unravel_index(change_HW.argmax(), change_HW.shape)
    return int(found[0]), int(found[1])


def _features(encoder: Encoder, x_BHWC: np.ndarray, device: str, precision: str) -> np.ndarray:
    return encode(encoder, np.ascontiguousarray(x_BHWC), device, precision).cpu().numpy()


def _activation(encoder: Encoder) -> Finding:
    name = encoder.identity.get("activation")
    if name is None:
        return Finding("activation", True, "as the model's own definition has it")
    if encoder.activation_witness:
        return Finding("activation", True, f"{name}, confirmed by {encoder.activation_witness}")
    return Finding("activation", None, f"{name} by assumption: nothing in or beside the file names it")


def _outputs(encoder: Encoder, f_BHWD: np.ndarray) -> Finding:
    if not np.isfinite(f_BHWD).all():
        return Finding("outputs", False, f"{np.mean(~np.isfinite(f_BHWD)):.1%} of the values are NaN or infinite")
    dead = int((f_BHWD.std(axis=(0, 1, 2)) == 0).sum())
    apart = float(np.abs(f_BHWD[0] - f_BHWD[1]).mean() / (f_BHWD.std() + 1e-30))
    words = f"{'x'.join(map(str, f_BHWD.shape[1:]))}, mean {f_BHWD.mean():.3g}, standard deviation {f_BHWD.std():.3g}"
    if dead > f_BHWD.shape[-1] // 10 or apart < 1e-4:
        return Finding("outputs", False, f"{words}; {dead} channels are dead, two pictures differ by {apart:.1e} of it")
    return Finding("outputs", True, f"{words}; {dead} dead channels")


def _places(encoder: Encoder, device: str, precision: str) -> Finding:
    height, width = encoder.grid
    if encoder.grid == (1, 1):
        return Finding("places", True, "a vector has none")
    cells = sorted({(0, 0), (0, width - 1), (height // 2, width // 3), (height - 1, 1 % width)})
    wrong = [(cell, found) for cell in cells if (found := brightest_cell(encoder, *cell, device, precision)) != cell]
    if not wrong:
        return Finding("places", True, f"a bright square in {len(cells)} cells changes those most")
    (cell, found), share = wrong[0], f"{len(wrong)} of {len(cells)}"
    return Finding("places", False, f"a bright square in cell {cell} changes cell {found} most ({share} are wrong)")


def _golden(encoder: Encoder, f_HWD: np.ndarray, spec: EncoderSpec) -> Finding:
    found, golden = golden_values(f_HWD), _golden_values(encoder)
    if golden is None:
        shown = ", ".join(f"{value:.5g}" for value in found)
        return Finding("golden features", None, f"none are known for these weights; here they are [{shown}]")
    worst = float(np.abs(np.subtract(found, golden)).max() / golden[-1])
    tolerance = GOLDEN_TOLERANCE if spec.precision == "float32" else 0.1
    words = f"within {worst:.1e} of the features' standard deviation"
    return Finding("golden features", worst <= tolerance, words if worst <= tolerance else f"off: {words} only")


def _golden_values(encoder: Encoder) -> list[float] | None:
    """From the JSON beside the weights (`golden`), else from those this package knows by the weights' digest."""
    if encoder.weights is None:
        return None
    beside: Any = sidecar(encoder.weights).get("golden")
    if isinstance(beside, list):
        return [float(value) for value in beside]
    with as_file(files("featurize") / "weights" / "golden.json") as path:
        entry = read_json(path).get(sha256_of(encoder.weights))
    return entry["values"] if entry else None


def _noise(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def _triple(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.3f}" for value in values)
