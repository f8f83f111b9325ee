"""Checkpoints that are whole or absent, and are checked before they are trusted.

A checkpoint is a directory ``step_00000300/``::

    state/          weights, optimizer, schedule, random state: Megatron's sharded torch_dist format
    config.yaml     the resolved configuration
    about.json      step, consumed samples, versions, git revision, fingerprints of tokenizer and data order
    tokenizer.json  the tokenizer itself, so that the directory stands alone
    manifest.json   size and sha256 of every other file; written last

It is written aside, fsynced and renamed; ``latest`` is replaced, never rewritten. A kill at any moment leaves either the
old state or the new one.
"""

import dataclasses
import json
import os
import pickle
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
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from tokenizers import Tokenizer

from looplm import device, optimizer_state, parallel
from looplm.cli import UserError, from_dict, to_dict
from looplm.config import GateConfig, ModelConfig, RunConfig
from looplm.files import fsync, sha256_of, write_whole
from looplm.model import LoopLM

# All that torch and Megatron name in .metadata.
_PICKLE_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "torch.distributed.checkpoint.filesystem",
    "megatron.core.dist_checkpointing.strategies",
)
_PICKLE_NAMES = {
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
}

# What may change between a checkpoint and the run that starts from it; everything else shapes the weights.
CHANGEABLE = {"num_loops", "rope_base", "max_sequence_length", "norm_eps", "init_std", "embedding_init_std"}


@dataclass(frozen=True)
class About:
    """What a checkpoint says of itself."""

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


class Trained(NamedTuple):
    """The parts whose state a checkpoint holds."""

    model: LoopLM
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


class OpenedModel(NamedTuple):
    """A model read for evaluation or generation."""

    model: LoopLM
    config: RunConfig
    step: int
    gate_trained: bool
    tokenizer: Tokenizer
    eos_id: int


