"""A study: one folder, a subfolder for each result, and a table of all results.

A result is written when it is complete, so that a repeated command continues where the last one stopped.
"""

import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from looplm.checkpoint import git_revision, versions
from looplm.failures import UserError
from looplm.files import write_whole

ResultType = TypeVar("ResultType", bound=NamedTuple)
RESULT, SETTINGS = "result.json", "settings.json"


class Study(Generic[ResultType]):
    """Results of one kind in a folder.

    Args:
        folder: created if it does not exist.
        settings: settings that all results share.
        result_type: a named tuple of plain values.

    Raises:
        UserError: the folder holds results of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], result_type: Callable[..., ResultType]) -> None:
        self.folder, self.settings, self._result_type = folder, settings, result_type
        folder.mkdir(parents=True, exist_ok=True)
        path, text = folder / SETTINGS, json.dumps(settings, indent=1)
        if path.exists() and json.loads(path.read_text()) != json.loads(text):
            raise UserError(f"{path}: belongs to a study with other settings; give another --output_dir")
        write_whole(path, text)

    def earlier(self, name: str) -> ResultType | None:
        """Return a result that an earlier command completed, or None."""
        path = self.folder / name / RESULT
        return self._result_type(**json.loads(path.read_text())) if path.exists() else None

    def complete(self, name: str, result: ResultType) -> ResultType:
        """Write a result, which marks it as complete, and return it."""
        write_whole(self.folder / name / RESULT, json.dumps(result._asdict(), indent=1))
        return result

    def write_report(self, results: Sequence[ResultType], table: str) -> None:
        """Write study.json, which says where and from what the results were made, and table.md."""
        threads = os.environ.get("OMP_NUM_THREADS")
        machine = {"platform": platform.platform(), "cores": os.cpu_count(), "threads": threads}
        report = {"commit": git_revision(), "versions": versions(), "machine": machine, **self.settings}
        report["runs"] = [result._asdict() for result in results]
        write_whole(self.folder / "study.json", json.dumps(report, indent=1))
        write_whole(self.folder / "table.md", table)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"
