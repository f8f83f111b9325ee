"""Checkpoints and exports made at revision 4ac3b61 (0.1.0) still open, compute the same values, and can be trained.

``fixtures/made_at_4ac3b61.tar.xz`` contains two runs of three steps (``mla`` with the LRU gate and its sequence signal,
``mha`` with the linear gate), their exports, their corpus, the gate logits and hidden states that the code of that time
computed, and ``make.py``, the script that made these files.
"""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from looplm import checkpoint
from looplm.checkpoint import OpenedModel
from pretrain.train import main as train
from tests.support.hf_models import code_cache as code_cache
from tests.support.tiny import train_rows
from tools.convert_hf import main as convert

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = ROOT / "tests" / "fixtures" / "made_at_4ac3b61.tar.xz"
RUNS = ("mla", "mha")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the archive."""
    folder = tmp_path_factory.mktemp("made")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def assert_same_outputs(opened: OpenedModel, expected: Path) -> None:
    values = json.loads(expected.read_text())
    with torch.no_grad():
        output = opened.model(torch.tensor(values["ids"]))
    torch.testing.assert_close(output.gate_logit_RSB, torch.tensor(values["gate_logit"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.hidden[-1], torch.tensor(values["hidden_last"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", RUNS)
def test_an_old_checkpoint_computes_the_same_values(kind, made, single_process):
    opened = checkpoint.open_model(str(made / kind), single_process)
    assert_same_outputs(opened, made / f"{kind}.json")
    assert opened.about.step == 3 and opened.about.objective == "entropy_regularised"


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_an_old_run_is_resumed(kind, made, tmp_path, keep_process_groups, capsys):
    config = str(made / kind / "config.yaml")
    corpus = made / "corpus"
    arguments = ["--config", config, "--output_dir", str(made / kind), "--optim.train_steps", "5"]
    arguments += [f'--data.train=[{{prefix: "{corpus}/train"}}]', f'--data.valid=[{{prefix: "{corpus}/valid"}}]']
    train(arguments)
    assert [row["step"] for row in train_rows(made / kind)] == [1, 2, 3, 4, 5]
    assert f"{config}:" in (shown := capsys.readouterr().err) and "loss.head_recompute: has no effect" in shown


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_an_old_export_can_be_imported_and_loads_with_its_own_code(
    kind, made, tmp_path, single_process, keep_process_groups, code_cache
):
    export, imported = made / f"export_{kind}", tmp_path / "imported"
    convert(["import", "--input", str(export), "--output", str(imported)])
    assert_same_outputs(checkpoint.open_model(str(imported), single_process), made / f"{kind}.json")
    if kind == "mha":
        return  # an export in Ouro's layout contains no code
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=torch.float32)
    opened = checkpoint.open_model(str(imported), single_process)
    ids_BS = torch.tensor(json.loads((made / "mla.json").read_text())["ids"])
    with torch.no_grad():
        logits_BSV = opened.model(ids_BS).hidden[-1].transpose(0, 1) @ opened.model.head_weight().t()
        torch.testing.assert_close(model(ids_BS).logits, logits_BSV, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_python_example_of_the_old_readme_still_runs(made):
    """Module paths and names of 0.1 work, with a warning, in a script in its own process."""
    example = (
        "import torch\n"
        "from looplm import checkpoint, parallel\n"
        "from looplm.exit_gate import exit_log_probs\n"
        "from looplm.inference.generate import GenerationConfig, Generator\n"
        "groups = parallel.start(seed=0)\n"
        f'opened = checkpoint.open_model("{made / "mla"}", groups)\n'
        'ids_BS = torch.tensor([opened.tokenizer.encode("import os").ids])\n'
        "with torch.no_grad():\n"
        "    output = opened.model(ids_BS, num_loops=6)\n"
        "trained = opened.model.shape.num_loops\n"
        "p_RSB = exit_log_probs(output.gate_logit_RSB[:trained]).exp()\n"
        "generator = Generator(opened.model, opened.tokenizer, opened.about.eos_id, opened.about.gate_trained)\n"
        "config = GenerationConfig(temperature=0.0, exit_threshold=0.5, max_new_tokens=8)\n"
        '(answer,) = generator.generate(["import os"], config)\n'
        "print(answer.text, answer.depths)\n"
        "parallel.stop()\n"
    )
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "LoopLM.shape is now LoopLM.model_config" in done.stderr
