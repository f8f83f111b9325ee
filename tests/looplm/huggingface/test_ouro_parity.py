"""An imported directory in Ouro's layout, compared with an independent Ouro on the directory's own tensors."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from looplm import checkpoint
from looplm.config import LossConfig, OptimConfig, ParallelConfig
from looplm.huggingface.convert import examine, export_model, import_source
from looplm.model.exit_gate import exit_log_probs
from pretrain.data import Batch
from pretrain.step import loop_losses
from pretrain.trainer import Trainer
from tests.support import ouro_reference as ouro
from tests.support.parity import assert_close_relative

pytestmark = pytest.mark.slow  # every test here starts a process or trains

CONFIGS = {"mha": ouro.CONFIG, "gqa": ouro.CONFIG | {"num_key_value_heads": 2, "rope_theta": 100.0}}
BETA = 0.1


@pytest.fixture(params=CONFIGS)
def imported(request, corpus, tmp_path, single_process):
    """config.json, the directory's tensors in double precision, and the model that we import."""
    config = CONFIGS[request.param]
    tensors = ouro.random_tensors(config)
    folder = ouro.write_folder(tmp_path / "hf", tensors, config, corpus / "tokenizer.json", shards=2)
    import_source(examine(folder), tmp_path / "ours", single_process)
    opened = checkpoint.open_model(str(tmp_path / "ours"), single_process)
    return config, {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}, opened


def batch_of(config) -> Batch:
    ids = torch.randint(config["vocab_size"], (2, 13))
    return Batch(ids[:, :-1], ids[:, 1:].t().contiguous(), torch.ones(12, 2), None)


def test_logits_gate_and_losses_of_every_loop(imported):
    config, tensors, opened = imported
    batch = batch_of(config)
    with torch.no_grad():
        output = opened.model(batch.ids_BS)
        logits = torch.stack([F.linear(h_SBD, opened.model.head_weight()) for h_SBD in output.hidden])
        losses, gate_logits = loop_losses(opened.model, batch, LossConfig())[:2]
    expected = ouro.forward(tensors, config, batch.ids_BS)
    assert torch.equal(gate_logits, output.gate_logit_RSB)
    assert_close_relative(
        {
            "logits": logits.transpose(1, 2),
            "exit probabilities": exit_log_probs(gate_logits).exp().transpose(1, 2),
            "losses": losses.transpose(1, 2),
        },
        {
            "logits": expected.logits_RBSV,
            "exit probabilities": expected.exit_probability_RBS,
            "losses": ouro.token_losses(expected, batch.labels_SB.T),
        },
    )


def test_an_optimizer_step_of_stage_1(imported, single_process, tmp_path):
    """Compare Megatron's optimizer on the imported model (exported again) with AdamW on the directory's tensors."""
    config, tensors, opened = imported
    optim = OptimConfig(train_steps=10, lr=3e-3, schedule="constant", precision="fp32")
    trainer = Trainer(opened.model, LossConfig(beta=BETA), optim, ParallelConfig(), single_process)
    batch = batch_of(config)
    done = trainer.train(iter([batch]), 1)

    spared = [tensor for name, tensor in tensors.items() if tensor.dim() == 1 or "early_exit_gate" in name]
    decayed = [tensor for name, tensor in tensors.items() if not (tensor.dim() == 1 or "early_exit_gate" in name)]
    plain = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": spared, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    expected = ouro.stage_1_loss(ouro.forward(tensors, config, batch.ids_BS), batch.labels_SB.T, BETA)
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(tensors.values(), optim.clip_grad)
    plain.step()
    assert done.stats.loss == pytest.approx(expected.item(), rel=1e-5)
    assert done.norms.grad_norm == pytest.approx(norm.item(), rel=1e-5)

    export_model(opened, tmp_path / "stepped", "ouro", None, 10**9)
    stepped = load_file(tmp_path / "stepped/model.safetensors")
    assert min((stepped[name] - before[name]).abs().max() for name in before) > 1e-3, "a tensor has not changed"
    assert_close_relative(stepped, tensors)
