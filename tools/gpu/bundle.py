"""Collect this code and the packages that it needs beside torch, for a machine without a network.

pip resolves the newest tested pins for Python 3.12 on Linux, and says what torch needs. These packages are on any
machine with torch, so they stay out. The rest is downloaded as wheels.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from looplm.checkpoint import git_revision
from looplm.failures import UserError

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "3.12"
GLIBC = range(5, 36)  # minor versions of glibc 2 that a wheel may ask for; pip matches each name exactly
LIMIT_MIB = 60
TORCH = "torch"
PLOTS = "matplotlib"  # a quarter of the bundle, for reports that no part of the check writes
INSTALL = "install.sh"
# Transformer Engine's torch part is a source package: the machine compiles it, with these and CUDA's headers.
ENGINE = ("transformer-engine", "transformer-engine-cu13")
ENGINE_SOURCE = "transformer-engine-torch"
ENGINE_NEEDS = (
    *("ninja", "pybind11", "pydantic", "einops", "onnx", "onnxscript", "importlib-metadata", "nvdlfw-inspect"),
    *("setuptools", "wheel"),
)

Report = Sequence[Mapping[str, Any]]  # of pip: each package's metadata


def build(folder: Path, constraints: Path, engine: bool) -> Path:
    """Build ``folder`` and the archive beside it, which is returned; an earlier bundle there is replaced.

    Args:
        folder: of the bundle.
        constraints: the pins.
        engine: also bundle Transformer Engine, which is larger than all the rest.

    Raises:
        UserError: ``folder`` holds something that is not a bundle.
    """
    is_bundle = all((folder / name).exists() for name in (INSTALL, "wheels", "requirements.txt"))
    if folder.exists() and not is_bundle:
        raise UserError(f"output: {folder} exists and is not a bundle; name a new folder")
    whole, folder = folder, folder.parent / f".{folder.name}.partial" / folder.name
    shutil.rmtree(folder.parent, ignore_errors=True)
    (folder / "wheels").mkdir(parents=True)
    own = [line for line in requirements() if Requirement(line).name != PLOTS]
    report = resolve([*own, *(ENGINE_NEEDS if engine else ())], constraints)
    download(to_bundle(report), folder / "wheels")
    if engine:
        download(pinned(ENGINE, constraints), folder / "wheels")
        download(pinned([ENGINE_SOURCE], constraints), folder / "wheels", source=True)
    wanted = [requirement for requirement in own if Requirement(requirement).name != TORCH]
    lines = [*wanted, *(ENGINE_NEEDS if engine else ())]
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in lines))
    copy_source(folder / "source")
    shutil.copy(Path(__file__).with_name(INSTALL), folder / INSTALL)
    packed = folder.with_name(f"{folder.name}.tar.gz")
    # Wheels are compressed already.
    with tarfile.open(packed, "w:gz", compresslevel=1) as file:
        file.add(folder, arcname=folder.name)
    shutil.rmtree(whole, ignore_errors=True)
    folder.rename(whole)
    archive = packed.replace(whole.with_name(packed.name))
    folder.parent.rmdir()
    return archive


def requirements() -> list[str]:
    """Return the packages that setup.py declares, without extras."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "install_requires"]
    found: list[str] = ast.literal_eval(keywords[0].value)
    return found


def resolve(wanted: Iterable[str], constraints: Path) -> Report:
    """Return pip's report of what it would install for Python 3.12 on Linux; only metadata is downloaded."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "report.json"
        pins = Path(scratch) / "pins.txt"
        pins.write_text("".join(f"{pin}\n" for pin in pins_of(constraints)))
        arguments = [
            "install",
            "--dry-run",
            "--ignore-requires-python",
            "--ignore-installed",
            "--report",
            str(output),
            "--target",
            scratch,
        ]
        _pip([*arguments, *_platform(), "-c", str(pins), *wanted])
        found: Report = json.loads(output.read_text())["install"]
    return found


def to_bundle(report: Report) -> list[str]:
    """Return name==version of each resolved package that torch does not bring."""
    versions = {canonicalize_name(one["metadata"]["name"]): one["metadata"]["version"] for one in report}
    brought = closure(report, TORCH)
    return sorted(f"{name}=={version}" for name, version in versions.items() if name not in brought)


def closure(report: Report, package: str) -> set[str]:
    """Return a package and all that it needs, by the metadata of a report."""
    needs = {canonicalize_name(one["metadata"]["name"]): one["metadata"].get("requires_dist") or [] for one in report}
    seen, waiting = set[tuple[str, str]](), [Requirement(package)]
    while waiting:
        one = waiting.pop()
        for part in ((canonicalize_name(one.name), extra) for extra in ("", *one.extras)):
            if part not in seen and part[0] in needs:
                seen.add(part)
                waiting += [need for need in map(Requirement, needs[part[0]]) if _applies(need, part[1])]
    return {name for name, _ in seen}


def _applies(requirement: Requirement, extra: str = "") -> bool:
    """Return True if a requirement holds on the machine that the bundle is for, with one of its owner's extras."""
    environment = {**default_environment(), "python_version": PYTHON, "python_full_version": f"{PYTHON}.0"}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "extra": extra}
    return requirement.marker is None or requirement.marker.evaluate(environment)  # type: ignore[arg-type]


def pinned(names: Iterable[str], constraints: Path) -> list[str]:
    """Return the pins of the named packages."""
    pins = {pin.partition("==")[0]: pin for pin in pins_of(constraints)}
    missing = [name for name in names if name not in pins]
    if missing:
        raise UserError(
            f"{constraints}: has no pin of {', '.join(missing)}; give --constraints with those of constraints-te.txt"
        )
    return [pins[name] for name in names]


def pins_of(constraints: Path) -> list[str]:
    """Return the pins that hold for Python 3.12; pip itself would choose those of the Python that it runs on."""
    lines = [line for line in constraints.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    return [str(line).partition(";")[0].strip() for line in map(Requirement, lines) if _applies(line)]


def download(pins: Sequence[str], folder: Path, source: bool = False) -> None:
    """Download exactly these packages, as wheels for the machine or as source."""
    where = ["--no-binary=:all:", "--no-build-isolation"] if source else _platform()
    _pip(["download", "--no-deps", "--dest", str(folder), *where, *pins])


def copy_source(folder: Path) -> None:
    """Copy the files of the checkout that git tracks, as they are now, and note the revision."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file():  # not one that is deleted but not committed
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    (folder / "REVISION").write_text(f"{git_revision()}\n")


def size_mib(path: Path) -> float:
    """Return the size of a file in MiB."""
    return path.stat().st_size / 2**20


def _platform() -> list[str]:
    names = [f"manylinux_2_{minor}_x86_64" for minor in reversed(GLIBC)]
    names += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    platforms = [word for name in names for word in ("--platform", name)]
    return ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]


def _pip(arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, env=os.environ | {"NVTE_FRAMEWORK": "pytorch"}, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"pip {arguments[0]}: {lines[-1] if lines else f'ended with status {done.returncode}'}")
