"""Steps whose losses or gradients are not finite, on one rank or on several."""

from pathlib import Path

import pytest

from looplm import checkpoint
from looplm.checkpoint import Health, step_folder
from tests.support.faulty import Fault, outcome, run_faulty
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
