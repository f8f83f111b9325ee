"""Plain or grouped attention made latent: rotary keys beside a latent that values, and the rest of the keys, grow from.

Three things stand between multi-head attention (MHA) and multi-head latent attention (MLA).

*Rotary keys.* MLA's is shared by all heads, MHA has one per key-value head. Channel pair k of a key is a complex number that
the position turns with frequency k, the same in every head; a unitary mix across heads of the pairs of one frequency
therefore commutes with the turning (TransMLA, arXiv 2502.07864). We mix by principal components, so that the first mixed
key holds most, and lay M of them side by side as the shared key (``model.qk_rope_period`` repeats the frequencies). Each
head's query takes the mix back. M = G keys are exact. What fewer keep out becomes a key without position: what turns by
w d at distance d is replaced by its mean over near distances, cos(w d) over d < 32. (Without that factor, M = 1 of 4 keys
cost ten times as much loss.)

*The latent* is a projection of the normed hidden state u: the principal components of what is to grow from it.

*Its norm.* MLA normalises the latent, MHA has nothing there. But u has a mean square of 1, and a projection on
orthonormal directions of full width keeps it: at kv_lora_rank = hidden_size the norm does nothing. (Up to the norms'
epsilon: the mean square of what u is made from must be far above it.) Narrower latents vary in length from token to
token, and the norm takes that away.

MLA divides scores by the root of another width; queries carry the difference.

Shapes: D hidden, H heads, G key-value heads, K head width, F = K/2 frequencies, M rotary keys kept, C latent, N rows.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from looplm.accounting import cache_values_per_token
from looplm.cli import require
from looplm.config import GateConfig, ModelConfig
from looplm.huggingface.names import entries
from tools.upcycling.parts import Parts, Upcycled

_NEAR = 32  # distances, in tokens, at which attention mostly looks


class Attention(NamedTuple):
    """The projections of one layer's plain attention, in fp64, as they act on u (the norm's gain is in them)."""

    query_HKD: Tensor
    key_GKD: Tensor
    value_GKD: Tensor


def to_latent(
    parts: Parts, kv_lora_rank: int, qk_rope_head_dim: int | None, moments_LDD: Sequence[Tensor] | None
) -> Upcycled:
    """The model with MLA in place of MHA.

    Args:
        parts: of a model with plain or grouped attention.
        kv_lora_rank: C, at most D.
        qk_rope_head_dim: M K, a multiple of the head's width; None takes every head's key (M = G).
        moments_LDD: second moments E[u u^T] of each layer's normed input (:mod:`tools.upcycling.calibrate`); None takes
            all directions as equally likely.

    Raises:
        UserError: another attention, or widths that do not fit.
    """
    shape = parts.model
    require(shape.attention == "mha", "checkpoint", shape.attention, "its attention is latent already; give a model with model.attention=mha")  # fmt: skip
    for key in ("qkv_bias", "qk_norm"):
        require(not getattr(shape, key), "checkpoint", f"model.{key}=true", "latent attention has no place for it; give a model without")  # fmt: skip
    width, groups = shape.attention_head_dim, shape.query_groups
    rope = groups * width if qk_rope_head_dim is None else qk_rope_head_dim
    legal = rope % width == 0 and 0 < rope <= groups * width
    require(legal, "qk_rope_head_dim", rope, f"give a multiple of the head's width {width}, up to {groups * width}")
    fix = f"give a number from 1 to the source's hidden_size={shape.hidden_size}"
    require(0 < kv_lora_rank <= shape.hidden_size, "kv_lora_rank", kv_lora_rank, fix)
    model = replace(
        shape,
        attention="mla",
        num_query_groups=None,
        head_dim=None,
        q_lora_rank=None,
        kv_lora_rank=kv_lora_rank,
        qk_nope_head_dim=0 if rope == groups * width else width,
        qk_rope_head_dim=rope,
        qk_rope_period=None if rope == width else width,
        v_head_dim=width,
    )
    weights = dict(parts.weights)
    isotropic = torch.eye(shape.hidden_size, dtype=torch.float64)
    for layer in range(shape.num_layers):
        moment_DD = isotropic if moments_LDD is None else moments_LDD[layer]
        prefix = f"decoder.layers.{layer}."
        gain = prefix + "input_layernorm.weight"
        plain = _attention(shape, layer, weights, weights[gain])
        del weights[f"{prefix}self_attention.linear_qkv.weight"]
        latent = convert(plain, model, moment_DD, shape.norm_eps)
        weights |= {f"{prefix}self_attention.{name}": weight.float() for name, weight in latent.items()}
        weights[gain] = torch.ones_like(weights[gain])
    return Upcycled(Parts(model, parts.gate, weights), *_account(shape, model))


def convert(plain: Attention, model: ModelConfig, moment_DD: Tensor, eps: float) -> dict[str, Tensor]:
    """One layer's projections for MLA, by the end of our names.

    Args:
        plain: the layer's.
        model: of the result.
        moment_DD: second moment of u, with a trace of D.
        eps: of the norms.
    """
    heads, groups = len(plain.query_HKD), len(plain.key_GKD)
    kept = model.qk_rope_head_dim // model.v_head_dim
    key_GFD, query_HFD = _complex(plain.key_GKD), _complex(plain.query_HKD)
    mix_FGM = _principal(key_GFD, moment_DD)[:, :, :kept]  # of keys z: z_g = sum_m mix_gm y_m, and y = mix^H z
    rotary_FMD = mix_FGM.mH @ key_GFD.transpose(0, 1)
    group_H = torch.arange(heads) // (heads // groups)
    turned_HMFD = torch.einsum("fhm,hfd->hmfd", mix_FGM[:, group_H].conj(), query_HFD)
    left_GFD = (key_GFD - (mix_FGM @ rotary_FMD).transpose(0, 1)) * _mean_turn(model)[:, None]

    grown_GND = plain.value_GKD
    query_HND = _pairs(turned_HMFD.flatten(1, 2))
    if model.qk_nope_head_dim:
        grown_GND = torch.cat((_halves(left_GFD), plain.value_GKD), dim=1)
        query_HND = torch.cat((plain.query_HKD, query_HND), dim=1)
    down_CD, up_NC = factorise(grown_GND.flatten(0, 1), moment_DD, model.kv_lora_rank)
    length = (torch.einsum("cd,de,ce->", down_CD, moment_DD, down_CD) / len(down_CD) + eps).sqrt()
    scale = math.sqrt(model.attention_head_dim / model.v_head_dim)
    return {
        "linear_q_proj.weight": query_HND.flatten(0, 1) * scale,
        "linear_kv_down_proj.weight": torch.cat((down_CD, _pairs(rotary_FMD.transpose(0, 1).flatten(0, 1)))),
        "kv_layernorm.weight": length.expand(len(down_CD)).clone(),
        "linear_kv_up_proj.weight": up_NC.unflatten(0, (groups, -1))[group_H].flatten(0, 1),
    }


def factorise(target_ND: Tensor, moment_DD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``up_NC @ down_CD``, nearest to ``target_ND`` on vectors of this second moment; the rows of down are orthonormal."""
    root_DD = _root(moment_DD)
    left_NN, _, _ = torch.linalg.svd(target_ND @ root_DD)
    rows_CD = left_NN[:, :rank].mT @ target_ND
    _, _, basis_DD = torch.linalg.svd(rows_CD)  # its first rows span them, the others make it whole
    down_CD = basis_DD[:rank]
    seen_CC = down_CD @ moment_DD @ down_CD.mT
    return down_CD, torch.linalg.solve(seen_CC, down_CD @ moment_DD @ target_ND.mT).mT


