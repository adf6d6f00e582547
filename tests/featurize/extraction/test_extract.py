"""Whole extractions: the same bytes from any number of workers, after a kill, and by the encoder's own words."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
import zarr
from PIL import Image
from safetensors.torch import load_file, save_file

from featurize.basis.svd import load_basis
from featurize.errors import UserError
from featurize.execution import devices
from featurize.extraction import loader
from featurize.extraction.extract import extract
from featurize.recipe import read_request
from tests.featurize.conftest import MODEL, MODEL_ARGS, as_words, chunks, options, random_picture

ENCODER = f"timm-{MODEL}"


def test_the_base_is_the_models_own_tokens_on_the_basis(
    extraction: Path, picture_folder: Path, vit_weights: Path
) -> None:
    model = timm.create_model(MODEL, num_classes=7, **MODEL_ARGS).eval().double()
    model.load_state_dict(load_file(vit_weights))
    path = picture_folder / "class-0" / "006.jpg"
    row = next(
        line for line in pq.read_table(extraction / "rows.parquet").to_pylist() if line["key"] == "class-0/006.jpg"
    )
    with Image.open(path) as image:
        picture = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC, box=tuple(row["box"])))
    basis = load_basis(extraction / ENCODER / "basis.safetensors")
    base = zarr.open(str(extraction / ENCODER / "base.zarr"), mode="r")
    for view, pixels in enumerate((picture, picture[:, ::-1])):
        x = torch.from_numpy(pixels.copy()).double().permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            tokens = model.forward_features(x)[0, 1:].reshape(4, 4, 48).numpy()
        expected = (tokens - basis.mean) @ basis.components
        np.testing.assert_allclose(np.asarray(base[row["row"], view]), expected, atol=6e-3)


def test_z_0_holds_the_pixels_and_its_second_view_the_flip(extraction: Path) -> None:
    z_0 = np.asarray(zarr.open(str(extraction / "pixels" / "16x16x3.zarr"), mode="r")[:])
    np.testing.assert_array_equal(z_0[:, 1], z_0[:, 0, :, ::-1])
    levels = (z_0.astype(np.float64) + 1) * 127.5
    assert np.abs(levels - np.rint(levels)).max() < 0.07  # each of the 256 values survives float16


def test_every_picture_is_stored_or_refused(
    picture_folder: Path, vit_weights: Path, tmp_path: Path, featurize: Callable
) -> None:
    folder = shutil.copytree(picture_folder, tmp_path / "pictures")
    (folder / "class-0" / "empty.jpg").touch()
    (folder / "class-1" / "cut.png").write_bytes((folder / "class-1" / "001.png").read_bytes()[:-40])
    arguments = ["extract", f"folder:{folder}", "--encoder", f"timm:{MODEL}", "--weights", vit_weights, "--workers", 0]
    outcome = featurize(*arguments, "--levels", "1x1x4", "--out", tmp_path / "out", "--max-bad", 1)
    assert outcome.code == 1
    assert "2 of 62 pictures can't be read" in outcome.err
    outcome = featurize(*arguments, "--levels", "1x1x4", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    lines = pq.read_table(tmp_path / "out" / "rows.parquet").to_pylist()
    refused = [line for line in lines if line["status"] == "refused"]
    assert len(lines) == 62
    assert {line["key"] for line in refused} == {"class-0/empty.jpg", "class-1/cut.png"}
    assert all(line["row"] is None and line["reason"] for line in refused)
    assert [line["row"] for line in lines if line["status"] == "ok"] == list(range(60))
    labels = zarr.open(str(tmp_path / "out" / "labels.zarr"), mode="r")[:]
    np.testing.assert_array_equal(labels, [line["label"] for line in lines if line["status"] == "ok"])


def test_asked_again_nothing_is_done_and_another_question_is_refused(
    extraction: Path, picture_folder: Path, vit_weights: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(extraction, tmp_path / "root")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    extract(read_request(None, options(picture_folder, vit_weights, root), "2x2x8"), workers=0, scheduler=None)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before

    other = tmp_path / "other.safetensors"
    state = load_file(vit_weights)
    save_file({key: value * 1.5 for key, value in state.items()}, other)
    shutil.copy(vit_weights.with_suffix(".json"), other.with_suffix(".json"))
    for changed, difference in (
        ({"weights": str(other)}, "encoder.weights_sha256"),
        ({"precision": "bfloat16"}, "encoder.precision"),
        ({"views": 1}, "views"),
        ({"source": f"folder:{picture_folder}/class-1"}, "already holds other pictures"),
    ):
        request = read_request(None, options(picture_folder, vit_weights, root) | changed, "2x2x8")
        with pytest.raises(UserError, match=difference):
            extract(request, workers=0, scheduler=None)
    assert chunks(root) == chunks(extraction)


def test_dask_workers_give_the_same_bytes(
    extraction: Path, picture_folder: Path, vit_weights: Path, tmp_path: Path
) -> None:
    request = read_request(None, options(picture_folder, vit_weights, tmp_path / "two"), "2x2x8,1x1x16")
    extract(request, workers=2, scheduler=None)
    assert chunks(tmp_path / "two") == chunks(extraction)


@pytest.mark.parametrize(("workers", "decoders"), [(0, 1), (0, 4), (1, 2)])
def test_decoders_and_as_beside_a_gpu_the_bytes_are_the_same(
    extraction: Path,
    picture_folder: Path,
    vit_weights: Path,
    tmp_path: Path,
    workers: int,
    decoders: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside a GPU workers are spawned, as CUDA can't be used in a fork, and do two blocks at once. Theirs is the CPU here.

    The slots are as small as a few images, so that parts of a batch come from several, and all slots are used again.
    """
    if workers:
        monkeypatch.setattr(devices, "gpus", lambda: 1)
    else:
        monkeypatch.setattr(loader, "ROWS_PER_JOB", 3)
    request = read_request(None, options(picture_folder, vit_weights, tmp_path), "2x2x8,1x1x16")
    extract(request, workers, scheduler=None, decoders=decoders)
    assert chunks(tmp_path) == chunks(extraction)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(
    extraction: Path, picture_folder: Path, vit_weights: Path, tmp_path: Path, begin: Callable
) -> None:
    """A limit on the size of a file is the full disk that a test can have without being root."""
    root = tmp_path / "full"
    request = options(picture_folder, vit_weights, root)
    words = as_words(request)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))"
    code, _, errors = begin(tmp_path, "featurize", "extract", request["source"], *words, before=limit).ended()
    assert code == 1
    assert "refuses a file so large" in errors
    assert "Traceback" not in errors
    extract(read_request(None, request, "2x2x8,1x1x16"), workers=0, scheduler=None)
    assert chunks(root) == chunks(extraction)


