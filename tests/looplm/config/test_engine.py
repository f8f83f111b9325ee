"""The engine section: what it allows, and the messages of what it refuses."""

import dataclasses

import pytest
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from looplm.config import EngineConfig, GateConfig, ModelConfig
from looplm.failures import UserError
from looplm.model import LoopLM
from looplm.model.local_layers import ReplicatedLinear
from looplm.parameters import linear_widths
from tests.support.tiny import run_config

TE = {"transformer_impl": "transformer_engine"}
FP8 = {**TE, "fp8": "hybrid"}
DELAYED = {"fp8": "emulate-hybrid", "fp8_recipe": "delayed"}
WIDE = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    ffn_hidden_size=256,
    num_layers=4,
    num_attention_heads=2,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
)
MHA = dataclasses.replace(WIDE, attention="mha", num_query_groups=1)


@pytest.mark.parametrize(
    ("keys", "value", "fix"),
    [
        (
            {"fp8": "hybrid"},
            "engine.fp8: 'hybrid'",
            "it needs engine.transformer_impl=transformer_engine; without a GPU take emulate-hybrid",
        ),
        ({**TE, "fp8": "emulate-e4m3"}, "engine.fp8: 'emulate-e4m3'", "it is for engine.transformer_impl=local"),
        ({"amax_history": 0}, "engine.amax_history: 0", ""),
        *(
            (
                {**format_of, "fp8_recipe": "delayed"},
                "engine.fp8_recipe: 'delayed'",
                "only values in FP8 are scaled; name an FP8 format in engine.fp8, or leave it out",
            )
            for format_of in ({}, {"fp8": "emulate-bf16"})
        ),
        *(
            (
                {**format_of, "amax_history": 7},
                "engine.amax_history: 7",
                "only engine.fp8_recipe=delayed has a history; leave it out",
            )
            for format_of in ({}, FP8)
        ),
        ({"fp8": "emulate-e4m3", "fp8_params": True}, "engine.fp8_params: True", "it needs engine.fp8"),
        ({**FP8, "fp8_recipe": "mxfp8", "fp8_params": True}, "engine.fp8_params: True", "mxfp8"),
        ({"first_layers_bf16": -1}, "engine.first_layers_bf16: -1", "give a number of at least 0"),
        ({"last_layers_bf16": 1}, "engine.last_layers_bf16: 1", "without engine.fp8"),
        ({"fp8": "emulate-bf16", "last_layers_bf16": 1}, "engine.last_layers_bf16: 1", "without engine.fp8"),
        ({**FP8, "fp8_recipe": "delayed", "first_layers_bf16": 1}, "engine.first_layers_bf16: 1", "delayed"),
    ],
)
def test_a_contradiction_is_one_line(keys, value, fix):
    with pytest.raises(UserError) as refused:
        EngineConfig(**keys)
    assert str(refused.value).startswith(f"{value} is not allowed; {fix}") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("engine", "sections", "value", "fix"),
    [
        (FP8, {}, "engine.fp8: 'hybrid'", "it needs optim.precision=bf16"),
        (
            {**FP8, "last_layers_bf16": 3},
            {"parallel": {"pipeline": 2}},
            "engine.last_layers_bf16: 3",
            "a pipeline rank has 2 layers",
        ),
        ({**FP8, "fp8_params": True}, {}, "engine.fp8_params: True", "it needs parallel.distributed_optimizer"),
        (
            {**FP8, "fp8_params": True},
            {
                "optim": {"precision": "bf16"},
                "checkpoint": {"initial": "x"},
                "parallel": {"distributed_optimizer": True},
            },
            "engine.fp8_params: True",
            "the optimizer's fp32 weights",
        ),
        (
            FP8,
            {"model": {"kv_lora_rank": 40}},
            "model.kv_lora_rank: 40",
            "engine.fp8_recipe=tensorwise multiplies in multiples of 16",
        ),
        ({**FP8, "fp8_recipe": "mxfp8"}, {}, "model.kv_lora_rank + qk_rope_head_dim: 80", "engine.fp8_recipe=mxfp8"),
        (
            FP8,
            {"model": {"v_head_dim": 24}, "parallel": {"tensor": 2}},
            "model.num_attention_heads x (qk_nope_head_dim + v_head_dim): 56",
            "engine.fp8_recipe=tensorwise multiplies in multiples of 16 (after parallel.tensor=2)",
        ),
        (FP8, {"data": {"seq_length": 12}}, "data.seq_length x micro_batch_size: 24", ""),
        (DELAYED, {"parallel": {"recompute": "full"}}, "engine.fp8_recipe: 'delayed'", "with parallel.recompute=full"),
        (
            {**FP8, "fp8_recipe": "delayed"},
            {"parallel": {"recompute": "loop"}},
            "engine.fp8_recipe: 'delayed'",
            "with parallel.recompute=loop",
        ),
        (DELAYED, {"parallel": {"pipeline": 2}}, "engine.fp8_recipe: 'delayed'", "its emulation compares all ranks"),
        (
            DELAYED,
            {"loss": {"objective": "adaptive_gate"}, "checkpoint": {"initial": "x"}},
            "engine.fp8_recipe: 'delayed'",
            "a frozen trunk",
        ),
    ],
)
def test_what_a_run_cannot_have_is_one_line(engine, sections, value, fix, tmp_path):
    sections = {**sections, "model": dataclasses.replace(WIDE, **sections.get("model", {}))}
    with pytest.raises(UserError) as refused:
        run_config(tmp_path, tmp_path, **sections, engine=engine)
    assert str(refused.value).startswith(f"{value} is not allowed; {fix}") and "\n" not in str(refused.value)


def test_what_a_run_can_have(tmp_path):
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
