"""The resume part finds a resume that is not exact."""

from pathlib import Path

import pytest
import torch

from looplm.checkpoint import optimizer_state
from tools.gpu import resume
from tools.gpu.record import Mismatch, Rows, read_rows

pytestmark = pytest.mark.slow  # it trains


def test_a_resume_that_forgets_adams_steps_is_found(single_process, tmp_path: Path, monkeypatch) -> None:
    set_step = optimizer_state._set_step
    monkeypatch.setattr(optimizer_state, "_set_step", lambda core, step: set_step(core, 0))
    config = resume.run_config(tmp_path / "whole", "mha", "linear", "fp32")
    with pytest.raises(Mismatch, match=r"\d+ of \d+ tensors differ after the resume") as raised:
        resume.resumed_against_whole(config, single_process, Rows(tmp_path / "rows"))
    values = raised.value.values
    assert (values["repetition"], values["first loss"], values["resumed"]) == ("equal", "equal", "differs")


def test_without_deterministic_kernels_the_usual_ones_are_used_and_named(
    single_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = resume.train

    def on_a_gpu(*arguments):
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set it. Turn")
        return train(*arguments)

    monkeypatch.setattr(resume, "train", on_a_gpu)
    config = resume.run_config(tmp_path / "case/whole", "mla", "lru", "bf16")
    values = resume.resumed_against_whole(config, single_process, Rows(tmp_path / "rows"))
    assert (values["kernels"], values["repetition"], values["resumed"]) == ("usual", "equal", "equal")
    (row,) = read_rows(tmp_path / "rows")
    assert row.status == "not run" and row.note.startswith("cumsum_cuda_kernel does not have a deterministic")
    assert not torch.are_deterministic_algorithms_enabled()
