"""The number of loops of each step: its schedule and distributions, whole runs, resumption, refusals."""

import dataclasses
import json
import math
from collections import Counter
from itertools import repeat
from pathlib import Path

import pytest
import torch

from looplm import reference
from looplm.accounting import training_flops_per_token
from looplm.config import HealthConfig, LossConfig, ModelConfig, ParallelConfig
from looplm.failures import UserError
from looplm.megatron import process_groups
from pretrain import health
from pretrain.data import check_corpus
from pretrain.loops import loops_of_step
from pretrain.train import train
from tests.pretrain.test_step import GATE, make_batch, make_opinionated
from tests.support.parity import assert_close_relative, grad_of, oracle_copy
from tests.support.tiny import run_config, train_rows

STEPS = 6


def test_the_onset_runs_few_loops_then_all(corpus, tmp_path):
    for share, onset in ((0.0, 0), (0.35, 2), (0.5, 3), (0.99, 6)):
        config = run_config(corpus, tmp_path, loss={"loop_onset": share})
        assert [loops_of_step(config, step) for step in range(STEPS)] == [1] * onset + [3] * (STEPS - onset)
    config = run_config(corpus, tmp_path, loss={"loop_onset": 0.5, "onset_loops": 2, "sampled_loops": "uniform"})
    drawn = [loops_of_step(config, step) for step in range(3, 60)]
    assert [loops_of_step(config, step) for step in range(3)] == [2] * 3 and set(drawn) == {1, 2, 3}


def test_uniform_loops_are_equally_likely_and_depend_on_seed_and_step(corpus, tmp_path):
    config = run_config(corpus, tmp_path, loss={"sampled_loops": "uniform"})
    drawn = [loops_of_step(config, step) for step in range(3000)]
    assert drawn == [loops_of_step(config, step) for step in range(3000)]
    assert set(drawn) == {1, 2, 3} and all(abs(count - 1000) < 100 for count in Counter(drawn).values())
    other = dataclasses.replace(config, seed=config.seed + 1)
    assert drawn != [loops_of_step(other, step) for step in range(3000)]


def test_poisson_loops_follow_the_sum_over_rates(corpus, tmp_path):
    """The share of each number, against a numerical integral of Poisson's probabilities over the rate's logarithm."""
    loops, draws, grid = 8, 4000, [(i - 200) / 40 for i in range(401)]
    config = run_config(corpus, tmp_path, model={"num_loops": loops}, loss={"sampled_loops": "poisson"})
    rates = [math.exp(math.log(4) - 1 / 8 + z / 2) for z in grid]
    normal = [math.exp(-z * z / 2) for z in grid]
    expected = [
        sum(w * math.exp(-rate) * rate**k / math.factorial(k) for w, rate in zip(normal, rates, strict=True))
        / sum(normal)
        for k in range(loops - 1)
    ]
    expected.append(1 - sum(expected))
    drawn = Counter(loops_of_step(config, step) for step in range(draws))
    for number, share in enumerate(expected, start=1):
        assert abs(drawn[number] / draws - share) < 4 * math.sqrt(share * (1 - share) / draws), number


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"loss": {"onset_loops": 2}}, r"loss\.onset_loops: 2 .* needs loss\.loop_onset above 0"),
        (
            {"loss": {"loop_onset": 0.5, "onset_loops": 3}},
            r"loss\.onset_loops: 3 .* give fewer than model\.num_loops=3",
        ),
        ({"loss": {"loop_onset": 1.0}}, r"loss\.loop_onset: 1\.0 .* below 1"),
        (
            {"loss": {"sampled_loops": "uniform"}, "parallel": ParallelConfig(overlap_grad_reduce=True)},
            r"loss\.sampled_loops: 'uniform' .* take parallel\.overlap_grad_reduce=false",
        ),
        (
            {"loss": {"loop_onset": 0.5}, "model": {"num_loops": 1}},
            r"loss\.loop_onset: 0\.5 .* with model\.num_loops=1 there are no fewer loops",
        ),
        (
            {"loss": {"sampled_loops": "poisson"}, "health": HealthConfig(spike_factor=7.0)},
            r"health\.spike_factor: 7\.0 .* leave it out with loss\.sampled_loops",
        ),
    ],
)
def test_what_cannot_work_is_refused(sections, words, corpus, tmp_path):
    with pytest.raises(UserError, match=words):
        run_config(corpus, tmp_path, **sections)


def test_the_gate_stage_refuses_fewer_loops():
    with pytest.raises(UserError, match=r"loss\.objective: 'adaptive_gate' .* leave out loss\.loop_onset"):
        LossConfig(objective="adaptive_gate", sampled_loops="uniform")


