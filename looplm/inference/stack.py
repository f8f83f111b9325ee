"""The shared stack for generation, and the layers around it: run over whatever tokens share a pass, with a cache.

Megatron's inference context keys its cache by layer only and holds no latents, so the blocks run here from their own
weights, in the same order as ``TransformerLayer.forward``. All loops have the same weights, so the stack does not know
which loop a token is in. Only the cache does, through ``attend``.

Shapes: S tokens of a lane, at consecutive positions, N lanes, D hidden, V vocabulary, T positions, K rotary width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.config import ModelConfig
from looplm.inference.attention import ATTENTIONS, Attention, Query
from looplm.model import LoopLM
from looplm.model.attention_gate import gated
from looplm.parameters import chosen

Attend = Callable[[int, Attention, Query, Tensor], Tensor]  # layer, its attention, queries, entries -> contexts
_TABLE_BLOCK = 1024


class LoopedStack:
    """A model's embedding, blocks, norms, exit gate and head.

    Args:
        model: not split over processes. Its weights are shared, not copied.

    Attributes:
        has_prelude: there are layers before the loops.
        has_coda: there are layers between the loops and the head.
        injects: later loops read what entered the first one.
    """

    def __init__(self, model: LoopLM) -> None:
        self.model_config, self.gate = model.model_config, model.gate
        self._embedding_VD = model.embedding.word_embeddings.weight.detach()
        self._head_VD = model.head_weight().detach()
        self.dtype, self.device = self._head_VD.dtype, self._head_VD.device
        self._blocks = [_Block(layer, model.model_config) for layer in model.decoder.layers]
        self._end_norm = model.decoder.final_layernorm.weight.detach()
        prelude, coda = ([] if block is None else block.layers for block in (model.prelude, model.coda))
        self._prelude = [_Block(layer, model.model_config) for layer in prelude]
        self._coda = [_Block(layer, model.model_config) for layer in coda]
        self._coda_norm = None if model.coda is None else model.coda.final_layernorm.weight.detach()
        self.has_prelude, self.has_coda = model.prelude is not None, model.coda is not None
        self.injects = model.injection is not None
        self._norms_state = model.model_config.loop_norm == "state"
        self._injection, self._step_embedding = model.injection, model.step_embedding
        first = model.decoder.layers[0].self_attention
        rotary = model.rotary or first.rotary_pos_emb  # MLA has its own in each layer
        assert rotary is not None
        self._frequency_K = rotary.inv_freq.to(self.device)
        self._turn_TK = torch.empty(0, len(self._frequency_K), dtype=torch.complex64, device=self.device)

    @property
    def queries_per_entry(self) -> int:
        """Number of query heads that attend to the same entry."""
        return self._blocks[0].attention.queries_per_entry

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings [..., D] of ids [...]."""
        return F.embedding(ids, self._embedding_VD)

    def turns(self, position: Tensor, end: int) -> Tensor:
        """Return the rotations [..., 1, K/2] for positions [...] below ``end``, as complex numbers.

        Cosine and sine are rounded to the model's dtype, as in training.
        """
        if end > len(self._turn_TK):
            position_T = torch.arange(-(-end // _TABLE_BLOCK) * _TABLE_BLOCK, device=self.device)
            angle_TK = position_T[:, None].float() * self._frequency_K
            cos_TK, sin_TK = (part.to(self.dtype).float() for part in (angle_TK.cos(), angle_TK.sin()))
            self._turn_TK = torch.complex(cos_TK, sin_TK)
        return self._turn_TK[position].unsqueeze(-2)

    def enter_loop(self, h_SND: Tensor, entered_SND: Tensor, loops: Sequence[int]) -> Tensor:
        """Return the input of each lane's loop, 0-based, from the state and what entered the first loop."""
        if self._injection is not None and any(loops):
            injected_SND: Tensor = self._injection(h_SND, entered_SND)
            is_later_N1 = torch.tensor([[loop > 0] for loop in loops], device=self.device)
            h_SND = torch.where(is_later_N1, injected_SND, h_SND)
        return h_SND if self._step_embedding is None else self._step_embedding.add_to_lanes(h_SND, loops)

    def run(self, h_SND: Tensor, turn_SN1K: Tensor, attend: Attend) -> Tensor:
        """Run one loop: every layer of the stack once, then the loop-end norm if the next loop reads its output."""
        h_SND = self._run(self._blocks, 0, h_SND, turn_SN1K, attend)
        return self._normed(h_SND, self._end_norm) if self._norms_state else h_SND

    def prelude(self, h_SND: Tensor, turn_SN1K: Tensor, attend: Attend) -> Tensor:
        """Run the layers before the loops."""
        return self._run(self._prelude, len(self._blocks), h_SND, turn_SN1K, attend)

    def coda(self, h_SND: Tensor, turn_SN1K: Tensor, attend: Attend) -> Tensor:
        """Run the layers between the loops and the head, and their norm."""
        h_SND = self._run(self._coda, len(self._blocks) + len(self._prelude), h_SND, turn_SN1K, attend)
        return self._normed(h_SND, self._coda_norm)

    def readable(self, h: Tensor) -> Tensor:
        """Return what the gate, and without a coda the head, read of the hidden state after a loop."""
        return h if self._norms_state else self._normed(h, self._end_norm)

    def _run(self, blocks: list["_Block"], first: int, h_SND: Tensor, turn_SN1K: Tensor, attend: Attend) -> Tensor:
        """Run blocks whose cache entries are those of the layers from ``first`` on."""
        for layer, block in enumerate(blocks, first):
            x_SND = block.norm(h_SND, block.before_attention)
            query, entry_SNW = block.attention.project(x_SND, turn_SN1K)
            context = attend(layer, block.attention, query, entry_SNW)
            if block.output_gate is not None:
                context = gated(context, F.linear(x_SND, block.output_gate))
            h_SND = h_SND + block.norm(F.linear(context, block.out), block.after_attention)
            gate, up = F.linear(block.norm(h_SND, block.before_mlp), block.fc1).chunk(2, dim=-1)
            h_SND = h_SND + block.norm(F.linear(F.silu(gate) * up, block.fc2), block.after_mlp)
        return h_SND

    def _normed(self, h: Tensor, weight_D: Tensor | None) -> Tensor:
        assert weight_D is not None
        return torch.rms_norm(h, weight_D.shape, weight_D, self.model_config.norm_eps)

    def head(self, h: Tensor) -> Tensor:
        """Return logits [..., V] in fp32 for what :meth:`coda` returns, or without one :meth:`readable`."""
        return F.linear(h, self._head_VD).float()


class _Block:
    """The weights of one block."""

    def __init__(self, layer: Any, config: ModelConfig) -> None:
        attention = chosen(ATTENTIONS, "model.attention", config.attention)
        self.attention = attention(layer.self_attention, config)
        gates = config.attention_gate != "none"
        self.output_gate = layer.self_attention.linear_gate.weight.detach() if gates else None
        self.out = layer.self_attention.linear_proj.weight.detach()
        self.fc1, self.fc2 = layer.mlp.linear_fc1.weight.detach(), layer.mlp.linear_fc2.weight.detach()
        self.before_attention = layer.input_layernorm.weight.detach()
        self.before_mlp = layer.pre_mlp_layernorm.weight.detach()
        self.after_attention: Tensor | None = None
        self.after_mlp: Tensor | None = None
        if config.sandwich_norm:
            self.after_attention = layer.self_attn_bda.norm.weight.detach()
            self.after_mlp = layer.mlp_bda.norm.weight.detach()
        self._eps = config.norm_eps

    def norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Apply RMSNorm with this weight; return ``x`` itself if the weight is None."""
        return x if weight is None else torch.rms_norm(x, weight.shape, weight, self._eps)
