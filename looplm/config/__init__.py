"""Configuration: one frozen dataclass per concern, validated when it is built.

model.py     the looped transformer and its exit gate
parallel.py  the parallel layout
engine.py    backend and matmul precision of the linear layers
run.py       loss, optimizer, data, checkpoints, logging, and the run that holds them all
"""

from looplm.config.engine import EMULATED, EngineConfig, Recipe
from looplm.config.model import GateConfig, ModelConfig
from looplm.config.parallel import ParallelConfig, Recompute
from looplm.config.run import (
    CheckpointConfig,
    DataConfig,
    DataSource,
    LoggingConfig,
    LossConfig,
    OptimConfig,
    RampUpConfig,
    RunConfig,
)

__all__ = [
    "EMULATED",
    "CheckpointConfig",
    "DataConfig",
    "DataSource",
    "EngineConfig",
    "GateConfig",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RampUpConfig",
    "Recipe",
    "Recompute",
    "RunConfig",
]
