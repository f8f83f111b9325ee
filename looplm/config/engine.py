"""What the stack's linears are made of, and in which numbers they multiply.

Parameters, residual stream, norms, attention's core, embedding, head and gate keep the run's own precision
(``optim.precision``) in every case. Only the linears inside the blocks go lower:

- *The gate* decides with sigmoids of small logits, and its gradients are differences of losses between loops; it has
  thousandths of the FLOPs.
- *The head* makes logits whose rounding is the loss's own error, R times a token.
- *The loop-end norm* feeds the head, the gate and the next loop at once: what it rounds is rounded again R times.
- *The embedding* is a table: there is no product to speed up.
- *Attention's core* stays out as in Megatron's own recipes: probabilities far below FP8's smallest step matter.

**Delayed scaling and loops.** Every other recipe scales a tensor by its own largest value. ``delayed`` scales it by the
largest of an *earlier* history, one history per linear and operand. Transformer Engine writes one entry whenever
Megatron's block ends, which under loops is R times a micro-batch. So (a) a history of H entries reaches back only
H / (R x micro-batches) steps; (b) all loops share one scale, the largest of their values: the quietest loop uses fewest of
FP8's values; (c) a scale is stale by a loop, not by a step: loop r is scaled by what loops r - 1, r - 2, ... were, and in
backward by loops r + 1, r + 2, .... The history is not in a checkpoint either (it is a pickle, and
:mod:`looplm.checkpoint` opens none): after a resume the first micro-batch is cast unscaled. Hence the default is
``tensorwise``.

**Not offered.** CUDA graphs: Transformer Engine's capture, as Megatron drives it, expects a layer once per micro-batch,
not R times; Megatron's own wants arguments of constant shape, and packed documents have none. User buffers, which hide
tensor parallelism's messages behind the products: Megatron-core knows them for ``mha`` only, and a model of Ouro's size
fits on one GPU.
"""

from dataclasses import dataclass
from typing import Literal

