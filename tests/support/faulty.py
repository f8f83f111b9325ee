"""Runs whose numbers are spoiled on purpose, on one rank, in one loop, in chosen steps."""

import dataclasses
import json
import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from looplm.checkpoint import optimizer_state
from looplm.config import RunConfig
from looplm.failures import Failure
from looplm.megatron import process_groups
from looplm.model import head as model_head
from pretrain import data as training_data
from pretrain import run as training_run
from pretrain import step as training_step
from pretrain.data import check_corpus
from pretrain.norms import LoopNorms
from pretrain.train import train
from pretrain.trainer import Trainer
from tests.support.tiny import VOCAB, train_rows

Kind = Literal["gradient", "loss", "weight gradient"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """NaN or inf in ``steps`` (from 1) on one rank: in the gradient of loop ``loop``'s hidden state, in its loss (both
    in micro-batch ``micro_batch``), or in one parameter's finished gradient."""

    kind: Kind
    steps: Collection[int]
    rank: int = 0
    loop: int = 2  # from 1
    micro_batch: int = 0
    value: float = math.nan
    parameter: str = ""


@contextmanager
def injected(fault: Fault) -> Iterator[None]:
    """Inject a fault into every training run of this process."""
    now = {"step": 0, "watched": 0, "micro_batch": -1}
    real = {"watch": LoopNorms.watch, "run": Trainer._run, "backward": Trainer._backward}
    losses = model_head.weighted_losses

    def active() -> bool:
        return now["step"] in fault.steps and dist.get_rank() == fault.rank

    def backward(self: Trainer, *args: Any) -> Any:
        now["step"] += 1
        return real["backward"](self, *args)  # type: ignore[operator]

    def run(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        now["heads"] = 0
        sums = real["run"](self, *args, **kwargs)  # type: ignore[operator]
        if fault.kind == "weight gradient" and active():
            dict(self.model.named_parameters())[fault.parameter].main_grad.view(-1)[0] = fault.value
        return sums

    def watch(self: LoopNorms, loop: int, h_SBD: Tensor) -> None:
        here = (loop + 1, len(self.hidden[loop])) == (fault.loop, fault.micro_batch)
        if fault.kind == "gradient" and active() and here and h_SBD.requires_grad:
            h_SBD.register_hook(lambda grad_SBD: grad_SBD * fault.value)
        real["watch"](self, loop, h_SBD)  # type: ignore[operator]
        now["loops"] = len(self.hidden)

    def weighted_losses(*args: Any) -> model_head.HeadLosses:
        micro_batch, loop = divmod(now["heads"], now["loops"])
        now["heads"] += 1
        found = losses(*args)
        if fault.kind != "loss" or not active() or (loop + 1, micro_batch) != (fault.loop, fault.micro_batch):
            return found
        assert found.expected is not None
        return model_head.HeadLosses(found.token_loss_SB + fault.value, found.expected + fault.value)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(LoopNorms, "watch", watch))
        stack.enter_context(mock.patch.object(Trainer, "_run", run))
        stack.enter_context(mock.patch.object(Trainer, "_backward", backward))
        stack.enter_context(mock.patch.object(training_step, "weighted_losses", weighted_losses))
        yield


def everything(trainer: Trainer) -> list[Tensor]:
    """Return copies of this rank's weights, main weights, moments and step counters."""
    state = optimizer_state.own_state(trainer.optimizer, trainer.model)
    core = optimizer_state._unchained(trainer.optimizer)
    counters = [torch.as_tensor(values["step"]) for values in core.optimizer.state.values()] if core.optimizer else []
    return [value.detach().clone() for value in (*trainer.model.parameters(), *state.values(), *counters)]


@contextmanager
def watched_updates(changed: list[int]) -> Iterator[None]:
    """Collect the numbers of the steps that changed anything on this rank; NaNs count as a change."""
    steps, real = {"step": 0}, Trainer.train

    def observed(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        before, steps["step"] = everything(self), steps["step"] + 1
        done = real(self, *args, **kwargs)
        after = everything(self)
        if len(before) != len(after) or not all(map(torch.equal, before, after)):
            changed.append(steps["step"])
        return done

    with mock.patch.object(Trainer, "train", observed):
        yield


def run_faulty(config: RunConfig, fault: Fault) -> None:
    """Train with a fault; rank 0 then writes ``outcome.json``: the failure, and for each rank the steps that changed
    anything there."""
    corpus = check_corpus(config.data, config.model.vocab_size)
    groups, changed, error = process_groups.start(config.seed, config.parallel), list[int](), None
    with injected(fault), watched_updates(changed):
        try:
            train(config, corpus, groups)
        except Failure as failure:
            error = (failure.status, str(failure))
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (error, changed))
    if dist.get_rank() == 0:
        errors, changes = zip(*outcomes, strict=True)
        assert len(set(errors)) == 1, errors
        Path(config.output_dir, "outcome.json").write_text(json.dumps({"error": error, "changed": changes}))


def outcome(config: RunConfig) -> dict[str, Any]:
    """Return what :func:`run_faulty` wrote, with the training rows and the rows of skipped steps."""
    folder = Path(config.output_dir)
    found: dict[str, Any] = json.loads((folder / "outcome.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return found | {"rows": train_rows(folder), "skipped": [row for row in rows if row["kind"] == "skipped"]}


@contextmanager
def spoiled_data(samples: Collection[int], skipped: range = range(0)) -> Iterator[None]:
    """Give some training samples wrong labels, and leave ``skipped`` out of the order, in the runs of this process."""
    real, build = training_data.micro_batches, training_data.build_train_set

    def build_train_set(config: RunConfig, corpus: Any, samples: int, horizon: int, first: int) -> Any:
        return build(config, corpus, samples + len(skipped), horizon, first)

    def micro_batches(dataset: Any, data: Any, consumed: int, rank: int, ranks: int) -> Iterator[Any]:
        size = data.micro_batch_size
        for index in count():
            first = consumed + (index * ranks + rank) * size
            if skipped and first >= skipped.start:
                first += len(skipped)
            (batch,) = islice(real(dataset, data, first, 0, 1), 1)
            if first in samples:
                batch = batch._replace(labels_SB=(batch.labels_SB * 7 + 13) % VOCAB)
            yield batch

    with (
        mock.patch.object(training_run, "micro_batches", micro_batches),
        mock.patch.object(training_run, "build_train_set", build_train_set),
    ):
        yield


def run_spoiled(config: RunConfig, samples: Collection[int], skipped: range = range(0)) -> None:
    """Train on spoiled data; rank 0 then writes ``outcome.json`` with the failure, if it is one."""
    corpus, error = check_corpus(config.data, config.model.vocab_size), None
    groups = process_groups.start(config.seed, config.parallel)
    with spoiled_data(samples, skipped):
        try:
            train(config, corpus, groups)
        except Failure as failure:
            error = (failure.status, str(failure))
    if dist.get_rank() == 0:
        Path(config.output_dir, "outcome.json").write_text(json.dumps({"error": error, "changed": []}))
