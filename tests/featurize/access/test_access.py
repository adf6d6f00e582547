"""A store root from Python: numpy, torch, and further images into its levels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import featurize
from featurize.errors import UserError
from featurize.execution.tasks import one_thread
from featurize.store.ledger import read_ledger
from tests.featurize.conftest import MODEL, random_picture
from tests.featurize.images.test_faults import swapped_profile

LEVEL, SMALL, BASE, Z0 = f"timm-{MODEL}/2x2x8", f"timm-{MODEL}/1x1x16", f"timm-{MODEL}/base", "pixels/16x16x3"


def test_levels_are_numpy_and_rows_have_keys_labels_and_classes(extraction: Path) -> None:
    root = featurize.open(extraction)
    assert list(root.paths) == [Z0, LEVEL, SMALL, BASE]
    assert root.levels == [LEVEL, SMALL]
    values = root["2x2x8"][:]
    assert isinstance(values, np.ndarray) and (values.shape, values.dtype) == ((60, 2, 2, 2, 8), np.float16)
    np.testing.assert_array_equal(root[LEVEL][5:7], values[5:7])
    assert len(root) == 60 and len(root["2x2x8"].attrs["mean"]) == 8
    assert root.classes == ("class-0", "class-1", "class-2")
    for row in (0, 59):
        assert f"class-{root.labels[row]}/" in root.keys[row]
    with pytest.raises(KeyError, match=r"has no array '8x8x8'; its arrays are pixels/16x16x3, "):
        root["8x8x8"]
    with pytest.raises(UserError, match="is not a store root"):
        featurize.open(extraction.parent / "nowhere")


def test_a_dataset_gives_rows_labels_and_one_view_or_both(extraction: Path) -> None:
    root = featurize.open(extraction)
    dataset = root.dataset("2x2x8", Z0, view=1)
    assert isinstance(dataset, torch.utils.data.Dataset) and len(dataset) == 60
    batches = list(DataLoader(dataset, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(0)))
    rows = torch.cat([batch["row"] for batch in batches]).numpy()
    assert sorted(rows) == list(range(60)) and list(rows) != list(range(60))
    level = torch.cat([batch["2x2x8"] for batch in batches])
    assert (level.dtype, level.shape) == (torch.float32, (60, 8, 2, 2))
    np.testing.assert_array_equal(level.permute(0, 2, 3, 1), root["2x2x8"][:][rows, 1])
    np.testing.assert_array_equal(torch.cat([batch["label"] for batch in batches]), root.labels[rows])
    assert batches[0][Z0].shape == (32, 3, 16, 16)
    both = root.dataset()[-1]
    assert both["row"] == 59 and both[LEVEL].shape == (2, 8, 2, 2) and both[SMALL].shape == (2, 16, 1, 1)
    with pytest.raises(IndexError, match="no row 60 among 60"):
        dataset[60]
    with pytest.raises(ValueError, match="view is 2 and 2x2x8 has 2; give 0"):
        root.dataset("2x2x8", view=2)


def test_a_forked_worker_reads_a_root_in_a_bucket(extraction: Path, bucket: str) -> None:
    fsspec.filesystem("s3").put(f"{extraction}/", f"{bucket}/root/", recursive=True)
    dataset, local = (featurize.open(root).dataset("2x2x8", view=0) for root in (f"{bucket}/root", extraction))
    np.testing.assert_array_equal(dataset[7]["2x2x8"], local[7]["2x2x8"])  # this process has connections now
    batches = DataLoader(dataset, 60, num_workers=1, multiprocessing_context="fork", timeout=60)
    np.testing.assert_array_equal(next(iter(batches))["2x2x8"], next(iter(DataLoader(local, 60)))["2x2x8"])


def test_captions_come_as_lists(shard: Path, vit_weights: Path, tmp_path: Path) -> None:
    from featurize.extraction.extract import extract
    from featurize.recipe import read_request

    wanted = {"source": f"wds:{shard}", "encoder": f"timm:{MODEL}", "weights": str(vit_weights), "out": str(tmp_path)}
    extract(read_request(None, wanted | {"z0": "pixels:8"}, "1x1x4"), workers=0, scheduler=None)
    root = featurize.open(tmp_path)
    assert root.captions[3] == ("picture 3",)
    batch = next(iter(DataLoader(root.dataset(captions=True), 4, collate_fn=featurize.collate)))
    assert batch["captions"] == [(f"picture {row}",) for row in range(4)]
    assert batch[f"timm-{MODEL}/1x1x4"].shape == (4, 1, 4, 1, 1)
    assert "captions" not in root.dataset()[0]


def test_images_of_a_root_encoded_again_are_its_rows(extraction: Path, picture_folder: Path) -> None:
    root = featurize.open(extraction)
    files = [image.source for image in read_ledger(extraction).images]
    with one_thread():
        latents = featurize.encode(files, root, "2x2x8", SMALL, BASE, Z0)
    for name, values in latents.items():
        assert values.dtype == np.float32
        unit = 0 if name in (BASE, Z0) else 1e-3  # of float16: sums of another batch are rounded in another order
        np.testing.assert_allclose(values.astype(np.float16), root[name][:, 0], rtol=unit, atol=1e-4 if unit else 0)
    images = [Image.open(files[0]), np.asarray(Image.open(files[41]).convert("RGB"))]
    with one_thread():
        some = featurize.encode(images, extraction)
    assert list(some) == [LEVEL, SMALL]
    np.testing.assert_array_equal(some[LEVEL], latents["2x2x8"][[0, 41]])


def test_an_image_is_treated_as_its_file(tmp_path: Path) -> None:
    """Turned upright, its 16 bits scaled and its colours converted."""
    from featurize.extraction.extract import extract
    from featurize.recipe import read_request

    wanted = {"source": "scenes:16", "limit": 4, "encoder": "pixels", "z0": "pixels:8", "icc": "srgb"}
    extract(read_request(None, {**wanted, "out": str(tmp_path / "root")}, "1x1x1"), workers=0, scheduler=None)
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [tmp_path / name for name in ("turned.png", "deep.png", "wide.png")]
    random_picture(1, 24, 16).save(files[0], exif=exif)
    Image.fromarray(random.integers(0, 65536, (16, 16), dtype=np.uint16)).save(files[1])
    random_picture(2, 16, 16).save(files[2], icc_profile=swapped_profile())
    by_path, by_image = (
        featurize.encode(images, tmp_path / "root", "pixels/8x8x3")["pixels/8x8x3"]
        for images in (files, [Image.open(file) for file in files])
    )
    np.testing.assert_array_equal(by_image, by_path)
    with pytest.raises(ValueError, match=r"images\[0\], .*can't be read: a grey picture of floats from -5 to -5"):
        featurize.encode([Image.new("F", (8, 8), -5)], tmp_path / "root", "pixels/8x8x3")


def test_what_is_no_image_is_said_in_a_sentence(extraction: Path, vit_weights: Path, tmp_path: Path) -> None:
    root = featurize.open(extraction)
    with pytest.raises(TypeError, match=r"images is a str; give a list of images, such as \[image\]"):
        featurize.encode("cat.jpg", root)
    with pytest.raises(ValueError, match="images is empty"):
        featurize.encode([], root)
    with pytest.raises(ValueError, match=r"images\[0\], .*cat\.jpg, can't be read"):
        featurize.encode([tmp_path / "cat.jpg"], root)
    with pytest.raises(ValueError, match=r"images\[0\] is float64 \(8, 8, 3\); give uint8 \(h, w, 3\)"):
        featurize.encode(np.zeros((1, 8, 8, 3)), root)
    with pytest.raises(TypeError, match=r"images\[0\] is a int; give a PIL image"):
        featurize.encode([3], root)  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"weights .*other\.pt of .* are not there"):
        featurize.encode(np.zeros((1, 8, 8, 3), np.uint8), root, weights=tmp_path / "other.pt")


def test_importing_featurize_imports_none_of_its_libraries() -> None:
    code = (
        "import featurize, sys; print([m for m in ('numpy', 'torch', 'zarr', 'pyarrow', 'click') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
