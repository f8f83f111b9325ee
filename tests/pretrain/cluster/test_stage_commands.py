"""Commands between two trainings of a recipe: how their words are read, and that the shipped ones are valid."""

import importlib
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from looplm.cli import UserError
from pretrain.cluster.submit import StageConfig, SubmitConfig, plan

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("", "run: '' is not allowed; give the words after \"python -m\""),
        ("tools.upcycle 'x", 'run: "tools.upcycle \'x" is not allowed; quote it as in a shell (No closing quotation)'),
        ("tools.upcicle", "run: 'tools.upcicle' is not allowed; it is not a module of this repository"),
        ("tools/upcycle", "run: 'tools/upcycle' is not allowed; it is not a module of this repository"),
        ("tools.upcycle --output=", "--output: '' is not allowed; name a path"),
    ],
)
def test_a_command_that_cannot_be_read(run: str, message: str) -> None:
    jobs, faults = plan(SubmitConfig(name="x", stages=(StageConfig(name="a", run=run),)))
    assert (jobs, faults) == ([], [f"a: {message}"])


def test_paths_of_a_command_may_follow_an_equals_sign() -> None:
    stage = StageConfig(name="a", run="tools.upcycle depth --checkpoint=runs/a --output=runs/b=c --layers 4")
    [job], faults = plan(SubmitConfig(name="x", stages=(stage,)))
    assert (job.reads, job.writes, faults) == ("runs/a", "runs/b=c", [])


class Parsed(Exception):
    """A command's line was parsed, and the command itself shall not run."""


def parse_line(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command's words with its own configuration, and run no more of it; raise UserError if they are wrong."""
    module = importlib.import_module(words[0])
    with monkeypatch.context() as patched, pytest.raises(Parsed):
        for name in ("parse_config", "parse_command"):
            if parse := getattr(module, name, None):
                patched.setattr(module, name, partial(parse_and_stop, parse))
        module.main(words[1:])


def parse_and_stop(parse: Callable[..., Any], *arguments: Any, **keywords: Any) -> NoReturn:
    raise Parsed(parse(*arguments, **keywords))


def test_shipped_recipes_use_options_that_their_commands_have(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        shlex.split(stage["run"])
        for path in sorted((ROOT / "configs").glob("*/chain.yaml"))
        for stage in yaml.safe_load(path.read_text())["stages"]
        if "run" in stage
    ]
    assert {words[0] for words in lines} == {"tools.upcycle", "tools.convert_hf", "pretrain.evaluate"}
    for words in lines:
        parse_line(words, monkeypatch)
        with pytest.raises(UserError, match="--no_such_key: unknown key"):
            parse_line([*words, "--no_such_key", "1"], monkeypatch)
