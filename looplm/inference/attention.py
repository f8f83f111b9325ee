"""The model's attention, split where the cache is: tokens to queries and entries, cached entries to contexts.

The cache keeps one vector per token and layer, its *entry* [W]:

    MLA        [normed or refined latent C | rotated rotary key K']     all heads' keys and values are projected from it
    MHA, GQA   [rotated keys G * K | values G * K]

A prompt attends as in training: causally, with all heads expanded. A later token attends to cached entries. MLA never
expands those: since ``q . (U c) = (U^T q) . c``, queries are projected down into the latent space, the softmax runs
over the entries as cached, and one up-projection per token gives the values (DeepSeek-V2, arXiv 2405.04434, section
2.1.2).

The weights are the model's own, used in plain torch calls: the overhead of module calls would show in the time that one
token takes. Rotated channels are stored as adjacent pairs, whatever their order in training. Queries and keys use the
same order, so their products do not change.

Shapes: S tokens of a lane, at consecutive positions, N lanes, D hidden, H heads, G key-value heads, P query heads per
key-value head, K query-key width, V value width, C latent, W entry, T cached positions, Q queries per entry and lane.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.config import ModelConfig

Query = tuple[Tensor, ...]


def rotate(x_SNHK: Tensor, turn_SN1K: Tensor) -> Tensor:
    """Rotate the pairs of channels (0,1), (2,3), ... by complex numbers of length 1, [S, N, 1, K/2]."""
    pairs = torch.view_as_complex(x_SNHK.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn_SN1K).flatten(-2).to(x_SNHK.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask_11ST: Tensor | None, scale: float | None = None) -> Tensor:
    """Attend over a prompt.

    Args:
        query: [S, N, H, K].
        key: [T, N, G, K].
        value: [T, N, G, V].
        mask_11ST: is added to the scores; None for a causal mask with S = T.
        scale: of the scores; None for 1 / sqrt(K).

    Returns:
        [S, N, H * V].
    """
    width, missing = value.size(-1), key.size(-1) - value.size(-1)
    if missing > 0:  # with unequal widths, torch leaves the flash kernel for one that materializes S x T
        value = F.pad(value, (0, missing))
    query_NHSK, key_NGTK, value_NGTV = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    causal, grouped = mask_11ST is None, key.size(2) != query.size(2)
    mixed_NHSV = F.scaled_dot_product_attention(
        query_NHSK, key_NGTK, value_NGTV, attn_mask=mask_11ST, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return mixed_NHSV[..., :width].permute(2, 0, 1, 3).flatten(2)


class CachedLatentAttention:
    """MLA. The absorbed matrices are views of the model's weights.

    Args:
        module: Megatron's attention.
        config: the model's.
    """

    def __init__(self, module: Any, config: ModelConfig) -> None:
        self.scale, self.eps = module.softmax_scale, config.norm_eps
        self.heads, self.latent = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.queries_per_entry = self.heads
        self._has_query_latent = config.q_lora_rank is not None
        if self._has_query_latent:
            self._query_down = module.linear_q_down_proj.weight.detach()
            self._query_norm = module.q_layernorm.weight.detach()
            self._query = module.linear_q_up_proj.weight.detach()
        else:
            self._query = module.linear_q_proj.weight.detach()
        self._down = module.linear_kv_down_proj.weight.detach()
        self._refine = module.kv_layernorm if config.latent_iterations else None
        has_norm = config.kv_latent_norm and self._refine is None
        self._norm = module.kv_layernorm.weight.detach() if has_norm else None
        self._up = module.linear_kv_up_proj.weight.detach()
        up_HXC = self._up.view(self.heads, self.nope + self.value, self.latent)
        self._key_up_HKC, value_up_HVC = up_HXC.split([self.nope, self.value], dim=1)
        self._value_up_HCV = value_up_HVC.transpose(1, 2)

    def project(self, x_SND: Tensor, turn_SN1K: Tensor) -> tuple[Query, Tensor]:
        """Return queries ([S, N, H, K] without and with position) and entries [S, N, W]."""
        down = x_SND
        if self._has_query_latent:
            down = F.linear(x_SND, self._query_down)
            down = torch.rms_norm(down, self._query_norm.shape, self._query_norm, self.eps)
        query = F.linear(down, self._query).unflatten(-1, (self.heads, -1))
        nope, rope = query.split_with_sizes([self.nope, self.rope], -1)
        projected = F.linear(x_SND, self._down)
        latent, key_rope = projected[..., : self.latent], projected[..., self.latent :]
        if self._norm is not None:
            latent = torch.rms_norm(latent, self._norm.shape, self._norm, self.eps)
        if self._refine is not None:
            latent = self._refine(latent)
        turned = rotate(torch.cat((rope, key_rope.unsqueeze(2)), dim=2), turn_SN1K)
        return (nope, turned[:, :, : self.heads]), torch.cat((latent, turned[:, :, self.heads]), dim=-1)

    def attend_prompt(self, query: Query, entry_TNW: Tensor, mask_11ST: Tensor | None) -> Tensor:
        """Return contexts [S, N, H * V] of the last S of T positions, which attend to all positions up to their own."""
        latent, key_rope = entry_TNW.split_with_sizes([self.latent, self.rope], -1)
        expanded = F.linear(latent, self._up).unflatten(-1, (self.heads, -1))
        nope, value = expanded.split_with_sizes([self.nope, self.value], -1)
        key = torch.cat((nope, key_rope.unsqueeze(2).expand(-1, -1, self.heads, -1)), dim=-1)
        return attend(torch.cat(query, dim=-1), key, value, mask_11ST, self.scale)

    def attend_cached(self, query: Query, entry_NTW: Tensor, mask_N1QT: Tensor | None) -> Tensor:
        """Return contexts [S, N, H * V] of tokens that attend to their lanes' entries; Q is S * H."""
        nope, rope = query
        length, lanes = nope.shape[:2]
        lowered_HXC = torch.bmm(nope.flatten(0, 1).transpose(0, 1), self._key_up_HKC)
        query_SNHW = torch.cat((lowered_HXC.transpose(0, 1).unflatten(0, (length, lanes)), rope), dim=-1)
        # All heads share the entries, so the kernel sees them as queries of one head. Values are the entries' first C.
        query_N1QW = query_SNHW.transpose(0, 1).flatten(1, 2).unsqueeze(1)
        entry_N1TW = entry_NTW.unsqueeze(1)
        mixed_N1QW = F.scaled_dot_product_attention(query_N1QW, entry_N1TW, entry_N1TW, mask_N1QT, scale=self.scale)
        mixed_NSHC = mixed_N1QW[:, 0, :, : self.latent].unflatten(1, (length, self.heads))
        mixed_HXC = mixed_NSHC.transpose(0, 1).flatten(0, 1).transpose(0, 1)
        return torch.bmm(mixed_HXC, self._value_up_HCV).transpose(0, 1).reshape(length, lanes, -1)


