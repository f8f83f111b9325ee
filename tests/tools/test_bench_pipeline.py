"""The pipeline bench on two processes: a comparison is fair only between schedules that compute the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from looplm.cli import UserError
from tools.bench_pipeline import PipelineBenchConfig, main

ROOT = Path(__file__).resolve().parents[2]


def test_both_schedules_compute_the_same_and_the_bench_prints_them() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "tests.tools.pipeline_worker"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = re.findall(
        r"^  (\d+) +(virtual stages|loop by loop) +\d+ ms +\d+ ms +[\d.]+% +([\d.]+)%$", done.stdout, re.MULTILINE
    )
    assert rows == [
        ("2", "virtual stages", "16.7"),
        ("2", "loop by loop", "50.0"),
        ("4", "virtual stages", "8.3"),
        ("4", "loop by loop", "25.0"),
    ]
    assert re.findall(r"^ +virtual stages / loop by loop +[\d.]+ +([\d.]+)$", done.stdout, re.MULTILINE) == ["0.78", "0.87"]  # fmt: skip


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="repeats: 0 is not allowed"):
        PipelineBenchConfig(repeats=0)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE: 1 is not allowed; a pipeline has at least 2 ranks: torchrun"):
        main([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="micro_batches: 3 is not allowed; give multiples of the 2 ranks"):
        main(["--micro_batches", "[2,3]"])
