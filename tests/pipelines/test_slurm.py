"""The workflow on a real SLURM of one node, which this file sets up: Debian's slurm-wlm, as root, on a machine without one.

Skipped where that can't be done. To have it: `apt-get install slurm-wlm munge`, and `snakemake-executor-plugin-slurm` and
`dask-jobqueue` in the environment, or in another folder of PYTHONPATH:
`uv pip install --target /tmp/slurm snakemake-executor-plugin-slurm dask-jobqueue`.
"""

from __future__ import annotations

import importlib.util
import os
import re
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
DEVICES = CONFIGURATION.with_name("gres.conf")
PROFILE = PIPELINES / "profiles" / "slurm"


def missing() -> str:
    """Why no SLURM can be set up here; nothing if it can."""
    if os.geteuid():
        return "not root"
    for program in ("slurmctld", "slurmd", "munged", "sbatch"):
        if not shutil.which(program):
            return f"no {program}"
    for module in ("snakemake_executor_plugin_slurm", "dask_jobqueue"):
        if not importlib.util.find_spec(module):
            return f"no {module.replace('_', '-')}"
    return "there is a SLURM already" if CONFIGURATION.exists() else ""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A SLURM of this machine as its only node, without accounting; two jobs of eight cores and a GPU fit, by its word."""
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
        "GresTypes": "gpu",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [f"NodeName={host} CPUs=16 RealMemory=64000 Gres=gpu:2", f"PartitionName=gpu Nodes={host} Default=YES"]
    CONFIGURATION.write_text("\n".join(lines) + "\n")
    DEVICES.write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # counted, and never opened
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
        DEVICES.unlink()


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
    wait_until(lambda: begun.poll() is not None or printed("squeue", "--noheader", "--format=%i"), 300)
    assert begun.poll() is None, begun.communicate()[0]
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    again = begin(folder)
    told, _ = again.communicate(timeout=3000)
    assert again.returncode == 0, told
    assert "Waiting for steps of an earlier start that are still running: SLURM job 1 rule_extract" in told
    assert (folder / "report.html").is_file()


def test_an_extraction_by_jobs_of_dask_as_the_page_has_it(slurm: None, tmp_path: Path) -> None:
    """cluster.py and the commands of docs/cluster.md, but for the images, the encoder and where the store is."""
    page = (PIPELINES.parent / "docs" / "cluster.md").read_text(encoding="utf-8")
    script, commands = re.findall(
        r"^```(?:python|bash)\n(.*?)^```", page.split("## SLURM\n")[1], re.MULTILINE | re.DOTALL
    )[:2]
    (tmp_path / "cluster.py").write_text(script)
    lines = [line for line in commands.splitlines() if not line.startswith("pip ")]
    told = re.sub(
        r"imagenet:\S+ --recipe \S+ --out \S+", "scenes:16 --limit 200 --encoder tiny --out root", "\n".join(lines)
    )
    assert "scenes:16" in told and "kill %1" in told
    # `set -m`: jobs have numbers, as in a terminal. The page's reader types the second line once the first has begun.
    begun = "until grep -q tcp:// cluster.txt; do sleep 0.2; done"
    told = told.replace("cluster.py &", f"cluster.py > cluster.txt &\n{begun}")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"set -em\n{told}"],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob("slurm-*.out")), "no job has run"
    subprocess.run([sys.executable, "-m", "featurize", "verify", "root"], cwd=tmp_path, check=True)
    wait_until(
        lambda: not printed("squeue", "--noheader", "--states=RUNNING,PENDING", "--format=%i")
    )  # closed with the cluster
