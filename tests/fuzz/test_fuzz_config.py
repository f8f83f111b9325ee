"""Fuzz the reading of configurations: YAML text, values in dicts, and the words of a command line."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.config import PipelineConfig
from looplm.binding import hints_of, section_of
from looplm.checkpoint import About
from looplm.cli import from_dict, parse_config, to_dict
from looplm.config import RunConfig
from looplm.evaluation.record import Evaluation
from looplm.inference import GenerationConfig
from tests.fuzz.mutate import HOSTILE, changed, edited, edits
from tests.fuzz.outcome import outcome

RUN: dict[str, Any] = {
    "output_dir": "out",
    "model": {"vocab_size": 64, "hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 2, "num_attention_heads": 4},
    "optim": {"train_steps": 10, "lr": 1e-3, "schedule": "wsd", "warmup_steps": 1},
    "data": {
        "train": [{"prefix": "a", "weight": 2}, {"prefix": "b"}],
        "valid": [{"prefix": "c"}],
        "seq_length": 32,
        "global_batch_size": 4,
        "rampup": {"start": 2, "increment": 2, "samples": 10},
    },
    "checkpoint": {"initial": "x", "resume": False},
    "parallel": {"tensor": 1, "pipeline": 1, "recompute": "none"},
    "health": {"spike_factor": 2.0},
    "seed": 1,
}
PIPELINE: dict[str, Any] = {
    "output_dir": "out",
    "sources": [
        {"name": "web", "kind": "jsonl", "paths": ["a/*.jsonl"], "filters": ["c4"], "limit": 3},
        {"name": "talk", "kind": "jsonl", "paths": ["b"], "chat": {"messages_key": "messages"}},
    ],
    "tokenizer": {"path": "tokenizer.json"},
    "dedup": {"exact": True, "ngram": 5},
    "executor": {"tasks": 2, "slurm": {"partition": "p", "time": "10:00:00"}},
    "validation_fraction": 0.1,
}
EVALUATION: dict[str, Any] = {
    "trained_loops": 1,
    "tokens": 8,
    "depths": [{"depth": 1, "loss": 1.0, "perplexity": 2.7, "accuracy": 0.5}],
    "exit_curve": [],
    "exit_distribution": [1.0],
}
ABOUT: dict[str, Any] = {
    **dict.fromkeys(("step", "samples", "tokens", "horizon_samples"), 1),
    **dict.fromkeys(("objective", "tokenizer_sha256", "data_order", "git_revision"), "x"),
    "gate_trained": True,
    "eos_ids": [1],
    "versions": {"torch": "2"},
}
CLASSES = {RunConfig: RUN, PipelineConfig: PIPELINE, GenerationConfig: {"stop": ["a"], "temperature": 0.5, "depth": 2}}


def names(cls: type) -> list[str]:
    """Return the name of every key of ``cls``."""
    found = []
    for name, hint in hints_of(cls).items():
        found += [name, *(names(inner) if (inner := section_of(hint)) else [])]
    return found


def parse(cls: type, argv: list[str]) -> Any:
    """Return what the command reads, or None if it prints help or the keys."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            return parse_config(cls, argv, prog="p", description="d")
        except SystemExit as ended:
            assert ended.code == 0 and printed.getvalue()
            return None


def check_round_trip(found: Any) -> None:
    """Assert that a config is the same after it was saved and read again."""
    if found is not None:
        values = yaml.safe_load(yaml.safe_dump(to_dict(found)))
        assert from_dict(type(found), values, where="here") == found


@given(case=st.sampled_from(list(CLASSES)).flatmap(lambda cls: st.tuples(st.just(cls), changed(CLASSES[cls]))))
@example(case=(RunConfig, {**RUN, "seed": 10**400}))
@example(case=(RunConfig, {**RUN, "optim": "os.path"}))
@example(case=(RunConfig, {**RUN, "\nerror: ": None}))
@example(case=(RunConfig, {**RUN, "parallel": {"tensor": 2**31}}))
@example(case=(RunConfig, {**RUN, "parallel": {"pipeline": 2**31, "first_stage_layers": 1}}))
def test_values(case: tuple[type, Any]) -> None:
    cls, values = case
    found: Any = outcome(lambda: from_dict(cls, values, where="here"), ["here"])
    assert found is None or isinstance(found, cls)


@given(values=changed(EVALUATION), about=changed(ABOUT))
def test_values_of_files(values: Any, about: Any) -> None:
    outcome(lambda: from_dict(Evaluation, values, where="here"), ["here"])
    outcome(lambda: from_dict(About, about, where="here"), ["here"])


@given(case=st.sampled_from(list(CLASSES)).flatmap(lambda cls: st.tuples(st.just(cls), changed(CLASSES[cls]))))
def test_files_of_changed_values(case: tuple[type, Any], tmp_path: Path) -> None:
    cls, values = case
    path = tmp_path / "a.yaml"
    try:
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
    except (yaml.YAMLError, ValueError):
        return
    check_round_trip(outcome(lambda: parse(cls, ["--config", str(path)]), [path, *names(cls)]))


TEXT = yaml.safe_dump(RUN).encode()
TEXTS = [TEXT, yaml.safe_dump(RUN, default_flow_style=True).encode(), b"a: &a {lr: 1}\noptim: {<<: *a, <<: [*a, *a]}\n"]


@given(content=st.one_of(st.builds(edited, st.sampled_from(TEXTS), edits), st.binary(max_size=200)))
@example(content=b'output_dir: "\\UFFFFFFFF"')
@example(content=b"a: &a [*a]")
@example(content=b"[" * 5000)
def test_bytes_of_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    check_round_trip(outcome(lambda: parse(RunConfig, ["--config", str(path)]), [path, *names(RunConfig)]))


WORDS = [f"--{name}" for name in ("seed", "optim.lr", "data.train", "model", "data.rampup", "data.rampup.start", "x")]
word = st.one_of(
    st.sampled_from([*WORDS, "--config", "--print_config", "--", "-h", "--optim.lr=", "[{prefix: a}]", "{lr: 1}", "1"]),
    st.sampled_from([str(value) for value in HOSTILE]),
    st.builds("{}={}".format, st.sampled_from(WORDS), st.text(max_size=10)),
    st.text(max_size=10),
)


@given(words=st.lists(word, max_size=6))
@example(words=["--optim", "os.path"])
@example(words=["\ud800"])
@example(words=["--config", "a\0b"])
def test_command_lines(words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(TEXT)
    words = [os.fsdecode(word.encode("utf-8", "surrogatepass")) for word in words]  # as an argument reaches us
    argv = ["--config", str(path), *words]
    check_round_trip(
        outcome(
            lambda: parse(RunConfig, argv),
            ["--", "argument", "cannot be read", *filter(None, words), *names(RunConfig)],
        )
    )
