"""Every encoder against an independent forward pass in float64, on random weights in the official key layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from featurize.basis.moments import merge_all, moments_of
from featurize.encoders import Encoder, EncoderSpec, encode, load_encoder, onednn
from featurize.encoders.check import check_encoder
from featurize.encoders.onednn import on_onednn
from featurize.errors import UserError
from tests.featurize import reference
from tests.featurize.layouts import described, moco_file, moco_state, vit_state

PICTURES = np.random.default_rng(3).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
SMALL = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 4}
RELATIVE, COSINE = 1e-5, 0.999


def normalised(encoder: Encoder, pictures: np.ndarray) -> Tensor:
    """x_BCHW as published: pixels / 255, minus the mean, over the standard deviation; float64."""
    x_BHWC = torch.from_numpy(pictures).double() / 255
    x_BHWC = (x_BHWC - torch.tensor(encoder.mean, dtype=torch.float64)) / torch.tensor(encoder.std, dtype=torch.float64)
    return x_BHWC.permute(0, 3, 1, 2)


def hold(spec: EncoderSpec, expected: Callable[[Tensor], Tensor], pictures: np.ndarray = PICTURES) -> Encoder:
    """The encoder agrees with the reference in float32, and in bfloat16 token by token."""
    encoder = load_encoder(spec, "cpu")
    with torch.no_grad():
        wanted = expected(normalised(encoder, pictures))
    found = encode(encoder, pictures, "cpu", "float32")
    assert found.shape == (len(pictures), *encoder.grid, encoder.channels)
    assert reference.furthest(found.reshape(wanted.shape), wanted) <= RELATIVE
    halved = encode(encoder, pictures, "cpu", "bfloat16")
    assert reference.least_cosine(halved.reshape(wanted.shape), wanted) >= COSINE
    converted = load_encoder(replace(spec, precision="bfloat16"), "cpu")  # its weights once, not at each batch
    torch.testing.assert_close(encode(converted, pictures, "cpu", "bfloat16"), halved, rtol=0, atol=0)
    return encoder


class Layers(nn.Module):
    """Linear layers as encoders have them: plain, without bias, and within torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(24, 32), nn.Linear(32, 8, bias=False)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = self.first(x_BLD)
        return self.last(self.attention(x_BLD, x_BLD, x_BLD, need_weights=False)[0])


def test_onednn_computes_every_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_intel", lambda: False)
    layers, x_BLD = Layers().eval().requires_grad_(False), torch.randn(3, 5, 24)
    forward = on_onednn(layers)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as seen:
        found = forward(x_BLD)
    calls = {event.key: event.count for event in seen.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] == 4
    assert not {"aten::mm", "aten::addmm"} & calls.keys()
    assert torch.backends.mha.get_fastpath_enabled()
    wanted = layers.double()(x_BLD.double())
    assert reference.furthest(found, wanted) <= RELATIVE


def test_on_intels_processors_torchs_own_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = Layers().eval()
    monkeypatch.setattr(onednn, "is_intel", lambda: True)
    assert on_onednn(layers) is layers


def _refused(*_: object) -> Tensor:
    raise RuntimeError("expected at most 4 arguments")


def _wrong(x: Tensor, *_: object) -> Tensor:
    return x


