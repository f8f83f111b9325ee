"""Validations that look at the loops: what they log is the checkpoint's, and training does not change."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from looplm import checkpoint
from looplm.config import RunConfig
from looplm.evaluation.dynamics import loop_dynamics
from looplm.megatron import process_groups
from pretrain.data import build_valid_set, check_corpus, index_cache, micro_batches
from pretrain.train import train
from tests.faults import harness
from tests.support.tiny import run_config

pytestmark = pytest.mark.slow  # every test here trains

LOOKS = {"eval_every": 3, "dynamics_samples": 4, "tensorboard": False}
DOES_NOT = LOOKS | {"dynamics_samples": 0}
MEASURED_TIMES = ("tokens_per_second", "seconds", "mfu")


def rows_of(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in MEASURED_TIMES} for row in rows if row["kind"] == kind]


def run(config: RunConfig) -> RunConfig:
    groups = process_groups.start(config.seed)
    train(config, check_corpus(config.data, config.model.vocab_size), groups)
    return config


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"optim": {"precision": "bf16"}, "parallel": {"recompute": "loop"}},
        {"engine": {"fp8": "emulate-hybrid", "fp8_recipe": "delayed"}},  # its scales remember what went before
    ],
    ids=["fp32", "bf16, recomputed", "fp8"],
)
def test_training_is_the_same_whether_validations_look_or_not(corpus, tmp_path, single_process, sections):
    looking, plain = (
        run(run_config(corpus, tmp_path / name, logging=logging, **sections))
        for name, logging in (("looking", LOOKS), ("plain", DOES_NOT))
    )
    assert rows_of(looking, "train") == rows_of(plain, "train")
    rows = rows_of(looking, "valid")
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        first, *later = row.pop("loop_radius")
        assert first is None and len(later) == 2 and all(radius > 0 for radius in later)
        assert len(row["attention_sink"]) == 3 and all(0 < share < 1 for share in row.pop("attention_sink"))
    assert rows == rows_of(plain, "valid")


def test_what_is_logged_is_measured_on_the_first_validation_samples(corpus, tmp_path, single_process):
    config = run(run_config(corpus, tmp_path / "run", logging=LOOKS))
    checked = check_corpus(config.data, config.model.vocab_size)
    valid_set = build_valid_set(config.data, checked, 8, config.seed, index_cache(config))
    assert valid_set is not None
    batches = islice(micro_batches(valid_set, config.data, 0, 0, 1), 2)
    ids_BS = torch.cat([batch.ids_BS for batch in batches])
    model = checkpoint.open_model(config.output_dir, single_process).model
    expected, row = loop_dynamics(model, ids_BS, single_process.dp), rows_of(config, "valid")[-1]
    assert len(ids_BS) == 4
    assert row["loop_radius"][1:] == pytest.approx(expected.loop_radius[1:], rel=1e-5)
    assert row["attention_sink"] == pytest.approx(expected.attention_sink, rel=1e-5)


def test_data_parallel_ranks_share_the_samples(corpus, tmp_path, single_process):
    whole = run(run_config(corpus, tmp_path / "whole", logging=LOOKS))
    shared = run_config(corpus, tmp_path / "shared", logging=LOOKS)
    harness.complete(shared, 2)
    for one, two in zip(rows_of(whole, "valid"), rows_of(shared, "valid"), strict=True):
        assert two["loop_radius"][1:] == pytest.approx(one["loop_radius"][1:], rel=1e-3)
        assert two["attention_sink"] == pytest.approx(one["attention_sink"], rel=1e-3)
