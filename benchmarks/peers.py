"""Environments of the peers' own: their requirements don't fit the project's. Built by uv in build/benchmarks/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

FOLDER = Path(__file__).parent / "peers"
BUILD = Path(__file__).parents[1] / "build" / "benchmarks"

peers_option = click.option(
    "--peers/--no-peers", default=True, help="Measure what needs an environment of its own as well."
)


def python_of(peer: str) -> Path:
    """The interpreter of the peer's environment; it is built from peers/<peer>.txt when it is not there."""
    environment = BUILD / peer
    python = environment / "bin" / "python"
    if not (environment / "complete").exists():
        uv = Path(sys.executable).with_name("uv")
        tool = str(uv) if uv.exists() else shutil.which("uv")
        if tool is None:
            raise click.ClickException("uv is not there; `make .venv` installs it.")
        click.echo(f"building {environment} ...", err=True)
        subprocess.run([tool, "venv", "--quiet", "--clear", "--python", sys.executable, environment], check=True)
        requirements = FOLDER / f"{peer}.txt"
        # Without --no-config the pins of the workspace would hold here too.
        command = [tool, "pip", "install", "--no-config", "--quiet", "--python", python, "-r", requirements]
        subprocess.run(command, check=True)
        (environment / "complete").touch()
    return python


@contextmanager
def peer_process(peer: str, *arguments: object) -> Iterator[Callable[..., None]]:
    """peers/<peer>.py running in its environment, ready; calling what it yields sends a line and waits for the answer."""
    process = subprocess.Popen(
        [python_of(peer), FOLDER / f"{peer}.py", *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None

    def answer() -> None:
        if not process.stdout.readline():
            raise click.ClickException(f"{peer}'s process ended early; its message stands above.")

    def ask(*words: object) -> None:
        process.stdin.write(" ".join(map(str, words)) + "\n")
        process.stdin.flush()
        answer()

    try:
        answer()
        yield ask
    finally:
        process.stdin.close()
        process.wait()
