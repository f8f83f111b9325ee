"""Pytest hooks that write docs/reliability.md: each test marked ``promise``, what it expects and what it saw.

``--reliability=FILE`` (``make faults``) writes the page at the end of a run. ``record_property("seen", TEXT)`` in a
test says what it saw. The text must be the same in every run: no times, temporary paths or process ids.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from looplm import failures
from looplm.files import write_whole

ROOT = Path(__file__).resolve().parent.parent.parent
FAILED = "**FAILED**"
SHOWN = 8  # different outcomes that a row lists

# The first prefix that fits decides.
AREAS = (
    ("tests/looplm/checkpoint", "Checkpoints"),
    ("tests/faults/test_checkpoint", "Checkpoints"),
    ("tests/faults/test_data", "Data"),
    ("tests/data_pipeline", "Data"),
    ("tests/pretrain/test_data", "Data"),
    ("tests/pretrain/test_mixed_data", "Data"),
    ("tests/looplm/config", "Configuration"),
    ("tests/looplm/test_cli", "Configuration"),
    ("tests/looplm/test_bounds", "Configuration"),
    ("tests/faults", "Training"),
    ("tests/pretrain", "Training"),
    ("tests/parallel", "Training"),
    ("tests/tools/test_replay", "Training"),
    ("tests/fuzz", "Damaged and hostile files"),
    ("tests", "Conversations, generation, import, export and evaluation"),
)

INTRODUCTION = """\
# Reliability

What LoopLM promises when something goes wrong, and the test that shows it. `make faults` runs every test below and
writes this page ({cases} cases, at most half an hour on two cores). `make test` runs the fast part.

**Guaranteed.** A run loses nothing that its last checkpoint holds. A resumed run at the same layout repeats the
uninterrupted one bit for bit: no sample is lost and none is seen twice. A checkpoint, a data set or an export is whole
or it is not there. A file that was damaged is never used, and no file can run code. Every failure ends in one line that
says where, what is wrong and what to do, and in one of the exit statuses below. Nothing waits forever.

**Not shown.** All of this was run on a CPU with gloo, on one machine, with one or two processes. It has never run on
GPUs, on several machines, or on a parallel file system; [Status](status.md) says more. A disk that reports a write as
done and then loses it cannot be noticed before the file is read.

## Exit statuses

{statuses}

A process that was killed ends with 128 plus the signal's number (137 for `kill -9`). `torchrun` ends with its own
status 1 whenever a worker fails, and prints the worker's status above.
"""


class Promise(NamedTuple):
    """A promise and the test function that proves it."""

    test: str  # path::name
    text: str
    expected: str


class Case(NamedTuple):
    """The outcome of one test, or of one parameter set of it."""

    promise: Promise
    line: int
    seen: tuple[str, ...]


_cases = pytest.StashKey[list[Case]]()
_config: pytest.Config | None = None  # a hook about reports is not told the configuration


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--reliability``."""
    parser.addoption("--reliability", metavar="FILE", help="write the page of promises to FILE")


def pytest_configure(config: pytest.Config) -> None:
    """Start with no cases."""
    global _config
    _config, config.stash[_cases] = config, []


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Attach a test's promise to its reports, which travel from xdist's workers to the process that writes the page."""
    marker = item.get_closest_marker("promise")
    if marker is not None:
        item.user_properties.append(("promise", [marker.kwargs["text"], marker.kwargs["expected"]]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the outcome of a test that proves a promise."""
    properties: list[tuple[str, Any]] = list(report.user_properties)
    promise: list[str] | None = dict(properties).get("promise")
    if _config is None or promise is None or not (report.when == "call" or report.outcome != "passed"):
        return
    text, expected = (" ".join(value.split()) for value in promise)
    seen = tuple(str(value) for name, value in properties if name == "seen")
    if report.failed:
        seen = (FAILED,)
    elif report.skipped:
        seen = ("not run on this machine",)
    test, line = report.nodeid.partition("[")[0], report.location[1]
    _config.stash[_cases].append(Case(Promise(test, text, expected), line or 0, seen))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the page, in the process that has all reports."""
    target = session.config.getoption("--reliability")
    if target is not None and not hasattr(session.config, "workerinput"):
        write_whole(Path(target), page(session.config.stash[_cases]))


def page(cases: list[Case]) -> str:
    """Return the page for the outcomes of a run."""
    rows: dict[Promise, list[Case]] = {}
    for case in sorted(cases, key=lambda case: (case.promise.test.partition("::")[0], case.line)):
        rows.setdefault(case.promise, []).append(case)
    parts = [INTRODUCTION.format(cases=len(cases), statuses=_statuses())]
    for area in dict.fromkeys(name for _, name in AREAS):
        found = [_row(promise, of) for promise, of in rows.items() if area_of(promise.test) == area]
        if found:
            head = "| promise | test | expected | seen |\n|---|---|---|---|"
            parts.append("\n".join([f"## {area}\n", head, *found]) + "\n")
    return "\n".join(parts)


def area_of(test: str) -> str:
    """Return the heading under which a test's promise is listed."""
    return next(name for prefix, name in AREAS if test.startswith(prefix))


