"""Overlapped descent on the Gaussian hierarchy: what it is at its two ends."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.overlap import sample_overlapped
from nestgen.sampling.conditions import ImageConditions
from nestgen.sampling.descent import sample_images
from tests.nestgen.diffusion.test_gaussian_hierarchy import IMAGES, exact_noise, hierarchy, marginals, relative

pytestmark = pytest.mark.usefixtures("exact_noise")
__all__ = ["exact_noise"]  # the fixture


def test_started_at_the_end_it_is_one_level_after_the_other() -> None:
    samplers = hierarchy("vp", "ddim", 10)
    alone = sample_images(samplers, range(IMAGES), ImageConditions(0))
    together = sample_overlapped(samplers, list(range(IMAGES)), 0, 0.0, "estimate")
    for level, z_BCHW in alone.items():
        np.testing.assert_allclose(together[level], z_BCHW, rtol=0, atol=1e-6)


def test_the_state_above_is_a_noised_condition_as_in_training() -> None:
    """So z_0's covariance stays that of the data, while its images are others."""
    samplers = hierarchy("vp", "dpm++-single", 50)
    alone, together = (
        sample_overlapped(samplers, list(range(IMAGES)), 0, start, "state")[0].flatten(1).numpy()
        for start in (0.0, 0.2)
    )
    covariance = marginals()[1][0]
    assert relative(together, alone) > 0.001
    assert relative(np.cov(together, rowvar=False), covariance) < 0.05
