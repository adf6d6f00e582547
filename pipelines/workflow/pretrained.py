"""Hierarchies that are trained already, with which a report opens: those of a recipe's `grid.pretrained` that are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestgen.errors import UserError
from nestgen.files import sha256_of
from nestgen.sharing.names import find_pretrained, shipped
from workflow.plan import Plan, RecipeError, has_splits

if TYPE_CHECKING:
    from nestgen.sharing.folder import Exported

FOLDER = Path("pretrained")  # of their images
ROWS = "stores/pretrained"  # store root of real images in the levels of the deepest
COUNT = 8  # images side by side
SHEETS = {
    "hierarchy": "",
    "like": f" --like 1 --store {ROWS}",
    "interpolate": f" --interpolate 2 5 --store {ROWS}",
}  # options of `nestgen hierarchy`


@dataclass(frozen=True)
class Pretrained:
    """An exported hierarchy: its name or folder, and what it says of itself."""

    name: str
    folder: Path
    exported: Exported

    @property
    def stem(self) -> str:
        """What its images' folder is called."""
        return self.folder.name

    @property
    def digest(self) -> str:
        """Another one for other weights, whose digests the file holds."""
        return sha256_of(self.folder / "config.json")

    @property
    def depth(self) -> int:
        return len(self.exported.recipe.levels)

    @property
    def settings(self) -> Path:
        """The recipe by which featurize encodes further images into its levels."""
        return self.folder / "features" / "nested.yaml"

    @property
    def source(self) -> str | None:
        """SOURCE of real images that can be had anywhere, as scenes can; None for others."""
        source = str(self.exported.about.data.get("source"))
        return source if source.startswith("scenes") and has_splits(source) and self.settings.is_file() else None

    @property
    def side(self) -> int:
        """Pixels a side of its images."""
        return int(self.exported.codec["size"])

    @property
    def card(self) -> dict[str, Any] | None:
        """Its first score card, if it has any."""
        return next(iter(self.exported.about.scores.values()), None)


def find_all(plan: Plan) -> list[Pretrained]:
    """Those of `grid.pretrained`, in its order; none where one of them is not there. Raises RecipeError for a damaged one."""
    names = plan.grid.pretrained
    if not all(name in shipped() or Path(name).is_dir() for name in names):
        return []
    try:
        return read(names)
    except UserError as error:
        raise RecipeError(f"grid.pretrained: {error}") from None


def read(names: Sequence[str]) -> list[Pretrained]:
    """Those of the names. Raises UserError where one is not there or damaged."""
    if not names:
        return []
    from nestgen.sharing.folder import read_exported  # which imports torch, for seconds

    folders = [find_pretrained(name) for name in names]
    return [Pretrained(name, folder, read_exported(folder)) for name, folder in zip(names, folders, strict=True)]
