"""The codecs of z_0, and what is said of a wrong one."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file

from featurize.checkpoints.files import read_state_dict
from featurize.codecs import load_codec, parse_codec
from featurize.encoders import EncoderSpec, encode, load_encoder
from featurize.errors import UserError
from featurize.scenes import draw_scene
from tests.featurize import reference
from tests.featurize.layouts import vae_state

EMBEDDED = Path(str(files("featurize"))) / "weights" / "tiny_vae"


def test_the_scenes_vae_decodes_held_out_scenes_even_with_noise_on_the_latent() -> None:
    from nestgen.sampling.decoder import load_decoder

    codec = load_codec(parse_codec("vae:64", "scenes", None))
    card = json.loads((EMBEDDED.parent / "scenes_vae" / "training.json").read_text())
    assert (codec.latent_shape, codec.stored_channels) == ((16, 16, 6), 12)
    pictures = np.stack([np.asarray(draw_scene(0, "val", index, 64).image) for index in range(50)])
    mean_BHWC, logvar_BHWC = np.split(codec.encode(pictures).numpy(), 2, axis=-1)
    z_BHWC = codec.attributes["scale"] * mean_BHWC
    # Every channel is as loud, so that a denoiser sees none drown in noise before the others.
    np.testing.assert_allclose(z_BHWC.std(axis=(0, 1, 2)), 1, atol=0.1)
    np.testing.assert_allclose(z_BHWC.mean(axis=(0, 1, 2)), 0, atol=0.15)
    np.testing.assert_allclose(np.exp(0.5 * logvar_BHWC), 0.05, rtol=0.01)

    decode = load_decoder(codec.attributes)
    noise_BHWC = np.random.default_rng(0).standard_normal(z_BHWC.shape, dtype=np.float32)
    for noise, stated in ((0.0, "val_psnr"), (0.1, "val_psnr, noise 0.1"), (0.2, "val_psnr, noise 0.2")):
        decoded = decode(torch.from_numpy(z_BHWC + noise * noise_BHWC).permute(0, 3, 1, 2))
        error_B = ((decoded / 127.5 - pictures / 127.5) ** 2).mean(axis=(1, 2, 3))
        # 50 scenes instead of 1,000: their mean differs by chance.
        assert (10 * np.log10(4 / error_B)).mean() == pytest.approx(card[stated], abs=1)


def test_the_embedded_vae_decodes_held_out_scenes() -> None:
    pictures = np.stack([np.asarray(draw_scene(0, "val", index, 32).image) for index in range(50)])
    codec = load_codec(parse_codec("vae:32", "tiny", None))
    moments = codec.encode(pictures).numpy()
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


CHANNELS, LATENT, GROUPS = (8, 16, 16), 4, 4
CONFIG = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3, "block_out_channels": list(CHANNELS), "layers_per_block": 1,
    "latent_channels": LATENT, "norm_num_groups": GROUPS, "scaling_factor": 0.18215,
}  # fmt: skip
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """`autoencoder_kl.pth` in CompVis' layout, small, with the config.json that says how small."""
    folder = tmp_path_factory.mktemp("original")
    state = vae_state(CHANNELS, 1, LATENT)
    torch.save(state, folder / "autoencoder_kl.pth")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder / "autoencoder_kl.pth", state


def _diffusers_folder(folder: Path, state: dict[str, torch.Tensor], old_names: bool) -> Path:
    """The same weights as diffusers publishes them; the published files still have its first names of the attention."""
    vae = AutoencoderKL.from_config(CONFIG)
    vae.load_state_dict(convert_ldm_vae_checkpoint(dict(state), CONFIG))
    found = vae.state_dict()
    if old_names:
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, name in old.items():
            found = {
                key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in found.items()
            }
        assert any("proj_attn" in key for key in found)
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in found.items()}, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **CONFIG}))
    return folder


