"""parallel.recompute and parallel.accumulate_fp32 in one process: gradients and memory."""

import dataclasses
from itertools import repeat
from typing import get_args

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from looplm.config import GateConfig, LossConfig, OptimConfig, ParallelConfig, Recompute
from looplm.model import LoopLM
from pretrain.data import Batch
from pretrain.trainer import Trainer
from tests.support.observe import observed
from tests.support.parity import assert_close_relative
from tests.support.tiny import MODEL, run_config
from tools.bench.memory import peak_saved_bytes
from tools.planning.activations import peak_activation_bytes
from tools.planning.planned_run import PlannedRun

MHA = dataclasses.replace(MODEL, attention="mha", num_query_groups=2)
TOKENS = (2, 32)  # [B, S]


def batch(seed: int = 0, batch_size: int = 2) -> Batch:
    """Return samples of two documents each, so that attention has a mask."""
    ids_BS = torch.randint(MODEL.vocab_size, (batch_size, 33), generator=torch.Generator().manual_seed(seed))
    start_S = torch.tensor([0] * 10 + [10] * 22)
    return Batch(
        ids_BS[:, :-1],
        ids_BS[:, 1:].t().contiguous(),
        torch.ones(32, batch_size),
        start_S[:, None].expand(-1, batch_size).contiguous(),
    )


def build_trainer(groups, layout, model=MODEL, dtype=torch.float32, loss=None) -> Trainer:
    loss = loss or LossConfig()
    torch.manual_seed(5)
    optim = OptimConfig(
        train_steps=6, decay_steps=2, warmup_steps=2, precision="fp32" if dtype is torch.float32 else "bf16"
    )
    return Trainer(LoopLM(model, GateConfig(state_size=8), groups, dtype, layout), loss, optim, layout, groups)


def gradients(trainer: Trainer, microbatches: int) -> dict[str, torch.Tensor]:
    trainer.backward(map(batch, range(microbatches)), microbatches)
    return {key: value.main_grad.clone() for key, value in trainer.ddp.module.named_parameters() if value.requires_grad}


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert set(found) == set(expected)
    return [key for key in expected if not torch.equal(found[key], expected[key])]


@pytest.mark.parametrize("model", [MODEL, MHA], ids=["mla", "mha"])
@pytest.mark.parametrize("mode", ["selective", "full", "loop"])
def test_gradients_equal_those_without_recomputing(mode, model, single_process, monkeypatch):
    calls = []
    counted = staticmethod(observed(megatron_random.CheckpointFunction.backward, lambda *_: calls.append(1)))
    monkeypatch.setattr(megatron_random.CheckpointFunction, "backward", counted)
    expected = build_trainer(single_process, ParallelConfig(), model)
    found = build_trainer(single_process, ParallelConfig(recompute=mode), model)
    one = gradients(expected, 1)
    assert calls == [] and all(value.any() for key, value in one.items() if "gate" not in key)
    again = gradients(found, 1)
    assert len(calls) == {"selective": 6, "full": 6, "loop": 3}[mode]  # 2 layers, 3 loops
    if mode == "selective":
        assert differing(again, one) == []
    # Otherwise the order of summation differs: the gradients of a block's two paths are added before the head's
    # gradient, and each loop's gradient is added to the buffer separately.
    assert_close_relative(again, one, 1e-6)
    assert_close_relative(gradients(found, 3), gradients(expected, 3), 1e-6)


def test_a_frozen_trunk_and_evaluation_recompute_nothing(single_process, monkeypatch):
    """The trunk has no backward in the gate stage, and nothing has one in evaluation."""
    monkeypatch.setattr(megatron_random.CheckpointFunction, "backward", None)
    frozen = LossConfig(objective="adaptive_gate")
    expected = gradients(build_trainer(single_process, ParallelConfig(), loss=frozen), 1)
    for mode in ("full", "loop"):
        trainer = build_trainer(single_process, ParallelConfig(recompute=mode), loss=frozen)
        assert differing(gradients(trainer, 1), expected) == []
        assert trainer.evaluate(repeat(batch()), 2).tokens == 128


@pytest.mark.slow
def test_overlap_on_one_rank_changes_no_bit(single_process):
    """From the second step on, Megatron knows how many gradients to wait for: one per parameter and recomputation."""
    for mode in ("none", "full", "loop"):
        rows = []
        for overlap in (False, True):
            trainer = build_trainer(single_process, ParallelConfig(recompute=mode, overlap_grad_reduce=overlap))
            rows.append([trainer.train(map(batch, range(2)), 2) for _ in range(3)])
        assert rows[0] == rows[1]


def test_accumulating_in_bf16_costs_precision(single_process):
    """Sixteen micro-batches with bf16 weights; recomputation adds each loop's gradient separately."""
    layout = ParallelConfig(recompute="loop")
    exact = gradients(build_trainer(single_process, layout, dtype=torch.bfloat16), 16)
    coarse = gradients(
        build_trainer(single_process, dataclasses.replace(layout, accumulate_fp32=False), dtype=torch.bfloat16), 16
    )
    assert {value.dtype for value in exact.values()} == {torch.float32}
    assert {value.dtype for value in coarse.values()} == {torch.bfloat16}
    moving = [key for key in exact if exact[key].abs().max() > 0]
    errors = {key: ((coarse[key].float() - exact[key]).norm() / exact[key].norm()).item() for key in moving}
    assert 1e-3 < sum(errors.values()) / len(errors) < 5e-2, errors


def test_memory_falls_as_predicted(single_process, tmp_path):
    """Each additional loop costs what the planner predicts, and the modes keep their order."""

    def peaks(mode: Recompute, num_loops: int) -> tuple[float, float]:
        config = run_config(
            tmp_path, tmp_path, parallel=ParallelConfig(recompute=mode), data={"document_masking": False}
        )
        config = dataclasses.replace(config, model=dataclasses.replace(MODEL, num_loops=num_loops, num_layers=4))
        plain = batch()._replace(document_start_SB=None)
        predicted = peak_activation_bytes(PlannedRun(config, 1, padded_heads=False), 0)
        return peak_saved_bytes(config, plain, single_process), predicted

    found = {mode: [peaks(mode, loops) for loops in (3, 4)] for mode in get_args(Recompute)}
    three = {mode: values[0][0] for mode, values in found.items()}
    assert three["full"] < three["loop"] < three["selective"] < three["none"]
    for mode, ((measured, predicted), (more_measured, more_predicted)) in found.items():
        assert more_measured - measured == pytest.approx(more_predicted - predicted, rel=0.05), mode
