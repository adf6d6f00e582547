"""The modules beside the Snakefile as it imports them, and Snakemake in this process."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.served import serving

PIPELINES = Path(__file__).parents[2] / "pipelines"
sys.path.insert(0, str(PIPELINES))


@pytest.fixture(scope="session")
def pipelines() -> Path:
    """The folder of the workflow."""
    return PIPELINES


@dataclass(eq=False)
class Report(logging.Handler):
    """The jobs that Snakemake reports: how many of each rule, and by rule the shell's lines and the GPUs that each claims."""

    jobs: Counter[str] = field(default_factory=Counter)
    shell: dict[str, list[str]] = field(default_factory=dict)
    gpus: dict[str, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def emit(self, record: logging.LogRecord) -> None:
        if rule := getattr(record, "rule_name", None):
            rule = "train" if rule == "train_above" else rule  # two rules only so that z_0's denoisers start first
            self.jobs[rule] += 1
            self.shell.setdefault(rule, []).append(getattr(record, "shellcmd", None) or "")
            self.gpus.setdefault(rule, set()).add(record.resources.get("gpu", 0))  # type: ignore[attr-defined]


Snakemake = Callable[..., Report]


@pytest.fixture
def snakemake(monkeypatch: pytest.MonkeyPatch) -> Snakemake:
    """Runs the workflow of a recipe in a folder and reports its jobs; with `dry` only lists them.

    It works in this process: one for each recipe would take half a minute of imports.
    """

    def run(recipe: Path, folder: Path, *targets: str, dry: bool = False, **config: object) -> Report:
        from snakemake.api import SnakemakeApi
        from snakemake.logging import logger
        from snakemake.settings.types import ConfigSettings, DAGSettings, OutputSettings, Quietness, ResourceSettings

        report = Report()
        with monkeypatch.context() as patched:
            patched.chdir(folder)  # where Snakemake ends, it leaves us
            try:
                with SnakemakeApi(OutputSettings(dryrun=dry, quiet={Quietness.ALL})) as api:
                    workflow = api.workflow(
                        resource_settings=ResourceSettings(cores=2),
                        config_settings=ConfigSettings(config={"recipe": str(recipe), **config}),
                        snakefile=PIPELINES / "Snakefile",
                        workdir=folder,
                    )
                    dag = workflow.dag(DAGSettings(targets=set(targets), force_incomplete=True))
                    logger.addHandler(report)
                    dag.execute_workflow(executor="dryrun" if dry else "local")
            finally:
                logger.removeHandler(report)
        return report

    return run


@pytest.fixture(scope="session")
def served_bin(begin: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of programs for the workflow: the two commands without the seconds of a start, and python."""
    with serving(lambda *words: begin(*words).ended(), tmp_path_factory.mktemp("served")) as folder:
        yield folder


@pytest.fixture
def served(served_bin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of a workflow in this process are the served ones."""
    monkeypatch.setattr(sys, "executable", str(served_bin / "python"))
