"""Fixtures that every test may use."""

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
    """All is imported: the garbage collector need not walk it again each time that a test or a library calls it."""
    gc.freeze()


@pytest.fixture(scope="session")
def single_process() -> Iterator[ProcessGroupCollection]:
    """Megatron-core started as a job of one process."""
    spare_the_spawn()
    yield process_groups.start(SEED)
    process_groups.stop()


@pytest.fixture(autouse=True)
def seeded_as_a_fresh_job() -> None:
    """Weights are drawn from the job's seed: without this, from whatever the test before it left."""
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny corpus; read it, do not write to it."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture
def job_goes_on(monkeypatch, single_process):
    """A command leaves the job when it is done; the tests' job goes on."""
    monkeypatch.setattr(process_groups, "stop", lambda: None)
