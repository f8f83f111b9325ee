"""Records and tables of the GPU check."""

import dataclasses
import json
import time
from pathlib import Path

import pytest

from looplm.failures import UserError
from tools.gpu import report
from tools.gpu.environment import describe_host
from tools.gpu.parts import PARTS, TOTAL_S, stretched
from tools.gpu.record import LONGEST, Mismatch, NotRun, PartRecord, Row, Rows, read_rows, short, status_of

ROOT = Path(__file__).resolve().parents[3]


def part(name: str, *rows: Row, status="ok", note="") -> PartRecord:
    return PartRecord(
        name=name, title="a title", status=status, seconds=1.2, limit_s=30, note=note, log=f"{name}.log", rows=rows
    )


CHECK = report.Check(
    device="cuda",
    machine="NVIDIA H200",
    date="2026-11-29",
    revision="abc",
    seconds=12.0,
    logs="x",
    parts=(
        part(
            "environment",
            Row(name="device", values={"name": "NVIDIA H200", "memory GiB": 139.8}),
            Row(name="host", values={"cores": 16}),
        ),
        part(
            "speed",
            Row(name="mla", values={"tokens/s": 123_456, "MFU %": None}),
            Row(name="mha", status="failed", note="out | of memory"),
            status="failed",
            note="out | of memory",
        ),
        part("speed-te", status="not run", note="transformer_engine is not installed here"),
    ),
)


def test_the_parts_fit_into_eight_minutes() -> None:
    assert sum(part.limit_s for part in PARTS.values()) <= TOTAL_S == 8 * 60
    assert next(iter(PARTS)) == "environment"


def test_parts_that_cannot_run_leave_their_time_to_the_others() -> None:
    parts = [dataclasses.replace(PARTS[name], needs=()) for name in ("parity", "decode")]
    absent = dataclasses.replace(PARTS["speed-te"], needs=("no_such_package",))
    found = stretched([*parts, absent])
    assert TOTAL_S - 2 <= found[0].limit_s + found[1].limit_s <= TOTAL_S
    assert found[0].limit_s / found[1].limit_s == pytest.approx(parts[0].limit_s / parts[1].limit_s, rel=0.01)


def test_no_measurement_begins_after_the_deadline(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows", deadline=time.monotonic() - 1)
    rows.measure("late", lambda: {"a": 1})
    assert read_rows(tmp_path / "rows") == (Row(name="late", status="not run", note="the time of the part is over"),)


def test_the_page_shows_every_row_with_its_reason() -> None:
    page = report.page(CHECK)
    assert page.startswith("# GPU check: NVIDIA H200, 2026-11-29\n")
    assert "| device | name NVIDIA H200, memory GiB 139.8 |" in page, "rows without common columns are in words"
    assert "| what | tokens/s | MFU % | reason |\n|---|---|---|---|\n| mla | 123,456 | – |  |" in page
    assert "| mha |  |  | failed: out \\| of memory |" in page
    assert "| speed-te | not run | 1.2 | 30 | transformer_engine is not installed here |" in page


def test_the_terminal_ends_with_the_parts_and_where_the_logs_of_failed_ones_are() -> None:
    lines = report.text(CHECK, Path("runs/gpu-check/x")).splitlines()
    assert lines[-2:] == ["speed failed: out | of memory", "  its log: runs/gpu-check/x/speed.log"]
    assert lines[-5].split() == ["environment", "ok", "1.2", "30"]
    rows = [line for line in lines if line.startswith(("  mla", "  mha", "  what"))]
    assert len({line.index(word) for line, word in zip(rows[1:], ("tokens/s", "123,456"), strict=False)}) == 1


def test_a_record_is_read_back_and_a_second_one_of_the_day_has_another_name(tmp_path: Path) -> None:
    stem = report.free_stem(tmp_path, CHECK.machine, CHECK.date)
    assert stem.name == "nvidia-h200-2026-11-29"
    written = report.write(CHECK, stem)
    assert [path.name for path in written] == ["nvidia-h200-2026-11-29.json", "nvidia-h200-2026-11-29.md"]
    assert report.read(written[0]) == CHECK and written[1].read_text() == report.page(CHECK)
    assert report.free_stem(tmp_path, CHECK.machine, CHECK.date).name == "nvidia-h200-2026-11-29-2"
    assert report.free_stem(tmp_path, " ", CHECK.date).name == "unknown-2026-11-29"


def test_every_page_is_that_of_its_record(tmp_path: Path) -> None:
    report.write(CHECK, tmp_path / "nvidia-h200-2026-11-29")
    for folder in (tmp_path, ROOT / "docs/gpu"):  # the documentation has none as long as no GPU was checked
        records, pages = sorted(folder.glob("*.json")), sorted(folder.glob("*.md"))
        assert [path.stem for path in records] == [path.stem for path in pages]
        assert records or folder != tmp_path
        for record, page in zip(records, pages, strict=True):
            assert page.read_text() == report.page(report.read(record)), page


def test_a_record_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match=r"x.json: format: 99 is not allowed; this release reads 1"):
        report.read(path)


def test_a_measurement_that_fails_or_cannot_be_made_leaves_the_next_ones(tmp_path: Path, capsys) -> None:
    rows = Rows(tmp_path / "rows.jsonl")

    def raises(error: Exception):
        def measurement():
            raise error

        return measurement

    rows.measure("good", lambda: {"a": 1})
    rows.measure("not here", raises(NotRun("no FP8")))
    rows.measure("refused", raises(UserError("engine.fp8: no")))
    rows.measure("wrong", raises(Mismatch("they differ", {"a": 2})))
    rows.measure("broken", raises(ValueError("x\n" * 500)))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"name": "cut sh')
    found = read_rows(tmp_path / "rows.jsonl")
    assert [row.status for row in found] == ["ok", "not run", "not run", "failed", "failed"]
    assert found[3].values == {"a": 2} and found[3].note == "they differ"
    assert found[4].note.startswith("ValueError: x x") and len(found[4].note) == LONGEST
    assert "Traceback" in capsys.readouterr().err
    assert read_rows(tmp_path / "absent") == ()


def test_the_status_of_a_part_follows_from_its_rows() -> None:
    good, bad, none = (Row(name="", status=status) for status in ("ok", "failed", "not run"))
    assert status_of((good, none), "") == "ok"
    assert status_of((good, bad), "") == "failed"
    assert status_of((none,), "") == status_of((), "") == "not run"
    assert status_of((good,), "killed") == "failed"


def test_a_reason_is_one_printable_line() -> None:
    assert short("a\n  b\x1b[31m") == "a b\\x1b[31m"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("No such file: '/home/someone/x/cc'", "No such file: 'cc'"),
        ('File "/usr/lib/python3.12/a.py", line 3', 'File "a.py", line 3'),
        ("/tmp/a/libx.so.3: not found (/opt/b/)", "libx.so.3: not found (b/)"),
        ("see https://docs.nvidia.com/cuda/x, and docs/gpu.md; 9 / 2 tokens/s", None),
    ],
)
def test_a_reason_names_no_folder(text: str, shown: str | None) -> None:
    assert short(text) == (shown or text)


def test_a_record_has_the_compilers_name_without_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/home/someone/bin/{name}" if name == "gcc" else None)
    assert describe_host()["C compiler"] == "gcc"
