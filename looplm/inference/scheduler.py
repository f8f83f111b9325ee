"""Scheduler: runs requests from a queue in the rows of a batch, until the queue is empty.

::

    queue --admit--> prefill --seat--> row of the batch --pass after pass--> ids --> texts --> finished: the row is free
                                          ^                                   |
                                          +------- next token, loop 1 --------+

A request that finishes frees its row for the next one. Prompts are read between passes, a piece at a time. The rows in
use are always the first ones: if no request comes to fill a hole, the last row moves into it, so the cache is read
without a copy. A request's text depends on its own prompt and seed; on its neighbors only by rounding.
"""

from collections.abc import Callable, Iterator

import torch

from looplm.inference.batch import TextBatch
from looplm.inference.depth_batch import DepthBatch
from looplm.inference.early_exit import ExitRule
from looplm.inference.prefill import Prefill
from looplm.inference.request import ActiveRequest
from looplm.inference.sampling import NewTokens, Sampler
from looplm.inference.settings import GenerationConfig
from looplm.inference.speculation import SpeculativeBatch
from looplm.inference.stack import LoopedStack
from looplm.inference.text_stream import Token
from looplm.model import LoopLM

OnToken = Callable[[int, Token], None]
NOT_FINITE = "the model's logits are not finite; its training diverged or a file is damaged; take an earlier checkpoint"


class Scheduler:
    """Runs requests, as many side by side as there are rows.

    Args:
        model: in eval mode.
        rule: when tokens exit.
        config: the settings that all requests share; its batch_size is the number of rows.
        queue: valid requests. It is read only as rows become free, so it may be endless.
        on_token: called with (index of the request, token) as soon as a token's text is final.
    """

    def __init__(
        self, model: LoopLM, rule: ExitRule, config: GenerationConfig, queue: Iterator[ActiveRequest], on_token: OnToken
    ) -> None:
        self._rule, self._config, self._queue, self._on_token = rule, config, queue, on_token
        self._rows, rows = dict[int, ActiveRequest](), config.batch_size
        self._stack, self._sampler = LoopedStack(model), Sampler(config, self._rows)
        self._batch: TextBatch
        if config.speculate:
            self._batch = SpeculativeBatch(self._stack, rule, config.draft_depth, config.speculate, rows)
        else:
            self._batch = DepthBatch(self._stack, rule, config.kv_cache, rows)
        self._waiting: ActiveRequest | None = next(queue, None)
        self._prefill: Prefill | None = None
        self._prefilling: list[ActiveRequest] = []

    @property
    def done(self) -> bool:
        """True once all requests have finished."""
        return self._waiting is None and self._prefill is None and not self._rows

    @torch.inference_mode()
    def step(self) -> list[ActiveRequest]:
        """Decode once in every row, read some prompts, and return the requests that finished."""
        finished: list[ActiveRequest] = []
        if self._rows:
            self._extend(self._batch.decode(self._sampler), finished)
        self._read_prompts(finished)
        self._close_holes()
        return finished

    def _extend(self, new: list[NewTokens], finished: list[ActiveRequest]) -> None:
        """Add new ids to their texts, and free the rows of texts that end."""
        continued: dict[int, int] = {}
        for tokens in new:
            request = self._rows[tokens.row]
            if not tokens.finite:
                request.fail(NOT_FINITE)
            request.drafted += tokens.drafted
            request.accepted += tokens.accepted
            for token_id in tokens.ids:
                for token in request.add(token_id, tokens.depth):
                    self._on_token(request.index, token)
                if request.finish is not None:
                    break
            if request.finish is None:
                continued[tokens.row] = tokens.ids[-1]
            else:
                finished.append(request)
                del self._rows[tokens.row]
                self._batch.free(tokens.row, broken=not tokens.finite)
        self._batch.append(list(continued), list(continued.values()))

    def _read_prompts(self, finished: list[ActiveRequest]) -> None:
        """Read about ``prefill_chunk`` prompt tokens, before rows that are in use take their next pass."""
        budget = self._config.prefill_chunk
        while budget > 0:
            self._prefill = self._prefill or self._admit()
            if self._prefill is None:
                return
            while not self._prefill.done and budget > 0:
                budget -= self._prefill.advance()
            if self._prefill.done:
                self._seat(self._prefill, finished)
                self._prefill = None

    def _admit(self) -> Prefill | None:
        """Take requests from the queue whose prompts are short enough to be read side by side, or a single long one."""
        chunk, longest, group = self._config.prefill_chunk, 0, list[ActiveRequest]()
        while self._waiting is not None and len(self._rows) + len(group) < self._config.batch_size:
            longest = max(longest, len(self._waiting.ids))
            if group and longest * (len(group) + 1) > chunk:
                break
            group.append(self._waiting)
            self._waiting = next(self._queue, None)
        self._prefilling = group
        prompts = [request.ids for request in group]
        return Prefill(self._stack, self._rule, self._config.kv_cache, prompts, chunk) if group else None

    def _seat(self, prefill: Prefill, finished: list[ActiveRequest]) -> None:
        """Give rows to requests whose prompts have been read, and sample their first ids."""
        rows = [row for row in range(self._config.batch_size) if row not in self._rows][: len(self._prefilling)]
        for index, (row, request) in enumerate(zip(rows, self._prefilling, strict=True)):
            self._rows[row] = request
            self._batch.seat(row, prefill, index)
        self._extend(self._sampler.sample(prefill.next_logits()._replace(rows=rows)), finished)

    def _close_holes(self) -> None:
        """Move the last rows into free ones before them."""
        for hole in range(len(self._rows)):
            if hole not in self._rows:
                last = max(self._rows)
                self._batch.move(last, hole)
                self._rows[hole] = self._rows.pop(last)
