"""Loss through the decode path, against the cacheless model and against a slow oracle."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.config import GateConfig
from looplm.evaluation.cached import cache_losses, decode_texts, texts_of
from looplm.inference.early_exit import ExitRule
from looplm.inference.kv_cache import CacheMode
from looplm.model import LoopLM
from looplm.model.exit_gate import exit_log_probs, q_exit
from tests.support.generation_oracle import GATES, VARIANTS, VOCAB, SlowGenerator, build

PROMPT = 5


@pytest.fixture(scope="module")
def model(single_process: ProcessGroupCollection) -> LoopLM:
    return build(VARIANTS["mla"], GATES["lru"], single_process)


def samples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return samples of 24 tokens with one, two and three documents, the first of the three as long as the prompt."""
    ids_BS, labels_SB = torch.randint(0, VOCAB, (3, 24)), torch.randint(0, VOCAB, (24, 3))
    mask_SB = (torch.rand(24, 3) > 0.2).float()
    start_SB = torch.zeros(24, 3, dtype=torch.int64)
    start_SB[9:, 1] = 9
    start_SB[5:, 2], start_SB[14:, 2] = 5, 14
    return ids_BS, labels_SB, mask_SB, start_SB


def decoded_places(mask_SB: torch.Tensor, start_SB: torch.Tensor) -> torch.Tensor:
    return (mask_SB > 0) & (torch.arange(24)[:, None] - start_SB >= PROMPT)


def test_samples_are_split_into_documents() -> None:
    ids_BS, labels_SB, mask_SB, start_SB = samples()
    texts = texts_of(ids_BS, labels_SB, mask_SB, start_SB)
    assert [len(text.ids) for text in texts] == [24, 9, 15, 5, 9, 10]
    assert texts[2].ids == ids_BS[1, 9:].tolist() and texts[2].labels == labels_SB[9:, 1].tolist()
    assert texts[2].counts == mask_SB[9:, 1].bool().tolist()
    assert [len(text.ids) for text in texts_of(ids_BS, labels_SB, mask_SB, None)] == [24] * 3


@pytest.mark.parametrize("threshold", [1.0, 0.6])
def test_per_loop_equals_the_cacheless_loss(threshold: float, model: LoopLM) -> None:
    ids_BS, labels_SB, mask_SB, start_SB = samples()
    with torch.no_grad():
        output = model(ids_BS, document_start_SB=start_SB)
        logits_RSBV = F.linear(torch.stack(output.hidden), model.head_weight())
    depth_SB = q_exit(exit_log_probs(output.gate_logit_RSB), threshold)
    logits_SBV = logits_RSBV.gather(0, (depth_SB - 1)[None, :, :, None].expand(1, -1, -1, VOCAB))[0]
    counts_SB = decoded_places(mask_SB, start_SB)
    expected = F.cross_entropy(logits_SBV[counts_SB], labels_SB[counts_SB], reduction="sum").item()
    rule = ExitRule(max_depth=4, threshold=threshold)
    for rows in (1, 2, 9):
        sums = decode_texts(model, texts_of(ids_BS, labels_SB, mask_SB, start_SB), PROMPT, rows, "per_loop", rule)
        assert sums.tokens == counts_SB.sum() and sums.depth == depth_SB[counts_SB].sum()
        assert sums.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["last", "mean", "first"])
def test_shared_caches_equal_the_oracle(mode: CacheMode, model: LoopLM) -> None:
    ids_BS, labels_SB, mask_SB, start_SB = samples()
    texts = texts_of(ids_BS, labels_SB, mask_SB, start_SB)
    tokens = loss = depth = 0.0
    for text in texts:
        slow = SlowGenerator(model, GateConfig(state_size=6), mode, threshold=0.6)
        slow.read_prompt(text.ids[:PROMPT])
        for place in range(PROMPT, len(text.ids)):
            _, token_depth = slow.read_token(text.ids[place], place)
            if text.counts[place]:
                loss += F.cross_entropy(slow.logits_1V, torch.tensor([text.labels[place]])).item()
                tokens, depth = tokens + 1, depth + token_depth
    sums = decode_texts(model, texts, PROMPT, 4, mode, ExitRule(max_depth=4, threshold=0.6))
    assert (sums.tokens, sums.depth) == (tokens, depth)
    assert sums.loss == pytest.approx(loss, rel=1e-5)


def test_cache_losses(model: LoopLM, single_process: ProcessGroupCollection) -> None:
    texts = texts_of(*samples())
    rules = [ExitRule(max_depth=4), ExitRule(max_depth=4, threshold=0.9, signal="entropy")]
    losses = cache_losses(model, texts, PROMPT, 4, ["per_loop", "first"], rules, single_process.dp)
    assert [(row.kv_cache, row.exit_threshold, row.exit_signal) for row in losses] == [
        ("per_loop", 1.0, "gate"),
        ("per_loop", 0.9, "entropy"),
        ("first", 1.0, "gate"),
        ("first", 0.9, "entropy"),
    ]
    sums = decode_texts(model, texts, PROMPT, 4, "first", rules[0])
    assert losses[2].loss == pytest.approx(sums.loss / sums.tokens) and losses[2].mean_depth == 4
    assert losses[2].tokens == sums.tokens and losses[0].loss != losses[2].loss
    nothing = cache_losses(model, texts, 24, 4, ["last"], rules[:1], single_process.dp)
    assert nothing[0].tokens == 0
