"""Contenders measured in turns on one machine, and the table of what they took."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import click
import psutil

Contender = Callable[[int], None]  # called with the number of the round

out_option = click.option("--out", type=click.Path(path_type=Path), help="Write the table here too (markdown).")
rounds_option = click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Medians of.")


@dataclass(frozen=True)
class Measured:
    """Medians over the rounds: seconds on the clock, and of processor time in this process and its children."""

    wall: float
    cpu: float
    spread: float  # (slowest - fastest) / median, of the clock


def take_turns(contenders: Mapping[str, Contender], rounds: int) -> dict[str, Measured]:
    """Each contender once a round, in an order that turns by one every round, so that what else the machine does and
    whatever stays warm falls on all of them alike."""
    names = list(contenders)
    walls: dict[str, list[float]] = {name: [] for name in names}
    cpus: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            cpu, wall = _cpu_seconds(), time.perf_counter()
            contenders[name](turn)
            walls[name].append(time.perf_counter() - wall)
            cpus[name].append(_cpu_seconds() - cpu)
            click.echo(f"round {turn + 1}/{rounds}  {name}: {walls[name][-1]:.3f} s", err=True)
    return {
        name: Measured(
            statistics.median(walls[name]),
            statistics.median(cpus[name]),
            (max(walls[name]) - min(walls[name])) / statistics.median(walls[name]),
        )
        for name in names
    }


def _cpu_seconds() -> float:
    """Of this process and all its descendants, ended or not."""
    spent = os.times()
    total = spent.user + spent.system + spent.children_user + spent.children_system
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def command(folder: Path, module: str, *words: str, **environment: str) -> float:
    """Run a command in the folder, with further variables in its environment; its seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", module, *words], cwd=folder, check=True, env=os.environ | environment)
    return time.perf_counter() - began


def table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Markdown, columns padded so that it reads as plain text too."""
    cells = [[str(cell) for cell in line] for line in [head, *lines]]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    padded = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])


def report(title: str, body: str, libraries: Sequence[str], out: Path | None) -> None:
    """Print a section with the machine it was measured on, and write it when asked to."""
    text = f"## {title}\n\n{body}\n\n*{machine(libraries)}*\n"
    click.echo(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return str(names[0]).strip() if names else platform.processor() or platform.machine()


def machine(libraries: Sequence[str]) -> str:
    """Processor, cores, load, date and versions."""
    load = ", ".join(f"{value:.1f}" for value in psutil.getloadavg())
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB; load {load} at the end; {date.today().isoformat()}; "
        f"Python {platform.python_version()}, {versions}"
    )


def ratio(first: float, second: float) -> str:
    """How many times the second goes into the first; a dash where a run was too short to be timed."""
    if not second:
        return "-"
    value = first / second
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def python_of(checkout: Path) -> str:
    """The interpreter that runs an earlier commit: of its own environment if it has one, whose packages had other names."""
    own = checkout / ".venv" / "bin" / "python"
    return str(own) if own.is_file() else sys.executable
