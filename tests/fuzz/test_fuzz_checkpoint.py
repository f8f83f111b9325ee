"""Fuzz checkpoint folders: damaged ones, and ones whose manifest agrees with what was changed."""

import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from looplm import checkpoint
from looplm.checkpoint import step_folder
from looplm.checkpoint.verify import fingerprint
from looplm.config import GateConfig
from looplm.model import LoopLM
from tests.fuzz.mutate import Edit, anything, changed, edited, edits
from tests.fuzz.outcome import outcome
from tests.support.tiny import MODEL, about_weights, write_corpus

pytestmark = pytest.mark.slow  # saving starts processes
GATE = GateConfig(state_size=8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, single_process) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_corpus(folder)
    model = LoopLM(MODEL, GATE, single_process, torch.float32)
    step = folder / "run" / "checkpoints" / "step_00000000"
    tokenizer = folder / "tokenizer.json"
    checkpoint.save_weights(step, model, GATE, about_weights("float32", tokenizer), tokenizer)
    return step


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "run" / "checkpoints" / "step_00000000"


def names_in(step: Path) -> list[str]:
    return sorted(path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file())


def restore(whole: Path, damaged: Path) -> None:
    """Copy the whole checkpoint."""
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(whole, damaged)


def same(whole: Path, damaged: Path) -> bool:
    """Return True if every file that the manifest lists is what was written."""
    listed = json.loads((damaged / "manifest.json").read_text())
    return all((damaged / name).read_bytes() == (whole / name).read_bytes() for name in listed)


def check_damaged(whole: Path, damaged: Path) -> None:
    """Assert that the folder is refused, or that every file that its manifest lists is what was written."""
    fault = step_folder.find_fault(damaged)
    step_folder.find_fault(damaged, deep=False)
    assert fault is None or (fault and "\n" not in fault), fault
    if fault is None:
        assert same(whole, damaged)
        listed = json.loads((damaged / "manifest.json").read_text())
        assert {"state/.metadata", "config.yaml", "about.json"} <= listed.keys()
    said = list[str]()
    newest = step_folder.newest(damaged.parent, said.append)
    assert (newest == damaged) == (fault is None) or not damaged.is_dir()
    for folder in (damaged, damaged.parents[1]):
        found = outcome(partial(step_folder.locate, str(folder)), [damaged.parents[1]])
        assert (found is None) == (fault is not None)


def renew(step: Path) -> None:
    """Write a manifest that agrees with the files, as someone would who wants the folder to be read."""
    files = {str(path.relative_to(step)): fingerprint(path) for path in step_folder.files_in(step)}
    (step / "manifest.json").write_text(json.dumps(files))


def check_forged(damaged: Path, groups: Any) -> None:
    """Assert that opening a folder whose manifest agrees with its files ends in a model or in one line."""
    renew(damaged)
    names = [damaged]
    fault = step_folder.find_fault(damaged)
    outcome(lambda: checkpoint.read_about(damaged), names)
    outcome(lambda: checkpoint.read_model(damaged), names)
    outcome(lambda: checkpoint.read_config(damaged), names)
    if fault is None:
        outcome(lambda: checkpoint.open_model(str(damaged), groups, dtype=None), names)


@given(data=st.data(), changes=edits)
def test_damaged_files(data: st.DataObject, changes: list[Edit], whole: Path, damaged: Path) -> None:
    restore(whole, damaged)
    path = damaged / data.draw(st.sampled_from(names_in(whole)))
    path.write_bytes(edited(path.read_bytes(), changes))
    check_damaged(whole, damaged)


@given(data=st.data())
def test_changed_manifests(data: st.DataObject, whole: Path, damaged: Path) -> None:
    restore(whole, damaged)
    values = json.loads((whole / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps(data.draw(st.one_of(changed(values), anything))))
    check_damaged(whole, damaged)


OTHERS = [".", "..", "/dev/zero", "/etc/passwd", "about.json", "", "missing", "pipe"]


@given(data=st.data(), other=st.sampled_from(OTHERS))
def test_files_that_are_something_else(data: st.DataObject, other: str, whole: Path, damaged: Path) -> None:
    restore(whole, damaged)
    path = damaged / data.draw(st.sampled_from([*names_in(whole), "state/extra", "companions/x", "state"]))
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if other == "":
        path.mkdir()
    elif other == "pipe":
        os.mkfifo(path)
    elif other != "missing":
        path.symlink_to(other)
    check_damaged(whole, damaged)


@given(name=st.sampled_from(["about.json", "config.yaml", "state/metadata.json"]), data=st.data())
def test_forged_values(name: str, data: st.DataObject, whole: Path, damaged: Path, single_process: Any) -> None:
    restore(whole, damaged)
    values = yaml.safe_load((whole / name).read_text())
    text = json.dumps(data.draw(changed(values)))
    (damaged / name).write_text(text)
    check_forged(damaged, single_process)


@given(data=st.data(), changes=edits)
def test_forged_bytes(
    data: st.DataObject, changes: list[Edit], whole: Path, damaged: Path, single_process: Any
) -> None:
    restore(whole, damaged)
    path = damaged / data.draw(st.sampled_from([name for name in names_in(whole) if name != "manifest.json"]))
    path.write_bytes(edited(path.read_bytes(), changes))
    check_forged(damaged, single_process)


class Hostile:
    """A pickle that would run a command."""

    def __init__(self, call: Any, arguments: tuple[Any, ...]) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


CALLS = [
    (os.mkdir, ("CANARY",)),
    (eval, ("__import__('os').mkdir('CANARY')",)),
    (__import__, ("this",)),
    (print, ("x",)),
]


@given(call=st.sampled_from(CALLS), name=st.sampled_from(["state/.metadata", "state/common.pt", "state/__0_0.distcp"]))
@example(call=CALLS[0], name="state/.metadata")
def test_hostile_pickles(call: Any, name: str, whole: Path, damaged: Path, single_process: Any) -> None:
    restore(whole, damaged)
    canary = damaged.parents[2] / "canary"
    function, arguments = call
    replaced = tuple(str(canary).join(part.split("CANARY")) if isinstance(part, str) else part for part in arguments)
    (damaged / name).write_bytes(pickle.dumps(Hostile(function, replaced)))
    check_forged(damaged, single_process)
    assert not canary.exists()
