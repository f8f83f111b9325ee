"""The block of a LoopLM. This file travels inside an export and needs only torch and transformers.

Shapes: B batch, S tokens of this call, T tokens seen (cached ones and these), D hidden, H heads, G key-value heads, K
query-key width, W value width, C latent, R loops. Loops count from 0.

Sources: loops, sandwich norms: Ouro (arXiv 2510.25741). Latent attention: DeepSeek-V2 (2405.04434). Gate on attention's
output: 2505.06708.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_looplm import View
from .configuration_looplm import LoopLMConfig
from .latent_reasoning_looplm import LoopLMLatentReasoning
from .norm_looplm import LoopLMRMSNorm


class LoopLMMLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: LoopLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))


class LoopLMHeadAttention(nn.Module):
    """Multi-head or grouped-query attention. Channels i and i + K/2 rotate together, as in Llama."""

    def __init__(self, config: LoopLMConfig, block: int) -> None:
        super().__init__()
        self.block, self.width = block, config.head_dim
        hidden, width, bias = config.hidden_size, self.width, config.qkv_bias
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * width, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm, self.k_norm = (LoopLMRMSNorm(width, config.rms_norm_eps) for _ in range(2))
        self.output_gate_proj = output_gate(config, width)
        self.o_proj = nn.Linear(config.num_attention_heads * width, hidden, bias=False)

    def forward(self, x_BSD: Tensor, view: View, loop: int) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (linear(x_BSD).unflatten(-1, (-1, self.width)).transpose(1, 2) for linear in projections)
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, view), rotate(key, view)
        if view.cache is not None:
            key, value = view.cache.store(loop, self.block, key, value, view.rows)
        mixed = attend(query, key, value, view.visible_B1ST, self.width**-0.5)
        return self.o_proj(gated(mixed, x_BSD, self.output_gate_proj))


class LoopLMLatentAttention(nn.Module):
    """Multi-head latent attention: all heads' keys and values come from one latent, and they share one rotary key.

    Channels (0, 1), (2, 3), ... of the rotary part rotate together, as in DeepSeek. The latent and the rotary key are
    cached. Later calls do not recompute the keys of past tokens: since ``q . (U c) = (U^T q) . c``, they project the
    queries down into the latent space instead, and the mixed latents up to values.
    """

    def __init__(self, config: LoopLMConfig, block: int) -> None:
        super().__init__()
        self.block, self.heads, self.latent = block, config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.scale = (self.nope + self.rope) ** -0.5
        hidden, query_rows = config.hidden_size, self.heads * (self.nope + self.rope)
        self.q_lora_rank = config.q_lora_rank
        if self.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_rows, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, self.q_lora_rank, bias=False)
            self.q_a_layernorm = LoopLMRMSNorm(self.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(self.q_lora_rank, query_rows, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=False)
        has_norm = config.kv_latent_norm and not config.latent_iterations  # the unit has one of its own
        self.kv_a_layernorm = LoopLMRMSNorm(self.latent, config.rms_norm_eps) if has_norm else None
        self.latent_reasoning = LoopLMLatentReasoning(config) if config.latent_iterations else None
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.output_gate_proj = output_gate(config, self.value)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=False)

    def forward(self, x_BSD: Tensor, view: View, loop: int) -> Tensor:
        return self.o_proj(gated(self._attend(x_BSD, view, loop), x_BSD, self.output_gate_proj))

    def _attend(self, x_BSD: Tensor, view: View, loop: int) -> Tensor:
        if self.q_lora_rank is None:
            query = self.q_proj(x_BSD)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        nope, rope = query.unflatten(-1, (self.heads, -1)).transpose(1, 2).split([self.nope, self.rope], -1)
        latent, key_rope = self.kv_a_proj_with_mqa(x_BSD).unsqueeze(1).split([self.latent, self.rope], -1)
        rope, key_rope = rotate(evens_then_odds(rope), view), rotate(evens_then_odds(key_rope), view)
        if self.kv_a_layernorm is not None:
            latent = self.kv_a_layernorm(latent)
        if self.latent_reasoning is not None:
            latent = self.latent_reasoning(latent)
        if view.cache is not None:
            latent, key_rope = view.cache.store(loop, self.block, latent, key_rope, view.rows)
        # Adapters and quantization put other modules here, and offloading leaves no weight: then call the module.
        is_plain = type(self.kv_b_proj) is nn.Linear and not self.kv_b_proj.weight.is_meta
        if is_plain and latent.size(2) > x_BSD.size(1):
            return self._attend_latents(nope, rope, latent, key_rope, view.visible_B1ST)
        projected = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).squeeze(1).transpose(1, 2)
        key_nope, value = projected.split([self.nope, self.value], -1)
        key = torch.cat((key_nope, key_rope.expand(-1, self.heads, -1, -1)), -1)
        return attend(torch.cat((nope, rope), -1), key, value, view.visible_B1ST, self.scale)

    def _attend_latents(
        self, nope: Tensor, rope: Tensor, latent_B1TC: Tensor, key_rope_B1TK: Tensor, visible_B1ST: Tensor | None
    ) -> Tensor:
        """Attend in the absorbed form. For the kernel, all heads are queries of the one head that has the entries."""
        up_HXC = self.kv_b_proj.weight.view(self.heads, -1, self.latent)
        key_up_HKC, value_up_HWC = up_HXC.split([self.nope, self.value], 1)
        length = nope.size(2)
        query_B1QK = torch.cat((torch.einsum("bhsk,hkc->bhsc", nope, key_up_HKC), rope), -1).flatten(1, 2).unsqueeze(1)
        entry_B1TK = torch.cat((latent_B1TC, key_rope_B1TK), -1)
        mask = None if visible_B1ST is None else visible_B1ST.repeat(1, 1, self.heads, 1)
        mixed = F.scaled_dot_product_attention(query_B1QK, entry_B1TK, entry_B1TK, attn_mask=mask, scale=self.scale)
        mixed_BHSC = mixed[:, 0, :, : self.latent].unflatten(1, (self.heads, length))
        return torch.einsum("bhsc,hwc->bshw", mixed_BHSC, value_up_HWC).flatten(2)


ATTENTIONS: dict[str, type[nn.Module]] = {"mla": LoopLMLatentAttention, "mha": LoopLMHeadAttention}


class LoopLMBlock(GradientCheckpointingLayer):
    """``x + norm_b(attention(norm_a(x)))``, then ``x + norm_d(mlp(norm_c(x)))``; b and d are the sandwich norms."""

    def __init__(self, config: LoopLMConfig, block: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = ATTENTIONS[config.attention](config, block), LoopLMMLP(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.post_attention_layernorm = LoopLMRMSNorm(width, eps), LoopLMRMSNorm(width, eps)
        self.sandwich_norm = config.sandwich_norm
        if self.sandwich_norm:  # a small initial sublayer output would be normalized away; the gain is small instead
            loops = config.total_ut_steps if config.residual_gain == "depth" else config.total_ut_steps**2
            outside = config.prelude_layers + config.coda_layers
            start = (2 * (config.num_hidden_layers * loops + outside)) ** -0.5
            self.input_layernorm_2 = LoopLMRMSNorm(width, eps, start)
            self.post_attention_layernorm_2 = LoopLMRMSNorm(width, eps, start)

    def forward(self, x_BSD: Tensor, view: View, loop: int) -> Tensor:
        y_BSD = self.self_attn(self.input_layernorm(x_BSD), view, loop)
        x_BSD = x_BSD + (self.input_layernorm_2(y_BSD) if self.sandwich_norm else y_BSD)
        y_BSD = self.mlp(self.post_attention_layernorm(x_BSD))
        return x_BSD + (self.post_attention_layernorm_2(y_BSD) if self.sandwich_norm else y_BSD)


def output_gate(config: LoopLMConfig, value: int) -> nn.Linear | None:
    """Return the projection to attention's output gate: a logit of each head, or of each of its ``value`` channels."""
    if config.attention_gate == "none":
        return None
    per_head = 1 if config.attention_gate == "head" else value
    return nn.Linear(config.hidden_size, config.num_attention_heads * per_head, bias=False)


