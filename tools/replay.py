"""Replay one step of a run, sample by sample, to see where its numbers stop being finite or which data spoil it.

    python -m tools.replay runs/mine/stage1/failures/step_00012345.json
    python -m tools.replay runs/mine/stage1 --step 12345
    python -m tools.replay runs/mine/stage1 --step 12345 --weights runs/mine/stage1/checkpoints/step_00012000

The first form takes a file that a run has written because a loss or gradient was not finite. The second takes any step
of a run, also one before a loss spike; if a rollback made the run repeat the step, its last attempt. Weights are those
that the failed run has kept for this purpose, or the newest checkpoint's before the step. One process computes every
sample of the step, in as many loops as the step ran, whatever the layout of the run was. It prints the loss and the
norm of the hidden state after each loop, the gradient's norm in each module, and the text. For a sample with NaN or inf
it names the module, loop and position where the first one arises.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from megatron.core.process_groups_config import ProcessGroupCollection
from tokenizers import Tokenizer

from looplm import checkpoint
from looplm.bounds import at_least, check_bounds, path_field, require
from looplm.checkpoint import About, step_folder
from looplm.cli import from_dict, parse_config, positional, run_main
from looplm.config import ParallelConfig, RunConfig
from looplm.config.stored import upgrade_config
from looplm.failures import UserError, printable
from looplm.json_file import read_object
from looplm.megatron import process_groups
from looplm.megatron.settings import DTYPES
from looplm.model import LoopLM
from looplm.yaml_text import read_yaml
from pretrain.batch_schedule import BatchSchedule
from pretrain.data import (
    Batch,
    Corpus,
    build_train_set,
    check_corpus,
    matches_data_order,
    micro_batches,
)
from pretrain.health import FAILURES
from pretrain.loops import loops_of_step
from pretrain.norms import MODULES, LoopNorms, module_of
from pretrain.optim import freeze_trunk
from pretrain.progress import Progress
from pretrain.step import loop_losses, objective
from tools.first_fault import Fault, Watch


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Step to replay.

    Args:
        path: a file in the folder failures of a training directory, or a training directory.
        step: with a training directory: the step to replay.
        weights: a step directory before the step, or one of another run, to take the weights from; null chooses it.
        characters: characters of each document that are printed.
    """

    path: Path = positional("PATH")
    step: int | None = None
    weights: str | None = path_field(None)
    characters: int = at_least(0, 160)

    def __post_init__(self) -> None:
        check_bounds(self, "")


@dataclass(frozen=True)
class Failed:
    """The part of a file about a failed step that a replay needs."""

    step: int
    samples: tuple[int, ...]
    what: str
    weights: str | None

    def __post_init__(self) -> None:
        ordered = len(self.samples) == 2 and 0 <= self.samples[0] < self.samples[1]
        require(ordered, "samples", list(self.samples), "a run writes the first and the one after the last")


class Weights(NamedTuple):
    """Weights to replay with, and a text that says where they come from."""

    folder: Path | None  # None: none exists, the run starts from its initial ones
    origin: str
    about: About | None = None  # None: the run has not written them


class Target(NamedTuple):
    """A step to replay: its run, and the samples in the order of the run's data, from first to before last."""

    run: Path
    step: int
    samples: range
    weights: Weights
    about: About | None  # of one of the run's checkpoints, if it has any
    undone: tuple[range, ...] = ()  # samples of earlier attempts at the step, which rollbacks have undone
    what: str = ""  # what the run said


class Replayed(NamedTuple):
    """Numbers of one sample; lists have one entry per loop."""

    tokens: int  # with a loss
    loss: float
    loss_per_loop: list[float]
    hidden_rms: list[float]
    grad_norms: dict[str, float]
    fault: Fault | None


def main(argv: list[str]) -> None:
    """``python -m tools.replay runs/mine/stage1/failures/step_00012345.json``"""
    options = parse_config(ReplayConfig, argv, prog="python -m tools.replay", description=str(__doc__))
    target = find(options)
    config = _read_config(target.run)
    corpus = check_corpus(config.data, config.model.vocab_size)
    if target.about is not None and not matches_data_order(target.about.data_order, config, corpus):
        raise UserError(f"{target.run}/config.yaml: its data have changed since this step; restore them")
    groups = process_groups.start(config.seed)
    try:
        replay(target, config, corpus, groups, options.characters)
    finally:
        process_groups.stop()