def test_ctrl_c_ends_with_one_line(picture_folder: Path, vit_weights: Path, tmp_path: Path, begin: Callable) -> None:
    request = options(picture_folder, vit_weights, tmp_path / "out")
    words = ["--encoder", request["encoder"], "--weights", vit_weights, "--out", tmp_path / "out", "--workers", 0]
    begun = begin(tmp_path, "featurize", "extract", request["source"], *words)
    while not (tmp_path / "out" / "first-pass").exists() and begun.process.is_alive():
        time.sleep(0.002)
    os.kill(begun.process.pid, signal.SIGINT)
    code, _, err = begun.ended()
    assert code in (0, 130)  # 0 when it was done before the signal came
    assert "Traceback" not in err
    if code == 130:
        assert "stopping: the tasks under way are finished first" in err
        assert "kept in" in err
        assert (
            json.loads((tmp_path / "out" / "extract.log.jsonl").read_text().splitlines()[-1])["event"] == "interrupted"
        )


def test_a_vae_gives_moments_that_decode(tmp_path: Path, picture_folder: Path, vit_weights: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=32,
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    request = options(
        picture_folder, vit_weights, tmp_path / "out", z0="vae:32", z0_weights=str(tmp_path / "vae"), z0_scale=0.2301
    )
    extract(read_request(None, request | {"limit": 5}, "1x1x4"), workers=0, scheduler=None)
    store = zarr.open(str(tmp_path / "out" / "vae" / "16x16x4.zarr"), mode="r")
    assert store.shape == (5, 2, 16, 16, 8)
    assert (store.attrs["latent_shape"], store.attrs["codec"]["scale"]) == ([16, 16, 4], 0.2301)
    ledger = pq.read_table(tmp_path / "out" / "rows.parquet").to_pylist()
    with Image.open(ledger[2]["source"]) as image:
        picture = image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC, box=tuple(ledger[2]["box"]))
    x = torch.from_numpy(np.asarray(picture) / 127.5 - 1).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        moments = vae.encode(x).latent_dist.parameters[0].permute(1, 2, 0)
    np.testing.assert_allclose(np.asarray(store[2, 0]), moments.numpy(), atol=5e-3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weights": "/nowhere.safetensors"}, "are not there"),
        ({"weights": None}, "can't be fetched"),
        ({"encoder": "mocov9"}, "no encoder 'mocov9'"),
        ({"model_args": {"depth": 3}}, "keys are missing"),
        ({"model_args": {"img_size": 64}}, "'pos_embed' is"),
        ({"z0": "pixel:3"}, "There is no codec 'pixel:3'"),
        ({"z0": "vae:32"}, "can't be fetched"),
        ({"source": "folder:/nowhere"}, "not there"),
        ({"source": None}, "Which pictures"),
        ({"basis": "/nowhere"}, "no basis"),
        ({"levels": "9x9x4"}, "larger than the 4x4 grid"),
        ({"levels": "2x2x99"}, "has 48"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_leaves_nothing(
    change: dict, sentence: str, picture_folder: Path, vit_weights: Path, tmp_path: Path, featurize: Callable
) -> None:
    wanted = options(picture_folder, vit_weights, tmp_path / "out") | {"levels": "1x1x4", "model_args": {}} | change
    source = wanted.pop("source")
    wanted["model_args"] = str(wanted["model_args"]) if wanted["model_args"] else None
    flags = [
        part for key, value in wanted.items() if value is not None for part in (f"--{key.replace('_', '-')}", value)
    ]
    outcome = featurize("extract", *([source] if source else []), *flags, "--workers", 0)
    assert outcome.code == 1
    assert sentence in outcome.err
    assert "Traceback" not in outcome.err
    assert not list(tmp_path.rglob("*.zarr"))


def test_weights_that_would_run_code_are_refused(tmp_path: Path, picture_folder: Path, featurize: Callable) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pth")
    outcome = featurize("extract", f"folder:{picture_folder}", "--encoder", f"timm:{MODEL}", "--weights", tmp_path / "trap.pth",
                        "--out", tmp_path / "out", "--levels", "1x1x4")  # fmt: skip
    assert outcome.code == 1
    assert "refused" in outcome.err
    assert not (tmp_path / "sprung").exists()


def test_a_bigger_picture_changes_the_crop_only(tmp_path: Path, vit_weights: Path) -> None:
    """A wide picture is cropped to its centre, so its borders change nothing."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    square = random_picture(5, 32, 32)
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste(square, (16, 0))
    square.save(folder / "a.png")
    wide.save(folder / "b.png")
    extract(read_request(None, options(folder, vit_weights, tmp_path / "out"), "2x2x2"), workers=0, scheduler=None)
    base = np.asarray(zarr.open(str(tmp_path / "out" / ENCODER / "base.zarr"), mode="r")[:])
    np.testing.assert_array_equal(base[0], base[1])


@pytest.mark.parametrize("held_out", [{"source": "scenes", "split": "val"}, {"source": "wds:/data/val-000000.tar"}])
def test_held_out_pictures_get_no_basis_of_their_own_silently(
    held_out: dict, tmp_path: Path, vit_weights: Path
) -> None:
    request = options(tmp_path, vit_weights, tmp_path / "out") | held_out
    with pytest.raises(UserError, match=r"give --basis STORE.*--basis own"):
        extract(read_request(None, request, "1x1x4"), workers=0, scheduler=None)
    wanted = read_request(None, request | {"basis": "own", "limit": 3, "source": "scenes:16"}, "1x1x4")
    extract(wanted, workers=0, scheduler=None)


def test_a_second_encoder_shares_the_rows_and_blocks_of_the_first(
    extraction: Path, picture_folder: Path, vit_weights: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(extraction, tmp_path / "root")
    request = options(picture_folder, vit_weights, root, z0="pixels:8") | {"encoder": "tiny", "weights": None}
    extract(read_request(None, request, "1x1x4"), workers=0, scheduler=None)
    first, second = (zarr.open(str(root / name / "base.zarr"), mode="r") for name in (ENCODER, "tiny"))
    assert first.chunks[0] == second.chunks[0]
    assert first.attrs["keys_sha256"] == second.attrs["keys_sha256"]
    assert chunks(root).items() >= chunks(extraction).items()


def test_moved_pictures_are_the_same_pictures(
    extraction: Path, picture_folder: Path, vit_weights: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(extraction, tmp_path / "root")
    moved = shutil.copytree(picture_folder, tmp_path / "moved")
    extract(read_request(None, options(moved, vit_weights, root), "2x2x8"), workers=0, scheduler=None)
    assert chunks(root) == chunks(extraction)
    sources = pq.read_table(root / "rows.parquet")["source"].to_pylist()
    assert all(source.startswith(str(moved)) for source in sources)


def test_relative_paths_are_those_of_the_folder_they_were_given_in(
    shard: Path, vit_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, featurize: Callable
) -> None:
    here, there, root = tmp_path / "test", tmp_path / "there", tmp_path / "root"
    for folder in (here, there):
        shutil.copytree(vit_weights.parent, folder)
        shutil.copy(shard, folder / "t.tar")
    with tarfile.open(shard) as tar, tarfile.open(there / "t.tar", "w") as other:
        for member in tar.getmembers()[3:]:
            other.addfile(member, tar.extractfile(member))
    request = options(tmp_path, Path("vit.safetensors"), root) | {"source": "wds:t.tar"}
    words = ["extract", request["source"], *as_words(request)]
    monkeypatch.chdir(here)  # a folder named `test`, whose pictures are not held out for that
    with monkeypatch.context() as patch:  # as earlier versions stored them
        patch.setattr("featurize.extraction.extract.with_absolute_paths", lambda features: features)
        assert featurize(*words).code == 0
    before = chunks(root)
    assert featurize(*words).code == 0
    assert chunks(root) == before
    shutil.rmtree(root)
    assert featurize(*words).code == 0
    before = chunks(root)

    monkeypatch.chdir(there)
    assert "is whole" in featurize("verify", root, "--re-encode", 3).out
    (root / "rows.parquet").write_bytes(b"PAR1")
    assert featurize("repair", root).code == 0
    next((root / ENCODER / "base.zarr" / "c").rglob("0/0/0/0/0")).unlink()
    assert featurize("repair", root).code == 0
    assert chunks(root) == before
    assert "already holds other pictures" in featurize(*words).err


def test_a_picture_changed_after_the_ledger_is_noticed(picture_folder: Path, vit_weights: Path, tmp_path: Path) -> None:
    from featurize.extraction.block import BlockTask, encode_batch
    from featurize.extraction.loader import Clock, batch_of
    from featurize.store.ledger import read_ledger
    from featurize.store.metadata import spec_of

    folder, root = shutil.copytree(picture_folder, tmp_path / "pictures"), tmp_path / "out"
    request = read_request(None, options(folder, vit_weights, root), "1x1x4")
    extract(request, workers=0, scheduler=None)
    ledger = read_ledger(root)
    random_picture(99).save(ledger.images[3].source)
    task = BlockTask(0, batch_of(ledger, range(8), request.features), None, spec_of(root / "pixels" / "16x16x3.zarr"))
    with pytest.raises(UserError, match="has changed since the ledger was made"):
        encode_batch(task, Clock())


def test_asked_again_nothing_heavy_is_imported(
    extraction: Path, picture_folder: Path, vit_weights: Path, shard: Path
) -> None:
    """In a process of its own, because these take longer to import than all else that the answers need."""
    script = """
import json, sys
from featurize.cli.main import main
from featurize.sources import list_images
for command in json.loads(sys.argv[1]):
    sys.argv = ["featurize", *command]
    try:
        main()
    except SystemExit as end:
        assert not end.code, command
list_images(sys.argv[-1], "train", None)
print([name for name in ("torch", "scipy", "zarr", "dask", "distributed", "webdataset", "timm") if name in sys.modules])
"""
    again = ["extract", f"folder:{picture_folder}", "--encoder", f"timm:{MODEL}", "--weights", str(vit_weights)]
    again += ["--out", str(extraction), "--views", "2", "--z0", "pixels:16", "--levels", "2x2x8,1x1x16"]
    commands = [again, ["info", str(extraction)], ["ls", str(extraction)], ["extract", "--help", f"wds:{shard}"]]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
