"""The denoiser against a plain U-ViT written from its description, and the rules of the condition path."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from nestgen.condition import stack
from nestgen.denoiser import Denoiser, DenoiserConfig, time_embedding

SMALL = DenoiserConfig(shape=(8, 4, 3), patch=2, dim=32, depth=4, heads=4)
GIVEN = replace(SMALL, condition_shape=(2, 2, 5))


def build(config: DenoiserConfig, seed: int = 0) -> Denoiser:
    """A denoiser whose weights are all random, those that start at zero too."""
    torch.manual_seed(seed)
    denoiser = Denoiser(config).double()
    for weight in denoiser.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return denoiser


def inputs(config: DenoiserConfig, batch: int = 3) -> dict[str, Tensor]:
    """Everything the configuration's forward takes."""
    rng = torch.Generator().manual_seed(1)
    h, w, c = config.shape
    kwargs: dict[str, Tensor] = {
        "z_BCHW": torch.randn(batch, c, h, w, generator=rng, dtype=torch.float64),
        "time_B": torch.rand(batch, generator=rng, dtype=torch.float64) * 1000,
    }
    if config.condition_shape:
        h, w, c = config.condition_shape
        kwargs["condition_BCHW"] = torch.randn(batch, c, h, w, generator=rng, dtype=torch.float64)
        kwargs["keep_B"] = torch.tensor([True, False, True])
    if config.labels:
        kwargs["label_B"] = torch.tensor([0, config.labels, 1])
    return kwargs


