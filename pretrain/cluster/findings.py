"""Judgment of a preflight's measurements: pure functions from figures to one line each, and all limits.

Every line has the figure and, if something is wrong, the fix.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Literal, NamedTuple

from looplm.checkpoint import HostMemory
from looplm.config import EngineConfig, RunConfig
from pretrain.batch_schedule import schedule_on
from pretrain.cluster.probes import RankInfo, WriteSpeed
from pretrain.mix import MANY_PASSES

GB = 10**9
CAPABILITY = {"fp32": (0, 0), "bf16": (8, 0)}  # lowest compute capability with matrix products in the format
CLOCK_WARN, CLOCK_FAIL = 1.0, 60.0  # seconds from the median
GPU_MEMORY_IN_USE = 0.05  # share of a GPU's memory that other processes may hold
SLOW_GPU = 0.8  # of the median rate
SLOW_NETWORK = 10 * GB  # bytes/s; NVLink and InfiniBand give several times as much
SLOW_SAVE = 300.0  # seconds in which training waits
SMALL_SHM = 1 * GB

Level = Literal["ok", "warn", "FAIL"]


class Finding(NamedTuple):
    """Result of one check, as one line."""

    level: Level
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<5}{self.subject:<12}{self.text}"


def _judge(subject: str, text: str, level: Level, wrong: bool, fix: str) -> Finding:
    """Return a finding of ``level``, with the fix at its end, if something is ``wrong``."""
    return Finding(level, subject, text + fix) if wrong else Finding("ok", subject, text)


def layout(config: RunConfig, ranks: int, ranks_on_node: int) -> Finding:
    """Return the layout of the run on its ranks; raise UserError if it does not fit them."""
    micro_batches, size = schedule_on(config, ranks).at(0)
    parallel = config.parallel
    text = (
        f"{ranks} ranks: {ranks // parallel.model_ranks} replicas of tensor {parallel.tensor} x pipeline "
        f"{parallel.pipeline} x context {parallel.context}; the first step has {size} samples in {micro_batches} "
        f"micro-batches of {config.data.micro_batch_size} on each"
    )
    fix = f"; parallel.tensor should divide the {ranks_on_node} ranks of a node, or its messages cross the slow network"
    return _judge("layout", text, "warn", ranks_on_node % parallel.tensor != 0, fix)


def enough_gpus(ranks_on_node: int, visible: int) -> Finding:
    """Compare the GPUs of a node with its ranks."""
    text = f"{ranks_on_node} ranks on this node, {visible} GPUs"
    fix = "; start as many ranks as there are GPUs (--nproc-per-node, --gpus-per-node)"
    return _judge("gpus", text, "FAIL", visible < ranks_on_node, fix)


def open_files(needed: int, limit: int) -> Finding:
    """Compare the files that a rank may have open with those that it needs: nearly all are connections to others."""
    text = f"a rank may have {limit:,} open, and needs at most {needed:,}"
    fix = f"; raise the hard limit (ulimit -Hn, limits.conf, LimitNOFILE of slurmd) to at least {needed}"
    return _judge("files", text, "FAIL", limit < needed, fix)


def no_gpu(driver: str, built_for: str) -> Finding:
    """Judge ranks without a GPU: on purpose, or with a driver that torch cannot use.

    Args:
        driver: the system's description of an NVIDIA driver; empty without a driver.
        built_for: torch's CUDA version; empty in a CPU build.
    """
    if not driver:
        return Finding("warn", "gpus", "none here: this run would train on the CPU")
    fix = "this is torch's CPU build; install the CUDA build"
    if built_for:
        fix = f"torch is built for CUDA {built_for}; take a newer driver or an older torch"
    return Finding("FAIL", "gpus", f"there is a driver ({driver}), but torch sees no GPU; {fix}")


def gpus(ranks: Sequence[RankInfo], formats: Sequence[str]) -> Finding:
    """Check model, free memory, compute capability and driver of every rank's GPU."""
    models = Counter(info.device.name for info in ranks)
    text = ", ".join(f"{count} x {model}" for model, count in models.items())
    for info in ranks:
        device, where = info.device, f"rank {info.rank} on {info.node}"
        for name in formats:
            if device.capability < CAPABILITY[name]:
                have, need = (".".join(map(str, pair)) for pair in (device.capability, CAPABILITY[name]))
                fault = f"{where}: {device.name} has compute capability {have}, {name} needs {need}"
                return Finding("FAIL", "gpus", fault)
        used = 1 - device.free_bytes / device.total_bytes
        if used > GPU_MEMORY_IN_USE:
            fault = f"{where}: {used:.0%} of the memory of {device.name} is in use"
            return Finding("FAIL", "gpus", f"{fault}; end what runs there (nvidia-smi), or drain the node")
        if _version(device.driver_for) < _version(device.built_for):
            fault = f"{where}: the driver is made for CUDA {device.driver_for}, torch for {device.built_for}"
            return Finding("warn", "gpus", f"{fault}; kernels that are compiled at run time may fail")
    if len(models) > 1:
        return Finding("warn", "gpus", f"{text}; the slowest sets the pace of all")
    smallest = min(info.device.total_bytes for info in ranks)
    return Finding("ok", "gpus", f"{text}, {smallest / GB:.0f} GB each, driver for CUDA {ranks[0].device.driver_for}")


