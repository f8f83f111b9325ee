"""Jobs that the ranks of a parity test run in a given layout.

Gradients are saved as if they were weights, through Megatron's resharding checkpoint. The test then reads them whole,
as a single process holds them.
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
from looplm.model.local_layers import ReplicatedLinear
from pretrain import optim
from pretrain.batch_schedule import BatchSchedule
from pretrain.data import build_train_set, check_corpus, micro_batches
from pretrain.loops import loops_of_step
from pretrain.train import train
from pretrain.trainer import Trainer
from tests.support.gradients import whole_gradients
from tests.support.observe import LargestTensor

# With Megatron's default of 40 million parameters, a tiny model would have a single bucket and nothing to overlap.
BUCKET_SIZE = 5000


def train_steps(
    config: RunConfig, weights: Path, output: Path, repeats: int = 0, stock_projections: bool = False
) -> None:
    """Load ``weights``, train ``optim.train_steps`` steps, and save what the test compares.

    That is the statistics and every gradient of the first step, the loss of each step, and the validation loss after
    them. Before training, the first step's backward pass is repeated ``repeats`` times and compared bit by bit. With
    ``stock_projections``, MLA's down projections are Megatron's own instead of our replicated ones.
    """
    replicated = ColumnParallelLinear if stock_projections else ReplicatedLinear
    local_layers.ATTENTION = local_layers.ATTENTION._replace(replicated=replicated)
    corpus = check_corpus(config.data, config.model.vocab_size)
    groups = process_groups.start(config.seed, config.parallel)
    model = LoopLM(config.model, config.gate, groups, layout=config.parallel, engine=config.engine)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(weights))
    model.load_state_dict(state["model"], strict=False)
    trainer = Trainer(model, config.loss, config.optim, config.parallel, groups)
    data, step_count = config.data, config.optim.train_steps
    count, samples = BatchSchedule(data, groups.dp.size(), config.parallel.pipeline).at(0)
    train_set = build_train_set(config, corpus, step_count * samples, step_count * samples)

    batches = micro_batches(train_set, data, 0, groups.dp.rank(), groups.dp.size())
    first = list(islice(batches, count))
    if config.parallel.overlap_grad_reduce:  # Megatron overlaps from the second step on
        trainer.backward(iter([*first, *first]), 2 * count)
    loops = [loops_of_step(config, step) for step in range(step_count)]
    stats, norms = trainer.backward(iter(first), count, loops[0])
    gradients = whole_gradients(trainer.ddp, groups)
    different = 0
    for _ in range(repeats):
        same = trainer.backward(iter(first), count, loops[0]) == (stats, norms)
        repeated = whole_gradients(trainer.ddp, groups)
        different += not (same and all(torch.equal(repeated[name], value) for name, value in gradients.items()))
    all_different = torch.tensor([different])
    dist.all_reduce(all_different)

    batches = chain(first, batches)
    losses = [trainer.train(batches, count, loops=ran)[0].loss for ran in loops]
    valid = trainer.evaluate(micro_batches(train_set, data, 0, groups.dp.rank(), groups.dp.size()), count)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(gradients.get(name, torch.zeros_like(parameter)))
    if dist.get_rank() == 0:
        output.mkdir(parents=True)
        found = {"losses": losses, "valid": valid.loss, "different": int(all_different)}
        (output / "stats.json").write_text(json.dumps(vars(stats) | vars(norms) | found))
        (output / "state").mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(output / "state"))
    dist.barrier()


def find_largest_tensor(config: RunConfig, output: Path) -> None:
    """Train a step, and save the size of the largest tensor that any operation of a rank has returned."""
    corpus = check_corpus(config.data, config.model.vocab_size)
    groups = process_groups.start(config.seed, config.parallel)
    model = LoopLM(config.model, config.gate, groups, layout=config.parallel)
    trainer = Trainer(model, config.loss, config.optim, config.parallel, groups)
    count, samples = BatchSchedule(config.data, groups.dp.size(), config.parallel.pipeline).at(0)
    train_set = build_train_set(config, corpus, 2 * samples, 2 * samples)
    first, second = (islice(micro_batches(train_set, config.data, step * samples, 0, 1), count) for step in range(2))
    trainer.train(first, count)  # makes the optimizer's state
    with LargestTensor() as largest:
        trainer.train(second, count)
        trainer.evaluate(micro_batches(train_set, config.data, 0, 0, 1), count)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"rank{dist.get_rank()}").write_text(str(largest.elements))


def reshard(config: RunConfig, weights: Path, output: Path) -> None:
    """Load ``weights`` and save them in this layout."""
    groups = process_groups.start(config.seed, config.parallel)
    model = LoopLM(config.model, config.gate, groups, torch.bfloat16, config.parallel)
    about = checkpoint.load_weights(weights, model, config.gate)
    checkpoint.save_weights(
        output, model, config.gate, about, weights / "tokenizer.json", weights / checkpoint.COMPANION_FOLDER
    )


def run_fp8_linears(config: RunConfig, output: Path) -> None:
    """Run a column-parallel and a row-parallel linear layer under emulated FP8, and save this rank's tensors.

    Each rank draws its own inputs. The file holds inputs, outputs and all gradients, in the shards that this rank has.
    """
    groups = process_groups.start(config.seed, config.parallel)
    model = LoopLM(config.model, config.gate, groups, layout=config.parallel, engine=config.engine)
    mlp, found = model.decoder.layers[0].mlp, {}
    for name, linear in (("column", mlp.linear_fc1), ("row", mlp.linear_fc2)):
        for _ in range(2):  # the first call fills the history that scales the second
            generator = torch.Generator().manual_seed(1 + groups.tp.rank())
            length = (
                8 if name == "column" and config.parallel.sequence_parallel else 16
            )  # a shard of the sequence, or all of it
            x = torch.randn(length, 2, linear.weight.size(1), generator=generator).requires_grad_()
            y = linear(x)[0]
            g = torch.randn(y.shape, generator=generator)
            linear.weight.grad = None
            y.backward(g)
        values = {"x": x, "weight": linear.weight, "g": g, "y": y, "dx": x.grad, "dW": linear.weight.grad}
        found[name] = {key: value.detach().clone() for key, value in values.items()}
    output.mkdir(parents=True, exist_ok=True)
    torch.save(found, output / f"rank{groups.tp.rank()}.pt")


def run_training(config: RunConfig) -> None:
    """Start a training run, or resume it if its directory has a checkpoint."""
    corpus = check_corpus(config.data, config.model.vocab_size)
    train(config, corpus, process_groups.start(config.seed, config.parallel))


def run(jobs: Sequence[Callable[[], None]]) -> None:
    """Run each job (a function above with its arguments bound), one after the other in the same processes."""
    gc.freeze()  # collections between two jobs then skip everything that torch has loaded
    small_buckets = partial(DistributedDataParallelConfig, bucket_size=BUCKET_SIZE)
    optim.DistributedDataParallelConfig = small_buckets  # type: ignore[attr-defined]  # the name that the product calls
    for number, job in enumerate(jobs):
        begin = time.monotonic()
        job()
        if dist.get_rank() == 0:
            print(f"job {number}: {time.monotonic() - begin:.1f} s", flush=True)
        process_groups.reset()
    process_groups.stop()
