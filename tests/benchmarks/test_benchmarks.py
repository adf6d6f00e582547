"""Every benchmark still runs, at a size that measures nothing: what it prints is a table with its contenders."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import (
    basis_fit,
    basis_rows,
    clip_retrieval,
    decode,
    extraction,
    gpu_day,
    io_counts,
    memory,
    one_pass,
    peers,
    precision,
    reads,
    remote_reads,
    sample,
    side_by_side,
)
from benchmarks.photos import write_shards
from featurize.cli.main import commands
from tests.conftest import Begin

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


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_io_counts(run: Callable[..., str]) -> None:
    text = run(io_counts, "--pictures", 40, "--model", MODEL, "--levels", "2x2x8")
    assert re.search(r"\| chunks +\| 4.0 +\|", text) and re.search(r"the base store is read, times \| 2.00", text)


def test_basis_rows(run: Callable[..., str], tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", 12, (40, 30))
    source = f"wds:{tmp_path}/shards/*.tar"
    text = run(basis_rows, "--source", source, "--keep", 8, "--rows", 4)
    assert re.search(r"\| 12 +\| 0\.0 +\| 0\.0e\+00", text) and re.search(r"\| 4 +\| [1-9]", text)


def test_extraction(run: Callable[..., str]) -> None:
    text = run(extraction, "--pictures", 40, "--model", MODEL, "--levels", "2x2x8", "--workers", 1, "--rounds", 1)
    assert "| featurize extract, 1 worker |" in text and "decode" in text
    assert re.search(r"featurize extract, 1 worker is \d\.\d\d on the clock of bare", text)


def test_one_pass_beside_itself(run: Callable[..., str]) -> None:
    here = Path(one_pass.__file__).parents[1]
    sizes = ("--pictures", 8, "--basis-rows", 4, "--model", MODEL, "--levels", "2x2x8", "--rounds", 1)
    text = run(one_pass, "--before", here, *sizes)
    assert "| before |" in text and "| now " in text


def test_the_papers_z_0_is_extracted_tiny(run: Callable[..., str]) -> None:
    """The options of a day's stage without a GPU, in this process."""
    [stage] = [stage for stage in gpu_day.STAGES if stage.name == "extract-vae"]
    text = run(extraction, *stage.tiny.split())
    assert "z_0 vae:32 in bfloat16" in text and "| bare forward pass |" in text


def test_precision(run: Callable[..., str]) -> None:
    text = run(precision, "--pictures", 2, "--model", MODEL, "--batch", 2)
    assert re.search(r"tiny +\| CPU with \w+ +\| float32 +\| 1\.000000 +\| 1\.000000 +\| 0 ", text)
    assert re.search(r"vae:64, scenes +\| CPU with \w+ +\| bfloat16 +\| -\d\d\.\d dB", text)


def test_remote_reads(run: Callable[..., str]) -> None:
    text = run(remote_reads, "--pictures", 12, "--latency", 5, "--rounds", 1)
    assert re.search(rf"{remote_reads.EACH} +\| [\d,]+ +\| 1\.00x +\| 12 ", text)
    assert re.search(rf"{remote_reads.AHEAD} +\| [\d,]+ +\| [\d.]+x +\| 1 ", text)


