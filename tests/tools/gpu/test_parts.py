"""Figures that the parts compute from their measurements, without a GPU: memory, utilization, gaps, versions."""

import dataclasses
from pathlib import Path

import pytest
import torch

from looplm.failures import UserError
from looplm.megatron import device
from looplm.model.spans import document_spans
from tools.gpu import environment, profile, resume, speed
from tools.gpu.parts import DeviceName, Job
from tools.gpu.profile import Event
from tools.gpu.recipes import check_device, document_starts, recipe
from tools.gpu.record import NotRun
from tools.planning.hardware import GPUS

JOB = Job(part="speed", variant="local", device="cuda", rows=Path("unused"), folder=Path("unused"))


def describe(monkeypatch: pytest.MonkeyPatch, name: str, gib: float) -> None:
    """Let the device seem to be another."""
    described = device.Description(name=name, total_bytes=int(gib * 2**30))
    monkeypatch.setattr(device, "describe", lambda: described)


def test_the_model_of_the_speed_part_has_a_third_of_a_billion_parameters_for_both_attentions() -> None:
    for attention in ("mla", "mha"):
        run = speed.planned(recipe("cuda", attention))
        assert sum(run.parameters(0).values()) / 1e9 == pytest.approx(0.3, rel=0.05)
        assert run.config.data.seq_length == 4096 and run.config.optim.precision == "bf16"


def test_the_micro_batch_is_the_largest_that_is_planned_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    case, sizes = speed.CASES[0], {}
    for name, gib in (("NVIDIA H200", 139.8), ("NVIDIA A100-SXM4-40GB", 39.4)):
        describe(monkeypatch, name, gib)
        config = speed.fitting(JOB, case)
        sizes[name] = config.data.micro_batch_size
        assert speed.planned_bytes(config) <= 0.75 * gib * 2**30
        larger = dataclasses.replace(config.data, micro_batch_size=16, global_batch_size=16)
        assert speed.planned_bytes(dataclasses.replace(config, data=larger)) > 0.75 * gib * 2**30
    assert sizes["NVIDIA H200"] > sizes["NVIDIA A100-SXM4-40GB"] >= 1
    describe(monkeypatch, "NVIDIA T4", 14.5)
    with pytest.raises(NotRun, match=r"planned \d+\.\d GiB for one sequence, more than 75% of 14\.5 GiB"):
        speed.fitting(JOB, case)


def test_utilization_and_memory_are_compared_with_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    describe(monkeypatch, "NVIDIA H200", 139.8)
    monkeypatch.setattr(device, "peak_flops", lambda: 989e12)
    config = recipe("cuda", "mla", micro_batch_size=4)
    values = speed.figures(config, 0.5, int(1.1 * speed.planned_bytes(config)), 10.0)
    assert values["tokens/s"] == 4 * 4096 * 2 and values["peak/planned"] == 1.1
    flops = 4 * 4096 * speed.model_flops_per_token(speed.planned(config))
    assert values["MFU %"] == pytest.approx(100 * flops / 0.5 / 989e12, abs=0.05)
    assert isinstance(values["planned tokens/s"], int) and values["planned tokens/s"] > 1000
    monkeypatch.setattr(device, "peak_flops", lambda: 0.0)
    describe(monkeypatch, "NVIDIA T4", 14.5)
    unknown = speed.figures(config, 0.5, 0, 10.0)
    missing = ("MFU %", "planned tokens/s", "peak GiB", "peak/planned")
    assert [unknown[key] for key in missing] == [None] * 4 and list(unknown) == list(values)


@pytest.mark.slow
def test_a_rehearsal_of_the_speed_parts_step_stands_beside_the_plan() -> None:
    config = recipe("cpu", "mla")
    rehearsed = speed.rehearsed_bytes(config)
    values = speed.figures(config, 0.5, 0, 10.0, rehearsed)
    assert values["rehearsed GiB"] == round(rehearsed / 2**30, 5) > 0 and speed.rehearsed_bytes(config) == rehearsed
    weights = sum(speed.planned(config).parameters(0).values())
    assert rehearsed > 16 * weights, "weights, gradients and the optimizer's state alone are 18 bytes a parameter"


def test_gpus_are_found_by_the_names_that_torch_gives() -> None:
    assert speed.known_gpu("NVIDIA H100 80GB HBM3") == GPUS["h100"]
    assert speed.known_gpu("NVIDIA A100-SXM4-80GB") == GPUS["a100-80"]
    assert speed.known_gpu("NVIDIA A100-SXM4-40GB") == GPUS["a100-40"]
    assert speed.known_gpu("NVIDIA H200") == GPUS["h200"]
    assert speed.known_gpu("CPU") is speed.known_gpu("NVIDIA RTX 4000") is None


def test_packed_samples_hold_eight_documents_of_different_lengths() -> None:
    start_SB = document_starts(64, 3)
    assert all(len(start_SB[:, sample].unique()) == 8 for sample in range(3))
    assert torch.equal(start_SB, document_starts(64, 3)) and not torch.equal(start_SB[:, 0], start_SB[:, 1])
    spans_N5 = document_spans(start_SB)
    assert spans_N5 is not None and len(spans_N5) == 24


EVENTS = [
    Event("gemm", 0.0, 10.0),
    Event("norm", 5.0, 12.0),  # beside the other, on a second stream
    Event("gemm", 20.0, 30.0),
    Event("add", 31.0, 35.0),
    Event("gemm", 43.0, 45.0),
]


def test_gaps_are_the_times_in_which_no_kernel_runs() -> None:
    assert [(gap.start, gap.end) for gap in profile.gaps(EVENTS, 0.0)] == [(12.0, 20.0), (30.0, 31.0), (35.0, 43.0)]
    assert [gap.name for gap in profile.gaps(EVENTS)] == ["between norm and gemm", "between add and gemm"]
    totals = profile.totals(EVENTS)
    assert totals["calls"] == 5 and totals["idle %"] == pytest.approx(100 * 17 / 45, abs=0.05)
    assert totals["share %"] == pytest.approx(100 * 28 / 45, abs=0.05)
    assert [name for name, _ in profile.by_gap(EVENTS)] == ["between norm and gemm", "between add and gemm"]
    with pytest.raises(RuntimeError, match="the profiler recorded no kernel"):
        profile.totals([])


def test_kernels_are_listed_by_the_time_they_take_together() -> None:
    rows = profile.by_kernel(EVENTS)
    assert [name for name, _ in rows] == ["gemm", "norm", "add"]
    assert rows[0][1] == {"ms": 0.022, "share %": 66.7, "calls": 3}


def test_the_drivers_version_is_read_from_the_kernel_modules_line() -> None:
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build  (x)\nGCC version: 13\n"
    assert environment.driver_version(text) == "580.159.03"
    assert environment.driver_version("") == "unknown"


def test_a_device_that_is_not_there_is_named_with_the_way_out() -> None:
    there: DeviceName = "cuda" if device.HAS_CUDA else "cpu"
    other: DeviceName = "cpu" if device.HAS_CUDA else "cuda"
    with pytest.raises(UserError, match=f"device: '{other}' is not allowed"):
        check_device(other)
    check_device(there)


def test_a_bit_that_differs_is_found() -> None:
    one = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert resume.differing({"a": torch.ones(2), "b": torch.tensor([0.0, 1e-45])}, one) == ["b"]
    assert resume.differing(dict(one), one) == []
