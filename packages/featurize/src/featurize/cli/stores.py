"""The commands on existing stores: `info`, `ls`, `images`, `verify` and `repair`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from featurize.cli.options import (
    SMALL_STORE,
    recipe_option,
    scheduler_option,
    wait_option,
    workers_option,
)
from featurize.errors import UserError
from featurize.io.files import resolve_path
from featurize.recipe import read_request


@click.command()
@click.argument("root", required=False)
@recipe_option
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw explained variance, effective rank, outlier tokens, and mean and std of the levels' channels.",
)
def info(root: str | None, recipe: Path | None, picture: Path | None) -> None:
    """Describe the store ROOT, by default the recipe's.

    Example: featurize info stores/photos --picture info.png
    """
    from featurize.reports.info import describe

    where = _root(root, recipe)
    click.echo(describe(where))
    if picture is not None:
        from featurize.reports.figure import draw_info

        draw_info(where, picture)
        click.echo(f"{picture} shows it.")


@click.command("ls")
@click.argument("folder", required=False)
def ls(folder: str | None) -> None:
    """List the store roots in FOLDER with all their arrays.

    FOLDER is by default ./stores, else the working directory. Each array has its size, its state and what made it.

    Example: featurize ls /data/stores
    """
    from featurize.reports.ls import list_stores

    default = "stores" if Path("stores").is_dir() else "."
    click.echo(list_stores(resolve_path(folder or default)))


@click.command()
@click.argument("root", required=False)
@recipe_option
@click.option(
    "--count", type=click.IntRange(1), default=64, show_default=True, help="How many, from row 0 on, at most."
)
@click.option("--size", type=click.IntRange(8), default=256, show_default=True, help="Pixels a side.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for 000000.png, ...")
def images(root: str | None, recipe: Path | None, count: int, size: int, out: Path) -> None:
    """Write images of the store ROOT as files.

    ROOT is by default the recipe's. Each image is the square that the encoder saw, read from its source again. Row 0 is
    000000.png.

    Example: featurize images stores/photos-train --count 10 --size 128 --out real
    """
    from featurize.reports.images import write_images

    where = _root(root, recipe)
    click.echo(f"{write_images(where, out, count, size)} images of {where} in {out}")


@click.command()
@click.argument("root", required=False)
@recipe_option
@click.option(
    "--re-encode", type=click.IntRange(min=0), default=0, metavar="K", help="Encode K random rows again as well."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses those rows.")
@workers_option
@scheduler_option
def verify(
    root: str | None, recipe: Path | None, re_encode: int, seed: int, workers: int | None, scheduler: str | None
) -> None:
    """Check the store ROOT, by default the recipe's.

    It reads all of it: the ledger, every block's digest, NaN and constant rows, mean and std, levels against their base store.
    One line per finding, and exit code 1 when there is one.

    Example: featurize verify stores/photos --re-encode 100
    """
    from featurize.execution.engine import engine
    from featurize.integrity.verify import verify as run_verify
    from featurize.store.layout import list_arrays

    folder = _root(root, recipe)
    with engine(workers if workers is not None else _few_workers(folder, scheduler), scheduler) as run:
        findings = run_verify(folder, run)
        if re_encode:
            from featurize.integrity.reencode import spot_check

            findings += spot_check(folder, re_encode, seed, run)
    _report(findings, f"{folder} is whole: {len(list_arrays(folder))} arrays, every block as it was written.")


@click.command()
@click.argument("root", required=False)
@recipe_option
@workers_option
@scheduler_option
@wait_option
def repair(root: str | None, recipe: Path | None, workers: int | None, scheduler: str | None, wait: bool) -> None:
    """Make again exactly what `verify` finds wrong.

    ROOT is by default the recipe's store root.

    Example: featurize repair stores/photos
    """
    from featurize.execution.engine import engine
    from featurize.execution.interrupt import finishing_tasks
    from featurize.integrity.repair import repair as run_repair
    from featurize.io.lock import root_lock

    folder = _root(root, recipe)
    few = workers if workers is not None else _few_workers(folder, scheduler)
    with engine(few, scheduler) as run, root_lock(folder, wait), finishing_tasks():
        findings = run_repair(folder, run, click.echo)
    _report(findings, f"{folder} is whole.")


def _root(root: str | None, recipe: Path | None) -> Path:
    return resolve_path(root or read_request(recipe, {}, None).features.out)


def _few_workers(root: Path, scheduler: str | None) -> int | None:
    """0 where a store is small, so that it is read before workers would have started; else None, the default."""
    from featurize.store.layout import list_arrays
    from featurize.store.metadata import read_metadata

    if scheduler is not None:
        return None
    try:
        return 0 if sum(read_metadata(path).nbytes for path in list_arrays(root)) < SMALL_STORE else None
    except (UserError, OSError):  # a damaged array
        return 0


def _report(findings: Sequence[object], whole: str) -> None:
    for finding in findings:
        click.echo(str(finding))
    if findings:
        sys.exit(1)
    click.echo(whole)