def save(folder: Path, trained: Trained, config: RunConfig, about: About, tokenizer: Path, keep: int) -> Path:
    """Write ``folder/step_XXXXXXXX`` whole, point ``latest`` at it, and drop all but the ``keep`` newest.

    Collective: every rank calls it. The tokenizer is a file to copy.
    """
    final = folder / f"step_{about.step:08d}"
    aside = folder / f".{final.name}.partial"
    if parallel.is_rank_0():
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "state").mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_state(trained, is_loading=False), str(aside / "state"))
    dist.barrier()
    if parallel.is_rank_0():
        write_whole(aside / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
        write_whole(aside / "about.json", json.dumps(dataclasses.asdict(about), indent=1))
        shutil.copyfile(tokenizer, aside / "tokenizer.json")
        files = {str(path.relative_to(aside)): _fingerprint(path) for path in _files(aside)}
        write_whole(aside / "manifest.json", json.dumps(files, indent=1))
        for path in (*_files(aside), aside / "state", aside):
            fsync(path)
        replaced = folder / f".{final.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():  # the same step again, after falling back from it: gone only once the new one is there
            os.rename(final, replaced)
        os.rename(aside, final)
        shutil.rmtree(replaced, ignore_errors=True)
        write_whole(folder / "latest", final.name + "\n")
        fsync(folder)
        for old in _steps(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def resume(folder: Path, trained: Trained, config: RunConfig, say: Callable[[str], None]) -> About | None:
    """Load the newest whole checkpoint of ``folder`` into ``trained``; None when there is none.

    Raises:
        UserError: it belongs to a model of another shape or to another stage.
    """
    found = newest(folder, say)
    if found is None:
        return None
    about = _fit(found, config.model, config.gate)
    if about.objective != config.loss.objective:
        raise UserError(
            f"{found}: belongs to the stage loss.objective={about.objective}, not {config.loss.objective}; "
            "give this stage an output_dir of its own and name the other in checkpoint.initial"
        )
    state = dist_checkpointing.load(
        _state(trained, is_loading=True), str(found / "state"), strict=StrictHandling.RAISE_ALL
    )
    trained.model.load_state_dict(state["model"])
    optimizer_state.load_state(trained.optimizer, trained.model, state["optimizer"], about.step)
    trained.scheduler.load_state_dict(state["scheduler"])
    device.set_rng_state(state["rng"])
    return about


def load_weights(directory: str, model: LoopLM, gate: GateConfig) -> About:
    """Weights only, from a training directory or from one step of it, into a model of the same shape."""
    found = locate(directory)
    about = _fit(found, model.shape, gate)
    weights = {"model": model.sharded_state_dict()}
    state = dist_checkpointing.load(weights, str(found / "state"))
    model.load_state_dict(state["model"])
    return about


def open_model(directory: str, groups: ProcessGroupCollection, dtype: torch.dtype = torch.float32) -> OpenedModel:
    """Build the model a checkpoint describes, in eval mode.

    Args:
        directory: a training directory (its newest whole checkpoint is taken) or one of its step directories.
        groups: from :func:`looplm.parallel.start`.
        dtype: to compute in.
    """
    found = locate(directory)
    config = read_config(found)
    model = LoopLM(config.model, config.gate, groups, dtype)
    about = load_weights(str(found), model, config.gate)
    tokenizer = Tokenizer.from_file(str(found / "tokenizer.json"))
    return OpenedModel(model.eval(), config, about.step, about.gate_trained, tokenizer, about.eos_id)


def locate(directory: str) -> Path:
    """The whole checkpoint that ``directory`` is or holds.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(directory)
    if (path / "manifest.json").exists():
        fault = find_fault(path)
        if fault:
            raise UserError(f"{path}: {fault}; take another step directory")
        return path
    found = newest(path / "checkpoints", lambda message: None)
    if found is None:
        raise UserError(f"{path}: no whole checkpoint here; give a training directory or a step directory of one")
    return found


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of ``folder`` that is whole; broken ones are named through ``say`` and passed over."""
    found: list[Path | None] = [None]
    if parallel.is_rank_0():
        for step in _steps(folder):
            fault = find_fault(step)
            if fault is None:
                found = [step]
                break
            say(f"{step}: {fault}; falling back to the checkpoint before it")
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def find_fault(step: Path) -> str | None:
    """What is wrong with a step directory, in words; None if every file has the size and hash it was written with."""
    try:
        manifest = json.loads((step / "manifest.json").read_text())
        for name, (size, sha256) in manifest.items():
            path = step / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _fingerprint(path)[1] != sha256:
                return f"{name} has changed since it was written"
        return _unsafe_pickle(step / "state" / ".metadata")
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be read ({error})"


def read_about(step: Path) -> About:
    """What the checkpoint says of itself."""
    path = step / "about.json"
    return from_dict(About, json.loads(path.read_text()), where=str(path))


def read_config(step: Path) -> RunConfig:
    """The configuration the checkpoint was made with."""
    path = step / "config.yaml"
    return from_dict(RunConfig, yaml.safe_load(path.read_text()), where=str(path))


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


def _state(trained: Trained, is_loading: bool) -> dict[str, Any]:
    weights = trained.model.sharded_state_dict()
    return {
        "model": weights,
        "optimizer": optimizer_state.sharded_state(trained.optimizer, trained.model, weights, is_loading),
        "scheduler": trained.scheduler.state_dict(),
        "rng": device.rng_state(),
    }


def _fit(step: Path, model: ModelConfig, gate: GateConfig) -> About:
    """Refuse a checkpoint of another shape, naming the first key that differs."""
    saved = read_config(step)
    for section, ours, theirs in (("model", model, saved.model), ("gate", gate, saved.gate)):
        for field in dataclasses.fields(ours):
            have, want = getattr(theirs, field.name), getattr(ours, field.name)
            if field.name not in CHANGEABLE and have != want:
                raise UserError(
                    f"{step}: made with {section}.{field.name}={have}, this run has {want}; "
                    f"set {section}.{field.name} to {have} or start from another checkpoint"
                )
    return read_about(step)


class _NoCode(pickle.Unpickler):
    """Reads what torch writes into ``.metadata`` and refuses every other name: a pickle can run any code it names."""

    def find_class(self, module: str, name: str) -> Any:
        if "." not in name and (module.startswith(_PICKLE_MODULES) or (module, name) in _PICKLE_NAMES):
            return super().find_class(module, name)
        found = None if module != "torch" else getattr(torch, name, None)
        if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
            return found
        raise UserError(f"names {module}.{name}, which a checkpoint has no need of")


def _unsafe_pickle(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            _NoCode(file).load()
    except UserError as error:
        return f"{path.name} {error}; it may run code and is not opened"
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
        return f"{path.name} cannot be read ({error})"
    return None


def _steps(folder: Path) -> list[Path]:
    """Step directories, newest first."""
    return sorted((path for path in folder.glob("step_*") if path.is_dir()), reverse=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")


def _fingerprint(path: Path) -> tuple[int, str]:
    return path.stat().st_size, sha256_of(path)
