"""Ouro in plain torch, with the names and keys of a released directory: the reference for conversion.

Written from the paper (arXiv 2510.25741) and the documented block, independently of the product and of
looplm/reference: batch first, separate projections, one head at a time. `tensors` is a flat dict as in safetensors,
`config` is the content of config.json.

    x = x + norm_b(attention(norm_a(x)));  x = x + norm_d(mlp(norm_c(x)));  model.norm ends every loop

Shapes: B batch, S sequence, D hidden, K head width, V vocabulary, R loops.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

Tensors = Mapping[str, Tensor]

CONFIG: dict[str, Any] = {
    "architectures": ["OuroForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_ouro.OuroConfig",
        "AutoModel": "modeling_ouro.OuroModel",
        "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
    },
    "bos_token_id": 0,
    "early_exit_threshold": 1.0,
    "eos_token_id": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 64,
    "max_window_layers": 2,
    "model_type": "ouro",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "total_ut_steps": 3,
    "transformers_version": "4.55.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 320,
    "a_key_of_tomorrow": {"nested": [1, 2]},
}


class Output(NamedTuple):
    logits_RBSV: Tensor
    exit_probability_RBS: Tensor


def forward(tensors: Tensors, config: Mapping[str, Any], ids_BS: Tensor) -> Output:
    """Return every loop's logits, and the probability of exiting after it."""
    x_BSD = tensors["model.embed_tokens.weight"][ids_BS]
    logits, survival, exits = [], torch.ones(()), []
    for loop in range(config["total_ut_steps"]):
        for layer in range(config["num_hidden_layers"]):
            x_BSD = block(tensors, config, f"model.layers.{layer}.", x_BSD)
        x_BSD = norm(tensors, config, "model.norm", x_BSD)
        logits.append(x_BSD @ tensors["lm_head.weight"].T)
        gate = x_BSD @ tensors["model.early_exit_gate.weight"].T + tensors["model.early_exit_gate.bias"]
        leave_BS = torch.sigmoid(gate)[..., 0]
        last = loop == config["total_ut_steps"] - 1
        exits.append(survival * (torch.ones_like(leave_BS) if last else leave_BS))
        survival = survival * (1 - leave_BS)
    return Output(torch.stack(logits), torch.stack(exits))


def block(tensors: Tensors, config: Mapping[str, Any], prefix: str, x_BSD: Tensor) -> Tensor:
    y_BSD = attention(tensors, config, f"{prefix}self_attn.", norm(tensors, config, f"{prefix}input_layernorm", x_BSD))
    x_BSD = x_BSD + norm(tensors, config, f"{prefix}input_layernorm_2", y_BSD)
    y_BSD = norm(tensors, config, f"{prefix}post_attention_layernorm", x_BSD)
    gate, up, down = (tensors[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
    y_BSD = (F.silu(y_BSD @ gate) * (y_BSD @ up)) @ down
    return x_BSD + norm(tensors, config, f"{prefix}post_attention_layernorm_2", y_BSD)


def attention(tensors: Tensors, config: Mapping[str, Any], prefix: str, x_BSD: Tensor) -> Tensor:
    heads, width = config["num_attention_heads"], config["head_dim"]
    served = heads // config["num_key_value_heads"]
    query, key, value = (x_BSD @ tensors[f"{prefix}{name}_proj.weight"].T for name in "qkv")
    length = x_BSD.shape[1]
    future_SS = torch.ones(length, length, dtype=torch.bool).triu(1)
    seen = []
    for head in range(heads):
        mine, theirs = (slice(at * width, (at + 1) * width) for at in (head, head // served))
        q_BSK, k_BSK = rotate(query[..., mine], config), rotate(key[..., theirs], config)
        score_BSS = (q_BSK @ k_BSK.mT / math.sqrt(width)).masked_fill(future_SS, -math.inf)
        seen.append(score_BSS.softmax(-1) @ value[..., theirs])
    return torch.cat(seen, -1) @ tensors[f"{prefix}o_proj.weight"].T


def rotate(x_BSK: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return cos x + sin rotate_half(x); channel i pairs with channel i + K/2."""
    half = x_BSK.shape[-1] // 2
    speed = config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (torch.arange(x_BSK.shape[1], dtype=torch.float64)[:, None] * speed).repeat(1, 2).to(x_BSK.dtype)
    turned = torch.cat([-x_BSK[..., half:], x_BSK[..., :half]], -1)
    return x_BSK * angle.cos() + turned * angle.sin()


def norm(tensors: Tensors, config: Mapping[str, Any], name: str, x_BSD: Tensor) -> Tensor:
    size = x_BSD.pow(2).mean(-1, keepdim=True)
    return tensors[f"{name}.weight"] * x_BSD / (size + config["rms_norm_eps"]).sqrt()


def token_losses(output: Output, labels_BS: Tensor) -> Tensor:
    """Return the cross-entropies [R, B, S]."""
    index_RBS1 = labels_BS[None, ..., None].expand(len(output.logits_RBSV), -1, -1, 1)
    return -output.logits_RBSV.log_softmax(-1).gather(-1, index_RBS1)[..., 0]


def stage_1_loss(output: Output, labels_BS: Tensor, beta: float) -> Tensor:
    """Return the mean over tokens of sum_r p_r L_r - beta H(p)."""
    p_RBS = output.exit_probability_RBS
    return ((p_RBS * token_losses(output, labels_BS)).sum(0) + beta * (p_RBS * p_RBS.log()).sum(0)).mean()


def random_tensors(config: Mapping[str, Any], std: float = 0.1) -> dict[str, Tensor]:
    """Return random weights for the model that `config` describes; norms near one."""
    d, f, v, width = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    rows = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    for prefix in (f"model.layers.{layer}." for layer in range(config["num_hidden_layers"])):
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (number * width, d) for name, number in rows.items()}
        shapes[f"{prefix}self_attn.o_proj.weight"] = (d, rows["q"] * width)
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (f, d) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (d, f)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{prefix}{name}.weight": (d,), f"{prefix}{name}_2.weight": (d,)}
    shapes |= {"model.early_exit_gate.weight": (1, d), "model.early_exit_gate.bias": (1,), "lm_head.weight": (v, d)}
    return {name: torch.randn(shape) * std + ("norm" in name) for name, shape in shapes.items()}


def write_folder(folder: Path, tensors: Tensors, config: Mapping[str, Any], tokenizer: Path, shards: int = 1) -> Path:
    """Write a directory as it would be released, with the safetensors package; return its path."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "extra": [1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(named, indent=4))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(where.values())):
        shard = {name: tensor for name, tensor in tensors.items() if where[name] == file}
        save_file(shard, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder
