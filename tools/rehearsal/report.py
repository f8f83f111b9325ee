"""The rehearsal's report, as lines of text."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from tools.rehearsal.comparison import TOLERANCE, Row, compare, moved_bytes
from tools.rehearsal.memory import KINDS
from tools.rehearsal.one_role import RoleReport
from tools.rehearsal.rehearsal import Plan, Rehearsal

GIB = 2**30
_MOVED = ("tensor", "context", "pipeline", "data")


def describe(rehearsal: Rehearsal, with_plan: bool = True) -> Iterator[str]:
    """Yield the report of a run: its roles, the planner's figures for some of them, and what their messages say."""
    reports = rehearsal.reports
    yield _layout(rehearsal.plan)
    if reports:
        yield from role_table(reports)
    if with_plan:
        for report, rows in compared_roles(rehearsal):
            yield from comparison_table(report.role.rank, rows)
    if not rehearsal.faults:
        messages = sum(len(report.messages) for report in reports)
        yield f"{len(reports)} roles ran; their {messages:,} messages are in accord"
    yield ""


def compared_roles(rehearsal: Rehearsal) -> Iterator[tuple[RoleReport, list[Row]]]:
    """Yield the first role and the last of another pipeline rank, with the planner's figures for them."""
    ends = rehearsal.reports[:1] + rehearsal.reports[-1:]
    for report in {one.role.pipeline: one for one in reversed(ends)}.values():
        yield report, compare(rehearsal.plan.config, rehearsal.plan.ranks, report)


def as_dict(rehearsal: Rehearsal) -> dict[str, Any]:
    """Return plain values for a JSON file: bytes, FLOPs, seconds of processor time."""
    plan = rehearsal.plan
    roles = [
        {
            **report.role._asdict(),
            "memory_bytes": report.memory.at_peak,
            "peak_bytes": report.memory.peak,
            "start_peak_bytes": report.start_peak,
            "flops": dict(report.flops),
            "moved_bytes": moved_bytes(report),
            "messages": len(report.messages),
            "seconds": report.seconds,
            "host_bytes": report.host_bytes,
        }
        for report in rehearsal.reports
    ]
    planned = {
        report.role.rank: {row.what: [row.predicted, row.rehearsed] for row in rows}
        for report, rows in compared_roles(rehearsal)
    }
    return {
        "name": plan.name,
        "gpus": plan.ranks,
        "parallel": asdict(plan.config.parallel),
        "micro_batches": [plan.micro_batches, plan.full_step],
        "roles": roles,
        "planned_and_rehearsed": planned,
        "faults": rehearsal.faults,
    }


def _layout(plan: Plan) -> str:
    layout, data = plan.config.parallel, plan.config.data
    sizes = f"tensor {layout.tensor}, pipeline {layout.pipeline}, context {layout.context}"
    step = f"{plan.micro_batches} of a step's {plan.full_step} micro-batches"
    samples = f"{data.micro_batch_size} x {data.seq_length:,} tokens"
    title = f"{plan.name}, " if plan.name else ""
    replicas = f"data {layout.replicas(plan.ranks):,}"
    return f"{title}{plan.ranks:,} GPUs: {sizes}, {replicas}; {step} of {samples}; recompute {layout.recompute}"


def role_table(reports: Sequence[RoleReport]) -> Iterator[str]:
    """Yield a table of the roles: memory at the peak in GiB by kind, FLOPs, bytes moved, and messages."""
    kinds = "".join(f"{kind:>12}" for kind in KINDS)
    moved = "".join(f"{kind:>10}" for kind in _MOVED)
    yield f"{'':<8}{'GiB alive at the peak':<24}{'':>56}{'':>16}  GiB moved"
    yield f"{'rank':>7} {kinds}{'all':>9}{'start':>9}{'TFLOP':>10}{moved}{'messages':>10}{'s':>7}"
    for report in reports:
        parts = "".join(f"{report.memory.at_peak[kind] / GIB:>12.3f}" for kind in KINDS)
        by_kind = moved_bytes(report)
        sent = "".join(f"{by_kind.get(kind, 0.0) / GIB:>10.3f}" for kind in _MOVED)
        peaks = f"{report.memory.peak / GIB:>9.3f}{report.start_peak / GIB:>9.3f}"
        flops = f"{report.flops.total() / 1e12:>10,.2f}"
        yield f"{report.role.rank:>7} {parts}{peaks}{flops}{sent}{len(report.messages):>10,}{report.seconds:>7.1f}"


def comparison_table(rank: int, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table of the planner's figures for one role; differences beyond the tolerance are marked."""
    yield f"rank {rank:<29}{'planned':>14}{'rehearsed':>14}{'off':>9}"
    for row in rows:
        unit, factor = ("TFLOP", 1e12) if row.what.startswith("FLOPs") else ("GiB", GIB)
        mark = f"  more than {TOLERANCE:.0%}" if row.differs else ""
        values = f"{row.predicted / factor:>14,.3f}{row.rehearsed / factor:>14,.3f}"
        yield f"  {row.what + ', ' + unit:<32}{values}{row.off:>9.1%}{mark}"
