"""Backend (local or Transformer Engine) and matmul precision of the linear layers in the stack.

Parameters, residual stream, norms, attention core, embedding, head and gate always keep the run's own precision
(``optim.precision``). Only the linear layers inside the blocks use a lower one:

- *The gate* decides with sigmoids of small logits, its gradients are differences of losses between loops, and it has
  thousandths of the FLOPs.
- *The head* computes logits whose rounding is the loss's own error, R times per token.
- *The loop-end norm* feeds the head, the gate and the next loop: its rounding errors accumulate over R loops.
- *The embedding* is a table lookup: there is no product to speed up.
- *The attention core* stays out, as in Megatron's own recipes: probabilities far below FP8's smallest step matter.

**Delayed scaling and loops.** Every other recipe scales a tensor by its own largest value. ``delayed`` scales it by the
largest of an *earlier* history, one history per linear layer and operand. Transformer Engine writes one entry whenever
Megatron's block ends, which with loops is R times a micro-batch. Therefore (a) a history of H entries reaches back only
H / (R x micro-batches) steps; (b) all loops share one scale, the largest of their values, so the quietest loop uses the
fewest of FP8's values; (c) a scale is stale by a loop, not by a step: loop r is scaled by the values of loops r - 1,
r - 2, ..., and in backward by those of loops r + 1, r + 2, .... The history is also not in a checkpoint (it is a
pickle, which :mod:`looplm.checkpoint` never opens): after a resume the first micro-batch is cast unscaled. Hence the
default is ``tensorwise``.

**Not offered.** CUDA graphs: Transformer Engine's capture, as Megatron drives it, expects a layer once per micro-batch,
not R times; Megatron's own needs arguments of constant shape, which packed documents do not have. User buffers, which
hide tensor parallelism's messages behind the products: Megatron-core supports them for ``mha`` only, and a model of
Ouro's size fits on one GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from looplm.bounds import at_least, check_bounds, positive, require
from looplm.config.parallel import ParallelConfig

Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]
EMULATED = "emulate-"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Backend and matmul precision of the linear layers in the stack.

    Args:
        transformer_impl: local (torch and Megatron-core, any device) or transformer_engine (NVIDIA GPUs: fused norms
            and attention, FP8). Checkpoints do not depend on it.
        fp8: format of the linear layers in the blocks; null keeps optim.precision. e4m3 for all operands; hybrid takes
            e5m2 for gradients. emulate-e4m3, emulate-hybrid and, as their baseline, emulate-bf16 round to that format
            and multiply in fp32: a slow study of the loss on a machine without a GPU.
        fp8_recipe: how values are scaled into FP8's range: tensorwise (by a tensor's own largest), delayed (by the
            largest of earlier ones: mixes the loops), blockwise (by 1 x 128 and 128 x 128 blocks, Hopper), mxfp8 (by
            32 values, Blackwell).
        amax_history: delayed only: length of the history; a step adds model.num_loops entries per micro-batch.
        fp8_params: also keep the weights of the linear layers in FP8, beside the optimizer's fp32 ones.
        first_layers_bf16: layers at the stack's start whose linear layers stay in bf16.
        last_layers_bf16: layers at the stack's end whose linear layers stay in bf16.
    """

    transformer_impl: Literal["local", "transformer_engine"] = "local"
    fp8: Literal["e4m3", "hybrid", "emulate-bf16", "emulate-e4m3", "emulate-hybrid"] | None = None
    fp8_recipe: Recipe = "tensorwise"
    amax_history: int = positive(1024)
    fp8_params: bool = False
    first_layers_bf16: int = at_least(0, 0)
    last_layers_bf16: int = at_least(0, 0)

    def __post_init__(self) -> None:
        check_bounds(self, "engine")
        nvidia = self.transformer_impl == "transformer_engine"
        fix = f"it needs engine.transformer_impl=transformer_engine; without a GPU take {EMULATED}{self.fp8}"
        require(nvidia or not self.real_fp8, "engine.fp8", self.fp8, fix)
        fix = "it is for engine.transformer_impl=local; Transformer Engine has real FP8: leave out emulate-"
        require(not (self.emulated and nvidia), "engine.fp8", self.fp8, fix)
        require(self.real_fp8 or not self.fp8_params, "engine.fp8_params", True, "it needs engine.fp8=e4m3 or hybrid")
        fix = "mxfp8 keeps two copies of each weight; take another engine.fp8_recipe or leave it false"
        require(self.fp8_recipe != "mxfp8" or not self.fp8_params, "engine.fp8_params", True, fix)
        lower = self.fp8 not in (None, "emulate-bf16")
        fix = "only values in FP8 are scaled; name an FP8 format in engine.fp8, or leave it out"
        require(lower or self.fp8_recipe == EngineConfig.fp8_recipe, "engine.fp8_recipe", self.fp8_recipe, fix)
        delayed, length = lower and self.fp8_recipe == "delayed", self.amax_history
        fix = "only engine.fp8_recipe=delayed has a history; leave it out"
        require(delayed or length == EngineConfig.amax_history, "engine.amax_history", length, fix)
        for key in ("first_layers_bf16", "last_layers_bf16"):
            layers = getattr(self, key)
            require(lower or layers == 0, f"engine.{key}", layers, "without engine.fp8 every layer is bf16; leave it 0")
            fix = "delayed scaling has one context for all layers; take another engine.fp8_recipe or leave it 0"
            require(self.fp8_recipe != "delayed" or layers == 0, f"engine.{key}", layers, fix)

    @property
    def emulated(self) -> bool:
        """True if the linear layers only round to FP8 and multiply in fp32."""
        return self.fp8 is not None and self.fp8.startswith(EMULATED)

    @property
    def real_fp8(self) -> bool:
        """True if the linear layers multiply in FP8."""
        return self.fp8 is not None and not self.emulated

    def packs_documents(self, layout: ParallelConfig) -> bool:
        """Return True if attention is Transformer Engine's, which takes the documents' offsets; ours takes spans."""
        return self.transformer_impl == "transformer_engine" and layout.context == 1

    def stays_in_bf16(self, layer: int, num_layers: int) -> bool:
        """Return True if layer ``layer`` (from 0, over the whole stack) keeps its linear layers in bf16."""
        return layer < self.first_layers_bf16 or layer >= num_layers - self.last_layers_bf16

    def check(
        self, num_layers: int, widths: Mapping[str, int], layout: ParallelConfig, tokens: int, frozen: bool
    ) -> None:
        """Raise a :class:`UserError` if these keys do not go with the model or the layout.

        Args:
            num_layers: layers of the stack.
            widths: sides of a block's matrices on one rank, by what they come from.
            layout: the parallel layout.
            tokens: tokens of a micro-batch: sequence length times sequences.
            frozen: True if the trunk is frozen (the gate's stage).
        """
        layers, recompute = num_layers // layout.pipeline, layout.recompute
        for key in ("first_layers_bf16", "last_layers_bf16"):
            kept = getattr(self, key)
            require(kept <= layers, f"engine.{key}", kept, f"a pipeline rank has {layers} layers")
        if self.fp8_recipe == "delayed":
            twice = recompute in (("loop",) if self.real_fp8 else ("full", "loop"))
            separate = self.emulated and layout.pipeline > 1
            for refused, reason in (
                (frozen, "a frozen trunk never updates its scales"),
                (twice, f"with parallel.recompute={recompute} its history would hold every value twice"),
                (separate, "its emulation compares all ranks, which parallel.pipeline separates"),
            ):
                require(not refused, "engine.fp8_recipe", "delayed", f"{reason}; take another, such as tensorwise")
        sharded = layout.distributed_optimizer or not self.fp8_params
        require(sharded, "engine.fp8_params", True, "it needs parallel.distributed_optimizer=true")
        if self.real_fp8:
            self._check_sizes(widths, layout, tokens)

    def _check_sizes(self, widths: Mapping[str, int], layout: ParallelConfig, tokens: int) -> None:
        unit, recipe = 32 if self.fp8_recipe == "mxfp8" else 16, f"engine.fp8_recipe={self.fp8_recipe}"
        for key, width in widths.items():
            fix = f"{recipe} multiplies in multiples of {unit} (after parallel.tensor={layout.tensor})"
            require(width % unit == 0, key, width, fix)
        own = tokens // (layout.context * (layout.tensor if layout.sequence_parallel else 1))
        fix = f"{recipe} needs a multiple of {unit} tokens per rank"
        require(own % unit == 0, "data.seq_length x micro_batch_size", own, fix)
