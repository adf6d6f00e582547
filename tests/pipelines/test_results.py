from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from click.testing import CliRunner


def write_pages(experiments: Path, out: Path, *names: str) -> dict[str, str]:
    from workflow.results import main

    out.mkdir(exist_ok=True)
    result = CliRunner().invoke(main, [*names, "--experiments", str(experiments), "--out", str(out)])
    assert result.exit_code == 0, result.output
    return {path.stem: path.read_text() for path in out.glob("*.md")}


def write_card(experiments: Path, recipe: str, cell: str, scores: dict[str, float], run: str | None = None) -> None:
    folder = experiments / recipe / "samples" / cell
    folder.mkdir(parents=True)
    card: dict[str, Any] = {
        "samples": {"recipe": run or recipe},
        "scores": [{"space": space, "frechet_distance": score} for space, score in scores.items()],
    }
    (folder / "evaluation.json").write_text(json.dumps(card))


def line(page: str, start: str) -> str:
    [found] = [one for one in page.splitlines() if one.startswith(start)]
    return found


def test_the_committed_pages_are_what_the_script_writes(pipelines: Path, tmp_path: Path) -> None:
    """Of what is kept of the experiments that were run, and of nothing for the others."""
    shutil.copytree(pipelines / "results", tmp_path / "out")
    for page in (tmp_path / "out").glob("*.md"):
        page.unlink()
    pages = write_pages(tmp_path / "none", tmp_path / "out")
    for name, page in pages.items():
        committed = (pipelines / "results" / f"{name}.md").read_text()
        assert committed == page, f"write it again: python pipelines/results.py {name}"
    assert {path.stem for path in (pipelines / "recipes").glob("*.yaml")} <= pages.keys()


def test_a_page_outlives_its_experiment_and_says_when_the_recipe_changed(pipelines: Path, tmp_path: Path) -> None:
    experiments, out = tmp_path / "experiments", tmp_path / "out"
    write_card(experiments, "coco-uncond", "L1", {"Inception": 33.0})
    once = write_pages(experiments, out, "coco-uncond")
    (out / "coco-uncond/notes.md").write_text("Tried with more steps.\n")
    again = write_pages(tmp_path / "none", out)
    assert again["coco-uncond"] == once["coco-uncond"].replace(
        "## Cost", "## Where it disagrees, and what was tried\n\nTried with more steps.\n\n## Cost"
    )
    assert "| 1 of 17 hierarchies are scored |" in again["README"]
    recipe = out / "coco-uncond/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("choose: greedy", "choose: all"))
    assert "scored, by [the recipe as it was](coco-uncond/recipe.yaml)" in write_pages(tmp_path / "none", out)["README"]


def test_what_was_not_run_has_no_number_of_ours(tmp_path: Path) -> None:
    page = write_pages(tmp_path / "none", tmp_path / "out", "imagenet100-uncond")["imagenet100-uncond"]
    assert "State: not run." in page
    assert line(page, "| 3 | 1 |") == "| 3 | 1 | 11.12 | not run |  |"
    assert "Training: not run" in page


