"""Records of runs: what is written is read, damage and contradictions are refused, nothing is half written."""

import json
import math
from threading import Timer

import pytest

from looplm.cli import to_dict
from looplm.failures import UserError
from looplm.lock import FolderLock
from tests.support.experiments import a_row, some_rows
from tools.experiments import rows as module
from tools.experiments.rows import Row, arms_of, merge_rows, read_row, read_rows, write_row


def test_a_record_is_read_as_it_was_written(tmp_path):
    row = a_row(curves={"test.levels": (4.0, 8.0), "test.accuracy by level": (0.9, 0.5)}, arm="größer\u2028")
    write_row(tmp_path / "run/row.json", row)
    assert read_row(tmp_path / "run/row.json") == row


def test_records_are_merged_in_order_and_only_once(tmp_path):
    path, rows = tmp_path / "evidence/words.jsonl", some_rows()
    assert len(merge_rows(path, rows[::2])) == len(rows[::2])
    merged = merge_rows(path, rows)
    assert set(map(str, merged)) == set(map(str, rows)) and merged == read_rows(path)
    before = path.read_bytes()
    assert before.count(b"\n") == len(rows)
    merge_rows(path, rows[::-1])
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["words.jsonl"], "neither a lock nor a partial file is left"


def test_a_diverged_run_is_a_record_too(tmp_path):
    row = a_row(figures={"test.loss": math.nan, "test.norm": math.inf})
    merge_rows(tmp_path / "x.jsonl", [row])
    merge_rows(tmp_path / "x.jsonl", [row])
    [found] = read_rows(tmp_path / "x.jsonl")
    assert math.isnan(found.figures["test.loss"]) and found.figures["test.norm"] == math.inf


def test_another_record_of_the_same_run_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    merge_rows(path, [a_row()])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"x.jsonl: has another record of arm looped, seed 0, final, lr 0.002; remove"):
        merge_rows(path, [a_row(lr=2e-3)])
    assert path.read_bytes() == before, "a final run is known by arm and seed, whatever its rate"
    merge_rows(path, [a_row(trial="sweep"), a_row(trial="sweep", lr=2e-3)])
    assert len(read_rows(path)) == 3


def test_a_failure_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    merge_rows(path, [a_row()])
    before = path.read_bytes()

    def broken(*_: object) -> None:
        raise OSError("disk")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
        patch.setattr(module, "write_whole", broken)
        merge_rows(path, [a_row(seed=1)])
    assert path.read_bytes() == before
    assert len(merge_rows(path, [a_row(seed=1)])) == 2, "the lock was released"


def test_runners_that_end_at_the_same_time_wait_for_each_other(tmp_path):
    lock = FolderLock(tmp_path, "evidence", say=print)
    lock.acquire()
    Timer(0.3, lock.release).start()
    assert len(merge_rows(tmp_path / "x.jsonl", [a_row()])) == 1


def test_a_folder_that_another_process_does_not_release_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.experiments.rows._PATIENCE", 0.2)
    with FolderLock(tmp_path, "evidence", say=print), pytest.raises(UserError, match="another run is writing"):
        merge_rows(tmp_path / "x.jsonl", [a_row()])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n", r"x.jsonl:1: not a line of JSON"),
        ("[]\n", r"x.jsonl:1: holds a list, not a JSON object"),
        ("\n", r"x.jsonl:1: not a line of JSON"),
        ("", r"x.jsonl:1: not a line of JSON"),
        (json.dumps({**to_dict(a_row()), "arms": 1}) + "\n", r"x.jsonl:1: arms: unknown key; did you mean arm\?"),
        (json.dumps({**to_dict(a_row()), "trial": "test"}) + "\n", "trial: 'test' is not allowed; give one of sweep"),
        (json.dumps({**to_dict(a_row()), "lr": 0}) + "\n", r"x.jsonl:1: lr: 0.0 is not allowed; give a number above 0"),
        ((json.dumps(to_dict(a_row())) + "\n") * 2, "recorded twice; keep one of the two lines"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"x.jsonl: cannot be read .No such file or directory.; restore it from git"):
        read_rows(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"x.jsonl: cannot be read \(not UTF-8\)"):
        read_rows(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="not a regular file"):
        read_rows(tmp_path)


def test_a_curve_has_positions():
    row = a_row(curves={"accuracy by depth": (0.2, 0.3), "test.depths": (2.0,), "test.loss by depth": (1.0,)})
    assert row.positions("accuracy by depth") == (1.0, 2.0), "depths count from 1 if they are not given"
    assert row.positions("test.loss by depth") == (2.0,)
    with pytest.raises(UserError, match=r"without 'test.levels'.*record its positions as 'test.levels'"):
        a_row(curves={"test.accuracy by level": (0.2,)})
    with pytest.raises(UserError, match=r"curves.levels: '1 values' is not allowed; give as many positions .* .2."):
        a_row(curves={"exit depth by level": (2.0, 3.0), "levels": (4.0,)})


def test_arms_are_ordered_by_size_and_hold_final_runs_only():
    arms = arms_of(some_rows()[::-1])
    assert list(arms) == ["once", "looped", "deep"]
    assert list(arms["deep"].rows) == [0, 1, 2, 3] and arms["looped"].learning_rates == (1e-3,)
    assert arms["looped"].flops == 2.4e6 * 3_072_000
    assert arms["once"].values("test.accuracy")[3] == 0.351 and arms["once"].values("valid.loss") == {}


def test_runs_whose_steps_draw_their_loops_cost_what_they_cost_in_the_mean():
    [arm] = arms_of([a_row(flops_per_token=2.0e6), a_row(seed=1, flops_per_token=2.1e6)]).values()
    assert arm.flops_per_token == pytest.approx(2.05e6)


def test_every_figure_of_a_run_that_diverged_is_nan():
    [arm] = arms_of([a_row(), a_row(seed=1, figures={}, diverged=True)]).values()
    assert arm.values("test.accuracy")[0] == 0.5 and math.isnan(arm.values("test.accuracy")[1])


def test_no_record_makes_no_file(tmp_path):
    assert merge_rows(tmp_path / "x.jsonl", []) == () and not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["parameters", "flops_per_token", "tokens"])
def test_runs_of_an_arm_differ_only_in_their_seed(key):
    with pytest.raises(UserError, match=f"arm looped, seed 1, final, lr 0.001: {key}: .* seed 0 has"):
        arms_of([a_row(), a_row(seed=1, **{key: 17})])


def test_every_field_is_written():
    assert set(to_dict(a_row())) == set(Row.__dataclass_fields__)
