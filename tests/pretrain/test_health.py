"""Steps whose losses or gradients are not finite, on one rank or on several."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import pytest

from looplm import checkpoint
from looplm.checkpoint import Health, step_folder
from looplm.config import LossConfig, ParallelConfig, RunConfig
from tests.support.faulty import Fault, outcome, run_faulty
from tests.support.launch import launch
from tests.support.tiny import run_config

TWELVE = {"train_steps": 12, "warmup_steps": 2, "decay_steps": 0, "schedule": "constant"}
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


# Two ranks each: layout, precision, fault, and what the run says. A step has samples 4 n to 4 n + 3.
CASES = {
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
        "the gradient of decoder.final_layernorm.weight is not finite (on rank 1)",
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
        "the gradient of embedding.word_embeddings.weight is not finite (on rank 0)",
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
        "the gradient of decoder.layers.0.mlp.linear_fc1.weight is not finite (on rank 1)",
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
