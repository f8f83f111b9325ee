"""Synthetic tasks in place of text: what each is, in numbers. Their generators are in ``data_pipeline/synthetic/``.

A sample has ``data.seq_length`` tokens of the task's own vocabulary, and labels of its own, which need not be the next
tokens. Harder or longer variants, for a test out of distribution, are the same task with other numbers.
"""

import re
from dataclasses import dataclass, fields

from looplm.bounds import UserError, check_bounds, require

_GROUP = re.compile(r"[SA][345]|Z([2-9]|[1-9][0-9]{1,2})")


@dataclass(frozen=True, kw_only=True)
class WordProblemConfig:
    """A random word over a group's elements; the label at every position is the product of the word so far.

    Args:
        group: S3 to S5 (permutations), A3 to A5 (even ones), or Z2 to Z999 (sums modulo n).
    """

    group: str = "S3"

    def __post_init__(self) -> None:
        fix = "give S3 to S5, A3 to A5, or Z2 to Z999"
        require(_GROUP.fullmatch(self.group) is not None, "data.task.word_problem.group", self.group, fix)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A synthetic task; name exactly one, with its keys or as ``{}``.

    Args:
        word_problem: products of words over a group (arXiv 2404.08819).
    """

    word_problem: WordProblemConfig | None = None

    def __post_init__(self) -> None:
        check_bounds(self, "data.task")
        if len(self._named) != 1:
            names = [spec.name for spec in fields(self)]
            raise UserError(f"data.task: {self._named or None} is not allowed; name exactly one of {', '.join(names)}")

    @property
    def _named(self) -> list[str]:
        return [spec.name for spec in fields(self) if getattr(self, spec.name) is not None]

    @property
    def name(self) -> str:
        """The name of the task."""
        return self._named[0]