def gated(mixed: Tensor, x_BSD: Tensor, projection: nn.Module | None) -> Tensor:
    """Return attention's output [B, S, H * W], gated by the sigmoids of a projection of the block's input if given."""
    if projection is None:
        return mixed
    gate = torch.sigmoid(projection(x_BSD)).unsqueeze(-1)
    return (mixed.unflatten(-1, (gate.size(-2), -1)) * gate).flatten(-2)


def rotate(x_BHSK: Tensor, view: View) -> Tensor:
    """Rotate the channels i and i + K/2 by the angles of the tokens' positions."""
    first, second = x_BHSK.chunk(2, -1)
    cos, sin = view.cos_B1SK, view.sin_B1SK
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BHSK.dtype)


def evens_then_odds(x: Tensor) -> Tensor:
    """Move channels (0, 1), (2, 3), ... to where :func:`rotate` expects pairs; queries and keys share the order."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Attend: [B, H, S, K], [B, G, T, K], [B, G, T, W] and [B, 1, S, T] give [B, S, H * W]."""
    width = value.size(-1)
    if key.size(-1) > width:  # unequal widths would exclude the flash kernel for one that materializes S x T
        value = F.pad(value, (0, key.size(-1) - width))
    causal, grouped = visible is None and query.size(2) > 1, key.size(1) != query.size(1)
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return mixed[..., :width].transpose(1, 2).flatten(2)
