"""Helpers of the Hugging Face tests: one of our models as a transformers model, through the table of parameters."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from looplm.config import GateConfig, ModelConfig
from looplm.huggingface.config_json import LOOPLM, HFDescription, TokenIds, to_config_json
from looplm.huggingface.export.configuration_looplm import LoopLMConfig
from looplm.huggingface.export.modeling_looplm import LoopLMForCausalLM
from looplm.huggingface.names import join, split
from looplm.model import LoopLM
from looplm.parameters import parameters


def hf_config(config: ModelConfig, gate: GateConfig, **keys: Any) -> LoopLMConfig:
    """Return the same model's configuration for transformers, with a trained gate; ``keys`` override its entries."""
    description = HFDescription(LOOPLM, config, gate, True, TokenIds(None, (), None))
    values = to_config_json(description, torch.float32)
    del values["auto_map"], values["architectures"], values["torch_dtype"]
    return LoopLMConfig(**{**values, **keys})


def to_theirs(config: ModelConfig, gate: GateConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors under the names of Hugging Face."""
    rows = parameters(config, gate)
    pairs = (zip(row.hugging_face_parts, split(row, ours[row.name]), strict=True) for row in rows)
    return {name: part for parts in pairs for name, part in parts}


def to_ours(config: ModelConfig, gate: GateConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of Hugging Face under our names."""
    return {row.name: join(row, [theirs[name] for name in row.hugging_face_parts]) for row in parameters(config, gate)}


def hf_model(model: LoopLM, gate: GateConfig, **keys: Any) -> LoopLMForCausalLM:
    """Return a transformers model with the same weights, in eval mode; ``keys`` override its configuration."""
    config = model.model_config
    built: Any = LoopLMForCausalLM(hf_config(config, gate, **keys))  # transformers' annotation of to() lacks self
    built = built.to(model.head_weight().dtype).eval()
    weights = to_theirs(config, gate, {name: p.detach() for name, p in model.named_parameters()})
    assert set(weights) == {name for name, _ in built.named_parameters()}
    built.load_state_dict(weights, strict=not config.tie_embeddings)
    return built


def generate(model: Any, *inputs: Tensor, **settings: Any) -> Tensor:
    """Return ``model.generate(...)``: ids [rows, length]. Its annotations exclude models with code of their own."""
    return model.generate(*inputs, **settings)


def random_ids(rows: int, length: int, vocab: int, seed: int = 0) -> Tensor:
    """Return random token ids [rows, length]."""
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache for the code of exports that belongs to one test."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    others = [folder for folder in sys.path if not (Path(folder) / "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", others)  # transformers adds the cache to its end
    forget()
    yield
    forget()