class CachedHeadAttention:
    """MHA and GQA. The cache holds keys and values of each key-value head; see :class:`CachedLatentAttention`."""

    def __init__(self, module: Any, config: ModelConfig) -> None:
        self.groups, self.width = config.query_groups, config.attention_head_dim
        self.queries_per_entry = config.num_attention_heads // config.query_groups
        self.eps = config.norm_eps
        self._qkv = module.linear_qkv.weight.detach()
        self._bias = module.linear_qkv.bias.detach() if config.qkv_bias else None
        self._norms = None
        if config.qk_norm:
            self._norms = module.q_layernorm.weight.detach(), module.k_layernorm.weight.detach()

    def project(self, x_SND: Tensor, turn_SN1K: Tensor) -> tuple[Query, Tensor]:
        """Return queries [S, N, G, P, K] and entries [S, N, W]."""
        per = self.queries_per_entry
        grouped = F.linear(x_SND, self._qkv, self._bias).unflatten(-1, (self.groups, per + 2, self.width))
        heads, value = grouped[:, :, :, : per + 1], grouped[:, :, :, per + 1]
        if self._norms is not None:
            parts = zip(heads.split([per, 1], 3), self._norms, strict=True)
            heads = torch.cat([torch.rms_norm(part, weight.shape, weight, self.eps) for part, weight in parts], 3)
        # The model rotates channel i together with i + K/2; make such pairs adjacent.
        pairs = heads.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        turned = rotate(pairs, turn_SN1K.unsqueeze(2))
        key = turned[:, :, :, per]
        return (turned[:, :, :, :per],), torch.cat((key.flatten(2), value.flatten(2)), dim=-1)

    def attend_prompt(self, query: Query, entry_TNW: Tensor, mask_11ST: Tensor | None) -> Tensor:
        """Return contexts [S, N, H * K] of the last S of T positions, which attend to all positions up to their own."""
        key, value = entry_TNW.unflatten(-1, (2, self.groups, self.width)).unbind(2)
        return attend(query[0].flatten(2, 3), key, value, mask_11ST)

    def attend_cached(self, query: Query, entry_NTW: Tensor, mask_N1QT: Tensor | None) -> Tensor:
        """Return contexts [S, N, H * K] of tokens that attend to their lanes' entries; Q is S * P."""
        key, value = entry_NTW.unflatten(-1, (2, self.groups, self.width)).permute(2, 0, 3, 1, 4)
        (query_SNGPK,) = query
        query_NGQK = query_SNGPK.permute(1, 2, 0, 3, 4).flatten(2, 3)
        mixed_NGQK = F.scaled_dot_product_attention(query_NGQK, key, value, mask_N1QT)
        mixed_NGSPK: Tensor = mixed_NGQK.unflatten(2, (-1, self.queries_per_entry))
        return mixed_NGSPK.permute(2, 0, 1, 3, 4).flatten(2)


Attention = CachedLatentAttention | CachedHeadAttention
ATTENTIONS: dict[str, type[Attention]] = {"mla": CachedLatentAttention, "mha": CachedHeadAttention}
