"""Convert plain or grouped attention to latent attention.

Multi-head latent attention (MLA) differs from multi-head attention (MHA) in three respects.

*Rotary keys.* MLA has one, shared by all heads; MHA has one per key-value head. Channel pair k of a key is a complex
number, which the position rotates with frequency k in every head. A linear mix, across heads, of the pairs of one
frequency therefore commutes with the rotation (TransMLA, arXiv 2502.07864). We mix by principal components, so that the
first mixed key holds most, and concatenate M of them to the shared key (``model.qk_rope_period`` repeats the
frequencies). Each head's query inverts the mix. M = G keys are exact. The keys beyond M become keys without position:
the rotation exp(i w d) at distance d is replaced by its mean over near distances, d < 16. (Without that factor, M = 1
of 4 keys cost ten times as much loss.)

*The latent* is a projection of the normed hidden state u: the principal components of the values, and of the keys
without position, that are computed from it.

*Principal* is what the layer's output shows most, not what is longest (:func:`importance`): a direction of the keys
counts by the queries that read it, one of the values by the output projection. It cuts the loss that a narrower latent
costs by half (docs/LOG.md, 2026-11-30).

*The latent's norm.* MLA normalizes the latent, MHA has no such norm. But u has a mean square of 1, which a projection
on orthonormal directions of full width preserves: at kv_lora_rank = hidden_size the norm changes nothing. (Up to the
norms' epsilon: the mean square of u before its norm must be far above it.) Narrower latents vary in length from token
to token, and the norm removes that variation. Without it (``model.kv_latent_norm: false``) the conversion is exact
where the latent has the rank of what it carries: the values alone if all rotary keys are kept.

MLA divides scores by the root of another width, which the queries compensate.

Shapes: D hidden, H heads, G key-value heads, K head width, F = K/2 frequencies, M rotary keys kept, C latent, N rows,
P those of a group.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from looplm.accounting import cache_values_per_token
from looplm.bounds import require
from looplm.config import ModelConfig
from looplm.huggingface.names import split
from looplm.parameters import layer_parameters
from tools.upcycling.model_state import ModelState, Upcycled

_NEAR = 16  # attention mostly looks at distances, in tokens, below this: the best of 8 to 32 on SmolLM2
# Keys count less than :func:`importance` derives; measured: on SmolLM2 the loss is lowest with 1/4 and 1/2.
_KEYS = 0.25


class Projections(NamedTuple):
    """Projections of one layer's plain attention, in fp64, as they act on u: the norm's gain is multiplied in."""

    query_HKD: Tensor
    key_GKD: Tensor
    value_GKD: Tensor
    output_DHK: Tensor


def latent_config(
    plain: ModelConfig, kv_lora_rank: int, qk_rope_head_dim: int | None, latent_norm: bool
) -> ModelConfig:
    """Return the configuration of the model with MLA; the arguments are those of :func:`to_latent`.

    Raises:
        UserError: the source has another kind of attention, or a width is not possible.
    """
    fix = "its attention is latent already; give a model with model.attention=mha"
    require(plain.attention == "mha", "checkpoint", plain.attention, fix)
    for key in ("qkv_bias", "qk_norm"):
        fix = "latent attention has no place for it; give a model without"
        require(not getattr(plain, key), "checkpoint", f"model.{key}=true", fix)
    outside = f"model.prelude_layers={plain.prelude_layers}, model.coda_layers={plain.coda_layers}"
    require(
        not plain.unlooped_layers, "checkpoint", outside, "only layers in the loops are converted; give a model without"
    )
    width, groups = plain.attention_head_dim, plain.query_groups
    rope = groups * width if qk_rope_head_dim is None else qk_rope_head_dim
    legal = rope % width == 0 and 0 < rope <= groups * width
    require(legal, "qk_rope_head_dim", rope, f"give a multiple of the head's width {width}, up to {groups * width}")
    fix = f"give a number from 1 to the source's hidden_size={plain.hidden_size}"
    require(0 < kv_lora_rank <= plain.hidden_size, "kv_lora_rank", kv_lora_rank, fix)
    return replace(
        plain,
        attention="mla",
        num_query_groups=None,
        head_dim=None,
        q_lora_rank=None,
        kv_lora_rank=kv_lora_rank,
        kv_latent_norm=latent_norm,
        qk_nope_head_dim=0 if rope == groups * width else width,
        qk_rope_head_dim=rope,
        qk_rope_period=None if rope == width else width,
        v_head_dim=width,
    )


def to_latent(
    source: ModelState,
    kv_lora_rank: int,
    qk_rope_head_dim: int | None,
    moments_LDD: Sequence[Tensor] | None,
    latent_norm: bool,
) -> Upcycled:
    """Return the model with MLA instead of MHA.

    Args:
        source: a model with plain or grouped attention.
        kv_lora_rank: C, at most D.
        qk_rope_head_dim: M K, a multiple of the head's width; None takes every head's key (M = G).
        moments_LDD: second moments E[u u^T] of each layer's normed input, from
            :func:`tools.upcycling.measure.second_moments`; None treats all directions as equally likely.
        latent_norm: give the latent its norm (``model.kv_latent_norm``).

    Raises:
        UserError: see :func:`latent_config`.
    """
    plain = source.config
    config, width = latent_config(plain, kv_lora_rank, qk_rope_head_dim, latent_norm), plain.attention_head_dim
    (row,) = (row for row in layer_parameters(plain) if row.name == "self_attention.linear_qkv.weight")
    weights = dict(source.weights)
    isotropic = torch.eye(plain.hidden_size, dtype=torch.float64)
    for layer in range(plain.num_layers):
        moment_DD = isotropic if moments_LDD is None else moments_LDD[layer]
        prefix = f"decoder.layers.{layer}."
        gain = prefix + "input_layernorm.weight"
        qkv = weights.pop(prefix + row.name) * weights[gain]
        query_HKD, key_GKD, value_GKD = (part.unflatten(0, (-1, width)) for part in split(row, qkv.double()))
        output_DHK = weights[prefix + "self_attention.linear_proj.weight"].double().unflatten(1, (-1, width))
        projections = Projections(query_HKD, key_GKD, value_GKD, output_DHK)
        latent = convert(projections, config, moment_DD, plain.norm_eps)
        weights |= {f"{prefix}self_attention.{name}": weight.float() for name, weight in latent.items()}
        if (gate := f"{prefix}self_attention.linear_gate.weight") in weights:
            weights[gate] = weights[gate] * weights[gain]
        weights[gain] = torch.ones_like(weights[gain])
    return Upcycled(ModelState(config, source.gate, weights), *_describe(plain, config))


def convert(plain: Projections, config: ModelConfig, moment_DD: Tensor, eps: float) -> dict[str, Tensor]:
    """Return one layer's projections for MLA, by the last part of our names.

    Args:
        plain: the layer's projections.
        config: the result's configuration.
        moment_DD: second moment of u, with a trace of D.
        eps: epsilon of the norms.
    """
    heads, groups = len(plain.query_HKD), len(plain.key_GKD)
    kept = config.qk_rope_head_dim // config.v_head_dim
    key_GFD, query_HFD = _complex(plain.key_GKD), _complex(plain.query_HKD)
    of_keys_GKK, of_values_GKK = importance(plain, moment_DD)
    mix_FGM, rotary_FMD = _shared_keys(key_GFD, of_keys_GKK, moment_DD, kept)
    group_H = torch.arange(heads) // (heads // groups)
    rotated_HMFD = torch.einsum("fhm,hfd->hmfd", mix_FGM[:, group_H].conj(), query_HFD)
    rest_GFD = (key_GFD - (mix_FGM @ rotary_FMD).transpose(0, 1)) * _mean_rotation(config)[:, None]

    target_GPD, weights = plain.value_GKD, list(of_values_GKK)
    query_HPD = _pairs(rotated_HMFD.flatten(1, 2))
    if config.qk_nope_head_dim:
        target_GPD = torch.cat((rest_GFD.real, rest_GFD.imag, plain.value_GKD), dim=1)  # the inverse of _complex
        query_HPD = torch.cat((plain.query_HKD, query_HPD), dim=1)
        weights = [part for group in zip(of_keys_GKK * _KEYS, of_values_GKK, strict=True) for part in group]
    down_CD, up_NC = factorize(target_GPD.flatten(0, 1), moment_DD, torch.block_diag(*weights), config.kv_lora_rank)
    length = (torch.einsum("cd,de,ce->", down_CD, moment_DD, down_CD) / len(down_CD) + eps).sqrt()
    scale = math.sqrt(config.attention_head_dim / config.v_head_dim)
    norm = {"kv_layernorm.weight": length.expand(len(down_CD)).clone()} if config.kv_latent_norm else {}
    return norm | {
        "linear_q_proj.weight": query_HPD.flatten(0, 1) * scale,
        "linear_kv_down_proj.weight": torch.cat((down_CD, _pairs(rotary_FMD.transpose(0, 1).flatten(0, 1)))),
        "linear_kv_up_proj.weight": up_NC.unflatten(0, (groups, -1))[group_H].flatten(0, 1),
    }


def importance(plain: Projections, moment_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much an error e of a group's key, and of its value, matters: e^T A e, with A of [G, K, K] for each.

    An error of a value reaches the layer's output from head h as O_h e. An error of a key changes a score by q_h e/√K,
    and the head's output by that share of O_h v. Both are squared, averaged over queries q and values v, and added up
    over the heads of the group; attention's probabilities weigh both alike, so they are left out.
    """
    heads, (groups, width, _) = len(plain.query_HKD), plain.key_GKD.shape
    read_HKK = torch.einsum("dhk,dhl->hkl", plain.output_DHK, plain.output_DHK)
    value_GKK = plain.value_GKD @ moment_DD @ plain.value_GKD.mT
    shown_H = torch.einsum("hkl,hkl->h", read_HKK, value_GKK.repeat_interleave(heads // groups, 0))
    query_HKK = plain.query_HKD @ moment_DD @ plain.query_HKD.mT / width
    of_keys_HKK = query_HKK * shown_H[:, None, None]
    return of_keys_HKK.unflatten(0, (groups, -1)).sum(1), read_HKK.unflatten(0, (groups, -1)).sum(1)


def factorize(target_ND: Tensor, moment_DD: Tensor, weight_NN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return down_CD and up_NC such that up @ down is nearest to the target on vectors of this second moment.

    An error e of the product counts e^T weight e. The rows of down are orthonormal.
    """
    weighed_ND = _root(weight_NN) @ target_ND
    left_NN, _, _ = torch.linalg.svd(weighed_ND @ _root(moment_DD))
    rows_CD = left_NN[:, :rank].mT @ weighed_ND
    _, _, basis_DD = torch.linalg.svd(rows_CD)  # its first rows span them, the others complete the basis
    down_CD = basis_DD[:rank]
    seen_CC = down_CD @ moment_DD @ down_CD.mT
    return down_CD, torch.linalg.solve(seen_CC, down_CD @ moment_DD @ target_ND.mT).mT


def _root(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def _mean_rotation(config: ModelConfig) -> Tensor:
    """Return the mean rotation of a key against a query that is near, by frequency: complex, [F]."""
    exponent_F = torch.arange(0, config.rope_period, 2, dtype=torch.float64) / config.rope_period
    angle_F = torch.outer(torch.arange(_NEAR, dtype=torch.float64), config.rope_base**-exponent_F)
    return torch.polar(torch.ones_like(angle_F), -angle_F).mean(0)


def _describe(plain: ModelConfig, latent: ModelConfig) -> tuple[list[str], list[str]]:
    """Return sentences on what is exact, and on what is approximate."""
    exact, approximate = ["everything but the attention's projections"], []
    keys, kept = plain.query_groups, latent.qk_rope_head_dim // latent.rope_period
    if kept == keys:
        exact.append(f"rotary keys: all {keys} of width {latent.rope_period}, side by side")
    else:
        approximate.append(
            f"rotary keys: {kept} of {keys} mixed ones keep their position, the rest of each key has none"
        )
    if latent.kv_lora_rank == plain.hidden_size and latent.kv_latent_norm:
        exact.append("the latent: its norm does nothing at full width, up to the norms' epsilon")
    else:
        projected = "values" if kept == keys else "values and keys without position"
        rank = min(plain.hidden_size, keys * latent.v_head_dim * (1 if kept == keys else 2))
        width = f"{latent.kv_lora_rank} of {plain.hidden_size}"
        if not latent.kv_latent_norm and latent.kv_lora_rank >= rank:
            exact.append(f"{projected}: the latent of {width} has their rank, {rank}, and no norm")
        else:
            lost = (
                ", whose length per token the norm takes away" if latent.kv_latent_norm else f", their rank is {rank}"
            )
            approximate.append(f"{projected}: from a latent of {width}{lost}")
    cached = [cache_values_per_token(config, 1) for config in (plain, latent)]
    exact.append(f"the cache holds {cached[1]:,} numbers per token and loop, before {cached[0]:,}")
    return exact, approximate


def _shared_keys(key_GFD: Tensor, weight_GKK: Tensor, moment_DD: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return a mix [F, G, M] and M shared keys [F, M, D], whose product is nearest to the groups' keys.

    They are principal components across the groups, by frequency. An error counts the sum of its pair's weights.
    """
    weight_GF = weight_GKK.diagonal(dim1=1, dim2=2).unflatten(1, (2, -1)).sum(1)
    size_FG1 = weight_GF.clamp(min=1e-12 * weight_GF.max().item()).sqrt().mT[..., None]
    weighed_FGD = key_GFD.transpose(0, 1) * size_FG1
    _, vectors_FGG = torch.linalg.eigh(weighed_FGD @ moment_DD.to(weighed_FGD.dtype) @ weighed_FGD.mH)
    unit_FGM = vectors_FGG.flip(-1)[:, :, :kept]  # eigh's largest is its last
    return unit_FGM / size_FG1, unit_FGM.mH @ weighed_FGD


def _complex(x_GKD: Tensor) -> Tensor:
    """Return pairs as complex numbers, [G, F, D]: MHA rotates channel k together with k + K/2."""
    return torch.complex(*x_GKD.chunk(2, dim=1))


def _pairs(z: Tensor) -> Tensor:
    """Return complex [..., F, D] as real [..., 2 F, D]: MLA rotates neighboring channels together."""
    return torch.stack((z.real, z.imag), dim=-2).flatten(-3, -2)
