"""Speed of early exit: all loops for every token, compared with three ways to profit from tokens that need fewer.

    select-after  run all loops, and read the state of the exit loop
    compaction    decode the rows in step, and drop those that have exited from later loops
    continuous    start a row's next token at once: continuous depth batching

With a trained checkpoint its gate decides, at the lowest threshold whose loss through the same cache is within 1 % of
full depth, over the checkpoint's own validation text. The text is given, so all strategies do the same work. Without a
checkpoint, random depths are used, half of the trained loops on average: this compares how a given saving is used.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from looplm import checkpoint
from looplm.bounds import require
from looplm.checkpoint import OpenedModel, step_folder
from looplm.config import GateConfig, ModelConfig
from looplm.evaluation.cached import Text, decode_texts, texts_of
from looplm.failures import UserError
from looplm.inference.depth_batch import DepthBatch, ExitedTokens
from looplm.inference.early_exit import ExitDecider, ExitDecision, ExitRule
from looplm.inference.kv_cache import CacheMode
from looplm.inference.prefill import Prefill
from looplm.inference.stack import LoopedStack
from looplm.model import LoopLM
from pretrain.data import build_valid_set, check_corpus, micro_batches
from tools.bench.timing import PrepareRun, print_speeds, rates

Strategy = Literal["full depth", "select-after", "compaction", "continuous depth batching"]
PROMPT, NEW = 64, 64
BATCHES = (1, 16)
CACHE: CacheMode = "last"
TOLERANCE = 1.01  # of full depth's loss
THRESHOLDS = [round(0.05 * step, 2) for step in range(1, 20)]
LOSS_TEXTS = 32
# Without a checkpoint: the recipe's blocks, enough for the stack to outweigh the head, as in models that are used.
LAYERS = 12
DEPTHS_OF_4 = (1, 1, 1, 2, 2, 3, 4)  # most tokens exit early, some do not: 2 on average


@dataclass(frozen=True)
class Workload:
    """A model, texts to decode with it, and the depths at which tokens exit."""

    model: LoopLM  # in eval mode
    texts: Sequence[Sequence[int]]  # token ids, longer than the prompt
    rule: ExitRule  # when tokens exit by the gate
    depths: Sequence[Sequence[int]] | None = None  # for each text and position, repeated; None if the gate decides
    opened: OpenedModel | None = None  # the checkpoint of the model; None if it is untrained


def check_workload(directory: str) -> None:
    """Raise a :class:`UserError` if a checkpoint has no validation text that is long enough to decode.

    It opens no weights, so it can precede measurements that take long.
    """
    step = step_folder.locate(directory)
    run = checkpoint.read_config(step)
    if run is None or not run.data.valid:
        raise UserError(f"checkpoint: {step} was trained without data.valid; give one of a run that has it")
    fix = f"no document in its validation samples has {PROMPT} + {NEW} tokens; give a checkpoint of longer ones"
    require(len(_long_texts(step)) > 0, "checkpoint", str(step), fix)


def trained_workload(directory: str, groups: ProcessGroupCollection) -> Workload:
    """Return a checkpoint's model and validation text, at the lowest threshold that costs at most 1 %."""
    opened = checkpoint.open_model(directory, groups)
    texts = _long_texts(opened.folder)
    full = ExitRule(max_depth=opened.model.model_config.num_loops)
    some = texts[:LOSS_TEXTS]
    measured = decode_texts(opened.model, some, PROMPT, LOSS_TEXTS, CACHE, full)
    for threshold in THRESHOLDS:
        rule = replace(full, threshold=threshold)
        exited = decode_texts(opened.model, some, PROMPT, LOSS_TEXTS, CACHE, rule)
        if exited.loss <= TOLERANCE * measured.loss:
            break
    else:
        rule, exited = full, measured
    early = f"loss {exited.loss / exited.tokens:.4f}, mean depth {exited.depth / exited.tokens:.2f}"
    late = f"at full depth {measured.loss / measured.tokens:.4f}"
    print(f"\nearly exit by the gate of {opened.folder}: at threshold {rule.threshold} {early}; {late}")
    return Workload(opened.model, [text.ids for text in texts], rule, opened=opened)


def random_workload(model: ModelConfig, gate: GateConfig, groups: ProcessGroupCollection) -> Workload:
    """Return untrained blocks and random depths; the gate is computed as usual, but its scores are ignored."""
    built, rng, rows = LoopLM(replace(model, num_layers=LAYERS), gate, groups).eval(), random.Random(0), max(BATCHES)
    depths = [[max(1, round(rng.choice(DEPTHS_OF_4) * model.num_loops / 4)) for _ in range(NEW)] for _ in range(rows)]
    texts = [[rng.randrange(model.vocab_size) for _ in range(PROMPT + NEW)] for _ in range(rows)]
    print(f"\nearly exit at random depths, {LAYERS} untrained layers")
    return Workload(built, texts, ExitRule(max_depth=model.num_loops, threshold=0.5), depths)


