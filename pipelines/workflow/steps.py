"""What the steps of the Snakefile take from a plan: paths of their files, and options of their commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path

from workflow.plan import Cell, Plan, ScoredBy, levels_of, sigma_name

HERE = Path(__file__).parent
POOLED = "1x1x64"  # level in which images are compared: mean-pooled features of the scoring encoder


def word(text: object) -> str:
    """A text as one word of a rule's shell line: quoted for the shell, its braces not for Snakemake to replace."""
    return shlex.quote(str(text)).replace("{", "{{").replace("}", "}}")


def shell_functions(programs: Path, gpus: int, launch: str | None) -> str:
    """What every shell line of a rule begins with: the commands as functions, for `shell.prefix`.

    `programs` is the folder of featurize, nestgen and python; with more than one of `gpus`, `on_gpu` gives its command one
    for itself; `launch` is what starts `python -m nestgen train`.
    """
    python = shlex.quote(str(programs / "python"))
    step = f"{python} -IS {shlex.quote(str(HERE / 'step.py'))}"
    on_gpu = f"{step} --gpus {gpus}" if gpus > 1 else step
    lines = {
        "featurize": f'{step} {shlex.quote(str(programs / "featurize"))} "$@"',
        "nestgen": f'{step} {shlex.quote(str(programs / "nestgen"))} "$@"',
        "on_gpu": f'{on_gpu} {shlex.quote(str(programs))}/"$@"',
        "train": f'{step} env PATH={shlex.quote(str(programs))}:"$PATH" {launch} -m nestgen train "$@"'
        if launch
        else 'on_gpu nestgen train "$@"',
        "sigma_choice": f'{python} {shlex.quote(str(HERE / "sigma_choice.py"))} "$@"',
        "report": f'{python} {shlex.quote(str(HERE.parent / "report.py"))} "$@"',
    }
    functions = "".join(f"{name}() {{ {line}; }}; " for name, line in lines.items())
    return functions.replace("{", "{{").replace("}", "}}") + "set -euo pipefail; "


def encoder_folder(encoder: str) -> str:
    """An encoder's folder in a store root (docs/store-format.md)."""
    return encoder.replace(":", "-").replace("/", "-")


def own_encoder(plan: Plan) -> str:
    """The encoder that makes the levels."""
    return str(plan.features.get("encoder", "tiny"))


def scorer(plan: Plan) -> ScoredBy:
    """The encoder in whose features images are compared."""
    return plan.grid.scored_by or ScoredBy(encoder=own_encoder(plan), weights=plan.features.get("weights"))


def level_shapes(plan: Plan) -> list[str]:
    """Levels to extract with the levels' own encoder: those above z_0, and the pooled one if it scores as well."""
    shapes = [level["shape"] for level in plan.levels[1:]]
    return list(dict.fromkeys([*shapes, *([POOLED] if scorer(plan).encoder == own_encoder(plan) else [])]))


def image_side(plan: Plan) -> int:
    """Pixels a side of the images that z_0 is made from."""
    return int(str(plan.features.get("z0", "pixels:32")).partition(":")[2])


def seals(plan: Plan, denoiser: str) -> list[str]:
    """Seals of the stores that a denoiser is trained on; z_0's is written before the base store's."""
    out = plan.features["out"]
    base = f"{out}/{encoder_folder(own_encoder(plan))}/base.seal.json"
    return [base, *level_seals(plan, out, [level for level in levels_of(denoiser) if level > 0])]


def level_seals(plan: Plan, root: str, levels: Iterable[int]) -> list[str]:
    """Seals of levels above z_0 in a store root."""
    return [f"{root}/{encoder_folder(own_encoder(plan))}/{plan.levels[level]['shape']}.seal.json" for level in levels]


def level_settings(plan: Plan, denoiser: str) -> str:
    """What the recipe says of a denoiser's level and conditions, beside shapes (another store) and σ (another folder)."""
    levels = [plan.levels[level] for level in levels_of(denoiser)]
    others = [{key: level[key] for key in level if key not in ("shape", "sigma")} for level in levels]
    return json.dumps(others, sort_keys=True, default=str)


def loss_curves(plan: Plan, *cells: Cell) -> list[str]:
    """The loss curves of the cells' denoisers, each drawn when its training ends."""
    return [
        f"runs/{plan.run_name(cell.seed)}/{denoiser}/loss.png" for cell in cells for denoiser in plan.denoisers(cell)
    ]


def best_cells(plan: Plan) -> list[str]:
    """For each depth the file that names its best cell, or the name of its only one."""
    return [f"chosen/L{depth}.json" if plan.searched(depth) else f"L{depth}" for depth in plan.depths]


def variations(plan: Plan) -> dict[str, int]:
    """Samples of the deepest hierarchy with levels k and above frozen to those of real images: k by the samples' name."""
    return {f"L{plan.deepest}-like-z{k}": k for k in range(1, plan.deepest)}


def seed_option(seed: int | None) -> str:
    """--recipe, for a seed that is not the recipe's own."""
    return "" if seed is None else f" --recipe nested-seed{seed}.yaml"


def sigma_option(plan: Plan, cell: Cell) -> str:
    """--sigma of a cell, for the shell; `sigma_choice` is its command that prints a chosen σ."""
    if not cell.sigmas:
        return ""
    if cell.sigmas_from is not None:
        return f" --sigma $(sigma_choice sigmas chosen/L{cell.sigmas_from}.json --then {cell.sigmas[0]:g})"
    lowest = cell.depth - len(cell.sigmas)
    below = [sigma_name(level.get("sigma", 0)) for level in plan.levels[1:lowest]]
    return f" --sigma {','.join([*below, *(f'{sigma:g}' for sigma in cell.sigmas)])}"


def deepest_options(plan: Plan) -> str:
    """--recipe, --depth and --sigma of the best of the deepest hierarchies, for the shell."""
    options = seed_option(plan.seeds[0])
    if plan.deepest < len(plan.levels):
        options += f" --depth {plan.deepest}"
    if plan.searched(plan.deepest):
        options += f" --sigma $(sigma_choice sigmas chosen/L{plan.deepest}.json)"
    return options


def sections_as_json(plan: Plan, *sections: str) -> str:
    """Sections of the recipe as a text that is equal for equal values."""
    return json.dumps({section: plan.document.get(section) for section in sections}, sort_keys=True, default=str)
