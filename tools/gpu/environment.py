"""The machine and its software: what a record must say so that its figures mean something elsewhere."""

import os
import platform
import re
import shutil
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from looplm import checkpoint
from looplm.megatron import device
from tools.gpu.parts import Job
from tools.gpu.recipes import check_device
from tools.gpu.record import Row, Rows, Value
from tools.machine import processor

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "apex", "triton", "numpy", "tokenizers")
DRIVER = Path("/proc/driver/nvidia/version")
GIB = 2**30


def run(job: Job) -> None:
    """Describe device, software and host, and measure matrix products and copies."""
    check_device(job.device)
    rows, size = Rows(job.rows, job.deadline), 8192 if device.HAS_CUDA else 256
    rows.measure("device", describe_device)
    rows.measure("software", describe_software)
    rows.measure("host", describe_host)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        rows.measure(f"matrix product, {name}", partial(_product, size, dtype))
    rows.measure("copy on the device", lambda: _copy(GIB if device.HAS_CUDA else GIB // 64))
    rows.add(Row(name="peak", values={"bf16 TFLOP/s": _peak()}))


def describe_device() -> dict[str, Value]:
    """Return name, memory and capability of the device, and the CUDA versions of torch and of the driver."""
    found = device.describe()
    return {
        "name": found.name if device.HAS_CUDA else processor(),
        "memory GiB": round(found.total_bytes / GIB, 1),
        "free GiB": round(found.free_bytes / GIB, 1),
        "capability": ".".join(map(str, found.capability)),
        "driver": driver_version(DRIVER.read_text() if DRIVER.exists() else ""),
        "driver's CUDA": found.driver_for,
        "torch's CUDA": found.built_for,
        "visible GPUs": device.visible_gpus(),
    }


def driver_version(text: str) -> str:
    """Return the version in the text of /proc/driver/nvidia/version; "unknown" if it has none."""
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else "unknown"


def describe_software() -> dict[str, Value]:
    """Return the versions of the packages that the figures depend on, and of this code."""
    found: dict[str, Value] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return {**found, **device.library_versions(), "revision": code_revision()}


def code_revision() -> str:
    """Return the revision of this code: of its git checkout, or the one that `make gpu-bundle` noted."""
    noted = ROOT / "REVISION"
    return noted.read_text().strip() if noted.exists() else checkpoint.git_revision() or "unknown"


def describe_host() -> dict[str, Value]:
    """Return the host's system, processor and memory; its name is no one's business."""
    memory = psutil.virtual_memory()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory GiB": round(memory.total / GIB, 1),
        "threads": torch.get_num_threads(),
        "C compiler": Path(shutil.which("cc") or shutil.which("gcc") or "none").name,  # for torch.compile on a GPU
    }


def _product(size: int, dtype: torch.dtype) -> dict[str, Value]:
    return {"TFLOP/s": round(device.matmul_flops(size, dtype) / 1e12, 3), "size": size}


def _copy(num_bytes: int, repeats: int = 5) -> dict[str, Value]:
    """Return the speed of copying on the device, with bytes read and written both counted."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device.DEVICE)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(repeats):
        device.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        device.synchronize()
        best = min(best, time.perf_counter() - start)
    return {"GB/s": round(2 * num_bytes / best / 1e9, 1)}


def _peak() -> Value:
    """Return the peak that utilization is measured against; None for a GPU that is not in the table."""
    return round(device.peak_flops() / 1e12, 3) or None
