"""Builds that are killed, run out of disk or lie under odd paths give what others give, or say why not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_pipeline import tokenize
from data_pipeline.config import DedupConfig
from data_pipeline.local_executor import StepFailed
from data_pipeline.verify import check_prefix
from looplm.failures import StorageFailure
from tests.support import disks

pytestmark = pytest.mark.slow  # every test here starts a process or trains

STEPS = ("read-a", "exact-signatures", "exact-find", "minhash-signatures", "minhash-buckets", "split", "tokenize")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """120 documents, of which 20 are exact and 10 near duplicates of others."""
    own = [" ".join(f"w{index}x{n}" for n in range(40)) for index in range(90)]
    return [*own, *own[:20], *(f"{text} again" for text in own[20:30])]


def result(output: Path) -> dict[str, bytes]:
    """Return the files of an output folder by name, without its logs."""
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.is_file()}


def undisturbed(config: Any, build: Callable, tmp_path: Path) -> dict[str, bytes]:
    return result(build(replace(config, output_dir=str(tmp_path / "whole"))))


def when_step_starts(name: str, work: Path, act: Callable[[], object]) -> threading.Thread:
    """Start a thread that acts as soon as the folder of a step appears."""

    def watch() -> None:
        end = time.monotonic() + 60
        while not (work / "final" / "logs" / name / "logs").exists() and time.monotonic() < end:
            time.sleep(0.001)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def kill_a_worker() -> None:
    """Kill a task's process, a child of the fork server."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for server in psutil.Process().children():
            for task in server.children():
                task.kill()
                return


@pytest.mark.promise(
    text="A killed worker of the tokenization ends the command; repeated, it gives the undisturbed bytes",
    expected="status 1, one line that names the step; then the same bytes",
)
@pytest.mark.parametrize("step", ["minhash-signatures", "tokenize"])
def test_a_killed_worker(
    step: str, texts: Any, jsonl: Any, config: Any, build: Any, tmp_path: Path, record_property: Any
) -> None:
    for part in range(6):  # a file for each task
        jsonl(f"a{part}", texts[20 * part : 20 * part + 20])
    settings = config({"a": tmp_path / "a*.jsonl"}, tasks=6, workers=2, dedup=True)
    killer = when_step_starts(step, tmp_path / "out.partial", kill_a_worker)
    with pytest.raises(StepFailed, match=rf"{step}: the process of task \d was ended by signal 9") as caught:
        build(settings)
    killer.join()
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    again = build(replace(settings, executor=replace(settings.executor, workers=1)))
    assert result(again) == undisturbed(settings, build, tmp_path)
    record_property("seen", f"status {caught.value.status}: {step}: ended by signal 9; then the same bytes")