from looplm.cli import require
from looplm.config.model import ModelConfig
from looplm.config.parallel import ParallelConfig

Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]
EMULATED = "emulate-"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the stack's linears are made of, and in which numbers they multiply.

    Args:
        transformer_impl: local (torch and Megatron-core, any device) or transformer_engine (NVIDIA GPUs: fused norms and
            attention, FP8). Checkpoints do not depend on it.
        fp8: format of the linears in the blocks; null keeps optim.precision. e4m3 for all operands; hybrid takes e5m2 for
            gradients. emulate-e4m3, emulate-hybrid and, as their baseline, emulate-bf16 round to that format and
            multiply in fp32: a slow study of the loss on a machine without a GPU.
        fp8_recipe: how values are scaled into FP8's range: tensorwise (by a tensor's own largest), delayed (by the largest
            of earlier ones: mixes the loops), blockwise (by 1 x 128 and 128 x 128 blocks, Hopper), mxfp8 (by 32 values,
            Blackwell).
        amax_history: delayed only: entries remembered; a step makes model.num_loops per micro-batch.
        fp8_params: keep the linears' weights in FP8 too, beside the optimizer's fp32 ones.
        first_layers_bf16: layers at the stack's start whose linears stay in bf16.
        last_layers_bf16: layers at the stack's end whose linears stay in bf16.
    """

    transformer_impl: Literal["local", "transformer_engine"] = "local"
    fp8: Literal["e4m3", "hybrid", "emulate-bf16", "emulate-e4m3", "emulate-hybrid"] | None = None
    fp8_recipe: Recipe = "tensorwise"
    amax_history: int = 1024
    fp8_params: bool = False
    first_layers_bf16: int = 0
    last_layers_bf16: int = 0

    def __post_init__(self) -> None:
        engine = self.transformer_impl == "transformer_engine"
        require(not self.real_fp8 or engine, "engine.fp8", self.fp8, f"it needs engine.transformer_impl=transformer_engine; without a GPU take {EMULATED}{self.fp8}")  # fmt: skip
        require(not (self.emulated and engine), "engine.fp8", self.fp8, "it is for engine.transformer_impl=local; Transformer Engine has the real one")  # fmt: skip
        require(self.amax_history > 0, "engine.amax_history", self.amax_history, "give a number above 0")
        require(not self.fp8_params or self.real_fp8, "engine.fp8_params", True, "it needs engine.fp8=e4m3 or hybrid")
        require(not self.fp8_params or self.fp8_recipe != "mxfp8", "engine.fp8_params", True, "mxfp8 keeps two copies of each weight; take another engine.fp8_recipe or leave it false")  # fmt: skip
        for key in ("first_layers_bf16", "last_layers_bf16"):
            layers = getattr(self, key)
            require(layers >= 0, f"engine.{key}", layers, "give 0 or more")
            require(layers == 0 or self.fp8 not in (None, "emulate-bf16"), f"engine.{key}", layers, "without engine.fp8 every layer is; leave it 0")  # fmt: skip
            require(layers == 0 or self.fp8_recipe != "delayed", f"engine.{key}", layers, "delayed scaling has one context for all layers; take another engine.fp8_recipe or leave it 0")  # fmt: skip

    @property
    def emulated(self) -> bool:
        """Whether the linears only round as FP8 would."""
        return self.fp8 is not None and self.fp8.startswith(EMULATED)

    @property
    def real_fp8(self) -> bool:
        """Whether the linears multiply in FP8."""
        return self.fp8 is not None and not self.emulated

    def packs_documents(self, layout: ParallelConfig) -> bool:
        """Whether attention is told where documents begin; else a mask hides them from each other."""
        return self.transformer_impl == "transformer_engine" and layout.context == 1

    def stays_in_bf16(self, layer: int, num_layers: int) -> bool:
        """Whether the linears of layer ``layer``, counted from 0 over the whole stack, do."""
        return layer < self.first_layers_bf16 or layer >= num_layers - self.last_layers_bf16

    def check(self, model: ModelConfig, layout: ParallelConfig, tokens: int, frozen: bool) -> None:
        """Refuse what the model or the layout cannot have.

        Args:
            model: whose linears these are.
            layout: over the ranks.
            tokens: of a micro-batch: sequence length times sequences.
            frozen: whether the trunk is (the gate's stage).
        """
        layers = model.num_layers // layout.pipeline
        for key in ("first_layers_bf16", "last_layers_bf16"):
            kept = getattr(self, key)
            require(kept <= layers, f"engine.{key}", kept, f"a pipeline rank has {layers} layers")
        delayed = self.fp8 not in (None, "emulate-bf16") and self.fp8_recipe == "delayed"
        other = "take another, tensorwise say"
        require(
            not (delayed and frozen),
            "engine.fp8_recipe",
            "delayed",
            f"a frozen trunk never updates its scales; {other}",
        )
        twice = layout.recompute in (("loop",) if self.real_fp8 else ("full", "loop"))
        require(not (delayed and twice), "engine.fp8_recipe", "delayed", f"with parallel.recompute={layout.recompute} its history would hold every value twice; {other}")  # fmt: skip
        require(not (delayed and self.emulated and layout.pipeline > 1), "engine.fp8_recipe", "delayed", f"its emulation compares all ranks, which parallel.pipeline keeps apart; {other}")  # fmt: skip
        require(not self.fp8_params or layout.distributed_optimizer, "engine.fp8_params", True, "it needs parallel.distributed_optimizer=true")  # fmt: skip
        if self.real_fp8:
            self._check_sizes(model, layout, tokens)

    def _check_sizes(self, model: ModelConfig, layout: ParallelConfig, tokens: int) -> None:
        unit = 32 if self.fp8_recipe == "mxfp8" else 16
        for key, width in linear_widths(model, layout.tensor).items():
            require(width % unit == 0, key, width, f"engine.fp8_recipe={self.fp8_recipe} multiplies in multiples of {unit} (after parallel.tensor={layout.tensor})")  # fmt: skip
        own = tokens // (layout.context * (layout.tensor if layout.sequence_parallel else 1))
        require(own % unit == 0, "data.seq_length x micro_batch_size", own, f"engine.fp8_recipe={self.fp8_recipe} wants a multiple of {unit} tokens a rank")  # fmt: skip


def linear_widths(model: ModelConfig, tensor: int) -> dict[str, int]:
    """The sides of the matrices in a block, as ``tensor`` ranks hold them, by what they come from."""
    heads = model.num_attention_heads // tensor
    widths = {"model.hidden_size": model.hidden_size, "model.ffn_hidden_size": model.ffn_hidden_size // tensor}
    if model.attention == "mha":
        groups = model.query_groups // tensor
        return {
            **widths,
            "model.num_attention_heads x head_dim": heads * model.attention_head_dim,
            "(num_attention_heads + 2 x num_query_groups) x head_dim": (heads + 2 * groups) * model.attention_head_dim,
        }
    widths |= {
        "model.num_attention_heads x (qk_nope_head_dim + qk_rope_head_dim)": heads * model.attention_head_dim,
        "model.num_attention_heads x (qk_nope_head_dim + v_head_dim)": heads
        * (model.qk_nope_head_dim + model.v_head_dim),
        "model.num_attention_heads x v_head_dim": heads * model.v_head_dim,
        "model.kv_lora_rank": model.kv_lora_rank,
        "model.kv_lora_rank + qk_rope_head_dim": model.kv_lora_rank + model.qk_rope_head_dim,
    }
    return widths if model.q_lora_rank is None else {**widths, "model.q_lora_rank": model.q_lora_rank}
