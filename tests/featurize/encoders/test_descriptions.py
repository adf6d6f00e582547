"""Encoders, codecs and the text encoder are described without being loaded, and describing says what loading finds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from featurize.checkpoints.files import read_checkpoint, sha256_of
from featurize.checkpoints.headers import tensor_names
from featurize.codecs import CodecDescription, describe_codec, load_codec, parse_codec
from featurize.encoders import EncoderDescription, EncoderSpec, describe_encoder, encode, kinds, load_encoder
from featurize.errors import UserError
from featurize.text.tower import TextSpec, describe_text_encoder, load_text_encoder
from tests.featurize.layouts import clip_state, described, moco_file, moco_state, torchscript_clip, vae_state, vit_state

SMALL = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 4}
VISUAL = {"img_size": 64, "width": 64, "layers": 2, "heads": 2, "embed_dim": 24}
VAE = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3, "block_out_channels": [8, 16, 16], "layers_per_block": 1,
    "latent_channels": 4, "norm_num_groups": 4, "scaling_factor": 0.18215,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, vit_weights: Path) -> dict[str, Path]:
    """Small random weights of every kind, in the layouts that are published."""
    root = tmp_path_factory.mktemp("kinds")
    for name in ("vae", "taesd"):
        (root / name).mkdir()
    found = {"timm": vit_weights, "vae": root / "vae" / "autoencoder_kl.pth", "taesd": root / "taesd"}
    found["mocov3"] = moco_file(root / "moco.pth.tar", moco_state(64, 2, 4), **SMALL)
    found["rcg"] = moco_file(
        root / "rcg.pth.tar", moco_state(64, 2, 4), **(SMALL | {"mlp_dim": 32, "projection_dim": 16})
    )
    torch.save(vit_state(64, 2, 16, 4), root / "dino.pth")
    found["dino"] = described(root / "dino.pth", **SMALL)
    torch.save(vit_state(64, 2, 14, 7, registers=4), root / "dinov2.pth")
    found["dinov2"] = described(root / "dinov2.pth", **(SMALL | {"img_size": 56}))
    state = clip_state(64, 2, 16, 4, 24, (32, 2, 77))
    found["clip"] = described(torchscript_clip(root / "clip.pt", state), **VISUAL)
    torch.save(state, root / "text.pt")
    found["text"] = described(root / "text.pt", width=32, layers=2, heads=2)
    torch.save(vae_state((8, 16, 16), 1, 4), found["vae"])
    (root / "vae" / "config.json").write_text(json.dumps(VAE))
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(found["taesd"])  # fmt: skip
    return found


ENCODERS = [
    ("tiny", None, "{}"),
    ("mocov3", "mocov3", "{}"),
    ("clip", "clip", "{}"),
    ("clip", "clip", '{"norm": "none", "projection": true}'),
    ("dino", "dino", "{}"),
    ("dino:dinov2_vitb14_reg", "dinov2", "{}"),
    ("rcg", "rcg", "{}"),
    ("vae", "tiny", '{"img_size": 32}'),
    ("vae", "vae", '{"img_size": 27}'),
    ("vae:latent", "vae", '{"img_size": 24}'),
    ("pixels", None, '{"img_size": 16, "patch_size": 4}'),
    ("timm:vit_tiny_patch16_224", "timm", "{}"),
]
CODECS = [("pixels:16", None), ("vae:32", "tiny"), ("vae:24", "vae"), ("taesd:24", "taesd")]


@pytest.mark.parametrize(("name", "file", "arguments"), ENCODERS)
def test_an_encoder_is_described_as_it_is_loaded(
    weights: dict[str, Path], name: str, file: str | None, arguments: str
) -> None:
    spec = EncoderSpec(name, str(weights.get(file or "", file)) if file else None, arguments)
    description, encoder = describe_encoder(spec), load_encoder(spec, "cpu")
    for part in fields(EncoderDescription):
        assert getattr(description, part.name) == getattr(encoder, part.name), part.name
    size = encoder.input_size
    f_BHWD = encode(encoder, torch.zeros(1, size, size, 3, dtype=torch.uint8).numpy(), "cpu", "float32")
    assert f_BHWD.shape == (1, *description.grid, description.channels)
    assert json.loads(json.dumps(description.identity)) == description.identity


def test_every_kind_of_encoder_is_among_them() -> None:
    assert {name.partition(":")[0] for name, _, _ in ENCODERS} == kinds().keys()


@pytest.mark.parametrize(("text", "file"), CODECS)
def test_a_codec_is_described_as_it_is_loaded(weights: dict[str, Path], text: str, file: str | None) -> None:
    spec = parse_codec(text, str(weights.get(file or "", file)) if file else None, None)
    description, codec = describe_codec(spec), load_codec(spec)
    for part in fields(CodecDescription):
        assert getattr(description, part.name) == getattr(codec, part.name), part.name
    latent = codec.encode(torch.zeros(1, spec.size, spec.size, 3, dtype=torch.uint8).numpy())
    assert latent.shape == (1, *description.latent_shape[:2], description.stored_channels)
    assert json.loads(json.dumps(description.identity)) == description.identity


def test_the_text_encoder_is_described_as_it_is_loaded(weights: dict[str, Path]) -> None:
    spec = TextSpec("clip", str(weights["text"]))
    description, encoder = describe_text_encoder(spec), load_text_encoder(spec, "cpu")
    assert description == encoder.description
    assert encoder.encode(["a red boat"]).shape == (1, description.tokens, description.width)


def test_describing_imports_no_torch(weights: dict[str, Path]) -> None:
    """But for `timm:MODEL`, whose models only timm knows."""
    encoders = [
        (name, str(weights.get(file or "", file)) if file else None, arguments)
        for name, file, arguments in ENCODERS
        if not name.startswith("timm:")
    ]
    codecs = [(text, str(weights.get(file or "", file)) if file else None) for text, file in CODECS]
    code = f"""
