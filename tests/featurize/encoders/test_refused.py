"""Arguments that no network has, and timm's models without a feature map: one sentence each, before any weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featurize.encoders import EncoderSpec, describe_encoder, load_encoder
from featurize.encoders.encoder import RESAMPLE
from featurize.encoders.timm_model import feature_map
from featurize.errors import UserError


class _Gives(nn.Module):
    """A timm model that gives these features."""

    def __init__(self, features: Any, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.features = features
        if grid:
            self.patch_embed = nn.Module()
            self.patch_embed.grid_size = grid

    def forward_features(self, x_BCHW: Tensor) -> Any:
        return self.features


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (_Gives([torch.ones(1, 4, 8)]), "a list"),  # crossvit, coat
        (_Gives((torch.ones(1, 4, 8),)), "a tuple"),
        (_Gives(torch.ones(1, 4, 8)), r"an array of shape \(1, 4, 8\)"),  # levit, twins, tnt, mixer, naflexvit
        (_Gives(torch.ones(1, 4, 8), (3, 3)), r"an array of shape \(1, 4, 8\)"),  # pit
        (_Gives(torch.ones(1, 8)), r"an array of shape \(1, 8\)"),
    ],
)
def test_a_timm_model_without_a_known_grid_is_one_sentence(model: nn.Module, given: str) -> None:
    with pytest.raises(UserError, match=f"_Gives gives {given} instead of .*choose a model with a map of tokens or of"):
        feature_map(model, torch.ones(1, 3, 8, 8))


def test_a_real_timm_model_without_a_grid_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"LevitDistilled gives .*; choose a model with a map of tokens or of convolutions"
    ):
        describe_encoder(EncoderSpec("timm:levit_128s", str(tmp_path / "w.pth")))


@pytest.mark.parametrize(
    ("name", "arguments", "wanted"),
    [
        ("vae", {"img_size": "big"}, "a whole number from 1 on"),
        ("pixels", {"img_size": 64.0}, "a whole number from 1 on"),
        ("mocov3", {"num_heads": 0}, "a whole number from 1 on"),
        ("mocov3", {"depth": True}, "a whole number from 1 on"),
        ("mocov3", {"arch": 7}, "a word"),
        ("clip", {"layers": "12"}, "a whole number from 1 on"),
        ("clip", {"heads": None}, "a whole number from 1 on"),
        ("clip", {"projection": 1}, "true or false"),
        ("clip", {RESAMPLE: "no"}, "true or false"),  # YAML 1.2 reads no as a word
        ("dino", {RESAMPLE: "no"}, "true or false"),
        ("dino", {"registers": -1}, "a whole number from 0 on"),
        ("tiny", {RESAMPLE: "no"}, "true or false"),
        ("timm:resnet10t", {RESAMPLE: "no"}, "true or false"),
    ],
)
def test_an_argument_that_cannot_be_is_one_sentence(
    tmp_path: Path, name: str, arguments: dict[str, Any], wanted: str
) -> None:
    (tmp_path / "w.pth").write_bytes(b"")
    weights = {"vae": "tiny", "pixels": None, "tiny": None}.get(name, str(tmp_path / "w.pth"))
    ((key, value),) = arguments.items()
    with pytest.raises(UserError, match=f"can't have {key} {json.dumps(value)}; --model-args.* must give {wanted}"):
        describe_encoder(EncoderSpec(name, weights, json.dumps(arguments)))


def test_a_transformer_of_no_heads_is_one_sentence() -> None:
    with pytest.raises(UserError, match="timm can't build"):
        load_encoder(EncoderSpec("tiny", None, '{"num_heads": 0}'), "cpu")
