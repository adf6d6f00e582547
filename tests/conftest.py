"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The machine may be busy: how long an example takes says nothing.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real pictures, or a visible skip where it is absent."""
    folder = Path(os.environ.get("NESTED_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")).resolve()
    if not (folder / "README.md").is_file():
        pytest.skip(f"real test data is not at {folder}; set NESTED_TEST_DATA")
    return folder
