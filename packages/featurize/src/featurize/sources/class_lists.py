"""Lists of classes: a file of names, or one that ships with the package."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

from featurize.errors import UserError
from featurize.io.addresses import read_text
from featurize.io.home import expand_home
from featurize.sources.outside_text import same_form

# ImageNet's 1000 wnids; and the 100 that Contrastive Multiview Coding chose at random (imagenet100.txt of
# github.com/HobbitLong/CMC, commit bc687a2), the subset that papers call ImageNet-100.
BUILT_IN = ("imagenet", "imagenet100")
WNID = re.compile(r"n\d{8}")


@cache
def read_classes(name: str) -> tuple[str, ...]:
    """The names of a list, sorted: a class's label is its position among them, whatever the file's order.

    `name` is one of BUILT_IN or a text file with a name a line, like `hot dog`. Where every line begins with a wnid, as in
    ImageNet's `synset_words.txt`, that is the name. Raises UserError for a file that is not there, is empty, is not UTF-8 or
    names a class twice.
    """
    if name in BUILT_IN:
        text = (files("featurize.sources") / "wnids" / f"{name}.txt").read_text(encoding="utf-8")
    else:
        try:
            text = read_text(str(expand_home(name).resolve()))
        except OSError as error:
            raise UserError(
                f"The list of classes {name} can't be read ({error.strerror}); give a file, or one of {', '.join(BUILT_IN)}."
            ) from None
    names = [same_form(line.strip()) for line in text.split("\n") if line.strip()]
    if all(WNID.fullmatch(name.split()[0]) for name in names):
        names = [name.split()[0] for name in names]
    if not names:
        raise UserError(f"The list of classes {name} is empty; it needs a class name a line.")
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise UserError(f"The list of classes {name} names {twice} twice; take one out.")
    return tuple(sorted(names))
