"""The section `grid` of a recipe: which hierarchies an experiment trains, samples and scores, and their names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

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

from nestgen.errors import UserError
from nestgen.recipe.yaml import read_yaml

# Number of samples of nestgen's evaluation protocols (docs/evaluation.md).
PROTOCOL_COUNTS = {"coco30k": 30_000, "imagenet100-50k": 50_000, "imagenet50k": 50_000}


SPLIT_KINDS = ("scenes", "coco", "coco2014", "coco2017", "imagenet")  # kinds of sources that have splits


class RecipeError(ValueError):
    """A recipe that no workflow can run, in one sentence."""


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Seeds = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Depths = Annotated[tuple[PositiveInt, ...], BeforeValidator(_as_tuple)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Sigmas = Annotated[tuple[NonNegativeFloat, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class ScoredBy(BaseModel):
    """The frozen encoder in whose features images are compared, where it is not the one that made the levels."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    encoder: str
    weights: str | None = None
    model_args: dict[str, Any] = {}


class Grid(BaseModel):
    """Which hierarchies of a recipe are run.

    depths     numbers of levels L; by default all from 1 to the recipe's; with `[]` only nearest neighbours are searched
    sigmas     values of σ to try on the top level of each hierarchy; by default the recipe's own σ is used
    choose     `greedy`: a deeper hierarchy takes the best σ of the shallower one, as in the paper; `all`: every combination
    seeds      everything is trained, sampled and scored once per seed; by default the recipe's own seed
    space      the space whose Fréchet distance chooses σ; by default the last one scored: Inception's, else an encoder's
    scored_by  the encoder in whose features images are compared; by default the recipe's
    held_out   SOURCE of evaluation.reference where it is not a split of features.source, as with other shards
    pretrained exported hierarchies whose images the report opens with, by name or folder, the shallowest first
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    depths: Depths | None = None
    sigmas: Sigmas | None = None
    choose: Literal["greedy", "all"] = "greedy"
    seeds: Seeds | None = None
    space: str | None = None
    scored_by: ScoredBy | None = None
    held_out: str | None = None
    pretrained: Names = ()


@dataclass(frozen=True)
class Cell:
    """One hierarchy that is sampled and scored.

    `sigmas` are the σ tried: those of levels 1, 2, ... (`choose: all`), that of the top level (`choose: greedy`), or none,
    where the recipe's own σ are used. With `greedy` the levels below the top take the σ chosen at depth `sigmas_from`.
    """

    depth: int
    sigmas: tuple[float, ...] = ()
    sigmas_from: int | None = None
    seed: int | None = None  # None is the recipe's own

    @property
    def name(self) -> str:
        """L3, L3-sigma0.5, L3-sigma1-0.5, L3-sigma0.5-seed1."""
        sigma = "".join(f"{'-' if index else '-sigma'}{sigma:g}" for index, sigma in enumerate(self.sigmas))
        return f"L{self.depth}{sigma}" + ("" if self.seed is None else f"-seed{self.seed}")


@dataclass(frozen=True)
class Plan:
    """A recipe as the workflow sees it."""

    document: Mapping[str, Any]
    grid: Grid

    @property
    def name(self) -> str:
        return str(self.document["name"])

    @property
    def features(self) -> Mapping[str, Any]:
        """The recipe's section `features`."""
        return dict(self.document["features"])

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """The recipe's section `evaluation`."""
        return dict(self.document.get("evaluation") or {})

    @property
    def levels(self) -> list[Mapping[str, Any]]:
        """The recipe's levels, z_0 first: mappings with `shape` and `sigma`."""
        return list(self.document["levels"])

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(range(1, len(self.levels) + 1)) if self.grid.depths is None else self.grid.depths

    @property
    def deepest(self) -> int:
        """The largest depth; 0 where no hierarchy is run."""
        return max(self.depths, default=0)

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """None is the recipe's own seed."""
        own = self.document.get("seed", 0)
        return tuple(None if seed == own else seed for seed in self.grid.seeds or (own,))

    @property
    def count(self) -> int:
        """Number of samples that are scored."""
        return int(self.evaluation.get("count") or PROTOCOL_COUNTS.get(self.evaluation.get("protocol", ""), 1000))

    def searched(self, depth: int) -> bool:
        """Whether several σ are tried at this depth."""
        return depth > 1 and self.grid.sigmas is not None

    def cells(self, depth: int | None = None, seed: int | Literal["all"] | None = "all") -> list[Cell]:
        """The hierarchies that are sampled: of one depth, of one seed, or all of them."""
        depths = self.depths if depth is None else (depth,)
        seeds = self.seeds if seed == "all" else (seed,)
        return [cell for one_seed in seeds for one_depth in depths for cell in self._cells(one_depth, one_seed)]

    def _cells(self, depth: int, seed: int | None) -> Iterator[Cell]:
        if not self.searched(depth):
            yield Cell(depth, seed=seed)
            return
        assert self.grid.sigmas is not None
        if self.grid.choose == "all":
            for sigmas in itertools.product(self.grid.sigmas, repeat=depth - 1):
                yield Cell(depth, sigmas, seed=seed)
            return
        sigmas_from = depth - 1 if depth > 2 and depth - 1 in self.depths else None
        for sigma in self.grid.sigmas:
            yield Cell(depth, (sigma,), sigmas_from, seed)

    def denoisers(self, cell: Cell) -> list[str]:
        """Folders of a cell's denoisers whose σ is fixed before any is chosen, z_0's first.

        The denoisers below the two top levels of a greedy cell also belong to the shallower cells, which are scored first.
        """
        sigmas: dict[int, Any] = {level: self.levels[level].get("sigma", 0) for level in range(1, cell.depth)}
        if cell.sigmas:
            sigmas |= dict(zip(range(cell.depth - len(cell.sigmas), cell.depth), cell.sigmas))
        lowest = 0 if cell.sigmas_from is None else cell.depth - 2
        return [self._denoiser(level, cell.depth, sigmas) for level in range(lowest, cell.depth)]

    def _denoiser(self, level: int, depth: int, sigmas: Mapping[int, Any]) -> str:
        """The folder's name as nestgen chooses it (docs/recipe.md)."""
        conditions = range(level + 1, depth if self._condition_on_all else min(level + 2, depth))
        given = [f"z{condition}-sigma{sigma_name(sigmas[condition])}" for condition in conditions]
        return "-".join([f"z{level}", *(["given", *given] if given else ["top"])])

    @property
    def _condition_on_all(self) -> bool:
        return (self.document.get("denoiser") or {}).get("condition_on") == "all"

    def all_denoisers(self) -> list[str]:
        """Folders of every denoiser that some cell of one seed needs."""
        return sorted({name for cell in self.cells(seed=self.seeds[0]) for name in self.denoisers(cell)})

    def run_name(self, seed: int | None) -> str:
        """Folder of a seed's runs: the recipe's name, followed by the seed where it is not the recipe's own."""
        return self.name if seed is None else f"{self.name}-seed{seed}"


