"""The pipeline bench on two processes: both schedules must compute the same for a fair comparison."""

import re
from pathlib import Path

import pytest

from looplm.failures import UserError
from tests.support import pipeline_worker
from tests.support.launch import run_ranks
from tools.bench.pipeline import PipelineBenchConfig, main


@pytest.mark.slow
def test_both_schedules_compute_the_same_and_are_printed(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    run_ranks(2, pipeline_worker.run, (), log, timeout=300)
    printed = log.read_text()
    rows = re.findall(
        r"^  (\d+) +(virtual stages|loop by loop) +\d+ ms +\d+ ms +[\d.]+% +([\d.]+)%$", printed, re.MULTILINE
    )
    assert rows == [
        ("2", "virtual stages", "16.7"),
        ("2", "loop by loop", "50.0"),
        ("4", "virtual stages", "8.3"),
        ("4", "loop by loop", "25.0"),
    ]
    ratios = re.findall(r"^ +virtual stages / loop by loop +[\d.]+ +([\d.]+)$", printed, re.MULTILINE)
    assert ratios == ["0.78", "0.87"]


def test_bad_input_gives_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="repeats: 0 is not allowed"):
        PipelineBenchConfig(repeats=0)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE: 1 is not allowed; a pipeline has at least 2 ranks: torchrun"):
        main([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="micro_batches: 3 is not allowed; give multiples of the 2 ranks"):
        main(["--micro_batches", "[2,3]"])
