"""The workflow on a real SLURM of one node, which this file sets up: Debian's slurm-wlm, as root, on a machine without one.

Skipped where that can't be done. To have it: `apt-get install slurm-wlm munge`, `pip install snakemake-executor-plugin-slurm`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipelines.conftest import PIPELINES
from tests.pipelines.test_run import write_recipe

CONFIGURATION = Path("/etc/slurm/slurm.conf")
PROFILE = PIPELINES / "profiles" / "slurm"


def missing() -> str:
    """Why no SLURM can be set up here; nothing if it can."""
    if os.geteuid():
        return "not root"
    for program in ("slurmctld", "slurmd", "munged", "sbatch"):
        if not shutil.which(program):
            return f"no {program}"
    if not importlib.util.find_spec("snakemake_executor_plugin_slurm"):
        return "no snakemake-executor-plugin-slurm"
    return "there is a SLURM already" if CONFIGURATION.exists() else ""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A SLURM of this machine as its only node, without accounting and without GPUs; two jobs of eight cores fit."""
    if why := missing():
        pytest.skip(f"no SLURM can be set up: {why}")
    state, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
    settings = {
        "ClusterName": "one",
        "SlurmctldHost": host,
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "StateSaveLocation": state,
        "SlurmdSpoolDir": state,
        "SlurmctldPidFile": state / "slurmctld.pid",
        "SlurmdPidFile": state / "slurmd.pid",
        "SlurmctldLogFile": state / "slurmctld.log",
        "SlurmdLogFile": state / "slurmd.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "AccountingStorageType": "accounting_storage/none",
        "SlurmdParameters": "config_overrides",  # more cores than there are
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [f"NodeName={host} CPUs=16 RealMemory=64000", f"PartitionName=main Nodes={host} Default=YES"]
    CONFIGURATION.write_text("\n".join(lines) + "\n")
    running = Path("/run/munge")
    began_munge = not list(running.glob("munge.socket*"))
    try:
        if began_munge:
            running.mkdir(exist_ok=True)
            shutil.chown(running, "munge", "munge")
            subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", shutil.which("munged") or ""], check=True)
        subprocess.run(["slurmctld"], check=True)
        subprocess.run(["slurmd"], check=True)
        wait_until(lambda: "idle" in printed("sinfo", "--noheader", "--format=%T"))
        yield
    finally:
        subprocess.run(["scontrol", "shutdown"], check=False)
        if began_munge:
            subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "munged --stop"], check=False)
        CONFIGURATION.unlink()


def printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def wait_until(holds: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.2)


def begin(folder: Path) -> subprocess.Popen[str]:
    """As docs/workflow.md has it, on a cluster without GPUs."""
    command = [sys.executable, PIPELINES / "run.py", write_recipe(folder), "--directory", folder, "--profile", PROFILE]
    return subprocess.Popen(
        [*map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_workflow_ends_after_its_head_was_killed_and_submits_nothing_twice(slurm: None, tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    begun = begin(folder)
    wait_until(lambda: printed("squeue", "--noheader", "--format=%i"), 300)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    again = begin(folder)
    told, _ = again.communicate(timeout=3000)
    assert again.returncode == 0, told
    assert "Waiting for steps of an earlier start that are still running: SLURM job 1 rule_extract" in told
    assert (folder / "report.html").is_file()
