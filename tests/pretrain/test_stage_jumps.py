"""A run of several stages: their order, their jumps, the limit on jumps, and the report."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from looplm.cli import to_dict
from looplm.config import CheckpointConfig, DataConfig, DataSource, LossConfig, ModelConfig, OptimConfig, RunConfig
from looplm.failures import UserError
from pretrain import stage_jumps
from pretrain.report.data import read_stages
from pretrain.report.page import build_page
from pretrain.stage_jumps import find_jumps, table

MODEL = ModelConfig(
    vocab_size=512, hidden_size=32, ffn_hidden_size=48, num_layers=2, num_attention_heads=2, attention="mha"
)


def write_stage(run: Path, name: str, losses: list[list[float]], initial: str | None = None, **sections: Any) -> None:
    """Write a training directory whose n-th step has ``losses[n]`` after its loops."""
    loops = len(losses[0])
    config = RunConfig(
        output_dir=str(run / name),
        model=dataclasses.replace(MODEL, num_loops=loops),
        optim=OptimConfig(train_steps=len(losses)),
        data=DataConfig(train=(DataSource(prefix=sections.pop("data", "text")),)),
        checkpoint=CheckpointConfig(initial=None if initial is None else str(run / initial)),
        **sections,
    )
    (run / name).mkdir(parents=True)
    (run / name / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    rows = [
        {
            "kind": "train",
            "step": step,
            "objective": config.loss.objective,
            "tokens": 64 * step,
            "learning_rate": 1e-3,
            "seconds": 1.0,
            "loss_per_loop": loss,
            "exit_distribution": [1 / loops] * loops,
        }
        for step, loss in enumerate(losses, start=1)
    ]
    (run / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def flat(steps: int, *losses: float) -> list[list[float]]:
    return [list(losses)] * steps


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Write stage1a (3 loops), stage1b (upcycled, 2 loops), stage2 (new data), gate and tuned, the last one first."""
    folder = tmp_path / "run"
    gate = LossConfig(objective="adaptive_gate")
    write_stage(folder, "tuned", flat(6, 1.0, 0.9), "gate", data="talk")
    write_stage(folder, "gate", flat(6, 3.5, 3.4), "stage2", loss=gate, data="other")
    write_stage(folder, "stage2", flat(30, 3.5, 3.4), "stage1b", data="other")
    write_stage(folder, "stage1b", [*flat(3, 5.0, 4.2), *flat(27, 4.0, 3.9)], "deeper")
    write_stage(folder, "stage1a", [*flat(20, 6.0, 6.0, 6.0), *flat(10, 4.2, 4.1, 4.0)])
    (folder / "deeper/companions").mkdir(parents=True)
    source = str(folder / "stage1a/checkpoints/step_00000030")
    (folder / "deeper/companions/upcycle.json").write_text(json.dumps([{"kind": "depth", "source": source}]))
    return folder


def test_stages_follow_the_ones_they_start_from(run):
    stages = read_stages(run)
    assert [(stage.name, stage.origin) for stage in stages] == [
        ("stage1a", None),
        ("stage1b", "stage1a"),
        ("stage2", "stage1b"),
        ("gate", "stage2"),
        ("tuned", "gate"),
    ]


def test_a_jump_is_the_highest_mean_of_a_few_steps_at_a_shared_loop(run):
    found = {one.after: one for one in find_jumps(read_stages(run))}
    assert found["stage1b"].loop == 2 and found["stage1b"].same_data
    assert found["stage1b"].nats == pytest.approx((3 * 4.2 + 7 * 3.9) / 10 - 4.1)
    assert found["stage2"].nats == pytest.approx(3.4 - 3.9) and not found["stage2"].same_data
    assert found["gate"].nats == pytest.approx(0) and found["gate"].same_data
    assert not found["tuned"].same_data


def test_a_late_spike_and_a_nan_count_as_jumps(run):
    lines = (run / "gate/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines * 4]
    for index, row in enumerate(rows):
        row["loss_per_loop"] = [3.5, 9.4 if index in (17, 22) else 3.4]
    (run / "gate/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {one.after: one.nats for one in find_jumps(read_stages(run))}["gate"] == pytest.approx(6 / 10)
    rows[3]["loss_per_loop"] = [3.5, None]
    (run / "gate/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert np.isnan({one.after: one.nats for one in find_jumps(read_stages(run))}["gate"])
    with pytest.raises(UserError, match=r"from stage2 to gate the loss of loop 2 jumps by nan nats"):
        stage_jumps.main([str(run), "--max_jump", "0.3"])


def test_only_steps_that_ran_the_loop_are_compared(run):
    lines = (run / "gate/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows[:3]:  # as with loss.loop_onset
        row["loss_per_loop"], row["exit_distribution"] = [3.5, None], [1.0, 0.0]
    (run / "gate/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {one.after: one.nats for one in find_jumps(read_stages(run))}["gate"] == pytest.approx(0)
    heads, *table_rows = table(read_stages(run), [])
    assert {row[0]: row[heads.index("loss")] for row in table_rows}["gate"] == "3.400"


def test_the_command_prints_a_row_per_stage_and_enforces_the_limit(run, capsys):
    stage_jumps.main([str(run), "--max_jump", "0.3"])
    heads, *rows, _ = capsys.readouterr().out.splitlines()
    assert heads.split()[0] == "stage" and [row.split()[0] for row in rows] == [
        "stage1a",
        "stage1b",
        "stage2",
        "gate",
        "tuned",
    ]
    assert rows[2].endswith("-0.500 *") and "gate alone" in rows[3] and "2 x 3" in rows[0]
    with pytest.raises(UserError, match=r"from stage1a to stage1b the loss of loop 2 jumps by -0\.110"):
        stage_jumps.main([str(run), "--max_jump", "-0.2"])
    with pytest.raises(UserError, match="no stage with a metrics"):
        stage_jumps.main([str(run / "absent")])


def test_the_report_has_the_table_and_names_that_do_not_overlap(run):
    page = build_page(run)
    assert page.count("<tr>") == 6 and "-0.500 *" in page
    heights = {name: page.split(f">{name}</text>")[0].rsplit("<text", 1)[1] for name in ("stage2", "gate", "tuned")}
    assert len({text.split('y="')[1].split('"')[0] for text in heights.values()}) > 1, (
        "names of narrow stages need several rows"
    )


def test_a_stage_with_an_unknown_origin_is_still_shown(tmp_path):
    write_stage(tmp_path, "a", flat(3, 1.0), "a")
    write_stage(tmp_path, "b", flat(3, 1.0), "elsewhere/stage9")
    assert {stage.name: stage.origin for stage in read_stages(tmp_path)} == {"a": None, "b": None}
