"""The command `featurize`: it parses, calls, and turns errors into one sentence."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from featurize.errors import Interrupted, UserError, explain_os_error
from featurize.files import place
from featurize.recipe import Features, choices, read_request

SMALL_STORE = 1 << 30  # bytes
DEFAULTS = {name: field.default for name, field in Features.model_fields.items()}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def commands() -> None:
    """Pictures through a frozen encoder into standardised per-level zarr stores."""


def _option(name: str, text: str, **settings: Any) -> Any:
    """An option of `extract` that goes over the recipe's key of the same name."""
    key = name.lstrip("-").replace("-", "_")
    default = DEFAULTS.get(key)
    shown = f" [default: the recipe's, else {default}]" if default not in (None, {}) else ""
    return click.option(name, key, help=text + shown, **settings)


_recipe = click.option(
    "--recipe", type=click.Path(path_type=Path), help="Recipe file. [default: ./nested.yaml, if it is there]"
)
_workers = click.option(
    "--workers",
    type=click.IntRange(min=0),
    help="Dask worker processes; 0 works in this one. [default: one a core, or one a GPU]",
)
_wait = click.option("--wait", is_flag=True, help="Wait for another run that holds the store root, then go on.")
_scheduler = click.option("--scheduler", metavar="ADDRESS", help="Use the Dask cluster at this address instead.")


@commands.command()
@click.argument("source", required=False)
@_recipe
@_option("--out", "Store root of this data set and split.", metavar="DIR")
@_option("--encoder", "Which one; `featurize encoders` lists them.", metavar="NAME")
@_option("--weights", "Weights of the encoder. Without it they are fetched by name.", metavar="FILE")
@_option("--model-args", "Arguments of the network: 'img_size=64,patch_size=8' or a YAML mapping.", metavar="ARGS")
@_option("--precision", "Precision of the encoder.", type=click.Choice(choices("precision")))
@_option(
    "--crop",
    "The square every encoder and codec sees, or the encoder's own evaluation crop.",
    type=click.Choice(choices("crop")),
)
@click.option("--levels", metavar="SHAPES", help="Levels above z_0, like 4x4x16,2x2x8. [default: the recipe's]")
@_option("--z0", "Codec of z_0 and the picture's side: pixels:32, vae:256, taesd:256.", metavar="CODEC:SIDE")
@_option("--z0-weights", "The codec's weights: a name, a folder or a file; tiny for the embedded VAE.", metavar="PATH")
@_option("--z0-scale", "Latent scale. Without this the codec's own, and 0.23010 for SD's VAE on COCO.", type=float)
@_option("--text", "Embed the captions as well: clip (ViT-L/14, 77x768).", type=click.Choice(["clip"]))
@_option("--text-weights", "Weights of the text encoder.", metavar="FILE")
@_option("--views", "2 encodes the horizontal flip as well.", type=click.IntRange(1, 2))
@_option("--limit", "Take the first so many pictures.", type=click.IntRange(min=1))
@_option("--split", "Split of scenes, COCO and ImageNet.", type=click.Choice(choices("split")))
@_option("--classes", "Only these of ImageNet's or a folder's classes: a list, or imagenet100.", metavar="FILE")
@_option("--base-channels", "Channels kept in the base store.", type=click.IntRange(min=1))
@_option(
    "--basis",
    "Take basis and standardisation of this store root: for a validation split. 'own' fits one on held-out pictures.",
    metavar="DIR",
)
@_option("--basis-rows", "Pictures on which the basis is fitted.", type=click.IntRange(min=1))
@_option(
    "--basis-tolerance",
    "Stop when that basis loses more than this share of the variance of all pictures.",
    type=click.FloatRange(min=0),
)
@_option("--max-bad", "Stop when more pictures than this can't be read: a count, or a share like 1%.", metavar="COUNT")
@_workers
@_scheduler
@_wait
def extract(
    recipe: Path | None,
    levels: str | None,
    workers: int | None,
    scheduler: str | None,
    wait: bool,
    model_args: str | None,
    **options: Any,
) -> None:
    """Encode the pictures of SOURCE and write base store, levels and z_0.

    SOURCE is scenes, wds:SHARDS, folder:DIR, imagenet:DIR or coco:DIR (docs/sources.md); without it, what the recipe names.
    Run again, it goes on where it stopped, and does nothing when all is there.
    """
    from featurize.extract import extract as run_extract
    from featurize.info import describe

    overrides = {key: value for key, value in options.items() if value is not None}
    if model_args is not None:
        overrides["model_args"] = _parse_model_args(model_args)
    request = read_request(recipe, overrides, levels)
    run_extract(request, workers, scheduler, wait)
    click.echo(describe(place(request.features.out)))


