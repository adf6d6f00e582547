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


WITHIN = """
import signal, sys

def in_a_class(*arguments):
    class Attribute:
        def __set_name__(self, owner, name):
            signal.raise_signal(signal.SIGINT)

    class Wrapped:  # Python 3.11 raises RuntimeError from what comes here
        attribute = Attribute()

def in_a_library(*arguments):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("something else is wrong") from None

import {module}
{module}.{function} = {place}
from {program}.__main__ import main
sys.argv = ["{program}", {command!r}]
main()
"""


@pytest.mark.parametrize("place", ["in_a_class", "in_a_library"])
@pytest.mark.parametrize(
    ("program", "command", "module", "function"),
    [
        ("featurize", "plan", "featurize.cli.extraction", "read_request"),
        ("nestgen", "info", "nestgen.recipe.recipe", "load_recipe"),
    ],
)
def test_where_libraries_make_another_error_of_it_it_is_one_sentence(
    program: str, command: str, module: str, function: str, place: str
) -> None:
    code = WITHIN.format(program=program, command=command, module=module, function=function, place=place)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 130 and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stderr.strip().startswith("interrupted")


@pytest.mark.parametrize("program", ["featurize", "nestgen"])
def test_the_module_is_the_command(program: str) -> None:
    result = subprocess.run([sys.executable, "-m", program, "--version"], capture_output=True, text=True, check=True)
    assert "version" in result.stdout
