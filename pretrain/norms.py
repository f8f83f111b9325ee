"""Norms that show where a step's numbers grow: each loop's hidden state and its gradient, and each module's gradient.

They are kept on the device until :class:`pretrain.trainer.Trainer` sums them over the ranks together with the losses,
so a step has no further collective and no further wait for the device.

Shapes: S sequence, B micro-batch, D hidden, R loops.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from looplm.config import LossConfig
from looplm.megatron.device import DEVICE
from looplm.model import LoopLM
from pretrain.optim import updated_part

ModuleName = Literal["embedding", "attention", "mlp", "norms", "gate", "head"]
MODULES: tuple[ModuleName, ...] = get_args(ModuleName)
# Norms are summed in fp32, whose largest number is 3.4e38, of gradients that are summed over the tokens.
LARGEST_SQUARE = 1e38


@dataclass(frozen=True)
class Norms:
    """Norms of one training step, over all ranks; lists have one entry per loop.

    ``hidden_rms`` is the root mean square of the residual stream before the loop-end norm, which makes any growth
    invisible. A loop's state is what the next loop reads: normed, with ``model.loop_norm: readout`` not.
    ``hidden_grad_norm`` is the norm of the loss's gradient with respect to it, through this loop's read-out and all
    later loops; zeros if the trunk is frozen. ``hidden_cosine`` is the cosine of the states of a loop and of the one
    before, both with all tokens as one vector, and 1 for the first loop: near 1 it hardly moves. ``grad_norms``
    are those of the trained modules, before clipping. Loops that the step did not run have NaN.
    """

    hidden_rms: list[float]
    hidden_grad_norm: list[float]
    hidden_cosine: list[float]
    grad_norms: dict[str, float]

    @classmethod
    def of_sums(
        cls, hidden: Tensor, gradient: Tensor, tokens: int, modules: Sequence[ModuleName], loops: int | None = None
    ) -> "Norms":
        """Return the norms of :meth:`LoopNorms.sums` and :meth:`GradientNorms.sums`, added up over the ranks.

        ``loops`` is how many the step ran; None for all.
        """
        sums_4R = hidden[1:].view(4, -1).clone()
        sums_4R[:, loops or sums_4R.size(1) :] = math.nan
        values, (residual_R, gradient_R, square_R, product_R) = hidden[0].clamp(min=1), sums_4R
        cosine_R = product_R / (square_R * torch.cat((square_R[:1], square_R[:-1]))).sqrt()
        by_module = dict(zip(MODULES, (gradient.sqrt() / max(tokens, 1)).tolist(), strict=True))
        return cls(
            hidden_rms=(residual_R / values).sqrt().tolist(),
            hidden_grad_norm=(gradient_R.sqrt() / max(tokens, 1)).tolist(),
            hidden_cosine=cosine_R.tolist(),
            grad_norms={module: by_module[module] for module in modules},
        )

    @property
    def grad_norm(self) -> float:
        """Norm of the whole gradient, before clipping."""
        return math.sqrt(sum(norm**2 for norm in self.grad_norms.values()))


class LoopNorms:
    """Norms of each loop's hidden state and of its gradient, for each micro-batch that this rank runs in a step.

    Only the last pipeline rank has the end of a loop; on the others all lists stay empty.
    """

    def __init__(self, model: LoopLM) -> None:
        self._loops = self._ran = model.model_config.num_loops
        self._residual = list[Tensor]()
        self.restart()
        if model.post_process:
            model.decoder.final_layernorm.register_forward_pre_hook(self._keep)

    def restart(self, loops: int | None = None) -> None:
        """Forget the micro-batches of the last step. The next one runs ``loops`` loops; None for all."""
        self._ran = loops or self._loops
        self.hidden: list[list[Tensor]] = [[] for _ in range(self._loops)]  # loop → micro-batch → norm
        self.gradient: list[dict[int, Tensor]] = [{} for _ in range(self._loops)]
        self._squares = [list[Tensor]() for _ in range(self._loops)]  # loop → micro-batch → h_r · h_r
        self._products = [list[Tensor]() for _ in range(self._loops)]  # h_r · h_{r-1}
        self._before: dict[int, Tensor] = {}  # micro-batch → state after its last loop
        self._values = 0  # in the hidden states after one loop

    def forget_recomputed(self) -> None:
        """Forget norms that no :meth:`watch` took: recomputation in backward runs the norm again, as do validations."""
        self._residual.clear()

    def watch(self, loop: int, h_SBD: Tensor) -> None:
        """Keep the norm of the residual stream behind ``h_SBD``, and of its gradient when backward comes to it.

        Keep also how the state lies to that of the loop before.
        """
        micro_batch, gradient = len(self.hidden[loop]), self.gradient[loop]
        self.hidden[loop].append(self._residual.pop(0))
        now = h_SBD.detach()
        self._squares[loop].append(_dot(now, now))
        self._products[loop].append(_dot(now, self._before.pop(micro_batch, now)))
        if loop + 1 < self._ran:
            self._before[micro_batch] = now
        self._values += h_SBD.numel() if loop == 0 else 0
        if h_SBD.requires_grad:
            h_SBD.register_hook(lambda grad_SBD: gradient.update({micro_batch: _norm(grad_SBD)}))

    def _keep(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        self._residual.append(_norm(inputs[0]))

    def sums(self) -> Tensor:
        """Return the number of values after one loop, and four sums for each loop: [1 + 4R].

        These are the squares of the residual stream and of the gradients, and the products of each state with itself
        and with the one before. They are summed over this rank's micro-batches.
        """
        norms = [*self.hidden, *(list(found.values()) for found in self.gradient)]
        zero = torch.zeros((), dtype=torch.float64, device=DEVICE)
        squares = [torch.stack(found).double().square().sum() if found else zero for found in norms]
        products = [torch.stack(found).double().sum() if found else zero for found in (*self._squares, *self._products)]
        return torch.stack([zero + self._values, *squares, *products])


class _Part(NamedTuple):
    """A parameter's gradient, as far as this rank updates it."""

    name: str
    parameter: torch.nn.Parameter
    span: slice | None  # of the flattened gradient; None for all of it
    counted: bool  # False for a copy of what another rank counts


