"""Speed of early exit: all loops for every token, against three ways to use that some need fewer.

    select-after  runs all loops and reads the state at the exit
    compaction    runs the rows in step and drops those that left
    continuous    starts a row's next token at once: continuous depth batching

With a trained checkpoint its gate decides, at the lowest threshold whose loss through the same cache is within 1 % of
full depth, over its own validation text; the text is handed in, so that all contenders do the same work. Without one,
depths are drawn, half of the trained loops on average: what is compared is how a given saving is used.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from looplm import checkpoint
from looplm.checkpoint import OpenedModel
from looplm.config import GateConfig, ModelConfig
from looplm.evaluation.cached import Text, decode_texts, texts_of
from looplm.inference.depth_batch import DepthBatch, ExitedTokens
from looplm.inference.early_exit import ExitDecider, ExitDecision, ExitRule
from looplm.inference.kv_cache import CacheMode
from looplm.inference.prefill import Prefill
from looplm.inference.stack import LoopedStack
from looplm.megatron import device
from looplm.model import LoopLM
from pretrain.data import build_valid_set, check_corpus, index_cache, micro_batches
from tools.bench.timing import Prepare, show, timed

PROMPT, NEW = 64, 64
BATCHES = (1, 16)
CACHE: CacheMode = "last"
TOLERANCE = 1.01  # of full depth's loss
THRESHOLDS = [round(0.05 * step, 2) for step in range(1, 20)]
LOSS_TEXTS = 32
# Without a checkpoint: the recipe's blocks, so many that the stack outweighs the head, as in models meant to be used.
LAYERS = 12
DEPTHS_OF_4 = (1, 1, 1, 2, 2, 3, 4)  # most leave early, some do not: 2 on average


@dataclass(frozen=True)
class Setting:
    """A model, texts to go through it, and who leaves when.

    Args:
        model: in eval mode.
        texts: token ids, longer than the prompt.
        rule: asks the gate.
        depths: at which tokens leave, for each text and place, over and over; None where the gate decides.
        opened: the checkpoint that the model is from; None if it is untrained.
    """

    model: LoopLM
    texts: Sequence[Sequence[int]]
    rule: ExitRule
    depths: Sequence[Sequence[int]] | None = None
    opened: OpenedModel | None = None


def trained_setting(directory: str, groups: ProcessGroupCollection) -> Setting:
    """A checkpoint's model and validation text, at the lowest threshold that costs at most 1 %."""
    opened = checkpoint.open_model(directory, groups)
    texts = [text for text in _validation_texts(opened.folder) if len(text.ids) >= PROMPT + NEW]
    full = ExitRule(max_depth=opened.model.model_config.num_loops)
    some = texts[:LOSS_TEXTS]
    measured = decode_texts(opened.model, some, PROMPT, LOSS_TEXTS, CACHE, full)
    most = TOLERANCE * measured.loss
    for threshold in THRESHOLDS:
        rule = replace(full, threshold=threshold)
        exited = decode_texts(opened.model, some, PROMPT, LOSS_TEXTS, CACHE, rule)
        if exited.loss <= most:
            break
    else:
        rule, exited = full, measured
    print(
        f"\nearly exit by the gate of {opened.folder}: at threshold {rule.threshold} loss {exited.loss / exited.tokens:.4f}, "
        f"mean depth {exited.depth / exited.tokens:.2f}; at full depth {measured.loss / measured.tokens:.4f}"
    )
    return Setting(opened.model, [text.ids for text in texts], rule, opened=opened)


def drawn_setting(model: ModelConfig, gate: GateConfig, groups: ProcessGroupCollection) -> Setting:
    """Untrained blocks and drawn depths; the gate is asked all the same, and not listened to."""
    built, dice, rows = LoopLM(replace(model, num_layers=LAYERS), gate, groups).eval(), random.Random(0), max(BATCHES)
    depths = [[max(1, round(dice.choice(DEPTHS_OF_4) * model.num_loops / 4)) for _ in range(NEW)] for _ in range(rows)]
    texts = [[dice.randrange(model.vocab_size) for _ in range(PROMPT + NEW)] for _ in range(rows)]
    print(f"\nearly exit at drawn depths, {LAYERS} untrained layers")
    return Setting(built, texts, ExitRule(max_depth=model.num_loops, threshold=0.5), depths)


