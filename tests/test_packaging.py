"""Install files and the Makefile's phases, checked without installing or training anything."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r"^[a-z0-9.-]+==[^ ;]+( ; [^;]+)?$")
PHASES = [
    "data_pipeline.tokenize",
    "pretrain.train",
    "pretrain.train",
    "pretrain.evaluate",
    "looplm.generate",
    "pretrain.report",
]
# Phases of `make ouro-tiny`: text, stage 1a, a deeper stack, 1b, 2 and 3, questions, 4, gate, fine-tuning, results.
OURO_TINY_PHASES = [
    *("data_pipeline.tokenize", "pretrain.train", "tools.upcycle", *["pretrain.train"] * 3),
    *(*["data_pipeline.synthetic.questions"] * 2, "data_pipeline.tokenize", *["pretrain.train"] * 3),
    *("tools.convert_hf", "looplm.generate", *["pretrain.evaluate"] * 2, "pretrain.report", "pretrain.stage_jumps"),
]


def test_every_constraint_is_an_exact_pin() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert not [line for line in pins if not PIN.match(line)]


def test_the_newest_constraints_pin_the_newest_declared_megatron_core() -> None:
    pins = [line for line in (ROOT / "constraints-newest.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(pins) == 1 and PIN.match(pins[0]), "only megatron-core may differ from constraints.txt"
    version = [int(part) for part in pins[0].removeprefix("megatron-core==").split(".")]
    found = re.search(r"megatron-core>=([\d.]+),<([\d.]+)", (ROOT / "setup.py").read_text())
    assert found
    oldest, beyond = ([int(part) for part in bound.split(".")] for bound in found.groups())
    assert oldest <= version < beyond and version[1] + 1 == beyond[1]
    assert f"megatron-core=={found[1]}\n" in (ROOT / "constraints.txt").read_text()


def test_the_oldest_constraints_pin_the_oldest_declared_transformers() -> None:
    lines = (ROOT / "constraints-hf-oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if PIN.match(line))
    assert set(pins) == {"huggingface-hub", "tokenizers", "transformers"}, "transformers, and the pins that it needs"
    found = re.search(r"transformers>=([\d.]+)", (ROOT / "setup.py").read_text())
    assert found and re.fullmatch(rf"{re.escape(found[1])}(\.0)*", pins["transformers"])


def test_transformer_engine_is_tested_with_the_newest_megatron_core() -> None:
    pins, newest = ((ROOT / f"constraints-{name}.txt").read_text().splitlines() for name in ("te", "newest"))
    assert newest[-1] in pins
    assert not [line for line in pins if not line.startswith("#") and not PIN.match(line)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["newest", "hf-oldest", "te"])
def test_another_environment_takes_every_other_pin_from_constraints(name: str, checkout: Path) -> None:
    for path in ("constraints.txt", f"constraints-{name}.txt"):
        shutil.copy(ROOT / path, checkout)
    subprocess.run(["make", "-s", f".venv-{name}/constraints.txt"], cwd=checkout, check=True)

    def pins(name: str) -> list[str]:
        return [line for line in (checkout / name).read_text().splitlines() if "==" in line and line[0] != "#"]

    changed = pins(f"constraints-{name}.txt")
    packages = {pin.split("==")[0] for pin in changed}
    others = [pin for pin in pins("constraints.txt") if pin.split("==")[0] not in packages]
    assert sorted(pins(f".venv-{name}/constraints.txt")) == sorted(changed + others)


def test_every_imported_package_is_declared() -> None:
    """A package that only another package requires may be missing after an upgrade."""
    words = [
        node.value for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Constant)
    ]
    declared = {re.split(r"[\[<>=]", word)[0].lower() for word in words if isinstance(word, str)}
    ours = {"looplm", "data_pipeline", "pretrain", "tools"}
    imported = set()
    for path in (path for package in ours for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    distributions = packages_distributions()
    foreign = imported - ours - {"tests"} - set(sys.stdlib_module_names)
    missing = {
        name
        for name in foreign
        if not {d.lower().replace("_", "-") for d in distributions.get(name, [name])} & declared
    }
    assert not missing, f"imported, but not declared in setup.py: {sorted(missing)}"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a directory with the Makefile, empty configs, and a Python that only records the modules it should run.

    That Python fails for a module named in the file ``broken``.
    """
    shutil.copy(ROOT / "Makefile", tmp_path)
    configs = tmp_path / "configs/quickstart"
    configs.mkdir(parents=True)
    for name in ("setup.py", "constraints.txt", "broken"):
        (tmp_path / name).touch()
    for name in ("data.yaml", "pretrain.yaml", "gate.yaml", "prompts.txt"):
        (configs / name).touch()
    for name in ("ouro-tiny", "smollm"):
        shutil.copytree(ROOT / "configs" / name, tmp_path / "configs" / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$2" >> ran\n! grep -qx "$2" broken\n')
    python.chmod(0o755)
    (tmp_path / ".venv/.installed").touch()
    return tmp_path


def make(checkout: Path, target: str = "quickstart") -> tuple[int, list[str]]:
    """Run ``make TARGET``, and return its exit status and the modules that it ran."""
    (checkout / "ran").write_text("")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "HISTORY"))}
    done = subprocess.run(["make", target], cwd=checkout, capture_output=True, env=environment, check=False)
    return done.returncode, (checkout / "ran").read_text().split()


