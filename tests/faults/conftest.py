"""Uninterrupted runs to compare with."""

from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

from tests.faults import harness
from tests.faults.layouts import LAYOUTS, STEPS, Reference, config_of


@pytest.fixture(scope="session")
def references(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Return a function that trains without interruption in a layout, once."""

    @cache
    def reference(layout: str) -> Reference:
        config, ranks = config_of(layout, corpus, tmp_path_factory.mktemp("whole") / "run"), LAYOUTS[layout][0]
        harness.complete(config, ranks, harness.killed_at(config, 0, None))
        found = Reference(
            config,
            harness.exact_rows(config.output_dir),
            harness.samples_by_step(config.output_dir),
            [harness.events(config, rank) for rank in range(ranks)],
        )
        assert [row[0] for row in found.rows] == [str(step) for step in range(1, STEPS + 1)]
        assert list(chain.from_iterable(found.samples.values())) == list(range(4 * STEPS)), "each once, in order"
        return found

    return reference
