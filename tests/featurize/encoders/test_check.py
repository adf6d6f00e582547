"""The list of encoders, and the proof that a loaded one computes what it should."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from featurize.checkpoints.downloads import PUBLISHED
from featurize.encoders import EncoderSpec, encode, known_names, load_encoder
from featurize.encoders.check import brightest_cell, check_encoder, golden_picture, golden_values
from tests.featurize.layouts import clip_state, described, moco_file, moco_state

VISUAL = {"img_size": 64, "width": 64, "layers": 2, "heads": 2, "embed_dim": 24}


def test_the_list_names_every_encoder_and_where_its_weights_are(  # type: ignore[no-untyped-def]
    featurize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATURIZE_CACHE", str(tmp_path))
    (tmp_path / PUBLISHED["dino-vitb16"].file).write_bytes(b"")
    outcome = featurize("encoders")
    assert outcome.code == 0
    lines = {line.split()[0]: line for line in outcome.out.splitlines() if line.strip()}
    assert lines.keys() >= set(known_names()) - {"timm:MODEL"}
    for name, words in {
        "mocov3": ("final LayerNorm", "256 bilinear, centre 224", "14x14x768", PUBLISHED["mocov3-vit_base"].url),
        "clip": ("ln_post", "224 bicubic, centre 224", "14x14x768"),
        "dino": ("256 bicubic, centre 224", "here (dino-vitb16.pth)"),
        "dino:dinov2_vitb14_reg": ("16x16x768",),
        "rcg": ("1x1x256", "projection of the class token"),
        "mocov3:vit_large": ("yours: --weights FILE",),
        "tiny": ("8x8x128", "in the package"),
        "vae": ("32x32x512", "none"),
    }.items():
        assert all(word in lines[name] for word in words), lines[name]


def test_tiny_passes_every_check(featurize) -> None:  # type: ignore[no-untyped-def]
    outcome = featurize("check-encoder", "tiny")
    assert outcome.code == 0, outcome.err
    found = {line.split()[1].rstrip(":"): line.split()[0] for line in outcome.out.splitlines()}
    assert found == dict.fromkeys(("keys", "activation", "pictures", "outputs", "places", "golden"), "ok")


def test_golden_features_catch_what_the_keys_cannot(tmp_path: Path) -> None:
    """Weights trained with QuickGELU, computed with GELU: every key fits, the golden features do not."""
    torch.save(clip_state(64, 2, 16, 4, 24, (8, 1, 77)), tmp_path / "clip.pt")
    described(tmp_path / "clip.pt", **VISUAL)
    spec = EncoderSpec("clip", str(tmp_path / "clip.pt"))
    findings = {finding.subject: finding for finding in check_encoder(spec, "cpu")}
    assert findings["activation"].passed is None
    assert findings["golden features"].passed is None and "none are known" in findings["golden features"].words
    encoder = load_encoder(spec, "cpu")
    golden = golden_values(encode(encoder, golden_picture(64)[None], "cpu", "float32")[0].numpy())
    document = {"model_args": VISUAL, "golden": golden}
    (tmp_path / "clip.json").write_text(json.dumps(document))
    assert {f.subject: f.passed for f in check_encoder(spec, "cpu")}["golden features"] is True
    mixed = EncoderSpec("clip", str(tmp_path / "clip.pt"), '{"activation": "gelu"}')
    last = {finding.subject: finding for finding in check_encoder(mixed, "cpu")}["golden features"]
    assert last.passed is False and last.words.startswith("off: within")


@pytest.mark.parametrize(
    ("key", "value", "subject"),
    [
        ("module.base_encoder.norm.weight", 0.0, "outputs"),  # every channel is dead
        ("module.base_encoder.patch_embed.proj.weight", 0.0, "places"),  # it does not see the picture
    ],
)
def test_a_network_that_sees_nothing_fails(featurize, tmp_path: Path, key: str, value: float, subject: str) -> None:  # type: ignore[no-untyped-def]
    path = moco_file(tmp_path / "m.pth.tar", moco_state(32, 1, 4), img_size=64, embed_dim=32, depth=1, num_heads=2)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"][key].fill_(value)
    torch.save(checkpoint, path)
    outcome = featurize("check-encoder", "mocov3", "--weights", path)
    assert outcome.code == 1
    assert f"FAILED    {subject}" in outcome.out
    assert "don't extract with it" in outcome.err


def test_a_shuffled_grid_is_found_out(tmp_path: Path) -> None:
    path = moco_file(tmp_path / "m.pth.tar", moco_state(32, 1, 4), img_size=64, embed_dim=32, depth=1, num_heads=2)
    encoder = load_encoder(EncoderSpec("mocov3", str(path)), "cpu")
    from dataclasses import replace

    turned = replace(encoder, forward=lambda x_BCHW: encoder.forward(x_BCHW).transpose(1, 2))
    assert brightest_cell(encoder, 1, 2, "cpu", "float32") == (1, 2)
    assert brightest_cell(turned, 1, 2, "cpu", "float32") == (2, 1)


def test_the_golden_picture_is_the_same_everywhere() -> None:
    picture = golden_picture(16)
    assert picture.shape == (16, 16, 3) and picture.dtype == np.uint8
    assert picture[0, 0].tolist() == [127, 220, 227]
    assert picture[5, 9].tolist() == [127, 147, 24]