def find(options: ReplayConfig) -> Target:
    """Return the step that the options name.

    Raises:
        UserError: the file is not a run's, the run has no such step, or the weights have already done it.
    """
    path, run, failed, kept = options.path, options.path, None, None
    if path.is_file():
        require(options.step is None, "--step", options.step, f"{path} names its own; leave --step out")
        values = read_object(path, "give one from OUTPUT_DIR/failures")
        values = {key: values[key] for key in Failed.__annotations__ if key in values}
        failed, run = from_dict(Failed, values, where=str(path)), path.resolve().parent.parent
        kept = None if failed.weights is None else str(path.with_suffix(""))  # the run may have been moved
    key, step = ("--step", options.step) if failed is None else (f"{path}: step", failed.step)
    steps = (config := _read_config(run)).optim.train_steps
    if step is None or not 1 <= step <= steps:
        raise UserError(f"{key}: {step} is not a step of {run}; give its number, from 1 to optim.train_steps={steps}")
    weights = _weights(run, step, options.weights or kept)
    about = weights.about
    if about is None or (failed is None and about.step >= step):  # kept weights: their position is after the step
        before = _newest(run, step - 1)
        about = None if before is None else checkpoint.read_about(before)
    if failed is not None:
        return Target(run, step, range(*failed.samples), weights, about, what=failed.what)
    *undone, samples = _attempts(config, step, about, _skipped(run))
    return Target(run, step, samples, weights, about, tuple(undone))


def _weights(run: Path, step: int, named: str | None) -> Weights:
    """Return the weights to replay with: those that are named, or else the newest before the step."""
    found, about, done = _newest(run, step - 1) if named is None else step_folder.locate(named), None, 0
    if found is None:
        initial = _read_config(run).checkpoint.initial
        if initial is None:
            return Weights(None, "the run's initial weights")
        found = step_folder.locate(initial)
    else:
        about, folder = checkpoint.read_about(found), found.resolve().parent
        failed = folder == (run / FAILURES).resolve()
        if not failed and folder != step_folder.of_run(run).resolve():
            return Weights(found, f"{found} (not of this run; of step {about.step} of another)")
        done = about.step - failed  # a failed step leaves the weights as they were before it
        if done >= step:
            fix = "give a step directory before it, or leave --weights out"
            raise UserError(f"--weights: {found} already includes step {step}, which is to be replayed; {fix}")
    exact = "the step's own" if done == step - 1 else f"{step - 1 - done} steps before this one"
    return Weights(found, f"{found} ({exact})", about)


def _newest(run: Path, up_to: int) -> Path | None:
    return step_folder.newest(step_folder.of_run(run), print, up_to)


def _attempts(
    config: RunConfig, step: int, about: About | None, windows: Iterable[tuple[int, int]]
) -> tuple[range, ...]:
    """Return the samples of each of the run's attempts at a step; the last attempt is the one that counts.

    A window begins at the position to which its rollback returned, and ends at that of the spike's end. So it tells
    which steps ran before the rollback, which ran after it, and which ran twice.

    Args:
        config: the run's.
        step: its number.
        about: of a checkpoint before the step, from which steps are counted; None counts from the first.
        windows: samples that each rollback has skipped, from first to before last, in the order of the rollbacks.
    """
    schedule = BatchSchedule(config.data, 1)
    done, consumed = (0, 0) if about is None else (about.step, about.samples)
    for _ in range(done, step - 1):
        consumed += schedule.at(consumed)[1]
    size, found, other, start = schedule.at(consumed)[1], list[range](), config.data.first_sample or 0, 0
    for first, stop in windows:
        if start <= consumed < stop - other:
            found.append(range(consumed + other, consumed + other + size))
        start, other = first - other, other + stop - first
    if start <= consumed:
        found.append(range(consumed + other, consumed + other + size))
    return tuple(found)


def _skipped(run: Path) -> list[tuple[int, int]]:
    """Return the samples that each rollback has skipped. A checkpoint knows of those before it, metrics.jsonl of all.

    A checkpoint to which the run has returned does not know of that rollback.
    """
    steps = step_folder.steps_in(step_folder.of_run(run))
    newest = next((step for step in steps if step_folder.find_fault(step, deep=False) is None), None)
    found = [] if newest is None else list(checkpoint.read_about(newest).health.skipped_samples)
    log = run / "metrics.jsonl"
    if log.is_file():
        with log.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if '"kind": "rollback"' in line:
                    with suppress(ValueError, KeyError, TypeError, RecursionError):  # half a line, of a killed run
                        first, stop = json.loads(line)["skipped_samples"]
                        found.append((int(first), int(stop)))
    return list(dict.fromkeys(found))


