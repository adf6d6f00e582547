"""The script that docs/cluster.md gives for SLURM, with a cluster that only says what it is told."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"
STANDS_IN = """
class SLURMCluster:
    scheduler_address = "tcp://login:8786"
    def __init__(self, **options): pass
    def adapt(self, **options): pass
    def __enter__(self): return self
    def __exit__(self, *error): print("closed", flush=True)
"""


def test_it_runs_in_the_background_until_it_is_killed_and_closes_the_cluster(tmp_path: Path) -> None:
    [script] = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        if "SLURMCluster" in block
    ]
    (tmp_path / "dask_jobqueue.py").write_text(STANDS_IN)
    (tmp_path / "cluster.py").write_text(script)
    with subprocess.Popen(
        [sys.executable, "cluster.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as begun:
        assert begun.stdout is not None
        assert begun.stdout.readline() == "tcp://login:8786\n"
        begun.send_signal(signal.SIGTERM)
        assert begun.stdout.read() == "closed\n"
    assert begun.returncode == 0
