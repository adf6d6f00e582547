"""What `featurize info --picture` draws, and that it is what the stores say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from featurize.io.files import json_sha256, write_json
from featurize.reports.figure import encoders_of
from featurize.store.seal import OWN_DIGEST
from tests.featurize.conftest import MODEL, Outcome

Command = Callable[..., Outcome]


def test_a_picture_of_every_encoder(extraction: Path, tmp_path: Path, featurize: Command) -> None:
    outcome = featurize("info", extraction, "--picture", tmp_path / "info.png")
    assert outcome.code == 0, outcome.err
    assert "60 rows" in outcome.out and "info.png" in outcome.out
    with Image.open(tmp_path / "info.png") as picture:
        assert picture.width > 1000
        assert np.asarray(picture.convert("L")).std() > 10


def test_it_shows_the_shares_means_and_stds_of_the_stores(extraction: Path, tmp_path: Path) -> None:
    root = shutil.copytree(extraction, tmp_path / "root")
    seal = root / f"timm-{MODEL}" / "base.seal.json"
    document = json.loads(seal.read_text()) | {"features": {"effective_rank": 12.5, "outlier_share": 0.02}}
    del document[OWN_DIGEST]
    write_json(seal, document | {OWN_DIGEST: json_sha256(document)})
    (facts,) = encoders_of(root)
    assert facts.name == f"timm:{MODEL}"
    assert len(facts.explained_K) == 48 and (np.diff(facts.explained_K) <= 0).all()
    assert np.isclose(facts.explained_K.sum(), 1)
    assert facts.measured == {"effective_rank": 12.5, "outlier_share": 0.02}
    assert [(name, len(mean), len(std)) for name, mean, std in facts.levels] == [("2x2x8", 8, 8), ("1x1x16", 16, 16)]


def test_nothing_to_draw_is_one_sentence(extraction: Path, tmp_path: Path, featurize: Command) -> None:
    shutil.copy(extraction / "rows.parquet", tmp_path)
    outcome = featurize("info", tmp_path, "--picture", tmp_path / "info.png")
    assert outcome.code == 1
    assert "nothing to draw" in outcome.err
    assert not (tmp_path / "info.png").exists()
