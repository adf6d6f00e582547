"""One flipped bit in any file of a sample folder is named, is sampled again to the same bytes, or changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nestgen.errors import UserError
from nestgen.images import read_images
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.sampling.card import read_card
from tests.nestgen.samples import levels, sample_folder

COUNT, FLIPS = 4, 120


@pytest.fixture
def recipe(trained: Callable[..., Path]) -> Recipe:
    return load_recipe(trained())


def test_a_flip_in_a_sample_folder(recipe: Recipe, tmp_path: Path) -> None:
    out = sample_folder(recipe, tmp_path / "s", count=COUNT)

    def read() -> list[Any]:
        return [read_card(recipe, out), read_images(out, COUNT).tolist(), *(one.tolist() for one in levels(out))]

    whole, chance = read(), random.Random(0)
    content = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"}
    named, refused, again = [], [], 0
    for number in range(FLIPS):
        file = list(content)[number % len(content)]
        place = chance.randrange(len(content[file]))
        data = bytearray(content[file])
        data[place] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        try:
            found = read()
            known = {
                key: value for key, value in found[0].items() if key in whole[0]
            }  # without a digest of another name
            assert [known, *found[1:]] == whole, (file, place)
        except UserError as error:
            named.append(str(error))
        if file.parent.name == "latents" or number % 10 == 0:  # what only a run that goes on reads
            again += 1
            try:
                sample_folder(recipe, out, count=COUNT)
                if file.suffix == ".json" and file.parent != out:
                    assert read() == whole, (file, place)
            except UserError as error:
                refused.append(str(error))
        for path, data in content.items():
            path.write_bytes(data)
    assert len(named) > FLIPS // 3 and again > 10
    assert all(str(out) in one and "\n" not in one for one in (*named, *refused))
    assert read() == whole


def test_a_damaged_record_of_settings_vouches_for_nothing(recipe: Recipe, tmp_path: Path) -> None:
    out = sample_folder(recipe, tmp_path / "s", count=COUNT)
    record = out / "latents/pictures.json"
    record.write_text(record.read_text().replace("png, rounded", "png, founded"))
    with pytest.raises(UserError, match=r"pictures\.json is damaged; sample into another folder, or give --overwrite"):
        sample_folder(recipe, out, count=COUNT)
    (out / "000001.png").write_bytes(b"")
    before = (out / "000000.png").read_bytes()
    sample_folder(recipe, out, count=COUNT, overwrite=True)
    assert (out / "000000.png").read_bytes() == before
    assert len(read_images(out, COUNT)) == COUNT
