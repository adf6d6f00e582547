"""Checkpoints outlast power cuts, and damage to them is noticed."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nestgen.errors import UserError
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe
from nestgen.runs import loss_log, scores
from nestgen.runs.checkpoint import Checkpoint, newest, open_checkpoint, save_checkpoint
from nestgen.runs.folder import best_step, prepare_folder, read_recipe, write_status
from nestgen.tensors import load_tensors
from nestgen.training.train import train
from tests.nestgen.power_cut import Files, recorded

PARTS = ("denoiser", "ema", "optimizer")


def save(run: Path, step: int, keep: int = 1) -> None:
    parts = {part: {"weight": torch.full((5,), float(step))} for part in PARTS}
    save_checkpoint(run, parts, {"step": step, "seed": 0}, keep)


def values(checkpoint: Checkpoint) -> dict[str, list[float]]:
    """All weights of a checkpoint, each part checked against its digest."""
    return {part: checkpoint.load(part)["weight"].tolist() for part in PARTS}


def step_after_cut(files: Files, folder: Path) -> int:
    """The step of the newest checkpoint in what a cut left; 0 if there is none. Raises UserError where it is damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    checkpoint = newest(folder / "runs/x/z0-top")
    if checkpoint is None:
        return 0
    assert values(checkpoint) == {part: [float(checkpoint.step)] * 5 for part in PARTS}
    return checkpoint.step


def test_after_a_power_cut_a_whole_checkpoint_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "disk"
    run = root / "runs/x/z0-top"
    root.mkdir()
    with recorded(root, monkeypatch) as disk:
        save(run, 1)
    first = list(disk.states())
    assert len(first) > 20
    assert {step_after_cut(state, tmp_path / "cut") for state in first} == {0, 1}
    assert step_after_cut(first[-1], tmp_path / "cut") == 1  # the folders above it are on the disk as well
    (run / "checkpoints/00000009.tmp").mkdir()  # a killed process left it
    with recorded(root, monkeypatch) as disk:
        save(run, 2)
    second = list(disk.states())
    assert {step_after_cut(state, tmp_path / "cut") for state in second} == {1, 2}
    assert step_after_cut(second[-1], tmp_path / "cut") == 2


def test_without_fsync_the_same_cut_loses_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above could fail."""
    run = tmp_path / "disk/runs/x/z0-top"
    save(run, 1)
    with recorded(tmp_path / "disk", monkeypatch, fsync=False) as disk:
        save(run, 2)

    def survives(state: Files) -> bool:
        try:
            return step_after_cut(state, tmp_path / "cut") > 0
        except UserError:
            return False

    assert not all(map(survives, disk.states()))


def test_an_old_checkpoint_that_stays_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS while a process has one of its files open."""

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr("nestgen.runs.checkpoint.shutil.rmtree", rmtree)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {"weights": {"w": torch.ones(2)}}, {"step": step}, keep=1)
        checkpoint = newest(tmp_path)
        assert checkpoint is not None and checkpoint.step == step


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "meta.json is not what was written"),
        (lambda text: text[: len(text) // 2], r"meta.json cannot be read \(JSONDecodeError\)"),
        (lambda text: "", r"meta.json cannot be read \(JSONDecodeError\)"),
        (lambda text: "[]", r"meta.json cannot be read \(TypeError\)"),
    ],
)
def test_damaged_meta_is_named_and_no_older_checkpoint_taken(
    tmp_path: Path, damage: Callable[[str], str], says: str
) -> None:
    save(tmp_path, 1, keep=2)
    save(tmp_path, 2, keep=2)
    meta = tmp_path / "checkpoints/00000002/meta.json"
    meta.write_text(damage(meta.read_text()))
    with pytest.raises(UserError, match=f"00000002 is damaged: {says}.* or remove the folder to go on from step 1"):
        newest(tmp_path)
    shutil.rmtree(meta.parent)
    checkpoint = newest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1


