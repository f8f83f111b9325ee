"""Time and memory of the head's forward and backward: one pass against logits that are kept, or recomputed."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.model.head import DirectGradient, token_losses, weighted_losses
from tools.bench.new_process import in_new_process, resident_peak
from tools.bench.timing import PrepareRun, has_fast_bf16, rates
from tools.bench.verdicts import Figure


class HeadSize(NamedTuple):
    """Sizes of a head; the defaults are Ouro's vocabulary and loops over 1,024 tokens of a small model."""

    tokens: int = 1024
    vocabulary: int = 49_152
    width: int = 512
    loops: int = 4
    dtype: torch.dtype = torch.float32


class Head:
    """Hidden states, weight and labels, and the weight's gradient buffer, which a training step has in any case."""

    def __init__(self, size: HeadSize) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = size.tokens, 1, size.width
        hidden = [torch.randn(sizes, generator=generator).to(size.dtype) for _ in range(size.loops)]
        weight_VD = torch.randn(size.vocabulary, size.width, generator=generator).mul_(0.02).to(size.dtype)
        self.hidden, self.weight = [h_SBD.requires_grad_() for h_SBD in hidden], weight_VD.requires_grad_()
        self.labels = torch.randint(size.vocabulary, (size.tokens, 1), generator=generator)
        self.share = torch.full((size.tokens, 1), 1 / size.loops)
        self.weight.grad = torch.zeros_like(self.weight)
        self.buffer_VD = torch.zeros(weight_VD.shape) if size.dtype is torch.bfloat16 else self.weight.grad

    def keep(self) -> None:
        """Keep the logits of all loops for backward, in plain torch."""
        self._backward([self._kept_losses(h_SBD) for h_SBD in self.hidden])

    def recompute(self) -> None:
        """Recompute the logits in backward, chunk by chunk."""
        self._backward([(self.share * token_losses(h, self.weight, self.labels)).sum() for h in self.hidden])

    def one_pass(self) -> None:
        """Compute losses and gradients in one pass, the weight's into its buffer."""
        direct = DirectGradient(self.buffer_VD, None, signals=False)
        losses = [weighted_losses(h, self.weight, self.labels, self.share, direct=direct) for h in self.hidden]
        self._backward([loss.expected for loss in losses if loss.expected is not None])

    def _kept_losses(self, h_SBD: Tensor) -> Tensor:
        logits = F.linear(h_SBD.flatten(0, 1), self.weight)
        return (self.share.flatten() * F.cross_entropy(logits, self.labels.flatten(), reduction="none")).sum()

    def _backward(self, losses: list[Tensor]) -> None:
        for h_SBD in self.hidden:
            h_SBD.grad = None
        torch.stack(losses).sum().backward()


WAYS: dict[str, Callable[[Head], None]] = {
    "all logits kept": Head.keep,
    "recomputed in chunks": Head.recompute,
    "one pass": Head.one_pass,
}


def bench_head(repeats: int, size: HeadSize = HeadSize()) -> Iterator[Figure]:  # noqa: B008  # a tuple of constants
    """Print speed and peak memory of each way, and yield the figures of the one pass, also in bf16 if it is fast."""
    sizes = [size, size._replace(dtype=torch.bfloat16)] if has_fast_bf16() else [size]
    for one in sizes:
        yield from _bench_size(repeats, one)


def _bench_size(repeats: int, size: HeadSize) -> Iterator[Figure]:
    head, tokens = Head(size), size.tokens * size.loops
    contenders: dict[str, PrepareRun] = {name: partial(partial, way, head) for name, way in WAYS.items()}
    speeds = rates(contenders, tokens, repeats)
    peaks = {name: in_new_process(peak_bytes, name, size) for name in WAYS}
    kept = next(iter(WAYS))
    precision = "bf16" if size.dtype is torch.bfloat16 else "fp32"
    print(
        f"\nhead: {size.tokens:,} tokens, V = {size.vocabulary:,}, D = {size.width}, R = {size.loops}, forward and "
        f"backward, {precision}"
    )
    for name, peak in peaks.items():
        time, memory = speeds.ratio(kept, name), peak / peaks[kept]
        print(f"  {name:<24}{time:>8.2f} x time{peak / 2**20:>10,.0f} MiB above the start{memory:>8.1%}")
    title = f"head, {precision}"
    yield Figure(f"{title}: time of one pass / all logits kept", speeds.ratio(kept, name), 1.03, at_least=False)
    yield Figure(f"{title}: memory of one pass / all logits kept", peaks[name] / peaks[kept], 0.2, at_least=False)


def peak_bytes(name: str, size: HeadSize) -> int:
    """Return by how much one of :data:`WAYS` raises this process's peak of resident memory."""
    head = Head(size)
    before = resident_peak()
    WAYS[name](head)
    return resident_peak() - before
