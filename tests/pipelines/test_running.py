"""What a killed workflow leaves running: its steps are waited for, and each step of several GPUs has one for itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.pipelines.conftest import PIPELINES


@contextmanager
def step(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A step that has begun: its command prints a line and ends when its input does."""
    code = "import os, sys; print(os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True); sys.stdin.read()"
    command = [sys.executable, "-IS", PIPELINES / "workflow/step.py", *words, sys.executable, "-c", code]
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as begun:
        yield begun


def test_a_step_that_lives_on_is_waited_for(tmp_path: Path) -> None:
    from workflow.running import living_processes, wait_for_steps

    told: list[str] = []
    with step(tmp_path) as begun:
        assert begun.stdin is not None and begun.stdout is not None
        begun.stdout.readline()
        waiting = threading.Thread(target=wait_for_steps, args=(tmp_path, told.append, 0.01))
        waiting.start()
        while not told and waiting.is_alive():
            time.sleep(0.01)
        assert waiting.is_alive()
        assert f"{Path(sys.executable).name} -c import" in told[0] and f" (process {begun.pid} of " in told[0]
        begun.stdin.close()
        waiting.join(30)
        assert not waiting.is_alive()
    assert not list(living_processes(tmp_path))
    assert not list((tmp_path / ".snakemake/steps").iterdir())


def test_jobs_of_the_folder_that_are_still_in_slurm_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workflow.running import living_jobs

    program = tmp_path / "squeue"
    queue = [
        f"7|rule_train|{tmp_path}-other",
        f"8|(null)|{tmp_path}",
        f"9|rule_train|{tmp_path}",
        f"10|rule_train|{tmp_path}",
    ]
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in queue))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "10")
    assert list(living_jobs(tmp_path)) == ["SLURM job 9 rule_train"]
    program.write_text("#!/bin/sh\n")
    assert not list(living_jobs(tmp_path))


def test_a_submitted_pod_that_is_still_running_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod of the workflow that is evicted starts again, while its Jobs go on."""
    from workflow.running import living_jobs

    marks = tmp_path / ".snakemake/incomplete"
    marks.mkdir(parents=True)
    (marks / "one").write_text(json.dumps({"external_jobid": "job.batch/nested-job-7"}))
    (marks / "local").write_text(json.dumps({"external_jobid": None}))
    (marks / "torn").write_text('{"external')
    program = tmp_path / "kubectl"
    program.write_text("#!/bin/sh\nprintf 'there  '\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert list(living_jobs(tmp_path)) == ["Kubernetes job.batch/nested-job-7"]
    program.write_text("#!/bin/sh\nprintf 'there Complete '\n")
    assert not list(living_jobs(tmp_path))


def test_each_step_has_a_gpu_for_itself(tmp_path: Path) -> None:
    with step(tmp_path, "--gpus", "2") as one, step(tmp_path, "--gpus", "2") as other:
        assert one.stdout is not None and other.stdout is not None
        assert sorted([one.stdout.readline(), other.stdout.readline()]) == ["0\n", "1\n"]
    with step(tmp_path, "--gpus", "2") as again:
        assert again.stdout is not None and again.stdout.readline() == "0\n"


def test_a_step_without_a_program_is_a_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, PIPELINES / "workflow/step.py", "no-such-program"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "no-such-program: No such file or directory\n")


@pytest.mark.parametrize(
    ("line", "does"),
    [
        ("featurize extract 'a b'", "featurize extract|a b"),
        ("OMP_NUM_THREADS=3 on_gpu nestgen sample", "nestgen sample 3"),
        ("train --level 1", "launcher -m nestgen train"),
    ],
)
def test_commands_of_the_rules_are_functions_of_the_shell(tmp_path: Path, line: str, does: str) -> None:
    """With an environment and a clone whose paths hold spaces and quotes."""
    from workflow.steps import shell_functions

    programs = tmp_path / "an 'environment' {x}"
    programs.mkdir()
    (programs / "python").symlink_to(sys.executable)
    for name in ("featurize", "nestgen", "launcher"):
        (programs / name).write_text(
            '#!/bin/sh\nprintf \'%s|\' "$(basename "$0") $1" "$2"\necho " $OMP_NUM_THREADS $*"\n'
        )
        (programs / name).chmod(0o755)
    prefix = shell_functions(programs, 0, "launcher" if line.startswith("train") else None)
    done = subprocess.run(
        ["bash", "-c", prefix.replace("{{", "{").replace("}}", "}") + line],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(word in done.stdout for word in does.replace("|", " ").split()), done.stdout
