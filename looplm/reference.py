"""The looped language model in one file of plain torch: the shortest way to learn it, and the oracle of the tests.

It is written from the papers' formulas and independent of the product: nothing here imports looplm or Megatron, and
autograd alone computes the gradients. Parameters come as one flat dict under the names of the product's state dict, so
the same tensors drive both sides and the gradient of each parameter is compared by name. Configs are duck typed:
anything with the attributes of `ModelConfig` and `GateConfig` will do.

    ids_BS ─embed─▶ h_SBD ─┬─▶ L layers ─▶ norm ─▶ h_SBD ─┬─ head ─▶ cross-entropy_SB ─┐  loop r
                           └──── R times, same weights ◀──┴─ gate ─▶ exit logit_SB ────┴─▶ sum_r p_r ce_r - beta H(p)

Shapes: B batch, S sequence, D hidden, F feed-forward, H heads, G query groups, K head width, C latent, V vocabulary,
R loops, L layers, Z gate state. Sequence first.

Sources: loops, sandwich norm, linear gate, both losses, Q-exit: Ouro (arXiv 2510.25741). Latent attention: DeepSeek-V2
(2405.04434). Rotary positions: RoFormer (2104.09864). Grouped queries: 2305.13245. SwiGLU: 2002.05202. RMSNorm:
1910.07467. GRU: 1406.1078, as `torch.nn.GRUCell` arranges it.
"""

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Params = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


class Output(NamedTuple):
    hidden: tuple[Tensor, ...]  # R tensors [S, B, D]: the hidden state after each loop's norm
    gate_logit_RSB: Tensor


def forward(
    params: Params,
    cfg: Any,
    gate_cfg: Any,
    ids_BS: Tensor,
    num_loops: int | None = None,
    document_start_SB: Tensor | None = None,
    fused_attention: bool = False,
) -> Output:
    """Embed, run the shared stack R times, ask the gate after each loop.

    `num_loops` runs fewer or more loops than the config's R; the gate still computes for R, as it was trained.
    """
    layers = [scope(params, f"decoder.layers.{i}.") for i in range(cfg.num_layers)]
    gate = scope(params, "gate.")
    view = View.of(cfg, ids_BS, document_start_SB, fused_attention)

    h_SBD = F.embedding(ids_BS.T, params["embedding.word_embeddings.weight"])
    state_SBZ, hidden, logits = None, [], []
    for loop in range(num_loops or cfg.num_loops):
        for layer in layers:
            h_SBD = block(layer, cfg, h_SBD, view)
        h_SBD = rms_norm(h_SBD, params["decoder.final_layernorm.weight"], cfg.norm_eps)
        logit_SB, state_SBZ = exit_gate(gate, gate_cfg, h_SBD, state_SBZ, loop, cfg.num_loops, view.visible_BSS)
        hidden.append(h_SBD)
        logits.append(logit_SB)
    return Output(tuple(hidden), torch.stack(logits))


def head_weight(params: Params, cfg: Any) -> Tensor:
    """Return the head's matrix [V, D]: its own, or the embedding when tied."""
    return params["embedding.word_embeddings.weight" if cfg.tie_embeddings else "output_layer.weight"]