def _read_config(run: Path) -> RunConfig:
    """Return the run's configuration, for one process."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path}: is missing; give a training directory, or a file of its folder failures")
    config = from_dict(RunConfig, upgrade_config(read_yaml(str(path)).values, str(path)), where=str(path))
    engine = replace(config.engine, fp8_params=False)  # they need a distributed optimizer, and no checkpoint has them
    data = replace(config.data, micro_batch_size=1, num_workers=0)
    return replace(config, output_dir=str(run), parallel=ParallelConfig(), engine=engine, data=data)


def replay(
    target: Target, config: RunConfig, corpus: Corpus, groups: ProcessGroupCollection, characters: int
) -> list[Replayed]:
    """Compute and print every sample of the step."""
    model = LoopLM(config.model, config.gate, groups, DTYPES[config.optim.precision], engine=config.engine)
    if target.weights.folder is not None:
        checkpoint.load_weights(target.weights.folder, model, config.gate)
    if config.loss.frozen_trunk:
        freeze_trunk(model)
    model.train()
    loops = loops_of_step(config, target.step - 1)
    print("\n".join(_heading(target, config, loops)))

    tokenizer = Tokenizer.from_buffer(corpus.tokenizer_json)
    total = BatchSchedule(config.data, 1).samples_of(config.optim.train_steps)
    horizon = Progress.start(config, corpus, total, target.about, None).horizon_samples
    first = target.samples.start
    train_set = build_train_set(config, corpus, max(horizon, target.samples.stop), horizon, first)
    batches = micro_batches(train_set, config.data, first, 0, 1)
    norms, found = LoopNorms(model), list[Replayed]()
    for sample, batch in zip(target.samples, batches, strict=False):
        result = _compute(model, norms, batch, config, loops)
        found.append(result)
        print(f"sample {sample}  loss {result.loss:.4f}  per loop {_numbers(result.loss_per_loop)}")
        print(f"  hidden state's rms before the loop-end norm, per loop: {_numbers(result.hidden_rms)}")
        print(f"  gradient: {'  '.join(f'{module} {norm:.3g}' for module, norm in result.grad_norms.items())}")
        for text in _documents(batch, tokenizer, characters):
            print(f"  {text}")
        if result.fault is not None:
            token = tokenizer.decode([int(batch.ids_BS[0, result.fault.position])], skip_special_tokens=False)
            print(f"  NOT FINITE, first: {result.fault}, token {token!r}")
        print()
    bad = [sample for sample, result in zip(target.samples, found, strict=False) if result.fault is not None]
    if bad:
        print(f"not finite in {len(bad)} of {len(found)} samples: {', '.join(map(str, bad))}")
    else:
        print(
            f"all numbers of these {len(found)} samples are finite here; if they were not in the run, compare the "
            "weights (above), the precision, the layout, and the hardware of the ranks that the file names"
        )
    return found


def _heading(target: Target, config: RunConfig, loops: int) -> Iterator[str]:
    """Yield what is replayed, line by line."""
    yield f"{target.run}, step {target.step}: samples {_span(target.samples)}"
    if target.undone:
        undone = ", then ".join(map(_span, target.undone))
        yield f"attempt {len(target.undone) + 1} at this step; undone by rollbacks: samples {undone}"
    if config.loss.varies_loops:
        yield f"loops of this step: {loops} of {config.model.num_loops}"
    yield f"weights: {target.weights.origin}"
    yield f"in the run: {printable(target.what)}\n" if target.what else ""


def _span(samples: range) -> str:
    return f"{samples[0]}-{samples[-1]}"


def _compute(model: LoopLM, norms: LoopNorms, batch: Batch, config: RunConfig, loops: int) -> Replayed:
    """Run one sample forward and backward in that many loops, watching every module."""
    norms.restart(loops)
    norms.forget_recomputed()
    model.zero_grad(set_to_none=True)
    watch, tokens = Watch(model, batch.ids_BS.size(1)), batch.mask_SB.sum().clamp(min=1)
    with watch:
        losses = loop_losses(model, batch, config.loss, loops, norms, loops)
        watch.look("loss", "the head", losses.token_loss_RSB)
        total = objective(config.loss, losses, batch.mask_SB)
        total.backward()
    squares = dict.fromkeys(MODULES, 0.0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squares[module_of(name)] += parameter.grad.double().square().sum().item()
    size = batch.ids_BS.numel() * config.model.hidden_size
    return Replayed(
        tokens=int(batch.mask_SB.sum()),
        loss=(total / tokens).item(),
        loss_per_loop=((losses.token_loss_RSB * batch.mask_SB).flatten(1).sum(1) / tokens).tolist(),
        hidden_rms=[(found[0].double().square() / size).sqrt().item() for found in norms.hidden[:loops]],
        grad_norms={module: square**0.5 / tokens.item() for module, square in squares.items() if square != 0},
        fault=watch.fault,
    )


def _documents(batch: Batch, tokenizer: Tokenizer, characters: int) -> Iterator[str]:
    """Yield each document of a sample as text, shortened."""
    ids = batch.ids_BS[0].tolist()
    starts = [0] if batch.document_start_SB is None else sorted(set(batch.document_start_SB[:, 0].tolist()))
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        text = tokenizer.decode(ids[start:stop], skip_special_tokens=False)
        shown = text if len(text) <= characters else f"{text[:characters]}…"
        yield f"positions {start}-{stop - 1}: {shown!r}"


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


if __name__ == "__main__":
    run_main(main)
