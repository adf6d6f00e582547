"""The denoiser against a plain U-ViT written from its description, and the rules of the condition path."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from nestgen.denoiser.blocks import sinusoids
from nestgen.denoiser.config import DenoiserConfig, bottleneck_warning
from nestgen.denoiser.uvit import Denoiser
from tests.nestgen.denoiser.plain_uvit import plain_uvit

SMALL = DenoiserConfig(shape=(8, 4, 3), patch=2, dim=32, depth=4, heads=4)
GIVEN = replace(SMALL, condition_shapes=((2, 2, 5),))
ALL = replace(SMALL, condition_shapes=((4, 2, 5), (2, 2, 4), (1, 1, 3)), sigma_told=True, text=(3, 6), qk_norm=True)


def build(config: DenoiserConfig, seed: int = 0) -> Denoiser:
    """A denoiser whose weights are all random, those that start at zero too."""
    torch.manual_seed(seed)
    denoiser = Denoiser(config).double()
    for weight in denoiser.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return denoiser


def inputs(config: DenoiserConfig, batch: int = 3) -> dict[str, Any]:
    """Everything the configuration's forward takes."""
    rng = torch.Generator().manual_seed(1)
    h, w, c = config.shape
    kwargs: dict[str, Any] = {
        "z_BCHW": torch.randn(batch, c, h, w, generator=rng, dtype=torch.float64),
        "time_B": torch.rand(batch, generator=rng, dtype=torch.float64) * 1000,
    }
    if config.condition_shapes:
        kwargs["condition"] = [
            torch.randn(batch, c, h, w, generator=rng, dtype=torch.float64) for h, w, c in config.condition_shapes
        ]
        kwargs["keep_B"] = torch.tensor([True, False, True])
    if config.labels:
        kwargs["label_B"] = torch.tensor([0, config.labels, 1])
    if config.text:
        kwargs["context_BTD"] = torch.randn(batch, *config.text, generator=rng, dtype=torch.float64)
    if config.sigma_told:
        kwargs["sigma_BK"] = torch.rand(batch, len(config.condition_shapes), generator=rng, dtype=torch.float64)
    return kwargs