def engine(asked: EngineConfig, faults: Sequence[str]) -> Finding:
    """Report the first of the ranks' ``faults``; a rank that has the backend and recipe asked for has an empty one."""
    if fault := next((f"rank {rank}: {fault}" for rank, fault in enumerate(faults) if fault), None):
        return Finding("FAIL", "engine", fault)
    return Finding("ok", "engine", f"{asked.transformer_impl}, fp8 {asked.fp8 or 'none'}")


def gradients(config: RunConfig, fused: bool) -> Finding:
    """Report where the gradients of a looped weight are summed.

    Autograd sums the uses of a weight in its own dtype before Megatron adds them to an fp32 buffer, unless each loop
    has a backward pass of its own, as under recomputation of layers or loops and in a pipeline. The relative error of
    bf16 weights' gradients then grows from 0.17 % to 0.32 % at 4 loops and 0.40 % at 8.

    Args:
        config: of the run.
        fused: True if Apex's kernel adds each use to the buffer by itself.
    """
    layout, loops = config.parallel, config.model.num_loops
    fp32 = config.optim.precision == "fp32" or layout.accumulate_fp32
    at_once = layout.pipeline == 1 and layout.recompute in ("none", "selective") and not config.loss.frozen_trunk
    coarse = fp32 and config.optim.precision == "bf16" and at_once and loops > 1 and not fused
    fix = f"; but a weight's over the {loops} loops in bf16: take parallel.recompute=loop, or install Apex's kernels"
    return _judge("gradients", f"summed in {'fp32' if fp32 else 'bf16'}", "warn", coarse, fix)


def software(ranks: Sequence[RankInfo]) -> Finding:
    """Compare the versions of all ranks."""
    common, _ = Counter(info.versions for info in ranks).most_common(1)[0]
    other = next((info for info in ranks if info.versions != common), None)
    if other is None:
        return Finding("ok", "software", common)
    return Finding("FAIL", "software", f"rank {other.rank} on {other.node} has {other.versions}; others have {common}")


def speed(ranks: Sequence[RankInfo]) -> Finding:
    """Compare the devices: a slow one delays every other, in every step."""
    usual = median(info.flops for info in ranks)
    slowest = min(ranks, key=lambda info: info.flops)
    share = slowest.flops / usual
    text = f"a matrix product at {usual / 1e12:.2f} TFLOP/s, the slowest of {len(ranks)} ranks at {share:.0%} of it"
    fix = f": rank {slowest.rank} on {slowest.node}; look for heat, power caps and other jobs there"
    return _judge("speed", text, "warn", share < SLOW_GPU, fix)


