"""Metadata of a checkpoint: its progress, origin and model, and whether a run may start from it."""

import dataclasses
import subprocess
import warnings
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from looplm.checkpoint.step_folder import step_name
from looplm.cli import from_dict
from looplm.config import GateConfig, ModelConfig, RunConfig
from looplm.config.model import foreign_keys
from looplm.config.stored import upgrade_config
from looplm.encoding import begin_id, read_tokenizer
from looplm.failures import UserError
from looplm.files import sha256_of
from looplm.json_file import read_object
from looplm.yaml_text import read_yaml

FORMAT_VERSION = 3  # of the checkpoints that this release writes; _upgrade reads older ones
_GIT_SECONDS = 10.0  # for git's look at all files; a shared file system or a busy machine may take longer
_ROOT = Path(__file__).parents[2]  # of the checkout
WEIGHTS_ONLY = "weights"  # takes the place of the objective if no run of ours made the checkpoint
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # optim.precision by the dtype in about.json

# Keys that may differ between a checkpoint and the run that starts from it. All others shape the weights.
CHANGEABLE = {"num_loops", "rope_base", "max_sequence_length", "norm_eps"}
CHANGEABLE |= {"init_std", "embedding_init_std", "residual_gain"}  # of weights that are drawn, not loaded


@dataclass(frozen=True, kw_only=True)
class Health:
    """Numerical incidents of a run so far; all of it resumes with the run.

    Args:
        skipped: steps without an update, because a loss or gradient was not finite.
        skipped_in_a_row: those at the end.
        skipped_samples: for each rollback, the samples (first, end) that no step will see again, end excluded.
        recent_losses: of the steps that a loss is compared with to find a spike.
        losses_above: losses in a row, at the end, that are above the limit of a spike.
        skipped_above: steps without an update since the first of those losses.
    """

    skipped: int = 0
    skipped_in_a_row: int = 0
    skipped_samples: tuple[tuple[int, int], ...] = ()
    recent_losses: tuple[float, ...] = ()
    losses_above: int = 0
    skipped_above: int = 0

    @property
    def steps_above(self) -> int:
        """Steps since the last one before the losses above the limit of a spike."""
        return self.losses_above + self.skipped_above

    @property
    def samples_left_out(self) -> int:
        """Number of the skipped samples."""
        return sum(stop - first for first, stop in self.skipped_samples)


@dataclass(frozen=True)
class About:
    """The content of about.json. Ids that are not known are None; an unknown ``dtype`` is empty.

    The run began with sample ``first_sample`` of the data's order. A text ends with any of ``eos_ids``. ``begin_id``
    stands before each text, usually ``bos_id``; None if texts begin without such a token.
    """

    step: int
    samples: int
    tokens: int
    horizon_samples: int
    objective: str
    gate_trained: bool
    tokenizer_sha256: str
    eos_ids: tuple[int, ...]
    data_order: str
    versions: dict[str, str]
    git_revision: str
    bos_id: int | None = None
    pad_id: int | None = None
    begin_id: int | None = None
    dtype: str = ""
    optimizer_step: int | None = None
    health: Health = field(default_factory=Health)
    first_sample: int = 0
    format_version: int = FORMAT_VERSION

    @classmethod
    def for_weights(
        cls,
        tokenizer: Path,
        eos_ids: tuple[int, ...],
        bos_id: int | None,
        pad_id: int | None,
        gate_trained: bool,
        dtype: torch.dtype,
    ) -> "About":
        """Metadata for imported weights. There is no run to resume; texts begin as the tokenizer begins them."""
        return cls(
            step=0,
            samples=0,
            tokens=0,
            horizon_samples=0,
            objective=WEIGHTS_ONLY,
            gate_trained=gate_trained,
            tokenizer_sha256=sha256_of(tokenizer),
            eos_ids=eos_ids,
            data_order="",
            versions=versions(),
            git_revision=git_revision(),
            bos_id=bos_id,
            pad_id=pad_id,
            begin_id=begin_id(read_tokenizer(tokenizer)),
            dtype=str(dtype).removeprefix("torch."),
        )

    @property
    def eos_id(self) -> tuple[int, ...]:
        """Name of :attr:`eos_ids` in 0.1, when a text could end with one token only."""
        warnings.warn("About.eos_id is now About.eos_ids", DeprecationWarning, stacklevel=2)
        return self.eos_ids

    @property
    def position(self) -> int:
        """Number of samples in the data's order behind it: of earlier stages, consumed, and skipped for good."""
        return self.first_sample + self.samples + self.health.samples_left_out

    @property
    def healthy_step(self) -> int:
        """Last step before those at the end that were skipped, or that may be the start of a loss spike."""
        return self.step - max(self.health.skipped_in_a_row, self.health.steps_above)

    @property
    def adam_steps(self) -> int:
        """Steps behind Adam's moments: without the skipped ones, with those of a run whose moments were taken over."""
        return self.step if self.optimizer_step is None else self.optimizer_step


