"""Every benchmark still runs, at a size that measures nothing: what it prints is a table with its contenders."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import basis_fit, extraction, memory, peers, reads, side_by_side

MODEL = "test_vit"  # timm's own for tests: 160 px, 64 channels


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Calls a benchmark in this process; the table that it wrote."""

    def call(benchmark, *arguments: object) -> str:
        outcome = CliRunner().invoke(benchmark.main, [*map(str, arguments), "--out", str(tmp_path / "table.md")])
        assert outcome.exit_code == 0, outcome.output
        text = (tmp_path / "table.md").read_text()
        assert text in outcome.output
        return text

    return call


@pytest.fixture
def ask_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment of a peer is built in tests: what asks for one fails."""

    def refuse(peer: str) -> Path:
        raise AssertionError(f"{peer} was asked for")

    monkeypatch.setattr(peers, "python_of", refuse)


@pytest.mark.usefixtures("ask_nobody")
def test_reads(run: Callable[..., str]) -> None:
    text = run(reads, "--rows", 600, "--batches", 2, "--batch", 16, "--rounds", 1, "--no-peers")
    assert all(name in text for name in ("nestgen's Store", "flat numpy memory map", "zarr fancy indexing"))


@pytest.mark.usefixtures("ask_nobody")
def test_basis_fit(run: Callable[..., str]) -> None:
    text = run(basis_fit, "--tokens", 2000, "--channels", 24, "--keep", 4, "--rounds", 1, "--no-peers")
    ours = next(line for line in text.splitlines() if basis_fit.OURS in line)
    angle = float(ours.split("|")[5])
    assert angle < 1e-4  # degrees
    assert "svd_compressed" in text


def test_extraction(run: Callable[..., str]) -> None:
    text = run(extraction, "--pictures", 12, "--model", MODEL, "--levels", "2x2x8", "--rounds", 1)
    assert "extraction / bare" in text


def test_memory(run: Callable[..., str]) -> None:
    text = run(memory, "--pictures", 8, "--times", 2, "--workers", 0)
    assert "featurize extract" in text and "featurize knn-viz" in text


def test_the_rest_says_what_it_is_for() -> None:
    """clip_retrieval needs an environment of its own for every figure: only its command line is tried."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.clip_retrieval", "--help"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "clip-retrieval" in done.stdout


def test_turns_are_medians_in_a_changing_order() -> None:
    seen: list[tuple[str, int]] = []
    measured = side_by_side.take_turns(
        {"a": lambda turn: seen.append(("a", turn)), "b": lambda turn: seen.append(("b", turn))}, 3
    )
    assert seen == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert set(measured) == {"a", "b"}
    assert all(one.wall >= 0 for one in measured.values())


def test_tokens_have_a_channel_with_a_large_mean() -> None:
    tokens = basis_fit.tokens_like_a_vits(4000, 16, 0)
    share = np.abs(tokens.mean(axis=0)) / tokens.std(axis=0)
    assert 150 < share.max() < 250 and tokens.dtype == np.float32
