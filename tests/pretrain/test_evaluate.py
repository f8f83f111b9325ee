"""Evaluation per depth: the table and the exit curve, against slow loops over the reference."""

import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.manifest import read_manifest
from looplm import checkpoint, reference
from looplm.checkpoint import step_folder
from looplm.config import TaskConfig, WordProblemConfig
from looplm.evaluation.depth import DepthMeter
from looplm.failures import UserError
from looplm.megatron import process_groups
from pretrain.data import Batch, build_valid_set, check_corpus, index_cache, micro_batches
from pretrain.evaluate import THRESHOLDS, _index_folder, _measure_decoding, main
from pretrain.evaluation_run import EvaluateConfig, data_read, validation_run
from pretrain.train import train
from tests.support.tiny import run_config


def test_meter_equals_a_slow_loop(single_process):
    torch.manual_seed(0)
    loss, logit = torch.rand(5, 6, 2), torch.randn(5, 6, 2)
    mask = (torch.rand(6, 2) > 0.3).float()
    thresholds = [0.2, 0.7, 1.0]
    meter = DepthMeter([1, 3, 5], 3, thresholds)
    for half in (slice(0, 3), slice(3, 6)):
        meter.add(loss[:, half], logit[:, half], mask[half])
    measured = meter.evaluation(single_process.dp)

    p = reference.exit_distribution(logit[:3])
    kept = [(s, b) for s in range(6) for b in range(2) if mask[s, b]]
    for row, depth in zip(measured.depths, (1, 3, 5), strict=True):
        expected = sum(loss[depth - 1, s, b].item() for s, b in kept) / len(kept)
        assert row.depth == depth and row.loss == pytest.approx(expected, rel=1e-6)
        assert row.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    for exit_row, threshold in zip(measured.exit_curve, thresholds, strict=True):
        depths = {}
        for s, b in kept:
            total = 0.0
            for depth in range(1, 4):
                total += p[depth - 1, s, b].item()
                if total >= threshold - 1e-9 or depth == 3:
                    depths[s, b] = depth
                    break
        assert exit_row.mean_depth == pytest.approx(sum(depths.values()) / len(kept), rel=1e-6)
        expected = sum(loss[depth - 1, s, b].item() for (s, b), depth in depths.items()) / len(kept)
        assert exit_row.loss == pytest.approx(expected, rel=1e-6)
    assert sum(measured.exit_distribution) == pytest.approx(1)


