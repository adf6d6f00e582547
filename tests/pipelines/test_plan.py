from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

LEVELS = [{"shape": "8x8x8"}, {"shape": "4x4x16", "sigma": 0.5}, {"shape": "2x2x16", "sigma": 1}, {"shape": "1x1x16"}]


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Any]:
    """Reads a recipe with this grid."""

    def read(grid: object = None, **more: object) -> Any:
        from workflow.plan import read_plan

        file = tmp_path / "small.yaml"
        file.write_text(json.dumps({"features": {"out": "s"}, "levels": LEVELS, "grid": grid, **more}))
        return read_plan(file)

    return read


def names(cells: list[Any]) -> list[str]:
    return [cell.name for cell in cells]


def test_without_a_grid_each_depth_has_the_recipe_s_sigma(plan: Callable[..., Any]) -> None:
    parsed = plan()
    assert (parsed.name, parsed.depths, parsed.seeds) == ("small", (1, 2, 3, 4), (None,))
    assert names(parsed.cells()) == ["L1", "L2", "L3", "L4"]
    assert parsed.denoisers(parsed.cells(3)[0]) == ["z0-given-z1-sigma0.5", "z1-given-z2-sigma1", "z2-top"]
    assert not any(parsed.searched(depth) for depth in parsed.depths)


def test_greedy_tries_sigma_on_the_top_level_and_keeps_what_was_chosen_below(plan: Callable[..., Any]) -> None:
    parsed = plan({"depths": [1, 2, 3], "sigmas": [0, 1.5]})
    assert names(parsed.cells()) == ["L1", "L2-sigma0", "L2-sigma1.5", "L3-sigma0", "L3-sigma1.5"]
    assert [cell.sigmas_from for cell in parsed.cells()] == [None, None, None, 2, 2]
    # D_0 of L = 3 is that of the chosen L = 2, so it is no dependency of its own.
    assert parsed.denoisers(parsed.cells(3)[1]) == ["z1-given-z2-sigma1.5", "z2-top"]
    assert len(parsed.all_denoisers()) == 3 + 2 * 2  # a top for each depth, and each level given the next at each sigma


def test_greedy_starts_from_the_recipe_s_sigma_where_the_depth_below_is_not_run(plan: Callable[..., Any]) -> None:
    parsed = plan({"depths": [1, 3], "sigmas": [0, 1]})
    cell = parsed.cells(3)[0]
    assert (cell.name, cell.sigmas_from) == ("L3-sigma0", None)
    assert parsed.denoisers(cell) == ["z0-given-z1-sigma0.5", "z1-given-z2-sigma0", "z2-top"]


def test_all_tries_every_combination(plan: Callable[..., Any]) -> None:
    parsed = plan({"depths": [3], "sigmas": [0, 1], "choose": "all"})
    assert names(parsed.cells()) == ["L3-sigma0-0", "L3-sigma0-1", "L3-sigma1-0", "L3-sigma1-1"]
    assert len(parsed.all_denoisers()) == 2 + 2 + 1


