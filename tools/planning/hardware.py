"""GPUs and networks, from their makers' data sheets: dense peaks, memory as torch sees it, bandwidths in one direction."""

from dataclasses import dataclass
from typing import Literal

from looplm.cli import require
from looplm.megatron.device import BF16_TFLOPS

GpuName = Literal["a100-40", "a100-80", "h100", "h200", "b200"]
NetworkName = Literal["eth-100", "ib-100", "ib-200", "ib-400", "ib-800"]

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device.

    Args:
        memory_gib: that a process can allocate from, in GiB; the data sheet's gigabytes less what the driver keeps.
        bf16_tflops: dense matrix products.
        fp8_tflops: the same; 0 where the device has no FP8.
        hbm_gbs: memory bandwidth, in gigabytes a second.
        nvlink_gbs: to the other GPUs of its node, in gigabytes a second in each direction.
    """

    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float
    hbm_gbs: float
    nvlink_gbs: float


# The SXM boards; sparse peaks, which the sheets print first, are twice these.
GPUS: dict[GpuName, Gpu] = {
    "a100-40": Gpu(memory_gib=39.4, bf16_tflops=BF16_TFLOPS["A100"], fp8_tflops=0, hbm_gbs=1555, nvlink_gbs=300),
    "a100-80": Gpu(memory_gib=79.1, bf16_tflops=BF16_TFLOPS["A100"], fp8_tflops=0, hbm_gbs=2039, nvlink_gbs=300),
    "h100": Gpu(memory_gib=79.1, bf16_tflops=BF16_TFLOPS["H100"], fp8_tflops=1979, hbm_gbs=3350, nvlink_gbs=450),
    "h200": Gpu(memory_gib=139.8, bf16_tflops=BF16_TFLOPS["H200"], fp8_tflops=1979, hbm_gbs=4800, nvlink_gbs=450),
    "b200": Gpu(memory_gib=178.4, bf16_tflops=BF16_TFLOPS["B200"], fp8_tflops=4500, hbm_gbs=7700, nvlink_gbs=900),
}

# Gigabytes a second and GPU, each direction: one adapter of that many gigabits for every GPU; eth-100 is one for a node of
# eight, as on machines that were not bought for training.
NETWORKS: dict[NetworkName, float] = {"eth-100": 12.5 / 8, "ib-100": 12.5, "ib-200": 25, "ib-400": 50, "ib-800": 100}
LATENCY_S = 20e-6  # of a collective operation or a message, whatever its size
ADAM_BYTES = 64  # of memory traffic per main weight: torch's AdamW reads and writes its four fp32 arrays several times
LOGIT_BYTES = 16  # of memory traffic per logit in forward; twice that in backward


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What arithmetic cannot know; measure yours and set it.

    Args:
        matmul: share of the dense peak that large matrix products reach.
        attention: share of the dense bf16 peak that fused attention reaches, forward and backward together.
        links: share of a link's bandwidth that collective operations reach.
        traffic: memory traffic of everything that is no matrix product (norms, rotary embedding, activation function,
            residual adds, casts), in units of the bytes that a layer saves for backward; a third of it in forward.
        margin: share of the memory left free: fragmentation, communication buffers, CUDA's context.
    """

    matmul: float = 0.65
    attention: float = 0.4
    links: float = 0.75
    traffic: float = 6.0
    margin: float = 0.1

    def __post_init__(self) -> None:
        for key in ("matmul", "attention", "links"):
            value = getattr(self, key)
            require(0 < value <= 1, f"assume.{key}", value, "it is a share; give a number above 0, at most 1")
        require(self.traffic >= 0, "assume.traffic", self.traffic, "give a number of at least 0")
        require(0 <= self.margin < 1, "assume.margin", self.margin, "it is a share; give a number from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    gpu: Gpu
    gpus: int
    node: int
    network_gbs: float
    fp8: bool
    assume: Assumptions

    @property
    def usable_bytes(self) -> float:
        """Of one GPU's memory."""
        return self.gpu.memory_gib * GIB * (1 - self.assume.margin)

    @property
    def traffic_bytes_per_s(self) -> float:
        """Of one GPU's memory."""
        return self.gpu.hbm_gbs * 1e9

    def link_bytes_per_s(self, ranks: int, stride: int) -> float:
        """What one rank of a collective operation moves in a second.

        A ring through several nodes is as fast as the adapters of all its members on a node together.

        Args:
            ranks: of the group.
            stride: ranks of the job between two neighbours of the group.
        """
        adapters = max(1, self.node // stride)
        across = ranks * stride > self.node
        gbs = min(self.gpu.nvlink_gbs, self.network_gbs * adapters) if across else self.gpu.nvlink_gbs
        return gbs * 1e9 * self.assume.links
