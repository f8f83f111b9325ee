"""Configuration: typed, stacked, validated; every mistake is one line that names key, value and fix."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from looplm.cli import from_dict, parse_config, to_dict
from looplm.config import DataConfig, RunConfig, SumsConfig, TaskConfig
from looplm.failures import UserError
from tests.support.tiny import run_config

BASE = {
    "output_dir": "run",
    "model": {
        "vocab_size": 64,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_layers": 2,
        "num_attention_heads": 4,
    },
    "optim": {"train_steps": 10},
    "data": {"train": [{"prefix": "a", "weight": 2}]},
}


def parse(tmp_path: Path, *argv: str, text: str | None = None) -> RunConfig:
    path = tmp_path / "base.yaml"
    path.write_text(text if text is not None else yaml.safe_dump(BASE))
    return parse_config(RunConfig, ["--config", str(path), *argv], prog="prog", description="words")


def test_files_stack_and_the_command_line_wins(tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("model: {num_loops: 8, num_layers: 3}\n")
    config = parse(tmp_path, "--config", str(second), "--model.num_loops", "2")
    assert (config.model.num_loops, config.model.num_layers, config.model.hidden_size) == (2, 3, 32)
    assert config.data.train[0].weight == 2


def test_round_trip_through_plain_values(tmp_path):
    config = run_config(tmp_path, tmp_path)
    assert from_dict(RunConfig, yaml.safe_load(yaml.safe_dump(to_dict(config))), where="here") == config


NO_SPIKES = r"is not allowed; without health\.spike_factor none is looked for; give that too"
MISTAKES = {
    ("--model.num_lops", "3"): r"--model\.num_lops: unknown key; did you mean model\.num_loops\?",
    ("--model.num_loops", "three"): r"model\.num_loops: .*three",
    ("--model.num_loops", "0"): r"model\.num_loops: 0 is not allowed; give a number above 0",
    ("--model.attention", "mqa"): r"model\.attention: .*mqa",
    ("--model.attention", "mha", "--model.num_attention_heads", "5"): r"model\.num_attention_heads: 5 .*hidden_size=32",
    ("--model.attention", "mha", "--model.num_query_groups", "3"): r"model\.num_query_groups: 3 .*multiple",
    ("--model.head_dim", "8"): r"model\.head_dim: 8 .*mha",
    ("--model.attention", "mha", "--model.latent_iterations", "2"): r"model\.latent_iterations: 2 .*mla",
    ("--model.latent_halting", "true"): r"model\.latent_halting: True .*latent_iterations=0",
    ("--model.qk_rope_head_dim", "7"): r"model\.qk_rope_head_dim: 7 .*even",
    ("--logging.dynamics_samples", "65"): r"logging\.dynamics_samples: 65 .*at most logging\.eval_samples=64",
    ("--logging.dynamics_samples", "8", "--parallel.tensor", "2"): r"logging\.dynamics_samples: 8 .*whole model",
    ("--logging.dynamics_samples", "8", "--logging.eval_every", "5"): r"logging\.dynamics_samples: 8 .*data\.valid",
    (
        *("--loss.loop_onset", "0.5", "--health.spike_factor", "8"),
    ): r"health\.spike_factor: 8\.0 .*different numbers of loops",
    ("--gate.kind", "linear", "--gate.sequence_level", "true"): r"gate\.sequence_level: True .*lru",
    ("--loss.beta", "-1"): r"loss\.beta: -1\.0 ",
    ("--loss.geometric_rate", "1"): r"loss\.geometric_rate: 1\.0 ",
    ("--loss.prior", "given"): r"loss\.prior_shares: \(\) .*loss\.prior=given",
    ("--loss.prior", "given", "--loss.prior_shares", "[1, 2]"): r"loss\.prior_shares: \(1\.0, 2\.0\) .*num_loops=",
    ("--loss.weights", "last", "--loss.prior", "geometric"): r"loss\.prior: 'geometric' .*loss\.weights=gate",
    ("--loss.weights", "last", "--loss.ponder_cost", "1"): r"loss\.ponder_cost: 1\.0 .*loss\.weights=gate",
    ("--loss.weights", "last", "--loss.regularizer", "batch"): r"loss\.regularizer: 'batch' .*loss\.weights=gate",
    ("--loss.weights", "last", "--loss.backward_loops", "2"): (
        r"^loss\.backward_loops: 2 is not allowed; with loss\.weights=last no gradient would reach the embedding; take "
        r"uniform or gate, or a model\.injection$"
    ),
    ("--model.sandwich_norm", "false", "--model.residual_gain", "loops"): r"model\.residual_gain: 'loops' .*sandwich",
    ("--loss.objective", "adaptive_gate"): r"checkpoint\.initial: None .*stage-1 directory",
    ("--optim.min_lr", "1"): r"optim\.min_lr: 1\.0 .*optim\.lr=0\.0003",
    ("--optim.warmup_steps", "11"): r"optim\.warmup_steps: 11 .*optim\.train_steps=10",
    ("--optim.schedule", "cosine", "--optim.decay_steps", "3"): r"optim\.decay_steps: 3 .*wsd",
    ("--optim.schedule", "constant", "--optim.min_lr", "1e-4"): (
        r"^optim\.min_lr: 0\.0001 is not allowed; with optim\.schedule=constant and optim\.decay_steps=0 the rate "
        r"never falls; leave it 0$"
    ),
    ("--health.spike_window", "8"): rf"^health\.spike_window: 8 {NO_SPIKES}$",
    ("--health.spike_steps", "2"): rf"^health\.spike_steps: 2 {NO_SPIKES}$",
    ("--optim.beta2", "1"): r"optim\.beta2: 1\.0 ",
    ("--data.global_batch_size=3", "--data.micro_batch_size", "2"): r"data\.global_batch_size: 3 .*micro_batch_size=2",
    ("--data.seq_length", "9999"): r"data\.seq_length: 9999 .*max_sequence_length=4096",
    ("--data.train", "[]"): r"data\.train: \[\] .*at least one source",
    ("--data.train", "[{prefix: a, weight: 0}]"): r"data source\.weight: 0\.0 ",
    ("--data.rampup", "{start: 8, increment: 1, samples: 4}"): r"data\.rampup\.start: 8 .*global_batch_size=1",
    ("--checkpoint.keep", "0"): r"checkpoint\.keep: 0 .*at least 1",
    ("--seed", "-1"): r"seed: -1 ",
}


@pytest.mark.parametrize("argv", MISTAKES, ids=lambda argv: " ".join(argv))
def test_a_mistake_is_one_line(tmp_path, argv):
    with pytest.raises(UserError, match=MISTAKES[argv]) as caught:
        parse(tmp_path, *argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("document_masking", False), ("horizon_samples", 8), ("cache_dir", "c")])
def test_a_task_has_no_keys_of_text(key, value):
    with pytest.raises(UserError) as refused:
        DataConfig(task=TaskConfig(sums=SumsConfig()), **{key: value})
    fix = "a task has no documents, passes or indices; leave it out"
    assert str(refused.value) == f"data.{key}: {value!r} is not allowed; {fix}"


FILES = {
    "model: {num_lops: 3}": r"base\.yaml:1: model\.num_lops: unknown key; did you mean model\.num_loops\?",
    "data: {train: [{prefx: a}]}": r"base\.yaml:1: data\.train\[0\]\.prefx: unknown key; did you mean .*prefix\?",
    "modle: {}": r"base\.yaml:1: modle: unknown key; did you mean model\?",
    "- 1": r"base\.yaml: holds a list, not a mapping",
    "model: {": r"base\.yaml:1: not valid YAML",
    "": r"base\.yaml: holds nothing",
}


@pytest.mark.parametrize("text", FILES)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text):
    with pytest.raises(UserError, match=FILES[text]) as caught:
        parse(tmp_path, text=text)
    assert "\n" not in str(caught.value)


def test_a_key_of_an_earlier_release_is_named_and_has_no_effect(tmp_path, capsys, monkeypatch):
    old, text = ["--loss.head_chunk_tokens", "64"], "loss:\n  head_recompute: false\n" + yaml.safe_dump(BASE)
    plain, found = parse(tmp_path), parse(tmp_path, *old, text=text)
    assert found == plain
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2 and str(tmp_path / "base.yaml:2: loss.head_recompute: has no effect; ") in shown[0]
    assert shown[1].startswith("--loss.head_chunk_tokens: has no effect; ")
    stored = to_dict(plain)
    stored["loss"] |= {"head_recompute": False, "head_chunk_tokens": 64}
    assert from_dict(RunConfig, stored, where="a checkpoint") == plain
    monkeypatch.setenv("RANK", "1")
    parse(tmp_path, *old)
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match=r"loss\.head_recompte: unknown key"):
        parse(tmp_path, "--loss.head_recompte", "1")


def test_a_missing_file_and_missing_keys(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read"):
        parse_config(RunConfig, ["--config", str(tmp_path / "nowhere.yaml")], prog="p", description="d")
    with pytest.raises(UserError, match=r"model\.vocab_size.*required"):
        parse_config(RunConfig, ["--output_dir", "x"], prog="p", description="d")


@pytest.mark.slow
def test_help_teaches_and_the_exit_status_is_2(tmp_path):
    command = [sys.executable, "-m", "tools.count_params"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "how often the stack runs in training" in " ".join(shown.stdout.split())
    wrong = subprocess.run([*command, "--config", "nowhere.yaml"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: nowhere.yaml: cannot be read")
