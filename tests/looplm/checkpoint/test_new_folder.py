"""Folders that commands make: by one process, whole or not at all, and never over what is there."""

from pathlib import Path

import pytest

from looplm.checkpoint import step_folder
from looplm.checkpoint.new_folder import making
from looplm.failures import UserError


def fill(output: Path) -> None:
    partial = step_folder.create_partial(output)
    (partial / "file").write_text("new")
    step_folder.move_into_place(partial, output)


def test_what_is_not_whole_at_the_end_is_removed(tmp_path):
    output = tmp_path / "deep/er/out"
    with pytest.raises(KeyboardInterrupt), making(output):
        step_folder.create_partial(output)
        raise KeyboardInterrupt
    assert not list(output.parent.iterdir())
    with making(output):
        fill(output)
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_two_processes_do_not_make_the_same_folder(tmp_path):
    with making(tmp_path / "out"):
        refusal = r"^output: another run is writing .*/out \(process \d+ on "
        with pytest.raises(UserError, match=refusal), making(tmp_path / "out"):
            pytest.fail("both make it")
        fill(tmp_path / "out")
    assert (tmp_path / "out/file").read_text() == "new"


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path):
    output = tmp_path / "out"
    refusal = r"/out: exists by now, and did not when this began; it is left alone; give"
    with pytest.raises(UserError, match=refusal), making(output):
        output.mkdir()
        (output / "notes").write_text("precious")
        fill(output)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes"]


def test_where_nothing_can_be_made_is_known_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        refusal = rf"^output: '.*/{name}' is not allowed; it exists already; name a new"
        with pytest.raises(UserError, match=refusal), making(tmp_path / name):
            pytest.fail("there is something")
    with pytest.raises(NotADirectoryError), making(tmp_path / "file/out"):  # one line, as of any path (looplm.cli)
        pytest.fail("its parent is a file")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    refusal = "this command runs in one process; start it without torchrun"
    with pytest.raises(UserError, match=refusal), making(tmp_path / "out"):
        pytest.fail("every rank would make it")
