"""GPUs and networks from the vendors' data sheets: dense peaks, memory visible to torch, bandwidth in one direction."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from looplm.bounds import at_least, check_bounds, positive
from looplm.megatron.device import BF16_TFLOPS

GpuName = Literal["a100-40", "a100-80", "h100", "h200", "b200"]
NetworkName = Literal["eth-100", "ib-100", "ib-200", "ib-400", "ib-800"]

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device. Peaks are dense, in TFLOP/s; bandwidths are in gigabytes per second and direction."""

    memory_gib: float  # that a process can allocate, in GiB: the data sheet's gigabytes less what the driver keeps
    bf16_tflops: float
    fp8_tflops: float  # 0 if the device has no FP8
    hbm_gbs: float  # memory
    nvlink_gbs: float  # to the other GPUs of its node
    capability: tuple[int, int]  # compute capability: (9, 0) is Hopper


# The SXM boards; sparse peaks, which the sheets print first, are twice these.
_AMPERE = partial(Gpu, bf16_tflops=BF16_TFLOPS["A100"], fp8_tflops=0, nvlink_gbs=300, capability=(8, 0))
_HOPPER = partial(Gpu, bf16_tflops=BF16_TFLOPS["H100"], fp8_tflops=1979, nvlink_gbs=450, capability=(9, 0))
_BLACKWELL = partial(Gpu, bf16_tflops=BF16_TFLOPS["B200"], fp8_tflops=4500, nvlink_gbs=900, capability=(10, 0))
GPUS: dict[GpuName, Gpu] = {
    "a100-40": _AMPERE(memory_gib=39.4, hbm_gbs=1555),
    "a100-80": _AMPERE(memory_gib=79.1, hbm_gbs=2039),
    "h100": _HOPPER(memory_gib=79.1, hbm_gbs=3350),
    "h200": _HOPPER(memory_gib=139.8, hbm_gbs=4800),
    "b200": _BLACKWELL(memory_gib=178.4, hbm_gbs=7700),
}

# Gigabytes per second of an adapter in each direction. Every GPU has its own; in SHARED_NETWORK a node has one, as
# machines have that were not bought for training.
NETWORKS: dict[NetworkName, float] = {"eth-100": 12.5, "ib-100": 12.5, "ib-200": 25, "ib-400": 50, "ib-800": 100}
SHARED_NETWORK: NetworkName = "eth-100"
LATENCY_S = 20e-6  # of a collective operation or a message of any size
ADAM_BYTES = 64  # memory traffic per main weight: torch's AdamW reads and writes its four fp32 arrays several times
LOGIT_BYTES = 16  # memory traffic per logit for the losses: bf16 product, fp32 copy, log-probabilities
LOGIT_GRADIENT_BYTES = 10  # and for the gradients: log-probabilities read, bf16 gradient written and read twice


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Efficiencies that arithmetic cannot predict; measure yours and set them.

    Args:
        matmul: share of the dense peak that large matrix products reach.
        attention: share of the dense bf16 peak that fused attention reaches, forward and backward together.
        links: share of a link's bandwidth that collective operations reach.
        traffic: memory traffic of all operations other than matrix products (norms, rotary embedding, activation
            function, residual adds, casts), in units of the bytes that a layer writes and could save; a third of it
            is in forward.
        margin: share of the memory left free for fragmentation, communication buffers and CUDA's context.
    """

    matmul: float = positive(0.65, at_most=1)
    attention: float = positive(0.4, at_most=1)
    links: float = positive(0.75, at_most=1)
    traffic: float = at_least(0, 6.0)
    margin: float = at_least(0, 0.1, below=1)

    def __post_init__(self) -> None:
        check_bounds(self, "assume")


def is_legal_number(gpus: int, node: int) -> bool:
    """Return True if a cluster may have ``gpus`` GPUs: a part of one node, or whole nodes of ``node`` GPUs."""
    return gpus <= node or gpus % node == 0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    gpu: Gpu
    gpus: int  # in all
    node: int  # GPUs per node
    network_gbs: float  # between nodes, in gigabytes per second, GPU and direction
    fp8: bool  # the layers' matrix products run at the FP8 peak
    assume: Assumptions

    @property
    def usable_bytes(self) -> float:
        """Bytes of one GPU's memory less the margin."""
        return self.gpu.memory_gib * GIB * (1 - self.assume.margin)

    def link_bytes_per_s(self, ranks: int, stride: int) -> float:
        """Return the bytes per second that one rank moves in a collective operation.

        A ring that spans nodes is as fast as the adapters of all its members on one node together.

        Args:
            ranks: size of the group.
            stride: distance, in ranks of the job, between two neighbors of the group.
        """
        adapters = max(1, self.node // stride)
        across = ranks * stride > self.node
        gbs = min(self.gpu.nvlink_gbs, self.network_gbs * adapters) if across else self.gpu.nvlink_gbs
        return gbs * 1e9 * self.assume.links
