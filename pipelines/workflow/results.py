"""Writes a page per recipe: the paper's numbers beside the measured ones, what they cost, and images."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click

from nestgen.denoiser.config import denoiser_config
from nestgen.denoiser.flops import count, training_petaflops
from nestgen.errors import UserError
from nestgen.recipe.recipe import load_recipe
from nestgen.recipe.yaml import read_yaml
from nestgen.scoring.compare import FID, inception_of
from workflow import evidence
from workflow.plan import Cell, Plan, read_plan

PIPELINES = Path(__file__).parents[1]
NOT_RUN = "not run"
count_once = functools.cache(count)  # recipes share most of their denoisers


@dataclass(frozen=True)
class Measured:
    """A score of one hierarchy: mean and standard deviation over its seeds."""

    mean: float
    std: float | None
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + ("" if self.std is None else f" ± {self.std:.2g}")


@dataclass(frozen=True)
class Outcome:
    """The collected results of a recipe: its score cards by the cell's name, and the `evaluation.inception` of their FIDs."""

    plan: Plan
    recipe: Path
    folder: Path
    cards: dict[str, dict[str, Any]]
    inception: str | None

    @property
    def was_run(self) -> bool:
        """Whether there is a result."""
        return evidence.was_run(self.plan, self.folder, self.cards)

    def scores(self, cell: Cell, space: str) -> Measured | None:
        """Score of a hierarchy in a space, over the seeds that are scored; None where none is."""
        names = [one.name for one in self.plan.cells(cell.depth) if one.sigmas == cell.sigmas]
        cards = [self.cards[name] for name in names if name in self.cards]
        values = [s["frechet_distance"] for card in cards for s in card["scores"] if s["space"] == space]
        return Measured(fmean(values), stdev(values) if len(values) > 1 else None, len(values)) if values else None

    @property
    def spaces(self) -> list[str]:
        """The spaces of images that every card has: Inception's first, then the encoder's, then z_0's."""
        each = [
            [score["space"] for score in card["scores"] if not re.fullmatch(r"z_[1-9]\d*", score["space"])]
            for card in self.cards.values()
        ]
        return [space for space in reversed(each[0]) if all(space in spaces for spaces in each)] if each else []

    def best(self, depth: int, space: str) -> tuple[Cell, Measured] | None:
        """The best hierarchy of a depth."""
        scores = [(cell, self.scores(cell, space)) for cell in self.plan.cells(depth, self.plan.seeds[0])]
        scored = [(cell, score) for cell, score in scores if score is not None]
        return min(scored, key=lambda pair: pair[1].mean) if scored else None


