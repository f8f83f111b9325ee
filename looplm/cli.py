"""The command line: YAML files and flags in, a frozen dataclass out, a user's mistake in one line with exit status 2.

jsonargparse does the typing, ``--help`` and ``--print_config``. This module adds the file and line of a wrong key, the
key that was probably meant, subcommands, and a ``--help`` that begins with one line of usage and a description::

    @dataclass(frozen=True, kw_only=True)
    class ReportConfig:
        '''Args:
            run: directory of a run.
            deep: read everything.
        '''

        run: Path = positional("RUN_DIR")            # `python -m pretrain.report RUN_DIR`; a tuple takes one or more
        deep: bool = switch()                        # `--deep`; every other field is `--name value`

    config = parse_config(ReportConfig, argv, prog="python -m pretrain.report", description=str(__doc__))
    word, config = parse_command({"depth": DepthConfig, "loops": LoopsConfig}, argv, prog=..., description=...)

Examples belong in the docstring that is passed as ``description``: it is shown as written.
"""

import dataclasses
import difflib
import inspect
import os
import re
import sys
import types
import typing
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import docstring_parser
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace

from looplm.bounds import require as require
from looplm.failures import Failure
from looplm.failures import UserError as UserError

ConfigType = TypeVar("ConfigType")


def positional(metavar: str) -> Any:
    """Return a required dataclass field that is given without a flag; a tuple takes one or more values."""
    return dataclasses.field(metadata={"positional": metavar})


def switch() -> Any:
    """Return a dataclass field that is False, or True if its flag is given (without a value)."""
    return dataclasses.field(default=False, metadata={"switch": True})


def parse_config(cls: type[ConfigType], argv: Sequence[str], *, prog: str, description: str) -> ConfigType:
    """Build ``cls`` from ``--config FILE`` (repeatable, later files win) and ``--section.key value``.

    Args:
        cls: a frozen dataclass whose fields are scalars, tuples, or dataclasses themselves.
        argv: the arguments without the program's name.
        prog: the command as the user types it, for ``--help``.
        description: the text of ``--help`` above the keys, usually the module's docstring with an example or two.

    Raises:
        UserError: a file that cannot be read, an unknown key, a value of the wrong type or out of bounds.
    """
    origins = dict[str, str]()  # "FILE:LINE" for each key whose value comes from a file
    for flag, value in _flags(argv):
        if flag == "--config" and value:
            values, lines = _load_yaml(value)
            origins |= {key: f"{value}:{line}" for key, line in lines.items()}
            for key, fix in _unknown_keys(cls, values):
                raise UserError(f"{origins.get(key, value)}: {key}: unknown key; {fix}")
        else:
            origins = {key: origin for key, origin in origins.items() if not f"--{key}.".startswith(f"{flag}.")}
    parser = _build_parser(cls, prog, description)  # type: ignore[arg-type]  # a class is hashable
    try:
        return _instantiate(cls, parser, parser.parse_args(list(argv)))
    except Exception as error:  # jsonargparse raises several kinds; each is the user's mistake at this point
        message = _explain(parser, error)
        origin = origins.get(message.partition(":")[0])
        raise UserError(f"{origin}: {message}" if origin else message) from error


def parse_command(commands: Mapping[str, type], argv: Sequence[str], *, prog: str, description: str) -> tuple[str, Any]:
    """Return the first argument and the config that its dataclass in ``commands`` builds from the other arguments.

    ``prog`` and ``description`` belong to the command as a whole; a subcommand is described by its class docstring.
    """
    word = argv[0] if argv else ""
    if word in ("-h", "--help"):
        lines = [f"  {name:<12}{str(inspect.getdoc(cls)).partition(chr(10))[0]}" for name, cls in commands.items()]
        print(f"usage: {prog} COMMAND [--KEY VALUE]...\n\n{description.strip()}\n\ncommands, each with its own --help:")
        print("\n".join(lines))
        sys.exit(0)
    if word not in commands:
        raise UserError(f"{prog}: {word or 'no command'}: unknown command; {_suggest(word, list(commands))}")
    about = str(inspect.getdoc(commands[word])).partition("\nArgs:")[0]
    return word, parse_config(commands[word], argv[1:], prog=f"{prog} {word}", description=about)


