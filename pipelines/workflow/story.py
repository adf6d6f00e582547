"""What a user sees of a workflow: a line a step, a bar with the time left, and at the end what was found and what comes next."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from workflow.plan import Plan, levels_of

TAIL = 15  # lines of the log that are shown where a step fails
OF_SNAKEMAKE = re.compile(  # lines that say which steps are planned, begin and end
    r"\s*|\[.*\d{4}\]|(local)?(rule|checkpoint) \w+:|Select jobs to execute\.\.\.|Execute \d+ jobs\.\.\.|Finished jobid: .*"
    r"|\d+ of \d+ steps .*| {4}(input|output|log|jobid|benchmark|reason|wildcards|priority|threads|resources|shell): .*"
)

# Rule: how long it takes beside a small step, and what it is for.
STEPS: dict[str, tuple[int, str]] = {
    "pretrained_sample": (4, "Draw from {stem}, which is trained already"),
    "pretrained_sheet": (2, "What its levels hold: {sheet}.png"),
    "pretrained_rows": (3, "Real images in its levels"),
    "pretrained_images": (1, "These images beside its samples"),
    "pretrained_decoded": (1, "What its codec leaves of them"),
    "extract": (10, "Turn images into features of the frozen encoder, and these into levels"),
    "extract_reference": (5, "The same for held-out images, against which samples are scored"),
    "extract_scored": (8, "Features of the encoder that scores samples"),
    "extract_scored_reference": (4, "The same for held-out images"),
    "knn": (2, "Which images does each level find alike?"),
    "train": (30, "Train the denoiser of {denoiser}"),
    "train_above": (20, "Train the denoiser of {denoiser}"),
    "sample": (4, "Draw samples of {cell}"),
    "sample_like": (3, "Draw samples that keep levels of real images ({like})"),
    "encode_samples": (2, "Features of the samples of {cell}"),
    "evaluate": (2, "Score the samples of {cell} against real images"),
    "choose": (1, "Choose the σ of L = {depth} by its scores"),
    "table": (1, "Table of scores over depth and σ"),
    "hierarchy": (2, "What does each level decide? Freeze it and draw the rest anew"),
    "real_images": (1, "Real images to stand beside the samples"),
    "real_decoded": (1, "What the codec of z_0 leaves of them"),
    "sheet": (1, "The same seeds at each depth, side by side"),
    "report": (1, "Write report.html"),
}


class Story(logging.Handler):
    """Listens to Snakemake and writes to the terminal: lines, and a bar below them where it is one."""

    def __init__(self, plan: Plan, terminal: TextIO) -> None:
        super().__init__()
        self.plan, self.terminal = plan, terminal
        self.ran = 0  # steps that ended, in all plans
        self.failed = ""  # the first step that failed
        self._steps: dict[int, tuple[str, str]] = {}  # rule and line, by Snakemake's number
        self._bar: Any = None

    def begin(self, folder: Path, log: Path) -> None:
        """Say what is run, and where."""
        self.say(f"{self.plan.name}: {len(self.plan.levels)} levels, in {folder}. Details: {log}")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear what Snakemake logs, of a plan that is made anew."""
        self._steps.clear()
        logger = logging.getLogger(
            "snakemake"
        )  # its own logger is below this one, and loses all handlers at each start
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """A record of Snakemake: the plan, a step that begins, ends or fails, or a sentence of ours."""
        event = str(getattr(record, "event", "") or "")
        if event == "run_info":
            self._plan(getattr(record, "stats", {}))
        elif event == "job_info":
            rule = str(getattr(record, "rule_name", ""))
            line = self._line(rule, getattr(record, "wildcards", {}))
            self._steps[record.__dict__["jobid"]] = (rule, line)
            if line:
                self.say(line)
        elif event == "job_finished":
            self._finish(record.__dict__["job_id"])
        elif event == "job_error":
            _, line = self._steps.get(record.__dict__["jobid"], ("", ""))
            self.failed = self.failed or f"A step failed: {line}"
        elif getattr(record, "told", False):
            self.say(record.getMessage())

    def say(self, *lines: str) -> None:
        """Write lines above the bar."""
        for line in lines:
            if self._bar is None:
                print(line, file=self.terminal, flush=True)
            else:
                self._bar.write(line, file=self.terminal)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _plan(self, stats: dict[str, Any]) -> None:
        total = sum(count * STEPS[rule][0] for rule, count in stats.items() if rule in STEPS)
        if self._bar is None and total and self.terminal.isatty():
            form = "{percentage:3.0f} %|{bar:30}| {elapsed} elapsed, about {remaining} left"
            self._bar = tqdm(total=0, file=self.terminal, bar_format=form, leave=False, smoothing=0.1)
        if self._bar is not None:
            self._bar.total += total
            self._bar.refresh()

    def _line(self, rule: str, wildcards: Any) -> str:
        names = {key: str(value) for key, value in dict(wildcards or {}).items()}
        if "denoiser" in names:
            level, *above = levels_of(names["denoiser"])
            names["denoiser"] = f"z_{level}" + (f" given {', '.join(f'z_{k}' for k in above)}" if above else "")
            names["denoiser"] += f" ({names['run']})" if len(self.plan.seeds) > 1 else ""
        return (
            STEPS[rule][1].format_map({"cell": "", "like": "", "depth": "", "stem": "", "sheet": "", **names})
            if rule in STEPS
            else ""
        )

    def _finish(self, job: int) -> None:
        rule, _ = self._steps.get(job, ("", ""))
        self.ran += rule in STEPS
        if self._bar is not None and rule in STEPS:
            self._bar.update(STEPS[rule][0])


