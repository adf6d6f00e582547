"""Recipes are read strictly: what is wrong is named by its path, with the nearest right key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nestgen.errors import UserError
from nestgen.recipe.level_sampling import level_sampling
from nestgen.recipe.locations import run_dir, store_path
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.recipe.sections import Section

BASE: dict[str, Any] = {
    "features": {"out": "stores/x", "source": "scenes", "views": 2, "encoder": "timm:vit/tiny"},
    "levels": [
        {"shape": "32x32x3", "patch": 4},
        {"shape": "4x4x16", "sigma": 0.5},
        {"shape": "2x2x8", "sigma": 1},
    ],
}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    """Reads BASE with top-level keys replaced, or a literal text."""

    def read(text: str | None = None, **changes: Any) -> Recipe:
        path = tmp_path / "demo.yaml"
        path.write_text(yaml.safe_dump({**BASE, **changes}) if text is None else text)
        return load_recipe(path)

    return read


def test_shift_auto_is_the_root_of_the_values_over_4096(load: Callable[..., Recipe]) -> None:
    levels = [{"shape": "32x32x3", "shift": "auto"}, {"shape": "8x8x64", "shift": "auto"}, {"shape": "2x2x16"}]
    assert [level.shift for level in load(levels=levels).levels] == [pytest.approx((3072 / 4096) ** 0.5), 1.0, 1.0]


def test_defaults_are_those_of_the_docs(load: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = load()
    assert recipe.name == "demo"  # the file's stem
    assert recipe.root == tmp_path
    assert [level.patch for level in recipe.levels] == [4, 2, 1]
    assert [level.shape for level in recipe.levels] == [(32, 32, 3), (4, 4, 16), (2, 2, 8)]
    assert (recipe.features.encoder, recipe.features.z0) == ("timm:vit/tiny", "pixels:32")
    documented = (Path(__file__).parents[3] / "docs" / "recipe.md").read_text().split("| key | default |")[1]
    rows = [line.split("|")[1:3] for line in documented.splitlines() if line.startswith("| ")]
    section = ""
    checked = 0
    for keys, defaults in ((cell.strip().replace("`", "") for cell in row) for row in rows):
        if keys.startswith("**"):
            section = keys.strip("*")
        elif section in ("denoiser", "process", "training", "sampling", "evaluation"):
            names = keys.split(", ")
            values = yaml.safe_load(f"[{defaults}]")
            for name, value in zip(names, values, strict=True):
                found = getattr(getattr(recipe, section), name)
                if isinstance(found, tuple):  # of one: the same for every level
                    found = found[0] if len(found) == 1 else list(found)
                # safe_load follows YAML 1.1: `no` is False, 2e-4 a string
                assert str(found) in (str(value), "no") or float(value) == found, (section, name)
                checked += 1
    assert checked >= 24


def test_paths(load: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = load(name="run-1")
    assert store_path(recipe, 0) == tmp_path / "stores/x/pixels/32x32x3.zarr"
    assert store_path(recipe, 1) == tmp_path / "stores/x/timm-vit-tiny/4x4x16.zarr"
    assert store_path(recipe, 2, Path("/other")) == Path("/other/timm-vit-tiny/2x2x8.zarr")
    assert run_dir(recipe, 0) == tmp_path / "runs/run-1/z0-given-z1-sigma0.5"
    assert run_dir(recipe, 2) == tmp_path / "runs/run-1/z2-top"
    assert run_dir(recipe.depth(1), 0) == tmp_path / "runs/run-1/z0-top"
    told = {"condition_on": "all", "sigma_told": True}
    levels = [BASE["levels"][0], {"shape": "4x4x16", "sigma": [0, 1.5]}, {"shape": "2x2x8", "sigma": 1}]
    both = load(name="run-1", denoiser=told, levels=levels)
    assert run_dir(both, 0).name == "z0-given-z1-sigma0to1.5-z2-sigma1"


def test_depth_cuts_levels_and_what_is_listed_for_each(load: Callable[..., Recipe]) -> None:
    recipe = load(sampling={"guidance": [1, 2.5, 3], "steps": 20, "guidance_interval": [0.1, 0.8]})
    assert [recipe.sampling.of("guidance", level) for level in range(3)] == [1, 2.5, 3]
    cut = recipe.depth(2)
    assert [level.shape for level in cut.levels] == [level.shape for level in recipe.levels[:2]]
    assert (cut.sampling.guidance, cut.root) == ((1.0, 2.5), recipe.root)
    for level in range(2):
        assert (cut.sampling.of("steps", level), cut.sampling.of("guidance_interval", level)) == (20, (0.1, 0.8))
    listed = load(sampling={"guidance_interval": [None, [0, 0.5], [0.2, 1]], "sampler": ["heun", None, "ddim"]})
    assert [listed.sampling.of("guidance_interval", level) for level in range(3)] == [None, (0, 0.5), (0.2, 1)]
    assert listed.depth(1).sampling.sampler == ("heun",)
    one = load(sampling={"sigma": 0.3}).depth(1)  # of the levels above z_0; there is none
    assert one.with_sampling({"steps": 5}).with_training({}).sampling.steps == (5,)


def test_the_default_sampler_is_u_vits_of_the_process(load: Callable[..., Recipe]) -> None:
    for kind, sampler in (("discrete", "dpm++-single"), ("vp", "dpm-single"), ("flow", "heun")):
        assert level_sampling(load(process={"kind": kind}), 0).sampler == sampler
    kept = load(process={"kind": "vp"}, sampling={"sampler": "dpm++-single"})
    assert level_sampling(kept, 0).sampler == "dpm++-single"
    with pytest.raises(UserError, match="is dpm-single, which a flow does not have"):
        level_sampling(load(process={"kind": "flow"}, sampling={"sampler": "dpm-single"}), 0)


def test_other_sigmas(load: Callable[..., Recipe]) -> None:
    recipe = load().with_sigmas([1.5, 0])
    assert [level.sigma for level in recipe.levels] == [0, 1.5, 0]
    assert [level.sigma for level in load().depth(2).with_sigmas([1.5]).levels] == [0, 1.5]
    with pytest.raises(UserError, match=r"--sigma lists 1 values for the 2 levels above z_0"):
        load().with_sigmas([1.5])
    for bad in (-1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"each is a standard deviation"):
            load().with_sigmas([bad, 0])


def test_the_workflow_s_section_may_stand_in_a_recipe(load: Callable[..., Recipe]) -> None:
    assert load(grid={"depths": [1, 2]}).depth(1).name == "demo"
    with pytest.raises(UserError, match="grid"):
        load(grid=[1, 2])


def test_sampling_changes_are_validated_like_the_file(load: Callable[..., Recipe]) -> None:
    recipe = load(sampling={"guidance": 0.4, "steps": 20})
    changed = recipe.with_sampling({"steps": [1, 2, 3]})
    assert (changed.sampling.steps, changed.sampling.guidance, changed.file) == ((1, 2, 3), (0.4,), recipe.file)
    with pytest.raises(UserError, match=r"sampling\.steps lists 2 values for 3 levels"):
        recipe.with_sampling({"steps": [1, 2]})


def test_numbers_and_words_are_read_as_written(load: Callable[..., Recipe]) -> None:
    text = yaml.safe_dump(BASE) + "training: {lr: 2e-4, precision: no, ema: .5, clip: 1}\nseed: 12\n"
    training = load(text).training
    assert (training.lr, training.precision, training.ema, training.clip) == (2e-4, "no", 0.5, 1.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"training": {"stpes": 5}}, "training.stpes is not a key; did you mean training.steps?"),
        ({"trainig": {}}, "trainig is not a key; did you mean training?"),
        ({"sampling": {"lr": 1}}, "sampling.lr is not a key; did you mean training.lr?"),
        ({"training": {"seed": 1}}, "training.seed is not a key; did you mean seed?"),
        ({"process": {"zzz": 1}}, "process.zzz is not a key; the keys here are kind, prediction, weighting"),
        ({"levels": [{"shpe": "32x32x3"}]}, "levels[0].shpe is not a key; did you mean levels[0].shape?"),
        ({"training": {"steps": "many"}}, "training.steps should be a valid integer, found 'many'"),
        ({"training": {"steps": 1.5}}, "training.steps should be a valid integer, found 1.5"),
        ({"training": {"steps": True}}, "training.steps should be a valid integer, found True"),
        ({"training": {"steps": 0}}, "training.steps should be greater than 0, found 0"),
        ({"training": {"preview": 1}}, "training.preview should be 0, for no previews, or 2 samples or more"),
        ({"training": {"lr": "fast"}}, "training.lr should be a valid number, found 'fast'"),
        ({"training": {"lr": float("nan")}}, "training.lr should be a finite number, found nan"),
        ({"training": {"betas": [0.9, 1.0]}}, "training.betas[1] should be less than 1, found 1.0"),
        (
            {"training": {"precision": "fp8"}},
            "training.precision should be 'no', 'bf16', 'fp16' or 'auto', found 'fp8'",
        ),
        ({"training": None}, "training should be a section of keys, found None"),
        ({"features": {}}, "features.out is missing"),
        ({"features": {"out": "x", "z0": "jpeg:3"}}, "features.z0"),
        ({"levels": []}, "levels"),
        ({"levels": [{"shape": "32x32"}]}, "levels[0].shape should be height x width x channels"),
        ({"levels": [{"shape": "16x16x3"}]}, "levels[0].shape is 16x16x3, but z_0 of features.z0 'pixels:32'"),
        ({"levels": [{"shape": "32x32x3", "patch": 5}]}, "levels[0] has patch 5, which does not divide its 32x32"),
        ({"levels": [{"shape": "32x32x3"}, {"shape": "7x7x4"}]}, "levels[1] has patch 2, which does not divide"),
        ({"levels": [{"shape": "32x32x3", "sigma": 1}]}, "levels[0].sigma: z_0 conditions nothing"),
        ({"levels": [{"shape": "32x32x3", "sigma": -1}]}, "levels[0].sigma should be greater than or equal to 0"),
        ({"sampling": {"guidance": [1, 2]}}, "sampling.guidance lists 2 values for 3 levels"),
        ({"sampling": {"steps": [3, 0, 1]}}, "sampling.steps[1] should be greater than 0, found 0"),
        ({"sampling": {"sampler": "eluer"}}, "sampling.sampler should be 'dpm-single', 'dpm++-single', 'dpm++-multi'"),
        ({"sampling": {"guidance_interval": [0.8, 0.1]}}, "sampling.guidance_interval[0] should be two times within"),
        ({"sampling": {"sigma": [1, 0, 0]}}, "sampling.sigma[0]: z_0 conditions nothing, so it has no sigma"),
        ({"sampling": {"autoguide": {"scale": 1}}}, "sampling.autoguide names no denoiser; give run"),
        (
            {"sampling": {"autoguide": {"scal": 1}}},
            "sampling.autoguide.scal is not a key; did you mean sampling.autoguide.scale?",
        ),
        (
            {"levels": [{"shape": "32x32x3"}, {"shape": "4x4x2", "sigma": "x"}]},
            "levels[1].sigma should be a valid number",
        ),
        (
            {"levels": [{"shape": "32x32x3"}, {"shape": "4x4x2", "sigma": [1, 0]}]},
            "levels[1] has sigma [1.0, 0.0]: a range",
        ),
        ({"levels": [{"shape": "32x32x3"}, {"shape": "4x4x2", "sigma": [0, 1]}]}, "set denoiser.sigma_told: true"),
        ({"levels": [{"shape": "32x32x3", "shift": 0}]}, "levels[0].shift should be greater than 0, found 0"),
        ({"training": {"muon": 1e-3, "shard": True}}, "training has muon, which takes whole matrices"),
        ({"process": {"logit_normal": [0, 0]}}, "process.logit_normal[1] should be greater than 0, found 0"),
        (
            {"sampling": {"internal_guidance": {"scal": 1.5}}},
            "sampling.internal_guidance.scal is not a key; did you mean sampling.internal_guidance.scale?",
        ),
        (
            {"training": {"align": {"weigth": 1}}},
            "training.align.weigth is not a key; did you mean training.align.weight?",
        ),
        ({"denoiser": {"text": "77"}}, "denoiser.text should be tokens x width of the text store, such as 77x768"),
        (
            {"process": {"kind": "flow", "prediction": "eps"}},
            "process has prediction eps, which at the start of flow's",
        ),
        ({"process": {"kind": "ddpm"}}, "process.kind should be 'discrete', 'vp' or 'flow', found 'ddpm'"),
        ({"sampling": {"guidance": "high"}}, "sampling.guidance should be a valid number, found 'high'"),
        ({"name": "../x"}, "name"),
    ],
)
def test_what_is_wrong_is_named(load: Callable[..., Recipe], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load(**changes)
    assert sentence in str(caught.value)
    assert "demo.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


KEYS = [
    (section, key)
    for section, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section) and section != "features"
    for key in field.annotation.model_fields
]


# Each line is ten times the one before: 10^8 values.
BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefg", "bcdefgh")
)


@given(st.sampled_from(KEYS), st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_slip_is_an_error_that_names_the_key(
    load: Callable[..., Recipe], where: tuple[str, str], data: st.DataObject
) -> None:
    section, key = where
    assume(len(key) > 3)
    at = data.draw(st.integers(0, len(key) - 2))
    slip = key[:at] + key[at + 1] + key[at] + key[at + 2 :]
    assume((section, slip) not in KEYS)
    with pytest.raises(UserError) as caught:
        load(**{section: {slip: 1}})
    assert f"{section}.{slip} is not a key; did you mean {section}.{key}?" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: a\nname: b\n", "line 2 is not valid YAML: the key 'name' is given twice"),
        ("levels:\n  - {shape: 1x1x1, shape: 2x2x2}\n", "line 2 is not valid YAML: the key 'shape' is given twice"),
        ("a: b: c\n", "line 1 is not valid YAML"),
        ("a: [1\nb: 2\n", "line 2 is not valid YAML"),
        ("- 1\n", "is not a recipe"),
        ("", "is not a recipe"),
        ("a: !!python/object/apply:os.getcwd []\n", "line 1 is not valid YAML"),
        ("\x00", "is not valid YAML"),
        ("[" * 60 + "]" * 60, "line 1 is not valid YAML: it has more than 50 levels"),
        ("[" * 2000, "is not valid YAML: it has more than 50 levels"),
        ("name: &a [*a]\n", "line 1 is not valid YAML: it has more than 50 levels"),
        (BOMB, "line 1 is not valid YAML: it has more than 100,000 values"),
        (f"{BOMB}name: *h\nname: *h\n", "is not valid YAML: it has more than 100,000 values"),
    ],
)
def test_broken_yaml_is_one_sentence(load: Callable[..., Recipe], text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load(text)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there is no recipe nested\.yaml; name one with --recipe FILE"):
        load_recipe()
    with pytest.raises(UserError, match=r"there is no recipe other\.yaml; check the path"):
        load_recipe(Path("other.yaml"))


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "nested.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(tmp_path / "nested.yaml")


def test_the_recipe_of_the_docs_is_valid(tmp_path: Path) -> None:
    docs = (Path(__file__).parents[3] / "docs" / "recipe.md").read_text()
    (tmp_path / "nested.yaml").write_text(docs.split("```yaml\n")[1].split("```")[0])
    recipe = load_recipe(tmp_path / "nested.yaml")
    assert (recipe.name, recipe.training.steps, recipe.denoiser.size) == ("demo", 1500, "nano")


def test_accumulate_of_earlier_recipes_is_a_micro_batch(load: Callable[..., Recipe]) -> None:
    for training, most in (
        ({"accumulate": 4}, 64),
        ({"batch": 10, "accumulate": 4}, 3),
        ({"accumulate": 1}, None),
        ({"micro_batch": 8}, 8),
    ):
        recipe = load(training=training)
        assert [recipe.training.micro_batch_of(level) for level in range(3)] == [most] * 3
        assert recipe.with_training({"steps": 3}).training.micro_batch == (most,)
    recipe = load(training={"micro_batch": [4, None, 2]})
    assert [recipe.depth(2).training.micro_batch_of(level) for level in range(2)] == [4, None]
    for training, says in (
        ({"accumulate": 0}, r"training\.accumulate is not a key"),
        ({"micro_batch": [4, 2]}, r"training\.micro_batch lists 2 values for 3 levels"),
    ):
        with pytest.raises(UserError, match=says):
            load(training=training)
