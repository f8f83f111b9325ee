"""Rehearsals against real runs of four processes, and seeded faults that a rehearsal must find."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from looplm.cli import to_dict
from looplm.config import ModelConfig, ParallelConfig, RunConfig
from looplm.failures import UserError
from tests.support.launch import run_ranks
from tests.support.rehearsal_worker import play_roles, read_real, read_roles, record_real_step
from tests.support.tiny import MODEL, run_config
from tools.rehearsal.one_role import RoleReport
from tools.rehearsal.rehearsal import faults_of, plan_rehearsal, rehearse
from tools.rehearsal.report import compared_roles, describe
from tools.rehearse import main

pytestmark = pytest.mark.slow

RANKS = 4
SMALL = dataclasses.replace(
    MODEL, hidden_size=64, ffn_hidden_size=96, num_layers=4, num_attention_heads=4, q_lora_rank=24, vocab_size=512
)
MHA = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    ffn_hidden_size=96,
    num_layers=4,
    num_loops=2,
    num_attention_heads=4,
    num_query_groups=2,
    attention="mha",
    max_sequence_length=64,
)
TENSOR_PIPELINE = ParallelConfig(tensor=2, pipeline=2, recompute="loop")
CONTEXT_DATA = ParallelConfig(context=2, distributed_optimizer=True, overlap_grad_reduce=True)
PIPELINE_DATA = ParallelConfig(pipeline=2)


def small_run(layout: ParallelConfig, micro_batches: int, ranks: int = RANKS, **sections: Any) -> RunConfig:
    batch = micro_batches * 2 * layout.replicas(ranks)
    data = {"global_batch_size": batch, "seq_length": 64, "micro_batch_size": 2}
    parts = {"model": SMALL, "parallel": layout, "data": data, **sections}
    return run_config(Path("unused"), Path("unused"), **parts)


def play(config: RunConfig, micro_batches: int, folder: Path, fault: str = "none", at: int = 1) -> list[RoleReport]:
    run_ranks(RANKS, play_roles, (config, RANKS, micro_batches, folder, fault, at), folder / "log.txt")
    return read_roles(folder, RANKS)


@pytest.mark.parametrize("layout", [TENSOR_PIPELINE, CONTEXT_DATA], ids=["TP2 x PP2", "CP2 x DP2"])
def test_a_rehearsal_records_what_a_real_run_does(layout: ParallelConfig, tmp_path: Path) -> None:
    micro_batches = 2 * layout.pipeline
    config = small_run(layout, micro_batches)
    run_ranks(RANKS, record_real_step, (config, micro_batches, tmp_path), tmp_path / "real.txt")
    reports = play(config, micro_batches, tmp_path)
    assert faults_of(config, reports) == []
    for report, (memory, messages) in zip(reports, read_real(tmp_path, RANKS), strict=True):
        assert report.messages == messages
        assert report.memory.peak == pytest.approx(memory.peak, rel=0.02)
        for kind, size in memory.most.items():
            assert report.memory.most[kind] == pytest.approx(size, rel=0.02), kind


def found(layout: ParallelConfig, fault: str, folder: Path, at: int = 1) -> str:
    """Return what the rehearsal says about a run with a seeded fault."""
    config = small_run(layout, 2)
    return "\n".join(faults_of(config, play(config, 2, folder, fault, at)))


def test_a_skipped_collective_is_found(tmp_path: Path) -> None:
    text = found(TENSOR_PIPELINE, "skipped collective", tmp_path, at=3)
    assert "rank 2 issues all_reduce" in text and "rank 3 issues" in text
    assert "looplm/model/head.py" in text


def test_a_group_of_the_wrong_members_is_found(tmp_path: Path) -> None:
    text = found(PIPELINE_DATA, "wrong members", tmp_path)
    assert "rank 0 asks for [0, 1], rank 1 for [0, 2]" in text


def test_a_message_of_the_wrong_shape_is_found(tmp_path: Path) -> None:
    text = found(PIPELINE_DATA, "wrong shape", tmp_path)
    assert "rank 1 issues send of" in text and "rank 3 issues recv of" in text


def test_a_tensor_that_is_never_freed_is_found(tmp_path: Path) -> None:
    text = found(PIPELINE_DATA, "kept tensor", tmp_path)
    assert text.startswith("rank 1") and "outlive the step" in text


def test_a_layout_that_leaves_a_stage_empty_is_refused() -> None:
    layout = dataclasses.replace(PIPELINE_DATA, first_stage_layers=4)
    with pytest.raises(UserError, match=r"first_stage_layers: 4 .*must leave the same number of layers, at least 1"):
        small_run(layout, 2)


KINDS: dict[str, tuple[int, ParallelConfig, dict[str, Any]]] = {
    "stage 1": (8, dataclasses.replace(TENSOR_PIPELINE, recompute="none"), {}),
    "context": (8, dataclasses.replace(CONTEXT_DATA, recompute="full"), {}),
    "gate": (8, ParallelConfig(context=2), {"loss": {"objective": "adaptive_gate"}, "checkpoint": {"initial": "none"}}),
    "gate in a pipeline": (
        4,
        ParallelConfig(pipeline=2, tensor=2),
        {"loss": {"objective": "adaptive_gate"}, "checkpoint": {"initial": "none"}},
    ),
    "plain attention": (4, ParallelConfig(tensor=2, distributed_optimizer=True), {"model": MHA}),
}


def test_every_kind_of_run_is_rehearsed(capsys: pytest.CaptureFixture[str]) -> None:
    plans = []
    for name, (ranks, layout, sections) in KINDS.items():
        config = small_run(layout, 2 * layout.pipeline, ranks=ranks, **sections)
        plans.append(plan_rehearsal(name, config, ranks, "all", None))
    for rehearsal in rehearse(plans, jobs=2):
        text = "\n".join(describe(rehearsal))
        assert rehearsal.faults == [], text
        assert "messages are in accord" in text
        for report, rows in compared_roles(rehearsal):
            off = {row.what: row.off for row in rows if row.what in ("weights", "gradients", "FLOPs of products")}
            assert all(abs(one) < 0.03 for one in off.values()), (rehearsal.plan.name, report.role, off)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(to_dict(small_run(PIPELINE_DATA, 4))))  # JSON is YAML
    written = tmp_path / "out.json"
    main(["--config", str(config), "--gpus", "4", "--rank", "0,2", "--json", str(written)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 GPUs: tensor 1, pipeline 2, context 1, data 2; 4 of a step's 4 micro-batches")
    assert "messages are in accord" in lines[-2]
    assert [role["rank"] for role in json.loads(written.read_text())[0]["roles"]] == [0, 2]
    with pytest.raises(UserError, match="gpus: missing"):
        main(["--config", str(config)])


def test_a_step_that_fails_is_reported_with_its_rank() -> None:
    """A vocabulary that a kernel cannot have, in a config that nobody has checked."""
    plan = plan_rehearsal("broken", small_run(PIPELINE_DATA, 4), RANKS, "3", None)
    broken = dataclasses.replace(plan.config.model)
    object.__setattr__(broken, "norm_eps", "text")
    config = dataclasses.replace(plan.config)
    object.__setattr__(config, "model", broken)
    (rehearsal,) = rehearse([dataclasses.replace(plan, config=config)], jobs=1)
    assert rehearsal.faults[0].startswith("rank 3 (pipeline 1, data 1, context 0, tensor 0): TypeError: ")
    assert "looplm/model/norms.py" in rehearsal.faults[0]


@pytest.mark.parametrize(
    ("place", "fix"), [("", "it is a directory"), ("nowhere/x.json", "its directory does not exist")]
)
def test_figures_that_could_not_be_written_are_refused_before_the_rehearsal(
    place: str, fix: str, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(to_dict(small_run(PIPELINE_DATA, 4))))
    with pytest.raises(UserError, match=f"json: .* is not allowed; {fix}"):
        main(["--config", str(config), "--gpus", "4", "--json", str(tmp_path / place)])
