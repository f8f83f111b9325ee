"""A pipeline's schedule on paper: who computes what when, if every rank were equally fast.

Two ways to take R loops of one stack through P ranks that each hold 1 / P of its layers, with M micro-batches in a step:

* **loops as virtual stages**: Megatron's interleaved 1F1B, one virtual stage per loop (:mod:`looplm.model.pipeline`). The
  order on each rank is asked of Megatron's own functions. Bubble (P - 1) / (R M) of the ideal time (Narayanan et al.
  2021, section 2.2.2, with R for its v).
* **loop by loop**: all micro-batches pass the pipeline once for loop 1, the pipeline empties, then loop 2, and so on;
  backward in reverse. It fills and empties 2 R times: bubble (P - 1) / M.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table


class Work(NamedTuple):
    """One rank's forward or backward of one micro-batch through one loop; numbers from 0."""

    kind: Literal["forward", "backward"]
    loop: int
    micro_batch: int


class Slot(NamedTuple):
    """Work and when a rank does it."""

    work: Work
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """In units of time.

    Args:
        forward: one rank's layers once.
        backward: their backward pass.
        head: the head after a loop, on the last rank, beside ``forward``; its backward keeps the ratio of the layers'.
        send: from the end of a rank's work until the next rank has its result; nobody computes less for it.
    """

    forward: float = 1.0
    backward: float = 2.0
    head: float = 0.0
    send: float = 0.0

    def of(self, work: Work, last_rank: bool) -> float:
        """What ``work`` takes."""
        forward = self.forward + (self.head if last_rank else 0.0)
        return forward if work.kind == "forward" else forward * self.backward / self.forward


Order = list[list[Work]]  # of each rank, first to last


class _Rank:
    """What Megatron asks of its communicator when it counts a rank's warm-up micro-batches."""

    def __init__(self, rank: int, pipeline: int, loops: int) -> None:
        self.pp_group, self.virtual_pipeline_model_parallel_size = self, loops
        self.rank, self.size = lambda: rank, lambda: pipeline


def virtual_stage_order(pipeline: int, loops: int, micro_batches: int) -> Order:
    """What each rank does, in Megatron's order, when the loops are virtual stages."""
    table = get_schedule_table(micro_batches, loops, pipeline)
    forward = [Work("forward", loop, micro_batch) for micro_batch, loop in table]
    backward = [Work("backward", loops - 1 - loop, micro_batch) for micro_batch, loop in table]
    order = []
    for rank in range(pipeline):
        _, _, warmup, _ = get_pp_rank_microbatches(
            micro_batches, loops, pipeline, p2p_communicator=_Rank(rank, pipeline, loops)
        )
        steady = [work for pair in zip(forward[warmup:], backward, strict=False) for work in pair]
        order.append(forward[:warmup] + steady + backward[len(table) - warmup :])
    return order


def loop_by_loop_order(pipeline: int, loops: int, micro_batches: int) -> list[Order]:
    """What each rank does when every loop, and the way back through it, is a pass of its own through the pipeline."""
    kinds: list[tuple[Literal["forward", "backward"], Iterable[int]]]
    kinds = [("forward", range(loops)), ("backward", reversed(range(loops)))]
    passes = [[Work(kind, loop, m) for m in range(micro_batches)] for kind, order in kinds for loop in order]
    return [[works] * pipeline for works in passes]


def simulate(passes: list[Order], costs: Costs) -> list[list[Slot]]:
    """Let every rank do its work in its order, each piece as soon as what it needs is there.

    Args:
        passes: orders that follow one another; each starts when all ranks are done with the one before it.
        costs: how long work and messages take.

    Returns:
        each rank's work with its times.

    Raises:
        ValueError: an order in which the ranks would wait for each other for ever.
    """
    slots: list[list[Slot]] = [[] for _ in passes[0]]
    loops = 1 + max(work.loop for order in passes for work in order[0])
    ended: dict[tuple[int, Work], float] = {}
    begin = 0.0
    for order in passes:
        todo = [deque(works) for works in order]
        while any(todo):
            before = len(ended)
            for rank, works in enumerate(todo):
                while works and all(need in ended for need, _ in _needs(rank, works[0], len(todo), loops)):
                    work = works.popleft()
                    arrivals = [ended[need] + sent * costs.send for need, sent in _needs(rank, work, len(todo), loops)]
                    start = max(begin, slots[rank][-1].end if slots[rank] else 0.0, *arrivals)
                    slots[rank].append(Slot(work, start, start + costs.of(work, rank == len(todo) - 1)))
                    ended[rank, work] = slots[rank][-1].end
            if len(ended) == before:
                raise ValueError("the ranks wait for each other")
        begin = end_of(slots)
    return slots


def _needs(rank: int, work: Work, pipeline: int, loops: int) -> list[tuple[tuple[int, Work], bool]]:
    """What must have ended before ``work`` may start, and whether it comes from another rank."""
    step = 1 if work.kind == "forward" else -1
    # All loops, one after the other, are one long line of R P stages.
    place = work.loop * pipeline + rank - step
    needs = []
    if 0 <= place < loops * pipeline:
        loop, source = divmod(place, pipeline)
        needs.append(((source, Work(work.kind, loop, work.micro_batch)), source != rank))
    if work.kind == "backward":
        needs.append(((rank, Work("forward", work.loop, work.micro_batch)), False))
    return needs


def end_of(slots: list[list[Slot]]) -> float:
    """When the last rank is done."""
    return max(row[-1].end for row in slots)


def bubble(slots: list[list[Slot]]) -> float:
    """Time beyond that of the busiest rank's work, as a share of it: 0 for a pipeline that nobody waits in."""
    ideal = max(sum(slot.end - slot.start for slot in row) for row in slots)
    return end_of(slots) / ideal - 1


def virtual_stage_bubble(pipeline: int, loops: int, micro_batches: int) -> float:
    """The formula for equal ranks and free messages; Narayanan et al. 2021, section 2.2.2, with R for its v."""
    return (pipeline - 1) / (loops * micro_batches)


def loop_by_loop_bubble(pipeline: int, loops: int, micro_batches: int) -> float:
    """The same for loop by loop: R passes there and R back, each of which fills and empties the pipeline."""
    return (pipeline - 1) / micro_batches


def in_flight(slots: list[list[Slot]]) -> int:
    """The most micro-batches, each in one loop, whose activations a rank holds at the same time."""
    most = 0
    for row in slots:
        held = 0
        for slot in row:
            held += 1 if slot.work.kind == "forward" else -1
            most = max(most, held)
    return most


def draw(slots: list[list[Slot]], unit: float) -> str:
    """One line per rank, one character per ``unit`` of time: a digit is a loop's forward, a letter its backward."""
    lines = []
    for rank, row in enumerate(slots):
        line = ["."] * round(end_of(slots) / unit)
        for slot in row:
            for column in range(round(slot.start / unit), round(slot.end / unit)):
                line[column] = _glyph(slot.work)
        lines.append(f"rank {rank}  {''.join(line)}")
    return "\n".join(lines)


def _glyph(work: Work) -> str:
    """Of the first loop 1 and a; after nine digits and 26 letters they start again."""
    return str(work.loop % 9 + 1) if work.kind == "forward" else chr(ord("a") + work.loop % 26)
