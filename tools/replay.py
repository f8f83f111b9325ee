"""Replay one step of a run, sample by sample, to see where its numbers stop being finite or which data spoil it.

    python -m tools.replay runs/mine/stage1/failures/step_00012345.json
    python -m tools.replay runs/mine/stage1 --step 12345
    python -m tools.replay runs/mine/stage1 --step 12345 --weights runs/mine/stage1/checkpoints/step_00012000

The first form takes a file that a run has written because a loss or gradient was not finite. The second takes any step
of a run, also one before a loss spike. Weights are those that the failed run has kept for this purpose, or the newest
checkpoint's before the step. One process computes every sample of the step, whatever the layout of the run was, and
prints the loss and the norm of the hidden state after each loop, the gradient's norm in each module, and the text. For
a sample with NaN or inf it names the module, loop and position where the first one arises.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from megatron.core.process_groups_config import ProcessGroupCollection
from tokenizers import Tokenizer
from torch import Tensor, nn

from looplm import checkpoint
from looplm.bounds import path_field
from looplm.checkpoint import About, step_folder
from looplm.cli import UserError, from_dict, parse_config, positional, run_main
from looplm.config import ParallelConfig, RunConfig
from looplm.megatron import process_groups
from looplm.model import LoopLM
from pretrain.data import (
    Batch,
    BatchSchedule,
    Corpus,
    build_train_set,
    check_corpus,
    data_order,
    micro_batches,
)
from pretrain.norms import MODULES, LoopNorms, module_of
from pretrain.optim import DTYPES, freeze_trunk
from pretrain.step import loop_losses, objective


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Step to replay.

    Args:
        path: a file in the folder failures of a training directory, or a training directory.
        step: with a training directory: the step to replay.
        weights: a step directory to take the weights from; null chooses it.
        characters: characters of each document that are printed.
    """

    path: Path = positional("PATH")
    step: int | None = None
    weights: str | None = path_field(None)
    characters: int = 160


class Target(NamedTuple):
    """A step to replay: its run, and the samples in the order of the run's data, from first to before last."""

    run: Path
    step: int
    samples: range
    weights: Path | None  # None: none exists, the run starts from its initial ones
    about: About | None  # of the weights
    what: str = ""  # what the run said


class Fault(NamedTuple):
    """Place of the first value that is not finite."""

    what: str  # output or gradient of the output
    module: str
    loop: int  # from 1
    position: int  # in the sample

    def __str__(self) -> str:
        return f"the {self.what} of {self.module} in loop {self.loop} at position {self.position}"


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
    if target.about is not None and target.about.data_order != data_order(config, corpus):
        raise UserError(f"{target.run}/config.yaml: its data have changed since this step; restore them")
    groups = process_groups.start(config.seed)
    try:
        replay(target, config, corpus, groups, options.characters)
    finally:
        process_groups.stop()


def find(options: ReplayConfig) -> Target:
    """Return the step that the options name.

    Raises:
        UserError: the file is not a run's, or the directory has no such step.
    """
    path, step, kept, what = options.path, options.step, None, ""
    if path.is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            step, (first, stop), what = int(record["step"]), map(int, record["samples"]), str(record["what"])
            kept = None if record["weights"] is None else str(path.with_suffix(""))  # the run may have been moved
        except (ValueError, KeyError, TypeError) as error:
            fix = "give one from OUTPUT_DIR/failures"
            raise UserError(
                f"{path}: not a file about a failed step ({type(error).__name__}: {error}); {fix}"
            ) from error
        run, samples = path.resolve().parent.parent, range(first, stop)
    elif step is None or step < 1:
        raise UserError(f"--step: {step} is not a step of {path}; give its number, from 1")
    else:
        run, samples = path, None
    weights, about = _weights(run, step, options.weights or kept)
    if samples is None:
        samples = _samples_of(_read_config(run), step, about)
    return Target(run, step, samples, weights, about, what)


def _weights(run: Path, step: int, named: str | None) -> tuple[Path | None, About | None]:
    """Return the weights to replay with: those that are named, or else the newest before the step."""
    if named is not None:
        found = step_folder.locate(named)
    else:
        newest = step_folder.newest(run / "checkpoints", print, step - 1)
        if newest is None:
            initial = _read_config(run).checkpoint.initial
            return (None if initial is None else step_folder.locate(initial)), None
        found = newest
    return found, checkpoint.read_about(found)


def _samples_of(config: RunConfig, step: int, about: About | None) -> range:
    """Return the samples of a step, counted on from a checkpoint before it."""
    schedule = BatchSchedule(config.data, 1)
    done, consumed, skipped = (0, 0, ()) if about is None else (about.step, about.samples, about.health.skipped_samples)
    for _ in range(done, step - 1):
        consumed += schedule.at(consumed)[1]
    first = consumed + sum(stop - start for start, stop in skipped)
    return range(first, first + schedule.at(consumed)[1])


