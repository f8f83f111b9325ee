"""YAML text to mappings, lists and strings. The declared type of a key, not YAML's guess, decides how it is read.

YAML 1.1 guesses types: ``no`` is false, ``010`` is 8, ``10:00:00`` is 36000 and ``1e-3`` is text. Here a scalar stays
as it was written. Tags are refused, so no file can name a type to build. Keys that are given twice are refused.
"""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from looplm.failures import UserError

MAX_BYTES = 2**20  # of a file; PyYAML reads about 200 KB a second
MAX_VALUES = 100_000  # in a file; aliases of aliases multiply
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}


class Plain(str):
    """A scalar that was written without quotes: ``null`` may mean the text or no value."""


class Document(NamedTuple):
    """The values of a text, and the line of each key by its full path."""

    values: Any
    lines: dict[str, int]


class _Loader(yaml.SafeLoader):
    """YAML without the guessing of types. PyYAML's C loader overflows the stack on a deep nest; this one raises."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # PyYAML's own name, never changed


def read_yaml(path: str) -> Document:
    """Return the content of a file, which must be a mapping."""
    file = Path(path)
    try:
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise UserError(f"{path}: is not a regular file; write the keys into one")
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: {size:,} bytes is not allowed; a file of keys has at most {MAX_BYTES:,}")
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"{path}: not valid YAML: not UTF-8 ({error.reason}); save it as UTF-8") from error
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read ({reason}); give the path of a YAML file") from error
    document = parse_yaml(text, path)
    if not isinstance(document.values, dict):
        kind = "nothing" if document.values is None else f"a {'list' if isinstance(document.values, list) else 'text'}"
        raise UserError(f"{path}: holds {kind}, not a mapping of keys; see --print_config for the form")
    return document


def parse_yaml(text: str, where: str) -> Document:
    """Return the content of ``text``; ``where`` names it in error messages, before the line."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        reader = _Reader(where)
        return Document(None if node is None else reader.value(node, ""), reader.lines)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {_one_line(error.problem)}") from error
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        character = f"the character U+{int(error.character):04X}"
        raise UserError(f"{where}:{number}: not valid YAML: {character} is not allowed in it; remove it") from error
    except RecursionError as error:
        raise UserError(f"{where}: not valid YAML: too many lists or mappings in one another") from error
    except (ValueError, OverflowError) as error:  # PyYAML converts escapes such as "\UFFFFFFFF" without a check
        raise UserError(f"{where}: not valid YAML: {_one_line(str(error))}") from error


class _Reader:
    """Turns composed nodes into values."""

    def __init__(self, where: str) -> None:
        self.lines = dict[str, int]()
        self._where = where
        self._values = 0

    def value(self, node: yaml.Node, name: str) -> Any:
        """Return the value of a node, which stands at the key ``name``."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise UserError(f"{self._where}: more than {MAX_VALUES:,} values; write fewer aliases")
        if node.tag not in _TAGS:
            raise self._error(node, name, f"the tag {node.tag!r} is not allowed; leave it out")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, name)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, f"{name}[{index}]") for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return Plain(node.value) if node.style is None else node.value

    def _mapping(self, node: yaml.MappingNode, name: str) -> dict[str, Any]:
        own, merged, seen = dict[str, Any](), dict[str, Any](), dict[str, int]()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, name, "a key that is a list or mapping is not allowed; give a name")
            key, line = key_node.value, key_node.start_mark.line + 1
            full = f"{name}.{key}" if name else key
            if key in seen:
                raise self._error(key_node, full, f"given twice, first on line {seen[key]}; remove one")
            seen[key] = line
            if key == "<<" and key_node.style is None:
                merged = self._merged(value_node, name)
                continue
            own[key] = self.value(value_node, full)
            self.lines[full] = line
        return merged | own

    def _merged(self, node: yaml.Node, name: str) -> dict[str, Any]:
        """Return the keys of the mappings behind ``<<``; those of earlier ones win."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged = dict[str, Any]()
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                raise self._error(node, f"{name}.<<".lstrip("."), "only mappings can be merged; name an anchor of one")
            merged = self.value(part, name) | merged
        return merged

    def _error(self, node: yaml.Node, name: str, problem: str) -> UserError:
        return UserError(f"{self._where}:{node.start_mark.line + 1}: {name + ': ' if name else ''}{problem}")


def _one_line(text: str | None) -> str:
    return " ".join(str(text).split())
