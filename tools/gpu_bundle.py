"""Collect everything that `make gpu-check` needs beside torch, for a machine without a network.

    python -m tools.gpu_bundle --constraints .venv-newest/constraints.txt

The archive dist/gpu-bundle.tar.gz holds wheels for Python 3.12 on Linux, this checkout, and install.sh. On the machine
with the GPU, which has Python 3.12 and torch (2.11 with CUDA 13, say):

    tar xzf gpu-bundle.tar.gz && gpu-bundle/install.sh && cd gpu-bundle/source && make gpu-check
"""

from dataclasses import dataclass
from pathlib import Path

from looplm.bounds import check_bounds, path_field
from looplm.cli import parse_config, run_main
from looplm.failures import UserError
from tools.gpu import bundle


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """Contents and place of the bundle.

    Args:
        constraints: exact versions of the packages.
        engine: also bundle Transformer Engine (hundreds of MiB), whose torch part the machine compiles.
        output: folder of the bundle, new or that of an earlier one; the archive is written beside it.
    """

    constraints: str = path_field("constraints.txt")
    engine: bool = False
    output: str = path_field("dist/gpu-bundle")

    def __post_init__(self) -> None:
        check_bounds(self, "")


def main(argv: list[str]) -> None:
    """``python -m tools.gpu_bundle``"""
    config = parse_config(BundleConfig, argv, prog="python -m tools.gpu_bundle", description=str(__doc__))
    constraints = Path(config.constraints)
    if not constraints.is_file():
        raise UserError(f"constraints: {constraints} is not a file; give a file of pins, such as constraints.txt")
    archive = bundle.build(Path(config.output), constraints, config.engine)
    size = bundle.size_mib(archive)
    wheels = sorted(path.name for path in (Path(config.output) / "wheels").iterdir())
    print("\n".join(wheels))
    print(f"{archive}: {size:.1f} MiB, {len(wheels)} packages")
    if size > bundle.LIMIT_MIB and not config.engine:
        raise UserError(f"{archive}: {size:.1f} MiB exceed the limit of {bundle.LIMIT_MIB} MiB; leave packages out")


if __name__ == "__main__":
    run_main(main)
