"""What a preflight makes of what it measured: pure functions from figures to one line each.

Every line has the figure, and where something is wrong the fix. The limits stand here and nowhere else.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Literal, NamedTuple

from looplm.config import EngineConfig, RunConfig
from pretrain.cluster.probes import Place, Writing
from pretrain.data import schedule_on

GB = 10**9
# Compute capability from which a GPU multiplies in a format.
CAPABILITY = {"fp32": (0, 0), "bf16": (8, 0)}
CLOCKS_APART = (1.0, 60.0)  # seconds: of note, and wrong
BUSY = 0.05  # share of a GPU's memory that others may hold
SLOW_GPU = 0.8  # of the median rate
SLOW_NETWORK = 10 * GB  # bytes/s; NVLink and InfiniBand give several times as much
SLOW_SAVE = 300.0  # seconds
SMALL_SHM = 1 * GB
MANY_PASSES = 4.0  # over the same text: further ones teach little (Muennighoff et al., arXiv 2305.16264)


class Verdict(NamedTuple):
    """One line: how bad, about what, and the figure."""

    level: Literal["ok", "warn", "FAIL"]
    about: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<5}{self.about:<12}{self.text}"


def layout(config: RunConfig, ranks: int, ranks_on_node: int) -> Verdict:
    """How the run lies on its ranks; raises the UserError of a layout that does not fit them."""
    micro_batches, size = schedule_on(config, ranks).at(0)
    parallel = config.parallel
    text = (
        f"{ranks} ranks: {ranks // parallel.model_ranks} replicas of tensor {parallel.tensor} x pipeline "
        f"{parallel.pipeline} x context {parallel.context}; the first step has {size} samples in {micro_batches} "
        f"micro-batches of {config.data.micro_batch_size} on each"
    )
    if ranks_on_node % parallel.tensor:
        return Verdict("warn", "layout", f"{text}; parallel.tensor should divide the {ranks_on_node} ranks of a node, or its messages cross the slow network")  # fmt: skip
    return Verdict("ok", "layout", text)


def enough_gpus(ranks_on_node: int, visible: int) -> Verdict:
    """A GPU for each rank."""
    text = f"{ranks_on_node} ranks on this node, {visible} GPUs"
    if visible < ranks_on_node:
        return Verdict("FAIL", "gpus", f"{text}; start as many ranks as there are GPUs (--nproc-per-node, --gpus-per-node)")  # fmt: skip
    return Verdict("ok", "gpus", text)


def no_gpu(driver: str, built_for: str) -> Verdict:
    """No rank has a GPU: meant so, or a driver that torch cannot use.

    Args:
        driver: what the system says of an NVIDIA driver; empty without one.
        built_for: the CUDA version of torch; empty in a CPU build.
    """
    if not driver:
        return Verdict("warn", "gpus", "none here: this run would train on the CPU")
    fix = f"torch is built for CUDA {built_for}; take a newer driver or an older torch" if built_for else "this is torch's CPU build; install the CUDA build"  # fmt: skip
    return Verdict("FAIL", "gpus", f"there is a driver ({driver}), but torch sees no GPU; {fix}")


def gpus(places: Sequence[Place], formats: Sequence[str]) -> Verdict:
    """Kind, memory and capability of every rank's GPU."""
    kinds = Counter(place.device.name for place in places)
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    for place in places:
        device, where = place.device, f"rank {place.rank} on {place.node}"
        for name in formats:
            if device.capability < CAPABILITY[name]:
                have, need = (".".join(map(str, pair)) for pair in (device.capability, CAPABILITY[name]))
                return Verdict("FAIL", "gpus", f"{where}: {device.name} has compute capability {have}, {name} needs {need}")  # fmt: skip
        used = 1 - device.free_bytes / device.total_bytes
        if used > BUSY:
            return Verdict("FAIL", "gpus", f"{where}: {used:.0%} of the memory of {device.name} is taken; end what runs there (nvidia-smi), or drain the node")  # fmt: skip
        if _version(device.driver_for) < _version(device.built_for):
            return Verdict("warn", "gpus", f"{where}: the driver is made for CUDA {device.driver_for}, torch for {device.built_for}; kernels that are compiled while running may fail")  # fmt: skip
    if len(kinds) > 1:
        return Verdict("warn", "gpus", f"{text}; the slowest sets the pace of all")
    smallest = min(place.device.total_bytes for place in places)
    return Verdict("ok", "gpus", f"{text}, {smallest / GB:.0f} GB each, driver for CUDA {places[0].device.driver_for}")


