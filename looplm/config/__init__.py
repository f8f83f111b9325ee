"""Configuration: one frozen dataclass per concern, validated when it is built.

model.py     the looped transformer and its exit gate
parallel.py  the parallel layout
engine.py    backend and matmul precision of the linear layers
tasks.py     synthetic tasks in place of text
loss.py      the training objective
run.py       optimizer, data, checkpoints, health, logging, and the run that holds them all
stored.py    configurations that earlier releases have stored
"""

from looplm.config.engine import EMULATED as EMULATED
from looplm.config.engine import EngineConfig as EngineConfig
from looplm.config.engine import Recipe as Recipe
from looplm.config.loss import LossConfig as LossConfig
from looplm.config.model import GateConfig as GateConfig
from looplm.config.model import Injection as Injection
from looplm.config.model import ModelConfig as ModelConfig
from looplm.config.parallel import ParallelConfig as ParallelConfig
from looplm.config.parallel import Recompute as Recompute
from looplm.config.run import CheckpointConfig as CheckpointConfig
from looplm.config.run import DataConfig as DataConfig
from looplm.config.run import DataSource as DataSource
from looplm.config.run import HealthConfig as HealthConfig
from looplm.config.run import LoggingConfig as LoggingConfig
from looplm.config.run import OptimConfig as OptimConfig
from looplm.config.run import RampUpConfig as RampUpConfig
from looplm.config.run import RunConfig as RunConfig
from looplm.config.tasks import CapoConfig as CapoConfig
from looplm.config.tasks import CausalLoopsConfig as CausalLoopsConfig
from looplm.config.tasks import DepoConfig as DepoConfig
from looplm.config.tasks import ManoConfig as ManoConfig
from looplm.config.tasks import MultiHopConfig as MultiHopConfig
from looplm.config.tasks import PHopConfig as PHopConfig
from looplm.config.tasks import ReachabilityConfig as ReachabilityConfig
from looplm.config.tasks import SumsConfig as SumsConfig
from looplm.config.tasks import TaskConfig as TaskConfig
from looplm.config.tasks import WordProblemConfig as WordProblemConfig
