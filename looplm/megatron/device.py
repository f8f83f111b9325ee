"""The device of this process. Only this module and :mod:`looplm.megatron.patches` use ``torch.cuda``."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from looplm.failures import Hang

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
HAS_TRANSFORMER_ENGINE = find_spec("transformer_engine") is not None
# Apex's extension, which adds a weight's gradient to its buffer in the matrix product itself.
HAS_FUSED_WEIGHT_GRADIENTS = find_spec("fused_weight_gradient_mlp_cuda") is not None
BACKEND = "cpu:gloo,cuda:nccl" if HAS_CUDA else "gloo"

# Dense bf16 peak in TFLOP/s from NVIDIA's data sheets, by a part of the device's name.
BF16_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
}


def rng_state() -> dict[str, torch.Tensor]:
    """Return the state of this process's random number generators."""
    states = {"cpu": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state()} if HAS_CUDA else states


def rng_state_of(seed: int) -> torch.Tensor:
    """Return the state that this device's random number generator has when it is seeded; it keeps its own."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if HAS_CUDA else []):
        torch.cuda.manual_seed(seed)
        return torch.cuda.get_rng_state()


def set_rng_state(states: dict[str, torch.Tensor]) -> None:
    """Restore a state that :func:`rng_state` returned."""
    torch.set_rng_state(states["cpu"])
    if HAS_CUDA and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


@dataclass(frozen=True)
class Description:
    """The device of a process.

    Args:
        name: the GPU's name, or "CPU".
        total_bytes: memory of the GPU; 0 on a CPU.
        free_bytes: memory that no process uses.
        capability: compute capability, (9, 0) for Hopper; (0, 0) on a CPU.
        built_for: the CUDA version that torch was built for; empty in a CPU build.
        driver_for: the newest CUDA version that the driver supports; empty without a driver.
    """

    name: str = "CPU"
    total_bytes: int = 0
    free_bytes: int = 0
    capability: tuple[int, int] = (0, 0)
    built_for: str = ""
    driver_for: str = ""


def describe() -> Description:
    """Return a description of the device of this process."""
    built_for = torch.version.cuda or ""
    if not HAS_CUDA:
        return Description(built_for=built_for)
    free, total = torch.cuda.mem_get_info()
    version = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # 13010 is 13.1
    driver_for = f"{version // 1000}.{version % 1000 // 10}"
    return Description(torch.cuda.get_device_name(), total, free, compute_capability(), built_for, driver_for)


def visible_gpus() -> int:
    """Return the number of GPUs that this process can use; a node cannot have more ranks."""
    return torch.cuda.device_count() if HAS_CUDA else 0


def bind_local_rank(local_rank: int) -> None:
    """Make the node's GPU number ``local_rank`` this process's device."""
    if HAS_CUDA:
        torch.cuda.set_device(local_rank)


def synchronize() -> None:
    """Wait until the device is idle, so that a clock read afterwards is right."""
    if HAS_CUDA:
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    """Restart :func:`peak_memory`, after giving back memory that is cached but not in use."""
    if HAS_CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Return the most bytes that this process has had in tensors on the GPU since the reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if HAS_CUDA else 0


def library_versions() -> dict[str, str]:
    """Return the versions of the GPU libraries that torch uses; nothing without a GPU."""
    if not HAS_CUDA:
        return {}
    return {"cuDNN": str(torch.backends.cudnn.version()), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}


def lost_gpu(error: Exception) -> Hang | None:
    """Return the failure of a GPU (a memory error, a lost link) that caused ``error``; None if something else did.

    A kernel's own fault, such as an illegal access, cannot be told from these. Memory that runs out is neither.
    """
    if not isinstance(error, torch.AcceleratorError):
        return None
    reason = str(error).partition("\n")[0]
    return Hang(f"the GPU has failed ({reason}); the run can be resumed, on another node if that repeats")


Stream = torch.cuda.Stream


def stream_from_now() -> Stream | None:
    """Return a stream of the GPU that begins after all work asked for so far; None without a GPU."""
    if not HAS_CUDA:
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """Run the calls inside on a stream of :func:`stream_from_now`, in any thread, and wait for them at the end."""
    if stream is None:
        yield
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):  # a new thread's device is the first one
        yield
        stream.synchronize()


def pin(buffer: torch.Tensor) -> None:
    """Let the GPU copy into host memory that is not torch's at full speed. Without a GPU, or if refused, do nothing."""
    if HAS_CUDA and buffer.numel():
        torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)


def unpin(buffer: torch.Tensor) -> None:
    """Undo :func:`pin`, before the memory is given back."""
    if HAS_CUDA and buffer.numel():
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


def compute_capability() -> tuple[int, int]:
    """Return the compute capability of this process's GPU: (9, 0) is Hopper; (0, 0) without a GPU."""
    return torch.cuda.get_device_capability() if HAS_CUDA else (0, 0)


@cache
def peak_flops() -> float:
    """Return the FLOP/s of one device: a known GPU's bf16 peak, or a CPU's measured fp32 matmul rate.

    An unknown GPU gives 0.0, for which metrics leave utilization out instead of guessing.
    """
    if HAS_CUDA:
        name = torch.cuda.get_device_name()
        return next((1e12 * tflops for model, tflops in BF16_TFLOPS.items() if model in name), 0.0)
    return matmul_flops(1024)


def matmul_flops(size: int, dtype: torch.dtype = torch.float32, repeats: int = 8) -> float:
    """Return the best measured FLOP/s of a square matrix product on this device, with a linear layer's strides."""
    a = torch.ones(
        size, size, device=DEVICE, dtype=dtype
    )  # no random numbers: all ranks' generators must stay in the same state
    best = float("inf")
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        torch.mm(a, a.t())
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
