"""Time several contenders in turns: machines are noisy, but ratios measured in one run are not."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from tqdm import tqdm

from looplm.megatron import device, process_groups

Measurement = TypeVar("Measurement")
PrepareRun = Callable[[], Callable[[], object]]  # sets up, and returns, a run to be timed


@dataclass(frozen=True)
class Rates:
    """How fast several contenders are that were timed in the same turns.

    Args:
        amount: what each handles in a turn, in tokens, characters or bytes.
        seconds: times of the turns by name.
    """

    amount: int
    seconds: Mapping[str, list[float]]

    def __getitem__(self, name: str) -> float:
        """Return a contender's rate per second, from its median time."""
        return self.amount / statistics.median(self.seconds[name])

    def items(self) -> Iterator[tuple[str, float]]:
        """Yield names and rates."""
        return ((name, self[name]) for name in self.seconds)

    def ratio(self, name: str, base: str) -> float:
        """Return how many times as fast as ``base`` a contender is: the median over the turns of the ratio in each.

        A machine that is slower for a while slows both contenders of a turn alike.
        """
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(theirs / own for own, theirs in pairs)


def in_turns(
    contenders: Mapping[str, Callable[[], Measurement]], repeats: int, patience: float = 0.0
) -> dict[str, list[Measurement]]:
    """Call all contenders in turns, after one turn of warm-up, and return their results.

    Args:
        contenders: what to call, by name.
        repeats: how many turns, at least.
        patience: seconds in which fast contenders get more turns than that: at most 4 (repeats - 1).
    """
    begin = time.perf_counter()
    for contender in contenders.values():
        contender()
    turns = max(repeats, min(4 * (repeats - 1), int(patience / (time.perf_counter() - begin))))
    results: dict[str, list[Measurement]] = {name: [] for name in contenders}
    hidden = None if process_groups.is_rank_0() else True  # None shows the bar on a terminal
    for _ in tqdm(range(turns), unit="turn", leave=False, disable=hidden):
        for name, contender in contenders.items():
            results[name].append(contender())
    return results


def rates(contenders: Mapping[str, PrepareRun], amount: int, repeats: int) -> Rates:
    """Time contenders that each handle ``amount`` (tokens, bytes); fast ones get a minute's worth of turns."""

    def seconds(prepare: PrepareRun) -> float:
        run = prepare()
        device.synchronize()
        start = time.perf_counter()
        run()
        device.synchronize()
        return time.perf_counter() - start

    timers = {name: lambda prepare=prepare: seconds(prepare) for name, prepare in contenders.items()}
    return Rates(amount, in_turns(timers, repeats, patience=60.0))


def per_second(runs: Mapping[str, Callable[[], object]], amount: int, repeats: int) -> Rates:
    """Return the same as :func:`rates` for runs that need no preparation."""
    return rates({name: partial(_identity, run) for name, run in runs.items()}, amount, repeats)


def _identity(run: Callable[[], object]) -> Callable[[], object]:
    return run


def print_speeds(title: str, speeds: Rates) -> None:
    """Print each contender's speed, and its ratio to the first one's."""
    first = next(iter(speeds.seconds))
    print(f"  {title}")
    for name, speed in speeds.items():
        print(f"    {name:<28}{speed:>10,.0f} tokens/s{speeds.ratio(name, first):>8.2f} x")


def has_fast_bf16() -> bool:
    """Return True if this device multiplies bf16 matrices at least half again as fast as fp32 ones."""
    return device.matmul_flops(512, torch.bfloat16) > 1.5 * device.matmul_flops(512)
