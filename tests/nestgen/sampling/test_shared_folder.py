"""Several commands that sample into one folder: each block once, a killed one's by another, and only of the same samples."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import pytest

from nestgen.errors import UserError
from nestgen.files import read_json
from nestgen.images import read_images
from nestgen.locks import open_locks
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.sampling.blocks import USERS
from tests.conftest import Begin, Begun
from tests.nestgen.samples import files, levels, sample_folder
from tests.nestgen.training_runs import SHRINK

pytestmark = pytest.mark.filterwarnings("error::tqdm.TqdmWarning")  # of a bar beyond its end


@pytest.fixture
def recipe(trained: Callable[..., Path]) -> Recipe:
    return load_recipe(trained())


# Notes every block that this process writes, and stops before it writes its block number `stop`.
NOTED = """
import signal
from nestgen.sampling.latents import Latents
write, number = Latents.write, 0
def noted(self, rows, z_BCHW):
    global number
    number += 1
    if number == {stop}:
        open({log!r}, "a").write("stopped\\n")
        os.kill(os.getpid(), signal.SIGSTOP)
    write(self, rows, z_BCHW)
    open({log!r}, "a").write(f"{{os.getpid()}} {{self.path.stem}} {{rows.start}}\\n")
Latents.write = noted
"""


@pytest.mark.parametrize("killed", [True, False])
def test_two_commands_share_a_folder_and_one_ends_what_a_killed_one_left(
    recipe: Recipe, tmp_path: Path, begin: Begin, killed: bool
) -> None:
    whole, out, log = sample_folder(recipe, tmp_path / "whole", count=8, batch=2), tmp_path / "s", tmp_path / "log"
    log.touch()

    def started(stop: int) -> Begun:
        command = ("nestgen", "sample", "--count", 8, "--batch-size", 2, "--out", out)
        return begin(recipe.root, *command, before=SHRINK + NOTED.format(log=str(log), stop=stop))

    def until(lines: int) -> list[str]:
        while len(noted := log.read_text().splitlines()) < lines and first.process.is_alive():
            time.sleep(0.01)
        return noted

    first = started(stop=2)
    until(2)  # it has written one block of z_2 and stops in the second
    second = started(stop=0)
    until(4)  # which the other one leaves out
    assert not list(out.glob("latents/z1.blocks/*.json"))
    assert sorted(path.stem for path in out.glob("latents/z2.blocks/*.json")) == ["000000", "000004", "000006"]
    assert first.process.pid is not None
    os.kill(first.process.pid, signal.SIGKILL if killed else signal.SIGCONT)
    assert second.ended()[0] == 0, second.ended()
    assert first.ended()[0] == (-signal.SIGKILL if killed else 0)
    written = [line.split() for line in log.read_text().splitlines() if line != "stopped"]
    assert sorted(block for _, *block in written) == [[f"z{k}", str(row)] for k in range(3) for row in (0, 2, 4, 6)]
    assert len({process for process, *_ in written}) == 2
    for one, other in zip(levels(whole), levels(out)):
        assert np.abs(one - other).max() < 1e-4 * one.std()  # another process may round otherwise
    assert np.abs(read_images(whole, 8).astype(int) - read_images(out, 8)).max() <= 1
    assert read_json(out / "sample.json") == read_json(whole / "sample.json")


def test_a_folder_in_use_is_joined_by_the_same_samples_only(
    recipe: Recipe, tmp_path: Path, fork: Callable[..., BaseProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ready = sample_folder(recipe, tmp_path / "s"), tmp_path / "ready"
    whole = files(out)
    code = """
import pathlib, time
from nestgen.locks import open_locks
from nestgen.sampling.blocks import USERS
locks = open_locks(pathlib.Path(out))
locks.lock(USERS, shared=True)
locks.sign()
pathlib.Path(ready).touch()
time.sleep(600)
"""
    holder = fork(code, out=str(out), ready=str(ready))
    while not ready.exists() and holder.is_alive():
        time.sleep(0.01)
    sample_folder(recipe, out)
    in_use = rf"s is being sampled into by another process \(process {os.getpid()} on .*\)"  # which signed last
    with pytest.raises(UserError, match=f"{in_use}, with other settings: z_2.steps was 5 and is 4; wait for it"):
        sample_folder(recipe.with_sampling({"steps": 4}), out, overwrite=True)
    with pytest.raises(UserError, match=f"{in_use}, which makes 7 samples; ask for as many"):
        sample_folder(recipe, out, count=9)
    assert files(out) == whole
    holder.kill()
    holder.join()
    sample_folder(recipe, out, count=9)  # the lock is gone with its holder
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "lockf", no_locks)
        with pytest.raises(
            UserError, match=r"the file system of .*new has no locks \(No locks available\), which keep"
        ):
            sample_folder(recipe, tmp_path / "new")
    sample_folder(recipe, tmp_path / "new", count=1)  # an empty folder with a lock is no other folder


def test_processes_end_with_their_killed_parent_and_hold_the_folder_until_then(
    recipe: Recipe, tmp_path: Path, begin: Begin
) -> None:
    out = tmp_path / "s"
    command = ("nestgen", "sample", "--count", 12, "--batch-size", 2, "--out", out, "--processes", 2)
    parent = begin(recipe.root, *command, "--set", "steps=300", before=SHRINK).process
    while not list(out.glob("latents/z2.blocks/*.json")) and parent.is_alive():
        time.sleep(0.01)
    workers = [one for one in psutil.Process(parent.pid).children() if "spawn_main" in " ".join(one.cmdline())]
    assert len(workers) == 2
    for process in workers:
        process.suspend()  # in the middle of their blocks of z_1
    parent.kill()
    parent.join()
    locks = open_locks(out)
    with locks.file:
        free = locks.lock(USERS)  # then another run would clear the folder
    for process in workers:
        process.resume()
    assert not psutil.wait_procs(workers, 60)[1]
    assert not free
    sample_folder(recipe.with_sampling({"steps": 1}), out, count=12, overwrite=True)


def no_locks(*arguments: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
