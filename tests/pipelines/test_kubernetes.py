"""The scripts between Snakemake's generic executor and kubectl, with a kubectl that only notes what it is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.pipelines.conftest import PIPELINES

PROFILE = PIPELINES / "profiles" / "kubernetes"


@pytest.fixture
def kubectl(tmp_path: Path) -> Path:
    """Prints what stands in `answer`, and keeps its words and its input."""
    program = tmp_path / "kubectl"
    program.write_text('#!/bin/sh\ncd "$(dirname "$0")"\necho "$@" > words\ncat > input\ncat answer\n')
    program.chmod(0o755)
    return tmp_path


def script(kubectl: Path, name: str, *words: str, answer: str = "") -> str:
    (kubectl / "answer").write_text(answer)
    environment = os.environ | {
        "PATH": f"{kubectl}:{os.environ['PATH']}",
        "NESTED_IMAGE": "r.example/n:1",
        "NESTED_CLAIM": "c",
    }
    program = [sys.executable, PROFILE / name] if name.endswith(".py") else [PROFILE / name]
    done = subprocess.run([*program, *words], env=environment, capture_output=True, text=True, check=True, input="")
    return done.stdout.strip()


def test_a_job_of_the_workflow_becomes_a_pod(kubectl: Path) -> None:
    job_script = "/shared/IMAGE SCRIPT|'a'&\\1/.snakemake/tmp.1/job.sh"
    asked = script(kubectl, "submit.py", "8", "32000", "1", job_script, answer="job.batch/nested-job-7\n")
    assert asked == "job.batch/nested-job-7"
    assert (kubectl / "words").read_text().strip() == "create -f - -o name"
    spec = YAML(typ="safe").load(kubectl / "input")["spec"]["template"]["spec"]
    [container] = spec["containers"]
    assert (container["image"], container["command"]) == ("r.example/n:1", ["sh", job_script])
    assert container["resources"]["limits"] == {"memory": "32000M", "nvidia.com/gpu": 1}
    assert container["resources"]["requests"] == {"cpu": 8, "memory": "32000M"}
    assert spec["volumes"][0]["persistentVolumeClaim"] == {"claimName": "c"}


def test_a_job_without_a_gpu_asks_for_none(kubectl: Path) -> None:
    script(kubectl, "submit.py", "1", "4000", "0", "job.sh", answer="job.batch/nested-job-8\n")
    [container] = YAML(typ="safe").load(kubectl / "input")["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "4000M"}


@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        ("there  ", "running"),
        ("there Complete ", "success"),
        ("there SuccessCriteriaMet Complete ", "success"),
        ("there FailureTarget Failed ", "failed"),
        ("", "failed"),
    ],
)
def test_its_state_is_one_of_three_words(kubectl: Path, conditions: str, state: str) -> None:
    assert script(kubectl, "status.sh", "job.batch/nested-job-7", answer=conditions) == state


def test_jobs_are_cancelled_together(kubectl: Path) -> None:
    script(kubectl, "cancel.sh", "job.batch/a", "job.batch/b")
    assert (kubectl / "words").read_text().split()[-2:] == ["job.batch/a", "job.batch/b"]


def test_the_profile_s_rules_are_the_workflow_s() -> None:
    """As on SLURM: a rule that is renamed would lose its cores and hours silently."""
    text = (PIPELINES / "Snakefile").read_text()
    for name in ("kubernetes", "slurm"):
        profile = YAML(typ="safe").load(PIPELINES / "profiles" / name / "config.yaml")
        for rule in {**profile.get("set-resources", {}), **profile["set-threads"]}:
            assert f"rule {rule}:" in text or f"use rule train as {rule} with:" in text
    workflow, *_ = [one for one in YAML(typ="safe").load_all(PROFILE / "workflow.yaml") if one["kind"] == "Job"]
    assert (
        PIPELINES.parent / workflow["spec"]["template"]["spec"]["containers"][0]["args"][1].partition("=")[2]
    ).is_dir()
