"""Locks of folders, on a file system that has none."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nestgen.locks import folder_lock


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_folder_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr("nestgen.locks.fcntl.flock", flock)
    with folder_lock(tmp_path, "is used"):
        assert (tmp_path / ".lock").read_text().startswith("process ")
    assert f"warning: the file system of {tmp_path} has no locks" in capsys.readouterr().err
