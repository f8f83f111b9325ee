"""The trainer: one model with its optimizer and learning-rate schedule, and the steps they run through Megatron.

Shapes: S sequence, B micro-batch, R loops.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice, tee
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from looplm.checkpoint import TrainingState
from looplm.config import LossConfig, OptimConfig, ParallelConfig
from looplm.megatron.device import DEVICE
from looplm.model import LoopLM
from looplm.model.pipeline import LoopView, loop_views
from pretrain.data import Batch
from pretrain.norms import LARGEST_SQUARE, GradientNorms, LoopNorms, Norms, trained_modules
from pretrain.optim import build_optimizer, build_scheduler, wrap_data_parallel
from pretrain.step import StepStats, forward_step

EVALUATED_AT_ONCE = 4  # micro-batches per pipeline rank between two looks at a request to stop


class Step(NamedTuple):
    """Result of one training step; the same on every rank.

    A step is ``healthy`` if its losses and gradients are finite on all ranks; otherwise it has changed neither weights
    nor Adam's moments. ``has_news`` is True if any rank had some.
    """

    stats: StepStats
    norms: Norms
    healthy: bool
    learning_rate: float
    has_news: bool


class Reduced(NamedTuple):
    """Everything that the ranks tell each other in a step, in one collective; see :class:`Step`."""

    stats: StepStats
    norms: Norms
    healthy: bool
    has_news: bool


def schedule_of(pipeline: int) -> Callable[..., list[Tensor]]:
    """Return Megatron's forward-backward function: for several views its interleaved schedule, for one the plain one.

    The interleaved schedule of Megatron-core 0.16 fails with a single view.
    """
    plain, interleaved = get_forward_backward_func(pipeline, None), get_forward_backward_func(pipeline, 2)

    def run(*, model: list[Any], **arguments: Any) -> list[Tensor]:
        outputs: list[Tensor] = (interleaved if len(model) > 1 else plain)(model=model, **arguments)
        return outputs

    return run


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
        loop_norms: of this rank's micro-batches in the last step.
        gradient_norms: of this rank's gradients in the last step.
        micro_batch_sums: :func:`pretrain.step.statistics_sums` of this rank's micro-batches in the last step, on the
            last pipeline rank.
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
        self.loop_norms, self.gradient_norms = LoopNorms(model), GradientNorms(self.ddp, self.optimizer, groups)
        self.micro_batch_sums = list[Tensor]()
        self._clip_grad = optim.clip_grad
        self._modules = trained_modules(loss, model.model_config.tie_embeddings)
        self._forward_step = partial(forward_step, loss, self.loop_norms)
        pipeline = groups.pp.size()
        self._views: dict[int, list[LoopView]] = {}  # of a pipeline, by the number of loops of a step
        self._frozen_pipeline = pipeline > 1 and loss.frozen_trunk
        self.schedule: Callable[..., list[Tensor]] = schedule_of(pipeline)

    @property
    def state(self) -> TrainingState:
        """The parts whose state a checkpoint holds. Collective: it completes weights that are not gathered yet."""
        if self.ddp.ddp_config.overlap_param_gather:
            self.ddp.start_param_sync(force_sync=True)
        return TrainingState(self.model, self.optimizer, self.scheduler)

    def train(
        self,
        batches: Iterator[Batch],
        num_microbatches: int,
        before_update: Callable[[], object] = lambda: None,
        has_news: Callable[[], bool] = lambda: False,
        loops: int | None = None,
    ) -> Step:
        """Run one step. Its update is skipped on all ranks if a loss or gradient is not finite on any of them.

        The learning-rate schedule counts a skipped step, because its data are consumed. Adam's bias correction does
        not, because its moments have not changed.

        Args:
            batches: this rank's micro-batches.
            num_microbatches: how many of them to take.
            before_update: called before the step changes weights and Adam's moments.
            has_news: asked after the backward pass; True if this rank wants to talk to the others after the step.
            loops: how many to run; None for all.
        """
        found = self._backward(batches, num_microbatches, self._clip_grad, has_news, loops)
        self.scheduler.step(1)
        if found.healthy:
            before_update()
            self.optimizer.prepare_grads()  # instead of step(), which would compute and read the norm a second time
            self.optimizer.step_with_ready_grads()
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        return Step(found.stats, found.norms, found.healthy, learning_rate, found.has_news)

    def backward(
        self, batches: Iterator[Batch], num_microbatches: int, loops: int | None = None
    ) -> tuple[StepStats, Norms]:
        """Run one step's forward and backward; each ``main_grad`` then holds the mean gradient over its tokens."""
        found = self._backward(batches, num_microbatches, 0.0, loops=loops)
        return found.stats, found.norms

    def evaluate(self, batches: Iterator[Batch], num_microbatches: int) -> StepStats:
        """Return the statistics of ``num_microbatches`` micro-batches per rank, without gradients."""
        stats = self.evaluate_until(lambda: False, batches, num_microbatches)
        assert stats is not None
        return stats

    def evaluate_until(
        self, stopped: Callable[[], bool], batches: Iterator[Batch], num_microbatches: int
    ) -> StepStats | None:
        """Evaluate, but return None as soon as ``stopped`` returns True, on every rank alike.

        It is asked once in a few micro-batches: with pipeline parallelism, each pause empties the pipeline.
        """
        self.ddp.eval()
        at_once, sums = EVALUATED_AT_ONCE * self.groups.pp.size(), list[Tensor]()
        for begin in range(0, num_microbatches, at_once):
            if begin and stopped():
                return None
            with torch.no_grad():
                self._run(batches, min(at_once, num_microbatches - begin), forward_only=True)
            sums += self.micro_batch_sums
        return StepStats.of_sums(self._add_up(self._once(self._sum(sums)).to(DEVICE)).cpu())

    def _backward(
        self,
        batches: Iterator[Batch],
        num_microbatches: int,
        clip_grad: float,
        has_news: Callable[[], bool] = lambda: False,
        loops: int | None = None,
    ) -> Reduced:
        """Run forward and backward; leave the mean gradient over the tokens, clipped, in the buffers.

        The ranks' numbers travel together, and the host reads them once, after all work up to the update is queued.
        """
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        # With a frozen trunk, the last pipeline rank runs the gate's backward in its loss function (forward_step).
        sums = self._run(batches, num_microbatches, forward_only=self._frozen_pipeline, loops=loops)
        if self._frozen_pipeline:
            self.model.config.finalize_model_grads_func(None, None, pg_collection=self.groups)

        hidden, gradient = self.loop_norms.sums(), self.gradient_norms.sums()
        gradient[-1] += (~sums.isfinite()).sum()
        hidden = hidden if self.model.config.sequence_parallel else self._once(hidden)
        parts = self._once(sums), hidden, gradient, sums.new_tensor([float(has_news())])
        total = self._add_up(torch.cat([part.to(DEVICE) for part in parts]))
        stats_sums, hidden, gradient, news = total.split([len(part) for part in parts])
        self.ddp.scale_gradients(_gradient_factor(stats_sums[0], gradient[:-1].sum(), clip_grad))

        stats_sums, hidden, gradient, news = total.cpu().split([len(part) for part in parts])
        stats = StepStats.of_sums(stats_sums, loops)
        norms = Norms.of_sums(hidden, gradient[:-1], stats.tokens, self._modules, loops)
        healthy = float(gradient[-1]) == 0 and float(gradient.sum()) < LARGEST_SQUARE
        return Reduced(stats, norms, healthy, bool(news))

    def _run(
        self, batches: Iterator[Batch], num_microbatches: int, forward_only: bool, loops: int | None = None
    ) -> Tensor:
        """Return statistics summed over this rank's micro-batches; zeros except on the last pipeline rank."""
        first = next(batches)
        seq_length, micro_batch_size = first.labels_SB.shape
        batches = (batch.shard(self.groups.cp) for batch in islice(chain([first], batches), num_microbatches))
        self.loop_norms.restart(loops)
        views = self._views_of(loops or self.model.model_config.num_loops)
        for view in views:
            view.restart()
        sums = self.schedule(
            forward_step_func=partial(self._forward_step, loops=loops),
            data_iterator=list(tee(batches, len(views))) if views else batches,
            model=views or [self.ddp],
            num_microbatches=num_microbatches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
        self.micro_batch_sums = sums
        return self._sum(sums)

    def _views_of(self, loops: int) -> list[LoopView]:
        """Return a pipeline's views for a step of ``loops`` loops; none without a pipeline."""
        if self.groups.pp.size() > 1 and loops not in self._views:
            self._views[loops] = loop_views(self.ddp, loops)
        return self._views.get(loops, [])

    def _sum(self, sums: list[Tensor]) -> Tensor:
        num_loops = self.model.model_config.num_loops
        return torch.stack(sums).sum(0) if sums else torch.zeros(3 + 2 * num_loops, dtype=torch.float64)

    def _once(self, sums: Tensor) -> Tensor:
        """Return ``sums``, which all tensor-parallel ranks hold, on the first of them and zeros on the others."""
        return sums if self.groups.tp.rank() == 0 else torch.zeros_like(sums)

    def _add_up(self, sums: Tensor) -> Tensor:
        """Return the sum over all ranks; collective."""
        dist.all_reduce(sums)
        return sums


def _gradient_factor(tokens: Tensor, square: Tensor, clip_grad: float) -> Tensor:
    """Return the factor that makes a gradient summed over tokens their mean, of at most the norm ``clip_grad``.

    Nothing is clipped for 0, or if the norm is not finite: the step will be skipped, and its gradients examined.

    Args:
        tokens: unmasked tokens of the step.
        square: of the norm of the summed gradient.
        clip_grad: largest norm of the mean; 0 for any.
    """
    mean = 1 / tokens.clamp(min=1)
    if not clip_grad:
        return mean
    norm = square.sqrt() * mean
    clipped = (clip_grad / (norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch and Megatron
    return mean * torch.where(norm.isfinite(), clipped, 1.0)
