"""Weights files, and the JSON beside them: what can't be is one sentence, whatever is wrong."""

from __future__ import annotations

import io
import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from featurize.checkpoints.files import read_checkpoint, sidecar
from featurize.errors import UserError, explain_memory_error

GOOD = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"depth": 2},
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 1, 0.5],
    "interpolation": "bicubic",
    "input_size": 64,
    "golden": [0.1, -2],
    "anything": ["else"],
}


def test_a_sound_description_is_read_as_it_is(tmp_path: Path) -> None:
    assert sidecar(tmp_path / "x.pth") == {}
    (tmp_path / "x.json").write_text(json.dumps(GOOD))
    assert sidecar(tmp_path / "x.pth") == GOOD


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("mean", [0.5, 0.5]),
        ("mean", 0.5),
        ("mean", ["0.5", "0.5", "0.5"]),
        ("mean", [0.5, float("nan"), 0.5]),
        ("std", [0.5, 0.5, 0.0]),
        ("std", None),
        ("std", [0.5, 0.5, True]),
        ("model", 7),
        ("model_args", [["depth", 2]]),
        ("interpolation", None),
        ("input_size", "64"),
        ("input_size", 0),
        ("input_size", True),
        ("golden", "0.1"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path: Path, key: str, bad: Any) -> None:
    (tmp_path / "x.json").write_text(json.dumps(GOOD | {key: bad}))
    with pytest.raises(
        UserError, match=rf"x\.json, which describes the weights .* says {key} .* must be .*; fix or remove"
    ):
        sidecar(tmp_path / "x.pth")


def saved(**options: Any) -> bytes:
    file = io.BytesIO()
    torch.save({f"w{number}": torch.ones(3, 4) for number in range(3)}, file, **options)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("name", "sound"),
    [
        ("new.pth", saved()),
        ("old.pth", saved(_use_new_zipfile_serialization=False)),
        ("x.safetensors", save({"w": torch.ones(3, 4)})),
    ],
)
def test_a_damaged_file_is_said_to_be_damaged_and_how_to_mend_it(tmp_path: Path, name: str, sound: bytes) -> None:
    """Cut anywhere, or with other bytes anywhere: a sentence of what the file is, or of a class that its name became."""
    path, chance, damaged = tmp_path / name, random.Random(0), 0
    for number in range(150):
        data = bytearray(sound)
        if number % 2:
            del data[chance.randrange(len(data)) :]
        else:
            data[chance.randrange(min(len(data), 900))] = chance.randrange(256)
        path.write_bytes(data)
        with suppress(UserError):
            read_checkpoint(path)  # the number of a version or a value may be another: nothing shows
            continue
        with pytest.raises(
            UserError, match=r"can't be read: it is damaged, .*; fetch or copy|are refused: it"
        ) as raised:
            read_checkpoint(path)
        assert "weights_only" not in str(raised.value)
        damaged += "can't be read: it is damaged, cut short, or no file of weights (" in str(raised.value)
    assert damaged >= 70


@pytest.mark.parametrize("data", [b"<html>not found", b"", b"version https://git-lfs.github.com/spec/v1\n", bytes(100)])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_file_that_holds_no_weights_is_said_to_be_none(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(
        UserError, match=r"can't be read: it is damaged, cut short, or no file of weights .*; fetch or copy"
    ):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. posix_memalign failed"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "x.pth").write_bytes(saved())
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(type(error)) as raised:
        read_checkpoint(tmp_path / "x.pth")
    assert "memory of the machine is full" in str(explain_memory_error(raised.value))
