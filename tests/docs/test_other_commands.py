"""What the documents call besides featurize and nestgen: make, scripts, installations. No line is of an unknown kind."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.docs.test_commands import PAGES, ROOT

sys.path.insert(0, str(ROOT / "pipelines"))
from workflow.rehearsal import CONFIG_KEYS

IDS = [str(page.relative_to(ROOT)) for page in PAGES]
# Of other people, and of the shell: what a page says of a cluster can't be run here.
OTHERS = {"mkdir", "cat", "openssl", "dask", "helm", "kubectl", "kill", "for", "done", "cd"}
# Distributions that a page may name besides those that our packages declare: each is on PyPI under this name.
INSTALLED = {"dask-jobqueue", "dask-kubernetes", "jupyterlab", "snakemake-executor-plugin-slurm"}
PROJECTS = {file.parent.name: tomllib.loads(file.read_text()) for file in ROOT.glob("packages/*/pyproject.toml")}
ELLIPSIS = re.compile(r"\.\.\.|\bNAME\b|\bmine\b")  # in a span of text something may be left to the reader


def lines_of(page: Path) -> Iterator[str]:
    """The lines of a page's shell blocks, without here-documents, and the spans that call make, pip or Python."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        block = re.sub(r"<<(\w+)\n.*?\n\1\n", "\n", block, flags=re.DOTALL)
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines())
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    called = (re.sub(r"^RECIPE=", "make run RECIPE=", span) for span in spans if not ELLIPSIS.search(span))
    yield from (span for span in called if re.match(r"(?:make|pip|python) \S", span))


def check(line: str) -> str | None:
    """What of a line is wrong, None where it can be called."""
    words = shlex.split(line.rstrip("&"), comments=True)
    while words and words[0] in ("&&", "do"):
        words = words[1:]
    if not words:
        return None
    program = Path(words[0]).name
    if program in ("featurize", "nestgen"):
        return None  # tests/docs/test_commands.py
    checks = {
        "make": check_make,
        "pip": check_pip,
        "uv": check_uv,
        "python": check_python,
        "pytest": check_pytest,
        "pre-commit": check_hook,
    }
    if program in checks:
        return checks[program](words[1:])
    return None if program in OTHERS else f"no test knows {program}"


def check_make(words: list[str]) -> str | None:
    """A dry run of make, and whether the recipe and the CONFIG keys are known."""
    if outcome := subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True).returncode:
        return f"make -n ends with {outcome}"
    variables = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("-"))
    if unknown := variables.keys() - {"RECIPE", "CONFIG", "ARGS"}:
        return f"make takes no {min(unknown)}"
    recipe = variables.get("RECIPE")
    if recipe is not None and not (ROOT / "pipelines" / "recipes" / f"{recipe}.yaml").is_file():
        return f"no recipe {recipe}"
    keys = {part.split("=")[0] for part in shlex.split(variables.get("CONFIG", ""))}
    return f"no CONFIG key {min(keys - set(CONFIG_KEYS))}" if keys - set(CONFIG_KEYS) else None


def check_pip(words: list[str]) -> str | None:
    """Whether what is installed is ours, with an extra that there is, or a known distribution."""
    if words[:1] != ["install"]:
        return f"pip {words[:1]}"
    for word in (word for word in words[1:] if not word.startswith("-")):
        name, _, extras = word.rstrip("]").partition("[")
        if name == ".":
            continue
        if " @ git+" in word:
            name, folder = re.fullmatch(r"([\w-]+) @ git\+\$REPO#subdirectory=packages/(\w+)", word).groups()
            if folder not in PROJECTS or PROJECTS[folder]["project"]["name"] != name:
                return f"packages/{folder} is not {name}"
            continue
        if name.startswith("./"):
            project = PROJECTS[Path(name).name]["project"]
            if missing := set(filter(None, extras.split(","))) - project["optional-dependencies"].keys():
                return f"{name} has no extra {min(missing)}"
            continue
        declared = {
            re.split(r"[^\w.-]", line)[0]
            for document in PROJECTS.values()
            for lines in (document["project"]["dependencies"], *document["project"]["optional-dependencies"].values())
            for line in lines
        }
        if name not in declared | INSTALLED:
            return f"nobody checked that {name} is the distribution that is meant"
    return None


def check_python(words: list[str]) -> str | None:
    """Whether a script or module is there, and a benchmark has the options."""
    if words[0] != "-m":
        return None if (ROOT / words[0]).is_file() or words[0] == "cluster.py" else f"no file {words[0]}"
    if not words[1].startswith("benchmarks."):
        return f"no test knows the module {words[1]}"
    command = importlib.import_module(words[1]).main
    try:
        command.make_context(words[1], list(words[2:]))
    except click.MissingParameter:
        return None if len(words) == 2 else "a parameter is missing"
    except click.UsageError as error:
        return error.format_message()
    return None


def check_pytest(words: list[str]) -> str | None:
    path, *rest = words
    if not (ROOT / path).exists():
        return f"no tests {path}"
    return None if rest[:1] != ["-k"] or rest[1] in (ROOT / path).read_text() else f"no test is named {rest[1]}"


def check_uv(words: list[str]) -> str | None:
    """Whether what is built is a package of ours, by the name of its distribution."""
    if words == ["publish"]:
        return None
    names = {document["project"]["name"] for document in PROJECTS.values()}
    return None if words[:2] == ["build", "--package"] and words[2] in names else f"uv {' '.join(words)}"


def check_hook(words: list[str]) -> str | None:
    return None if words == ["install"] and (ROOT / ".pre-commit-config.yaml").is_file() else "no hooks"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_line_of_a_page_can_be_called(page: Path) -> None:
    assert not [f"{line}: {wrong}" for line in lines_of(page) if (wrong := check(line))]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_of_a_page_can_be_parsed_and_imported(page: Path) -> None:
    """Every block is Python, and what it imports of our packages is there."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^ *```python\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(re.sub(r"^ {3}", "", block, flags=re.MULTILINE) if block[0] == " " else block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("featurize", "nestgen"):
                module = importlib.import_module(str(node.module))
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], node.module


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("make dem", "make -n ends with 2"),
        ("make run RECIPE=minni", "no recipe minni"),
        ("make run RECIPE=mini CONFIG='gpu=1'", "no CONFIG key gpu"),
        ("pip install featurise", "nobody checked"),
        ("pip install './packages/featurize[s4]'", "has no extra s4"),
        ("pip install 'featurize @ git+$REPO#subdirectory=packages/featurize'", "packages/featurize is not featurize"),
        ("python -m benchmarks.decode --pictures many", "is not a valid"),
        ("wget https://example.org", "no test knows wget"),
        (".venv/bin/pytest tests/nowhere", "no tests"),
    ],
)
def test_a_wrong_line_is_found(line: str, wrong: str) -> None:
    assert wrong in str(check(line))
