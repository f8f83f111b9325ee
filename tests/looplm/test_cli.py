"""The command line: positionals, switches, subcommands, --help, and the origin of wrong values."""

import ast
import errno
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from looplm import cli
from looplm.bounds import check_bounds, positive
from looplm.cli import _path_failure, from_dict, parse_command, parse_config, positional, run_main, switch
from looplm.config import GateConfig, RunConfig
from looplm.failures import UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check token files.

    Read their manifests.

    Args:
        prefix: paths without a suffix.
        deep: read everything.
        limit: how many files.
    """

    prefix: tuple[str, ...] = positional("PREFIX")
    deep: bool = switch()
    limit: int = positive(3)

    def __post_init__(self) -> None:
        check_bounds(self, "")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw a run.

    Args:
        run: a directory.
        output: a file.
    """

    run: Path = positional("RUN_DIR")
    output: Path | None = None


def verify(*argv: str) -> Verify:
    return parse_config(Verify, argv, prog="python -m verify", description="About.")


def command(*argv: str) -> tuple[str, object]:
    return parse_command({"verify": Verify, "report": Report}, argv, prog="python -m x", description="Two things.")


def test_positionals_and_switches_may_be_in_any_order():
    assert verify("a") == Verify(prefix=("a",))
    assert verify("--deep", "a", "b", "--limit", "4") == verify("a", "b", "--limit=4", "--deep")
    assert verify("a", "--deep") == Verify(prefix=("a",), deep=True, limit=3)


def test_a_subcommand_has_its_own_config():
    assert command("verify", "a", "--deep") == ("verify", Verify(prefix=("a",), deep=True))
    assert command("report", "a", "--output=b") == ("report", Report(run=Path("a"), output=Path("b")))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["verify"], "prefix: required and not given"),
        (["verify", "a", "--limit", "x"], "limit: 'x' is not allowed; give a whole number"),
        (["verify", "a", "--limit", "0"], "limit: 0 is not allowed; give a number above 0"),
        (["verify", "a", "--dep"], r"--dep: unknown key; did you mean deep\?"),
        (["report", "a", "b"], "unrecognized arguments: b"),
        (["verfy", "a"], r"python -m x: verfy: unknown command; did you mean verify\?"),
        ([], "python -m x: no command: unknown command; give one of verify, report"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(argv, message, monkeypatch, capsys):
    with pytest.raises(UserError, match=message):
        command(*argv)
    monkeypatch.setattr("sys.argv", ["x", *argv])
    with pytest.raises(SystemExit) as ended:
        run_main(lambda argv: print(command(*argv)))
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("rank", "local_rank", "joined", "printed"),
    [
        ("0", "0", False, "error: x: missing\n"),
        ("8", "0", False, "error: rank 8: x: missing\n"),
        ("9", "1", False, ""),
        ("0", "0", True, "error: x: missing\n"),
        ("8", "0", True, ""),
    ],
)
def test_the_first_rank_of_each_node_prints_a_mistake_before_the_ranks_have_joined(
    rank: str, local_rank: str, joined: bool, printed: str, monkeypatch, capsys
):
    def fail(_: list[str]) -> None:
        raise UserError("x: missing")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr("sys.argv", ["x"])
    monkeypatch.setattr(cli, "_has_joined", lambda: joined)
    with pytest.raises(SystemExit) as ended:
        run_main(fail)
    assert (ended.value.code, capsys.readouterr().err) == (2, printed)


@pytest.mark.slow
def test_data_that_one_node_lacks_is_named_by_its_first_rank(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: {tmp_path}/run\n"
        "model: {vocab_size: 320, hidden_size: 32, ffn_hidden_size: 48, num_layers: 2, num_attention_heads: 2}\n"
        "optim: {train_steps: 1, warmup_steps: 0, decay_steps: 0, precision: fp32}\n"
        f"data: {{train: [{{prefix: {tmp_path}/no}}], seq_length: 32, micro_batch_size: 1, global_batch_size: 16}}\n"
    )
    variables = {"RANK": "8", "WORLD_SIZE": "16", "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "pretrain.train", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: rank 8: {tmp_path}/no.manifest.json: cannot be read")


