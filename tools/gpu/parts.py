"""The parts of the check, in order of worth, each with its own time limit. Together they may take eight minutes.

The limits are for a machine that runs every part; :func:`stretched` shares the time of those that cannot run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Literal

DeviceName = Literal["cuda", "cpu"]
TOTAL_S = 480


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the check.

    Args:
        name: on the command line and in the record.
        title: what it measures.
        module: whose function ``run`` measures it, in a new process.
        limit_s: seconds after which that process is stopped.
        variant: passed to ``run``.
        environment: variables of its process.
        needs: packages without which it cannot run.
    """

    name: str
    title: str
    module: str
    limit_s: float
    variant: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Packages that it needs and that are not installed here."""
        return tuple(package for package in self.needs if find_spec(package) is None)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Instructions for a part's process.

    Args:
        part: name of the part.
        variant: of the part.
        device: where it must run.
        rows: file that its rows are appended to.
        folder: empty folder for files of its own.
        deadline: time.monotonic() after which no further measurement begins.
    """

    part: str
    variant: str
    device: DeviceName
    rows: Path
    folder: Path
    deadline: float = inf


_CUDNN = {"NVTE_FUSED_ATTN": "1", "NVTE_FLASH_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"}
_FLASH = {"NVTE_FUSED_ATTN": "0", "NVTE_FLASH_ATTN": "1", "NVTE_UNFUSED_ATTN": "0"}
_NVIDIA = ("transformer_engine",)

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part(name="environment", title="the machine and its software", module="tools.gpu.environment", limit_s=45),
        Part(
            name="parity",
            title="loss and every gradient against looplm/reference",
            module="tools.gpu.parity",
            variant="local",
            limit_s=115,
        ),
        Part(
            name="parity-te",
            title="the same with Transformer Engine",
            module="tools.gpu.parity",
            variant="transformer_engine",
            limit_s=35,
            needs=_NVIDIA,
        ),
        Part(
            name="resume",
            title="a run that is stopped and resumed against one that is not",
            module="tools.gpu.resume",
            limit_s=45,
            environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},  # cuBLAS is deterministic only with it
        ),
        Part(
            name="speed",
            title="training step of 0.3 B parameters: local",
            module="tools.gpu.speed",
            variant="local",
            limit_s=65,
        ),
        Part(
            name="speed-te",
            title="the same: Transformer Engine, cuDNN attention",
            module="tools.gpu.speed",
            variant="transformer_engine",
            limit_s=30,
            environment=_CUDNN,
            needs=_NVIDIA,
        ),
        Part(
            name="speed-flash",
            title="the same: Transformer Engine, flash-attn",
            module="tools.gpu.speed",
            variant="transformer_engine",
            limit_s=30,
            environment=_FLASH,
            needs=(*_NVIDIA, "flash_attn"),
        ),
        Part(
            name="speed-fp8",
            title="the same: Transformer Engine, FP8",
            module="tools.gpu.speed",
            variant="fp8",
            limit_s=30,
            environment=_CUDNN,
            needs=_NVIDIA,
        ),
        Part(
            name="decode",
            title="decoding by cache, exit threshold and batch",
            module="tools.gpu.decode",
            limit_s=50,
        ),
        Part(
            name="profile",
            title="kernels and gaps of a training step and of decoding",
            module="tools.gpu.profile",
            limit_s=35,
        ),
    )
}


def stretched(parts: Sequence[Part]) -> list[Part]:
    """Return the parts with the eight minutes divided among those that can run here, in proportion to their limits."""
    factor = TOTAL_S / sum(part.limit_s for part in parts if not part.missing)
    return [replace(part, limit_s=int(part.limit_s * factor)) for part in parts]