def block(p: Params, cfg: Any, x_SBD: Tensor, view: "View") -> Tensor:
    """Return x + norm_b(attention(norm_a(x))), then x + norm_d(mlp(norm_c(x))); b and d only with sandwich norms."""
    attention = latent_attention if cfg.attention == "mla" else grouped_attention
    normed_SBD = rms_norm(x_SBD, p["input_layernorm.weight"], cfg.norm_eps)
    y_SBD = attention(scope(p, "self_attention."), cfg, normed_SBD, view)
    if cfg.sandwich_norm:
        y_SBD = rms_norm(y_SBD, p["self_attn_bda.norm.weight"], cfg.norm_eps)
    x_SBD = x_SBD + y_SBD
    normed_SBD = rms_norm(x_SBD, p["pre_mlp_layernorm.weight"], cfg.norm_eps)
    y_SBD = swiglu(scope(p, "mlp."), normed_SBD)
    if cfg.sandwich_norm:
        y_SBD = rms_norm(y_SBD, p["mlp_bda.norm.weight"], cfg.norm_eps)
    return x_SBD + y_SBD


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(at_least_fp32(x))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def swiglu(p: Params, x_SBD: Tensor) -> Tensor:
    """Return W_down (silu(W_gate x) * W_up x); gate and up are one matrix, gate rows first."""
    gate_SBF, up_SBF = F.linear(x_SBD, p["linear_fc1.weight"]).chunk(2, dim=-1)
    return F.linear(F.silu(gate_SBF) * up_SBF, p["linear_fc2.weight"])


def latent_attention(p: Params, cfg: Any, x_SBD: Tensor, view: "View") -> Tensor:
    """MLA: keys and values of all heads grow from one latent [S, B, C]; one rotary key is shared by the heads."""
    heads, nope, rope = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
    if cfg.q_lora_rank is None:
        q_SBHK = F.linear(x_SBD, p["linear_q_proj.weight"])
    else:
        latent = rms_norm(F.linear(x_SBD, p["linear_q_down_proj.weight"]), p["q_layernorm.weight"], cfg.norm_eps)
        q_SBHK = F.linear(latent, p["linear_q_up_proj.weight"])
    q_nope, q_rope = q_SBHK.unflatten(-1, (heads, nope + rope)).split([nope, rope], dim=-1)

    latent_SBC, k_rope = F.linear(x_SBD, p["linear_kv_down_proj.weight"]).split([cfg.kv_lora_rank, rope], dim=-1)
    kv = F.linear(rms_norm(latent_SBC, p["kv_layernorm.weight"], cfg.norm_eps), p["linear_kv_up_proj.weight"])
    k_nope, v_SBHK = kv.unflatten(-1, (heads, nope + cfg.v_head_dim)).split([nope, cfg.v_head_dim], dim=-1)

    # DeepSeek pairs neighboring channels (0,1), (2,3), ...: de-interleave them, then rotate halves.
    q_rope = rotate(evens_then_odds(q_rope), view)
    k_rope = rotate(evens_then_odds(k_rope[:, :, None]), view).expand_as(q_rope)
    y_SBHK = attend(torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, k_rope], -1), v_SBHK, view)
    return F.linear(y_SBHK.flatten(2), p["linear_proj.weight"])


def grouped_attention(p: Params, cfg: Any, x_SBD: Tensor, view: "View") -> Tensor:
    """MHA, or GQA when a key-value head serves a group. The joint projection holds, per group, [queries..., k, v]."""
    groups = cfg.num_query_groups or cfg.num_attention_heads
    queries = cfg.num_attention_heads // groups
    qkv = F.linear(x_SBD, p["linear_qkv.weight"], p.get("linear_qkv.bias"))
    qkv = qkv.unflatten(-1, (groups, queries + 2, mha_head_dim(cfg)))
    q, k, v = qkv.split([queries, 1, 1], dim=3)  # [S, B, G, queries or 1, K]
    if cfg.qk_norm:
        q, k = (rms_norm(t, p[f"{n}_layernorm.weight"], cfg.norm_eps) for t, n in ((q, "q"), (k, "k")))
    k, v = (t.expand_as(q).flatten(2, 3) for t in (k, v))
    y_SBHK = attend(rotate(q.flatten(2, 3), view), rotate(k, view), v, view)
    return F.linear(y_SBHK.flatten(2), p["linear_proj.weight"])


