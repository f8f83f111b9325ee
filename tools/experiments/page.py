"""The page of an experiment in docs/evidence: question, verdict, tables, plots, and what it was made from.

The same experiment and rows give the same bytes, in whatever order the rows come.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from looplm.bounds import require
from looplm.failures import UserError
from looplm.files import is_file_name, write_whole
from tools.experiments import formats
from tools.experiments.experiment import Experiment
from tools.experiments.findings import Finding, Verdict, claim_of, decide, find
from tools.experiments.plots import curve_by_arm, curves_of, figure_by_arm, file_name, loss_by_worth, map_by_depth
from tools.experiments.rows import Arm, Row, arms_of
from tools.experiments.tables import (
    Table,
    arms_table,
    comparisons_table,
    markdown,
    sweep_problems,
    sweep_table,
    worth_table,
)
from tools.experiments.worth import Worth

_MAPPED = "test.accuracy"
_METHOD = """\
Only final runs count, paired by seed. An interval is the wider of Student's t and the BCa bootstrap at either end. The
verdict is that of the deciding comparison, which was fixed before the runs; p (Holm) and p (BH) are adjusted over all
{count} comparisons of the table. Effect g is Hedges' g of the paired differences; power and seeds needed are those of a
t test for an effect of this size, for planning only. The ratios are those of the first arm to the second.
"""
_WORTH = """\
loss = E + A (N_once + R^φ N_looped)^(−α), fitted to {figure} of each seed: R loops of a layer are worth R^φ layers. N
counts the parameters of the layers outside the loops and in them. In the plot, lines of one series meet where the law
holds.
"""
_STAIRS = """\
The map shows the arm that is claimed to be better, read after each number of loops. Rows above the white line have more
loops than it was trained with.
"""


def write_page(
    folder: Path,
    name: str,
    experiment: Experiment,
    rows: Sequence[Row],
    *,
    source: str,
    command: str,
    missing: int = 0,
    worths: Sequence[Worth] = (),
) -> Verdict:
    """Write NAME.md, NAME.tex and the plots into a folder, and return the verdict.

    Args:
        folder: for the files, each of which is written whole or not at all.
        name: of the experiment, also the first part of each file's name.
        experiment: what was asked.
        rows: records of all runs.
        source: the text of the experiment's YAML file.
        command: the command that repeats the experiment.
        missing: runs that are planned and not recorded yet.
        worths: what a loop is worth in each series, where the experiment asks for it.

    Raises:
        UserError: no final run, runs of an arm that differ in more than the seed, or names that make no file names.
    """
    report = Report.of(name, experiment, rows, source=source, command=command, missing=missing, worths=worths)
    plots = draw(report)
    for file, svg in plots.items():
        write_whole(folder / file, svg)
    write_whole(folder / f"{name}.tex", "\n".join(table.latex() for table in report.tables if table.rows))
    write_whole(folder / f"{name}.md", page(report, list(plots)))
    return report.verdict


class Report(NamedTuple):
    """An experiment with all that its page tells.

    Args:
        name: of the experiment.
        experiment: what was asked.
        rows: records of all runs, in a fixed order.
        arms: those with final runs.
        findings: the comparisons.
        verdict: the answer.
        source: the text of the experiment's YAML file.
        command: the command that repeats the experiment.
        worths: what a loop is worth in each series; empty if it is not asked.
    """

    name: str
    experiment: Experiment
    rows: tuple[Row, ...]
    arms: Mapping[str, Arm]
    findings: tuple[Finding, ...]
    verdict: Verdict
    source: str
    command: str
    worths: tuple[Worth, ...]

    @classmethod
    def of(
        cls,
        name: str,
        experiment: Experiment,
        rows: Sequence[Row],
        *,
        source: str,
        command: str,
        missing: int,
        worths: Sequence[Worth],
    ) -> "Report":
        """Compare the runs; arguments and errors are those of :func:`write_page`."""
        require(is_file_name(f"{name}.md"), "name", name, "give the name of a file")
        ordered = tuple(sorted(rows, key=lambda row: (row.trial, row.arm, row.lr, row.seed)))
        arms = arms_of(ordered)
        if not arms:
            raise UserError(f"{name}: no final run is recorded; run the experiment before its report")
        findings = find(experiment, arms)
        verdict = decide(experiment, findings)
        if missing:
            unfinished = f"Not finished: {missing} of {len(ordered) + missing} planned runs are missing."
            verdict = verdict._replace(reason=f"{verdict.reason} {unfinished}")
        return cls(name, experiment, ordered, arms, findings, verdict, source, command, tuple(worths))

    @property
    def tables(self) -> tuple[Table, ...]:
        """Tables of arms, comparisons, rates and worth; those that nothing was measured for have no rows."""
        sweep = sweep_table(self.experiment, self.rows, self.arms)
        compared = comparisons_table(self.findings, self.arms)
        return arms_table(self.experiment, self.arms), compared, sweep, worth_table(self.worths)


def draw(report: Report) -> dict[str, str]:
    """Return the plots as SVG by file name: one per figure and per curve of those that were measured, then others.

    These are the law of what a loop is worth, and a map of the arm that is claimed to be better: its accuracy by level
    and number of loops.
    """
    name, experiment, arms, worths = report.name, report.experiment, report.arms, report.worths
    final = [row for row in report.rows if row.trial == "final"]
    plots = dict[str, str]()
    figures = [figure for figure in experiment.figures if any(arm.values(figure) for arm in arms.values())]
    curves = [curve for curve in experiment.curves if curve in curves_of(final)]
    for title in (*figures, *curves):
        file = file_name(name, title)
        fix = f"its plot would be {file}, a name that is taken or no file can have; rename it"
        require(is_file_name(file) and file not in plots, "figures and curves", title, fix)
        plots[file] = figure_by_arm(title, arms) if title in figures else curve_by_arm(title, arms)
    if any(worth.phi for worth in worths):
        plots[file_name(name, f"{worths[0].figure} by worth")] = loss_by_worth(worths[0].figure, worths)
    stairs = map_by_depth(_MAPPED, arms[experiment.decides.better]) if experiment.decides.better in arms else None
    return plots if stairs is None else plots | {file_name(name, f"{_MAPPED} by level and depth"): stairs}


def page(report: Report, plots: Sequence[str]) -> str:
    """Return the page in Markdown; ``plots`` are the names of the files beside it."""
    name, findings, verdict = report.name, report.findings, report.verdict
    arms, compared, sweep, worth = report.tables
    count = sum(finding.comparison is not None for finding in findings)
    parts = [
        f"# {markdown(name)}",
        markdown(report.experiment.question),
        f"Claim, fixed before the runs: {markdown(claim_of(report.experiment.decides))}.",
        f"**{verdict.answer.capitalize()}.** {markdown(verdict.reason)}",
        "## Arms",
        arms.markdown(),
        "## Comparisons",
        compared.markdown(),
        _METHOD.format(count=count),
        _list([f"{finding.title}: {finding.problem}" for finding in findings if finding.problem]),
        _list(_reasons(findings)),
        *(_worth_section(report.worths, worth) if report.worths else ()),
        "## Learning rates",
        sweep.markdown() if sweep.rows else "",
        _list(sweep_problems(report.rows, report.arms)),
        "## Plots",
        *(f"![{markdown(file.removeprefix(f'{name}-').removesuffix('.svg'))}]({file})" for file in plots),
        "Bands around curves are 95 % t intervals over seeds." if any("-by-" in file for file in plots) else "",
        _STAIRS if any(file.endswith("-by-level-and-depth.svg") for file in plots) else "",
        "## Runs",
        f"- command: `{report.command}`\n{_list([*_runs(report.rows), *_retired(report.experiment)])}",
        "## As written before it ran",
        "\n".join(f"    {line}".rstrip() for line in report.source.strip().splitlines()),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _worth_section(worths: Sequence[Worth], table: Table) -> list[str]:
    """Return heading, table and explanation of what a loop is worth."""
    problems = [f"{worth.series}: {worth.problem}" for worth in worths if worth.problem]
    text = _WORTH.format(figure=markdown(worths[0].figure))
    return ["## Worth of a loop", table.markdown(), text, _list(problems)]


def _reasons(findings: Sequence[Finding]) -> list[str]:
    """Return why each test was chosen, a line per reason with the comparisons that have it."""
    titles = defaultdict[str, list[str]](list)
    for title, comparison in ((finding.title, finding.comparison) for finding in findings):
        if comparison is not None:
            titles[f"{comparison.test}, because {comparison.reason}"].append(title)
    all_alike = len(titles) == 1 and len(findings) > 1
    return [f"{'each comparison' if all_alike else '; '.join(of)}: {why}" for why, of in titles.items()]


def _runs(rows: Sequence[Row]) -> list[str]:
    """Return where the rows come from, as items of plain text."""
    final = [row for row in rows if row.trial == "final"]
    machines, commits = sorted({row.machine for row in rows}), sorted({row.commit for row in rows})
    seeds, swept = ({row.seed for row in rows if row.trial == trial} for trial in ("final", "sweep"))
    return [
        f"runs: {len(final)} final, {len(rows) - len(final)} in the sweep",
        f"seeds: {_numbers(seeds)} final, {_numbers(swept) or 'none'} in the sweep",
        f"machine: {'; '.join(machines)}",
        f"commit: {', '.join(commits)}",
        *_mixed(final),
        f"time: {formats.duration(sum(row.seconds for row in rows))} in all, "
        f"{formats.duration(max(row.seconds for row in rows))} for the longest run",
        f"tokens: {formats.count(sum(row.tokens for row in rows))} trained in all",
    ]


def _retired(experiment: Experiment) -> list[str]:
    """Return which arms the command does not repeat."""
    return [] if experiment.retired is None else [str(experiment.retired)]


def _mixed(final: Sequence[Row]) -> list[str]:
    """Return, of each seed whose arms come from several commits, which arms are not of the most frequent one."""
    items = []
    for seed in sorted({row.seed for row in final}):
        of_seed = [row for row in final if row.seed == seed]
        (usual, _), *others = Counter(row.commit for row in of_seed).most_common()
        arms = [f"{row.arm} of {row.commit}" for row in of_seed if row.commit != usual]
        items += [f"seed {seed} is of {usual}, but {', '.join(arms)}"] if others else []
    return items


def _numbers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {markdown(item)}" for item in items)