@pytest.mark.slow
def test_a_job_that_was_left_is_remembered():
    """Torch keeps no public trace of a job that its process has left."""
    code = (
        "from looplm import cli; assert not cli._has_joined()\n"
        "import torch.distributed as dist; assert not cli._has_joined()\n"
        "from looplm.megatron import process_groups\n"
        "process_groups.start(0); assert cli._has_joined()\n"
        "process_groups.stop(); assert not dist.is_initialized() and cli._has_joined()"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stderr[-2000:]


def test_ctrl_c_is_one_line_and_exit_status_130(monkeypatch, capsys):
    """A signal itself would not do: a job in the background ignores SIGINT."""

    def interrupted(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as ended:
        run_main(interrupted)
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted by Ctrl-C\n")


@pytest.mark.slow
@pytest.mark.parametrize("long", ["[print('x') for _ in range(99_999)]", "sys.exit(print('x'))"])
def test_a_closed_pipe_ends_a_command_without_a_word(long):
    """As ``| head`` does, early in a long output or before a short one was flushed."""
    code = f"import sys; from looplm.cli import run_main; run_main(lambda _: ({long}) and None)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (141, b"")


@pytest.mark.slow
def test_another_broken_pipe_is_no_closed_output():
    code = "from looplm.cli import run_main\ndef main(_): raise BrokenPipeError(32, 'a socket')\nrun_main(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "a socket" in done.stderr


def help_text(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        command(*argv)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_lists_the_subcommands_and_each_shows_its_own(capsys):
    overview = help_text(capsys, "--help")
    assert overview.startswith("usage: python -m x COMMAND [--KEY VALUE]...\n\nTwo things.\n")
    assert "  verify      Check token files.\n  report      Draw a run.\n" in overview
    own = help_text(capsys, "verify", "--help")
    usage = "usage: python -m x verify PREFIX... [--config FILE]... [--KEY VALUE]...\n"
    assert own.startswith(f"{usage}\nCheck token files.\n\nRead their manifests.\n")
    assert "read everything." in own and "(type: int, default: 3)" in own


def test_help_shows_usage_then_examples_then_keys_by_section(capsys):
    examples = "    python -m train --config a.yaml\n    python -m train --config a.yaml --model.num_loops 8"
    with pytest.raises(SystemExit):
        parse_config(RunConfig, ["--help"], prog="python -m train", description=f"Train.\n\n{examples}\n")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: python -m train [--config FILE]... [--KEY VALUE]..."
    assert lines[1:6] == ["", "Train.", "", *examples.splitlines()]
    sections = [lines.index(f"{section}:") for section in ("the looped transformer", "optimizer, schedule, precision")]
    keys = [lines.index(f"  --{key}") for key in ("model.num_loops", "optim.lr")]
    assert sections[0] < keys[0] < sections[1] < keys[1]
    assert "learning rate after warm-up. (type: float, default: 0.0003)" in " ".join(" ".join(lines).split())


BASE = """output_dir: run
model: {vocab_size: 64, hidden_size: 32, ffn_hidden_size: 48, num_layers: 2, num_attention_heads: 4}
optim:
  train_steps: 10
data:
  train:
    - {prefix: a, weight: 2}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lr_: 1\n", r"b\.yaml:2: optim\.lr_: unknown key; did you mean optim\.lr\?"),
        ("data:\n  train:\n  - prefix: a\n    wight: 1\n", r"b\.yaml:4: data\.train\[0\]\.wight: unknown key; did .*"),
        ("optim:\n  lr: fast\n", r"b\.yaml:2: optim\.lr: 'fast' is not allowed; give a finite number"),
        ("optim:\n\n  lr: 0\n", r"b\.yaml:3: optim\.lr: 0\.0 is not allowed; give a number above 0"),
        ("model: {num_loops: 0}", r"b\.yaml:1: model\.num_loops: 0 is not allowed.*"),
        ("seed: 1\nmodel: {num_loops: 3}\nseed: 2\n", r"b\.yaml:3: seed: given twice, first on line 1; remove one"),
        ("optim:\n  lr: 1.0\n  lr: 2.0\n", r"b\.yaml:3: optim\.lr: given twice, first on line 2; remove one"),
        ("a: 1\nb: {\n", r"b\.yaml:3: not valid YAML: .*"),
    ],
)
def test_a_mistake_in_a_file_names_file_and_line(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(BASE)
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        parse_run(tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert re.fullmatch(rf"{tmp_path}/{message}", str(refused.value)), refused.value


def parse_run(*files: Path, argv: tuple[str, ...] = ()) -> RunConfig:
    flags = [word for path in files for word in ("--config", str(path))]
    return parse_config(RunConfig, [*flags, *argv], prog="p", description="")


def test_an_error_names_the_line_of_the_value_in_effect(tmp_path):
    base, first, second = (tmp_path / name for name in ("a.yaml", "b.yaml", "c.yaml"))
    base.write_text(BASE)
    first.write_text("model: {num_loops: 0}")
    second.write_text("\nmodel:\n  num_loops: -1\n")
    with pytest.raises(UserError, match=r"c\.yaml:3: model\.num_loops: -1 is"):
        parse_run(base, first, second)
    with pytest.raises(UserError, match=r"^model\.num_loops: -2 is"):
        parse_run(base, first, argv=("--model.num_loops=-2",))
    assert parse_run(base, first, argv=("--model.num_loops", "2")).model.num_loops == 2


COMMANDS = [
    path
    for package in ("data_pipeline", "looplm", "pretrain", "tools")
    for path in sorted((ROOT / package).rglob("*.py"))
    if "\n    run_main(" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_commands_help_shows_an_example(path):
    """A command's help begins with its module's docstring."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert re.search(rf"-m {re.escape(module)}\b", text)


def test_a_path_that_may_not_be_read_is_a_mistake_of_one_line() -> None:
    failure = _path_failure(PermissionError(errno.EACCES, "Permission denied", "runs/theirs"))
    assert str(failure) == "runs/theirs: Permission denied; give another path, or change its permissions"


@pytest.mark.parametrize("values", ["vocab_size", ["a"], None, 3])
def test_a_section_that_is_no_mapping_is_refused(values):
    with pytest.raises(UserError, match=r"^config\.yaml: .+ stands where the keys of GateConfig belong; restore"):
        from_dict(GateConfig, values, where="config.yaml")