def bench_exit(workload: Workload, repeats: int) -> None:
    """Print the speed of every strategy for each batch size."""
    for rows in BATCHES:
        depths: list[float] = []
        contenders = {name: prepare_decoding(workload, rows, name) for name in get_args(Strategy)}
        contenders["compaction"] = prepare_decoding(workload, rows, "compaction", depths)
        speeds = rates(contenders, rows * NEW, repeats)
        print_speeds(f"batch {rows}, mean depth {statistics.mean(depths):.2f} of {workload.rule.max_depth}", speeds)


def prepare_decoding(
    workload: Workload, rows: int, strategy: Strategy, depths: list[float] | None = None
) -> PrepareRun:
    """Return the preparation of a run that decodes ``rows * NEW`` tokens after prompts that were read beforehand.

    Args:
        workload: model and texts.
        rows: texts side by side.
        strategy: how early exit is used.
        depths: list to which the depths of the tokens are added.
    """
    full = strategy == "full depth"
    rule = replace(workload.rule, threshold=1.0) if full else workload.rule
    stack, texts = LoopedStack(workload.model), [workload.texts[row % len(workload.texts)] for row in range(rows)]

    @torch.inference_mode()
    def prepare() -> Callable[[], object]:
        batch = DepthBatch(stack, rule, CACHE, rows)
        prefill = Prefill(stack, rule, CACHE, [text[:PROMPT] for text in texts], rows * PROMPT)
        while not prefill.done:
            prefill.advance()
        for row in range(rows):
            batch.seat(row, prefill, row)
        batch.runs_on = strategy == "select-after"
        if workload.depths is not None and not full:
            batch.decider = _GivenDepths(stack, rule, workload.depths)
        return lambda: decode(batch)

    @torch.inference_mode()
    def decode(batch: DepthBatch) -> None:
        position, remaining = [PROMPT] * rows, rows * NEW
        batch.append(range(rows), [text[PROMPT] for text in texts])
        passes: list[ExitedTokens] = []
        while remaining > 0:
            passes.append(batch.advance())
            exited = passes[-1].rows if strategy == "continuous depth batching" else not batch.in_flight
            if not exited:
                continue
            step, passes = batch.read(passes), []
            step.logits_NV.argmax(-1).tolist()  # a greedy decoder would wait for this
            for row in step.rows:
                position[row], remaining = position[row] + 1, remaining - 1
            batch.append(step.rows, [texts[row][position[row] % len(texts[row])] for row in step.rows])
            if depths is not None:
                depths.extend(step.depths)

    return prepare


class _GivenDepths(ExitDecider):
    """Decider by which tokens exit at given depths; the gate is computed as usual, but its scores are ignored."""

    def __init__(self, stack: LoopedStack, rule: ExitRule, depths: Sequence[Sequence[int]]) -> None:
        super().__init__(stack, rule, len(depths))
        self._depths, self._position = depths, [-1] * len(depths)

    def decide(
        self,
        before_ND: Tensor,
        h_SND: Tensor,
        rows: Sequence[int],
        loops: Sequence[int],
        length_N: Tensor | None = None,
    ) -> ExitDecision:
        super().decide(before_ND, h_SND, rows, loops, length_N)
        for row, loop in zip(rows, loops, strict=True):
            self._position[row] += loop == 0
        depths = [self._depths[row][self._position[row] % NEW] for row in rows]
        return ExitDecision([loop + 1 >= depth for loop, depth in zip(loops, depths, strict=True)])


def _long_texts(folder: Path) -> list[Text]:
    """Return the documents, long enough to decode, in the validation samples that the checkpoint's run measured."""
    run = checkpoint.read_config(folder)
    assert run is not None, "the checkpoint was made by a run"
    corpus = check_corpus(run.data, run.model.vocab_size)
    count = max(1, run.logging.eval_samples // run.data.micro_batch_size)
    with TemporaryDirectory() as indices:  # the run's own folder may have been moved since, or be another's
        valid_set = build_valid_set(run.data, corpus, run.logging.eval_samples, run.seed, Path(indices))
        assert valid_set is not None, "the recipe has data.valid"
        batches = islice(micro_batches(valid_set, run.data, 0, 0, 1), count)
        texts = [text for batch in batches for text in texts_of(*batch[:4])]
    return [text for text in texts if len(text.ids) >= PROMPT + NEW]
