"""Ctrl-C while a command is still being imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

INTERRUPTED = """
import signal, sys

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
from {program}.__main__ import main
main()
"""


@pytest.mark.parametrize("program", ["featurize", "nestgen"])
def test_it_is_one_sentence(program: str) -> None:
    result = subprocess.run([sys.executable, "-c", INTERRUPTED.format(program=program)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "interrupted before anything began\n")


@pytest.mark.parametrize("program", ["featurize", "nestgen"])
def test_the_module_is_the_command(program: str) -> None:
    result = subprocess.run([sys.executable, "-m", program, "--version"], capture_output=True, text=True, check=True)
    assert "version" in result.stdout
