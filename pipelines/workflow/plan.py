"""The section `grid` of a recipe: which hierarchies of an experiment are trained, sampled and scored, and under which names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

# Samples of nestgen's evaluation protocols (docs/evaluation.md), which fix how many there are.
PROTOCOL_COUNTS = {"coco30k": 30_000, "imagenet100-50k": 50_000, "imagenet50k": 50_000}


class RecipeError(ValueError):
    """A recipe that no workflow can run, in one sentence."""


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Seeds = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Depths = Annotated[tuple[PositiveInt, ...], BeforeValidator(_as_tuple)]
Sigmas = Annotated[tuple[NonNegativeFloat, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class ScoredBy(BaseModel):
    """The frozen encoder in whose features the pictures are compared, where it is not the one that made the levels."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    encoder: str
    weights: str | None = None
    model_args: dict[str, Any] = {}


class Grid(BaseModel):
    """What of a recipe's hierarchy is run.

    depths     numbers of levels L; all from 1 to the recipe's by default; of none only the nearest neighbours are drawn
    sigmas     values of σ that are tried on the top level of each hierarchy; by default the recipe's own σ stands
    choose     `greedy`: a deeper hierarchy keeps the best σ of the shallower one, as in the paper; `all`: every combination
    seeds      each trains, samples and scores everything once more; the recipe's own by default
    space      the space whose Fréchet distance chooses σ; by default the last one scored: Inception's, else an encoder's
    scored_by  the encoder in whose features pictures are compared; the recipe's by default
    held_out   SOURCE of evaluation.reference where it is no split of features.source: other shards, say
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    depths: Depths | None = None
    sigmas: Sigmas | None = None
    choose: Literal["greedy", "all"] = "greedy"
    seeds: Seeds | None = None
    space: str | None = None
    scored_by: ScoredBy | None = None
    held_out: str | None = None


@dataclass(frozen=True)
class Cell:
    """One hierarchy that is sampled and scored.

    `sigmas` are those of levels 1, 2, ... that are tried: all of them (`choose: all`), the top level's alone
    (`greedy`: `given` then is the depth whose chosen σ the levels below take), or none, where the recipe's own stand.
    """

    depth: int
    sigmas: tuple[float, ...] = ()
    given: int | None = None
    seed: int | None = None  # None is the recipe's own

    @property
    def name(self) -> str:
        """L3, L3-sigma0.5, L3-sigma1-0.5, L3-sigma0.5-seed1."""
        sigma = "".join(f"{'-sigma' if not number else '-'}{one:g}" for number, one in enumerate(self.sigmas))
        return f"L{self.depth}{sigma}" + ("" if self.seed is None else f"-seed{self.seed}")


@dataclass(frozen=True)
class Plan:
    """A recipe as the workflow sees it. `levels` are the recipe's: mappings with shape and sigma."""

    document: Mapping[str, Any]
    grid: Grid

    @property
    def name(self) -> str:
        return str(self.document["name"])

    @property
    def levels(self) -> list[Mapping[str, Any]]:
        return list(self.document["levels"])

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(range(1, len(self.levels) + 1)) if self.grid.depths is None else self.grid.depths

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """None is the recipe's own seed."""
        own = self.document.get("seed", 0)
        return tuple(None if seed == own else seed for seed in self.grid.seeds or (own,))

    def searched(self, depth: int) -> bool:
        """Whether several σ are tried at this depth."""
        return depth > 1 and self.grid.sigmas is not None

    def cells(self, depth: int | None = None, seed: int | Literal["all"] | None = "all") -> list[Cell]:
        """The hierarchies that are sampled: of one depth, of one seed, or all of them."""
        depths = self.depths if depth is None else (depth,)
        seeds = self.seeds if seed == "all" else (seed,)
        return [cell for one_seed in seeds for one in depths for cell in self._cells(one, one_seed)]

    def _cells(self, depth: int, seed: int | None) -> Iterator[Cell]:
        if not self.searched(depth):
            yield Cell(depth, seed=seed)
            return
        assert self.grid.sigmas is not None
        if self.grid.choose == "all":
            for sigmas in itertools.product(self.grid.sigmas, repeat=depth - 1):
                yield Cell(depth, sigmas, seed=seed)
            return
        given = depth - 1 if depth > 2 and depth - 1 in self.depths else None
        for sigma in self.grid.sigmas:
            yield Cell(depth, (sigma,), given, seed)

    def denoisers(self, cell: Cell) -> list[str]:
        """Folders of the denoisers of a cell that are known before any σ is chosen: z_0's first.

        Those below the two top levels of a greedy cell are among those of the shallower cells, which are scored first.
        """
        own: list[Any] = [level.get("sigma", 0) for level in self.levels]
        sigmas = dict(zip(range(1, cell.depth), own[1 : cell.depth]))
        if cell.sigmas:
            sigmas |= dict(zip(range(cell.depth - len(cell.sigmas), cell.depth), cell.sigmas))
        lowest = cell.depth - 2 if cell.given is not None else 0
        return [self._denoiser(level, cell.depth, sigmas) for level in range(lowest, cell.depth)]

    def _denoiser(self, level: int, depth: int, sigmas: Mapping[int, Any]) -> str:
        """As nestgen names it (docs/recipe.md)."""
        above = range(level + 1, depth if self._condition_on_all else min(level + 2, depth))
        given = [f"z{one}-sigma{sigma_name(sigmas[one])}" for one in above]
        return "-".join([f"z{level}", *(["given", *given] if given else ["top"])])

    @property
    def _condition_on_all(self) -> bool:
        return (self.document.get("denoiser") or {}).get("condition_on") == "all"

    def all_denoisers(self) -> list[str]:
        """Every denoiser that some cell of one seed needs."""
        names = [name for cell in self.cells(seed=self.seeds[0]) for name in self.denoisers(cell)]
        return sorted(set(names))

    def run_name(self, seed: int | None) -> str:
        """Of a seed's runs: the recipe's name, with the seed where it is not the recipe's."""
        return self.name if seed is None else f"{self.name}-seed{seed}"


