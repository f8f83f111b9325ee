"""What each way of recomputing activations keeps in memory, counted and not sampled: the figures have no noise."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from typing import Any, get_args

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from looplm.config import Recompute, RunConfig
from looplm.megatron.device import DEVICE
from looplm.model import LoopLM
from pretrain.data import Batch
from pretrain.optim import DTYPES
from pretrain.trainer import Trainer


class SavedBytes:
    """Bytes that autograd holds for backward, each storage once and the parameters' own left out.

    The peak counts what a checkpointed part saves while it is made again, too. Buffers that an operation needs only while
    it runs, gradients and the optimizer are not in it: they are the same for every way of recomputing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._excluded = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._uses: Counter[int] = Counter()
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> "_Saved":
        """Autograd saves a tensor."""
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        saved = _Saved(tensor.detach())  # detached: an operation's own output would hold its graph in a circle
        if place not in self._excluded:
            self._uses[place] += 1
            if self._uses[place] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(saved, self._release, place, size)
        return saved

    def _release(self, place: int, size: int) -> None:
        self._uses[place] -= 1
        if self._uses[place] == 0:
            self.now -= size


class _Saved:
    """Stands in autograd's graph for a saved tensor, and is freed with it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what autograd saves inside."""
    count = SavedBytes(model)
    with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda saved: saved.tensor):
        yield count


def peak_saved_bytes(config: RunConfig, batch: Batch, groups: ProcessGroupCollection) -> int:
    """Peak of one micro-batch's forward and backward under ``config.parallel.recompute``."""
    layout = config.parallel
    model = LoopLM(config.model, config.gate, groups, DTYPES[config.optim.precision], layout)
    trainer = Trainer(model, config.loss, config.optim, layout, groups)
    batches: Iterator[Any] = repeat(batch)
    with saved_bytes(model) as count:
        trainer.backward(batches, 1)
    return count.peak


def bench_recompute(recipe: RunConfig, batch_size: int, groups: ProcessGroupCollection) -> None:
    """Print the peak of every way, for the recipe's model and ``batch_size`` samples."""
    length = recipe.data.seq_length
    ids_BS = torch.randint(recipe.model.vocab_size, (batch_size, length + 1), device=DEVICE)
    mask_SB = torch.ones(length, batch_size, device=DEVICE)
    batch = Batch(ids_BS[:, :-1], ids_BS[:, 1:].t().contiguous(), mask_SB, None)
    modes = get_args(Recompute)
    layouts = {mode: replace(recipe, parallel=replace(recipe.parallel, recompute=mode)) for mode in modes}
    peaks = {mode: peak_saved_bytes(config, batch, groups) for mode, config in layouts.items()}
    model = recipe.model
    print(f"\nkept for backward, {recipe.optim.precision}: {batch_size} x {length} tokens, {model.num_layers} layers, {model.num_loops} loops")  # fmt: skip
    for mode, peak in peaks.items():
        print(f"  recompute: {mode:<13}{peak / 2**20:>10,.1f} MiB{peak / peaks['none']:>8.1%}")