def has_splits(source: object) -> bool:
    """Whether `--split val` names the held-out images of a source."""
    return str(source).partition(":")[0] in SPLIT_KINDS


def sigma_name(sigma: Any) -> str:
    """σ as in the name of a denoiser's folder: '0.5' for 0.5, '0to1.5' for a range."""
    return "to".join(f"{value:g}" for value in (sigma if isinstance(sigma, list | tuple) else (sigma,)))


def train_options(denoiser: str) -> str:
    """Options of `nestgen train` for the denoiser of a folder: level, depth and σ."""
    if match := re.fullmatch(r"z(\d+)-top", denoiser):
        return f"--level {match[1]} --depth {int(match[1]) + 1}"
    name, given = denoiser.split("-given-")
    conditions = re.findall(r"z(\d+)-sigma(.+?)(?=-z\d|$)", given)
    level, top = int(name.removeprefix("z")), int(conditions[-1][0])
    if any("to" in sigma for _, sigma in conditions):  # only the recipe can name a range
        return f"--level {level} --depth {top + 1}"
    sigmas = ["0"] * level + [sigma for _, sigma in conditions]
    return f"--level {level} --depth {top + 1} --sigma {','.join(sigmas)}"


def levels_of(denoiser: str) -> list[int]:
    """The level that a folder's denoiser generates, then its conditions."""
    return [int(level) for level in re.findall(r"(?:^|-)z(\d+)", denoiser)]


