"""lm-evaluation-harness gives the same answers for a checkpoint and its export at any depth; errors take one line."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core.process_groups_config import ProcessGroupCollection
from tokenizers import Tokenizer, processors

from looplm import checkpoint
from looplm.config import GateConfig
from looplm.files import sha256_of
from looplm.huggingface.convert import export_model
from tests.support.generation_oracle import build
from tests.support.tiny import BOS, MODEL, TEXTS, about_weights

ROOT = Path(__file__).resolve().parents[2]
GATE = GateConfig(state_size=8, sequence_level=True)
TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "tiny_text": {
        "output_type": "generate_until",
        "doc_to_target": "text",
        "generation_kwargs": {"until": ["z"], "max_gen_toks": 10},
        "metric_list": [{"metric": "exact_match"}],
    },
}
OWN = {"fewshot_split": "test"}  # its examples are its other questions


def write_tasks(folder: Path) -> None:
    """Write task files on local data; one lacks its data, one asks for more tokens than the context has."""
    folder.mkdir()
    data = folder / "documents.jsonl"
    with data.open("w") as file:
        for index, text in enumerate(TEXTS[:5]):
            document = {"question": text[:12], "text": text * (1 + 2 * (index == 1))}  # one is longer than the context
            file.write(json.dumps({**document, "choices": ["\n    return", " a", "b):"], "answer": index % 3}) + "\n")
    long = {**TASKS["tiny_text"], "generation_kwargs": {"until": ["z"], "max_gen_toks": 64}}
    others = {"tiny_long": long, "broken": TASKS["tiny_choice"], "tiny_own": {**TASKS["tiny_choice"], **OWN}}
    for name, kind in {**TASKS, **others}.items():
        files = {"test": "missing.jsonl" if name == "broken" else str(data)}
        question = "" if name == "tiny_rolling" else "{{question}}"
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, "doc_to_text": question, **kind}))


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, single_process: ProcessGroupCollection
) -> dict[str, Any]:
    """Return the worker's answers for a model whose answers vary, and the command's report."""
    folder = tmp_path_factory.mktemp("harness")
    model = build(replace(MODEL, num_loops=4), GATE, single_process)
    about = about_weights("float32", corpus / "tokenizer.json")
    checkpoint.save_weights(folder / "step", model, GATE, about, corpus / "tokenizer.json")
    opened = checkpoint.open_model(str(folder / "step"), single_process, dtype=None)
    export_model(opened, folder / "export", "looplm", None, 10**9)
    write_tasks(folder / "tasks")
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    with_bos = replace(about, begin_id=BOS, tokenizer_sha256=sha256_of(folder / "tokenizer.json"))
    checkpoint.save_weights(folder / "step-bos", model, GATE, with_bos, folder / "tokenizer.json")
    opened = checkpoint.open_model(str(folder / "step-bos"), single_process, dtype=None)
    export_model(opened, folder / "export-bos", "looplm", None, 10**9)
    with torch.no_grad():
        model.head_weight().fill_(math.nan)
    checkpoint.save_weights(folder / "step-nan", model, GATE, about, corpus / "tokenizer.json")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HOME": str(folder / "hf"), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "tests.support.harness_worker", "step", "export", "tasks", "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((folder / "report.json").read_text())
    return {**json.loads((folder / "found.json").read_text()), "report": report, "shown": done.stdout}


def approximately(value: Any) -> Any:
    """Compare numbers to 1e-4, and everything else exactly."""
    if isinstance(value, list):
        return [approximately(item) for item in value]
    return pytest.approx(value, rel=1e-4) if isinstance(value, float) else value


@pytest.mark.slow
def test_a_checkpoint_and_its_export_answer_alike(found: dict[str, Any]) -> None:
    for one in found["alike"]:
        assert one["ours"]["tiny_text"] == one["theirs"]["tiny_text"]
        for name in ("tiny_choice", "tiny_rolling"):
            assert one["ours"][name] == approximately(one["theirs"][name])
    for name in TASKS:
        assert len({str(one["theirs"][name]) for one in found["alike"]}) > 2, "depth and threshold change something"


@pytest.mark.slow
def test_the_command_shows_and_writes_results(found: dict[str, Any]) -> None:
    report = found["report"]
    assert 0 <= report["results"]["tiny_choice"]["acc,none"] <= 1
    assert report["n-samples"]["tiny_text"]["effective"] == 5 and report["depth"] == 4
    assert report["n-shot"]["tiny_choice"] == 5, "as many as there are documents"
    assert "tiny_choice" in found["shown"]


@pytest.mark.slow
@pytest.mark.promise(
    text="A text's BOS is put in once, and not scored: pairs, whole texts and continuations equal those of the export",
    expected="equal scores; lm-evaluation-harness's own rolling score counts BOS too",
)
def test_a_text_begins_with_bos_once(found: dict[str, Any], record_property: Callable[[str, object], None]) -> None:
    bos = found["bos"]
    ours, theirs = bos["pairs"]
    assert ours == approximately(theirs)
    ours, once, twice = bos["texts"]
    assert ours[:2] == approximately(once[:2])
    assert twice[0] < once[0] - 1, "the tokenizer adds BOS"
    ours, theirs = bos["generated"]
    assert ours == theirs and all(ours)
    record_property("seen", "equal scores; BOS once")


@pytest.mark.slow
@pytest.mark.promise(
    text="A choice that melts into the context's last token has a score; one without tokens is refused",
    expected="the score of its own tokens after the context; one line that names the choice",
)
def test_a_choice_that_melts_into_the_context(
    found: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    ours, theirs = found["bos"]["melting"]
    assert ours == approximately(theirs) and ours[0][0] < 0
    message = found["bos"]["empty"]
    assert message == "tasks: the continuation '' of 'abc' has no tokens to score; remove the item from the task"
    record_property("seen", f"a score; {message}")


@pytest.mark.slow
def test_mistakes_give_a_one_line_error(found: dict[str, Any]) -> None:
    expected = ["tiny_chioce: no such task", "broken: cannot be loaded", "depth: 2", "exit_threshold: 2"]
    expected += ["limit: 0", "max_gen_toks: 64", "depth: 10001 is not allowed; give null or a number of at least 1"]
    expected += [
        "num_fewshot: 6 is not allowed; give at most 5, as tiny_choice has no more documents for them",
        "num_fewshot: 5 is not allowed; give at most 4, as tiny_own has no more documents for them",
    ]
    for message, part in zip(found["mistakes"], expected, strict=True):
        assert part in message and "\n" not in message, message


@pytest.mark.slow
def test_a_model_whose_logits_are_not_finite_has_no_score(found: dict[str, Any]) -> None:
    reason = "the model's logits are not finite; its training diverged or a file is damaged; take an earlier checkpoint"
    assert found["broken"] == [f"step-nan: {reason}"] * len(TASKS)
