"""Mistakes at the terminal: one line that names what to fix, and no output."""

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import documents, tokenize
from looplm.failures import UserError

pytestmark = pytest.mark.slow  # every test here starts a process or trains

BASE = """
output_dir: {folder}/out
sources:
  - {{name: a, kind: jsonl, paths: ["{folder}/a.jsonl"]}}
tokenizer: {{vocab_size: 300}}
validation_fraction: 0.2
executor: {{tasks: 2, workers: 1}}
"""


@pytest.fixture
def run(tmp_path: Path, corpus: Any, jsonl: Callable) -> Callable[..., str]:
    """Return a function that runs the command with a changed config and arguments, and returns its error message."""

    def call(*arguments: str, change: tuple[str, str] = ("", "")) -> str:
        path = tmp_path / "c.yaml"
        path.write_text(BASE.format(folder=tmp_path).replace(*change) if change[0] else BASE.format(folder=tmp_path))
        with pytest.raises(UserError) as caught:
            tokenize.main(["--config", str(path), *arguments])
        assert not (tmp_path / "out").exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    jsonl("a", corpus.documents(12, 2))
    return call


NO_KEY = "is not allowed; only kind=jsonl or parquet without chat has it; leave it out"
UNUSED = "is not allowed; it has no effect without dedup.minhash; give that too, or leave it out"


@pytest.mark.parametrize(
    ("change", "needles"),
    [
        (
            ("validation_fraction", "validation_fracton"),
            ["c.yaml", "validation_fracton", "did you mean validation_fraction"],
        ),
        (
            ("kind: jsonl", "kind: jsonl, text_kye: x"),
            ["c.yaml", "sources[0].text_kye", "did you mean sources[0].text_key"],
        ),
        (("kind: jsonl", "kind: jason"), ["kind", "jason"]),
        (("kind: jsonl", "kind: jsonl, filters: [gopher]"), ["filters", "gopher"]),
        (("kind: jsonl", "kind: jsonl, min_chars: 0"), ["sources.a.min_chars", "0"]),
        (("kind: jsonl", "kind: jsonl, limit: 0"), ["sources.a.limit", "0"]),
        (("name: a", "name: a/b"), ["sources[].name", "a/b"]),
        (("name: a", "name: chat_template"), ["sources[].name", "'chat_template'", "give another"]),
        (
            ("kind: jsonl", "kind: jsonl, min_chars: 9, max_chars: 8"),
            ["sources.a.max_chars: 8", "at least min_chars=9"],
        ),
        (("kind: jsonl", "kind: python-stdlib"), ["sources.a.paths", "leave it out"]),
        (("a.jsonl", "b.jsonl"), ["sources.a.paths", "b.jsonl", "matches no file"]),
        (("kind: jsonl", "kind: jsonl, text_key: body"), ["a.jsonl:1", "no key 'body'"]),
        *(
            (("kind: jsonl", f"kind: {kind}, text_key: body"), [f"sources.a.text_key: 'body' {NO_KEY}"])
            for kind in ("text", "jsonl, chat: {messages_key: m}")
        ),
        (
            ("kind: jsonl", "kind: jsonl, language: deu"),
            ["sources.a.language: 'deu' is not allowed; only filters read it; name one, or leave it out"],
        ),
        (("kind: jsonl", "kind: jsonl, min_chars: 99999"), ["sources.a", "no document is left", "12 too_short"]),
        (("kind: jsonl", "kind: jsonl, filters: [c4], language: qqq"), ["sources.a.language", "qqq"]),
    ],
)
def test_config_and_sources(run: Callable[..., str], change: tuple[str, str], needles: list[str]) -> None:
    line = run(change=change)
    assert all(needle in line for needle in needles), line


