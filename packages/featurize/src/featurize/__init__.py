"""featurize: images through a frozen encoder into standardised per-level zarr stores."""

from __future__ import annotations

__version__: str


def __getattr__(name: str) -> str:
    """`featurize.__version__`, from the installed package: pyproject.toml is the one place that states it."""
    if name == "__version__":
        from featurize.versions import version

        return version("featurize")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
