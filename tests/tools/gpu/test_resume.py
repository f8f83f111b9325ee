"""The resume part finds a resume that is not exact."""

from pathlib import Path

import pytest

from looplm.checkpoint import optimizer_state
from tools.gpu import resume
from tools.gpu.record import Mismatch, Rows

pytestmark = pytest.mark.slow  # it trains


def test_a_resume_that_forgets_adams_steps_is_found(single_process, tmp_path: Path, monkeypatch) -> None:
    set_step = optimizer_state._set_step
    monkeypatch.setattr(optimizer_state, "_set_step", lambda core, step: set_step(core, 0))
    config = resume.run_config(tmp_path / "whole", "mha", "linear", "fp32")
    with pytest.raises(Mismatch, match=r"\d+ of \d+ tensors differ after the resume") as raised:
        resume.resumed_against_whole(config, single_process, Rows(tmp_path / "rows"))
    values = raised.value.values
    assert (values["repetition"], values["first loss"], values["resumed"]) == ("equal", "equal", "differs")
