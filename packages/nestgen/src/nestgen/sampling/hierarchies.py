"""Which hierarchies of trained denoisers are in a run's folder, by the folders' names alone.

A run holds several where it was trained with several depths or condition noises: z0-given-z1-sigma0.5 and
z0-given-z1-sigma1 belong to two, and z0-top is a hierarchy of one level.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from nestgen.errors import UserError
from nestgen.recipe.locations import run_dir, sigma_name
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.runs.checkpoint import checkpoint_folders
from nestgen.runs.folder import read_recipe

Sigma = float | tuple[float, float]  # of a level: a noise, or the range that its denoiser was trained with

_SIGMA = re.compile(r"z(\d+)-sigma(.+?)(?=-z\d+-sigma|$)")


def choose_hierarchy(run: Path, depth: int | None = None, sigma: float | Sequence[Sigma] | None = None) -> Recipe:
    """The recipe of one hierarchy of a run, of a depth and of a sigma: one for all levels above z_0, or one for each.

    By default the deepest, with the recipe's own sigmas if several have that depth. Raises UserError for a folder without
    a hierarchy, and ValueError, listing what there is, where none or more than one is as asked for.
    """
    there = list(find_hierarchies(run))
    if not there:
        made = "has no trained denoiser of z_0 with all levels above it" if any(run.glob("z*-*")) else "is not a run"
        raise UserError(f"{run} {made}; give runs/<name>, after `nestgen train` for every level")
    asked = [one for one in there if depth is None or len(one.levels) == depth]
    if sigma is None:
        asked = [one for one in asked if len(one.levels) == len(asked[0].levels)]
        own = [one for one in asked if _names(one) == _names(load_recipe(one.file).depth(len(one.levels)))]
        asked = own or asked
    else:
        asked = [one for one in asked if _fits(one, sigma)]
        asked = [one for one in asked if len(one.levels) == len(asked[0].levels)]
    if len(asked) == 1:
        return asked[0]
    listed = "; ".join(f"depth {len(one.levels)}" + _described(one) for one in (asked or there))
    how = "more than one such hierarchy" if asked else "no such hierarchy"
    raise ValueError(f"{run} has {how}; choose with depth and sigma one of: {listed}")


def find_hierarchies(run: Path) -> Iterator[Recipe]:
    """The recipe of each hierarchy all of whose levels are trained, the deepest first, then by rising sigmas.

    It is the one that lies beside z_0's denoiser, cut to the depth and with the sigmas of the folders' names. Its paths are
    relative to the experiment's folder, two above the run's.
    """
    names = [folder.name for folder in run.glob("z*-*") if checkpoint_folders(folder)]
    recipes = {
        name: read_recipe(run / name).rooted(run.resolve().parent.parent)
        for name in sorted(names)
        if name.startswith("z0-") and (run / name / "recipe.yaml").is_file()
    }
    found = [
        (len(cut.levels), cut)
        for name, recipe in recipes.items()
        for cut in _candidates(recipe, names)
        if run_dir(cut, 0).name == name and all(run_dir(cut, level).name in names for level in range(len(cut.levels)))
    ]
    for _, recipe in sorted(found, key=lambda pair: (-pair[0], list(map(_number, _sigmas(pair[1]))))):
        yield recipe


def _candidates(recipe: Recipe, names: Sequence[str]) -> Iterator[Recipe]:
    """A recipe at every depth and with every combination of the sigmas in some names."""
    for depth in range(1, len(recipe.levels) + 1):
        above = recipe.levels[1:depth]
        for sigmas in product(*(_choices(number, level.sigma, names) for number, level in enumerate(above, 1))):
            levels = [level.model_copy(update={"sigma": sigma}) for level, sigma in zip(above, sigmas)]
            yield recipe.depth(depth).model_copy(update={"levels": (recipe.levels[0], *levels)})


def _choices(level: int, own: Sigma, names: Sequence[str]) -> list[Sigma]:
    """The sigmas of a level in some names; the recipe's own is exact, where a name has six digits."""
    texts = {text for name in names for number, text in _SIGMA.findall(name) if int(number) == level}
    return [own if text == sigma_name(own) else _parsed(text) for text in sorted(texts)]


def _parsed(text: str) -> Sigma:
    low, separator, high = text.partition("to")
    return (float(low), float(high)) if separator else float(low)


def _sigmas(recipe: Recipe) -> list[Sigma]:
    return [level.sigma for level in recipe.levels[1:]]


def _names(recipe: Recipe) -> list[str]:
    return [sigma_name(sigma) for sigma in _sigmas(recipe)]


def _fits(recipe: Recipe, sigma: float | Sequence[Sigma]) -> bool:
    above = len(recipe.levels) - 1
    asked = [sigma] * above if isinstance(sigma, int | float) else [_as_sigma(one) for one in sigma]
    return above > 0 and _names(recipe) == [sigma_name(one) for one in asked]


def _as_sigma(value: Sigma | Sequence[float]) -> Sigma:
    return value if isinstance(value, int | float) else (value[0], value[1])


def _number(sigma: Sigma) -> float:
    return sigma[-1] if isinstance(sigma, tuple) else sigma


def _described(recipe: Recipe) -> str:
    return f", sigma {', '.join(_names(recipe))}" if len(recipe.levels) > 1 else ""