@pytest.mark.slow
def test_command_measures_a_checkpoint_beyond_its_depth(corpus, tmp_path, single_process, monkeypatch, capsys):
    config = run_config(corpus, tmp_path / "run")
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    monkeypatch.setattr(process_groups, "stop", lambda: None)  # the test session still needs its process groups
    arguments = ["--checkpoint", str(tmp_path / "run"), "--depths", "1,3,5", "--samples", "6", "--batch_size", "2"]
    decoding = ["--kv_caches=per_loop,last", "--prompt_tokens=6", "--exit_signal=confidence", "--exit_thresholds=0.5,1"]
    main([*arguments, *decoding])
    report = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert report["step"] == 6 and report["trained_loops"] == 3
    assert [row["depth"] for row in report["depths"]] == [1, 3, 5]
    assert [row["threshold"] for row in report["exit_curve"]] == THRESHOLDS
    printed = capsys.readouterr().out
    assert "beyond training" in printed and "  per_loop " in printed
    rows = report["decoding"]
    assert f"{rows[0]['mean_depth']:>11.2f} {rows[0]['tokens']:>9,}\n" in printed
    assert [(row["kv_cache"], row["exit_threshold"]) for row in rows] == [
        ("per_loop", 0.5),
        ("per_loop", 1.0),
        ("last", 0.5),
        ("last", 1.0),
    ]
    assert all(0 < row["tokens"] < report["tokens"] and 1 <= row["mean_depth"] <= 3 for row in rows)
    assert rows[1]["mean_depth"] == rows[3]["mean_depth"] == 3, "threshold 1 is full depth"
    assert abs(rows[1]["loss"] - report["depths"][1]["loss"]) < 0.5, "the same samples except their first tokens"

    depths = dict[str, Any]()
    for name in ("valid", "train"):
        output = tmp_path / f"on_{name}.json"
        main([*arguments, "--valid", str(corpus / name), "--output", str(output)])
        depths[name] = json.loads(output.read_text())["depths"]
    assert depths["valid"] == report["depths"] and depths["train"] != depths["valid"]

    held = (read_manifest(corpus / "valid").tokens - 1) // 32
    capsys.readouterr()
    main([*arguments, "--samples=1000", f"--output={tmp_path / 'all.json'}"])
    line = f"samples: 1000 becomes {held // 2 * 2}, because {held} samples read all of {corpus / 'valid'}\n"
    assert capsys.readouterr().out.startswith(line)
    assert json.loads((tmp_path / "all.json").read_text())["tokens"] < 32 * held
    fix = f"{held} samples read all of {corpus / 'valid'}, and 1 ranks read that many each; give fewer"
    with pytest.raises(UserError, match=f"^{re.escape(f'batch_size: 500 is not allowed; {fix}')}$"):
        main([*arguments, "--samples=1000", "--batch_size=500"])
    with pytest.raises(UserError, match="prompt_tokens: 32"):  # leaves no token to measure
        main([*arguments, "--kv_caches=last", "--prompt_tokens=32"])
    untrained = dataclasses.replace(
        checkpoint.read_about(step_folder.locate(str(tmp_path / "run"))), gate_trained=False
    )
    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"exit_thresholds: '0.5'.*never trained"):
        patched.setattr(checkpoint, "read_about", lambda step: untrained)
        main([*arguments, "--kv_caches=last", "--prompt_tokens=6", "--exit_thresholds=0.5"])

    opened = checkpoint.open_model(str(tmp_path / "run"), single_process)
    weights = dict(opened.model.named_parameters())
    total, tokens = torch.zeros(5), 0.0
    found = check_corpus(config.data, config.model.vocab_size)
    valid_set = build_valid_set(config.data, found, 6, config.seed, index_cache(config))
    assert valid_set is not None
    batches = micro_batches(valid_set, config.data, 0, 0, 1)
    for _ in range(3):
        batch = next(batches)
        model, gate = opened.model.model_config, opened.gate
        output = reference.forward(weights, model, gate, batch.ids_BS, 5, batch.document_start_SB)
        for loop, hidden in enumerate(output.hidden):
            losses = reference.token_losses(hidden, reference.head_weight(weights, model), batch.labels_SB)
            total[loop] += (losses * batch.mask_SB).sum().item()
        tokens += batch.mask_SB.sum().item()
    assert report["tokens"] == tokens
    for row in report["depths"]:
        assert row["loss"] == pytest.approx(total[row["depth"] - 1].item() / tokens, rel=1e-4)
    full = report["exit_curve"][-1]
    assert full["threshold"] == 1.0 and full["mean_depth"] == pytest.approx(3)
    assert full["loss"] == pytest.approx(report["depths"][1]["loss"])

    shutil.rmtree(tmp_path / "run/index_cache")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(moved)
    main(["--checkpoint", ".", *arguments[2:]])
    again = json.loads((moved / "evaluation.json").read_text())
    assert again["checkpoint"] == str(moved / "checkpoints/step_00000006") and again["data"] == [str(corpus / "valid")]
    assert (moved / "index_cache").is_dir() and not (tmp_path / "run").exists()


def test_sample_indices_are_kept_where_the_checkpoint_is_now(tmp_path, monkeypatch):
    weights, step = tmp_path / "weights", tmp_path / "run/checkpoints/step_00000006"
    assert _index_folder(weights, None) == weights and _index_folder(step, None) == tmp_path / "run"
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "run")
    assert _index_folder(step, "there/result.json") == Path("there")
    assert _index_folder(weights, "there/result.json") == weights


