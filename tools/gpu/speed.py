"""Speed and memory of a stage-1 training step: tokens per second, model FLOPs utilization, peak against predictions.

A measurement that runs out of memory or fails leaves the others as they are. The micro-batch is the largest that the
planner fits into three quarters of the device's memory. The rehearsal (:mod:`tools.rehearsal`) knows Megatron's local
layers only.

Shapes: B batch, S sequence.
"""

import gc
import statistics
import time
from functools import cache, partial
from importlib.metadata import version
from itertools import repeat
from typing import NamedTuple

from megatron.core.process_groups_config import ProcessGroupCollection
from packaging.version import Version

from looplm.config import EngineConfig, Recompute, RunConfig
from looplm.megatron import device
from pretrain.run import build
from tools.gpu.parts import Job
from tools.gpu.recipes import Attention, batch_of, recipe, started
from tools.gpu.record import NotRun, Rows, Value
from tools.planning.estimate import estimate
from tools.planning.flops import model_flops_per_token
from tools.planning.hardware import GPUS, Assumptions, Cluster, Gpu
from tools.planning.memory import fullest_rank_memory
from tools.planning.planned_run import PlannedRun
from tools.rehearsal.one_role import RoleReport, rehearsed_config
from tools.rehearsal.processes import Assignment, rehearse_all
from tools.rehearsal.roles import role_of

GIB = 2**30
WARM_UP, TIMED = 2, 5
MICRO_BATCHES = (8, 4, 2, 1)
USABLE = 0.75  # of the device's memory
_UNEQUAL = Version("2.18")

ENGINES = {
    "local": EngineConfig(),
    "transformer_engine": EngineConfig(transformer_impl="transformer_engine"),
    "fp8": EngineConfig(transformer_impl="transformer_engine", fp8="hybrid", fp8_recipe="tensorwise"),
}


class Case(NamedTuple):
    """One measurement."""

    attention: Attention
    documents: bool
    recompute: Recompute = "none"

    @property
    def name(self) -> str:
        """Name of the row."""
        documents = "packed documents" if self.documents else "one document"
        return f"{self.attention}, {documents}, recompute {self.recompute}"


CASES = (
    Case("mla", True),
    Case("mla", False),
    Case("mha", True),
    Case("mha", False),
    Case("mla", True, "loop"),
)


def run(job: Job) -> None:
    """Measure every case with one engine."""
    with started(job) as groups:
        rows = Rows(job.rows, job.deadline)
        for case in CASES:
            rows.measure(case.name, partial(measure, job, case, groups))
            gc.collect()  # the trainer and its buffers are in reference cycles


def measure(job: Job, case: Case, groups: ProcessGroupCollection) -> dict[str, Value]:
    """Return speed and memory of one case."""
    if job.part == "speed-flash" and case.attention == "mla" and Version(version("transformer-engine")) < _UNEQUAL:
        raise NotRun(f"Transformer Engine runs MLA's unequal widths on flash-attn from {_UNEQUAL} on")
    config = fitting(job, case)
    device.reset_peak_memory()
    trainer, _ = build(config, groups)
    batch = batch_of(config, case.documents)
    times = []
    for _ in range(WARM_UP + TIMED):
        device.synchronize()
        start = time.perf_counter()
        step = trainer.train(repeat(batch), 1)
        device.synchronize()
        times.append(time.perf_counter() - start)
    if not step.healthy:
        raise ArithmeticError(f"the loss or a gradient is not finite; loss {step.stats.loss}")
    peak = device.peak_memory()
    rehearsed = rehearsed_bytes(config) if job.variant == "local" else None
    return figures(config, statistics.median(times[WARM_UP:]), peak, step.stats.loss, rehearsed)


def fitting(job: Job, case: Case) -> RunConfig:
    """Return the recipe with the largest micro-batch that the planner fits into the device's memory; 2 on a CPU."""
    total, engine = device.describe().total_bytes, ENGINES[job.variant]
    sizes = MICRO_BATCHES if total else (2,)
    for size in sizes:
        config = recipe(job.device, case.attention, recompute=case.recompute, micro_batch_size=size, engine=engine)
        if not total or planned_bytes(config) <= USABLE * total:
            return config
    need = planned_bytes(config) / GIB
    raise NotRun(f"planned {need:.1f} GiB for one sequence, more than {USABLE:.0%} of {total / GIB:.1f} GiB")


def planned_bytes(config: RunConfig) -> float:
    """Return the planner's memory of one rank."""
    return fullest_rank_memory(planned(config)).total


@cache
def rehearsed_bytes(config: RunConfig) -> int:
    """Return the memory of a step of one document a sample, executed on the CPU without numbers.

    Raises:
        RuntimeError: the step fails there.
    """
    step = rehearsed_config(config, 1, 1)
    ((_, report),) = rehearse_all([Assignment(step, 1, role_of(0, step.parallel, 1), 1)], jobs=1)
    if not isinstance(report, RoleReport):
        raise RuntimeError(f"the rehearsal fails at {report.where}: {report.error}")
    return report.memory.peak


def planned(config: RunConfig) -> PlannedRun:
    """Return the run for the planner."""
    return PlannedRun(config, 1, padded_heads=device.HAS_CUDA)


def figures(
    config: RunConfig, seconds: float, peak: int, loss: float, rehearsed: int | None = None
) -> dict[str, Value]:
    """Return the row of a step that took ``seconds`` and whose memory peaked at ``peak`` bytes (0: not measured)."""
    data, run = config.data, planned(config)
    tokens = data.global_batch_size * data.seq_length / seconds
    rate, memory = device.peak_flops(), planned_bytes(config)
    gpu = known_gpu(device.describe().name)
    return {
        "tokens/s": round(tokens),
        "MFU %": round(100 * tokens * model_flops_per_token(run) / rate, 1) if rate else None,
        "planned tokens/s": None if gpu is None else round(estimate(run, one_gpu(gpu, config)).tokens_per_s),
        "peak GiB": round(peak / GIB, 2) if peak else None,
        "planned GiB": _gib(memory),
        "peak/planned": round(peak / memory, 3) if peak else None,
        "rehearsed GiB": None if rehearsed is None else _gib(rehearsed),
        "sequences": data.micro_batch_size,
        "ms": round(1000 * seconds, 1),
        "loss": round(loss, 3),
    }


def _gib(size: float) -> float:
    return round(size / GIB, 2 if size > GIB else 5)


def known_gpu(name: str) -> Gpu | None:
    """Return the planner's data of a GPU by the name that torch gives; None if it has none."""
    words = name.lower().replace("-", " ").split()
    found = [key for key in GPUS if key.partition("-")[0] in words]
    sized = [key for key in found if key.partition("-")[2] and f"{key.partition('-')[2]}gb" in words]
    return GPUS[(sized or found)[0]] if found else None


def one_gpu(gpu: Gpu, config: RunConfig) -> Cluster:
    """Return a cluster of one GPU."""
    return Cluster(gpu=gpu, gpus=1, node=1, network_gbs=1, fp8=config.engine.real_fp8, assume=Assumptions())
