"""Steps whose losses or gradients are not finite, on one rank or on several."""

import dataclasses
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from looplm import checkpoint
from looplm.checkpoint import Health, step_folder
from looplm.cli import run_main, to_dict
from looplm.config import LossConfig, ParallelConfig, RunConfig
from looplm.failures import NumericalFailure
from pretrain.data import check_corpus
from pretrain.health import finite_or_null, require_finite
from pretrain.run import build
from pretrain.train import main, train
from pretrain.trainer import Step, Trainer
from tests.support.faulty import Fault, injected, outcome, run_faulty
from tests.support.launch import SERVER, launch
from tests.support.tiny import run_config, train_rows

TWELVE = {"train_steps": 12, "warmup_steps": 2, "decay_steps": 0, "schedule": "constant"}
LAST_NORM = "decoder.final_layernorm.weight"
SAVES = {"save_every": 3, "keep": 2}


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step_*"))


@pytest.mark.slow
@pytest.mark.promise(
    text="A step whose gradient is not finite changes no weight and no moment",
    expected="the step is skipped and named; the run goes on; healthy checkpoints stay",
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_gradient_that_is_not_finite_is_skipped(
    corpus, tmp_path, single_process, keep_process_groups, capsys, record_property, precision
):
    config = run_config(corpus, tmp_path, optim={**TWELVE, "precision": precision}, checkpoint=SAVES)
    run_faulty(config, Fault(kind="gradient", steps={5}, micro_batch=1))
    found = outcome(config)
    assert found["error"] is None and found["changed"] == [[n for n in range(1, 13) if n != 5]]
    line = "the gradient of loop 2's hidden state is not finite (on rank 0, samples 18-19)"
    assert found["skipped"] == [{"kind": "skipped", "step": 5, "samples": [16, 20], "what": line}]
    assert [row["skipped"] for row in found["rows"]] == [0] * 4 + [1] * 8
    assert all(row["loss"] < 7 for row in found["rows"]) and found["rows"][4]["grad_norm"] is None
    said = f"step 5  skipped: {line}; 1 in a row, 1 in total"
    assert said in capsys.readouterr().err
    assert steps_of(tmp_path) == [9, 12]
    about = checkpoint.read_about(step_folder.locate(str(tmp_path)))
    assert about.health == Health(skipped=1) and about.adam_steps == 11
    record_property("seen", said)


def spoiled_command(fault: Fault, log: Path, *arguments: str) -> None:
    """Run ``python -m pretrain.train`` with a fault, in a forked process whose stderr goes to ``log``."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    sys.argv[1:] = arguments
    with injected(fault):
        run_main(main)


@pytest.mark.slow
@pytest.mark.promise(
    text="After health.max_skipped steps in a row the run ends; the healthy checkpoint is kept",
    expected="status 3, one line that names step, loop and samples, and the command that replays them",
)
def test_gradients_that_stay_not_finite_end_the_run(corpus, tmp_path, record_property):
    config = run_config(corpus, tmp_path / "run", optim=TWELVE, checkpoint=SAVES)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    fault = Fault(kind="gradient", steps=range(5, 13), loop=3)
    log = tmp_path / "log.txt"
    process = SERVER.Process(target=spoiled_command, args=(fault, log, "--config", str(path)))
    process.start()
    process.join(120)
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    replay = tmp_path / "run/failures/step_00000008.json"
    what = "step 8: the gradient of loop 3's hidden state is not finite (on rank 0, samples 28-29)"
    ends = "health.max_skipped=3 allows no further step without an update (4 in a row)"
    assert errors == [f"error: {what}; {ends}; look at the batch with: python -m tools.replay {replay}"]
    assert process.exitcode == 3
    record_property("seen", f"status 3: error: {what}; {ends}")
    assert steps_of(tmp_path / "run") == [3, 6]
    assert [row["skipped"] for row in train_rows(tmp_path / "run")] == [0, 0, 0, 0, 1, 2, 3, 4]
    bad = json.loads(replay.read_text())
    assert bad["samples"] == [28, 32] and bad["hidden_grad_norm"] == [None] * 3 and bad["grad_norms"]["mlp"] is None
    assert all(value < 7 for value in bad["loss_per_loop"]) and bad["ranks"][0]["micro_batches"][0]["gradients"]
    assert step_folder.find_fault(Path(bad["weights"])) is None and "state" not in bad["weights"]


@pytest.mark.slow
def test_a_run_with_skipped_steps_resumes_bit_for_bit(corpus, tmp_path, single_process):
    """Adam's bias correction, the schedule and the number of steps skipped in a row."""
    changes: dict[str, Any] = {"optim": {**TWELVE, "train_steps": 6, "precision": "bf16"}, "health": {"max_skipped": 2}}
    straight = run_config(corpus, tmp_path / "straight", **changes)
    halves = run_config(corpus, tmp_path / "halves", checkpoint={"save_every": 3}, **changes)
    run_faulty(straight, Fault(kind="gradient", steps={2, 3, 5}))
    run_faulty(halves, Fault(kind="gradient", steps={2, 3, 5}))
    saved = tmp_path / "halves/checkpoints"
    assert checkpoint.read_about(saved / "step_00000003").health == Health(skipped=2, skipped_in_a_row=2)
    (saved / "step_00000006/manifest.json").unlink()
    run_faulty(halves, Fault(kind="gradient", steps={2}))  # its second step is step 5
    exact = ("step", "loss", "loss_per_loop", "grad_norm", "grad_norms", "hidden_rms", "learning_rate", "skipped")
    found, expected = ([[row[key] for key in exact] for row in outcome(it)["rows"]] for it in (halves, straight))
    assert found == expected

    (saved / "step_00000006/manifest.json").unlink()
    run_faulty(halves, Fault(kind="gradient", steps={1}))
    status, message = outcome(halves)["error"]
    assert status == 3 and message.startswith("step 4: ") and "(3 in a row)" in message, "two were skipped before"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "clip_grad", "what"),
    [
        (1e25, 0.0, "the norm of the gradient of decoder.final_layernorm.weight is not finite (on rank 0)"),
        (1.1e19, 1.0, "the gradient's norm is too large for fp32"),
    ],
)
def test_a_gradient_too_large_for_its_norm_is_skipped(corpus, tmp_path, single_process, value, clip_grad, what):
    """Its square overflows fp32: clipping would then multiply every gradient by 0, or Adam's second moment be inf."""
    config = run_config(corpus, tmp_path, optim={**TWELVE, "train_steps": 3, "clip_grad": clip_grad})
    run_faulty(config, Fault(kind="weight gradient", steps={2}, parameter=LAST_NORM, value=value))
    found = outcome(config)
    assert found["changed"] == [[1, 3]] and found["skipped"][0]["what"] == what


