"""Experiments with real processes: run, killed, shared, and nothing repeated."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from looplm.cli import UserError
from tests.tools.experiments.test_runs import MINI, mini
from tools import experiment
from tools.experiments.runner import Runner

pytestmark = pytest.mark.slow


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tools.experiment", "run", str(folder / "mini.yaml")]
    command += ["--output_dir", str(folder / "runs"), "--evidence", str(folder / "evidence"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evidence/mini.jsonl").read_text().splitlines()]


def test_two_runners_share_an_experiment_and_a_killed_one_is_continued(tmp_path, capsys):
    (tmp_path / "mini.yaml").write_text(
        MINI.replace("seeds: [1000, 1001]", "seeds: [1000]").replace("seeds: [1, 2]", "seeds: [1]")
    )
    first = start(tmp_path)
    while not list((tmp_path / "runs/mini").glob("*/unit.json")):
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)  # its run goes on alone, or is continued
    first.communicate()
    pair = [start(tmp_path) for _ in range(2)]
    texts = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], texts
    rows = records(tmp_path)
    assert len(rows) == 4 + 2 and {row["trial"] for row in rows} == {"sweep", "final"}
    for row in rows:
        assert row["figures"]["valid.loss"] > 0 and ("test.accuracy" in row["figures"]) == (row["trial"] == "final")
        assert row["lr"] in (0.001, 0.002) and row["tokens"] == 64 * row["steps"]
    final = next(row for row in rows if row["trial"] == "final" and row["arm"] == "1x2")
    curves = final["curves"]
    assert len(curves["test.accuracy by depth"]) == 4 and curves["longer.levels"] == [float(n) for n in range(1, 13)]
    assert len(curves["test.refitted accuracy by depth"]) == 4
    logs = (
        [json.loads(line) for line in (tmp_path / "runs/mini/final_1x2_lr0.002_seed1/run/metrics.jsonl").open()]
        if (tmp_path / "runs/mini/final_1x2_lr0.002_seed1").exists()
        else []
    )
    assert len({row["step"] for row in logs if row["kind"] == "train"}) == len(
        [row for row in logs if row["kind"] == "train"]
    ), "a step was trained twice"

    (tmp_path / "evidence/copy").mkdir()
    again = start(tmp_path, "--output_dir", str(tmp_path / "elsewhere"))
    assert again.communicate(timeout=60)[0].count("final_") == 0 and again.returncode == 0, "runs were repeated"
    assert not (tmp_path / "elsewhere").exists()
    experiment.main(["report", str(tmp_path / "mini.yaml"), "--evidence", str(tmp_path / "evidence")])
    assert "Does it run?" in (tmp_path / "evidence/mini.md").read_text()
    assert capsys.readouterr().out


def test_a_failing_run_is_named_with_its_log(tmp_path):
    config = mini(base={"health": {"max_skipped": 0}, "optim": {"lr": 1e30, "min_lr": 0.0}}, sweep={"rates": [1e30]})
    with pytest.raises(UserError, match=r"final_1x1_lr1e\+30_seed1 ended with status \d+; see .*log.txt"):
        Runner(config, tmp_path / "runs", tmp_path / "mini.jsonl").run(1)
