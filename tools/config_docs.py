"""Write docs/config.md, the list of all configuration keys, from the dataclasses: ``python -m tools.config_docs``.

Types, defaults and bounds come from the fields, descriptions from the docstrings that ``--help`` shows too.
"""

import inspect
import json
import types
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

from data_pipeline.config import PipelineConfig
from looplm.bounds import is_path
from looplm.cli import run_main
from looplm.config import RunConfig
from looplm.failures import UserError
from looplm.files import write_whole
from looplm.inference import GenerationConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"
PARTS = (
    ("Run", RunConfig, "Keys of `pretrain.train`, `tools.plan` and every other command that reads a training recipe."),
    ("Data pipeline", PipelineConfig, "Keys of `data_pipeline.tokenize`."),
    ("Generation", GenerationConfig, "Keys of `looplm.generate`, and arguments of `GenerationConfig` in Python."),
)
HEAD = """\
# Configuration

<!-- Written by `python -m tools.config_docs`; do not edit. -->

Every key of a YAML file is also an option on the command line: `--model.num_loops 4`. `[]` marks the entries of a list.
"""


def main(argv: list[str]) -> None:
    """``python -m tools.config_docs``"""
    if argv:
        raise UserError(f"{argv[0]}: unknown argument; python -m tools.config_docs takes none")
    write_whole(PAGE, page())
    print(PAGE)


def page() -> str:
    """Return the whole page."""
    parts = [f"## {title}\n\n{intro}\n\n" + "\n".join(_sections(cls, [])) for title, cls, intro in PARTS]
    return "\n".join([HEAD, *parts])


def _sections(cls: type, names: list[str]) -> list[str]:
    """Return the table of ``cls``, whose sections are ``names``, and the tables of the dataclasses among its fields."""
    prefix = f"{names[0]}." if names else ""
    doc = docstring_parser.parse(inspect.getdoc(cls) or "")
    described = {parameter.arg_name: parameter.description or "" for parameter in doc.params}
    hints, rows, nested = get_type_hints(cls), [], dict[type, list[str]]()
    for spec in fields(cls):
        text = _plain(described[spec.name]).replace("|", "\\|")
        rows.append(f"| `{spec.name}` | {_kind(spec, hints[spec.name])}{_bounds(spec)} | {_default(spec)} | {text} |")
        for inner, many in _dataclasses(hints[spec.name]):
            nested.setdefault(inner, []).append(f"{prefix}{spec.name}{'[]' if many else ''}")
    summary = _plain(" ".join(filter(None, (doc.short_description, doc.long_description))))
    head = "### " + ", ".join(f"`{name}`" for name in names) + "\n\n" if names else ""
    own = "\n".join(("| key | type | default | |", "|---|---|---|---|", *rows))
    tables = [table for inner, sections in nested.items() for table in _sections(inner, sections)]
    return [f"{head}{summary}\n\n{own}\n", *tables]


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")


def _type(hint: Any) -> str:
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if get_origin(hint) is tuple:
        return f"list of {_type(arguments[0]).replace('section', 'sections')}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if is_dataclass(hint):
        return "section"
    return {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}[hint]


def _kind(spec: Field[Any], hint: Any) -> str:
    return _type(hint).replace("text", "path") if is_path(spec, hint) else _type(hint)


def _bounds(spec: Field[Any]) -> str:
    if "non_empty" in spec.metadata:
        return ", not empty"
    limits = spec.metadata.get("limits", {})
    return (
        ", " + " and ".join(f"{word.removeprefix('of ')} {limit}" for word, limit in limits.items()) if limits else ""
    )


def _default(spec: Field[Any]) -> str:
    if spec.default is MISSING:
        return "required" if spec.default_factory is MISSING else "see below"
    plain = list(spec.default) if isinstance(spec.default, tuple) else spec.default
    return f"`{json.dumps(plain)}`" if not isinstance(plain, str) else f"`{plain}`"


def _dataclasses(hint: Any) -> list[tuple[type, bool]]:
    """Return the dataclasses in ``hint``, each with whether it is the element of a list."""
    if is_dataclass(hint) and isinstance(hint, type):
        return [(hint, False)]
    many = get_origin(hint) is tuple
    return [(cls, many) for argument in get_args(hint) if argument is not ... for cls, _ in _dataclasses(argument)]


if __name__ == "__main__":
    run_main(main)
