"""The looped language model in one file of plain torch: the shortest way to learn it, and the oracle of the tests.

It is written from the papers' formulas. Parameters come as one flat dict under the names of the product's state dict,
so the same tensors drive both sides and the gradient of each parameter is compared by name. Configs are duck typed:
anything with the attributes of `ModelConfig` and `GateConfig` will do.

    ids_BS ─embed─▶ h_SBD ─┬─▶ L layers ─▶ norm ─▶ h_SBD ─┬─ head ─▶ cross-entropy_SB ─┐  loop r
                           └──── R times, same weights ◀──┴─ gate ─▶ exit logit_SB ────┴─▶ sum_r p_r ce_r - beta H(p)

A model may have layers of its own before the loops (prelude, run once) and in front of the head (coda, run after each
loop), and its norm at the end of a loop may be for the read-out alone.

Shapes: B batch, S sequence, D hidden, F feed-forward, H heads, G query groups, K head width, C latent, V vocabulary,
R loops, L layers, Z gate state. Sequence first.

Each later loop may read what entered the first one again (injection), and each loop a vector of its own (step).

Sources: loops, sandwich norm, linear gate: Ouro (arXiv 2510.25741). Prelude and coda: 2502.05171. Step embedding:
1807.03819. Latent attention: DeepSeek-V2 (2405.04434). Rotary positions: RoFormer (2104.09864). Grouped queries:
2305.13245. SwiGLU: 2002.05202. RMSNorm: 1910.07467. GRU: 1406.1078, as `torch.nn.GRUCell` arranges it.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Params = Mapping[str, Tensor]


class Output(NamedTuple):
    hidden: tuple[Tensor, ...]  # R tensors [S, B, D]: what the head reads after each loop
    gate_logit_RSB: Tensor
    latent_steps: list[Tensor]  # of each layer and loop: mean number of steps of latent reasoning, [S, B]
    state: tuple[Tensor, ...]  # R tensors [S, B, D]: what the next loop reads


def forward(
    params: Params,
    cfg: Any,
    gate_cfg: Any,
    ids_BS: Tensor,
    num_loops: int | None = None,
    document_start_SB: Tensor | None = None,
    fused_attention: bool = False,
    backward_loops: int | None = None,
) -> Output:
    """Embed, run the shared stack R times, ask the gate after each loop.

    `num_loops` runs fewer or more loops than the config's R; the gate still computes for R, as it was trained.
    """
    gate = scope(params, "gate.")
    view = View.of(cfg, ids_BS, document_start_SB, fused_attention)

    def layers(name: str, number: int, x_SBD: Tensor) -> Tensor:
        for i in range(number):
            x_SBD = block(scope(params, f"{name}.layers.{i}."), cfg, x_SBD, view)
        return x_SBD

    h_SBD = F.embedding(ids_BS.T, params["embedding.word_embeddings.weight"])
    h_SBD = layers("prelude", cfg.prelude_layers, h_SBD)
    entered_SBD, state_SBZ, states, hidden, logits = h_SBD, None, [], [], []
    num_loops = num_loops or cfg.num_loops
    for loop in range(num_loops):
        if backward_loops is not None and 0 < loop == num_loops - backward_loops:
            h_SBD = h_SBD.detach()  # gradients flow through the last loops alone
        if loop > 0:
            h_SBD = inject(scope(params, "injection."), cfg.injection, h_SBD, entered_SBD)
        if cfg.step_embedding == "learned":  # loops beyond the trained ones read the last vector
            h_SBD = h_SBD + params["step_embedding.weight"][min(loop + 1, cfg.num_loops) - 1]
        h_SBD = layers("decoder", cfg.num_layers, h_SBD)
        read_SBD = rms_norm(h_SBD, params["decoder.final_layernorm.weight"], cfg.norm_eps)
        if cfg.loop_norm == "state":  # otherwise the next loop and a coda continue the residual stream
            h_SBD = read_SBD
        states.append(h_SBD)
        logit_SB, state_SBZ = exit_gate(gate, gate_cfg, read_SBD, state_SBZ, loop, cfg.num_loops, view.visible_BSS)
        if cfg.coda_layers:
            read_SBD = layers("coda", cfg.coda_layers, h_SBD)
            read_SBD = rms_norm(read_SBD, params["coda.final_layernorm.weight"], cfg.norm_eps)
        hidden.append(read_SBD)
        logits.append(logit_SB)
    return Output(tuple(hidden), torch.stack(logits), view.latent_steps, tuple(states))


def inject(p: Params, kind: str, h_SBD: Tensor, entered_SBD: Tensor) -> Tensor:
    """Return what a later loop reads: the state, and what entered the first loop (arXiv 1909.01377, 2502.05171)."""
    match kind:
        case "additive":
            return h_SBD + entered_SBD
        case "diagonal":
            return p["state_gain"] * h_SBD + p["input_gain"] * entered_SBD
        case "linear":
            of_state_DD, of_input_DD = p["weight"].chunk(2, dim=1)
            return h_SBD @ of_state_DD.T + entered_SBD @ of_input_DD.T
    return h_SBD


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

    down_SBX = F.linear(x_SBD, p["linear_kv_down_proj.weight"])
    latent_SBC, k_rope = down_SBX[:, :, : cfg.kv_lora_rank], down_SBX[:, :, cfg.kv_lora_rank :]
    unit = scope(p, "kv_layernorm.")
    if cfg.kv_latent_norm:
        latent_SBC = rms_norm(latent_SBC, unit["norm.weight" if cfg.latent_iterations else "weight"], cfg.norm_eps)
    if cfg.latent_iterations:
        latent_SBC = refine(unit, cfg, latent_SBC, view)
    kv = F.linear(latent_SBC, p["linear_kv_up_proj.weight"])
    k_nope, v_SBHK = kv.unflatten(-1, (heads, nope + cfg.v_head_dim)).split([nope, cfg.v_head_dim], dim=-1)

    # DeepSeek pairs neighboring channels (0,1), (2,3), ...: de-interleave them, then rotate halves.
    q_rope = rotate(evens_then_odds(q_rope), view)
    k_rope = rotate(evens_then_odds(k_rope[:, :, None]), view).expand_as(q_rope)
    y_SBHK = attend(torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, k_rope], -1), v_SBHK, view)
    y_SBHK = output_gate(p, cfg, x_SBD, y_SBHK)
    return F.linear(y_SBHK.flatten(2), p["linear_proj.weight"])


def refine(p: Params, cfg: Any, latent_SBC: Tensor, view: "View") -> Tensor:
    """Latent reasoning: T steps of a GRU that reads the latent; the last state, or the mean over the stopping time.

    A token that has not stopped before step t of T stops there with probability sigmoid(w z_t + b + logit(1/(T-t+1))).
    """
    state_SBC, last, mean_SBC = latent_SBC, cfg.latent_iterations, torch.zeros_like(latent_SBC)
    running_SB1, steps_SB1 = torch.ones_like(latent_SBC[..., :1]), torch.zeros_like(latent_SBC[..., :1])
    for step in range(1, last + 1):
        state_SBC = gru_cell(scope(p, "cell."), latent_SBC, state_SBC)
        steps_SB1 = steps_SB1 + running_SB1  # each step is taken by the tokens that have not stopped before it
        if cfg.latent_halting and step < last:
            odds_SB1 = F.linear(state_SBC, p["halt.weight"], p["halt.bias"]).exp() / (last - step)
            stop_SB1 = odds_SB1 / (1 + odds_SB1)
            mean_SBC = mean_SBC + running_SB1 * stop_SB1 * state_SBC
            running_SB1 = running_SB1 * (1 - stop_SB1)
    view.latent_steps.append(steps_SB1.squeeze(-1))
    return mean_SBC + running_SB1 * state_SBC


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
    return F.linear(output_gate(p, cfg, x_SBD, y_SBHK).flatten(2), p["linear_proj.weight"])


def output_gate(p: Params, cfg: Any, x_SBD: Tensor, y_SBHK: Tensor) -> Tensor:
    """Return y * sigmoid(W x) with a gate for each head, or for each of its channels (arXiv 2505.06708)."""
    if cfg.attention_gate == "none":
        return y_SBHK
    per_head = 1 if cfg.attention_gate == "head" else y_SBHK.shape[-1]
    logit_SBHK = F.linear(x_SBD, p["linear_gate.weight"]).unflatten(-1, (cfg.num_attention_heads, per_head))
    return y_SBHK * torch.sigmoid(logit_SBHK)


class View(NamedTuple):
    """Positions and mask for one forward call: each token's rotation angles, and which tokens it may attend to."""

    cos_SK: Tensor
    sin_SK: Tensor
    visible_BSS: Tensor  # True where query i may see key j; B is 1 when documents do not differ by sample
    packed: bool  # samples hold several documents, so that a causal mask is not enough
    fused: bool  # scaled_dot_product_attention in place of the explicit softmax
    latent_steps: list[Tensor]  # collected on the way

    @classmethod
    def of(cls, cfg: Any, ids_BS: Tensor, document_start_SB: Tensor | None, fused: bool) -> "View":
        latent = cfg.attention == "mla"
        width = cfg.qk_rope_head_dim if latent else mha_head_dim(cfg)
        period = (cfg.qk_rope_period if latent else None) or width  # the width of one of several rotary keys
        place_S = torch.arange(ids_BS.shape[1], device=ids_BS.device, dtype=torch.float64)
        speed_K = cfg.rope_base ** (-torch.arange(0, period, 2, device=ids_BS.device, dtype=torch.float64) / period)
        speed_K = speed_K.repeat(width // period)
        angle_SK, packed = torch.outer(place_S, speed_K), document_start_SB is not None
        return cls(angle_SK.cos(), angle_SK.sin(), visible(place_S, document_start_SB), packed, fused, [])


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


def mha_head_dim(cfg: Any) -> int:
    return cfg.head_dim or cfg.hidden_size // cfg.num_attention_heads


def scope(params: Params, prefix: str) -> Params:
    """Return the parameters below a prefix, without the prefix."""
    return {name.removeprefix(prefix): t for name, t in params.items() if name.startswith(prefix)}


def at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
