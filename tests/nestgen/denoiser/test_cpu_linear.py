"""The linear layer through oneDNN: values and gradients against float64, and where it is taken."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from nestgen.denoiser import cpu_linear
from nestgen.denoiser.cpu_linear import Linear, onednn_works

BY_ONEDNN = "mkldnn::_linear_pointwise"
EITHER = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(not onednn_works(), reason="this torch was built without oneDNN")),
]


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN on every processor."""
    monkeypatch.setattr(cpu_linear, "BY_ONEDNN", True)


def calls(layer: nn.Module, x: torch.Tensor) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        layer(x).float().sum().backward()
    return {event.key: event.count for event in seen.key_averages()}


@pytest.mark.parametrize("by_onednn", EITHER)
@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_values_and_gradients_are_float64s(
    by_onednn: bool, leading: list[int], inputs: int, outputs: int, bias: bool
) -> None:
    layer = Linear(inputs, outputs, bias=bias)
    exact = nn.Linear(inputs, outputs, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    x, grad = torch.randn(*leading, inputs, requires_grad=True), torch.randn(*leading, outputs)
    x64 = x.detach().double().requires_grad_()
    with patch.object(cpu_linear, "BY_ONEDNN", by_onednn):
        layer(x).backward(grad)
        torch.testing.assert_close(layer(x).double(), exact(x64), rtol=1e-5, atol=1e-5)
    exact(x64).backward(grad.double())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    for own, other in zip(layer.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(own.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not onednn_works(), reason="this torch was built without oneDNN")
@pytest.mark.usefixtures("onednn")
def test_onednn_computes_float32_and_nothing_is_computed_for_nobody() -> None:
    x = torch.randn(4, 7, 16)
    assert calls(Linear(16, 8), x)[BY_ONEDNN] == 2  # forward and the weight's gradient: x has none
    assert calls(Linear(16, 8), x.requires_grad_())[BY_ONEDNN] == 3
    frozen = Linear(16, 8).requires_grad_(False)
    assert calls(frozen, x)[BY_ONEDNN] == 2


@pytest.mark.usefixtures("onednn")
def test_other_precisions_are_torchs() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    assert BY_ONEDNN not in calls(Linear(16, 8).double(), x.detach().double())
    with torch.autocast("cpu", torch.bfloat16):
        y = Linear(16, 8)(x)
    assert y.dtype == torch.bfloat16
    assert Linear(16, 8, device="meta")(x.to("meta")).shape == (4, 8)


def test_torchs_own_layer_is_taken_where_the_private_operator_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: object) -> torch.Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    for product in (gone, lambda x, weight, bias: x @ weight.T):  # not there; no bias added
        monkeypatch.setattr("nestgen.denoiser.cpu_linear._product", product)
        assert not onednn_works()
    monkeypatch.setattr(cpu_linear, "BY_ONEDNN", False)
    layer, x = Linear(16, 8), torch.randn(4, 16)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(("vendor", "expected"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_intels_processors_are_known(
    vendor: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: é\n")
    monkeypatch.setattr(cpu_linear, "Path", lambda name: tmp_path / Path(name).name)
    assert cpu_linear.is_intel() == expected