class View(NamedTuple):
    """Positions and mask for one forward call: each token's rotation angles, and which tokens it may attend to."""

    cos_SK: Tensor
    sin_SK: Tensor
    visible_BSS: Tensor  # True where query i may see key j; B is 1 when documents do not differ by sample
    packed: bool  # samples hold several documents, so that a causal mask is not enough
    fused: bool  # scaled_dot_product_attention in place of the explicit softmax

    @classmethod
    def of(cls, cfg: Any, ids_BS: Tensor, document_start_SB: Tensor | None, fused: bool) -> "View":
        latent = cfg.attention == "mla"
        width = cfg.qk_rope_head_dim if latent else mha_head_dim(cfg)
        period = (cfg.qk_rope_period if latent else None) or width  # the width of one of several rotary keys
        place_S = torch.arange(ids_BS.shape[1], device=ids_BS.device, dtype=torch.float64)
        speed_K = cfg.rope_base ** (-torch.arange(0, period, 2, device=ids_BS.device, dtype=torch.float64) / period)
        speed_K = speed_K.repeat(width // period)
        angle_SK, packed = torch.outer(place_S, speed_K), document_start_SB is not None
        return cls(angle_SK.cos(), angle_SK.sin(), visible(place_S, document_start_SB), packed, fused)


def visible(place_S: Tensor, document_start_SB: Tensor | None = None) -> Tensor:
    """Return [B, S, S]: True if j <= i and j is in i's document, which is known by the index of its first token."""
    causal_1SS = (place_S[:, None] >= place_S)[None]
    if document_start_SB is None:
        return causal_1SS
    document_BS = document_start_SB.T
    return causal_1SS & (document_BS[:, :, None] == document_BS[:, None, :])


def rotate(x_SBHK: Tensor, view: View) -> Tensor:
    """Rotate the pair (x_k, x_{k+K/2}) of the token at position i by the angle i * base^(-2k/K)."""
    cos, sin = (t.to(x_SBHK.dtype)[:, None, None] for t in (view.cos_SK, view.sin_SK))
    first, second = x_SBHK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def evens_then_odds(x: Tensor) -> Tensor:
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)


def attend(q_SBHK: Tensor, k_SBHK: Tensor, v_SBHK: Tensor, view: View) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v over the visible tokens, head by head."""
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBHK, k_SBHK, v_SBHK))  # [B, H, S, K]
    if view.fused:
        # The flash kernel needs one width for q, k and v; padding v with zeros is exact and faster than another kernel.
        padded = F.pad(v, (0, max(0, q.shape[-1] - v.shape[-1])))
        mask = view.visible_BSS[:, None] if view.packed else None
        y = F.scaled_dot_product_attention(q, k, padded, attn_mask=mask, is_causal=mask is None)[..., : v.shape[-1]]
    else:
        score = (q @ k.mT).to(at_least_fp32(q)) / math.sqrt(q.shape[-1])
        score = score.masked_fill(~view.visible_BSS[:, None], -math.inf)
        y = score.softmax(-1).to(v.dtype) @ v
    return y.permute(2, 0, 1, 3)


def exit_gate(
    p: Params, gate_cfg: Any, h_SBD: Tensor, state_SBZ: Tensor | None, loop: int, num_loops: int, visible_BSS: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the exit logit a_r [S, B] after loop `loop` (counted from 0) and the state that travels to the next loop.

    linear: a = w h + b.
    lru: a recurrent unit over loops, z_r = GRU(W_u h_r, z_{r-1}), a = w z + b, optionally plus a readout of the running
    mean of z over the document so far.
    mlp: a = w silu(W h_r + v c_r + b_1) + b_2 with the relative change c_r = |h_r - h_{r-1}| / |h_{r-1}|, c_1 = 1.
    lru and mlp add logit(1 / (loops left)), so that an untrained gate (w = b = 0) is the uniform prior p_r = 1/R.
    """
    h_SBD, p = h_SBD.to(at_least_fp32(h_SBD)), {name: t.to(at_least_fp32(t)) for name, t in p.items()}
    readout = p["readout.weight"], p["readout.bias"]
    match gate_cfg.kind:
        case "linear":
            return F.linear(h_SBD, *readout).squeeze(-1), None
        case "mlp":
            change_SB1 = torch.ones_like(h_SBD[..., :1])
            if state_SBZ is not None:
                change_SB1 = ((h_SBD - state_SBZ).square().sum(-1) / state_SBZ.square().sum(-1)).sqrt().unsqueeze(-1)
            first_layer = torch.cat((p["hidden.weight"], p["change.weight"]), 1)
            inner_SBZ = F.silu(F.linear(torch.cat((h_SBD, change_SB1), -1), first_layer, p["hidden.bias"]))
            logit_SB, state_SBZ = F.linear(inner_SBZ, *readout).squeeze(-1), h_SBD
        case "lru":
            u_SBZ = F.linear(h_SBD, p["input_proj.weight"])
            state_SBZ = torch.zeros_like(u_SBZ) if state_SBZ is None else state_SBZ
            state_SBZ = gru_cell(scope(p, "cell."), u_SBZ, state_SBZ)
            logit_SB = F.linear(state_SBZ, *readout).squeeze(-1)
        case unknown:
            raise ValueError(f"gate.kind: {unknown!r} is unknown here")
    if gate_cfg.sequence_level:
        seen_BSS = visible_BSS.to(state_SBZ.dtype).expand(h_SBD.shape[1], -1, -1)
        mean_SBZ = torch.einsum("bij,jbz->ibz", seen_BSS / seen_BSS.sum(-1, keepdim=True), state_SBZ)
        logit_SB = logit_SB + F.linear(mean_SBZ, p["sequence_readout.weight"]).squeeze(-1)
    left = num_loops - loop
    if left > 1:  # the last loop takes whatever is left: its logit is not used
        logit_SB = logit_SB + math.log((1 / left) / (1 - 1 / left))
    return logit_SB, state_SBZ