def run(config) -> list[dict]:
    train(config, check_corpus(config.data, config.model.vocab_size), process_groups.start(config.seed))
    return train_rows(config.output_dir)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_validates_all_loops_and_counts_what_ran(corpus, tmp_path, single_process):
    sections = {"loss": {"loop_onset": 0.34, "sampled_loops": "uniform"}, "logging": {"peak_tflops": 1.0}}
    whole = run_config(corpus, tmp_path / "whole", **sections)
    straight, ran = run(whole), [loops_of_step(whole, step) for step in range(STEPS)]
    assert len(set(ran)) > 1 and [row["loops"] for row in straight] == ran
    for row in straight:
        per_token = training_flops_per_token(whole.model, whole.gate, whole.loss, whole.data.seq_length, row["loops"])
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * per_token / 1e12)
        assert [value is None for value in row["loss_per_loop"]] == [loop >= row["loops"] for loop in range(3)]
    lines = map(json.loads, (Path(whole.output_dir) / "metrics.jsonl").read_text().splitlines())
    valid = [line for line in lines if line["kind"] == "valid"]
    assert valid and all(None not in line["loss_per_loop"] for line in valid)

    halves = dataclasses.replace(whole, output_dir=str(tmp_path / "halves"))
    halves = dataclasses.replace(halves, checkpoint=dataclasses.replace(halves.checkpoint, save_every=3))
    run(halves)
    steps = tmp_path / "halves" / "checkpoints"
    (steps / "step_00000006" / "manifest.json").unlink()  # as if the run had died before its last save
    keys = ("step", "loops", "loss", "loss_per_loop", "grad_norm", "exit_distribution")
    assert [[row[key] for key in keys] for row in run(halves)] == [[row[key] for key in keys] for row in straight]


@pytest.mark.slow
@pytest.mark.parametrize("loops", [1, 2])
@pytest.mark.parametrize(
    "keys",
    [
        {"prior": "given", "prior_shares": (3.0, 2.0, 1.0), "ponder_cost": 0.05},
        {"regularizer": "batch"},
        {"weights": "uniform", "backward_loops": 1},
        {"weights": "last", "stability": 0.3},
    ],
    ids=lambda keys: next(iter(keys.values())),
)
def test_a_step_of_fewer_loops_is_one_of_a_model_with_fewer(single_process, keys, loops):
    """Loss, statistics and gradients of two uneven micro-batches equal the oracle's with that number of loops."""
    loss = LossConfig(beta=0.3, **keys)
    looped, trainer = make_opinionated(single_process, loss, step_embedding="learned")
    batches = [make_batch(0, masked=7), make_batch(1, masked=0)]
    plain = oracle_copy(dict(looped.named_parameters()))
    model: ModelConfig = dataclasses.replace(looped.model_config, num_loops=loops)
    total, tokens = torch.zeros((), dtype=torch.float64), sum(batch.mask_SB.sum() for batch in batches)
    prior_R = torch.tensor(loss.prior_shares[:loops]) / sum(loss.prior_shares[:loops]) if loss.prior_shares else None
    per_loop = torch.zeros(loops, dtype=torch.float64)
    for batch in batches:
        output = reference.forward(plain, model, GATE, batch.ids_BS, backward_loops=loss.backward_loops)
        head_VD = reference.head_weight(plain, model)
        losses = torch.stack([reference.token_losses(h, head_VD, batch.labels_SB) for h in output.hidden])
        if loss.weights == "gate":
            options = loss.beta, batch.mask_SB, prior_R, loss.regularizer == "batch", loss.ponder_cost
            mean = reference.entropy_regularised_loss(losses, output.gate_logit_RSB, *options)
        else:
            weighed = losses[-1] if loss.weights == "last" else losses.mean(0)
            penalty_SB = loss.stability * reference.state_changes(output.hidden)
            mean = reference.masked_mean(weighed + penalty_SB, batch.mask_SB)
        total = total + mean * batch.mask_SB.sum()
        per_loop += (losses.detach() * batch.mask_SB).flatten(1).sum(1)
    (total / tokens).backward()
    stats, norms = trainer.backward(iter(batches), 2, loops)
    assert stats.loss == pytest.approx((total / tokens).item(), rel=1e-6)
    assert stats.loss_per_loop[:loops] == pytest.approx((per_loop / tokens).tolist(), rel=1e-5)
    for values in (stats.loss_per_loop, norms.hidden_rms, norms.hidden_grad_norm, norms.hidden_cosine):
        assert len(values) == 3 and [math.isnan(value) for value in values] == [loop >= loops for loop in range(3)]
    assert sum(stats.exit_distribution[:loops]) == pytest.approx(1) and not any(stats.exit_distribution[loops:])
    trained = [name for name in plain if not name.startswith("gate.") or (loss.weights == "gate" and loops > 1)]
    found = {name: parameter.main_grad for name, parameter in looped.named_parameters() if name in trained}
    assert_close_relative(found, {name: grad_of(plain[name]) for name in trained}, 1e-5)
    assert not any(math.isnan(value) for value in trainer.evaluate(iter(batches), 2).loss_per_loop), "it runs all loops"


@pytest.mark.slow
def test_a_bad_step_of_fewer_loops_names_only_those_that_ran(single_process):
    looped, trainer = make_opinionated(single_process, LossConfig())
    with torch.no_grad():
        looped.decoder.final_layernorm.weight[0] = math.nan
    done = trainer.train(repeat(make_batch(0, masked=7)), 2, loops=2)
    bad = health.examine(trainer, done, step=1, samples=(0, 4), micro_batch_size=2)
    assert not done.healthy and {found.losses for rank in bad.ranks for found in rank.micro_batches} == {(1, 2)}
