"""Fuzz the files of a prefix, manifest first, and what training reads of them."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.manifest import read_manifest
from data_pipeline.verify import check_prefix
from looplm.config import DataConfig, DataSource
from pretrain.data import check_corpus
from tests.fuzz.mutate import Edit, anything, changed, edited, edits
from tests.fuzz.outcome import outcome
from tests.support.tiny import VOCAB, write_chat_corpus, write_corpus

FILES = ("valid.manifest.json", "valid.bin", "valid.idx", "tokenizer.json")


@pytest.fixture(scope="module", params=["text", "chat"])
def whole(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_corpus(folder) if request.param == "text" else write_chat_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def restore(whole: Path, damaged: Path) -> None:
    """Copy the whole prefix."""
    for path in damaged.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in FILES:
        shutil.copyfile(whole / name, damaged / name)


def check(whole: Path, damaged: Path) -> None:
    """Assert that the damaged prefix is refused, or is the whole one in everything that training uses."""
    prefix, manifest = damaged / "valid", read_manifest(whole / "valid")
    names = [damaged, "valid"]
    outcome(lambda: check_prefix(prefix, deep=False), names)
    found = outcome(lambda: check_prefix(prefix, deep=True), names)
    if found is not None:
        assert all((damaged / name).read_bytes() == (whole / name).read_bytes() for name in FILES[1:])
        assert (found.documents, found.tokens, found.files) == (manifest.documents, manifest.tokens, manifest.files)
        assert found.fingerprint == manifest.fingerprint and found.tokenizer.eos_id == manifest.tokenizer.eos_id
    data = DataConfig(train=(DataSource(prefix=str(prefix)),))
    outcome(lambda: check_corpus(data, VOCAB), [*names, "data.", "model."])


@given(data=st.data())
def test_manifests_of_changed_values(data: st.DataObject, whole: Path, damaged: Path) -> None:
    restore(whole, damaged)
    values = json.loads((whole / FILES[0]).read_text())
    (damaged / FILES[0]).write_text(json.dumps(data.draw(changed(values))))
    check(whole, damaged)


@given(name=st.sampled_from(FILES), changes=edits)
@example(name="valid.idx", changes=[Edit("overwrite", 0.03, 1, b"\xff" * 7 + b"\x7f")])
def test_bytes_of_files(name: str, changes: list[Edit], whole: Path, damaged: Path) -> None:
    restore(whole, damaged)
    (damaged / name).write_bytes(edited((whole / name).read_bytes(), changes))
    check(whole, damaged)


@example(name="valid.manifest.json", other="/dev/zero")
@given(name=st.sampled_from(FILES), other=st.sampled_from([*FILES, ".", "..", "/dev/zero", "/dev/null", "", "missing"]))
def test_files_that_are_something_else(name: str, other: str, whole: Path, damaged: Path) -> None:
    restore(whole, damaged)
    (damaged / name).unlink()
    if other == "":
        (damaged / name).mkdir()
    elif other != "missing":
        (damaged / name).symlink_to(other)
    check(whole, damaged)


@given(content=st.one_of(st.binary(max_size=100), st.builds(json.dumps, anything).map(str.encode)))
@example(content=b"[" * 100_000)
@example(content=b'{"documents": 1e400}')
def test_manifests_of_anything(content: bytes, damaged: Path) -> None:
    (damaged / FILES[0]).unlink(missing_ok=True)
    (damaged / FILES[0]).write_bytes(content)
    outcome(lambda: read_manifest(damaged / "valid"), [damaged])
