"""The command line: exit codes, one sentence, and nothing of a traceback."""

from __future__ import annotations

import getpass
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from nestgen.cli.main import main
from nestgen.errors import UserError

Experiment = Callable[..., Path]
SHORT = {"steps": 4, "batch": 4, "checkpoint_every": 2, "warmup": 2}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Runs `nestgen ARGS` in tmp_path; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(main, list(args))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    return call


Run = Callable[..., tuple[int, str, str]]


def test_train_needs_no_more_than_a_level(run: Run, experiment: Experiment) -> None:
    experiment(training=SHORT)
    code, out, _ = run("info")
    assert code == 0
    assert "D_1  runs/toy/z1-given-z2-sigma0.5: not trained" in out
    assert run("train", "--level", "1")[0] == 0
    assert "D_1  runs/toy/z1-given-z2-sigma0.5: step 4 of 4" in run("info")[1]
    code, out, _ = run("train", "--level", "1")
    assert (code, out) == (0, "runs/toy/z1-given-z2-sigma0.5 is complete at step 4; nothing to do\n")


def test_sigma_stands_in_for_the_recipe_s(run: Run, experiment: Experiment) -> None:
    experiment(training=SHORT)
    assert run("train", "--level", "0", "--depth", "2", "--sigma", "1.5")[0] == 0
    assert "D_0  runs/toy/z0-given-z1-sigma1.5: step 4 of 4" in run("info", "--sigma", "1.5,0")[1]
    assert "z0-given-z1-sigma0.5: not trained" in run("info")[1]
    code, _, errors = run("sample", "--out", "s", "--sigma", "1.5")
    assert (code, errors.count("\n")) == (1, 1)
    assert "--sigma lists 1 values for the 2 levels above z_0" in errors
    assert "not a list of numbers" in run("train", "--level", "0", "--sigma", "much")[2]


def test_depth_steps_and_recipe(run: Run, experiment: Experiment) -> None:
    experiment(training=SHORT).rename("other.yaml")
    code, _, errors = run("train", "--level", "0", "--depth", "1", "--recipe", "other.yaml", "--steps", "3")
    assert code == 0, errors
    assert Path("runs/toy/z0-top/checkpoints/00000003").is_dir()
    out = run("info", "--depth", "1", "--recipe", "other.yaml")[1]
    assert "D_0  runs/toy/z0-top: step 3 of 4" in out
    assert "z_1" not in out


def test_training_options_are_set_and_stores_verified(run: Run, experiment: Experiment) -> None:
    experiment(training=SHORT)
    train = ("train", "--level", "0", "--depth", "1")
    assert run(*train, "--set", "steps=2")[0] == 0
    code, _, errors = run(*train, "--set", "lr=1e-3", "--set", "training.clip=1", "--set", "warmup=3", "--verify")
    assert code == 0, errors
    assert "verify 8x8x3.zarr: 100%" in errors
    assert "verify 4x4x6.zarr" not in errors
    meta = json.loads(Path("runs/toy/z0-top/checkpoints/00000004/meta.json").read_text())
    assert [meta["training"][key] for key in ("lr", "clip", "warmup")] == [1e-3, 1, 3]
    code, _, errors = run(*train)
    assert code == 1
    assert "training.lr was 0.001 and is 0.0002, training.warmup was 3 and is 2; " in errors
    assert "or go on with the new values by `--set clip=... --set lr=... --set warmup=...`" in errors
    code, _, errors = run(*train, "--set", "batch=8", "--set", "lr=1e-3", "--set", "clip=1", "--set", "warmup=3")
    assert (code, "training.batch was 4 and is 8" in errors, "--set" in errors) == (1, True, False)
    assert run(*train, "--set", "speed=1")[2].startswith("error: nested.yaml: training.speed is not a key")
    block = Path("stores/toy/pixels/8x8x3.zarr/c/2/0/0/0/0")
    content = block.read_bytes()
    block.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    code, _, errors = run(*train, "--set", "steps=9", "--verify")
    assert code == 1
    assert "8x8x3.zarr is damaged: block 2 is not what was written (its SHA-256 differs)" in errors


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("info",), "error: there is no recipe nested.yaml; name one with --recipe FILE"),
        (("train", "--level", "0"), "error: there is no recipe nested.yaml; name one with --recipe FILE"),
        (("info", "--recipe", "x.yaml"), "error: there is no recipe x.yaml; check the path"),
    ],
)
def test_missing_recipe(run: Run, args: tuple[str, ...], sentence: str) -> None:
    code, out, errors = run(*args)
    assert (code, out) == (1, "")
    assert errors.startswith(sentence)
    assert errors.count("\n") == 1