def test_a_missing_file_or_a_foreign_format_is_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints/00000001"
    (folder / "ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"ema\.safetensors is missing; .* remove the folder to begin again"):
        newest(tmp_path)
    (folder / "meta.json").write_text(json.dumps({"format": "nestgen-checkpoint/3"}))
    with pytest.raises(UserError, match="has format nestgen-checkpoint/3, and this nestgen reads nestgen-checkpoint/2"):
        newest(tmp_path)


def test_checkpoints_without_digests_are_read(tmp_path: Path) -> None:
    save(tmp_path, 1)
    file = tmp_path / "checkpoints/00000001/meta.json"
    meta = json.loads(file.read_text())
    del meta["sha256"], meta["meta_sha256"]
    file.write_text(json.dumps(meta))
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    assert values(checkpoint)["ema"] == [1.0] * 5
    assert checkpoint.sha256("ema") == open_checkpoint(file.parent).sha256("ema")


@pytest.mark.usefixtures("fresh_accelerator")
def test_flips_in_a_runs_folder_are_noticed_or_harmless(toy: Callable[..., Recipe]) -> None:
    """Whatever bit is flipped: a sentence, or everything that is read for training and sampling as it was."""
    recipe = toy(steps=4, ema_snapshots=2, checkpoint_every=2, preview=4)
    train(recipe, 0)
    folder = run_dir(recipe, 0)

    def read() -> dict[str, Any]:
        checkpoint = newest(folder)
        assert checkpoint is not None
        parts: dict[str, dict[str, Any]] = {part: checkpoint.load(part) for part in (*PARTS, "power-0.05", "power-0.1")}
        parts |= {path.name: load_tensors(path) for path in (folder / "snapshots").iterdir()}
        loss_log.read(folder / "log.jsonl", "loss")
        parts["recipe"] = read_recipe(folder).model_dump()
        parts["scores"] = {"best": best_step(folder), "all": scores.read(folder)}
        write_status(folder.parent, checkpoint.meta, "")
        # a flip in the name of a digest makes it an unknown key
        known = {key: value for key, value in checkpoint.meta.items() if key in whole_meta and "sha256" not in key}
        return {
            "meta": known,
            **{
                name: {
                    key: one.numpy().tobytes() if isinstance(one, torch.Tensor) else one for key, one in part.items()
                }
                for name, part in parts.items()
            },
        }

    checkpoint = newest(folder)
    assert checkpoint is not None
    whole_meta = checkpoint.meta
    whole = read()
    rng = np.random.default_rng(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    read_for_it = [path for path in files if path.suffix in (".safetensors", ".json", ".jsonl", ".yaml")]
    sentences = []
    for _ in range(100):
        file = read_for_it[rng.integers(len(read_for_it))]
        content = file.read_bytes()
        bit = int(rng.integers(8 * len(content)))
        file.write_bytes(flipped(content, bit))
        try:
            assert read() == whole, (file, bit)
        except UserError as error:
            sentences.append(str(error))
        file.write_bytes(content)
    assert not [one for one in sentences if "\n" in one or ("damaged" not in one and "cannot be read" not in one)]
    assert 20 < len(sentences) < 100  # files of the older checkpoint, the log and config.json are not among them
    assert read() == whole


def test_any_flip_in_scores_or_recipe_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Every bit of scores.jsonl in turn; then bits of recipe.yaml. What a power cut tore is no damage."""
    for step, distance in ((100, 2.0), (200, 1.5), (300, 1.75)):
        scores.append(tmp_path, step, distance)
    file, found = tmp_path / "scores.jsonl", scores.read(tmp_path)
    content, sentences = file.read_bytes(), []
    for bit in range(8 * len(content)):
        file.write_bytes(flipped(content, bit))
        try:
            assert scores.read(tmp_path) == found, bit
        except UserError as error:
            sentences.append(str(error))
    assert len(sentences) > 0.7 * 8 * len(content)  # all but those in the digest's own name
    assert all(one.startswith(f"{file} is damaged in line ") for one in sentences)
    for cut in range(content.rindex(b"{"), len(content) - 2):
        file.write_bytes(content[:cut])
        assert scores.read(tmp_path) == found[:2]
    file.write_bytes(content)
    scores.truncate(tmp_path, 200)
    assert (scores.read(tmp_path), best_step(tmp_path)) == (found[:2], 200)
    file.write_text('{"step": 7, "frechet_distance": 1.0}\n')  # an earlier version's
    assert best_step(tmp_path) == 7

    trained = tmp_path / "trained.yaml"
    trained.write_text(
        "name: x\nfeatures: {out: s, z0: pixels:8}\nlevels:\n- {shape: 8x8x3, patch: 4}\nsampling: {steps: 5}\n"
    )
    prepare_folder(tmp_path, trained, {"level": 0, "training": {"keep": 1}}, 0, 300)
    assert read_recipe(tmp_path).sampling.steps == (5,)
    content = (tmp_path / "recipe.yaml").read_bytes()
    for bit in range(0, 8 * len(content), 7):
        (tmp_path / "recipe.yaml").write_bytes(flipped(content, bit))
        with pytest.raises(UserError, match=r"recipe\.yaml is damaged .* copy the recipe that was trained to it again"):
            read_recipe(tmp_path)


def flipped(content: bytes, bit: int) -> bytes:
    place = bit // 8
    return content[:place] + bytes([content[place] ^ 1 << bit % 8]) + content[place + 1 :]
