"""The bundle for a machine without a network: which packages it holds, its copy of the code, and its installer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from looplm.failures import UserError
from tools import gpu_bundle
from tools.gpu import bundle

ROOT = Path(__file__).resolve().parents[3]


def package(name: str, *needs: str, version: str = "1.0") -> dict[str, dict[str, object]]:
    return {"metadata": {"name": name, "version": version, "requires_dist": list(needs)}}


REPORT = [
    package(
        "torch", "jinja2", "cuda-toolkit[cublas]==13; sys_platform == 'linux'", "opt-einsum>=3; extra == 'opt-einsum'"
    ),
    package("Jinja2", "markupsafe>=2"),
    package("MarkupSafe"),
    package("cuda_toolkit", "nvidia-cublas; extra == 'cublas'", "nvidia-nvtx; extra == 'nvtx'"),
    package("nvidia_cublas"),
    package("nvidia_nvtx"),
    package("megatron-core", "torch", "numpy<3", version="0.19.2"),
    package("numpy", version="2.5.5"),
    package("opt_einsum"),
]


def test_torch_and_what_it_brings_stay_out() -> None:
    assert bundle.closure(REPORT, "torch") == {"torch", "jinja2", "markupsafe", "cuda-toolkit", "nvidia-cublas"}
    assert bundle.to_bundle(REPORT) == ["megatron-core==0.19.2", "numpy==2.5.5", "nvidia-nvtx==1.0", "opt-einsum==1.0"]


def test_the_requirements_are_those_of_setup_py_without_extras() -> None:
    names = {Requirement(requirement).name for requirement in bundle.requirements()}
    assert {"torch", "megatron-core", "tokenizers", "psutil"} <= names and not {"datatrove", "pytest"} & names


def test_a_package_without_a_pin_is_named(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("# pins\nnumpy==2.4.6 ; python_version < '3.12'\nnumpy==2.5.5 ; python_version >= '3.12'\n")
    assert bundle.pinned(["numpy"], path) == ["numpy==2.5.5"]
    with pytest.raises(UserError, match=r"constraints.txt: has no pin of transformer-engine; give"):
        bundle.pinned(["numpy", "transformer-engine"], path)
    with pytest.raises(UserError, match=r"constraints: .*absent is not a file"):
        gpu_bundle.main(["--constraints", str(tmp_path / "absent")])


@pytest.mark.slow
def test_the_code_travels_as_it_is_with_its_revision(tmp_path: Path) -> None:
    bundle.copy_source(tmp_path)
    for name in ("Makefile", "setup.py", "constraints.txt", "tools/gpu_check.py", "looplm/reference/model.py"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    assert (tmp_path / "REVISION").read_text().strip() and not (tmp_path / ".venv").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="this Python is the one that the wheels are for")
def test_another_python_is_refused_before_anything_is_installed(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    script = tmp_path / bundle.INSTALL
    script.write_bytes((ROOT / "tools/gpu" / bundle.INSTALL).read_bytes())
    done = subprocess.run(["sh", str(script), sys.executable], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2 and "is not Python 3.12" in done.stderr
    assert not list((tmp_path / "source").iterdir())


def test_only_a_bundle_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped --output would otherwise be deleted, with all that it holds."""
    monkeypatch.setattr(bundle, "resolve", lambda *_: [])
    monkeypatch.setattr(bundle, "download", lambda *_, **__: None)
    monkeypatch.setattr(bundle, "copy_source", lambda folder: folder.mkdir())
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.tex").touch()
    with pytest.raises(UserError, match=r"output: .*work exists and is not a bundle; name a new folder"):
        bundle.build(tmp_path / "work", tmp_path / "constraints.txt", engine=False)
    assert (tmp_path / "work/thesis.tex").exists()
    for _ in range(2):  # new, and in place of an earlier one
        archive = bundle.build(tmp_path / "bundle", tmp_path / "constraints.txt", engine=False)
        assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == [
            *("install.sh", "requirements.txt", "source", "wheels")
        ]
    assert archive == tmp_path / "bundle.tar.gz"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.tar.gz", "work"]
