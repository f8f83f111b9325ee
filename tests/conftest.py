"""Fixtures for every test."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.megatron import process_groups
from tests.support.saving import spare_the_spawn
from tests.support.tiny import write_corpus

SEED = 1234


def pytest_collection_finish() -> None:
    """Exempt everything imported so far from garbage collection, which tests and libraries trigger often."""
    gc.freeze()


@pytest.fixture(scope="session")
def single_process() -> Iterator[ProcessGroupCollection]:
    """Start Megatron-core as a job of one process, and return its process groups."""
    spare_the_spawn()
    yield process_groups.start(SEED)
    process_groups.stop()


@pytest.fixture(autouse=True)
def fresh_seed() -> None:
    """Seed every test alike, so that its weights do not depend on the tests before it."""
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tiny corpus. Tests share it, so they must not write to it."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture
def keep_process_groups(monkeypatch: pytest.MonkeyPatch, single_process: ProcessGroupCollection) -> None:
    """Keep the process groups for other tests: a command stops them when it ends."""
    monkeypatch.setattr(process_groups, "stop", lambda: None)