def test_memory(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands run in this process here: starting four would take most of a minute."""

    def in_this_process(command: list[str]) -> float:
        outcome = CliRunner().invoke(commands, command[3:], catch_exceptions=False)
        assert outcome.exit_code == 0, outcome.output
        return 100.0

    monkeypatch.setattr(memory, "peak_memory", in_this_process)
    text = run(memory, "--pictures", 8, "--times", 2, "--workers", 0)
    assert "featurize extract" in text and "featurize knn-viz" in text and "1.00x" in text


def test_peak_memory_is_of_the_command_and_its_children() -> None:
    child = "x = bytearray(80 << 20); import time; time.sleep(0.4)"
    parent = f"import subprocess, sys; x = bytearray(40 << 20); subprocess.run([sys.executable, '-c', {child!r}])"
    assert 115 < memory.peak_memory([sys.executable, "-S", "-c", parent]) < 200


def test_clip_retrieval_asks_both_for_the_same_pictures(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No environment is built: what would be run is looked at, and ours is a valid command line."""
    asked: list[list[str]] = []
    monkeypatch.setattr(clip_retrieval, "_run", lambda command, environment: asked.append([*map(str, command)]))
    monkeypatch.setattr(clip_retrieval, "python_of", lambda peer: Path(peer))
    monkeypatch.setattr(clip_retrieval, "MODEL", "ViT-S-32-alt")  # a small one, as nothing is encoded
    text = run(
        clip_retrieval,
        "--pictures",
        64,
        "--start-pictures",
        32,
        "--rounds",
        1,
        "--threads",
        1,
    )
    assert "clip-retrieval inference" in text and "featurize extract" in text
    theirs = [command for command in asked if command[0] == "clip-retrieval"]
    ours = [command for command in asked if command[0] == sys.executable]
    assert [len(command[6:]) for command in theirs] == [1, 2]
    for them, us in zip(theirs, ours, strict=True):
        assert us[4] == "wds:" + "::".join(them[6:])
        commands.commands["extract"].make_context("extract", us[4:])


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


def test_sample(run: Callable[..., str]) -> None:
    text = run(sample, "--size", "nano", "--batch", 1, "--steps", 2, "--rounds", 1)
    assert all(
        name in text for name in ("plain U-ViT, DPM-Solver++", "nestgen, L = 1", "nestgen, L = 3", "by its GFlops")
    )


def test_a_gpu_day_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stages here are two commands of no weight, of which one fails at first."""
    out = tmp_path / "day"

    def command(stage: gpu_day.Stage, on_gpu: bool, table: Path) -> list[str]:
        code = f"import sys; sys.exit({(stage.name == 'resume') and not (tmp_path / 'mended').exists()!r})"
        return [sys.executable, "-IS", "-c", code]

    monkeypatch.setattr(gpu_day.Stage, "command", command)
    words = ["--out", str(out), "--only", "resume", "--only", "step-small"]
    first = CliRunner().invoke(gpu_day.main, words)
    assert first.exit_code == 1
    assert "step-small: done (" in first.output and "resume: failed (" in first.output
    (tmp_path / "mended").touch()
    second = CliRunner().invoke(gpu_day.main, words)
    assert second.exit_code == 0
    assert "step-small: done before (" in second.output and "resume: done (" in second.output
    assert json.loads((out / "resume.json").read_text())["state"] == "done"
    late = CliRunner().invoke(gpu_day.main, ["--out", str(out), "--only", "step-large", "--minutes", "0"])
    assert late.exit_code == 0 and "step-large: out of time (" in late.output


@pytest.mark.parametrize("stage", gpu_day.STAGES, ids=gpu_day.NAMES)
def test_a_gpu_day_s_stages_are_commands(stage: gpu_day.Stage) -> None:
    """Both sizes of each are options that its benchmark has."""
    module = importlib.import_module(f"benchmarks.{stage.module}")
    for on_gpu in (True, False):
        module.main.make_context(stage.name, stage.command(on_gpu, Path("out.md"))[3:])


def test_a_gpu_day_runs_tiny_without_a_gpu(tmp_path: Path) -> None:
    done = CliRunner().invoke(gpu_day.main, ["--out", str(tmp_path), "--only", "profile-small"])
    assert done.exit_code == 0, (tmp_path / "profile-small.log").read_text()
    assert "No GPU is here" in done.output or "NVIDIA" in done.output
    assert (tmp_path / "profile-small.md").read_text().startswith("## ")


@pytest.mark.parametrize("name", ["resume", "pictures"])
def test_a_stage_of_many_commands_runs_tiny(
    name: str, run: Callable[..., str], begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a process that has imported all it needs: by itself a dozen of them take a minute to start."""
    [stage] = [stage for stage in gpu_day.STAGES if stage.name == name]
    module = importlib.import_module(f"benchmarks.{stage.module}")

    def command(folder: Path, *words: str) -> float:
        code, _, errors = begin(folder, *words).ended()
        assert code == 0, errors
        return 1.0

    monkeypatch.setattr(module, "command", command)
    text = run(module, *stage.tiny.split())
    assert ("| in two halves |" in text) if name == "resume" else ("| L = 1 " in text)


def test_decoding_is_compared_by_size(run: Callable[..., str]) -> None:
    text = run(decode, "--pictures", 2, "--rounds", 1)
    for size in ("224x224", "500x375", "1200x900"):
        assert re.search(rf"{size} +\| Pillow", text) and re.search(rf"{size} +\| featurize", text)
