"""Tables of an experiment, as Markdown and as LaTeX (booktabs). A difference is never shown without its interval."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tools.experiments import formats
from tools.experiments.experiment import Experiment
from tools.experiments.findings import Finding
from tools.experiments.rows import Arm, Row
from tools.experiments.statistics import estimate
from tools.experiments.worth import Worth
from tools.studies.study import markdown_table

_MARKDOWN = {"&": "&amp;", "<": "&lt;", "|": "\\|", "*": "\\*", "_": "\\_", "`": "\\`"}
_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "−": "$-$",
    "<": "$<$",
    ">": "$>$",
    "×": "$\\times$",
}


class Table(NamedTuple):
    """A table of plain text."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Return the table in Markdown, without its caption."""
        return markdown_table(list(map(markdown, self.header)), [list(map(markdown, row)) for row in self.rows])

    def latex(self) -> str:
        """Return the table in LaTeX, for the package booktabs. The first column is aligned left, the others right."""
        head, *body = (" & ".join(map(latex, row)) + r" \\" for row in (self.header, *self.rows))
        columns = "l" + "r" * (len(self.header) - 1)
        lines = [r"\begin{table}", rf"\caption{{{latex(self.caption)}}}", rf"\begin{{tabular}}{{{columns}}}"]
        lines += [r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        return "\n".join(lines) + "\n"


def markdown(text: str) -> str:
    """Return plain text as Markdown of one line that shows it."""
    return _escaped(text, _MARKDOWN)


def latex(text: str) -> str:
    """Return plain text as LaTeX that shows it."""
    return _escaped(text, _LATEX)


def arms_table(experiment: Experiment, arms: Mapping[str, Arm]) -> Table:
    """Return a row per arm: its size, cost and learning rate, and the mean of each figure over its seeds."""
    header = ("arm", "parameters", "training FLOPs a token", "tokens", "seeds", "learning rate", *experiment.figures)
    rows = []
    for arm in arms.values():
        size = (f"{arm.parameters:,}", formats.count(arm.flops_per_token), formats.count(arm.tokens))
        rates = ", ".join(f"{rate:g}" for rate in arm.learning_rates)
        means = (mean_of(list(arm.values(figure).values())) for figure in experiment.figures)
        rows.append((arm.name, *size, str(len(arm.rows)), rates, *means))
    return Table("Arms: mean over seeds and 95 % interval", header, tuple(rows))


def comparisons_table(findings: Sequence[Finding], arms: Mapping[str, Arm]) -> Table:
    """Return a row per finding. The ratios show how well the arms are matched."""
    header = (
        *("comparison", "figure", "difference", "p (Holm)", "seeds", "matched in", "parameters ratio", "FLOPs ratio"),
        *("test", "p", "p (BH)", "effect g", "power", "seeds needed"),
    )
    rows = []
    for finding in findings:
        pair, comparison = finding.pair, finding.comparison
        ratios = ("", "")
        if pair.better in arms and pair.than in arms:
            a, b = arms[pair.better], arms[pair.than]
            ratios = (formats.ratio(a.parameters, b.parameters), formats.ratio(a.flops, b.flops))
        names = f"{pair.better} − {pair.than}", finding.figure
        about = str(len(finding.seeds)), pair.matched, *ratios
        if comparison is None or finding.p_holm is None or finding.p_bh is None:
            found = *names, "not compared", "", *about
            rows.append((*found, *[""] * (len(header) - len(found))))
            continue
        p, p_holm, p_bh = map(formats.p_value, (comparison.p, finding.p_holm, finding.p_bh))
        plan = (formats.effect(comparison), formats.power(comparison), formats.seeds_needed(comparison))
        rows.append((*names, formats.difference(comparison), p_holm, *about, comparison.test, p, p_bh, *plan))
    return Table("Comparisons, paired by seed: mean difference and 95 % interval", header, tuple(rows))


def worth_table(worths: Sequence[Worth]) -> Table:
    """Return a row per series: φ over its seeds, and how well the law describes its losses."""
    rows = []
    for worth in worths:
        if worth.phi is None:
            rows.append((worth.series, str(len(worth.fits)), worth.problem or "an interval needs two seeds", *[""] * 5))
            continue
        fits = list(worth.fits.values())
        low, high = min(found.alpha for found in fits), max(found.alpha for found in fits)
        error = max(found.error for found in fits)
        against = worth.against_first
        rows.append(
            (
                worth.series,
                str(len(fits)),
                formats.with_interval(worth.phi.mean, worth.phi.interval),
                ", ".join(formats.number(found.phi, 2) for found in fits),
                formats.number(4**worth.phi.mean, 2),
                f"{formats.number(low, 2)} to {formats.number(high, 2)}",
                formats.number(error, 3),
                "" if against is None else formats.difference(against),
            )
        )
    header = ("series", "seeds", "φ", "of each seed", "layers that 4 loops are worth", "α")
    return Table("Worth of a loop", (*header, "largest error of a fit", "φ above the first series'"), tuple(rows))


def sweep_table(experiment: Experiment, rows: Sequence[Row], arms: Mapping[str, Arm]) -> Table:
    """Return a row per arm and learning rate of the sweep, marked where the final runs use it."""
    trials = _trials(rows)
    cells = []
    for (name, rate), runs in sorted(trials.items()):
        values = [value for run in runs if (value := run.value(experiment.tuned_by)) is not None]
        chosen = "chosen" if name in arms and rate in arms[name].learning_rates else ""
        cells.append((name, f"{rate:g}", str(len(runs)), mean_of(values), chosen))
    header = ("arm", "learning rate", "runs", experiment.tuned_by, "")
    return Table("Sweep over learning rates", header, tuple(cells))


def sweep_problems(rows: Sequence[Row], arms: Mapping[str, Arm]) -> list[str]:
    """Return a sentence for each reason why the learning rates may be unfair."""
    trials, problems = _trials(rows), list[str]()
    if not trials:
        return ["No learning rate was swept, so the arms' rates may suit them unequally."]
    counts = {name: sum(len(runs) for (arm, _), runs in trials.items() if arm == name) for name in arms}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {number}" for name, number in counts.items())
        problems.append(f"The arms had unequal numbers of trials: {shown}.")
    for name, arm in arms.items():
        swept = sorted(rate for other, rate in trials if other == name)
        for rate in arm.learning_rates if swept else ():
            if rate not in swept:
                problems.append(f"{name} runs at {rate:g}, which was not in its sweep.")
            elif len(swept) > 1 and rate in (swept[0], swept[-1]):
                problems.append(f"{name} runs at {rate:g}, an end of its sweep; a better rate may lie beyond.")
    return problems


def mean_of(values: Sequence[float]) -> str:
    """Return the mean over seeds with its interval. One seed has no interval, and a NaN no mean."""
    if not values:
        return "not recorded"
    if not all(map(math.isfinite, values)):
        broken = sum(not math.isfinite(value) for value in values)
        return f"{broken} of {len(values)} not finite"
    if len(values) == 1:
        return f"{formats.number(values[0])} (one seed)"
    found = estimate(np.array(values))
    return formats.with_interval(found.mean, found.interval)


def _trials(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    trials = dict[tuple[str, float], list[Row]]()
    for row in rows:
        if row.trial == "sweep":
            trials.setdefault((row.arm, row.lr), []).append(row)
    return trials


def _escaped(text: str, escapes: Mapping[str, str]) -> str:
    pattern = "|".join(map(re.escape, escapes))
    return re.sub(pattern, lambda match: escapes[match[0]], " ".join(text.split()))
