"""Checkpoints that cannot be written, or are damaged between two runs: real runs of two ranks that resume."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from looplm.config import RunConfig
from tests.faults import harness
from tests.faults.layouts import Reference, config_of
from tests.support.disks import fill, small_disk

pytestmark = pytest.mark.slow
LAYOUT = "pipeline"  # each rank writes shards of its own
FULL_DISK = 5


def resume_exactly(config: RunConfig, whole: Reference) -> None:
    """Resume a run, which must then equal the uninterrupted one."""
    harness.complete(config, 2)
    assert harness.exact_rows(config.output_dir) == whole.rows
    assert harness.samples_by_step(config.output_dir) == whole.samples
    assert not harness.leftovers(config.output_dir)


def refused_save(config: RunConfig, ends: list[harness.End], last_whole: str) -> str:
    """Check that a save has failed cleanly; return the line that says so."""
    assert [end.status for end in ends] == [FULL_DISK, FULL_DISK], [end.output[-3000:] for end in ends]
    line, checkpoints = ends[0].last_line, Path(config.output_dir) / "checkpoints"
    assert line.startswith("error: ") and line not in ends[1].output and "Traceback" not in ends[0].output
    assert (checkpoints / "latest").read_text().strip() == last_whole
    assert [path.name for path in sorted(checkpoints.glob("step_*"))][-1] == last_whole
    return line.replace(f"{config.output_dir}/", "")


def fill_the_disk(folder: str, rank: int) -> None:
    """Fault: on rank 1, the disk has no room for its shard of step 4."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[0] if event == "open" else ""
        is_shard = isinstance(path, (str, os.PathLike)) and str(path).endswith(".distcp")
        if is_shard and ".step_00000004." in str(path) and not os.path.lexists(path):
            os.symlink("/dev/full", path)

    if rank == 1:
        sys.addaudithook(audit)


@pytest.mark.promise(
    text="A disk that is full for one rank's shard, or a writer process killed with kill -9, publishes nothing",
    expected="status 5 on every rank and one line at the next step; the same command then continues exactly",
)
def test_a_save_that_one_rank_cannot_finish(
    corpus: Path, tmp_path: Path, references: Callable[[str], Reference], record_property: Any
) -> None:
    whole = references(LAYOUT)
    config = config_of(LAYOUT, corpus, tmp_path / "run")
    line = refused_save(config, harness.finish(config, 2, partial(fill_the_disk, config.output_dir)), "step_00000002")
    assert "the disk is full" in line
    record_property("seen", f"disk full: status 5 on both ranks, {line.partition(' (')[0]}")

    shards = [label for label in whole.events[1] if "writer: open" in label and ".step_00000006.partial" in label]
    at = harness.Moment(shards[-1].replace("save 3", "save 2"))  # of the attempt that resumes after step 2
    fault = harness.killed_at(config, 1, at, spares_the_rank=True)
    line = refused_save(config, harness.finish(config, 2, fault), "step_00000004")
    assert "was killed (signal 9)" in line
    record_property("seen", f"writer killed: status 5 on both ranks, {line}")
    resume_exactly(config, whole)


@pytest.mark.hard
@pytest.mark.promise(
    text="A disk that fills up during a run ends it cleanly; with space again, the same command continues exactly",
    expected="status 5 on both ranks, one line; the checkpoint before it stays; no half-written one is loaded",
)
def test_a_disk_that_fills_up(
    corpus: Path, tmp_path: Path, references: Callable[[str], Reference], record_property: Any
) -> None:
    with small_disk(tmp_path / "disk") as folder:
        whole, config = references(LAYOUT), config_of(LAYOUT, corpus, folder / "run")
        with harness.Job(config, 2) as job:
            latest = folder / "run/checkpoints/latest"
            job.wait_for(latest.exists)
            filler = fill(folder, 40_000)  # enough for metrics, too little for a checkpoint
            ends = job.ends()
        line = refused_save(config, ends, latest.read_text().strip())
        assert "the disk is full" in line
        filler.unlink()
        resume_exactly(config, whole)
    record_property("seen", "status 5 on both ranks: the disk is full; then as the uninterrupted run")


