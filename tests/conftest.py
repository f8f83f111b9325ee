"""Fixtures that every test may use."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm import parallel
from tests.tiny import write_corpus


@pytest.fixture(scope="session")
def single_process() -> Iterator[ProcessGroupCollection]:
    """Megatron-core started as a job of one process."""
    yield parallel.start(seed=1234)
    parallel.stop()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny corpus; read it, do not write to it."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder
