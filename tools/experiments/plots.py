"""Plots of an experiment as SVG files of their own: the same rows give the same bytes.

Arms differ in color and marker; the colors are those of Okabe and Ito, which color-blind readers can tell apart.

Shapes: N seeds, P positions of a curve, R depths.
"""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import count, cycle, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from tools.experiments.rows import Arm, Row, positions_name
from tools.experiments.statistics import estimate, t_half_width
from tools.experiments.worth import Worth

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX*"
_STYLE = Path(__file__).with_suffix(".mplstyle")
_MAX_MARKED = 20  # positions up to which a curve has a marker at each


def figure_by_arm(figure: str, arms: Mapping[str, Arm]) -> str:
    """Draw a figure for each arm: a dot per seed, and beside the dots the mean with its 95 % interval."""
    plot, axes = _new(height=1.2 + 0.42 * len(arms))
    names = list[str]()
    for place, (arm, style) in enumerate(zip(arms.values(), _styles(), strict=False)):
        values = list(arm.values(figure).values())
        value_N = np.array([value for value in values if np.isfinite(value)])
        lost = len(values) - len(value_N)
        names.append(f"{arm.name}\n({lost} not finite)" if lost else arm.name)
        offset_N = np.linspace(-0.12, 0.12, len(value_N)) if len(value_N) > 1 else np.zeros(len(value_N))
        axes.plot(value_N, place + offset_N, **style, linestyle="", markersize=4, alpha=0.6)
        if len(value_N) > 1 and not lost:
            found = estimate(value_N)
            axes.plot(found.interval, [place + 0.27] * 2, color=style["color"], linewidth=1.6)
            axes.plot(found.mean, place + 0.27, "|", color=style["color"], markersize=9, markeredgewidth=2)
    axes.set_yticks(range(len(arms)), names)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{figure}: seeds, mean, 95 % interval")
    return _svg(plot, figure)


