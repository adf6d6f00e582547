"""What a report says of its numbers: each sentence is true of them, whatever they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SpaceScores:
    """Fréchet distances in one space: a value for each depth, None where the hierarchy has no such level; `floor` is real
    images against real ones."""

    space: str
    dimensions: int
    distances: tuple[float | None, ...]
    floor: float | None

    @property
    def complete(self) -> tuple[float, ...]:
        """The distances of all depths; nothing where one is missing, or where there is one depth only."""
        found = tuple(distance for distance in self.distances if distance is not None)
        return found if len(found) == len(self.distances) > 1 else ()

    @property
    def falls(self) -> bool:
        """Whether each depth is better than the one before it."""
        return bool(self.complete) and all(b < a for a, b in zip(self.complete, self.complete[1:]))

    def best(self, depths: Sequence[int]) -> int:
        """The depth with the lowest distance."""
        return min(zip(self.complete, depths))[1]


def depth_heading(scores: Sequence[SpaceScores], depths: Sequence[int]) -> str:
    """What depth does to the samples, in all the spaces that every depth has."""
    compared = [one for one in scores if one.complete]
    if not compared:
        return "Samples"
    if all(one.falls for one in compared):
        return "Samples get better with depth"
    if all(one.best(depths) == min(depths) for one in compared):
        return "Samples do not get better with depth"
    return "Depth helps in part"


def depth_sentences(scores: Sequence[SpaceScores], depths: Sequence[int]) -> list[str]:
    """A sentence for each space that every depth has."""
    sentences = []
    for one in scores:
        if not one.complete:
            continue
        each = ", ".join(f"{distance:.3g} at L = {depth}" for distance, depth in zip(one.complete, depths))
        end = "lower with every level" if one.falls else f"L = {one.best(depths)} is best"
        sentences.append(f"In {one.space} the distance is {each}: {end}.")
    return sentences


def levels_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much samples vary, over the levels that are frozen; `rows` are those of hierarchy.json, from none on."""
    variations = [row["variation"] for row in rows]
    each = ", ".join(
        f"{variation:.0f} with {frozen_name(row)} frozen" for row, variation in zip(rows, variations, strict=True)
    )
    falls = all(b < a for a, b in zip(variations, variations[1:]))
    start = "The more levels are frozen, the less the samples vary" if falls else "So much the samples vary"
    return f"{start}: by {each} (of 255)."


def frozen_name(row: Mapping[str, Any]) -> str:
    """The frozen levels of a row of hierarchy.json."""
    return " and ".join(f"z_{level}" for level in row["frozen"]) or "nothing"


def neighbours_sentence(agreement: Mapping[str, float | None], chance: float | None) -> str:
    """In which space neighbours share the query's label most, beside raw pixels and chance; nothing without labels."""
    shares = {space: share for space, share in agreement.items() if share is not None}
    if not shares:
        return ""
    best = max(shares, key=lambda space: shares[space])
    others = [f"by {space} {shares[space]:.0%}" for space in ("raw pixels",) if space in shares and space != best]
    others += [] if chance is None else [f"by chance {chance:.0%}"]
    beside = f"; {', '.join(others)}" if others else ""
    return f"By {best}, {shares[best]:.0%} of an image's neighbours have its label{beside}."