def gru_cell(p: Params, u: Tensor, z: Tensor) -> Tensor:
    u_reset, u_update, u_new = F.linear(u, p["weight_ih"], p["bias_ih"]).chunk(3, dim=-1)
    z_reset, z_update, z_new = F.linear(z, p["weight_hh"], p["bias_hh"]).chunk(3, dim=-1)
    reset, update = torch.sigmoid(u_reset + z_reset), torch.sigmoid(u_update + z_update)
    return (1 - update) * torch.tanh(u_new + reset * z_new) + update * z


def exit_distribution(gate_logit_RSB: Tensor) -> Tensor:
    """Return p_r = lambda_r * prod_{j<r} (1 - lambda_j), lambda = sigmoid(logit); the last loop takes the rest."""
    survival_SB, p = torch.ones_like(gate_logit_RSB[0]), []
    for logit_SB in gate_logit_RSB[:-1]:
        p.append(survival_SB * torch.sigmoid(logit_SB))
        survival_SB = survival_SB * torch.sigmoid(-logit_SB)
    return torch.stack([*p, survival_SB])


def entropy(p_RSB: Tensor) -> Tensor:
    return -(p_RSB * p_RSB.log()).sum(0)


def q_exit(p_RSB: Tensor, threshold: float) -> Tensor:
    """Return the depth [S, B] from 1: the first loop by which the exit mass reaches the threshold, R at 1. Slow."""
    depths = []
    for p_R in p_RSB.flatten(1).T.tolist():
        reached = [depth for depth, mass in enumerate(accumulate(p_R), start=1) if mass >= threshold]
        depths.append(reached[0] if reached and threshold < 1 else len(p_R))
    return torch.tensor(depths).view(p_RSB.shape[1:])


def token_losses(hidden_SBD: Tensor, weight_VD: Tensor, labels_SB: Tensor) -> Tensor:
    """Return the cross-entropy [S, B] of each token, from the whole matrix of logits [S, B, V]."""
    logits_SBV = F.linear(hidden_SBD, weight_VD)
    logits_SBV = logits_SBV.to(at_least_fp32(logits_SBV))
    return F.cross_entropy(logits_SBV.flatten(0, 1), labels_SB.flatten(), reduction="none").view_as(labels_SB)