@commands.command()
@click.argument("shapes", required=False)
@_recipe
@click.option("--out", metavar="DIR", help="Store root. [default: the recipe's]")
@click.option("--encoder", metavar="NAME", help="Encoder whose base store is used. [default: the recipe's, else tiny]")
@click.option("--basis", metavar="DIR", help="Store root whose standardisation is taken: for a validation split.")
@_workers
@_scheduler
@_wait
def levels(
    shapes: str | None,
    recipe: Path | None,
    workers: int | None,
    scheduler: str | None,
    wait: bool,
    **options: str | None,
) -> None:
    """Derive the levels SHAPES (like 4x4x16,2x2x8) from the base store; the encoder is not needed."""
    from featurize.engine import engine
    from featurize.interrupt import finishing_tasks
    from featurize.levels import derive_level
    from featurize.lock import holding
    from featurize.plan import other_basis
    from featurize.store import folder_name, open_sealed

    features = {key: value for key, value in options.items() if value is not None}
    request = read_request(recipe, features, shapes)
    if not request.levels:
        raise UserError("Which levels? Give SHAPES like 4x4x16,2x2x8, or a recipe (nested.yaml) with levels.")
    root = place(request.features.out)
    base = root / folder_name(request.features.encoder) / "base.zarr"
    # A small base store is pooled sooner than workers start.
    few = workers is None and scheduler is None and open_sealed(base).nbytes < SMALL_STORE
    with engine(0 if few else workers, scheduler) as run, holding(root, wait), finishing_tasks():
        for shape in request.levels:
            click.echo(f"{derive_level(base, shape, other_basis(request.features), run)} is sealed")


