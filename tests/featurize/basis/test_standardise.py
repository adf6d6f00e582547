"""A level is standardised by its channels' spread, which must not be nothing."""

from __future__ import annotations

import numpy as np
import pytest

from featurize.basis.standardise import check_varies
from featurize.errors import UserError


def test_a_constant_channel_is_named_and_a_constant_level_has_another_cure() -> None:
    check_varies(np.array([1.0, 0.1]), "1x1x2")
    with pytest.raises(UserError, match=r"Channel 1 of the level 1x1x3 is constant .*; ask for fewer channels"):
        check_varies(np.array([1.0, 0.0, 0.1]), "1x1x3")
    # One image, one cell: fewer channels would be constant too.
    with pytest.raises(UserError, match=r"The level 1x1x2 is constant .*; give more images, or leave that level out"):
        check_varies(np.zeros(2), "1x1x2")
