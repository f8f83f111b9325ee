"""Simulation of pipeline schedules: which rank computes what at which time, if all ranks are equally fast.

There are two ways to pass M micro-batches through R loops of a stack that is split over P ranks:

* **interleaved**: Megatron's interleaved 1F1B with one virtual stage per loop (:mod:`looplm.model.pipeline`). The order
  on each rank comes from Megatron's own functions. The bubble is (P - 1) / (R M) of the ideal time (Narayanan et al.
  2021, section 2.2.2, with R for its v).
* **loop by loop**: all micro-batches pass the pipeline once for loop 1, the pipeline empties, then loop 2, and so on;
  backward runs in reverse. The pipeline fills and empties 2 R times, so the bubble is (P - 1) / M.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table


class Work(NamedTuple):
    """Forward or backward of one micro-batch through one loop on one rank; loops and micro-batches count from 0."""

    kind: Literal["forward", "backward"]
    loop: int
    micro_batch: int


class Slot(NamedTuple):
    """Work with its start and end time on a rank."""

    work: Work
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Durations, in any unit of time."""

    forward: float = 1.0  # of one rank's layers
    backward: float = 2.0
    head: float = 0.0  # added to forward on the last rank, after each loop; its backward has the layers' ratio
    send: float = 0.0  # from the end of a rank's work until the next rank has its result; delays no other work

    def duration(self, work: Work, last_rank: bool) -> float:
        """Return the time that ``work`` takes."""
        forward = self.forward + (self.head if last_rank else 0.0)
        return forward if work.kind == "forward" else forward * self.backward / self.forward


Order = list[list[Work]]  # each rank's work, first to last


class _Communicator:
    """The attributes that Megatron reads from its communicator to count a rank's warm-up micro-batches."""

    def __init__(self, rank: int, pipeline: int, loops: int | None) -> None:
        self.pp_group, self.virtual_pipeline_model_parallel_size = self, loops
        self.rank, self.size = lambda: rank, lambda: pipeline


def interleaved_order(pipeline: int, loops: int, micro_batches: int) -> Order:
    """Return the order of each rank's work in Megatron's interleaved schedule with loops as virtual stages.

    A single loop runs through the plain schedule, as in training.
    """
    table = get_schedule_table(micro_batches, loops, pipeline)
    forward = [Work("forward", loop, micro_batch) for micro_batch, loop in table]
    backward = [Work("backward", loops - 1 - loop, micro_batch) for micro_batch, loop in table]
    order = []
    for rank in range(pipeline):
        communicator = _Communicator(rank, pipeline, loops if loops > 1 else None)
        _, _, warmup, _ = get_pp_rank_microbatches(micro_batches, loops, pipeline, p2p_communicator=communicator)
        steady = [work for pair in zip(forward[warmup:], backward, strict=False) for work in pair]
        order.append(forward[:warmup] + steady + backward[len(table) - warmup :])
    return order


def loop_by_loop_order(pipeline: int, loops: int, micro_batches: int) -> list[Order]:
    """Return the order of each rank's work if every loop, in each direction, is its own pass through the pipeline."""
    directions: list[tuple[Literal["forward", "backward"], Iterable[int]]]
    directions = [("forward", range(loops)), ("backward", reversed(range(loops)))]
    passes = [[Work(kind, loop, m) for m in range(micro_batches)] for kind, order in directions for loop in order]
    return [[works] * pipeline for works in passes]


def simulate(passes: list[Order], costs: Costs) -> list[list[Slot]]:
    """Return each rank's work with its times, if a rank starts each piece as soon as its inputs have arrived.

    Args:
        passes: consecutive orders; each starts when all ranks have finished the previous one.
        costs: durations of work and messages.

    Raises:
        ValueError: an order in which the ranks wait for each other forever.
    """
    slots: list[list[Slot]] = [[] for _ in passes[0]]
    loops = 1 + max(work.loop for order in passes for work in order[0])
    ended: dict[tuple[int, Work], float] = {}
    begin = 0.0
    for order in passes:
        queues = [deque(works) for works in order]
        while any(queues):
            before = len(ended)
            for rank, works in enumerate(queues):
                while works and all(need in ended for need, _ in _dependencies(rank, works[0], len(queues), loops)):
                    work = works.popleft()
                    needs = _dependencies(rank, work, len(queues), loops)
                    arrivals = [ended[need] + sent * costs.send for need, sent in needs]
                    start = max(begin, slots[rank][-1].end if slots[rank] else 0.0, *arrivals)
                    slots[rank].append(Slot(work, start, start + costs.duration(work, rank == len(queues) - 1)))
                    ended[rank, work] = slots[rank][-1].end
            if len(ended) == before:
                raise ValueError("the ranks wait for each other")
        begin = end_of(slots)
    return slots


def _dependencies(rank: int, work: Work, pipeline: int, loops: int) -> list[tuple[tuple[int, Work], bool]]:
    """Return the work that must end before ``work`` starts, each with True if it runs on another rank."""
    step = 1 if work.kind == "forward" else -1
    # The ranks of all loops, one loop after another, form one line of R P positions.
    position = work.loop * pipeline + rank - step
    needs = []
    if 0 <= position < loops * pipeline:
        loop, source = divmod(position, pipeline)
        needs.append(((source, Work(work.kind, loop, work.micro_batch)), source != rank))
    if work.kind == "backward":
        needs.append(((rank, Work("forward", work.loop, work.micro_batch)), False))
    return needs


def end_of(slots: list[list[Slot]]) -> float:
    """Return the time at which the last rank finishes."""
    return max(row[-1].end for row in slots)


def bubble(slots: list[list[Slot]]) -> float:
    """Return the time beyond the busiest rank's work, as a share of that work; 0 if that rank never waits."""
    ideal = max(sum(slot.end - slot.start for slot in row) for row in slots)
    return end_of(slots) / ideal - 1


def interleaved_bubble(pipeline: int, loops: int, micro_batches: int) -> float:
    """Return the bubble of the interleaved schedule by its formula, for equal ranks and free messages."""
    return (pipeline - 1) / (loops * micro_batches)


def loop_by_loop_bubble(pipeline: int, loops: int, micro_batches: int) -> float:
    """Return the bubble of loop by loop: R passes in each direction, each of which fills and empties the pipeline."""
    return (pipeline - 1) / micro_batches


def in_flight(slots: list[list[Slot]]) -> int:
    """Return the most micro-batches, each in one loop, whose activations one rank holds at the same time."""
    most = 0
    for row in slots:
        held = 0
        for slot in row:
            held += 1 if slot.work.kind == "forward" else -1
            most = max(most, held)
    return most


def render(slots: list[list[Slot]], unit: float) -> str:
    """Draw one line per rank and one character per ``unit`` of time.

    A digit is a loop's forward, counted from 1, a letter its backward, from a. After nine loops the digits start again,
    after 26 the letters.
    """
    lines = []
    for rank, row in enumerate(slots):
        line = ["."] * round(end_of(slots) / unit)
        for work, start, end in row:
            symbol = str(work.loop % 9 + 1) if work.kind == "forward" else chr(ord("a") + work.loop % 26)
            begin, stop = round(start / unit), round(end / unit)
            line[begin:stop] = symbol * (stop - begin)
        lines.append(f"rank {rank}  {''.join(line)}")
    return "\n".join(lines)
