"""A module that owns the reference model's parameters, to train it.

Shapes: B batch, S sequence, D hidden, V vocabulary, R loops.
"""

from typing import Any

import torch
from torch import Tensor, nn

from looplm.reference.losses import entropy_regularised_loss, token_losses
from looplm.reference.model import forward, head_weight, mha_head_dim

Shapes = dict[str, tuple[int, ...]]


class ReferenceLM(nn.Module):
    """A module that owns the parameters, under the product's names, and computes stage 1's loss.

    Its own initial weights are the product's only for models without sandwich norms, injection and step embedding, up
    to the embedding's scale: load weights where that matters.
    """

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
            zero = "bias" in leaf or path[-1] in ("readout", "sequence_readout", "halt")
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


def before_keys_and_values(cfg: Any, c: int) -> Shapes:
    """Return the shapes of the latent's norm and of its reasoning unit."""
    if not cfg.latent_iterations:
        return {"kv_layernorm.weight": (c,)} if cfg.kv_latent_norm else {}
    unit: Shapes = {"cell.weight_ih": (3 * c, c), "cell.weight_hh": (3 * c, c)}
    unit |= {"cell.bias_ih": (3 * c,), "cell.bias_hh": (3 * c,)}
    unit |= {"norm.weight": (c,)} if cfg.kv_latent_norm else {}
    unit |= {"halt.weight": (1, c), "halt.bias": (1,)} if cfg.latent_halting else {}
    return {f"kv_layernorm.{name}": shape for name, shape in unit.items()}


def parameter_shapes(cfg: Any, gate_cfg: Any) -> Shapes:
    """Return the shape of every parameter by name. The number of loops is in none but the step embedding's."""
    d, f, v, heads = cfg.hidden_size, cfg.ffn_hidden_size, cfg.vocab_size, cfg.num_attention_heads
    if cfg.attention == "mla":
        c, rope, per_query = cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
        attention: Shapes = {
            "linear_kv_down_proj.weight": (c + rope, d),
            **before_keys_and_values(cfg, c),
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

    value = cfg.v_head_dim if cfg.attention == "mla" else mha_head_dim(cfg)
    gated = {"head": heads, "element": heads * value}.get(cfg.attention_gate)
    attention |= {"linear_gate.weight": (gated, d)} if gated else {}

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
    blocks = {"prelude": cfg.prelude_layers, "decoder": cfg.num_layers, "coda": cfg.coda_layers}
    for block, number in blocks.items():
        shapes |= {f"{block}.layers.{i}.{name}": shape for i in range(number) for name, shape in layer.items()}
    injections: dict[str, Shapes] = {
        "diagonal": {"state_gain": (d,), "input_gain": (d,)},
        "linear": {"weight": (d, 2 * d)},
    }
    shapes |= {f"injection.{name}": shape for name, shape in injections.get(cfg.injection, {}).items()}
    shapes |= {"step_embedding.weight": (cfg.num_loops, d)} if cfg.step_embedding == "learned" else {}
    shapes |= {"coda.final_layernorm.weight": (d,)} if cfg.coda_layers else {}
    shapes |= {f"gate.{name}": shape for name, shape in gate.items()}
    return shapes if cfg.tie_embeddings else shapes | {"output_layer.weight": (v, d)}
