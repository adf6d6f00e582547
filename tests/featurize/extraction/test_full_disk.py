"""A disk that is really full, at whatever stage: one sentence, and with more space the same command ends in the same bytes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.featurize.conftest import as_words, chunks, options

SIZES = (1, 5, 10, 16, 24, 40, 56, 70, 90, 110, 130)  # pages of 4 kB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Calls with pages: a file system of so many."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")

    def resized(pages: int) -> Path:
        subprocess.run(["mount", "-o", f"remount,size={4 * pages}k", disk], check=True)
        return disk

    yield resized
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_one_sentence_at_every_stage(
    small_disk: Callable,
    extraction: Path,
    picture_folder: Path,
    vit_weights: Path,
    featurize: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Another program may fill the disk after the look at its free space, so that look is left out here.
    for module in ("extract", "first_pass"):
        monkeypatch.setattr(f"featurize.extraction.{module}.check_space", lambda targets, root: None)
    root = small_disk(1) / "root"
    request = options(picture_folder, vit_weights, root)
    words = as_words(request)
    stages = set()
    for pages in SIZES:
        small_disk(pages)
        ended = featurize("extract", request["source"], *words)
        assert ended.code == 1, ended.err
        sentence = re.fullmatch(rf"error: No space is left on the disk at {root}/(\S+); .*", ended.err.splitlines()[-1])
        assert sentence, ended.err
        stages.add(sentence[1])
    small_disk(10_000)
    assert featurize("extract", request["source"], *words).code == 0
    assert chunks(root) == chunks(extraction)
    assert len(stages) > 4, stages
