"""The GPU check: whole on a CPU, so that it cannot be broken when a GPU appears; and what it says without one."""

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from looplm.failures import UserError
from tools import gpu_check
from tools.gpu import report
from tools.gpu.parts import PARTS
from tools.gpu.record import PartRecord, Row

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], report.Check]:
    """Run the command in a new process, and return what it printed and recorded."""
    command = [sys.executable, "-m", "tools.gpu_check", "--output", str(tmp_path / "record")]
    command += ["--logs", str(tmp_path / "logs"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    (path,) = (tmp_path / "record").glob("*.json")
    return done, report.read(path)


@pytest.mark.slow
def test_the_whole_check_runs_on_a_cpu(tmp_path: Path) -> None:
    done, check = run(tmp_path, "--device", "cpu")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    parts = {part.name: part for part in check.parts}
    assert list(parts) == list(PARTS) and not [part.name for part in check.parts if part.name not in done.stdout]
    statuses = {name: "not run" if PARTS[name].missing else "ok" for name in PARTS}
    assert {name: part.status for name, part in parts.items()} == statuses
    assert all("not installed here" in part.note for part in check.parts if part.status == "not run")
    rows = {name: part.rows for name, part in parts.items()}
    assert all(row.status == "ok" for found in rows.values() for row in found)

    # 4 kinds of model x 2 precisions x 4 ways of recomputing x plain and packed
    assert len({row.name for row in rows["parity"]}) == 64
    errors = {
        precision: [r.values["worst"] for r in rows["parity"] if precision in r.name] for precision in ("fp32", "bf16")
    }
    assert max(errors["fp32"]) < 2e-5 and 1e-3 < max(errors["bf16"]) < 0.3  # type: ignore[type-var,operator]
    logs = tmp_path / "logs" / check.logs
    log = (logs / "resume.log").read_text()
    assert log.count("resuming after step 2 of 4") == 2, "once in each case"
    assert [row.values["resumed"] for row in rows["resume"]] == ["equal", "equal"]
    assert {"packed documents", "one document"} == {row.name.split(", ")[1] for row in rows["speed"]}
    assert all(row.values["tokens/s"] and row.values["planned GiB"] for row in rows["speed"])
    depths = Counter(row.values["mean depth"] for row in rows["decode"])
    assert depths == {1: 12, 2: 12, 3: 12}, "3 batches x 4 caches at each threshold"
    assert {row.values["tokens"] for row in rows["decode"]} == {2, 32, 256}
    kinds = {row.name.partition(": ")[0] for row in rows["profile"]}
    assert kinds == {"training step", "decoding, batch 1"} and any(": gap " in row.name for row in rows["profile"])
    page = next((tmp_path / "record").glob("*.md")).read_text()
    assert page == report.page(check) and "its figures mean nothing" in page
    assert sorted(path.stem for path in logs.glob("*")) == sorted(n for n, s in statuses.items() if s == "ok")


@pytest.mark.slow
def test_without_a_gpu_the_first_part_says_so_and_no_other_starts(tmp_path: Path) -> None:
    done, check = run(tmp_path, "--parts", "[parity]")
    assert done.returncode == 1
    environment, parity = check.parts
    assert (
        environment.status == "failed" and "sees no GPU; look at the driver, or give --device cpu" in environment.note
    )
    assert parity.status == "not run" and parity.note == f"environment failed: {environment.note}"
    assert f"its log: {tmp_path / 'logs' / check.logs}/environment.log" in done.stdout and check.machine == "unknown"


def test_a_part_that_fails_does_not_keep_the_others_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = list[str]()

    def run_part(part, device, folder):
        started.append(part.name)
        record = PartRecord(
            name=part.name, title=part.title, status="ok", seconds=1, limit_s=9, log="x", rows=(Row(name="x"),)
        )
        return dataclasses.replace(record, status="failed", note="it broke") if part.name == "parity" else record

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--output", str(tmp_path)])
    assert ended.value.code == 1 and started == list(PARTS)
    (record,) = tmp_path.glob("*.json")
    assert "/" not in report.read(record).logs, "a record holds no path"
    shown = capsys.readouterr().out
    assert "parity failed: it broke" in shown and shown.count(" failed: ") == 1
    started.clear()
    gpu_check.main(["--output", str(tmp_path), "--parts", "[resume,decode]"])
    assert started == ["environment", "resume", "decode"]


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(UserError, match=r"parts: 'speeds' is not allowed; give some of environment, parity"):
        gpu_check.main(["--parts", "[speeds]"])


def test_a_record_that_could_not_be_written_is_refused_before_the_check(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output: .*file' is not allowed; it is a file; name a folder"):
        gpu_check.main(["--device=cpu", f"--output={tmp_path / 'file'}"])
