"""Paths in every command: the home directory, environment variables, and keys that must say that they are paths."""

import ast
import dataclasses
import importlib
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from looplm.binding import hints_of, section_of
from looplm.bounds import expand_path, is_path
from looplm.cli import parse_config, run_main
from looplm.config import RunConfig
from looplm.failures import UserError

ROOT = Path(__file__).resolve().parents[2]
MODEL = "model: {vocab_size: 64, hidden_size: 32, ffn_hidden_size: 48, num_layers: 2, num_attention_heads: 4}"
RECIPE = f"{MODEL}\noptim: {{train_steps: 10}}\n"

# The keys of all commands that hold text and no path. A new key of text is listed here or declared with path_field.
TEXTS = {
    "bos_token", "eos_token", "pad_token", "special_tokens",
    "answer_key", "ignore", "messages_key", "prompt_key", "text_key", "language", "name", "partition", "qos", "time",
    "prompt", "stop", "depths", "votes", "kv_caches", "exit_thresholds", "tasks",
    "group", "question", "figure", "figures", "curves", "better", "than", "tuned_by", "base", "arms", "tests", "series",
    "parts", "rank", "revision", "roles", "variants", "arguments", "run", "start", "only", "layers", "search",
}  # fmt: skip


def config_classes() -> Iterator[type]:
    """Yield the dataclass of every command."""
    for package in ("data_pipeline", "looplm", "pretrain", "tools"):
        for path in sorted((ROOT / package).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            if path.name == "cli.py" or not re.search(r"\bparse_(config|command)\(", source):
                continue
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            defined = {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
            named = set(re.findall(r"\bparse_config\(\s*(\w+)", source)) | defined
            found = (vars(module).get(name) for name in named)
            yield from (cls for cls in found if isinstance(cls, type) and cls.__name__.endswith("Config"))


def text_keys(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, bool]]:
    """Yield each key of text or paths, its field, and True if it is declared as a path."""
    for spec in dataclasses.fields(cls):
        hint = hints_of(cls)[spec.name]
        if inner := section_of(hint):
            yield from text_keys(inner, f"{prefix}{spec.name}.")
        elif {str, Path} & {hint, *typing.get_args(hint)}:
            yield f"{cls.__module__}.{cls.__name__} {prefix}{spec.name}", spec, is_path(spec, hint)


@pytest.fixture(scope="module")
def keys() -> list[tuple[str, dataclasses.Field, bool]]:
    found = {row[0]: row for cls in config_classes() for row in text_keys(cls)}
    return [found[key] for key in sorted(found)]


def test_every_key_that_is_a_path_says_so(keys):
    assert sum(declared for *_, declared in keys) > 40
    undeclared = {spec.name: key for key, spec, declared in keys if not declared}
    forgotten = {key for name, key in undeclared.items() if name not in TEXTS}
    assert not forgotten, f"declare them with looplm.bounds.path_field, or list them as texts: {forgotten}"
    assert set(undeclared) == TEXTS, "keys that no command has"


@pytest.fixture
def home(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("EMPTY", "")
    return tmp_path


def parse(*argv: str) -> RunConfig:
    return parse_config(RunConfig, argv, prog="p", description="")


@pytest.mark.promise(
    text="`~` and `$NAME` in a path mean the home directory and the variable, in files, flags and lists",
    expected="the same path everywhere; a variable that is not set is refused",
)
def test_home_and_variables_in_files_and_flags(home, record_property):
    keys = "output_dir: ~/out\ncheckpoint: {initial: '${SCRATCH}/a'}\n"
    (home / "a.yaml").write_text(f"{RECIPE}{keys}data: {{train: [{{prefix: ~/d}}], cache_dir: $SCRATCH/c}}\n")
    config = parse("--config", "~/a.yaml", "--data.valid", "[{prefix: $SCRATCH/v}]")
    scratch = home / "scratch"
    assert config.output_dir == str(home / "out") and config.checkpoint.initial == str(scratch / "a")
    assert config.data.train[0].prefix == str(home / "d") and config.data.valid[0].prefix == str(scratch / "v")
    assert config.data.cache_dir == str(scratch / "c")
    assert parse("--config", "~/a.yaml", "--output_dir=~/b").output_dir == str(home / "b")
    with pytest.raises(UserError, match=r"output_dir: .*NOWHERE.* is not set") as refused:
        parse("--config", "~/a.yaml", "--output_dir", "$NOWHERE/b")
    record_property("seen", f"six paths as meant; {refused.value}")


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("~", "HOME"),
        ("~/a b/é", "HOME/a b/é"),
        ("$SCRATCH", "HOME/scratch"),
        ("a/$SCRATCH", "a/HOME/scratch"),
        ("${SCRATCH}s", "HOME/scratchs"),
        ("relative/../x", "relative/../x"),
        ("./~", "./~"),
        ("a~", "a~"),
        ("1$", "1$"),
        ("$5", "$5"),
    ],
)
def test_expansion(home, text, expanded):
    assert expand_path(text, "key") == expanded.replace("HOME", str(home))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "key: '' is not allowed; name a path"),
        (" a", "key: ' a' is not allowed; remove the spaces around it"),
        ("a\t", r"key: 'a\\t' is not allowed; remove the spaces around it"),
        ("   ", "key: '   ' is not allowed; remove the spaces around it"),
        ("a\nb", r"key: 'a\\nb' is not allowed; a path holds no control characters"),
        ("a\0b", r"key: 'a\\x00b' is not allowed; a path holds no control characters"),
        ("~nobody-of-that-name/x", "there is no such user"),
        ("$SCRATCHES/x", "the environment variable 'SCRATCHES' is not set"),
        ("$EMPTY/x", "the environment variable 'EMPTY' is not set"),
        ("${SCRATCH:-/tmp}/x", "the environment variable 'SCRATCH:-/tmp' is not set"),
        ("${}/x", "the environment variable '' is not set"),
    ],
)
def test_a_path_that_cannot_be_meant_is_refused(home, text, message):
    with pytest.raises(UserError, match=message):
        expand_path(text, "key")
    assert os.environ["EMPTY"] == ""


def test_a_quoted_path_in_a_file_names_its_line(home):
    (home / "a.yaml").write_text(f"{RECIPE}output_dir: 'out '\ndata: {{train: [{{prefix: a}}]}}\n")
    with pytest.raises(UserError, match=r"a\.yaml:3: output_dir: 'out ' is not allowed; remove the spaces"):
        parse("--config", "~/a.yaml")


@pytest.mark.parametrize("name", ["file/x", "file", "x" * 300])
def test_a_path_that_can_be_no_folder_is_one_line(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as ended:
        run_main(lambda _: (tmp_path / name).mkdir())
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and printed.startswith(f"error: {tmp_path}/{name}: ") and printed.count("\n") == 1
