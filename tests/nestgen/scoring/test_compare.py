"""Cards side by side: what may stand there, and the grid."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nestgen.cli.main import main
from nestgen.errors import UserError
from nestgen.files import read_json
from nestgen.scoring.compare import compare, grid


def card(depth: int = 2, sigma: float = 0.5, distance: float = 3.0, seed: int = 0) -> dict[str, Any]:
    levels = [{"steps": 20, "guidance": 1.0, "condition_sigma": 0.5} for _ in range(depth)]
    if depth > 1:
        levels[depth - 2]["condition_sigma"] = sigma
    score = {
        "frechet_distance": distance,
        "kid": distance / 10,
        "samples": 100,
        "dimensions": 32,
        "reference": {"sha256": "a" * 64, "rows": 500, "store": "stores/val"},
    }
    spaces = [*(f"z_{level}" for level in range(depth)), "tiny 1x1x64"]
    return {
        "scores": [copy.deepcopy({"space": space, **score}) for space in spaces],
        "protocol": None,
        "samples": {
            "recipe": "toy",
            "depth": depth,
            "seed": seed,
            "label": None,
            "codec": {"name": "pixels", "scale": 1.0},
            "pictures": "png",
            "levels": levels,
        },
    }


def write(folder: Path, *cards: dict[str, Any]) -> list[Path]:
    paths = [folder / f"{number}.json" for number in range(len(cards))]
    for path, one in zip(paths, cards):
        path.write_text(json.dumps(one))
    return paths


def test_cards_stand_side_by_side_named_by_what_differs(tmp_path: Path) -> None:
    other = card(distance=2.0)
    other["samples"]["levels"][0]["steps"] = 40
    text = compare(write(tmp_path, card(), other))
    assert [line.split(":")[0] for line in text.splitlines() if ":" in line] == ["z_0", "z_1", "tiny 1x1x64"]
    assert "0.json, z_0 steps 20" in text
    assert "1.json, z_0 steps 40" in text
    assert "guidance" not in text
    run = CliRunner().invoke(main, ["compare", *map(str, write(tmp_path, card(), other))])
    assert (run.exit_code, run.output) == (0, text + "\n")


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("scores", 0, "samples"), 99, "samples in z_0 is 100 and 99"),
        (("scores", 2, "reference", "sha256"), "b" * 64, "reference in tiny 1x1x64 is aaaaaaaaaaaa"),
        (("scores", 0, "dimensions"), 8, "dimensions in z_0"),
        (("scores", 1, "weights_sha256"), "c", "weights_sha256 in z_1"),
        (("scores", 1, "inception"), "pytorch-fid", "inception in z_1 is tensorflow and pytorch-fid"),
        (("protocol",), "coco30k", "evaluation protocol is None and coco30k"),
        (("samples", "pictures"), "jpg", "image format and rounding is png and jpg"),
        (("samples", "label"), 3, "class of the samples is None and 3"),
        (("samples", "codec", "scale"), 0.5, r"scale of z_0 is 1\.0 and 0\.5"),
    ],
)
def test_unlike_cards_are_refused_with_the_reason(tmp_path: Path, path: tuple[Any, ...], value: Any, why: str) -> None:
    other = copy.deepcopy(card())
    place: Any = other
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(UserError, match=why):
        compare(write(tmp_path, card(), other))


def test_cards_are_compared_in_every_space_that_some_have(tmp_path: Path) -> None:
    """Two of three have an FID, and the first has none."""
    cards = [card() for _ in range(3)]
    for one, kind in zip(cards[1:], ("tensorflow", "pytorch-fid")):
        one["scores"].append(one["scores"][0] | {"space": "Inception", "inception": kind})
    with pytest.raises(
        UserError, match=r"1\.json and .*2\.json .*: inception in Inception is tensorflow and pytorch-fid"
    ):
        compare(write(tmp_path, *cards))
    cards[2]["scores"][-1]["inception"] = "tensorflow"
    assert "Inception: 100 samples" in compare(write(tmp_path, *cards))


def test_a_grid_of_cards_without_a_common_space_names_one_that_lacks_it(tmp_path: Path) -> None:
    first, second, third = card(), card(), card()
    first["scores"].append(first["scores"][0] | {"space": "Inception"})
    second["scores"] = second["scores"][:1]
    third["scores"] = [first["scores"][-1]]
    with pytest.raises(UserError, match=r"1\.json has no frechet_distance in Inception"):
        grid(write(tmp_path, first, second, third), None, "frechet_distance", tmp_path / "grid.png")


def test_a_card_without_the_way_into_inception_is_tensorflow_s(tmp_path: Path) -> None:
    other = card()
    other["scores"][0]["inception"] = "tensorflow"
    assert compare(write(tmp_path, card(), other))


def test_what_is_no_card_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="is not a score card"):
        compare([tmp_path / "x.json"])
    foreign = card()
    foreign["scores"] = [foreign["scores"][0] | {"space": "Inception"}]
    with pytest.raises(UserError, match="no space in common"):
        compare(write(tmp_path, card(), foreign))


def test_the_grid_is_a_line_a_depth_and_a_column_a_sigma(tmp_path: Path) -> None:
    cards = [card(1, distance=9.0), card(2, 0.0, 6.0), card(2, 1.0, 4.0), card(2, 1.0, 5.0, seed=1), card(3, 0.0, 2.0)]
    text = grid(write(tmp_path, *cards), None, "frechet_distance", tmp_path / "grid.png")
    head, *lines = [line.split("  ") for line in text.splitlines()[1:]]
    assert [cell.strip() for cell in head if cell.strip()] == ["L", "σ = 0", "σ = 1"]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines] == [
        ["1", "9"],
        ["2", "6", "4.5 ± 0.71"],
        ["3", "2"],
    ]
    cells = read_json(tmp_path / "grid.json")
    assert (cells["space"], cells["score"]) == ("tiny 1x1x64", "frechet_distance")
    assert cells["cells"][2] == {"depth": 2, "sigma": 1.0, "mean": 4.5, "std": pytest.approx(0.5**0.5), "cards": 2}
    assert (tmp_path / "grid.png").stat().st_size > 5000
    with pytest.raises(UserError, match="has no kid in z_2"):
        grid(write(tmp_path, *cards), "z_2", "kid", tmp_path / "grid.png")
