"""Loss and every gradient on this device, against looplm/reference in double precision with the same weights.

The product computes them as in training: through the trainer, Megatron's schedule and wrapper, and the head that writes
its gradient into the buffer. The reference is plain torch with autograd. Every case runs plain and with packed
documents, and with each way of recomputing.

An error is the largest difference of a tensor, relative to the largest value of its module's gradients. bf16 rounds
every activation to three digits, so there the error of a tensor is compared with that of the reference itself in bf16,
which rounds in other places.

Shapes: B batch, S sequence.
"""

from collections.abc import Mapping
from itertools import product, repeat
from typing import Any, NamedTuple, get_args

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from looplm import reference
from looplm.cli import from_dict
from looplm.config import (
    EngineConfig,
    GateConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Recompute,
)
from looplm.megatron.device import DEVICE
from looplm.megatron.settings import DTYPES
from looplm.model import LoopLM
from pretrain.data import Batch
from pretrain.trainer import Trainer
from tools.gpu.parts import Job
from tools.gpu.recipes import SEED, document_starts, started
from tools.gpu.record import Mismatch, Rows, Value

S, B, V = 64, 2, 128
BETA = 1.0  # as large as the losses, so that the gate's gradient is more than their small differences
FP32_TOLERANCE = 1e-4  # on a CPU the errors are near 3e-6
BF16_TOLERANCE = 0.1  # at least allowed in bf16; a mistake is off by about 1
BF16_FACTOR = 3.0  # and as many times the reference's own error in bf16

_SIZES: dict[str, Any] = {
    **{"vocab_size": V, "hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2, "num_attention_heads": 4},
    **{"num_loops": 3, "max_sequence_length": S},
}
_LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "mla": {**_SIZES, **_LATENT, "attention": "mla"},
    "mha": {**_SIZES, "attention": "mha", "num_query_groups": 2},  # grouped, which takes kernels of its own
}
GATES = {"lru": GateConfig(state_size=16), "linear": GateConfig(kind="linear")}
PRECISIONS = {"local": ("fp32", "bf16"), "transformer_engine": ("bf16",)}  # its attention kernels take 16 bits only


class Case(NamedTuple):
    """A model on one backend in one precision."""

    attention: str
    gate: str
    precision: str
    backend: str


class Found(NamedTuple):
    """Loss and gradients by name."""

    loss: Tensor
    gradients: dict[str, Tensor]


def run(job: Job) -> None:
    """Compare every case."""
    with started(job) as groups:
        rows = Rows(job.rows, job.deadline)
        for attention, gate, precision in product(MODELS, GATES, PRECISIONS[job.variant]):
            check_case(Case(attention, gate, precision, job.variant), groups, rows)


def check_case(case: Case, groups: ProcessGroupCollection, rows: Rows) -> None:
    """Add a row for each way of recomputing, plain and with documents."""
    model = from_dict(ModelConfig, MODELS[case.attention], where="tools.gpu.parity")
    weights = random_weights(model, GATES[case.gate], DTYPES[case.precision])
    batches = {"plain": random_tokens(None), "packed": random_tokens(document_starts(S, B))}
    wanted: dict[str, Found] = {}
    allowed: dict[str, dict[str, float]] = {}
    for name, batch in batches.items():
        wanted[name] = referenced(weights, model, GATES[case.gate], batch, torch.float64)
        allowed[name] = tolerances(case, weights, model, batch, wanted[name])
    for mode, (name, batch) in product(get_args(Recompute), batches.items()):
        title = f"{case.attention}, {case.gate}, {case.precision}, {name}, recompute {mode}"

        def measure(mode: Recompute = mode, name: str = name, batch: Batch = batch) -> Mapping[str, Value]:
            found = computed(case, weights, model, batch, mode, groups)
            return compare(found, wanted[name], allowed[name])

        rows.measure(title, measure)


