"""Requests from a queue into the rows of a batch, until none is left.

::

    queue --admit--> prefill --seat--> row of the batch --pass after pass--> ids --> texts --> ended: the row is free
                                          ^                                   |
                                          +------- next token, loop 1 --------+

A request that ends frees its row for the next one. Prompts are read between passes, a piece at a time. Rows in use stay
the first ones: where no request comes to fill a hole, the last row moves into it, and the cache is read without a copy.
A request's text depends on its own prompt and seed; on its neighbours only by rounding.
"""

from collections.abc import Callable, Iterator

import torch

from looplm.inference.depth_batch import DepthBatch
from looplm.inference.early_exit import ExitRule
from looplm.inference.prefill import Prefill
from looplm.inference.request import Running
from looplm.inference.sampling import Sampler
from looplm.inference.settings import GenerationConfig
from looplm.inference.speculation import Emission, Speculation
from looplm.inference.stack import LoopedStack
from looplm.inference.text_stream import Token
from looplm.megatron import device
from looplm.model import LoopLM

OnToken = Callable[[int, Token], None]
_NOT_FINITE = "the model's logits are not finite; its weights are damaged or its training diverged"


class Scheduler:
    """Runs requests, as many side by side as there are rows.

    Args:
        model: in eval mode.
        rule: when tokens leave the loops.
        config: the rest.
        rows: texts side by side.
        queue: requests that can be run; read on only as rows become free, so it may be endless.
        on_token: called with (index of the request, token) as soon as a token's text is final.
    """

    def __init__(
        self,
        model: LoopLM,
        rule: ExitRule,
        config: GenerationConfig,
        rows: int,
        queue: Iterator[Running],
        on_token: OnToken,
    ) -> None:
        self._model, self._rule, self._config, self._queue, self._on_token = model, rule, config, queue, on_token
        self._stack = LoopedStack(model)
        self._batch: DepthBatch | Speculation
        self._sampler = Sampler(config, rows, model.model_config.vocab_size, self._stack.device)
        if config.speculate:
            self._batch = Speculation(
                self._stack, rule.max_depth, config.draft_depth, config.speculate, rows, self._sampler
            )
        else:
            self._batch = DepthBatch(model, self._stack, rule, config.kv_cache, rows)
        self._rows: list[Running | None] = [None] * rows
        self._waiting: Running | None = next(queue, None)
        self._job: Prefill | None = None
        self._reading: list[Running] = []

    @property
    def done(self) -> bool:
        """Whether all requests have ended."""
        return self._waiting is None and self._job is None and not any(self._rows)

    @torch.inference_mode()
    def step(self) -> list[Running]:
        """One pass of the stack over the tokens in flight, and some reading of prompts; returns the requests that ended."""
        ended: list[Running] = []
        with device.adapter_off():
            if any(self._rows):
                self._take(self._decode(), ended)
            self._read(ended)
            self._close_up()
        return ended

    def _decode(self) -> list[Emission]:
        if isinstance(self._batch, Speculation):
            return self._batch.round()
        left = self._batch.advance()
        if not left.rows:
            return []
        step = self._batch.read([left])
        drawn = self._sampler.draw(step.rows, step.logits_NV)
        rows = zip(step.rows, drawn.ids, step.depths, drawn.sound, strict=True)
        return [Emission(row, [token_id], depth, sound) for row, token_id, depth, sound in rows]

    def _take(self, emissions: list[Emission], ended: list[Running]) -> None:
        """Ids into texts; rows whose text goes on start their next token."""
        rows, ids = [], []
        for emission in emissions:
            request = self._rows[emission.row]
            assert request is not None
            if not emission.sound:
                request.fail(_NOT_FINITE)
            request.drafted += emission.drafted
            request.accepted += emission.accepted
            for token_id in emission.ids:
                for token in request.take(token_id, emission.depth):
                    self._on_token(request.index, token)
                if request.finish is not None:
                    break
                self._sampler.saw([emission.row], [token_id])
            if request.finish is None:
                rows.append(emission.row)
                ids.append(emission.ids[-1])
            else:
                ended.append(request)
                self._rows[emission.row] = None
                self._batch.release(emission.row, broken=not emission.sound)
        if rows:
            self._batch.start(rows, ids)

    def _read(self, ended: list[Running]) -> None:
        """Go on reading prompts: about a chunk's worth of tokens if rows are waiting for their next pass."""
        budget = self._config.prefill_chunk
        while budget > 0:
            if self._job is None:
                self._admit()
            if self._job is None:
                return
            while not self._job.done and budget > 0:
                budget -= self._job.advance()
            if self._job.done:
                self._seat(self._job, ended)
                self._job = None

    def _admit(self) -> None:
        """Take requests from the queue that are short enough to be read side by side, or one that is not."""
        free, longest, group = self._rows.count(None), 0, list[Running]()
        while self._waiting is not None and len(group) < free:
            longest = max(longest, len(self._waiting.ids))
            if group and longest * (len(group) + 1) > self._config.prefill_chunk:
                break
            group.append(self._waiting)
            self._waiting = next(self._queue, None)
        if group:
            prompts, config = [request.ids for request in group], self._config
            self._job = Prefill(self._model, self._stack, self._rule, config.kv_cache, prompts, config.prefill_chunk)
            self._reading = group

    def _seat(self, job: Prefill, ended: list[Running]) -> None:
        """Prompts that have been read get rows, and their first ids."""
        step, rows = job.step, []
        for index, request in enumerate(self._reading):
            row = self._rows.index(None)
            self._rows[row] = request
            self._batch.seat(row, job, index)
            self._sampler.seat(row, request)
            rows.append(row)
        drawn = self._sampler.draw(rows, step.logits_NV)
        firsts = zip(rows, drawn.ids, step.depths, drawn.sound, strict=True)
        self._take([Emission(row, [token_id], depth, sound) for row, token_id, depth, sound in firsts], ended)

    def _close_up(self) -> None:
        """Let the last rows move into holes."""
        used = len(self._rows) - self._rows.count(None)
        for hole in range(used):
            if self._rows[hole] is None:
                last = max(row for row, request in enumerate(self._rows) if request is not None)
                self._batch.move(last, hole)
                self._sampler.move(last, hole)
                self._rows[hole], self._rows[last] = self._rows[last], None