def as_float32(given_: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in the precision of training."""

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(one) for one in value]
        return value.float() if value.is_floating_point() else value

    return {name: convert(value) for name, value in given_.items()}


@pytest.mark.parametrize("labels", [0, 7])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, depth=6, heads=2, patch=4),
        replace(GIVEN, condition="replace"),
        replace(GIVEN, condition="residual", depth=6),
        replace(GIVEN, condition_shapes=((4, 2, 5),)),  # as large as the token grid: up, then down
        replace(SMALL, text=(3, 6), qk_norm=True),
        ALL,
        replace(ALL, condition="residual"),
    ],
)
def test_forward_and_gradients_are_those_of_plain_uvit(config: DenoiserConfig, labels: int) -> None:
    config = replace(config, labels=labels)
    denoiser, given_ = build(config), inputs(config)
    given_.pop("keep_B", None)
    weights = {name: value.detach().clone().requires_grad_() for name, value in denoiser.named_parameters()}
    found = denoiser(**given_)
    wanted = plain_uvit(
        weights,
        config,
        *(given_.get(name) for name in ("z_BCHW", "time_B", "label_B", "condition", "context_BTD", "sigma_BK")),
    )
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8 * wanted.abs().max().item())
    found.square().sum().backward()
    wanted.square().sum().backward()
    for name, parameter in denoiser.named_parameters():
        gradient = weights[name].grad
        assert gradient is not None, name
        assert parameter.grad is not None, name
        error = (parameter.grad - gradient).norm() / gradient.norm()
        assert error < 1e-8, name


def test_weights_have_the_published_names() -> None:
    names = set(Denoiser(replace(SMALL, labels=3)).state_dict())
    block = [
        *(f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")),
        "attn.qkv.weight",
        *(f"{part}.{kind}" for part in ("attn.proj", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")),
    ]
    expected = {"pos_embed", "label_emb.weight"}
    expected |= {
        f"{part}.{kind}"
        for part in ("patch_embed.proj", "norm", "decoder_pred", "final_layer")
        for kind in ("weight", "bias")
    }
    expected |= {
        f"{place}.{name}"
        for place in ("in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1")
        for name in block
    }
    expected |= {f"out_blocks.{i}.skip_linear.{kind}" for i in range(2) for kind in ("weight", "bias")}
    assert names == expected
    assert Denoiser(replace(SMALL, labels=3)).pos_embed.shape == (1, 2 + 8, 32)


@pytest.mark.parametrize(("depth", "sites"), [(2, 4), (4, 4), (12, 8), (16, 10), (20, 12)])
def test_sites(depth: int, sites: int) -> None:
    assert len(Denoiser(replace(GIVEN, depth=depth)).sites) == sites


def test_sinusoids() -> None:
    found = sinusoids(torch.tensor([0.0, 1.0, 999.0], dtype=torch.float64), 4)
    wanted = [[math.cos(t), math.cos(t / 100), math.sin(t), math.sin(t / 100)] for t in (0, 1, 999)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("null", ["zeros", "learned"])
@pytest.mark.parametrize("config", [GIVEN, ALL])
def test_dropped_condition_is_the_null_condition(config: DenoiserConfig, null: Any) -> None:
    config = replace(config, null_condition=null)
    denoiser, given_ = build(config), inputs(config)
    mixed = denoiser(**given_)
    kept = denoiser(**{**given_, "keep_B": None})
    free = denoiser(**{**given_, "condition": None, "keep_B": None})  # sigmas then tell nothing
    torch.testing.assert_close(mixed[[0, 2]], kept[[0, 2]])
    torch.testing.assert_close(mixed[1], free[1])
    assert (kept[1] - free[1]).abs().max() > 1e-3
    zero = [torch.zeros_like(one) for one in given_["condition"]]
    sigmas = {"sigma_BK": torch.zeros_like(given_["sigma_BK"])} if config.sigma_told else {}
    same = torch.allclose(denoiser(**{**given_, "condition": zero, "keep_B": None, **sigmas}), free)
    assert same == (null == "zeros")


def test_missing_label_is_the_null_class() -> None:
    config = replace(SMALL, labels=5)
    denoiser, given_ = build(config), inputs(config)
    null = denoiser(**{**given_, "label_B": torch.full((3,), 5)})
    torch.testing.assert_close(denoiser(given_["z_BCHW"], given_["time_B"]), null)
    assert (denoiser(**given_)[0] - null[0]).abs().max() > 1e-3


def test_a_missing_caption_is_the_empty_one() -> None:
    config = replace(SMALL, text=(3, 6))
    denoiser, given_ = build(config), inputs(config)
    denoiser.null_context.copy_(given_["context_BTD"][0])
    empty = denoiser(**{**given_, "context_BTD": None})
    torch.testing.assert_close(empty[0], denoiser(**given_)[0])
    assert (empty[1] - denoiser(**given_)[1]).abs().max() > 1e-3
    assert torch.equal(denoiser.state_dict()["null_context"], given_["context_BTD"][0])


def test_a_denoiser_told_sigma_hears_it() -> None:
    denoiser, given_ = build(ALL), inputs(ALL)
    for k in range(3):
        other = given_["sigma_BK"].clone()
        other[:, k] += 0.5
        changed = (denoiser(**given_) - denoiser(**{**given_, "sigma_BK": other})).abs().amax((1, 2, 3))
        assert changed[0] > 1e-5
        assert changed[1] == 0  # its condition is dropped


def test_activation_checkpointing_changes_no_gradient() -> None:
    config = replace(ALL, labels=2)
    given_, gradients = inputs(config), []
    for checkpointing in (False, True):
        denoiser = build(config)
        denoiser.checkpointing = checkpointing
        denoiser(**given_).square().sum().backward()
        gradients.append([parameter.grad for parameter in denoiser.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["replace", "residual"])
def test_a_condition_path_starts_as_the_identity(mode: Any) -> None:
    torch.manual_seed(0)
    denoiser, twin = Denoiser(replace(GIVEN, condition=mode)), Denoiser(SMALL)
    missing, unexpected = twin.load_state_dict(denoiser.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith("sites.") for name in unexpected)
    given_ = as_float32(inputs(GIVEN))
    torch.testing.assert_close(denoiser(**given_), twin(given_["z_BCHW"], given_["time_B"]))
    # but it is not stuck there: within two steps every weight of the path moves
    optimizer = torch.optim.SGD(denoiser.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        denoiser(**given_).square().sum().backward()
        optimizer.step()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_first_weights_are_uvits_but_for_the_way_through() -> None:
    torch.manual_seed(0)
    config = replace(GIVEN, dim=128, labels=3, null_condition="learned")
    for name, weight in Denoiser(config).named_parameters():
        if ".stack." in name or name in ("patch_embed.proj.bias", "label_emb.weight"):
            continue  # torch's own
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        elif weight.numel() > 1000 and not name.startswith(("patch_embed", "decoder_pred", "out_blocks", "sites")):
            assert abs(weight.std() - 0.02) < 0.001, name
            assert abs(weight.mean()) < 0.001, name


@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 4, 6), (1, 1, 64), (8, 8, 8)])
def test_positions_of_sinusoids_are_told_apart_beside_the_patch(shape: tuple[int, int, int]) -> None:
    config = DenoiserConfig(shape=shape, patch=4 if shape[0] == 32 else 1, dim=128, depth=4, heads=4)
    torch.manual_seed(0)
    random = Denoiser(config)
    torch.manual_seed(0)
    denoiser = Denoiser(replace(config, positions="sinusoids"))
    for name, weight in denoiser.named_parameters():  # nothing else changes
        assert name == "pos_embed" or weight.equal(random.get_parameter(name)), name
    position_ND = (denoiser.pos_embed - random.pos_embed)[0].detach()
    assert not position_ND[: denoiser.extras].any()
    position_ND = position_ND[denoiser.extras :]
    if len(position_ND) == 1:
        assert not position_ND.any()
        return
    embed_DP, values = denoiser.patch_embed.proj.weight.flatten(1), shape[2] * config.patch**2
    torch.testing.assert_close(position_ND @ embed_DP, torch.zeros(len(position_ND), values), atol=1e-4, rtol=0)
    torch.testing.assert_close(position_ND.norm(dim=1), torch.full((len(position_ND),), values**0.5))
    # A token is most like itself, and the less like another, the further that is.
    similarity_NN = position_ND @ position_ND.T
    assert similarity_NN.argmax(1).equal(torch.arange(len(position_ND)))
    assert (similarity_NN[0, :3].diff() < 0).all()


def test_positions_have_room_for_no_right_angle_where_a_patch_fills_the_token() -> None:
    full = DenoiserConfig(shape=(8, 8, 8), patch=2, dim=32, depth=2, heads=2, positions="sinusoids")
    position_ND = Denoiser(full).pos_embed[0, 1:]
    torch.testing.assert_close(position_ND.norm(dim=1), torch.full((16,), 32**0.5), atol=0.3, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, labels=3),
        GIVEN,
        replace(GIVEN, condition="residual"),
        replace(SMALL, positions="sinusoids"),
    ],
)
def test_an_untrained_denoiser_returns_what_it_is_given(config: DenoiserConfig) -> None:
    """Most of z_t is the noise asked for: U-ViT's own start has to learn the way through first."""
    torch.manual_seed(0)
    given_ = {**inputs(config, 3), "z_BCHW": torch.randn(3, 3, 8, 4, dtype=torch.float64)}
    found = Denoiser(config).double()(**given_)
    assert (found - given_["z_BCHW"]).norm() / given_["z_BCHW"].norm() < 0.4


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 2, 3), (4, 4, 16)])
def test_an_untrained_denoiser_keeps_amplitudes(shape: tuple[int, int, int]) -> None:
    """Of tokens of few values too: twice the input is nearly twice the output, where a bare LayerNorm would say the same."""
    torch.manual_seed(0)
    denoiser = Denoiser(DenoiserConfig(shape=shape, patch=1, dim=128, depth=4, heads=4))
    z_BCHW, time_B = torch.randn(64, shape[2], *shape[:2]), torch.full((64,), 500.0)
    with torch.no_grad():
        once, twice = denoiser(z_BCHW, time_B), denoiser(2 * z_BCHW, time_B)
    slope = float((once * z_BCHW).sum() / z_BCHW.square().sum())
    assert 0.6 < slope < 1.4
    assert 1.2 < float((twice * once).sum() / once.square().sum()) < 2


def test_bfloat16_autocast_is_near() -> None:
    config = replace(GIVEN, labels=4)
    torch.manual_seed(0)
    denoiser = Denoiser(config)
    given_ = as_float32(inputs(config))
    exact = denoiser(**given_)
    with torch.autocast("cpu", torch.bfloat16):
        near = denoiser(**given_)
    assert (near.float() - exact).norm() / exact.norm() < 0.02


def test_a_patch_of_more_values_than_a_token_is_told() -> None:
    wide = replace(SMALL, shape=(16, 8, 3), patch=4)  # 48 values, width 32
    assert bottleneck_warning(replace(wide, dim=48)) is None
    sentence = bottleneck_warning(wide)
    assert sentence is not None
    assert "4x4x3 has 48 values" in sentence
    # What the sentence says of the loss, 1 - 32 / 48: of white noise, a linear map to the width and back leaves it.
    assert "33% of the noise" in sentence
    embed_DP = torch.linalg.qr(torch.randn(48, 32, dtype=torch.float64))[0].T
    left = torch.eye(48, dtype=torch.float64) - embed_DP.T @ embed_DP
    assert left.square().sum() / 48 == pytest.approx(1 / 3)
