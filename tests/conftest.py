"""Fixtures for every test."""

import gc
import os
import platform
import socket
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.megatron import process_groups
from pretrain.trainer import Trainer
from tests.support.promises import pytest_addoption as pytest_addoption
from tests.support.promises import pytest_configure as pytest_configure
from tests.support.promises import pytest_runtest_logreport as pytest_runtest_logreport
from tests.support.promises import pytest_runtest_setup as pytest_runtest_setup
from tests.support.promises import pytest_sessionfinish as pytest_sessionfinish
from tests.support.tiny import write_corpus

SEED = 1234
STARTS_A_PROCESS = ("subprocess.Popen", "os.fork", "os.posix_spawn")
guarded = False  # True while a test without the marker slow runs


def refuse_processes(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook: raise if a guarded test starts a process, or asks the server that forks ``forkserver`` processes."""
    asks_a_server = event == "socket.connect" and getattr(arguments[0], "family", None) == socket.AF_UNIX
    if guarded and (event in STARTS_A_PROCESS or asks_a_server):
        raise AssertionError(f"{event}: this test starts a process; mark it slow")


def refuse_training(*_: object) -> NoReturn:
    """Take the place of Trainer.train in a guarded test."""
    raise AssertionError("this test trains; mark it slow")


sys.addaudithook(refuse_processes)
platform.processor()  # starts a process once; whichever test asks first would be refused


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test that starts a process or trains, its fixtures included, unless it is marked slow."""
    global guarded
    guarded, train = item.get_closest_marker("slow") is None, Trainer.train
    if guarded:
        Trainer.train = refuse_training  # type: ignore[method-assign,assignment]
    try:
        return (yield)
    finally:
        guarded = False
        Trainer.train = train  # type: ignore[method-assign]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked hard, unless FAULTS=all (``make faults``)."""
    if os.environ.get("FAULTS") == "all":
        return
    hard = [item for item in items if item.get_closest_marker("hard")]
    if hard:
        config.hook.pytest_deselected(items=hard)
        items[:] = [item for item in items if item not in hard]


def pytest_collection_finish() -> None:
    """Exempt everything imported so far from garbage collection, which tests and libraries trigger often."""
    gc.freeze()


@pytest.fixture(scope="session")
def single_process() -> Iterator[ProcessGroupCollection]:
    """Start Megatron-core as a job of one process, and return its process groups."""
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
