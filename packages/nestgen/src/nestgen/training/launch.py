"""Several processes of one machine that share a training: `nestgen train --processes N`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType
from typing import IO

from nestgen.errors import UserError

LOST = 75  # exit code of a process whose partner ended; not a fault of its own
LEASH = "NESTGEN_LEASH"  # number of the pipe that breaks when the parent is gone
GRACE = 60.0  # seconds that the others have to end by themselves once one has failed


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs `nestgen ARGUMENTS` in so many processes; returns the exit code of the training.

    Each gets an equal share of the CPU's cores unless OMP_NUM_THREADS says otherwise, and a GPU of its own where there
    are any. SIGINT and SIGTERM are passed on, and the processes end by themselves when this one is gone. The meeting
    point is held by this process, at a port that the system gave it, so nobody else can be met there.
    """
    from torch.distributed import TCPStore  # takes seconds to import

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    held, leash = os.pipe()
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's word for: the launcher holds the store
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        LEASH: str(held),
    }
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo may look long for an address of the host's name
    with ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(1, processes)]
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "nestgen", *arguments],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=errors[rank - 1] if rank else None,
                stdout=subprocess.DEVNULL if rank else None,
                stdin=subprocess.DEVNULL,
                pass_fds=[held],
                start_new_session=True,  # so that Ctrl-C reaches them once, through this process
            )
            for rank in range(processes)
        ]
        os.close(held)
        try:
            codes = _wait(started)
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            os.close(leash)
        return _verdict(codes, errors)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes of all; once one has failed, the others end within GRACE, by themselves or by force."""

    def forward(number: int, frame: FrameType | None) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        failed: float | None = None
        while None in (codes := [process.poll() for process in started]):
            if failed is None and any(codes):
                failed = time.monotonic()
            if failed is not None and time.monotonic() - failed > GRACE:
                break
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return [process.returncode if process.returncode is not None else LOST for process in started]


def _verdict(codes: Sequence[int], errors: Sequence[IO[str]]) -> int:
    """The exit code of the training. Shows what another process than the first, which is heard anyway, died of."""
    culprits = [rank for rank, code in enumerate(codes) if code not in (0, LOST)]
    if not culprits:
        return max(codes)
    if 0 not in culprits:
        errors[culprits[0] - 1].seek(0)
        sys.stderr.write(errors[culprits[0] - 1].read())
    code = codes[culprits[0]]
    if code < 0:
        raise UserError(
            f"process {culprits[0]} of the training was ended by {signal.Signals(-code).name}, perhaps for want of "
            "memory; the same command goes on from the last checkpoint"
        )
    return code


def follow_the_parent() -> None:
    """In a process that `launch` started: asks it to stop once the parent is gone."""
    if (leash := os.environ.get(LEASH)) is None:
        return

    def watch() -> None:
        os.read(int(leash), 1)  # nothing is ever written: this returns when the other end is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="leash", daemon=True).start()
