"""Fixtures of the upcycling tests."""

from pathlib import Path

import pytest

from pretrain.data import check_corpus
from pretrain.train import train
from tests.support.tiny import run_config


@pytest.fixture(scope="session")
def tiny_run(corpus, tmp_path_factory, single_process) -> Path:
    """A finished run of the tiny model, read-only."""
    config = run_config(corpus, tmp_path_factory.mktemp("source") / "run")
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    return Path(config.output_dir)