def sigma_name(sigma: Any) -> str:
    """As in the name of a denoiser's folder: '0.5' of 0.5, '0to1.5' of a range."""
    return "to".join(f"{one:g}" for one in (sigma if isinstance(sigma, list | tuple) else (sigma,)))


def train_options(denoiser: str) -> str:
    """What `nestgen train` is told to train the denoiser of a folder: level, depth and the σ it is given."""
    if match := re.fullmatch(r"z(\d+)-top", denoiser):
        return f"--level {match[1]} --depth {int(match[1]) + 1}"
    level, given = denoiser.split("-given-")
    above = re.findall(r"z(\d+)-sigma(.+?)(?=-z\d|$)", given)
    number, top = int(level.removeprefix("z")), int(above[-1][0])
    if any("to" in sigma for _, sigma in above):  # a range is the recipe's own
        return f"--level {number} --depth {top + 1}"
    sigmas = ["0"] * number + [sigma for _, sigma in above]
    return f"--level {number} --depth {top + 1} --sigma {','.join(sigmas)}"


def levels_of(denoiser: str) -> list[int]:
    """The level that a folder's denoiser generates, and those it is given."""
    return [int(one) for one in re.findall(r"(?:^|-)z(\d+)", denoiser)]


def read_plan(file: Path) -> Plan:
    """The plan of a recipe file. Raises RecipeError."""
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{file} can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or not {"features", "levels"} <= document.keys():
        raise RecipeError(f"{file} holds no recipe with features and levels; docs/recipe.md shows one")
    return plan_of({"name": file.stem, **document}, file)


def plan_of(document: Mapping[str, Any], file: Path) -> Plan:
    """The plan of a recipe. Raises RecipeError for a grid that is not one, or not of these levels."""
    try:
        grid = Grid.model_validate(document.get("grid") or {})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("grid", *first["loc"])))
        known = f"; its keys are {', '.join(Grid.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise RecipeError(f"{file}: {key} is {first['input']!r}, but: {first['msg']}{known}") from None
    plan = Plan(document, grid)
    for depth in plan.depths:
        if depth > len(plan.levels):
            raise RecipeError(f"{file}: grid.depths names {depth}, but there are {len(plan.levels)} levels")
    if grid.sigmas is not None and grid.choose == "greedy" and plan._condition_on_all:
        raise RecipeError(
            f"{file}: grid.choose is greedy, but with denoiser.condition_on 'all' every denoiser depends on every σ, so there "
            "is nothing to keep; set grid.choose: all"
        )
    return plan