@click.command()
@click.argument("names", metavar="[RECIPE]...", nargs=-1)
@click.option(
    "--experiments", type=click.Path(path_type=Path), default=Path("experiments"), show_default=True,
    help="Folder of the experiments, each under its recipe's name.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=PIPELINES / "results", help="Folder of the pages.")
def main(names: Sequence[str], experiments: Path, out: Path) -> None:
    """Write the pages of the RECIPEs (by default of all) and the list of all recipes."""
    paper: Any = read_yaml(PIPELINES / "paper.yaml")
    recipes = {file.stem: file for file in sorted((PIPELINES / "recipes").glob("*.yaml"))}
    for name in names or recipes:
        if name not in recipes:
            raise click.ClickException(f"there is no recipe {name}; the recipes are {', '.join(recipes)}")
        plan = read_plan(recipes[name])
        evidence.collect(plan, recipes[name], experiments / plan.name, out / name)
    outcomes = {name: read_outcome(file, out / name) for name, file in recipes.items()}
    for name in names or recipes:
        (out / f"{name}.md").write_text(page(outcomes, name, paper.get(name, {})), encoding="utf-8")
        click.echo(out / f"{name}.md")
    (out / "README.md").write_text(index(outcomes, paper), encoding="utf-8")


def read_outcome(recipe: Path, folder: Path) -> Outcome:
    """The collected results of a recipe, if there are any. Raises ClickException for FIDs of two kinds."""
    plan = read_plan(recipe)
    cards = evidence.score_cards(plan, folder)
    try:
        inception = inception_of(score for card in cards.values() for score in card["scores"])
    except UserError as error:
        raise click.ClickException(f"{folder}: {error}") from None
    return Outcome(plan, recipe, folder, cards, inception)


def page(outcomes: Mapping[str, Outcome], name: str, paper: Mapping[str, Any]) -> str:
    """The page of a recipe."""
    outcome = outcomes[name]
    parts = [
        f"# {name}",
        f"{paper.get('table', 'No table of the paper')}. [Recipe](../recipes/{name}.yaml): {what_is_run(outcome.plan)}.",
        f"State: {state(outcome)}.",
    ]
    if outcome.plan.depths:
        parts += ["## Scores", scores(outcome, paper.get("fid") or {})]
    if paper.get("beside"):
        parts.append(
            "In the same table of the paper: "
            + ", ".join(f"{who} {fid:g}" for who, fid in paper["beside"].items())
            + "."
        )
    parts += [
        line
        for other, depth in (paper.get("compare") or {}).items()
        if (line := compared(outcome, outcomes[other], depth))
    ]
    if claims := shows(outcome):
        parts += ["## What it shows", claims]
    if notes := evidence.notes(outcome.folder):
        parts += ["## Where it disagrees, and what was tried", notes]
    if outcome.plan.depths:
        parts += ["## Cost", cost(outcome)]
    images = [
        f"![{text}]({name}/{file})\n\n*{text}*"
        for file, text in evidence.IMAGES.items()
        if (outcome.folder / file).is_file()
    ]
    if outcome.was_run and images:
        parts += ["## Pictures", *images]
    if outcome.cards:
        parts.append(
            f"The score cards, with all that each number was computed on, are in [{name}/cards]({name}/{evidence.CARDS})."
        )
    return "\n\n".join(parts) + "\n"


def what_is_run(plan: Plan) -> str:
    """Depths, σ and seeds as text."""
    if not plan.depths:
        return "nearest neighbours only, nothing is trained"
    sigmas = f", σ in {{{', '.join(f'{one:g}' for one in plan.grid.sigmas)}}}" if plan.grid.sigmas else ""
    return f"L = {', '.join(map(str, plan.depths))}{sigmas}, {len(plan.seeds)} seed(s)"


def state(outcome: Outcome) -> str:
    """Not run, complete, or how many hierarchies are scored."""
    if not outcome.was_run:
        return NOT_RUN
    total = len(outcome.plan.cells())
    done = "complete" if len(outcome.cards) == total else f"{len(outcome.cards)} of {total} hierarchies are scored"
    if evidence.recipe_changed(outcome.recipe, outcome.folder):
        done += f", by [the recipe as it was]({outcome.plan.name}/{evidence.RECIPE})"
    return done


def scores(outcome: Outcome, fid: Mapping[str, float]) -> str:
    """A row for each hierarchy: the paper's FID, the measured one, the difference, and distances in other spaces."""
    others = [space for space in outcome.spaces if space != FID]
    measured_fid = bool(fid) or FID in outcome.spaces
    head = ["L", "σ of the top level"]
    here_by = "FID here" if outcome.inception is None else f"FID here ({outcome.inception})"
    head += ["paper's FID", here_by, "difference"] if measured_fid else []
    head += [f"Fréchet distance, {space}" for space in others] or ([] if measured_fid else ["Fréchet distance"])
    rows = [head, ["---"] * len(head)]
    for cell in outcome.plan.cells(seed=outcome.plan.seeds[0]):
        printed = fid.get(Cell(cell.depth, cell.sigmas).name)
        row = [str(cell.depth), ", ".join(f"{one:g}" for one in cell.sigmas)]
        if measured_fid:
            here = outcome.scores(cell, FID)
            row += ["" if printed is None else f"{printed:.2f}", str(here or NOT_RUN)]
            row.append("" if here is None or printed is None else f"{here.mean - printed:+.2f}")
        row += [str(outcome.scores(cell, space) or NOT_RUN) for space in others] or ([] if measured_fid else [NOT_RUN])
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def compared(outcome: Outcome, other: Outcome, depth: int) -> str:
    """The best score of this recipe beside another's best at one depth, in the spaces that both have."""
    name = other.plan.name
    common = [space for space in outcome.spaces if space in other.spaces]
    if outcome.inception != other.inception:
        common = [space for space in common if space != FID]
    lines = []
    for space in common:
        ours, theirs = outcome.best(max(outcome.plan.depths), space), other.best(depth, space)
        if ours and theirs:
            lines.append(f"{space}: {ours[1]} here, {theirs[1]} there")
    return f"Beside L = {depth} of [{name}]({name}.md): " + ("; ".join(lines) if lines else NOT_RUN) + "."


def shows(outcome: Outcome) -> str:
    """The paper's claims as numbers: what depth gains, and what σ gains."""
    lines = []
    for space in outcome.spaces:
        best = {depth: one for depth in outcome.plan.depths if (one := outcome.best(depth, space))}
        if 1 in best:
            first = best[1][1]
            for depth, (cell, score) in best.items():
                if depth > 1:
                    sigma = f" (σ {', '.join(f'{one:g}' for one in cell.sigmas)})" if cell.sigmas else ""
                    lines.append(
                        f"- {space}: L = {depth}{sigma} is {score.mean / first.mean:.2f} of L = 1 ({score} against {first})."
                    )
        if 2 in best and best[2][0].sigmas:
            at = {cell.sigmas[0]: outcome.scores(cell, space) for cell in outcome.plan.cells(2, outcome.plan.seeds[0])}
            if at.get(0.0) and best[2][0].sigmas[0] > 0:
                lines.append(f"- {space}: at L = 2, σ = {best[2][0].sigmas[0]:g} gives {best[2][1]}, σ = 0 {at[0.0]}.")
            elif at.get(0.0):
                lines.append(f"- {space}: at L = 2, no σ > 0 is better than σ = 0 ({at[0.0]}).")
    return "\n".join(lines)


def cost(outcome: Outcome) -> str:
    """Hours of training by the logs, and the computed cost of the denoisers."""
    measured = evidence.training_cost(outcome.folder)
    trained = (
        f"{measured['denoisers']} denoisers were trained, in {measured['hours']:.2f} hours of one device"
        if measured
        else f"Training: {NOT_RUN}"
    )
    return f"{trained}. By count:\n\n{by_count(ran if (ran := outcome.folder / evidence.RECIPE).is_file() else outcome.recipe)}"


def by_count(file: Path) -> str:
    """GFlops of each denoiser of a recipe, and the petaflops of all its runs' training."""
    plan, recipe = read_plan(file), load_recipe(file)
    rows, total = [["denoiser", "parameters", "GFlops a picture", "trainings", "PFlops of each"], ["---"] * 5], 0.0
    kinds: dict[tuple[int, bool], int] = {}
    for name in plan.all_denoisers():
        kind = int(name.split("-")[0].removeprefix("z")), name.endswith("-top")
        kinds[kind] = kinds.get(kind, 0) + len(plan.seeds)
    for (level, top), times in kinds.items():
        counts = count_once(denoiser_config(recipe.depth(level + 1) if top else recipe, level))
        each = training_petaflops(recipe, counts)
        total += times * each
        what = f"z_{level}, {'the top' if top else 'given the level above'}"
        rows.append([what, f"{counts.parameters / 1e6:.2f}M", f"{counts.gflops_true:.3g}", str(times), f"{each:.4g}"])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\nTogether {total:.4g} PFlops: three forward passes a step and picture, attention included."


def index(outcomes: Mapping[str, Outcome], paper: Mapping[str, Any]) -> str:
    """The list of all recipes."""
    rows = [
        f"| [{name}]({name}.md) | {paper.get(name, {}).get('table', '')} | {state(outcome)} |"
        for name, outcome in outcomes.items()
    ]
    return (
        "# Results\n\nA page for each recipe, by `pipelines/results.py`: the paper's numbers beside those measured here.\n"
        "A recipe that was not run says so. How to run one: [docs/workflow.md](../../docs/workflow.md).\n\n"
        "| recipe | of the paper | state |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    main()