class GradientNorms:
    """Norms of the gradients that this rank updates, after they were summed over the ranks.

    Args:
        ddp: the model in Megatron's wrapper, whose buffers hold the gradients.
        optimizer: decides which part of a parameter this rank updates.
        groups: the process groups.
    """

    def __init__(
        self, ddp: DistributedDataParallel, optimizer: MegatronOptimizer, groups: ProcessGroupCollection
    ) -> None:
        replica = groups.dp_cp.rank() > 0 and not ddp.ddp_config.use_distributed_optimizer
        self._parts = list[_Part]()
        for name, parameter in ddp.module.named_parameters():
            span = updated_part(optimizer, parameter)
            if parameter.requires_grad and span != slice(0, 0):
                unique = param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, groups.tp)
                self._parts.append(_Part(name, parameter, span, unique and not replica))
        modules = [MODULES.index(module_of(part.name)) for part in self._parts]
        counted = torch.tensor([part.counted for part in self._parts], dtype=torch.bool, device=DEVICE)
        is_of_MN = torch.arange(len(MODULES), device=DEVICE)[:, None] == torch.tensor(modules, device=DEVICE)
        self._counted_MN = is_of_MN & counted

    def sums(self) -> Tensor:
        """Return the squared norm of each of :data:`MODULES`, as far as this rank counts it, and the number of faults.

        A fault is a gradient that is not finite, also if another rank counts its norm.
        """
        norm_N = self._norms().double()
        # Not index_add_, which on a GPU adds in any order; not a product, in which one infinite norm spoils all.
        squares_M = torch.where(self._counted_MN, norm_N.square(), 0.0).sum(1)
        return torch.cat((squares_M, (~norm_N.isfinite()).sum().double().reshape(1)))

    def not_finite(self) -> list[str]:
        """Return the names of the parameters whose gradient is not finite on this rank."""
        finite = self._norms().isfinite().tolist()
        return [part.name for part, good in zip(self._parts, finite, strict=True) if not good]

    def _norms(self) -> Tensor:
        gradients = [
            part.parameter.main_grad if part.span is None else part.parameter.main_grad.view(-1)[part.span]  # type: ignore[attr-defined]
            for part in self._parts
        ]
        if not gradients:  # a pipeline rank without the gate, in the gate's training stage
            return torch.zeros(0, device=DEVICE)
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))


def trained_modules(loss: LossConfig, tied: bool) -> tuple[ModuleName, ...]:
    """Return the modules that have gradients; a tied head is part of the embedding."""
    if loss.frozen_trunk:
        return ("gate",)
    absent = {"head"} if tied else set[ModuleName]()
    return tuple(module for module in MODULES if module not in absent | ({"gate"} if not loss.trains_gate else set()))


def module_of(name: str) -> ModuleName:
    """Return the part of the model that a parameter belongs to."""
    rules: tuple[tuple[str, ModuleName], ...] = (
        ("embedding.", "embedding"),
        ("injection.", "embedding"),  # it brings the embedding into later loops
        ("step_embedding.", "embedding"),
        ("output_layer.", "head"),
        ("gate.", "gate"),
    )
    for start, module in rules:
        if name.startswith(start):
            return module
    *_, owner, own = name.split(".")
    if "norm" in owner or "norm" in own:  # Transformer Engine's layer_norm_weight is inside a fused linear layer
        return "norms"
    return "attention" if ".self_attention." in name else "mlp"


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x.flatten().float(), y.flatten().float())


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach(), dtype=torch.float32)
