"""The modules beside the Snakefile, as it imports them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

PIPELINES = Path(__file__).parents[2] / "pipelines"
sys.path.insert(0, str(PIPELINES))


@pytest.fixture
def pipelines() -> Path:
    """The folder of the workflow."""
    return PIPELINES
