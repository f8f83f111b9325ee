"""The optimizer's state moves between Megatron's optimizers: a checkpoint does not depend on which one wrote it."""

from functools import partial
from typing import Literal

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.checkpoint import optimizer_state
from looplm.config import GateConfig, LossConfig, OptimConfig, ParallelConfig
from looplm.megatron.settings import DTYPES
from looplm.model import LoopLM
from pretrain import optim
from pretrain.data import Batch
from pretrain.trainer import Trainer
from tests.support.tiny import MODEL

LAYOUTS = {
    "plain": ParallelConfig(),
    "distributed": ParallelConfig(distributed_optimizer=True),
    "distributed, many buckets": ParallelConfig(distributed_optimizer=True, overlap_grad_reduce=True),
}


class Run:
    """A model in training, with initial weights drawn from ``seed``."""

    def __init__(
        self,
        groups: ProcessGroupCollection,
        layout: ParallelConfig,
        precision: Literal["fp32", "bf16"],
        seed: int,
        objective: Literal["entropy_regularised", "adaptive_gate"] = "entropy_regularised",
    ) -> None:
        torch.manual_seed(seed)
        config = OptimConfig(train_steps=9, warmup_steps=1, decay_steps=1, lr=1e-2, precision=precision)
        loss = LossConfig(objective=objective)
        self.model = LoopLM(MODEL, GateConfig(state_size=8), groups, DTYPES[precision], layout)
        self.trainer = Trainer(self.model, loss, config, layout, groups)
        self.optimizer: MegatronOptimizer = self.trainer.optimizer
        self.scheduler = self.trainer.scheduler

    def train(self, step: int) -> float:
        ids = torch.randint(MODEL.vocab_size, (2, 33), generator=torch.Generator().manual_seed(step))
        batch = Batch(ids[:, :-1], ids[:, 1:].t().contiguous(), torch.ones(32, 2), None)
        return self.trainer.train(iter([batch]), 1)[0].loss

    def state(self) -> dict:
        weights = self.model.sharded_state_dict()
        return {"model": weights, "optimizer": optimizer_state.sharded_state(self.optimizer, self.model, weights)}

    def load(self, folder: str, step: int) -> list[int]:
        """Load a state; return the sizes of the groups in which the optimizer's was read."""
        state = dist_checkpointing.load({"model": self.model.sharded_state_dict()}, folder)
        self.model.load_state_dict(state["model"])
        sizes = list[int]()

        def read(wanted: dict) -> optimizer_state.State:
            sizes.append(sum(4 * tensor.data.numel() for values in wanted.values() for tensor in values.values()))
            return dist_checkpointing.load({"optimizer": wanted}, folder)["optimizer"]

        optimizer_state.load(self.optimizer, self.model, self.model.sharded_state_dict(), read, step)
        self.scheduler.step(step)
        return sizes

    def adam_steps(self) -> list[float]:
        return [state["step"].item() for state in self.optimizer.chained_optimizers[0].optimizer.state.values()]


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """Make several buckets: Megatron's hold 40 million parameters, and wrong offsets show from the second one on."""
    monkeypatch.setattr(
        optim, "DistributedDataParallelConfig", partial(DistributedDataParallelConfig, bucket_size=3000)
    )


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Read the state in several groups, as that of a large model."""
    monkeypatch.setattr(optimizer_state, "GROUP_BYTES", 40_960)  # as much as the largest tensor


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_another_optimizer_continues_where_one_stopped(source, target, precision, single_process, tmp_path):
    first = Run(single_process, LAYOUTS[source], precision, seed=1)
    for step in range(3):
        first.train(step)
    dist_checkpointing.save(first.state(), str(tmp_path))
    second = Run(single_process, LAYOUTS[target], precision, seed=2)
    sizes = second.load(str(tmp_path), 3)
    assert len(sizes) > 3 and max(sizes) <= optimizer_state.GROUP_BYTES
    assert second.adam_steps() == first.adam_steps() and set(second.adam_steps()) == {3.0}
    for step in range(3, 6):
        # The norm that clips the gradients is summed in the order of the buckets.
        assert second.train(step) == pytest.approx(first.train(step), rel=1e-6 if precision == "fp32" else 1e-4)
    assert set(second.adam_steps()) == {6.0}, "each parameter counts for itself"


def test_a_frozen_trunk_has_no_state(single_process):
    run = Run(single_process, LAYOUTS["distributed"], "fp32", seed=1, objective="adaptive_gate")
    names = run.state()["optimizer"]
    assert names and all(name.startswith("gate.") for name in names)
