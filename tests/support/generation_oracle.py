"""Shared by the generation tests: small models, a byte tokenizer, and a slow generator as the oracle.

The slow generator runs one row, one token, one loop at a time, in double precision, on the functions of
looplm.reference: no batch, no padding, no mask, no absorbed projections, and a cache that is a Python list.
"""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from looplm import reference
from looplm.config import GateConfig, ModelConfig
from looplm.model import LoopLM
from tests.support.parity import oracle_copy

EOS, BOS, VOCAB = 256, 257, 259
MLA = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    ffn_hidden_size=48,
    num_layers=2,
    num_attention_heads=4,
    num_loops=4,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=10,
    max_sequence_length=128,
)
MHA = replace(MLA, attention="mha")
VARIANTS = {
    "mla": MLA,
    "mla-query-latent": replace(MLA, q_lora_rank=14, sandwich_norm=False, qk_rope_period=2),
    "mla-plain-latent": replace(MLA, kv_latent_norm=False),
    "mla-latent-halting": replace(MLA, latent_iterations=2, latent_halting=True, q_lora_rank=14),
    "mha": replace(MHA, head_dim=12),
    "gqa-biases-normed-heads": replace(MHA, num_query_groups=2, qkv_bias=True, qk_norm=True),
    "gqa": replace(MHA, num_query_groups=2, tie_embeddings=True),
}
# What SlowGenerator does not know: layers outside the loops, other inputs of a loop, other read-outs, gated attention.
READ_OUTS = {
    "mla-prelude-coda": replace(MLA, prelude_layers=1, coda_layers=2),
    "gqa-coda-readout-norm": replace(VARIANTS["gqa"], coda_layers=1, loop_norm="readout"),
    "mha-diagonal-injection": replace(MHA, injection="diagonal"),
    "mla-prelude-linear-injection": replace(MLA, prelude_layers=1, injection="linear"),
    "mla-element-gate": replace(MLA, attention_gate="element"),
    "gqa-head-gate": replace(VARIANTS["gqa"], attention_gate="head"),
    "mla-step-embedding": replace(MLA, step_embedding="learned", injection="additive"),
    "mha-prelude-readout-norm": replace(MHA, prelude_layers=2, loop_norm="readout"),
}
GATES = {
    "lru": GateConfig(state_size=6),
    "sequence": GateConfig(state_size=6, sequence_level=True),
    "linear": GateConfig(kind="linear"),
    "mlp": GateConfig(kind="mlp", hidden_size=7),
}


def build(
    config: ModelConfig, gate: GateConfig, groups: ProcessGroupCollection, dtype: torch.dtype = torch.float32
) -> LoopLM:
    """Return a model with weights so large that greedy text does not repeat one token, and that the gate decides."""
    torch.manual_seed(3)
    model = LoopLM(config, gate, groups, dtype).eval()
    for name, parameter in model.named_parameters():
        if name.startswith("gate."):
            nn.init.normal_(parameter, std=0.4)
        elif name.endswith(("norm.weight", "_gain")):
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.1 if name.startswith("embedding") else 0.2)
    return model


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte, numbered as in the alphabet; 256 to 258 are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<bos>", "<pad>"])
    return tokenizer


class SlowGeneration(NamedTuple):
    """Ids and depths of the generated tokens."""

    ids: list[int]
    depths: list[int]


