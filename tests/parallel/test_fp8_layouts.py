"""Emulated FP8 under tensor parallelism: each rank rounds its own operands, as Transformer Engine does."""

import dataclasses
from functools import partial

import pytest
import torch

from looplm.config import EngineConfig, ParallelConfig, Recipe
from tests.support import worker
from tests.support.fp8_reference import FORMATS, products, under_scale
from tests.support.launch import launch
from tests.support.parity import assert_close_relative
from tests.support.tiny import MODEL, run_config

pytestmark = pytest.mark.slow
MHA = dataclasses.replace(MODEL, attention="mha")
LAYOUTS = {"sequence": ParallelConfig(tensor=2), "no sequence": ParallelConfig(tensor=2, sequence=False)}
RECIPES: tuple[Recipe, ...] = ("tensorwise", "delayed")


@pytest.fixture(scope="module")
def results(corpus, tmp_path_factory):
    """Return what each rank saved, by layout and recipe."""
    folder = tmp_path_factory.mktemp("fp8")
    jobs = []
    for layout, parallel in LAYOUTS.items():
        for recipe in RECIPES:
            engine = EngineConfig(fp8="emulate-hybrid", fp8_recipe=recipe)
            config = run_config(corpus, folder / "run", model=MHA, parallel=parallel, engine=engine)
            jobs.append(partial(worker.run_fp8_linears, config, folder / layout / recipe))
    launch(2, jobs, folder)
    return {
        (layout, recipe): [torch.load(folder / layout / recipe / f"rank{rank}.pt") for rank in range(2)]
        for layout in LAYOUTS
        for recipe in RECIPES
    }


def linear(x, weight, g, recipe, every):
    """Return one rank's products; ``every`` holds the operands of all ranks, which share delayed scaling's scales."""
    if recipe == "tensorwise":
        return products(x, weight, g, "tensorwise", "e5m2")
    formats = {"x": "e4m3", "weight": "e4m3", "g": "e5m2"}
    scale = {key: FORMATS[name][2] / max(float(t.abs().max()) for t in every[key]) for key, name in formats.items()}
    x, weight, g = (under_scale(t, formats[key], scale[key]) for key, t in zip(formats, (x, weight, g), strict=True))
    return {"y": x @ weight.T, "dx": g @ weight, "dW": g.T @ x}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_column_parallel_linear_equals_the_definitions(layout, recipe, results):
    ranks = [rank["column"] for rank in results[layout, recipe]]
    gathers = layout == "sequence"
    # In a model without sequence parallelism both ranks have the same x. Different x show what each rank uses.
    x = [torch.cat([rank["x"] for rank in ranks]) if gathers else rank["x"] for rank in ranks]
    x = [part.flatten(0, 1) for part in x]
    every = {"x": x, "weight": [rank["weight"] for rank in ranks], "g": [rank["g"] for rank in ranks]}
    theirs = [
        linear(part, rank["weight"], rank["g"].flatten(0, 1), recipe, every)
        for part, rank in zip(x, ranks, strict=True)
    ]
    dx = sum(one["dx"] for one in theirs)
    for number, (rank, one) in enumerate(zip(ranks, theirs, strict=True)):
        own = dx.chunk(2)[number] if gathers else dx
        expected = {"y": one["y"], "dW": one["dW"], "dx": own}
        found = {"y": rank["y"].flatten(0, 1), "dW": rank["dW"], "dx": rank["dx"].flatten(0, 1)}
        assert_close_relative(found, expected)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_parallel_linear_equals_the_definitions(layout, recipe, results):
    ranks = [rank["row"] for rank in results[layout, recipe]]
    gathers = layout == "sequence"
    g = [torch.cat([rank["g"] for rank in ranks]) if gathers else rank["g"] for rank in ranks]
    g = [part.flatten(0, 1) for part in g]
    every = {"x": [rank["x"] for rank in ranks], "weight": [rank["weight"] for rank in ranks], "g": g}
    theirs = [
        linear(rank["x"].flatten(0, 1), rank["weight"], part, recipe, every)
        for part, rank in zip(g, ranks, strict=True)
    ]
    y = sum(one["y"] for one in theirs)
    for number, (rank, one) in enumerate(zip(ranks, theirs, strict=True)):
        own = y.chunk(2)[number] if gathers else y
        expected = {"y": own, "dW": one["dW"], "dx": one["dx"]}
        found = {"y": rank["y"].flatten(0, 1), "dW": rank["dW"], "dx": rank["dx"].flatten(0, 1)}
        assert_close_relative(found, expected)
