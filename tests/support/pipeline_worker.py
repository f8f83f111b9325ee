"""One rank of the pipeline bench's test: compare a step under both schedules, then run the bench.

It prints nothing but the bench's output; a difference is an AssertionError.
"""

from unittest import mock

import torch
import torch.distributed as dist

from looplm.model.pipeline import LoopView
from pretrain.step import StepStats
from pretrain.trainer import Trainer
from tests.support.parity import assert_close_relative
from tools.bench.pipeline import PipelineBenchConfig, build, main, random_batches
from tools.planning import schedule

RANKS, COUNT = 2, 4
SIZES = {"num_loops": 3, "layers_per_rank": 1, "hidden_size": 32, "seq_length": 16}
TINY = PipelineBenchConfig(repeats=1, micro_batches=(COUNT,), **SIZES)


def one_step(trainer: Trainer) -> tuple[StepStats, dict[str, torch.Tensor], list[tuple[int, int]]]:
    """Return statistics, this rank's gradients, and its forward passes in order, as (loop, micro-batch)."""
    calls: list[tuple[int, int]] = []
    forward = LoopView.forward

    def recorded(view: LoopView, *args: object, **kwargs: object) -> object:
        calls.append((view.loop, sum(loop == view.loop for loop, _ in calls)))
        return forward(view, *args, **kwargs)  # type: ignore[arg-type]

    with mock.patch.object(LoopView, "forward", recorded):
        stats, _ = trainer.backward(iter(random_batches(TINY, COUNT)), COUNT)
    return stats, {name: p.main_grad.clone() for name, p in trainer.ddp.module.named_parameters()}, calls


def compare() -> None:
    """Assert that both schedules give the same results, each in its own order of work."""
    trainers = build(TINY, RANKS)
    rank = dist.get_rank()
    model = trainers["virtual stages"].ddp.module
    if model.post_process:
        with torch.no_grad():  # the gate's gradients are zero at its initial weights
            for parameter in model.gate.parameters():
                parameter.normal_(std=0.3)
    orders = {
        "virtual stages": [schedule.interleaved_order(RANKS, TINY.num_loops, COUNT)],
        "loop by loop": schedule.loop_by_loop_order(RANKS, TINY.num_loops, COUNT),
    }
    expected, gradients, _ = one_step(trainers["virtual stages"])
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    for name in ("loop by loop", "virtual stages", "loop by loop"):
        stats, found, calls = one_step(trainers[name])
        assert_close_relative(found, gradients, 1e-5)
        assert abs(stats.loss - expected.loss) < 1e-5 * expected.loss and stats.tokens == expected.tokens, name
        planned = [work for order in orders[name] for work in order[rank] if work.kind == "forward"]
        assert calls == [(work.loop, work.micro_batch) for work in planned], name
    losses = [trainer.evaluate(iter(random_batches(TINY, COUNT)), COUNT).loss for trainer in trainers.values()]
    assert max(abs(loss - expected.loss) for loss in losses) < 1e-5 * expected.loss, losses


def run() -> None:
    compare()
    sizes = [word for key, value in SIZES.items() for word in (f"--{key}", str(value))]
    main(["--repeats", "1", "--micro_batches", "[2,4]", *sizes])