def random_weights(model: ModelConfig, gate: GateConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return weights by name with which every parameter matters: no norm is 1, and no readout is 0."""
    generator, weights = torch.Generator().manual_seed(SEED), dict[str, Tensor]()
    for name, shape in sorted(reference.parameter_shapes(model, gate).items()):
        std = 0.3 if name.startswith("gate.") else 0.1
        drawn = (
            torch.rand(shape, generator=generator) + 0.5
            if "norm" in name
            else std * torch.randn(shape, generator=generator)
        )
        weights[name] = drawn.to(DEVICE, dtype)
    return weights


def random_tokens(document_start_SB: Tensor | None) -> Batch:
    """Return a micro-batch in which some labels have no loss."""
    generator = torch.Generator().manual_seed(SEED)
    ids_BS = torch.randint(V, (B, S + 1), generator=generator).to(DEVICE)
    mask_SB = (torch.rand(S, B, generator=generator) < 0.8).float().to(DEVICE)
    return Batch(ids_BS[:, :-1], ids_BS[:, 1:].t().contiguous(), mask_SB, document_start_SB)


def referenced(
    weights: Mapping[str, Tensor], model: ModelConfig, gate: GateConfig, batch: Batch, dtype: torch.dtype
) -> Found:
    """Return the reference's loss and gradients, computed in ``dtype``."""
    oracle = reference.ReferenceLM(model, gate, fused_attention=False).to(DEVICE, dtype)
    oracle.load_state_dict(dict(weights))
    start_SB = None if batch.document_start_SB is None else batch.document_start_SB.to(DEVICE)
    loss = oracle(batch.ids_BS, batch.labels_SB, BETA, batch.mask_SB, start_SB)
    loss.backward()
    return Found(loss.detach(), {name: _gradient(one) for name, one in oracle.named_parameters()})


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def computed(
    case: Case,
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    batch: Batch,
    mode: Recompute,
    groups: ProcessGroupCollection,
) -> Found:
    """Return the product's loss and gradients."""
    layout = ParallelConfig(recompute=mode)
    engine = EngineConfig(transformer_impl=case.backend)  # type: ignore[arg-type]  # one of its literals
    built = LoopLM(model, GATES[case.gate], groups, DTYPES[case.precision], layout, engine=engine)
    names = local_names(built)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.copy_(weights[names[name]])
    optim = OptimConfig(train_steps=1, precision=case.precision)  # type: ignore[arg-type]  # one of its literals
    trainer = Trainer(built, LossConfig(beta=BETA), optim, layout, groups)
    stats, _ = trainer.backward(repeat(batch), 1)
    gradients = {names[name]: one.main_grad.clone() for name, one in built.named_parameters()}
    return Found(torch.tensor(stats.loss, dtype=torch.float64, device=DEVICE), gradients)


def local_names(model: LoopLM) -> dict[str, str]:
    """Return each parameter's name in a local block, which is the reference's, by its own name."""
    renames = model.decoder.layers[0].submodules_config.sharded_state_dict_keys_map
    renamed = {}
    for name, _ in model.named_parameters():
        local = name
        for own, theirs in renames.items():
            local = local.replace(own, theirs)
        renamed[name] = local
    return renamed


def tolerances(
    case: Case, weights: Mapping[str, Tensor], model: ModelConfig, batch: Batch, wanted: Found
) -> dict[str, float]:
    """Return the largest allowed error of the loss and of each gradient."""
    if case.precision == "fp32":
        return dict.fromkeys(["loss", *wanted.gradients], FP32_TOLERANCE)
    rounded = referenced(weights, model, GATES[case.gate], batch, torch.bfloat16)
    return {name: max(BF16_TOLERANCE, BF16_FACTOR * error) for name, error in errors(rounded, wanted).items()}


def errors(found: Found, wanted: Found) -> dict[str, float]:
    """Return the error of the loss, and of each gradient relative to the largest value of its module's gradients.

    A gradient of one number, as that of the gate's bias, may cancel to a small part of what was added up; its module's
    other gradients say how large that was.
    """
    largest: dict[str, float] = {}
    for name, value in wanted.gradients.items():
        module = name.rpartition(".")[0]
        largest[module] = max(largest.get(module, 0.0), float(value.abs().max()))
    seen = {"loss": relative_error(found.loss, wanted.loss, float(wanted.loss.abs()))}
    for name, value in wanted.gradients.items():
        seen[name] = relative_error(found.gradients[name], value, largest[name.rpartition(".")[0]])
    return seen


def relative_error(found: Tensor, wanted: Tensor, scale: float) -> float:
    """Return the largest difference relative to ``scale``; infinite if the scale is zero and the difference is not."""
    difference = float((found.detach().double() - wanted.detach().double()).abs().max())
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


def compare(found: Found, wanted: Found, allowed: Mapping[str, float]) -> dict[str, Value]:
    """Return the error of the loss, and the worst gradient with its error; raise if any exceeds what is allowed."""
    seen = errors(found, wanted)
    wrong = {name: error for name, error in seen.items() if not error <= allowed[name]}  # NaN is wrong too
    worst = max(seen, key=lambda name: _excess(seen[name], allowed[name]))
    values: dict[str, Value] = {
        "loss": float(f"{seen['loss']:.1e}"),
        "worst": float(f"{seen[worst]:.1e}"),
        "allowed": float(f"{allowed[worst]:.1e}"),
        "tensor": worst,
    }
    if wrong:
        message = f"{len(wrong)} of {len(seen)} tensors differ, most of all {worst}: {seen[worst]:.1e}"
        raise Mismatch(f"{message}, allowed {allowed[worst]:.1e}", values)
    return values


def _excess(error: float, allowed: float) -> float:
    return error / allowed if error == error else float("inf")
