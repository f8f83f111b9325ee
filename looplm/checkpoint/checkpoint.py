"""What a checkpoint holds: a run's whole state, or weights alone.

A checkpoint is a directory ``step_00000300/``::

    state/          weights, optimizer, schedule, random state: Megatron's sharded torch_dist format
    config.yaml     the resolved configuration; of weights alone, its sections model and gate
    about.json      step, consumed samples, versions, git revision, fingerprints of tokenizer and data order
    tokenizer.json  the tokenizer itself, so that the directory stands alone
    companions/     what came with imported weights and goes out with them again: a chat template, say
    manifest.json   size and sha256 of every other file; written last

Whole or absent: :mod:`looplm.checkpoint.step_folder`. ``latest`` names the newest; it is replaced, never rewritten.
"""

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from tokenizers import Tokenizer

from looplm.checkpoint import optimizer_state, step_folder
from looplm.checkpoint.sharded_weights import sharded_weights
from looplm.checkpoint.step_folder import locate
from looplm.cli import UserError, from_dict, to_dict
from looplm.config import GateConfig, ModelConfig, RunConfig
from looplm.files import sha256_of, write_whole
from looplm.megatron import device, process_groups
from looplm.model import EXTRA_STATE, LoopLM

COMPANION_FOLDER = "companions"
WEIGHTS_ONLY = "weights"  # in place of an objective, where no run has made the checkpoint

# What may change between a checkpoint and the run that starts from it; everything else shapes the weights.
CHANGEABLE = {"num_loops", "rope_base", "max_sequence_length", "norm_eps", "init_std", "embedding_init_std"}


@dataclass(frozen=True)
class About:
    """What a checkpoint says of itself; an id is None, and the type empty, where an older one did not say."""

    step: int
    samples: int
    tokens: int
    horizon_samples: int
    objective: str
    gate_trained: bool
    tokenizer_sha256: str
    eos_id: int
    data_order: str
    versions: dict[str, str]
    git_revision: str
    bos_id: int | None = None
    pad_id: int | None = None
    dtype: str = ""
    optimizer_step: int | None = None

    @classmethod
    def for_weights(
        cls,
        tokenizer: Path,
        eos_id: int,
        bos_id: int | None,
        pad_id: int | None,
        gate_trained: bool,
        dtype: torch.dtype,
    ) -> "About":
        """Of weights that come from elsewhere: no run of ours made them, so there is nothing to resume."""
        return cls(
            step=0,
            samples=0,
            tokens=0,
            horizon_samples=0,
            objective=WEIGHTS_ONLY,
            gate_trained=gate_trained,
            tokenizer_sha256=sha256_of(tokenizer),
            eos_id=eos_id,
            data_order="",
            versions=versions(),
            git_revision=git_revision(),
            bos_id=bos_id,
            pad_id=pad_id,
            dtype=str(dtype).removeprefix("torch."),
        )

    @property
    def adam_steps(self) -> int:
        """Steps that Adam's moments are made of: more than this run's where it took them over from another."""
        return self.step if self.optimizer_step is None else self.optimizer_step


class TrainingState(NamedTuple):
    """The parts whose state a checkpoint holds."""

    model: LoopLM
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


class OpenedModel(NamedTuple):
    """A model read for evaluation or generation."""

    model: LoopLM
    gate: GateConfig
    about: About
    tokenizer: Tokenizer
    folder: Path


class ModelDescription(NamedTuple):
    """What shapes a checkpoint's weights, and what they mean."""

    model: ModelConfig
    gate: GateConfig


