"""Training steps and evaluation of packed documents make no tensor as large as an attention mask."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest

from looplm.config import ParallelConfig
from tests.support import worker
from tests.support.launch import launch
from tests.support.tiny import MODEL, run_config

LENGTH = 512
LAYOUTS = {
    "alone": ParallelConfig(),
    "alone, full": ParallelConfig(recompute="full"),
    "CP2": ParallelConfig(context=2),
    "PP2, loop": ParallelConfig(pipeline=2, recompute="loop"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tensor_is_as_large_as_a_mask(layout: str, corpus: Path, tmp_path: Path) -> None:
    parallel = LAYOUTS[layout]
    data = {"seq_length": LENGTH, "micro_batch_size": 1, "global_batch_size": 2}
    model = dataclasses.replace(MODEL, max_sequence_length=LENGTH)
    config = run_config(corpus, tmp_path / "run", data=data, model=model, parallel=parallel)
    launch(parallel.model_ranks, [partial(worker.find_largest_tensor, config, tmp_path / "sizes")], tmp_path)
    sizes = [int(path.read_text()) for path in (tmp_path / "sizes").iterdir()]
    assert len(sizes) == parallel.model_ranks
    assert 0 < max(sizes) < LENGTH * LENGTH // parallel.context