def test_bad_states(run: Run, experiment: Experiment) -> None:
    experiment(training=SHORT)
    for args, says in [
        (("train", "--level", "3"), "error: level 3 is not within 0..2"),
        (("train", "--level", "2", "--depth", "2"), "error: level 2 is not within 0..1"),
        (("train", "--level", "0", "--depth", "9"), "error: depth 9 is not within 1..3"),
        (("train", "--level", "7", "--verify"), "error: level 7 is not within 0..2"),
    ]:
        code, _, errors = run(*args)
        assert code == 1
        assert errors.startswith(says)
        assert errors.count("\n") == 1
    Path("stores/toy/tiny/2x2x4.zarr/c/0/0/0/0/0").unlink()
    code, _, errors = run("train", "--level", "2")
    assert code == 1
    assert "block 0 is missing" in errors
    assert not Path("runs").exists()


def test_without_a_command_it_says_where_the_experiment_stands(run: Run, trained: Experiment, tmp_path: Path) -> None:
    code, out, _ = run()
    assert (code, out.splitlines()[0]) == (0, "Usage: main [OPTIONS] COMMAND [ARGS]...")
    trained(training={"steps": 7, "preview": 0})
    other = tmp_path / "runs" / "toy" / "z1-given-z2-sigma0.5"
    kept = other.rename(tmp_path / "kept")
    log = tmp_path / "runs" / "toy" / "z2-top" / "log.jsonl"
    log.write_text('{"step": 7, "gflop_per_second": 0.0002}\n')
    code, out, _ = run()
    assert code == 0
    assert "z_0  40 rows in stores/toy/pixels/8x8x3.zarr" in out
    assert "D_0  step 7 of 7, in runs/toy/z0-given-z1-sigma0.5" in out
    assert "D_1  not trained" in out
    assert re.search(r"\nNext: nestgen train --level 1    \(about \d+ hours?\)\n", out), out
    kept.rename(other)
    assert "\nNext: nestgen sample --count 64 --out samples\n" in run()[1]
    assert run("sample", "--count", "2", "--out", "samples")[0] == 0
    out = run()[1]
    assert "2 samples in samples" in out
    assert "\nNext: nestgen evaluate --samples samples\n" in out
    Path("samples/evaluation.json").write_text('{"scores": []}')
    out = run()[1]
    assert "2 samples in samples, scored" in out
    assert "\nNext: nestgen explore runs/toy\n" in out
    metadata = Path("stores/toy/tiny/4x4x6.zarr/zarr.json")
    metadata.write_text(metadata.read_text().replace('"zarr_format"', '"changed"'))
    assert "\nNext: featurize repair\n" in run()[1]
    shutil.rmtree("stores/toy/tiny/4x4x6.zarr")
    out = run()[1]
    assert "z_1  there is no store stores/toy/tiny/4x4x6.zarr" in out
    assert "\nNext: featurize extract\n" in out


