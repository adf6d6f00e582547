"""The commands that write stores: `extract`, `levels` and `embed-text`; `plan` estimates what an extraction takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featurize.cli.options import (
    SMALL_STORE,
    decoders_option,
    parse_model_args,
    recipe_option,
    scheduler_option,
    wait_option,
    workers_option,
)
from featurize.errors import UserError
from featurize.io.files import resolve_path
from featurize.recipe import Features, choices, read_request

DEFAULTS = {name: field.default for name, field in Features.model_fields.items() if not field.is_required()}


def _option(name: str, text: str, **settings: Any) -> Any:
    """An option of `extract` that overrides the recipe's key of the same name."""
    key = name.lstrip("-").replace("-", "_")
    default = DEFAULTS.get(key)
    shown = f" [default: the recipe's, else {default}]" if default not in (None, {}) else ""
    return click.option(name, key, help=text + shown, **settings)


@click.command()
@click.argument("source", required=False)
@recipe_option
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
@_option(
    "--icc",
    "Embedded colour profiles: ignored, as by the encoders' authors, or converted to sRGB.",
    type=click.Choice(choices("icc")),
)
@_option(
    "--decoder",
    "How JPEGs are decoded: to Pillow's pixels; nvjpeg, on an NVIDIA GPU; or scaled:SIDE, by libjpeg to four, three, two or one "
    "eighths, of at least SIDE.",
    metavar="NAME",
)
@_option("--strict", "Refuse JPEGs that libjpeg warns of, like one whose middle is lost.", is_flag=True, default=None)
@click.option("--levels", metavar="SHAPES", help="Levels above z_0, like 4x4x16,2x2x8. [default: the recipe's]")
@_option("--z0", "Codec of z_0 and the picture's side: pixels:32, vae:256, taesd:256.", metavar="CODEC:SIDE")
@_option(
    "--z0-crop",
    "What the codec sees: the same as the encoder, or the crop of U-ViT's COCO (lanczos) or ImageNet (adm) latents.",
    type=click.Choice(choices("z0_crop")),
)
@_option(
    "--z0-weights",
    "The codec's weights: a name, a folder or a file; tiny or scenes for an embedded VAE.",
    metavar="PATH",
)
@_option("--z0-scale", "Latent scale. Without this the codec's own, and 0.23010 for SD's VAE on COCO.", type=float)
@_option("--z0-precision", "Precision of the codec's network.", type=click.Choice(choices("z0_precision")))
@_option("--text", "Embed the captions as well: clip (ViT-L/14, 77x768).", type=click.Choice(["clip"]))
@_option("--text-weights", "Weights of the text encoder.", metavar="FILE")
@_option("--views", "2 encodes the horizontal flip as well.", type=click.IntRange(1, 2))
@_option("--limit", "Take only the first images, this many.", type=click.IntRange(min=1))
@_option(
    "--split", "Split of scenes, COCO and ImageNet; folder: and wds: have none.", type=click.Choice(choices("split"))
)
@_option("--classes", "Only these of ImageNet's or a folder's classes: a list, or imagenet100.", metavar="FILE")
@_option("--base-channels", "Channels stored in the base store.", type=click.IntRange(min=1))
@_option(
    "--basis",
    "Take basis and standardisation of this store root: for a validation split. 'own' fits one on held-out images.",
    metavar="DIR",
)
@_option("--basis-rows", "Images on which the basis is fitted.", type=click.IntRange(min=1))
@_option(
    "--basis-tolerance",
    "Stop when that basis loses more than this share of the variance of all images.",
    type=click.FloatRange(min=0),
)
@_option("--max-bad", "Stop when more images than this can't be read: a count, or a share like 1%.", metavar="COUNT")
@workers_option
@decoders_option
@scheduler_option
@wait_option
def extract(
    recipe: Path | None,
    levels: str | None,
    workers: int | None,
    decoders: int | None,
    scheduler: str | None,
    wait: bool,
    model_args: str | None,
    **options: Any,
) -> None:
    """Encode images and write base store, levels and z_0.

    SOURCE is scenes, wds:SHARDS, folder:DIR, imagenet:DIR or coco:DIR (docs/sources.md); without it, what the recipe names.
    Run again, it continues where it stopped, and does nothing when all is there.

    Example: featurize extract folder:photos --encoder tiny --levels 4x4x16,1x1x32 --z0 pixels:64 --out stores/photos
    """
    from featurize.extraction.extract import extract as run_extract
    from featurize.reports.info import describe

    overrides = {key: value for key, value in options.items() if value is not None}
    if model_args is not None:
        overrides["model_args"] = parse_model_args(model_args)
    request = read_request(recipe, overrides, levels)
    run_extract(request, workers, scheduler, wait, decoders)
    click.echo(describe(resolve_path(request.features.out)))


@click.command()
@click.argument("shapes", required=False)
@recipe_option
@click.option("--out", metavar="DIR", help="Store root. [default: the recipe's]")
@click.option("--encoder", metavar="NAME", help="Encoder whose base store is used. [default: the recipe's, else tiny]")
@click.option("--basis", metavar="DIR", help="Store root whose standardisation is taken: for a validation split.")
@workers_option
@scheduler_option
@wait_option
def levels(
    shapes: str | None,
    recipe: Path | None,
    workers: int | None,
    scheduler: str | None,
    wait: bool,
    **options: str | None,
) -> None:
    """Derive levels from the base store, without the encoder.

    SHAPES are height x width x channels, separated by commas; by default the recipe's.

    Example: featurize levels 4x4x16,2x2x8 --out stores/photos
    """
    from featurize.execution.engine import engine
    from featurize.execution.interrupt import finishing_tasks
    from featurize.extraction.levels import derive_levels
    from featurize.extraction.targets import other_basis
    from featurize.io.lock import root_lock
    from featurize.store.layout import base_path, encoder_folder
    from featurize.store.read import read_sealed_metadata

    features = {key: value for key, value in options.items() if value is not None}
    request = read_request(recipe, features, shapes)
    if not request.levels:
        raise UserError("Which levels? Give SHAPES like 4x4x16,2x2x8, or a recipe (nested.yaml) with levels.")
    root = resolve_path(request.features.out)
    base = base_path(encoder_folder(root, request.features.encoder))
    if not root.exists():  # which the lock would make
        raise UserError(f"There is no store at {base}; `featurize extract` makes it.")
    with root_lock(root, wait):  # first, as the run that holds it may be writing the base store
        # A small base store is pooled sooner than workers start.
        few = workers is None and scheduler is None and read_sealed_metadata(base).nbytes < SMALL_STORE
        with engine(0 if few else workers, scheduler) as run, finishing_tasks():
            for level in derive_levels(base, request.levels, other_basis(request.features), run):
                click.echo(f"{level} is sealed")


@click.command("embed-text")
@click.option(
    "--prompts", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Prompts, one per line."
)
@click.option("--out", required=True, metavar="DIR", help="Folder of the embeddings.")
@click.option(
    "--text-weights", metavar="FILE", help="Weights of the text encoder. Without it they are fetched by name."
)
@workers_option
@scheduler_option
def embed_text(prompts: Path, out: str, text_weights: str | None, workers: int | None, scheduler: str | None) -> None:
    """Embed prompts with CLIP, for `nestgen sample`.

    It is the text tower of ViT-L/14, as for the captions of `extract --text clip`.

    Example: featurize embed-text --prompts prompts.txt --out prompts
    """
    from featurize.execution.engine import engine
    from featurize.extraction.captions import embed_prompts
    from featurize.text.tower import TextSpec

    with engine(0 if workers is None else workers, scheduler) as run:
        path = embed_prompts(prompts, out, TextSpec("clip", text_weights), run)
    click.echo(f"{path} is sealed")


@click.command("plan")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option(
    "--rows",
    type=click.IntRange(1),
    help="Number of images, where the source is not on this machine. [default: ImageNet's and COCO's published numbers]",
)
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Images per second, to compute the hours.")
@click.option("--measure", is_flag=True, help="Extract some of the images, as extract would all, to compute the hours.")
@workers_option
@decoders_option
@scheduler_option
def plan(
    recipe: Path | None,
    rows: int | None,
    rate: float | None,
    measure: bool,
    workers: int | None,
    decoders: int | None,
    scheduler: str | None,
) -> None:
    """Estimate rows, bytes and hours of an extraction.

    RECIPE is by default ./nested.yaml. `nestgen info` estimates the training.

    Example: featurize plan nested.yaml --rate 500
    """
    from featurize.extraction.plan import estimate

    if not measure and any(option is not None for option in (workers, decoders, scheduler)):
        raise UserError(
            "--workers, --decoders and --scheduler say who measures; give --measure too, or leave them out."
        )
    click.echo(estimate(read_request(recipe, {}, None), rows, rate, measure, workers, scheduler, decoders))
