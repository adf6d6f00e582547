"""What an earlier start of a workflow left behind when it was killed: Snakemake's lock, and steps that are still running."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path

KUBERNETES_STATUS = Path(__file__).parents[1] / "profiles" / "kubernetes" / "status.sh"

_own_locks: dict[Path, TextIOWrapper] = {}  # open until this process ends


def remove_stale_locks(folder: Path) -> bool:
    """Remove Snakemake's locks of a folder where no workflow is running; False where one is.

    Every workflow holds a file lock that the system releases when its process ends, however it ends. A second workflow
    can't take it, changes nothing, and Snakemake then refuses it as usual.
    """
    state = folder.resolve() / ".snakemake"
    state.mkdir(exist_ok=True)
    lock = _own_locks.get(state) or (state / "alive").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process holds it, or this file system has no locks
        lock.close()
        return False
    _own_locks[state] = lock
    for stale in state.glob("locks/*.lock"):
        stale.unlink(missing_ok=True)
    return True


def wait_for_steps(folder: Path, tell: Callable[[str], object], seconds: float = 2.0) -> None:
    """Wait until the steps of an earlier start have ended, so that none is done twice at once.

    A killed Snakemake leaves its steps running: local processes, and jobs of a cluster. What they do is not lost; the
    same steps, planned again, find it and end at once. `tell` gets a sentence whenever the steps waited for are others.
    """
    told: list[str] = []
    while living := sorted([*living_processes(folder), *living_jobs(folder)]):
        if living != told:
            tell(f"Waiting for steps of an earlier start that are still running: {'; '.join(living)}.")
            told = living
        time.sleep(seconds)


def living_processes(folder: Path) -> Iterator[str]:
    """Steps that hold the lock of their file in `.snakemake/steps` (workflow/step.py): "COMMAND (process PID of HOST)"."""
    for file in (folder / ".snakemake" / "steps").glob("*"):
        try:
            with file.open() as step:
                try:
                    fcntl.flock(step, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    file.unlink()
                except BlockingIOError:
                    host, _, process = file.name.rpartition("-")
                    yield f"{step.read().strip()} (process {process} of {host})"
        except OSError:  # it has just been removed, or this file system has no locks
            continue


def living_jobs(folder: Path) -> Iterator[str]:
    """Jobs of the folder's steps that are queued or running, in SLURM and in Kubernetes: "SLURM job 12 rule_train"."""
    for line in _output("squeue", "--me", "--noheader", "--format=%i|%k|%Z").splitlines():
        job, comment, where = line.split("|", 2)
        if comment.startswith("rule_") and Path(where) == folder.resolve() and job != os.environ.get("SLURM_JOB_ID"):
            yield f"SLURM job {job} {comment}"
    for job in sorted(set(_submitted(folder / ".snakemake" / "incomplete"))):
        if job.startswith("job.batch/") and _output(KUBERNETES_STATUS, job).strip() == "running":
            yield f"Kubernetes {job}"


def _submitted(marks: Path) -> Iterator[str]:
    """Identifiers in Snakemake's marks of outputs whose jobs have not ended."""
    for mark in marks.rglob("*"):
        try:
            job = json.loads(mark.read_text()).get("external_jobid")
        except (OSError, ValueError, AttributeError):  # a folder; a mark that is half written
            continue
        if job:
            yield str(job)


def _output(*command: object) -> str:
    """What a command prints; nothing where there is no such command."""
    try:
        return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
