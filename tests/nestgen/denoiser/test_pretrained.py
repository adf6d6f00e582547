"""Published U-ViT checkpoints begin a denoiser, whose condition path does not change what the network says."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nestgen.denoiser.config import DenoiserConfig
from nestgen.denoiser.pretrained import read_weights, uvit_weights
from nestgen.denoiser.uvit import Denoiser
from nestgen.errors import UserError
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import load_recipe
from nestgen.training.train import train

PLAIN = DenoiserConfig(shape=(8, 8, 4), patch=2, dim=32, depth=4, heads=4)


def official(config: DenoiserConfig) -> dict[str, Tensor]:
    """A state dict in the layout of U-ViT's nnet.pth (libs/uvit.py, libs/uvit_t2i.py), written out here."""
    d, (h, w, c), p = config.dim, config.shape, config.patch
    tokens = 1 + bool(config.labels) + (config.text[0] if config.text else 0) + h * w // p**2
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, d),
        "patch_embed.proj.weight": (d, c, p, p),
        "patch_embed.proj.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
        "decoder_pred.weight": (p * p * c, d),
        "decoder_pred.bias": (p * p * c,),
        "final_layer.weight": (c, c, 3, 3),
        "final_layer.bias": (c,),
    }
    if config.labels:
        shapes["label_emb.weight"] = (config.labels + 1, d)
    if config.text:
        shapes |= {"context_embed.weight": (d, config.text[1]), "context_embed.bias": (d,)}
    half = config.depth // 2
    for name in [f"{side}_blocks.{i}" for side in ("in", "out") for i in range(half)] + ["mid_block"]:
        if name.startswith("out"):
            shapes |= {f"{name}.skip_linear.weight": (d, 2 * d), f"{name}.skip_linear.bias": (d,)}
        for part in ("norm1", "norm2"):
            shapes |= {f"{name}.{part}.weight": (d,), f"{name}.{part}.bias": (d,)}
        shapes |= {f"{name}.attn.qkv.weight": (3 * d, d)}
        for part, out, inner in (("attn.proj", d, d), ("mlp.fc1", 4 * d, d), ("mlp.fc2", d, 4 * d)):
            shapes |= {f"{name}.{part}.weight": (out, inner), f"{name}.{part}.bias": (out,)}
    rng = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


@pytest.mark.parametrize("config", [PLAIN, replace(PLAIN, labels=5), replace(PLAIN, text=(3, 6))])
@pytest.mark.parametrize("mode", ["replace", "residual"])
def test_the_output_is_that_of_the_unconditional_network(tmp_path: Path, config: DenoiserConfig, mode: Any) -> None:
    state = official(config)
    torch.save(state, tmp_path / "nnet.pth")
    twin = Denoiser(config)
    twin.load_state_dict({**state, **dict(twin.named_buffers())})
    conditioned = replace(config, condition_shapes=((4, 4, 6), (2, 2, 3)), condition=mode, sigma_told=True)
    denoiser = Denoiser(conditioned)
    denoiser.load_state_dict(read_weights(tmp_path / "nnet.pth", denoiser), strict=False)
    z_BCHW, time_B = torch.randn(3, 4, 8, 8), torch.tensor([1.0, 500.0, 1000.0])
    conditions = [torch.randn(3, 6, 4, 4), torch.randn(3, 3, 2, 2)]
    extra: dict[str, Any] = {}
    if config.labels:
        extra["label_B"] = torch.tensor([0, 4, 5])
    if config.text:
        extra["context_BTD"] = torch.randn(3, 3, 6)
    wanted = twin(z_BCHW, time_B, **extra)
    found = denoiser(z_BCHW, time_B, conditions, sigma_BK=torch.rand(3, 2), **extra)
    if mode == "residual":
        assert torch.equal(found, wanted)
    else:  # x = GELU(x) - GELU(-x), but for rounding
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    # and back again: the same layout, the same bytes
    assert uvit_weights(denoiser.state_dict()).keys() == state.keys()
    for name, tensor in uvit_weights(denoiser.state_dict()).items():
        assert torch.equal(tensor, state[name])


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "nnet.pth"
    torch.save(official(replace(PLAIN, labels=5)), file)
    for config, says in [
        (PLAIN, r"the denoiser has no label_emb\.weight; it has pos_embed \[1, 18, 32\] instead of \[1, 17, 32\]"),
        (replace(PLAIN, labels=6), r"it has label_emb\.weight \[6, 32\] instead of \[7, 32\]"),
        (replace(PLAIN, labels=5, qk_norm=True), r"it lacks in_blocks\.0\.attn\.q_norm\.weight.* and \d+ more"),
        (replace(PLAIN, labels=5, depth=6), r"it lacks in_blocks\.2\."),
    ]:
        with pytest.raises(UserError, match=says):
            read_weights(file, Denoiser(config))
    assert read_weights(file, Denoiser(replace(PLAIN, labels=5)))


class Runs:
    """A pickle that would run code."""

    def __reduce__(self) -> Any:
        return print, ("run",)


def test_bad_files_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    denoiser = Denoiser(PLAIN)
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"a": Runs()}))
    torch.save({"a": Runs()}, tmp_path / "code2.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, says in [
        ("none.pth", r"there is no .*none\.pth; check the path given to --init"),
        ("code.pth", "cannot be read as weights"),
        ("code2.pth", "cannot be read as weights"),
        ("text.pth", "cannot be read as weights"),
        ("cut.safetensors", "cannot be read as weights"),
        ("list.pth", "is not a state dict"),
    ]:
        with pytest.raises(UserError, match=says) as caught:
            read_weights(tmp_path / name, denoiser)
        assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_training_begins_with_them_and_goes_on_without(experiment: Callable[..., Path], tmp_path: Path) -> None:
    options = {"steps": 1, "batch": 4, "warmup": 100, "lr": 1e-9, "preview": 0, "weight_decay": 0.0}
    levels = ({"shape": "4x4x3"}, {"shape": "2x2x3"})
    recipe = load_recipe(experiment(levels=levels, training=options))
    plain = {
        name: torch.randn_like(value) * 0.1
        for name, value in Denoiser(replace(PLAIN, shape=(4, 4, 3), dim=128, heads=4)).state_dict().items()
    }
    save_file(plain, tmp_path / "plain.safetensors")
    torch.save({f"module.{name}": value for name, value in plain.items()}, tmp_path / "nnet.pth")
    train(recipe, 0, tmp_path / "nnet.pth")
    folder = run_dir(recipe, 0)
    found = load_file(folder / "checkpoints/00000001/denoiser.safetensors")
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7)
    more = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 2})})
    with pytest.raises(UserError, match="was started with other settings: init was"):
        train(more, 0, tmp_path / "plain.safetensors")
    train(more, 0)  # goes on with what it began with
    assert (folder / "checkpoints/00000002").is_dir()
