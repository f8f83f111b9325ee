"""Where the time of a training step and of decoding goes: kernels by their share, and gaps in which the device idles.

torch's profiler records every kernel with its start and end. On a CPU there are no kernels, so the outermost operators
of the profiled thread take their place: the same code runs, the figures mean little.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from looplm.inference import GenerationConfig
from looplm.megatron import device
from looplm.megatron.settings import DTYPES
from looplm.model import LoopLM
from pretrain.run import build
from tools.bench.endless import endless_generator
from tools.gpu.parts import Job
from tools.gpu.recipes import batch_of, recipe, started
from tools.gpu.record import Row, Rows, Value

STEPS, TOKENS = 2, 4  # on a CPU half of them, because the profiler takes longer than the work
KERNELS, GAPS = 12, 4
LONGEST_NAME = 90
SMALLEST_GAP_US = 2.0  # the least that a launch takes


class Event(NamedTuple):
    """A kernel's time on the device, in microseconds."""

    name: str
    start: float
    end: float


def run(job: Job) -> None:
    """Profile a training step and decoding."""
    config = recipe(job.device, "mla", micro_batch_size=2)
    with started(job) as groups:
        rows = Rows(job.rows, job.deadline)
        steps, tokens = (STEPS, TOKENS) if device.HAS_CUDA else (STEPS // 2, TOKENS // 2)
        trainer, _ = build(config, groups)
        batch = batch_of(config, documents=True)

        def train() -> None:
            for _ in range(steps):
                trainer.train(repeat(batch), 1)

        add_profile(rows, "training step", profiled(train))
        model = LoopLM(config.model, config.gate, groups, DTYPES[config.optim.precision]).eval()
        generator, settings = endless_generator(model), GenerationConfig(temperature=0.0, max_new_tokens=tokens)
        add_profile(rows, "decoding, batch 1", profiled(lambda: generator.generate([[1, 2, 3]], settings)))


def profiled(action: Callable[[], object]) -> list[Event]:
    """Return the kernels of ``action``, which has run once before, in order of their start."""
    action()
    device.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.HAS_CUDA else [])]
    with profile(activities=activities) as recorded:
        action()
        device.synchronize()
    found: Any = recorded.events()
    if device.HAS_CUDA:
        chosen = [event for event in found if event.device_type == DeviceType.CUDA and not _is_annotation(event)]
    else:
        chosen = [event for event in found if event.cpu_parent is None]
    events = [Event(event.name, event.time_range.start, event.time_range.end) for event in chosen]
    return sorted(events, key=lambda event: event.start)


def _is_annotation(event: Any) -> bool:
    """Return True for a range that a program marked, which covers kernels and the gaps between them."""
    return bool(getattr(event, "is_user_annotation", False))


def add_profile(rows: Rows, title: str, events: Sequence[Event]) -> None:
    """Add rows for the whole, the kernels that take most time, and the gaps that cost most."""
    rows.measure(title, lambda: totals(events))
    for name, values in by_kernel(events)[:KERNELS]:
        rows.add(Row(name=f"{title}: {name}", values=values))
    for name, values in by_gap(events)[:GAPS]:
        rows.add(Row(name=f"{title}: gap {name}", values=values))


def totals(events: Sequence[Event]) -> dict[str, Value]:
    """Return the time from the first kernel to the end of the last, and the share in which none ran."""
    if not events:
        raise RuntimeError("the profiler recorded no kernel; is CUPTI installed, and may this user profile?")
    span = max(event.end for event in events) - events[0].start
    idle = sum(gap.end - gap.start for gap in gaps(events, 0.0))
    return {
        "ms": round(span / 1000, 2),
        "share %": round(100 * (1 - idle / span), 1),
        "calls": len(events),
        "idle %": round(100 * idle / span, 1),
    }


def by_kernel(events: Sequence[Event]) -> list[tuple[str, dict[str, Value]]]:
    """Return time, share and calls of each kernel, the most time first."""
    time, calls = Counter[str](), Counter[str]()
    for event in events:
        time[event.name] += event.end - event.start  # type: ignore[assignment]  # a Counter of floats
        calls[event.name] += 1
    total = sum(time.values()) or 1
    return [
        (
            name[:LONGEST_NAME],
            {"ms": round(spent / 1000, 3), "share %": round(100 * spent / total, 1), "calls": calls[name]},
        )
        for name, spent in time.most_common()
    ]


def gaps(events: Sequence[Event], smallest: float = SMALLEST_GAP_US) -> list[Event]:
    """Return the times in which no kernel ran, longer than ``smallest``, named by the kernels before and after."""
    found, busy_until, last = list[Event](), float("-inf"), ""
    for event in events:
        if last and event.start - busy_until > smallest:
            found.append(Event(f"between {last[:40]} and {event.name[:40]}", busy_until, event.start))
        if event.end > busy_until:
            busy_until, last = event.end, event.name
    return found


def by_gap(events: Sequence[Event]) -> list[tuple[str, dict[str, Value]]]:
    """Return time, share of the whole and number of the gaps between the same two kernels, the most time first."""
    lengths = defaultdict[str, list[float]](list)
    for gap in gaps(events):
        lengths[gap.name].append(gap.end - gap.start)
    span = max((event.end for event in events), default=0.0) - (events[0].start if events else 0.0) or 1.0
    ordered = sorted(lengths.items(), key=lambda item: -sum(item[1]))
    return [
        (name, {"ms": round(sum(one) / 1000, 3), "share %": round(100 * sum(one) / span, 1), "calls": len(one)})
        for name, one in ordered
    ]
