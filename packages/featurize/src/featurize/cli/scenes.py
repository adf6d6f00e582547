"""`scenes`: writes the embedded data set."""

from __future__ import annotations

from pathlib import Path

import click

from featurize.recipe import choices


@click.command()
@click.option("--count", type=click.IntRange(1, 10**9), default=6000, show_default=True, help="How many.")
@click.option("--size", type=click.IntRange(8, 1024), default=32, show_default=True, help="Side in pixels.")
@click.option("--split", type=click.Choice(choices("split")), default="train", show_default=True, help="Which scenes.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed draws other scenes.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder of the shards.")
def scenes(count: int, size: int, split: str, seed: int, out: Path) -> None:
    """Draw scenes and write them as webdataset shards.

    Example: featurize scenes --count 1000 --size 64 --out shards
    """
    from featurize.scenes import write_shards

    shards = write_shards(count, size, split, out, seed)
    click.echo(f"{count:,} scenes are in {len(shards)} shards: {shards[0]} ... {shards[-1].name}")