def test_more_documents_than_a_prefix_holds(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENTS", 11)
    line = "sources.a: 12 documents, a prefix holds at most 11; split its paths over several sources"
    assert run() == line


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["--tokenizer.vocab_size", "100"], ["tokenizer.vocab_size", "100", "259"]),
        (["--tokenizer.vocab_size", "3000000000"], ["tokenizer.vocab_size", "1073741824"]),
        (["--tokenizer.path", "t.json"], ["tokenizer.vocab_size", "either"]),
        (["--tokenizer.vocab_size", "null", "--tokenizer.path", "none.json"], ["tokenizer.path", "none.json"]),
        (["--tokenizer.pad_token", "<|eos|>"], ["tokenizer.pad_token", "differ"]),
        (["--validation_fraction", "1.5"], ["validation_fraction", "1.5"]),
        (["--validation_fraction", "1e-9"], ["sources.a", "valid split"]),
        (["--validation_fraction", "0.999999999"], ["sources.a", "train split"]),
        (["--executor.tasks", "0"], ["executor.tasks", "0"]),
        (["--executor.workers", "two"], ["executor.workers", "two"]),
        (["--dedup.buckets", "0"], ["dedup.buckets", "0"]),
        *(
            (["--dedup.minhash", "false", f"--dedup.{key}={value}"], [f"dedup.{key}: ", UNUSED])
            for key, value in (("ignore", "[]"), ("ngram", 4), ("buckets", 4), ("hashes_per_bucket", 4))
        ),
        (["--dedup.minhash=false", "--dedup.language=cmn"], [f"dedup.language: 'cmn' {UNUSED}"]),
        (
            ["--tokenizer.allow_loss", "true"],
            ["tokenizer.allow_loss: True is not allowed; a trained tokenizer has a token for every byte; leave it out"],
        ),
        (
            ["--tokenizer.vocab_size", "null", "--tokenizer.path", "t.json", "--tokenizer.train_chars", "9"],
            ["tokenizer.train_chars: 9 is not allowed; an existing tokenizer is not trained; leave it out"],
        ),
        (["--dedup.bukets", "4"], ["dedup.bukets", "did you mean dedup.buckets"]),
        (["--executor.slurm.partition", "cpu"], ["executor.slurm", "sbatch"]),
    ],
)
def test_values(run: Callable[..., str], arguments: list[str], needles: list[str]) -> None:
    line = run(*arguments)
    assert all(needle in line for needle in needles), line


def test_a_split_without_documents_is_refused_before_the_search_for_duplicates(run, monkeypatch) -> None:
    monkeypatch.setattr(documents, "find_duplicates", lambda *_: pytest.fail("searched"))
    fix = "give it more documents, or change sources.a.validation_fraction=1e-09"
    assert f"sources.a: no document is left for its valid split; {fix}" in run("--validation_fraction", "1e-9")


def test_a_source_of_duplicates_alone_is_refused(run: Callable[..., str], tmp_path: Path) -> None:
    both = f'paths: ["{tmp_path}/a.jsonl"]}}\n  - {{name: b, kind: jsonl, paths: ["{tmp_path}/b.jsonl"]}}'
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    line = run(change=(f'paths: ["{tmp_path}/a.jsonl"]}}', both))
    assert "no document is left for its train split; the others were duplicates" in line


def test_truncated_input_found_while_reading(run: Callable[..., str], tmp_path: Path) -> None:
    packed = gzip.compress((tmp_path / "a.jsonl").read_bytes() * 200)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-9])
    assert "a.jsonl.gz: is truncated" in run(change=("a.jsonl", "a.jsonl.gz"))


def test_bad_line_found_by_a_worker_process(run: Callable[..., str], tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write('{"txt": "x"}\n')
    assert "a.jsonl:13: no key 'text'" in run("--executor.workers", "2")


def test_two_runs_at_once(tmp_path: Path, corpus: Any, jsonl: Callable, config: Any) -> None:
    (tmp_path / "out.partial").mkdir()
    hold = "import sys, fasteners; lock = fasteners.InterProcessLock(sys.argv[1]); lock.acquire()"
    wait = "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", f"{hold}; {wait}", str(tmp_path / "out.partial" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is writing"):
            tokenize.build(config({"a": jsonl("a", corpus.documents(9))}))
        other.communicate("")
    assert (tmp_path / "out.partial").exists()
