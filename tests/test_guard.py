"""Tests without the marker slow can neither start a process nor train (tests/conftest.py)."""

import os
import subprocess

import pytest

from pretrain.trainer import Trainer


def test_an_unmarked_test_cannot_start_a_process() -> None:
    with pytest.raises(AssertionError, match="mark it slow"):
        subprocess.run(["true"])
    with pytest.raises(AssertionError, match="mark it slow"):
        os.fork()


def test_an_unmarked_test_cannot_train() -> None:
    with pytest.raises(AssertionError, match="mark it slow"):
        Trainer.train(None, iter([]), 1)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_slow_test_can_start_a_process() -> None:
    assert subprocess.run(["true"]).returncode == 0
