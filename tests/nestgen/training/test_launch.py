"""Several processes train as one: they agree with one process, end together and leave nothing behind."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed import DistBackendError, DistNetworkError

from nestgen.errors import LostProcess, UserError
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.runs.checkpoint import newest
from nestgen.training.accelerator import lost_processes
from nestgen.training.launch import LOST, PARENT_PIPE, _exit_code, launch, process_environment
from nestgen.training.train import train
from tests.conftest import Begin, Begun
from tests.nestgen.training_runs import TRAIN, apart, log, parts, wait_for_checkpoint

Fork = Callable[..., BaseProcess]
pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def together(fork: Fork, tmp_path: Path) -> Callable[..., list[BaseProcess]]:
    """Starts the processes of a training as `launch` does, but from imported ones, which costs no seconds."""
    numbers = count()

    def run(recipe: Recipe, processes: int = 2) -> list[BaseProcess]:
        store = tmp_path / f"store-{next(numbers)}"
        return [fork(TRAIN, process_environment(rank, processes, store), recipe=recipe) for rank in range(processes)]

    return run


def wait(started: list[BaseProcess]) -> None:
    """Until all have ended well."""
    for process in started:
        process.join(200)
        assert process.exitcode == 0


def test_two_processes_agree_with_one_and_with_themselves(
    toy: Callable[..., Recipe], together: Callable[..., list[BaseProcess]]
) -> None:
    """The gradient of the global batch is a mean over halves: equal but for float32 rounding, here 1e-3.

    Adam divides by the gradient's size, so where that is all rounding, so is the step.
    """
    one, two, killed, mixed = (toy(name, steps=20, checkpoint_every=5) for name in ("one", "two", "killed", "mixed"))
    train(one, 0)
    wait(together(two))
    assert 0 < apart(one, two) < 1e-3  # not nothing: they did share the work
    for x, y in zip(log(one), log(two), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)

    # One of them is killed: the other ends by itself, and both go on to the same bytes.
    victim, partner = together(killed)
    wait_for_checkpoint(killed, 5, lambda: victim.exitcode)
    victim.kill()
    partner.join(60)
    assert partner.exitcode not in (None, 0)
    wait(together(killed))
    assert parts(killed) == parts(two)

    # From one process to two and back.
    train(toy("mixed", steps=6), 0)
    wait(together(toy("mixed", steps=13)))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(mixed, 0)
    assert 0 < apart(one, mixed) < 1e-3


def test_processes_that_see_other_folders_are_refused(toy: Callable[..., Recipe], fork: Fork, tmp_path: Path) -> None:
    """As where runs/ is on the disk of each machine: from another checkpoint each would train weights of its own."""
    recipe = toy("apart", steps=20)
    train(toy("apart", steps=10), 0)
    other = shutil.copytree(recipe.root, tmp_path / "other")
    shutil.rmtree(other / "runs")
    roots = (recipe, load_recipe(other / recipe.file.name))
    store = tmp_path / "store"
    started = [fork(TRAIN, process_environment(rank, 2, store), recipe=one) for rank, one in enumerate(roots)]
    for process in started:
        process.join(200)
    assert [process.exitcode for process in started] == [1, 1]
    assert [checkpoint and checkpoint.step for checkpoint in (newest(run_dir(one, 0)) for one in roots)] == [10, None]


def test_shards_agree_with_the_whole(toy: Callable[..., Recipe], together: Callable[..., list[BaseProcess]]) -> None:
    """FSDP: the same training, from shards of the weights; whole checkpoints, which anything goes on with."""
    whole, sharded = toy("whole", steps=14), toy("sharded", steps=8, shard=True, micro_batch=2)
    train(whole, 0)
    wait(together(sharded))
    wait(together(toy("sharded", steps=11, shard=True)))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(toy("sharded", steps=14), 0)
    assert 0 < apart(whole, sharded) < 1e-3


def test_one_command_starts_and_ends_them(toy: Callable[..., Recipe], begin: Begin) -> None:
    """`nestgen train --processes 2`, stopped by Ctrl-C; then begun again, with the first process killed.

    All the while no other machine reaches it.
    """
    listening: set[str] = set()

    def watch(parent: Begun) -> int | None:
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(parent.process.pid)
            for process in (main, *main.children(recursive=True)):
                listening.update(one.laddr.ip for one in process.net_connections("inet") if one.status == "LISTEN")
        return parent.process.exitcode

    recipe = toy("launched", steps=10_000, batch=4, checkpoint_every=5)
    for number in (signal.SIGINT, signal.SIGKILL):
        before = newest(run_dir(recipe, 0))
        parent = begin(recipe.root, "nestgen", "train", "--level=0", "--processes=2", f"--recipe={recipe.file}")
        try:
            wait_for_checkpoint(recipe, before.step + 1 if before else 1, lambda parent=parent: watch(parent))
            children = psutil.Process(parent.process.pid).children(recursive=True)
            assert len(children) == 2
            os.kill(parent.process.pid, number)
            code, out, errors = parent.ended()
            _, alive = psutil.wait_procs(children, timeout=100)
            assert not alive
        finally:
            parent.process.kill()
        assert "2 process(es) on cpu, batch 4 (2 each)" in out
        if number == signal.SIGINT:
            assert code == 130, errors
            assert errors.count("stopped after step") == 1
            assert "Traceback" not in errors
    assert listening == {"127.0.0.1"}  # gloo's


def test_the_fault_of_one_process_is_told_once(toy: Callable[..., Recipe], capfd: pytest.CaptureFixture[str]) -> None:
    recipe = toy("bad", steps=5, batch=9)
    assert launch(2, ["train", "--level=0", f"--recipe={recipe.file}"]) == 1
    errors = capfd.readouterr().err
    assert errors.count("error: training.batch 9 does not divide among 2 processes") == 1
    assert "Traceback" not in errors


def test_a_killed_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `python -m nestgen` does: here the second process kills itself, and the first waits for ever."""
    program = "import os, signal, time; os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else time.sleep(10**6)"
    real = subprocess.Popen

    def start(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        assert command[:3] == [sys.executable, "-m", "nestgen"]
        return real([sys.executable, "-c", program], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr("nestgen.training.launch.GRACE", 0.5)
    with pytest.raises(UserError, match="process 1 of the training was ended by SIGKILL"):
        launch(2, ["train"])
    assert not [child for child in psutil.Process().children() if program in child.cmdline()]


def test_a_signal_before_the_first_step_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preemption while the processes still import: no word of memory."""
    program = (
        f"import os, time; os.environ['RANK'] == '0' and os.kill({os.getpid()}, {signal.SIGTERM:d}); time.sleep(10**6)"
    )
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: real([sys.executable, "-c", program], **options))
    with pytest.raises(KeyboardInterrupt):
        launch(2, ["train"])


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_processes_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, signals: int) -> None:
    """They hear no signal, as where a GPU waits for another. Two signals end them, or one and the time to stop."""
    program = (
        "import os, signal, sys, time; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM]); "
        "open(os.environ['HUNG'] + os.environ['RANK'], 'w'); time.sleep(10**6)"
    )
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: real([sys.executable, "-c", program], **options))
    monkeypatch.setattr("nestgen.training.launch.STOP", 0.5 if signals == 1 else 100.0)
    monkeypatch.setattr("nestgen.training.launch.SAME", 0.1)

    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("HUNG", f"{folder}/rank-")

        def send() -> None:
            while len(os.listdir(folder)) < 2:
                time.sleep(0.01)
            for _ in range(signals):
                os.kill(os.getpid(), number)
                time.sleep(0.3)

        sender = threading.Thread(target=send)
        sender.start()
        with pytest.raises(
            KeyboardInterrupt, match=r"stopped at once, without a checkpoint .* goes on from the last one"
        ):
            launch(2, ["train"])
        sender.join()
    assert not [child for child in psutil.Process().children() if program in child.cmdline()]


def test_a_process_that_hangs_does_not_outlive_its_parent() -> None:
    program = (
        "import os, signal, sys, time; from nestgen.training import launch; launch.STOP = 0.3; "
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM]); "
        "launch.stop_with_the_parent(); time.sleep(10**6)"
    )
    read_end, write_end = os.pipe()
    environment = os.environ | {PARENT_PIPE: str(read_end)}
    hung = subprocess.Popen([sys.executable, "-c", program], env=environment, pass_fds=[read_end])
    os.close(read_end)
    try:
        time.sleep(0.5)
        assert hung.poll() is None
        os.close(write_end)  # as when the parent is killed
        assert hung.wait(100) == -signal.SIGKILL
    finally:
        hung.kill()


@pytest.mark.parametrize(
    ("codes", "code", "printed"),
    [
        ((0, 0), 0, ""),
        ((LOST, LOST), LOST, ""),  # both lost a third, on another machine
        ((LOST, 1), 1, "second"),
        ((130, 130), 130, ""),  # the first one's words are printed already
    ],
)
def test_the_exit_code_is_that_of_the_cause(
    codes: tuple[int, ...], code: int, printed: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(codes, [io.StringIO("second")]) == code
    assert capfd.readouterr().err == printed


def test_a_kill_is_the_cause_of_what_others_end_with() -> None:
    """NCCL ends the first process with a traceback of its own and exit code 1."""
    with pytest.raises(UserError, match="process 1 of the training was ended by SIGKILL"):
        _exit_code((1, -signal.SIGKILL), [io.StringIO()])


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (DistNetworkError("Connection was likely closed."), True),
        (
            DistBackendError("NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error"),
            False,
        ),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_only_what_gloo_and_the_store_raise_means_a_lost_process(
    error: RuntimeError, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(LostProcess if lost else type(error)), lost_processes(Accelerator(cpu=True)):
        raise error


def test_threads_are_shared(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    real = subprocess.Popen
    program = "import os, sys; print(os.environ['OMP_NUM_THREADS'], os.environ['WORLD_SIZE'])"
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", program], **options)
    )
    assert launch(3, []) == 0
    assert capfd.readouterr().out == f"{max(1, (os.cpu_count() or 1) // 3)} 3\n"  # only the first one's is heard
