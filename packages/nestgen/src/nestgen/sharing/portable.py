"""Values without what only means something on the machine that they were made on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# A path that begins at the root, at home or outside of the folder, alone or after a name as in folder:/data/photos. Not what
# follows it in an address: s3://bucket/photos.
_PATH = re.compile(r"(^|:)(?!//)(?:~|\.{1,2})?/[^:]*")


def portable(value: Any) -> Any:
    """A JSON value with the last part only of every path of this machine: /home/me/vae.pt is vae.pt."""
    if isinstance(value, str):
        return _PATH.sub(lambda match: match[1] + match[0].rstrip("/").rsplit("/", 1)[-1], value)
    if isinstance(value, Mapping):
        return {key: portable(one) for key, one in value.items() if key != "_name_or_path"}
    return [portable(one) for one in value] if isinstance(value, list | tuple) else value
