"""Captions embedded beside the images they belong to."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from featurize.errors import UserError
from featurize.execution.tasks import run_here
from featurize.extraction.captions import TextTask, embed_prompts
from featurize.extraction.extract import extract
from featurize.io.files import resolve_path
from featurize.io.lock import root_lock
from featurize.recipe import read_request
from featurize.store.read import open_sealed
from featurize.text.tower import TextSpec
from tests.featurize.conftest import Outcome
from tests.featurize.layouts import clip_state


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Random weights of a small text tower, with the JSON that describes it."""
    weights = tmp_path / "text.pt"
    torch.save(clip_state(64, 2, 16, 4, 24, (32, 2, 77)), weights)
    network = {"width": 32, "heads": 2, "layers": 2, "activation": "quick_gelu"}
    weights.with_suffix(".json").write_text(json.dumps({"model_args": network}))
    return weights


def test_captions_that_are_embedded_already_are_left_as_they_are(shard: Path, weights: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    options = {"source": f"wds:{shard}", "out": str(root), "encoder": "pixels", "z0": "pixels:16", "text": "clip"}
    request = read_request(None, options | {"text_weights": str(weights)}, "2x2x3")
    paths = extract(request, workers=0, scheduler=None)
    assert [path.relative_to(root).as_posix() for path in paths[-2:]] == ["text/77x32.zarr", "text/offsets.zarr"]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert extract(request, workers=0, scheduler=None) == paths
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_prompts_are_lines_and_nothing_else_ends_one(weights: Path, tmp_path: Path) -> None:
    """A byte-order mark is no part of the first prompt, nor do signs end a line that only `str.splitlines` takes for breaks."""
    (tmp_path / "prompts.txt").write_bytes("\ufeffa dog\r\na\u2028cat\x1c\n\nthe end".encode())
    embed_prompts(tmp_path / "prompts.txt", tmp_path / "out", TextSpec("clip", str(weights)), run_here)
    table = pq.read_table(tmp_path / "out" / "prompts.parquet")
    assert table["prompt"].to_pylist() == ["a dog", "a\u2028cat\x1c", "", "the end"]
    (tmp_path / "prompts.txt").write_bytes(b"un caf\xe9\n")
    with pytest.raises(UserError, match="are not UTF-8 text"):
        embed_prompts(tmp_path / "prompts.txt", tmp_path / "other", TextSpec("clip", str(weights)), run_here)


def test_prompts_wait_for_a_run_that_embeds_into_the_same_folder(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("featurize.io.lock.POLL", 0.01)
    (tmp_path / "prompts.txt").write_text("a dog\n")
    job = (tmp_path / "prompts.txt", tmp_path / "out", TextSpec("clip", str(weights)), run_here)
    with ThreadPoolExecutor(1) as thread, caplog.at_level(logging.INFO):
        with root_lock(tmp_path / "out", wait=False):
            embedded = thread.submit(embed_prompts, *job)
            while not (embedded.done() or "waiting for it to end" in caplog.text):
                time.sleep(0.01)
            assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
        assert embedded.result() == tmp_path / "out" / "text" / "77x32.zarr"


def test_workers_elsewhere_get_absolute_paths(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a dog\n")
    sent: list[TextTask] = []

    def run(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        tasks = list(tasks)
        sent.extend(task for task in tasks if isinstance(task, TextTask))
        return run_here(function, tasks)

    embed_prompts(Path("prompts.txt"), Path("out"), TextSpec("clip", weights.name), run)
    assert [(task.spec.path, task.encoder.weights) for task in sent] == [
        (tmp_path / "out/text/77x32.zarr", str(weights))
    ]


def test_prompts_go_to_a_bucket(
    weights: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, featurize: Callable[..., Outcome]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a dog\n")
    words = ("--prompts", "prompts.txt", "--text-weights", weights.name, "--workers", 0)
    outcome = featurize("embed-text", *words, "--out", f"{bucket}/prompts")
    assert outcome.out == f"{bucket}/prompts/text/77x32.zarr is sealed\n"
    assert not Path("s3:").exists() and open_sealed(resolve_path(f"{bucket}/prompts/text/77x32.zarr")).shape[0] == 2