def entropy_regularised_loss(
    token_loss_RSB: Tensor,
    gate_logit_RSB: Tensor,
    beta: float,
    mask_SB: Tensor | None = None,
    prior_R: Tensor | None = None,
    of_batch: bool = False,
    ponder_cost: float = 0.0,
) -> Tensor:
    """Return stage 1's loss, sum_r p_r (ce_r + r cost) - beta H(p) or + beta KL(p || prior), or the mean p's."""
    p_RSB = exit_distribution(gate_logit_RSB)
    cost_RSB = token_loss_RSB + ponder_cost * torch.arange(1, len(p_RSB) + 1)[:, None, None]
    held_RSB = torch.stack([masked_mean(p_SB, mask_SB).expand_as(p_SB) for p_SB in p_RSB]) if of_batch else p_RSB
    prior_R11 = 1 if prior_R is None else prior_R.to(p_RSB)[:, None, None]
    penalty_SB = (held_RSB * (held_RSB / prior_R11).log()).sum(0)
    return masked_mean((p_RSB * cost_RSB).sum(0) + beta * penalty_SB, mask_SB)


def adaptive_gate_loss(
    token_loss_RSB: Tensor,
    gate_logit_RSB: Tensor,
    slope: float = 50.0,
    threshold: float = 0.005,
    mask_SB: Tensor | None = None,
    target: str = "paper",
) -> Tensor:
    """Return stage 2's loss: continue where one more loop still helps.

    w_t, t = 2..R, says how much loop t improved on loop t - 1. "paper" trains lambda_t on it, as printed; "next" trains
    lambda_{t-1}, which decides whether loop t is run at all.
    """
    loops = token_loss_RSB.shape[0]
    total_SB = torch.zeros_like(token_loss_RSB[0])
    for t in range(1, loops):
        improvement_SB = (token_loss_RSB[t - 1] - token_loss_RSB[t]).clamp(min=0).detach()
        w_SB = torch.sigmoid(slope * (improvement_SB - threshold))
        logit_SB = gate_logit_RSB[t if target == "paper" else t - 1]
        # Binary cross-entropy between the continue probability, 1 - lambda = sigmoid(-logit), and w.
        total_SB = total_SB - w_SB * F.logsigmoid(-logit_SB) - (1 - w_SB) * F.logsigmoid(logit_SB)
    return masked_mean(total_SB / loops, mask_SB)


def geometric_prior(num_loops: int, rate: float) -> Tensor:
    p_R = torch.tensor([rate * (1 - rate) ** loop for loop in range(num_loops)], dtype=torch.float64)
    return p_R / p_R.sum()


def masked_mean(x_SB: Tensor, mask_SB: Tensor | None) -> Tensor:
    """Return the mean over the tokens with mask 1; zero if there are no such tokens."""
    mask_SB = torch.ones_like(x_SB) if mask_SB is None else mask_SB.to(x_SB.dtype)
    return (x_SB * mask_SB).sum() / mask_SB.sum().clamp(min=1)


class ReferenceLM(nn.Module):
    """A module that owns the parameters, under the product's names, and computes stage 1's loss."""

    def __init__(self, cfg: Any, gate_cfg: Any, fused_attention: bool = True) -> None:
        super().__init__()
        self.cfg, self.gate_cfg, self.fused_attention = cfg, gate_cfg, fused_attention
        for name, shape in parameter_shapes(cfg, gate_cfg).items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            value = torch.ones(shape) if "norm" in path[-1] else torch.randn(shape) * cfg.init_std
            zero = "bias" in leaf or path[-1] in ("readout", "sequence_readout")
            owner.register_parameter(leaf, nn.Parameter(torch.zeros(shape) if zero else value))

    def forward(
        self,
        ids_BS: Tensor,
        labels_SB: Tensor,
        beta: float,
        mask_SB: Tensor | None = None,
        document_start_SB: Tensor | None = None,
    ) -> Tensor:
        params = dict(self.named_parameters())
        output = forward(params, self.cfg, self.gate_cfg, ids_BS, None, document_start_SB, self.fused_attention)
        weight_VD = head_weight(params, self.cfg)
        token_loss_RSB = torch.stack([token_losses(h_SBD, weight_VD, labels_SB) for h_SBD in output.hidden])
        return entropy_regularised_loss(token_loss_RSB, output.gate_logit_RSB, beta, mask_SB)