def test_first_sentences_fit_a_line() -> None:
    help_text = CliRunner().invoke(main, ["--help"], terminal_width=80).output
    assert "export" in help_text
    assert "..." not in help_text.split("Commands:")[1]


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_help_ends_with_an_example_that_can_be_called(name: str) -> None:
    command = main.commands[name]
    last = (command.help or "").strip().splitlines()[-1].strip()
    assert last.startswith(f"Example: nestgen {name}"), last
    with click.Context(command) as context:
        command.parse_args(context, shlex.split(last.removeprefix(f"Example: nestgen {name}")))


@pytest.mark.parametrize(
    "args",
    [
        ("sample", "--out", "s", "--store", "x"),
        ("hierarchy", "--store", "x"),
        ("hierarchy", "--over-depth", "--freeze-from", "1"),
        ("hierarchy", "--over-depth", "--kept", "card.json"),
        ("compare", "card.json", "--space", "z_0"),
        ("compare", "card.json", "--score", "kid"),
        ("evaluate", "--samples", "s", "--encoder", "tiny"),
        ("evaluate", "--samples", "s", "--level-shape", "1x1x64"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(run: Run, trained: Experiment, args: tuple[str, ...]) -> None:
    trained()
    code, _, errors = run(*args)
    assert code == 2
    assert args[-2] in errors.splitlines()[-1]
    assert not Path("s").exists()


@pytest.mark.parametrize("args", [("train",), ("train", "--level", "x"), ("nothing",), ("train", "--levle", "0")])
def test_usage_errors_exit_2(run: Run, args: tuple[str, ...]) -> None:
    code, _, errors = run(*args)
    assert code == 2
    assert "Usage:" in errors


@pytest.mark.parametrize(
    ("raised", "code", "sentence"),
    [
        (UserError("it is so"), 1, "error: it is so\n"),
        (OSError(28, "No space left on device", "/x/log.jsonl"), 1, "error: /x/log.jsonl: No space left on device\n"),
        (OSError("odd"), 1, "error: odd\n"),
        (MemoryError(), 1, "error: memory is full; give a smaller batch, or fewer images, or a smaller denoiser\n"),
        (
            RuntimeError("CUDA out of memory"),
            1,
            "error: memory is full; give a smaller batch, or fewer images, or a smaller denoiser\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("stopped after step 3"), 130, "stopped after step 3\n"),
    ],
)
def test_errors_become_sentences(run: Run, raised: BaseException, code: int, sentence: str) -> None:
    @click.command()
    def fails() -> None:
        raise raised

    main.add_command(fails, "fails")
    try:
        assert run("fails") == (code, "", sentence)
    finally:
        del main.commands["fails"]


def test_a_read_only_folder_is_one_sentence(run: Run, experiment: Experiment) -> None:
    experiment(training=SHORT)
    Path("runs").write_text("")  # a file where a folder should be: fails for root too
    code, _, errors = run("train", "--level", "2")
    assert code == 1
    assert errors.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in errors


def test_module_and_console_script_are_the_same(experiment: Experiment, tmp_path: Path) -> None:
    for command in ([sys.executable, "-m", "nestgen"], [str(Path(sys.executable).with_name("nestgen"))]):
        result = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path, check=True)
        assert result.stdout.startswith("Usage: nestgen [OPTIONS] COMMAND")
        result = subprocess.run([*command, "train"], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 2


def test_nestgen_imports_nothing_of_featurize() -> None:
    script = (
        "import sys; sys.modules['featurize'] = None\n"
        "import pkgutil, importlib, nestgen\n"
        "for module in pkgutil.walk_packages(nestgen.__path__, 'nestgen.'):\n"
        "    if module.name != 'nestgen.__main__': importlib.import_module(module.name)\n"
        "assert not any(name.startswith('featurize.') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_user_without_a_name_has_one_for_torch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container whose user has no passwd entry, importing torch's compiler would fail."""

    def no_entry(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    monkeypatch.setenv("LOGNAME", "")  # so that what is set is removed again
    assert run()[0] == 0
    assert getpass.getuser() == str(os.getuid())
