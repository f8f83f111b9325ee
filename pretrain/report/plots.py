"""The report's figures as inline SVG, drawn by matplotlib in placeholder colors that the page's style sheet replaces.

One drawing thus serves light and dark mode: ``_INK`` becomes ``var(--ink)``, and loop r becomes ``var(--loop-r)``. Text
stays text and takes the page's font.

Shapes: N logged steps, R loops.
"""

import html
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from pretrain.report.data import Stage

Drawing = ParamSpec("Drawing")
Points = Sequence[tuple[float, float]]

_INK, _MUTED, _GRID, _PAPER = "#010101", "#010102", "#010103", "#010104"
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)", _PAPER: "var(--paper)"}
_STYLE = Path(__file__).with_name("report.mplstyle")
_DASHED: dict[str, Any] = {"color": _MUTED, "linewidth": 1.0, "linestyle": (0, (3, 3))}
_LEGEND: dict[str, Any] = {"loc": "outside upper left", "ncols": 4, "handlelength": 1.5}
_BESIDE = ((6, 4, "left", "bottom"), (-6, -4, "right", "top"), (6, -4, "left", "top"), (-6, 4, "right", "bottom"))
_ABOVE_BELOW = ((0, 6, "center", "bottom"), (0, -6, "center", "top"))
_CACHE_STYLES: tuple[dict[str, Any], ...] = (
    {"color": _INK, "linestyle": "-", "marker": "o"},
    {"color": _INK, "linestyle": "--", "marker": "s", "markerfacecolor": _PAPER},
    {"color": _MUTED, "linestyle": "-", "marker": "^"},
    {"color": _MUTED, "linestyle": ":", "marker": "v"},
)
_LETTER_WIDTH = 0.018  # of a stage's name, relative to the axes
_MAX_POINTS = 150  # of a curve; more steps are averaged in groups


def loop_colors(loops: int) -> dict[str, list[str]]:
    """Return hex colors of loops 1 to R for each mode, and pale ones for the background of text.

    Viridis has even steps of lightness and is safe for color-blind readers. The deepest loop has the most contrast.
    """
    at_R = np.linspace(0, 1, loops) if loops > 1 else np.ones(1)
    colors = {}
    for mode, place_R, page, strength_R in (
        ("light", 0.78 - 0.72 * at_R, 1.0, 0.24 + 0.26 * at_R),
        ("dark", 0.36 + 0.60 * at_R, 0.1, 0.46 - 0.06 * at_R),
    ):
        rgb = colormaps["viridis"](place_R)[:, :3]
        colors[mode] = [to_hex(row) for row in rgb]
        colors[f"{mode}-pale"] = [to_hex(row) for row in page + (rgb - page) * strength_R[:, None]]
    return colors


def _figure(
    title: str, unit: str, size: tuple[float, float] = (4.4, 2.85)
) -> Callable[[Callable[Concatenate[Axes, Drawing], None]], Callable[Drawing, str]]:
    """Decorate a function that draws on axes, so that it returns the finished <figure>."""

    def decorate(draw: Callable[Concatenate[Axes, Drawing], None]) -> Callable[Drawing, str]:
        @wraps(draw)
        def render(*args: Drawing.args, **kwargs: Drawing.kwargs) -> str:
            text = io.StringIO()
            with rc_context({"svg.hashsalt": title}, fname=_STYLE), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # the mean of NaNs is NaN: a gap in the curve
                figure = Figure(figsize=size, layout="constrained")
                draw(figure.add_subplot(), *args, **kwargs)
                figure.savefig(text, format="svg", transparent=True)
            caption = f"{html.escape(title)} <small>{html.escape(unit)}</small>"
            svg = _embeddable(text.getvalue(), f"{title}, {unit}")
            return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"

        return render

    return decorate


@_figure("Training loss after each loop", "nats per token")
def loss_per_loop(axes: Axes, stages: Sequence[Stage]) -> None:
    """Draw the cross-entropy after each loop; dots are validation at the deepest one."""
    for stage, step_N, offset in _timeline(axes, stages):
        for loop, loss_N in enumerate(stage.train["loss_per_loop"].T, start=1):
            _curve(axes, step_N, loss_N, _loop(loop))
        if stage.valid["step"].size:
            deepest_N = stage.valid["loss_per_loop"][:, -1]
            axes.plot(stage.valid["step"] + offset, deepest_N, "o", color=_INK, markersize=3.5, markerfacecolor=_PAPER)


@_figure("Loss above that of the deepest loop", "nats per token")
def loop_gain(axes: Axes, stages: Sequence[Stage]) -> None:
    """Draw each loop's loss above the deepest loop's; in :func:`loss_per_loop` the curves are too close to tell."""
    for stage, step_N, _ in _timeline(axes, stages):
        loss_NR = stage.train["loss_per_loop"]
        for loop, gain_N in enumerate((loss_NR - loss_NR[:, -1:]).T, start=1):
            _curve(axes, step_N, gain_N, _loop(loop))


