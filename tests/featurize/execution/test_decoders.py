"""Decoders: each job once and in order through slots that are used again, a dead process named and replaced, none left behind."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import pytest

from featurize.errors import UserError
from featurize.execution import decoders
from featurize.execution.decoders import SLOTS_PER_DECODER, decoded, end_decoders
from featurize.execution.devices import views_per_batch
from featurize.execution.local import MAX_DEATHS
from tests.featurize.execution.pids import left_once_killed


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    end_decoders()


def fill(number: int, slot: np.ndarray) -> int:
    slot[:1000] = number
    return os.getpid()


def dies_once(mark: Path, slot: np.ndarray) -> int:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return fill(7, slot)


def dies(number: int, slot: np.ndarray) -> None:
    os._exit(7)


def fails(number: int, slot: np.ndarray) -> int:
    if number == 3:
        raise UserError("three is too many")
    return number


def sleeps(seconds: float, slot: np.ndarray) -> None:
    time.sleep(seconds)


def test_jobs_are_done_in_order_in_other_processes_through_slots_that_are_used_again() -> None:
    found: dict[str, list[int]] = {}

    def take(name: str, numbers: range) -> None:
        for number, (pid, slot) in zip(numbers, decoded(fill, numbers, 2), strict=True):
            assert (slot[:1000] == number).all()
            found.setdefault(name, []).append(pid)

    callers = [threading.Thread(target=take, args=(f"{start}", range(start, start + 20))) for start in (0, 100)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    pids = {pid for own in found.values() for pid in own}
    assert [len(own) for own in found.values()] == [20, 20]
    assert 1 <= len(pids) <= 2 and os.getpid() not in pids
    for _, slot in decoded(fill, [200], 2):  # what nobody takes any more comes back
        assert slot[0] == 200
        break
    own = decoders._decoders
    assert own is not None and own.memory.shape[0] == 2 * SLOTS_PER_DECODER
    end_decoders()
    assert own.free.qsize() == 2 * SLOTS_PER_DECODER
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_a_killed_decoder_is_named_and_its_job_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        slots = [slot[0] for _, slot in decoded(dies_once, [tmp_path / "a", tmp_path / "b"], 1)]
    assert slots == [7, 7]
    assert [message.partition("(")[0] for message in caplog.messages] == ["Decoder 1 "] * 2
    assert all("died (signal SIGKILL); its images are decoded again" in message for message in caplog.messages)


def test_decoders_that_die_again_and_again_stop_the_run() -> None:
    with pytest.raises(
        UserError, match=rf"died \(exit code 7\); {MAX_DEATHS} decoders died over.*with fewer --decoders"
    ):
        list(decoded(dies, [0], 1))
    assert [result for result, _ in decoded(fails, [4], 1)] == [4]


def test_an_error_in_a_job_is_the_callers() -> None:
    with pytest.raises(UserError, match="three is too many"):
        list(decoded(fails, range(9), 1))
    assert [result for result, _ in decoded(fails, [4, 5, 6], 1)] == [4, 5, 6]


def test_where_no_process_may_be_started_threads_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a worker of Dask's nanny."""
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    assert [(pid, slot[0]) for pid, slot in decoded(fill, range(9), 2)] == [(os.getpid(), n) for n in range(9)]


def test_decoders_end_with_their_process(fork: Callable[..., BaseProcess], tmp_path: Path) -> None:
    code = """
from pathlib import Path
from featurize.execution.decoders import decoded
from tests.featurize.execution.test_decoders import fill, sleeps
pids = {pid for pid, _ in decoded(fill, range(8), 2)}
Path(out, "part").write_text(" ".join(map(str, pids)))
Path(out, "part").rename(Path(out, "pids"))
list(decoded(sleeps, [60.0], 2))
"""
    assert not left_once_killed(fork(code, out=str(tmp_path)), tmp_path)


@pytest.mark.parametrize(
    ("memory", "views", "side", "batch"),
    [
        (139 << 30, 2048, 224, 256),
        (24 << 30, 2048, 256, 64),
        (139 << 30, 40, 256, 64),
        (4 << 30, 2048, 256, 32),
        (139 << 30, 2048, 512, 64),
        (24 << 30, 2048, 512, 16),
        (4 << 30, 2048, 512, 8),
        (4 << 30, 1, 4096, 2),
    ],
)
def test_a_gpus_batches_depend_on_its_memory_and_on_the_task(
    monkeypatch: pytest.MonkeyPatch, memory: int, views: int, side: int, batch: int
) -> None:
    from types import SimpleNamespace

    import torch

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    assert views_per_batch("cuda:0", 32, views, side) == batch
    assert views_per_batch("cpu", 32, views, side) == 32
