"""The machine that a figure was measured on, in words."""

from pathlib import Path


def processor() -> str:
    """Return the processor's name, as Linux gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")