# ---- damage between two runs


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def of_older_step(path: Path) -> None:
    shutil.copyfile(Path(str(path).replace("step_00000006", "step_00000004")), path)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "flipped byte in a shard": ("state/__0_0.distcp", flip),
    "flipped byte in the other rank's shard, which holds optimizer state": ("state/__1_0.distcp", flip),
    "flipped byte in the manifest": ("manifest.json", flip),
    "truncated shard": ("state/__1_0.distcp", truncate),
    "missing shard": ("state/__0_0.distcp", Path.unlink),
    "shard of an older step": ("state/__1_0.distcp", of_older_step),
    "truncated .metadata": ("state/.metadata", truncate),
    "missing .metadata": ("state/.metadata", Path.unlink),
    "truncated common.pt": ("state/common.pt", truncate),
    "missing common.pt": ("state/common.pt", Path.unlink),
    "empty latest": ("../latest", lambda path: path.write_text("")),
    "garbage in latest": ("../latest", lambda path: path.write_bytes(bytes(range(256)))),
    "dangling latest": ("../latest", lambda path: path.write_text("step_00000099")),
}


def interrupted_after_6(whole: Reference, folder: Path) -> RunConfig:
    """Return a copy of a run that has not saved its last steps."""
    source = whole.config.output_dir
    shutil.copytree(source, folder)
    shutil.copytree(f"{source}.logs", f"{folder}.logs")
    shutil.rmtree(folder / "checkpoints/step_00000008")
    (folder / "checkpoints/latest").write_text("step_00000006\n")
    return dataclasses.replace(whole.config, output_dir=str(folder))


@pytest.mark.hard
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.promise(
    text="A damaged checkpoint is named and never loaded; the run falls back to the one before it. The file latest "
    "is only for people: a wrong one changes nothing",
    expected="status 0; one line with the file and its fault; losses equal to the bit",
)
def test_damage_between_two_runs(
    tmp_path: Path, references: Callable[[str], Reference], record_property: Any, damage: str
) -> None:
    whole = references(LAYOUT)
    config = interrupted_after_6(whole, tmp_path / "run")
    name, hurt = DAMAGES[damage]
    hurt(tmp_path / "run/checkpoints/step_00000006" / name)
    ends = harness.finish(config, 2)
    assert [end.status for end in ends] == [0, 0], ends[0].output[-3000:]
    step = 6 if "latest" in damage else 4
    assert f"resuming after step {step} of 8" in ends[0].output
    told = "step_00000006: " in ends[0].output and "falling back to the checkpoint before it" in ends[0].output
    assert told == (step == 4), ends[0].output
    assert harness.exact_rows(config.output_dir) == whole.rows
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000008\n"
    record_property("seen", f"{damage}: resumed after step {step}")


@pytest.mark.hard
@pytest.mark.promise(
    text="A run that saves a step again, over a damaged checkpoint of that step, survives kill -9 at any rename",
    expected="losses equal to the bit, nothing left behind",
)
def test_a_repeated_save_killed(tmp_path: Path, references: Callable[[str], Reference], record_property: Any) -> None:
    whole = references(LAYOUT)

    def damaged(name: str) -> RunConfig:
        config = interrupted_after_6(whole, tmp_path / name)
        flip(tmp_path / name / "checkpoints/step_00000006/state/__0_0.distcp")
        return config

    config = damaged("traced")
    harness.complete(config, 2, harness.killed_at(config, 0, None))
    moves = [label for label in harness.events(config, 0) if "step_00000006" in label and "partial/" not in label]
    moves = [label for label in moves if not label.partition(": ")[2].startswith("writer: open")]
    assert len(moves) >= 3, moves
    for number, label in enumerate(moves):
        config = damaged(str(number))
        with harness.Job(config, 2, harness.killed_at(config, 0, harness.Moment(label))) as job:
            job.wait_for_a_death()
            job.kill_all()
        assert harness.events(config, 0)[-1] == f"killed at {label}"
        resume_exactly(config, whole)
    record_property("seen", "every resumed run equals the uninterrupted one")