def curve_by_arm(curve: str, arms: Mapping[str, Arm]) -> str:
    """Draw a curve of each arm that has it: the mean over seeds, and a band for the 95 % interval at each position.

    An arm whose seeds have different positions gets a thin line per seed.
    """
    plot, axes = _new(height=3.2 + 0.2 * max(0, len(arms) // 4 - 3))  # the legend takes a line for four arms
    for arm, style in zip(arms.values(), _styles(), strict=False):
        rows = [row for row in arm.rows.values() if curve in row.curves]
        if not rows:
            continue
        positions = {row.positions(curve) for row in rows}
        if len(positions) > 1:
            for row in rows:
                axes.plot(row.positions(curve), row.curves[curve], color=style["color"], linewidth=0.7)
            axes.plot([], [], color=style["color"], label=f"{arm.name} (each seed)")
            continue
        lost = sum(row.diverged for row in arm.rows.values())
        name = f"{arm.name} ({lost} diverged)" if lost else arm.name
        _band(axes, np.array(positions.pop()), np.array([row.curves[curve] for row in rows]), style, name)
    key = positions_name(curve).rpartition(".")[2].removesuffix("s")
    axes.set_xlabel(key)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylabel(curve.rpartition(" by ")[0])
    plot.legend(loc="outside upper left", ncols=4, handlelength=1.5, frameon=False)
    return _svg(plot, curve)


def map_by_depth(figure: str, arm: Arm) -> str | None:
    """Draw a share by level, at each number of loops, as a color: where more loops solve harder levels, it has stairs.

    Values are means over seeds. Depths above the line were never trained. Return None for fewer than two depths or
    levels, and for seeds whose levels or depths differ.
    """
    names, rows = _depth_curves(figure, arm), list(arm.rows.values())
    if len(names) < 2 or len({row.positions(name) for row in rows for name in names}) > 1:
        return None
    level_P = rows[0].positions(names[0])
    value_RP = np.mean([[row.curves[name] for name in names] for row in rows], axis=0)
    if len(level_P) < 2:
        return None
    plot, axes = _new(height=1.4 + 0.18 * len(names))
    drawn = axes.pcolormesh(value_RP, vmin=0, vmax=1, cmap="cividis", edgecolors="face")
    trained = len(rows[0].curves.get(f"{figure.partition('.')[0]}.exit probability by depth", ()))
    if 0 < trained < len(names):
        axes.axhline(trained, color="white", linewidth=1.5)
    axes.set_xticks(np.arange(len(level_P)) + 0.5, [f"{level:g}" for level in level_P])
    axes.set_yticks(np.arange(len(names)) + 0.5, [str(depth) for depth in range(1, len(names) + 1)])
    axes.tick_params(length=0, labelsize="small")
    axes.grid(visible=False)
    axes.set_xlabel("level")
    axes.set_ylabel("loops")
    seeds = f"mean of {len(rows)} seeds" if len(rows) > 1 else "one seed"
    axes.set_title(f"{figure} of {arm.name}, {seeds}", loc="left", fontsize="medium")
    plot.colorbar(drawn)
    return _svg(plot, f"{figure} by level and depth")


def loss_by_worth(figure: str, worths: Sequence[Worth]) -> str:
    """Draw losses by effective parameters, a line per series and number of loops: where the law holds, lines meet."""
    plot, axes = _new(height=3.2)
    for worth, style in zip(worths, _styles(), strict=False):
        if worth.phi is None:
            continue
        for loops, marker in zip(sorted({at.loops for at in worth.layers}), _MARKERS, strict=False):
            points = sorted(
                (at.effective(worth.phi.mean), loss)
                for at, loss in zip(worth.layers, worth.losses, strict=True)
                if at.loops == loops
            )
            label = f"{worth.series}, {loops} loop{'s' * (loops > 1)}"
            axes.plot(*zip(*points, strict=True), marker=marker, color=style["color"], linewidth=0.8, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("effective parameters of the layers")
    axes.set_ylabel(figure)
    plot.legend(loc="outside upper left", ncols=3, handlelength=1.5, frameon=False)
    return _svg(plot, f"{figure} by worth")


def _depth_curves(figure: str, arm: Arm) -> list[str]:
    """Return the names of a figure's curves by level, at 1, 2, ... loops, that all seeds of an arm have."""
    names = (f"{figure}@depth={depth} by level" for depth in count(1))
    return list(takewhile(lambda name: all(name in row.curves for row in arm.rows.values()), names))


def curves_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of all curves, without their positions, in alphabetical order."""
    return sorted({name for row in rows for name in row.curves if " by " in name})


def file_name(experiment: str, plot: str) -> str:
    """Return the name of a plot's file: "EXPERIMENT-test.accuracy-by-level.svg"."""
    return f"{experiment}-{re.sub(r'[^A-Za-z0-9._=@]+', '-', plot).strip('-')}.svg"


def _band(axes: Axes, position_P: np.ndarray, value_NP: np.ndarray, style: Mapping[str, Any], name: str) -> None:
    """Draw a mean over seeds and its interval; positions where a seed is not finite are a gap."""
    whole_P = np.isfinite(value_NP).all(axis=0)
    mean_P = np.where(whole_P, np.nan_to_num(value_NP).mean(axis=0), np.nan)
    marked = {**style} if len(position_P) <= _MAX_MARKED else {"color": style["color"]}
    axes.plot(position_P, mean_P, **marked, markersize=4, linewidth=1.5, label=name)
    if len(value_NP) > 1:
        half_P = t_half_width(np.nan_to_num(value_NP))  # Student's alone: a bootstrap at every position takes minutes
        axes.fill_between(position_P, mean_P - half_P, mean_P + half_P, color=style["color"], alpha=0.15, linewidth=0)


def _new(height: float) -> tuple[Figure, Axes]:
    with rc_context(fname=_STYLE):
        plot = Figure(figsize=(6.4, height), layout="constrained")
        return plot, plot.add_subplot()


def _styles() -> "cycle[dict[str, Any]]":
    pairs = zip(_COLORS * len(_MARKERS), _MARKERS * len(_COLORS), strict=True)  # 7 colors and 8 markers: 56 styles
    return cycle([{"color": color, "marker": marker} for color, marker in pairs])


def _svg(plot: Figure, title: str) -> str:
    text = io.StringIO()
    for words in plot.findobj(Text):
        words.set_parse_math(False)  # a name may hold dollars
    with rc_context({"svg.hashsalt": title}, fname=_STYLE):
        plot.savefig(text, format="svg", metadata={"Date": None, "Title": title})
    return text.getvalue()
