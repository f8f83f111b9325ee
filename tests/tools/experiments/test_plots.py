"""Plots of an experiment: what they draw, and that the same rows give the same bytes."""

import math
import re
from xml.etree import ElementTree

import pytest

from tests.support.experiments import ACCURACY, a_row, some_rows
from tools.experiments.plots import curve_by_arm, curves_of, figure_by_arm, file_name, map_by_depth
from tools.experiments.rows import arms_of

ARMS = arms_of(some_rows())
SVG = "{http://www.w3.org/2000/svg}"


def words(svg: str) -> set[str]:
    return {"".join(text.itertext()).strip() for text in ElementTree.fromstring(svg).iter(f"{SVG}text")}


def uses(svg: str) -> dict[str, int]:
    """Return how often each marker is drawn."""
    found = re.findall(r'<use xlink:href="#(\w+)"', svg)
    return {name: found.count(name) for name in found}


def test_every_seed_is_a_dot():
    svg = figure_by_arm("test.accuracy", ARMS)
    dots = [len(values) - (arm == "deep") for arm, values in ACCURACY.items()]
    drawn = sorted(uses(svg).values())
    for number in dots:
        assert number in drawn
    assert {"once", "looped", "deep", "test.accuracy: seeds, mean, 95 % interval"} <= words(svg)


def test_a_seed_that_is_not_finite_is_told_and_takes_the_interval_away():
    values = [0.5, math.nan, 0.6]
    arms = arms_of([a_row(seed=seed, figures={"f": value}) for seed, value in enumerate(values)])
    assert any("1 not finite" in word for word in words(figure_by_arm("f", arms)))
    one = arms_of([a_row(figures={"f": 0.5})])
    assert "looped" in words(figure_by_arm("f", one))


def test_a_curve_has_a_line_per_arm_and_a_band():
    svg = curve_by_arm("test.accuracy by level", ARMS)
    assert {"once", "looped", "deep", "level", "test.accuracy"} <= words(svg)
    assert len(re.findall(r'id="(?:Fill|Poly)\w*Collection', svg)) == 3
    alone = arms_of([row for row in some_rows() if row.seed == 0 and row.trial == "final"])
    assert "Collection" not in curve_by_arm("test.accuracy by level", alone), "one seed has no interval"


def test_a_curve_says_how_many_seeds_it_lacks():
    rows = [a_row(seed=0, curves={"loss by depth": (3.0, 2.0)}), a_row(seed=1, figures={}, diverged=True)]
    assert "looped (1 diverged)" in words(curve_by_arm("loss by depth", arms_of(rows)))


def test_a_name_with_dollars_is_a_name():
    rows = [a_row(arm="cost_$5_or_$6", curves={"loss by depth": (3.0, 2.0)})]
    assert "cost_$5_or_$6" in words(curve_by_arm("loss by depth", arms_of(rows)))


def test_seeds_with_other_positions_are_lines_of_their_own():
    rows = [
        a_row(seed=seed, curves={"steps": (1.0, 2.0 + seed), "loss by step": (3.0, math.nan if seed else 2.0)})
        for seed in range(2)
    ]
    svg = curve_by_arm("loss by step", arms_of(rows))
    assert {"looped (each seed)", "step", "loss"} <= words(svg) and "Collection" not in svg


@pytest.mark.parametrize(
    "draw",
    [lambda arms: figure_by_arm("test.accuracy", arms), lambda arms: curve_by_arm("test.accuracy by level", arms)],
)
def test_the_same_rows_give_the_same_bytes_in_any_order(draw):
    assert draw(ARMS) == draw(arms_of(some_rows()[::-1]))


def test_curves_are_those_with_an_axis():
    assert curves_of(some_rows()) == ["test.accuracy by depth", "test.accuracy by level"]


def test_file_names_have_no_odd_letters():
    assert file_name("words", "test.accuracy@depth=2") == "words-test.accuracy@depth=2.svg"
    assert file_name("words", "exit depth by level/é") == "words-exit-depth-by-level.svg"


def staircase(depths: int, levels: tuple[float, ...] = (1.0, 2.0, 3.0)) -> dict[str, tuple[float, ...]]:
    """Return curves of a model that is right up to level r after r loops, and was trained with two."""
    curves = {"test.levels": levels, "test.exit probability by depth": (0.5, 0.5)}
    names = (f"test.accuracy@depth={depth} by level" for depth in range(1, depths + 1))
    return curves | {name: tuple(float(level <= r) for level in levels) for r, name in enumerate(names, start=1)}


def test_a_map_has_a_cell_for_each_depth_and_level_and_a_line_at_the_trained_depth():
    rows = [a_row(seed=seed, curves=staircase(3)) for seed in range(2)]
    svg = map_by_depth("test.accuracy", arms_of(rows)["looped"])
    assert svg is not None
    assert {"1", "2", "3", "level", "loops", "test.accuracy of looped, mean of 2 seeds"} <= words(svg)
    cells = re.search(r'<g id="QuadMesh_1">(.*?)</g>', svg, re.DOTALL)
    assert cells is not None
    colors = re.findall(r"fill: (#\w+)", cells[1])
    assert len(colors) == 9 and len(set(colors)) == 2
    dark = [color == colors[0] for color in colors]
    assert dark == [True, False, False, True, True, False, True, True, True], "a staircase, from one loop up"
    assert svg.count("stroke: #ffffff") == 1
    edges = sorted({float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", cells[1])})
    line = re.search(r'd="M [\d.]+ ([\d.]+) [^"]*"[^>]*stroke: #ffffff', svg)
    assert line is not None and len(edges) == 4
    assert float(line[1]) == pytest.approx(edges[1], abs=1e-3), "above two of three depths; y goes down"
    whole = map_by_depth("test.accuracy", arms_of([a_row(curves=staircase(2))])["looped"])
    assert whole is not None and "stroke: #ffffff" not in whole
    alone = map_by_depth("test.accuracy", arms_of(rows[:1])["looped"])
    assert alone is not None and "test.accuracy of looped, one seed" in words(alone)


def test_without_two_depths_or_levels_alike_there_is_no_map():
    without = [staircase(1)], [staircase(3, (1.0,))], [staircase(3), staircase(3, (1.0, 2.0, 4.0))], [staircase(0)]
    for curves in without:
        rows = [a_row(seed=seed, curves=one) for seed, one in enumerate(curves)]
        assert map_by_depth("test.accuracy", arms_of(rows)["looped"]) is None
