"""Memory of each way of recomputing activations.

The bytes that autograd saves are counted, not sampled, so they have no noise.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from typing import get_args

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from looplm.config import Recompute, RunConfig
from looplm.megatron.device import DEVICE
from looplm.megatron.settings import DTYPES
from looplm.model import LoopLM
from pretrain.data import Batch
from pretrain.trainer import Trainer


class SavedBytes:
    """Bytes that autograd holds for backward, each storage once and without the parameters' own.

    The peak includes what a recomputed part saves while backward runs through it. It does not include buffers that live
    only during an operation, gradients, and the optimizer, which are the same for every way of recomputing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._excluded = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._uses: Counter[int] = Counter()
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> "_SavedTensor":
        """Count a tensor that autograd saves."""
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        saved = _SavedTensor(tensor.detach())  # detached, since an operation's own output would refer to its graph
        if address not in self._excluded:
            self._uses[address] += 1
            if self._uses[address] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(saved, self._release, address, size)
        return saved

    def _release(self, address: int, size: int) -> None:
        self._uses[address] -= 1
        if self._uses[address] == 0:
            self.now -= size


class _SavedTensor:
    """Handle for a saved tensor in autograd's graph, freed together with it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what autograd saves inside the context."""
    count = SavedBytes(model)
    with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda saved: saved.tensor):
        yield count


def random_batch(recipe: RunConfig, batch_size: int, documents: bool = False) -> Batch:
    """Return random tokens; with ``documents``, a sample is two documents if the recipe masks documents."""
    length, sizes_SB = recipe.data.seq_length, (recipe.data.seq_length, batch_size)
    ids_BS = torch.randint(recipe.model.vocab_size, (batch_size, length + 1), device=DEVICE)
    start_SB = None
    if documents and recipe.data.document_masking:
        start_SB = torch.zeros(sizes_SB, dtype=torch.int64)
        start_SB[length // 2 :] = length // 2
    return Batch(ids_BS[:, :-1], ids_BS[:, 1:].t().contiguous(), torch.ones(sizes_SB, device=DEVICE), start_SB)


def peak_saved_bytes(config: RunConfig, batch: Batch, groups: ProcessGroupCollection) -> int:
    """Return the peak of one micro-batch's forward and backward under ``config.parallel.recompute``."""
    model = LoopLM(config.model, config.gate, groups, DTYPES[config.optim.precision], config.parallel)
    trainer = Trainer(model, config.loss, config.optim, config.parallel, groups)
    with saved_bytes(model) as count:
        trainer.backward(repeat(batch), 1)
    return count.peak


def bench_recompute(recipe: RunConfig, batch_size: int, groups: ProcessGroupCollection) -> None:
    """Print the peak of each way of recomputing, for the recipe's model and ``batch_size`` samples."""
    batch, model, peaks = random_batch(recipe, batch_size), recipe.model, dict[str, int]()
    for mode in get_args(Recompute):
        config = replace(recipe, parallel=replace(recipe.parallel, recompute=mode))
        peaks[mode] = peak_saved_bytes(config, batch, groups)
    tokens = f"{batch_size} x {recipe.data.seq_length} tokens"
    sizes = f"{tokens}, {model.num_layers} layers, {model.num_loops} loops"
    print(f"\nkept for backward, {recipe.optim.precision}: {sizes}")
    for mode, peak in peaks.items():
        print(f"  recompute: {mode:<13}{peak / 2**20:>10,.1f} MiB{peak / peaks['none']:>8.1%}")