def test_weights_and_moments_that_are_not_finite_are_not_saved(corpus, tmp_path, single_process):
    trainer, _ = build(run_config(corpus, tmp_path), single_process)
    require_finite(trainer.state, 7)
    with torch.no_grad():
        trainer.model.decoder.layers[0].mlp.linear_fc1.weight[3, 2] = math.inf
    name = r"decoder\.layers\.0\.mlp\.linear_fc1\.weight"
    with pytest.raises(NumericalFailure, match=f"step 7: {name} is not finite on rank 0; no checkpoint is written"):
        require_finite(trainer.state, 7)


@pytest.mark.slow
def test_a_run_looks_at_what_it_saves(corpus, tmp_path, single_process, monkeypatch):
    config, real = run_config(corpus, tmp_path, checkpoint={"save_every": 3}), Trainer.train
    steps = list[Step]()

    def spoils_the_third_step(self: Trainer, *args: Any) -> Any:
        done = real(self, *args)
        steps.append(done)
        if len(steps) == 3:
            self.state.model.decoder.final_layernorm.weight.data[0] = math.inf
        return done

    monkeypatch.setattr(Trainer, "train", spoils_the_third_step)
    with pytest.raises(NumericalFailure, match=f"step 3: {LAST_NORM} is not finite on rank 0; no checkpoint"):
        train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    assert not steps_of(tmp_path)


def test_json_has_null_for_numbers_that_are_not_finite():
    assert finite_or_null({"a": [1.5, math.nan], "b": (math.inf, 2, "x")}) == {"a": [1.5, None], "b": [None, 2, "x"]}


