"""Nested generative models: one denoiser per level of a hierarchy of stored latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestgen.pipeline import NestedPipeline

__all__ = ["NestedPipeline", "__version__"]

__version__: str


def __getattr__(name: str) -> Any:
    """The names above on first use: NestedPipeline takes seconds to import, and the command line often needs none."""
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("nestgen")
    if name == "NestedPipeline":
        from nestgen.pipeline import NestedPipeline

        return NestedPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
