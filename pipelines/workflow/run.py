"""Runs a recipe by Snakemake to its end, and tells it as a story; what Snakemake and the steps print goes to a file.

A step that runs hides from Snakemake whether the steps after it have to run as well, where they ignore the times of its
files. So the workflow is planned again until a plan is empty: only then it is said to be done.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click

from workflow.plan import Plan, RecipeError, read_plan
from workflow.rehearsal import configured
from workflow.story import Story, findings, tail

LOG = "workflow.log"
# Where one of these is given, Snakemake knows how many cores there are, or a cluster does.
HAS_CORES = ("--profile", "--workflow-profile", "--executor", "--cores", "-c", "--jobs", "-j")
MOST_PLANS = 5
INTERRUPTED = 130


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("recipe", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(recipe: Path, options: tuple[str, ...]) -> None:
    """Run RECIPE. OPTIONS are Snakemake's, and last --config KEY=VALUE..."""
    sys.exit(run(recipe.resolve(), options))


def run(recipe: Path, options: Sequence[str]) -> int:
    """Run a recipe until nothing is left to do; the exit code. `options` are Snakemake's."""
    from snakemake.cli import args_to_api, parse_args, parse_config

    at = options.index("--config") if "--config" in options else len(options)
    command = [*options[:at], "--config", f"recipe={recipe}", *options[at + 1 :]]
    command = [f"--snakefile={Path(__file__).parents[1] / 'Snakefile'}", "--rerun-incomplete", *command]
    has_cores = any(word.partition("=")[0].startswith(HAS_CORES) for word in options)
    if not has_cores and "SNAKEMAKE_PROFILE" not in os.environ:
        command = ["--cores=all", *command]
    _, arguments = parse_args(command)
    config = parse_config(arguments.config)
    try:
        plan = configured(read_plan(recipe), recipe, config)
    except RecipeError as error:
        raise click.ClickException(str(error)) from None
    if config.get("gpus") and "gpu" not in arguments.resources and "--cores=all" in command:
        command = [f"--resources=gpu={config['gpus']}", *command]

    def once() -> bool:
        parser, arguments = parse_args(command)
        return bool(args_to_api(arguments, parser))

    folder = Path(arguments.directory or ".").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not runs_steps(arguments):
        return 0 if once() else 1
    return to_the_end(once, plan, folder, is_forced=bool(arguments.force or arguments.forceall or arguments.forcerun))


def runs_steps(arguments: Any) -> bool:
    """Whether Snakemake is asked to run steps, and not only to print or to change something of its own."""
    others = (
        "dryrun touch unlock lint list_target_rules list_rules dag rulegraph filegraph d3dag summary detailed_summary"
    )
    others += " list_changes list_untracked cleanup_metadata archive delete_all_output report print_compilation"
    return not any(getattr(arguments, name, None) for name in others.split())


def to_the_end(once: Callable[[], bool], plan: Plan, folder: Path, is_forced: bool) -> int:
    """Run the workflow until a plan is empty, telling its story; the exit code. `is_forced`: a plan is never empty."""
    log = folder / LOG
    start = log.stat().st_size if log.exists() else 0
    interrupted: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    with printing_to(log) as terminal:
        story = Story(plan, terminal)
        story.begin(folder, log)
        try:
            succeeded = is_done = False
            for _ in range(MOST_PLANS):
                ran = story.ran
                with story.listening():
                    succeeded = once()
                is_done = is_forced or story.ran == ran
                if is_done or not succeeded:
                    break
        except KeyboardInterrupt:
            succeeded = False
        finally:
            story.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        if interrupted:
            story.say(f"Interrupted. What is done is kept: the same command goes on. ({log})")
            return INTERRUPTED
        if not succeeded:
            story.say(f"{story.failed or 'The workflow stopped'}. From {log}:\n\n{tail(log, start)}")
            return 1
        if not is_done:
            story.say(f"Steps are planned again and again. Look at {log}.")
            return 1
        story.say(*findings(plan, folder))
    return 0


@contextmanager
def printing_to(log: Path) -> Iterator[TextIO]:
    """Send what this process and its children print to a file; what is left to print to is the terminal, or standard error."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with log.open("a") as file, os.fdopen(os.dup(2), "w", buffering=1) as terminal:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
