"""The page of a report: its sections as HTML, around the figures of plots.py."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from looplm.accounting import parameter_counts
from looplm.bounds import require
from looplm.config.model import MAX_DEPTH
from looplm.evaluation.record import FILE_NAME, CacheLoss, Evaluation
from looplm.failures import UserError
from pretrain.report import plots
from pretrain.report.data import Conversion, Sample, Stage, read_conversions, read_samples, read_stages
from pretrain.stage_jumps import find_jumps, table

TAIL_STEPS = 10  # averaged for the value at the end of a stage
LAST_STAGES = 3  # whose exits are drawn as bars; a tile does not list more stages than this
SAMPLE_SETTINGS = ("temperature", "top_k", "top_p", "exit_threshold", "depth", "kv_cache", "seed")
SMALL_PLOTS = (
    ("learning_rate", "Learning rate", ""),
    ("grad_norm", "Gradient", "norm"),
    ("tokens_per_second", "Speed", "tokens/s"),
    ("mean_depth", "Mean depth", "loops"),
    ("hidden_rms", "Hidden state after each loop, before its norm", "rms"),
    ("hidden_grad_norm", "Gradient of each loop's hidden state", "norm"),
    ("hidden_cosine", "Hidden state of each loop and of the one before", "cosine"),
    ("loop_radius", "Spectral radius of each loop, in validations", ""),
    ("attention_sink", "Attention on the first token, in validations", "share"),
)


def build_page(run: Path) -> str:
    """Return the page's HTML. What the run does not have (yet) is left out, with a note.

    Raises:
        UserError: there is nothing to report on, or a file is malformed.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such directory; give the directory of a run, such as runs/quickstart")
    stages = read_stages(run)
    evaluation = _read_evaluation(run / FILE_NAME) if (run / FILE_NAME).is_file() else None
    samples = read_samples(run / "samples.jsonl")
    if not (stages or evaluation or samples):
        raise UserError(
            f"{run}: no metrics.jsonl, evaluation.json or samples.jsonl in it; train something into it first"
        )
    trained = [stage.loops for stage in stages] + ([evaluation.trained_loops] if evaluation else [])
    deepest = max([1, *trained, *(depth for sample in samples for _, depth in sample.tokens)])
    loops = max(trained, default=deepest)

    body = [_headline(stages, evaluation), *_notes(stages, evaluation, samples)]
    if conversions := read_conversions(run):
        body += _conversions(conversions)
    if len(stages) > 1:
        body += _stages(stages)
    if stages:
        body += _training(stages, loops)
    if trained and loops > 1:
        body += _exits(stages, evaluation)
    if evaluation:
        body += _depths(evaluation)
    if evaluation and evaluation.decoding:
        body += _caches(evaluation.decoding)
    if samples:
        body += _sample_text(samples, deepest)
    body += _configs(stages)

    lines, text = plots.loop_colors(loops), plots.loop_colors(deepest)
    page = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(run.resolve().name),
        body="\n".join(body),
        light=_variables("loop", lines["light"]) + _variables("pale", text["light-pale"]),
        dark=_variables("loop", lines["dark"]) + _variables("pale", text["dark-pale"]),
    )


def _read_evaluation(path: Path) -> Evaluation:
    evaluation = Evaluation.read(path)
    fix = f"give a number from 1 to {MAX_DEPTH:,}, or run pretrain.evaluate again"
    found = [("trained_loops", evaluation.trained_loops), *(("depths[].depth", row.depth) for row in evaluation.depths)]
    for key, depth in found:
        require(1 <= depth <= MAX_DEPTH, f"{path}: {key}", depth, fix)
    return evaluation


