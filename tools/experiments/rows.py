"""The records of finished runs: one file per run, and one JSON object a line in docs/evidence/EXPERIMENT.jsonl.

A run writes its own record with :func:`write_row` as its last act, so that runs need no lock and a record marks a run
as complete. A report then merges the records into the experiment's file, which is committed.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal

from looplm.bounds import at_least, check_bounds, non_empty, positive, require
from looplm.cli import from_dict, to_dict
from looplm.failures import UserError
from looplm.files import write_whole
from looplm.json_file import MAX_BYTES, read_object
from looplm.lock import FolderLock

_PATIENCE = 60.0  # seconds to wait for another process that adds records, which takes it a moment
_DRAWN = 0.1  # share by which the FLOPs of runs differ whose steps draw their number of loops
_FIX = "remove the file and repeat the run"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The record of a finished run.

    A curve is named ``[SPLIT.]NAME by KEY``, such as "test.accuracy by level". The positions of its values are the
    curve ``[SPLIT.]KEYs`` beside it, here "test.levels". Only "by depth" may leave them out: they are then 1, 2, ...

    Args:
        arm: name of the experiment's arm.
        seed: seed of the run; runs of two arms with the same seed are compared with each other.
        trial: a run of the sweep over learning rates, or one whose figures count.
        lr: learning rate.
        parameters: number of parameters without the gate's.
        flops_per_token: training FLOPs of one token, forward and backward.
        steps: optimizer steps.
        tokens: tokens that the run trained on.
        seconds: wall-clock time of the run.
        machine: processor and number of threads.
        commit: git revision of the code.
        figures: results by name, such as "test.accuracy" or "test.accuracy@depth=2".
        curves: series of results by name, and their positions.
        settings: fingerprint of the keys that made the run.
        diverged: the training ended in losses or gradients that were not finite: each figure counts as NaN.
    """

    arm: str = non_empty()
    seed: int = at_least(0)
    trial: Literal["sweep", "final"]
    lr: float = positive()
    parameters: int = positive()
    flops_per_token: float = positive()
    steps: int = positive()
    tokens: int = positive()
    seconds: float = at_least(0, below=float("inf"))
    machine: str = non_empty()
    commit: str = non_empty()
    figures: dict[str, float]
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict)
    settings: str = non_empty()
    diverged: bool = False

    def __post_init__(self) -> None:
        check_bounds(self, "")
        for name, values in self.curves.items():
            if " by " in name:
                found, wanted = len(self.positions(name)), len(values)
                fix = f"give as many positions as the curve has values ({wanted})"
                require(found == wanted, f"curves.{positions_name(name)}", f"{found} values", fix)

    @property
    def label(self) -> str:
        """The run in words, for messages."""
        return f"arm {self.arm}, seed {self.seed}, {self.trial}, lr {self.lr:g}"

    def value(self, figure: str) -> float | None:
        """Return a figure; NaN for a run that diverged, and None if it was not measured."""
        return math.nan if self.diverged else self.figures.get(figure)

    def positions(self, curve: str) -> tuple[float, ...]:
        """Return where the values of a curve lie on its axis."""
        name, values = positions_name(curve), self.curves[curve]
        if name not in self.curves and curve.endswith(" by depth"):
            return tuple(float(depth) for depth in range(1, len(values) + 1))
        require(name in self.curves, f"curves.{curve}", f"without {name!r}", f"record its positions as {name!r}")
        return self.curves[name]


def positions_name(curve: str) -> str:
    """Return the name of the positions of a curve: "test.levels" for "test.accuracy by level"."""
    name, _, key = curve.rpartition(" by ")
    split, dot, _ = name.rpartition(".")
    return f"{split}{dot}{key}s"


def write_row(path: Path, row: Row) -> None:
    """Write the record of one run, whole or not at all."""
    write_whole(path, _line(row))


def read_row(path: Path) -> Row:
    """Read the record of one run.

    Raises:
        UserError: it cannot be read, or is not what :func:`write_row` writes.
    """
    return from_dict(Row, read_object(path, _FIX), where=str(path))


