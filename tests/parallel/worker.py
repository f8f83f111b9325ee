"""What each rank of a parity test does, in a given layout: a step's gradients and ten steps' losses, or a training run.

``torchrun -m tests.parallel.worker JOBS.json``. Gradients are saved as if they were weights, through Megatron's own
resharding checkpoint, so that the test can read them as one process would hold them.
"""

import json
import sys
import time
from itertools import chain, islice
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

STEPS = 10


def steps(config: RunConfig, weights: str, output: Path, repeats: int = 0) -> None:
    """Load ``weights``; save the statistics and every gradient of the first step, the loss of ten, and the validation
    loss after them. ``repeats`` more backward passes of the first step are first compared with it bit by bit."""
    corpus = check_corpus(config)
    groups = parallel.start(config.seed, config.parallel)
    model = LoopLM(config.model, config.gate, groups, layout=config.parallel)
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, weights)["model"])
    ddp = wrap_data_parallel(model, config.loss)
    optimizer = build_optimizer(ddp, config.optim)
    scheduler = build_scheduler(optimizer, config.optim)
    data = config.data
    stepper = Stepper(ddp, optimizer, scheduler, config.loss, groups, data.seq_length, data.micro_batch_size)
    count, samples = BatchSchedule(data, groups.dp.size(), config.parallel.pipeline).at(0)
    train_set = build_train_set(config, corpus, STEPS * samples, STEPS * samples)

    batches = micro_batches(train_set, data, 0, groups.dp.rank(), groups.dp.size())
    first = list(islice(batches, count))
    stats = stepper.backward(iter(first), count)
    gradients = {name: p.main_grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    different = 0
    for _ in range(repeats):
        again = stepper.backward(iter(first), count)
        same = again == stats and all(
            torch.equal(p.main_grad, gradients[name]) for name, p in model.named_parameters() if p.requires_grad
        )
        different += not same
    all_different = torch.tensor([different])
    dist.all_reduce(all_different)

    batches = chain(first, batches)
    losses = [stepper.train(batches, count)[0].loss for _ in range(STEPS)]
    valid = stepper.evaluate(micro_batches(train_set, data, 0, groups.dp.rank(), groups.dp.size()), count)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(gradients.get(name, torch.zeros_like(parameter)))
    if dist.get_rank() == 0:
        output.mkdir(parents=True)
        found = {"losses": losses, "valid": valid.loss, "different": int(all_different)}
        (output / "stats.json").write_text(json.dumps(vars(stats) | found))
        (output / "state").mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(output / "state"))
    dist.barrier()


def main() -> None:
    """Run every job of the file in turn, in one set of processes: starting them costs more than the jobs."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        begin = time.monotonic()
        config = from_dict(RunConfig, job["config"], where="job")
        if job["kind"] == "steps":
            steps(config, job["weights"], Path(job["output"]), job.get("repeats", 0))
        else:
            train(config, check_corpus(config), parallel.start(config.seed, config.parallel))
        if dist.get_rank() == 0:
            print(f"{job.get('output', config.output_dir)}: {time.monotonic() - begin:.1f} s", flush=True)
        parallel.reset()
    parallel.stop()


if __name__ == "__main__":
    main()
