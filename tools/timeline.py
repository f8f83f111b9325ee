"""Draw one training step of a pipeline in two schedules, with the bubble of each: python -m tools.plan --timeline.

Loops run as virtual stages, in the order of Megatron-core's interleaved schedule, or one by one through the pipeline.
"""

from dataclasses import dataclass

from looplm.bounds import at_least, check_bounds, positive, require
from looplm.cli import parse_config
from tools.planning import schedule
from tools.planning.schedule import Costs, Slot

COLUMNS = 140  # of a drawing, at most
MAX_PIECES = 200_000  # of work in each direction; their simulation takes half a minute


@dataclass(frozen=True, kw_only=True)
class TimelineConfig:
    """Size of the pipeline and durations in it.

    Args:
        pipeline: ranks that hold consecutive parts of the stack, parallel.pipeline.
        loops: loops of the stack, model.num_loops.
        micro_batches: per replica and step: data.global_batch_size / data.micro_batch_size / replicas.
        forward: time of one rank's forward pass for one micro-batch; it sets the unit of the other times.
        backward: time of the backward pass.
        head: time that the head adds to a forward pass on the last rank; its backward has the layers' ratio.
        send: time from the end of a rank's work until the next rank has its result.
    """

    pipeline: int = 4
    loops: int = positive(4)
    micro_batches: int = 4
    forward: float = at_least(1e-6, 1.0, at_most=1e6)
    backward: float = at_least(1e-6, 2.0, at_most=1e6)
    head: float = at_least(0, 0.0, at_most=1e6)
    send: float = at_least(0, 0.0, at_most=1e6)

    def __post_init__(self) -> None:
        check_bounds(self, "")
        require(self.pipeline > 1, "pipeline", self.pipeline, "a pipeline has at least 2 ranks")
        nearest = max(1, round(self.micro_batches / self.pipeline)) * self.pipeline
        groups = f"Megatron's interleaved schedule deals them in groups of pipeline={self.pipeline}"
        fits = self.micro_batches > 0 and self.micro_batches % self.pipeline == 0
        require(fits, "micro_batches", self.micro_batches, f"{groups}; the nearest legal value is {nearest}")
        pieces = self.pipeline * self.loops * self.micro_batches
        fix = f"pipeline x loops x micro_batches are {pieces:,}; at most {MAX_PIECES:,} can be drawn, so lower one"
        require(pieces <= MAX_PIECES, "loops", self.loops, fix)


def main(argv: list[str]) -> None:
    """``python -m tools.plan --timeline [--pipeline 4 --loops 4 --micro_batches 8 ...]``"""
    prog = "python -m tools.plan --timeline"
    print(timeline(parse_config(TimelineConfig, argv, prog=prog, description=str(__doc__))))


def timeline(config: TimelineConfig) -> str:
    """Return the drawing of both schedules with their bubbles and activations."""
    sizes = ranks, loops, count = config.pipeline, config.loops, config.micro_batches
    costs = Costs(forward=config.forward, backward=config.backward, head=config.head, send=config.send)
    virtual = schedule.simulate([schedule.interleaved_order(*sizes)], costs)
    by_loop = schedule.simulate(schedule.loop_by_loop_order(*sizes), costs)
    unit = max(min(config.forward, config.backward), schedule.end_of(by_loop) / COLUMNS)
    lines = [
        f"{ranks} ranks, {loops} loops, {count} micro-batches; a character is {unit:.3g} of time",
        "1 2 3 ...  forward of loop 1, 2, 3, ...      a b c ...  their backward      .  nothing to do",
        "",
        "loops as virtual stages (Megatron's interleaved 1F1B)",
        schedule.render(virtual, unit),
        _summary(virtual, f"(P - 1) / (R M) = {ranks - 1}/{loops * count}", schedule.interleaved_bubble(*sizes)),
        "",
        "loop by loop: the pipeline empties after each",
        schedule.render(by_loop, unit),
        _summary(by_loop, f"(P - 1) / M = {ranks - 1}/{count}", schedule.loop_by_loop_bubble(*sizes)),
        "",
        f"a step takes {schedule.end_of(virtual) / schedule.end_of(by_loop):.1%} of the time it takes loop by loop",
    ]
    return "\n".join(lines)


def _summary(slots: list[list[Slot]], formula: str, expected: float) -> str:
    most = schedule.in_flight(slots)
    return (
        f"bubble {schedule.bubble(slots):.1%} of the busiest rank's work; equal ranks and free messages: "
        f"{formula} = {expected:.1%}\na rank holds the activations of at most {most} micro-batches in one loop each"
    )
