"""Save and load checkpoints: a run's whole state, or weights alone.

A checkpoint is a directory ``step_00000300/``::

    state/          weights, optimizer, schedule, random state: Megatron's sharded torch_dist format
    config.yaml     the resolved configuration; for weights alone, only its sections model and gate
    about.json      format version, step, samples, package versions, git revision, fingerprints of tokenizer and data
    tokenizer.json  the tokenizer, so that the directory needs no other file
    companions/     files that came with imported weights and leave with an export, such as a chat template
    manifest.json   size and hash (xxh3) of every other file; written last

The directory is complete or absent (:mod:`looplm.checkpoint.step_folder`); ``latest`` beside it names the newest.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

import looplm.checkpoint.optimizer_state as optimizer_state
import looplm.checkpoint.step_folder as step_folder
from looplm.bounds import require
from looplm.checkpoint.about import About, check_fit, check_moments, check_resume, read_about, read_model
from looplm.checkpoint.contents import check_size
from looplm.checkpoint.memory import own_storage
from looplm.checkpoint.saving import Saving
from looplm.cli import to_dict
from looplm.config import GateConfig, RunConfig
from looplm.encoding import read_tokenizer
from looplm.failures import UserError
from looplm.files import sha256_of
from looplm.megatron import device
from looplm.model import EXTRA_STATE, LoopLM

_ANOTHER = "remove it, so that the checkpoint before it is used, or take another"


class TrainingState(NamedTuple):
    """The parts of a training run whose state a checkpoint holds."""

    model: LoopLM
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


class OpenedModel(NamedTuple):
    """A model loaded for evaluation, generation or export."""

    model: LoopLM
    gate: GateConfig
    about: About
    tokenizer: Tokenizer
    folder: Path


def save_weights(
    final: Path,
    model: LoopLM,
    gate: GateConfig,
    about: About,
    tokenizer: Path | bytes,
    companions: Path | None = None,
) -> None:
    """Write weights alone to the directory ``final``, for ``checkpoint.initial``, evaluation or export.

    Collective. ``about.objective`` is :data:`WEIGHTS_ONLY`.
    """
    config = {"model": to_dict(model.model_config), "gate": to_dict(gate)}
    Saving(final, {"model": sharded_weights(model)}, config, about, tokenizer, companions).wait()


def resume(found: Path, training: TrainingState, config: RunConfig) -> About:
    """Load one of a run's own checkpoints into ``training``, so that the run goes on.

    Raises:
        UserError: the checkpoint's weights have other shapes, or another training stage wrote it.
    """
    about = check_resume(found, config)
    load_run(found, training)
    return about


def load_run(step: Path, training: TrainingState) -> None:
    """Load a run's whole state from one of its step directories."""
    parts = {"model": training.model.sharded_state_dict(), **_small_parts(training)}
    state, missing, unexpected = _load(step, parts, strict=StrictHandling.RETURN_ALL)

    def read(wanted: dict[str, Any]) -> optimizer_state.State:
        found, not_wanted, unknown = _load(step, {"optimizer": wanted}, strict=StrictHandling.RETURN_ALL)
        missing.intersection_update(not_wanted)
        unexpected.update(unknown)
        return optimizer_state.State(found.get("optimizer", {}))

    adam_steps, weights = read_about(step).adam_steps, training.model.sharded_state_dict()
    optimizer_state.load(training.optimizer, training.model, weights, read, adam_steps)
    # Older checkpoints hold empty extra states.
    different = [key for key in sorted({*missing, *unexpected}) if EXTRA_STATE not in key]
    if different:
        raise UserError(
            f"{step}: not a checkpoint of this run: only one of the two has {', '.join(different)}; "
            "resume with the configuration that wrote it"
        )
    training.model.load_state_dict(state["model"])
    try:
        training.scheduler.num_steps = 0  # Megatron adds the loaded steps to those of a schedule that has run
        training.scheduler.load_state_dict(state["scheduler"])
        device.set_rng_state(state["rng"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{step}: {_first_line(error)} in its schedule or random state; {_ANOTHER}") from error


def _load(step: Path, wanted: dict[str, Any], **options: Any) -> Any:
    """Read a step directory into ``wanted``; raise a :class:`UserError` if its state has another form. Collective."""
    try:
        return dist_checkpointing.load(wanted, str(step / "state"), **options)
    except CheckpointException as error:  # some rank's, raised on all
        reason = _first_line(next((cause for cause, _ in error.failures.values()), error))
    except (CheckpointingException, AssertionError, KeyError, TypeError, ValueError) as error:
        reason = _first_line(error)
    raise UserError(f"{step}: its state cannot be loaded ({reason}); {_ANOTHER}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def load_optimizer(step: Path, training: TrainingState, config: RunConfig) -> None:
    """Load only the optimizer's state, for a stage that continues with the moments of the previous one.

    Raises:
        UserError: the checkpoint has no moments, or they belong to other parameters or another precision.
    """
    about = check_moments(step, config)
    weights = training.model.sharded_state_dict()

    def read(wanted: dict[str, Any]) -> optimizer_state.State:
        found = _load(step, {"optimizer": wanted})
        return optimizer_state.State(found.get("optimizer", {}))

    optimizer_state.load(training.optimizer, training.model, weights, read, about.adam_steps)


def load_weights(step: Path, model: LoopLM, gate: GateConfig) -> About:
    """Load only the weights of a step directory, into a model of the same shapes."""
    about = check_fit(step, model.model_config, gate)
    state = _load(step, {"model": sharded_weights(model)})
    model.load_state_dict(state["model"])
    return about


def open_model(
    directory: str, groups: ProcessGroupCollection, dtype: torch.dtype | None = torch.float32
) -> OpenedModel:
    """Build the model that a checkpoint describes, load its weights, and set it to eval mode.

    Args:
        directory: a training directory, whose newest complete checkpoint is used, or a step directory.
        groups: from :func:`looplm.megatron.process_groups.start`.
        dtype: precision to compute in; None for that of the stored weights.
    """
    return open_step(step_folder.locate(directory), groups, dtype)


def open_step(found: Path, groups: ProcessGroupCollection, dtype: torch.dtype | None = torch.float32) -> OpenedModel:
    """Do what :func:`open_model` does with a step directory that ``step_folder.locate`` has verified."""
    about, described = read_about(found), read_model(found)
    check_size(found, described)
    check_tokens(found, about, described.model.vocab_size)
    model_config, gate = described
    dtype = dtype or getattr(torch, about.dtype or "float32")
    model = LoopLM(model_config, gate, groups, dtype, initialize=False)
    load_weights(found, model, gate)
    return OpenedModel(model.eval(), gate, about, read_tokenizer(found / "tokenizer.json"), found)


def check_tokens(step: Path, about: About, vocab_size: int) -> None:
    """Raise a :class:`UserError` if about.json is that of another tokenizer or vocabulary: texts might never end."""
    where, fix = f"{step}/about.json", "it is not this checkpoint's; take another step directory"
    has = sha256_of(step / "tokenizer.json")
    require(about.tokenizer_sha256 == has, f"{where}: tokenizer_sha256", about.tokenizer_sha256, fix)
    require(bool(about.eos_ids), f"{where}: eos_ids", list(about.eos_ids), fix)
    for token in (*about.eos_ids, *filter(None, (about.bos_id, about.pad_id, about.begin_id))):
        require(0 <= token < vocab_size, f"{where}: token", token, f"the model has {vocab_size}; {fix}")


def sharded_state(training: TrainingState) -> dict[str, Any]:
    """Return a run's whole state in Megatron's sharded form, to save. Collective."""
    weights = training.model.sharded_state_dict()
    for factory in weights.values():  # the optimizer's factories are copies of them
        if isinstance(factory, ShardedTensorFactory):
            factory.build_fn = partial(_build_halves, factory.build_fn)
    return {
        "model": weights,
        "optimizer": optimizer_state.sharded_state(training.optimizer, training.model, weights),
        **_small_parts(training),
    }


def _small_parts(training: TrainingState) -> dict[str, Any]:
    return {"scheduler": training.scheduler.state_dict(), "rng": device.rng_state()}


def sharded_weights(model: LoopLM) -> dict[str, Any]:
    """Return ``model.sharded_state_dict()`` without the copies that Megatron makes of fused matrices.

    Megatron stores the two halves of a gated feed-forward layer's first matrix apart. When it saves, it copies both
    halves of every layer, because a half is a view. When it loads, it concatenates them into a new matrix, although
    they were read into the old one. For a model with Ouro's shapes that is 0.4 of its size.

    For weights alone: an optimizer's state needs Megatron's own factories.
    """
    state = model.sharded_state_dict()
    for factory in state.values():
        if isinstance(factory, ShardedTensorFactory):
            factory.build_fn = partial(_build_halves, factory.build_fn)
            factory.merge_fn = partial(_merge_halves, factory.data, factory.merge_fn)
    return state


def _build_halves(build: Callable[..., Any], *args: Any) -> Any:
    """Return the halves with a storage of their own over the same memory, so that Megatron sees no view to copy."""
    halves = build(*args)
    for half in halves:
        half.data = own_storage(half.data)
    return halves


def _merge_halves(matrix: Tensor, merge: Callable[[Any], Tensor], halves: list[Tensor]) -> Tensor:
    """Return the matrix itself if its halves were filled in place."""
    address = matrix.data_ptr()
    for half in halves:
        if half.data_ptr() != address:
            return merge(halves)
        address += half.nbytes
    return matrix
