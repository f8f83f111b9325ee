"""The device of this process. With :mod:`looplm.megatron.patches` the only code that names ``torch.cuda``."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
HAS_TRANSFORMER_ENGINE = find_spec("transformer_engine") is not None
BACKEND = "cpu:gloo,cuda:nccl" if HAS_CUDA else "gloo"

# Dense bf16 peak in TFLOP/s, from the makers' data sheets; matched against the device's name.
BF16_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
}


@contextmanager
def adapter_off() -> Iterator[None]:
    """For code that calls torch alone and often, such as decoding: the adapter looks at every call, which costs time."""
    with torch._C.DisableTorchFunction():
        yield


def rng_state() -> dict[str, torch.Tensor]:
    """The state of this process's random number generators."""
    states = {"cpu": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state()} if HAS_CUDA else states


def set_rng_state(states: dict[str, torch.Tensor]) -> None:
    """Inverse of :func:`rng_state`."""
    torch.set_rng_state(states["cpu"])
    if HAS_CUDA and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


@dataclass(frozen=True)
class Description:
    """What a process computes on.

    Args:
        name: of the GPU, or "CPU".
        total_bytes: of its memory; 0 on a CPU.
        free_bytes: of them, that no process uses.
        capability: compute capability, (9, 0) for Hopper; (0, 0) on a CPU.
        built_for: the CUDA version that torch was built for; empty in a CPU build.
        driver_for: the newest CUDA version that the driver knows; empty without one.
    """

    name: str = "CPU"
    total_bytes: int = 0
    free_bytes: int = 0
    capability: tuple[int, int] = (0, 0)
    built_for: str = ""
    driver_for: str = ""


def describe() -> Description:
    """The device of this process."""
    built_for = torch.version.cuda or ""
    if not HAS_CUDA:
        return Description(built_for=built_for)
    free, total = torch.cuda.mem_get_info()
    known = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # 13010 is 13.1
    driver_for = f"{known // 1000}.{known % 1000 // 10}"
    return Description(
        torch.cuda.get_device_name(), total, free, torch.cuda.get_device_capability(), built_for, driver_for
    )


def visible_gpus() -> int:
    """GPUs that this process could use; more ranks than that cannot share a node."""
    return torch.cuda.device_count() if HAS_CUDA else 0


def bind_local_rank(local_rank: int) -> None:
    """Let this process use the node's GPU number ``local_rank``."""
    if HAS_CUDA:
        torch.cuda.set_device(local_rank)


def synchronize() -> None:
    """Wait for the device, so that a clock read next is true."""
    if HAS_CUDA:
        torch.cuda.synchronize()


def compute_capability() -> tuple[int, int]:
    """Of this process's GPU, as NVIDIA counts: (9, 0) is Hopper; (0, 0) without one."""
    return torch.cuda.get_device_capability() if HAS_CUDA else (0, 0)


@cache
def peak_flops() -> float:
    """FLOP/s of one device: the data sheet's bf16 figure for a known GPU, else the measured fp32 matmul rate.

    Returns 0.0 for a GPU that is not in the table: utilisation is then left out rather than guessed.
    """
    if HAS_CUDA:
        name = torch.cuda.get_device_name()
        return next((1e12 * tflops for model, tflops in BF16_TFLOPS.items() if model in name), 0.0)
    return matmul_flops(1024)


def matmul_flops(size: int, dtype: torch.dtype = torch.float32, repeats: int = 8) -> float:
    """Best measured FLOP/s of a square matrix product on this device, laid out as a linear layer's."""
    a = torch.ones(size, size, device=DEVICE, dtype=dtype)  # draws no random number: ranks must stay in step
    best = float("inf")
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        torch.mm(a, a.t())
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
