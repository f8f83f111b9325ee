"""Whole runs of a tiny model: resumption, stages, golden losses, errors."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.manifest import read_manifest
from looplm import checkpoint
from looplm.checkpoint import optimizer_state, step_folder
from looplm.cli import to_dict
from looplm.config import EngineConfig, RampUpConfig, RunConfig
from looplm.failures import UserError
from looplm.megatron import process_groups
from pretrain.data import check_corpus
from pretrain.run import build
from pretrain.stopping import STOPPED
from pretrain.train import main, train
from tests.support.launch import SERVER
from tests.support.tiny import run_config, train_rows

pytestmark = pytest.mark.slow  # every test here starts a process or trains

EXACT = ("step", "samples", "tokens", "loss", "loss_per_loop", "exit_distribution", "grad_norm", "learning_rate")


def run(config: RunConfig) -> list[dict]:
    """Train in this process, as ``main`` does, and return the training lines of metrics.jsonl."""
    groups = process_groups.start(config.seed)
    train(config, check_corpus(config.data, config.model.vocab_size), groups)
    return train_rows(config.output_dir)


def exact(rows: list[dict]) -> list[tuple]:
    return [tuple(json.dumps(row[key]) for key in EXACT) for row in rows]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_six_steps_equal_three_plus_restart_plus_three_bit_for_bit(corpus, tmp_path, single_process, precision):
    whole = run_config(corpus, tmp_path / "whole", optim={"precision": precision})
    straight = run(whole)

    halves = dataclasses.replace(whole, output_dir=str(tmp_path / "halves"))
    halves = dataclasses.replace(halves, checkpoint=dataclasses.replace(halves.checkpoint, save_every=3))
    run(halves)
    steps = tmp_path / "halves" / "checkpoints"
    (steps / "step_00000006" / "manifest.json").unlink()  # as if the run had died before its last save
    resumed = run(halves)

    assert exact(resumed) == exact(straight)
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5, 6], "each step appears once in metrics.jsonl"


def test_resume_with_growing_batch(corpus, tmp_path, single_process):
    ramp = {"rampup": RampUpConfig(start=2, increment=2, samples=8), "global_batch_size": 6}
    straight = run(run_config(corpus, tmp_path / "a", data=ramp))
    assert [row["samples"] for row in straight][:3] != [6, 12, 18], "the batch grows"
    halves = run_config(corpus, tmp_path / "b", data=ramp, checkpoint={"save_every": 3, "keep": 9})
    run(halves)
    (tmp_path / "b/checkpoints/step_00000006/manifest.json").unlink()
    assert exact(run(halves)) == exact(straight)


STEADY = {"schedule": "constant", "decay_steps": 0, "warmup_steps": 0}


@pytest.mark.parametrize("horizon", [None, 80])
def test_an_extended_run_equals_one_that_was_longer_from_the_start(corpus, tmp_path, single_process, horizon):
    data = {"horizon_samples": horizon}  # 80 samples need the data twice
    whole = run(run_config(corpus, tmp_path / "whole", optim={**STEADY, "train_steps": 9}, data=data))
    short = run_config(corpus, tmp_path / "run", optim=STEADY, data=data)
    run(short)
    assert exact(run(dataclasses.replace(short, optim=dataclasses.replace(short.optim, train_steps=9)))) == exact(whole)


def test_a_stage_reads_on_where_the_one_before_it_stopped(corpus, tmp_path, single_process, capsys):
    """With the same data in the same order, and Adam's moments, two stages are one run."""
    whole = run(run_config(corpus, tmp_path / "whole", optim={**STEADY, "train_steps": 12}))
    run(run_config(corpus, tmp_path / "first", optim=STEADY))
    start = {"initial": str(tmp_path / "first"), "initial_optimizer": True, "save_every": 3, "keep": 9}
    second = run_config(corpus, tmp_path / "second", optim=STEADY, checkpoint=start)
    figures = ("loss", "loss_per_loop", "grad_norm")
    assert [[row[key] for key in figures] for row in run(second)] == [
        [row[key] for key in figures] for row in whole[6:]
    ]
    assert "reads on at sample 24 of the mix, where " in capsys.readouterr().err
    about = checkpoint.read_about(step_folder.locate(second.output_dir))
    assert (about.first_sample, about.samples, about.position) == (24, 24, 48)
    (tmp_path / "second/checkpoints/step_00000006/manifest.json").unlink()
    shutil.rmtree(tmp_path / "first")
    assert [row["loss"] for row in run(second)] == [row["loss"] for row in whole[6:]]
    assert "reads on" not in capsys.readouterr().err
    stored = yaml.safe_load((tmp_path / "second/config.yaml").read_text())["data"]
    assert (stored["first_sample"], stored["horizon_samples"]) == (24, about.horizon_samples)
    with pytest.raises(UserError, match=r"data\.first_sample: 0 is not allowed; .*second began with 24; leave it out"):
        run(dataclasses.replace(second, data=dataclasses.replace(second.data, first_sample=0)))
    longer = run_config(corpus, tmp_path / "whole", optim={**STEADY, "train_steps": 12}, data={"horizon_samples": 9999})
    with pytest.raises(
        UserError, match=r"data\.horizon_samples: 9999 is not allowed; .*whole began with 200; leave it"
    ):
        run(longer)


