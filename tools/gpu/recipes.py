"""Models and batches that the parts measure: 0.3 B parameters at 4K tokens on a GPU, a few thousand on a CPU.

Shapes: B batch, S sequence.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from looplm.bounds import require
from looplm.cli import from_dict
from looplm.config import EngineConfig, Recompute, RunConfig
from looplm.megatron import device, process_groups
from pretrain.data import Batch
from tools.bench.memory import random_batch
from tools.gpu.parts import DeviceName, Job

Attention = Literal["mla", "mha"]
SEED = 1234

_SIZES: dict[DeviceName, dict[str, Any]] = {
    "cuda": {
        **{"vocab_size": 49_152, "hidden_size": 1024, "ffn_hidden_size": 2816, "num_layers": 16},
        **{"num_attention_heads": 8, "num_loops": 4, "max_sequence_length": 4096},
    },
    "cpu": {
        **{"vocab_size": 256, "hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 2},
        **{"num_attention_heads": 2, "num_loops": 3, "max_sequence_length": 64},
    },
}
_LATENT: dict[DeviceName, dict[str, Any]] = {
    "cuda": {"kv_lora_rank": 256},  # and the heads of DeepSeek-V3: 128 + 64 for queries and keys, 128 for values
    "cpu": {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
}


@contextmanager
def started(job: Job) -> Iterator[ProcessGroupCollection]:
    """Check that this process runs on the job's device, and yield the process groups of a job of one process."""
    check_device(job.device)
    groups = process_groups.start(SEED)
    try:
        yield groups
    finally:
        process_groups.stop()


def check_device(wanted: DeviceName) -> None:
    """Raise a user error if this process is on another device than the check was asked to measure."""
    found = device.DEVICE.type
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    fix = f"torch {torch.__version__} ({built}) sees no GPU; look at the driver, or give --device cpu"
    require(found == wanted, "device", wanted, fix if wanted == "cuda" else "hide the GPU: CUDA_VISIBLE_DEVICES=")


def recipe(
    name: DeviceName,
    attention: Attention,
    *,
    recompute: Recompute = "none",
    micro_batch_size: int = 2,
    engine: EngineConfig | None = None,
) -> RunConfig:
    """Return the stage-1 recipe of the speed measurements, with one micro-batch a step."""
    sizes = _SIZES[name]
    latent = _LATENT[name] if attention == "mla" else {}
    length = sizes["max_sequence_length"]
    batch = {"seq_length": length, "micro_batch_size": micro_batch_size, "global_batch_size": micro_batch_size}
    values: dict[str, Any] = {
        "output_dir": "unused",
        "model": {**sizes, **latent, "attention": attention},
        "gate": {"kind": "lru" if attention == "mla" else "linear"},
        "optim": {"train_steps": 1000, "warmup_steps": 100, "precision": "bf16"},
        "data": {"train": [{"prefix": "unused"}], **batch},
        "parallel": {"recompute": recompute},
        "engine": vars(engine or EngineConfig()),
    }
    return from_dict(RunConfig, values, where="tools.gpu.recipes")


def batch_of(config: RunConfig, documents: bool) -> Batch:
    """Return a micro-batch of random tokens: each sample one document, or about eight of different lengths."""
    batch = random_batch(config, config.data.micro_batch_size)
    return batch._replace(document_start_SB=document_starts(*batch.labels_SB.shape)) if documents else batch


def document_starts(length: int, samples: int, documents: int = 8) -> Tensor:
    """Return the first position of each token's document [S, B], on the host; the borders are random but fixed."""
    generator = torch.Generator().manual_seed(SEED)
    start_SB = torch.zeros(length, samples, dtype=torch.int64)
    for sample in range(samples):
        borders = torch.randperm(length - 1, generator=generator)[: documents - 1] + 1
        for border in borders.sort().values.tolist():
            start_SB[border:, sample] = border
    return start_SB