@pytest.mark.slow
def test_quickstart_skips_finished_phases(checkout: Path) -> None:
    assert make(checkout) == (0, PHASES)
    assert make(checkout) == (0, [])


@pytest.mark.slow
def test_quickstart_repeats_a_failed_phase(checkout: Path) -> None:
    (checkout / "broken").write_text("pretrain.evaluate\n")
    assert make(checkout) == (2, PHASES[:4])
    assert make(checkout) == (2, PHASES[3:4])
    (checkout / "broken").write_text("")
    assert make(checkout) == (0, PHASES[3:])


@pytest.mark.slow
def test_quickstart_reruns_the_phases_that_depend_on_a_changed_config(checkout: Path) -> None:
    make(checkout)
    results = {name: checkout / "runs/quickstart" / name / "result" for name in ("data", "stage1", "gate")}
    for path in results.values():
        path.parent.mkdir()
        path.touch()
    stamp = (checkout / "runs/quickstart/.done/report").stat().st_mtime
    os.utime(checkout / "configs/quickstart/pretrain.yaml", (stamp + 10, stamp + 10))
    (checkout / "broken").write_text("pretrain.train\n")
    assert make(checkout) == (2, PHASES[1:2])
    assert [name for name, path in results.items() if path.exists()] == ["data", "gate"]
    results["stage1"].parent.mkdir()
    results["stage1"].touch()  # written by the phase before it failed; the phase resumes from it
    (checkout / "broken").write_text("")
    os.utime(checkout / "configs/quickstart/pretrain.yaml", (stamp, stamp))  # not changed since the phase began
    assert make(checkout) == (0, PHASES[1:])
    assert [name for name, path in results.items() if path.exists()] == ["data", "stage1"]


@pytest.mark.slow
def test_a_phase_that_was_interrupted_begins_anew_if_its_config_has_changed_since(checkout: Path) -> None:
    (checkout / "broken").write_text("pretrain.train\n")
    assert make(checkout) == (2, PHASES[:2])
    half = checkout / "runs/quickstart/stage1/half"
    half.parent.mkdir()
    half.touch()
    assert make(checkout) == (2, PHASES[1:2]) and half.exists(), "it continues"
    begun = (checkout / "runs/quickstart/.done/stage1.begun").stat().st_mtime
    os.utime(checkout / "configs/quickstart/pretrain.yaml", (begun + 10, begun + 10))
    assert make(checkout) == (2, PHASES[1:2]) and not half.exists()


@pytest.mark.slow
def test_ouro_tiny_runs_its_phases_once_and_checks_the_stage_jumps_every_time(checkout: Path) -> None:
    assert make(checkout, "ouro-tiny") == (0, OURO_TINY_PHASES)
    assert make(checkout, "ouro-tiny") == (0, OURO_TINY_PHASES[-1:])
    (checkout / "broken").write_text("pretrain.stage_jumps\n")
    assert make(checkout, "ouro-tiny") == (2, OURO_TINY_PHASES[-1:])


@pytest.mark.slow
def test_ouro_tiny_reruns_a_changed_stage_and_all_later_ones(checkout: Path) -> None:
    make(checkout, "ouro-tiny")
    stages = ("stage1b", "stage4", "gate", "sft")
    for name in stages:
        (checkout / "runs/ouro-tiny" / name).mkdir()
    stamp = (checkout / "runs/ouro-tiny/.done/report").stat().st_mtime
    os.utime(checkout / "configs/ouro-tiny/stage4.yaml", (stamp + 10, stamp + 10))
    (checkout / "broken").write_text("tools.convert_hf\n")
    assert make(checkout, "ouro-tiny") == (2, [*["pretrain.train"] * 3, "tools.convert_hf"])
    assert [name for name in stages if (checkout / "runs/ouro-tiny" / name).exists()] == ["stage1b"]


@pytest.mark.slow
def test_smollm_installs_its_model_once_and_reruns_what_a_changed_config_needs(checkout: Path) -> None:
    status, ran = make(checkout, "smollm")
    assert (status, ran[:4]) == (0, ["pip", "pip", "tools.smollm", "data_pipeline.tokenize"])
    conversions, trained = ["tools.upcycle"] * 3, ["pretrain.train", "pretrain.train", "pretrain.evaluate"]
    assert ran[4:] == [*conversions, *trained, "looplm.generate", "pretrain.report"]
    assert make(checkout, "smollm") == (0, [])
    (checkout / "setup.py").touch()
    ran = make(checkout, "smollm")[1]
    assert set(ran) <= {"pip"}, "another environment is no reason to heal the model again"
    stamp = (checkout / "runs/smollm/.done/stage1").stat().st_mtime
    os.utime(checkout / "configs/smollm/gate.yaml", (stamp + 10, stamp + 10))
    assert make(checkout, "smollm") == (0, [*trained[1:], "looplm.generate", "pretrain.report"])