@_figure("Where tokens leave, over training", "share of tokens")
def exit_over_training(axes: Axes, stages: Sequence[Stage]) -> None:
    """Draw the gate's exit distribution, stacked from the first loop (bottom) to the last."""
    for stage, all_steps_N, _ in _timeline(axes, stages):
        step_N, share_NR = _thin(all_steps_N, stage.train["exit_distribution"])
        if len(step_N) == 1:
            step_N, share_NR = step_N[0] + np.array([-0.5, 0.5]), share_NR.repeat(2, axis=0)
        colors = [_loop(loop) for loop in range(1, share_NR.shape[1] + 1)]
        axes.stackplot(step_N, np.nan_to_num(share_NR.T), colors=colors, edgecolor=_PAPER, linewidth=0.6)
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))


@_figure("Where tokens leave, at the end", "share of tokens")
def exit_histogram(axes: Axes, distributions: Mapping[str, Sequence[float]]) -> None:
    """Draw bars per loop; the last of several distributions has the full color."""
    count, width = len(distributions), 0.8 / len(distributions)
    for index, (name, share_R) in enumerate(distributions.items(), start=1):
        x = np.arange(1, len(share_R) + 1) + (index - (count + 1) / 2) * width
        alpha = 1.0 if index == count else 0.25 * index
        axes.bar(x, share_R, 0.92 * width, color=[_loop(loop + 1) for loop in range(len(share_R))], alpha=alpha)
        axes.bar(1, 0, color=_INK, alpha=alpha, label=name)  # for the legend only
    for left, share in zip(x - 0.46 * width, share_R, strict=True):  # from the left edge of the last bars into the gap
        axes.annotate(_percent(share), (left, share), (0, 3), textcoords="offset points")
    axes.set_xlabel("loop")
    axes.margins(y=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    axes.grid(axis="x", visible=False)
    axes.figure.legend(**_LEGEND)


@_figure("Validation loss at each depth", "nats per token")
def loss_per_depth(axes: Axes, depths: Points, trained: int) -> None:
    """Draw points (depth, loss), all tokens at one depth, labeled with perplexity; hollow beyond the trained depth."""
    axes.plot(*zip(*depths, strict=True), color=_MUTED, linewidth=1)
    axes.axvline(trained, **_DASHED, zorder=1)
    for depth, loss in depths:
        color = _loop(min(int(depth), trained))
        axes.plot(depth, loss, "o", color=color, markersize=7, markerfacecolor=_PAPER if depth > trained else color)
    axes.plot([], [], "o", color=_loop(trained), label="up to the trained depth")
    axes.plot([], [], "o", color=_loop(trained), markerfacecolor=_PAPER, label="beyond it")
    axes.set_xlabel("depth (loops run)")
    axes.margins(x=0.08, y=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.figure.legend(**_LEGEND)
    _label(axes, depths, [f"{np.exp(loss):.4g}" for _, loss in depths], (*_ABOVE_BELOW, *_BESIDE))


@_figure("Early exit: loss against mean depth", "nats per token")
def exit_curve(axes: Axes, curve: Mapping[tuple[float, float], Sequence[float]], depths: Points) -> None:
    """Draw points (mean depth, loss) labeled with their thresholds; squares, for comparison, are fixed depths."""
    if depths:
        squares: dict[str, Any] = {"color": _MUTED, "linewidth": 0.8, "markersize": 6, "markerfacecolor": _PAPER}
        axes.plot(*zip(*depths, strict=True), "s--", **squares, label="fixed depth")
    axes.plot(*zip(*curve, strict=True), "o-", color=_INK, markersize=5, label="Q-exit at threshold")
    axes.set_xlabel("mean depth (loops run per token)")
    axes.margins(x=0.12, y=0.18)
    axes.figure.legend(**_LEGEND)
    names = [f"{min(q):g}" if len(q) == 1 else f"{min(q):g}–{max(q):g}" for q in curve.values()]
    _label(axes, list(curve), names, (*_BESIDE, *_ABOVE_BELOW), avoid=depths)


@_figure("Loss through each cache", "nats per token")
def cache_curves(axes: Axes, decoding: Mapping[str, Points]) -> None:
    """Draw points (mean depth, loss) of each cache."""
    for (cache, points), style in zip(decoding.items(), cycle(_CACHE_STYLES)):
        axes.plot(*zip(*points, strict=True), **style, markersize=5, label=cache)
    axes.set_xlabel("mean depth (loops run per token)")
    axes.margins(x=0.08, y=0.12)
    axes.figure.legend(**_LEGEND)


def module_norms(stage: Stage) -> dict[str, np.ndarray]:
    """Return the norms [N] of the gradient of each module; an empty dict if the stage has not logged them."""
    prefix = "grad_norms/"
    return {key.removeprefix(prefix): norm_N for key, norm_N in stage.train.items() if key.startswith(prefix)}


@_figure("Gradient of each module", "norm")
def gradient_per_module(axes: Axes, stages: Sequence[Stage]) -> None:
    """Draw the norm of the gradient of each module, before clipping."""
    modules = list(dict.fromkeys(name for stage in stages for name in module_norms(stage)))
    lines = [(color, line) for line in ("-", "--", ":") for color in (_INK, _MUTED)]
    styles = dict(zip(modules, cycle(lines), strict=False))
    for stage, step_N, _ in _timeline(axes, stages):
        for name, norm_N in module_norms(stage).items():
            x, y = _thin(step_N, norm_N)
            axes.plot(x, y, color=styles[name][0], linestyle=styles[name][1], linewidth=1.2)
    for name, (color, line) in styles.items():
        axes.plot([], [], color=color, linestyle=line, label=name)
    axes.set_yscale("log")
    axes.figure.legend(**_LEGEND)


def small_plot(stages: Sequence[Stage], key: str, title: str, unit: str, log: bool = False) -> str:
    """Return a small figure of one scalar of the metrics, or of one value per loop.

    It is drawn over training, or over the validations if only those have it.
    """

    @_figure(title, unit, size=(2.6, 1.7))
    def draw(axes: Axes) -> None:
        for stage, step_N, offset in _timeline(axes, stages, named=False):
            values = stage.train[key]
            if not np.isfinite(values).any() and np.isfinite(stage.valid[key]).any():
                step_N, values = stage.valid["step"] + offset, stage.valid[key]
            if values.ndim == 1:
                _curve(axes, step_N, values, _INK)
            else:
                for loop, value_N in enumerate(values.T, start=1):
                    if np.isfinite(value_N).any():
                        _curve(axes, step_N, value_N, _loop(loop))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=5))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    return draw()