@pytest.mark.parametrize(("data", "seed", "first"), [({}, 1234, 24), ({"first_sample": 8}, 1234, 8), ({}, 9, 0)])
def test_a_stage_begins_anew_with_another_order_or_where_it_is_told(
    data, seed, first, corpus, tmp_path, single_process
):
    run(run_config(corpus, tmp_path / "first"))
    run(run_config(corpus, tmp_path / "next", data=data, seed=seed, checkpoint={"initial": str(tmp_path / "first")}))
    assert checkpoint.read_about(step_folder.locate(str(tmp_path / "next"))).first_sample == first


def test_a_resumed_run_with_another_batch_has_samples_for_all_its_steps(corpus, tmp_path, single_process):
    steady = {"schedule": "constant", "decay_steps": 0}
    first = run_config(corpus, tmp_path / "run", optim=steady, data={"global_batch_size": 4})
    run(first)
    data = dataclasses.replace(first.data, global_batch_size=2, micro_batch_size=2)
    longer = dataclasses.replace(first, data=data, optim=dataclasses.replace(first.optim, train_steps=9))
    assert [row["samples"] for row in run(longer)][5:] == [24, 26, 28, 30]
    shorter = dataclasses.replace(first, optim=dataclasses.replace(first.optim, train_steps=7))
    with pytest.raises(UserError, match=r"optim.train_steps: 7 is not allowed; .*run has trained 9 steps; give at le"):
        run(shorter)


def test_a_run_that_shall_not_resume_needs_a_folder_without_steps(corpus, tmp_path, single_process):
    first = run_config(corpus, tmp_path / "run", checkpoint={"resume": False})
    run(first)
    with pytest.raises(UserError, match=r"checkpoint.resume: False is not allowed; .*holds steps of an earlier run"):
        run(first)


def test_a_stage_resumes_without_the_one_before_it(corpus, tmp_path, single_process):
    run(run_config(corpus, tmp_path / "first"))
    start = {"initial": str(tmp_path / "first"), "save_every": 3, "keep": 9}
    second = run_config(corpus, tmp_path / "second", checkpoint=start)
    straight = run(second)
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "second/checkpoints/step_00000006/manifest.json").unlink()
    assert exact(run(second)) == exact(straight)


def test_permanent_checkpoints_of_a_run_stay(corpus, tmp_path, single_process):
    run(run_config(corpus, tmp_path / "run", checkpoint={"save_every": 1, "keep": 1, "keep_every": 2}))
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").glob("step_*"))] == [
        step_folder.step_name(step) for step in (2, 4, 6)
    ]


