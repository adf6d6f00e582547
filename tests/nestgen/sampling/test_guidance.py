"""What the denoisers get on the way down: conditions and their noise, labels, guidance in all its forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nestgen import randomness
from nestgen.denoiser.uvit import Conditioning, Denoiser
from nestgen.errors import UserError
from nestgen.files import read_json
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.runs.checkpoint import newest, save_checkpoint
from nestgen.sampling.conditions import ImageConditions
from nestgen.sampling.descent import sample_images
from nestgen.sampling.trained import LevelSampler, load_samplers
from tests.nestgen.samples import levels, sample_folder

Trained = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.fixture
def recipe(trained: Trained) -> Recipe:
    return load_recipe(trained())


def test_noise_belongs_to_the_level_not_to_the_depth(recipe: Recipe, tmp_path: Path) -> None:
    """With denoisers that see nothing, z_0 is a function of its noise: the same at L = 1, 2, 3."""
    z_0 = []
    for depth in (1, 2, 3):
        samplers = load_samplers(recipe.depth(depth), CPU)
        for sampler in samplers:
            torch.nn.init.zeros_(sampler.trained.denoiser.final_layer.weight)
            torch.nn.init.zeros_(sampler.trained.denoiser.final_layer.bias)
        z_0.append(sample_images(samplers, range(4), ImageConditions(0))[0])
    torch.testing.assert_close(z_0[0], z_0[1], rtol=0, atol=0)
    torch.testing.assert_close(z_0[0], z_0[2], rtol=0, atol=0)


def test_frozen_levels_stay_and_decide_what_is_below(recipe: Recipe) -> None:
    samplers = load_samplers(recipe, CPU)
    free = sample_images(samplers, range(3), ImageConditions(0))
    for lowest in (1, 2):
        frozen = {level: free[level] for level in range(lowest, 3)}
        again = sample_images(samplers, range(3), ImageConditions(0), frozen)
        for level in range(3):
            torch.testing.assert_close(again[level], free[level], rtol=0, atol=0)
    frozen = {1: free[1].flip(0), 2: free[2]}
    other = sample_images(samplers, range(3), ImageConditions(0), frozen)
    assert other[1] is frozen[1]
    assert (other[0] - free[0]).abs().max() > 0.01  # z_0 is another: it was conditioned on another z_1


class Recorder(torch.nn.Module):
    """A denoiser that records what it is called with, and predicts from it."""

    def __init__(self, sampler: LevelSampler) -> None:
        super().__init__()
        self.config = sampler.config
        self.pos_embed = sampler.trained.denoiser.pos_embed
        self.calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []
        self.prepared: list[dict[str, Any]] = []
        self.denoiser = sampler.trained.denoiser

    def forward(self, *inputs: Tensor, **given: Any) -> Tensor:
        self.calls.append((inputs, given))
        return self.denoiser(*inputs, **given)

    def prepare(self, *inputs: Any) -> Conditioning:
        names = ("batch", "condition", "keep_B", "label_B", "context_BTD", "sigma_BK")
        self.prepared.append(dict(zip(names, inputs, strict=True)))
        return self.denoiser.prepare(*inputs)


def recording(sampler: LevelSampler) -> tuple[LevelSampler, Recorder]:
    recorder = Recorder(sampler)
    trained = replace(sampler.trained, denoiser=recorder)  # type: ignore[arg-type]
    return replace(sampler, trained=trained), recorder


def with_settings(sampler: LevelSampler, **changes: Any) -> LevelSampler:
    return replace(sampler, settings=replace(sampler.settings, **changes))


def eps_of(
    sampler: LevelSampler, z: Tensor, n: float, conditions: tuple[Tensor, ...] = (), label_B: Tensor | None = None
) -> Tensor:
    """The guided noise prediction at time n of the discrete process, 1 to 1000."""
    t = torch.tensor(n / 1000, dtype=torch.float64)
    process = sampler.trained.process
    x = sampler.guided(conditions, label_B)(z, t)
    return (z - float(process.alpha(t)) * x) / float(process.sigma(t))


def test_guidance_is_the_formula_in_one_call(trained: Trained) -> None:
    recipe = load_recipe(trained(classes=4, denoiser={"size": "nano", "labels": 4}))
    sampler, recorder = recording(with_settings(load_samplers(recipe, CPU)[1], guidance=0.7))
    z, above = randomness.normal(0, "z", range(5), (6, 4, 4)), randomness.normal(0, "above", range(5), (4, 2, 2))
    time, label = torch.full((5,), 300.0), torch.tensor([0, 1, 2, 3, 0])
    eps = eps_of(sampler, z, 300.0, (above,), label)
    assert len(recorder.calls) == 1
    conditional = recorder.denoiser(z, time, above, torch.ones(5, dtype=torch.bool), label)
    unconditional = recorder.denoiser(z, time, None, None, torch.full((5,), 4))
    torch.testing.assert_close(eps, 1.7 * conditional - 0.7 * unconditional, rtol=1e-4, atol=1e-5)
    assert (conditional - unconditional).abs().max() > 0.01
    for unguided in (0.0, None):
        eps = eps_of(with_settings(sampler, guidance=unguided), z, 300.0, (above,), label)
        torch.testing.assert_close(eps, conditional, rtol=1e-4, atol=1e-5)
        assert recorder.calls[-1][0][0] is z  # one batch, not two


class Products(TorchDispatchMode):
    """Counts multiplications of matrix products and convolutions, and how often something is looked up in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplications, self.lookups = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("_linear_pointwise", "linear") or "convolution" in name:
            transposed = name == "convolution" and args[6]
            positions = args[0].numel() // args[0].shape[1] if transposed else out.numel() // args[1].shape[0]
            self.multiplications += positions * args[1].numel() if "conv" in name else out.numel() * args[0].shape[-1]
        elif name in ("addmm", "mm", "bmm"):
            self.multiplications += out.numel() * args[-1].shape[-2]
        self.lookups += name == "embedding"
        return out