def parameter_shapes(cfg: Any, gate_cfg: Any) -> Shapes:
    """Return the shape of every parameter by name. The number of loops is in none."""
    d, f, v, heads = cfg.hidden_size, cfg.ffn_hidden_size, cfg.vocab_size, cfg.num_attention_heads
    if cfg.attention == "mla":
        c, rope, per_query = cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
        attention: Shapes = {
            "linear_kv_down_proj.weight": (c + rope, d),
            "kv_layernorm.weight": (c,),
            "linear_kv_up_proj.weight": (heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), c),
            "linear_proj.weight": (d, heads * cfg.v_head_dim),
        }
        if cfg.q_lora_rank is None:
            attention["linear_q_proj.weight"] = (heads * per_query, d)
        else:
            attention["linear_q_down_proj.weight"] = (cfg.q_lora_rank, d)
            attention["q_layernorm.weight"] = (cfg.q_lora_rank,)
            attention["linear_q_up_proj.weight"] = (heads * per_query, cfg.q_lora_rank)
    else:
        rows = (heads + 2 * (cfg.num_query_groups or heads)) * mha_head_dim(cfg)
        attention = {"linear_qkv.weight": (rows, d), "linear_proj.weight": (d, heads * mha_head_dim(cfg))}
        attention |= {"linear_qkv.bias": (rows,)} if cfg.qkv_bias else {}
        attention |= {f"{n}_layernorm.weight": (mha_head_dim(cfg),) for n in "qk"} if cfg.qk_norm else {}

    norms = ["input_layernorm", "pre_mlp_layernorm"] + ["self_attn_bda.norm", "mlp_bda.norm"] * cfg.sandwich_norm
    layer = {f"{norm}.weight": (d,) for norm in norms} | {f"self_attention.{n}": s for n, s in attention.items()}
    layer |= {"mlp.linear_fc1.weight": (2 * f, d), "mlp.linear_fc2.weight": (d, f)}

    z, y = gate_cfg.state_size, gate_cfg.hidden_size
    lru: Shapes = {"input_proj.weight": (z, d), "cell.weight_ih": (3 * z, z), "cell.weight_hh": (3 * z, z)}
    lru |= {"cell.bias_ih": (3 * z,), "cell.bias_hh": (3 * z,)}
    lru |= {"sequence_readout.weight": (1, z)} if gate_cfg.sequence_level else {}
    mlp: Shapes = {"hidden.weight": (y, d), "hidden.bias": (y,), "change.weight": (y, 1)}
    read, before = {"linear": (d, {}), "lru": (z, lru), "mlp": (y, mlp)}[gate_cfg.kind]
    gate: Shapes = {**before, "readout.weight": (1, read), "readout.bias": (1,)}

    shapes = {"embedding.word_embeddings.weight": (v, d), "decoder.final_layernorm.weight": (d,)}
    shapes |= {f"decoder.layers.{i}.{name}": shape for i in range(cfg.num_layers) for name, shape in layer.items()}
    shapes |= {f"gate.{name}": shape for name, shape in gate.items()}
    return shapes if cfg.tie_embeddings else shapes | {"output_layer.weight": (v, d)}


def mha_head_dim(cfg: Any) -> int:
    return cfg.head_dim or cfg.hidden_size // cfg.num_attention_heads


def scope(params: Params, prefix: str) -> Params:
    """Return the parameters below a prefix, without the prefix."""
    return {name.removeprefix(prefix): t for name, t in params.items() if name.startswith(prefix)}


def at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
