"""A run that is stopped and resumed equals one that is not, bit for bit: losses, weights and Adam's moments.

Both are the product's own runs on a synthetic task: training, checkpoint and loading. torch is asked for deterministic
kernels. If one does not exist, the runs use the usual ones, with attention by matrix products; a run may then not even
equal its own repetition, so that is measured too, and only the loss of the first step after the resume must be equal.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from looplm import checkpoint
from looplm.checkpoint import optimizer_state, step_folder
from looplm.cli import from_dict
from looplm.config import RunConfig
from pretrain.data import check_corpus
from pretrain.run import build
from pretrain.train import train
from tools.gpu.parity import MODELS
from tools.gpu.parts import Job
from tools.gpu.recipes import started
from tools.gpu.record import Mismatch, Row, Rows, Value, short

STEPS, STOP = 4, 2
CASES = {"mla, lru, bf16": ("mla", "lru", "bf16"), "mha, linear, fp32": ("mha", "linear", "fp32")}
NO_KERNEL = "deterministic"  # in torch's message about an operation that has no such kernel


def run(job: Job) -> None:
    """Measure every case."""
    with started(job) as groups:
        rows = Rows(job.rows, job.deadline)
        for name, (attention, gate, precision) in CASES.items():
            folder = job.folder / name.replace(", ", "-")
            config = run_config(folder / "whole", attention, gate, precision)
            rows.measure(name, partial(resumed_against_whole, config, groups, rows))


def run_config(output: Path, attention: str, gate: str, precision: str) -> RunConfig:
    """Return a run of a few steps with a checkpoint in the middle."""
    length = MODELS[attention]["max_sequence_length"]
    values: dict[str, Any] = {
        "output_dir": str(output),
        "model": MODELS[attention],
        "gate": {"kind": gate, "state_size": 16},
        "optim": {"train_steps": STEPS, "lr": 1e-3, "warmup_steps": 2, "decay_steps": 2, "precision": precision},
        "data": {"task": {"p_hop": {}}, "seq_length": length, "micro_batch_size": 4, "global_batch_size": 8},
        "checkpoint": {"save_every": STOP, "keep": 9},
        "logging": {"tensorboard": False},
    }
    return from_dict(RunConfig, values, where="tools.gpu.resume")


def resumed_against_whole(config: RunConfig, groups: ProcessGroupCollection, rows: Rows) -> dict[str, Value]:
    """Return how the resumed run compares with the whole one, with deterministic kernels if all of them exist."""
    try:
        return compare(config, groups, deterministic=True)
    except RuntimeError as error:
        if NO_KERNEL not in str(error):
            raise
        note = short(str(error).partition(". ")[0])
        rows.add(Row(name="deterministic kernels", status="not run", note=note))
        shutil.rmtree(Path(config.output_dir).parent, ignore_errors=True)
        return compare(config, groups, deterministic=False)


def compare(config: RunConfig, groups: ProcessGroupCollection, deterministic: bool) -> dict[str, Value]:
    """Run the recipe whole, again, and with a stop in the middle; raise if the resumed run is not what it must be."""
    with kernels(deterministic):
        halves = replace(config, output_dir=str(Path(config.output_dir).with_name("halves")))
        corpus = check_corpus(config.data, config.model.vocab_size)
        states, losses = list[dict[str, Tensor]](), list[list[float]]()
        for one in (config, halves, halves):  # the second is the same run again, until it loses its last checkpoint
            train(one, corpus, groups)
            states.append(final_state(one, groups))
            losses.append(losses_of(Path(one.output_dir)))
            if len(states) == 2:
                break_last_checkpoint(Path(halves.output_dir))
    different = differing(states[2], states[0])
    repeats = not differing(states[1], states[0]) and losses[1] == losses[0]
    values: dict[str, Value] = {
        "kernels": "deterministic" if deterministic else "usual",
        "repetition": "equal" if repeats else "differs",
        "first loss": "equal" if losses[2][STOP] == losses[0][STOP] else "differs",
        "resumed": "equal" if not different and losses[2] == losses[0] else "differs",
        "tensors": len(states[0]),
        "different": len(different),
    }
    must_be_equal = "resumed" if repeats else "first loss"
    if values[must_be_equal] != "equal":
        first = different[0] if different else "a loss"
        raise Mismatch(f"{len(different)} of {len(states[0])} tensors differ after the resume: {first}", values)
    return values


@contextmanager
def kernels(deterministic: bool) -> Iterator[None]:
    """Ask torch for deterministic kernels, or at least for attention by matrix products.

    Backward of the other kernels adds in any order.
    """
    torch.use_deterministic_algorithms(deterministic)
    try:
        with nullcontext() if deterministic else sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def break_last_checkpoint(output: Path) -> None:
    """Leave a run as if it had died before its last save."""
    (step_folder.of_run(output) / step_folder.step_name(STEPS) / step_folder.MANIFEST).unlink()


def final_state(config: RunConfig, groups: ProcessGroupCollection) -> dict[str, Tensor]:
    """Return weights and optimizer state of a run's last checkpoint, by name."""
    trainer, _ = build(config, groups)
    state = trainer.state
    checkpoint.resume(step_folder.locate(config.output_dir), state, config)
    tensors = {name: parameter.detach().cpu() for name, parameter in state.model.named_parameters()}
    for name, values in optimizer_state.plain_state(state.optimizer, state.model).items():
        tensors |= {f"{key} of {name}": value.detach().cpu().clone() for key, value in values.items()}
    return tensors


def losses_of(output: Path) -> list[float]:
    """Return the loss of every training step."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["loss"] for row in rows if "learning_rate" in row]


def differing(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that differ in any bit."""
    return [name for name in wanted if not torch.equal(found[name], wanted[name])]
