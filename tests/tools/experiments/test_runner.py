"""An experiment with real processes: killed, shared by two runners, nothing repeated, and reported."""

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
from tools.experiments.runner import Runner, keep_niceness

pytestmark = pytest.mark.slow


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tools.experiment", "run", str(folder / "mini.yaml")]
    command += ["--output_dir", str(folder / "runs"), "--evidence", str(folder / "evidence"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evidence/mini.jsonl").read_text().splitlines()]


def test_a_session_gets_its_runners_niceness():
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        scheduled = Path(f"/proc/{process.pid}/autogroup")
        keep_niceness(process.pid, 7)
        text = scheduled.read_text() if scheduled.exists() else "nice 7\n"
        process.kill()
    assert text.endswith("nice 7\n")


def test_two_runners_share_an_experiment_and_a_killed_one_is_continued(tmp_path, capsys):
    one_seed = MINI.replace("seeds: [1, 2]", "seeds: [1]").replace("rates: [0.001, 0.002]", "rates: [0.001]")
    (tmp_path / "mini.yaml").write_text(one_seed)
    first = start(tmp_path)
    while not list((tmp_path / "runs/mini").glob("*/unit.json")):
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)  # its run goes on alone, or is continued
    first.communicate()
    pair = [start(tmp_path) for _ in range(2)]
    texts = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], texts
    rows = records(tmp_path)
    assert sorted((row["trial"], row["arm"], row["seed"]) for row in rows) == [("final", "1x1", 1), ("final", "1x2", 1)]
    for row in rows:
        assert row["figures"]["valid.loss"] > 0 and row["tokens"] == 64 * row["steps"] == 384
    curves = next(row["curves"] for row in rows if row["arm"] == "1x2")
    assert len(curves["test.accuracy by depth"]) == len(curves["test.refitted accuracy by depth"]) == 4
    assert curves["longer.levels"] == [float(n) for n in range(1, 12)]
    for metrics in (tmp_path / "runs/mini").glob("*/run/metrics.jsonl"):
        steps = [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if row["kind"] == "train"]
        assert steps == [1, 2, 3, 4, 5, 6], "a step was trained twice, or left out"

    again = start(tmp_path, "--output_dir", str(tmp_path / "elsewhere"))
    text = again.communicate(timeout=100)[0]
    assert again.returncode == 0 and not (tmp_path / "elsewhere").exists(), f"recorded runs were repeated: {text}"
    experiment.main(["report", str(tmp_path / "mini.yaml"), "--evidence", str(tmp_path / "evidence")])
    assert "Does it run?" in (tmp_path / "evidence/mini.md").read_text() and "undecided" in capsys.readouterr().out


def test_a_failing_run_is_named_with_its_log(tmp_path):
    broken = mini(base={"model": {"vocab_size": 3}}, sweep={"rates": [1e-3]})
    with pytest.raises(UserError, match=r"final_1x1_lr0.001_seed1 ended with status 2; see .*log.txt"):
        Runner(broken, tmp_path / "runs", tmp_path / "mini.jsonl").run(1)
    [log] = (tmp_path / "runs").glob("final_1x1*/log.txt")
    assert "model.vocab_size: 3 is not allowed" in log.read_text()
