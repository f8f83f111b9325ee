"""Check a machine with one NVIDIA GPU in at most eight minutes, without a network.

    python -m tools.gpu_check
    python -m tools.gpu_check --parts "[environment,parity]"
    python -m tools.gpu_check --device cpu

Each part runs in a process of its own with its own time limit, so that one failure hides nothing; docs/gpu_check.md
says how to read what it prints. The record goes to docs/gpu. With --device cpu the same parts run with tiny sizes in
half a minute: this shows that the check itself works, and says nothing about GPUs.
"""

import os
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from looplm.bounds import check_bounds, non_empty, path_field, require
from looplm.cli import parse_config, run_main
from tools.gpu import report
from tools.gpu.parts import PARTS, DeviceName, stretched
from tools.gpu.process import run_part
from tools.gpu.record import PartRecord

FIRST = "environment"
RECORDS: dict[DeviceName, str] = {"cuda": "docs/gpu", "cpu": "runs/gpu-check"}


@dataclass(frozen=True, kw_only=True)
class GpuCheckConfig:
    """Device and parts of a check.

    Args:
        device: cuda, or cpu for a rehearsal with tiny sizes.
        parts: names of the parts; the environment is always checked first.
        output: folder of the record; null takes docs/gpu, and runs/gpu-check for a rehearsal.
        logs: folder in which this check's logs get a folder of their own.
    """

    device: DeviceName = "cuda"
    parts: tuple[str, ...] = non_empty(tuple(PARTS))
    output: str | None = path_field(None)
    logs: str = path_field("runs/gpu-check")

    def __post_init__(self) -> None:
        check_bounds(self, "")
        for name in self.parts:
            require(name in PARTS, "parts", name, f"give some of {', '.join(PARTS)}")
        for key in ("output", "logs"):
            folder = getattr(self, key)
            usable = folder is None or Path(folder).is_dir() or not Path(folder).exists()
            require(usable, key, folder, "it is a file; name a folder")


def main(argv: list[str]) -> None:
    """``python -m tools.gpu_check``"""
    config = parse_config(GpuCheckConfig, argv, prog="python -m tools.gpu_check", description=str(__doc__))
    if config.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    begin = datetime.now()
    logs = Path(config.logs) / f"{begin:%Y-%m-%d-%H%M%S}-{os.getpid()}"
    start = time.monotonic()
    parts = run_parts(config, logs)
    check = report.Check(
        device=config.device,
        machine=str(report.value_of(parts, "device", "name") or "unknown") if config.device == "cuda" else "cpu",
        date=f"{begin:%Y-%m-%d}",
        revision=str(report.value_of(parts, "software", "revision") or "unknown"),
        seconds=round(time.monotonic() - start, 1),
        logs=logs.name,
        parts=tuple(parts),
    )
    print(report.text(check, logs))
    output = Path(config.output or RECORDS[config.device])
    for path in report.write(check, report.free_stem(output, check.machine, check.date)):
        print(path)
    if check.failed:
        sys.exit(1)


def run_parts(config: GpuCheckConfig, logs: Path) -> list[PartRecord]:
    """Run the parts one after the other, and say how each ended; if the device is not there, none after the first."""
    found = list[PartRecord]()
    chosen = [part for name, part in PARTS.items() if name == FIRST or name in config.parts]
    for part in stretched(chosen):
        name = part.name
        print(f"{name} (at most {part.limit_s:g} s): {part.title}", flush=True)
        if found and not found[0].rows:
            note = f"{FIRST} failed: {found[0].note}"
            record = PartRecord(
                name=name, title=part.title, status="not run", seconds=0, limit_s=part.limit_s, note=note
            )
        else:
            record = run_part(part, config.device, logs)
        print(f"  {record.status} after {record.seconds:.1f} s{f': {record.note}' if record.note else ''}", flush=True)
        found.append(record)
    return found


if __name__ == "__main__":
    run_main(main)
