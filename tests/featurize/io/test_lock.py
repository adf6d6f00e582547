"""One run at a time on a store root, on a disk and in a bucket."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath

from featurize.errors import UserError
from featurize.execution.tasks import call
from featurize.io import bucket_lock
from featurize.io.files import read_json, write_json
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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("RENEWAL", 0.02), ("SILENCE", 0.3), ("POLL", 0.01)):
        monkeypatch.setattr(f"featurize.io.bucket_lock.{name}", seconds)


def mark_of(token: str | None, host: str = "elsewhere") -> dict[str, object]:
    return {"host": host, "pid": os.getpid(), "since": "then"} | ({"token": token} if token else {})


@pytest.mark.usefixtures("quick")
def test_in_a_bucket_a_living_run_is_left_alone_whatever_its_host_and_pid() -> None:
    """Containers share hostnames and have process numbers of their own: only signs of life count."""
    root = UPath("memory://locks/root")
    with root_lock(root, False):
        assert str(os.getpid()) in str(holder(root)) and "last sign of life" in str(holder(root))
        with pytest.raises(UserError, match="held by process"), root_lock(root, False):
            pass
    assert holder(root) is None
    assert not list(root.glob(".lock*"))
    ended = threading.Event()

    def other() -> None:  # whose process number means nothing here
        number = 0
        while not ended.wait(0.02):
            number += 1
            mark = mark_of("another", socket.gethostname()) | {"pid": 2**22 + 1, "sign": number}
            (root / ".lock").write_text(json.dumps(mark))

    thread = threading.Thread(target=other)
    thread.start()
    while not (root / ".lock").exists():
        pass
    try:
        for _ in range(3):
            with pytest.raises(UserError, match="held by process 4194305"), root_lock(root, False):
                pass
    finally:
        ended.set()
        thread.join()
    with root_lock(root, False):  # now it gives no sign
        assert str(os.getpid()) in str(holder(root))
    assert not list(root.glob(".lock*"))


@pytest.mark.usefixtures("quick")
def test_in_a_bucket_a_lock_without_signs_of_life_is_an_earlier_versions_and_stays() -> None:
    root = UPath("memory://locks/old")
    (root / ".lock").write_text(json.dumps(mark_of(None)))
    with pytest.raises(UserError, match=r"on elsewhere since then.*earlier version; if it has died, remove"):
        root_lock(root, False).__enter__()


@pytest.mark.usefixtures("quick")
def test_of_many_runs_that_find_a_bucket_lock_dead_one_takes_it_over(monkeypatch: pytest.MonkeyPatch) -> None:
    one_at_a_time, create = threading.Lock(), bucket_lock._create

    def atomic_create(path: Path, mark: dict[str, object]) -> bool:  # as S3's; the bucket in memory is not
        with one_at_a_time:
            return create(path, mark)

    monkeypatch.setattr(bucket_lock, "_create", atomic_create)
    for trial in range(5):
        path = UPath(f"memory://locks/race-{trial}/.lock")
        path.write_text(json.dumps(mark_of("dead")))
        with ThreadPoolExecutor(8) as pool:
            attempts = pool.map(bucket_lock.acquire, [path] * 8, [mark_of(None)] * 8)
            (release,) = (release for release in attempts if release)
        release()
        assert not list(path.parent.glob(".lock*"))


@pytest.mark.usefixtures("quick")
def test_a_run_whose_bucket_lock_was_taken_stops() -> None:
    root = UPath("memory://locks/taken")

    def work() -> None:
        with root_lock(root, False):
            (root / ".lock").write_text(json.dumps(mark_of("another")))
            time.sleep(30)  # and is interrupted

    with pytest.raises(UserError, match="Another run has taken over"):
        work()
    assert json.loads((root / ".lock").read_text())["token"] == "another"


@pytest.mark.usefixtures("quick")
def test_a_bucket_lock_that_cannot_be_read_for_a_while_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    root = UPath("memory://locks/slow")
    read, answers = MemoryFileSystem._open, iter(["SlowDown: Please reduce your request rate", "Internal Server Error"])
    read_again = threading.Event()

    def fails(system: MemoryFileSystem, path: str, mode: str = "rb", **options: object) -> object:
        if mode == "rb" and (answer := next(answers, None)):
            raise OSError(errno.EIO, answer)
        read_again.set()
        return read(system, path, mode, **options)

    with root_lock(root, False):
        monkeypatch.setattr(MemoryFileSystem, "_open", fails)
        assert read_again.wait(30)
        (root / ".lock").write_bytes(b"damaged")
        while "token" not in (bucket_lock.read_mark(root / ".lock") or {}):  # it is renewed
            time.sleep(0.01)
    assert not (root / ".lock").exists()


@pytest.mark.usefixtures("quick")
def test_a_living_run_is_left_alone_where_a_bucket_overwrites_what_is_only_to_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As stores with S3's interface do that don't know If-None-Match."""
    write = MemoryFileSystem.pipe_file
    monkeypatch.setattr(
        MemoryFileSystem, "pipe_file", lambda self, path, value, mode="create": write(self, path, value)
    )
    root = UPath("memory://locks/overwritten")
    with root_lock(root, False):
        mine = json.loads((root / ".lock").read_text())["token"]
        with pytest.raises(UserError, match="held by process"), root_lock(root, False):
            pass
        assert json.loads((root / ".lock").read_text())["token"] == mine
    assert holder(root) is None


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a run that was killed has left its lock file."""

    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / ".lock").write_text(json.dumps(mark_of(None)))
    with root_lock(tmp_path, False):
        assert "has no locks; start no second run on it" in caplog.text
    assert not (tmp_path / ".lock").exists()


def test_a_lock_file_that_its_holder_removes_after_another_run_opened_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run would else make one of its own, and lock that."""
    lock = fcntl.flock
    removed = iter([tmp_path / ".lock"])

    def removes_it_first(*arguments: Any) -> None:
        if path := next(removed, None):
            path.unlink()
        lock(*arguments)

    monkeypatch.setattr("fcntl.flock", removes_it_first)
    with root_lock(tmp_path, False):
        assert read_json(tmp_path / ".lock")["pid"] == os.getpid()


def test_a_file_system_that_cannot_sync_folders_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As FUSE's and CIFS's can't; files are synced all the same."""
    fsync, synced = os.fsync, []

    def no_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        synced.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    root = tmp_path / "a" / "root"
    with root_lock(root, False):
        assert f"The file system of {root} can't sync folders: after a power cut files may be missing" in caplog.text
        write_json(root / "x.json", {"a": 1})
    assert synced and read_json(root / "x.json") == {"a": 1}
    caplog.clear()
    monkeypatch.setattr(os, "fsync", fsync)
    with root_lock(root, False):
        assert not caplog.text


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOTCONN])
def test_a_share_that_fails_is_one_sentence(number: int) -> None:
    with pytest.raises(
        UserError, match=rf"share fails at /mnt/x \({os.strerror(number)}\); bring it back and run the same"
    ):
        call(fail_with, OSError(number, os.strerror(number), "/mnt/x"))


def fail_with(error: OSError) -> None:
    raise error
