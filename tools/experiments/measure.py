"""Evaluations after a run, checked before the first run trains."""

from dataclasses import dataclass, field, replace
from typing import Literal

from looplm.bounds import at_least, check_bounds, path_field, positive, require
from looplm.checkpoint import ModelDescription
from looplm.config import RunConfig, TaskConfig
from looplm.files import is_file_name
from pretrain.evaluation_run import EvaluateConfig, check_exits, validation_run

Trial = Literal["sweep", "final"]
_TAKEN = ("valid", "test", "train")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Held-out data that differ from a run's own.

    Args:
        seq_length: tokens of a sample; null for the run's.
        task: a synthetic task in place of the run's.
        valid: prefix of other text.
    """

    seq_length: int | None = positive(None)
    task: TaskConfig | None = None
    valid: str | None = path_field(None)

    def __post_init__(self) -> None:
        check_bounds(self, "measure.tests[]")


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Measurements after a run, besides validation data and a task's test at the trained depth.

    Args:
        depth_factor: depths up to so many times the trained loops are measured.
        samples: of each split, a multiple of batch_size.
        batch_size: samples in one forward pass.
        refit_steps: of a task: steps of the heads that are fitted to the states of each depth; 0 fits none.
        votes: of a task: numbers of chains that the model writes for each last answer of the test; the most frequent
            counts.
        tests: further splits by name; they hold what differs: ``{longer: {seq_length: 32}}``. Text has no other test.
        kv_caches: caches to decode the task's test through, token by token.
        prompt_tokens: with kv_caches: tokens that are read as a prompt.
    """

    depth_factor: int = positive(2)
    samples: int = positive(1024)
    batch_size: int = positive(128)
    refit_steps: int = at_least(0, 0)
    votes: tuple[int, ...] = positive(())
    tests: dict[str, SplitConfig] = field(default_factory=dict)
    kv_caches: tuple[str, ...] = ()
    prompt_tokens: int = positive(1)

    def __post_init__(self) -> None:
        check_bounds(self, "measure")
        for name in self.tests:
            require(name not in _TAKEN, "measure.tests", name, "it is measured anyway; give another name")
            plain = is_file_name(name) and " " not in name and "." not in name
            require(plain, "measure.tests", name, "give a name without spaces, dots and slashes")


def evaluations(measure: MeasureConfig, run: RunConfig, trial: Trial) -> dict[str, EvaluateConfig]:
    """Return the evaluations of a run by split; a trial is measured on validation data only.

    Raises:
        UserError: one of them could not be made of this run's checkpoint.
    """
    is_task, loops = run.data.task is not None, run.model.num_loops
    fix = "an experiment is measured on one source; give one"
    require(is_task or len(run.data.valid) == 1, "data.valid", [source.prefix for source in run.data.valid], fix)
    for key in ("refit_steps", "votes", "kv_caches"):
        value, fix = getattr(measure, key), "only a task has a test of its own; leave it out"
        require(is_task or not value, f"measure.{key}", value, fix)
    plain = EvaluateConfig(
        checkpoint=run.output_dir, depths=_up_to(loops), samples=measure.samples, batch_size=measure.batch_size
    )
    found = {"valid": plain}
    if trial == "final":
        beyond = replace(plain, depths=_up_to(measure.depth_factor * loops), split="test" if is_task else "valid")
        if is_task:
            found["test"] = replace(
                beyond,
                refit_steps=measure.refit_steps,
                votes=",".join(map(str, measure.votes)),
                kv_caches=",".join(measure.kv_caches),
                prompt_tokens=measure.prompt_tokens if measure.kv_caches else plain.prompt_tokens,
            )
        for name, split in measure.tests.items():
            found[name] = replace(beyond, seq_length=split.seq_length, task=split.task, valid=split.valid)
    for name, config in found.items():
        _check(name, config, run)
    return found


def _check(name: str, config: EvaluateConfig, run: RunConfig) -> None:
    """Raise if the checkpoint of a run could not be measured so."""
    key = f"measure.tests.{name}" if name not in _TAKEN else "measure"
    is_text, fix = run.data.task is None, "the run reads a task; give seq_length or task"
    require(is_text or config.valid is None, f"{key}.valid", config.valid, fix)
    require(not is_text or config.task is None, f"{key}.task", "a task", "the run reads text; give valid")
    validation_run(config, run, ModelDescription(run.model, run.gate), run.output_dir)
    check_exits(config, run.loss.trains_gate)


def _up_to(depth: int) -> str:
    return ",".join(map(str, range(1, depth + 1)))