# Two ranks each: layout, precision, fault, and what the run says. A step has samples 4 n to 4 n + 3.
CASES: dict[str, tuple[dict[str, Any], str, Fault, str]] = {
    "TP2": (
        {"tensor": 2},
        "fp32",
        Fault(kind="gradient", steps={3}, rank=1, loop=3),
        "the gradient of loop 3's hidden state is not finite (on rank 1, samples 8-9)",
    ),
    "TP2, a copied weight": (
        {"tensor": 2},
        "bf16",
        Fault(kind="weight gradient", steps={3}, rank=1, parameter="decoder.final_layernorm.weight"),
        "the norm of the gradient of decoder.final_layernorm.weight is not finite (on rank 1)",
    ),
    "PP2": (
        {"pipeline": 2},
        "fp32",
        Fault(kind="gradient", steps={3}, rank=1, loop=1, micro_batch=1),
        "the gradient of loop 1's hidden state is not finite (on rank 1, samples 10-11)",
    ),
    "PP2, the first rank's weight": (
        {"pipeline": 2},
        "fp32",
        Fault(kind="weight gradient", steps={3}, rank=0, parameter="embedding.word_embeddings.weight", value=math.inf),
        "the norm of the gradient of embedding.word_embeddings.weight is not finite (on rank 0)",
    ),
    "CP2": (
        {"context": 2},
        "fp32",
        Fault(kind="gradient", steps={3}, rank=0, loop=2),
        "the gradient of loop 2's hidden state is not finite (on rank 0, samples 8-9)",
    ),
    "DP2, distributed optimizer": (
        {"distributed_optimizer": True},
        "bf16",
        Fault(kind="gradient", steps={3}, rank=1),
        "the gradient of loop 2's hidden state is not finite (on rank 1, samples 10-11)",
    ),
    "DP2, a weight of one replica": (
        {},
        "fp32",
        Fault(kind="weight gradient", steps={3}, rank=1, parameter="decoder.layers.0.mlp.linear_fc1.weight"),
        "the norm of the gradient of decoder.layers.0.mlp.linear_fc1.weight is not finite (on rank 1)",
    ),
    "DP2, a loss": (
        {},
        "fp32",
        Fault(kind="loss", steps={3, 4}, rank=0, loop=3, value=math.inf),
        "the loss of loop 3 is not finite (on rank 0, samples 8-9)",
    ),
}


def case_config(name: str, corpus: Path, folder: Path) -> RunConfig:
    layout, precision, *_ = CASES[name]
    optim = {"train_steps": 4, "warmup_steps": 0, "decay_steps": 0, "schedule": "constant", "precision": precision}
    return run_config(
        corpus,
        folder / name.replace(" ", "_"),
        optim=optim,
        parallel=ParallelConfig(**layout),
        checkpoint={"save_every": 2},
        health={"max_skipped": 1},
    )


@pytest.fixture(scope="module")
def two_ranks(corpus, tmp_path_factory) -> Path:
    """Run all cases on two ranks, one after the other, and the gate's stage on a pipeline."""
    folder = tmp_path_factory.mktemp("two_ranks")
    jobs = [partial(run_faulty, case_config(name, corpus, folder), fault) for name, (*_, fault, _) in CASES.items()]
    gate = case_config("PP2", corpus, folder)
    gate = dataclasses.replace(
        gate,
        output_dir=str(folder / "gate"),
        loss=LossConfig(objective="adaptive_gate"),
        checkpoint=dataclasses.replace(gate.checkpoint, initial=gate.output_dir),
    )
    jobs.append(partial(run_faulty, gate, Fault(kind="weight gradient", steps={2}, rank=1, parameter=GATE_WEIGHT)))
    launch(2, jobs, folder)
    return folder


GATE_WEIGHT = "gate.readout.weight"


@pytest.mark.slow
@pytest.mark.promise(
    text="A NaN in one rank's gradient, or inf in one loop's loss, stops the update on every rank",
    expected="no rank changes a weight; the line names loop, rank and samples",
)
@pytest.mark.parametrize("name", CASES)
def test_no_rank_takes_a_step_that_is_not_finite_on_one(name, two_ranks, corpus, record_property):
    config, (*_, fault, line) = case_config(name, corpus, two_ranks), CASES[name]
    found = outcome(config)
    assert found["skipped"][0]["what"] == line
    ends = len(fault.steps) > config.health.max_skipped
    assert found["changed"] == [[n for n in (1, 2, 3, 4) if n not in fault.steps]] * 2
    assert all(math.isfinite(row["loss"]) for row in found["rows"] if row["step"] not in fault.steps)
    if not ends:
        assert found["error"] is None and steps_of(Path(config.output_dir)) == [2, 4]
        record_property("seen", f"skipped: {line}")
        return
    status, message = found["error"]
    assert status == 3 and message.startswith("step 4: the loss of loop 3 is not finite (on rank 0, samples 12-13); ")
    assert steps_of(Path(config.output_dir)) == [2], "the last checkpoint is older than the fault"
    record_property("seen", f"status {status}: {message.partition(' look at')[0]}")


@pytest.mark.slow
def test_the_gate_stage_of_a_pipeline_skips_too(two_ranks):
    found = json.loads((two_ranks / "gate/outcome.json").read_text())
    assert found["error"] is None and found["changed"] == [[], [1, 3, 4]], "the first rank has no gate"


@pytest.mark.slow
def test_the_last_checkpoint_before_skipped_steps_stays(corpus, tmp_path):
    saves = {"save_every": 3, "keep": 1}
    config = run_config(corpus, tmp_path, optim={**TWELVE, "train_steps": 6}, checkpoint=saves)
    run_faulty(config, Fault(kind="gradient", steps={5, 6}))
    assert steps_of(tmp_path) == [3, 6]
