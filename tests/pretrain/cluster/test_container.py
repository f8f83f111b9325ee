"""The container recipes, without building them: their files exist, and install.sh keeps the image's packages."""

import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "pretrain/container"
TORCH = "2.10.0a0+b4e4ee81d3.nv25.12"
# The Transformer Engine that the installed megatron-core accepts, and the first one that it does not.
ACCEPTED = next(Requirement(text) for text in requires("megatron-core") or [] if text.startswith("transformer-engine"))
BOUNDS = {bound.operator: Version(bound.version) for bound in ACCEPTED.specifier}
ENGINE = f"{BOUNDS.get('>=', Version('2.10.0')).base_version}+769ed778"
TOO_NEW = BOUNDS.get("<", Version("2.13.0")).base_version
IMAGE = "\n".join(
    (
        "Flash_Attn==2.7.4.post1",
        "megatron-core==0.15.0",
        "numpy==2.1.0",
        f"torch=={TORCH}",
        f"transformer_engine=={ENGINE}",
        "",
    )
)
# Answer for pip and record its arguments; run any other script.
PYTHON = """#!/bin/bash
case "$*" in
    "-m pip uninstall"*) sed -i '/^megatron-core==/d' image ;;
    "-m pip list"*) cat image ;;
    "-m pip install"*) echo "$@" >asked; cp "$PIP_CONSTRAINT" constraint ;;
    *) exec "$REAL" "$@" ;;
esac
"""


def test_both_recipes_are_equivalent() -> None:
    docker, apptainer = (FOLDER / "Dockerfile").read_text(), (FOLDER / "looplm.def").read_text()
    image = re.search(r"^ARG IMAGE=(nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3)$", docker, re.MULTILINE)
    assert image and f"\nFrom: {image[1]}\n" in apptainer
    copied = re.search(r"^COPY (.*) \./$", docker, re.MULTILINE)
    files = re.findall(r"^    (\S+) /opt/looplm/(\S+)$", apptainer, re.MULTILINE)
    assert copied and copied[1].split() == [source for source, _ in files]
    assert all((ROOT / source).is_file() and Path(source).name == name for source, name in files)
    assert "\nRUN bash install.sh\n" in docker and "    cd /opt/looplm\n    bash install.sh\n" in apptainer


def test_the_extras_that_are_installed_exist() -> None:
    extras = re.search(r"'\.\[([a-z,]+)\]'", (FOLDER / "install.sh").read_text())
    declared = re.findall(r'^    "([a-z]+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert extras and set(extras[1].split(",")) <= set(declared) - {"gpu", "dev"}, (
        "the image already has the packages of the extra gpu"
    )


Install = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """Return a function that runs install.sh in an image with IMAGE's packages, some with other versions afterwards."""
    for name in ("setup.py", "constraints.txt", "pretrain/container/install.sh"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "image").write_text(IMAGE)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(PYTHON)
    (tmp_path / "bin/python").chmod(stat.S_IRWXU)

    def run(**moved: str) -> "subprocess.CompletedProcess[str]":
        installed = dict(line.split("==") for line in IMAGE.split() if "megatron" not in line) | moved
        for name, number in installed.items():
            folder = tmp_path / f"packages/{name}-{number}.dist-info"
            folder.mkdir(parents=True)
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        path = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "PYTHONPATH": f"{tmp_path}/packages", "REAL": sys.executable}
        return subprocess.run(["bash", "install.sh"], cwd=tmp_path, env=path, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_an_images_packages_are_pinned_to_their_versions(install: Install, tmp_path: Path) -> None:
    done = install()
    assert (done.returncode, done.stderr) == (0, "")
    assert f"torch {TORCH}, transformer-engine {ENGINE}, megatron-core {version('megatron-core')}" in done.stdout
    assert (tmp_path / "asked").read_text().split()[-1] == ".[data,hf]"
    pins = (tmp_path / "constraint").read_text().splitlines()
    assert pins == [line for line in IMAGE.splitlines() if "megatron" not in line] + ["megatron-core==0.16.1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moved", "message"),
    [
        ({"numpy": "2.3.0"}, "numpy: was 2.1.0, is 2.3.0"),
        ({"transformer_engine": TOO_NEW}, f"transformer_engine: was {ENGINE}, is {TOO_NEW}"),
    ],
)
def test_a_changed_image_fails(install: Install, moved: dict[str, str], message: str) -> None:
    done = install(**moved)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"error: {message}")


@pytest.mark.slow
@pytest.mark.skipif("<" not in BOUNDS, reason="the installed megatron-core accepts any Transformer Engine")
def test_an_unsupported_transformer_engine_fails(install: Install, tmp_path: Path) -> None:
    (tmp_path / "image").write_text(IMAGE.replace(ENGINE, TOO_NEW))
    done = install(transformer_engine=TOO_NEW)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    fault = f"transformer-engine: {TOO_NEW} does not fit megatron-core, which requires {ACCEPTED.specifier}"
    assert fault in done.stderr
