"""The codecs of z_0, and what is said of a wrong one."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from featurize.checkpoints import read_state_dict
from featurize.codecs import load_codec, parse_codec
from featurize.errors import UserError
from featurize.scenes import draw_scene

EMBEDDED = Path(str(files("featurize"))) / "weights" / "tiny_vae"


def test_the_embedded_vae_decodes_held_out_scenes() -> None:
    pictures = np.stack([np.asarray(draw_scene(0, "val", index, 32).image) for index in range(50)])
    codec = load_codec(parse_codec("vae:32", "tiny", None))
    moments = codec.encode(pictures)
    assert codec.latent_shape == (8, 8, 8)
    assert moments.shape == (50, 8, 8, 16)

    vae = AutoencoderKL.from_config(codec.attributes["config"]).eval()
    vae.load_state_dict(read_state_dict(EMBEDDED / "diffusion_pytorch_model.safetensors"))
    with torch.no_grad():
        decoded = vae.decode(torch.from_numpy(moments[..., :8]).permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1).numpy()
    error = ((np.clip(decoded, -1, 1) - (pictures / 127.5 - 1)) ** 2).mean(axis=(1, 2, 3))
    blurred = pictures.reshape(50, 8, 4, 8, 4, 3).mean(axis=(2, 4), keepdims=True).repeat(4, 2).repeat(4, 4)
    blur = ((blurred.reshape(pictures.shape) - pictures) / 127.5) ** 2
    # Far better than the 8x8 picture that averages on the latent's grid would give.
    assert (10 * np.log10(4 / error)).mean() > (10 * np.log10(4 / blur.mean(axis=(1, 2, 3)))).mean() + 3
    scaled = codec.attributes["scale"] * moments[..., :8]
    assert 0.8 < scaled.std() < 1.2


def test_the_embedded_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED.parent.rglob("*") if path.is_file()) < 6e6


def test_pixels_keep_every_value() -> None:
    picture = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    stored = load_codec(parse_codec("pixels:16", None, None)).encode(picture).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(np.rint((stored + 1) * 127.5), picture)


@pytest.mark.parametrize(
    ("text", "weights", "scale", "sentence"),
    [
        ("jpeg:32", None, None, "is no codec"),
        ("pixels:0", None, None, "is no codec"),
        ("pixels:32", "x", None, "has no weights"),
        ("pixels:32", None, 0.5, "no scale"),
        ("vae:32", "tiny", -1.0, "is no latent scale"),
        ("vae:32", "/nowhere", None, "are not there"),
        ("vae:30", "tiny", None, "must be a multiple"),
    ],
)
def test_a_wrong_codec_is_one_sentence(text: str, weights: str | None, scale: float | None, sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        load_codec(parse_codec(text, weights, scale))
    assert sentence in str(raised.value)


def test_weights_of_another_vae_are_refused(tmp_path: Path) -> None:
    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    vae.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((EMBEDDED / "config.json").read_text())
    with pytest.raises(UserError, match="don't fit the model"):
        load_codec(parse_codec("vae:32", str(tmp_path), None))