@pytest.mark.parametrize("operator", [None, _refused, _wrong])
def test_without_the_private_operator_torchs_own_is_taken(operator: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_intel", lambda: False)
    monkeypatch.setattr(onednn, "_linear", operator)
    onednn.has_onednn_linear.cache_clear()
    layers = Layers().eval()
    try:
        assert on_onednn(layers) is layers
    finally:
        onednn.has_onednn_linear.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_computes_the_same_features_and_moments() -> None:
    """But for convolutions, which torch computes in TF32 there: 4e-4 at a ViT-B's worst token."""
    on_cpu, on_gpu = (
        encode(load_encoder(EncoderSpec("tiny"), device), PICTURES, device, "float32") for device in ("cpu", "cuda:0")
    )
    assert on_gpu.is_cuda
    assert reference.furthest(on_gpu.cpu(), on_cpu) <= 1e-3
    tokens_ND = on_gpu.flatten(0, 2)
    merged = merge_all(moments_of(part) for part in tokens_ND.split(7))
    whole = moments_of(tokens_ND.cpu())
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=0, atol=1e-12 * np.abs(whole.scatter).max())
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def moco(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    state = moco_state(64, 2, 4)
    return moco_file(tmp_path_factory.mktemp("moco") / "vit-b-300ep.pth.tar", state, **SMALL), state


def test_mocov3_computes_the_papers_tokens(moco: tuple[Path, dict[str, Tensor]]) -> None:
    path, state = moco
    encoder = hold(EncoderSpec("mocov3", str(path)), lambda x: reference.vit(state, x, 4)[:, 1:])
    assert (encoder.grid, encoder.channels, encoder.input_size) == ((4, 4), 64, 64)
    assert encoder.identity["norm"] == "final LayerNorm"
    assert encoder.identity["prefix_tokens_dropped"] == 1
    assert (encoder.interpolation, str(encoder.official_crop)) == ("bilinear", "Resize(256) CenterCrop(64)")


def test_rcg_is_the_projected_class_token(tmp_path: Path) -> None:
    state = moco_state(64, 2, 4)
    sizes = {**SMALL, "mlp_dim": 32, "projection_dim": 16}
    path = moco_file(tmp_path / "moco.pth.tar", state, **sizes)
    expected = lambda x: reference.moco_head(state, reference.vit(state, x, 4)[:, 0])  # noqa: E731
    encoder = hold(EncoderSpec("rcg", str(path)), expected)
    assert (encoder.grid, encoder.channels) == ((1, 1), 16)


def test_vit_larges_misnamed_keys_are_mended(tmp_path: Path) -> None:
    state = moco_state(32, 15, 2)
    wrong = {
        "blocks.13.norm1": "blocks.13.norm13", "blocks.13.mlp.fc1": "blocks.13.mlp.fc13",
        "blocks.14.norm2": "blocks.14.norm14", "blocks.14.mlp.fc2": "blocks.14.mlp.fc14",
    }  # fmt: skip
    renamed = {}
    for key, value in state.items():
        stem, _, kind = key.rpartition(".")
        renamed[f"{wrong.get(stem, stem)}.{kind}".lstrip(".")] = value
    assert renamed.keys() != state.keys()
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 15, "num_heads": 2}
    path = moco_file(tmp_path / "vitl.pth.tar", renamed, arch="vit_large", **sizes)
    pictures = PICTURES[:, :32, :32]
    hold(EncoderSpec("mocov3:vit_large", str(path)), lambda x: reference.vit(state, x, 2)[:, 1:], pictures)


def _without(prefix: str) -> Callable[[dict[str, Any]], None]:
    def change(checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith(prefix)}

    return change


def _stripped(checkpoint: dict[str, Any]) -> None:
    prefix = "module.base_encoder."
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _linear_probe(checkpoint: dict[str, Any]) -> None:
    _stripped(checkpoint)
    state = {f"module.{k}": v for k, v in checkpoint["state_dict"].items() if not k.startswith("head.")}
    checkpoint["state_dict"] = state | {
        "module.head.weight": torch.zeros(1000, 64),
        "module.head.bias": torch.zeros(1000),
    }


def _position(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], None]:
    def apply(checkpoint: dict[str, Any]) -> None:
        key = "module.base_encoder.pos_embed"
        checkpoint["state_dict"][key] = change(checkpoint["state_dict"][key])

    return apply


def _columns_first(table_1ND: Tensor) -> Tensor:
    """What a meshgrid of the other convention makes of it."""
    patches = table_1ND[:, 1:].unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    return torch.cat([table_1ND[:, :1], patches], dim=1)


