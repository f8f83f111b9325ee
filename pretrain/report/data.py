"""Metrics and samples of a run directory, read and checked for the report."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from looplm.binding import MAX_INT
from looplm.cli import from_dict
from looplm.config import ModelConfig, RunConfig
from looplm.config.model import MAX_DEPTH
from looplm.config.stored import upgrade_config
from looplm.failures import UserError
from looplm.json_file import parse_object
from looplm.yaml_text import read_yaml

SCALARS = ("tokens", "seconds", "mean_depth", "learning_rate", "grad_norm", "tokens_per_second")
PER_LOOP = ("loss_per_loop", "exit_distribution")
# Not in the metrics of older releases; the last two are those of validations with logging.dynamics_samples.
OPTIONAL_PER_LOOP = ("hidden_rms", "hidden_grad_norm", "hidden_cosine", "loop_radius", "attention_sink")
_FIX = "write it again or remove it"

Columns = dict[str, np.ndarray]
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A training directory. Columns are float arrays over its logged steps: [N], or [N, R] for a value per loop.

    ``config`` is the text of its configuration and ``run`` what it says; empty and None if the directory has none.
    ``origin`` is the name of the stage whose weights it started from, if known.
    """

    name: str
    config: str
    run: RunConfig | None
    train: Columns
    valid: Columns
    origin: str | None = None

    @property
    def loops(self) -> int:
        """Loops in training."""
        return self.train["loss_per_loop"].shape[1]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A line of samples.jsonl; tokens are (text, depth)."""

    prompt: str
    tokens: list[tuple[str, int]]
    settings: Record


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A model that tools.upcycle made in the run's folder; losses are None if they were not measured.

    ``loss_before`` is that of the model it was made from, at that model's own depth; ``loss_after`` has one per loop.
    """

    name: str
    kind: str
    source: str
    model: ModelConfig
    loss_before: float | None
    loss_after: list[float] | None


def read_conversions(run: Path) -> list[Conversion]:
    """Return the models of ``run`` that were converted and not trained since, oldest first."""
    found = []
    for path in run.glob("*/companions/upcycle.json"):  # as tools.upcycle writes it; carried on by training
        folder = path.parent.parent
        if (folder / "metrics.jsonl").is_file() or not (folder / "config.yaml").is_file():
            continue
        record = _last_conversion(path)
        before, after = ({} if when not in record else _object(record, when, str(path)) for when in ("before", "after"))
        loops = len(_numbers(before, "exit_distribution", str(path))) if before else 0
        found.append(
            Conversion(
                name=folder.name,
                kind=str(record.get("kind")),
                source=Path(str(record.get("source"))).name,
                model=_read_model(folder),
                loss_before=_numbers(before, "loss_per_depth", str(path))[:loops][-1] if before else None,
                loss_after=_numbers(after, "loss_per_depth", str(path)) if after else None,
            )
        )
    return sorted(found, key=lambda conversion: (run / conversion.name).stat().st_mtime)


def read_stages(run: Path) -> list[Stage]:
    """Return every training directory of ``run`` that has logged a step.

    Each one follows the one it started from; otherwise the oldest is first and a gate last.
    """
    found = []
    for path in (run / "metrics.jsonl", *run.glob("*/metrics.jsonl")):
        records = _read_lines(path, growing=True)
        train, valid = ([entry for entry in records if entry[1].get("kind") == kind] for kind in ("train", "valid"))
        if train:
            name = path.parent.resolve().name
            text, config = _read_config(path.parent)
            stage = Stage(name=name, config=text, run=config, train=_columns(train), valid=_columns(valid))
            is_gate = train[-1][1].get("objective") == "adaptive_gate"
            found.append((is_gate, path.stat().st_mtime, name, replace(stage, origin=_origin(stage, run))))
    waiting, ordered = [stage for *_, stage in sorted(found, key=lambda entry: entry[:3])], list[Stage]()
    while waiting:
        names = {stage.name for stage in waiting}
        ready = [stage for stage in waiting if stage.origin not in names]
        ordered.append((ready or waiting)[0])
        waiting.remove(ordered[-1])
    return ordered


def _origin(stage: Stage, run: Path) -> str | None:
    """Return the stage that checkpoint.initial names; for upcycled weights, the stage that they were made from."""
    if stage.run is None or stage.run.checkpoint.initial is None:
        return None
    named = Path(stage.run.checkpoint.initial)
    record = run / named.name / "companions/upcycle.json"  # as tools.upcycle writes it
    if not (run / named.name / "metrics.jsonl").is_file() and record.is_file():
        named = Path(str(_last_conversion(record).get("source")))
    names = {path.parent.name for path in run.glob("*/metrics.jsonl")} - {stage.name}
    return next((part for part in reversed(named.parts) if part in names), None)


