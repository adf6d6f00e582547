"""One step: it waits for nothing, skips what is not finite, and its network is one graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.count_step import count_step
from nestgen.denoiser.blocks import LayerNorm
from nestgen.denoiser.config import DenoiserConfig
from nestgen.denoiser.half_weights import HalfWeights
from nestgen.denoiser.uvit import Denoiser
from nestgen.diffusion.process import Process
from nestgen.recipe.sections import TrainingOptions
from nestgen.training.batches import Batch
from nestgen.training.step import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
CONFIG = DenoiserConfig((4, 4, 3), 2, 16, 2, 2, ((2, 2, 3),), labels=3, sigma_told=True)
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")


def trainer(**options: Any) -> Trainer:
    """Of a small denoiser."""
    torch.manual_seed(0)
    chosen = TrainingOptions(warmup=0, lr=1e-3, clip=1.0, ema_snapshots=5, **options)
    accelerator = Accelerator(cpu=True, mixed_precision=chosen.precision)
    return Trainer(accelerator, Denoiser(CONFIG), Process(), chosen)


def batch(seed: int) -> Batch:
    """Noise."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    at = Process().at((torch.arange(4, dtype=torch.float64) + 1) / 5)
    above, told = (normal(4, 3, 2, 2),), torch.full((4, 1), 0.5)
    keep_B, label_B = torch.arange(4) > 0, torch.arange(4)
    return Batch(normal(4, 3, 4, 4), normal(4, 3, 4, 4), at, above, told, keep_B, label_B)


def everything(trained: Trainer) -> dict[str, Tensor]:
    """Weights, averages and the optimisers' state, copied."""
    found = {f"weight/{name}": tensor for name, tensor in trained.weights.items()}
    for length, average in {0: trained.average, **trained.power}.items():
        found |= {f"average {length}/{name}": tensor for name, tensor in average.items()}
    for one in trained.optimizers:
        found |= one.state()
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@pytest.mark.parametrize("muon", [None, pytest.param(1e-3, marks=needs_muon)])
def test_a_step_that_is_not_finite_changes_nothing_of_any_optimiser(muon: float | None) -> None:
    trained, reference = trainer(muon=muon), trainer(muon=muon)
    assert trained.step(batch(1), 0).finite
    before = everything(trained)
    bad = batch(2)
    result = trained.step(replace(bad, z_BCHW=bad.z_BCHW * torch.inf), 1)
    assert not result.finite and not result.gradient_norm.isfinite()
    after = everything(trained)
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    reference.step(batch(1), 0)
    for one in (trained, reference):
        assert one.step(batch(3), 1).finite
    assert all(torch.equal(tensor, everything(reference)[name]) for name, tensor in everything(trained).items())