def _one_more(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["module.base_encoder.fc_norm.weight"] = torch.ones(64)


def _nan(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["module.base_encoder.norm.weight"][3] = float("nan")


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (_without("module.base_encoder."), "hold the momentum encoder only"),
        (_stripped, "no key begins with module.base_encoder"),
        (_linear_probe, "of a linear probe"),
        (_without("module.base_encoder.norm."), "2 keys are missing (first 'norm.bias')"),
        (_without("module.base_encoder.blocks.1.attn"), "4 keys are missing"),
        (_without("module.base_encoder.pos_embed"), "'pos_embed'"),
        (_one_more, "1 unexpected (first 'fc_norm.weight')"),
        (_position(_columns_first), "rows before columns"),
        (_position(torch.zeros_like), "not MoCo-v3's fixed sine-cosine"),
        (_position(lambda table: table[:, :10]), "position embedding"),
        (_nan, "NaN"),
        (lambda checkpoint: checkpoint.update(arch="vit_small"), "of MoCo-v3's vit_small"),
    ],
)
def test_a_wrong_mocov3_file_is_one_sentence(
    moco: tuple[Path, dict[str, Tensor]], tmp_path: Path, mistake: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    checkpoint = torch.load(moco[0], weights_only=True)
    mistake(checkpoint)
    torch.save(checkpoint, tmp_path / "wrong.pth.tar")
    with pytest.raises(UserError) as raised:
        load_encoder(EncoderSpec("mocov3", str(described(tmp_path / "wrong.pth.tar", **SMALL))), "cpu")
    assert sentence in str(raised.value)


def test_rcg_needs_the_head_and_its_norms(tmp_path: Path) -> None:
    sizes = {**SMALL, "mlp_dim": 32, "projection_dim": 16}
    state = {key: value for key, value in moco_state(64, 2, 4).items() if not key.startswith("head.7")}
    path = moco_file(tmp_path / "moco.pth.tar", state, **sizes)
    with pytest.raises(UserError, match=r"3 keys are missing \(first '7.num_batches_tracked'\)"):
        load_encoder(EncoderSpec("rcg", str(path)), "cpu")


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "args": Path("x")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="refused"):
        load_encoder(EncoderSpec("mocov3", str(tmp_path / "evil.pth")), "cpu")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="hold a list instead of named tensors"):
        load_encoder(EncoderSpec("mocov3", str(tmp_path / "list.pth")), "cpu")


