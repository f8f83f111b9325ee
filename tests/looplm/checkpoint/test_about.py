"""The revision that a run records of its own code."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from looplm.checkpoint import about, git_revision

pytestmark = pytest.mark.slow  # every test here starts a process


@pytest.fixture
def fake_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the path that a test writes its own git to. No answer of another git is remembered, before or after."""
    (tmp_path / ".git").touch()  # as a worktree has it
    monkeypatch.setattr(about, "_ROOT", tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    git_revision.cache_clear()
    yield tmp_path / "git"
    git_revision.cache_clear()


@pytest.mark.parametrize(
    ("script", "revision"),
    [
        ("echo 1234abc-dirty", "1234abc-dirty"),
        ('case "$*" in *--dirty) exec sleep 60;; esac; echo 1234abc', "1234abc-unchecked"),
        ("exec sleep 60", ""),
        ("echo fatal: not a git repository >&2; exit 128", ""),
    ],
    ids=["checked", "too slow to look at all files", "too slow for anything", "no repository"],
)
def test_a_slow_git_costs_the_word_on_changes_and_never_the_run(script, revision, fake_git, monkeypatch):
    fake_git.write_text(f"#!/bin/sh\n{script}\n")
    fake_git.chmod(0o755)
    monkeypatch.setattr(about, "_GIT_SECONDS", 60.0 if "1234abc-dirty" in script else 0.5)
    assert git_revision() == revision
    fake_git.unlink()
    assert git_revision() == revision, "it is asked once"


def test_a_package_inside_another_projects_checkout_has_no_revision(fake_git):
    fake_git.write_text("#!/bin/sh\necho 1234abc\n")
    fake_git.chmod(0o755)
    (fake_git.parent / ".git").unlink()
    assert git_revision() == ""
