"""Repeated runs are recorded if they succeed and are complete, and nothing else is."""

import sys
from pathlib import Path

import pytest

from looplm.failures import UserError
from looplm.files import sha256_of
from tools import history

pytestmark = pytest.mark.slow  # every test here starts a process or trains

HEAD = ",".join(history.COLUMNS) + "\n"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "history.csv"
    path.write_text(HEAD)
    monkeypatch.setattr(history, "TABLE", path)
    monkeypatch.setattr(history, "PLOT", tmp_path / "history.svg")
    return path


def say(text: str, status: int = 0) -> list[str]:
    """Return a command that prints ``text`` and exits with ``status``."""
    return [sys.executable, "-c", f"import sys; print({text!r}); sys.exit({status})"]


def test_a_successful_run_is_recorded(table: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert history.record("test", say("== 7 passed, 2 skipped in 1.5s ==")) == 0
    (row,) = history.read_rows()
    assert (row["command"], row["result"]) == ("make test", "7 passed, 2 skipped") and int(row["seconds"]) < 60
    assert "7 passed" in capfd.readouterr().out
    assert sha256_of(table) in history.PLOT.read_text(), "the plot follows the table"


def test_a_failed_or_partial_run_is_not_recorded(table: Path) -> None:
    assert history.record("test", say("1 failed, 7 passed in 2s", status=1)) == 1
    assert history.record("quickstart", say("== quickstart 6/6: report")) == 0
    assert table.read_text() == HEAD


def test_a_table_that_cannot_be_written_is_no_failure(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(history, "TABLE", table.parent)
    assert history.record("test", say("7 passed")) == 0
    assert "not recorded" in capsys.readouterr().err


def test_the_figures_of_the_quickstart_and_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text('{"depths": [{"depth": 1, "loss": 4.5581}, {"depth": 2, "loss": 4.411}]}')
    monkeypatch.setattr(history, "EVALUATION", evaluation)
    assert history.result("quickstart", "== quickstart 1/6: data\n") == "4.558 4.411"
    assert history.result("bench", "  ok      speed   1.06   ≥ 1.05\n11 of 18 aims met\n") == "11 of 18 aims met"
    assert history.result("bench", "killed before its end\n") == ""


def test_an_unknown_name_is_refused_before_the_command_runs(table: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    with pytest.raises(UserError, match="NAME: 'tests' is not allowed; give one of test, faults, quickstart, bench"):
        history.record("tests", [sys.executable, "-c", f"open({str(made)!r}, 'w')"])
    assert not made.exists()


def test_rows_that_cannot_be_read_are_left_out_of_the_plot_and_stay_in_the_table(table: Path) -> None:
    table.write_text(f"{HEAD}2026-01-01,abc,make test,12.5,7 passed,2 cores\n2026-01-02,abc,make test,60,7 passed,2 c")
    assert history.record("test", say("7 passed")) == 0
    assert len(table.read_text().splitlines()) == 4 and len(history.read_rows()) == 3
    table.unlink()
    assert history.record("test", say("8 passed")) == 0
    assert [row["result"] for row in history.read_rows()] == ["8 passed"], "a new table has a header"


def test_a_table_without_rows_has_no_plot(table: Path) -> None:
    with pytest.raises(UserError, match=r"history.csv: has no row with seconds; restore it from git"):
        history.plot()
