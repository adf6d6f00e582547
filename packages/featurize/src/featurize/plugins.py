"""Encoders and codecs that other installed packages add, by entry points."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TypeVar

from featurize.errors import UserError

T = TypeVar("T")


def with_installed(built_in: dict[str, T], group: str, kind: type[T]) -> dict[str, T]:
    """The built-in ones by name, and those that installed packages give as entry points of `group`, like featurize.encoders.

    Raises UserError for a name that is given twice, and for what can't be imported or is not a `kind`.
    """
    found = dict(built_in)
    for point in entry_points(group=group):
        owner = f"the installed package {point.dist.name}" if point.dist else "an installed package"
        if point.name in found:
            raise UserError(
                f"The name '{point.name}' that {owner} gives to one of its {group} is taken; uninstall or rename it."
            )
        try:
            loaded = point.load()
        except Exception as error:
            raise UserError(
                f"'{point.name}' among the {group} of {owner} can't be imported ({type(error).__name__}: {error}); "
                "repair or uninstall that package."
            ) from None
        if not isinstance(loaded, kind):
            raise UserError(
                f"'{point.name}' among the {group} of {owner} is a {type(loaded).__name__} ({point.value}) and must be a "
                f"{kind.__module__}.{kind.__name__}; docs/encoders.md has an example."
            )
        found[point.name] = loaded
    return found
