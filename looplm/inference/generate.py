"""Prompts in, generations out: one batch of requests through a :class:`~looplm.inference.decode.Decoder`.

::

    generator = Generator(model, tokenizer, eos_id)
    for generation in generator.generate(["def f(", "class "], GenerationConfig(temperature=0.0, kv_cache="last")):
        print(generation.prompt + generation.text, [token.depth for token in generation.tokens])
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from looplm.cli import require
from looplm.inference.decode import Decoder, Step
from looplm.inference.early_exit import ExitRule
from looplm.inference.kv_cache import CacheMode
from looplm.inference.sampling import choose, penalise
from looplm.inference.text_stream import TextStream, Token
from looplm.model import LoopLM

Finish = Literal["eos", "stop", "length", "context", "error"]
OnToken = Callable[[int, Token], None]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to continue a text.

    Args:
        max_new_tokens: tokens to add at most; the model's context may end it sooner.
        temperature: 0 takes the likeliest token each time; 1 draws from the model's own distribution.
        top_k: draw from the k likeliest tokens only; 0 for all.
        top_p: draw from the likeliest tokens that together reach this probability; 1 for all.
        repetition_penalty: above 1, tokens already in the text become less likely.
        stop: strings the text ends before.
        seed: of the first row; row i takes seed + i.
        kv_cache: per_loop (exact), or one cache that the loops share: last, mean or first.
        exit_threshold: a token leaves at the first loop by which the gate's exit probability reaches this; null for all loops.
        min_depth: with exit_threshold: no token leaves before this loop.
        max_depth: with exit_threshold: every token leaves after this loop; null for the trained number of loops.
        depth: run every token exactly this many loops, more than trained if you like; null for the trained number.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    kv_cache: CacheMode = "per_loop"
    exit_threshold: float | None = None
    min_depth: int = 1
    max_depth: int | None = None
    depth: int | None = None

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "give at least 1")
        require(self.temperature >= 0, "temperature", self.temperature, "give 0 (greedy) or more")
        require(self.top_k >= 0, "top_k", self.top_k, "give 0 (all) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "give a number above 0 and at most 1")
        require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "give a number above 0; 1 is none")  # fmt: skip
        require("" not in self.stop, "stop", list(self.stop), "an empty string would stop at once; leave it out")
        require(0 <= self.seed < 2**31, "seed", self.seed, "give a whole number from 0 to 2147483647")
        require(self.kv_cache in ("per_loop", "last", "mean", "first"), "kv_cache", self.kv_cache, "give per_loop, last, mean or first")  # fmt: skip
        threshold = self.exit_threshold
        require(threshold is None or 0 <= threshold <= 1, "exit_threshold", threshold, "give a number from 0 to 1")
        require(self.min_depth >= 1, "min_depth", self.min_depth, "give at least 1")
        require(self.depth is None or self.depth >= 1, "depth", self.depth, "give at least 1")
        require(self.depth is None or threshold is None, "depth", self.depth, "a fixed depth leaves exit_threshold nothing to decide; give one of the two")  # fmt: skip
        for key, default in (("min_depth", 1), ("max_depth", None)):
            value = getattr(self, key)
            require(threshold is not None or value == default, key, value, "it bounds exit_threshold; give that too, or depth alone")  # fmt: skip

    def exit_rule(self, trained_loops: int, gate_trained: bool) -> ExitRule:
        """The rule for a model; raises :class:`UserError` where the model cannot follow it."""
        if self.exit_threshold is None:
            return ExitRule(max_depth=self.depth or trained_loops)
        require(
            gate_trained or self.exit_threshold == 1,
            "exit_threshold",
            self.exit_threshold,
            "this checkpoint's gate was never trained; run the gate stage, or give depth",
        )
        most = self.max_depth or trained_loops
        require(1 <= most <= trained_loops, "max_depth", self.max_depth, f"the gate knows loops 1 to {trained_loops}; to go deeper give depth")  # fmt: skip
        require(self.min_depth <= most, "min_depth", self.min_depth, f"give at most {most}")
        return ExitRule(max_depth=most, min_depth=self.min_depth, threshold=self.exit_threshold)


@dataclass(frozen=True)
class Generation:
    """What became of a prompt. ``finish`` says why it ended; with "error", ``error`` says what was wrong with this row."""

    prompt: str
    tokens: list[Token]
    finish: Finish
    error: str | None = None

    @property
    def text(self) -> str:
        """The continuation, without the end-of-text token or stop string."""
        return "".join(token.text for token in self.tokens)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


@dataclass
class _Request:
    """A row on its way."""

    index: int  # among all prompts
    prompt: str
    prompt_ids: list[int]
    stream: TextStream
    random: torch.Generator
    row: int = -1  # in the batch
    next_id: int = -1
    finish: Finish | None = None
    error: str | None = None

    def fail(self, error: str) -> None:
        self.finish, self.error = "error", error


class Generator:
    """Continues texts with a model.

    Args:
        model: in eval mode.
        tokenizer: that it was trained with.
        eos_id: end of text.
        gate_trained: whether early exit may be asked for.
    """

    def __init__(self, model: LoopLM, tokenizer: Tokenizer, eos_id: int, gate_trained: bool = True) -> None:
        self.model, self.tokenizer, self.eos_id, self.gate_trained = model, tokenizer, eos_id, gate_trained

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[str | Sequence[int]], config: GenerationConfig, on_token: OnToken | None = None
    ) -> list[Generation]:
        """Continue all prompts, side by side. A prompt that cannot be continued yields an error, the others go on.

        Args:
            prompts: texts, or token ids.
            config: the same for all rows but for the seed.
            on_token: called with (index of the prompt, token) as soon as a token's text is final.

        Raises:
            UserError: the model cannot follow ``config``.
        """
        rule = config.exit_rule(self.model.shape.num_loops, self.gate_trained)
        requests = [self._open(prompt, config, index) for index, prompt in enumerate(prompts)]
        batch = [request for request in requests if request.finish is None]
        if batch:
            self._run(batch, rule, config, on_token or (lambda index, token: None))
        return [Generation(r.prompt, r.stream.tokens, r.finish or "length", r.error) for r in requests]

    def _open(self, prompt: str | Sequence[int], config: GenerationConfig, index: int) -> _Request:
        """Check a prompt; what is wrong with it is the row's error, not the batch's."""
        vocab_size, context = self.model.shape.vocab_size, self.model.shape.max_sequence_length
        if isinstance(prompt, str):
            text, ids = prompt, self.tokenizer.encode(prompt, add_special_tokens=False).ids
        else:
            text, ids = "", list(prompt)
        foreign = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
        known = [] if foreign else ids
        stream = TextStream(self.tokenizer, known, config.stop)
        random = torch.Generator().manual_seed(config.seed + index)
        request = _Request(index, text or self.tokenizer.decode(known), ids, stream, random)
        if not ids:
            request.fail("the prompt is empty; give at least one token")
        elif foreign:
            request.fail(f"token id {foreign[0]} is not below the vocabulary's {vocab_size}; use the model's tokenizer")
        elif len(ids) >= context:
            request.fail(f"the prompt has {len(ids)} tokens and leaves no room in the context of {context}; shorten it")
        return request

    def _run(self, batch: list[_Request], rule: ExitRule, config: GenerationConfig, on_token: OnToken) -> None:
        """Generate until every row has a reason to end."""
        device = self.model.head_weight().device
        length_B = torch.tensor([len(request.prompt_ids) for request in batch], device=device)
        ids_BS = torch.zeros(len(batch), int(length_B.max()), dtype=torch.int64, device=device)
        seen_BV = torch.zeros(len(batch), self.model.shape.vocab_size, dtype=torch.bool, device=device)
        for row, request in enumerate(batch):
            request.row = row
            ids_BS[row, : len(request.prompt_ids)] = torch.tensor(request.prompt_ids)
            seen_BV[row, request.prompt_ids] = True
        decoder = Decoder(self.model, rule, config.kv_cache, rows=len(batch))
        step = decoder.prefill(ids_BS, length_B)
        live = batch
        while True:
            self._choose(live, step, seen_BV, config)
            for request, depth in zip(live, step.depth_N.tolist(), strict=True):
                for token in self._advance(request, depth, config):
                    on_token(request.index, token)
            live = [request for request in live if request.finish is None]
            if not live:
                return
            rows_N = torch.tensor([request.row for request in live], device=device)
            ids_N = torch.tensor([request.next_id for request in live], device=device)
            seen_BV[rows_N, ids_N] = True
            step = decoder.decode(ids_N, rows_N)

    def _choose(self, live: list[_Request], step: Step, seen_BV: Tensor, config: GenerationConfig) -> None:
        """Draw every row's next id, with the row's own random numbers."""
        finite_N = step.logits_NV.isfinite().all(-1)
        logits_NV = step.logits_NV.masked_fill(~finite_N[:, None], 0.0)
        if config.repetition_penalty != 1:
            logits_NV = penalise(logits_NV, seen_BV[[request.row for request in live]], config.repetition_penalty)
        uniform_N = torch.stack([torch.rand((), dtype=torch.float64, generator=request.random) for request in live])
        ids_N = choose(logits_NV, uniform_N.to(logits_NV.device), config.temperature, config.top_k, config.top_p)
        for request, token_id, finite in zip(live, ids_N.tolist(), finite_N.tolist(), strict=True):
            request.next_id = token_id
            if not finite:
                request.fail("the model's logits are not finite; its weights are damaged or its training diverged")

    def _advance(self, request: _Request, depth: int, config: GenerationConfig) -> list[Token]:
        """Take the drawn id into the row's text, end the row if that is due, and return what can be shown."""
        if request.finish is None and request.next_id == self.eos_id:
            request.finish = "eos"
        if request.finish is not None:
            return request.stream.close()
        shown = request.stream.push(request.next_id, depth)
        added = len(request.stream.tokens)
        if request.stream.stopped:
            request.finish = "stop"
        elif added == config.max_new_tokens:
            request.finish = "length"
        elif len(request.prompt_ids) + added == self.model.shape.max_sequence_length:
            request.finish = "context"
        return shown + request.stream.close() if request.finish else shown
