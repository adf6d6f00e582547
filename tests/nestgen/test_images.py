"""Sheets: where the pictures land, and what cannot make one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nestgen.errors import UserError
from nestgen.images import CELL, GAP, draw_sheet, folders_sheet, image_path, read_images, write_image


def pictures(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_every_picture_stands_in_its_row_and_column_enlarged() -> None:
    rows = [pictures(3, 32), pictures(2, 32, 1)]
    sheet = np.asarray(draw_sheet(rows))
    assert sheet.shape == (GAP + 2 * (96 + GAP), GAP + 3 * (96 + GAP), 3)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            top, left = GAP + r * (96 + GAP), GAP + c * (96 + GAP)
            np.testing.assert_array_equal(sheet[top : top + 96 : 3, left : left + 96 : 3], picture)
            np.testing.assert_array_equal(sheet[top + 2 : top + 96 : 3, left + 2 : left + 96 : 3], picture)
    assert (sheet[-96:, -96:] == 255).all()  # where the shorter row ends


def test_large_pictures_keep_their_size_and_titles_move_them_right() -> None:
    row = pictures(2, CELL + 1)
    plain, titled = np.asarray(draw_sheet([row])), np.asarray(draw_sheet([row], ["z_1\nfrozen"]))
    margin = titled.shape[1] - plain.shape[1]
    assert margin > 20
    np.testing.assert_array_equal(titled[:, margin:], plain)
    assert (titled[:, :margin] < 128).any()  # the title is drawn
    assert (titled[:, margin - GAP : margin] == 255).all()  # and ends before the pictures


def test_folders_stand_under_each_other(tmp_path: Path) -> None:
    rows = [pictures(3, 8, 0), pictures(3, 8, 1)]
    folders = [tmp_path / "L1", tmp_path / "L2"]
    for folder, row in zip(folders, rows):
        for index, picture in enumerate(row):
            write_image(picture, image_path(folder, index))
    np.testing.assert_array_equal(read_images(folders[1], 3), rows[1])
    expected = draw_sheet([row[:2] for row in rows], ["L = 1", "L = 2"])
    np.testing.assert_array_equal(folders_sheet(folders, ["L = 1", "L = 2"], 2), expected)
    assert sorted(path.name for path in folders[0].iterdir()) == [f"{i:06d}.png" for i in range(3)]


def test_what_makes_no_sheet_is_said_in_a_sentence(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    for folder, side in ((small, 8), (large, 16)):
        write_image(pictures(1, side)[0], image_path(folder, 0))
    with pytest.raises(UserError, match=r"has no 000001\.png; run `nestgen sample` with --count 2"):
        read_images(small, 2)
    with pytest.raises(UserError, match=r"16x16 pixels and .*small of 8x8"):
        folders_sheet([small, large], ["a", "b"], 1)
    write_image(pictures(1, 16)[0], image_path(small, 1))
    with pytest.raises(UserError, match=r"000001\.png has another size"):
        read_images(small, 2)
    image_path(small, 1).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"000001\.png is damaged"):
        read_images(small, 2)
