"""Run an experiment: arms x seeds of pretrain.train, measured and compared; its file says beforehand what decides it.

    python -m tools.experiment plan   configs/experiments/word_problem.yaml
    python -m tools.experiment run    configs/experiments/word_problem.yaml --jobs 2
    python -m tools.experiment report configs/experiments/word_problem.yaml

``run`` first tries the learning rates for each arm and then trains every seed at the best. It may be stopped and
repeated; several of them may share the runs, on one machine or as tasks of a Slurm array. The records of all runs are
in docs/evidence/NAME.jsonl: runs that are there are not repeated. ``report`` writes docs/evidence/NAME.md.
"""

from dataclasses import dataclass
from pathlib import Path

from looplm.bounds import check_bounds, path_field, positive
from looplm.cli import parse_command, parse_config, positional_paths, run_main
from looplm.failures import UserError
from tools.experiments.findings import claim_of
from tools.experiments.page import write_page
from tools.experiments.rows import arms_of
from tools.experiments.runner import Runner
from tools.experiments.runs import ExperimentConfig, sweep_units

PROG = "python -m tools.experiment"


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Show arms, sizes, comparisons and the number of runs; nothing is trained.

    Args:
        experiment: its YAML file.
        output_dir: folder of the runs; each experiment has one in it.
        evidence: folder of records and reports.
    """

    experiment: Path = positional_paths("FILE")
    output_dir: str = path_field("runs/experiments")
    evidence: str = path_field("docs/evidence")

    def __post_init__(self) -> None:
        check_bounds(self, "")


@dataclass(frozen=True, kw_only=True)
class RunCommand(PlanConfig):
    """Run what is missing.

    Args:
        experiment: its YAML file.
        output_dir: folder of the runs; each experiment has one in it.
        evidence: folder of records and reports.
        jobs: runs side by side, each with one thread.
    """

    jobs: int = positive(1)


class ResumeCommand(RunCommand):
    """Run what is missing of an experiment that was begun; a mistyped folder is refused."""


class ReportCommand(PlanConfig):
    """Write the page with tables, plots and verdict from the records."""


COMMANDS = {"plan": PlanConfig, "run": RunCommand, "resume": ResumeCommand, "report": ReportCommand}


def main(argv: list[str]) -> None:
    """``python -m tools.experiment plan|run|resume|report FILE``"""
    word, command = parse_command(COMMANDS, argv or ["--help"], prog=PROG, description=str(__doc__))
    path: Path = command.experiment
    config = parse_config(ExperimentConfig, ["--config", str(path)], prog=PROG, description=str(__doc__))
    folder, evidence = Path(command.output_dir) / path.stem, Path(command.evidence)
    runner = Runner(config, folder, evidence / f"{path.stem}.jsonl")
    if config.retired and word != "plan":
        print(config.retired)
    if word == "plan":
        print(plan(config, runner))
    elif word == "report":
        command_line = f"{PROG} run {path}"
        rows = runner.merge()
        if not rows and not config.live_arms:
            return
        verdict = write_page(
            evidence,
            path.stem,
            config,
            rows,
            source=path.read_text(),
            command=command_line,
            missing=runner.total - runner.done(rows),
            worths=config.worths(arms_of(rows)),
        )
        print(f"{evidence / path.stem}.md: {verdict.answer}. {verdict.reason}")
    else:
        if word == "resume" and not folder.is_dir():
            raise UserError(f"output_dir: {folder} does not exist; begin it with: {PROG} run {path}")
        runner.run(command.jobs)
        runner.merge()


def plan(config: ExperimentConfig, runner: Runner) -> str:
    """Return the arms, the comparisons and the work."""
    lines = [config.question, ""]
    width = max(map(len, config.arms))
    lines.append(f"{'arm':<{width}} {'parameters':>12} {'MFLOP a token':>14} {'PFLOP a run':>12}")
    for arm, size in config.sizes.items():
        per_token, whole = size.flops_per_token / 1e6, size.flops / 1e15
        lines.append(f"{arm:<{width}} {size.parameters:>12,} {per_token:>14.3f} {whole:>12.4f}")
    lines += [str(config.retired)] if config.retired else []
    lines += ["", *(f"{pair.better} against {pair.than}: equal {pair.matched}" for pair in config.pairs), ""]
    lines.append(f"decides: {claim_of(config.decides)}")
    rows, sweep = runner.rows(), len(sweep_units(config))
    lines.append(f"{sweep} trials of learning rates and {runner.total - sweep} runs, {runner.done(rows)} of them done")
    if rows:
        rate = sum(row.flops_per_token * row.tokens for row in rows) / sum(row.seconds for row in rows)
        left = sum(config.sizes[arm].flops for arm in config.live_arms) * len(config.seeds) / rate / 3600
        lines.append(f"about {left:.1f} hours of one core for all seeds, at the rate of the runs done")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
