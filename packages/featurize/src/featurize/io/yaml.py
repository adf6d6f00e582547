"""YAML 1.2 by ruamel.yaml: plain values only, no key twice. `no` is a word and `2e-4` a number there."""

from __future__ import annotations

from pathlib import Path

from featurize.errors import UserError


def read_yaml(file: Path) -> object:
    """The content of a YAML file. Raises UserError naming the line of the first fault."""
    try:
        return parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text; save it as UTF-8.") from None


def parse_yaml(text: str, where: str) -> object:
    """The content of a YAML text. Raises UserError naming where it stands and the line of the first fault."""
    # Imported here, because most commands read no recipe.
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError, SafeConstructor
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    class Constructor(SafeConstructor):
        """Builds plain values; a date stays the text that it is."""

    Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)
    reader = YAML(typ="safe", pure=True)  # not `pure`, it would be libyaml, which reads YAML 1.1
    reader.Constructor = Constructor
    try:
        return reader.load(text)
    except MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(str(error.problem).split())
        if isinstance(error, DuplicateKeyError):  # whose text is: found duplicate key "x" with value ...
            problem = f"the key {problem.split(chr(34))[1]!r} is given twice"
        raise UserError(f"{where}{line} is not valid YAML: {problem}") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply to be read; write it flatter.") from None
    except (YAMLError, ValueError) as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
