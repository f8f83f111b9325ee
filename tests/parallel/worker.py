"""What each rank of a parity test does: one optimizer step's gradients, or a few whole steps, in a given layout.

``torchrun tests/parallel/worker.py JOB.json``. Gradients are saved as if they were weights, through Megatron's own
resharding checkpoint, so that the test can read them as one process would hold them.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from looplm import parallel
from looplm.cli import from_dict
from looplm.config import RunConfig
from looplm.model import LoopLM
from pretrain.data import BatchSchedule, build_train_set, check_corpus, micro_batches
from pretrain.optim import build_optimizer, build_scheduler, wrap_data_parallel
from pretrain.step import Stepper
from pretrain.train import train


def gradients(config: RunConfig, weights: str, output: Path) -> None:
    """Load ``weights``, run one step's forward and backward, and save the loss and every gradient under ``output``."""
    corpus = check_corpus(config)
    groups = parallel.start(config.seed, config.parallel)
    model = LoopLM(config.model, config.gate, groups, layout=config.parallel)
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, weights)["model"])
    ddp = wrap_data_parallel(model, config.loss, config.parallel)
    optimizer = build_optimizer(ddp, config.optim, config.parallel)
    scheduler = build_scheduler(optimizer, config.optim)
    data = config.data
    stepper = Stepper(ddp, optimizer, scheduler, config.loss, groups, data.seq_length, data.micro_batch_size)
    count, batch = BatchSchedule(config.data, groups.dp.size()).at(0)
    train_set = build_train_set(config, corpus, batch, batch)
    batches = micro_batches(train_set, config.data, 0, groups.dp.rank(), groups.dp.size())
    stats = stepper.backward(batches, count)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter))
    if dist.get_rank() == 0:
        output.mkdir(parents=True)
        (output / "stats.json").write_text(json.dumps(vars(stats)))
        (output / "state").mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(output / "state"))
    dist.barrier()


def main() -> None:
    """Run every job of the file in turn, in one set of processes: starting them costs more than the jobs."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        config = from_dict(RunConfig, job["config"], where="job")
        if job["kind"] == "gradients":
            gradients(config, job["weights"], Path(job["output"]))
        else:
            train(config, check_corpus(config), parallel.start(config.seed, config.parallel))
        parallel.reset()
    parallel.stop()


if __name__ == "__main__":
    main()
