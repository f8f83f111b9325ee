"""Losses at each depth before and after, on a few samples of a data prefix: what the report's table holds.

Shapes: R loops.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.cli import UserError
from looplm.config import DataConfig, DataSource, LossConfig, ModelConfig
from looplm.evaluation.depth import DepthMeter
from pretrain.data import Batch, build_valid_set, check_corpus, micro_batches
from pretrain.step import loop_losses
from tools.upcycling.parts import Parts, assemble

_BATCH = 4  # samples in one forward pass
_SEED = 1234  # decides which samples of the data are read


@dataclass(frozen=True)
class Sample:
    """Which tokens are read.

    Args:
        prefix: of the data.
        samples: sequences, rounded up to whole batches of 4.
        seq_length: tokens of each.
    """

    prefix: str
    samples: int
    seq_length: int

    def read(self, model: ModelConfig, tokenizer_sha256: str, groups: ProcessGroupCollection) -> list[Batch]:
        """The batches; always the same ones.

        Raises:
            UserError: a damaged prefix, one that is too short, or one of another tokenizer than the model's.
        """
        source, count = (DataSource(prefix=self.prefix),), -(-self.samples // _BATCH)
        sizes = {"seq_length": self.seq_length, "micro_batch_size": _BATCH, "global_batch_size": _BATCH}
        data = DataConfig(train=source, valid=source, **sizes)
        corpus = check_corpus(data, model.vocab_size)
        if corpus.tokenizer_sha256 != tokenizer_sha256:
            raise UserError(f"{self.prefix}: made with another tokenizer than the model's; name data of its own")
        with TemporaryDirectory() as folder:  # for Megatron's indices: nothing is written beside the data
            found = build_valid_set(data, corpus, count * _BATCH, _SEED, Path(folder))
            assert found is not None
            return list(islice(micro_batches(found, data, 0, groups.dp.rank(), groups.dp.size()), count))


@torch.no_grad()
def measure(parts: Parts, batches: list[Batch], depths: int, groups: ProcessGroupCollection) -> dict[str, Any]:
    """Loss at depths 1 to ``depths`` and the gate's mean exit distribution [R] over the model's own loops."""
    model, loops = assemble(parts, groups).eval(), parts.model.num_loops
    meter = DepthMeter(list(range(1, max(depths, loops) + 1)), loops, [])
    for batch in batches:
        meter.add(*loop_losses(model, batch, LossConfig(), num_loops=max(depths, loops)), batch.mask_SB)
    measured = meter.evaluation(groups.dp)
    loss = [row.loss for row in measured.depths]
    return {"tokens": measured.tokens, "loss_per_depth": loss, "exit_distribution": list(measured.exit_distribution)}
