"""The block of Transformer Engine's modules, on a machine without a GPU.

Its parameters need no GPU: the model is built with FP8 on, and a checkpoint carries every parameter to a local block
and back. Its kernels do: plain torch replaces them, so that the block's wiring, packed documents and loops can be
compared with the oracle, and the tests see which modules run inside FP8's context. The kernels are not tested here.
"""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from looplm import checkpoint, reference
from looplm.config import EngineConfig, GateConfig, ModelConfig, ParallelConfig, Recipe
from looplm.megatron.device import HAS_TRANSFORMER_ENGINE
from looplm.model import EXTRA_STATE, LoopLM
from looplm.model.pipeline import loop_views
from looplm.model.transformer_engine_layers import local_names
from tests.support.parity import assert_close_relative, gradients, oracle_copy
from tests.support.tiny import about_weights

if HAS_TRANSFORMER_ENGINE:
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

needs_engine = pytest.mark.skipif(
    not HAS_TRANSFORMER_ENGINE, reason="Transformer Engine is not installed here: make test-te builds an environment"
)
GATE = GateConfig(state_size=8)
MLA = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    ffn_hidden_size=96,
    num_layers=3,
    num_attention_heads=4,
    num_loops=2,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    max_sequence_length=64,
)
MHA = dataclasses.replace(MLA, attention="mha", num_query_groups=2)
MODELS = {
    "mla": MLA,
    "mla, query latent": dataclasses.replace(MLA, q_lora_rank=48),
    "mla, unequal heads, no sandwich": dataclasses.replace(MLA, v_head_dim=8, sandwich_norm=False),
    "mha": MHA,
    "mha, biases and normed heads": dataclasses.replace(MHA, qkv_bias=True, qk_norm=True),
    "mla, gate": dataclasses.replace(MLA, attention_gate="element"),
    "mha, gate": dataclasses.replace(MHA, attention_gate="element"),
    "mha, tied": dataclasses.replace(MHA, tie_embeddings=True, num_query_groups=None),
}
S, B = 24, 2


def engine(
    fp8: Literal["e4m3", "hybrid"] | None = "hybrid", recipe: Recipe = "tensorwise", **keys: Any
) -> EngineConfig:
    return EngineConfig(transformer_impl="transformer_engine", fp8=fp8, fp8_recipe=recipe, **keys)


def documents() -> Tensor:
    """Return the first position of each token's document [S, B]."""
    start_SB = torch.zeros(S, B, dtype=torch.int64)
    start_SB[5:, 0], start_SB[11:, 0], start_SB[S - 1 :, 1] = 5, 11, S - 1
    return start_SB


# ------------------------------------------------------------------------------------------- without Transformer Engine


@pytest.mark.parametrize("name", MODELS)
def test_fused_norms_have_the_names_that_a_local_block_gives_them(name, single_process):
    layer = LoopLM(MODELS[name], GATE, single_process).decoder.layers[0]
    norms = {key for key in layer.state_dict() if "norm" in key}
    fused = {f"{target}weight" for target in local_names(MODELS[name]).values()}
    two_readers = MODELS[name].attention == "mla" or MODELS[name].attention_gate != "none"
    alone = {"input_layernorm.weight"} if two_readers else set()
    sandwich = {"self_attn_bda.norm.weight", "mlp_bda.norm.weight"} if MODELS[name].sandwich_norm else set()
    heads = {f"self_attention.{part}_layernorm.weight" for part in "qk"} if MODELS[name].qk_norm else set()
    absent = set() if MODELS[name].q_lora_rank else {"self_attention.q_layernorm.weight"}
    assert not fused & alone
    assert norms == (fused - absent) | alone | sandwich | heads


def test_a_pipeline_refreshes_the_fp8_weights_once_a_step():
    ddp = Mock(module=Mock(model_config=Mock(num_loops=3)))
    for view in loop_views(ddp):
        view.set_is_first_microbatch()
    ddp.set_is_first_microbatch.assert_called_once_with()


# --------------------------------------------------------------------------------------------------- built, on a CPU


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer the questions of Transformer Engine's constructors and contexts as a Hopper GPU would."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    properties = SimpleNamespace(name="paper", major=9, minor=0, multi_processor_count=132, total_memory=2**36)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)


def shapes(model: LoopLM) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight in a checkpoint, by its name there."""
    found: dict[str, tuple[int, ...]] = {}
    for value in model.sharded_state_dict().values():
        whole = getattr(value, "global_shape", None) or tuple(value.data.shape)  # a fused matrix is split when saved
        found[value.key] = (*found.get(value.key, ()), *whole)
    return found


def fill(model: LoopLM) -> LoopLM:
    """Fill the weights with random values, and return the model."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.rand(parameter.shape, generator=generator))
    return model


def canonical(model: LoopLM) -> dict[str, Tensor]:
    """Return the weights under the local model's names."""
    renamed = {}
    for name, parameter in model.named_parameters():
        for fused, local in local_names(model.model_config).items():
            name = name.replace(fused, local) if model.attends_packed else name
        renamed[name] = parameter.detach()
    return renamed


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize("fp8", [None, "tensorwise", "delayed", "blockwise"])
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_carries_every_parameter_to_a_local_block_and_back(
    name, fp8, single_process: ProcessGroupCollection, tmp_path: Path, pretended_gpu, corpus
):
    config, layers = MODELS[name], engine(None) if fp8 is None else engine(recipe=fp8)
    theirs = fill(LoopLM(config, GATE, single_process, torch.bfloat16, engine=layers))
    local = LoopLM(config, GATE, single_process, torch.bfloat16)
    assert theirs.config.fp8 == layers.fp8 and shapes(theirs) == shapes(local)
    shapes_of = [{key: value.shape for key, value in canonical(model).items()} for model in (theirs, local)]
    assert shapes_of[0] == shapes_of[1]

    about = about_weights("bfloat16", corpus / "tokenizer.json")
    checkpoint.save_weights(tmp_path / "theirs", theirs, GATE, about, corpus / "tokenizer.json")
    checkpoint.load_weights(tmp_path / "theirs", local, GATE)
    assert_same(canonical(theirs), canonical(local))

    other = fill(LoopLM(config, GATE, single_process, torch.bfloat16))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    checkpoint.save_weights(tmp_path / "local", other, GATE, about, corpus / "tokenizer.json")
    checkpoint.load_weights(tmp_path / "local", theirs, GATE)
    assert_same(canonical(other), canonical(theirs))
    assert any(key.endswith(EXTRA_STATE) for key in theirs.state_dict()), "there was no FP8 state to leave out"


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# --------------------------------------------------------------------------------- plain torch in the kernels' place


