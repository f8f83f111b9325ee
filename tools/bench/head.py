"""Time and memory of the head's forward and backward: one pass against logits that are kept, or recomputed."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.model.head import DirectGradient, token_losses, weighted_losses
from tools.bench.new_process import in_new_process, resident_peak
from tools.bench.timing import PrepareRun, tokens_per_s
from tools.bench.verdicts import Figure


class HeadSize(NamedTuple):
    """Sizes of a head; the defaults are Ouro's vocabulary and loops over 1,024 tokens of a small model."""

    tokens: int = 1024
    vocabulary: int = 49_152
    width: int = 512
    loops: int = 4


class Head:
    """Hidden states, weight and labels, and the weight's gradient buffer, which a training step has in any case."""

    def __init__(self, size: HeadSize) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = size.tokens, 1, size.width
        self.hidden = [torch.randn(sizes, generator=generator).requires_grad_() for _ in range(size.loops)]
        self.weight = torch.randn(size.vocabulary, size.width, generator=generator).mul_(0.02).requires_grad_()
        self.labels = torch.randint(size.vocabulary, (size.tokens, 1), generator=generator)
        self.share = torch.full((size.tokens, 1), 1 / size.loops)
        self.weight.grad = torch.zeros_like(self.weight)

    def keep(self) -> None:
        """Keep the logits of all loops for backward, in plain torch."""
        self._backward([self._kept_losses(h_SBD) for h_SBD in self.hidden])

    def recompute(self) -> None:
        """Recompute the logits in backward, chunk by chunk."""
        self._backward([(self.share * token_losses(h, self.weight, self.labels)).sum() for h in self.hidden])

    def one_pass(self) -> None:
        """Compute losses and gradients in one pass, the weight's into its buffer."""
        assert self.weight.grad is not None
        direct = DirectGradient(self.weight.grad, None, signals=False)
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
    """Print speed and peak memory of each way, and yield the figures of the one pass."""
    head, tokens = Head(size), size.tokens * size.loops
    contenders: dict[str, PrepareRun] = {name: partial(partial, way, head) for name, way in WAYS.items()}
    speeds = tokens_per_s(contenders, tokens, repeats)
    peaks = {name: in_new_process(peak_bytes, name, size) for name in WAYS}
    kept = next(iter(WAYS))
    print(
        f"\nhead: {size.tokens:,} tokens, V = {size.vocabulary:,}, D = {size.width}, R = {size.loops}, forward and "
        "backward, fp32"
    )
    for name, peak in peaks.items():
        time, memory = speeds[kept] / speeds[name], peak / peaks[kept]
        print(f"  {name:<24}{time:>8.2f} x time{peak / 2**20:>10,.0f} MiB above the start{memory:>8.1%}")
    yield Figure("head: time of one pass / all logits kept", speeds[kept] / speeds[name], 1.03, at_least=False)
    yield Figure("head: memory of one pass / all logits kept", peaks[name] / peaks[kept], 0.2, at_least=False)


def peak_bytes(name: str, size: HeadSize) -> int:
    """Return by how much one of :data:`WAYS` raises this process's peak of resident memory."""
    head = Head(size)
    before = resident_peak()
    WAYS[name](head)
    return resident_peak() - before
