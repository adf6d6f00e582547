"""`sample`, `decode` for real images, and the sheets of images: `hierarchy` and `sheet`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from nestgen.cli.options import (
    NumberOr,
    Root,
    depth_option,
    recipe_of,
    recipe_option,
    seed_option,
    set_option,
    sigma_option,
    store_option,
    vae_option,
)
from nestgen.errors import UserError

if TYPE_CHECKING:
    from upath import UPath

    from nestgen.recipe.recipe import Recipe
    from nestgen.sharing.folder import About, Exported

pretrained_option = click.option(
    "--pretrained",
    metavar="NAME",
    help="An exported folder, a hierarchy that ships with nestgen, or a repository of the Hugging Face Hub, instead of a recipe.",
)
freeze_option = click.option(
    "--freeze-from", type=int, metavar="K", help="Keep levels K and above; 1 by default with --like."
)


@click.command()
@click.option("--count", type=click.IntRange(1), help="How many; the recipe's evaluation.count by default.")
@seed_option
@click.option("--batch-size", type=click.IntRange(1), help="Images at a time; the recipe's by default.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the samples.")
@pretrained_option
@click.option(
    "--step",
    type=NumberOr("step", "best"),
    metavar="STEP",
    help="Each level's checkpoint of that step, or its `best` by the previews; by default the newest.",
)
@recipe_option
@depth_option
@sigma_option
@set_option
@click.option(
    "--label", metavar="CLASS", help="The class of all samples, by number or name; by default each has a random one."
)
@click.option("--prompt", metavar="TEXT", help="The caption of all samples; `featurize embed-text` embeds it.")
@click.option(
    "--prompts",
    type=Root(),
    metavar="ROOT",
    help="Embedded captions: of `featurize embed-text`, prompt i for image i; of a data set, one per image.",
)
@click.option(
    "--like",
    type=NumberOr("row", "each"),
    metavar="ROW",
    help="Freeze levels to this real image; `each`: image i to row i.",
)
@freeze_option
@store_option
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="One for each GPU, say.")
@click.option("--overwrite", is_flag=True, help="Replace samples of other settings or denoisers in that folder.")
@vae_option
def sample(
    count: int | None,
    seed: int | None,
    batch_size: int | None,
    out: Path,
    pretrained: str | None,
    step: int | Literal["best"] | None,
    recipe_file: Path | None,
    depth: int | None,
    sigmas: tuple[float, ...] | None,
    settings: dict[str, Any],
    label: str | None,
    prompt: str | None,
    prompts: Path | UPath | None,
    like: int | str | None,
    freeze_from: int | None,
    store: Path | UPath | None,
    processes: int,
    overwrite: bool,
    vae: Path | None,
) -> None:
    """Samples images from the top level down.

    OUT gets 000000.png, ..., their latents and the card sample.json; the first 64 are together in OUT-sheet.png.
    Interrupted, the same command goes on; with more --count, to more images; with other settings or denoisers and
    --overwrite, it samples again the levels they change. Begun several times at once, on several machines too, it shares
    the work. Image i does not depend on batch size or number of processes, up to
    rounding.

    Example: nestgen sample --count 64 --out samples
    """
    from nestgen.recipe.locations import store_root
    from nestgen.sampling.captions import embed_prompts
    from nestgen.sampling.conditions import Request
    from nestgen.sampling.frozen import FrozenSource
    from nestgen.sampling.sample import sample
    from nestgen.sampling.trained import find_levels

    if pretrained is not None:
        if step is not None:
            raise click.UsageError("--pretrained excludes --step")
        exported = _exported(pretrained, recipe_file, depth, sigmas, settings, like is not None, store)
        recipe, levels, about = exported.recipe, exported.levels, exported.about
    else:
        recipe, about = recipe_of(recipe_file, depth, sigmas, settings), None
        levels = find_levels(recipe, step=step)
    if prompt is not None and prompts is not None:
        raise click.UsageError("--prompt and --prompts exclude each other")
    if store is not None and like is None:
        raise click.UsageError("--store has the rows of --like; give --like too")
    frozen = None
    if like is not None:
        row = None if like == "each" else int(like)
        frozen = FrozenSource(1 if freeze_from is None else freeze_from, store or store_root(recipe), row)
    elif freeze_from is not None:
        frozen = FrozenSource(freeze_from)
    request = Request(
        count=count or recipe.evaluation.count,
        seed=recipe.seed if seed is None else seed,
        batch=batch_size or recipe.sampling.batch,
        label=_class_number(label, recipe, about),
        frozen=frozen,
        prompts=embed_prompts(recipe, [prompt]) if prompt is not None else prompts,
        prompt=prompt,
        vae=vae,
        overwrite=overwrite,
    )
    sample(recipe, out, request, processes, levels)


def _class_number(label: str | None, recipe: Recipe, about: About | None) -> int | None:
    """The class of --label, a number or a name. Without `about` the recipe's stores say the names.

    Raises UserError for a name that no class has.
    """
    if label is None or label.isdecimal():
        return None if label is None else int(label)
    from nestgen.sampling.arguments import label_number
    from nestgen.sharing.about import about_stores

    try:
        return label_number(label, (about or about_stores(recipe)).class_names)
    except ValueError as error:
        raise UserError(f"--label: {error}") from None


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("hierarchy.png"), show_default=True)
@click.option("--columns", type=click.IntRange(2, 1000), default=8, show_default=True, help="Images per row.")
@click.option(
    "--freeze-from", type=int, metavar="K", help="Only the row of levels K and above; by default each in turn."
)
@click.option("--like", type=click.IntRange(0), metavar="ROW", help="Freeze to this real image.")
@click.option(
    "--interpolate", type=click.IntRange(0), nargs=2, metavar="A B", help="Interpolate from one row to another."
)
@click.option("--over-depth", is_flag=True, help="Freeze nothing: the same seeds at L = 1, 2, ...")
@click.option(
    "--kept",
    "preservation",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="CARD",
    help="Score cards of samples made with --like each --freeze-from K: what they preserve is written at row K.",
)
@store_option
@seed_option
@pretrained_option
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
    preservation: tuple[Path, ...],
    store: Path | UPath | None,
    seed: int | None,
    pretrained: str | None,
    recipe_file: Path | None,
    depth: int | None,
    sigmas: tuple[float, ...] | None,
    settings: dict[str, Any],
    vae: Path | None,
) -> None:
    """Draws a sheet of what each level holds.

    It has a row for each k, with levels k and above frozen and the rest sampled again. They are frozen to a sample; with
    --like to a real image; with --interpolate to steps between two. How much each row's images vary goes to OUT with the
    ending .json.

    Example: nestgen hierarchy --like 17 --out like-17.png
    """
    from nestgen.recipe.locations import store_root
    from nestgen.scoring.hierarchy_sheet import SheetOptions, hierarchy_sheet

    if sum((like is not None, interpolate is not None, over_depth)) > 1:
        raise click.UsageError("--like, --interpolate and --over-depth exclude each other")
    needs_rows = like is not None or interpolate is not None
    if store is not None and not needs_rows:
        raise click.UsageError("--store has the rows of --like and --interpolate; give one of them too")
    if over_depth and (freeze_from is not None or preservation):
        raise click.UsageError("--over-depth freezes nothing; it excludes --freeze-from and --kept")
    levels = None
    if pretrained is not None:
        if over_depth:
            raise click.UsageError("--pretrained excludes --over-depth: an exported hierarchy has one depth")
        exported = _exported(pretrained, recipe_file, depth, sigmas, settings, needs_rows, store)
        recipe, levels = exported.recipe, exported.levels
    else:
        recipe = recipe_of(recipe_file, depth, sigmas, settings)
    options = SheetOptions(freeze_from, store or store_root(recipe), like, interpolate, over_depth)
    hierarchy_sheet(recipe, out, columns, recipe.seed if seed is None else seed, options, vae, preservation, levels)


def _exported(
    name: str,
    recipe_file: Path | None,
    depth: int | None,
    sigmas: tuple[float, ...] | None,
    settings: dict[str, Any],
    needs_rows: bool,
    store: Path | UPath | None,
) -> Exported:
    """An exported hierarchy, with `settings` in its recipe's `sampling`."""
    from nestgen.sharing.folder import read_exported
    from nestgen.sharing.names import find_pretrained

    if (recipe_file, depth, sigmas) != (None, None, None):
        raise click.UsageError("--pretrained excludes --recipe, --depth and --sigma")
    folder = find_pretrained(name)
    if needs_rows and store is None:
        raise click.UsageError(
            "an exported hierarchy has no rows: give --store ROOT, made by `featurize extract SOURCE --recipe "
            f"{folder / 'features' / 'nested.yaml'} --out ROOT`"
        )
    exported = read_exported(folder)
    return replace(exported, recipe=exported.recipe.with_sampling(settings))


