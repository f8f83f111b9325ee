"""Numbers as the tables and sentences of a report show them: plain text, with a true minus sign."""

import math

from tools.experiments.statistics import MAX_SEEDS, Comparison, Interval

_MAX_DECIMALS = 6
_WITHOUT_INTERVAL = 4  # decimals
_SCALES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float, decimals: int = _WITHOUT_INTERVAL) -> str:
    """Return a number with fixed decimals; "not finite" for NaN and infinities."""
    if not math.isfinite(value):
        return "not finite"
    text = f"{value:.{decimals}f}"
    return (text[1:] if float(text) == 0 and text[0] == "-" else text).replace("-", "−")


def with_interval(mean: float, interval: Interval) -> str:
    """Return "0.312 [0.280, 0.344]", with as many decimals as the interval's width deserves."""
    digits = _decimals(interval)
    return f"{number(mean, digits)} [{number(interval.low, digits)}, {number(interval.high, digits)}]"


def difference(comparison: Comparison) -> str:
    """Return the mean difference of a comparison with its interval."""
    return with_interval(comparison.difference.mean, comparison.difference.interval)


def p_value(p: float) -> str:
    """Return a p value; small ones as "<0.0001"."""
    return "<0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def effect(comparison: Comparison) -> str:
    """Return the effect size of a comparison, or "unknown"."""
    return "unknown" if comparison.effect is None else number(comparison.effect, 2)


def power(comparison: Comparison) -> str:
    """Return the power of a comparison in percent, or "unknown"."""
    return "unknown" if comparison.power is None else f"{100 * comparison.power:.0f} %"


def seeds_needed(comparison: Comparison) -> str:
    """Return the seeds that a comparison needs, or why there is no number."""
    if comparison.effect is None:
        return "unknown"
    return f">{MAX_SEEDS:,}" if comparison.seeds_needed is None else str(comparison.seeds_needed)


def count(value: float) -> str:
    """Return a count with three digits and its unit: "12.3 k", "1.20 M"."""
    if not math.isfinite(value):
        return "not finite"
    for scale, unit in _SCALES:
        if value >= 0.9995 * scale:
            scaled = value / scale
            return f"{scaled:.{max(0, 2 - int(math.log10(scaled * 1.0005)))}f} {unit}"
    return f"{value:g}"


def ratio(a: float, b: float) -> str:
    """Return a / b with three digits."""
    return f"{a / b:.3g}"


def duration(seconds: float) -> str:
    """Return a time in its natural unit: "45 s", "12.5 min", "3.2 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _decimals(interval: Interval) -> int:
    """Return the decimals that show two digits of the interval's half width, and on which side of 0 its ends are."""
    half = (interval.high - interval.low) / 2
    if half <= 0:
        return _WITHOUT_INTERVAL
    digits = min(max(1 - math.floor(math.log10(half)), 0), _MAX_DECIMALS)
    while digits < _MAX_DECIMALS and any(end and float(f"{end:.{digits}f}") == 0 for end in interval):
        digits += 1
    return digits
