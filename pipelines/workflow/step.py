"""`step.py [--gpus N] COMMAND...`: becomes the command of a step, which until its end holds the lock of a file of its own.

So a workflow that is started again knows which steps of a killed one are still running (workflow/running.py). With
`--gpus N` the step also takes one of N GPUs for itself. Standard library only, as every step begins here.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import sys
import tempfile
from pathlib import Path

STATE = Path(".snakemake")


def main(words: list[str]) -> None:
    """Replace this process by the command."""
    if words[0] == "--gpus":
        take_gpu(int(words[1]))
        words = words[2:]
    held = hold(STATE / "steps" / f"{socket.gethostname()}-{os.getpid()}")
    if held is not None:
        os.write(held, " ".join([os.path.basename(words[0]), *words[1:4]]).encode(errors="replace"))
    try:
        os.execvp(words[0], words)
    except OSError as error:
        sys.exit(f"{words[0]}: {error.strerror}")


def hold(file: Path) -> int | None:
    """Lock a file for as long as this process lives, whatever it becomes: the descriptor, or None where another holds it.

    None as well on a file system without locks.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another holds it, or this file system has no locks
        os.close(descriptor)
        return None
    os.set_inheritable(descriptor, True)
    return descriptor


def take_gpu(count: int) -> None:
    """Let this process see the first GPU that no other step holds. Snakemake runs no more such steps than there are GPUs."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else [str(number) for number in range(count)]
    # On a disk of this machine, whose GPUs they are: that of the workflow may be a network's, and have no locks.
    workflow = hashlib.sha256(os.fsencode(os.getcwd())).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"nested-gpus-{os.getuid()}" / workflow
    for gpu in gpus[:count]:
        if hold(folder / gpu.replace("/", "-")) is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            return


if __name__ == "__main__":
    main(sys.argv[1:])
