"""The model's attention with a cache between its two halves: tokens to queries and entries, entries to contexts.

What a token leaves behind is one vector per layer, its *entry* [W]:

    MLA        [normed latent C | rotated rotary key K']     keys and values of all heads grow from it
    MHA, GQA   [rotated keys G * K | values G * K]

A prompt is attended to as in training: causally, heads expanded. A later token attends to cached entries. MLA then never
expands them: since ``q . (U c) = (U^T q) . c``, queries go down into the latent space, the softmax runs over entries as
they lie in the cache, and one up-projection per token makes the values (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

Shapes: S sequence, N tokens side by side (one per row), D hidden, H heads, G key-value heads, K query-key width,
V value width, C latent, W entry, T cached positions.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.config import ModelConfig
from looplm.model import LoopLM


class Rotary(NamedTuple):
    """Cosine and sine of every token's angles, [S, N, 1, K]."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x_SNHK: Tensor) -> Tensor:
        """Half-split rotation, as the training path's (Megatron's ``_apply_rotary_pos_emb_bshd``)."""
        first, second = x_SNHK.chunk(2, dim=-1)
        return x_SNHK * self.cos + torch.cat((-second, first), dim=-1) * self.sin

    def rotate_pairs(self, x_SNHK: Tensor) -> Tensor:
        """The same for channels that lie in pairs (0,1), (2,3), ...: MLA's."""
        return self.rotate(torch.cat((x_SNHK[..., 0::2], x_SNHK[..., 1::2]), dim=-1))


def rotary_at(position_SN: Tensor, frequency_K: Tensor, dtype: torch.dtype) -> Rotary:
    """The angles at these positions, from the model's own frequencies; rounded to the model's type as in training."""
    angle = position_SN[..., None, None].float() * frequency_K.to(position_SN.device)
    angle = torch.cat((angle, angle), dim=-1)
    return Rotary(angle.cos().to(dtype), angle.sin().to(dtype))


class LatentAttention:
    """MLA. Built on the model's own module; the absorbed matrices are views of its weights."""

    def __init__(self, module: Any, shape: ModelConfig) -> None:
        self.module = module
        self.heads, self.latent = shape.num_attention_heads, shape.kv_lora_rank
        self.nope, self.rope, self.value = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim
        up_HXC = module.linear_kv_up_proj.weight.view(self.heads, self.nope + self.value, self.latent)
        self.key_up_HKC, self.value_up_HVC = up_HXC.split([self.nope, self.value], dim=1)

    def project(self, x_SND: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Queries [S, N, H, K] and entries [S, N, W]."""
        m = self.module
        if m.config.q_lora_rank is None:
            query = m.linear_q_proj(x_SND)[0]
        else:
            query = m.linear_q_up_proj(m.q_layernorm(m.linear_q_down_proj(x_SND)[0]))[0]
        nope, rope = query.unflatten(-1, (self.heads, -1)).split([self.nope, self.rope], dim=-1)
        latent, key_rope = m.linear_kv_down_proj(x_SND)[0].split([self.latent, self.rope], dim=-1)
        entry_SNW = torch.cat((m.kv_layernorm(latent), rotary.rotate_pairs(key_rope.unsqueeze(2)).squeeze(2)), dim=-1)
        return torch.cat((nope, rotary.rotate_pairs(rope)), dim=-1), entry_SNW

    def attend_prompt(self, query_SNHK: Tensor, entry_SNW: Tensor) -> Tensor:
        """Each position over itself and those before it: contexts [S, N, H * V]."""
        latent, key_rope = entry_SNW.split([self.latent, self.rope], dim=-1)
        grown = self.module.linear_kv_up_proj(latent)[0].unflatten(-1, (self.heads, -1))
        nope, value = grown.split([self.nope, self.value], dim=-1)
        key = torch.cat((nope, key_rope.unsqueeze(2).expand(-1, -1, self.heads, -1)), dim=-1)
        return self.module.core_attention(query_SNHK, key, value, None)

    def attend_cached(self, query_1NHK: Tensor, entry_NTW: Tensor, visible_N11T: Tensor | None) -> Tensor:
        """One token per row over that row's entries: contexts [1, N, H * V]."""
        nope, rope = query_1NHK[0].split([self.nope, self.rope], dim=-1)
        query_NHW = torch.cat((torch.einsum("nhk,hkc->nhc", nope, self.key_up_HKC), rope), dim=-1)
        # All heads share the entries: for the kernel they are H queries of one head. Values are the entries' first C.
        entry_N1TW = entry_NTW.unsqueeze(1)
        mixed_N1HW = F.scaled_dot_product_attention(
            query_NHW.unsqueeze(1), entry_N1TW, entry_N1TW, visible_N11T, scale=self.module.softmax_scale
        )
        mixed_NHC = mixed_N1HW[:, 0, :, : self.latent]
        return torch.einsum("nhc,hvc->nhv", mixed_NHC, self.value_up_HVC).flatten(1).unsqueeze(0)


class HeadAttention:
    """MHA and GQA: the cache holds keys and values of each key-value head."""

    def __init__(self, module: Any, shape: ModelConfig) -> None:
        self.module = module
        self.groups, self.width = shape.query_groups, shape.attention_head_dim

    def project(self, x_SND: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Queries [S, N, H, K] and entries [S, N, W]."""
        query, key, value = self.module.get_query_key_value_tensors(x_SND)[:3]
        return rotary.rotate(query), torch.cat((rotary.rotate(key).flatten(2), value.flatten(2)), dim=-1)

    def attend_prompt(self, query_SNHK: Tensor, entry_SNW: Tensor) -> Tensor:
        """Each position over itself and those before it: contexts [S, N, H * K]."""
        key, value = entry_SNW.unflatten(-1, (2, self.groups, self.width)).unbind(2)
        return self.module.core_attention(query_SNHK, key, value, None)

    def attend_cached(self, query_1NHK: Tensor, entry_NTW: Tensor, visible_N11T: Tensor | None) -> Tensor:
        """One token per row over that row's entries: contexts [1, N, H * K]."""
        key, value = entry_NTW.unflatten(-1, (2, self.groups, self.width)).permute(2, 0, 3, 1, 4)
        query_NGQK = query_1NHK[0].unflatten(1, (self.groups, -1))
        mixed_NGQK = F.scaled_dot_product_attention(query_NGQK, key, value, visible_N11T)
        return mixed_NGQK.flatten(1).unsqueeze(0)


def cached_attentions(model: LoopLM) -> tuple[list[LatentAttention | HeadAttention], Tensor]:
    """One per layer, and the rotary frequencies that the model was trained with."""
    modules = [layer.self_attention for layer in model.decoder.layers]
    if model.shape.attention == "mla":
        return [LatentAttention(module, model.shape) for module in modules], modules[0].rotary_pos_emb.inv_freq
    assert model.rotary is not None
    return [HeadAttention(module, model.shape) for module in modules], model.rotary.inv_freq
