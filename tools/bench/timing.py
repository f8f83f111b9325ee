"""Contenders in turns: machines are noisy, ratios measured in one run are not."""

import statistics
import time
from collections.abc import Callable

from looplm.megatron import device

Prepare = Callable[[], Callable[[], object]]  # sets up a run that is timed


def timed(contenders: dict[str, Prepare], tokens: int, repeats: int) -> dict[str, float]:
    """Tokens per second of each, in turns, from the median."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, prepare in contenders.items():
            run = prepare()
            device.synchronize()
            start = time.perf_counter()
            run()
            device.synchronize()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: tokens / statistics.median(times) for name, times in seconds.items()}


def show(title: str, speed: dict[str, float]) -> None:
    """Each against the first one."""
    first = next(iter(speed.values()))
    print(f"  {title}")
    for name, rate in speed.items():
        print(f"    {name:<28}{rate:>10,.0f} tokens/s{rate / first:>8.2f} x")
