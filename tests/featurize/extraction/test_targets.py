"""The blocks of an extraction."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurize.codecs import CodecDescription, kinds, pixels
from featurize.encoders import EncoderDescription
from featurize.execution.tasks import run_here
from featurize.extraction import fit, targets
from featurize.extraction.extract import extract
from featurize.extraction.loader import INNER_BATCH
from featurize.integrity.reencode import spot_check
from featurize.recipe import read_request
from featurize.store.read import open_array

ENCODER = EncoderDescription("any", 224, (14, 14), 768, (), (), "bicubic", None, None, {}, {})


@given(
    rows=st.integers(1, 3_000_000),
    views=st.integers(1, 2),
    channels=st.integers(1, 768),
    side=st.sampled_from([16, 32, 256, 1024]),
)
def test_a_block_is_whole_inner_batches(rows: int, views: int, channels: int, side: int) -> None:
    codec = CodecDescription("pixels", side, "bicubic", (side, side, 3), 3, {}, {})
    block = targets.choose_rows_per_block(rows, views, ENCODER, channels, codec)
    assert block * views % INNER_BATCH == 0
    assert block & (block - 1) == 0
    assert block <= targets.MAX_ROWS_PER_BLOCK
    assert rows <= 4 * INNER_BATCH or rows / block > 4 or block == INNER_BATCH
    h_w_c = max(14 * 14 * channels, side * side * 3)
    assert 2 * views * block * h_w_c <= targets.MAX_BYTES_PER_BLOCK or block * views == INNER_BATCH


def test_a_store_begun_with_smaller_blocks_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of earlier versions have."""
    options = {"source": "scenes:16", "out": str(tmp_path), "limit": 40, "encoder": "pixels", "z0": "pixels:16"}
    with monkeypatch.context() as patch:
        patch.setattr(targets, "choose_rows_per_block", lambda *_: 16)
        extract(read_request(None, options, "2x2x4"), 0, None)
    extract(read_request(None, options, "2x2x4,1x1x2"), 0, None)
    assert {open_array(path).chunks[0] for path in tmp_path.rglob("*.zarr")} == {16}


def test_a_codec_of_ones_own_without_weights_is_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds(), "squares", pixels.KIND)
    options = {"source": "scenes:16", "out": str(tmp_path), "limit": 8, "encoder": "pixels", "z0": "squares:16"}
    extract(read_request(None, options, "2x2x4"), 0, None)
    assert spot_check(tmp_path, 4, 0, run_here) == []


def test_parts_of_a_fit_that_a_kill_left_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"source": "scenes:16", "out": str(tmp_path), "limit": 8, "encoder": "pixels", "z0": "pixels:16"}
    request = read_request(None, options, "2x2x4")

    def killed(folder: Path) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(fit, "remove_folder", killed)
        with pytest.raises(SystemExit):
            extract(request, 0, None)
    assert list(tmp_path.rglob("*.parts"))
    extract(request, 0, None)
    assert not list(tmp_path.rglob("*.parts"))
