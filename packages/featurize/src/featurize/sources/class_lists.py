"""Lists of classes: a file of names, or one that ships with the package."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from featurize.errors import UserError

# ImageNet's 1000 wnids; and the 100 that Contrastive Multiview Coding chose at random (imagenet100.txt of
# github.com/HobbitLong/CMC, commit bc687a2), the subset that papers call ImageNet-100.
BUILT_IN = ("imagenet", "imagenet100")


@cache
def read_classes(name: str) -> tuple[str, ...]:
    """The names of a list, sorted: a class's label is its position among them, whatever the file's order.

    `name` is one of BUILT_IN or a text file with a name at the start of each line (so ImageNet's `synset_words.txt` will
    do). Raises UserError for a file that is not there, is empty or names a class twice.
    """
    if name in BUILT_IN:
        text = (files("featurize.sources") / "wnids" / f"{name}.txt").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UserError(
                f"The list of classes {name} can't be read ({reason}); give a file, or one of {', '.join(BUILT_IN)}."
            ) from None
    names = [line.split()[0] for line in text.splitlines() if line.strip()]
    if not names:
        raise UserError(f"The list of classes {name} is empty; it needs a class name a line.")
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise UserError(f"The list of classes {name} names {twice} twice; take one out.")
    return tuple(sorted(names))
