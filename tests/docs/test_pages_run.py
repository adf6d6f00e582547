"""The READMEs' and some pages' commands and Python, run as they stand there on small inputs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from nestgen import NestedPipeline
from nestgen.cli.main import main
from tests.featurize.conftest import Outcome, random_picture
from tests.featurize.conftest import featurize as featurize
from tests.featurize.conftest import no_network as no_network
from tests.nestgen.conftest import experiment as experiment
from tests.nestgen.conftest import little as little
from tests.nestgen.conftest import one_thread as one_thread
from tests.nestgen.conftest import trained as trained

ROOT = Path(__file__).parents[2]
# Need weights that are not here: that they say so is what is tested.
WITHOUT_WEIGHTS = ("check-encoder clip", "embed-text")


def blocks(page: str, kind: str, section: str | None = None) -> list[str]:
    """The fenced blocks of a kind in a page, or in one section of it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if section is not None:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```(?:{kind})\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def calls(block: str) -> Iterator[list[str]]:
    """The words of each command of a block."""
    yield from (shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines() if line.strip())


def make_run(trained: Callable[..., Path], tmp_path: Path) -> Path:
    """A trained run `demo` with its recipe nested.yaml; returns its folder."""
    recipe = trained(name="demo", sampling={"steps": 1}, training={"steps": 7, "batch": 4, "preview": 0})
    run = tmp_path / "runs" / "demo"
    for folder in run.iterdir():
        shutil.copy(recipe, folder / "recipe.yaml")
    return run


def test_featurize_s_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, featurize: Callable[..., Outcome]) -> None:
    monkeypatch.chdir(tmp_path)
    for index in range(12):
        folder = tmp_path / "pictures" / ("cat" if index % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        random_picture(index).save(folder / f"{index}.jpg")
    (tmp_path / "prompts.txt").write_text("a dog\n")
    for program, *words in calls(blocks("packages/featurize/README.md", "bash")[0]):
        assert program == "featurize"
        if words[0] == "scenes":  # as many as there stand would take half a minute
            words[words.index("--count") + 1] = "10"
        outcome = featurize(*words)
        if " ".join(words).startswith(WITHOUT_WEIGHTS):
            assert "can't be fetched" in outcome.err
        else:
            assert outcome.code == 0, f"{words}: {outcome.err}"
    assert (tmp_path / "knn.png").is_file() and list((tmp_path / "shards").glob("*.tar"))
    (code,) = blocks("packages/featurize/README.md", "python")
    space: dict[str, Any] = {}
    exec(code, space)
    assert space["root"].levels == ["tiny/4x4x16", "tiny/3x3x20", "tiny/2x2x8"]
    assert space["batch"]["4x4x16"].shape == (12, 16, 4, 4)
    assert space["z_BHWC"].shape == (1, 4, 4, 16)


def test_nestgen_s_readme_and_sharing(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On trained denoisers; `train` finds them complete, and explore is a server that waits for a browser."""
    make_run(trained, tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = [*calls(blocks("packages/nestgen/README.md", "bash")[0]), *calls(blocks("docs/sharing.md", "sh")[0])]
    for program, *words in lines:
        assert program == "nestgen"
        if words[:1] in (["explore"], ["compare"]) or "--processes" in words:
            continue
        if "--count" in words:
            words[words.index("--count") + 1] = "20"
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, f"{words}: {result.output[-500:]}"
    assert (tmp_path / "demo-model" / "scores" / "evaluation.json").is_file()


def test_the_packages_install_from_an_address_of_git(tmp_path: Path) -> None:
    """README's lines, by uv and without what the packages depend on, which is here; what is installed is whole."""
    repository, installed = tmp_path / "repository", tmp_path / "installed"
    shutil.copytree(ROOT / "packages", repository / "packages", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", repository, "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    lines = [words for block in blocks("README.md", "bash", "Install elsewhere") for words in calls(block)]
    assert [words[:2] for words in lines] == [["pip", "install"]] * 2
    wanted = [word.replace("$REPO", repository.as_uri()) for words in lines for word in words[2:]]
    uv = [
        Path(sys.executable).with_name("uv"),
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-config",
    ]
    where = ["--python", sys.executable, "--target", installed, "--cache-dir", tmp_path / "cache"]
    subprocess.run([*uv, *where, *wanted], check=True)
    for name in ("featurize", "nestgen"):
        source = ROOT / "packages" / name / "src"
        there = {path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        assert not [path for path in there if not (installed / path).is_file()]
        code = f"import {name}; from {name}.__main__ import main; print({name}.__file__); main()"
        result = subprocess.run(
            [sys.executable, "-c", code, "--version"],
            env=os.environ | {"PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.splitlines()[0] == str(installed / name / "__init__.py")
        assert "version 0" in result.stdout


@pytest.mark.parametrize(("program", "word"), [("featurize", "extract"), ("nestgen", "sample")])
def test_the_shell_completes_commands(program: str, word: str) -> None:
    """As README's line sets it up: the script for bash, and what it calls for a Tab."""
    (line,) = re.findall(r"`(eval [^`]*)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    (variable,) = re.findall(rf"\$\((\w+)=bash_source {program}\)", line)
    script = Path(sys.executable).with_name(program)

    def answer(kind: str, **typed: str) -> str:
        environment = os.environ | {variable: kind} | typed
        return subprocess.run([script], env=environment, capture_output=True, text=True, check=True).stdout

    assert f"complete -o nosort -F _{program}_completion {program}" in answer("bash_source")
    assert answer("bash_complete", COMP_WORDS=f"{program} {word[:3]}", COMP_CWORD="1") == f"plain,{word}\n"


@pytest.mark.parametrize(("page", "section"), [("README.md", "Two commands"), ("docs/sharing.md", None)])
def test_python_to_sample_and_share(
    page: str, section: str | None, trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(trained, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "runs").symlink_to(run.parent)
    pushed: list[str] = []
    monkeypatch.setattr(NestedPipeline, "push_to_hub", lambda self, name, **options: pushed.append(name))
    from_pretrained = NestedPipeline.from_pretrained
    monkeypatch.setattr(NestedPipeline, "from_pretrained", lambda name: from_pretrained(name.rpartition("/")[2]))
    (code,) = blocks(page, "python", section)
    space: dict[str, Any] = {}
    exec(code, space)
    assert len(space["images"]) == 16 and isinstance(space["images"][0], Image.Image)
    assert pushed == (["someone/demo-model"] if "push_to_hub" in code else [])
