"""An unfinished build with other settings or inputs: steps that they do not concern are kept, nothing else is used."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import tokenize, workspace
from data_pipeline.config import DedupConfig, PipelineConfig, TokenizerConfig
from data_pipeline.local_executor import FINISHED
from data_pipeline.verify import check_prefix
from looplm.failures import UserError

READ = ["read-a", "read-b"]
FOUND = ["exact-find", "exact-signatures"]
FOLDERS = {"read-a": "documents/a", "read-b": "documents/b", "exact-find": "exact", "exact-signatures": "exact-found"}


@pytest.fixture
def settings(jsonl: Callable, config: Callable) -> PipelineConfig:
    sources = {name: jsonl(name, [f"{name}{index}" for index in range(9)]) for name in ("a", "b")}
    return replace(config(sources), dedup=DedupConfig(minhash=False))


def begin(settings: PipelineConfig, act: Callable[[Path], object] = lambda work: None, **changes: bool) -> None:
    """Enter the workspace of a build, and leave it by an error after ``act``."""
    files = {source.name: [Path(source.paths[0])] for source in settings.sources}
    identity = workspace.identity_of(settings, files)
    with workspace.workspace(Path(settings.output_dir), identity, changes.get("replace", False)) as work:
        act(work)
        raise ZeroDivisionError


def do_every_step(work: Path) -> None:
    for step in (*READ, *FOUND, "split", "tokenize"):
        log = work / "final" / "logs" / step
        log.mkdir(parents=True)
        (log / FINISHED).touch()
        (work / FOLDERS.get(step, step)).mkdir(parents=True)
    (work / "final" / "tokenizer.json").touch()


def steps_and_folders(work: Path) -> tuple[list[str], list[str]]:
    """Return the steps that count as done, and the folders and files of the work."""
    steps = sorted(path.name for path in (work / "final" / "logs").iterdir())
    found = [*work.glob("*"), *work.glob("documents/*"), *work.glob("final/*")]
    names = (str(path.relative_to(work)) for path in found)
    return steps, sorted(set(names) - {"documents", "final", "final/logs", workspace._IDENTITY, ".lock", ".tasks"})


CHANGES = [
    ({"tokenizer": TokenizerConfig(vocab_size=300)}, "tokenizer.vocab_size 320 -> 300", [*FOUND, *READ, "split"]),
    ({"seed": 9}, "seed 1234 -> 9", [*FOUND, *READ]),
    ({"validation_fraction": 0.5}, "validation_fraction 0.2 -> 0.5", [*FOUND, *READ]),
    ({"dedup": DedupConfig(exact=False, minhash=False)}, "dedup.exact True -> False", READ),
]


@pytest.mark.parametrize(("change", "differs", "kept"), CHANGES)
def test_steps_of_the_same_settings_are_kept(change, differs, kept, settings, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):
        begin(settings, do_every_step)
    work, other = tmp_path / "out.partial", replace(settings, **change)
    before = steps_and_folders(work)
    lost = ", ".join(sorted({*READ, *FOUND, "split", "tokenize"} - {*kept}))
    line = f"output_dir: out.partial holds finished steps ({lost}) of other settings ({differs}); "
    fix = "restore them, add --replace true or choose another folder"
    with pytest.raises(UserError, match=f"^{re.escape(line + fix)}$"):
        begin(other)
    assert steps_and_folders(work) == before
    with pytest.raises(ZeroDivisionError):
        begin(other, replace=True)
    said = f"out.partial: was begun with other settings ({differs}); keeping {', '.join(kept)}\n"
    assert capsys.readouterr().out == said
    assert steps_and_folders(work) == (kept, sorted(FOLDERS.get(step, step) for step in kept))
    with pytest.raises(ZeroDivisionError):
        begin(other)
    assert capsys.readouterr().out == "", "the work is of these settings now"


def test_a_job_array_that_still_writes_outdated_files_is_named(settings, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):
        begin(settings, do_every_step)
    before = steps_and_folders(tmp_path / "out.partial")
    monkeypatch.setattr(workspace, "unfinished_job", lambda log: "7" if log.name == "split" else None)
    line = (
        "output_dir: Slurm job 7 still writes split of other settings (seed 1234 -> 9); "
        f"end it by scancel, or remove {tmp_path}/out.partial/final/logs/split/job_id if it has ended, and run again"
    )
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        begin(replace(settings, seed=9), replace=True)
    assert steps_and_folders(tmp_path / "out.partial") == before


@pytest.mark.parametrize("removals", range(6))
def test_a_killed_removal_leaves_no_step_without_its_files(removals, settings, tmp_path, monkeypatch) -> None:
    with pytest.raises(ZeroDivisionError):
        begin(settings, do_every_step)
    remove, removed = shutil.rmtree, list[Path]()

    def die(folder: Path) -> None:
        if len(removed) == removals:
            raise KeyboardInterrupt
        removed.append(folder)
        remove(folder)

    other = replace(settings, sources=settings.sources[1:], seed=9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", die)
        begin(other, replace=True)
    with pytest.raises(ZeroDivisionError):
        begin(settings)
    steps, folders = steps_and_folders(tmp_path / "out.partial")
    assert steps == ["read-b"] and "documents/b" in folders


@pytest.mark.slow
def test_a_bad_line_costs_only_the_reading_of_its_source(settings, build, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    bad, whole = tmp_path / "b.jsonl", (tmp_path / "b.jsonl").read_text()
    bad.write_text(whole + "{broken\n")
    with pytest.raises(UserError, match=r"b\.jsonl:10: not valid JSON"):
        build(settings)
    marks = list((tmp_path / "out.partial/final/logs/read-a/completions").iterdir())
    times = [mark.stat().st_mtime_ns for mark in marks]
    bad.write_text(whole + json.dumps({"text": "mended"}) + "\n")
    output = build(settings)
    assert "out.partial: was begun with other settings (inputs.b); keeping read-a\n" in capsys.readouterr().out
    assert [(output / "logs/read-a/completions" / mark.name).stat().st_mtime_ns for mark in marks] == times
    assert not (tmp_path / "out.partial").exists()
    clean = check_prefix(build(replace(settings, output_dir="clean")) / "b_train", deep=True)
    assert check_prefix(output / "b_train", deep=True) == clean


@pytest.mark.slow
def test_an_input_that_is_touched_after_the_work_is_named(settings: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenize, "_make_tokenizer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        tokenize.build(settings)
    (tmp_path / "a.jsonl").touch()
    line = (
        "output_dir: out.partial holds finished steps (exact-find, exact-signatures, read-a, split) of other settings "
        "(inputs.a); restore them, add --replace true or choose another folder"
    )
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        tokenize.build(settings)


def quick(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Put ``act`` in the place of all work on the data."""
    monkeypatch.setattr(tokenize, "split_documents", lambda *_: act())
    for name in ("_make_tokenizer", "write_prefixes", "_write_manifests"):
        monkeypatch.setattr(tokenize, name, lambda *_: None)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda folder: (folder / "a.jsonl").touch(), "a.jsonl: has changed"),
        (lambda folder: (folder / "a2.jsonl").write_text("{}"), "a2.jsonl: is new"),
        (lambda folder: (folder / "a1.jsonl").unlink(), "a1.jsonl: is gone"),
    ],
)
def test_inputs_that_change_during_a_build_are_named(change, line, settings, tmp_path, monkeypatch) -> None:
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "a1.jsonl")
    every = replace(settings.sources[0], paths=(str(tmp_path / "a*.jsonl"),))
    settings = replace(settings, sources=(every, settings.sources[1]))
    quick(monkeypatch, lambda: change(tmp_path))
    fix = "run again with --replace true when nothing writes there any more"
    with pytest.raises(UserError, match=f"^{re.escape(f'{tmp_path}/{line} since this build began; {fix}')}$"):
        tokenize.build(settings)
    assert not (tmp_path / "out").exists()


def test_a_finished_build_is_not_checked_again(settings, monkeypatch, tmp_path) -> None:
    quick(monkeypatch, lambda: None)
    tokenize.build(settings)
    monkeypatch.setattr(tokenize, "_check_inputs", None)  # fails if it is called
    tokenize.build(settings)