def read_rows(path: Path) -> tuple[Row, ...]:
    """Read the file of an experiment, sorted by trial, arm, learning rate and seed.

    Raises:
        UserError: the file cannot be read, a line is not a record, or a run is there twice.
    """
    fix = "restore it from git, or remove it and repeat the report"
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a regular file; {fix}")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(f"{path}: has {size:,} bytes, more than {MAX_BYTES:,}; split the experiment")
        lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{path}: cannot be read ({reason}); {fix}") from error
    rows = list[Row]()
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not a line of JSON ({error}); {fix}") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}:{number}: holds a {type(values).__name__}, not a JSON object; {fix}")
        rows.append(from_dict(Row, values, where=f"{path}:{number}"))
    return _unique(rows, str(path))


def merge_rows(path: Path, new: Iterable[Row]) -> tuple[Row, ...]:
    """Add records to the file of an experiment, whole or not at all, and return all of them.

    Records that the file already has may be given again. The folder is locked meanwhile, and runners that share an
    experiment wait for each other.

    Raises:
        UserError: the file has another record of the same run, or another process holds the folder for a minute.
    """
    with FolderLock(path.parent, str(path.parent), say=print, wait=_PATIENCE):
        rows = list(read_rows(path)) if path.exists() else []
        known = {_key(row): row for row in rows}
        for row in new:
            earlier = known.setdefault(_key(row), row)
            if earlier is row:
                rows.append(row)
            elif _line(earlier) != _line(row):  # as text: a NaN does not equal itself
                fix = "remove its line if the new run replaces it, or the new run's folder if not"
                raise UserError(f"{path}: has another record of {row.label}; {fix}")
        merged = _unique(rows, str(path))
        if merged:  # no file is better than one without a record, which would count as damaged
            write_whole(path, "".join(map(_line, merged)))
        return merged


@dataclass(frozen=True)
class Arm:
    """The runs of one arm whose figures count.

    Args:
        name: of the arm.
        parameters: number of parameters without the gate's.
        flops_per_token: training FLOPs of one token, a mean over the runs, whose seeds may draw their loops.
        tokens: tokens that each run trained on.
        learning_rates: of the runs; more than one if the arm was tuned for each seed.
        rows: by seed.
    """

    name: str
    parameters: int
    flops_per_token: float
    tokens: int
    learning_rates: tuple[float, ...]
    rows: Mapping[int, Row]

    @property
    def flops(self) -> float:
        """Training FLOPs of a run."""
        return self.flops_per_token * self.tokens

    def values(self, figure: str) -> dict[int, float]:
        """Return a figure by seed, for the seeds that have it."""
        found = {seed: row.value(figure) for seed, row in self.rows.items()}
        return {seed: value for seed, value in found.items() if value is not None}


def arms_of(rows: Sequence[Row]) -> dict[str, Arm]:
    """Return the arms with final runs, by name, from few parameters and FLOPs to many.

    Raises:
        UserError: runs of one arm differ in what makes the arm.
    """
    arms = list[Arm]()
    final = [row for row in rows if row.trial == "final"]
    for name in {row.arm for row in final}:
        own = {row.seed: row for row in sorted(final, key=lambda row: row.seed) if row.arm == name}
        first = next(iter(own.values()))
        for row in own.values():
            for key, tolerance in (("parameters", 0.0), ("flops_per_token", _DRAWN), ("tokens", 0.0)):
                value, expected = getattr(row, key), getattr(first, key)
                fix = f"seed {first.seed} has {expected!r}; the runs of an arm differ in nothing but the seed"
                require(math.isclose(value, expected, rel_tol=tolerance), f"{row.label}: {key}", value, fix)
        rates = tuple(sorted({row.lr for row in own.values()}))
        flops_per_token = fmean(row.flops_per_token for row in own.values())
        arms.append(Arm(name, first.parameters, flops_per_token, first.tokens, rates, own))
    arms.sort(key=lambda arm: (arm.parameters, arm.flops, arm.name))
    return {arm.name: arm for arm in arms}


def _key(row: Row) -> tuple[str, str, float, int]:
    """Return what identifies a run. An arm has one final run per seed, whatever its learning rate."""
    return row.trial, row.arm, row.lr if row.trial == "sweep" else 0.0, row.seed


def _unique(rows: Sequence[Row], where: str) -> tuple[Row, ...]:
    seen = set[tuple[str, str, float, int]]()
    for row in rows:
        if _key(row) in seen:
            raise UserError(f"{where}: {row.label}: recorded twice; keep one of the two lines")
        seen.add(_key(row))
    return tuple(sorted(rows, key=_key))


def _line(row: Row) -> str:
    return json.dumps(to_dict(row)) + "\n"
