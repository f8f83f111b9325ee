"""Values as people write them: types by key, and files that are no configuration."""

import os
import re
from pathlib import Path

import pytest

from looplm.cli import parse_config
from looplm.config import RunConfig
from looplm.failures import UserError

BASE = """output_dir: run
model: {vocab_size: 64, hidden_size: 32, ffn_hidden_size: 48, num_layers: 2, num_attention_heads: 4}
optim: {train_steps: 10}
data: {train: [{prefix: a}]}
"""


def parse(folder: Path, text: str | bytes = "seed: 1\n", *argv: str) -> RunConfig:
    (folder / "a.yaml").write_text(BASE)
    (folder / "b.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    files = ["--config", str(folder / "a.yaml"), "--config", str(folder / "b.yaml")]
    return parse_config(RunConfig, [*files, *argv], prog="p", description="")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optim: {lr: 1e-3}", "optim.lr", 0.001),  # PyYAML reads text
        ("optim: {lr: 1}", "optim.lr", 1.0),
        ("optim: {lr: '2e-4'}", "optim.lr", 0.0002),
        ("optim: {lr: .5}", "optim.lr", 0.5),
        ("optim: {train_steps: 1_000}", "optim.train_steps", 1000),
        ("checkpoint: {resume: no}", "checkpoint.resume", False),
        ("checkpoint: {resume: On}", "checkpoint.resume", True),
        ("output_dir: no", "output_dir", "no"),
        ("output_dir: 007", "output_dir", "007"),
        ("output_dir: 2024-01-01", "output_dir", "2024-01-01"),
        ("output_dir: 10:00:00", "output_dir", "10:00:00"),
        ("output_dir: 1e3", "output_dir", "1e3"),
        ("data: {cache_dir: ~}", "data.cache_dir", None),
        ("data: {cache_dir: 'null'}", "data.cache_dir", "null"),
        ("data: {horizon_samples: null}", "data.horizon_samples", None),
        ("optim: &o {lr: 0.5, train_steps: 3}", "optim.lr", 0.5),
        ("model: {init_std: &a 0.5}\noptim: {lr: *a}", "optim.lr", 0.5),
        ("data: {train: [{prefix: a}], valid: [&p {prefix: a, weight: 3}, {<<: *p, prefix: b}]}", "seed", 1234),
        ("\ufeffseed: 3", "seed", 3),
        ("---\nseed: 3\n...\n", "seed", 3),
    ],
)
def test_a_value_has_the_type_of_its_key(tmp_path, text, key, value):
    found = parse(tmp_path, text)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--optim.lr", "1e-3"], "lr", 0.001),
        (["--optim.lr=1e-3", "--optim.lr", "2e-3"], "lr", 0.002),
        (["--optim", "{lr: 1e-3}"], "lr", 0.001),
    ],
)
def test_flags_are_read_alike(tmp_path, argv, key, value):
    optim = parse(tmp_path, "seed: 1\n", *argv).optim
    assert getattr(optim, key) == value and optim.train_steps == 10


def test_merged_mappings_give_what_is_not_given(tmp_path):
    sources = parse(tmp_path, "data: {train: [&p {prefix: a, weight: 3}, {<<: *p, prefix: b}]}").data.train
    assert [(source.prefix, source.weight) for source in sources] == [("a", 3.0), ("b", 3.0)]