@pytest.mark.parametrize("guidance", [0.0, 0.7])
def test_nothing_of_the_conditions_is_computed_within_the_loop(trained: Trained, guidance: float) -> None:
    """A further step costs what a denoiser without conditions costs, and at each site the image tokens' products alone."""
    denoiser = {"size": "nano", "labels": 4, "sigma_told": True, "condition_on": "all"}
    recipe = load_recipe(trained(classes=4, denoiser=denoiser))
    recipe = recipe.with_sampling({"guidance": guidance, "sampler": "ddim"})
    sampler, recorder = recording(load_samplers(recipe, CPU)[0])
    above = {1: randomness.normal(0, "1", range(2), (6, 4, 4)), 2: randomness.normal(0, "2", range(2), (4, 2, 2))}

    def count(steps: int) -> Products:
        with Products() as products:
            sample_images([with_settings(sampler, steps=steps)], range(2), ImageConditions(0, 4), above)
        return products

    one, two, three = count(1), count(2), count(3)
    assert three.multiplications - two.multiplications == two.multiplications - one.multiplications
    assert one.lookups == two.lookups == three.lookups == 1
    assert len(recorder.prepared) == 3
    config = replace(sampler.config, condition_shapes=(), sigma_told=False, labels=0)
    plain, images = Denoiser(config).requires_grad_(False), 4 if guidance else 2
    with Products() as products, torch.inference_mode():
        plain(torch.zeros(images, 3, 8, 8), torch.zeros(images))
    label_tokens = 4 * config.dim**2 * 3 * (config.depth + 1) + 2 * config.dim**2 * config.depth // 2
    sites = len(recorder.denoiser.sites) * 4 * 4 * config.dim**2  # 4 tokens: D x 2 D, and 2 D x D
    expected = products.multiplications + images * (label_tokens + sites)
    assert two.multiplications - one.multiplications == expected


@pytest.mark.parametrize(("classes", "top"), [(0, None), (4, 1.0)])
def test_the_top_is_guided_by_its_label_only(trained: Trained, classes: int, top: float | None) -> None:
    recipe = load_recipe(trained(classes=classes, denoiser={"size": "nano", "labels": classes}))
    assert [sampler.settings.guidance for sampler in load_samplers(recipe, CPU)] == [1.0, 1.0, top]


def test_the_condition_is_noised_as_in_training(recipe: Recipe) -> None:
    samplers = load_samplers(recipe, CPU)
    z_1 = randomness.normal(1, "test", range(200), (6, 4, 4))
    sampler, recorder = recording(with_settings(samplers[0], guidance=0.0, steps=1))
    sample_images([sampler], range(200), ImageConditions(0), {1: z_1})
    (condition,) = recorder.prepared[0]["condition"]
    added = condition - z_1
    assert abs(added.std() - 0.5) < 0.01
    for stream in ("sample/z0", "sample/z1"):  # independent of the noise that the levels start from
        level = randomness.normal(0, stream, range(200), (6, 4, 4))
        assert abs(torch.corrcoef(torch.stack([added.flatten(), level.flatten()]))[0, 1]) < 0.03