@pytest.mark.parametrize(("variant", "patch"), [("", 16), ("vits8", 8)])
def test_dino_computes_the_papers_tokens(tmp_path: Path, variant: str, patch: int) -> None:
    state = vit_state(64, 2, patch, 64 // patch)
    torch.save(state, tmp_path / "dino.pth")
    described(tmp_path / "dino.pth", **SMALL)
    name = f"dino:{variant}" if variant else "dino"
    encoder = hold(EncoderSpec(name, str(tmp_path / "dino.pth")), lambda x: reference.vit(state, x, 4)[:, 1:])
    assert encoder.grid == (64 // patch, 64 // patch)
    assert str(encoder.official_crop) == "Resize(256) CenterCrop(64)"


def test_dinov2_drops_its_registers_and_resamples_its_places(tmp_path: Path) -> None:
    state = vit_state(64, 2, 14, 7, registers=4)
    torch.save(state, tmp_path / "dinov2.pth")
    described(tmp_path / "dinov2.pth", **(SMALL | {"img_size": 56}))
    encoder = hold(
        EncoderSpec("dino:dinov2_vitb14_reg", str(tmp_path / "dinov2.pth")),
        lambda x: reference.vit(state, x, 4)[:, 5:],
        PICTURES[:, :56, :56],
    )
    assert encoder.grid == (4, 4)
    assert encoder.identity["register_tokens_dropped"] == 4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: {"student": s, "epoch": 3}, "hold DINO's student alone"),
        (lambda s: {f"head.{k}": v for k, v in s.items()}, "keys begin with 'head.'"),
        (lambda s: {"module.linear.weight": torch.ones(2, 2)}, "not the backbone alone"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("norm.")}, "2 keys are missing"),
        (lambda s: s | {"pos_embed": s["pos_embed"][:, :5]}, "'pos_embed' is (1, 5, 64)"),
        (lambda s: s | {"register_tokens": torch.ones(1, 4, 64)}, "unexpected (first 'register_tokens')"),
    ],
)
def test_a_wrong_dino_file_is_one_sentence(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Any]], sentence: str
) -> None:
    torch.save(change(vit_state(64, 2, 16, 4)), tmp_path / "wrong.pth")
    with pytest.raises(UserError) as raised:
        load_encoder(EncoderSpec("dino", str(described(tmp_path / "wrong.pth", **SMALL))), "cpu")
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("model", "arguments", "grid", "norm"),
    [
        ("resnet10t", {}, (3, 3), "none"),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, (3, 3), "none"),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": [1, 1], "embed_dim": 24, "num_heads": [2, 2],
                                          "window_size": 4}, (8, 8), "final LayerNorm"),
        ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 2}, (4, 4),
         "final LayerNorm"),
    ],
)  # fmt: skip
def test_any_timm_backbone_gives_its_map(
    tmp_path: Path, model: str, arguments: dict[str, Any], grid: tuple[int, int], norm: str
) -> None:
    import timm

    torch.manual_seed(0)
    own = timm.create_model(model, num_classes=5, **arguments).eval()
    save_file(own.state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "w.json").write_text(json.dumps({"model": model, "model_args": arguments, "input_size": 96}))
    encoder = load_encoder(EncoderSpec(f"timm:{model}", str(tmp_path / "w.safetensors")), "cpu")
    pictures = np.resize(PICTURES, (2, encoder.input_size, encoder.input_size, 3))
    found = encode(encoder, pictures, "cpu", "float32")
    assert encoder.grid == grid
    assert encoder.identity["norm"] == norm
    with torch.no_grad():
        own_map = own.forward_features(normalised(encoder, pictures).float())
    if own_map.ndim == 3:
        own_map = own_map[:, own.num_prefix_tokens :].unflatten(1, grid)
    elif model.startswith(("resnet", "convnext")):
        own_map = own_map.permute(0, 2, 3, 1)
    torch.testing.assert_close(found, own_map)


def test_arguments_and_names_are_checked(moco: tuple[Path, dict[str, Tensor]]) -> None:
    path = str(moco[0])
    for spec, sentence in [
        (
            EncoderSpec("mocov3:vit_huge", path),
            "There is no encoder 'mocov3:vit_huge'; known are tiny, mocov3, mocov3:vit_sm",
        ),
        (EncoderSpec("timm", path), "There is no encoder 'timm'"),
        (EncoderSpec("mocov3", path, '{"dept": 3}'), "has no argument 'dept'"),
        (EncoderSpec("mocov3", path, '{"num_heads": 5}'), "can't be built"),
        (EncoderSpec("mocov3", path, '{"depth": 3}'), "keys are missing"),
        (EncoderSpec("mocov3:vit_large"), "no address is known for them: --weights FILE"),
    ]:
        with pytest.raises(UserError) as raised:
            load_encoder(spec, "cpu")
        assert sentence in str(raised.value)


def test_pixels_are_the_patches_themselves() -> None:
    pictures = PICTURES[:, :16, :16]
    spec = EncoderSpec("pixels", None, '{"img_size": 16, "patch_size": 4}')
    encoder = load_encoder(spec, "cpu")
    f_BHWD = encode(encoder, pictures, "cpu", "float32")
    assert f_BHWD.shape == (len(pictures), *encoder.grid, encoder.channels) == (len(pictures), 4, 4, 48)
    patch = torch.from_numpy(pictures[1, 4:8, 8:12].astype(np.float32)) / 127.5 - 1
    assert torch.allclose(f_BHWD[1, 1, 2].sort().values, patch.flatten().sort().values, atol=1e-6)
    for bad, says in [
        (EncoderSpec("pixels", "w.pt"), "has no weights"),
        (EncoderSpec("pixels", None, '{"patch_size": 7}'), "can't cut 64 pixels into patches of 7"),
    ]:
        with pytest.raises(UserError, match=says):
            load_encoder(bad, "cpu")
    assert all(finding.passed is not False for finding in check_encoder(EncoderSpec("pixels"), "cpu"))