def test_an_evaluation_knows_its_data_and_writes_where_it_is_told(corpus, tmp_path):
    trained = run_config(corpus, tmp_path / "run", data={"cache_dir": "elsewhere"})
    stored = checkpoint.ModelDescription(trained.model, trained.gate)
    config = EvaluateConfig(checkpoint="x")
    run = validation_run(config, trained, stored, str(tmp_path / "moved"))
    assert index_cache(run) == tmp_path / "moved/index_cache"
    assert data_read(config, run) == (str(corpus / "valid"),)
    task = EvaluateConfig(checkpoint="x", task=TaskConfig(word_problem=WordProblemConfig(group="S3")), split="test")
    assert data_read(task, validation_run(task, trained, stored, "x")) == ("word_problem (test)",)


OTHER_DATA = "is not allowed; evaluation.json is about the checkpoint's own data; name another file in output"
UNDECODED = "is not allowed; it has no effect without kv_caches; give that too"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--checkpoint", "x", "--valid", "y"], f"^valid: 'y' {OTHER_DATA}$"),
        (["--checkpoint", "x", "--task.p_hop.hops=[1]"], f"^task: 'p_hop' {OTHER_DATA}$"),
        (["--checkpoint", "x", "--exit_thresholds", "0.5"], f"^exit_thresholds: '0.5' {UNDECODED}$"),
        (["--checkpoint", "x", "--exit_signal", "entropy"], f"^exit_signal: 'entropy' {UNDECODED}$"),
        (["--checkpoint", "x", "--prompt_tokens", "9"], f"^prompt_tokens: 9 {UNDECODED}$"),
        (["--checkpoint", "nowhere"], "nowhere: no whole checkpoint"),
        (["--checkpoint", "x", "--depths", "0,1"], "depths: '0,1'"),
        (["--checkpoint", "x", "--depths", ""], "depths: ''"),
        (["--checkpoint", "x", "--depths", "1,10001"], "'1,10001' is not allowed; give whole numbers from 1 to 10,000"),
        (["--checkpoint", "x", "--votes", "1,1001"], "'1,1001' is not allowed; give whole numbers from 1 to 1,000,"),
        (["--checkpoint", "x", "--votes", "none"], "votes: 'none' is not allowed"),
        (["--checkpoint", "x", "--samples", "0"], "samples: 0"),
        (["--checkpoint", "x", "--samples", "6"], "samples: 6 is not allowed; each forward pass reads batch_size=4"),
        (["--checkpoint", "x", "--depths", "²"], "depths: '²'"),
        (["--checkpoint", "x", "--kv_caches", "last,lost"], "kv_caches: 'last,lost'"),
        (["--checkpoint", "x", "--exit_thresholds", "0.5,2"], "exit_thresholds: '0.5,2'"),
        (["--checkpoint", "x", "--exit_thresholds", "high"], "exit_thresholds: 'high'"),
        (["--checkpoint", "x", "--prompt_tokens", "0"], "prompt_tokens: 0"),
        (["--checkpont", "x"], r"--checkpont: unknown key; did you mean checkpoint\?"),
    ],
)
def test_invalid_arguments(argv, words):
    with pytest.raises(UserError, match=words):
        main(argv)


@pytest.mark.parametrize("counted", [4, 0])
def test_decoding_needs_a_document_that_is_longer_than_the_prompt(counted, single_process):
    """Of two documents of 4 tokens in a sample of 8."""
    start_SB = torch.tensor([[0]] * 4 + [[4]] * 4)
    batch = Batch(torch.zeros(1, 8), torch.zeros(8, 1), torch.full((8, 1), float(counted > 0)), start_SB)
    config = EvaluateConfig(checkpoint="x", kv_caches="last", prompt_tokens=4)
    fix = f"no document has a token to measure behind its first {counted}; give fewer"
    with pytest.raises(UserError, match=f"^prompt_tokens: 4 is not allowed; {fix}$"):
        _measure_decoding(None, [batch], config, single_process)  # type: ignore[arg-type]
