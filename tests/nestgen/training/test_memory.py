"""Every recipe trains on one GPU of 80 GB, counted on tensors without data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nestgen.denoiser import blocks
from nestgen.denoiser.config import DenoiserConfig, denoiser_config
from nestgen.denoiser.memory import check_batch, is_out_of_memory, most_samples, sampling_memory
from nestgen.denoiser.uvit import Denoiser
from nestgen.errors import UserError
from nestgen.recipe.recipe import load_recipe

FOLDER = Path(__file__).parents[3] / "pipelines/recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
OF_THE_PAPER = [file for file in RECIPES if file.name.startswith(("coco", "imagenet"))]
GPU = 80e9
ROOM = 0.8  # of it for what is counted here; the rest for gradients of activations, kernels and fragments
STATE = 4 * (1 + 1 + 2 + 1)  # bytes of a weight with its average, AdamW's moments and its gradient, in float32


def saved_bytes(config: DenoiserConfig, batch: int) -> int:
    """Bytes that a forward pass in bfloat16 on a GPU keeps for the backward pass, without the weights themselves."""
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    h, w, c = config.shape
    with FakeTensorMode():
        with torch.device("cuda"):
            denoiser = Denoiser(config)
            conditions = [torch.empty(batch, c, h, w) for h, w, c in config.condition_shapes]
            arguments = {
                "condition": conditions or None,
                "keep_B": torch.empty(batch, dtype=torch.bool) if conditions else None,
                "label_B": torch.empty(batch, dtype=torch.int64) if config.labels else None,
                "context_BTD": torch.empty(batch, *config.text) if config.text else None,
            }
            z_BCHW, time_B = torch.empty(batch, c, h, w), torch.empty(batch)
        torch.set_autocast_enabled("cuda", True)  # torch.autocast wants a GPU to be there
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                denoiser(z_BCHW, time_B, **arguments)
        finally:
            torch.set_autocast_enabled("cuda", False)
        for weight in denoiser.parameters():
            saved.pop(weight.untyped_storage()._cdata, None)
        return sum(storage.nbytes() for storage in saved.values())


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention, as a GPU has it, and weights that nobody fills."""

    def attention(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor) -> Tensor:
        q_BHLK, k_BHLK = q_BHLK.to(v_BHLK.dtype), k_BHLK.to(v_BHLK.dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention(q_BHLK, k_BHLK, v_BHLK)[0]

    monkeypatch.setattr(blocks, "_attention", attention)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_step_fits_into_80_gb(file: Path) -> None:
    recipe = load_recipe(file)
    for level in range(len(recipe.levels)):
        config = denoiser_config(recipe, level)
        with torch.device("meta"):
            weights = sum(weight.numel() for weight in Denoiser(config).parameters())
        batch = min(recipe.training.batch, recipe.training.micro_batch_of(level) or recipe.training.batch)
        assert saved_bytes(config, batch) + STATE * weights < ROOM * GPU, f"z_{level}"


def test_the_count_is_that_of_a_layer() -> None:
    """Of one more block: what each of its layers keeps, in bytes a value."""
    config = DenoiserConfig(shape=(8, 8, 4), patch=2, dim=64, depth=2, heads=2)
    deeper = DenoiserConfig(shape=(8, 8, 4), patch=2, dim=64, depth=4, heads=2)
    batch, tokens, dim = 1000, 17, 64
    values = batch * tokens * dim
    more = saved_bytes(deeper, batch) - saved_bytes(config, batch)
    # float32 residual at both norms: 2 x 4; bfloat16: norms' outputs 2, q k v 3, attention 1, its copy 1, MLP 4 + 4
    assert more / values == pytest.approx(2 * (8 + 2 * 15), rel=0.25)


@pytest.mark.parametrize("recipe", OF_THE_PAPER[::5], ids=lambda file: file.stem)
def test_what_is_refused_would_not_have_fitted(recipe: Path) -> None:
    """The bound that refuses a batch lies below what its forward pass keeps, and not far below."""
    config = denoiser_config(load_recipe(recipe), 0)
    counted = saved_bytes(config, 8)
    most = most_samples(config, counted, training=True)
    assert 8 <= most <= 48


def test_a_batch_that_cannot_fit_is_one_sentence() -> None:
    config = denoiser_config(load_recipe(RECIPES[0]), 0)
    cpu = torch.device("cpu")
    check_batch(config, 1, cpu, "--batch-size", training=False)
    with pytest.raises(
        UserError, match=r"^1,000,000,000 samples in one pass do not fit .* GB, .* set --batch-size to less"
    ):
        check_batch(config, 10**9, cpu, "--batch-size", training=False)
    with pytest.raises(RuntimeError) as full:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(full.value) and not is_out_of_memory(RuntimeError("shapes differ"))
    sentence = r"^64 image\(s\) at a time do not fit .* machine; give --batch-size 32 or fewer"
    with pytest.raises(UserError, match=sentence), sampling_memory(64, cpu):
        raise full.value
    with pytest.raises(RuntimeError, match="shapes differ"), sampling_memory(64, cpu):
        raise RuntimeError("shapes differ")
