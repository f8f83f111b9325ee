"""What upcycling changes: a model's shape, its weights and Adam's moments, as plain tensors by name; read and written.

One process holds the model whole, on the CPU. Every kind of upcycling is a function from :class:`Parts` to
:class:`Upcycled`, and touches no file.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import yaml
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from looplm import checkpoint
from looplm.checkpoint import COMPANION_FOLDER, WEIGHTS_ONLY, About, optimizer_state, step_folder
from looplm.cli import to_dict
from looplm.config import GateConfig, ModelConfig, ParallelConfig, RunConfig
from looplm.files import write_whole
from looplm.model import LoopLM
from pretrain.optim import DTYPES
from pretrain.trainer import Trainer

RECORD = "upcycle.json"


class Parts(NamedTuple):
    """A model taken apart.

    Args:
        model: its shape.
        gate: the exit gate's.
        weights: fp32, by our names. Where the gate's are missing they are drawn anew.
        moments: Adam's two for each weight, by the same names; None where there is no run to go on with.
    """

    model: ModelConfig
    gate: GateConfig
    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] | None = None


class Upcycled(NamedTuple):
    """What became of them, and in plain sentences what the result has exactly and what only nearly."""

    parts: Parts
    exact: list[str]
    approximate: list[str]


class Source(NamedTuple):
    """Where the parts come from.

    Args:
        folder: as the record names it.
        parts: what was found there.
        about: what the checkpoint says of itself.
        tokenizer: file to copy.
        companions: files to carry along.
        run: the run that made them, with the state of its ``scheduler``; None where none can go on.
    """

    folder: Path
    parts: Parts
    about: About
    tokenizer: Path
    companions: tuple[Path, ...]
    run: RunConfig | None = None
    scheduler: dict[str, Any] | None = None


def open_source(directory: str, groups: ProcessGroupCollection) -> Source:
    """Take apart a training directory's newest checkpoint, one of its steps, or weights alone.

    A gate stage has moments of its gate alone, so only its weights are taken.
    """
    found = step_folder.locate(directory)
    run, about = checkpoint.read_config(found), checkpoint.read_about(found)
    if run is None or about.objective != "entropy_regularised":
        opened = checkpoint.open_model(str(found), groups)
        parts = Parts(opened.model.model_config, opened.gate, _weights(opened.model))
        return Source(found, parts, about, found / "tokenizer.json", _companions(found))
    model = LoopLM(run.model, run.gate, groups, DTYPES[run.optim.precision])
    trained = Trainer(model, run.loss, run.optim, ParallelConfig(), groups).state
    checkpoint.load_run(found, trained)
    weights, moments = _weights(trained.model), {}
    for name, state in optimizer_state.plain_state(trained.optimizer, trained.model).items():
        if optimizer_state.MAIN in state:  # bf16 weights are a shadow of the optimizer's
            weights[name] = state.pop(optimizer_state.MAIN).detach().cpu()
        moments[name] = state
    parts, schedule = Parts(run.model, run.gate, weights, moments), trained.scheduler.state_dict()
    return Source(found, parts, about, found / "tokenizer.json", _companions(found), run, schedule)


def assemble(parts: Parts, groups: ProcessGroupCollection, dtype: torch.dtype = torch.float32) -> LoopLM:
    """The model that the parts describe. A gate that they do not hold is a fresh one."""
    model = LoopLM(parts.model, parts.gate, groups, dtype)
    named = dict(model.named_parameters())
    missing = {name for name in named if name not in parts.weights and not name.startswith("gate.")}
    assert not missing and parts.weights.keys() <= named.keys(), (missing, parts.weights.keys() - named.keys())
    with torch.no_grad():
        for name, weight in parts.weights.items():
            named[name].copy_(weight)
    return model


def write(output: Path, source: Source, parts: Parts, record: dict[str, Any], groups: ProcessGroupCollection) -> None:
    """Write ``output`` whole.

    Where the parts hold moments it is a training directory that ``pretrain.train`` resumes at the source's step; else
    weights alone, for ``checkpoint.initial``. ``record`` is added to the list in the companions' upcycle.json.
    """
    holds_gate = any(name.startswith("gate.") for name in parts.weights)
    about = replace(
        source.about,
        gate_trained=source.about.gate_trained and holds_gate and parts.model.num_loops > 1,
        versions=checkpoint.versions(),
        git_revision=checkpoint.git_revision(),
    )
    with TemporaryDirectory() as folder:
        companions = Path(folder) / COMPANION_FOLDER
        companions.mkdir()
        for path in source.companions:
            shutil.copyfile(path, companions / path.name)
        earlier = json.loads((companions / RECORD).read_text()) if (companions / RECORD).exists() else []
        write_whole(companions / RECORD, json.dumps([*earlier, record], indent=1) + "\n")
        if source.run is None or parts.moments is None:
            about = replace(about, objective=WEIGHTS_ONLY, dtype=about.dtype or "float32", optimizer_step=None)
            model = assemble(parts, groups, getattr(torch, about.dtype))
            checkpoint.save_weights(output, model, parts.gate, about, source.tokenizer, companions)
        else:
            _write_run(output, source, parts, about, companions, groups)


def _write_run(
    output: Path, source: Source, parts: Parts, about: About, companions: Path, groups: ProcessGroupCollection
) -> None:
    assert source.run is not None and source.scheduler is not None and parts.moments is not None
    start = replace(source.run.checkpoint, initial=None, initial_optimizer=False)
    run = replace(source.run, output_dir=str(output), model=parts.model, gate=parts.gate, checkpoint=start)
    model = assemble(parts, groups, DTYPES[run.optim.precision])
    trained = Trainer(model, run.loss, run.optim, ParallelConfig(), groups).state
    weights = dict(trained.model.named_parameters())
    state = {name: _state_of(name, weight, parts) for name, weight in weights.items()}
    optimizer_state.load_state(trained.optimizer, trained.model, state, about.adam_steps)
    trained.scheduler.load_state_dict(source.scheduler)
    partial = step_folder.create_partial(output)
    checkpoint.save(partial / "checkpoints", trained, run, about, source.tokenizer, run.checkpoint.keep, companions)
    shutil.copytree(companions, partial / COMPANION_FOLDER)
    write_whole(partial / "config.yaml", yaml.safe_dump(to_dict(run), sort_keys=False))
    step_folder.move_into_place(partial, output)


def _state_of(name: str, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
    """Adam's state of one weight; that of a fresh gate is zero, which makes its first steps small ones."""
    assert parts.moments is not None
    nothing = {moment: torch.zeros(weight.shape) for moment in optimizer_state.MOMENTS}
    main = {} if weight.dtype is torch.float32 else {optimizer_state.MAIN: parts.weights.get(name, weight.detach())}
    return {**parts.moments.get(name, nothing), **main}


def _companions(step: Path) -> tuple[Path, ...]:
    return tuple(sorted((step / COMPANION_FOLDER).glob("*")))


def _weights(model: LoopLM) -> dict[str, Tensor]:
    return {name: weight.detach().float().cpu() for name, weight in model.named_parameters()}
