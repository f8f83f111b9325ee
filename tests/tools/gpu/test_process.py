"""Parts in processes of their own: however one ends, its record says how, and what it had measured is kept."""

import dataclasses
import time
from pathlib import Path

import pytest

from tests.support.launch import SERVER
from tools.gpu import process
from tools.gpu.parts import PARTS, Part
from tools.gpu.record import PartRecord

pytestmark = pytest.mark.slow  # every test here starts a process

PART = Part(
    name="some",
    title="something",
    module="tests.support.gpu_parts",
    limit_s=60,
    environment={"GPU_PARTS_TEST": "set"},
)


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork parts from the tests' own server, whose list of modules to import must stay as it is."""
    monkeypatch.setattr(process, "_context", lambda _: SERVER)


def run(folder: Path, variant: str, **changes: float | str) -> PartRecord:
    part = dataclasses.replace(PART, variant=variant, **changes)  # type: ignore[arg-type]
    record = process.run_part(part, "cpu", folder)
    assert [row.name for row in record.rows][:1] == ([] if changes.get("module") else ["first"])
    assert [path.name for path in folder.iterdir()] == [f"{part.name}.log"], "its own files are removed"
    return record


def test_a_part_that_ends_well_is_ok(tmp_path: Path) -> None:
    record = run(tmp_path, "ends")
    assert (record.status, record.note, record.log) == ("ok", "", "some.log")
    assert record.rows[0].values == {"device": "cpu", "variable": "set"}
    assert "done" in (tmp_path / record.log).read_text()


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("raises", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("is killed", "ended by SIGSEGV; last line: "),
        ("exits", "error: no such thing"),
        ("differs", "2 of 3 tensors differ"),
    ],
)
def test_a_part_that_fails_gives_its_last_line_and_keeps_its_rows(variant: str, reason: str, tmp_path: Path) -> None:
    record = run(tmp_path, variant)
    assert record.status == "failed" and record.note.startswith(reason)
    assert (tmp_path / record.log).read_text()


def test_a_part_that_hangs_is_stopped_and_its_log_says_where_it_was(tmp_path: Path) -> None:
    begin = time.monotonic()
    record = run(tmp_path, "hangs", limit_s=1)
    assert time.monotonic() - begin < 20
    assert record.status == "failed" and record.note.startswith("stopped after its limit of 4 s")
    assert "gpu_parts.py" in (tmp_path / record.log).read_text(), "the stack of the sleeping process"


def test_a_module_that_cannot_be_imported_fails_its_part_alone(tmp_path: Path) -> None:
    record = run(tmp_path, "", module="tests.support.no_such_part")
    assert record.status == "failed" and record.rows == ()
    assert record.note == "ModuleNotFoundError: No module named 'tests.support.no_such_part'"


def test_what_cannot_be_measured_here_is_no_failure(tmp_path: Path) -> None:
    record = run(tmp_path, "cannot")
    assert (record.status, record.rows[1].status, record.rows[1].note) == ("ok", "not run", "too little memory")


def test_a_part_without_its_package_is_not_started(tmp_path: Path) -> None:
    part = dataclasses.replace(PARTS["speed-flash"], needs=("no_such_package", "os"))
    record = process.run_part(part, "cpu", tmp_path)
    assert (record.status, record.seconds, record.log) == ("not run", 0, "")
    assert record.note == "no_such_package: not installed here (setup.py, [gpu])"
    assert not list(tmp_path.iterdir())
