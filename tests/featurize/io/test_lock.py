"""One run at a time on a store root, on a disk and in a bucket."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from upath import UPath

from featurize.errors import UserError
from featurize.io.lock import holder, root_lock

HOLD = (
    "import sys, time; from pathlib import Path; from featurize.io.lock import root_lock\n"
    "with root_lock(Path(sys.argv[1]), False): print('held', flush=True); time.sleep(60)"
)


def test_the_second_run_hears_who_holds_the_root_and_a_dead_ones_lock_is_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"process {other.pid} on {socket.gethostname()} since .*--wait"),
            root_lock(tmp_path, False),
        ):
            pass
        assert str(other.pid) in str(holder(tmp_path))
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / ".lock").exists()
    assert holder(tmp_path) is None
    with root_lock(tmp_path, False):
        pass
    assert not (tmp_path / ".lock").exists()


def test_waiting_goes_on_when_the_other_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featurize.io.lock.POLL", 0.01)
    order: list[str] = []
    first_holds = threading.Event()

    def second() -> None:
        first_holds.wait()
        with root_lock(tmp_path, True):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with root_lock(tmp_path, False):
        first_holds.set()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_in_a_bucket_a_dead_process_of_this_host_is_taken_over_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    root = UPath("memory://locks/root")
    with root_lock(root, False):
        assert str(os.getpid()) in str(holder(root))
        with pytest.raises(UserError, match="held by process"), root_lock(root, False):
            pass
    assert holder(root) is None
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mark = {"host": socket.gethostname(), "pid": dead.pid, "since": "then", "started": 0.0}
    (root / ".lock").write_text(json.dumps(mark))
    with root_lock(root, False):
        pass
    (root / ".lock").write_text(json.dumps(mark | {"host": "elsewhere"}))
    with pytest.raises(UserError, match="on elsewhere since then"), root_lock(root, False):
        pass


def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with root_lock(tmp_path, False):
        assert "has no locks; start no second run on it" in caplog.text
    assert not (tmp_path / ".lock").exists()
