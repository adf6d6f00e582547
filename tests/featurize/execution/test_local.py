"""Local worker processes: every task once, a dead worker named and replaced, none left behind."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from featurize.errors import UserError
from featurize.execution.devices import cores, device_of_worker
from featurize.execution.engine import engine
from featurize.execution.interrupt import SAME, finishing_tasks
from featurize.execution.local import MAX_DEATHS, _serve
from featurize.execution.tasks import Run, in_order, ordered_map, run_here
from tests.featurize.execution.pids import left_once_killed


def square(number: int) -> int:
    return number * number


def process_of(number: int) -> int:
    return os.getpid()


def dies_once(mark: Path) -> str:
    """Killed the first time, done the second."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return mark.name


def dies(number: int) -> None:
    os._exit(7)


def fails(number: int) -> int:
    if number == 2:
        raise ValueError("two is too many")
    return number


class Unsendable(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def fails_oddly(number: int) -> None:
    raise Unsendable(1, 2)


def no_space(number: int) -> None:
    raise OSError(28, "No space left on device", "/disk")


def sleeps(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_each_task_is_done_once_and_processes_are_used_again() -> None:
    with engine(2, None) as run:
        assert sorted(run(square, range(20))) == [(number, number * number) for number in range(20)]
        assert list(ordered_map(run)(square, iter(range(7)))) == [square(number) for number in range(7)]
        first = {found for _, found in run(process_of, range(8))}
        assert {found for _, found in run(process_of, range(8))} <= first
        assert len(first) <= 2 and os.getpid() not in first
        children = {child.pid for child in psutil.Process().children(recursive=True)}
        assert first <= children
    assert not [pid for pid in first if psutil.pid_exists(pid)]
    with engine(2, None) as run:
        assert list(run(square, [])) == []
    with engine(0, None) as run:
        assert run is run_here
        assert list(in_order(run(square, [3]))) == [9]


def test_a_killed_worker_is_named_and_its_task_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), engine(2, None) as run:
        found = {result for _, result in run(dies_once, [tmp_path / "a", tmp_path / "b", tmp_path / "c"])}
    assert found == {"a", "b", "c"}
    assert sum("died (signal SIGKILL); its block is done again" in message for message in caplog.messages) == 3
    assert caplog.messages[0].startswith("Worker ")


def test_workers_that_die_again_and_again_stop_the_run() -> None:
    with engine(1, None) as run:
        with pytest.raises(
            UserError, match=rf"died \(exit code 7\); {MAX_DEATHS} workers died over one block.*fewer --w"
        ):
            list(run(dies, range(3)))
        assert list(run(square, [4])) == [(0, 16)]  # the next run has workers of its own


def test_an_error_in_a_task_is_the_runs_with_its_traceback() -> None:
    with engine(2, None) as run:
        with pytest.raises(ValueError, match="two is too many") as raised:
            list(run(fails, range(5)))
        assert any("in fails" in note for note in raised.value.__notes__)
        with pytest.raises(RuntimeError, match="Unsendable: 1 and 2"):
            list(run(fails_oddly, range(2)))
        with pytest.raises(UserError, match="No space is left on the disk"):
            list(run(no_space, range(2)))
        # What a run that ended early had under way does not turn up in the next.
        for _ in run(sleeps, [0.0, 0.05, 0.05]):
            break
        assert sorted(run(square, range(4))) == [(0, 0), (1, 1), (2, 4), (3, 9)]


def test_ctrl_c_finishes_what_is_under_way_and_the_second_stops_at_once() -> None:
    found: list[float] = []

    def interrupted(signals: int, run: Run, tasks: list[float], pause: float = 0.0) -> None:
        with finishing_tasks():
            for _, seconds in run(sleeps, tasks):
                for _ in range(0 if found else signals):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(pause)
                found.append(seconds)

    with engine(2, None) as run, pytest.raises(KeyboardInterrupt):
        interrupted(1, run, [0.1] * 50)
    assert 1 <= len(found) <= 4
    found.clear()
    with engine(2, None) as run, pytest.raises(KeyboardInterrupt):
        interrupted(2, run, [0.1] * 50)  # within a moment, as SLURM sends them
    assert found
    begun = time.monotonic()
    found.clear()
    with engine(1, None) as run, pytest.raises(KeyboardInterrupt):
        interrupted(2, run, [0.0, 60.0], pause=1.1 * SAME)
    assert time.monotonic() - begun < 30


def test_a_signal_to_all_processes_reaches_the_main_one_only() -> None:
    with engine(1, None) as run:
        ((_, worker),) = run(process_of, [0])
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
        assert list(run(process_of, [0])) == [(0, worker)]


def test_workers_end_with_the_main_process(fork: Callable[..., BaseProcess], tmp_path: Path) -> None:
    code = """
from pathlib import Path
from featurize.execution.engine import engine
from tests.featurize.execution.test_local import process_of, sleeps
with engine(2, None) as run:
    pids = {pid for _, pid in run(process_of, range(8))}
    Path(out, "part").write_text(" ".join(map(str, pids)))
    Path(out, "part").rename(Path(out, "pids"))
    list(run(sleeps, [60.0]))
"""
    assert not left_once_killed(fork(code, out=str(tmp_path)), tmp_path)


def test_a_worker_whose_pipe_is_closed_ends_without_a_word() -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, 0))
    process.start()
    there.close()
    here.close()
    process.join(60)
    assert process.exitcode == 0  # an error would be 1, with its traceback


def test_cores_heed_a_containers_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featurize.execution import devices

    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    assert cores() == 8
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cores() == 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores() == 8
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores() == 3


@pytest.mark.parametrize(("file", "count"), [("nvidiactl", 1), ("dxg", 1), ("kfd", 1), ("null", 0)])
def test_gpus_are_counted_where_a_driver_is(
    file: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In WSL2 the only file is /dev/dxg. The torch that is imported to count is one that finds a GPU."""
    from featurize.execution import devices

    (tmp_path / "torch.py").write_text("class cuda: device_count = lambda: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == f"/dev/{file}")
    assert devices.gpus.__wrapped__() == count


def test_workers_take_the_gpus_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    from featurize.execution import devices

    monkeypatch.setattr(devices, "gpus", lambda: 2)
    monkeypatch.setattr(devices, "_worker_number", None)
    assert device_of_worker() == "cuda:0"
    for number, device in enumerate(("cuda:0", "cuda:1", "cuda:0")):
        devices.become_worker(number)
        assert device_of_worker() == device
    devices.become_worker(0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says which signals a process blocks")
def test_ctrl_c_never_meets_the_fork_server_as_it_imports() -> None:
    code = (
        "from multiprocessing import forkserver\n"
        "from featurize.execution.local import local_workers\n"
        "with local_workers(1, ()) as run:\n"
        "    assert dict(run(abs, [-1])) == {0: 1}\n"
        "    print(open(f'/proc/{forkserver._forkserver._forkserver_pid}/status').read())\n"
    )
    status = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    (blocked,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")]
    assert int(blocked, 16) >> (signal.SIGINT - 1) & 1
