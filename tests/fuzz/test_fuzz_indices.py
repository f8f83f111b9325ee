"""Fuzz index files: truncated, foreign and forged ones."""

from pathlib import Path

import pytest
from hypothesis import example, given

from data_pipeline.token_file import read_index
from tests.fuzz.mutate import Edit, edited, edits
from tests.fuzz.outcome import outcome
from tests.support.tiny import write_corpus


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@given(changes=edits)
@example(changes=[Edit("overwrite", 0.6, 1, bytes([0, 0, 0x80, 0, 0, 0x80, 0, 0, 0x80]))])
def test_indices(changes: list[Edit], whole: Path, damaged: Path) -> None:
    path, content = damaged / "a.idx", (whole / "valid.idx").read_bytes()
    path.write_bytes(edited(content, changes))
    found = outcome(lambda: read_index(path), [path])
    if found is not None:
        assert found.bin_bytes >= 0 and len(found.lengths()) == found.documents
