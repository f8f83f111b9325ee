"""Draw one training step of a pipeline whose loops are virtual stages, in the order in which Megatron-core's schedule would
run it, and the same step with the loops one by one: python -m tools.plan --timeline.
"""

from dataclasses import dataclass

from looplm.cli import parse_config, require
from tools.planning import schedule
from tools.planning.schedule import Costs, Slot

COLUMNS = 140  # of a drawing, at most


@dataclass(frozen=True, kw_only=True)
class TimelineConfig:
    """What is drawn.

    Args:
        pipeline: ranks that hold consecutive parts of the stack, parallel.pipeline.
        loops: of the stack, model.num_loops.
        micro_batches: in a step, of each replica: data.global_batch_size / data.micro_batch_size / replicas.
        forward: time of one rank's layers, once, for one micro-batch; the unit of the other times is the same.
        backward: time of their backward pass.
        head: time that the head adds to a forward on the last rank; its backward adds as many times more.
        send: time from the end of a rank's work until the next rank has its result.
    """

    pipeline: int = 4
    loops: int = 4
    micro_batches: int = 4
    forward: float = 1.0
    backward: float = 2.0
    head: float = 0.0
    send: float = 0.0

    def __post_init__(self) -> None:
        require(self.pipeline > 1, "pipeline", self.pipeline, "a pipeline has at least 2 ranks")
        require(self.loops > 0, "loops", self.loops, "give a number above 0")
        nearest = max(1, round(self.micro_batches / self.pipeline)) * self.pipeline
        fits = self.micro_batches > 0 and self.micro_batches % self.pipeline == 0
        require(fits, "micro_batches", self.micro_batches, f"Megatron's interleaved schedule deals them in groups of pipeline={self.pipeline}; the nearest legal value is {nearest}")  # fmt: skip
        for key in ("forward", "backward"):
            require(getattr(self, key) > 0, key, getattr(self, key), "give a time above 0")
        for key in ("head", "send"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "give a time of at least 0")


def main(argv: list[str]) -> None:
    """``python -m tools.plan --timeline [--pipeline 4 --loops 4 --micro_batches 8 ...]``"""
    prog = "python -m tools.plan --timeline"
    print(timeline(parse_config(TimelineConfig, argv, prog=prog, description=str(__doc__))))


def timeline(config: TimelineConfig) -> str:
    """Both ways through the loops, drawn and measured."""
    sizes = (config.pipeline, config.loops, config.micro_batches)
    costs = Costs(forward=config.forward, backward=config.backward, head=config.head, send=config.send)
    virtual = schedule.simulate([schedule.virtual_stage_order(*sizes)], costs)
    by_loop = schedule.simulate(schedule.loop_by_loop_order(*sizes), costs)
    unit = max(min(config.forward, config.backward), schedule.end_of(by_loop) / COLUMNS)
    ranks, loops, count = sizes
    lines = [
        f"{ranks} ranks, {loops} loops, {count} micro-batches; a character is {unit:.3g} of time",
        "1 2 3 ...  forward of loop 1, 2, 3, ...      a b c ...  their backward      .  nothing to do",
        "",
        "loops as virtual stages (Megatron's interleaved 1F1B)",
        schedule.draw(virtual, unit),
        _measured(virtual, f"(P - 1) / (R M) = {ranks - 1}/{loops * count}", schedule.virtual_stage_bubble(*sizes)),
        "",
        "loop by loop: the pipeline empties after each",
        schedule.draw(by_loop, unit),
        _measured(by_loop, f"(P - 1) / M = {ranks - 1}/{count}", schedule.loop_by_loop_bubble(*sizes)),
        "",
        f"a step takes {schedule.end_of(virtual) / schedule.end_of(by_loop):.1%} of the time it takes loop by loop",
    ]
    return "\n".join(lines)


def _measured(slots: list[list[Slot]], formula: str, expected: float) -> str:
    return (
        f"bubble {schedule.bubble(slots):.1%} of the busiest rank's work; equal ranks and free messages: "
        f"{formula} = {expected:.1%}\na rank holds the activations of at most {schedule.in_flight(slots)} micro-batches in one loop each"
    )
