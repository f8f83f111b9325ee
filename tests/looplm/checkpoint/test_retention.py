"""Which steps stay: the newest whole ones and the permanent ones, whatever else lies in the folder."""

import os
import shutil
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from looplm import checkpoint
from looplm.checkpoint import step_folder
from looplm.checkpoint.step_folder import step_name
from looplm.checkpoint.verify import _REQUIRED as REQUIRED
from looplm.checkpoint.verify import fingerprint
from looplm.config import CheckpointConfig
from looplm.failures import StorageFailure


def make_step(folder: Path, step: int) -> Path:
    """Write a step directory that passes the cheap look: its files have their sizes."""
    partial, final = step_folder.create_partial(folder / step_name(step)), folder / step_name(step)
    for name in REQUIRED:
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_text(name)
    files = {name: fingerprint(partial / name) for name in REQUIRED}
    step_folder.publish(partial, final, files)
    return final


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir())


@pytest.mark.parametrize(
    ("keep", "keep_every", "whole", "left"),
    [
        (2, 0, [10, 20, 30, 40], [30, 40]),
        (1, 20, [10, 20, 30, 40], [20, 40]),
        (2, 30, [10, 20, 30, 40], [30, 40]),
        (2, 0, [10, 20, 40], [20, 30, 40]),  # 30 was found damaged, or never looked at: it does not count
        (2, 0, [40], [10, 20, 30, 40]),
        (1, 0, [20], [20, 30, 40]),
    ],
)
@pytest.mark.promise(
    text="Old checkpoints are deleted only while as many newer ones as `checkpoint.keep` are known to be whole",
    expected="the newest whole ones and the permanent ones stay",
)
def test_the_newest_whole_ones_and_the_permanent_ones_stay(
    keep, keep_every, whole, left, tmp_path, record_property
) -> None:
    for step in (10, 20, 30, 40):
        make_step(tmp_path, step)
    step_folder.delete_old(tmp_path, keep, keep_every, {step_name(step) for step in whole})
    assert steps(tmp_path) == left
    record_property("seen", f"keep {keep}, keep_every {keep_every}, whole {whole} of [10, 20, 30, 40]: {left} stay")


@pytest.mark.parametrize("keys", list(product((1, 3), (0, 2, 3, 50), (0, 2, 5), (12, 13))))
def test_the_disk_must_hold_what_a_run_holds_at_once(keys, tmp_path) -> None:
    keep, keep_every, save_every, last = keys
    most = 0
    for step in range(1, last + 1):
        if step == last or (save_every and step % save_every == 0):
            make_step(tmp_path, step)
            most = max(most, len(steps(tmp_path)))
            step_folder.delete_old(tmp_path, keep, keep_every, {path.name for path in tmp_path.iterdir()})
    retention = CheckpointConfig(save_every=save_every, keep=keep, keep_every=keep_every)
    config: Any = SimpleNamespace(checkpoint=retention, optim=SimpleNamespace(train_steps=last))
    assert most <= checkpoint.number_at_once(config) <= most + keep  # a permanent one can be among the newest


@pytest.mark.parametrize(
    ("verified", "keep", "healthy", "found"),
    [
        (40, 2, 40, [40, 30]),
        (40, 9, 40, [40, 30, 10]),  # 20 is damaged
        (40, 1, 35, [40, 30]),  # 40 may be in a loss spike
        (30, 2, 30, [30, 10]),  # 40 was found damaged
    ],
)
def test_what_a_run_that_resumes_knows_to_be_whole(verified, keep, healthy, found, tmp_path) -> None:
    for step in (10, 20, 30, 40):
        make_step(tmp_path, step)
    (tmp_path / step_name(20) / "about.json").write_text("x")
    assert step_folder.whole_up_to(tmp_path, verified, keep, healthy) == [step_name(step) for step in found]


@pytest.mark.parametrize("damage", ["missing file", "cut file", "missing manifest"])
def test_a_step_that_was_damaged_since_does_not_count(damage: str, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make_step(tmp_path, step)
    name = {"missing file": "about.json", "cut file": "state/.metadata", "missing manifest": "manifest.json"}[damage]
    path = tmp_path / step_name(30) / name
    path.write_text("x") if damage == "cut file" else path.unlink()
    step_folder.delete_old(tmp_path, 1, 0, {step_name(step) for step in (10, 20, 30)})
    assert steps(tmp_path) == [20, 30]


def test_nothing_outside_the_folder_is_deleted(tmp_path: Path) -> None:
    folder, other = tmp_path / "checkpoints", tmp_path / "other"
    for step in (20, 30):
        make_step(folder, step)
    make_step(other, 10)
    (folder / step_name(10)).symlink_to(other / step_name(10))
    (folder / "step_notes").mkdir()
    step_folder.delete_old(folder, 1, 0, {step_name(30)})
    assert sorted(path.name for path in folder.iterdir()) == [step_name(10), step_name(30), "step_notes"]
    assert (other / step_name(10) / "about.json").exists()


def test_recovery_after_each_moment_of_a_kill(tmp_path: Path) -> None:
    for step in (1, 2):
        make_step(tmp_path, step)
    (tmp_path / step_name(1)).rename(tmp_path / f".{step_name(1)}.replaced")  # killed between the two renames
    (tmp_path / f".{step_name(2)}.replaced").mkdir()  # killed before the old one was deleted
    (tmp_path / f".{step_name(3)}.0a0b0c0d.partial" / "state").mkdir(parents=True)
    (tmp_path / f".{step_name(4)}.deleted").mkdir()
    (tmp_path / ".latest.partial").write_text("step")
    step_folder.recover(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [step_name(1), step_name(2)]
    assert all(step_folder.find_fault(tmp_path / step_name(step), deep=False) is None for step in (1, 2))


@pytest.mark.parametrize("moment", ["before the renames", "between the renames", "after the renames"])
@pytest.mark.promise(
    text="A kill while an existing step is saved again leaves the old or the new whole one",
    expected="one whole step, nothing else",
)
def test_saving_a_step_again(moment, tmp_path, monkeypatch, record_property) -> None:
    old = make_step(tmp_path, 5)
    (old / "mark").write_text("old")
    rename, calls = os.rename, []

    def die(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == {"before the renames": 1, "between the renames": 2}.get(moment):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", die)
    if moment == "after the renames":
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
        make_step(tmp_path, 5)
    else:
        with pytest.raises(KeyboardInterrupt):
            make_step(tmp_path, 5)
    monkeypatch.undo()
    step_folder.recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [step_name(5)]
    assert step_folder.find_fault(tmp_path / step_name(5), deep=False) is None
    which = "old" if (tmp_path / step_name(5) / "mark").exists() else "new"
    assert which == ("new" if moment == "after the renames" else "old")
    record_property("seen", f"{moment}: the {which} one")


@pytest.mark.parametrize("content", [None, b"ab"], ids=["absent", "cut"])
def test_a_file_of_another_rank_that_is_not_seen_here_publishes_nothing(content: bytes | None, tmp_path: Path) -> None:
    """The ranks of a job on several nodes write to one folder, which must be the same on all."""
    final = tmp_path / step_name(3)
    partial = step_folder.create_partial(final)
    if content is not None:
        (partial / "shard").write_bytes(content)
    with pytest.raises(StorageFailure, match=r"shard was written by another rank and is not seen here"):
        step_folder.publish(partial, final, {"shard": (3, "xxh3:0")})
    assert not final.exists()
