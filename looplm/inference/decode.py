"""The model run through a cache: prompts first, then one token per row at a time.

Megatron's inference context keys its cache by layer only and holds no latents, so the blocks are run here, from their
own submodules, in the same order as ``TransformerLayer.forward``::

    prefill   ids_SN --embed--> h_SND --+-- stack, causal within the prompt, entries -> cache --+-- norm --> h_SND
    decode    ids_1N --embed--> h_1ND --+-- stack, one token over cached entries --------------+-- norm --> h_1ND
                                        +------------------- up to max_depth times ------------+
                                                    tokens leave as the exit rule says; the head reads where they left

Prompts are padded on the right: under a causal mask no token sees the padding, and decoding overwrites its entries.

Shapes: S sequence, N tokens side by side (one per row taking part), B rows, D hidden, V vocabulary, T positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.inference.attention import Rotary, cached_attentions, rotary_at
from looplm.inference.early_exit import ExitGateReader, ExitRule, last_token
from looplm.inference.kv_cache import CacheMode, KVCache
from looplm.model import LoopLM


class Step(NamedTuple):
    """What the next token of each row is drawn from: logits [N, V] in fp32, read at depth [N] (1-based, int64)."""

    logits_NV: Tensor
    depth_N: Tensor


@dataclass(frozen=True)
class _Tokens:
    """The tokens that are in the compute, and where they stand."""

    rows_N: Tensor
    length_N: Tensor  # own positions among the S; the rest is padding
    position_SN: Tensor
    rotary: Rotary
    span: int = 0  # decoding: how many cached positions they look at (T)
    visible_N11T: Tensor | None = None  # decoding: which of those; None for all

    def keep(self, stay_N: Tensor) -> "_Tokens":
        return replace(
            self,
            rows_N=self.rows_N[stay_N],
            length_N=self.length_N[stay_N],
            position_SN=self.position_SN[:, stay_N],
            rotary=Rotary(self.rotary.cos[:, stay_N], self.rotary.sin[:, stay_N]),
            visible_N11T=None if self.visible_N11T is None else self.visible_N11T[stay_N],
        )


Attend = Callable[[int, int, _Tokens, Tensor, Tensor], Tensor]


class Decoder:
    """A model, and the cache of a batch of ``rows`` texts.

    With a ``per_loop`` cache all loops run and the logits are read at the exit loop: exactly the cacheless model. With
    a shared cache, tokens that leave are taken out of the batch before the next loop.

    Args:
        model: in eval mode.
        rule: when tokens leave the loops.
        mode: what the cache keeps.
        rows: texts side by side (B).
    """

    def __init__(self, model: LoopLM, rule: ExitRule, mode: CacheMode, rows: int) -> None:
        self.model, self.rule = model, rule
        self.attentions, self._frequency = cached_attentions(model)
        weight = model.head_weight()
        self.cache = KVCache(model.shape, mode, rows, rule.max_depth, weight.dtype, weight.device)
        self.gate = ExitGateReader(model.gate, model.shape.num_loops, rows)
        self._next_B = torch.zeros(rows, dtype=torch.int64, device=weight.device)  # position of each row's next token

    @torch.inference_mode()
    def prefill(self, ids_BS: Tensor, length_B: Tensor) -> Step:
        """Read all prompts, padded on the right to one length.

        Args:
            ids_BS: token ids.
            length_B: length of each prompt, at least 1.
        """
        self.cache.reserve(ids_BS.size(1))
        self._next_B = length_B.clone()
        rows_B = torch.arange(len(length_B), device=ids_BS.device)
        position_SN = torch.arange(ids_BS.size(1), device=ids_BS.device)[:, None].expand(-1, len(rows_B))
        tokens = _Tokens(rows_B, length_B, position_SN, self._rotary(position_SN))
        return self._run(ids_BS.t(), tokens, self._attend_prompt, compact=False)

    @torch.inference_mode()
    def decode(self, ids_N: Tensor, rows_N: Tensor) -> Step:
        """One more token in some of the rows, each at its own position.

        Args:
            ids_N: the tokens.
            rows_N: their rows, ascending; the other rows stay as they are.
        """
        position_N = self._next_B[rows_N]
        self._next_B[rows_N] += 1
        span = int(position_N.max()) + 1
        self.cache.reserve(span)
        visible_NT = torch.arange(span, device=ids_N.device) <= position_N[:, None]
        visible_N11T = None if visible_NT.all() else visible_NT[:, None, None, :]
        tokens = _Tokens(
            rows_N, torch.ones_like(rows_N), position_N[None], self._rotary(position_N[None]), span, visible_N11T
        )
        return self._run(ids_N[None], tokens, self._attend_cached, compact=self.cache.mode != "per_loop")

    def _run(self, ids_SN: Tensor, tokens: _Tokens, attend: Attend, compact: bool) -> Step:
        """All loops; a token's logits are read where it leaves, and with ``compact`` it then leaves the compute too."""
        h_SND = self.model.embedding(ids_SN.t(), position_ids=None)
        chosen_ND = h_SND.new_empty(h_SND.shape[1:])
        depth_N = torch.zeros_like(tokens.rows_N)
        here_N = torch.arange(len(depth_N), device=depth_N.device)  # which of the N tokens are still in the compute
        self.gate.start(tokens.rows_N)
        for loop in range(self.rule.max_depth):
            h_SND = self._stack(h_SND, tokens, loop, attend)
            leaves_N = self._leaves(h_SND, tokens, loop) & (depth_N[here_N] == 0)
            if not leaves_N.any():
                continue
            chosen_ND[here_N[leaves_N]] = last_token(h_SND, tokens.length_N)[leaves_N]
            depth_N[here_N[leaves_N]] = loop + 1
            if compact:
                stay_N = ~leaves_N
                here_N, h_SND, tokens = here_N[stay_N], h_SND[:, stay_N], tokens.keep(stay_N)
                self.gate.keep(stay_N)
                if not len(here_N):
                    break
        return Step(F.linear(chosen_ND, self.model.head_weight()).float(), depth_N)

    def _rotary(self, position_SN: Tensor) -> Rotary:
        return rotary_at(position_SN, self._frequency, self.model.head_weight().dtype)

    def _leaves(self, h_SND: Tensor, tokens: _Tokens, loop: int) -> Tensor:
        """Which tokens may go after this loop."""
        all_N = torch.ones_like(tokens.rows_N, dtype=torch.bool)
        if loop + 1 == self.rule.max_depth:
            return all_N
        if not self.rule.asks_gate:
            return ~all_N
        cumulative_N = self.gate.cumulative(h_SND, tokens.length_N, loop)
        return (cumulative_N >= self.rule.threshold) & (loop + 1 >= self.rule.min_depth)

    def _stack(self, h_SND: Tensor, tokens: _Tokens, loop: int, attend: Attend) -> Tensor:
        """One loop: every layer once, then the loop-end norm."""
        for index, layer in enumerate(self.model.decoder.layers):
            query, entry = self.attentions[index].project(layer.input_layernorm(h_SND), tokens.rotary)
            context = attend(index, loop, tokens, query, entry)
            output = layer.self_attention.linear_proj(context)
            h_SND = layer.self_attn_bda(False, False)(output, h_SND, 0.0)
            output = layer.mlp(layer.pre_mlp_layernorm(h_SND))
            h_SND = layer.mlp_bda(False, False)(output, h_SND, 0.0)
        return self.model.decoder.final_layernorm(h_SND)

    def _attend_prompt(self, layer: int, loop: int, tokens: _Tokens, query: Tensor, entry_SNW: Tensor) -> Tensor:
        self.cache.write_prompt(layer, loop, tokens.rows_N, entry_SNW)
        return self.attentions[layer].attend_prompt(query, entry_SNW)

    def _attend_cached(self, layer: int, loop: int, tokens: _Tokens, query: Tensor, entry_1NW: Tensor) -> Tensor:
        position_N = tokens.position_SN[0]
        seen_NTW = self.cache.update(layer, loop, tokens.rows_N, position_N, entry_1NW[0], tokens.span)
        return self.attentions[layer].attend_cached(query, seen_NTW, tokens.visible_N11T)