def plain_uvit(
    w: dict[str, Tensor],
    config: DenoiserConfig,
    z: Tensor,
    time: Tensor,
    label: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """U-ViT in plain tensor algebra: no nn.Module, attention and unfolding written out, one sample at a time."""
    side, d, heads = config.patch, config.dim, config.heads

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def block(x: Tensor, name: str) -> Tensor:
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").split(d, -1)
        out = []
        for head in range(heads):
            part = slice(head * d // heads, (head + 1) * d // heads)
            scores = q[:, part] @ k[:, part].T / math.sqrt(d // heads)
            out.append(torch.softmax(scores, -1) @ v[:, part])
        x = x + linear(torch.cat(out, -1), f"{name}.attn.proj")
        hidden = gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return x + linear(hidden, f"{name}.mlp.fc2")

    def join(x: Tensor, site: int, c: Tensor | None, extras: int) -> Tensor:
        if c is None:
            return x
        for layer in range(2):
            name = f"sites.{site}.stack.{layer}"
            if f"{name}.weight" in w:
                weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
                module = stack(config.condition_shape, config.grid, d)[layer]
                op = F.conv_transpose2d if isinstance(module, torch.nn.ConvTranspose2d) else F.conv2d
                c = op(c[None], weight, bias, stride=module.stride, padding=module.padding)[0]
        image = x[extras:]
        joined = torch.cat([image, c.reshape(d, -1).T], -1)
        result = linear(gelu(linear(joined, f"sites.{site}.fc1")), f"sites.{site}.fc2")
        return torch.cat([x[:extras], image + result if config.condition == "residual" else result])

    def one(z: Tensor, time: Tensor, label: Tensor | None, c: Tensor | None) -> Tensor:
        rows, columns = config.grid
        kernel = w["patch_embed.proj.weight"].reshape(d, -1)
        patches = [
            z[:, i * side : (i + 1) * side, j * side : (j + 1) * side].reshape(-1)
            for i in range(rows)
            for j in range(columns)
        ]
        image = torch.stack(patches) @ kernel.T + w["patch_embed.proj.bias"]
        angles = time * torch.tensor([10000 ** (-i / (d // 2)) for i in range(d // 2)], dtype=torch.float64)
        tokens = [torch.cat([torch.cos(angles), torch.sin(angles)])[None], image]
        if label is not None:
            tokens.insert(0, w["label_emb.weight"][label][None])
        extras = len(tokens)
        extras = extras - 1
        x = torch.cat(tokens) + w["pos_embed"][0]
        half, site, skips = config.depth // 2, 0, []
        for i in range(half):
            if i % 2 == 0:
                x, site = join(x, site, c, extras), site + 1
            x = block(x, f"in_blocks.{i}")
            skips.append(x)
        x, site = join(x, site, c, extras), site + 1
        x = block(x, "mid_block")
        for i in range(half):
            if i % 2 == 0:
                x, site = join(x, site, c, extras), site + 1
            x = block(linear(torch.cat([x, skips.pop()], -1), f"out_blocks.{i}.skip_linear"), f"out_blocks.{i}")
        x = join(x, site, c, extras)
        x = linear(norm(x, "norm"), "decoder_pred")[extras:]
        picture = torch.zeros(config.shape[2], *config.shape[:2], dtype=torch.float64)
        for n, patch in enumerate(x):
            i, j = divmod(n, columns)
            picture[:, i * side : (i + 1) * side, j * side : (j + 1) * side] = patch.reshape(side, side, -1).permute(
                2, 0, 1
            )
        return F.conv2d(picture[None], w["final_layer.weight"], w["final_layer.bias"], padding=1)[0]

    return torch.stack(
        [
            one(
                z[i],
                time[i],
                None if label is None else label[i],
                None if condition is None else condition[i],
            )
            for i in range(len(z))
        ]
    )


@pytest.mark.parametrize("labels", [0, 7])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, depth=6, heads=2, patch=4),
        replace(GIVEN, condition="replace"),
        replace(GIVEN, condition="residual", depth=6),
        replace(GIVEN, condition_shape=(4, 2, 5)),  # as large as the token grid: up, then down
    ],
)
def test_forward_and_gradients_are_those_of_plain_uvit(config: DenoiserConfig, labels: int) -> None:
    config = replace(config, labels=labels)
    denoiser, given_ = build(config), inputs(config)
    given_.pop("keep_B", None)
    weights = {name: value.detach().clone().requires_grad_() for name, value in denoiser.named_parameters()}
    found = denoiser(**given_)
    wanted = plain_uvit(
        weights, config, given_["z_BCHW"], given_["time_B"], given_.get("label_B"), given_.get("condition_BCHW")
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


def test_time_embedding() -> None:
    found = time_embedding(torch.tensor([0.0, 1.0, 999.0], dtype=torch.float64), 4)
    wanted = [[math.cos(t), math.cos(t / 100), math.sin(t), math.sin(t / 100)] for t in (0, 1, 999)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("null", ["zeros", "learned"])
def test_dropped_condition_is_the_null_condition(null: Any) -> None:
    config = replace(GIVEN, null_condition=null)
    denoiser, given_ = build(config), inputs(config)
    mixed = denoiser(**given_)
    kept = denoiser(**{**given_, "keep_B": None})
    free = denoiser(given_["z_BCHW"], given_["time_B"])
    torch.testing.assert_close(mixed[[0, 2]], kept[[0, 2]])
    torch.testing.assert_close(mixed[1], free[1])
    assert (kept[1] - free[1]).abs().max() > 1e-3
    zero = torch.zeros_like(given_["condition_BCHW"])
    same = torch.allclose(denoiser(given_["z_BCHW"], given_["time_B"], zero), free)
    assert same == (null == "zeros")


def test_missing_label_is_the_null_class() -> None:
    config = replace(SMALL, labels=5)
    denoiser, given_ = build(config), inputs(config)
    null = denoiser(**{**given_, "label_B": torch.full((3,), 5)})
    torch.testing.assert_close(denoiser(given_["z_BCHW"], given_["time_B"]), null)
    assert (denoiser(**given_)[0] - null[0]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["replace", "residual"])
def test_a_condition_path_starts_as_the_identity(mode: Any) -> None:
    torch.manual_seed(0)
    denoiser, twin = Denoiser(replace(GIVEN, condition=mode)), Denoiser(SMALL)
    missing, unexpected = twin.load_state_dict(denoiser.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith("sites.") for name in unexpected)
    given_ = {name: value.float() if value.is_floating_point() else value for name, value in inputs(GIVEN).items()}
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


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, labels=3), GIVEN, replace(GIVEN, condition="residual")])
def test_an_untrained_denoiser_returns_what_it_is_given(config: DenoiserConfig) -> None:
    """Most of z_t is the noise asked for: U-ViT's own start has to learn the way through first."""
    torch.manual_seed(0)
    given_ = {**inputs(config, 3), "z_BCHW": torch.randn(3, 3, 8, 4, dtype=torch.float64)}
    found = Denoiser(config).double()(**given_)
    assert torch.corrcoef(torch.stack([found.flatten(), given_["z_BCHW"].flatten()]))[0, 1] > 0.9


def test_bfloat16_autocast_is_near() -> None:
    config = replace(GIVEN, labels=4)
    torch.manual_seed(0)
    denoiser = Denoiser(config)
    given_ = {name: value.float() if value.is_floating_point() else value for name, value in inputs(config).items()}
    exact = denoiser(**given_)
    with torch.autocast("cpu", torch.bfloat16):
        near = denoiser(**given_)
    assert (near.float() - exact).norm() / exact.norm() < 0.02


# denoiser.md's table: (condition shape, token grid, D) and the parameters of each layer of its stack
TABLE = [
    ((8, 8, 64), (16, 16), 512, [(2, 2, 0)], [131_584]),
    ((6, 6, 56), (4, 4), 512, [(3, 1, 0), (3, 2, 1)], [32_320, 295_424]),
    ((4, 4, 48), (3, 3), 512, [(3, 1, 0), (3, 2, 1)], [27_712, 295_424]),
    ((2, 2, 40), (2, 2), 512, [(4, 2, 1), (3, 2, 1)], [41_024, 295_424]),
    ((6, 6, 32), (16, 16), 768, [(6, 2, 0)], None),
    ((4, 4, 24), (3, 3), 768, [(3, 1, 0), (3, 2, 1)], None),
    ((2, 2, 16), (2, 2), 768, [(4, 2, 1), (3, 2, 1)], None),
    ((6, 6, 32), (16, 16), 1024, [(6, 2, 0)], None),
]


@pytest.mark.parametrize(("shape", "grid", "dim", "layers", "parameters"), TABLE)
def test_stacks_of_the_table(
    shape: tuple[int, int, int],
    grid: tuple[int, int],
    dim: int,
    layers: list[tuple[int, int, int]],
    parameters: list[int] | None,
) -> None:
    found = stack(shape, grid, dim)
    assert [(m.kernel_size[0], m.stride[0], m.padding[0]) for m in found] == layers
    assert [type(m).__name__ for m in found] == ["ConvTranspose2d", "Conv2d"][: len(layers)]
    if parameters:
        assert [sum(p.numel() for p in m.parameters()) for m in found] == parameters


SIDE = st.integers(1, 20)


@given(SIDE, SIDE, SIDE, SIDE, st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_any_pair_of_shapes_has_a_stack(h: int, w: int, rows: int, columns: int, channels: int) -> None:
    layers = stack((h, w, channels), (rows, columns), 2)
    condition = torch.randn(1, channels, h, w, dtype=torch.float64, requires_grad=True)
    tokens = layers.double()(condition)
    assert tokens.shape == (1, 2, rows, columns)
    # every place of the condition is seen, and every token sees some
    (gradient,) = torch.autograd.grad(tokens.sum(), condition, retain_graph=True)
    assert (gradient.abs().sum((0, 1)) > 0).all()
    bias_free = layers(torch.zeros_like(condition))
    assert ((tokens - bias_free).abs().sum((0, 1)) > 0).all()