def _mean_turn(model: ModelConfig) -> Tensor:
    """What is left, on average over near tokens, of a pair of each frequency that no longer turns: [F]."""
    frequency_F = model.rope_base ** (-torch.arange(0, model.rope_period, 2, dtype=torch.float64) / model.rope_period)
    return torch.outer(torch.arange(_NEAR, dtype=torch.float64), frequency_F).cos().mean(0)


def _account(plain: ModelConfig, latent: ModelConfig) -> tuple[list[str], list[str]]:
    """What is exact, what is not."""
    exact, approximate = ["everything but the attention's projections"], []
    keys, kept = plain.query_groups, latent.qk_rope_head_dim // latent.rope_period
    if kept == keys:
        exact.append(f"rotary keys: all {keys} of width {latent.rope_period}, side by side")
    else:
        approximate.append(
            f"rotary keys: {kept} of {keys} mixed ones keep their position, the rest of each key has none"
        )
    if latent.kv_lora_rank == plain.hidden_size:
        exact.append("the latent: its norm does nothing at full width, up to the norms' epsilon")
    else:
        what = "values" if kept == keys else "values and keys without position"
        approximate.append(f"{what}: from a latent of {latent.kv_lora_rank} of {plain.hidden_size}, whose length per token the norm takes away")  # fmt: skip
    cached = [cache_values_per_token(shape, 1) for shape in (plain, latent)]
    exact.append(f"the cache holds {cached[1]:,} numbers per token and loop, before {cached[0]:,}")
    return exact, approximate


def _principal(key_GFD: Tensor, moment_DD: Tensor) -> Tensor:
    """For each frequency the unitary [G, G] of its pairs' principal components across heads, largest first."""
    key_FGD = key_GFD.transpose(0, 1)
    _, vectors_FGG = torch.linalg.eigh(key_FGD @ moment_DD.to(key_FGD.dtype) @ key_FGD.mH)
    return vectors_FGG.flip(-1)


def _attention(shape: ModelConfig, layer: int, weights: dict[str, Tensor], gain_D: Tensor) -> Attention:
    name = f"decoder.layers.{layer}.self_attention.linear_qkv.weight"
    (entry,) = (entry for entry in entries(shape, GateConfig()) if entry.ours == name)
    parts = entry.split((weights[name] * gain_D).double())
    return Attention(*(part.unflatten(0, (-1, shape.attention_head_dim)) for part in parts))


def _complex(x_GKD: Tensor) -> Tensor:
    """MHA turns channel k together with k + K/2: [G, F, D]."""
    return torch.complex(*x_GKD.chunk(2, dim=1))


def _halves(z_GFD: Tensor) -> Tensor:
    """The inverse of :func:`_complex`."""
    return torch.cat((z_GFD.real, z_GFD.imag), dim=1)


def _pairs(z: Tensor) -> Tensor:
    """[..., F, D] to [..., 2 F, D]: MLA turns neighbouring channels together."""
    return torch.stack((z.real, z.imag), dim=-2).flatten(-3, -2)


def _root(moment_DD: Tensor) -> Tensor:
    values_D, vectors_DD = torch.linalg.eigh(moment_DD)
    return (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.mT