REFUSED = {
    "optim: {lr: .nan}": r"b\.yaml:1: optim\.lr: '\.nan' is not allowed; give a finite number",
    "optim: {lr: .inf}": r"b\.yaml:1: optim\.lr: '\.inf' .*",
    "optim: {lr: 1e999}": r"b\.yaml:1: optim\.lr: '1e999' .*",
    "loss: {threshold: nan}": r"b\.yaml:1: loss\.threshold: 'nan' .*",
    "optim: {train_steps: 4.0}": r"b\.yaml:1: optim\.train_steps: '4\.0' is not allowed; give a whole number",
    "optim: {train_steps: 1e3}": r"b\.yaml:1: optim\.train_steps: '1e3' .*",
    "optim: {train_steps: 010}": r"b\.yaml:1: optim\.train_steps: '010' .*",
    "optim: {train_steps: 0x10}": r"b\.yaml:1: optim\.train_steps: '0x10' .*",
    "optim: {train_steps: 1:30}": r"b\.yaml:1: optim\.train_steps: '1:30' .*",
    "optim: {train_steps: true}": r"b\.yaml:1: optim\.train_steps: 'true' .*",
    "optim: {train_steps: null}": r"b\.yaml:1: optim\.train_steps: null is not allowed; give a whole number",
    "optim: {train_steps: 99999999999999999999}": r"b\.yaml:1: optim\.train_steps: .* a whole number below 2\^63",
    f"optim: {{train_steps: {'9' * 5000}}}": r"b\.yaml:1: optim\.train_steps: '9{80}\.\.\. \(5,000 characters\)' .*",
    "checkpoint: {resume: null}": r"b\.yaml:1: checkpoint\.resume: null is not allowed; give true or false",
    "checkpoint: {keep: null}": r"b\.yaml:1: checkpoint\.keep: null .*",
    "checkpoint: {resume: 0}": r"b\.yaml:1: checkpoint\.resume: '0' .*",
    "optim:": r"b\.yaml:1: optim: null is not allowed; give a mapping of keys",
    "optim: a.yaml": r"b\.yaml:1: optim: 'a\.yaml' is not allowed; give a mapping of keys",
    "optim: [1]": r"b\.yaml:1: optim: \['1'\] is not allowed; .*",
    "optim: {lr: [1]}": r"b\.yaml:1: optim\.lr: \['1'\] is not allowed; .*",
    "data: {train: {prefix: a}}": r"b\.yaml:1: data\.train: .* is not allowed; give a list",
    "output_dir: ~": r"b\.yaml:1: output_dir: null .*",
    "output_dir: {a: b}": r"b\.yaml:1: output_dir: \{'a': 'b'\} is not allowed; give a text",
    'output_dir: "a\\ud800"': r"b\.yaml:1: output_dir: 'a\\ud800' is not allowed; give a text",
    "seed: !!int '3'": r"b\.yaml:1: seed: the tag 'tag:yaml\.org,2002:int' is not allowed; leave it out",
    "seed: !!python/object/apply:os.abort []": r"b\.yaml:1: seed: the tag .*os\.abort' is not allowed; leave it out",
    "optim: {class_path: a.b}": r"b\.yaml:1: optim\.class_path: unknown key; .*",
    "optim.lr: 2": r"b\.yaml:1: optim\.lr: unknown key; write optim: \{lr: \.\.\.\}",
    "optim: {lr: 1}\noptim.lr: 2": r"b\.yaml:2: optim\.lr: unknown key; write optim: \{lr: \.\.\.\}",
    "data: {train: [{prefix: a, prefix: b}]}": r"b\.yaml:1: data\.train\[0\]\.prefix: given twice, first on line 1; .*",
    "x: &x {lr: 1}\noptim: {<<: *x}": r"b\.yaml:1: x: unknown key; .*",
    "optim: {<<: 1}": r"b\.yaml:1: optim\.<<: only mappings can be merged; .*",
    "1: 2": r"b\.yaml:1: 1: unknown key; .*",
    "? [a]\n: 2": r"b\.yaml:1: a key that is a list or mapping is not allowed; give a name",
    "seed: 1\n---\nseed: 2": r"b\.yaml:2: not valid YAML: but found another document",
    "optim:\n\tlr: 1": r"b\.yaml:2: not valid YAML: found character .*",
    "# nothing": r"b\.yaml: holds nothing, not a mapping of keys; .*",
    "seed": r"b\.yaml: holds a text, not a mapping of keys; .*",
    "seed: 1\x07": r"b\.yaml:1: not valid YAML: the character U\+0007 is not allowed in it; remove it",
    'seed: "\\UFFFFFFFF"': r"b\.yaml(:1)?: not valid YAML: .*",
    f"seed: {'[' * 3000}{']' * 3000}": r"b\.yaml: not valid YAML: too many lists or mappings in one another",
    "seed: &a [*a]": r"b\.yaml: not valid YAML: too many .*",
    "a: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)): (
        r"b\.yaml: more than 100,000 values; write fewer aliases"
    ),
    f"# {'x' * 2**20}\nseed: 1": r"b\.yaml: 1,048,586 bytes is not allowed; a file of keys has at most 1,048,576",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:40].replace("\n", " "))
def test_a_value_of_another_type_is_one_line(tmp_path, text):
    with pytest.raises(UserError) as refused:
        parse(tmp_path, text)
    assert re.fullmatch(f"{re.escape(str(tmp_path))}/{REFUSED[text]}", str(refused.value)), refused.value


