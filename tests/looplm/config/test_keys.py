"""Effects of keys that no other test changes."""

import dataclasses
import json

import pytest
import torch

from looplm import reference
from looplm.config import GateConfig, LossConfig, ModelConfig
from looplm.model import LoopLM
from looplm.model.exit_gate import exit_log_probs
from looplm.model.losses import LoopLosses
from pretrain.data import build_train_set, check_corpus, micro_batches
from pretrain.step import objective
from pretrain.train import train
from tests.support.tiny import MODEL, run_config


@pytest.mark.slow
def test_logging_and_cache_keys(corpus, tmp_path, single_process):
    logging = {"log_every": 4, "eval_every": 3, "tensorboard": False, "peak_tflops": 1e-30}
    data = {"cache_dir": str(tmp_path / "cache"), "horizon_samples": 8}
    config = run_config(corpus, tmp_path / "run", data=data, logging=logging, checkpoint={"save_every": 2, "keep": 2})
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [4, 6]  # always the last one
    assert [row["step"] for row in rows if row["kind"] == "valid"] == [3, 6]
    assert all(row["mfu"] > 1e6 for row in rows if row["kind"] == "train")
    assert list((tmp_path / "cache").rglob("*.npy"))
    assert not {"tensorboard", "index_cache"} & {path.name for path in (tmp_path / "run").iterdir()}
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")) == [
        "step_00000004",
        "step_00000006",
    ]


@pytest.mark.slow
def test_processes_that_prefetch_change_no_batch(corpus, tmp_path, single_process):
    config = run_config(corpus, tmp_path)
    train_set = build_train_set(config, check_corpus(config.data, config.model.vocab_size), 8, 8)
    ids = [
        [batch.ids_BS for batch in micro_batches(train_set, data, 0, 0, 1)]
        for data in (config.data, dataclasses.replace(config.data, num_workers=2))
    ]
    assert len(ids[0]) == len(ids[1]) == 4 and all(map(torch.equal, *ids))


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_the_geometric_prior_reaches_the_objective(rate):
    loss_RSB, logit_RSB, mask_SB = torch.rand(4, 5, 2), torch.randn(4, 5, 2), torch.ones(5, 2)
    config = LossConfig(prior="geometric", geometric_rate=rate, beta=0.3)
    expected = reference.entropy_regularised_loss(loss_RSB, logit_RSB, 0.3, mask_SB, reference.geometric_prior(4, rate))
    expected_loss = (exit_log_probs(logit_RSB).exp() * loss_RSB).sum()
    mean = objective(config, LoopLosses(loss_RSB, logit_RSB, expected_loss), mask_SB) / mask_SB.sum()
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize(
    ("keys", "theirs"),
    [
        (
            {"prior": "given", "prior_shares": (1.0, 2.0, 0.5, 0.5)},
            {"prior_R": torch.tensor([0.25, 0.5, 0.125, 0.125])},
        ),
        ({"regularizer": "batch"}, {"of_batch": True}),
        ({"ponder_cost": 0.2}, {"ponder_cost": 0.2}),
    ],
    ids=["given prior", "batch", "ponder cost"],
)
def test_the_regularizers_keys_reach_the_objective(keys, theirs):
    loss_RSB, logit_RSB, mask_SB = torch.rand(4, 5, 2), torch.randn(4, 5, 2), (torch.rand(5, 2) < 0.7).float()
    expected = reference.entropy_regularised_loss(loss_RSB, logit_RSB, 0.3, mask_SB, **theirs)
    expected_loss = (exit_log_probs(logit_RSB).exp() * loss_RSB * mask_SB).sum()
    config = LossConfig(beta=0.3, **keys)
    mean = objective(config, LoopLosses(loss_RSB, logit_RSB, expected_loss), mask_SB) / mask_SB.sum()
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize(("kind", "gain"), [("depth", (2 * 3 * 4) ** -0.5), ("loops", (2 * 3) ** -0.5 / 4)])
def test_the_initial_gain_of_the_sandwich_norms(kind, gain, single_process):
    config: ModelConfig = dataclasses.replace(MODEL, num_layers=3, num_loops=4, residual_gain=kind)
    model = LoopLM(config, GateConfig(), single_process)
    norms = {name: weight for name, weight in model.named_parameters() if name.endswith("_bda.norm.weight")}
    assert len(norms) == 6
    for weight in norms.values():
        torch.testing.assert_close(weight, torch.full_like(weight, gain))


@pytest.mark.parametrize("target", ["paper", "next"])
def test_the_gate_losss_keys_reach_the_objective(target):
    loss_RSB, logit_RSB, mask_SB = torch.rand(4, 5, 2), torch.randn(4, 5, 2), torch.ones(5, 2)
    config = LossConfig(objective="adaptive_gate", slope=7.0, threshold=0.1, target=target)
    expected = reference.adaptive_gate_loss(loss_RSB, logit_RSB, 7.0, 0.1, mask_SB, target)
    mean = objective(config, LoopLosses(loss_RSB, logit_RSB, None), mask_SB) / mask_SB.sum()
    torch.testing.assert_close(mean, expected)


def test_the_gate_loss_has_one_default_target():
    assert (LossConfig().slope, LossConfig().threshold, LossConfig().target) == (50.0, 0.005, "next")


@pytest.mark.parametrize(
    ("keys", "std"),
    [
        ({}, 1.0),
        ({"tie_embeddings": True, "init_std": 0.5}, 0.5),
        ({"tie_embeddings": True, "embedding_init_std": 0.25}, 0.25),
    ],
)
def test_the_embeddings_initial_scale(keys, std):
    config: ModelConfig = dataclasses.replace(MODEL, **keys)
    assert config.embedding_std == std
