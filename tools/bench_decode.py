"""Speed of decoding: with a cache against without, early exit in three ways, absorbed against expanded MLA.

Early exit follows a pattern of depths that is drawn beforehand, half of the trained loops on average, because what is
compared is how a given saving is used. Three ways: *select-after* runs all loops and reads the state at the exit;
*compaction* runs the rows in step and drops those that left; *continuous* starts a row's next token at once.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from looplm import device
from looplm.config import GateConfig, ModelConfig
from looplm.inference.attention import LatentAttention
from looplm.inference.depth_batch import DepthBatch, Left
from looplm.inference.early_exit import ExitMeter, ExitRule, Verdict
from looplm.inference.generate import GenerationConfig, Generator
from looplm.inference.prefill import Prefill
from looplm.inference.stack import LoopedStack
from looplm.model import LoopLM

# The recipe's blocks, so many that the stack outweighs the head, as it does in models that are meant to be used.
LAYERS = 12
PROMPT, NEW = 64, 64
BATCHES = (1, 16)
DEPTHS_OF_4 = (1, 1, 1, 2, 2, 3, 4)  # most leave early, some do not: 2 on average

Prepare = Callable[[], Callable[[], object]]  # sets up a run that is timed


class _Pattern(ExitMeter):
    """Tokens leave at depths that were drawn beforehand; the gate is asked all the same, and not listened to."""

    def __init__(self, asked: ExitMeter, depths: Sequence[Sequence[int]]) -> None:
        self._asked, self._depths, self._place = asked, depths, [-1] * len(depths)

    def judge(
        self,
        before_ND: Tensor,
        h_SND: Tensor,
        rows: Sequence[int],
        loops: Sequence[int],
        length_N: Tensor | None = None,
    ) -> Verdict:
        self._asked.judge(before_ND, h_SND, rows, loops, length_N)
        for row, loop in zip(rows, loops, strict=True):
            self._place[row] += loop == 0
        depths = [self._depths[row][self._place[row] % NEW] for row in rows]
        return Verdict([loop + 1 >= depth for loop, depth in zip(loops, depths, strict=True)])


def bench_decode(model: ModelConfig, gate: GateConfig, groups: ProcessGroupCollection, repeats: int) -> None:
    """Print the tables; everything in turns, from the median."""
    built = LoopLM(replace(model, num_layers=LAYERS), gate, groups).eval()
    print(
        f"\ndecoding, fp32, {LAYERS} layers: prompts of {PROMPT} tokens, {NEW} new ones, {model.num_loops} loops, cache of the last loop"
    )
    for rows in BATCHES:
        _show(f"batch {rows}", _timed(_exits(built, rows), rows * NEW, repeats))
    _show("batch 1, a cache for each loop", _timed(_caches(built), NEW, repeats))
    if model.attention == "mla":
        _show("one layer's attention, 16 tokens over 512 entries", _timed(_attentions(built), 16, repeats))


def _exits(model: LoopLM, rows: int) -> dict[str, Prepare]:
    """Full depth, and early exit in three ways."""
    dice, loops = random.Random(0), model.shape.num_loops
    depths = [[max(1, round(dice.choice(DEPTHS_OF_4) * loops / 4)) for _ in range(NEW)] for _ in range(rows)]
    mean = statistics.mean(depth for row in depths for depth in row)
    print(f"  early exit at mean depth {mean:.2f}")
    return {
        "full depth": _drive(model, rows, None, continuous=True),
        "select-after": _drive(model, rows, depths, continuous=False, runs_on=True),
        "compaction": _drive(model, rows, depths, continuous=False),
        "continuous depth batching": _drive(model, rows, depths, continuous=True),
    }


def _drive(
    model: LoopLM, rows: int, depths: Sequence[Sequence[int]] | None, continuous: bool, runs_on: bool = False
) -> Prepare:
    """Greedy ids in all rows, prompts read beforehand, until there are ``rows * NEW``: as in the middle of a long stream.

    Args:
        model: any.
        rows: texts side by side.
        depths: at which tokens leave, for each row and place, over and over; None for full depth.
        continuous: rows go their own pace, or wait for each other after every token.
        runs_on: tokens that left stay in the compute until the last loop.
    """
    stack = LoopedStack(model)
    rule = ExitRule(max_depth=model.shape.num_loops, threshold=1.0 if depths is None else 0.5)

    @torch.inference_mode()
    def prepare() -> Callable[[], object]:
        batch = DepthBatch(model, stack, rule, "last", rows)
        job = Prefill(model, stack, rule, "last", [range(PROMPT)] * rows, rows * PROMPT)
        while not job.done:
            job.advance()
        for row in range(rows):
            batch.seat(row, job, row)
        if depths is not None:
            batch.runs_on, batch.meter = runs_on, _Pattern(batch.meter, depths)
        return lambda: decode(batch)

    @torch.inference_mode()
    def decode(batch: DepthBatch) -> None:
        ids, left = [0] * rows, rows * NEW
        with device.adapter_off():
            batch.start(range(rows), ids)
            exits: list[Left] = []
            while left > 0:
                exits.append(batch.advance())
                if not (exits[-1].rows if continuous else not batch.in_flight):
                    continue
                step, exits = batch.read(exits), []
                for row, token_id in zip(step.rows, step.logits_NV.argmax(-1).tolist(), strict=True):
                    ids[row], left = token_id, left - 1
                batch.start(step.rows, [ids[row] for row in step.rows])

    return prepare


def _caches(model: LoopLM) -> dict[str, Prepare]:
    """Without a cache, and with one."""
    generator = Generator(model, _NoText(), eos_id=-1)  # type: ignore[arg-type]
    config = GenerationConfig(temperature=0.0, max_new_tokens=NEW)

    @torch.no_grad()
    def cacheless() -> None:
        ids = list(range(PROMPT))
        for _ in range(NEW):
            h_1D = model(torch.tensor([ids], device=device.DEVICE)).hidden[-1][-1]
            ids.append(int(F.linear(h_1D, model.head_weight()).argmax()))

    prompt = [list(range(PROMPT))]
    return {
        "without a cache": lambda: cacheless,
        "with a cache": lambda: lambda: generator.generate(prompt, config),
    }


def _timed(contenders: dict[str, Prepare], tokens: int, repeats: int) -> dict[str, float]:
    """Tokens per second of each, in turns, from the median."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, prepare in contenders.items():
            run = prepare()
            device.synchronize()
            start = time.perf_counter()
            run()
            device.synchronize()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: tokens / statistics.median(times) for name, times in seconds.items()}