def engine(asked: EngineConfig, faults: Sequence[str]) -> Verdict:
    """Whether every rank has what the blocks are to be made of.

    Args:
        asked: for.
        faults: of each rank; empty where it has it.
    """
    for rank, fault in enumerate(faults):
        if fault:
            return Verdict("FAIL", "engine", f"rank {rank}: {fault}")
    return Verdict("ok", "engine", f"{asked.transformer_impl}, fp8 {asked.fp8 or 'none'}")


def software(places: Sequence[Place]) -> Verdict:
    """The same versions on all ranks."""
    common, _ = Counter(place.versions for place in places).most_common(1)[0]
    for place in places:
        if place.versions != common:
            return Verdict("FAIL", "software", f"rank {place.rank} on {place.node} has {place.versions}; others have {common}")  # fmt: skip
    return Verdict("ok", "software", common)


def speed(places: Sequence[Place]) -> Verdict:
    """A slow device holds up every other, in every step."""
    usual = median(place.flops for place in places)
    slowest = min(places, key=lambda place: place.flops)
    text = f"a matrix product at {usual / 1e12:.2f} TFLOP/s, the slowest of {len(places)} ranks at {slowest.flops / usual:.0%} of it"  # fmt: skip
    if slowest.flops < SLOW_GPU * usual:
        return Verdict("warn", "speed", f"{text}: rank {slowest.rank} on {slowest.node}; look for heat, power caps and other jobs there")  # fmt: skip
    return Verdict("ok", "speed", text)


def clocks(places: Sequence[Place]) -> Verdict:
    """Clocks apart put logs in the wrong order, and break what compares times of files."""
    middle = median(place.clock for place in places)
    worst = max(places, key=lambda place: abs(place.clock - middle))
    apart = abs(worst.clock - middle)
    text = f"at most {apart:.3f} s from the median"
    level: Literal["ok", "warn", "FAIL"] = "ok" if apart < CLOCKS_APART[0] else "warn" if apart < CLOCKS_APART[1] else "FAIL"  # fmt: skip
    fix = "" if level == "ok" else f": rank {worst.rank} on {worst.node}; let its clock be set (chronyc tracking)"
    return Verdict(level, "clocks", text + fix)


def sums(wrong: Sequence[str], fault: str = "") -> Verdict:
    """Whether all-reduces gave what they should.

    Args:
        wrong: groups with a wrong sum.
        fault: what stopped them, if something did.
    """
    if fault:
        return Verdict("FAIL", "all-reduce", f"failed: {fault}; NCCL_DEBUG=INFO says which network it took")
    if wrong:
        return Verdict("FAIL", "all-reduce", f"wrong sums in the groups {', '.join(wrong)}; a link, a GPU or NCCL is broken: take nodes out until it is right")  # fmt: skip
    return Verdict("ok", "all-reduce", "right in every group: all, tensor, pipeline, context, data")


def network(speed: float, ranks: int, nodes: int, on_gpu: bool) -> Verdict:
    """Speed of an all-reduce over all ranks, in bytes/s."""
    if ranks == 1:
        return Verdict("ok", "network", "a single rank has none")
    text = f"all-reduce over {ranks} ranks (nodes: {nodes}): {speed / GB:.1f} GB/s"
    if on_gpu and speed < SLOW_NETWORK:
        return Verdict("warn", "network", f"{text}; NVLink and InfiniBand give more than {SLOW_NETWORK / GB:.0f}: NCCL_DEBUG=INFO says NET/Socket where it found no InfiniBand")  # fmt: skip
    return Verdict("ok", "network", text)


def environment(tensor: int, capability: tuple[int, int], connections: str | None) -> Verdict:
    """CUDA_DEVICE_MAX_CONNECTIONS, on which the overlap of tensor parallelism hangs before Blackwell."""
    text = f"CUDA_DEVICE_MAX_CONNECTIONS={connections or 'unset'}"
    if tensor > 1 and (0, 0) < capability < (10, 0) and connections != "1":
        return Verdict("warn", "environment", f"{text}; set it to 1, or parallel.tensor={tensor} does not overlap its messages")  # fmt: skip
    return Verdict("ok", "environment", text)