def _embeddable(svg: str, label: str) -> str:
    """Return matplotlib's file as a page element: without header, metadata, size and ids; colors as variables."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (width|height|version|xmlns|xmlns:xlink)="[^"]*"', "", svg, count=5)
    svg = re.sub(r' id="[a-zA-Z.]+_[\d.]+"', "", svg)
    svg = re.sub(r"#0a([0-9a-f]{4})", lambda match: f"var(--loop-{int(match[1], 16)})", svg)
    svg = re.sub(r"#01010[1-4]", lambda match: _VARIABLES[match[0]], svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def _loop(loop: int) -> str:
    return f"#0a{loop:04x}"


def _percent(share: float, _: object = None) -> str:
    return f"{100 * share:.0f} %"


def _timeline(axes: Axes, stages: Sequence[Stage], named: bool = True) -> Iterator[tuple[Stage, np.ndarray, float]]:
    """Yield the stages in sequence, each with the positions of its steps on the axis and the offset that was added."""
    end, rows = 0.0, list[float]()  # rows of names above the axes, each with the position where its last name ends
    whole = sum(stage.train["step"][-1] for stage in stages) * _LETTER_WIDTH
    for stage in stages:
        step_N = stage.train["step"]
        offset = end if step_N[0] <= end else 0.0
        start, previous, end = step_N[0] + offset, end, step_N[-1] + offset
        if previous:
            axes.axvline(start - 0.5, **_DASHED, zorder=3)
        if named and len(stages) > 1:
            row = next((row for row, taken in enumerate(rows) if taken <= start), len(rows))
            rows[row : row + 1] = [start + whole * (len(stage.name) + 1)]
            axes.text(start, 1.02 + 0.09 * row, stage.name, transform=axes.get_xaxis_transform(), color=_MUTED)
        yield stage, step_N + offset, offset
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def _thin(step_N: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most ``_MAX_POINTS`` rows, each the mean of neighbors; values that are not finite are left out."""
    values = np.where(np.isfinite(values), values, np.nan)
    groups = np.array_split(np.arange(len(step_N)), min(len(step_N), _MAX_POINTS))
    return np.array([step_N[rows].mean() for rows in groups]), np.array(
        [np.nanmean(values[rows], 0) for rows in groups]
    )


def _curve(axes: Axes, step_N: np.ndarray, value_N: np.ndarray, color: str) -> None:
    x, y = _thin(step_N, value_N)
    axes.plot(x, y, "o" if len(x) == 1 else "-", color=color, markersize=4)


def _label(
    axes: Axes,
    points: Points,
    names: Sequence[str],
    positions: Sequence[tuple[float, float, str, str]],
    avoid: Points = (),
) -> None:
    """Label each point at the first of ``positions`` (offset, alignment) that is free of marks, labels and the line.

    Skip the label if no position is free.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # fixes the layout, so that boxes have their final positions
    marks = [axes.transData.transform(point) for point in (*points, *avoid)]
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in marks]
    for start, end in pairwise(marks[: len(points)]):
        steps = int(np.hypot(*(end - start)) // 3)
        line = (start + (end - start) * step / max(1, steps) for step in range(steps))
        taken += [Bbox.from_extents(x - 1, y - 1, x + 1, y + 1) for x, y in line]
    for point, name in zip(points, names, strict=True):
        for dx, dy, ha, va in positions:
            label = axes.annotate(name, point, (dx, dy), textcoords="offset points", ha=ha, va=va)
            box = label.get_window_extent().padded(2)
            inside = axes.bbox.x0 <= box.x0 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
            label.remove()
