"""Loss spikes: detection, and the return to the checkpoint before one."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from looplm import checkpoint
from looplm.checkpoint import Health, step_folder
from looplm.config import HealthConfig, RampUpConfig, RunConfig
from pretrain import spikes
from pretrain.health import count
from tests.support.faulty import Fault, injected, outcome, run_spoiled
from tests.support.launch import launch
from tests.support.tiny import run_config, train_rows

WATCHED = HealthConfig(spike_factor=7.0, spike_window=8, spike_steps=2)
STEADY = (5.0, 5.1, 4.9, 5.05, 4.95, 5.0, 5.02, 4.98)


def test_the_limit_is_robust():
    """One of eight losses at 50 moves it little; it exists after spike_window losses."""
    spread = 1.4826 * 0.035
    assert spikes.limit(STEADY, WATCHED) == pytest.approx(5.0 + 7 * spread)
    assert spikes.limit((*STEADY[:-1], 50.0), WATCHED) == pytest.approx(5.0, abs=0.7)
    assert spikes.limit(STEADY[1:], WATCHED) is None and spikes.limit(STEADY, HealthConfig()) is None
    assert spikes.limit([5.0] * 8, WATCHED) == pytest.approx(5.0 + 7 * 0.005), "equal losses have a spread too"


def test_a_spike_is_several_losses_in_a_row():
    health = Health()
    for loss in STEADY:
        health = spikes.watch(health, loss, WATCHED)
    assert health == Health(recent_losses=STEADY)
    once = spikes.watch(health, 9.0, WATCHED)
    assert once == Health(recent_losses=STEADY, losses_above=1), "the limit does not follow the spike"
    assert spikes.watch(once, 5.0, WATCHED) == Health(recent_losses=(*STEADY[1:], 5.0))
    assert spikes.watch(once, 9.0, WATCHED).losses_above == WATCHED.spike_steps
    assert spikes.watch(Health(), 5.0, HealthConfig()) == Health(), "no losses are kept if no spike is looked for"
    assert spikes.accept(spikes.watch(once, 9.0, WATCHED)) == Health()


@pytest.mark.parametrize(("losses", "steps"), [("9", 1), ("n9", 1), ("9n", 2), ("9n9", 3), ("9n5", 0), ("9n5n9", 1)])
def test_a_step_without_an_update_is_part_of_the_spike_around_it(losses, steps):
    """``n`` is a step whose loss is not finite. One before the spike changed nothing: the run may return to it."""
    health = Health(recent_losses=STEADY)
    for loss in losses:
        done: Any = SimpleNamespace(healthy=loss != "n", stats=SimpleNamespace(loss=float(loss.replace("n", "nan"))))
        health = count(health, done, WATCHED)
    assert health.steps_above == steps
    assert spikes.accept(health).steps_above == 0


def spiky(corpus: Path, folder: Path, **changes: Any) -> RunConfig:
    """Return a run of 14 steps with 4 samples each, which looks for spikes early."""
    optim = {"train_steps": 14, "warmup_steps": 2, "decay_steps": 4, "precision": "bf16"}
    health = {"spike_factor": 2.0, "spike_window": 4, "spike_steps": 2, "max_rollbacks": 1}
    sections: dict[str, dict[str, Any]] = {
        "optim": optim,
        "health": health,
        "checkpoint": {"save_every": 3, "keep": 9, "in_background": False},
    }
    return run_config(
        corpus, folder, **{key: {**sections.get(key, {}), **changes.get(key, {})} for key in {*sections, *changes}}
    )


def lines(config: RunConfig, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return the rows of a log without the times in them."""
    timed = ("seconds", "tokens_per_second", "mfu")
    rows = [json.loads(line) for line in (Path(config.output_dir) / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def forget(config: RunConfig, *steps: int) -> None:
    for step in steps:
        (Path(config.output_dir) / f"checkpoints/step_{step:08d}/manifest.json").unlink()


@pytest.mark.slow
@pytest.mark.promise(
    text="A loss spike is rolled back and its data are skipped, twice the same, also after a restart",
    expected="back to the checkpoint before it; equal losses bit for bit",
)
def test_a_spike_is_rolled_back_and_its_data_are_skipped(corpus, tmp_path, single_process, capsys, record_property):
    config, bad = spiky(corpus, tmp_path / "run"), range(24, 32)
    run_spoiled(config, bad)
    rows = lines(config)
    (rollback,) = [row for row in rows if row["kind"] == "rollback"]
    assert (rollback["step"], rollback["spike"]["step"], rollback["skipped_samples"]) == (6, 8, [24, 32])
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "rollback" in line]
    assert said.endswith("back to step 6 (rollback 1 of 1), samples 24-31 are skipped")
    record_property("seen", said)
    steps = train_rows(config.output_dir)
    assert [row["step"] for row in steps] == list(range(1, 15)) and steps[-1]["samples"] == 56
    undone = lines(config, "rolled_back.jsonl")
    assert [(row["step"], row["rollback"]) for row in undone if row["kind"] == "train"] == [(7, 1), (8, 1)]
    assert min(row["loss"] for row in undone) > max(row["loss"] for row in steps[6:]) + 1
    about = checkpoint.read_about(step_folder.locate(config.output_dir))
    assert about.health.skipped_samples == ((24, 32),) and about.adam_steps == 14

    again = spiky(corpus, tmp_path / "again")
    run_spoiled(again, bad)
    assert lines(again) == rows and lines(again, "rolled_back.jsonl") == undone
    forget(config, 12, 14)  # a restart that knows of the rollback
    run_spoiled(config, bad)
    assert lines(config) == rows and lines(config, "rolled_back.jsonl") == undone
    forget(config, 9, 12, 14)  # a restart that does not
    run_spoiled(config, bad)
    assert lines(config) == rows and lines(config, "rolled_back.jsonl") == undone


@pytest.mark.slow
@pytest.mark.parametrize(("skipped", "bad"), [((), range(24, 32)), ((8,), range(24, 36))])
def test_the_checkpoint_before_a_spike_stays_until_it_is_known(skipped, bad, corpus, tmp_path, single_process):
    """Step 7 belongs to the spike, is saved, and would push the only older checkpoint off the disk."""
    config = spiky(corpus, tmp_path, checkpoint={"save_every": 1, "keep": 1})
    with injected(Fault(kind="gradient", steps=skipped)):
        run_spoiled(config, bad)
    assert [row["step"] for row in lines(config) if row["kind"] == "rollback"] == [6]
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000014"]
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000014\n"


@pytest.mark.slow
@pytest.mark.promise(
    text="More spikes than health.max_rollbacks end the run",
    expected="status 3, one line that names the step and the batch to look at",
)
def test_more_spikes_than_allowed_end_the_run(corpus, tmp_path, single_process, record_property):
    config = spiky(corpus, tmp_path)
    run_spoiled(config, range(24, 40))
    status, message = outcome(config)["error"]
    assert status == 3 and message.startswith("step 8: a loss spike (") and "max_rollbacks=1 allows no" in message
    assert message.endswith(f"python -m tools.replay {tmp_path} --step 8")
    assert step_folder.newest(tmp_path / "checkpoints", print) == tmp_path / "checkpoints/step_00000006"
    record_property("seen", f"status {status}: {message.partition(';')[0]}; health.max_rollbacks=1 allows no further")

    nowhere = spiky(corpus, tmp_path / "nowhere", checkpoint={"save_every": 0})
    run_spoiled(nowhere, range(24, 40))
    status, message = outcome(nowhere)["error"]
    assert status == 3 and message.endswith(
        "no checkpoint of step 6 or earlier to return to; lower checkpoint.save_every"
    )


@pytest.mark.slow
def test_without_rollbacks_a_spike_is_only_reported(corpus, tmp_path, single_process):
    config = spiky(corpus, tmp_path, health={"max_rollbacks": 0})
    run_spoiled(config, range(24, 32))
    assert [row["step"] for row in lines(config) if row["kind"] == "spike"] == [8]
    assert [row["step"] for row in train_rows(tmp_path)] == list(range(1, 15))


@pytest.mark.slow
def test_a_run_goes_on_as_if_the_skipped_data_had_never_been_there(corpus, tmp_path, single_process):
    """The batch grows with the samples that count."""
    ramp = RampUpConfig(start=2, increment=2, samples=24)
    config = spiky(corpus, tmp_path, data={"rampup": ramp, "global_batch_size": 6})
    run_spoiled(config, range(12, 20))
    (rollback,) = [row for row in lines(config) if row["kind"] == "rollback"]
    rows = train_rows(tmp_path)
    assert min(row["tokens_per_second"] for row in rows) > 0, "after a rollback tokens are counted from its step"
    straight = spiky(corpus, tmp_path / "straight", data={"rampup": ramp, "global_batch_size": 6})
    run_spoiled(straight, (), skipped=range(*rollback["skipped_samples"]))
    assert [row["samples"] for row in rows] == [row["samples"] for row in train_rows(tmp_path / "straight")]
    assert [row["loss"] for row in rows] == [row["loss"] for row in train_rows(tmp_path / "straight")]


def roll_back_on_two_ranks(corpus: Path, folder: Path, layouts: dict[str, dict[str, Any]], turns: int) -> None:
    """Run each layout several times with a spike, and compare the runs of a layout."""
    runs = [
        [spiky(corpus, folder / f"{name}{turn}", parallel=layouts[name]) for turn in range(turns)] for name in layouts
    ]
    launch(2, [partial(run_spoiled, config, range(24, 32)) for configs in runs for config in configs], folder)
    for configs in runs:
        rows = lines(configs[0])
        assert [row["step"] for row in rows if row["kind"] == "rollback"] == [6]
        assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 15))
        assert all(lines(config) == rows for config in configs)


@pytest.mark.slow
def test_two_ranks_roll_back_together(corpus, tmp_path):
    roll_back_on_two_ranks(corpus, tmp_path, {"zero": {"distributed_optimizer": True}}, turns=1)


@pytest.mark.slow
@pytest.mark.hard
def test_every_layout_rolls_back_twice_the_same(corpus, tmp_path):
    layouts: dict[str, dict[str, Any]] = {
        "zero": {"distributed_optimizer": True},
        "tensor": {"tensor": 2},
        "pipeline": {"pipeline": 2},
    }
    roll_back_on_two_ranks(corpus, tmp_path, layouts, turns=2)
