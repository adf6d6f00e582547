"""Captions: which image gets which, that they reach the denoisers, and where they come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from nestgen.cli.main import main
from nestgen.errors import UserError
from nestgen.files import read_json
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.sampling.captions import embed_prompts, open_prompts
from nestgen.sampling.conditions import Request, open_conditions
from nestgen.sampling.frozen import FrozenSource
from nestgen.sampling.latents import open_latents
from nestgen.sampling.trained import load_samplers
from nestgen.stores.store import open_store
from tests.nestgen.captions import Writer, stand_in, write_text

Trained = Callable[..., Path]


@pytest.fixture
def recipe(trained: Trained, tmp_path: Path, store_writer: Writer, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    write_text(tmp_path / "stores" / "toy", store_writer, [1] * 40)
    monkeypatch.chdir(tmp_path)
    return load_recipe(trained(denoiser={"size": "nano", "text": "3x8"}, sampling={"steps": 2}))


def test_loose_prompts_go_round(tmp_path: Path, store_writer: Writer) -> None:
    values = write_text(tmp_path, store_writer)
    prompts = open_prompts(tmp_path, (3, 8))
    np.testing.assert_array_equal(prompts.context(range(6), 0).numpy(), values[[1, 2, 3, 4, 1, 2]])
    assert prompts.describe()["captions"] == "prompt i of image i"


def test_each_captioned_picture_gives_one_of_its_captions(tmp_path: Path, store_writer: Writer) -> None:
    counts = [2, 0, 5, 1, 3]
    write_text(tmp_path, store_writer, counts)
    prompts = open_prompts(tmp_path, (3, 8))
    bounds = np.concatenate([[1], 1 + np.cumsum(counts)])
    rows = prompts.text_rows(range(4000), 7)
    pictures = np.searchsorted(bounds, rows, side="right") - 1
    assert all(sorted(pictures[first : first + 4]) == [0, 2, 3, 4] for first in range(0, 4000, 4))
    for picture in (0, 2, 4):  # every caption about as often
        shares = np.bincount(rows[pictures == picture] - bounds[picture]) / 1000
        assert len(shares) == counts[picture]
        assert np.abs(shares - 1 / counts[picture]).max() < 0.06
    np.testing.assert_array_equal(prompts.text_rows([37, 5], 7), rows[[37, 5]])  # a function of (seed, i)
    assert (prompts.text_rows(range(4000), 8) != rows).any()
    assert prompts.describe()["captions"] == "one of each row"
    own = prompts.text_rows(range(4), 7, [4, 0, 1, 2])  # of rows: their own, and of one without captions the empty one
    assert (np.searchsorted(bounds, own, side="right") - 1).tolist() == [4, 0, -1, 2]


def test_captions_reach_the_denoisers_and_the_card(recipe: Recipe, tmp_path: Path, store_writer: Writer) -> None:
    write_text(tmp_path / "one", store_writer, count=2)

    def drawn(out: str, *options: str) -> np.ndarray:
        run = CliRunner().invoke(main, ["sample", "--count", "3", "--batch-size", "3", "--out", out, *options])
        assert run.exit_code == 0, run.output
        return open_latents(tmp_path / out, 2).read_all()

    plain, given = drawn("plain"), drawn("given", "--prompts", "one")
    assert np.abs(plain - given).min(axis=(1, 2, 3)).max() > 1e-4
    np.testing.assert_array_equal(drawn("again", "--prompts", "one"), given)
    assert read_json(Path("given/sample.json"))["text"]["captions"] == "prompt i of image i"
    assert read_json(Path("plain/sample.json"))["text"] is None
    assert read_json(Path("plain/sample.json"))["levels"][2]["guidance"] == 1.0  # a caption is there to be dropped
    run = CliRunner().invoke(main, ["sample", "--count", "3", "--out", "given", "--overwrite"])
    assert "z_2 and below are sampled again, because text.captions was prompt i of image i" in run.output


def test_an_image_frozen_to_a_row_has_its_caption(recipe: Recipe, tmp_path: Path) -> None:
    """One caption a row: that of the row that image i is frozen to, not of the seed's order; image 0's where it is frozen."""
    root = tmp_path / "stores" / "toy"
    text = open_store(root / "text" / "3x8.zarr").load().astype(np.float32)
    samplers = load_samplers(recipe, torch.device("cpu"))

    def context(frozen: FrozenSource | None) -> torch.Tensor:
        context_BTD = open_conditions(recipe, samplers, Request(3, 0, 3, frozen=frozen, prompts=root)).context(range(3))
        assert context_BTD is not None
        return context_BTD

    for source, rows in ((FrozenSource(2, root), [1, 2, 3]), (FrozenSource(1, root, 9), [10, 10, 10])):
        np.testing.assert_array_equal(context(source), text[rows])
    free, frozen = context(None), context(FrozenSource(1))
    np.testing.assert_array_equal(frozen, free[[0, 0, 0]])


def test_a_prompt_is_embedded_once_by_featurize(
    recipe: Recipe, tmp_path: Path, store_writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "made", store_writer, count=1)
    (tmp_path / "text.pt").touch()
    document = (tmp_path / "nested.yaml").read_text()
    (tmp_path / "nested.yaml").write_text(document.replace("features:", "features:\n  text_weights: text.pt"))
    stand_in(
        tmp_path,
        monkeypatch,
        "import shutil, sys\n"
        "assert sys.argv[1:3] == ['embed-text', '--prompts'] and sys.argv[4] == '--out', sys.argv\n"
        "assert open(sys.argv[3]).read() == 'a red ball\\n'\n"
        "assert sys.argv[6:] == ['--text-weights', 'text.pt'], sys.argv\n"
        f"shutil.copytree({str(tmp_path / 'made' / 'text')!r}, sys.argv[5] + '/text')\n",
    )
    run = CliRunner().invoke(main, ["sample", "--count", "2", "--out", "s", "--prompt", "a red\nball"])
    assert run.exit_code == 0, run.output
    text = read_json(Path("s/sample.json"))["text"]
    assert text["captions"] == "a red\nball"
    (tmp_path / "bin" / "featurize").write_text("never called again")
    assert embed_prompts(load_recipe(), ["a red\nball"]).is_dir()


def test_wrong_prompts_are_one_sentence(
    recipe: Recipe, tmp_path: Path, store_writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="the prompt is empty"):
        embed_prompts(recipe, ["  \n"])
    write_text(tmp_path / "none", store_writer, count=0)
    with pytest.raises(UserError, match="has no captions but the empty one"):
        open_prompts(tmp_path / "none", (3, 8))
    write_text(tmp_path / "another", store_writer, encoder=1)
    run = CliRunner().invoke(main, ["sample", "--count", "1", "--out", "s", "--prompts", "another"])
    assert (run.exit_code, "another text encoder than the captions" in run.output) == (1, True)
    with pytest.raises(UserError, match=r"there is no store .*nowhere/text/3x8\.zarr"):
        open_prompts(tmp_path / "nowhere", (3, 8))
    without = recipe.model_copy(update={"denoiser": recipe.denoiser.model_copy(update={"text": None})})
    for prompt in ("a ball", ""):
        with pytest.raises(UserError, match=r"take no captions \(denoiser.text is null\)"):
            embed_prompts(without, [prompt])
    stand_in(tmp_path, monkeypatch, "import sys; sys.exit('error: no weights')")
    with pytest.raises(UserError, match="could not embed the prompt"):
        embed_prompts(recipe, ["a ball"])
    monkeypatch.setenv("PATH", "")
    (tmp_path / "bin" / "featurize").unlink()
    with pytest.raises(UserError, match="is not installed; install featurize, or embed prompts elsewhere"):
        embed_prompts(recipe, ["a ball"])
    run = CliRunner().invoke(main, ["sample", "--out", "s", "--prompt", "a", "--prompts", "b"])
    assert run.exit_code == 2