def test_fids_of_two_ways_into_inception_do_not_stand_together(tmp_path: Path) -> None:
    from workflow.results import main

    experiments, names = tmp_path / "experiments", ("imagenet100-rcg-uncond", "imagenet100-8x8x256-uncond")
    for recipe in names:
        write_card(experiments, recipe, "L2", {"z_0": 8.0, "Inception": 33.0})
    page = write_pages(experiments, tmp_path / "out", *names)[names[0]]
    assert "FID here (tensorflow)" in page
    assert "Inception: 33 here, 33 there; z_0: 8 here, 8 there" in page
    card = experiments / names[0] / "samples/L2/evaluation.json"
    scored = json.loads(card.read_text())
    scored["scores"][1]["inception"] = "pytorch-fid"
    card.write_text(json.dumps(scored))
    page = write_pages(experiments, tmp_path / "out", *names)[names[0]]
    assert "FID here (pytorch-fid)" in page
    assert "Inception: 33 here" not in page
    assert "z_0: 8 here, 8 there" in page
    write_card(experiments, "coco-uncond", "L1", {"Inception": 33.0})
    write_card(experiments, "coco-uncond", "L2-sigma0", {"Inception": 20.0})
    card = experiments / "coco-uncond/samples/L1/evaluation.json"
    card.write_text(card.read_text().replace('"space"', '"inception": "pytorch-fid", "space"'))
    arguments = ["coco-uncond", "--experiments", str(experiments), "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(main, arguments)
    assert (run.exit_code, "as in pytorch-fid and tensorflow, which are not comparable" in run.output) == (1, True)


def test_measured_scores_stand_beside_the_papers(tmp_path: Path) -> None:
    experiments = tmp_path / "experiments"
    write_card(experiments, "coco-uncond", "L1", {"z_0": 8.0, "clip 1x1x64": 4.0, "Inception": 33.0})
    write_card(experiments, "coco-uncond", "L2-sigma0", {"z_0": 7.0, "clip 1x1x64": 3.0, "Inception": 20.0})
    write_card(experiments, "coco-uncond", "L2-sigma1", {"z_0": 6.0, "clip 1x1x64": 2.0, "Inception": 14.0})
    page = write_pages(experiments, tmp_path / "out", "coco-uncond")["coco-uncond"]
    assert "State: 3 of 17 hierarchies are scored." in page
    assert line(page, "| 2 | 1 |") == "| 2 | 1 | 13.24 | 14 | +0.76 | 2 | 6 |"
    assert line(page, "| 5 | 0 |") == "| 5 | 0 | 6.27 | not run |  | not run | not run |"
    assert "Inception: L = 2 (σ 1) is 0.42 of L = 1 (14 against 33)" in page
    assert "Inception: at L = 2, σ = 1 gives 14, σ = 0 20" in page
    assert (tmp_path / "out/coco-uncond/cards/L2-sigma1.json").is_file()


def test_pictures_of_scenes_are_kept_and_those_of_a_source_with_terms_are_not(tmp_path: Path) -> None:
    for recipe in ("mini", "mini-photos"):
        write_card(tmp_path / "e", recipe, "L1", {"z_0": 8.0})
        for name in ("knn.png", "samples.png"):
            (tmp_path / "e" / recipe / name).touch()
    pages = write_pages(tmp_path / "e", tmp_path / "out", "mini", "mini-photos")
    assert "mini/knn.png" in pages["mini"] and "knn.png" not in pages["mini-photos"]
    assert not (tmp_path / "out/mini-photos/knn.png").exists()
    assert "mini-photos/samples.png" in pages["mini-photos"]


def test_seeds_are_averaged_with_their_spread_and_recipes_compared(tmp_path: Path) -> None:
    experiments = tmp_path / "experiments"
    for seed, (semantic, pixels) in enumerate([(1.0, 4.0), (2.0, 5.0), (3.0, 6.0)]):
        end = f"-seed{seed}" if seed else ""
        for recipe, score in (("mini", semantic), ("mini-pixels", pixels)):
            write_card(experiments, recipe, f"L2-sigma0.5{end}", {"tiny 1x1x64": score}, f"{recipe}{end}")
    pages = write_pages(experiments, tmp_path / "out", "mini", "mini-pixels")
    assert line(pages["mini"], "| 2 | 0.5 |") == "| 2 | 0.5 | 2 ± 1 |"
    assert "Beside L = 2 of [mini](mini.md): tiny 1x1x64: 5 ± 1 here, 2 ± 1 there." in pages["mini-pixels"]


def test_a_rehearsal_is_no_result(tmp_path: Path) -> None:
    write_card(tmp_path / "e", "coco-uncond", "L1", {"Inception": 33.0}, "coco-uncond-rehearsal")
    assert "State: not run." in write_pages(tmp_path / "e", tmp_path / "out", "coco-uncond")["coco-uncond"]
