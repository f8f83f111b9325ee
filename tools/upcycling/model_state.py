"""A model's configuration, weights and Adam moments as plain tensors by name: read from, and written to, checkpoints.

One process holds the whole model on the CPU. Every kind of upcycling is a pure function from :class:`ModelState` to
:class:`Upcycled` and touches no file.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import yaml
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from looplm import checkpoint
from looplm.checkpoint import COMPANION_FOLDER, WEIGHTS_ONLY, About, TrainingState, optimizer_state, step_folder
from looplm.checkpoint.saving import Saving
from looplm.checkpoint.state import sharded_state
from looplm.cli import to_dict
from looplm.config import GateConfig, ModelConfig, ParallelConfig, RunConfig
from looplm.failures import UserError
from looplm.files import write_whole
from looplm.huggingface.companion_files import CONVERSIONS, read_conversions
from looplm.megatron.settings import DTYPES
from looplm.model import LoopLM
from pretrain.trainer import Trainer


class ModelState(NamedTuple):
    """A model as plain tensors."""

    config: ModelConfig
    gate: GateConfig
    weights: dict[str, Tensor]  # fp32, by our names; those of the gate and the injection may be missing
    moments: dict[str, dict[str, Tensor]] | None = None  # Adam's two of each weight; None if there is no run to resume


class Upcycled(NamedTuple):
    """The converted model, with a description of what is preserved exactly and what approximately."""

    state: ModelState
    exact: list[str]
    approximate: list[str]


class Source(NamedTuple):
    """A model to convert, with the files that accompany it."""

    folder: Path  # as the record names it
    state: ModelState
    about: About
    tokenizer: Path  # file to copy
    companions: tuple[Path, ...]  # further files to copy
    run: RunConfig | None = None  # the run that trained the model; None if it cannot be resumed
    scheduler: dict[str, Any] | None = None  # state of the run's learning-rate schedule
    left_behind: tuple[str, ...] = ()  # files beside the model that do not fit the result
    conversions: Sequence[dict[str, Any]] = ()  # records of those that made the model


def open_source(directory: str, groups: ProcessGroupCollection) -> Source:
    """Read a training directory's newest checkpoint, one of its step directories, or weights alone.

    A gate stage has moments of its gate only, so only the weights of its checkpoint are read.
    """
    step = step_folder.locate(directory)
    run, about = checkpoint.read_config(step), checkpoint.read_about(step)
    files = step / "tokenizer.json", tuple(sorted((step / COMPANION_FOLDER).glob("*")))
    earlier = read_conversions(step / COMPANION_FOLDER)
    if run is None or about.objective != "entropy_regularised":
        opened = checkpoint.open_step(step, groups)
        state = ModelState(opened.model.model_config, opened.gate, _weights(opened.model))
        return Source(step, state, about, *files, conversions=earlier)
    checkpoint.check_tokens(step, about, run.model.vocab_size)
    training = _training_state(LoopLM(run.model, run.gate, groups, DTYPES[run.optim.precision]), run, groups)
    checkpoint.load_run(step, training)
    weights, moments = _weights(training.model), optimizer_state.plain_state(training.optimizer, training.model)
    for name, adam in moments.items():
        if optimizer_state.MAIN in adam:  # bf16 weights are rounded copies of the optimizer's
            weights[name] = adam.pop(optimizer_state.MAIN).detach().cpu()
    state = ModelState(run.model, run.gate, weights, moments)
    return Source(step, state, about, *files, run, training.scheduler.state_dict(), conversions=earlier)


def assemble(state: ModelState, groups: ProcessGroupCollection, dtype: torch.dtype = torch.float32) -> LoopLM:
    """Build the model. Without weights in ``state``, gate, injection and step embedding are initialized."""
    model = LoopLM(state.config, state.gate, groups, dtype)
    named = dict(model.named_parameters())
    fresh = ("gate.", "injection.", "step_embedding.")
    missing = {name for name in named if name not in state.weights and not name.startswith(fresh)}
    assert not missing and state.weights.keys() <= named.keys(), (missing, state.weights.keys() - named.keys())
    with torch.no_grad():
        for name, weight in state.weights.items():
            named[name].copy_(weight)
    return model


def converted_run(run: RunConfig, state: ModelState, output: Path) -> RunConfig:
    """Return the run that continues with a converted model.

    Raises:
        UserError: keys of the run do not fit the model.
    """
    start = replace(run.checkpoint, initial=None, initial_optimizer=False)
    return replace(run, output_dir=str(output), model=state.config, gate=state.gate, checkpoint=start)


def as_stored(state: ModelState, source: Source) -> ModelState:
    """Return the state with weights as :func:`write` stores them: rounded, unless moments keep fp32 ones too."""
    if source.run is not None and state.moments is not None:
        return state
    dtype = _dtype_of(source.about)
    return state._replace(weights={name: weight.to(dtype).float() for name, weight in state.weights.items()})


def write(
    output: Path, source: Source, state: ModelState, record: dict[str, Any], groups: ProcessGroupCollection
) -> None:
    """Write ``state``, from :func:`as_stored`, to ``output``, completely or not at all.

    With moments it is a training directory that ``pretrain.train`` resumes at the source's step, otherwise weights
    alone, for ``checkpoint.initial``. ``record`` is appended to the list in the companions' upcycle.json.
    """
    for name, weight in state.weights.items():
        if not weight.isfinite().all():
            raise UserError(f"{name}: the converted weight holds values that are not finite; is the source whole?")
    has_gate = any(name.startswith("gate.") for name in state.weights)
    about = replace(
        source.about,
        gate_trained=source.about.gate_trained and has_gate and state.config.num_loops > 1,
        versions=checkpoint.versions(),
        git_revision=checkpoint.git_revision(),
    )
    with TemporaryDirectory() as folder:
        companions = Path(folder) / COMPANION_FOLDER
        companions.mkdir()
        for path in source.companions:
            shutil.copyfile(path, companions / path.name)
        write_whole(companions / CONVERSIONS, json.dumps([*source.conversions, record], indent=1) + "\n")
        if source.run is None or state.moments is None:
            model = assemble(state, groups, _dtype_of(about))
            about = replace(about, objective=WEIGHTS_ONLY, dtype=about.dtype or "float32", optimizer_step=None)
            checkpoint.save_weights(output, model, state.gate, about, source.tokenizer, companions)
            return
        run = converted_run(source.run, state, output)
        training = _training_state(assemble(state, groups, DTYPES[run.optim.precision]), run, groups)
        adam = {name: _adam_state(name, weight, state) for name, weight in training.model.named_parameters()}
        optimizer_state.load_state(training.optimizer, training.model, adam, about.adam_steps)
        training.scheduler.load_state_dict(source.scheduler)
        partial = step_folder.create_partial(output)
        step = step_folder.of_run(partial) / step_folder.step_name(about.step)
        saved = sharded_state(training)
        Saving(step, saved, to_dict(run), about, source.tokenizer, companions).wait()
        step_folder.note_latest(step)
        shutil.copytree(companions, partial / COMPANION_FOLDER)
        write_whole(partial / "config.yaml", yaml.safe_dump(to_dict(run), sort_keys=False))
        step_folder.move_into_place(partial, output)


def _adam_state(name: str, weight: Tensor, state: ModelState) -> dict[str, Tensor]:
    """Return Adam's state of one weight. A fresh gate's moments are zero, which makes its first steps small."""
    assert state.moments is not None
    zeros = {moment: torch.zeros(weight.shape) for moment in optimizer_state.MOMENTS}
    main = {} if weight.dtype is torch.float32 else {optimizer_state.MAIN: state.weights.get(name, weight.detach())}
    return {**state.moments.get(name, zeros), **main}


def _training_state(model: LoopLM, run: RunConfig, groups: ProcessGroupCollection) -> TrainingState:
    return Trainer(model, run.loss, run.optim, ParallelConfig(), groups).state


def _dtype_of(about: About) -> torch.dtype:
    """Return the dtype of weights alone."""
    dtype: torch.dtype = getattr(torch, about.dtype or "float32")
    return dtype


def _weights(model: LoopLM) -> dict[str, Tensor]:
    return {name: weight.detach().float().cpu() for name, weight in model.named_parameters()}
