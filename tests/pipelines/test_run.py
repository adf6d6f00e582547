"""`make run`: told as a story, killed at any time and started again to the same end, with strings that a shell would run."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.conftest import PIPELINES, Snakemake

HOSTILE = "v$(touch X) 's & IMAGE|\"`touch X`;touch X"
TINY: dict[str, Any] = {
    "name": "tiny",
    "features": {"source": "scenes:16", "out": "stores/train", "encoder": "tiny", "z0": "pixels:16", "limit": 24},
    "levels": [{"shape": "16x16x3", "patch": 4}, {"shape": "2x2x8", "sigma": 0.5}],
    "denoiser": {"size": "nano"},
    "training": {"steps": 4, "batch": 8, "warmup": 2, "checkpoint_every": 2, "preview": 0},
    "sampling": {"steps": 2, "batch": 12},
    "evaluation": {"count": 12},
}
# The driver in a process of its own, whose commands are the served ones.
APART = (
    f"import sys; sys.path.insert(0, {str(PIPELINES)!r}); sys.executable = sys.argv.pop(1); "
    "from workflow.run import main; main()"
)
KILLS = int(os.environ.get("NESTED_TEST_KILLS", "1"))  # at random times


def write_recipe(folder: Path, **changes: Any) -> Path:
    """The recipe in the folder, which is made where it is not there; as it is, where it is."""
    folder.mkdir(exist_ok=True)
    recipe = folder / "tiny.yaml"
    if not recipe.exists():
        recipe.write_text(json.dumps(TINY | changes))
    return recipe


def begin(folder: Path, served_bin: Path, *words: str, **changes: Any) -> subprocess.Popen[str]:
    """`make run` of the recipe, begun in a folder."""
    recipe = write_recipe(folder, **changes)
    command = [sys.executable, "-c", APART, served_bin / "python", recipe, "--directory", folder, "--cores=2", *words]
    return subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(folder: Path, files: str, begun: subprocess.Popen[str]) -> None:
    """Until there are such files, which are there before it has ended."""
    while not list(folder.glob(files)):
        assert begun.poll() is None, f"it ended before there was {files}"
        time.sleep(0.01)


def results(folder: Path) -> dict[str, bytes]:
    """What the report is made of, without the folder's own path, and so without the digests of what names it."""
    names = [*folder.glob("samples/*/evaluation.json"), *folder.glob("samples/*/[0-9]*.png"), folder / "hierarchy.json"]
    found = {str(name.relative_to(folder)): name.read_bytes().replace(bytes(folder), b"") for name in names}
    return {name: re.sub(rb'"document_sha256": "\w+"', b"", content) for name, content in found.items()}


