"""The paper's evaluations by name: how many samples, against which images, and of which classes or captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Name = Literal["coco30k", "imagenet100-50k", "imagenet50k"]
Inception = Literal["tensorflow", "pytorch-fid"]


@dataclass(frozen=True)
class Protocol:
    """What an evaluation fixes. `held_out`: against a reference root of its own, else against the training rows.

    `inception` is how images reach Inception (scoring/inception.py): U-ViT, whose numbers stand beside the paper's,
    measures FIDs as pytorch-fid does.
    """

    count: int
    held_out: bool
    policy: str
    inception: Inception = "pytorch-fid"

    def violation(self, card: dict[str, Any], held_out: bool) -> str | None:
        """Why samples with this card, against such a reference, do not follow the protocol; None if they do."""
        if card["count"] != self.count:
            return f"it takes {self.count} samples, and there are {card['count']}"
        if held_out != self.held_out:
            return "its reference is " + (
                "the validation set: set evaluation.reference"
                if self.held_out
                else "the training rows, not another root"
            )
        if card.get("label") is not None:
            return "each of its samples has a class drawn at random: leave --label out"
        if card.get("text") and card["text"].get("captions") != "one of each row":
            return "each of its samples has a caption of another image of the reference: give --prompts its root"
        return None


PROTOCOLS: dict[str, Protocol] = {
    "coco30k": Protocol(30_000, True, "validation set; with text, one seeded caption of each of its first 30,000 rows"),
    "imagenet100-50k": Protocol(50_000, False, "training images; with labels, classes drawn uniformly from the seed"),
    "imagenet50k": Protocol(50_000, False, "training images; with labels, classes drawn uniformly from the seed"),
}