def save(
    folder: Path,
    trained: TrainingState,
    config: RunConfig,
    about: About,
    tokenizer: Path,
    keep: int,
    companions: Path | None = None,
) -> Path:
    """Write ``folder/step_XXXXXXXX`` whole, point ``latest`` at it, and drop all but the ``keep`` newest.

    Collective: every rank calls it.

    Args:
        folder: of all the run's checkpoints.
        trained: whose state is saved.
        config: the run's.
        about: what it says of itself.
        tokenizer: file to copy.
        keep: how many stay.
        companions: folder to copy, if it exists.
    """
    final = folder / f"step_{about.step:08d}"
    _write(final, _state(trained, is_loading=False), to_dict(config), about, tokenizer, companions)
    if process_groups.is_rank_0():
        write_whole(folder / "latest", final.name + "\n")
        for old in step_folder.steps_in(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def save_weights(
    final: Path, model: LoopLM, gate: GateConfig, about: About, tokenizer: Path, companions: Path | None = None
) -> None:
    """Write the directory ``final`` whole: weights that a run may start from (``checkpoint.initial``), or be measured.

    Collective. ``about.objective`` is :data:`WEIGHTS_ONLY`.
    """
    shape = {"model": to_dict(model.model_config), "gate": to_dict(gate)}
    _write(final, {"model": sharded_weights(model)}, shape, about, tokenizer, companions)


def _write(
    final: Path, state: dict[str, Any], config: dict[str, Any], about: About, tokenizer: Path, companions: Path | None
) -> None:
    partial = [step_folder.create_partial(final) if process_groups.is_rank_0() else None]
    dist.broadcast_object_list(partial, src=0)
    assert partial[0] is not None
    folder = partial[0]
    if process_groups.is_rank_0():
        (folder / "state").mkdir()
    dist.barrier()
    force_all_tensors_to_non_fp8(state)  # engine.fp8_params
    dist_checkpointing.save(state, str(folder / "state"))
    dist.barrier()
    if process_groups.is_rank_0():
        write_whole(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        write_whole(folder / "about.json", json.dumps(dataclasses.asdict(about), indent=1))
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        if companions is not None and companions.is_dir():
            shutil.copytree(companions, folder / COMPANION_FOLDER)
        step_folder.publish(folder, final)
    dist.barrier()


def resume(folder: Path, trained: TrainingState, config: RunConfig, say: Callable[[str], None]) -> About | None:
    """Load the newest whole checkpoint of ``folder`` into ``trained``; None when there is none.

    Raises:
        UserError: it belongs to a model of another shape or to another stage.
    """
    found = step_folder.newest(folder, say)
    if found is None:
        return None
    about = check_fit(found, config.model, config.gate)
    if about.objective == WEIGHTS_ONLY:
        raise UserError(f"{found}: holds weights alone, no run to resume; name it in checkpoint.initial")
    if about.objective != config.loss.objective:
        raise UserError(
            f"{found}: belongs to the stage loss.objective={about.objective}, not {config.loss.objective}; "
            "give this stage an output_dir of its own and name the other in checkpoint.initial"
        )
    load_run(found, trained)
    return about


def load_run(step: Path, trained: TrainingState) -> None:
    """A run's whole state, from one of its step directories into parts of the same shape."""
    wanted = _state(trained, is_loading=True)
    state, absent, unread = dist_checkpointing.load(wanted, str(step / "state"), strict=StrictHandling.RETURN_ALL)
    different = [
        key for key in sorted({*absent, *unread}) if EXTRA_STATE not in key
    ]  # older checkpoints have empty ones
    if different:
        raise UserError(f"{step}: not of this run: only one of the two has {', '.join(different)}")
    trained.model.load_state_dict(state["model"])
    steps = read_about(step).adam_steps
    optimizer_state.load_state(trained.optimizer, trained.model, state["optimizer"], steps)
    trained.scheduler.load_state_dict(state["scheduler"])
    device.set_rng_state(state["rng"])


def load_optimizer(step: Path, trained: TrainingState, config: RunConfig) -> None:
    """The optimizer's state alone, from a step directory, for a stage that goes on with the moments of the one before.

    Raises:
        UserError: there is none, or it is not of the parameters or of the precision that this stage trains.
    """
    about, objective = read_about(step), config.loss.objective
    where, fix = f"checkpoint.initial_optimizer: {step}", "leave it false"
    if about.objective == WEIGHTS_ONLY:
        raise UserError(f"{where} holds weights alone, no moments; {fix}")
    if about.objective == "adaptive_gate" != objective:
        raise UserError(f"{where} holds moments of the gate alone, loss.objective={objective} trains all; {fix}")
    dtype = str(trained.model.config.params_dtype).removeprefix("torch.")
    if about.dtype not in ("", dtype):
        raise UserError(f"{where} was trained in {about.dtype}, this stage in {dtype}; change optim.precision or {fix}")
    weights = trained.model.sharded_state_dict()
    wanted = optimizer_state.sharded_state(trained.optimizer, trained.model, weights, is_loading=True)
    state = dist_checkpointing.load({"optimizer": wanted}, str(step / "state"))
    optimizer_state.load_state(trained.optimizer, trained.model, state["optimizer"], about.adam_steps)


def load_weights(step: Path, model: LoopLM, gate: GateConfig) -> About:
    """Weights only, from a step directory (:func:`looplm.checkpoint.step_folder.locate`), into a model of the same shape."""
    about = check_fit(step, model.model_config, gate)
    weights = {"model": sharded_weights(model)}
    state = dist_checkpointing.load(weights, str(step / "state"))
    model.load_state_dict(state["model"])
    return about


def open_model(
    directory: str, groups: ProcessGroupCollection, dtype: torch.dtype | None = torch.float32
) -> OpenedModel:
    """Build the model a checkpoint describes, in eval mode.

    Args:
        directory: a training directory (its newest whole checkpoint is taken) or one of its step directories.
        groups: from :func:`looplm.megatron.process_groups.start`.
        dtype: to compute in; None for what the weights are stored in.
    """
    found = locate(directory)
    shape, about = read_model(found), read_about(found)
    dtype = dtype or getattr(torch, about.dtype or "float32")
    model = LoopLM(shape.model, shape.gate, groups, dtype, draw=False)
    load_weights(found, model, shape.gate)
    tokenizer = Tokenizer.from_file(str(found / "tokenizer.json"))
    return OpenedModel(model.eval(), shape.gate, about, tokenizer, found)


def read_about(step: Path) -> About:
    """What the checkpoint says of itself."""
    path = step / "about.json"
    return from_dict(About, json.loads(path.read_text()), where=str(path))


def read_config(step: Path) -> RunConfig | None:
    """The configuration of the run that made the checkpoint; None of weights alone."""
    values, path = _read_yaml(step), step / "config.yaml"
    return from_dict(RunConfig, values, where=str(path)) if "output_dir" in values else None


def read_model(step: Path) -> ModelDescription:
    """What its weights are."""
    values, path = _read_yaml(step), str(step / "config.yaml")
    model = from_dict(ModelConfig, values.get("model", {}), where=path)
    return ModelDescription(model, from_dict(GateConfig, values.get("gate", {}), where=path))


def _read_yaml(step: Path) -> dict[str, Any]:
    return yaml.safe_load((step / "config.yaml").read_text())


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    found = {}
    for package in ("torch", "megatron-core", "transformer-engine", "numpy", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def git_revision() -> str:
    """Revision of the code that is running; empty outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except OSError:
        return ""


def _state(trained: TrainingState, is_loading: bool) -> dict[str, Any]:
    weights = trained.model.sharded_state_dict()
    return {
        "model": weights,
        "optimizer": optimizer_state.sharded_state(trained.optimizer, trained.model, weights, is_loading),
        "scheduler": trained.scheduler.state_dict(),
        "rng": device.rng_state(),
    }


def check_fit(step: Path, model: ModelConfig, gate: GateConfig) -> About:
    """Refuse a checkpoint of another shape, naming the first key that differs; what it says of itself."""
    saved = read_model(step)
    for section, ours, theirs in (("model", model, saved.model), ("gate", gate, saved.gate)):
        said = _shaping(theirs)
        for key, want in _shaping(ours).items():
            have = said.get(key)
            if have != want:
                raise UserError(
                    f"{step}: made with {section}.{key}={have}, this run has {want}; "
                    f"set {section}.{key} to {have} or start from another checkpoint"
                )
    about = read_about(step)
    writer, reader = about.versions["megatron-core"], version("megatron-core")
    if _release(writer) > _release(reader) and not (step / "state/common.pt").exists():
        raise UserError(
            f"{step}: written by megatron-core {writer}, which {reader} cannot read; install {writer} or newer"
        )
    return about


def _shaping(config: ModelConfig | GateConfig) -> dict[str, object]:
    """What shapes weights: null as the number it stands for, and nothing of the other kind of attention or gate."""
    values, silent = dataclasses.asdict(config), set(CHANGEABLE)
    if isinstance(config, GateConfig):
        silent |= set() if config.kind == "lru" else {"state_size"}
    elif config.attention == "mha":
        values |= {"num_query_groups": config.query_groups, "head_dim": config.attention_head_dim}
        silent |= {
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "qk_rope_period",
            "v_head_dim",
        }
    return {key: value for key, value in values.items() if key not in silent}


def _release(version: str) -> tuple[int, ...]:
    """0.16.1 → (0, 16)"""
    return tuple(int(part) for part in version.split(".")[:2])