@dataclass
class SlowGenerator:
    """Greedy generation of one row with a shared cache and early exit, written from their definitions."""

    model: LoopLM
    gate_config: GateConfig
    mode: str
    threshold: float
    signal: str = "gate"
    loops: int = 0  # 0: as trained
    past: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)  # per layer and token: key and value [H, K]
    states: list[list[Tensor]] = field(default_factory=list)  # per loop: gate states of the positions that ran it
    logits_1V: Tensor = field(init=False)  # of the last token that was chosen

    def __post_init__(self) -> None:
        self.model_config = self.model.model_config
        self.params = {name: p.detach() for name, p in oracle_copy(dict(self.model.named_parameters())).items()}
        self.past = [[] for _ in range(self.model_config.num_layers)]
        self.loops = self.loops or self.model_config.num_loops
        self.states = [[] for _ in range(self.loops)]

    def generate(self, prompt: list[int], new_tokens: int) -> SlowGeneration:
        token, depth = self.read_prompt(prompt)
        ids, depths = [token], [depth]
        for place in range(len(prompt), len(prompt) + new_tokens - 1):
            token, depth = self.read_token(ids[-1], place)
            ids.append(token)
            depths.append(depth)
        return SlowGeneration(ids, depths)

    def read_prompt(self, prompt: list[int]) -> tuple[int, int]:
        """Run all loops on all positions, each over its own keys and values, and keep those that the mode keeps."""
        view = self.view(torch.arange(len(prompt)))
        h_SD, logits, state = self.embed(prompt), [], None
        hidden = [h_SD[-1]]
        kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.past]
        for loop in range(self.loops):
            for layer, p in enumerate(self.layers()):
                query, key, value = self.project(p, h_SD, view)
                kept[layer].append((key, value))
                h_SD = self.finish_block(p, h_SD, reference.attend(query, key, value, view))
            h_SD = self.loop_end(h_SD)
            logit_SB, state = reference.exit_gate(
                self.gate(), self.gate_config, h_SD, state, loop, self.model_config.num_loops, view.visible_BSS
            )
            if state is not None:
                self.states[loop] = list(state[:, 0])
            hidden.append(h_SD[-1])
            logits.append(logit_SB[-1])
        for layer, loops in enumerate(kept):
            for place in range(len(prompt)):
                mine = [(key[place, 0], value[place, 0]) for key, value in loops]
                self.past[layer].append(self.blend(mine))
        if self.signal == "gate":
            depth = int(reference.q_exit(reference.exit_distribution(torch.stack(logits)), self.threshold))
        else:
            scores = [self.score(hidden[loop], hidden[loop + 1], loop) for loop in range(self.loops)]
            enough = [depth for depth, score in enumerate(scores, 1) if score >= self.threshold]
            depth = min([*enough, self.loops])
        return self.read_out(hidden[depth]), depth

    def score(self, before_1D: Tensor, after_1D: Tensor, loop: int) -> float:
        """Return a score that needs no gate."""
        p_V = (after_1D[0] @ reference.head_weight(self.params, self.model_config).T).softmax(-1)
        if self.signal == "confidence":
            return float(p_V.max())
        if self.signal == "entropy":
            return 1 + float((p_V * p_V.log()).sum()) / math.log(self.model_config.vocab_size)
        change = float((after_1D - before_1D).norm() / after_1D.norm())
        return 0.0 if loop == 0 else max(0.0, 1 - change)

    def read_token(self, token: int, place: int) -> tuple[int, int]:
        """Run loops until the token exits. It sees past tokens as the mode keeps them, and itself as in its loop."""
        view = self.view(torch.tensor([place]))
        h_SD, state = self.embed([token]), None
        mine: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.past]
        survival, mass = 1.0, 0.0
        for loop in range(self.loops):
            before_SD = h_SD
            for layer, p in enumerate(self.layers()):
                query, key, value = self.project(p, h_SD, view)
                mine[layer].append((key[0, 0], value[0, 0]))
                seen = [*self.past[layer], mine[layer][-1]]
                keys, values = (torch.stack(part)[:, None] for part in zip(*seen, strict=True))
                everything = view._replace(visible_BSS=torch.ones(1, 1, len(seen), dtype=torch.bool))
                h_SD = self.finish_block(p, h_SD, reference.attend(query, keys, values, everything))
            h_SD = self.loop_end(h_SD)
            if self.signal == "gate":
                logit, state = self.ask_gate(h_SD, state, loop)
                mass += survival * torch.sigmoid(logit).item()
                survival *= torch.sigmoid(-logit).item()
            else:
                mass = self.score(before_SD[-1], h_SD[-1], loop)
            if (self.threshold < 1 and mass >= self.threshold) or loop + 1 == self.loops:
                break
        for layer, loops in enumerate(mine):
            self.past[layer].append(self.blend(loops))
        return self.read_out(h_SD[-1]), loop + 1

    def ask_gate(self, h_SD: Tensor, state: Tensor | None, loop: int) -> tuple[Tensor, Tensor | None]:
        """Return the gate's logit and state: the reference's for one position, plus the mean over those that ran."""
        alone = torch.ones(1, 1, 1, dtype=torch.bool)
        plain = replace(self.gate_config, sequence_level=False)
        logit, state = reference.exit_gate(self.gate(), plain, h_SD, state, loop, self.model_config.num_loops, alone)
        if self.gate_config.sequence_level:
            assert state is not None
            self.states[loop].append(state[0, 0])
            mean = torch.stack(self.states[loop]).mean(0)
            logit = logit + F.linear(mean, self.params["gate.sequence_readout.weight"])
        return logit, state

    def blend(self, loops: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the key and value that later tokens see of a token that ran these loops."""
        if self.mode == "mean":
            keys, values = zip(*loops, strict=True)
            return torch.stack(keys).mean(0), torch.stack(values).mean(0)
        return loops[0] if self.mode == "first" else loops[-1]

    def view(self, place_S: Tensor) -> reference.View:
        until = int(place_S[-1]) + 1
        view = reference.View.of(self.model_config, torch.zeros(1, until, dtype=torch.int64), None, False)
        return view._replace(cos_SK=view.cos_SK[place_S], sin_SK=view.sin_SK[place_S])

    def layers(self) -> list[reference.Params]:
        return [reference.scope(self.params, f"decoder.layers.{i}.") for i in range(self.model_config.num_layers)]

    def gate(self) -> reference.Params:
        return reference.scope(self.params, "gate.")

    def embed(self, ids: list[int]) -> Tensor:
        return self.params["embedding.word_embeddings.weight"][ids].unsqueeze(1)

    def project(self, p: reference.Params, x_SBD: Tensor, view: reference.View) -> tuple[Tensor, Tensor, Tensor]:
        """Return a layer's queries, keys and values [S, 1, H, K]: the arguments of the reference's ``attend``."""
        attention = reference.latent_attention if self.model_config.attention == "mla" else reference.grouped_attention
        normed_SBD = reference.rms_norm(x_SBD, p["input_layernorm.weight"], self.model_config.norm_eps)
        with mock.patch.object(reference.model, "attend", side_effect=lambda q, k, v, view: v) as attend:
            attention(reference.scope(p, "self_attention."), self.model_config, normed_SBD, view)
        query, key, value, _ = attend.call_args.args
        return query, key, value

    def finish_block(self, p: reference.Params, x_SBD: Tensor, context_SBHK: Tensor) -> Tensor:
        """Run a block from its heads' outputs to its end."""
        eps = self.model_config.norm_eps
        y_SBD = F.linear(context_SBHK.flatten(2), p["self_attention.linear_proj.weight"])
        if self.model_config.sandwich_norm:
            y_SBD = reference.rms_norm(y_SBD, p["self_attn_bda.norm.weight"], eps)
        x_SBD = x_SBD + y_SBD
        y_SBD = reference.swiglu(
            reference.scope(p, "mlp."), reference.rms_norm(x_SBD, p["pre_mlp_layernorm.weight"], eps)
        )
        if self.model_config.sandwich_norm:
            y_SBD = reference.rms_norm(y_SBD, p["mlp_bda.norm.weight"], eps)
        return x_SBD + y_SBD

    def loop_end(self, h_SBD: Tensor) -> Tensor:
        return reference.rms_norm(h_SBD, self.params["decoder.final_layernorm.weight"], self.model_config.norm_eps)

    def read_out(self, h_1D: Tensor) -> int:
        self.logits_1V = h_1D @ reference.head_weight(self.params, self.model_config).T
        return int(self.logits_1V.argmax())
