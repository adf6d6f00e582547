"""The command line: parses, calls, and turns errors into one sentence and an exit code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nestgen.errors import LostPartner, UserError
from nestgen.launch import LOST, launch

if TYPE_CHECKING:
    from nestgen.recipe import Recipe


class Commands(click.Group):
    """A group whose commands end with `error: <sentence>` and exit code 1, or 130 when interrupted."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            sentence, code = f"error: {error}", LOST if isinstance(error, LostPartner) else 1
        except OSError as error:  # no space, no permission: the sentence is the system's
            where = f"{error.filename}: " if error.filename else ""
            sentence, code = f"error: {where}{error.strerror or error}", 1
        except KeyboardInterrupt as interrupt:
            sentence, code = str(interrupt) or "interrupted", 130
        click.echo(sentence, err=True)
        return ctx.exit(code)


recipe_option = click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    help="The recipe, ./nested.yaml by default.",
)
depth_option = click.option("--depth", type=int, help="Cut the hierarchy to its first so many levels.")


class Sigmas(click.ParamType):
    """Numbers separated by commas."""

    name = "sigma,..."

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The numbers."""
        try:
            return tuple(float(one) for one in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers, such as 1,0.5")


sigma_option = click.option(
    "--sigma", "sigmas", type=Sigmas(), help="Noise on levels 1, 2, ... as conditions, instead of the recipe's."
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nestgen")
def main() -> None:
    """Trains one denoiser per level of a hierarchy of stored latents, and samples from the top down."""


@main.command()
@recipe_option
@depth_option
@sigma_option
def info(recipe_file: Path | None, depth: int | None, sigmas: tuple[float, ...] | None) -> None:
    """Shows each level's shape, parameters and GFlops, and what stores and trained denoisers there are."""
    from nestgen.info import show

    click.echo(show(_recipe(recipe_file, depth, sigmas)))


level_option = click.option(
    "--level", type=int, required=True, help="The level whose denoiser is meant; 0 is the data."
)


@main.command()
@level_option
@recipe_option
@depth_option
@sigma_option
@click.option("--steps", type=click.IntRange(1), help="Train to so many steps, whatever the recipe says.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes of this machine that share the training, each on a GPU of its own or a share of the cores.",
)
@click.option(
    "--init",
    type=click.Path(path_type=Path),
    help="First weights: a published U-ViT checkpoint (nnet_ema.pth) or another denoiser's safetensors.",
)
@click.pass_context
def train(
    context: click.Context,
    level: int,
    recipe_file: Path | None,
    depth: int | None,
    sigmas: tuple[float, ...] | None,
    steps: int | None,
    processes: int,
    init: Path | None,
) -> None:
    """Trains a level's denoiser, going on from its newest checkpoint. Levels may train side by side.

    Ctrl-C ends the step under way and keeps it. Over several machines: `accelerate launch -m nestgen train --level 0`
    or `torchrun -m nestgen train --level 0`.
    """

    recipe = _recipe(recipe_file, depth, sigmas)
    if steps is not None:
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": steps})})
    if processes > 1:
        sigma = None if sigmas is None else ",".join(map(str, sigmas))
        options = {"recipe": recipe_file, "depth": depth, "sigma": sigma, "steps": steps, "init": init, "level": level}
        given = [f"--{name}={value}" for name, value in options.items() if value is not None]
        context.exit(launch(processes, ["train", *given]))
    from nestgen.train import train

    train(recipe, level, init)


@main.command()
@level_option
@click.option(
    "--length", type=float, required=True, help="Standard deviation of the average's window, as a share of the steps."
)
@click.option("--name", required=True, help="The run to write: runs/NAME, to sample from by a recipe of that name.")
@click.option("--step", type=click.IntRange(1), help="Up to that step; the newest snapshot's by default.")
@recipe_option
@depth_option
@sigma_option
def ema(
    level: int,
    length: float,
    name: str,
    step: int | None,
    recipe_file: Path | None,
    depth: int | None,
    sigmas: tuple[float, ...] | None,
) -> None:
    """Makes an average of the weights of any length from the snapshots of a training (training.ema_snapshots)."""
    from nestgen.snapshots import reconstruct

    click.echo(reconstruct(_recipe(recipe_file, depth, sigmas), level, length, name, step))


seed_option = click.option(
    "--seed", type=click.IntRange(0), help="Image i depends on it and i; the recipe's by default."
)


class Setting(click.ParamType):
    """KEY=VALUE of the recipe's section `sampling`, the value in YAML."""

    name = "key=value"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, object]:
        """The key and the value."""
        from nestgen.yaml12 import parse_yaml

        key, equals, text = value.partition("=")
        if not equals:
            self.fail(f"{value!r} is not KEY=VALUE, such as steps=20 or guidance='[0.5, 1]'")
        return key.strip().removeprefix("sampling."), parse_yaml(text, f"--set {key}")


class Row(click.ParamType):
    """A row of a store, or `each`."""

    name = "row"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """The number, or `each`."""
        if value != "each" and not value.isdecimal():
            self.fail(f"{value!r} is neither a row number nor `each`")
        return value if value == "each" else int(value)


