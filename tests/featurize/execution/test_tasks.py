"""What a task computes with."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
from featurize.execution.tasks import call

def threads(_):
    import sys
    assert "torch" not in sys.modules
    import torch
    return torch.get_num_threads()

print(call(threads, None))
"""


@pytest.mark.parametrize("threads", ["4", None])
def test_torch_imported_by_a_task_has_one_thread(threads: str | None) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = threads
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
