"""What bfloat16, and another device, change in features and latents: errors against float32 on the processor.

python -m benchmarks.precision --out build/precision.md
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch

from benchmarks.photos import random_vit
from benchmarks.side_by_side import out_option, report, table, take_turns
from featurize.codecs import Codec, load_codec, parse_codec
from featurize.encoders import EncoderSpec, encode, load_encoder
from featurize.execution.precision import device_name
from featurize.scenes import draw_scene
from nestgen.sampling.decoder import load_decoder

PRECISIONS = ("float32", "bfloat16")


@click.command()
@click.option("--pictures", default=64, show_default=True, help="Held-out scenes.")
@click.option("--model", default="vit_base_patch16_224", show_default=True, help="A timm model, with random weights.")
@click.option("--vae", default="vae:64", show_default=True, metavar="CODEC:SIDE", help="Codec, with --vae-weights.")
@click.option("--vae-weights", default="scenes", show_default=True, help="Weights of the codec.")
@click.option("--batch", default=16, show_default=True, help="Pictures at a time.")
@out_option
def main(pictures: int, model: str, vae: str, vae_weights: str, batch: int, out: Path | None) -> None:
    """Each precision on each device of this machine; one thread on the processor."""
    torch.set_num_threads(1)
    devices = ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])]
    arms = [(device, precision) for device in devices for precision in PRECISIONS]
    with tempfile.TemporaryDirectory(prefix="precision-") as folder:
        weights = str(random_vit(Path(folder), model))
        encoders = {"tiny": EncoderSpec("tiny"), f"{model}, random": EncoderSpec(f"timm:{model}", weights)}
        lines = [line for name, spec in encoders.items() for line in _of_encoder(name, spec, pictures, batch, arms)]
    tokens = table(("encoder", "device", "precision", "least cosine", "mean cosine", "error", "ms a picture"), lines)
    latents = table(
        ("codec", "device", "precision", "error of the moments", "decoded alike", "decoded against the picture", "ms a picture"),
        _of_codec(vae, vae_weights, pictures, batch, arms),
    )  # fmt: skip
    body = (
        f"{pictures} held-out scenes; errors are of all values together, against the first line of each network. Cosines are "
        f"of single tokens.\n\n{tokens}\n\nThe decoder computes in float32; a picture decoded from the means is compared with "
        f"the one from float32's means, and with the true one.\n\n{latents}"
    )
    report("Precision", body, ("torch", "timm", "diffusers", "numpy"), out)


def _of_encoder(
    name: str, spec: EncoderSpec, pictures: int, batch: int, arms: list[tuple[str, str]]
) -> list[tuple[str, ...]]:
    loaded = {arm: load_encoder(replace(spec, precision=arm[1]), arm[0]) for arm in arms}
    size = next(iter(loaded.values())).input_size
    x_NHWC = _scenes(pictures, size)

    def run(arm: tuple[str, str]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x_BHWC: encode(loaded[arm], x_BHWC, *arm).cpu().numpy()

    features, seconds = _measured({arm: run(arm) for arm in arms}, x_NHWC, batch)
    wanted = features[arms[0]].reshape(-1, features[arms[0]].shape[-1]).astype(np.float64)
    lines = []
    for arm in arms:
        found = features[arm].reshape(wanted.shape).astype(np.float64)
        cosines = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
        lines.append(
            (name, device_name(arm[0]), arm[1], f"{cosines.min():.6f}", f"{cosines.mean():.6f}",
             _decibels(found - wanted, wanted), f"{1000 * seconds[arm]:.1f}")
        )  # fmt: skip
    return lines


def _of_codec(text: str, weights: str, pictures: int, batch: int, arms: list[tuple[str, str]]) -> list[tuple[str, ...]]:
    codecs = {
        (device, precision): load_codec(replace(parse_codec(text, weights, None, precision=precision), device=device))
        for device, precision in arms
    }
    first = codecs[arms[0]]
    x_NHWC = _scenes(pictures, first.size)

    def encode_by(codec: Codec) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x_BHWC: codec.encode(x_BHWC).cpu().numpy()

    moments, seconds = _measured({arm: encode_by(codec) for arm, codec in codecs.items()}, x_NHWC, batch)
    decode = load_decoder(first.attributes)

    def decoded(z_NHWC: np.ndarray) -> np.ndarray:
        means = torch.from_numpy(z_NHWC[..., : first.latent_shape[-1]]) * first.attributes["scale"]
        return np.concatenate([decode(part.permute(0, 3, 1, 2)) for part in means.split(batch)]).astype(np.float64)

    wanted, lines = decoded(moments[arms[0]]), []
    for arm in arms:
        images = decoded(moments[arm])
        lines.append(
            (f"{text}, {weights}", device_name(arm[0]), arm[1],
             _decibels(moments[arm] - moments[arms[0]], moments[arms[0]]),
             _psnr(images, wanted), _psnr(images, x_NHWC), f"{1000 * seconds[arm]:.1f}")
        )  # fmt: skip
    return lines


def _scenes(count: int, side: int) -> np.ndarray:
    return np.stack([np.asarray(draw_scene(0, "val", index, side).image) for index in range(count)])


def _measured(
    networks: dict[tuple[str, str], Callable[[np.ndarray], np.ndarray]], x_NHWC: np.ndarray, batch: int
) -> tuple[dict[tuple[str, str], np.ndarray], dict[tuple[str, str], float]]:
    """What each network makes of the images, and the seconds that it takes a picture: of the processor, on a GPU the clock's."""
    parts = [x_NHWC[start : start + batch] for start in range(0, len(x_NHWC), batch)]
    values = {arm: np.concatenate([network(part) for part in parts]) for arm, network in networks.items()}
    turns = {
        "/".join(arm): (lambda turn, network=network: [network(part) for part in parts])
        for arm, network in networks.items()
    }
    took = take_turns(turns, 3)
    seconds = {
        arm: (took["/".join(arm)].cpu if arm[0] == "cpu" else took["/".join(arm)].wall) / len(x_NHWC)
        for arm in networks
    }
    return values, seconds


def _decibels(difference: np.ndarray, values: np.ndarray) -> str:
    """Power of a difference as a share of that of the values."""
    share = float(np.square(difference).sum() / np.square(values).sum())
    return f"{10 * np.log10(share):.1f} dB" if share else "0"


def _psnr(images: np.ndarray, wanted: np.ndarray) -> str:
    """Mean over the images of 10 log10(255^2 / mean squared error)."""
    error_N = np.square(images - wanted).mean(axis=(1, 2, 3))
    return f"{np.mean(10 * np.log10(255**2 / error_N)):.1f} dB" if error_N.all() else "equal"


if __name__ == "__main__":
    main()
