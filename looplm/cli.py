"""The command line: YAML files and flags in, a frozen dataclass out, a user's mistake in one line with exit status 2.

Files and flags are merged in the order of the command line, later ones win key by key. ``--help`` begins with one line
of usage and a description::

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
import errno
import inspect
import os
import select
import signal
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import docstring_parser
import yaml

from looplm import binding
from looplm.binding import Flag, hints_of, retired_keys, retired_of, section_of, suggest, unknown_keys
from looplm.bounds import expand_path
from looplm.failures import Failure, UserError
from looplm.files import is_unicode, storage_failure
from looplm.yaml_text import parse_yaml, read_yaml

ConfigType = TypeVar("ConfigType")

WIDTH = 118  # of --help
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_PATH_FAULTS = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, *_FORBIDDEN)


def positional(metavar: str) -> Any:
    """Return a required dataclass field that is given without a flag; a tuple takes one or more values."""
    return dataclasses.field(metadata={"positional": metavar})


def positional_paths(metavar: str) -> Any:
    """Return a required dataclass field for paths that are given without a flag."""
    return dataclasses.field(metadata={"positional": metavar, "path": "name a path"})


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
    for argument in argv:
        if not is_unicode(argument):
            fix = "set the terminal to UTF-8, or rename the file"
            raise UserError(f"{os.fsencode(argument)!r}: an argument that is not UTF-8; {fix}")
    given = _Given(cls)
    words, wants_values = list[str](), False
    for flag, value in _flags(cls, argv):
        if flag in ("-h", "--help"):
            print(_help(cls, prog, description))
            sys.exit(0)
        elif flag == "--print_config" and not value:
            wants_values = True
        elif flag == "--config":
            given.add_file(expand_path(_required(flag, value), flag))
        elif flag:
            given.add_flag(flag, value)
        else:
            words.append(str(value))
    given.add_words(words)
    if os.environ.get("RANK", "0") == "0":
        for note in given.notes:
            print(note, file=sys.stderr)
    try:
        if wants_values:
            print(yaml.safe_dump(_shown(cls, given.values, ""), sort_keys=False, allow_unicode=True), end="")
            sys.exit(0)
        return binding.build(cls, given.values, expand=True)
    except UserError as error:
        origin = given.origins.get(str(error).partition(":")[0])
        raise UserError(f"{origin}: {error}" if origin else str(error)) from error


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
        raise UserError(f"{prog}: {word or 'no command'}: unknown command; {suggest(word, list(commands))}")
    about = str(inspect.getdoc(commands[word])).partition("\nArgs:")[0]
    return word, parse_config(commands[word], argv[1:], prog=f"{prog} {word}", description=about)


def run_main(main: Callable[[list[str]], None]) -> NoReturn:
    """Run ``main(argv)`` and exit: 0 on success, or one line on stderr and the status of a :class:`Failure`.

    Every rank raises a shared failure, such as a user's mistake, so rank 0 alone prints it. Others are one rank's own.
    Before the ranks have joined, one node alone may lack a file or a GPU, so the first rank of each node prints it.
    A full or broken disk becomes a failure wherever it was met. After Ctrl-C the status is 130, and 141 if whoever read
    the output has closed it (``| head``), as in a shell.
    """
    rank = os.environ.get("RANK")
    try:
        try:
            _run_and_flush(main)
        except OSError as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                sys.exit(128 + signal.SIGPIPE)
            failure = storage_failure(error) or _path_failure(error)
            if failure is None:
                raise
            raise failure from error
    except KeyboardInterrupt:
        print("interrupted by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Failure as error:
        if rank is None or (rank == "0" and error.is_shared):
            print(f"error: {error}", file=sys.stderr)
        elif not error.is_shared or (os.environ.get("LOCAL_RANK") == "0" and not _has_joined()):
            print(f"error: rank {rank}: {error}", file=sys.stderr)
        sys.exit(error.status)
    sys.exit(0)


def _has_joined() -> bool:
    """Return True if torch.distributed is or was initialized by torchrun's variables; a command leaves it at its end.

    Torch keeps the address of the last job. It is not imported for this: few commands need it.
    """
    torch_state = sys.modules.get("torch.distributed.distributed_c10d")
    return getattr(torch_state, "_default_pg_init_method", None) is not None


def _run_and_flush(main: Callable[[list[str]], None]) -> None:
    try:
        main(sys.argv[1:])
    except SystemExit:  # of --help, for example
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _nobody_reads() -> bool:
    """Return True if the reader of stdout is gone; what is left to print is then dropped."""
    output, poll = sys.stdout.fileno(), select.poll()
    poll.register(output, 0)  # errors are reported unasked
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


def _path_failure(error: OSError) -> UserError | None:
    """Return the mistake of a path that cannot be one of a file or folder; None if the error is another."""
    if error.errno not in _PATH_FAULTS or error.filename is None:
        return None
    fix = "change its permissions" if error.errno in _FORBIDDEN else "remove what is there"
    return UserError(f"{os.fsdecode(error.filename)}: {error.strerror}; give another path, or {fix}")


def to_dict(config: Any) -> dict[str, Any]:
    """Return the dataclass as values that YAML can hold (tuples become lists)."""

    values: dict[str, Any] = to_plain(dataclasses.asdict(config))
    return values


def to_plain(value: Any) -> Any:
    """Return a value, or those in it, as lists, mappings and scalars that YAML can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_dict(cls: type[ConfigType], values: Any, *, where: str) -> ConfigType:
    """Invert :func:`to_dict`; ``where`` names the source in error messages.

    Keys of earlier releases that have no effect any more are left out.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: {values!r:.80} stands where the keys of {cls.__name__} belong; restore the file")
    for key, fix in unknown_keys(cls, values):
        raise UserError(f"{where}: {key}: unknown key; {fix}")
    try:
        return binding.build(cls, values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


class _Given:
    """The values of files and flags for ``cls``, merged.

    ``origins`` has "FILE:LINE" for each key from a file, ``notes`` a line for each key without effect.
    """

    def __init__(self, cls: type) -> None:
        self.values = dict[str, Any]()
        self.origins = dict[str, str]()
        self.notes = list[str]()
        self._cls = cls

    def add_file(self, path: str) -> None:
        """Merge a file."""
        values, lines = read_yaml(path)
        self.origins |= {key: f"{path}:{line}" for key, line in lines.items()}
        for key, fix in unknown_keys(self._cls, values):
            raise UserError(f"{self.origins.get(key, path)}: {key}: unknown key; {fix}")
        for key, reason in retired_keys(self._cls, values):
            self.notes.append(f"{self.origins.get(key, path)}: {key}: has no effect; {reason}; remove it")
        self.values = _merged(self.values, values)

    def add_flag(self, flag: str, text: str | None) -> None:
        """Merge the value of ``--section.key``."""
        name = flag[2:]
        hint: Any = self._cls
        for part in name.split("."):
            section = None if typing.get_origin(hint) is tuple else section_of(hint)
            hint = hints_of(section).get(part) if section else None
            if section and part in retired_of(section):
                self.notes.append(f"{flag}: has no effect; {retired_of(section)[part]}; remove it")
                return
            if hint is None:
                raise UserError(f"{flag}: unknown key; {suggest(name, [*_names(self._cls), 'config', 'help'])}")
        self.origins = {key: origin for key, origin in self.origins.items() if not f"{key}.".startswith(f"{name}.")}
        text = _required(flag, text)
        value: Any = Flag(text)
        if text.strip()[:1] in ("{", "[") and _is_collection(hint):
            value = parse_yaml(text, flag).values
        for part in reversed(name.split(".")):
            value = {part: value}
        for key, fix in unknown_keys(self._cls, value):
            raise UserError(f"--{key}: unknown key; {fix}")
        self.values = _merged(self.values, value)

    def add_words(self, words: list[str]) -> None:
        """Give the words without a flag to the positional fields, in their order."""
        for spec in dataclasses.fields(self._cls):
            if "positional" in spec.metadata and words:
                many = _is_tuple(hints_of(self._cls)[spec.name])
                self.values[spec.name] = list(map(Flag, words)) if many else Flag(words[0])
                words = [] if many else words[1:]
        if words:
            raise UserError(f"unrecognized arguments: {' '.join(words)}; every value follows its --key")


def _flags(cls: type, argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each ``--flag`` with its value or None, and each other word after an empty flag."""
    switches = {f"--{spec.name}" for spec in dataclasses.fields(cls) if "switch" in spec.metadata}
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if word in ("-h", "--help", "--print_config"):
            yield word, ""
        elif flag.startswith("--") and flag != "--":
            if flag in switches and not equals:
                value = "true"
            elif not equals:
                value = next(words, "--")
            # A value of several words is meant, as in --arguments "--parallel.tensor 2".
            yield flag, None if value.startswith("--") and " " not in value and not equals else value
        elif word.startswith("-"):
            raise UserError(f"unrecognized arguments: {word}; a key begins with two dashes")
        else:
            yield "", word


