"""Rehearsals of runs: each run's roles, side by side in processes, and what their reports say together."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from looplm.accounting import weight_bytes
from looplm.config import RunConfig
from pretrain.batch_schedule import schedule_on
from tools.planning.planned_run import PlannedRun
from tools.rehearsal.matching import find_faults
from tools.rehearsal.one_role import RoleReport, enough_micro_batches, rehearsed_config
from tools.rehearsal.processes import Assignment, Failed, rehearse_all
from tools.rehearsal.roles import Role, chosen_roles


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run to rehearse.

    Args:
        name: of the run, for the report.
        config: of the run, with the batch of the rehearsed step.
        ranks: of the whole job.
        roles: those to rehearse.
        micro_batches: of the rehearsed step on each replica.
        full_step: micro-batches of the run's own step.
    """

    name: str
    config: RunConfig
    ranks: int
    roles: list[Role]
    micro_batches: int
    full_step: int


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Result of a rehearsal; it found nothing wrong if ``faults`` is empty."""

    plan: Plan
    reports: list[RoleReport] = field(default_factory=list)  # by rank; without the roles that failed
    faults: list[str] = field(default_factory=list)


def plan_rehearsal(name: str, config: RunConfig, ranks: int, wanted: str, micro_batches: int | None) -> Plan:
    """Return the rehearsal of a run on that many ranks.

    Args:
        name: of the run.
        config: of the run.
        ranks: of the job.
        wanted: ``all`` or ranks, see :func:`tools.rehearsal.roles.chosen_roles`.
        micro_batches: of the rehearsed step; None for as many as tell all that a longer step would.

    Raises:
        UserError: the layout does not fit the number of ranks or the batch, or there is no such rank.
    """
    data = config.data
    schedule_on(config, ranks)
    full_step = data.global_batch_size // (data.micro_batch_size * config.parallel.replicas(ranks))
    count = enough_micro_batches(config, full_step) if micro_batches is None else micro_batches
    changed = rehearsed_config(config, ranks, count)
    schedule_on(changed, ranks)
    return Plan(
        name=name,
        config=changed,
        ranks=ranks,
        roles=chosen_roles(wanted, config.parallel, ranks),
        micro_batches=count,
        full_step=full_step,
    )


def rehearse(plans: Sequence[Plan], jobs: int) -> list[Rehearsal]:
    """Rehearse all roles of all runs, ``jobs`` at a time, and compare the messages of each run's roles."""
    numbered = [(number, role) for number, plan in enumerate(plans) for role in plan.roles]
    work = [
        Assignment(plans[number].config, plans[number].ranks, role, plans[number].micro_batches)
        for number, role in numbered
    ]
    found = [Rehearsal(plan=plan) for plan in plans]
    reports = rehearse_all(work, jobs)
    for place, report in tqdm(reports, total=len(work), unit="role", disable=None):
        rehearsal = found[numbered[place][0]]
        if isinstance(report, Failed):
            rehearsal.faults.append(f"{report.role}: {report.error} at {report.where}")
        else:
            rehearsal.reports.append(report)
    for rehearsal in found:
        rehearsal.reports.sort(key=lambda report: report.role.rank)
        if not rehearsal.faults:
            rehearsal.faults.extend(faults_of(rehearsal.plan.config, rehearsal.reports))
    return found


def faults_of(config: RunConfig, reports: Sequence[RoleReport]) -> list[str]:
    """Return what would make the job fail to which the roles belong, or its memory grow.

    Storages that outlive a step count from the size of a rank's hidden state on; statistics are smaller.
    """
    faults = find_faults(
        {report.role.rank: report.messages for report in reports},
        {report.role.rank: report.order for report in reports},
        {report.role.rank: report.groups for report in reports},
    )
    hidden = int(PlannedRun(config, 1).shard_tokens * config.model.hidden_size * weight_bytes(config.optim.precision))
    for report in reports:
        kept = {size: count for size, count in report.memory.kept.items() if size >= hidden}
        if kept:
            sizes = ", ".join(f"{count} of {size:,} bytes" for size, count in kept.items())
            faults.append(
                f"{report.role}: storages outlive the step that made them ({sizes}); something refers to them"
            )
    return faults
