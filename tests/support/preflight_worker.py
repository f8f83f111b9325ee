"""A preflight on several ranks: first on healthy ones, then with wrong sums and a fast clock on the last rank."""

import json
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from looplm.cli import from_dict
from looplm.config import RunConfig
from looplm.megatron import process_groups
from pretrain.cluster import probes
from pretrain.cluster.examine import examine

FORWARD = 200.0  # seconds


def damage_the_last_rank() -> None:
    if dist.get_rank() != dist.get_world_size() - 1:
        return
    reduce = dist.all_reduce

    def reduce_and_add_one(values: Any, group: Any = None, **kwargs: Any) -> None:
        reduce(values, group=group, **kwargs)
        values += dist.get_world_size(group) > 1

    dist.all_reduce = reduce_and_add_one  # type: ignore[assignment]  # it takes only what the probes pass
    probes.clock = lambda: time.time() + FORWARD


def run(config_file: Path, result: Path) -> None:
    config = from_dict(RunConfig, json.loads(config_file.read_text()), where="test")
    groups = process_groups.start(config.seed, config.parallel)
    found = {"sound": list(examine(config, groups))}
    damage_the_last_rank()
    found["damaged"] = list(examine(config, groups))
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found))
    process_groups.stop()
