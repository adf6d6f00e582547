"""`export`, a trained hierarchy as one folder to hand on, and `explore`, a page to play with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nestgen.cli.options import NumberOr, Sigmas, vae_option
from nestgen.errors import UserError


def hierarchy_options(command: Any) -> Any:
    """The options that choose one hierarchy of a run, and its averages of the weights."""
    for option in reversed(
        [
            click.option("--depth", type=int, help="Its number of levels; the deepest by default."),
            click.option(
                "--sigma", "sigmas", type=Sigmas(), help="Noise on z_1, z_2, ... that it was trained with; one for all."
            ),
            click.option(
                "--step",
                type=NumberOr("step", "best"),
                help="Step of the checkpoints, or `best`; the newest by default.",
            ),
            click.option("--ema-length", type=float, help="Average the weights over another share of the steps."),
            vae_option,
        ]
    ):
        command = option(command)
    return command


def open_pipeline(
    folder: str,
    depth: int | None,
    sigmas: tuple[float, ...] | None,
    step: int | str | None,
    ema_length: float | None,
    vae: Path | None,
    device: str | None = None,
) -> Any:
    """The pipeline of a run's folder, an exported folder or a shipped hierarchy."""
    from nestgen.pipeline import NestedPipeline
    from nestgen.sharing.names import shipped

    exported = (Path(folder) / "config.json").is_file() or folder in shipped()
    if exported or not Path(folder).is_dir():
        if (depth, sigmas, step, ema_length) != (None, None, None, None):
            raise click.UsageError(f"{folder} is exported: --depth, --sigma, --step and --ema-length are of runs")
        return NestedPipeline.from_pretrained(folder, device=device, vae=vae)
    sigma = sigmas[0] if sigmas is not None and len(sigmas) == 1 else sigmas
    try:
        return NestedPipeline.from_run(
            folder,
            depth=depth,
            sigma=sigma,
            step=step,  # type: ignore[arg-type]
            ema_length=ema_length,
            device=device,
            vae=vae,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="The folder; an earlier export is replaced."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of the weights: float16 is half as large.",
)
@click.option(
    "--scores", type=click.Path(path_type=Path), multiple=True, metavar="CARD", help="Score cards for the model card."
)
@click.option(
    "--class-names", type=click.Path(path_type=Path), metavar="FILE", help="Names of the classes, one a line, in order."
)
@hierarchy_options
def export(
    run: Path,
    out: Path,
    dtype: str,
    scores: tuple[Path, ...],
    class_names: Path | None,
    depth: int | None,
    sigmas: tuple[float, ...] | None,
    step: int | str | None,
    ema_length: float | None,
    vae: Path | None,
) -> None:
    """Writes a trained hierarchy as one folder to hand on.

    RUN is runs/<name>. The folder holds the averaged weights, the configuration, a small codec and a model card, and no path
    of this machine. `nestgen sample --pretrained OUT` samples from it without stores, on any machine, the same images for
    the same seeds.

    Example: nestgen export runs/demo --out demo-model --scores samples/evaluation.json
    """
    import torch

    from nestgen.scoring.compare import read_cards

    cards = dict(zip([path.stem for path in scores], read_cards(scores), strict=True))
    if len(cards) < len(scores):
        raise UserError("two of the --scores have one file name; rename one of them")
    names = () if class_names is None else _lines(class_names)
    pipe = open_pipeline(str(run), depth, sigmas, step, ema_length, vae, "cpu")
    pipe.save_pretrained(
        out, dtype=torch.float16 if dtype == "float16" else None, class_names=names, scores=cards or None
    )
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{len(pipe.samplers)} level(s), {size / 1e6:.1f} MB, in {out}; its model card is {out / 'README.md'}")


def _lines(file: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text") from None


@click.command()
@click.argument("folder", metavar="FOLDER")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Of the page; a free one by default.")
@click.option("--open", "browser", is_flag=True, help="Open the page in the browser.")
@hierarchy_options
def explore(
    folder: str,
    port: int,
    browser: bool,
    depth: int | None,
    sigmas: tuple[float, ...] | None,
    step: int | str | None,
    ema_length: float | None,
    vae: Path | None,
) -> None:
    """Opens a local page to play with a hierarchy.

    FOLDER is runs/<name>, an exported folder, a hierarchy that ships (scenes), or a repository of the Hugging Face Hub.

    Click a sample to see what each level holds, take levels from two, walk from one to another, move noise and guidance.
    Only this machine can open the page, by the address that is printed. Ctrl-C ends it.

    Example: nestgen explore runs/demo --open
    """
    import webbrowser

    from nestgen.explore.server import Server
    from nestgen.explore.session import Session

    pipe = open_pipeline(folder, depth, sigmas, step, ema_length, vae)
    with Server(Session(pipe).answer, port) as server:
        print(f"{server.address}\nOpen this address in a browser of this machine; Ctrl-C ends it.", flush=True)
        if browser:
            webbrowser.open(server.address)
        server.serve_forever()
