"""Translation of configs into Megatron's, and engines that this machine lacks, which are refused before a start."""

import dataclasses
from typing import Any

import pytest
import torch

from looplm.cli import UserError
from looplm.config import EngineConfig, ParallelConfig
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


def test_the_initial_scales_reach_megatron():
    config = transformer_config(dataclasses.replace(MODEL, init_std=0.5, embedding_init_std=0.25))
    assert (config.init_method_std, config.embedding_init_method_std) == (0.5, 0.25)
    assert config.perform_initialization and not transformer_config(MODEL, initialize=False).perform_initialization