def test_the_recipe_s_own_seed_has_plain_names(plan: Callable[..., Any]) -> None:
    parsed = plan({"depths": [1], "seeds": [4, 5]}, seed=4)
    assert names(parsed.cells()) == ["L1", "L1-seed5"]
    assert [parsed.run_name(seed) for seed in parsed.seeds] == ["small", "small-seed5"]


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ({"depth": [1]}, r"grid\.depth is .*its keys are depths, sigmas, choose"),
        ({"depths": [5]}, "grid.depths names 5, but there are 4 levels"),
        ({"sigmas": [-1]}, r"grid\.sigmas\.0 is -1"),
        ({"sigmas": ["a"]}, r"grid\.sigmas\.0 is 'a'"),
        ({"choose": "best"}, r"grid\.choose is 'best'.*greedy"),
        ({"scored_by": {"weights": "w"}}, r"grid\.scored_by\.encoder"),
    ],
)
def test_a_bad_grid_is_one_sentence(plan: Callable[..., Any], grid: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        plan(grid)
    assert "\n" not in str(caught.value)
    assert "small.yaml" in str(caught.value)


def test_greedy_is_refused_where_every_denoiser_depends_on_every_sigma(plan: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"set grid\.choose: all"):
        plan({"sigmas": [0, 1]}, denoiser={"condition_on": "all"})
    whole = plan({"depths": [3], "sigmas": [0, 1], "choose": "all"}, denoiser={"condition_on": "all"})
    assert len(whole.all_denoisers()) == 4 + 2 + 1
    assert "z0-given-z1-sigma0-z2-sigma1" in whole.all_denoisers()


@given(
    depth=st.integers(1, 4),
    sigmas=st.lists(st.sampled_from([0, 0.25, 0.5, 1.0, 1.5, 1e-05, 12.0]), min_size=3, max_size=3),
    on_all=st.booleans(),
)
def test_folders_and_options_are_nestgen_s(depth: int, sigmas: list[float], on_all: bool) -> None:
    """The options made from a folder's name make nestgen choose that folder."""
    from nestgen.recipe.locations import run_dir
    from nestgen.recipe.recipe import Recipe
    from workflow.plan import levels_of, plan_of, train_options

    levels = [LEVELS[0], *({**level, "sigma": sigma} for level, sigma in zip(LEVELS[1:], sigmas))]
    document = {
        "name": "small",
        "features": {"out": "s", "z0": "vae:32"},
        "levels": levels,
        "denoiser": {"condition_on": "all" if on_all else "above"},
    }
    plan, recipe = plan_of(document, Path("small.yaml")), Recipe.model_validate(document)
    cut = recipe.depth(depth)
    cell = plan.cells(depth)[0]
    assert plan.denoisers(cell) == [run_dir(cut, level).name for level in range(depth)]
    for level, denoiser in enumerate(plan.denoisers(cell)):
        words = train_options(denoiser).split()
        options = dict(zip(words[::2], words[1::2]))
        trained = recipe.depth(int(options["--depth"]))
        if "--sigma" in options:
            trained = trained.with_sigmas([float(one) for one in options["--sigma"].split(",")])
        assert int(options["--level"]) == level
        assert run_dir(trained, level).name == denoiser
        assert levels_of(denoiser) == [level, *cut.conditions(level)]


def test_a_range_of_sigma_is_left_to_the_recipe(plan: Callable[..., Any]) -> None:
    from workflow.plan import train_options

    parsed = plan(levels=[LEVELS[0], {"shape": "4x4x16", "sigma": [0, 1.5]}])
    denoiser = parsed.denoisers(parsed.cells(2)[0])[0]
    assert denoiser == "z0-given-z1-sigma0to1.5"
    assert train_options(denoiser) == "--level 0 --depth 2"


def card(distance: float, *sigmas: float, space: str = "tiny 1x1x64") -> dict[str, Any]:
    levels = [{"condition_sigma": sigma} for sigma in (*sigmas, 0.0)]
    scores = [{"space": "z_0", "frechet_distance": 100 - distance}, {"space": space, "frechet_distance": distance}]
    return {"samples": {"levels": levels}, "scores": scores}


def test_the_chosen_sigma_has_the_smallest_mean_over_seeds() -> None:
    from workflow.sigma_choice import choose

    cards = {
        "L3-sigma0": card(5, 1, 0),
        "L3-sigma0.5": card(1, 1, 0.5),
        "L3-sigma0-seed1": card(5, 1, 0),
        "L3-sigma0.5-seed1": card(10, 1, 0.5),
    }
    chosen = choose(cards, None)
    assert (chosen["cell"], chosen["sigmas"], chosen["space"]) == ("L3-sigma0", [1, 0], "tiny 1x1x64")
    assert [one["mean"] for one in chosen["tried"]] == [5, 5.5]
    assert choose(cards, "z_0")["cell"] == "L3-sigma0.5"
    assert choose({"b": card(1, 1.5), "a": card(1, 0.5)}, None)["sigmas"] == [0.5]  # of equals the smaller


def test_cards_without_a_common_space_choose_nothing() -> None:
    from click import ClickException

    from workflow.sigma_choice import choose

    with pytest.raises(ClickException, match="no space Inception"):
        choose({"a": card(1, 0)}, "Inception")


def test_fids_of_two_ways_into_inception_choose_nothing() -> None:
    from click import ClickException

    from workflow.sigma_choice import choose

    old, new = card(1, 0, space="Inception"), card(2, 0.5, space="Inception")
    new["scores"][-1]["inception"] = "pytorch-fid"
    with pytest.raises(ClickException, match="as in pytorch-fid and tensorflow, which are not comparable"):
        choose({"a": old, "b": new}, None)


def test_a_recipe_is_read_and_written_as_yaml_1_2(tmp_path: Path) -> None:
    """In YAML 1.1 `no` is False and `2e-4` a text, so the workflow would run another recipe than `nestgen train` reads."""
    from workflow.plan import read_plan
    from workflow.rehearsal import configured, write_recipes

    file = tmp_path / "small.yaml"
    file.write_text(
        "features: {out: s, precision: no}\nlevels: [{shape: 8x8x8}]\ntraining: {precision: no, lr: 2e-4}\ngrid: {seeds: [1]}\n"
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        config = {"limit": 8}  # so that nested.yaml is written anew
        write_recipes(configured(read_plan(file), file, config), file, config)
    for name in ("small.yaml", "nested.yaml", "nested-seed1.yaml"):
        document = read_plan(tmp_path / name).document
        assert document["features"]["precision"] == document["training"]["precision"] == "no"
        assert document["training"]["lr"] == 2e-4


def test_a_recipe_without_a_name_has_that_of_its_file_in_every_step(tmp_path: Path) -> None:
    """`nested.yaml` was a copy of it, and nestgen called the run `nested`."""
    from workflow.plan import read_plan
    from workflow.rehearsal import configured, write_recipes

    file = tmp_path / "mine.yaml"
    file.write_text("features: {out: s}\nlevels: [{shape: 8x8x8}]\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        write_recipes(configured(read_plan(file), file, {}), file, {})
    assert read_plan(tmp_path / "nested.yaml").name == "mine"


def test_a_recipe_says_what_differs_from_its_base(tmp_path: Path) -> None:
    """Sections key by key, lists as a whole; the name is its own, and what is run is written out."""
    from workflow.plan import read_plan
    from workflow.rehearsal import configured, write_recipes

    (tmp_path / "first.yaml").write_text(
        "name: one\nfeatures: {source: scenes, out: s, limit: 8}\nlevels: [{shape: 8x8x8}, {shape: 1x1x8}]\n"
        "training: {steps: 4, batch: 2}\n"
    )
    (tmp_path / "second.yaml").write_text("base: first.yaml\nlevels: [{shape: 4x4x8}]\n")
    file = tmp_path / "third.yaml"
    file.write_text("base: second.yaml\nfeatures: {limit: 9}\ntraining: {steps: 5}\n")
    plan = read_plan(file)
    assert plan.document == {
        "name": "third",
        "features": {"source": "scenes", "out": "s", "limit": 9},
        "levels": [{"shape": "4x4x8"}],
        "training": {"steps": 5, "batch": 2},
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        write_recipes(configured(plan, file, {}), file, {})
    assert read_plan(tmp_path / "nested.yaml").document == plan.document


@pytest.mark.parametrize(
    ("base", "says"), [("a.yaml", "a.yaml is its own base, by way of a.yaml"), ("b.yaml", "can't be read")]
)
def test_a_base_that_leads_nowhere_is_a_sentence(tmp_path: Path, base: str, says: str) -> None:
    from workflow.plan import RecipeError, read_plan

    (tmp_path / "a.yaml").write_text(f"base: {base}\n")
    with pytest.raises(RecipeError, match=says):
        read_plan(tmp_path / "a.yaml")


@pytest.mark.parametrize("source", ["folder:/data/p", "wds:/data/p.tar"])
def test_held_out_images_are_never_the_training_images(plan: Callable[..., Any], tmp_path: Path, source: str) -> None:
    """A source without splits: the workflow stored its images again as the reference, and scored against them."""
    from workflow.plan import RecipeError
    from workflow.rehearsal import configured

    file = tmp_path / "small.yaml"
    parsed = plan(None, features={"source": source, "out": "s"}, evaluation={"reference": "r"})
    with pytest.raises(RecipeError, match=r"has no split of them; give their SOURCE as grid\.held_out"):
        configured(parsed, file, {})
    assert configured(parsed, file, {"held_out": "folder:/data/q"}).grid.held_out == "folder:/data/q"
    assert configured(parsed, file, {"source": "imagenet:/data/i"}).features["source"] == "imagenet:/data/i"


def test_a_config_key_that_nothing_reads_is_refused(plan: Callable[..., Any], tmp_path: Path) -> None:
    from workflow.plan import RecipeError
    from workflow.rehearsal import configured

    with pytest.raises(RecipeError, match="there is no CONFIG key 'gpu'; the keys are recipe, data"):
        configured(plan(), tmp_path / "small.yaml", {"gpu": 1})
    with pytest.raises(RecipeError, match="CONFIG gpus is 'two', but must be how many GPUs there are"):
        configured(plan(), tmp_path / "small.yaml", {"gpus": "two"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "a{b}"}, r"name is 'a\{b\}', but it names a folder"),
        ({"evaluation": {"reference": "r}"}}, "evaluation.reference"),
        (
            {"levels": [{"shape": "8x8x8; touch X"}]},
            "the shape of level 0 is '8x8x8; touch X', but must be like 8x8x64",
        ),
    ],
)
def test_names_that_no_step_can_have_are_refused(plan: Callable[..., Any], changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan(**changes)


def test_samples_are_encoded_as_the_rows_are(plan: Callable[..., Any]) -> None:
    from workflow.rehearsal import scored_features

    rows = {"encoder": "tiny", "precision": "bf16", "crop": "official", "icc": "srgb"}
    scored = scored_features(plan(features={"out": "s", "views": 2, **rows}))
    assert scored == {**rows, "out": "stores/samples", "z0": "pixels:8"}
