"""Replay of a step: the same samples and numbers as in the run, and the place of the first NaN or inf."""

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from looplm import checkpoint
from looplm.cli import UserError
from looplm.config import RunConfig
from looplm.model import LoopLM
from pretrain.norms import LoopNorms
from tests.support.faulty import Fault, outcome, run_faulty, run_spoiled
from tests.support.tiny import TEXTS, run_config
from tools import replay

OPTIM = {"train_steps": 8, "warmup_steps": 0, "decay_steps": 0, "schedule": "constant"}


@pytest.fixture(scope="module")
def failed(corpus, tmp_path_factory, single_process) -> RunConfig:
    """Return a run that ends at step 5, the second whose gradient is not finite; it was saved after step 2."""
    changes = {"optim": OPTIM, "health": {"max_skipped": 1}, "checkpoint": {"save_every": 2, "keep": 9}}
    config = run_config(corpus, tmp_path_factory.mktemp("failed"), **changes)
    run_faulty(config, Fault(kind="gradient", steps=range(4, 9), loop=3, micro_batch=1))
    return config


def record(config: RunConfig) -> Path:
    return Path(config.output_dir) / "failures/step_00000005.json"


def replayed(*arguments: object) -> list[replay.Replayed]:
    """Run the command in this process, and return the results of its samples."""
    found = list[replay.Replayed]()
    compute = replay._compute
    keep = lambda *args: found.append(compute(*args)) or found[-1]  # type: ignore[func-returns-value]  # noqa: E731
    with mock.patch.object(replay, "_compute", keep):
        replay.main([str(argument) for argument in arguments])
    return found


@pytest.mark.slow
def test_the_samples_of_a_failed_step_have_the_run_s_numbers(failed, keep_process_groups, capsys):
    found, bad = replayed(record(failed)), json.loads(record(failed).read_text())
    tokens = torch.tensor([float(sample.tokens) for sample in found])
    losses_NR = torch.tensor([sample.loss_per_loop for sample in found])
    mean_R = (losses_NR * tokens[:, None]).sum(0) / tokens.sum()
    assert mean_R.tolist() == pytest.approx(bad["loss_per_loop"], rel=1e-5)
    rms = torch.tensor([sample.hidden_rms for sample in found]).square().mean(0).sqrt()
    assert rms.tolist() == pytest.approx(bad["hidden_rms"], rel=1e-5)
    shown = capsys.readouterr().out
    assert f"weights: {bad['weights']} (the step's own)" in shown and "sample 16  loss" in shown
    assert "all numbers of these 4 samples are finite here" in shown, "the fault was the run's own"
    texts = {text[:20] for text in TEXTS}
    lines = [eval(line.split(": ", 1)[1]) for line in shown.splitlines() if line.startswith("  positions ")]
    assert len(lines) > 4 and sum(line[:20] in texts for line in lines) > 2


@pytest.mark.slow
@pytest.mark.promise(
    text="tools.replay names the module, loop and position where the first NaN arises",
    expected="for each sample of the failed step",
)
def test_the_module_and_loop_of_a_fault_are_named(failed, keep_process_groups, capsys, record_property):
    real = LoopNorms.watch

    def watch(self: LoopNorms, loop: int, h_SBD: torch.Tensor) -> None:
        real(self, loop, h_SBD)
        if loop == 1:
            h_SBD.register_hook(lambda grad_SBD: grad_SBD.index_fill(0, torch.tensor(7), math.nan))

    with mock.patch.object(LoopNorms, "watch", watch):
        found = replayed(record(failed))
    last = "decoder.layers.1.mlp_bda.norm"  # its output's gradient is the first that the spoiled one flows into
    place = replay.Fault("gradient of the output", last, 2, 7)
    assert [sample.fault for sample in found] == [place] * 4
    line = next(line.strip() for line in capsys.readouterr().out.splitlines() if "NOT FINITE" in line)
    assert line.startswith(f"NOT FINITE, first: the gradient of the output of {last} in loop 2 at position 7, token ")
    record_property("seen", line.partition(", token")[0])


@pytest.mark.slow
def test_a_weight_that_is_not_finite_is_found_in_the_first_loop(failed, keep_process_groups, capsys):
    load = checkpoint.load_weights

    def spoiled(step: Path, model: LoopLM, *args: Any) -> Any:
        about = load(step, model, *args)
        with torch.no_grad():
            model.decoder.layers[1].mlp.linear_fc2.weight[0, 0] = math.inf
        return about

    with mock.patch.object(checkpoint, "load_weights", spoiled):
        found = replayed(failed.output_dir, "--step", 4)
    assert {sample.fault and sample.fault[:3] for sample in found} == {("output", "decoder.layers.1.mlp.linear_fc2", 1)}
    shown = capsys.readouterr().out
    assert "samples 12-15" in shown and "step_00000002 (1 steps before this one)" in shown
    assert "not finite in 4 of 4 samples: 12, 13, 14, 15" in shown


@pytest.mark.slow
def test_samples_after_a_rollback(corpus, tmp_path, single_process):
    """The step's samples are counted on from a checkpoint that knows of the skipped data."""
    health = {"spike_factor": 4.0, "spike_window": 8, "spike_steps": 2, "max_rollbacks": 1}
    optim = {**OPTIM, "train_steps": 20}
    config = run_config(corpus, tmp_path, optim=optim, health=health, checkpoint={"save_every": 4, "keep": 9})
    run_spoiled(config, range(48, 56))
    assert outcome(config)["error"] is None
    samples = {step: replay.find(replay.ReplayConfig(path=tmp_path, step=step)).samples for step in (1, 12, 18)}
    assert samples == {1: range(4), 12: range(44, 48), 18: range(76, 80)}, "8 samples were skipped before step 13"


def test_mistakes_are_named(failed, tmp_path):
    for text in ("", "{}", '{"step": 1, "samples": [1], "weights": null}', '{"step": "x"}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=r"a\.json: not a file about a failed step"):
            replay.main([str(tmp_path / "a.json")])
    with pytest.raises(UserError, match=r"--step: None is not a step of"):
        replay.main([failed.output_dir])
    with pytest.raises(UserError, match=r"config\.yaml: is missing; give a training directory"):
        replay.main([str(tmp_path), "--step", "3"])