def same_data(fingerprints: Mapping[str, str]) -> Verdict:
    """Every node must see the same data; by node."""
    common, _ = Counter(fingerprints.values()).most_common(1)[0]
    for node, fingerprint in fingerprints.items():
        if fingerprint != common:
            return Verdict("FAIL", "data", f"{node} sees other data than the other nodes; put it on a file system that all share")  # fmt: skip
    return Verdict("ok", "data", f"whole, fingerprint {common[:16]}, on {len(fingerprints)} nodes; data_pipeline.verify --deep reads every byte")  # fmt: skip


def passes(needed: Mapping[str, float], held: Mapping[str, int]) -> Verdict:
    """How often the run goes over each source's tokens."""
    times = {prefix: needed[prefix] / held[prefix] for prefix in needed}
    most = max(times, key=lambda prefix: times[prefix])
    text = f"{sum(needed.values()) / GB:,.4g} billion tokens to train on, {sum(held.values()) / GB:,.4g} there; {most} is read {times[most]:.2f} times"  # fmt: skip
    if times[most] > MANY_PASSES:
        return Verdict("warn", "mix", f"{text}; add data or lower its weight")
    return Verdict("ok", "mix", text)


def disk(free: int, checkpoint: int, keep: int, kept: int) -> Verdict:
    """Room for the checkpoints that stay, and for one more that is written before the oldest goes.

    Args:
        free: bytes.
        checkpoint: bytes of one.
        keep: how many stay.
        kept: how many are there already.
    """
    needed = checkpoint * max(1, keep + 1 - kept)
    text = f"{free / GB:,.1f} GB free; {keep} + 1 checkpoints of {checkpoint / GB:,.2f} GB, {kept} there, need {needed / GB:,.1f}"  # fmt: skip
    if free < needed:
        return Verdict("FAIL", "disk", f"{text}; make room, lower checkpoint.keep, or move output_dir")
    return Verdict("ok", "disk", f"{text} (a quota is not seen)")


def saving(writing: Writing, checkpoint: int, every: int) -> Verdict:
    """How long the run stands still for a checkpoint of so many bytes."""
    if writing.fault:
        return Verdict("FAIL", "saving", f"{writing.fault}; let this user write there, or move output_dir")
    seconds = checkpoint / writing.speed + checkpoint / writing.hashing
    when = f"every {every} steps" if every else "at the end"
    text = f"{writing.speed / GB:.2f} GB/s from {writing.writers} ranks, hashed at {writing.hashing / GB:.2f}: about {seconds:,.0f} s for a checkpoint, {when}"  # fmt: skip
    if seconds > SLOW_SAVE:
        return Verdict("warn", "saving", f"{text}; take a faster file system or a larger checkpoint.save_every")
    return Verdict("ok", "saving", text)


def memory(places: Sequence[Place], checkpoint: int, writers: int) -> Verdict:
    """Main memory for what is gathered on a node while a checkpoint is written: its writers' share."""
    least = min(places, key=lambda place: place.ram_bytes)
    ranks_on_node = max(Counter(place.node for place in places).values())
    needed = checkpoint * min(writers, ranks_on_node) // writers
    text = f"at least {least.ram_bytes / GB:.1f} GB free on every node; a checkpoint takes {needed / GB:.2f} of a node"
    if least.ram_bytes < needed:
        return Verdict("FAIL", "memory", f"{text}: too little on {least.node}; ask for all of the node's (--mem=0, --exclusive)")  # fmt: skip
    return Verdict("ok", "memory", text)


def shared_memory(places: Sequence[Place]) -> Verdict:
    """/dev/shm, through which ranks of a node and data workers hand things on; a container may have next to none."""
    least = min(places, key=lambda place: place.shm_bytes)
    text = f"at least {least.shm_bytes / GB:.1f} GB of /dev/shm"
    if least.shm_bytes < SMALL_SHM:
        return Verdict("warn", "shm", f"{text}, on {least.node}; in Docker give --ipc=host")
    return Verdict("ok", "shm", text)


def _version(text: str) -> tuple[int, ...]:
    """13.1 → (13, 1)"""
    return tuple(int(part) for part in text.split(".") if part)
