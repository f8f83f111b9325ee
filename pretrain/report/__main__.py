"""Write one self-contained HTML page about a run: curves, exits, depths and sample text. No scripts, nothing fetched.

python -m pretrain.report runs/quickstart
"""

from dataclasses import dataclass
from pathlib import Path

from looplm.cli import parse_config, positional, run_main
from looplm.failures import UserError
from looplm.files import write_whole
from pretrain.report.page import build_page


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """A run and its page.

    Args:
        run: directory with a training directory per stage, evaluation.json and samples.jsonl; some may be missing.
        output: HTML file to write; null writes RUN_DIR/report.html.
    """

    run: Path = positional("RUN_DIR")
    output: Path | None = None


def main(argv: list[str]) -> None:
    """``python -m pretrain.report RUN_DIR [--output FILE]``"""
    config = parse_config(ReportConfig, argv, prog="python -m pretrain.report", description=str(__doc__))
    output = config.output or config.run / "report.html"
    page = build_page(config.run)
    try:
        write_whole(output, page)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); give another --output") from error
    print(f"report: {output}")


if __name__ == "__main__":
    run_main(main)
