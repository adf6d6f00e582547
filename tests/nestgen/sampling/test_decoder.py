"""Decoders: pixels come back exactly, latents as AutoencoderKL decodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nestgen.errors import UserError
from nestgen.files import sha256_of
from nestgen.sampling.decoder import load_decoder, to_uint8

PIXELS = {"name": "pixels", "size": 16, "moments": False, "scale": 1.0}


def test_every_pixel_value_survives_the_store() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    stored = (pixels / 127.5 - 1).astype("<f2")
    z_0 = torch.from_numpy(stored.astype(np.float32)).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(load_decoder(PIXELS)(z_0), pixels)


def test_rounds_to_the_nearest_and_clips() -> None:
    wanted = torch.tensor([-3.0, -0.4, 0.4, 0.6, 99.6, 254.4, 254.6, 300.0])
    decoded = to_uint8((wanted / 127.5 - 1).reshape(1, 1, 1, -1))
    assert decoded.flatten().tolist() == [0, 0, 0, 1, 100, 254, 255, 255]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """A tiny AutoencoderKL of random weights on disk in diffusers' layout, and the codec that a store would name."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    config = {key: value for key, value in AutoencoderKL.load_config(folder).items() if key[0] != "_"}
    codec = {"name": "vae", "size": 16, "moments": True, "scale": 0.23010}
    return model, codec | {"weights": str(file), "weights_sha256": sha256_of(file), "config": config}


def test_latents_are_unscaled_and_decoded(vae: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    model, codec = vae
    z_0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = to_uint8(model.decode(z_0 / 0.23010).sample)
    assert expected.shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(load_decoder(codec)(z_0), expected)
    moved = tmp_path / "vae.safetensors"
    moved.write_bytes(Path(codec["weights"]).read_bytes())
    elsewhere = codec | {"weights": "/nowhere/vae.safetensors"}
    np.testing.assert_array_equal(load_decoder(elsewhere, moved)(z_0), expected)
    torch.save(model.state_dict(), tmp_path / "vae.bin")
    as_torch = codec | {"weights_sha256": sha256_of(tmp_path / "vae.bin")}
    np.testing.assert_array_equal(load_decoder(as_torch, tmp_path / "vae.bin")(z_0), expected)


def test_wrong_weights_are_said_in_a_sentence(vae: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    _, codec = vae
    with pytest.raises(UserError, match=r"/nowhere/vae\.safetensors are not there; name the file with --vae"):
        load_decoder(codec | {"weights": "/nowhere/vae.safetensors"})
    with pytest.raises(UserError, match="not the VAE that encoded z_0"):
        load_decoder(codec | {"weights_sha256": "0" * 64})
    broken = tmp_path / "broken.safetensors"
    for content in (b"", b"nothing of the kind"):
        broken.write_bytes(content)
        with pytest.raises(UserError, match="cannot be loaded"):
            load_decoder(codec | {"weights_sha256": sha256_of(broken)}, broken)
    code = tmp_path / "code.bin"
    torch.save({"x": Path}, code)  # a pickle that names more than tensors
    with pytest.raises(UserError, match="cannot be loaded"):
        load_decoder(codec | {"weights_sha256": sha256_of(code)}, code)
    other = codec | {"config": codec["config"] | {"latent_channels": 8}}
    with pytest.raises(UserError, match="cannot be loaded"):
        load_decoder(other)
    with pytest.raises(UserError, match="needs no VAE"):
        load_decoder(PIXELS, broken)
