"""One block of rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from featurize.errors import UserError
from featurize.extraction import block
from featurize.extraction.extract import extract
from featurize.recipe import read_request


@pytest.mark.parametrize(("network", "array"), [("encoder", "base"), ("codec", "8x8x3")])
def test_weights_that_change_during_a_run_stop_it(
    network: str, array: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where their file is overwritten: the blocks of an array are made by one network."""
    load = getattr(block, f"load_{network}")

    def other(*arguments: Any) -> Any:
        loaded = load(*arguments)
        return replace(loaded, identity={**loaded.identity, "name": "other"})

    wanted = {"source": "scenes:16", "limit": 4, "encoder": "pixels", "z0": "pixels:8", "out": str(tmp_path / "root")}
    with monkeypatch.context() as patched:
        patched.setattr(block, f"load_{network}", other)
        with pytest.raises(UserError, match=rf"{array}\.zarr was begun with other weights of its {network}; put those"):
            extract(read_request(None, wanted, "1x1x1"), workers=0, scheduler=None)
    extract(read_request(None, wanted, "1x1x1"), workers=0, scheduler=None)
