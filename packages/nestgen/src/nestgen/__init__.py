"""Nested generative models: one denoiser per level of a hierarchy of stored latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestgen.sampling.pipeline import NestedPipeline

__all__ = ["NestedPipeline"]


def __getattr__(name: str) -> Any:
    """NestedPipeline on first use: importing it takes seconds, and the command line often needs none of it."""
    if name == "NestedPipeline":
        from nestgen.sampling.pipeline import NestedPipeline

        return NestedPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
