"""Configuration: one frozen dataclass per concern, validated once, when it is built.

model.py     the looped transformer and its exit gate
parallel.py  how a run is laid out over ranks
engine.py    backend and matmul precision of the linear layers
run.py       loss, optimizer, data, checkpoints, logging, and the run that holds them all
"""

from looplm.config.engine import EMULATED, EngineConfig, Recipe, linear_widths
from looplm.config.model import GateConfig, ModelConfig, require_positive
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
    "linear_widths",
    "require_positive",
]