def clocks(ranks: Sequence[RankInfo]) -> Finding:
    """Compare the clocks: if they differ, logs are out of order and comparisons of file times fail."""
    middle = median(info.clock for info in ranks)
    worst = max(ranks, key=lambda info: abs(info.clock - middle))
    apart = abs(worst.clock - middle)
    fix = f": rank {worst.rank} on {worst.node}; let its clock be set (chronyc tracking)"
    level: Level = "warn" if apart < CLOCK_FAIL else "FAIL"
    return _judge("clocks", f"at most {apart:.3f} s from the median", level, apart >= CLOCK_WARN, fix)


def sums(wrong: Sequence[str], fault: str = "") -> Finding:
    """Judge the all-reduces: ``wrong`` names groups with a wrong sum, ``fault`` is the error that ended them."""
    if fault:
        return Finding("FAIL", "all-reduce", f"failed: {fault}; NCCL_DEBUG=INFO reports the network that it uses")
    if wrong:
        text = f"wrong sums in the groups {', '.join(wrong)}"
        fix = "a link, a GPU or NCCL is broken: take nodes out until the sums are right"
        return Finding("FAIL", "all-reduce", f"{text}; {fix}")
    return Finding("ok", "all-reduce", "right in every group: all, tensor, pipeline, context, data")


def network(speed: float, ranks: int, nodes: int, on_gpu: bool) -> Finding:
    """Judge the speed of an all-reduce over all ranks, in bytes/s."""
    if ranks == 1:
        return Finding("ok", "network", "not used by a single rank")
    text = f"all-reduce over {ranks} ranks (nodes: {nodes}): {speed / GB:.1f} GB/s"
    limit = f"{SLOW_NETWORK / GB:.0f}"
    fix = f"; NVLink and InfiniBand give more than {limit}: NCCL_DEBUG=INFO shows NET/Socket if it found no InfiniBand"
    return _judge("network", text, "warn", on_gpu and speed < SLOW_NETWORK, fix)


def environment(tensor: int, capability: tuple[int, int], connections: str | None) -> Finding:
    """Check CUDA_DEVICE_MAX_CONNECTIONS, which decides on the overlap of tensor parallelism before Blackwell."""
    text = f"CUDA_DEVICE_MAX_CONNECTIONS={connections or 'unset'}"
    wrong = tensor > 1 and (0, 0) < capability < (10, 0) and connections != "1"
    fix = f"; set it to 1, or parallel.tensor={tensor} does not overlap its messages"
    return _judge("environment", text, "warn", wrong, fix)


def same_data(fingerprints: Mapping[str, str]) -> Finding:
    """Compare the data's fingerprints, by node."""
    common, _ = Counter(fingerprints.values()).most_common(1)[0]
    if other := next((node for node, fingerprint in fingerprints.items() if fingerprint != common), None):
        fix = "put it on a file system that all share"
        return Finding("FAIL", "data", f"{other} sees other data than the other nodes; {fix}")
    text = f"complete, fingerprint {common[:16]}, on {len(fingerprints)} nodes"
    return Finding("ok", "data", f"{text}; data_pipeline.verify --deep reads every byte")


def passes(needed: Mapping[str, float], held: Mapping[str, int]) -> Finding:
    """Judge how often the run, with the stages that it reads on from, reads each source's tokens."""
    times = {prefix: needed[prefix] / held[prefix] for prefix in needed}
    most = max(times, key=lambda prefix: times[prefix])
    totals = f"{sum(needed.values()) / GB:,.4g} billion tokens to train on, {sum(held.values()) / GB:,.4g} there"
    text = f"{totals}; {most} is read {times[most]:.2f} times"
    return _judge("mix", text, "warn", times[most] > MANY_PASSES, "; add data or lower its weight")


