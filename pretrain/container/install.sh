#!/bin/bash
# Install what LoopLM needs into one of NVIDIA's images without changing its packages: its torch, Transformer Engine and
# flash-attn are built for each other. Runs beside copies of setup.py and constraints.txt, while the image is built.
#
# Every package of the image keeps its version. megatron-core is the version that the tests run on; it replaces the
# image's own. For all other packages, pip chooses versions that setup.py allows and that fit the image's: the exact
# versions of constraints.txt would require newer versions of packages in the image. installed.txt records the result.
set -euo pipefail
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 # pip may change the Python of an image

python -m pip uninstall --quiet --yes megatron-core
python -m pip list --format=freeze >image.txt
{ cat image.txt; grep '^megatron-core==' constraints.txt; } >pins.txt

# Only the packages: without its folders the project itself is empty, and the code is mounted later. The image's own
# constraints (PIP_CONSTRAINT) pin the same packages, but another megatron-core.
PIP_CONSTRAINT=$PWD/pins.txt python -m pip install --no-cache-dir --no-build-isolation '.[data,hf]'
python -m pip list --format=freeze >installed.txt

# Check that the image's packages are unchanged and fit each other.
python - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

for line in Path("image.txt").read_text().splitlines():
    name, _, before = line.partition("==")
    if version(name) != before:
        raise SystemExit(f"error: {name}: was {before}, is {version(name)}; an image's packages must not change")
wanted = next(Requirement(text) for text in requires("megatron-core") if text.startswith("transformer-engine"))
try:
    engine = version("transformer-engine")
except PackageNotFoundError:
    raise SystemExit("error: transformer-engine: not in this image; use one from nvcr.io/nvidia/pytorch") from None
if not wanted.specifier.contains(engine, prereleases=True):
    fault = f"{engine} does not fit megatron-core, which requires {wanted.specifier}"
    raise SystemExit(f"error: transformer-engine: {fault}")
print(f"torch {version('torch')}, transformer-engine {engine}, megatron-core {version('megatron-core')}")
PYTHON
