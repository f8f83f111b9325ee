"""The trainer: one model with its optimizer and learning-rate schedule, and the steps they run through Megatron.

Shapes: S sequence, B micro-batch, R loops.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice, tee

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from looplm.checkpoint import TrainingState
from looplm.config import LossConfig, OptimConfig, ParallelConfig
from looplm.megatron.device import DEVICE
from looplm.model import LoopLM
from looplm.model.pipeline import loop_views
from pretrain.data import Batch
from pretrain.optim import build_optimizer, build_scheduler, wrap_data_parallel
from pretrain.step import StepStats, forward_step


class Trainer:
    """A model in training.

    Args:
        model: with its initial weights, which the optimizer copies; ``loss`` may freeze all of it but the gate.
        loss: what is minimized.
        optim: optimizer, learning-rate schedule and precision.
        parallel: the layout that the model was built in.
        groups: the process groups of that layout.

    Attributes:
        ddp: the model in Megatron's data-parallel wrapper; after :meth:`backward` it holds the gradients.
        schedule: Megatron's forward-backward function, which deals micro-batches to pipeline ranks.
    """

    def __init__(
        self,
        model: LoopLM,
        loss: LossConfig,
        optim: OptimConfig,
        parallel: ParallelConfig,
        groups: ProcessGroupCollection,
    ) -> None:
        self.model, self.groups = model, groups
        self.ddp = wrap_data_parallel(model, loss, parallel)
        self.optimizer = build_optimizer(self.ddp, optim, parallel)
        self.scheduler = build_scheduler(self.optimizer, optim)
        self._forward_step = partial(forward_step, loss)
        pipeline = groups.pp.size()
        self._views = loop_views(self.ddp) if pipeline > 1 else []
        self._frozen_pipeline = pipeline > 1 and loss.frozen_trunk
        self.schedule: Callable[..., list[Tensor]] = get_forward_backward_func(pipeline, len(self._views) or None)

    @property
    def state(self) -> TrainingState:
        """The parts whose state a checkpoint holds."""
        return TrainingState(self.model, self.optimizer, self.scheduler)

    def train(self, batches: Iterator[Batch], num_microbatches: int) -> tuple[StepStats, float, float]:
        """Run one optimizer step; return its statistics, the gradient norm before clipping, and the learning rate."""
        stats = self.backward(batches, num_microbatches)
        self.scheduler.step(1)
        _, grad_norm, _ = self.optimizer.step()
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        return stats, float(grad_norm or 0.0), learning_rate

    def backward(self, batches: Iterator[Batch], num_microbatches: int) -> StepStats:
        """Run one step's forward and backward; each ``main_grad`` then holds the mean gradient over its tokens."""
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        # With a frozen trunk, the last pipeline rank runs the gate's backward in its loss function (forward_step).
        sums = self._run(batches, num_microbatches, forward_only=self._frozen_pipeline)
        if self._frozen_pipeline:
            self.model.config.finalize_model_grads_func(None, sums[0].int(), pg_collection=self.groups)
        return self._mean(sums)

    def evaluate(self, batches: Iterator[Batch], num_microbatches: int) -> StepStats:
        """Return the statistics of ``num_microbatches`` micro-batches per rank, without gradients."""
        self.ddp.eval()
        with torch.no_grad():
            return self._mean(self._run(batches, num_microbatches, forward_only=True))

    def _run(self, batches: Iterator[Batch], num_microbatches: int, forward_only: bool) -> Tensor:
        """Return statistics summed over this rank's micro-batches; zeros except on the last pipeline rank."""
        first = next(batches)
        seq_length, micro_batch_size = first.labels_SB.shape
        batches = (batch.shard(self.groups.cp) for batch in islice(chain([first], batches), num_microbatches))
        for view in self._views:
            view.restart()
        sums = self.schedule(
            forward_step_func=self._forward_step,
            data_iterator=list(tee(batches, len(self._views))) if self._views else batches,
            model=self._views or [self.ddp],
            num_microbatches=num_microbatches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
        num_loops = self.model.model_config.num_loops
        return torch.stack(sums).sum(0) if sums else torch.zeros(3 + 2 * num_loops, dtype=torch.float64)

    def _mean(self, sums: Tensor) -> StepStats:
        """Return the means over the tokens of all ranks; collective."""
        sums = sums.to(DEVICE)
        dist.all_reduce(sums, group=self.groups.dp_cp)
        dist.all_reduce(sums, group=self.groups.pp)  # only the last pipeline rank's are not zero
        return StepStats.of_sums(sums)
