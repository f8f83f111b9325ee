"""What each rank of a parity test does, in a given layout: a step's gradients and some steps' losses, a training run, or
weights read and written.

Gradients are saved as if they were weights, through Megatron's own resharding checkpoint, so that the test can read them
as one process would hold them.
"""

import gc
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from looplm import checkpoint
from looplm.config import RunConfig
from looplm.megatron import process_groups
from looplm.model import LoopLM, local_layers
from pretrain import optim
from pretrain.data import BatchSchedule, build_train_set, check_corpus, micro_batches
from pretrain.train import train
from pretrain.trainer import Trainer
from tests.support.gradients import whole_gradients
from tests.support.saving import spare_the_spawn

# Megatron's default is 40 million, so that a tiny model would have one bucket and nothing to overlap.
BUCKET_SIZE = 5000
REPLICATED = local_layers.ReplicatedLinear


def steps(config: RunConfig, weights: Path, output: Path, repeats: int = 0, stock_projections: bool = False) -> None:
    """Load ``weights``; save the statistics and every gradient of the first step, the loss of ``optim.train_steps``, and
    the validation loss after them. ``repeats`` more backward passes of the first step are first compared with it bit by
    bit. ``stock_projections`` are Megatron's own where ours are replicated."""
    local_layers.ReplicatedLinear = ColumnParallelLinear if stock_projections else REPLICATED  # type: ignore[misc]
    corpus = check_corpus(config.data, config.model.vocab_size)
    groups = process_groups.start(config.seed, config.parallel)
    model = LoopLM(config.model, config.gate, groups, layout=config.parallel, engine=config.engine)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(weights))
    model.load_state_dict(state["model"], strict=False)
    trainer = Trainer(model, config.loss, config.optim, config.parallel, groups)
    data, train_steps = config.data, config.optim.train_steps
    count, samples = BatchSchedule(data, groups.dp.size(), config.parallel.pipeline).at(0)
    train_set = build_train_set(config, corpus, train_steps * samples, train_steps * samples)

    batches = micro_batches(train_set, data, 0, groups.dp.rank(), groups.dp.size())
    first = list(islice(batches, count))
    if config.parallel.overlap_grad_reduce:  # Megatron counts the gradients in a first step and overlaps from then on
        trainer.backward(iter([*first, *first]), 2 * count)
    stats = trainer.backward(iter(first), count)
    gradients = whole_gradients(trainer.ddp, groups)
    different = 0
    for _ in range(repeats):
        same = trainer.backward(iter(first), count) == stats
        again = whole_gradients(trainer.ddp, groups)
        different += not (same and all(torch.equal(again[name], value) for name, value in gradients.items()))
    all_different = torch.tensor([different])
    dist.all_reduce(all_different)

    batches = chain(first, batches)
    losses = [trainer.train(batches, count)[0].loss for _ in range(train_steps)]
    valid = trainer.evaluate(micro_batches(train_set, data, 0, groups.dp.rank(), groups.dp.size()), count)

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


def reshard(config: RunConfig, weights: Path, output: Path) -> None:
    """Load ``weights`` in this layout, and save them in it."""
    groups = process_groups.start(config.seed, config.parallel)
    model = LoopLM(config.model, config.gate, groups, torch.bfloat16, config.parallel)
    about = checkpoint.load_weights(weights, model, config.gate)
    checkpoint.save_weights(
        output, model, config.gate, about, weights / "tokenizer.json", weights / checkpoint.COMPANION_FOLDER
    )


def emulation(config: RunConfig, output: Path) -> None:
    """One column-parallel and one row-parallel linear of the blocks under emulated FP8, each on inputs of its own: what
    comes out and every gradient, in pieces as this rank has them."""
    groups = process_groups.start(config.seed, config.parallel)
    model = LoopLM(config.model, config.gate, groups, layout=config.parallel, engine=config.engine)
    mlp, found = model.decoder.layers[0].mlp, {}
    for name, linear in (("column", mlp.linear_fc1), ("row", mlp.linear_fc2)):
        for _ in range(2):  # a history starts at the second
            generator = torch.Generator().manual_seed(1 + groups.tp.rank())
            length = 8 if name == "column" and config.parallel.sequence_parallel else 16  # a part, or gathered
            x = torch.randn(length, 2, linear.weight.size(1), generator=generator).requires_grad_()
            y = linear(x)[0]
            g = torch.randn(y.shape, generator=generator)
            linear.weight.grad = None
            y.backward(g)
        values = {"x": x, "weight": linear.weight, "g": g, "y": y, "dx": x.grad, "dW": linear.weight.grad}
        found[name] = {key: value.detach().clone() for key, value in values.items()}
    output.mkdir(parents=True, exist_ok=True)
    torch.save(found, output / f"rank{groups.tp.rank()}.pt")


def training(config: RunConfig) -> None:
    """A whole run, or the rest of one."""
    train(
        config, check_corpus(config.data, config.model.vocab_size), process_groups.start(config.seed, config.parallel)
    )


def run(jobs: Sequence[Callable[[], None]]) -> None:
    """Run every job, one of the functions above with its arguments, in turn in one set of processes."""
    gc.freeze()  # between two jobs the collector is called: it need not walk all that torch has loaded
    spare_the_spawn()
    optim.DistributedDataParallelConfig = partial(DistributedDataParallelConfig, bucket_size=BUCKET_SIZE)  # type: ignore[misc,assignment]
    for number, job in enumerate(jobs):
        begin = time.monotonic()
        job()
        if dist.get_rank() == 0:
            print(f"job {number}: {time.monotonic() - begin:.1f} s", flush=True)
        process_groups.reset()
    process_groups.stop()
