"""Profiles of hypothesis: a few fixed examples in every test run, and new ones for FUZZ_SECONDS with ``make fuzz``."""

import os
import random
import resource
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.fuzz.outcome import count

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
MEMORY = 1 << 30  # bytes that an input may cost

_COMMON: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", max_examples=25, derandomize=True, **_COMMON)
settings.register_profile("many", max_examples=2000, print_blob=True, **_COMMON)
settings.load_profile("many" if SECONDS else "few")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Repeat a target with new seeds until its share of FUZZ_SECONDS has passed."""
    result = yield
    inner = getattr(pyfuncitem.obj, "hypothesis", None)
    if not SECONDS or inner is None:
        return result
    targets = [item for item in pyfuncitem.session.items if item.path == pyfuncitem.path and _is_target(item)]
    _limit_memory()
    start, first, shown = time.monotonic(), count["examples"], 0.0
    share = SECONDS / len(targets)
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    while (spent := time.monotonic() - start) < share:
        pyfuncitem.obj._hypothesis_internal_use_seed = random.getrandbits(64)
        pyfuncitem.obj(**arguments)
        if spent - shown > 30:
            shown = spent
            _say(f"{pyfuncitem.name}: {spent:.0f} of {share:.0f} s, {count['examples'] - first:,} examples")
    _say(f"{pyfuncitem.name}: done, {share:.0f} s, {count['examples'] - first:,} examples")
    return result


def _is_target(item: pytest.Item) -> bool:
    return hasattr(getattr(item, "obj", None), "hypothesis")


def _limit_memory() -> None:
    """Let an allocation that an input asks for fail beyond MEMORY more than what is in use."""
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, resource.RLIM_INFINITY))


def _say(text: str) -> None:
    print(text, file=sys.__stderr__, flush=True)