@click.command()
@click.argument("folders", metavar="DIR...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--titles", required=True, help="One per folder, separated by commas.")
@click.option("--count", type=click.IntRange(1), default=8, show_default=True, help="Images of each folder.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The sheet, a PNG.")
def sheet(folders: tuple[Path, ...], titles: str, count: int, out: Path) -> None:
    """Draws a sheet with a row for each sample folder.

    The same seeds stand under each other.

    Example: nestgen sheet one two --titles 'L = 1,L = 2' --out sheet.png
    """
    from nestgen.images import folders_sheet, write_image

    names = titles.split(",")
    if len(names) != len(folders):
        raise click.BadParameter(f"{len(names)} titles for {len(folders)} folders", param_hint="--titles")
    write_image(folders_sheet(folders, names, count), out)


@click.command()
@click.option(
    "--count", type=click.IntRange(1), default=64, show_default=True, help="How many, from row 0 on, at most."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for 000000.png, ...")
@store_option
@pretrained_option
@recipe_option
@vae_option
def decode(
    count: int,
    out: Path,
    store: Path | UPath | None,
    pretrained: str | None,
    recipe_file: Path | None,
    vae: Path | None,
) -> None:
    """Decodes real images from their z_0.

    They are the bound of what samples can look like: what the codec loses of an image no sample has.

    Example: nestgen decode --store stores/scenes-val --count 10 --out decoded
    """
    from nestgen.recipe.locations import store_root
    from nestgen.recipe.recipe import load_recipe
    from nestgen.scoring.decoded import write_decoded

    if pretrained is not None:
        recipe = _exported(pretrained, recipe_file, None, None, {}, True, store).recipe
    else:
        recipe = load_recipe(recipe_file)
    where = store or store_root(recipe)
    print(f"{write_decoded(recipe, where, out, count, vae)} images of {where}, decoded, in {out}")
