"""Checkpoints as trainings leave them: what certainly wraps the weights is taken off, anything else is named with its cure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from featurize.checkpoints.files import read_checkpoint, read_state_dict, sha256_of
from featurize.checkpoints.headers import tensor_names
from featurize.encoders import EncoderSpec, encode, load_encoder
from featurize.errors import UserError
from tests.featurize.layouts import clip_state, described, torchscript_clip, vit_state

SMALL = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 4}
STATE = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.ones(2)}
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)


def named(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in STATE.items()}


def optimizer() -> dict[str, Any]:
    return {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}


@pytest.mark.parametrize(
    "checkpoint",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3, "arch": "vit", "best_acc1": torch.tensor(0.7), "optimizer": optimizer()},
        {"model": STATE, "args": argparse.Namespace(lr=1e-3, name="x"), "optimizer": optimizer(), "scaler": {}},
        {"model": STATE, "best": np.float64(0.7), "steps": np.int64(3), "criterion": {"weight": torch.ones(3)}},
        {"model_ema": STATE},
        {"teacher": STATE, "epoch": 7},
        {"module": named("module.")},
        {"my_network": STATE, "config": {"depth": 3}},
        {"state_dict": {"model": STATE}},
        named("module."),
        named("_orig_mod."),
        named("module._orig_mod."),
        named("_orig_mod.module."),
        {"state_dict": named("model.")},
        {"conv._orig_mod.weight": STATE["conv.weight"], "conv._orig_mod.bias": STATE["conv.bias"]},
    ],
    ids=lambda checkpoint: "+".join(list(checkpoint)[:3]),
)
def test_what_certainly_wraps_the_weights_is_taken_off(tmp_path: Path, checkpoint: dict[str, Any]) -> None:
    torch.save(checkpoint, tmp_path / "w.pth")
    found = read_state_dict(tmp_path / "w.pth")
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], value) for name, value in STATE.items())
    assert tensor_names(tmp_path / "w.pth") == set(STATE)


@pytest.mark.parametrize("sets", [("model", "model_ema"), ("student", "teacher"), ("state_dict", "state_dict_ema")])
def test_of_several_sets_of_weights_none_is_taken_by_chance(tmp_path: Path, sets: tuple[str, str]) -> None:
    torch.save(dict.fromkeys(sets, STATE) | {"optimizer": optimizer()}, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=rf"several sets of weights \({', '.join(sorted(sets))}\); save the one you mean"
    ):
        read_state_dict(tmp_path / "w.pth")


def test_a_class_that_is_not_harmless_is_named_and_not_to_be_run(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "where": Path("x")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"it holds a pathlib\.[\w.]*PosixPath, .* save its tensors alone") as refused:
        read_checkpoint(tmp_path / "w.pth")
    assert "weights_only" not in str(refused.value)


def test_weights_in_several_files_are_read_by_their_index(tmp_path: Path) -> None:
    for number, name in enumerate(STATE, 1):
        save_file({name: STATE[name]}, tmp_path / f"model-{number:05d}-of-00002.safetensors")
    weight_map = {name: f"model-{number:05d}-of-00002.safetensors" for number, name in enumerate(STATE, 1)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}))
    found = read_state_dict(index)
    assert all(torch.equal(found[name], value) for name, value in STATE.items())
    assert tensor_names(index) == set(STATE)
    before = sha256_of(index)
    save_file({"conv.bias": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    assert sha256_of(index) != before  # the index itself did not change
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"model-00001-of-00002\.safetensors of the weights .* is not there; fetch all parts"
    ):
        read_state_dict(index)
    index.write_text("{}")
    with pytest.raises(UserError, match="does not say which file holds which tensor"):
        read_state_dict(index)


def features(path: Path, name: str, arguments: str = "{}") -> Tensor:
    return encode(load_encoder(EncoderSpec(name, str(path), arguments), "cpu"), PICTURES, "cpu", "float32")


def test_dinos_training_checkpoint_gives_the_teachers_features(tmp_path: Path) -> None:
    teacher, student = vit_state(64, 2, 16, 4), vit_state(64, 2, 16, 4, seed=9)
    torch.save(teacher, tmp_path / "backbone.pth")
    head = {"head.mlp.0.weight": torch.ones(8, 64), "head.last_layer.weight_g": torch.ones(8, 1)}
    whole = {
        "student": {f"module.backbone.{key}": value for key, value in student.items()},
        "teacher": {f"backbone.{key}": value for key, value in teacher.items()} | head,
        "optimizer": optimizer(),
        "epoch": 800,
        "args": argparse.Namespace(arch="vit_base"),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }
    torch.save(whole, tmp_path / "whole.pth")
    paths = [described(tmp_path / f"{name}.pth", **SMALL) for name in ("backbone", "whole")]
    assert torch.equal(features(paths[0], "dino"), features(paths[1], "dino"))


def test_positions_of_another_size_are_resampled_when_asked_for(tmp_path: Path) -> None:
    larger, own = vit_state(64, 2, 16, 6), vit_state(64, 2, 16, 6)
    own["pos_embed"] = resample_abs_pos_embed(larger["pos_embed"], [4, 4], num_prefix_tokens=1)
    for name, state in (("larger", larger), ("own", own)):
        torch.save(state, tmp_path / f"{name}.pth")
        described(tmp_path / f"{name}.pth", **SMALL)
    with pytest.raises(UserError, match=r"'pos_embed' is \(1, 37, 64\).*resample_positions=true"):
        features(tmp_path / "larger.pth", "dino")
    asked = '{"resample_positions": true}'
    assert torch.equal(features(tmp_path / "larger.pth", "dino", asked), features(tmp_path / "own.pth", "dino"))
    identity = load_encoder(EncoderSpec("dino", str(tmp_path / "larger.pth"), asked), "cpu").identity
    assert identity["network"]["resample_positions"] is True
    with pytest.raises(UserError, match="mocov3 has no argument 'resample_positions'"):
        features(tmp_path / "own.pth", "mocov3", asked)


def test_positions_of_clip_and_timm_are_resampled_too(tmp_path: Path) -> None:
    import timm

    asked = {"resample_positions": True}
    visual = {"img_size": 64, "width": 64, "layers": 2, "heads": 2, "embed_dim": 24}
    archive = torchscript_clip(tmp_path / "clip.pt", clip_state(64, 2, 16, 6, 24, (8, 1, 77)))
    described(archive, **visual)
    with pytest.raises(UserError, match="resample_positions=true"):
        features(archive, "clip")
    assert features(archive, "clip", json.dumps(asked)).shape == (2, 4, 4, 64)

    sizes = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    torch.manual_seed(0)
    larger = timm.create_model("deit_tiny_distilled_patch16_224", img_size=96, num_classes=0, **sizes)
    torch.nn.init.normal_(larger.pos_embed)
    save_file(larger.state_dict(), tmp_path / "t.safetensors")
    model, arguments = "timm:deit_tiny_distilled_patch16_224", {**sizes, "img_size": 64}
    with pytest.raises(UserError, match="'pos_embed' is"):
        features(tmp_path / "t.safetensors", model, json.dumps(arguments))
    found = features(tmp_path / "t.safetensors", model, json.dumps(arguments | asked))
    own = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=0, **arguments)
    position = resample_abs_pos_embed(larger.pos_embed, [4, 4], num_prefix_tokens=2)
    own.load_state_dict(larger.state_dict() | {"pos_embed": position})
    save_file(own.state_dict(), tmp_path / "own.safetensors")
    assert torch.equal(found, features(tmp_path / "own.safetensors", model, json.dumps(arguments)))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_a_text_model_is_read_with_and_without_its_prefix(tmp_path: Path, prefix: str) -> None:
    from featurize.checkpoints.clip import read_clip

    width = 4
    layer = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    layer |= {"layer_norm1": (width,), "layer_norm2": (width,), "mlp.fc1": (8, width), "mlp.fc2": (width, 8)}
    state = {f"encoder.layers.0.{name}.weight": torch.randn(shape) for name, shape in layer.items()}
    state |= {f"encoder.layers.0.{name}.bias": torch.randn(shape[0]) for name, shape in layer.items()}
    state |= {"embeddings.token_embedding.weight": torch.randn(9, width), "final_layer_norm.weight": torch.ones(width)}
    state |= {"embeddings.position_embedding.weight": torch.randn(7, width), "final_layer_norm.bias": torch.ones(width)}
    save_file({f"{prefix}{name}": value for name, value in state.items()}, tmp_path / "w.safetensors")
    text = read_clip(tmp_path / "w.safetensors").text
    assert torch.equal(text["token_embedding.weight"], state["embeddings.token_embedding.weight"])
    assert text["transformer.resblocks.0.attn.in_proj_weight"].shape == (3 * width, width)
    assert torch.equal(text["ln_final.bias"], state["final_layer_norm.bias"])
    assert len(text) == 16