@pytest.fixture
def plain_kernels(monkeypatch: pytest.MonkeyPatch, pretended_gpu) -> list[tuple[str, bool]]:
    """Replace the kernels by plain torch on the same parameters.

    The list records each module that ran, by its class name, and whether FP8 was on.
    """
    ran: list[tuple[str, bool]] = []

    def note(module: object) -> None:
        ran.append((type(module).__name__, FP8GlobalStateManager.is_fp8_enabled()))

    def linear(self, x, **_):
        note(self)
        return F.linear(x, self.weight, self.bias if self.use_bias else None)

    def norm(self, x):
        note(self)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def norm_linear(self, x, **_):
        normed = F.rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps)
        return linear(self, normed)

    def attention(
        self, q, k, v, mask, attn_mask_type, qkv_format="sbhd", cu_seqlens_q=None, cu_seqlens_kv=None, **limits
    ):
        note(self)
        assert mask is None
        if qkv_format == "sbhd":
            assert attn_mask_type == "causal"
            q_BHSK, k_BHSK, v_BHSK = (x.permute(1, 2, 0, 3) for x in (q, k, v))
            return causal(q_BHSK, k_BHSK, v_BHSK, self.softmax_scale).permute(2, 0, 1, 3).flatten(2)
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal") and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) <= limits["max_seqlen_q"] == limits["max_seqlen_kv"]
        documents_HTK = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([causal(q, k, v, self.softmax_scale).transpose(0, 1) for q, k, v in documents_HTK])

    monkeypatch.setattr(te.Linear, "forward", linear)
    monkeypatch.setattr(te.RMSNorm, "forward", norm)
    monkeypatch.setattr(te.LayerNormLinear, "forward", norm_linear)
    monkeypatch.setattr(te.DotProductAttention, "forward", attention)
    return ran


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(-3) != k.size(-3))


@needs_engine
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_the_wiring_equals_the_oracle(name, packed, single_process, plain_kernels):
    config = MODELS[name]
    model = LoopLM(config, GATE, single_process, engine=engine(None))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * drawn if "norm" in key else 0.1 * drawn)
    names = {id(p): key for key, p in zip(canonical(model), model.parameters(), strict=True)}
    params = {names[id(p)]: p for p in model.parameters()}
    ids_BS = torch.randint(config.vocab_size, (B, S), generator=generator)
    start_SB = documents() if packed else None
    output = model(ids_BS, document_start_SB=start_SB)
    their_params = oracle_copy(params)
    theirs = reference.forward(their_params, config, GATE, ids_BS, document_start_SB=start_SB)
    ours_by_loop, theirs_by_loop = (
        {f"loop {loop}": h_SBD for loop, h_SBD in enumerate(hidden)} for hidden in (output.hidden, theirs.hidden)
    )
    assert_close_relative(ours_by_loop, theirs_by_loop)
    mix_SBD = torch.randn(S, B, config.hidden_size, generator=generator)
    trunk = {key: value for key, value in params.items() if key.startswith("decoder.")}
    assert_close_relative(
        gradients((mix_SBD * torch.stack(list(output.hidden))).sum(), trunk),
        gradients((mix_SBD * torch.stack(list(theirs.hidden))).sum(), {key: their_params[key] for key in trunk}),
    )


@needs_engine
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    ("recipe", "keys"), [("tensorwise", {"last_layers_bf16": 1}), ("delayed", {}), ("blockwise", {})]
)
def test_the_blocks_run_in_fp8_in_every_loop_and_nothing_else_does(
    recipe, keys, recompute, single_process, plain_kernels
):
    layout, layers = ParallelConfig(recompute=recompute), engine(recipe=recipe, **keys)
    model = LoopLM(MLA, GATE, single_process, torch.bfloat16, layout, engine=layers)
    outside: list[bool] = []
    for module in (model.decoder.final_layernorm, model.gate):
        module.register_forward_hook(lambda *_: outside.append(FP8GlobalStateManager.is_fp8_enabled()))
    with torch.no_grad():
        model(torch.randint(MLA.vocab_size, (B, S)))
    attention = ["TEColumnParallelLinear", "TELinear", "TELayerNormColumnParallelLinear", "TEDotProductAttention"]
    mlp = ["TELayerNormColumnParallelLinear", "TERowParallelLinear"]
    layer = ["RMSNorm", *attention, "TERowParallelLinear", *mlp]
    assert sorted(name for name, _ in plain_kernels) == sorted(layer * MLA.num_layers * MLA.num_loops)
    fp8 = [on for _, on in plain_kernels]
    in_bf16 = keys.get("last_layers_bf16", 0)
    one_loop = [True] * len(layer) * (MLA.num_layers - in_bf16) + [False] * len(layer) * in_bf16
    assert fp8 == one_loop * MLA.num_loops
    assert len(outside) == 2 * MLA.num_loops and not any(outside)
