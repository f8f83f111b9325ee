"""Tests without the marker slow can neither start a process nor train (tests/conftest.py)."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from pretrain.trainer import Trainer


def test_an_unmarked_test_cannot_start_a_process() -> None:
    with pytest.raises(AssertionError, match="mark it slow"):
        subprocess.run(["true"])
    with pytest.raises(AssertionError, match="mark it slow"):
        os.fork()


def test_an_unmarked_test_cannot_ask_for_a_process(tmp_path: Path) -> None:
    with (
        socket.socket(socket.AF_UNIX) as server,
        socket.socket(socket.AF_UNIX) as client,
        pytest.raises(AssertionError, match="mark it slow"),
    ):
        server.bind(str(tmp_path / "listener"))
        client.connect(str(tmp_path / "listener"))


def test_an_unmarked_test_cannot_train() -> None:
    with pytest.raises(AssertionError, match="mark it slow"):
        Trainer.train(None, iter([]), 1)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_slow_test_can_start_a_process() -> None:
    assert subprocess.run(["true"]).returncode == 0