def test_both_layouts_of_the_vae_give_the_papers_moments(
    original: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path, state = original
    x_BCHW = torch.from_numpy(PICTURES).double().permute(0, 3, 1, 2) / 127.5 - 1
    wanted, middle = reference.vae_moments(state, x_BCHW, GROUPS)
    wanted = wanted.permute(0, 2, 3, 1)
    torch.save({"state_dict": {f"first_stage_model.{k}": v for k, v in state.items()} | {"loss.logvar": torch.ones(1)}},
               tmp_path / "model.ckpt")  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    places = [path, tmp_path / "model.ckpt", _diffusers_folder(tmp_path / "new", state, False),
              _diffusers_folder(tmp_path / "old", state, True)]  # fmt: skip
    found = {}
    for place in places:
        codec = load_codec(parse_codec("vae:24", str(place), None))
        found[place] = codec.encode(PICTURES).numpy()
        assert codec.latent_shape == (6, 6, 4)
        assert codec.attributes["layout"] == ("diffusers" if place.is_dir() else "original")
        # The mean's rounding is the moments' unit: single channels pass through zero.
        assert reference.furthest(torch.from_numpy(found[place]), wanted) <= 1e-5
        np.testing.assert_array_equal(found[place], found[places[0]])
    # The encoder of the ablation sees the same network from inside.
    encoder = load_encoder(EncoderSpec("vae", str(path), '{"img_size": 24}'), "cpu")
    inside = encode(encoder, PICTURES, "cpu", "float32")
    assert (encoder.grid, encoder.channels) == ((6, 6), 16)
    assert reference.furthest(inside, middle.permute(0, 2, 3, 1)) <= 1e-5
    assert reference.least_cosine(encode(encoder, PICTURES, "cpu", "bfloat16"), middle.permute(0, 2, 3, 1)) >= 0.999
    latent = load_encoder(EncoderSpec("vae:latent", str(path), '{"img_size": 24}'), "cpu")
    assert reference.furthest(encode(latent, PICTURES, "cpu", "float32"), wanted[..., :4]) <= 1e-5


def test_nestgen_decodes_what_is_stored_from_either_layout(
    original: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    from nestgen.sampling.decoder import load_decoder

    path, state = original
    pictures = []
    for place in (
        path,
        _diffusers_folder(tmp_path / "new", state, False),
        _diffusers_folder(tmp_path / "old", state, True),
    ):
        codec = load_codec(parse_codec("vae:24", str(place), 0.5))
        z_BCHW = (
            torch.from_numpy(codec.encode(PICTURES).numpy()[..., :LATENT]).permute(0, 3, 1, 2)
            * codec.attributes["scale"]
        )
        pictures.append(load_decoder(codec.attributes)(z_BCHW))
    assert pictures[0].shape == PICTURES.shape
    np.testing.assert_array_equal(pictures[0], pictures[1])
    np.testing.assert_array_equal(pictures[0], pictures[2])


def test_the_scale_is_the_sources_unless_it_is_said(original: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path = str(original[0])
    for source, scale, expected in [
        ("coco:/data", None, 0.23010),
        ("coco2014:/data", None, 0.23010),
        ("coco2017:/data", None, 0.23010),
        ("imagenet:/data", None, 0.18215),
        (None, None, 0.18215),
        ("coco:/data", 0.5, 0.5),
    ]:
        assert load_codec(parse_codec("vae:24", path, scale, source)).attributes["scale"] == expected
    # A VAE of another scale than Stable Diffusion's is not meant.
    own = load_codec(parse_codec("vae:32", "tiny", None)).attributes["scale"]
    assert load_codec(parse_codec("vae:32", "tiny", None, "coco:/data")).attributes["scale"] == own != 0.23010


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: {k: v for k, v in s.items() if "mid.attn_1.q." not in k}, "4 keys are missing"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("encoder.norm_out")}, "2 keys are missing"),
        (lambda s: s | {"encoder.down.5.block.0.conv1.weight": torch.ones(1)}, "must describe it"),
        (lambda s: {"cls_token": torch.ones(1)}, "don't fit the model"),
    ],
)
def test_a_wrong_original_file_is_one_sentence(
    original: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    sentence: str,
) -> None:
    torch.save(change(original[1]), tmp_path / "autoencoder_kl.pth")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError) as raised:
        load_codec(parse_codec("vae:24", str(tmp_path / "autoencoder_kl.pth"), None))
    assert sentence in str(raised.value)