def _read_config(run: Path) -> RunConfig:
    """Return the run's configuration, for one process."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path}: is missing; give a training directory, or a file of its folder failures")
    config = from_dict(RunConfig, yaml.safe_load(path.read_text(encoding="utf-8")), where=str(path))
    return replace(config, parallel=ParallelConfig(), data=replace(config.data, micro_batch_size=1, num_workers=0))


def replay(
    target: Target, config: RunConfig, corpus: Corpus, groups: ProcessGroupCollection, characters: int
) -> list[Replayed]:
    """Compute and print every sample of the step."""
    model = LoopLM(config.model, config.gate, groups, DTYPES[config.optim.precision], engine=config.engine)
    origin = "the run's initial weights"
    if target.weights is not None:
        about = checkpoint.load_weights(target.weights, model, config.gate)
        steps = target.step - 1 - about.step if target.about is not None else target.step - 1
        exact = "the step's own" if target.weights.parent.name == "failures" else f"{steps} steps before this one"
        origin = f"{target.weights} ({exact})"
    if config.loss.frozen_trunk:
        freeze_trunk(model)
    model.train()
    print(f"{target.run}, step {target.step}: samples {target.samples[0]}-{target.samples[-1]}\nweights: {origin}")
    print(f"in the run: {target.what}\n" if target.what else "")

    tokenizer = Tokenizer.from_buffer(corpus.tokenizer_json)
    horizon = _horizon(config, target.about)
    train_set = build_train_set(config, corpus, max(horizon, target.samples.stop), horizon)
    batches = micro_batches(train_set, config.data, target.samples.start, 0, 1)
    norms, found = LoopNorms(model), list[Replayed]()
    for sample, batch in zip(target.samples, batches, strict=False):
        result = _compute(model, norms, batch, config)
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


def _horizon(config: RunConfig, about: About | None) -> int:
    if about is not None and about.horizon_samples:
        return about.horizon_samples
    return config.data.horizon_samples or BatchSchedule(config.data, 1).samples_of(config.optim.train_steps)


def _compute(model: LoopLM, norms: LoopNorms, batch: Batch, config: RunConfig) -> Replayed:
    """Run one sample forward and backward, watching every module."""
    norms.restart()
    norms.forget_recomputed()
    model.zero_grad(set_to_none=True)
    watch, tokens = _Watch(model, batch.ids_BS.size(1)), batch.mask_SB.sum().clamp(min=1)
    with watch:
        losses = loop_losses(model, batch, config.loss, norms=norms)
        watch.look("loss", "the head", losses.token_loss_RSB)
        mean = objective(config.loss, losses, batch.mask_SB) / tokens
        mean.backward()
    squares = dict.fromkeys(MODULES, 0.0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squares[module_of(name)] += parameter.grad.double().square().sum().item()
    size = batch.ids_BS.numel() * config.model.hidden_size
    return Replayed(
        tokens=int(batch.mask_SB.sum()),
        loss=mean.item(),
        loss_per_loop=((losses.token_loss_RSB * batch.mask_SB).flatten(1).sum(1) / tokens).tolist(),
        hidden_rms=[(found[0].double().square() / size).sqrt().item() for found in norms.hidden],
        grad_norms={module: square**0.5 for module, square in squares.items() if square != 0},
        fault=watch.fault,
    )


class _Watch:
    """Hooks on every module, which find the first output, or else the first gradient, that is not finite.

    A module that is called again belongs to the next loop. Backward starts at the last loop's end, so the first
    gradient found is the one closest to the loss.
    """

    def __init__(self, model: nn.Module, length: int) -> None:
        self._model, self._length, self._hooks = model, length, list[Any]()
        self.fault: Fault | None = None

    def __enter__(self) -> None:
        for name, module in self._model.named_modules():
            if not list(module.children()):
                self._hooks.append(module.register_forward_hook(partial(self._after, name, count(1))))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def look(self, what: str, name: str, value: Tensor, loop: int | None = None) -> None:
        """Note the place of the first number that is not finite; without ``loop``, loops are the first dimension."""
        if self.fault is not None or bool(value.isfinite().all()):
            return
        place = (~value.isfinite()).nonzero()[0].tolist()
        position = place[value.shape.index(self._length)] if self._length in value.shape else 0
        self.fault = Fault(what, name, place[0] + 1 if loop is None else loop, position)

    def _after(self, name: str, calls: "count[int]", module: nn.Module, inputs: Any, output: Any) -> None:
        loop = next(calls)
        for value in _tensors(output):
            self.look("output", name, value, loop)
            if value.requires_grad:
                value.register_hook(partial(self.look, "gradient of the output", name, loop=loop))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


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
