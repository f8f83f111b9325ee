"""The planner's memory estimates against real training steps; all checks: make plan-check."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from looplm.config import LossConfig, ParallelConfig
from looplm.failures import UserError
from tests.support.launch import run_ranks
from tools import plan_check
from tools.plan_check import CHECKS, PARTS, TOLERANCE, MemoryCheck, compare, measure, planned_run, recipe_of
from tools.planning.memory import rank_memory

pytestmark = pytest.mark.slow  # every test here starts a process or trains

ALONE = ["alone, none, MHA", "alone, none, MLA, bf16", "alone, full, MLA", "alone, loop, MHA, bf16"]
ALONE += ["alone, none, MHA, step embedding", "alone, none, MHA, head gate", "alone, selective, MLA, element gate"]
ALONE += ["alone, none, MLA, plain latent", "alone, none, MLA, prelude and coda", "alone, full, MHA, prelude and coda"]
ALONE += ["alone, none, MLA, latent reasoning", "alone, none, MLA, latent reasoning, bf16"]
ALONE += ["alone, none, MLA, linear injection"]
ALONE += ["alone, none, MHA, last loop's loss, bf16", "alone, none, MHA, penalized states, bf16"]
TOGETHER = [
    "DP2 + distributed optimizer, MLA, bf16",
    "TP2, none, MLA",
    "TP2, none, MLA, element gate",
    "PP2, none, MLA",
    "PP2, loop, MLA",
    "PP2, loop, MLA, prelude and coda",
    "PP2, loop, MLA, linear injection",
    "CP2, none, MLA",
]
WIDTH = 64  # of the model: a quarter of that in plan_check


def assert_near(rows: list[tuple[str, int, str, float, float]]) -> None:
    assert [row[2] for row in rows] == [*PARTS] * (len(rows) // len(PARTS))
    off = {(name, rank, part): predicted / measured - 1 for name, rank, part, predicted, measured in rows}
    assert max(map(abs, off.values())) <= TOLERANCE, off


@pytest.mark.parametrize("name", ALONE)
def test_one_process(name: str, single_process) -> None:
    assert_near(compare(name, [measure(recipe_of(CHECKS[name], WIDTH), single_process)], WIDTH))


def test_a_frozen_trunk(single_process) -> None:
    config = recipe_of(MemoryCheck(1, ParallelConfig()), WIDTH)
    frozen = replace(
        config, loss=LossConfig(objective="adaptive_gate"), checkpoint=replace(config.checkpoint, initial="unused")
    )
    measured, predicted = measure(frozen, single_process), asdict(rank_memory(planned_run(frozen, 1), 0))
    for part in PARTS:
        assert predicted[part] == pytest.approx(measured[part], rel=0.1), part


def test_two_processes(tmp_path: Path) -> None:
    output = tmp_path / "measured.json"
    run_ranks(2, plan_check.worker, (output, TOGETHER, WIDTH), tmp_path / "log.txt")
    measured = json.loads(output.read_text())
    assert list(measured) == TOGETHER
    for name in TOGETHER:
        assert_near(compare(name, measured[name], WIDTH))


def test_a_selection_without_a_check_is_refused() -> None:
    with pytest.raises(UserError, match=r"only: 'TP3' is not allowed; .* alone, none, MLA \| .* \| TP2, none, MLA \|"):
        plan_check.main(["--only", "TP3"])


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name = "alone, full, MLA"
    plan_check.main(["--only", name])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(name)]
    assert [row.split()[4] for row in rows] == [*PARTS]
    off = {name: [dict.fromkeys(PARTS, 1)]}
    monkeypatch.setattr(plan_check, "launch", lambda ranks, names: off)
    with pytest.raises(SystemExit, match="1"):
        plan_check.main(["--only", name])