@given(seed=st.integers(0, 2**31), first=st.integers(0, 10**6))
def test_labels_are_functions_of_seed_and_index(seed: int, first: int) -> None:
    conditions = ImageConditions(seed, classes=5)
    block, one = conditions.labels(range(first, first + 6)), conditions.labels([first + 3])
    assert block is not None
    assert one is not None
    assert block[3] == one[0]
    assert 0 <= int(block.min()) <= int(block.max()) < 5


def test_labels_reach_the_denoisers(trained: Trained, tmp_path: Path) -> None:
    recipe = load_recipe(trained(classes=4, denoiser={"size": "nano", "labels": 4}))
    label_B = ImageConditions(0, classes=4).labels(range(400))
    assert label_B is not None
    assert torch.bincount(label_B).tolist() == pytest.approx([100] * 4, abs=35)
    free, labelled = sample_folder(recipe, tmp_path / "free"), sample_folder(recipe, tmp_path / "labelled", label=2)
    same = (label_B[:7] == 2).numpy()
    assert 0 < same.sum() < 7
    equal = [np.array_equal(one, other) for one, other in zip(levels(free)[2], levels(labelled)[2])]
    assert equal == same.tolist()  # only the images of that class are the same
    with pytest.raises(UserError, match="no label 4: the denoisers have classes 0 to 3"):
        sample_folder(recipe, tmp_path / "bad", label=4)


def test_guidance_holds_within_its_interval_and_decays_downwards(recipe: Recipe) -> None:
    changed = recipe.with_sampling(
        {"guidance": 2.0, "guidance_decay": 0.5, "guidance_interval": [None, [0.2, 0.6], None]}
    )
    samplers = load_samplers(changed, CPU)
    assert [sampler.settings.guidance for sampler in samplers] == [0.5, 1.0, None]
    sampler, recorder = recording(samplers[1])
    z, above = randomness.normal(0, "z", range(2), (6, 4, 4)), randomness.normal(0, "above", range(2), (4, 2, 2))
    for n, batch in ((150.0, 2), (200.0, 4), (600.0, 4), (650.0, 2)):
        eps_of(sampler, z, n, (above,))
        assert len(recorder.calls[-1][0][0]) == batch  # twice the images where it is guided


def test_sigma_at_sampling_is_its_own(recipe: Recipe, tmp_path: Path) -> None:
    changed = recipe.with_sampling({"sigma": [0, 0.25, None]})
    assert [sampler.settings.sigmas for sampler in load_samplers(changed, CPU)] == [(0.25,), (0.5,), ()]
    sample_folder(changed, tmp_path / "s")
    levels_of = read_json(tmp_path / "s" / "sample.json")["levels"]
    assert [level["condition_sigma"] for level in levels_of] == [0.25, 0.5, 0.0]


