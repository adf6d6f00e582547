"""libtiff writes of each damaged file to the process's standard error, into the progress bar; the ledger says it already."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache
from pathlib import Path

import PIL


@cache
def silence_libtiff() -> None:
    """Takes the handlers of errors and warnings from the libtiff in Pillow's wheels; another libtiff stays as it is."""
    for library in Path(PIL.__file__).parents[1].glob("pillow.libs/libtiff*.so*"):
        with suppress(OSError, AttributeError):
            libtiff = ctypes.CDLL(str(library))  # already loaded: the same library, not another copy
            for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
                handler = getattr(libtiff, name)
                handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
                handler(None)
