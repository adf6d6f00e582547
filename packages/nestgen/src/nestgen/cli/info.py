"""What a recipe describes, in words: its levels with their counts, its stores, its trained denoisers."""

from __future__ import annotations

from nestgen.denoiser.config import bottleneck_warning, denoiser_config
from nestgen.denoiser.flops import PAPER, PublishedGrowth, count, growth, training_petaflops
from nestgen.errors import UserError
from nestgen.recipe.locations import run_dir, store_path
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import Level, shape_name
from nestgen.runs.checkpoint import newest
from nestgen.stores.store import open_store
from nestgen.text import table


def show(recipe: Recipe) -> str:
    """The whole text of `nestgen info`."""
    return "\n\n".join([_levels(recipe), _growth(recipe), _training(recipe), _stores(recipe), _denoisers(recipe)])


def _levels(recipe: Recipe) -> str:
    rows: list[tuple[str, ...]] = [
        ("level", "shape", "sigma", "tokens", "conditions", "parameters", "GFlops", "with attention")
    ]
    for number, level in enumerate(recipe.levels):
        config = denoiser_config(recipe, number)
        counts = count(config)
        rows.append(
            (
                f"z_{number}",
                shape_name(level.shape),
                _sigma(level) if number else "",
                str(level.grid[0] * level.grid[1]),
                ", ".join(f"z_{above}" for above in recipe.conditions(number)),
                f"{counts.parameters / 1e6:.3f}M",
                f"{counts.gflops:.3f}",
                f"{counts.gflops_true:.3f}",
            )
        )
    labels = f"{recipe.denoiser.labels} labels" if recipe.denoiser.labels else "no labels"
    return (
        f"{recipe.file}: {recipe.name}, {len(recipe.levels)} level(s), denoiser {recipe.denoiser.size}, {labels}\n"
        "GFlops are of one image's forward pass by the paper's convention, which leaves out attention products.\n\n"
    ) + "\n".join([table(rows), *_warnings(recipe)])


def _warnings(recipe: Recipe) -> list[str]:
    warnings = [bottleneck_warning(denoiser_config(recipe, number)) for number in range(len(recipe.levels))]
    return [f"warning: of z_{number}, {sentence}" for number, sentence in enumerate(warnings) if sentence]


def _sigma(level: Level) -> str:
    return f"{level.sigma[0]:g} to {level.sigma[1]:g}" if isinstance(level.sigma, tuple) else f"{level.sigma:g}"


def _growth(recipe: Recipe) -> str:
    paper = _paper(recipe)
    header = ("L", "adds", "parameters", "GFlops", "with attention")
    rows: list[tuple[str, ...]] = [(*header, "paper: parameters", "GFlops") if paper else header]
    for number, level in enumerate(recipe.levels):
        before, after = (
            [denoiser_config(recipe.depth(depth), level) for level in range(depth)] if depth else []
            for depth in (number, number + 1)
        )
        counts = growth(before, after)
        row: tuple[str, ...] = (
            f"{number + 1}",
            f"z_{number} {shape_name(level.shape)}",
            f"{counts.parameters / 1e6:.3f}M",
            f"{counts.gflops:.3f}",
            f"{counts.gflops_true:.3f}",
        )
        if paper:
            row += (f"{paper.parameters[number]:.2f}M", f"{paper.gflops[number]:.2f}")
        rows.append(row)
    note = f"; beside it the paper's {paper.name}" if paper else ""
    return f"What each L adds (its denoiser, and the condition path it gives the level below){note}\n\n" + table(rows)


def _training(recipe: Recipe) -> str:
    options = recipe.training
    each = [training_petaflops(recipe, count(denoiser_config(recipe, number))) for number in range(len(recipe.levels))]
    rows: list[tuple[str, ...]] = [("denoiser", "PFlops", "hours at 100 TFlop/s")]
    for name, petaflops in [*((f"D_{number}", one) for number, one in enumerate(each)), ("together", sum(each))]:
        rows.append((name, f"{petaflops:.4g}", f"{petaflops / 0.1 / 3600:.3g}"))
    return (
        f"Training: {options.steps:,} steps of {options.batch:,} images, three forward passes each, attention included\n\n"
    ) + table(rows)


def _paper(recipe: Recipe) -> PublishedGrowth | None:
    shapes, sizes = tuple(level.shape for level in recipe.levels), {level.size for level in recipe.levels}
    return next(
        (
            one
            for one in PAPER
            if sizes <= {None, one.size} and one.size == recipe.denoiser.size and one.shapes[: len(shapes)] == shapes
        ),
        None,
    )


def _stores(recipe: Recipe) -> str:
    lines = []
    for number in range(len(recipe.levels)):
        path = store_path(recipe, number)
        try:
            store = open_store(path)
            lines.append(f"z_{number}  {path}: {store.rows} rows, {store.views} view(s)")
        except UserError as error:
            lines.append(f"z_{number}  {error}")
    return "Stores\n\n" + "\n".join(lines)


def _denoisers(recipe: Recipe) -> str:
    lines = []
    for number in range(len(recipe.levels)):
        folder = run_dir(recipe, number)
        try:
            checkpoint = newest(folder)
        except UserError as error:
            lines.append(f"D_{number}  {error}")
            continue
        state = f"step {checkpoint.step} of {recipe.training.steps}" if checkpoint else "not trained"
        lines.append(f"D_{number}  {folder}: {state}")
    return "Denoisers\n\n" + "\n".join(lines)
