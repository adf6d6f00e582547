"""featurize: images through a frozen encoder into standardised per-level zarr stores.

root = featurize.open("stores/photos")
z_NVHWC = root["4x4x16"][:100]                            # numpy: 100 rows, their views, a map of 4x4 with 16 channels
loader = DataLoader(root.dataset("4x4x16", view=0), 64)   # torch
latents = featurize.encode(["cat.jpg"], root)             # further images into its levels
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurize.access.dataset import collate
    from featurize.access.encode import encode
    from featurize.access.root import open_root as open

__all__ = ["__version__", "collate", "encode", "open"]

__version__: str


def __getattr__(name: str) -> Any:
    """The names above on first use: importing featurize imports none of its libraries, so that `--help` is quick.

    The version is that of the installed package: pyproject.toml is the one place that states it.
    """
    if name == "__version__":
        from featurize.versions import version

        return version("featurize")
    if name == "open":
        from featurize.access.root import open_root

        return open_root
    if name == "encode":
        from featurize.access.encode import encode

        return encode
    if name == "collate":
        from featurize.access.dataset import collate

        return collate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
