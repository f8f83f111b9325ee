"""A finished run, and copies of it to damage."""

import shutil
from pathlib import Path

import pytest

from pretrain.data import check_corpus
from pretrain.train import train
from tests.support.tiny import run_config


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory, single_process) -> Path:
    """A finished run with checkpoints at steps 2, 4 and 6. Tests share it, so they must not write to it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = run_config(corpus, folder, checkpoint={"save_every": 2, "keep": 3})
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"
