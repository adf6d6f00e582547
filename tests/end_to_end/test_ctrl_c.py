"""Ctrl-C at any moment of any command: exit code 130, one sentence, and the same command then does its work.

`NESTED_TEST_INTERRUPTS=40 pytest tests/end_to_end/test_ctrl_c.py` interrupts 40 times.
"""

from __future__ import annotations

import os
import random
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Begin
from tests.end_to_end.test_previous_version import ARCHIVE, NARROW, VAE

INTERRUPTS = int(os.environ.get("NESTED_TEST_INTERRUPTS", "3"))
LATEST = 1.5  # seconds after the start: on an idle machine most commands end soon after
COMMANDS = [
    [str(VAE) if word == "VAE" else word for word in command.split()]
    for command in (
        "featurize extract --out stores/new --workers 2",
        "nestgen train --level 0 --steps 60",
        "nestgen sample --count 64 --out new --vae VAE",
        "featurize levels 1x1x8 --workers 0",
        "featurize repair stores/train",
        "featurize verify stores/train",
        "featurize scenes --count 200 --size 32 --out shards",
        "featurize knn-viz --stores stores/train --encoder tiny --out knn.png",
        "featurize images stores/train --count 8 --out real",
        "featurize check-encoder tiny",
        "featurize plan",
        "featurize info stores/train",
        "featurize ls stores",
        "nestgen sample --count 32 --out new --processes 2 --vae VAE",
        "nestgen evaluate --samples samples --reference stores/train",
        "nestgen diagnose --samples samples",
        "nestgen nearest --samples samples --vae VAE",
        "nestgen hierarchy --vae VAE",
        "nestgen sheet samples --titles before --count 2 --out sheet.png",
        "nestgen export runs/previous --out model --vae VAE",
        "nestgen decode --store stores/train --count 8 --out decoded --vae VAE",
        "nestgen info",
    )
]
# A group of processes of its own, as a terminal gives a command: Ctrl-C reaches all of them.
BEFORE = f"{NARROW}; os.setsid(); open('begun', 'w').close()"


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[[], Path]:
    """Makes another copy of an experiment: nested.yaml, stores, runs, samples."""

    def make() -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(folder, filter="data")
        return folder

    return make


def test_an_interrupted_command_ends_in_a_sentence_and_can_be_given_again(
    experiment: Callable[[], Path], begin: Begin
) -> None:
    chance, codes = random.Random(19), Counter[int]()
    for number in range(INTERRUPTS):
        command = COMMANDS[number % len(COMMANDS)]
        folder, delay = experiment(), chance.uniform(0, LATEST)
        begun = begin(folder, *command, before=BEFORE)
        while not (folder / "begun").exists() and begun.process.is_alive():
            time.sleep(0.005)
        begun.process.join(delay)
        if begun.process.is_alive() and begun.process.pid:
            os.killpg(begun.process.pid, signal.SIGINT)
        code, _, errors = begun.ended()
        said = f"{' '.join(command)} after {delay:.2f} s: {code}, {errors[-1500:]}"
        codes[code] += 1
        assert code in (0, 130), said  # 0: it was done before
        assert "Traceback" not in errors and "Error:" not in errors, said
        if code == 130:
            assert errors.strip().splitlines()[-1].strip(), said
        _, _, errors = (again := begin(folder, *command, before=BEFORE)).ended()
        assert again.process.exitcode == 0, f"again, {said}\n{errors[-1500:]}"
        assert "Traceback" not in errors, f"again, {said}\n{errors[-1500:]}"
        left = [path for path in folder.rglob("*") if path.suffix in (".part", ".tmp") or path.name.startswith(".tmp")]
        assert not left, f"{said}, and it left {left}"
        print(said.split(":")[0], code, flush=True)
    assert codes[130] >= INTERRUPTS // 3, codes
