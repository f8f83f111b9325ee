"""Run a model on a few samples of a data prefix: its losses per depth, and second moments of its attention's input.

Shapes: S sequence, B batch, D hidden, L layers, R loops, N tokens.
"""

from itertools import islice
from math import gcd
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from looplm.bounds import require
from looplm.config import DataConfig, DataSource, LossConfig, ModelConfig
from looplm.evaluation.depth import DepthMeter
from looplm.failures import UserError
from pretrain.data import Batch, build_valid_set, check_corpus, micro_batches, valid_samples
from pretrain.step import loop_losses
from tools.upcycling.model_state import ModelState, assemble

_BATCH = 4  # samples in one forward pass, if they can be divided so
_SEED = 1234  # decides which samples of the data are read
_RIDGE = 1e-3  # share of an isotropic moment: a direction that no token had is unlikely, not impossible


def read_samples(
    prefix: str,
    samples: int,
    length: int,
    config: ModelConfig,
    tokenizer_sha256: str,
    groups: ProcessGroupCollection,
    *,
    masks_documents: bool = True,
    key: str = "samples",
) -> list[Batch]:
    """Return samples of a data prefix, the same in every call, in equal batches of at most 4.

    Args:
        prefix: of the data.
        samples: how many.
        length: tokens of each.
        config: of the model that reads them.
        tokenizer_sha256: of the model's tokenizer.
        groups: process groups of a single process.
        masks_documents: a token sees its own document alone (``data.document_masking``).
        key: that gives ``samples``, for a message.

    Raises:
        UserError: ``length`` exceeds the model's maximum, the data is damaged or holds fewer samples, or its tokenizer
            differs from the model's.
    """
    most = config.max_sequence_length
    require(length <= most, "seq_length", length, f"give at most the model's max_sequence_length={most}")
    source, rows = (DataSource(prefix=prefix),), gcd(samples, _BATCH)
    sizes: dict[str, Any] = {"seq_length": length, "micro_batch_size": rows, "global_batch_size": rows}
    data = DataConfig(train=source, valid=source, document_masking=masks_documents, **sizes)
    corpus = check_corpus(data, config.vocab_size)
    if corpus.tokenizer.sha256 != tokenizer_sha256:
        raise UserError(f"{prefix}: made with another tokenizer than the model's; tokenize it with the model's")
    held = valid_samples(data, corpus)
    assert held is not None, "the data is no task"
    require(samples <= held, key, samples, f"{prefix} holds {held} sequences of {length} tokens; give at most {held}")
    with TemporaryDirectory() as folder:  # for Megatron's indices, so that nothing is written beside the data
        dataset = build_valid_set(data, corpus, samples, _SEED, Path(folder))
        assert dataset is not None
        return list(islice(micro_batches(dataset, data, 0, groups.dp.rank(), groups.dp.size()), samples // rows))


@torch.no_grad()
def measure(state: ModelState, batches: list[Batch], depths: int, groups: ProcessGroupCollection) -> dict[str, Any]:
    """Return the loss of a model at each depth, and its mean exit distribution [R].

    Args:
        state: the model.
        batches: text.
        depths: the largest depth that is measured, if the model has no more loops (R).
        groups: process groups of a single process.
    """
    model, loops = assemble(state, groups).eval(), state.config.num_loops
    meter = DepthMeter(list(range(1, max(depths, loops) + 1)), loops, [])
    for batch in batches:
        losses = loop_losses(model, batch, LossConfig(), num_loops=max(depths, loops))
        meter.add(losses.token_loss_RSB, losses.gate_logit_RSB, batch.mask_SB)
    measured = meter.evaluation(groups.dp)
    loss = [row.loss for row in measured.depths]
    return {"tokens": measured.tokens, "loss_per_depth": loss, "exit_distribution": list(measured.exit_distribution)}


@torch.no_grad()
def second_moments(state: ModelState, batches: list[Batch], groups: ProcessGroupCollection) -> list[Tensor]:
    """Return E[u u^T] of each layer over all tokens and loops, [D, D] with a trace of D.

    u is the normed input of attention, before the norm's gain.
    """
    model, config = assemble(state, groups).eval(), state.config
    width = config.hidden_size
    sums_LDD = [torch.zeros(width, width, dtype=torch.float64) for _ in range(config.num_layers)]

    def add(sum_DD: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        u_ND = F.rms_norm(args[0], (width,), eps=config.norm_eps).flatten(0, 1).double()
        sum_DD += (u_ND.mT @ u_ND).cpu()

    for layer, sum_DD in zip(model.decoder.layers, sums_LDD, strict=True):
        layer.input_layernorm.register_forward_pre_hook(lambda *hooked, sum_DD=sum_DD: add(sum_DD, *hooked))
    for batch in batches:
        model(batch.ids_BS, None, batch.document_start_SB)
    isotropic = torch.eye(width, dtype=torch.float64)
    return [(1 - _RIDGE) * total_DD * width / total_DD.trace() + _RIDGE * isotropic for total_DD in sums_LDD]
