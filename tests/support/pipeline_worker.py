"""What each rank of the pipeline bench's test does: one step under both schedules, compared, and then the bench itself.

Prints nothing of its own; a difference ends it.
"""

from unittest import mock

import torch
import torch.distributed as dist

from looplm.model.pipeline import LoopStage
from pretrain.step import StepStats
from pretrain.trainer import Trainer
from tests.support.parity import assert_close_relative
from tools.bench.pipeline import PipelineBenchConfig, build, main, random_batches
from tools.planning import schedule

RANKS, COUNT = 2, 4
TINY = PipelineBenchConfig(
    repeats=1, micro_batches=(COUNT,), num_loops=3, layers_per_rank=1, hidden_size=32, seq_length=16
)


def one_step(trainer: Trainer) -> tuple[StepStats, dict[str, torch.Tensor], list[tuple[int, int]]]:
    """Statistics, this rank's gradients, and its forward passes as (loop, micro-batch), in their order."""
    calls: list[tuple[int, int]] = []
    forward = LoopStage.forward

    def recorded(stage: LoopStage, *args: object, **kwargs: object) -> object:
        calls.append((stage.loop, sum(loop == stage.loop for loop, _ in calls)))
        return forward(stage, *args, **kwargs)  # type: ignore[arg-type]

    with mock.patch.object(LoopStage, "forward", recorded):
        stats = trainer.backward(iter(random_batches(TINY, COUNT)), COUNT)
    return stats, {name: p.main_grad.clone() for name, p in trainer.ddp.module.named_parameters()}, calls


def compare() -> None:
    """Both schedules, in turns, give the same; each runs in its own order."""
    trainers = build(TINY, RANKS)
    rank = dist.get_rank()
    model = trainers["virtual stages"].ddp.module
    if model.post_process:
        with torch.no_grad():  # off its start the gate's gradients are not zero
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
        planned = [w for order in orders[name] for w in order[rank] if w.kind == "forward"]
        assert calls == [(work.loop, work.micro_batch) for work in planned], name
    losses = [s.evaluate(iter(random_batches(TINY, COUNT)), COUNT).loss for s in trainers.values()]
    assert max(abs(loss - expected.loss) for loss in losses) < 1e-5 * expected.loss, losses


def run() -> None:
    compare()
    main(["--repeats", "1", "--micro_batches", "[2,4]", "--num_loops", "3", "--layers_per_rank", "1", "--hidden_size", "32", "--seq_length", "16"])  # fmt: skip