def tail(log: Path, start: int) -> str:
    """The last lines of a file, after its byte `start`, that a failed step printed: without what Snakemake says of steps."""
    printed = log.read_bytes()[start:].decode(errors="replace").partition("\nRuleException:")[0]
    plan, first_step, of_steps = printed.partition("\nSelect jobs to execute...\n")
    printed = of_steps if first_step else plan
    lines = [line.rpartition("\r")[2] for line in printed.replace("\r\n", "\n").split("\n")]
    return "\n".join(f"  {line}" for line in [line for line in lines if not OF_SNAKEMAKE.fullmatch(line)][-TAIL:])


def findings(plan: Plan, folder: Path) -> list[str]:
    """Lines for the end: what was found, and the next commands. Of what is not there nothing is said."""
    lines = ["", f"Done: {folder / 'report.html'}" if (folder / "report.html").is_file() else f"Done: {folder}"]
    lines += [line for line in (_of_depth(plan, folder), _of_levels(folder), _of_neighbours(folder)) if line]
    if plan.depths and (folder / "report.html").is_file():
        programs = os.path.relpath(Path(sys.executable).parent, folder)
        lines += [
            f"Next, in {folder}:",
            f"  {programs}/nestgen sample --count 64 --seed 1 --out more   # other samples of the same denoisers",
            f"  {programs}/nestgen info                                    # parameters and cost of each level",
            f"  {programs}/featurize info                                  # what the stores hold",
        ]
    return lines


def _of_depth(plan: Plan, folder: Path) -> str:
    """How the Fréchet distance went with depth, in the last space that all cards have."""
    scores: dict[int, float] = {}
    space = ""
    for cell in plan.cells(seed=plan.seeds[0]) if plan.depths else []:
        card = _json(folder / "samples" / cell.name / "evaluation.json")
        if card:
            space = card["scores"][-1]["space"]
            distance = card["scores"][-1]["frechet_distance"]
            scores[cell.depth] = min(distance, scores.get(cell.depth, distance))
    if len(scores) < 2:
        return ""
    best = min(scores, key=lambda depth: scores[depth])
    each = ", ".join(f"{score:.3g} at L = {depth}" for depth, score in sorted(scores.items()))
    return f"  Samples: Fréchet distance {each} ({space}); L = {best} is best."


def _of_levels(folder: Path) -> str:
    hierarchy = _json(folder / "hierarchy.json")
    rows = hierarchy["rows"] if hierarchy else []
    if not rows:
        return ""
    each = ", ".join(
        f"{row['variation']:.0f} with {' and '.join(f'z_{k}' for k in row['frozen']) or 'nothing'} frozen"
        for row in rows
    )
    return f"  Levels: samples vary by {each} (of 255)."


def _of_neighbours(folder: Path) -> str:
    shares = (_json(folder / "knn.json") or {}).get("label_agreement", {})
    known = {space: share for space, share in shares.items() if share is not None}
    if not known:
        return ""
    return (
        "  Neighbours with the same label: " + ", ".join(f"{space} {share:.0%}" for space, share in known.items()) + "."
    )


def _json(file: Path) -> Any:
    return json.loads(file.read_text()) if file.is_file() else None
