"""Ctrl-C while a command, or a library that it needs later, is still being imported."""

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


IN_A_CLASS = """
import signal, sys

class CtrlC:
    def __set_name__(self, owner, name):
        signal.raise_signal(signal.SIGINT)

def read_recipe(*arguments):
    class Wrapped:  # Python 3.11 raises RuntimeError from what comes here
        attribute = CtrlC()

import {module}
{module}.{function} = read_recipe
from {program}.__main__ import main
sys.argv = ["{program}", {command!r}]
main()
"""


@pytest.mark.parametrize(
    ("program", "command", "module", "function"),
    [
        ("featurize", "plan", "featurize.cli.extraction", "read_request"),
        ("nestgen", "info", "nestgen.recipe.recipe", "load_recipe"),
    ],
)
def test_while_a_class_is_being_made_it_is_one_sentence(program: str, command: str, module: str, function: str) -> None:
    code = IN_A_CLASS.format(program=program, command=command, module=module, function=function)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 130 and len(result.stderr.split("\n")) < 4, result.stderr
    assert result.stderr.strip().startswith("interrupted")


@pytest.mark.parametrize("program", ["featurize", "nestgen"])
def test_the_module_is_the_command(program: str) -> None:
    result = subprocess.run([sys.executable, "-m", program, "--version"], capture_output=True, text=True, check=True)
    assert "version" in result.stdout