import sys
from featurize.codecs import describe_codec, parse_codec
from featurize.encoders import EncoderSpec, describe_encoder
from featurize.text.tower import TextSpec, describe_text_encoder
for name, weights, arguments in {encoders!r}:
    describe_encoder(EncoderSpec(name, weights, arguments))
for text, weights in {codecs!r}:
    describe_codec(parse_codec(text, weights, None))
describe_text_encoder(TextSpec("clip", {str(weights["text"])!r}))
assert not {{"torch", "timm", "open_clip", "diffusers"}} & sys.modules.keys(), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_read_from_every_layout(tmp_path: Path) -> None:
    state = {"encoder.down.0.weight": torch.zeros(2), "norm.bias": torch.zeros(3)}
    save_file(state, tmp_path / "a.safetensors", {"format": "pt"})
    torch.save({"state_dict": state, "epoch": 3, "args": Path("x")}, tmp_path / "b.pth")
    torch.save({"model": state}, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "b.pth", "c.pth"):
        assert tensor_names(tmp_path / name) == state.keys(), name
    for name in ("a.safetensors", "b.pth", "c.pth"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
        with pytest.raises(UserError, match=f"{name} can't be read"):
            tensor_names(tmp_path / name)


@pytest.mark.parametrize(("name", "file"), [("encoder", "dino"), ("codec", "taesd"), ("text", "text")])
def test_a_file_that_is_overwritten_is_loaded_again(
    weights: dict[str, Path], tmp_path: Path, name: str, file: str
) -> None:
    """In one process, as a training in a notebook does: the identity and the values are both of the newest file."""

    def run(path: str) -> tuple[str, np.ndarray]:
        if name == "encoder":
            encoder = load_encoder(EncoderSpec("dino", path), "cpu")
            pictures = np.full((1, 64, 64, 3), 99, np.uint8)
            return encoder.identity["weights_sha256"], encode(encoder, pictures, "cpu", "float32").numpy()
        if name == "codec":
            codec = load_codec(parse_codec("taesd:24", path, None))
            return codec.identity["weights_sha256"], codec.encode(np.full((1, 24, 24, 3), 99, np.uint8)).numpy()
        text = load_text_encoder(TextSpec("clip", path), "cpu")
        return text.description.identity["weights_sha256"], text.encode(["a red boat"])

    source = weights[file]
    if source.is_dir():
        copy = tmp_path / "diffusion_pytorch_model.safetensors"
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    else:
        copy = Path(shutil.copy(source, tmp_path))
        shutil.copy(source.with_suffix(".json"), tmp_path)
    first, old = run(str(copy))
    assert np.array_equal(run(str(copy))[1], old)
    state = {key: value * 1.5 for key, value in read_checkpoint(copy).items()}
    save_file(state, copy) if copy.suffix == ".safetensors" else torch.save(state, copy)
    second, new = run(str(copy))
    assert first != second == sha256_of(copy)
    assert not np.array_equal(old, new)


@pytest.mark.parametrize("data", [b"version https://git-lfs.github.com/spec/v1\n", b"<!doctype html><p>not found"])
def test_text_under_the_name_of_weights_is_no_lack_of_memory(tmp_path: Path, data: bytes) -> None:
    """Its first eight bytes, read as a header's length, are more than any memory holds."""
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"can't be read: it is damaged, .* no file of weights \(.*; fetch or copy"):
        tensor_names(tmp_path / "x.safetensors")