def bench_exit(setting: Setting, repeats: int) -> None:
    """Print a table for each batch size; everything in turns, from the median."""
    for rows in BATCHES:
        met: list[float] = []
        contenders = {
            "full depth": _drive(setting, rows, full=True),
            "select-after": _drive(setting, rows, runs_on=True),
            "compaction": _drive(setting, rows, met=met),
            "continuous depth batching": _drive(setting, rows, continuous=True),
        }
        speed = timed(contenders, rows * NEW, repeats)
        show(f"batch {rows}, mean depth {statistics.mean(met):.2f} of {setting.rule.max_depth}", speed)


def _drive(
    setting: Setting,
    rows: int,
    full: bool = False,
    continuous: bool = False,
    runs_on: bool = False,
    met: list[float] | None = None,
) -> Prepare:
    """All rows, prompts read beforehand, until there are ``rows * NEW`` tokens: as in the middle of a long stream.

    Args:
        setting: as above.
        rows: texts side by side.
        full: every token runs all loops.
        continuous: rows go their own pace, or wait for each other after every token.
        runs_on: tokens that left stay in the compute until the last loop.
        met: collects the depths of tokens.
    """
    model, rule = setting.model, replace(setting.rule, threshold=1.0) if full else setting.rule
    stack, texts = LoopedStack(model), [setting.texts[row % len(setting.texts)] for row in range(rows)]

    @torch.inference_mode()
    def prepare() -> Callable[[], object]:
        batch = DepthBatch(stack, rule, CACHE, rows)
        job = Prefill(stack, rule, CACHE, [text[:PROMPT] for text in texts], rows * PROMPT)
        while not job.done:
            job.advance()
        for row in range(rows):
            batch.seat(row, job, row)
        batch.runs_on = runs_on
        if setting.depths is not None and not full:
            batch.decider = _Pattern(batch.decider, setting.depths)
        return lambda: decode(batch)

    @torch.inference_mode()
    def decode(batch: DepthBatch) -> None:
        place, left = [PROMPT] * rows, rows * NEW
        with device.adapter_off():
            batch.append(range(rows), [text[PROMPT] for text in texts])
            exits: list[ExitedTokens] = []
            while left > 0:
                exits.append(batch.advance())
                if not (exits[-1].rows if continuous else not batch.in_flight):
                    continue
                step, exits = batch.read(exits), []
                step.logits_NV.argmax(-1).tolist()  # what a greedy decoder would wait for
                for row in step.rows:
                    place[row], left = place[row] + 1, left - 1
                batch.append(step.rows, [texts[row][place[row] % len(texts[row])] for row in step.rows])
                if met is not None:
                    met.extend(step.depths)

    return prepare


class _Pattern(ExitDecider):
    """Tokens leave at depths that were drawn beforehand; the gate is asked all the same, and not listened to."""

    def __init__(self, asked: ExitDecider, depths: Sequence[Sequence[int]]) -> None:
        self._asked, self.gate, self._depths, self._place = asked, asked.gate, depths, [-1] * len(depths)

    def decide(
        self,
        before_ND: Tensor,
        h_SND: Tensor,
        rows: Sequence[int],
        loops: Sequence[int],
        length_N: Tensor | None = None,
    ) -> ExitDecision:
        self._asked.decide(before_ND, h_SND, rows, loops, length_N)
        for row, loop in zip(rows, loops, strict=True):
            self._place[row] += loop == 0
        depths = [self._depths[row][self._place[row] % NEW] for row in rows]
        return ExitDecision([loop + 1 >= depth for loop, depth in zip(loops, depths, strict=True)])


def _validation_texts(folder: Path) -> list[Text]:
    """The documents in the validation samples that the checkpoint's run measured."""
    run = checkpoint.read_config(folder)
    assert run is not None, "a run made it"
    corpus = check_corpus(run.data, run.model.vocab_size)
    valid_set = build_valid_set(run.data, corpus, run.logging.eval_samples, run.seed, index_cache(run))
    assert valid_set is not None, "the recipe validates"
    count = max(1, run.logging.eval_samples // run.data.micro_batch_size)
    batches = islice(micro_batches(valid_set, run.data, 0, 0, 1), count)
    return [text for batch in batches for text in texts_of(*batch)]
