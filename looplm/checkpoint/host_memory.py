"""Main memory that the checkpoints of a run take, beside what training takes: known before the run."""

from collections import Counter
from typing import NamedTuple

from looplm.accounting import checkpoint_bytes, optimizer_bytes
from looplm.checkpoint.optimizer_state import GROUP_BYTES
from looplm.config import RunConfig
from looplm.parameters import parameters


class HostMemory(NamedTuple):
    """Bytes at the peak.

    Args:
        saving: of all ranks together that write a checkpoint.
        loading: of each rank that reads one.
        staying: of all writers together, from the first save on.
    """

    saving: int
    loading: int
    staying: int


def host_bytes(config: RunConfig) -> HostMemory:
    """Return what the checkpoints of a run take.

    A save copies the whole checkpoint into memory that the writing processes share, and that is used again for the next
    one. Beside it are the moments and main weights of a distributed optimizer, which its first ranks gather. To load,
    every rank reads the optimizer's state in groups, and Megatron concatenates the halves of a gated layer's matrix.
    """
    frozen, precision = config.loss.frozen_trunk, config.optim.precision
    stacked = Counter[str]()
    for row in parameters(config.model, config.gate):
        if row.section == "gate" or not frozen:
            stacked[".".join(part for part in row.name.split(".") if not part.isdigit())] += row.size
    state = sum(stacked.values()) * optimizer_bytes(precision)
    group = min(state, max(GROUP_BYTES, 4 * max(stacked.values()) // config.parallel.tensor))
    stored = checkpoint_bytes(config.model, config.gate, precision, frozen)
    gathered = state if config.parallel.distributed_optimizer else 0
    return HostMemory(stored + gathered, 2 * group, stored)
