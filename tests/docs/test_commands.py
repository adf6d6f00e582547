"""Every command, link and module that the documentation names exists, and commands have the options given."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("packages/*/README.md")]
)


def spelled(text: str) -> Iterator[tuple[list[str], bool]]:
    """The words of our commands in a page, and whether they are a call: in a block of code, and not in a `span`."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for number, line in enumerate([*lines, *spans]):
        if re.match(r"(?:\S*/)?(?:featurize|nestgen) ", line.strip()):
            line = re.sub(r"\$\w+", "1", line.strip().rstrip("&"))  # in a loop of the shell
            yield shlex.split(line, comments=True), number < len(lines)


def wrong_in(words: list[str], is_call: bool) -> str | None:
    """What of a command there is not; what else is wrong with a call."""
    from featurize.cli.main import commands
    from nestgen.cli.main import main

    group = commands if Path(words[0]).name == "featurize" else main
    if len(words) == 1:  # it says where things stand
        return None
    command = group.commands.get(words[1])
    if words[1].startswith("-") or command is None:
        return None if words[1] in ("--help", "--version") else f"no command {words[1]}"
    try:
        command.make_context(words[1], words[2:], resilient_parsing="--help" in words)
    except click.UsageError as error:
        return error.format_message() if is_call or isinstance(error, click.NoSuchOption) else None
    return None


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_and_links_of_a_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = [f"{' '.join(words)}: {said}" for words, call in spelled(text) if (said := wrong_in(words, call))]
    links = [target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in target]
    wrong += [f"no file {target}" for target in links if not (page.parent / target).exists()]
    modules = set(re.findall(r"`((?:\w+/)+\w+\.py)`", text))
    wrong += [f"no module {module}" for module in modules if not is_module(module)]
    assert not wrong


def is_module(path: str) -> bool:
    """Whether the path is below the root, or below a package or the folder that holds it."""
    return any(
        (folder / path).is_file() for folder in (ROOT, *ROOT.glob("packages/*/src"), *ROOT.glob("packages/*/src/*"))
    )


def test_the_readme_spells_commands() -> None:
    assert len(list(spelled((ROOT / "README.md").read_text(encoding="utf-8")))) > 10


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_no_install_line_names_a_stranger_s_package(page: Path) -> None:
    """`featurize` and `nestgen` on PyPI are not these: they are installed from a clone, or by `NAME @ git+ADDRESS`."""
    text = re.sub(r'"[\w-]+ @ git\+[^"]+"', "", page.read_text(encoding="utf-8"))
    lines = re.findall(r"pip install ([^\n`#]+)", text)
    words = [word.strip("'\"") for line in lines for word in line.split()]
    assert not [word for word in words if re.match(r"(featurize|nestgen)\b", word)]