def made_while_training(needed: int) -> Finding:
    """Report the tokens of a synthetic task: every sample is new."""
    return Finding("ok", "mix", f"{needed / GB:,.4g} billion tokens to train on, made while training")


def disk(free: int, checkpoint: int, keep: int, kept: int) -> Finding:
    """Check the room for the checkpoints that stay, and for one more, which is written before the oldest is deleted.

    Args:
        free: bytes.
        checkpoint: bytes of one checkpoint.
        keep: number of checkpoints that stay.
        kept: number that exist already.
    """
    needed = checkpoint * max(1, keep + 1 - kept)
    sizes = f"{keep} + 1 checkpoints of {checkpoint / GB:,.2f} GB, {kept} there, need {needed / GB:,.1f}"
    text = f"{free / GB:,.1f} GB free; {sizes}"
    if free < needed:
        return Finding("FAIL", "disk", f"{text}; make room, lower checkpoint.keep, or move output_dir")
    return Finding("ok", "disk", f"{text} (a quota is not detected)")


def saving(speed: WriteSpeed, checkpoint: int, every: int, in_background: bool) -> Finding:
    """Judge how long a checkpoint of so many bytes takes. Each rank hashes its files while it writes them.

    Args:
        speed: of writing and hashing.
        checkpoint: bytes.
        every: steps between checkpoints; 0 saves at the end only.
        in_background: True if training continues meanwhile.
    """
    if speed.fault:
        return Finding("FAIL", "saving", f"{speed.fault}; let this user write there, or move output_dir")
    seconds = checkpoint / min(speed.writing, speed.writers * speed.hashing)
    speeds = f"{speed.writing / GB:.2f} GB/s from {speed.writers} ranks, each hashes {speed.hashing / GB:.2f} GB/s"
    when = f"every {every} steps" if every else "at the end"
    beside = "beside training" if in_background else "in which training waits"
    text = f"{speeds}: a save takes about {seconds:,.0f} s, {beside}, {when}"
    fix = "; set checkpoint.in_background, take a faster file system or a larger checkpoint.save_every"
    return _judge("saving", text, "warn", seconds > SLOW_SAVE and not in_background, fix)


def memory(ranks: Sequence[RankInfo], needs: HostMemory, writers: int, rolls_back: bool) -> Finding:
    """Check the main memory for a save, by the writers of a node, and for a resume, by all of its ranks.

    Args:
        ranks: all of them.
        needs: of the run's checkpoints.
        writers: ranks that write a checkpoint.
        rolls_back: True if the run may load a checkpoint after it has saved one.
    """
    least = min(ranks, key=lambda info: info.ram_bytes)
    ranks_on_node = max(Counter(info.node for info in ranks).values())
    share = min(writers, ranks_on_node) / writers
    saving = share * needs.saving
    loading = ranks_on_node * needs.loading + rolls_back * share * needs.staying
    name = "rollback" if rolls_back else "resume"
    takes = f"a save takes {saving / GB:.2f} of a node, a {name} {loading / GB:.2f}"
    text = f"at least {least.ram_bytes / GB:.1f} GB free on every node; {takes}"
    fix = f": too little on {least.node}; ask for all of the node's memory (--mem=0, --exclusive)"
    return _judge("memory", text, "FAIL", least.ram_bytes < max(saving, loading), fix)


def shared_memory(ranks: Sequence[RankInfo]) -> Finding:
    """Check /dev/shm, which the ranks of a node and data workers share; it may be tiny in a container."""
    least = min(ranks, key=lambda info: info.shm_bytes)
    text = f"at least {least.shm_bytes / GB:.1f} GB of /dev/shm"
    fix = f", on {least.node}; in Docker give --ipc=host"
    return _judge("shm", text, "warn", least.shm_bytes < SMALL_SHM, fix)


def _version(text: str) -> tuple[int, ...]:
    """Return "13.1" as (13, 1)."""
    return tuple(int(part) for part in text.split(".") if part)
