"""Synthetic tasks as training data: samples depend on their index alone, and a run on them resumes bit for bit."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.synthetic.registry import open_task
from data_pipeline.synthetic.task import SPLITS
from looplm import checkpoint
from looplm.cli import from_dict
from looplm.config import DataConfig, RunConfig, TaskConfig, WordProblemConfig
from looplm.failures import UserError
from looplm.megatron import process_groups
from pretrain import evaluate
from pretrain.data import build_train_set, build_valid_set, check_corpus, micro_batches
from pretrain.task_data import TaskDataset
from pretrain.train import train
from tests.support.launch import run_ranks

TASK = TaskConfig(word_problem=WordProblemConfig(group="S3"))


def config(folder: Path, **changes: Any) -> RunConfig:
    model = {"vocab_size": 7, "hidden_size": 16, "ffn_hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": model | {"num_loops": 3, "attention": "mha"},
        "gate": {"kind": "linear"},
        "optim": {"train_steps": 6, "lr": 1e-3, "precision": "fp32"},
        "data": {"task": {"word_problem": {}}, "seq_length": 8, "micro_batch_size": 8, "global_batch_size": 16},
        "logging": {"eval_samples": 4, "tensorboard": False},
    }
    for section, keys in changes.items():
        values[section] = values.get(section, {}) | keys
    return from_dict(RunConfig, values, where="test")


def batches_of(run: RunConfig, start: int, count: int, rank: int = 0, ranks: int = 1) -> list[Any]:
    train_set = build_train_set(run, check_corpus(run.data, run.model.vocab_size), 4096, 4096)
    batches = micro_batches(train_set, run.data, start, rank, ranks)
    return [next(batches) for _ in range(count)]


@pytest.mark.slow
def test_a_sample_depends_on_its_index_alone(tmp_path):
    whole = torch.cat([batch.ids_BS for batch in batches_of(config(tmp_path), 0, 160)])
    assert len({tuple(row) for row in whole.tolist()}) > 1270, "samples repeat"
    for start in (8, 1016, 1024):  # within a block of 1024, across two, at the start of one
        [batch] = batches_of(config(tmp_path), start, 1)
        assert torch.equal(batch.ids_BS, whole[start : start + 8])
    workers = batches_of(config(tmp_path, data={"num_workers": 2}), 1000, 4)
    assert torch.equal(torch.cat([batch.ids_BS for batch in workers]), whole[1000:1032])
    second = batches_of(config(tmp_path), 0, 2, rank=1, ranks=2)
    assert torch.equal(torch.cat([batch.ids_BS for batch in second]), torch.cat((whole[8:16], whole[24:32])))


def test_a_batch_is_the_tasks_own_labels_and_levels(tmp_path):
    [batch] = batches_of(config(tmp_path), 0, 1)
    product_EE = open_task(TASK).product_EE  # type: ignore[attr-defined]
    assert batch.document_start_SB is None and not batch.mask_SB[0].any() and bool((batch.mask_SB[1:] == 1).all())
    assert not batch.ids_BS[:, 0].any() and bool((batch.level_SB[0] == -1).all()), "END begins every word"
    for sample in range(8):
        so_far = int(batch.ids_BS[sample, 1]) - 1
        for position in range(1, 8):
            if position > 1:
                so_far = int(product_EE[so_far, int(batch.ids_BS[sample, position]) - 1])
            assert int(batch.labels_SB[position, sample]) == so_far + 1
            assert int(batch.level_SB[position, sample]) == position


def test_splits_and_seeds_differ(tmp_path):
    sets = [TaskDataset(open_task(TASK), 12, split, seed, 2000) for split in SPLITS for seed in (1, 2)]
    rows = [{tuple(row) for row in np.asarray(found.__getitems__(list(range(2000)))["tokens"])} for found in sets]
    for index, first in enumerate(rows):
        assert all(len(first & other) < 3 for other in rows[index + 1 :])
    for index in range(0, 6, 2):
        others = set().union(*(row for other, row in enumerate(rows) if other // 2 != index // 2))
        assert not (rows[index] | rows[index + 1]) & others, "an item is in two splits"


def test_what_cannot_be_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"model.vocab_size: 6 is not allowed; data.task.word_problem has 7 symbols"):
        check_corpus(config(tmp_path).data, 6)
    with pytest.raises(UserError, match="exactly one of word_problem"):
        TaskConfig()
    with pytest.raises(UserError, match=r"data.task: 'word_problem' is not allowed; it replaces text; leave out /x"):
        from_dict(DataConfig, {"task": {"word_problem": {}}, "train": [{"prefix": "/x"}]}, where="data")
    with pytest.raises(UserError, match=r"data.train: \[\] is not allowed; name at least one source.* or a task"):
        DataConfig()


@pytest.mark.slow
def test_a_run_on_a_task_resumes_bit_for_bit_and_is_measured(tmp_path, single_process, monkeypatch, capsys):
    whole = config(tmp_path / "whole", loss={"weights": "last"}, checkpoint={"save_every": 3, "keep": 9})
    assert train(whole, check_corpus(whole.data, 7), single_process)
    parted = dataclasses.replace(whole, output_dir=str(tmp_path / "parted"))
    first = dataclasses.replace(parted, optim=dataclasses.replace(parted.optim, train_steps=3))
    train(first, check_corpus(first.data, 7), single_process)
    train(parted, check_corpus(parted.data, 7), single_process)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parted")
    ]
    trained = [[row for row in found if row is not None][:3] for found in losses]
    assert trained[0] == trained[1]
    opened = [checkpoint.open_model(str(tmp_path / name), single_process) for name in ("whole", "parted")]
    first_weights, second_weights = (dict(found.model.named_parameters()) for found in opened)
    assert all(torch.equal(value, second_weights[name]) for name, value in first_weights.items())
    assert not opened[0].about.gate_trained and opened[0].tokenizer.encode("123 213").ids == [1, 3]

    other = dataclasses.replace(
        parted, data=dataclasses.replace(parted.data, task=TaskConfig(word_problem=WordProblemConfig(group="Z6")))
    )
    with pytest.raises(UserError, match="trained with another tokenizer"):
        train(other, check_corpus(other.data, 7), single_process)

    monkeypatch.setattr(process_groups, "stop", lambda: None)  # the test session still needs its process groups
    arguments = ["--checkpoint", whole.output_dir, "--depths", "1,3,6", "--samples", "32", "--batch_size", "16"]
    fitted_on = list[str]()

    def made(*sizes: Any) -> TaskDataset:
        fitted_on.append(sizes[2])
        return TaskDataset(*sizes)

    monkeypatch.setattr(evaluate, "TaskDataset", made)
    evaluate.main(
        [
            *arguments,
            "--split",
            "test",
            "--refit_steps",
            "2",
            "--votes",
            "3,1",
            "--kv_caches",
            "per_loop",
            "--prompt_tokens=1",
        ]
    )
    report = json.loads((tmp_path / "whole/evaluation.json").read_text())
    answers = report["answers"]
    assert report["data"] == ["word_problem (test)"] and fitted_on == ["train"], "no head is fitted to what it answers"
    assert [row["depth"] for row in answers["depths"]] == [1, 2, 3, 4, 5, 6] and len(answers["refitted"]) == 6
    assert len(answers["attention_sink"]) == 6 and len(answers["loop_radius"]) == 5
    assert answers["levels"]["levels"] == list(range(1, 8)) and answers["levels"]["labels"] == [32] * 7
    assert report["depths"][1]["loss"] == pytest.approx(answers["depths"][2]["loss"], rel=1e-5)
    by_split = dict[str, torch.Tensor]()
    for split in SPLITS[1:]:
        held_out = TaskDataset(open_task(TASK), 8, split, whole.seed, 32).__getitems__(list(range(32)))
        with torch.no_grad():
            logits_SBV = opened[0].model(held_out["tokens"]).hidden[-1] @ opened[0].model.head_weight().T
        counts_SB = held_out["loss_mask"].t().bool()
        by_split[split] = torch.nn.functional.cross_entropy(logits_SBV[counts_SB], held_out["labels"].t()[counts_SB])
    assert report["depths"][1]["loss"] == pytest.approx(by_split["test"].item(), rel=1e-4)
    assert abs(by_split["test"] - by_split["valid"]) > 1e-3, "the comparison above does not tell the splits apart"
    last = answers["depths"][2]["accuracy_by_level"][-1]
    assert answers["voted"] == [{"votes": votes, "solved": last} for votes in (1, 3)], "without a chain: the argmax"
    decoded = answers["depths"][2]["accuracy"]
    assert report["decoding"][0]["accuracy"] == pytest.approx(decoded, abs=0.02), "the same labels, through the cache"
    assert "right by position 1 2 3" in capsys.readouterr().out

    def measured(ranks: int, batch: int, *more: str) -> dict[str, Any]:
        output = tmp_path / "measured.json"
        argv = [*arguments[:-1], str(batch), f"--output={output}", *more]  # later flags count
        run_ranks(ranks, evaluate.main, (argv,), tmp_path / f"log_{ranks}_{batch}.txt")
        found: dict[str, Any] = json.loads(output.read_text())["answers"]
        return found

    at_once, halves, shared = measured(1, 32), measured(1, 16, "--refit_steps=2"), measured(2, 16, "--refit_steps=2")
    assert shared["attention_sink"] == pytest.approx(at_once["attention_sink"], rel=1e-4), "the mean of the ranks'"
    assert shared["refitted"] == pytest.approx(halves["refitted"]) and len(set(halves["refitted"])) > 1
    hops = config(tmp_path / "hops", data={"task": {"p_hop": {"hops": [1, 2, 3], "alphabet": 3}}})
    hops = dataclasses.replace(hops, optim=dataclasses.replace(hops.optim, train_steps=1, warmup_steps=0))
    train(hops, check_corpus(hops.data, 7), single_process)
    few = ["--checkpoint", hops.output_dir, "--samples=2"]
    uneven = measured(2, 1, *few)  # the samples have a label each, of these levels
    assert uneven["levels"]["levels"] == [2, 3]
    for at, whole_at in zip(uneven["depths"], measured(1, 2, *few)["depths"], strict=True):
        assert at["loss_by_level"] == pytest.approx(whole_at["loss_by_level"], rel=1e-5)
    with pytest.raises(AssertionError, match="samples: 32 is not allowed; give a multiple of 64: 2 ranks read"):
        measured(2, 32)
    hops_keys = ["--task.p_hop.hops=[1,2]", "--task.p_hop.alphabet=3", f"--output={tmp_path / 'other.json'}"]
    with pytest.raises(UserError, match=r"votes: '1' is not allowed; samples of this task have their labels at diff"):
        evaluate.main([*arguments, "--votes", "1", *hops_keys])
    with pytest.raises(UserError, match=r"task: p_hop has other symbols than the task of .*whole"):
        evaluate.main([*arguments, *hops_keys])
    with pytest.raises(UserError, match=r"data.seq_length|max_sequence_length"):
        evaluate.main([*arguments, "--seq_length", "5000"])


HOLDS_A_LOADER = """
import builtins
from pretrain.data import build_train_set, check_corpus, micro_batches
from tests.pretrain.test_task_data import config
run = config("unused", data={"num_workers": 1})
builtins.batches = micro_batches(build_train_set(run, check_corpus(run.data, 7), 4096, 4096), run.data, 0, 0, 1)
next(builtins.batches)
"""


@pytest.mark.slow
def test_a_process_that_still_holds_a_loader_ends():
    """Its workers ignore the SIGTERM with which multiprocessing would end them, and wait for."""
    ended = subprocess.run([sys.executable, "-c", HOLDS_A_LOADER], timeout=120, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_run_validates_on_the_valid_split(tmp_path):
    data = config(tmp_path).data
    found = build_valid_set(data, check_corpus(data, 7), 4, 1, tmp_path)
    expected = TaskDataset(open_task(TASK), data.seq_length, "valid", 1, 4)
    assert isinstance(found, TaskDataset)
    rows = [0, 1, 2, 3]
    assert torch.equal(found.__getitems__(rows)["tokens"], expected.__getitems__(rows)["tokens"])