@pytest.fixture(scope="module")
def finished(served_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the recipe was run undisturbed, and what was told."""
    folder = tmp_path_factory.mktemp("run") / "experiment"
    begun = begin(folder, served_bin)
    told, _ = begun.communicate()
    assert begun.returncode == 0, told
    return folder, told


def copied(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """That folder again, for another recipe."""
    folder = tmp_path / "experiment"
    subprocess.run(["cp", "-a", finished[0], folder], check=True)
    (folder / "tiny.yaml").unlink()
    return folder


def test_it_tells_a_story_in_lines(finished: tuple[Path, str]) -> None:
    folder, told = finished
    assert "\r" not in told and "rule" not in told
    lines = told.splitlines()
    assert lines[1].startswith("Turn images into features")
    assert f"Done: {folder / 'report.html'}" in lines
    assert sum(line.startswith(("  Samples:", "  Levels:", "  Neighbours")) for line in lines) == 3
    assert len(lines[lines.index(f"Next, in {folder}:") :]) == 4
    assert "Finished jobid" in (folder / "workflow.log").read_text()


def test_on_a_terminal_there_is_a_bar_with_the_time_left(tmp_path: Path) -> None:
    from workflow.plan import plan_of
    from workflow.story import Story

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def logged(event: str, **extra: object) -> None:
        story.emit(logging.makeLogRecord({"event": event, **extra}))

    terminal = Terminal()
    story = Story(plan_of(TINY, tmp_path / "tiny.yaml"), terminal)
    logged("run_info", stats={"extract": 1, "train": 1, "all": 1, "total": 3})
    logged("job_info", jobid=1, rule_name="extract", wildcards=None)
    logged("job_finished", job_id=1)
    logged("job_info", jobid=2, rule_name="train", wildcards={"run": "tiny", "denoiser": "z0-given-z1-sigma0.5"})
    story.close()
    shown = terminal.getvalue()
    assert "Train the denoiser of z_0 given z_1\n" in shown
    assert " 25 %|" in shown and "left" in shown
    assert story.ran == 1


def test_killed_at_any_time_it_ends_in_the_same(
    finished: tuple[Path, str], served_bin: Path, snakemake: Snakemake, tmp_path: Path
) -> None:
    """Snakemake alone is killed, and its step lives on: the next start waits for it, and does not believe it is done."""
    rng = random.Random(int(os.environ.get("NESTED_TEST_SEED", "0")))
    folder = tmp_path / "experiment"

    def killed(files: str = "") -> None:
        begun = begin(folder, served_bin)
        if files:
            wait_for(folder, files, begun)
        else:
            time.sleep(rng.uniform(1, 8))
        os.kill(begun.pid, signal.SIGKILL)
        begun.wait()

    killed(".snakemake/steps/*")
    patience = time.monotonic() + 300
    while not (folder / "features.json").exists():  # the extraction ends, and nobody notes that
        assert time.monotonic() < patience
        time.sleep(0.1)
    # Once, the extraction was all of this plan, as it is marked incomplete. A copy, as this process keeps what it locks.
    subprocess.run(["cp", "-a", folder, tmp_path / "copy"], check=True)
    assert {"extract", "train", "report"} <= set(snakemake(folder / "tiny.yaml", tmp_path / "copy", dry=True).jobs)
    killed("runs/*/*/log.jsonl")
    for _ in range(KILLS):
        killed()
    begun = begin(folder, served_bin)
    told, _ = begun.communicate()
    assert begun.returncode == 0, told
    assert (folder / "report.html").is_file()
    assert results(folder) == results(finished[0])


@pytest.mark.parametrize(
    ("plans", "code", "says"), [([2, 1, 0], 0, "Done: "), ([1] * 9, 1, "Steps are planned again and again.")]
)
def test_it_plans_again_until_a_plan_is_empty(
    plans: list[int], code: int, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from workflow.plan import plan_of
    from workflow.run import MOST_PLANS, to_the_end

    logger = logging.getLogger("snakemake.test")
    made: list[int] = []

    def once() -> bool:
        made.append(plans[len(made)])
        for number in range(made[-1]):
            logger.warning("", extra={"event": "job_info", "jobid": number, "rule_name": "report", "wildcards": None})
            logger.warning("", extra={"event": "job_finished", "job_id": number})
        return True

    assert to_the_end(once, plan_of(TINY, tmp_path / "tiny.yaml"), tmp_path, is_forced=False) == code
    assert made == plans[:MOST_PLANS]
    assert says in capfd.readouterr().err


def test_a_new_level_and_more_steps_at_once_are_both_planned(
    finished: tuple[Path, str], snakemake: Snakemake, tmp_path: Path
) -> None:
    """Trainings ignore the times of stores; what else changed of them is seen all the same."""
    folder = copied(finished, tmp_path)
    levels = [*TINY["levels"], {"shape": "1x1x8"}]
    write_recipe(folder, levels=levels, training={**TINY["training"], "steps": 6}, grid={"depths": [1, 2]})
    jobs = snakemake(folder / "tiny.yaml", folder, dry=True).jobs
    assert (jobs["extract"], jobs["train"], jobs["sample"], jobs["report"]) == (1, 3, 2, 1)


def test_an_environment_that_moved_changes_nothing(
    finished: tuple[Path, str], snakemake: Snakemake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = finished
    monkeypatch.setattr(sys, "executable", str(tmp_path / "moved" / "bin" / "python"))
    assert not snakemake(folder / "tiny.yaml", folder, dry=True).jobs


def test_it_opens_with_hierarchies_that_are_trained_already(
    finished: tuple[Path, str], served_bin: Path, tmp_path: Path
) -> None:
    from nestgen import NestedPipeline

    folder = copied(finished, tmp_path)
    for depth in (1, 2):
        pipe = NestedPipeline.from_run(folder / "runs" / "tiny", depth=depth, device="cpu")
        card = json.loads((folder / "samples" / f"L{depth}" / "evaluation.json").read_text())
        pipe.save_pretrained(tmp_path / f"it's L{depth}", scores={"card": card})
    names = [str(tmp_path / f"it's L{depth}") for depth in (1, 2)]
    begun = begin(folder, served_bin, grid={"pretrained": names})
    told, _ = begun.communicate()
    assert begun.returncode == 0, told
    assert "Draw from it's L1, which is trained already" in told and "Train the denoiser" not in told
    assert len(list((folder / "pretrained" / "it's L2").glob("[0-9]*.png"))) == 16
    for name in ("hierarchy", "like", "interpolate"):
        assert (folder / "pretrained" / f"{name}.png").is_file()
    page = (folder / "report.html").read_text()
    assert "First, what a longer training draws" in page
    assert "L = 1, z_0 4 steps of 8; L = 2, z_1 4 steps of 8, z_0 4 steps of 8" in page
    assert page.count("In tiny 1x1x64 the distance is") == 2
    shown = 2 * 8 + 2 * 8 + 2 + 3  # real and decoded, samples of each, their sheets, levels
    assert page.count("data:image/webp") == (finished[0] / "report.html").read_text().count("data:image/webp") + shown
    begun = begin(folder, served_bin, "-n")
    told, _ = begun.communicate()
    assert "Nothing to be done" in told, told


def test_an_end_without_a_report_is_an_error(finished: tuple[Path, str], snakemake: Snakemake, served: None) -> None:
    """Whatever made it: here a report that writes nothing where Snakemake was told not to look."""
    from snakemake_interface_common.exceptions import WorkflowError

    folder, _ = finished
    text = (folder / "report.html").read_bytes()
    try:
        (folder / "knn.json").write_text((folder / "knn.json").read_text() + "\n")
        with pytest.MonkeyPatch.context() as patched:
            exists = Path.exists
            patched.setattr(Path, "exists", lambda path, **o: path.name != "report.html" and exists(path, **o))
            with pytest.raises(WorkflowError, match=r"report\.html is missing: start the workflow again"):
                snakemake(folder / "tiny.yaml", folder)
    finally:
        (folder / "report.html").write_bytes(text)


def test_interrupted_it_is_one_sentence(served_bin: Path, tmp_path: Path) -> None:
    begun = begin(tmp_path / "experiment", served_bin)
    wait_for(tmp_path, "experiment/.snakemake/steps/*", begun)
    os.kill(begun.pid, signal.SIGINT)
    told, _ = begun.communicate()
    assert begun.returncode == 130
    assert told.splitlines()[-1].startswith("Interrupted. What is done is kept: the same command goes on.")


def test_a_step_that_fails_is_named_with_what_it_printed(served_bin: Path, tmp_path: Path) -> None:
    begun = begin(tmp_path / "experiment", served_bin, features={**TINY["features"], "encoder": "nosuch"})
    told, _ = begun.communicate()
    assert begun.returncode == 1
    assert "A step failed: Turn images into features" in told
    shown = told.partition("workflow.log:\n\n")[2].splitlines()
    assert "nosuch" in shown[-1] and "Traceback" not in told
    assert not [line for line in shown if re.search("RuleException|jobid|rule |resources|Job stats", line)], told
    assert not (tmp_path / "experiment" / "report.html").exists()


def test_a_config_key_that_does_not_exist_is_a_sentence(served_bin: Path, tmp_path: Path) -> None:
    begun = begin(tmp_path / "experiment", served_bin, "--config", "sourc=x")
    told, _ = begun.communicate()
    assert begun.returncode == 1
    assert told.startswith("Error: there is no CONFIG key 'sourc'; the keys are recipe, data, source")


@pytest.mark.parametrize("more", [{}, {"gpus": 2}])
def test_strings_of_a_recipe_are_words_of_the_shell(
    more: dict[str, Any], snakemake: Snakemake, tmp_path: Path, pipelines: Path
) -> None:
    """Every line of a dry run is read by bash, with programs that only note their words."""
    out, reference, held_out = f"stores/{HOSTILE}", f"stores/w{HOSTILE}", f"wds:{HOSTILE}-{{0..3}}.tar"
    recipe = tmp_path / "hostile.yaml"
    document = TINY | {
        "name": f"n{HOSTILE}",
        "features": {**TINY["features"], "out": out},
        "evaluation": {"count": 12, "reference": reference},
        "denoiser": {"size": "nano", "text": "77x16"},
        "grid": {
            "space": HOSTILE,
            "sigmas": [0, 1],
            "held_out": held_out,
            "scored_by": {"encoder": f"timm:{HOSTILE}", "weights": HOSTILE},
        },
    }
    recipe.write_text(json.dumps(document))
    found = snakemake(recipe, tmp_path, dry=True, **more)
    words: set[str] = set()
    print_words = "f() { printf '%s\\n' \"$@\"; }; "
    functions = "".join(
        f'{name}() {{ f "$@"; }}; '
        for name in ("featurize", "nestgen", "on_gpu", "train", "sigma_choice", "report", "rm", "mv")
    )
    for line in (line for lines in found.shell.values() for line in lines if line):
        done = subprocess.run(
            ["bash", "-c", print_words + functions + line.replace(" > features.json.tmp", "")],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        words |= {*done.stdout.splitlines()}
    assert {out, reference, held_out, HOSTILE, f"timm:{HOSTILE}", f"runs/n{HOSTILE}"} <= words
    assert not (tmp_path / "X").exists()
