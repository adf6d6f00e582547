"""What is wrong with a recipe, in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from nestgen.recipe.sections import Align, Autoguide, InternalGuidance, Level, Section

# What pydantic adds to a key's path where several types are allowed.
UNION_MEMBERS = ("float", "tuple[", "constrained-float", "function-before[")


def describe_error(errors: ValidationError, data: Any, recipe: type[Section]) -> str:
    """What is wrong with a recipe's data, in one sentence: the key by its path, what was expected, what was found."""
    # An unknown key first: it is why another one is missing.
    error: Any = min(errors.errors(), key=lambda one: one["type"] != "extra_forbidden")
    path = []
    for part in error["loc"]:
        if str(part).startswith(UNION_MEMBERS):
            continue
        if isinstance(part, int) and not isinstance(data, list | tuple):
            continue  # the recipe has one value where a list may stand
        path.append(part)
        data = data.get(part) if isinstance(data, Mapping) else data[part] if isinstance(data, list | tuple) else None
    name = _dotted(path)
    if error["type"] == "extra_forbidden":
        return f"{name} is not a key; {_nearest(path, _keys(recipe))}"
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] == "model_type":
        return f"{name} should be a section of keys, found {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if error["type"] == "value_error" and isinstance(error["input"], dict):  # a rule over several keys
        return f"{name} {message}".strip()
    return f"{name} {message}, found {error['input']!r}"


def _dotted(path: list[Any]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _keys(recipe: type[Section]) -> dict[str, list[str]]:
    """The keys of each section, for suggestions; the top of the file is ""."""
    return {
        "": list(recipe.model_fields),
        "levels": list(Level.model_fields),
        **{
            name: list(field.annotation.model_fields)
            for name, field in recipe.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        },
        "autoguide": list(Autoguide.model_fields),
        "internal_guidance": list(InternalGuidance.model_fields),
        "align": list(Align.model_fields),
    }


def _nearest(path: list[Any], keys_of: dict[str, list[str]]) -> str:
    """The right key that an unknown one most likely stands for."""
    key = str(path[-1])
    keys = keys_of[next((str(part) for part in reversed(path[:-1]) if part in keys_of), "")]
    if near := difflib.get_close_matches(key, keys, 1):
        return f"did you mean {_dotted([*path[:-1], near[0]])}?"
    for section, others in keys_of.items():
        if key in others:
            return f"did you mean {_dotted([section, key] if section else [key])}?"
    return f"the keys here are {', '.join(keys)}"