class ModelDescription(NamedTuple):
    """The configuration of a checkpoint's weights."""

    model: ModelConfig
    gate: GateConfig


class Difference(NamedTuple):
    """A key, with its value for the weights of a checkpoint and the one that a run wants."""

    key: str
    saved: object
    wanted: object


def read_about(step: Path) -> About:
    """Return the about.json of a step directory, of this format version or an older one."""
    path = step / "about.json"
    values = read_object(path, "take another step directory")
    about = from_dict(About, _upgrade(values, path), where=str(path))
    if about.dtype and not isinstance(getattr(torch, about.dtype, None), torch.dtype):
        raise UserError(f"{path}: dtype: {about.dtype!r} is not allowed; it must be one of torch's, such as bfloat16")
    return about


def _upgrade(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the values of an about.json in the form of :data:`FORMAT_VERSION`, upgraded one version at a time.

    ======= =====================================================================================================
    version change
    ======= =====================================================================================================
    1       no format_version (releases before 0.2.0); bos_id, pad_id, dtype and optimizer_step came one by one
    2       format_version
    3       eos_id became eos_ids; begin_id; health; first_sample
    ======= =====================================================================================================
    """
    found = values.get("format_version", 1)
    if type(found) is not int or not 1 <= found <= FORMAT_VERSION:
        raise UserError(
            f"{path}: written in checkpoint format {found}, but this release reads formats up to {FORMAT_VERSION}; "
            "install the release of LoopLM that wrote it, or a newer one"
        )
    if found == 1:
        values = {"bos_id": None, "pad_id": None, "dtype": "", "optimizer_step": None, **values, "format_version": 2}
    if values["format_version"] == 2:  # one end token only, and no record of how texts begin
        imported = values.get("objective") == WEIGHTS_ONLY
        begin = begin_id(read_tokenizer(path.with_name("tokenizer.json"))) if imported else None
        values = {**values, "begin_id": begin, "format_version": 3}
        if "eos_id" in values:
            values["eos_ids"] = [values.pop("eos_id")]
    return values


def read_config(step: Path) -> RunConfig | None:
    """Return the configuration of the run that made a checkpoint; None for weights alone."""
    values, path = _read_yaml(step)
    return from_dict(RunConfig, upgrade_config(values, path), where=path) if "output_dir" in values else None


def read_model(step: Path) -> ModelDescription:
    """Return the configuration of a checkpoint's weights."""
    values, path = _read_yaml(step)
    values = upgrade_config({"model": values.get("model", {}), "gate": values.get("gate", {})}, path)
    model = from_dict(ModelConfig, values["model"], where=path)
    return ModelDescription(model, from_dict(GateConfig, values["gate"], where=path))


def _read_yaml(step: Path) -> tuple[dict[str, Any], str]:
    path = str(step / "config.yaml")
    return read_yaml(path).values, path


def check_resume(step: Path, config: RunConfig) -> About:
    """Return a checkpoint's about.json, if a run of this configuration may resume from it.

    Raises:
        UserError: the checkpoint's weights have other shapes, or another training stage wrote it.
    """
    about = check_fit(step, config.model, config.gate)
    if step.name != step_name(about.step):
        raise UserError(f"{step}: its about.json is that of step {about.step}; remove this step directory")
    if about.objective == WEIGHTS_ONLY:
        raise UserError(f"{step}: holds weights alone, no run to resume; name it in checkpoint.initial")
    if about.objective != config.loss.objective:
        raise UserError(
            f"{step}: belongs to the stage loss.objective={about.objective}, not {config.loss.objective}; "
            "give this stage an output_dir of its own and name the other in checkpoint.initial"
        )
    precision = _PRECISIONS.get(about.dtype, config.optim.precision)
    if precision != config.optim.precision:
        raise UserError(
            f"{step}: trained with optim.precision={precision}, this run has {config.optim.precision}; set "
            f"optim.precision to {precision}, or give a new output_dir and name this one in checkpoint.initial"
        )
    return about


def check_moments(step: Path, config: RunConfig) -> About:
    """Return a checkpoint's about.json, if its moments may be those that a stage begins with.

    Raises:
        UserError: the checkpoint has no moments, or they belong to other parameters or another precision.
    """
    about, objective = read_about(step), config.loss.objective
    where, fix = f"checkpoint.initial_optimizer: {step}", "leave it false"
    if about.objective == WEIGHTS_ONLY:
        raise UserError(f"{where} holds weights alone, no moments; {fix}")
    if about.objective == "adaptive_gate" != objective:
        raise UserError(f"{where} holds moments of the gate alone, loss.objective={objective} trains all; {fix}")
    before = read_config(step)
    if before is not None and config.loss.trains_gate and not before.loss.trains_gate:
        raise UserError(f"{where} holds no moments of the gate, which loss.weights={before.loss.weights} froze; {fix}")
    if _PRECISIONS.get(about.dtype, config.optim.precision) != config.optim.precision:
        dtype = {precision: dtype for dtype, precision in _PRECISIONS.items()}[config.optim.precision]
        raise UserError(f"{where} was trained in {about.dtype}, this stage in {dtype}; change optim.precision or {fix}")
    return about


def find_difference(saved: ModelDescription, wanted: ModelDescription) -> Difference | None:
    """Return the first key that shapes weights and differs; None if the weights of ``saved`` fit ``wanted``."""
    # A step embedding has a vector for each loop; tools.upcycle changes their number.
    embeds = "none" not in (wanted.model.step_embedding, saved.model.step_embedding)
    loops = {"num_loops"} if embeds else set[str]()
    for section, ours, theirs in (("model", wanted.model, saved.model), ("gate", wanted.gate, saved.gate)):
        found = _shaping(theirs, loops)
        for key, want in _shaping(ours, loops).items():
            have = found.get(key)
            if have != want:
                return Difference(f"{section}.{key}", have, want)
    return None


def check_fit(step: Path, model: ModelConfig, gate: GateConfig) -> About:
    """Return a checkpoint's about.json; raise a :class:`UserError` if its weights do not fit the given configuration.

    The message names the first key that differs.
    """
    about = read_about(step)
    if (different := find_difference(read_model(step), ModelDescription(model, gate))) is not None:
        key, have, want = different
        raise UserError(
            f"{step}: made with {key}={have}, this run has {want}; set {key} to {have} or start from another checkpoint"
        )
    writer, reader = about.versions.get("megatron-core", ""), version("megatron-core")
    if _release(writer) > _release(reader) and not (step / "state/common.pt").exists():
        raise UserError(
            f"{step}: written by megatron-core {writer}, which {reader} cannot read; install {writer} or newer"
        )
    return about


def _shaping(config: ModelConfig | GateConfig, too: set[str]) -> dict[str, object]:
    """Return the keys that shape weights, and those of ``too``, without those of other kinds of attention and gate.

    A null that stands for a derived number is replaced by that number.
    """
    values = dataclasses.asdict(config)
    if isinstance(config, ModelConfig):
        values |= {"num_query_groups": config.query_groups, "head_dim": config.attention_head_dim}
    free = (CHANGEABLE | foreign_keys(config)) - too
    return {key: value for key, value in values.items() if key not in free}


def _release(number: str) -> tuple[int, ...]:
    """Return the first two parts of a version: 0.16.1 → (0, 16); nothing for a text that is no version."""
    return tuple(int(part) for part in number.split(".")[:2] if part.isdecimal())


def versions() -> dict[str, str]:
    """Return the versions of the packages that a run's numbers depend on."""
    found = {}
    for package in ("torch", "megatron-core", "transformer-engine", "numpy", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


@cache
def git_revision() -> str:
    """Return the revision of the running code, or an empty string outside a git checkout of it.

    An installed package lies perhaps inside the checkout of another project, whose revision says nothing.

    Git is asked once, because a slow one would delay every save. The answer ends in ``-dirty`` if files were changed,
    and in ``-unchecked`` if git took too long to look at all of them.
    """
    if not (_ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=12"]
    for options, ending in ((["--dirty"], ""), ([], "-unchecked")):
        try:
            done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=_GIT_SECONDS)
        except OSError:
            return ""
        except subprocess.TimeoutExpired:
            continue
        revision = done.stdout.strip()
        return revision and revision + ending
    return ""
