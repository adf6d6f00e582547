"""Several processes of one machine that share a training: `nestgen train --processes N`.

torch's elastic launcher is not used: after Ctrl-C it gives the processes 30 seconds before it kills them, which a step
and its checkpoint may exceed, and its processes survive it when it is killed itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from nestgen.cores import cores
from nestgen.errors import UserError

LOST = 75  # exit code of a process that ended because another one did
PARENT_PIPE = "NESTGEN_PARENT_PIPE"  # number of the pipe that breaks when the parent is gone
STORE_FILE = "NESTGEN_STORE_FILE"  # where the processes tell each other their addresses
GRACE = 60.0  # seconds that the others have to end by themselves once one has failed
STOP = (
    600.0  # seconds that the step under way and its checkpoint may take after a signal: a process that hangs hears none
)
SAME = 1.0  # seconds within which two signals are one: SLURM sends them to this process and to those that it started


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs `nestgen ARGUMENTS` in so many processes; returns the exit code of the training.

    Each gets an equal share of the CPU's cores unless OMP_NUM_THREADS says otherwise, and a GPU of its own where there
    are any. SIGINT and SIGTERM are passed on, and the processes end by themselves when this one is gone.
    """
    read_end, write_end = os.pipe()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nestgen-")))
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(1, processes)]
        started: list[subprocess.Popen[bytes]] = []
        try:
            with _passing_on(started) as signalled:
                for rank in range(processes):
                    process = subprocess.Popen(
                        [sys.executable, "-m", "nestgen", *arguments],
                        env=process_environment(rank, processes, folder / "store") | {PARENT_PIPE: str(read_end)},
                        stderr=errors[rank - 1] if rank else None,
                        stdout=subprocess.DEVNULL if rank else None,
                        stdin=subprocess.DEVNULL,
                        pass_fds=[read_end],
                        start_new_session=True,  # so that Ctrl-C reaches them once, through this process
                    )
                    started.append(process)
                if signalled:
                    raise KeyboardInterrupt
                codes = _wait(started, signalled)
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            os.close(read_end)
            os.close(write_end)
        return _exit_code(codes, errors)


def process_environment(rank: int, processes: int, store: Path) -> dict[str, str]:
    """The environment of one of the processes of a training on this machine, which no other user can join or reach.

    They find each other by a file in a folder of this user's, where torch's TCPStore would listen at every address of
    the machine and let anybody write, and they listen on the loopback alone unless the environment names an interface.
    """
    defaults = {"OMP_NUM_THREADS": str(max(1, cores() // processes))}
    if sys.platform == "linux":
        defaults |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {**defaults, **os.environ, **{name: str(number) for name, number in numbers.items()}, STORE_FILE: str(store)}


@contextmanager
def _passing_on(started: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[float]]:
    """Within it SIGINT and SIGTERM go to the processes instead of this one; when each came, by time.monotonic()."""
    signalled: list[float] = []

    def forward(number: int, frame: FrameType | None) -> None:
        signalled.append(time.monotonic())
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signalled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(started: Sequence[subprocess.Popen[bytes]], signalled: Sequence[float]) -> list[int]:
    """Exit codes of all; once one has failed, the others have GRACE to end by themselves and then count as LOST.

    Raises KeyboardInterrupt at a second signal, STOP after the first one, and where that one ended a process.
    """
    failed_at: float | None = None
    while None in (codes := [process.poll() for process in started]):
        if failed_at is None and any(codes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE:
            break
        if signalled and (signalled[-1] - signalled[0] > SAME or time.monotonic() - signalled[0] > STOP):
            raise KeyboardInterrupt(
                "stopped at once, without a checkpoint of the step under way: the same command goes on from the last one"
            )
        time.sleep(0.05)
    if signalled and any(process.returncode in (-signal.SIGINT, -signal.SIGTERM) for process in started):
        raise KeyboardInterrupt  # it ended before its first step, from which on it hears signals
    return [process.returncode if process.returncode is not None else LOST for process in started]


def _exit_code(codes: Sequence[int], errors: Sequence[IO[str]]) -> int:
    """The exit code of the training: that of a killed process, else of the first that failed by itself.

    Prints the errors of that process; rank 0's are printed already.
    """
    failed = [rank for rank, code in enumerate(codes) if code not in (0, LOST)]
    if not failed:
        return max(codes)
    culprit = min(failed, key=lambda rank: (codes[rank] > 0, rank))
    if culprit:
        errors[culprit - 1].seek(0)
        sys.stderr.write(errors[culprit - 1].read())
    if (code := codes[culprit]) < 0:
        perhaps = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        raise UserError(
            f"process {culprit} of the training was ended by {signal.Signals(-code).name}{perhaps}; the same command goes on "
            "from the last checkpoint"
        )
    return code


def stop_with_the_parent() -> None:
    """In a process that `launch` started: stops it, as SIGTERM does, once the parent is gone; kills it if it hangs."""
    if (pipe := os.environ.get(PARENT_PIPE)) is None:
        return

    def watch() -> None:
        os.read(int(pipe), 1)  # nothing is ever written: this returns when the other end is closed
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()