def test_golden_losses(corpus, tmp_path, single_process):
    """A refactoring must not change them. Give the reason for any change in the commit message."""
    rows = run(run_config(corpus, tmp_path))
    golden = json.loads((Path(__file__).parent / "golden_losses.json").read_text())
    assert [row["loss"] for row in rows] == pytest.approx(golden["loss"], rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(golden["grad_norm"], rel=1e-4)


def test_validations_without_data_are_said_to_have_no_effect(corpus, tmp_path, single_process, capsys):
    kept = run(run_config(corpus, tmp_path / "with", logging={"eval_every": 3}))
    assert "no effect" not in capsys.readouterr().err
    without = run_config(corpus, tmp_path / "without", logging={"eval_every": 3}, data={"valid": ()})
    assert exact(run(without)) == exact(kept)
    assert "logging.eval_every: 3 has no effect, because data.valid is empty" in capsys.readouterr().err


def test_the_first_lines_count_passes_and_validation_samples(corpus, tmp_path, single_process, capsys):
    config = run_config(corpus, tmp_path, logging={"eval_samples": 1000}, optim={"train_steps": 2, "decay_steps": 0})
    run(config)
    passes = 2 * 4 * 32 / read_manifest(corpus / "train").tokens
    held = (read_manifest(corpus / "valid").tokens - 1) // 32
    said = capsys.readouterr().err
    assert f"passes over the data: train {passes:.2f}\n" in said
    why = f"{held} samples read all of data.valid, and every rank of this layout reads whole micro-batches"
    assert f"logging.eval_samples: 1000 becomes {held // 2 * 2}, because {why}\n" in said


def test_a_run_with_emulated_fp8_says_so_and_resumes_without_it(corpus, tmp_path, single_process, capsys):
    steady = {"optim": {"schedule": "constant", "decay_steps": 0}}
    plain = run(run_config(corpus, tmp_path / "plain", **steady))
    assert "EMULATED" not in capsys.readouterr().err
    config = run_config(corpus, tmp_path / "fp8", engine={"fp8": "emulate-hybrid"}, **steady)
    rounded = run(config)
    assert "EMULATED: engine.fp8=emulate-hybrid" in capsys.readouterr().err
    assert [row["loss"] for row in rounded] != [row["loss"] for row in plain]
    assert [row["loss"] for row in rounded] == pytest.approx([row["loss"] for row in plain], rel=0.02)
    longer = dataclasses.replace(config, engine=EngineConfig(), optim=dataclasses.replace(config.optim, train_steps=7))
    assert exact(run(longer)[:6]) == exact(rounded) and len(train_rows(config.output_dir)) == 7


def test_the_gate_stage_changes_only_the_gate(corpus, tmp_path, single_process):
    stage1 = run_config(corpus, tmp_path / "stage1")
    run(stage1)
    gate = run_config(
        corpus,
        tmp_path / "gate",
        loss={"objective": "adaptive_gate"},
        checkpoint={"initial": stage1.output_dir},
    )
    rows = run(gate)
    assert rows[0]["objective"] == "adaptive_gate"
    before = checkpoint.open_model(stage1.output_dir, single_process)
    after = checkpoint.open_model(gate.output_dir, single_process)
    assert before.about.gate_trained and after.about.gate_trained
    moved = {
        name
        for (name, old), new in zip(before.model.named_parameters(), after.model.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert moved and all(name.startswith("gate.") for name in moved), moved


def test_a_later_stage_may_change_loops_rope_and_length(corpus, tmp_path, single_process):
    run(run_config(corpus, tmp_path / "a"))
    later = run_config(
        corpus,
        tmp_path / "b",
        model={"num_loops": 2, "rope_base": 40_000.0},
        data={"seq_length": 48},
        loss={"beta": 0.01},
        checkpoint={"initial": str(tmp_path / "a")},
    )
    assert len(run(later)[0]["loss_per_loop"]) == 2


def test_a_step_embedding_holds_later_stages_to_its_loops(corpus, tmp_path, single_process):
    steps = {"step_embedding": "learned"}
    run(run_config(corpus, tmp_path / "a", model=steps, optim={"train_steps": 1, "warmup_steps": 0, "decay_steps": 0}))
    start = {"initial": str(tmp_path / "a")}
    with pytest.raises(UserError, match=r"made with model\.num_loops=3, this run has 2; set model\.num_loops to 3"):
        run(run_config(corpus, tmp_path / "b", model=steps | {"num_loops": 2}, checkpoint=start))


def test_a_later_stage_can_inherit_the_moments(corpus, tmp_path, single_process):
    """Its moments after one step are beta times the old ones, plus those of a step that started without them."""
    first = run_config(corpus, tmp_path / "first")
    run(first)

    def moments(folder: str) -> dict[str, dict[str, torch.Tensor]]:
        config = run_config(corpus, tmp_path / folder)
        trainer, _ = build(config, single_process)
        checkpoint.resume(step_folder.locate(str(tmp_path / folder)), trainer.state, config)
        return optimizer_state.plain_state(trainer.optimizer, trainer.model)

    one = {"train_steps": 1, "warmup_steps": 0, "decay_steps": 0}
    for folder, inherits in (("with", True), ("without", False)):
        start = {"initial": first.output_dir, "initial_optimizer": inherits}
        run(run_config(corpus, tmp_path / folder, optim=one, checkpoint=start))
    old, inherited, fresh = (moments(folder) for folder in ("first", "with", "without"))
    for name in old:
        for moment, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.95)):
            assert old[name][moment].any() or name.startswith("gate.cell"), name
            expected = beta * old[name][moment] + fresh[name][moment]
            torch.testing.assert_close(inherited[name][moment], expected, rtol=1e-4, atol=1e-9)
    about = checkpoint.read_about(step_folder.locate(str(tmp_path / "with")))
    assert about.step == 1 and about.adam_steps == 7, "Adam's bias correction counts the steps of both"


def test_a_stage_with_inherited_moments_resumes_bit_for_bit(corpus, tmp_path, single_process):
    run(run_config(corpus, tmp_path / "first"))
    start = {"initial": str(tmp_path / "first"), "initial_optimizer": True, "save_every": 2}
    straight = run(run_config(corpus, tmp_path / "a", optim={"train_steps": 4, "warmup_steps": 0}, checkpoint=start))
    halves = run_config(corpus, tmp_path / "b", optim={"train_steps": 4, "warmup_steps": 0}, checkpoint=start)
    run(halves)
    (tmp_path / "b/checkpoints/step_00000004/manifest.json").unlink()
    assert exact(run(halves)) == exact(straight)
    assert checkpoint.read_about(step_folder.locate(str(tmp_path / "b"))).adam_steps == 10


def test_moments_that_do_not_fit_raise(corpus, tmp_path, single_process):
    run(run_config(corpus, tmp_path / "stage1"))
    start: dict[str, Any] = {"initial": str(tmp_path / "stage1")}
    run(run_config(corpus, tmp_path / "gate", loss={"objective": "adaptive_gate"}, checkpoint=start))
    run(run_config(corpus, tmp_path / "last", loss={"weights": "last"}))
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "holds no moments of the gate, which loss.weights=last froze; leave it false": ("last", {}),
        "was trained in float32, this stage in bfloat16": ("stage1", {"precision": "bf16"}),
        "moments of the gate alone": ("gate", {}),
    }
    for words, (folder, optim) in cases.items():
        start = {"initial": str(tmp_path / folder), "initial_optimizer": True}
        with pytest.raises(UserError, match=words):
            run(run_config(corpus, tmp_path / "next", optim=optim, checkpoint=start))
    with pytest.raises(UserError, match=r"checkpoint\.initial_optimizer: True is not allowed; name the stage"):
        run_config(corpus, tmp_path / "next", checkpoint={"initial_optimizer": True})
    assert not (tmp_path / "next").exists()


