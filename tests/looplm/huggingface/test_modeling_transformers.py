"""The exported model in the other classes of transformers: its Trainer, and what ``generate()`` can and cannot do."""

from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from transformers import Trainer, TrainingArguments

from looplm.huggingface.export.modeling_looplm import LoopLMForCausalLM
from tests.support.generation_oracle import GATES, MLA, VOCAB, build
from tests.support.hf_models import hf_model, random_ids
from tests.support.parity import TOLERANCE

IDS_BS = random_ids(2, 9, VOCAB)


@pytest.fixture(scope="module")
def model(single_process: ProcessGroupCollection) -> LoopLMForCausalLM:
    """An MLA model whose gate reads the text so far. Shared by tests: do not change it."""
    return hf_model(build(MLA, GATES["sequence"], single_process), GATES["sequence"])


def test_trainer_evaluates_and_predicts(model: LoopLMForCausalLM, tmp_path: Path) -> None:
    rows: list[dict[str, Tensor]] = [{"input_ids": ids, "labels": ids} for ids in IDS_BS]
    settings = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    trainer = Trainer(model, settings, eval_dataset=rows)
    with torch.no_grad():
        expected = model(IDS_BS, labels=IDS_BS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=TOLERANCE)
    found = trainer.predict(rows).predictions  # type: ignore[arg-type]
    assert torch.allclose(torch.from_numpy(found), expected.logits, atol=1e-5)