def _recipe(
    file: Path | None,
    depth: int | None,
    sigmas: tuple[float, ...] | None = None,
    settings: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe of a command, cut and changed as its options say."""
    from nestgen.recipe import load_recipe

    recipe = load_recipe(file)
    if depth is not None:
        recipe = recipe.depth(depth)
    if sigmas is not None:
        recipe = recipe.with_sigmas(sigmas)
    return recipe.with_sampling(settings) if settings else recipe


set_option = click.option(
    "--set",
    "settings",
    type=Setting(),
    multiple=True,
    callback=lambda ctx, param, pairs: dict(pairs),
    metavar="KEY=VALUE",
    help="Another value of a key of `sampling`: steps=20, guidance='[0.5, 1, 0]', sampler=heun, ...",
)
freeze_option = click.option(
    "--freeze-from", type=int, metavar="K", help="Keep levels K and above; 1 by default with --like."
)
store_option = click.option(
    "--store", type=click.Path(path_type=Path), help="Store root of the rows; the training rows by default."
)
vae_option = click.option(
    "--vae", type=click.Path(path_type=Path), help="The VAE's weights, if they are not where z_0's store says."
)


@main.command()
@click.option("--count", type=click.IntRange(1), help="How many; the recipe's evaluation.count by default.")
@seed_option
@click.option("--batch-size", type=click.IntRange(1), help="Pictures at a time; the recipe's by default.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the samples.")
@recipe_option
@depth_option
@sigma_option
@set_option
@click.option("--label", type=int, help="The class of all samples; by default each draws its own.")
@click.option("--prompt", metavar="TEXT", help="The caption of all samples; `featurize embed-text` embeds it.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="ROOT",
    help="Embedded captions: of `featurize embed-text`, prompt i for image i; of a data set, one of each picture's.",
)
@click.option("--like", type=Row(), metavar="ROW", help="Keep levels of this real picture; `each`: image i of row i.")
@freeze_option
@store_option
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="One for each GPU, say.")
@vae_option
def sample(
    count: int | None,
    seed: int | None,
    batch_size: int | None,
    out: Path,
    recipe_file: Path | None,
    depth: int | None,
    sigmas: tuple[float, ...] | None,
    settings: dict[str, Any],
    label: int | None,
    prompt: str | None,
    prompts: Path | None,
    like: int | str | None,
    freeze_from: int | None,
    store: Path | None,
    processes: int,
    vae: Path | None,
) -> None:
    """Draws samples from the top level down: OUT/000000.png, ..., their latents, sample.json and OUT-sheet.png.

    Interrupted, the same command goes on; with more --count, to more images; with other settings or denoisers, it
    draws anew the levels they change. Image i is the same for any batch size and number of processes.
    """
    from nestgen.cards import Request
    from nestgen.prompts import embed_prompt
    from nestgen.sample import sample
    from nestgen.sources import Source, training_root

    recipe = _recipe(recipe_file, depth, sigmas, settings)
    if prompt is not None and prompts is not None:
        raise click.UsageError("--prompt and --prompts exclude each other")
    source = None
    if like is not None:
        row = None if like == "each" else int(like)
        source = Source(1 if freeze_from is None else freeze_from, store or training_root(recipe), row)
    elif freeze_from is not None:
        source = Source(freeze_from)
    request = Request(
        count=count or recipe.evaluation.count,
        seed=recipe.seed if seed is None else seed,
        batch=batch_size or recipe.sampling.batch,
        label=label,
        source=source,
        prompts=embed_prompt(recipe, prompt) if prompt is not None else prompts,
        prompt=prompt,
        vae=vae,
    )
    sample(recipe, out, request, processes)


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("hierarchy.png"), show_default=True)
@click.option("--columns", type=click.IntRange(2), default=8, show_default=True, help="Pictures in a row.")
@click.option(
    "--freeze-from", type=int, metavar="K", help="Only the row of levels K and above; by default each in turn."
)
@click.option("--like", type=click.IntRange(0), metavar="ROW", help="Freeze to this real picture.")
@click.option("--interpolate", type=click.IntRange(0), nargs=2, metavar="A B", help="Walk from one row to another.")
@click.option("--over-depth", is_flag=True, help="Freeze nothing: the same seeds at L = 1, 2, ...")
@store_option
@seed_option
@recipe_option
@depth_option
@sigma_option
@set_option
@vae_option
def hierarchy(
    out: Path,
    columns: int,
    freeze_from: int | None,
    like: int | None,
    interpolate: tuple[int, int] | None,
    over_depth: bool,
    store: Path | None,
    seed: int | None,
    recipe_file: Path | None,
    depth: int | None,
    sigmas: tuple[float, ...] | None,
    settings: dict[str, Any],
    vae: Path | None,
) -> None:
    """Draws a sheet that looks into the hierarchy: a row for each k, levels k and above frozen, the rest drawn anew.

    They are frozen to a sample; with --like to a real picture; with --interpolate to the way between two. How much
    each row's pictures vary goes to OUT with the ending .json.
    """
    from nestgen.hierarchy import Look, hierarchy
    from nestgen.sources import training_root

    if sum((like is not None, interpolate is not None, over_depth)) > 1:
        raise click.UsageError("--like, --interpolate and --over-depth exclude each other")
    recipe = _recipe(recipe_file, depth, sigmas, settings)
    look = Look(freeze_from, store or training_root(recipe), like, interpolate, over_depth)
    hierarchy(recipe, out, columns, recipe.seed if seed is None else seed, look, vae)


@main.command()
@click.option("--samples", type=click.Path(path_type=Path), required=True, help="Folder of `nestgen sample`.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="Store root to score against; by default the recipe's evaluation.reference, else the training rows.",
)
@click.option(
    "--samples-store",
    type=click.Path(path_type=Path),
    help="Store root of the encoded samples: `featurize extract folder:SAMPLES --basis ...`.",
)
@click.option(
    "--level-shape", default="1x1x64", show_default=True, help="The level of --samples-store that is compared."
)
@click.option("--encoder", help="The encoder that made that level; the recipe's by default.")
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    help="Real pictures for an FID: a folder, or an .npz of mu and sigma; the recipe's evaluation.pictures by default.",
)
@click.option(
    "--inception", type=click.Path(path_type=Path), help="Inception's weights for an FID, if not in torch's cache."
)
@click.option("--out", type=click.Path(path_type=Path), help="The card; SAMPLES/evaluation.json by default.")
@recipe_option
def evaluate(
    samples: Path,
    reference: Path | None,
    samples_store: Path | None,
    level_shape: str,
    encoder: str | None,
    pictures: Path | None,
    inception: Path | None,
    out: Path | None,
    recipe_file: Path | None,
) -> None:
    """Scores samples per level, in the frozen encoder's space and by FID, into one card (docs/evaluation.md)."""
    from nestgen.evaluate import Against, evaluate

    against = Against(reference, samples_store, level_shape, encoder, pictures, inception)
    evaluate(_recipe(recipe_file, None), samples, against, out or samples / "evaluation.json")


reference_option = click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="Store root of held-out pictures; by default the recipe's evaluation.reference, else the training rows.",
)