def test_autoguidance_leads_away_from_a_worse_denoiser(recipe: Recipe, tmp_path: Path) -> None:
    strong = run_dir(recipe, 2)

    def earlier(name: str) -> Path:
        return strong.parent.parent / name / strong.name

    checkpoint = newest(strong)
    assert checkpoint is not None
    tensors = checkpoint.load("ema")
    tensors["final_layer.bias"] += 0.5
    stores, level = checkpoint.meta["stores"], checkpoint.meta["levels"][2]
    for name, meta in (
        ("weak", {"stores": stores | {"features": "f"}}),  # what the network was aligned to is no input
        ("shifted", {"levels": [{}, {}, level | {"shift": 2.0}]}),
        ("elsewhere", {"stores": stores | {"z2": "f"}}),
    ):
        save_checkpoint(earlier(name), {"ema": tensors}, checkpoint.meta | meta, keep=1)
    guided = recipe.with_sampling({"autoguide": [None, None, {"scale": 0.8, "run": "weak"}]})
    top = load_samplers(guided, CPU)[2]
    assert top.weak is not None
    z = randomness.normal(0, "z", range(3), (4, 2, 2))
    eps, plain = eps_of(top, z, 500.0), eps_of(load_samplers(recipe, CPU)[2], z, 500.0)
    torch.testing.assert_close(eps, plain - 0.8 * 0.5, rtol=1e-4, atol=1e-4)  # d + w (d - (d + 0.5))
    sample_folder(guided, tmp_path / "s")
    assert read_json(tmp_path / "s" / "sample.json")["levels"][2]["autoguide"]["scale"] == 0.8
    for autoguide, sentence in (
        ({"scale": 1, "step": 5}, r"has no checkpoint of step 5, .* \(it has 7\)"),
        ({"scale": 1, "step": 7}, "has the weights it should guide"),
        ({"scale": 1, "run": "nowhere"}, r"no trained denoiser in .*nowhere"),
        ({"scale": 1, "run": "shifted"}, "shifted.* cannot guide .*: the two differ in shift"),
        ({"scale": 1, "run": "elsewhere"}, "elsewhere.* cannot guide .*: the two differ in stores"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_samplers(recipe.with_sampling({"autoguide": [None, None, autoguide]}), CPU)


def test_internal_guidance_leads_away_from_the_side_head_in_one_call(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """D_side + w (D - D_side) within its interval, D outside; with guidance by the condition, its terms add up."""
    recipe = load_recipe(trained(training={"side_loss": 0.25}))
    guided = recipe.with_sampling({"internal_guidance": {"scale": 1.7, "interval": [0.3, 1]}})
    sampler, recorder = recording(with_settings(load_samplers(guided, CPU)[0], guidance=0.0))
    z, above = randomness.normal(0, "z", range(3), (3, 8, 8)), randomness.normal(0, "above", range(3), (6, 4, 4))
    for n, w in ((300.0, 1.7), (299.0, 1.0)):
        eps = eps_of(sampler, z, n, (above,))
        assert len(recorder.calls) == 1
        recorder.calls.clear()
        last, side, _ = recorder.denoiser(z, torch.full((3,), n), above, all_outputs=True)
        torch.testing.assert_close(eps, side + w * (last - side), rtol=1e-4, atol=1e-4)
        assert (last - side).abs().max() > 0.01
    both = eps_of(with_settings(sampler, guidance=0.5), z, 300.0, (above,))
    last, side, _ = recorder.denoiser(z, torch.full((3,), 300.0), above, all_outputs=True)
    null = recorder.denoiser(z, torch.full((3,), 300.0))
    torch.testing.assert_close(both, last + 0.5 * (last - null) + 0.7 * (last - side), rtol=1e-4, atol=1e-4)
    sample_folder(guided, tmp_path / "s")
    card = read_json(tmp_path / "s" / "sample.json")["levels"][0]
    assert card["internal_guidance"] == {"scale": 1.7, "interval": [0.3, 1.0]}
    sample_folder(guided, tmp_path / "s")
    assert "sampled again" not in capsys.readouterr().out  # an interval read is the interval written


def test_internal_guidance_needs_a_side_head(recipe: Recipe) -> None:
    """Whatever the recipe says of the training, whose heads `train --set` may have given or taken."""
    says = recipe.with_training({"side_loss": 0.25, "align": {}})
    for changed in (recipe, says):
        with pytest.raises(
            UserError, match=r"has no side head for sampling\.internal_guidance; set training\.side_loss"
        ):
            load_samplers(changed.with_sampling({"internal_guidance": {"scale": 1.5}}), CPU)
    z = [sample_images(load_samplers(one, CPU), range(2), ImageConditions(0))[0] for one in (recipe, says)]
    torch.testing.assert_close(z[0], z[1], rtol=0, atol=0)


def test_all_levels_above_condition_where_the_denoisers_were_trained_so(trained: Trained, tmp_path: Path) -> None:
    options = {"size": "nano", "condition_on": "all", "sigma_told": True}
    recipe = load_recipe(trained(denoiser=options)).with_sampling({"sigma": [0, 0.3, 0.7], "steps": 2})
    samplers = load_samplers(recipe, CPU)
    assert [sampler.settings.sigmas for sampler in samplers] == [(0.3, 0.7), (0.7,), ()]
    sampler, recorder = recording(with_settings(samplers[0], guidance=0.5))
    above = {1: randomness.normal(1, "1", range(50), (6, 4, 4)), 2: randomness.normal(1, "2", range(50), (4, 2, 2))}
    sample_images([sampler], range(50), ImageConditions(0), above)
    (z, _), given = recorder.calls[0][0], recorder.prepared[0]
    assert len(z) == 100
    for level, sigma, noised in zip((1, 2), (0.3, 0.7), given["condition"], strict=True):
        assert abs(float((noised[:50] - above[level]).std()) - sigma) < 0.02
    assert given["sigma_BK"].unique(dim=0).tolist() == [pytest.approx([0.3, 0.7])]
    assert given["keep_B"].tolist() == [True] * 50 + [False] * 50
    sample_folder(recipe, tmp_path / "s", count=2)
    assert read_json(tmp_path / "s" / "sample.json")["levels"][0]["further_sigmas"] == [0.7]