@commands.command("embed-text")
@click.option("--prompts", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Prompts, one a line.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder of the embeddings.")
@click.option(
    "--text-weights", metavar="FILE", help="Weights of the text encoder. Without it they are fetched by name."
)
@_workers
@_scheduler
def embed_text(prompts: Path, out: Path, text_weights: str | None, workers: int | None, scheduler: str | None) -> None:
    """Embed prompts with CLIP ViT-L/14's text tower, for `nestgen sample`."""
    from featurize.engine import engine
    from featurize.text import TextSpec, embed_prompts

    with engine(0 if workers is None else workers, scheduler) as run:
        path = embed_prompts(prompts, out, TextSpec("clip", text_weights), run)
    click.echo(f"{path} is sealed")


@commands.command("plan")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--rows", type=click.IntRange(1), help="So many pictures, where the source is not here.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Pictures a second, to tell the hours.")
@click.option("--measure", is_flag=True, help="Encode some pictures here to find the rate.")
def plan(recipe: Path | None, rows: int | None, rate: float | None, measure: bool) -> None:
    """Say what the extraction of RECIPE (./nested.yaml) takes before it starts: rows, bytes of each store, hours.

    What the training takes is in `nestgen info`.
    """
    from featurize.estimate import estimate

    click.echo(estimate(read_request(recipe, {}, None), rows, rate, measure))


@commands.command()
def encoders() -> None:
    """List the encoders: what each computes, from which pictures, and where its weights are."""
    from featurize.encoder_table import table

    click.echo(table())


@commands.command("check-encoder")
@click.argument("name")
@click.option("--weights", metavar="FILE", help="Weights of the encoder. Without it they are fetched by name.")
@click.option("--model-args", metavar="ARGS", help="Arguments of the network, as for extract.")
@click.option("--precision", type=click.Choice(choices("precision")), default="float32", show_default=True)
def check_encoder(name: str, weights: str | None, model_args: str | None, precision: str) -> None:
    """Prove that the encoder NAME computes what it should, before a run."""
    import json

    from featurize.check_encoder import check_encoder as run_check
    from featurize.encoders import EncoderSpec
    from featurize.engine import device_of_worker

    arguments = json.dumps(_parse_model_args(model_args) if model_args else {}, sort_keys=True)
    failed = []
    for finding in run_check(EncoderSpec(name, weights, arguments, precision), device_of_worker()):
        mark = {True: "ok", False: "FAILED", None: "unproven"}[finding.passed]
        click.echo(f"{mark:<9} {finding.subject}: {finding.words}")
        failed += [finding.subject] if finding.passed is False else []
    if failed:
        raise UserError(f"The encoder {name} fails in {', '.join(failed)}; don't extract with it.")


@commands.command("knn-viz")
@_recipe
@click.option(
    "--stores", metavar="DIR,...", help="Store root, or several of the same pictures. [default: the recipe's]"
)
@click.option(
    "--encoder",
    metavar="NAME,...",
    help="Encoders whose levels are shown side by side. [default: the recipe's, else tiny]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="knn.png",
    show_default=True,
    help="The sheet; numbers and overlap go beside it.",
)
@click.option(
    "--queries", type=click.IntRange(1, 50), default=4, show_default=True, help="Query pictures on the sheet."
)
@click.option("--neighbours", type=click.IntRange(1, 30), default=8, show_default=True, help="Neighbours of each.")
@click.option("--rows", metavar="N|all", default="10000", show_default=True, help="Rows compared, by keyed hash.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses queries and rows.")
@click.option(
    "--index",
    type=click.Choice(["auto", "exact", "ivf"]),
    default="auto",
    show_default=True,
    help="auto is exact up to a million rows and FAISS's inverted file beyond.",
)
@click.option("--raw", is_flag=True, help="Encode the rows again and compare the features before the basis as well.")
@click.option("--weights", metavar="FILE", help="Weights of the encoder, for --raw. [default: the recipe's]")
@click.option("--model-args", metavar="ARGS", help="Arguments of timm's model, for --raw. [default: the recipe's]")
def knn_viz(
    recipe: Path | None,
    stores: str | None,
    encoder: str | None,
    out: Path,
    queries: int,
    neighbours: int,
    rows: str,
    seed: int,
    index: str,
    raw: bool,
    weights: str | None,
    model_args: str | None,
) -> None:
    """Draw nearest neighbours at every level and print how often their labels agree.

    Several --encoder NAME,... or --stores DIR,... stand side by side on the sheet, for the same queries.
    """
    from featurize.knn_viz import Compared
    from featurize.knn_viz import knn_viz as run_knn_viz

    roots, encoders = _several(stores), _several(encoder)
    given = {"out": roots[:1], "encoder": encoders[:1], "weights": [weights] if weights else []}
    overrides: dict[str, Any] = {key: value[0] for key, value in given.items() if value}
    if model_args is not None:
        overrides["model_args"] = _parse_model_args(model_args)
    features = read_request(recipe, overrides, None).features
    roots, encoders = roots or [features.out], encoders or [features.encoder]
    if len(roots) > 1 and len(encoders) not in (1, len(roots)):
        raise UserError(
            f"--stores names {len(roots)} roots and --encoder {len(encoders)}; give one for each, or one for all."
        )
    if raw and max(len(roots), len(encoders)) > 1:
        raise UserError("--raw encodes again with one encoder; name one store root and one encoder.")
    pairs = zip(roots * (len(encoders) if len(roots) == 1 else 1), encoders * (len(roots) if len(encoders) == 1 else 1))
    numbers = run_knn_viz(
        [Compared(place(root), name) for root, name in pairs],
        out,
        queries,
        neighbours,
        _count_of(rows),
        seed,
        index,
        features if raw else None,
    )
    _print_neighbours(numbers, out)


def _print_neighbours(numbers: dict[str, Any], out: Path) -> None:
    from featurize.knn_viz import overlap_path

    agreement, near = numbers["label_agreement"], numbers["neighbours"]
    wide = max(map(len, agreement))
    if numbers["chance"] is None:
        click.echo("These pictures have no labels, so there is no label agreement.")
    else:
        click.echo(
            f"Share of the {near} nearest neighbours with the query's label ({numbers['rows']:,} rows compared):"
        )
        for name, share in (agreement | {"chance": numbers["chance"]}).items():
            click.echo(f"  {name:<{wide}} {share:.1%}")
    for name, index in numbers["index"].items():
        if index["kind"] != "exact":
            click.echo(f"  {name:<{wide}} {index['described']}")
    click.echo(f"Share of the {near} nearest neighbours in common:")
    for name, shares in zip(numbers["overlap"]["spaces"], numbers["overlap"]["matrix"], strict=True):
        click.echo(f"  {name:<{wide}} " + " ".join(f"{share:4.0%}" for share in shares))
    click.echo(f"{out} shows the neighbours, {overlap_path(out)} what they have in common.")


def _several(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _count_of(rows: str) -> int | None:
    """The number of --rows; None for all."""
    if rows == "all":
        return None
    if not rows.isdecimal() or int(rows) < 3:
        raise UserError(f"--rows is '{rows}'; give a number from 3 on, or all.")
    return int(rows)


@commands.command()
@click.argument("root", required=False)
@_recipe
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw explained variance, effective rank, outlier tokens, and mean and std of the levels' channels.",
)
def info(root: str | None, recipe: Path | None, picture: Path | None) -> None:
    """Say what the store ROOT holds; without it, the recipe's."""
    from featurize.info import describe
    from featurize.info_picture import draw_info

    where = _root(root, recipe)
    click.echo(describe(where))
    if picture is not None:
        draw_info(where, picture)
        click.echo(f"{picture} shows it.")


@commands.command("ls")
@click.argument("folder", required=False)
def ls(folder: str | None) -> None:
    """List all store roots in FOLDER (default: stores, else the working directory): arrays, sizes, states, what made them."""
    from featurize.catalogue import catalogue

    default = "stores" if Path("stores").is_dir() else "."
    click.echo(catalogue(place(folder or default)))


@commands.command()
@click.argument("root", required=False)
@_recipe
@click.option(
    "--re-encode", type=click.IntRange(min=0), default=0, metavar="K", help="Encode K random rows again as well."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses those rows.")
@_workers
@_scheduler
def verify(
    root: str | None, recipe: Path | None, re_encode: int, seed: int, workers: int | None, scheduler: str | None
) -> None:
    """Check the store ROOT (the recipe's without it): the ledger, every block's digest, NaN and constant rows, mean and std,
    levels against their base store. One line a finding, and exit code 1 when there is one."""
    from featurize.engine import engine
    from featurize.verify import arrays_of
    from featurize.verify import verify as run_verify

    folder = _root(root, recipe)
    with engine(workers if workers is not None else _few_workers(folder, scheduler), scheduler) as run:
        findings = run_verify(folder, run)
        if re_encode:
            from featurize.spot_check import spot_check

            findings += spot_check(folder, re_encode, seed, run)
    _report(findings, f"{folder} is whole: {len(arrays_of(folder))} arrays, every block as it was written.")


@commands.command()
@click.argument("root", required=False)
@_recipe
@_workers
@_scheduler
@_wait
def repair(root: str | None, recipe: Path | None, workers: int | None, scheduler: str | None, wait: bool) -> None:
    """Do again exactly what `verify` finds wrong in the store ROOT (the recipe's without it)."""
    from featurize.engine import engine
    from featurize.interrupt import finishing_tasks
    from featurize.lock import holding
    from featurize.repair import repair as run_repair

    folder = _root(root, recipe)
    few = workers if workers is not None else _few_workers(folder, scheduler)
    with engine(few, scheduler) as run, holding(folder, wait), finishing_tasks():
        findings = run_repair(folder, run, click.echo)
    _report(findings, f"{folder} is whole.")


def _root(root: str | None, recipe: Path | None) -> Path:
    return place(root or read_request(recipe, {}, None).features.out)


def _few_workers(root: Path, scheduler: str | None) -> int | None:
    """None, or 0 where a store is read sooner than workers start."""
    from featurize.store import opened
    from featurize.verify import arrays_of

    if scheduler is not None:
        return None
    try:
        return 0 if sum(opened(path).nbytes for path in arrays_of(root)) < SMALL_STORE else None
    except Exception:  # zarr raises many kinds for a damaged array
        return 0


def _report(findings: Sequence[object], whole: str) -> None:
    for finding in findings:
        click.echo(str(finding))
    if findings:
        sys.exit(1)
    click.echo(whole)


@commands.command()
@click.option("--count", type=click.IntRange(min=1), default=6000, show_default=True, help="How many.")
@click.option("--size", type=click.IntRange(8, 1024), default=32, show_default=True, help="Side in pixels.")
@click.option("--split", type=click.Choice(choices("split")), default="train", show_default=True, help="Which scenes.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed draws other scenes.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder of the shards.")
def scenes(count: int, size: int, split: str, seed: int, out: Path) -> None:
    """Draw scenes and write them as webdataset shards."""
    from featurize.scenes import write_shards

    shards = write_shards(count, size, split, out, seed)
    click.echo(f"{count:,} scenes are in {len(shards)} shards: {shards[0]} ... {shards[-1].name}")


def _parse_model_args(text: str) -> dict[str, Any]:
    """`a=1,b=x` or a YAML (JSON) mapping."""
    try:
        parsed = yaml.safe_load(text)
        if isinstance(parsed, str) and "=" in parsed:
            pairs = [part.split("=", 1) for part in text.split(",")]
            parsed = {key.strip(): yaml.safe_load(value) for key, value in pairs}
    except (yaml.YAMLError, ValueError):
        parsed = None
    if not isinstance(parsed, dict):
        raise UserError(f"--model-args '{text}' is no list of arguments; write img_size=64,patch_size=8.")
    return parsed


def main() -> None:
    """Entry point: 0 done, 1 for an error of the input or the machine, 2 for a wrong command line, 130 interrupted."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("featurize").setLevel(logging.INFO)
    try:
        commands(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        sentence = explain_os_error(error)
        if sentence is None:
            raise
        _fail(str(sentence))
    except (KeyboardInterrupt, click.Abort) as error:
        # click turns what an extraction raises into Abort, and keeps it as the cause.
        told = next((str(raised) for raised in (error, error.__cause__) if isinstance(raised, Interrupted)), None)
        told = told or "interrupted: what is written is kept; run the same command again to go on."
        click.echo(f"\n{told}", err=True)
        sys.exit(130)


def _fail(sentence: str) -> None:
    click.echo(f"error: {sentence}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
