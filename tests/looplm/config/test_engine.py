"""What the engine section allows, and what its refusals say; what this machine does not have is refused before a start."""

import dataclasses

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from looplm.cli import UserError
from looplm.config import EngineConfig, GateConfig, ModelConfig, ParallelConfig
from looplm.megatron import settings
from looplm.megatron.settings import check_engine, transformer_config
from looplm.model import LoopLM
from looplm.model.local_layers import ReplicatedLinear
from looplm.parameters import linear_widths
from tests.support.tiny import MODEL, run_config

TE = {"transformer_impl": "transformer_engine"}
FP8 = {**TE, "fp8": "hybrid"}
DELAYED = {"fp8": "emulate-hybrid", "fp8_recipe": "delayed"}
WIDE = ModelConfig(
    vocab_size=512, hidden_size=128, ffn_hidden_size=256, num_layers=4, num_attention_heads=2, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
)  # fmt: skip
MHA = dataclasses.replace(WIDE, attention="mha", num_query_groups=1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fp8": "hybrid"}, "engine.fp8: 'hybrid' is not allowed; it needs engine.transformer_impl=transformer_engine; without a GPU take emulate-hybrid"),
        ({**TE, "fp8": "emulate-e4m3"}, "engine.fp8: 'emulate-e4m3' is not allowed; it is for engine.transformer_impl=local"),
        ({"amax_history": 0}, "engine.amax_history: 0 is not allowed"),
        ({"fp8": "emulate-e4m3", "fp8_params": True}, "engine.fp8_params: True is not allowed; it needs engine.fp8"),
        ({**FP8, "fp8_recipe": "mxfp8", "fp8_params": True}, "engine.fp8_params: True is not allowed; mxfp8"),
        ({"first_layers_bf16": -1}, "engine.first_layers_bf16: -1 is not allowed; give a number of at least 0"),
        ({"last_layers_bf16": 1}, "engine.last_layers_bf16: 1 is not allowed; without engine.fp8"),
        ({"fp8": "emulate-bf16", "last_layers_bf16": 1}, "engine.last_layers_bf16: 1 is not allowed; without engine.fp8"),
        ({**FP8, "fp8_recipe": "delayed", "first_layers_bf16": 1}, "engine.first_layers_bf16: 1 is not allowed; delayed"),
    ],
)  # fmt: skip
def test_a_contradiction_is_one_line(keys, message):
    with pytest.raises(UserError) as refused:
        EngineConfig(**keys)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("engine", "sections", "message"),
    [
        (FP8, {}, "engine.fp8: 'hybrid' is not allowed; it needs optim.precision=bf16"),
        ({**FP8, "last_layers_bf16": 3}, {"parallel": {"pipeline": 2}}, "engine.last_layers_bf16: 3 is not allowed; a pipeline rank has 2 layers"),
        ({**FP8, "fp8_params": True}, {}, "engine.fp8_params: True is not allowed; it needs parallel.distributed_optimizer"),
        ({**FP8, "fp8_params": True}, {"optim": {"precision": "bf16"}, "checkpoint": {"initial": "x"}, "parallel": {"distributed_optimizer": True}}, "engine.fp8_params: True is not allowed; the optimizer's fp32 weights"),
        (FP8, {"model": {"kv_lora_rank": 40}}, "model.kv_lora_rank: 40 is not allowed; engine.fp8_recipe=tensorwise multiplies in multiples of 16"),
        ({**FP8, "fp8_recipe": "mxfp8"}, {}, "model.kv_lora_rank + qk_rope_head_dim: 80 is not allowed; engine.fp8_recipe=mxfp8"),
        (FP8, {"model": {"v_head_dim": 24}, "parallel": {"tensor": 2}}, "model.num_attention_heads x (qk_nope_head_dim + v_head_dim): 56 is not allowed"),
        (FP8, {"data": {"seq_length": 12}}, "data.seq_length x micro_batch_size: 24 is not allowed"),
        (DELAYED, {"parallel": {"recompute": "full"}}, "engine.fp8_recipe: 'delayed' is not allowed; with parallel.recompute=full"),
        ({**FP8, "fp8_recipe": "delayed"}, {"parallel": {"recompute": "loop"}}, "engine.fp8_recipe: 'delayed' is not allowed; with parallel.recompute=loop"),
        (DELAYED, {"parallel": {"pipeline": 2}}, "engine.fp8_recipe: 'delayed' is not allowed; its emulation compares all ranks"),
        (DELAYED, {"loss": {"objective": "adaptive_gate"}, "checkpoint": {"initial": "x"}}, "engine.fp8_recipe: 'delayed' is not allowed; a frozen trunk"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_have_is_one_line(engine, sections, message, tmp_path):
    sections = {**sections, "model": dataclasses.replace(WIDE, **sections.get("model", {}))}
    with pytest.raises(UserError) as refused:
        run_config(tmp_path, tmp_path, **sections, engine=engine)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_what_it_can_have(tmp_path):
    bf16 = {"model": WIDE, "optim": {"precision": "bf16"}}
    run_config(tmp_path, tmp_path, **bf16, engine={**FP8, "fp8_recipe": "delayed"}, parallel={"recompute": "full"})
    run_config(tmp_path, tmp_path, **bf16, engine={**FP8, "first_layers_bf16": 2}, parallel={"pipeline": 2})
    run_config(tmp_path, tmp_path, engine={"fp8": "emulate-hybrid"}, parallel={"recompute": "loop", "pipeline": 2})


@pytest.mark.parametrize(
    "model", [WIDE, dataclasses.replace(WIDE, q_lora_rank=48), MHA], ids=["mla", "query latent", "mha"]
)
def test_the_widths_are_those_of_the_matrices(model, single_process):
    built = LoopLM(model, GateConfig(), single_process)
    kinds = (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)
    linears = [linear for linear in built.decoder.layers[0].modules() if isinstance(linear, kinds)]
    sides = {side for linear in linears for side in linear.weight.shape}
    assert sides == set(linear_widths(model, 1).values())


@pytest.mark.skipif(settings.HAS_TRANSFORMER_ENGINE, reason="it is installed here")
def test_without_transformer_engine_a_run_that_needs_it_is_refused():
    with pytest.raises(
        UserError, match=r"engine\.transformer_impl: 'transformer_engine' .*not installed here.*take local"
    ):
        transformer_config(WIDE, torch.bfloat16, engine=EngineConfig(**FP8))


def test_a_gpu_is_asked_for_what_it_has(monkeypatch):
    monkeypatch.setattr(settings, "HAS_CUDA", True)
    monkeypatch.setattr(settings, "HAS_TRANSFORMER_ENGINE", True)
    monkeypatch.setattr(settings, "compute_capability", lambda: (9, 0))
    check_engine(EngineConfig(**FP8, fp8_recipe="blockwise"))
    with pytest.raises(UserError, match=r"engine\.fp8_recipe: 'mxfp8' .* capability 10\.0, this GPU has 9\.0"):
        check_engine(EngineConfig(**FP8, fp8_recipe="mxfp8"))
    with pytest.raises(UserError, match=r"engine\.fp8: 'emulate-e4m3' .*for machines without a GPU"):
        check_engine(EngineConfig(fp8="emulate-e4m3"))


def test_the_engine_in_megatrons_terms(monkeypatch):
    monkeypatch.setattr(settings, "HAS_TRANSFORMER_ENGINE", True)
    engine = EngineConfig(**FP8, fp8_recipe="blockwise", last_layers_bf16=2)
    config = transformer_config(WIDE, torch.bfloat16, ParallelConfig(tensor=2), engine=engine)
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("hybrid", "blockwise", False)
    assert (config.first_last_layers_bf16, config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (
        True,
        0,
        2,
    )
    assert transformer_config(MODEL, engine=EngineConfig(fp8="emulate-e4m3")).fp8 is None
