#!/bin/bash
# Install what LoopLM needs into an image of NVIDIA's, and touch nothing that is there: its torch, Transformer Engine and
# flash-attn are built for each other. Runs beside copies of setup.py and constraints.txt, while the image is made.
#
# Every package of the image stays at its version, and megatron-core is the one that the tests run on (the image's own, if it
# has one, makes way). All others are pip's choice among what setup.py allows and the image's can be had with: the exact
# versions of constraints.txt want newer ones of packages that an image holds. installed.txt says what came of it.
set -euo pipefail
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 # an image is nobody's system

python -m pip uninstall --quiet --yes megatron-core
python -m pip list --format=freeze >image.txt
{ cat image.txt; grep '^megatron-core==' constraints.txt; } >pins.txt

# The packages alone: without its folders the project itself is empty, and the code comes from where it is mounted. The
# image's own list of pins (PIP_CONSTRAINT) says the same of its packages, and something else of megatron-core.
PIP_CONSTRAINT=$PWD/pins.txt python -m pip install --no-cache-dir --no-build-isolation '.[data,hf]'
python -m pip list --format=freeze >installed.txt

# What must not have moved, and what must fit.
python - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

for line in Path("image.txt").read_text().splitlines():
    name, _, before = line.partition("==")
    if version(name) != before:
        raise SystemExit(f"error: {name}: was {before}, is {version(name)}; an image's packages must stay as they are")
wanted = next(Requirement(text) for text in requires("megatron-core") if text.startswith("transformer-engine"))
try:
    engine = version("transformer-engine")
except PackageNotFoundError:
    raise SystemExit("error: transformer-engine: not in this image; take one of nvcr.io/nvidia/pytorch") from None
if not wanted.specifier.contains(engine, prereleases=True):
    raise SystemExit(f"error: transformer-engine: {engine} does not fit megatron-core, which wants {wanted.specifier}")
print(f"torch {version('torch')}, transformer-engine {engine}, megatron-core {version('megatron-core')}")
PYTHON
