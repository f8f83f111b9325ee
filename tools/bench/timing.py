"""Time several contenders in turns: machines are noisy, but ratios measured in one run are not."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
from tqdm import tqdm

from looplm.megatron import device, process_groups

Measurement = TypeVar("Measurement")
PrepareRun = Callable[[], Callable[[], object]]  # sets up, and returns, a run to be timed


def in_turns(contenders: Mapping[str, Callable[[], Measurement]], repeats: int) -> dict[str, list[Measurement]]:
    """Call all contenders ``repeats`` times in turns, after one turn of warm-up, and return their results."""
    results: dict[str, list[Measurement]] = {name: [] for name in contenders}
    hidden = None if process_groups.is_rank_0() else True  # None shows the bar on a terminal
    for turn in tqdm(range(repeats + 1), unit="turn", leave=False, disable=hidden):
        for name, contender in contenders.items():
            result = contender()
            if turn:
                results[name].append(result)
    return results


def rates(contenders: Mapping[str, PrepareRun], amount: int, repeats: int) -> dict[str, float]:
    """Return how much of ``amount`` (tokens, bytes) each contender does per second, from its median time."""

    def seconds(prepare: PrepareRun) -> float:
        run = prepare()
        device.synchronize()
        start = time.perf_counter()
        run()
        device.synchronize()
        return time.perf_counter() - start

    timers = {name: lambda prepare=prepare: seconds(prepare) for name, prepare in contenders.items()}
    return {name: amount / statistics.median(times) for name, times in in_turns(timers, repeats).items()}


def per_second(runs: Mapping[str, Callable[[], object]], amount: int, repeats: int) -> dict[str, float]:
    """Return the same as :func:`rates` for runs that need no preparation."""
    return rates({name: partial(_identity, run) for name, run in runs.items()}, amount, repeats)


def _identity(run: Callable[[], object]) -> Callable[[], object]:
    return run


def print_speeds(title: str, speeds: Mapping[str, float]) -> None:
    """Print each contender's speed, and its ratio to the first one's."""
    first = next(iter(speeds.values()))
    print(f"  {title}")
    for name, speed in speeds.items():
        print(f"    {name:<28}{speed:>10,.0f} tokens/s{speed / first:>8.2f} x")


def has_fast_bf16() -> bool:
    """Return True if this device multiplies bf16 matrices at least half again as fast as fp32 ones."""
    return device.matmul_flops(512, torch.bfloat16) > 1.5 * device.matmul_flops(512)
