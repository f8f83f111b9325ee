"""The memory that a job may still take, with the files of both versions of cgroups."""

from pathlib import Path

import psutil
import pytest

from pretrain.cluster.job_memory import available_bytes

GB = 1 << 30
FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder for cgroups, on a node with 100 GB."""
    memory = psutil.virtual_memory()._replace(available=100 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return tmp_path


def write(node: Path, version: str, path: str, limit: str) -> None:
    """Write a group that uses 5 GB, of which 2 GB can be given up."""
    folder, (most, usage, cache) = node / version / path, FILES[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / most).write_text(f"{limit}\n")
    (folder / usage).write_text(f"{5 * GB}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{cache} {2 * GB}\n")


@pytest.mark.parametrize(("version", "line"), [("", "0::/"), ("memory", "9:cpuset,memory:/")])
@pytest.mark.parametrize(
    ("step", "job", "expected"),
    [("max", "max", 100), (str(30 * GB), "max", 27), (str(30 * GB), str(20 * GB), 17), ("max", str(2 * GB), 0)],
    ids=["no limit", "of the step", "of the job above it", "more taken than allowed"],
)
def test_the_smallest_limit_counts(node, version, line, step, job, expected):
    unlimited = str((1 << 63) - 4096) if version else "max"
    write(node, version, "slurm/job_7", job.replace("max", unlimited))
    write(node, version, "slurm/job_7/step_0", step.replace("max", unlimited))
    (node / "groups").write_text(f"3:freezer:/elsewhere\n{line}slurm/job_7/step_0\n")
    assert available_bytes(node / "groups", node) == expected * GB


def test_a_machine_without_cgroups_has_its_own_memory(node):
    assert available_bytes(node / "none", node) == 100 * GB
