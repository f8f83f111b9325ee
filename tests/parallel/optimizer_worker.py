"""What each rank of the optimizer's tests does: gradients of a few steps, or whole runs. ``torchrun -m ... JOBS.json``"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallelConfig

from looplm import parallel
from looplm.cli import from_dict
from looplm.config import RunConfig
from looplm.model import LoopLM
from pretrain import optim
from pretrain.data import BatchSchedule, build_train_set, check_corpus, micro_batches
from pretrain.step import Stepper
from pretrain.train import train
from tests.parallel.gradients import whole_gradients

# Megatron's default is 40 million, so that a tiny model would have one bucket and nothing to overlap.
BUCKET_SIZE = 5000


def gradients(config: RunConfig, weights: str, output: Path) -> None:
    """Load ``weights`` and save the gradients of one step under ``output``.

    It is run twice: in the first step Megatron only counts which gradients come, in the second it overlaps.
    """
    corpus = check_corpus(config)
    groups = parallel.start(config.seed, config.parallel)
    model = LoopLM(config.model, config.gate, groups, optim.DTYPES[config.optim.precision], config.parallel)
    ddp = optim.wrap_data_parallel(model, config.loss, config.parallel)
    optimizer = optim.build_optimizer(ddp, config.optim, config.parallel)
    scheduler, data = optim.build_scheduler(optimizer, config.optim), config.data
    stepper = Stepper(ddp, optimizer, scheduler, config.loss, groups, data.seq_length, data.micro_batch_size)
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, weights)["model"])
    count, batch = BatchSchedule(config.data, groups.dp.size(), config.parallel.pipeline).at(0)
    train_set = build_train_set(config, corpus, batch, batch)
    for _ in range(2):
        batches = micro_batches(train_set, config.data, 0, groups.dp.rank(), groups.dp.size())
        stats = stepper.backward(batches, count)
    found = whole_gradients(ddp, groups)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found[name] if name in found else torch.zeros_like(parameter))
    if dist.get_rank() == 0:
        (output / "state").mkdir(parents=True)
        (output / "stats.json").write_text(json.dumps(vars(stats)))
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(output / "state"))
    dist.barrier()


def main() -> None:
    """Run every job of the file in turn."""
    optim.DistributedDataParallelConfig = partial(DistributedDataParallelConfig, bucket_size=BUCKET_SIZE)
    jobs: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())
    for job in jobs:
        config = from_dict(RunConfig, job["config"], where="job")
        if job["kind"] == "gradients":
            gradients(config, job["weights"], Path(job["output"]))
        else:
            train(config, check_corpus(config), parallel.start(config.seed, config.parallel))
        parallel.reset()
    parallel.stop()


if __name__ == "__main__":
    main()