@pytest.mark.parametrize("text", [b"seed: \xe9", "seed: 1".encode("utf-16")], ids=["latin-1", "utf-16"])
def test_a_file_that_is_not_utf_8(tmp_path, text):
    with pytest.raises(UserError, match=r"b\.yaml: not valid YAML: not UTF-8 \(.*\); save it as UTF-8"):
        parse(tmp_path, text)


@pytest.mark.promise(
    text="A configuration runs no code: no text in a file or flag is imported, and tags are refused",
    expected="status 2, one line that names file, line and key",
)
def test_no_value_of_a_section_is_imported(tmp_path, monkeypatch, record_property):
    """jsonargparse, which read the files before, imported what a section's text named."""
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for argv in (["--optim", "hostile.Thing"], ["--optim", '{"class_path": "hostile.Thing"}']):
        with pytest.raises(UserError, match="optim"):
            parse(tmp_path, "seed: 1", *argv)
    with pytest.raises(UserError, match="optim: 'hostile") as refused:
        parse(tmp_path, "optim: hostile.Thing")
    record_property("seen", f"status {refused.value.status}: {str(refused.value).removeprefix(f'{tmp_path}/')}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed"], "--seed: expected one argument; give --seed VALUE"),
        (["--seed", "--output_dir", "x"], "--seed: expected one argument"),
        (["--seed="], "seed: '' is not allowed; give a whole number"),
        (["--sed=1"], r"--sed: unknown key; did you mean seed\?"),
        (["--seed=1", "2"], "unrecognized arguments: 2"),
        (["-s", "2"], "unrecognized arguments: -s"),
        (["--", "2"], "unrecognized arguments: --"),
        ([""], "unrecognized arguments: "),
        (["--config"], "--config: expected one argument"),
        (["--config="], "--config: '' is not allowed; name a path"),
        (["--config", "a\0b"], "--config: .* a path holds no control characters"),
        (["--config", "x" * 5000], "cannot be read"),
        (["--config", "/"], "/: cannot be read .*directory"),
        (["--config", "/dev/null"], "/dev/null: is not a regular file"),
        (["--config.x", "1"], "--config.x: unknown key"),
        (["--print_config=x"], "--print_config: unknown key"),
        (["--optim", "{lr: 1, lr: 2}"], "--optim:1: lr: given twice"),
        (["--optim", "[1]"], "optim: .* is not allowed; give a mapping"),
        (["--optim", "{train_step: 1}"], r"--optim.train_step: unknown key; did you mean optim.train_steps\?"),
        (["--data.train", "[{prefix: a"], "--data.train:1: not valid YAML"),
        (["--data.train", "a"], "data.train: 'a' is not allowed; give a list"),
        (["--data.train.prefix", "a"], "--data.train.prefix: unknown key"),
        (["--optim.lr.x", "a"], "--optim.lr.x: unknown key"),
        (["--output_dir", os.fsdecode(b"a\xff")], "not UTF-8"),
    ],
)
def test_a_wrong_flag_is_one_line(tmp_path, argv, message):
    with pytest.raises(UserError, match=message) as refused:
        parse(tmp_path, "seed: 1", *argv)
    assert "\n" not in str(refused.value)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is not a regular file"):
        parse(tmp_path, "seed: 1", "--config", str(tmp_path / "pipe"))


def test_printed_keys_can_be_read_again(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(tmp_path, "optim: {lr: 1e-05}\noutput_dir: '010'", "--print_config")
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "vocab_size: 64" in printed
    assert parse(tmp_path, printed) == parse(tmp_path, "optim: {lr: 1e-05}\noutput_dir: '010'")


@pytest.mark.promise(
    text="A key that is given twice in one file is refused, in lists and flags too",
    expected="status 2, one line with both line numbers",
)
def test_a_key_given_twice(tmp_path, record_property):
    with pytest.raises(UserError) as refused:
        parse(tmp_path, "optim: {lr: 1e-3}\nseed: 1\noptim: {train_steps: 5}\n")
    record_property("seen", f"status {refused.value.status}: {str(refused.value).removeprefix(f'{tmp_path}/')}")
    assert str(refused.value) == f"{tmp_path}/b.yaml:3: optim: given twice, first on line 1; remove one"
