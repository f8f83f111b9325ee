"""Translation of configs into Megatron's, and engines that this machine lacks, which are refused before a start."""

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from looplm.config import EngineConfig, ParallelConfig
from looplm.failures import UserError
from looplm.megatron import settings
from looplm.megatron.device import HAS_TRANSFORMER_ENGINE
from looplm.megatron.settings import check_engine, transformer_config
from tests.support.tiny import MODEL

FP8: dict[str, Any] = {"transformer_impl": "transformer_engine", "fp8": "hybrid"}


@pytest.mark.skipif(HAS_TRANSFORMER_ENGINE, reason="it is installed here")
def test_without_transformer_engine_a_run_that_needs_it_is_refused():
    with pytest.raises(
        UserError, match=r"engine\.transformer_impl: 'transformer_engine' .*not installed here.*take local"
    ):
        transformer_config(MODEL, torch.bfloat16, engine=EngineConfig(**FP8))


def test_what_a_gpu_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(settings, "HAS_CUDA", True)
    monkeypatch.setattr(settings, "HAS_TRANSFORMER_ENGINE", True)
    monkeypatch.setattr(settings, "compute_capability", lambda: (9, 0))
    check_engine(EngineConfig(**FP8, fp8_recipe="blockwise"))
    with pytest.raises(UserError, match=r"engine\.fp8_recipe: 'mxfp8' .* capability 10\.0, this GPU has 9\.0"):
        check_engine(EngineConfig(**FP8, fp8_recipe="mxfp8"))
    with pytest.raises(UserError, match=r"engine\.fp8: 'emulate-e4m3' .*for machines without a GPU"):
        check_engine(EngineConfig(fp8="emulate-e4m3"))


def test_the_engine_as_megatrons_settings(monkeypatch):
    monkeypatch.setattr(settings, "HAS_TRANSFORMER_ENGINE", True)
    engine = EngineConfig(**FP8, fp8_recipe="blockwise", last_layers_bf16=2)
    config = transformer_config(MODEL, torch.bfloat16, ParallelConfig(tensor=2), engine=engine)
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("hybrid", "blockwise", False)
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (0, 2)
    assert transformer_config(MODEL, engine=EngineConfig(fp8="emulate-e4m3")).fp8 is None


@pytest.mark.parametrize("engine", ["local", "transformer_engine"])
def test_each_loop_adds_to_the_gradient_of_a_weight_that_all_use(engine, monkeypatch):
    """Transformer Engine overwrites a fused buffer at a weight's first use in a step, which is the last in backward."""
    for name in ("HAS_CUDA", "HAS_TRANSFORMER_ENGINE", "HAS_FUSED_WEIGHT_GRADIENTS"):
        monkeypatch.setattr(settings, name, True)
    config = transformer_config(MODEL, engine=EngineConfig(transformer_impl=engine))
    assert config.gradient_accumulation_fusion
    assert config.disable_parameter_transpose_cache == (engine == "transformer_engine")


@pytest.mark.parametrize(
    ("given", "backend"),
    [({}, "auto"), ({"FLASH": "1", "FUSED": "0", "UNFUSED": "0"}, "flash"),
     ({"FLASH": "0", "UNFUSED": "0"}, "fused"), ({"FLASH": "0", "FUSED": "0"}, "unfused")],
)  # fmt: skip
def test_transformer_engines_variables_choose_the_kernel(given, backend, monkeypatch):
    for kernel in ("FLASH", "FUSED", "UNFUSED"):
        monkeypatch.delenv(f"NVTE_{kernel}_ATTN", raising=False)
    for kernel, value in given.items():
        monkeypatch.setenv(f"NVTE_{kernel}_ATTN", value)
    assert transformer_config(MODEL).attention_backend is AttnBackend[backend]
    monkeypatch.setenv("NVTE_FLASH_ATTN", "yes")
    with pytest.raises(UserError, match=r"NVTE_FLASH_ATTN, NVTE_FUSED_ATTN, .*: 'yes, .*set all three, or none"):
        transformer_config(MODEL)


def test_the_initial_scales_reach_megatron():
    config = transformer_config(dataclasses.replace(MODEL, init_std=0.5, embedding_init_std=0.25))
    assert (config.init_method_std, config.embedding_init_method_std) == (0.5, 0.25)
    assert config.perform_initialization and not transformer_config(MODEL, initialize=False).perform_initialization
