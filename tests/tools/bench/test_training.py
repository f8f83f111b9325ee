"""The bench of training and of storage, on shapes that take seconds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from looplm.config import RunConfig
from looplm.model import LoopLM
from tests.support.tiny import run_config
from tools.bench import storage, training
from tools.bench.new_process import in_new_process
from tools.bench.training import in_precision, peak_bytes, recomputing, small_recipe, tiny_recipe

pytestmark = pytest.mark.slow  # it trains and starts processes

resized = training._resized


@pytest.fixture
def recipe(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Return a recipe whose resized shapes are small."""

    def smaller(recipe: RunConfig, batch: tuple[int, int], **model: Any) -> RunConfig:
        sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 1, "num_attention_heads": 2}
        return resized(recipe, (1, min(batch[1], 2048)), **{**model, **sizes})

    monkeypatch.setattr(training, "_resized", smaller)
    return run_config(corpus, tmp_path, data={"global_batch_size": 2})


def test_the_shapes_are_those_that_the_figures_name(corpus, tmp_path, single_process) -> None:
    recipe = run_config(corpus, tmp_path)
    small, tiny = small_recipe(recipe), tiny_recipe(recipe)
    assert sum(p.numel() for p in LoopLM(small.model, small.gate, single_process).parameters()) / 1e6 == pytest.approx(
        44.4, abs=0.1
    )
    assert (small.model.attention, small.model.num_loops, small.data.micro_batch_size) == ("mha", 4, 2)
    assert (tiny.model.num_layers, tiny.data.micro_batch_size, tiny.data.seq_length) == (1, 128, 16)
    assert in_precision(small, "bf16").optim.precision == "bf16"
    assert recomputing(small, "loop").parallel.recompute == "loop"


def test_every_figure_of_training_is_yielded(recipe, single_process, monkeypatch, capsys) -> None:
    def here(function, *arguments):
        if function is peak_bytes:
            return 2 << 20 if arguments[0] in (None, "none") else 1 << 20
        section, config, repeats = arguments
        return list(training.SECTIONS[section](config, single_process, repeats))

    monkeypatch.setattr(training, "in_new_process", here)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    figures = list(training.bench_training(recipe, 1))
    assert all(figure.value > 0 for figure in figures)
    names = [figure.name for figure in figures]
    assert len(names) == len(set(names)) >= 11
    by_name = {figure.name: figure.value for figure in figures}
    assert by_name["small model: peak memory of ours with recompute: loop / plain"] == 0.5
    assert by_name["kept for backward with recompute: loop, 3 loops / one"] < 2
    assert "ours, recompute: loop" in capsys.readouterr().out


def test_memory_is_measured_in_a_process_of_its_own(recipe, corpus, tmp_path) -> None:
    recipe = resized(run_config(corpus, tmp_path), (2, 256), vocab_size=16_384)
    plain, ours = (in_new_process(peak_bytes, mode, recipe) for mode in (None, "none"))
    assert plain > 3 * 512 * 16_384 * 4 > 0, "three loops' logits at least"
    assert 0 < ours < plain


def test_rates_of_data_and_checkpoints(recipe, capsys) -> None:
    figures = list(storage.bench_storage(recipe, 1, text=50_000))
    assert [figure.aim for figure in figures] == [0.9, 0.8, 0.8] and all(figure.value > 0 for figure in figures)
    assert "MB of weights" in capsys.readouterr().out