def read_samples(path: Path) -> list[Sample]:
    """Return the samples; an empty list if there is no such file."""
    samples = []
    for where, record in _read_lines(path):
        prompt, settings = record.get("prompt"), record.get("settings", {})
        if not isinstance(prompt, str) or not isinstance(settings, dict):
            raise UserError(f"{where}: prompt or settings are not as looplm.generate writes them; write the file again")
        tokens = []
        for row in _objects(record, "tokens", where):
            text, depth = row.get("text"), _whole(row, "depth", where, 1, MAX_DEPTH)
            if not isinstance(text, str):
                raise UserError(f"{where}: text: {text!r:.200} is not a text; {_FIX}")
            tokens.append((text, depth))
        samples.append(Sample(prompt=prompt, tokens=tokens, settings=settings))
    return samples


def _read_config(folder: Path) -> tuple[str, RunConfig | None]:
    """Return the stage's resolved configuration, or its newest checkpoint's, as it is written and parsed."""
    newest_first = sorted(folder.glob("checkpoints/step_*/config.yaml"), reverse=True)
    for path in (folder / "config.yaml", *newest_first):
        if path.is_file():
            values = upgrade_config(read_yaml(str(path)).values, str(path))
            return _read_text(path), from_dict(RunConfig, values, where=str(path))
    return "", None


def _read_model(folder: Path) -> ModelConfig:
    path = str(folder / "config.yaml")
    values = upgrade_config({"model": read_yaml(path).values.get("model", {})}, path)
    return from_dict(ModelConfig, values["model"], where=path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {_FIX}") from error


def _read_lines(path: Path, *, growing: bool = False) -> list[tuple[str, Record]]:
    """Return the objects of a JSON-lines file, each with its ``file:line``; an empty list if there is no such file.

    With ``growing``, half a line at the end is left out with a note: its writer was killed, or is writing.
    """
    lines = _read_text(path).split("\n") if path.is_file() else []
    if growing and lines and lines[-1].strip() and not _is_json(lines[-1]):
        print(f"note: {path}:{len(lines)}: is half a line, of a run that was killed; left out", file=sys.stderr)
        lines = lines[:-1]
    numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [(where, parse_object(line, where, _FIX)) for where, line in numbered]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _objects(record: Record, key: str, where: str) -> list[Record]:
    rows = record.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{where}: {key}: not a list of objects; {_FIX}")
    return rows


def _number(record: Record, key: str, where: str) -> float:
    """Return the number under ``key``; null (not known) becomes NaN."""
    value = record.get(key, "missing")
    if value is None:
        return math.nan
    if not (isinstance(value, float) or (type(value) is int and abs(value) < MAX_INT)):
        raise UserError(f"{where}: {key}: {value!r:.200} is not a number; {_FIX}")
    return float(value)


def _whole(record: Record, key: str, where: str, least: int, most: int) -> int:
    value = record.get(key)
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{where}: {key}: {value!r:.200} is not a whole number from {least} to {most:,}; {_FIX}")
    return value


def _numbers(record: Record, key: str, where: str) -> list[float]:
    values = record.get(key)
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: {key}: {values!r} is not a list of numbers; {_FIX}")
    return [_number({key: value}, key, where) for value in values]


def _last_conversion(path: Path) -> Record:
    """Return the newest entry of a model's list of conversions."""
    steps = _objects(parse_object('{"steps": ' + _read_text(path) + "}", str(path), _FIX), "steps", str(path))
    if not steps:
        raise UserError(f"{path}: names no conversion; {_FIX}")
    return steps[-1]


def _object(record: Record, key: str, where: str) -> Record:
    value = record.get(key)
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key}: {value!r} is not an object; {_FIX}")
    return value


def _modules(record: Record, where: str) -> dict[str, float]:
    norms = _object({"grad_norms": {}} | record, "grad_norms", where)
    return {name: _number(norms, name, where) for name in norms}


def _columns(records: Sequence[tuple[str, Record]]) -> Columns:
    """Turn records into columns; rows with fewer loops end in NaN.

    Required are the step, losses and exits. A norm of the gradient of MODULE is the column ``grad_norms/MODULE``.
    """
    columns = {"step": np.array([_whole(record, "step", where, 0, MAX_INT - 1) for where, record in records], float)}
    for key in SCALARS:
        columns[key] = np.array([_number({key: None, **record}, key, where) for where, record in records])
    modules = [_modules(record, where) for where, record in records]
    for name in dict.fromkeys(name for row in modules for name in row):
        columns[f"grad_norms/{name}"] = np.array([row.get(name, math.nan) for row in modules])
    for key in (*PER_LOOP, *OPTIONAL_PER_LOOP):
        missing = {key: [None]} if key in OPTIONAL_PER_LOOP else {}
        rows = [_numbers(missing | record, key, where) for where, record in records]
        width = max(map(len, rows), default=0)
        columns[key] = np.array([row + [math.nan] * (width - len(row)) for row in rows]).reshape(len(rows), width)
    return columns