def _required(flag: str, value: str | None) -> str:
    if value is None:
        raise UserError(f"{flag}: expected one argument; give {flag} VALUE, or {flag}=VALUE if it begins with dashes")
    return value


def _merged(base: Any, over: Any) -> Any:
    """Return ``over`` on top of ``base``, mappings key by key."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{key: _merged(base.get(key), value) for key, value in over.items()}}


def _names(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the full name of every key and section."""
    for name, hint in hints_of(cls).items():
        yield f"{prefix}{name}"
        if (inner := section_of(hint)) and not _is_tuple(hint):
            yield from _names(inner, f"{prefix}{name}.")


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _is_collection(hint: Any) -> bool:
    parts = (hint, *typing.get_args(hint))
    return any(dataclasses.is_dataclass(part) or typing.get_origin(part) in (tuple, dict) for part in parts)


def _shown(cls: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the values with the defaults of the keys that are not given, and null for those without one."""
    shown = dict[str, Any]()
    for spec in dataclasses.fields(cls):
        hint, key = hints_of(cls)[spec.name], f"{prefix}{spec.name}"
        if dataclasses.is_dataclass(hint) and isinstance(values.get(spec.name, {}), Mapping):
            shown[spec.name] = _shown(hint, values.get(spec.name, {}), f"{key}.")  # type: ignore[arg-type]
        elif spec.name in values:
            value = binding.convert(hint, values[spec.name], key, expand=True)
            shown[spec.name] = to_plain(value)
        else:
            shown[spec.name] = None if spec.default is dataclasses.MISSING else to_plain(spec.default)
    return shown


def _help(cls: type, prog: str, description: str) -> str:
    usage = [prog]
    for spec in dataclasses.fields(cls):
        if "positional" in spec.metadata:
            usage.append(spec.metadata["positional"] + "..." * _is_tuple(hints_of(cls)[spec.name]))
    lines = [f"usage: {' '.join(usage)} [--config FILE]... [--KEY VALUE]...", "", *description.strip().splitlines(), ""]
    lines += _entry("--config FILE", "YAML file with these keys; give it several times to stack files")
    lines += _entry("--print_config", "print the keys after merging all files and flags, and exit")
    return "\n".join([*lines, *_key_help(cls, "")])


def _key_help(cls: type, prefix: str) -> list[str]:
    """Return the lines of ``--help`` for the keys of ``cls``, then those of its sections."""
    texts = {
        param.arg_name: " ".join((param.description or "").split())
        for base in reversed(cls.__mro__)
        for param in docstring_parser.parse(inspect.getdoc(base) or "").params
    }
    lines, sections = list[str](), list[str]()
    for spec in dataclasses.fields(cls):
        hint, text = hints_of(cls)[spec.name], texts.get(spec.name, "")
        inner = section_of(hint)
        if inner and dataclasses.is_dataclass(hint):
            sections += ["", f"{text.rstrip('.')}:", *_key_help(inner, f"{prefix}{spec.name}.")]
            continue
        flag = spec.metadata.get("positional") or f"--{prefix}{spec.name}"
        lines += _entry(flag, text if "switch" in spec.metadata else f"{text} ({_about(spec, hint)})")
    return lines + sections


def _entry(name: str, text: str) -> list[str]:
    return [f"  {name}", *textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _about(spec: "dataclasses.Field[Any]", hint: Any) -> str:
    kind = " | ".join(_type_name(part) for part in typing.get_args(hint) or [hint]) if not _is_tuple(hint) else "list"
    if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
        return f"type: {kind}, required"
    return f"type: {kind}, default: {'null' if spec.default is None else to_plain(spec.default)}"


def _type_name(hint: Any) -> str:
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