def test_a_step_does_not_wait_for_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value of a tensor becomes one of Python: on a GPU each would wait for all that was launched before."""
    trained = trainer()
    trained.step(batch(1), 0)

    def waits(*_: object) -> None:
        raise AssertionError("a step has read a tensor's value")

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, name, waits)
    trained.step(batch(2), 1)


def test_the_denoiser_is_one_graph() -> None:
    """torch.compile finds nothing in it that it has to leave to Python."""
    denoiser = Denoiser(replace(CONFIG, side_head=True, qk_norm=True, text=(2, 4)))
    one = batch(1)
    inputs = one.denoiser_inputs() | {"context_BTD": torch.randn(4, 2, 4)}
    explained = torch._dynamo.explain(denoiser)(one.z_BCHW, one.at.time_embedding_input_B, **inputs, all_outputs=True)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    torch._dynamo.reset()


def test_tokens_have_one_precision_and_the_prediction_that_of_the_weights() -> None:
    denoiser, types = Denoiser(CONFIG), []
    for module in (*denoiser.in_blocks, denoiser.mid_block, *denoiser.out_blocks, *denoiser.sites):
        assert isinstance(module, nn.Module)
        module.register_forward_hook(lambda module, inputs, output: types.append((inputs[0].dtype, output.dtype)))
    one = batch(1)
    with torch.autocast("cpu", torch.bfloat16):
        prediction_BCHW = denoiser(one.z_BCHW, one.at.time_embedding_input_B, **one.denoiser_inputs())
    assert set(types) == {(torch.bfloat16, torch.bfloat16)}
    assert prediction_BCHW.dtype == torch.float32


def test_elementwise_work_is_half_of_what_it_was() -> None:
    """Of a bfloat16 step of small as a GPU runs it uncompiled; cde5d26 read and wrote 126.3 GB by 797 kernels."""
    counted = count_step(DenoiserConfig((32, 32, 4), 2, 512, 12, 8, ((8, 8, 64),)), 256)
    assert 1e9 < sum(counted.bytes.values()) <= 126.3e9 / 2
    assert 100 < sum(counted.kernels.values()) <= 797 / 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_half_weights_give_autocasts_own_numbers(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prediction and gradients, bit for bit, in several calls; what has no part in a loss has no gradient."""
    monkeypatch.setattr("nestgen.denoiser.half_weights.AT_ONCE", 7)
    torch.manual_seed(0)
    denoiser = Denoiser(replace(CONFIG, side_head=True, qk_norm=True, text=(2, 4)))
    denoiser.checkpointing = checkpointing
    for weight in denoiser.parameters():
        nn.init.normal_(weight, std=0.1)
    one, found = batch(1), []
    for model in (denoiser, HalfWeights(denoiser)):
        denoiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(one.z_BCHW, one.at.time_embedding_input_B, **one.denoiser_inputs(), all_outputs=True)
        outputs.prediction_BCHW.square().mean().backward()
        gradients = {name: weight.grad for name, weight in denoiser.named_parameters() if weight.grad is not None}
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        assert gradients.keys() == {name for name, _ in denoiser.named_parameters() if not name.startswith("side_")}
        found.append({"prediction": outputs.prediction_BCHW.detach(), **gradients})
    assert [name for name, tensor in found[0].items() if not torch.equal(tensor, found[1][name])] == []


def test_steps_with_half_weights_are_those_of_autocast() -> None:
    """Also in parts, whose gradients are added in float32. On a GPU a step has them, on a CPU they are given to it here."""
    steps = []
    for half in (False, True):
        trained = trainer(precision="bf16")
        trained.micro_batch = 3
        if half:
            trained.model = trained.accelerator.prepare(HalfWeights(trained.denoiser))
        for step in range(2):
            assert trained.step(batch(step), step).finite
        steps.append(everything(trained))
    assert [name for name, tensor in steps[0].items() if not torch.equal(tensor, steps[1][name])] == []


def test_a_norm_keeps_its_inputs_precision_and_sums_in_float32() -> None:
    """Within a rounding of bfloat16 of the norm in float32, far from zero as well; its weights get float32 gradients."""
    norm = LayerNorm(16)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x_BLD = (20 + torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(1))).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y_BLD = norm(x_BLD)
    weight_D = norm.weight.detach().bfloat16().float()
    assert y_BLD.dtype == torch.bfloat16
    torch.testing.assert_close(y_BLD.float(), F.layer_norm(x_BLD.float(), [16], weight_D), rtol=2**-8, atol=1e-6)
    y_BLD.sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.dtype == torch.float32


def test_the_average_of_a_constant_decay() -> None:
    """As U-ViT's: a tenth of the first step at a decay of 0.9, where the default would take nine tenths of it."""
    trained = trainer(ema=0.9, ema_schedule="constant")
    before = {name: weight.detach().clone() for name, weight in trained.weights.items()}
    trained.step(batch(1), 0)
    for name, weight in trained.weights.items():
        torch.testing.assert_close(trained.average[name], 0.9 * before[name] + 0.1 * weight.detach())


def test_first_weights_may_be_uvits() -> None:
    """Truncated normal of 0.02 in every linear layer, also those that the default lets the input through."""
    torch.manual_seed(0)
    denoiser = Denoiser(replace(CONFIG, dim=128, init="uvit"))
    for layer in (denoiser.decoder_pred, denoiser.out_blocks[0].skip_linear):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert layer.weight.abs().max() < 0.1
