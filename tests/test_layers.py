"""The layers of both packages: imports run downward only, between folders and between the files of a folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"
MOST_LINES, MOST_MODULES = 400, 14

# Folders and modules of a package, from the ground up: each may import those before it. What is not listed is the
# package's own `__init__` and `__main__`.
ORDER = {
    "nestgen": (
        "errors text memory cores compiler files locks tensors randomness philox images recipe stores denoiser diffusion "
        "runs sampling sharing pipeline scoring training explore cli"
    ),
    "featurize": (
        "errors versions plugins io execution images scenes checkpoints sources recipe encoders codecs text basis store "
        "extraction integrity access neighbours reports cli"
    ),
}
FILES = {package: sorted((PACKAGES / package / "src" / package).rglob("*.py")) for package in ORDER}


def module_name(file: Path, package: str) -> str:
    """Dotted name below the package: `denoiser.uvit`; "denoiser" of denoiser/__init__.py."""
    parts = file.relative_to(PACKAGES / package / "src" / package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(file: Path, package: str) -> Iterator[str]:
    """Modules of the package that a file imports anywhere in it."""
    names = {module_name(other, package) for other in FILES[package]}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            targets = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for target in targets:
            path = target.removeprefix(f"{package}.")
            if target.startswith(f"{package}."):
                yield path if path in names else path.rpartition(".")[0]


@pytest.mark.parametrize("package", ORDER)
def test_folders_import_those_below_them_only(package: str) -> None:
    rank = {name: number for number, name in enumerate(ORDER[package].split())}
    tops = {file: module_name(file, package).split(".")[0] for file in FILES[package]}
    assert set(tops.values()) - {"", "__main__"} <= set(rank), "add what is new to ORDER"
    upward = [
        f"{file}: {name}"
        for file, top in tops.items()
        for name in imports(file, package)
        if top in rank and name and rank[name.split(".")[0]] > rank[top]
    ]
    assert not upward


@pytest.mark.parametrize("package", ORDER)
def test_files_of_a_folder_import_each_other_in_one_direction(package: str) -> None:
    graph = {module_name(file, package): set(imports(file, package)) - {""} for file in FILES[package]}
    try:
        TopologicalSorter({name: after - {name} for name, after in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", ORDER)
def test_files_and_folders_are_small(package: str) -> None:
    long = {str(file): lines for file in FILES[package] if (lines := len(file.read_text().splitlines())) > MOST_LINES}
    assert not long
    folders = {file.parent for file in FILES[package]}
    modules = {str(folder): len([*folder.glob("*.py")]) - (folder / "__init__.py").exists() for folder in folders}
    assert not {folder: count for folder, count in modules.items() if count > MOST_MODULES}