def read_plan(file: Path) -> Plan:
    """The plan of a recipe file. Raises RecipeError."""
    document = read_document(file)
    if not {"features", "levels"} <= document.keys():
        raise RecipeError(f"{file} is not a recipe: give it the sections features and levels, as docs/recipe.md shows")
    return plan_of({"name": file.stem, **document}, file)


def read_document(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe with what it says over its `base`, another file beside it: sections key by key, lists as a whole.

    The name is never that of the base. `above` are the files whose base this is. Raises RecipeError.
    """
    if file in above:
        raise RecipeError(f"{file} is its own base, by way of {above[-1].name}; name another one")
    try:
        document = read_yaml(file)
    except OSError as error:
        raise RecipeError(f"{file} can't be read: {error.strerror}") from None
    except UserError as error:
        raise RecipeError(str(error)) from None
    if not isinstance(document, dict):
        raise RecipeError(f"{file} is not a recipe: give it the sections features and levels, as docs/recipe.md shows")
    base = document.pop("base", None)
    if base is None:
        return document
    below = read_document(file.parent / str(base), (*above, file))
    return _over({key: value for key, value in below.items() if key != "name"}, document)


def _over(below: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    both = {**below, **document}
    for key in below.keys() & document.keys():
        if isinstance(below[key], Mapping) and isinstance(document[key], Mapping):
            both[key] = _over(below[key], document[key])
    return both


def plan_of(document: Mapping[str, Any], file: Path) -> Plan:
    """The plan of a recipe. Raises RecipeError where its section `grid` is wrong or does not fit its levels."""
    try:
        grid = Grid.model_validate(document.get("grid") or {})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("grid", *first["loc"])))
        keys = f"; its keys are {', '.join(Grid.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise RecipeError(f"{file}: {key} is {first['input']!r}, but: {first['msg']}{keys}") from None
    plan = Plan(document, grid)
    _check_names(plan, file)
    for depth in plan.depths:
        if depth > len(plan.levels):
            raise RecipeError(f"{file}: grid.depths names {depth}, but there are {len(plan.levels)} levels")
    if grid.sigmas is not None and grid.choose == "greedy" and plan._condition_on_all:
        raise RecipeError(
            f"{file}: grid.choose is greedy, but with denoiser.condition_on 'all' every denoiser depends on every σ, so "
            "the σ of a shallower hierarchy can't be reused; set grid.choose: all"
        )
    return plan


def _check_names(plan: Plan, file: Path) -> None:
    """Raises RecipeError for what can't be part of a step's file names, in which Snakemake takes braces for its own."""
    reference = plan.evaluation.get("reference")
    names = {
        "name": plan.document.get("name"),
        "features.out": plan.features.get("out"),
        "evaluation.reference": reference,
    }
    for key, text in names.items():
        if text is not None and re.search(r"[{}\n]", str(text)):
            raise RecipeError(f"{file}: {key} is {text!r}, but it names a folder, and must do so without {{ or }}")
    for number, level in enumerate(plan.levels):
        shape = level.get("shape") if isinstance(level, Mapping) else level
        if not re.fullmatch(r"\d+x\d+x\d+", str(shape)):
            raise RecipeError(f"{file}: the shape of level {number} is {shape!r}, but must be like 8x8x64")