@main.command()
@click.option("--samples", type=click.Path(path_type=Path), required=True, help="Folder of `nestgen sample`.")
@reference_option
@click.option("--out", type=click.Path(path_type=Path), default=Path("diagnosis.png"), show_default=True)
@recipe_option
@sigma_option
def diagnose(
    samples: Path, reference: Path | None, out: Path, recipe_file: Path | None, sigmas: tuple[float, ...] | None
) -> None:
    """Says which level loses quality: its score given true levels above it, given generated ones, and the gap.

    The numbers go to OUT with the ending .json, the latents drawn for it to the folder OUT without an ending.
    """
    from nestgen.diagnose import diagnose

    diagnose(_recipe(recipe_file, None, sigmas), samples, reference, out)


@main.command()
@click.option("--samples", type=click.Path(path_type=Path), required=True, help="Folder of `nestgen sample`.")
@click.option("--count", type=click.IntRange(1), default=10, show_default=True, help="Samples on the sheet.")
@reference_option
@click.option("--out", type=click.Path(path_type=Path), default=Path("nearest.png"), show_default=True)
@vae_option
@recipe_option
def nearest(
    samples: Path, count: int, reference: Path | None, out: Path, vae: Path | None, recipe_file: Path | None
) -> None:
    """Looks for memorised pictures: a sheet of samples with their nearest training rows at each level.

    How near all samples lie, beside held-out pictures, goes to OUT with the ending .json.
    """
    from nestgen.nearest import nearest

    nearest(_recipe(recipe_file, None), samples, out, count, reference, vae)


@main.command()
@click.argument("cards", metavar="CARD...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--grid", type=click.Path(path_type=Path), help="Draw a grid of depths and sigmas to this PNG instead.")
@click.option("--space", help="Space of the grid; by default the last that all cards have.")
@click.option("--score", default="frechet_distance", show_default=True, help="Score of the grid.")
def compare(cards: tuple[Path, ...], grid: Path | None, space: str | None, score: str) -> None:
    """Puts score cards of `nestgen evaluate` side by side, or says why they cannot be compared."""
    from nestgen import compare

    click.echo(compare.compare(cards) if grid is None else compare.grid(cards, space, score, grid))


@main.command()
@click.argument("folders", metavar="DIR...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--titles", required=True, help="One per folder, separated by commas.")
@click.option("--count", type=click.IntRange(1), default=8, show_default=True, help="Pictures of each folder.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The sheet, a PNG.")
def sheet(folders: tuple[Path, ...], titles: str, count: int, out: Path) -> None:
    """Draws a sheet with a row for each sample folder: the same seeds stand under each other."""
    from nestgen.sheet import folders_sheet, write_picture

    names = titles.split(",")
    if len(names) != len(folders):
        raise click.BadParameter(f"{len(names)} titles for {len(folders)} folders", param_hint="--titles")
    write_picture(folders_sheet(folders, names, count), out)