def run_main(main: Callable[[list[str]], None]) -> NoReturn:
    """Run ``main(argv)`` and exit: 0 on success, or one line on stderr and the status of a :class:`Failure`.

    Every rank finds a user's mistake, so rank 0 alone prints it. Any other failure may be one rank's own.
    """
    rank = os.environ.get("RANK")
    try:
        main(sys.argv[1:])
    except Failure as error:
        if not isinstance(error, UserError):
            print(f"error: {error}" if rank is None else f"error: rank {rank}: {error}", file=sys.stderr)
        elif rank in (None, "0"):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    sys.exit(0)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the dataclass as values that YAML can hold (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    values: dict[str, Any] = plain(dataclasses.asdict(config))
    return values


def from_dict(cls: type[ConfigType], values: dict[str, Any], *, where: str) -> ConfigType:
    """Invert :func:`to_dict`; ``where`` names the source in error messages."""
    for key, fix in _unknown_keys(cls, values):
        raise UserError(f"{where}: {key}: unknown key; {fix}")
    parser = _build_parser(cls)  # type: ignore[arg-type]  # a class is hashable
    try:
        return _instantiate(cls, parser, parser.parse_object(values))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: {_explain(parser, error)}") from error


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Description as written, then each key with its docstring text, type and default."""


@cache  # resolving type hints dominates the cost of reading a small file
def _build_parser(cls: type, prog: str = "", description: str = "") -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog, description=description, formatter_class=_HelpFormatter, exit_on_error=False, allow_abbrev=False
    )
    text = "YAML file with these keys; give it several times to stack files"
    parser.add_argument("--config", metavar="FILE", action=ActionConfigFile, help=text)
    texts = {param.arg_name: param.description for param in docstring_parser.parse(cls.__doc__ or "").params}
    special, usage = set[str](), [prog]
    for key in dataclasses.fields(cls):
        if "switch" in key.metadata:
            parser.add_argument(f"--{key.name}", action="store_true", help=texts.get(key.name))
        elif "positional" in key.metadata:
            hint, metavar = typing.get_type_hints(cls)[key.name], key.metadata["positional"]
            many = typing.get_origin(hint) is tuple
            kind, nargs = (typing.get_args(hint)[0], "+") if many else (hint, None)
            parser.add_argument(key.name, metavar=metavar, type=kind, nargs=nargs, help=texts.get(key.name))
            usage.append(f"{metavar}..." if many else metavar)
        else:
            continue
        special.add(key.name)
    parser.add_class_arguments(cls, skip=special)
    parser.usage = " ".join([*usage, "[--config FILE]... [--KEY VALUE]..."])
    return parser


def _instantiate(cls: type[ConfigType], parser: ArgumentParser, values: Namespace) -> ConfigType:
    values.pop("config", None)
    built = vars(parser.instantiate(values))
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in built.items()})


def _flags(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each ``--flag`` with the value that follows it."""
    for argument, following in zip_longest(argv, argv[1:], fillvalue=""):
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            yield flag, value if equals else following


def _load_yaml(path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the values of a YAML file, and the line of each key by its full path."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(
            f"{where}: not valid YAML: {getattr(error, 'problem', None) or ' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: holds {type(values).__name__}, not a mapping of keys; see --print_config for the form"
        )
    lines = dict[str, int]()
    for key, line in _key_lines(node):
        if key in lines:
            raise UserError(f"{path}:{line}: {key}: given twice, first on line {lines[key]}; remove one")
        lines[key] = line
    return values, lines


def _key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _key_lines(value, f"{prefix}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _key_lines(item, f"{prefix[:-1]}[{index}].")


def _dataclasses_in(annotation: Any) -> list[type]:
    """Return the dataclasses inside an annotation such as ``Optional[X]`` or ``tuple[X, ...]``."""
    if dataclasses.is_dataclass(annotation):
        return [annotation]  # type: ignore[list-item]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, tuple):
        return [found for inner in typing.get_args(annotation) for found in _dataclasses_in(inner)]
    return []


def _unknown_keys(cls: type, values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each key of ``values`` for which ``cls`` has no field, with a suggestion."""
    if isinstance(values, list):
        for index, value in enumerate(values):
            yield from _unknown_keys(cls, value, f"{prefix[:-1]}[{index}].")
    if not isinstance(values, dict):
        return
    annotations = typing.get_type_hints(cls)
    known = {field.name: annotations[field.name] for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in known:
            yield f"{prefix}{key}", _suggest(str(key), list(known), prefix)
        for inner in _dataclasses_in(known.get(key)):
            yield from _unknown_keys(inner, value, f"{prefix}{key}.")


def _suggest(key: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {prefix}{close[0]}?" if close else f"give one of {', '.join(known)}"


def _explain(parser: ArgumentParser, error: Exception) -> str:
    """Return jsonargparse's message on one line, with a suggestion for a misspelled ``--key``."""
    message = " ".join(str(error).split())
    if isinstance(error, UserError):
        return message
    unknown = re.search(r"unrecognized arguments: --([\w.]+)", message)
    if unknown:
        return f"--{unknown[1]}: unknown key; {_suggest(unknown[1], [action.dest for action in parser._actions])}"
    missing = re.search(r"the following arguments are required: (.*)", message)
    if missing:
        return f"{missing[1]}: required and not given; set it in a --config file or on the command line"
    typed = re.search(r'Parser key "([\w.]+)": (.*)', message)
    return f"{typed[1]}: {typed[2]}" if typed else message
