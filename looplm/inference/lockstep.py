"""Rows in lock step: prompts first, then one token in each row at a time, handed in from outside.

This is what measuring a model through its cache needs (:mod:`looplm.evaluation.cached`); generation, whose rows go
their own pace, is the scheduler's.

Shapes: S sequence, B rows, N rows taking part, V vocabulary.
"""

from collections.abc import Sequence

import torch

from looplm.inference.depth_batch import DepthBatch, Left
from looplm.inference.early_exit import ExitRule
from looplm.inference.kv_cache import CacheMode, KVCache
from looplm.inference.prefill import Prefill, Step
from looplm.inference.stack import LoopedStack
from looplm.megatron import device
from looplm.model import LoopLM


class Decoder:
    """A model, and the cache of a batch of texts.

    With a ``per_loop`` cache all loops run and the logits are read at the exit loop: exactly the cacheless model. With
    a shared cache, tokens that leave are taken out of the batch before the next loop.

    Args:
        model: in eval mode.
        rule: when tokens leave the loops.
        mode: what the cache keeps.
        rows: texts side by side (B).
        piece: tokens of the prompts that run through the stack at once.
    """

    def __init__(self, model: LoopLM, rule: ExitRule, mode: CacheMode, rows: int, piece: int = 1 << 30) -> None:
        self._model, self._rule, self._mode, self._rows, self._piece = model, rule, mode, rows, piece
        self._stack = LoopedStack(model)
        self.batch = DepthBatch(model, self._stack, rule, mode, rows)

    @property
    def cache(self) -> KVCache:
        """What is kept of the past."""
        return self.batch.cache

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Step:
        """Read the prompts of all rows, token ids of any length from 1."""
        with device.adapter_off():
            job = Prefill(self._model, self._stack, self._rule, self._mode, prompts, self._piece)
            while not job.done:
                job.advance()
            for row in range(self._rows):
                self.batch.seat(row, job, row)
            return job.step

    @torch.inference_mode()
    def decode(self, ids: Sequence[int], rows: Sequence[int]) -> Step:
        """One more token in some of the rows, each at its own position.

        Args:
            ids: the tokens.
            rows: their rows, ascending; the other rows stay as they are.
        """
        with device.adapter_off():
            self.batch.start(rows, ids)
            left: list[Left] = []
            while sum(len(some.rows) for some in left) < len(rows):
                left.append(self.batch.advance())
            return self.batch.read(left)
