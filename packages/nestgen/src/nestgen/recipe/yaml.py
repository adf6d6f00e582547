"""YAML 1.2 by ruamel.yaml: plain values only, of bounded size and depth, no key twice."""

from __future__ import annotations

from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from nestgen.errors import UserError

MOST_VALUES = 100_000  # with aliases written out: a few lines of them may stand for gigabytes
MOST_LEVELS = 50


class _Constructor(SafeConstructor):
    """Builds plain values; dates stay the text that they are."""

    def construct_document(self, node: Node) -> object:
        _check_size(node)
        return super().construct_document(node)


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def _check_size(document: Node) -> None:
    nodes, values = [(document, 1)], 0
    while nodes:
        node, level = nodes.pop()
        values += 1
        if level > MOST_LEVELS or values > MOST_VALUES:
            limit = f"{MOST_LEVELS} levels" if level > MOST_LEVELS else f"{MOST_VALUES:,} values"
            raise ConstructorError(problem=f"it has more than {limit}", problem_mark=node.start_mark)
        if isinstance(node, SequenceNode):
            nodes += [(child, level + 1) for child in node.value]
        elif isinstance(node, MappingNode):
            nodes += [(child, level + 1) for pair in node.value for child in pair]


def read_yaml(file: Path) -> object:
    """The content of a YAML file. Raises UserError naming the line of the first fault."""
    try:
        return parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text") from None


def parse_yaml(text: str, where: str) -> object:
    """The content of a YAML text. Raises UserError naming where it stands and the line of the first fault."""
    yaml = YAML(typ="safe", pure=True)  # without `pure` it is libyaml, which follows YAML 1.1
    yaml.Constructor = _Constructor
    try:
        return yaml.load(text)
    except DuplicateKeyError as error:  # its text is `found duplicate key "steps" with value ...`
        key = error.problem.split('"')[1]
        problem, mark = f"the key {key!r} is given twice", error.problem_mark
    except MarkedYAMLError as error:
        problem, mark = " ".join(str(error.problem).split()), error.problem_mark
    except YAMLError as error:
        problem, mark = " ".join(str(error).split()), None
    except RecursionError:
        problem, mark = f"it has more than {MOST_LEVELS} levels", None
    raise UserError(f"{where}{f' line {mark.line + 1}' if mark else ''} is not valid YAML: {problem}")
