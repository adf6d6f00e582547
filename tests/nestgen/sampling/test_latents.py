"""Latents of a sample folder: blocks that exist or do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nestgen.errors import UserError
from nestgen.sampling.latents import Latents, create_latents, open_latents


def values(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, 4, 3, generator=torch.Generator().manual_seed(seed))


def filled(folder: Path, count: int = 7, block: int = 3) -> tuple[Latents, Tensor]:
    latents, z_BCHW = create_latents(folder, 1, (count, 4, 3, 2), block), values(count)
    for rows in latents.blocks():
        latents.write(rows, z_BCHW[rows.start : rows.stop])
    return latents, z_BCHW


def test_what_was_written_is_read_and_any_zarr_reader_opens_it(tmp_path: Path) -> None:
    latents, z_BCHW = filled(tmp_path)
    for rows in latents.blocks():
        torch.testing.assert_close(latents.read(rows), z_BCHW[rows.start : rows.stop], rtol=0, atol=0)
    z_BHWC = z_BCHW.permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(open_latents(tmp_path, 1).read_all(), z_BHWC)
    array = zarr.open_array(tmp_path / "latents" / "z1.zarr", mode="r")
    assert (array.shape, array.chunks, array.dtype) == ((7, 4, 3, 2), (3, 4, 3, 2), np.float32)
    np.testing.assert_array_equal(array[:], z_BHWC)


@given(count=st.integers(1, 50), block=st.integers(1, 60))
def test_blocks_cover_every_row_once(tmp_path_factory: pytest.TempPathFactory, count: int, block: int) -> None:
    latents = create_latents(tmp_path_factory.mktemp("latents"), 0, (count, 1, 1, 1), block)
    rows = list(latents.blocks())
    assert [index for one in rows for index in one] == list(range(count))
    assert {len(one) for one in rows[:-1]} <= {min(block, count)}


def test_a_block_without_its_record_does_not_exist(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "latents" / "z1.blocks" / "000003.json").unlink()
    again = create_latents(tmp_path, 1, (7, 4, 3, 2), 5)
    assert list(again.blocks()) == [range(3), range(3, 6), range(6, 7)]  # the blocks it began with
    assert [again.has(rows) for rows in again.blocks()] == [True, False, True]
    with pytest.raises(UserError, match="unfinished: images 3 to 5 are not there"):
        again.read_all()


def test_an_array_without_blocks_is_begun_again(tmp_path: Path) -> None:
    create_latents(tmp_path, 1, (7, 4, 3, 2), 3)
    (tmp_path / "latents" / "z1.zarr" / "zarr.json").write_text("{")  # cut while it was laid out
    assert create_latents(tmp_path, 1, (9, 4, 3, 2), 5).array.chunks[0] == 5


def test_bad_blocks_are_said_in_a_sentence(tmp_path: Path) -> None:
    latents, _ = filled(tmp_path)
    latents.array[4, 0, 0, 0] = 9.0
    with pytest.raises(UserError, match="damaged at images 3 to 5"):
        latents.read_all()
    with pytest.raises(UserError, match="z1 of images 0 to 2 came out not finite"):
        latents.write(range(3), torch.full((3, 2, 4, 3), torch.nan))
    with pytest.raises(UserError, match=r"has no latents of z_2"):
        open_latents(tmp_path, 2)