def _headline(stages: Sequence[Stage], evaluation: Evaluation | None) -> str:
    """Return the tiles at the top: a name, a figure, and what it refers to."""
    tiles = []
    if stages:
        loss_N = stages[0].train["loss_per_loop"][:, -1]
        loss_N = loss_N[np.isfinite(loss_N)] if np.isfinite(loss_N).any() else loss_N  # steps that ran all loops
        start, end = loss_N[0], _at_end(loss_N)
        change = f"{'fell' if end <= start else 'rose'} by {abs(start - end):.2f} nats"
        tiles.append(("Training loss", f"{start:.2f} → {end:.2f}", f"{change} at the deepest loop, {stages[0].name}"))
    if evaluation:
        deepest = evaluation.trained_loops
        tiles += [
            ("Validation loss", f"{row.loss:.3f}", f"perplexity {np.exp(row.loss):.4g} at depth {row.depth}")
            for row in evaluation.depths
            if row.depth == deepest
        ]
        mean = np.dot(evaluation.exit_distribution, range(1, len(evaluation.exit_distribution) + 1))
        tiles.append(("Mean depth", f"{mean:.2f}", f"of {deepest} in training, as the gate decides"))
    if runs := [stage.run for stage in stages if stage.run is not None]:
        count = sum(parameter_counts(runs[-1].model, runs[-1].gate).values())
        tiles.append(("Parameters", _short(count), "shared by all loops"))
    tokens = _tokens(stages)
    seconds = {stage.name: float(np.nansum(stage.train["seconds"])) for stage in stages}
    for title, totals, form in (("Tokens seen", tokens, _short), ("Training time", seconds, _duration)):
        if 0 < sum(totals.values()) < np.inf:
            terms = " + ".join(f"{name} {form(total)}" for name, total in totals.items())
            terms = terms if len(totals) <= LAST_STAGES else f"in {len(totals)} stages"
            tiles.append((title, form(sum(totals.values())), terms))
    texts = (tuple(map(escape, tile)) for tile in tiles)
    cells = (f"<div><small>{name}</small><b>{figure}</b><small>{about}</small></div>" for name, figure, about in texts)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _tokens(stages: Sequence[Stage]) -> dict[str, float]:
    """Return the tokens that each stage trained on. One that resumes a converted run counts that run's tokens on."""
    tokens, before = dict[str, float](), (np.inf, 0.0)
    for stage in stages:
        counted = float(np.nanmax(stage.train["tokens"], initial=0))
        resumes = stage.train["step"][0] > before[0] and stage.train["tokens"][0] > before[1]
        tokens[stage.name] = counted - (before[1] if resumes else 0.0)
        before = stage.train["step"][-1], counted
    return tokens


def _notes(stages: Sequence[Stage], evaluation: Evaluation | None, samples: Sequence[Sample]) -> list[str]:
    """Return notes on missing files and on losses that are not finite."""
    notes = []
    if not stages:
        notes.append("No training metrics here: pretrain.train writes them.")
    if evaluation is None:
        notes.append("No evaluation.json here: pretrain.evaluate writes it.")
    if not samples:
        notes.append("No samples.jsonl here: looplm.generate writes it.")
    for stage in stages:
        ran_NR = stage.train["exit_distribution"] != 0  # no token leaves after a loop that the step did not run
        bad = int((~np.isfinite(stage.train["loss_per_loop"]) & ran_NR).any(axis=1).sum())
        if bad:
            steps = f"{bad} of {len(stage.train['step'])} logged steps"
            notes.append(f"{stage.name}: {steps} have a loss that is not finite; the curves leave them out.")
    return [f'<p class="note">{escape(note)}</p>' for note in notes]


def _conversions(conversions: Sequence[Conversion]) -> list[str]:
    """Return a table with a row per converted model."""
    heads = ("model", "made by", "from", "layers", "cached numbers", "loss of the source", "loss after each loop")
    rows = []
    for one in conversions:
        before = "" if one.loss_before is None else f"{one.loss_before:.4f}"
        after = "" if one.loss_after is None else " ".join(f"{loss:.4f}" for loss in one.loss_after)
        cached = f"{one.model.attention_widths.cached:,}"
        rows.append((one.name, one.kind, one.source, one.model.depth_summary, cached, before, after))
    return [
        "<h2>Conversions</h2><p>Models made from others, before any training. Cached numbers: of one token in one "
        "layer.</p>",
        *_table(heads, rows),
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return [
        f'<div class="table"><table><tr>{"".join(f"<th>{escape(head)}</th>" for head in heads)}</tr>',
        *(f"<tr>{row}</tr>" for row in cells),
        "</table></div>",
    ]


def _stages(stages: Sequence[Stage]) -> list[str]:
    """Return a table with a row per stage."""
    heads, *rows = table(stages, find_jumps(stages))
    return [
        "<h2>Stages</h2><p>Each stage starts from the previous stage's checkpoint. Loss: at the deepest loop, over the "
        "last steps. Jump: how far the first steps of a stage rise above the last of the previous one, at a loop that "
        "both run; * with other data.</p>",
        *_table(heads, rows),
    ]


def _training(stages: Sequence[Stage], loops: int) -> list[str]:
    small = [
        plots.small_plot(stages, key, title, unit, log=unit in ("norm", "rms"))
        for key, title, unit in SMALL_PLOTS
        if any(np.isfinite(columns[key]).any() for stage in stages for columns in (stage.train, stage.valid))
    ]
    return [
        "<h2>Training</h2><p>Every loop runs the same weights again. Open dots: validation at the deepest loop.</p>",
        _legend("loop", loops),
        _grid("plots", plots.loss_per_loop(stages), plots.loop_gain(stages) if loops > 1 else ""),
        _grid("small", *small),
        _grid("plots", plots.gradient_per_module(stages)) if any(map(plots.module_norms, stages)) else "",
    ]


def _exits(stages: Sequence[Stage], evaluation: Evaluation | None) -> list[str]:
    last = stages[-LAST_STAGES:]
    ends = {stage.name: [_at_end(share_N) for share_N in stage.train["exit_distribution"].T] for stage in last}
    if evaluation:
        ends["validation"] = list(evaluation.exit_distribution)
    return [
        "<h2>Exits</h2><p>The gate gives each token a probability of leaving after each loop.</p>",
        _grid("plots", plots.exit_over_training(stages) if stages else "", plots.exit_histogram(ends)),
    ]


def _depths(evaluation: Evaluation) -> list[str]:
    points = [(row.depth, row.loss) for row in evaluation.depths if _can_be_drawn(row.loss)]
    trained = [(depth, loss) for depth, loss in points if depth <= evaluation.trained_loops]
    thresholds: dict[tuple[float, float], list[float]] = {}  # by the point that they share
    read = ", ".join(Path(source).name for source in evaluation.data)
    for row in evaluation.exit_curve:
        if _can_be_drawn(row.mean_depth) and _can_be_drawn(row.loss):
            thresholds.setdefault((round(row.mean_depth, 3), round(row.loss, 5)), []).append(row.threshold)
    return [
        "<h2>Depth</h2><p>At each depth: all tokens run that many loops; the numbers are perplexities. Early exit: "
        "a token leaves once its summed exit probability reaches the threshold; the numbers are thresholds."
        f"{escape(f' Measured on {read}.') if read else ''}</p>",
        _grid(
            "plots",
            plots.loss_per_depth(points, evaluation.trained_loops) if points else "",
            plots.exit_curve(thresholds, trained) if thresholds else "",
        ),
    ]


def _can_be_drawn(value: float) -> bool:
    """Return False for the loss of a diverged model, and for numbers that no float32 holds."""
    return abs(value) <= float(np.finfo(np.float32).max)


def _caches(rows: Sequence[CacheLoss]) -> list[str]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: (row.mean_depth, row.loss)):
        if _can_be_drawn(row.mean_depth) and _can_be_drawn(row.loss):
            curves.setdefault(row.kv_cache, []).append((row.mean_depth, row.loss))
    return [
        "<h2>Caches</h2><p>Loss of text that is decoded token by token: with a cache for each loop, or with one that "
        "all loops share. At the deepest point of each, tokens run all loops; at the others, they leave early.</p>",
        _grid("plots", plots.cache_curves(curves)),
    ]