def _show(title: str, speed: dict[str, float]) -> None:
    """Against the first one."""
    first = next(iter(speed.values()))
    print(f"  {title}")
    for name, rate in speed.items():
        print(f"    {name:<28}{rate:>10,.0f} tokens/s{rate / first:>8.2f} x")


class _NoText:
    """A tokenizer for ids that nobody reads."""

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def _attentions(model: LoopLM) -> dict[str, Prepare]:
    """A token over cached entries: in the latent space, or with every entry expanded to heads."""
    shape, lanes, span = model.shape, 16, 512
    attention = LatentAttention(model.decoder.layers[0].self_attention, shape)
    nope = torch.randn(1, lanes, shape.num_attention_heads, shape.qk_nope_head_dim, device=device.DEVICE)
    rope = torch.randn(1, lanes, shape.num_attention_heads, shape.qk_rope_head_dim, device=device.DEVICE)
    entry_NTW = torch.randn(lanes, span, shape.kv_lora_rank + shape.qk_rope_head_dim, device=device.DEVICE)
    visible_11ST = torch.zeros(1, 1, 1, span, device=device.DEVICE)

    @torch.inference_mode()
    def absorbed() -> Tensor:
        return attention.attend_cached((nope, rope), entry_NTW, None)

    @torch.inference_mode()
    def expanded() -> Tensor:
        return attention.attend_prompt((nope, rope), entry_NTW.transpose(0, 1), visible_11ST)

    return {"expanded": lambda: expanded, "absorbed": lambda: absorbed}