def test_loss_falls(corpus, tmp_path, single_process):
    rows = run(run_config(corpus, tmp_path, optim={"train_steps": 40, "decay_steps": 10}, data={"seq_length": 48}))
    assert rows[0]["loss"] - rows[-1]["loss"] > 1.0


def test_metrics_are_complete(corpus, tmp_path, single_process):
    *earlier, row = run(run_config(corpus, tmp_path))
    assert sum(row["exit_distribution"]) == pytest.approx(1, abs=1e-5)
    assert 1 <= row["mean_depth"] <= 3 and row["entropy"] > 0
    assert row["tokens"] == 6 * 4 * 32 and row["tokens_per_second"] > 0 and 0 < row["mfu"] < 1
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    drawn = {event.step: event.value for event in board.Scalars("train/loss")}
    assert drawn == pytest.approx({each["step"]: each["loss"] for each in (*earlier, row)})
    assert board.Scalars("train/loss_per_loop/3")[-1].value == pytest.approx(row["loss_per_loop"][2])


def test_errors_come_before_training(corpus, tmp_path, single_process):
    run(run_config(corpus, tmp_path / "a"))
    start = {"initial": str(tmp_path / "a")}
    gate_loss = {"objective": "adaptive_gate"}
    cases = {
        "hidden_size": run_config(corpus, tmp_path / "b", model={"hidden_size": 64}, checkpoint=start),
        "state_size": run_config(corpus, tmp_path / "b", gate={"state_size": 4}, checkpoint=start),
        "seed": run_config(corpus, tmp_path / "a", seed=5),
        "objective": run_config(corpus, tmp_path / "a", loss=gate_loss, checkpoint=start),
        "no whole checkpoint": run_config(corpus, tmp_path / "b", checkpoint={"initial": str(tmp_path / "nowhere")}),
    }
    for word, config in cases.items():
        with pytest.raises(UserError, match=word):
            run(config)
    assert not (tmp_path / "b").exists(), "no incomplete file is left behind"


def _command(*arguments: str) -> None:
    """Run ``python -m pretrain.train`` in a forked process, which saves its imports."""
    torch.set_num_threads(1)
    main([*arguments])


def test_sigterm_saves_before_the_run_ends(corpus, tmp_path):
    config = run_config(corpus, tmp_path / "run", optim={"train_steps": 100_000, "warmup_steps": 0, "decay_steps": 0})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    process = SERVER.Process(target=_command, args=("--config", str(path)))
    process.start()
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.1)
    process.terminate()
    process.join(60)
    assert process.exitcode == STOPPED
    saved = step_folder.newest(tmp_path / "run/checkpoints", print)
    assert saved is not None
    assert checkpoint.read_about(saved).step == train_rows(tmp_path / "run")[-1]["step"]


def test_the_command_line_reports_a_mistake_in_one_line(corpus, tmp_path):
    config = run_config(corpus, tmp_path / "run")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    with pytest.raises(UserError, match=r"model\.vocab_size: 100 .*320 tokens"):
        main(["--config", str(path), "--model.vocab_size", "100"])
    command = [sys.executable, "-m", "pretrain.train", "--config", str(path), "--optim.learning_rate", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]  # torch may print warnings before it
    assert last.startswith("error: --optim.learning_rate: unknown key; did you mean optim.")