def _sample_text(samples: Sequence[Sample], deepest: int) -> list[str]:
    """Return prompts in gray, and each generated token on the color of its depth."""
    sections = [
        "<h2>Sample text</h2><p>Color: how many loops a token ran. Gray: the prompt.</p>",
        _legend("pale", deepest),
    ]
    for sample in samples:
        spans = "".join(_token(text, depth) for text, depth in sample.tokens)
        mean = np.mean([depth for _, depth in sample.tokens]) if sample.tokens else np.nan
        settings = [(key, sample.settings.get(key)) for key in SAMPLE_SETTINGS]
        facts = [f"mean depth {mean:.2f}", *(f"{key} {value}" for key, value in settings if value is not None)]
        text = f'<div class="text"><q>{escape(sample.prompt)}</q>{spans}</div>'
        sections.append(f'<div class="sample">{text}<p>{escape(" · ".join(facts))}</p></div>')
    return sections


def _token(text: str, depth: int) -> str:
    newline = ' class="nl"' if text.startswith("\n") else ""
    return f'<span{newline} style="--c:var(--pale-{depth})" title="depth {depth}">{escape(text)}</span>'


def _configs(stages: Sequence[Stage]) -> list[str]:
    files = [(f"{stage.name}/config.yaml", stage.config) for stage in stages if stage.config]
    heading = ["<h2>Configuration</h2>"] if files else []
    return heading + [f"<details><summary>{escape(a)}</summary><pre>{escape(b)}</pre></details>" for a, b in files]


def _legend(color: str, loops: int) -> str:
    names = ((loop, f"{'loop' if color == 'loop' else 'depth'} {loop}") for loop in range(1, loops + 1))
    chips = (f'<span><i style="--c:var(--{color}-{loop})"></i>{name}</span>' for loop, name in names)
    return f'<div class="legend">{"".join(chips)}</div>'


def _grid(name: str, *figures: str) -> str:
    return f'<div class="{name}">{"".join(figures)}</div>'


def _variables(name: str, colors: Sequence[str]) -> str:
    return "".join(f" --{name}-{loop}: {color};" for loop, color in enumerate(colors, start=1))


def _at_end(values_N: np.ndarray) -> float:
    """Return the mean of the last finite values."""
    finite = values_N[np.isfinite(values_N)][-TAIL_STEPS:]
    return float(finite.mean()) if len(finite) else float("nan")


def _short(count: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}\N{NO-BREAK SPACE}{unit}"
    return f"{count:.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours = f"{minutes // 60} h {minutes % 60} min"
    text = hours if minutes >= 60 else f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return text.replace(" ", "\N{NO-BREAK SPACE}")