def start(config: Any) -> int:
    """Fork a process group of its own that builds."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        tokenize.build(config)
        os._exit(0)
    os.setpgid(pid, pid)  # whoever comes first
    return pid


def kill_when(config: Any, moment: Callable[[], bool]) -> bool:
    """Start a build, and kill -9 it at a moment. Return False if it had finished before."""
    pid = start(config)
    while not moment():
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


@pytest.mark.promise(
    text="Tokenization killed in any of its steps and repeated with other workers loses and repeats no document",
    expected="the bytes of an undisturbed build",
)
def test_killed_in_every_step(
    texts: Any, jsonl: Any, config: Any, build: Any, tmp_path: Path, record_property: Any
) -> None:
    settings = config({"a": jsonl("a", texts)}, tasks=3, dedup=True)
    logs, killed = tmp_path / "out.partial" / "final" / "logs", 0
    for step in STEPS:
        killed += kill_when(settings, (logs / step / "logs").exists)
    assert killed == len(STEPS) and not (tmp_path / "out").exists()
    again = build(replace(settings, executor=replace(settings.executor, workers=2)))
    assert result(again) == undisturbed(settings, build, tmp_path)
    record_property("seen", f"killed in {killed} steps: the bytes of an undisturbed build")


@pytest.mark.hard
@pytest.mark.promise(
    text="Tokenization with two workers killed at 20 random moments and repeated loses and repeats no document",
    expected="the bytes of an undisturbed build",
)
def test_killed_at_random_moments(
    texts: Any, jsonl: Any, config: Any, build: Any, tmp_path: Path, record_property: Any, corpus: Any
) -> None:
    source = jsonl("a", texts)
    path = tmp_path / "c.yaml"
    path.write_text(
        f"output_dir: {tmp_path / 'out'}\nsources: [{{name: a, kind: jsonl, paths: [{source}]}}]\n"
        "tokenizer: {vocab_size: 320}\nvalidation_fraction: 0.2\nexecutor: {tasks: 4, workers: 2}\n"
    )
    command = [sys.executable, "-m", "data_pipeline.tokenize", "--config", str(path)]
    began = time.monotonic()
    subprocess.run([*command, "--output_dir", str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    duration, killed, outputs = time.monotonic() - began, 0, list[Path]()
    for attempt in range(20):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as run:
            time.sleep(corpus.random.uniform(0.4, 1.0) * duration)
            if run.poll() is None:
                killed += 1
                if attempt % 2:
                    os.killpg(run.pid, signal.SIGKILL)
                else:  # its workers must end by themselves
                    run.kill()
        if (tmp_path / "out").exists():
            duration *= 0.8  # the machine has become faster, or had other work before
            outputs.append((tmp_path / "out").rename(tmp_path / f"finished{attempt}"))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    expected = result(tmp_path / "whole")
    assert all(result(output) == expected for output in (tmp_path / "out", *outputs)) and killed >= 10
    record_property("seen", "the bytes of an undisturbed build")


def test_a_killed_removal_does_not_look_like_work_to_continue(
    texts: Any, jsonl: Any, config: Any, build: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Settings A are killed, settings B begin to remove A's files and are killed too, and A is started again."""
    settings = config({"a": jsonl("a", texts)})
    assert kill_when(settings, (tmp_path / "out.partial/final/logs/tokenize/logs").exists)
    remove, order = shutil.rmtree, ("documents", "split", "final")

    def remove_two(folder: Path) -> None:
        remove(folder)
        if folder.name == "split":
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda folder: iter([folder / name for name in order]))
        patch.setattr("data_pipeline.workspace.shutil.rmtree", remove_two)
        with pytest.raises(ZeroDivisionError):
            build(replace(settings, seed=9, replace=True))
    assert result(build(settings)) == undisturbed(settings, build, tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 400 kB."""
    with disks.small_disk(tmp_path / "disk", "size=400k") as folder:
        yield folder


@pytest.mark.promise(
    text="A disk that fills up while tokenizing ends the command, and a repetition on a larger one gives whole data",
    expected="status 5, one line about the disk; then the undisturbed bytes",
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(
    workers: int,
    texts: Any,
    jsonl: Any,
    config: Any,
    build: Any,
    tmp_path: Path,
    small_disk: Path,
    record_property: Any,
) -> None:
    settings = config({"a": jsonl("a", texts)}, workers=workers, output_dir=str(small_disk / "out"))
    for free_kb in (0, 20, 60, 100):  # full at the start, and in later steps
        filler = disks.fill(small_disk, free_kb << 10)
        with pytest.raises(StorageFailure, match="the disk is full") as caught:
            build(settings)
        assert "\n" not in str(caught.value) and caught.value.status == 5
        assert not (small_disk / "out").exists()
        filler.unlink()
    disks.run_as_root("mount", "-o", "remount,size=64m", str(small_disk))
    assert result(build(settings)) == undisturbed(settings, build, tmp_path)
    record_property("seen", "status 5: the disk is full; then the undisturbed bytes")


@pytest.mark.promise(
    text="No character of a path is read as a pattern by deduplication, merging, tokenizer or training",
    expected="90 of 120 documents, as under a plain path",
)
@pytest.mark.parametrize("name", ["exp[1]", "-a*?{b,c} #50% größe::two words "])
def test_odd_output_folders(
    name: str, texts: Any, jsonl: Any, config: Any, build: Any, decoded: Any, tmp_path: Path, record_property: Any
) -> None:
    output = tmp_path / name / "data"
    found = build(config({"a": jsonl("a", texts)}, output_dir=str(output), dedup=True, workers=2))
    documents = [text for split in ("train", "valid") for text in decoded(found / f"a_{split}")]
    assert sorted(documents) == sorted(texts[:90])
    assert check_prefix(found / "a_train", deep=True)
    record_property("seen", f"{len(documents)} of {len(texts)} documents")


def sheet(corpus: Any, lines: int = 20) -> str:
    """Return a sheet of sums."""
    pairs = [(corpus.random.randrange(100), corpus.random.randrange(100)) for _ in range(lines)]
    return "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)


@pytest.mark.promise(
    text="Texts that differ in their numbers are different documents, unless dedup.ignore names numbers",
    expected="300 of 300 sheets of sums; 1 with dedup.ignore=[numbers]",
)
def test_sheets_of_sums(
    corpus: Any, jsonl: Any, config: Any, build: Any, tmp_path: Path, record_property: Any, capsys: Any
) -> None:
    source = {"a": jsonl("a", [sheet(corpus) for _ in range(300)])}
    settings = config(source, dedup=True, validation_fraction=0.0)
    kept = check_prefix(build(settings) / "a_train", deep=False).documents
    loose = replace(settings, dedup=DedupConfig(ignore=("numbers", "punctuation")), output_dir=str(tmp_path / "loose"))
    left = check_prefix(build(loose) / "a_train", deep=False).documents
    assert (kept, left) == (300, 1)
    record_property("seen", f"{kept} of 300 sheets of sums; {left} with dedup.ignore=[numbers]")


def test_near_duplicates_of_other_kinds(
    corpus: Any, jsonl: Any, config: Any, build: Any, decoded: Any, capsys: Any
) -> None:
    """Tables, dates, code and texts without spaces: one changed place is a near-duplicate, other content is not."""
    random = corpus.random
    tables = ["\n".join(f"{random.randrange(10**6)}\t{random.random():.4f}" for _ in range(60)) for _ in range(3)]
    days = [[(random.randrange(1, 13), random.randrange(1, 29)) for _ in range(60)] for _ in range(3)]
    dates = [" ".join(f"2024-{month:02}-{day:02}" for month, day in some) for some in days]
    names = [[(corpus.word(), corpus.word()) for _ in range(30)] for _ in range(3)]
    code = ["\n".join(f"def {name}({key}):\n    return {key}" for name, key in some) for some in names]
    chinese = ["".join(chr(random.randrange(0x4E00, 0x9FA5)) for _ in range(200)) for _ in range(3)]
    own = [*tables, *dates, *code, *chinese]
    near = [text[:-1] + ("x" if text.isascii() else "世") for text in own]
    short = ["one two", "One, two!", "一二", "A B C D"]
    output = build(config({"a": jsonl("a", [*own, *near, *short])}, dedup=True, validation_fraction=0.0))
    assert sorted(decoded(output / "a_train")) == sorted([*own, *short])
    assert "4 others have fewer than dedup.ngram=5 words, too few to compare" in (out := capsys.readouterr().out), out


@pytest.mark.promise(
    text="Validation gets its share of the documents whatever their ids are, and no text that training has",
    expected="about 100 of 400",
)
@pytest.mark.parametrize("ids", ["null", "missing", "the same", "per file"])
def test_the_split_does_not_depend_on_ids(
    ids: str, corpus: Any, config: Any, build: Any, decoded: Any, tmp_path: Path, record_property: Any, capsys: Any
) -> None:
    documents = corpus.documents(200, 1)
    for half, name in ((documents[:100] * 2, "a"), (documents[100:] * 2, "b")):
        keys: dict[str, Callable] = {
            "null": lambda index: {"id": None},
            "missing": lambda index: {},
            "the same": lambda index: {"id": "x"},
            "per file": lambda index: {"id": index},
        }
        lines = [json.dumps({"text": text, **keys[ids](index)}) + "\n" for index, text in enumerate(half)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    settings = config({"a": tmp_path / "[ab].jsonl"}, validation_fraction=0.25, workers=2)
    output = build(settings)
    train, valid = (decoded(output / f"a_{split}") for split in ("train", "valid"))
    assert len(train) + len(valid) == 400 and 70 <= len(valid) <= 130
    assert not set(train) & set(valid)
    assert "split by text" in capsys.readouterr().out
    record_property("seen", f"{len(valid)} of 400")