def test_a_codec_in_bfloat16_is_another_identity_and_decodes_to_the_same_pictures() -> None:
    """58.6 dB were measured for 32 scenes of 64 pixels; 50 dB is less than one grey level of 256."""
    from nestgen.sampling.decoder import load_decoder

    pictures = np.stack([np.asarray(draw_scene(0, "val", index, 64).image) for index in range(4)])
    full, half = (load_codec(parse_codec("vae:64", "scenes", None, precision=name)) for name in ("float32", "bfloat16"))
    assert half.identity == full.identity | {"precision": "bfloat16"} and half.attributes == full.attributes
    moments, others = full.encode(pictures).numpy(), half.encode(pictures).numpy()
    share = np.square(others - moments).sum() / np.square(moments).sum()
    assert 1e-7 < share < 2e-5  # -47 dB; of float32's roundings it would be 1e-13
    decode = load_decoder(full.attributes)
    images = [
        decode(torch.from_numpy(full.attributes["scale"] * z[..., :6]).permute(0, 3, 1, 2)).astype(float)
        for z in (moments, others)
    ]
    assert 10 * np.log10(255**2 / np.square(images[0] - images[1]).mean()) > 50


def test_taesd_is_stored_without_moments_and_comes_back(tmp_path: Path) -> None:
    from nestgen.sampling.decoder import load_decoder, to_uint8

    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    tiny.save_pretrained(tmp_path)
    codec = load_codec(parse_codec("taesd:24", str(tmp_path), None))
    z_BHWC = codec.encode(PICTURES).numpy()
    assert (codec.latent_shape, codec.stored_channels, z_BHWC.shape) == ((12, 12, 4), 4, (2, 12, 12, 4))
    assert (codec.attributes["moments"], codec.attributes["scale"]) == (False, 1.0)
    with torch.no_grad():
        x_BCHW = torch.from_numpy(PICTURES).float().permute(0, 3, 1, 2) / 127.5 - 1
        torch.testing.assert_close(torch.from_numpy(z_BHWC).permute(0, 3, 1, 2), tiny.encode(x_BCHW).latents)
        z_BCHW = torch.from_numpy(z_BHWC).permute(0, 3, 1, 2)
        expected = to_uint8(tiny.decode(z_BCHW).sample)
    np.testing.assert_array_equal(load_decoder(codec.attributes)(z_BCHW), expected)
    with pytest.raises(UserError, match="give a multiple of it"):
        load_codec(parse_codec("taesd:23", str(tmp_path), None))


def test_pixels_keep_every_value() -> None:
    picture = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    stored = load_codec(parse_codec("pixels:16", None, None)).encode(picture).half().float().numpy()
    np.testing.assert_array_equal(np.rint((stored + 1) * 127.5), picture)


def test_pixels_have_no_precision() -> None:
    with pytest.raises(UserError, match="has no network to compute in bfloat16; leave --z0-precision out"):
        parse_codec("pixels:32", None, None, precision="bfloat16")


@pytest.mark.parametrize(
    ("text", "weights", "scale", "sentence"),
    [
        ("jpeg:32", None, None, "There is no codec 'jpeg:32'"),
        ("pixels:0", None, None, "There is no codec 'pixels:0'"),
        ("pixels:32", "x", None, "has no weights"),
        ("pixels:32", None, 0.5, "no scale"),
        ("vae:32", "tiny", -1.0, "can't be a latent scale"),
        ("vae:32", "/nowhere", None, "are not there"),
        ("vae:30", "tiny", None, "give a multiple of it"),
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


@pytest.mark.parametrize("codec", ["vae:24", "taesd:24"])
def test_a_link_into_the_hugging_face_cache_keeps_its_name(
    original: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, codec: str
) -> None:
    """There `snapshots/<revision>/x.safetensors` is a link to `blobs/<digest>`, whose name does not say what it is."""
    if codec.startswith("vae"):
        folder = _diffusers_folder(tmp_path / "snapshot", original[1], False)
    else:
        folder = tmp_path / "snapshot"
        AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).save_pretrained(folder)  # fmt: skip
    file = folder / "diffusion_pytorch_model.safetensors"
    file.rename(tmp_path / "0a1b2c")
    file.symlink_to(tmp_path / "0a1b2c")
    loaded = load_codec(parse_codec(codec, str(folder), None))
    assert loaded.attributes["weights"] == str(file)
