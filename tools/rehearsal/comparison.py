"""The planner's figures for a role, beside what the rehearsal recorded."""

from collections.abc import Iterator
from typing import NamedTuple

from looplm.config import RunConfig
from tools.planning import communication
from tools.planning.flops import backward_flops, forward_flops
from tools.planning.hardware import GPUS, NETWORKS, Assumptions, Cluster
from tools.planning.memory import rank_memory
from tools.planning.planned_run import PlannedRun
from tools.rehearsal.one_role import RoleReport
from tools.rehearsal.traffic import SEND, Message

TOLERANCE = 0.03
_SMALL = 0.01  # of a row's total: parts below it are not compared
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mv")


class Row(NamedTuple):
    """One figure of a role."""

    what: str
    predicted: float
    rehearsed: float
    counts: bool = True  # False for a part so small that its difference does not matter

    @property
    def off(self) -> float:
        """Difference, relative to what was rehearsed."""
        return self.predicted / self.rehearsed - 1 if self.rehearsed else float(self.predicted != 0)

    @property
    def differs(self) -> bool:
        """True if it is off by more than the tolerance."""
        return self.counts and abs(self.off) > TOLERANCE


def compare(config: RunConfig, ranks: int, report: RoleReport) -> list[Row]:
    """Return memory, FLOPs and bytes of a role, predicted for the rehearsed step and rehearsed.

    Args:
        config: of the rehearsed step (:func:`tools.rehearsal.one_role.rehearsed_config`).
        ranks: of the whole job.
        report: of one role.
    """
    run = PlannedRun(config, config.parallel.replicas(ranks), padded_heads=False)
    return [*_memory(run, report), *_flops(run, report), *_bytes(run, report)]


def _memory(run: PlannedRun, report: RoleReport) -> Iterator[Row]:
    planned, found = rank_memory(run, report.role.pipeline), report.memory
    parts = {kind: (getattr(planned, kind), found.most[kind]) for kind in ("weights", "gradients", "optimizer")}
    for name, (predicted, rehearsed) in parts.items():
        yield Row(name, predicted, rehearsed, rehearsed > _SMALL * found.peak)
    passing = found.at_peak["activations"] + found.at_peak["buffers"]
    yield Row("activations", planned.activations, found.most["activations"], passing > _SMALL * found.peak)
    yield Row("activations and working", planned.activations + planned.working, passing, passing > _SMALL * found.peak)
    yield Row("memory", planned.total, found.peak)


def _flops(run: PlannedRun, report: RoleReport) -> Iterator[Row]:
    passes = run.config.model.num_loops * run.micro_batches
    ways = (forward_flops(run, report.role.pipeline), backward_flops(run, report.role.pipeline))
    planned = (ways[0] + ways[1]).times(passes)
    products = sum(report.flops[name] for name in _PRODUCTS)
    attention = report.flops.total() - products
    yield Row("FLOPs of products", planned.layers + planned.head, products)
    yield Row("FLOPs of attention", planned.attention, attention)
    yield Row("FLOPs", planned.total, report.flops.total())


def _bytes(run: PlannedRun, report: RoleReport) -> Iterator[Row]:
    moved = moved_bytes(report)
    planned = planned_bytes(run, report.role.pipeline)
    if run.replicas == 1:  # the same ranks share the context and the data, so their messages are told apart by nothing
        planned["data"] += planned.pop("context")
    total = sum(moved.values())
    for kind in planned:
        if planned[kind] or moved.get(kind, 0):
            yield Row(f"bytes, {kind}", planned[kind], moved.get(kind, 0), moved.get(kind, 0) > _SMALL * total)


def planned_bytes(run: PlannedRun, rank: int) -> dict[str, float]:
    """Return the bytes that a pipeline rank moves in a step, by kind of parallelism."""
    cluster = Cluster(
        gpu=GPUS["h100"], gpus=run.replicas * run.config.parallel.model_ranks, node=8,
        network_gbs=NETWORKS["ib-400"], fp8=False, assume=Assumptions(),
    )  # fmt: skip  # bytes depend on none of these
    passes, both = run.config.model.num_loops * run.micro_batches, (False, True)
    return {
        "tensor": passes * sum(communication.tensor_traffic(run, rank, cluster, way).bytes for way in both),
        "context": passes * sum(communication.context_traffic(run, rank, cluster, way).bytes for way in both),
        "pipeline": communication.messages_sent(run, rank) * communication.pipeline_message(run, cluster).bytes,
        "data": communication.gradient_traffic(run, rank, cluster).bytes
        + communication.weight_traffic(run, rank, cluster).bytes,
    }


def moved_bytes(report: RoleReport) -> dict[str, float]:
    """Return the bytes that a role moves, by kind of parallelism: what it sends, or what a ring passes through it."""
    moved: dict[str, float] = {}
    for message in report.messages:
        kind = "pipeline" if message.is_point_to_point else report.group_kinds.get(message.group, "all")
        moved[kind] = moved.get(kind, 0.0) + _moved(message)
    return moved


def _moved(message: Message) -> float:
    if message.is_point_to_point:
        return message.bytes if message.kind == SEND else 0
    ranks = len(message.group)
    return message.bytes * (ranks - 1) / ranks * (2 if message.kind == "all_reduce" else 1)