def _row(promise: Promise, cases: list[Case]) -> str:
    seen = list(dict.fromkeys(text for case in cases for text in case.seen)) or ["as expected"]
    if len(seen) > SHOWN and FAILED not in seen:
        seen = [*seen[:SHOWN], f"and {len(seen) - SHOWN} more"]
    number = f", {len(cases)} cases" if len(cases) > 1 else ""
    cells = _cell(promise.text), f"`{promise.test}`{number}", _cell(promise.expected), "<br>".join(map(_cell, seen))
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Return ``text`` so that Markdown shows it as it is, in one line."""
    return text if text == FAILED else re.sub(r"([\\`*_\[\]|<])", r"\\\1", " ".join(text.split()))


def _statuses() -> str:
    """Return the table in the docstring of :mod:`looplm.failures` as Markdown."""
    _, head, body, _ = re.split(r"^[= ]+$", str(failures.__doc__), flags=re.MULTILINE)
    widths = [len(rule) for rule in re.findall(r"=+", str(failures.__doc__))[:3]]
    lines = []
    for line in (*head.strip("\n").splitlines(), *body.strip("\n").splitlines()):
        starts = [sum(widths[:column]) + column for column in range(3)]
        ends = [*(start - 1 for start in starts[1:]), None]
        cells = (line[start:end].strip() for start, end in zip(starts, ends, strict=True))
        cells = (re.sub(r":class:`(\w+)`", r"`\1`", cell).replace("``", "`") for cell in cells)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([lines[0], "|---|---|---|", *lines[1:]])


def listed(page: str) -> set[Promise]:
    """Return the promises in the tables of a page, as Markdown shows them."""
    rows = [re.split(r" \| ", line[2:-2]) for line in page.splitlines() if re.match(r"\| .* \| `tests/", line)]
    return {
        Promise(test.split("`")[1], *(re.sub(r"\\(.)", r"\1", cell) for cell in (text, expected)))
        for text, test, expected, _ in rows
    }


def in_source() -> set[Promise]:
    """Return every promise that a test file makes, without importing it.

    The marker's text and expectation must be literals, and the marker a decorator: either written there, or a name
    that the file assigns the marker to.
    """
    return {promise for path in sorted((ROOT / "tests").rglob("test_*.py")) for promise in _promises_of(path)}


def _promises_of(path: Path) -> Iterator[Promise]:
    source = path.read_text(encoding="utf-8")
    if "mark.promise" not in source:
        return
    tree, name = ast.parse(source), path.relative_to(ROOT)
    named = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and _is_promise(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    calls = sum(_is_promise(node) for node in ast.walk(tree))
    used = list(named.values())
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for decorator in function.decorator_list:
            call = named.get(decorator.id) if isinstance(decorator, ast.Name) else decorator
            if isinstance(call, ast.Call) and _is_promise(call):
                used += [] if call in used else [call]
                values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
                text, expected = (" ".join(values[key].split()) for key in ("text", "expected"))
                yield Promise(f"{name}::{function.name}", text, expected)
    assert len(used) == calls, f"{name}: mark a promise with a decorator, or with a name of the file as decorator"


def _is_promise(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.promise")
