"""Decoding through a cache against the model's own forward pass without one, and the cache's memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.accounting import cache_values_per_token
from looplm.config import GateConfig, ModelConfig
from looplm.evaluation.cached import LockstepDecoder
from looplm.failures import UserError
from looplm.inference import GenerationConfig
from looplm.inference.early_exit import ExitRule, ExitSignal
from looplm.inference.kv_cache import CacheMode, KVCache
from looplm.inference.sampling import NextLogits
from looplm.inference.stack import LoopedStack
from looplm.megatron.device import DEVICE
from looplm.model import LoopLM
from looplm.model.exit_gate import exit_log_probs, q_exit
from tests.support.generation_oracle import GATES, MLA, READ_OUTS, VARIANTS, VOCAB, build
from tests.support.observe import observed

WITHOUT_CODA = (
    "mha-prelude-readout-norm",
    "mha-diagonal-injection",
    "mla-step-embedding",
    "mla-element-gate",
)  # without a coda
LENGTHS = (21, 1, 9)  # of the prompts, in one batch
NEW = 10
OURO: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 2048,
    "ffn_hidden_size": 5632,
    "num_layers": 24,
    "num_attention_heads": 16,
}


def teacher_forced(
    model: LoopLM, rule: ExitRule, mode: CacheMode = "per_loop", piece: int = 1000
) -> tuple[torch.Tensor, list[NextLogits]]:
    """Run random ids through prefill and decode, and return the ids [B, S] and the logits at each new token."""
    ids_BS = torch.randint(0, VOCAB, (len(LENGTHS), max(LENGTHS) + NEW), device=DEVICE)
    texts = ids_BS.tolist()
    prompts = [text[:length] for text, length in zip(texts, LENGTHS, strict=True)]
    decoder = LockstepDecoder(model, rule, mode, prompts, piece)
    steps = [decoder.prompt_logits]
    for new in range(NEW):
        ids = [text[length + new] for text, length in zip(texts, LENGTHS, strict=True)]
        steps.append(decoder.decode(ids))
    assert all(step.rows == list(range(len(LENGTHS))) for step in steps)
    return ids_BS, steps


def splitting_threshold(model: LoopLM) -> float:
    """Return a threshold that half of random tokens reach within two loops, whatever the gate's initial weights."""
    with torch.no_grad():
        logit_RSB = model(torch.randint(0, VOCAB, (4, 16), device=DEVICE)).gate_logit_RSB
    return float(exit_log_probs(logit_RSB)[:2].exp().sum(0).median())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("variant", [*VARIANTS, *WITHOUT_CODA])
def test_per_loop_equals_the_cacheless_model(variant: str, gate: str, single_process: ProcessGroupCollection) -> None:
    """Logits and exit depth of every token, with rows of different lengths side by side."""
    model = build((VARIANTS | READ_OUTS)[variant], GATES[gate], single_process)
    threshold = splitting_threshold(model)
    ids_BS, steps = teacher_forced(model, ExitRule(max_depth=4, threshold=threshold))
    with torch.no_grad():
        hidden, gate_logit_RSB, _ = model(ids_BS)
        logits_RSBV = F.linear(torch.stack(hidden), model.head_weight())
    depth_SB = q_exit(exit_log_probs(gate_logit_RSB), threshold)
    depths = set()
    for new, step in enumerate(steps):
        for row, length in enumerate(LENGTHS):
            place = length - 1 + new
            depth = int(depth_SB[place, row])
            assert step.depths[row] == depth
            torch.testing.assert_close(step.logits_NV[row], logits_RSBV[depth - 1, place, row], rtol=0, atol=1e-4)
            depths.add(depth)
    assert len(depths) > 1, "the gate must decide something, or this proves nothing"


@pytest.mark.parametrize("threshold, outside", [(0.45, 1), (0.6, 4)])
def test_depth_bounds_clamp_the_gates_depths(
    threshold: float, outside: int, single_process: ProcessGroupCollection
) -> None:
    model = build(MLA, GATES["sequence"], single_process)
    given = {}
    for least, most in ((1, 4), (2, 3)):
        torch.manual_seed(5)
        _, steps = teacher_forced(model, ExitRule(min_depth=least, max_depth=most, threshold=threshold))
        given[most] = torch.tensor([step.depths for step in steps])
    assert torch.equal(given[3], given[4].clamp(2, 3)) and outside in given[4]


@pytest.mark.parametrize("variant", ["mla", *READ_OUTS])
@pytest.mark.parametrize("depth", [1, 3, 6])
def test_fixed_depth_also_beyond_the_trained_one(
    depth: int, variant: str, single_process: ProcessGroupCollection
) -> None:
    model = build((VARIANTS | READ_OUTS)[variant], GATES["lru"], single_process)
    ids_BS, steps = teacher_forced(model, ExitRule(max_depth=depth))
    with torch.no_grad():
        logits_SBV = F.linear(model(ids_BS, num_loops=depth).hidden[-1], model.head_weight())
    for new, step in enumerate(steps):
        assert step.depths == [depth] * len(LENGTHS)
        places = torch.tensor(LENGTHS) - 1 + new
        torch.testing.assert_close(step.logits_NV, logits_SBV[places, range(len(LENGTHS))], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["per_loop", "last", "mean", "first"])
def test_a_coda_reads_each_token_as_of_the_loop_in_which_it_exited(
    mode: CacheMode, single_process: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is the model's own coda, without a cache, over the states that the tokens left the loops with."""
    model, read = build(READ_OUTS["mla-prelude-coda"], GATES["lru"], single_process), list[torch.Tensor]()
    monkeypatch.setattr(
        LoopedStack, "coda", observed(LoopedStack.coda, lambda _, h_SND, *__: read.append(h_SND.clone()))
    )
    ids = torch.randint(0, VOCAB, (30,)).tolist()
    rule = ExitRule(max_depth=4, threshold=splitting_threshold(model))
    decoder = LockstepDecoder(model, rule, mode, [ids[:12]])
    steps = [decoder.prompt_logits, *(decoder.decode([token]) for token in ids[12:])]
    assert model.coda is not None and len({step.depths[0] for step in steps}) > 1
    with torch.no_grad():
        read_S1D = model.coda(torch.cat(read), attention_mask=None)
        logits_SV = F.linear(read_S1D[:, 0], model.head_weight())
    decoded = torch.cat([step.logits_NV for step in steps])
    torch.testing.assert_close(decoded, logits_SV[11:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("signal, gate", [("gate", "sequence"), ("gate", "linear"), ("change", "lru")])
@pytest.mark.parametrize("variant", ["mla-prelude-coda", "gqa-coda-readout-norm"])
def test_with_a_coda_a_prompt_read_at_once_is_the_prompt_read_token_by_token(
    variant: str, signal: ExitSignal, gate: str, least: int, single_process: ProcessGroupCollection
) -> None:
    model = build(READ_OUTS[variant], GATES[gate], single_process)
    threshold = 0.35 if signal == "change" else splitting_threshold(model)
    rule = ExitRule(max_depth=4, min_depth=least, threshold=threshold, signal=signal)
    texts = torch.randint(0, VOCAB, (2, 12)).tolist()
    at_once = LockstepDecoder(model, rule, "per_loop", [texts[0][:11], texts[1][:8]])
    by_token = LockstepDecoder(model, rule, "per_loop", [text[:1] for text in texts])
    alone = [by_token.decode([text[place] for text in texts]) for place in range(1, 12)]
    assert len({depth for step in alone for depth in step.depths}) > 1
    for found, expected, row in ((at_once.prompt_logits, alone[9], 0), (at_once.prompt_logits, alone[6], 1)):
        assert found.depths[row] == expected.depths[row]
        torch.testing.assert_close(found.logits_NV[row], expected.logits_NV[row], rtol=0, atol=1e-4)
    found = at_once.decode([texts[0][11]])  # it reads the entries that the prompt left
    torch.testing.assert_close(found.logits_NV[0], alone[10].logits_NV[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("signal", ["confidence", "entropy"])
def test_a_coda_refuses_exits_that_need_every_loops_logits(signal: ExitSignal) -> None:
    config = GenerationConfig(exit_threshold=0.5, exit_signal=signal)
    with pytest.raises(UserError, match=r"exit_signal: .* 2 coda layers .* give gate or change"):
        config.exit_rule(READ_OUTS["mla-prelude-coda"], gate_trained=True)
    assert config.exit_rule(MLA, gate_trained=True).signal == signal


@pytest.mark.parametrize("mode", ["per_loop", "last", "mean", "first"])
@pytest.mark.parametrize("variant, gate", [("mla", "sequence"), ("gqa", "lru"), ("gqa-coda-readout-norm", "linear")])
def test_a_prompt_in_pieces_equals_the_prompt_at_once(
    variant: str, gate: str, mode: CacheMode, single_process: ProcessGroupCollection
) -> None:
    """Both the logits after it and the logits of later tokens, which attend to it."""
    model = build((VARIANTS | READ_OUTS)[variant], GATES[gate], single_process)
    rule, steps = ExitRule(max_depth=4, threshold=splitting_threshold(model)), {}
    for piece in (1000, 3, 12):  # 3 and 12 tokens of 3 prompts: 1 and 4 positions at a time
        torch.manual_seed(5)
        _, steps[piece] = teacher_forced(model, rule, mode, piece)
    for piece in (3, 12):
        for whole, pieces in zip(steps[1000], steps[piece], strict=True):
            assert pieces.depths == whole.depths
            # If tokens attend to each other's last loops, rounding errors are fed back.
            torch.testing.assert_close(pieces.logits_NV, whole.logits_NV, rtol=0, atol=1e-3)


@pytest.mark.parametrize("variant", ["mla", "gqa"])
def test_bf16(variant: str, single_process: ProcessGroupCollection) -> None:
    """Products are taken in another order (absorbed, one token at a time), so only rounding may differ."""
    model = build(VARIANTS[variant], GATES["sequence"], single_process, torch.bfloat16)
    ids_BS, steps = teacher_forced(model, ExitRule(max_depth=4))
    with torch.no_grad():
        logits_SBV = F.linear(model(ids_BS).hidden[-1], model.head_weight()).float()
    wrong = [
        (steps[-1].logits_NV[row] - logits_SBV[length - 1 + NEW, row]).norm() for row, length in enumerate(LENGTHS)
    ]
    assert steps[-1].logits_NV.dtype is torch.float32
    assert max(wrong) < 0.1 * logits_SBV.norm(dim=-1).mean()


@pytest.mark.parametrize("mode", ["last", "mean", "first"])
def test_one_loop_has_nothing_to_share(mode: CacheMode, single_process: ProcessGroupCollection) -> None:
    model = build(MLA, GATES["lru"], single_process)
    torch.manual_seed(5)
    _, exact = teacher_forced(model, ExitRule(max_depth=1))
    torch.manual_seed(5)
    _, shared = teacher_forced(model, ExitRule(max_depth=1), mode)
    assert all(torch.equal(a.logits_NV, b.logits_NV) for a, b in zip(exact, shared, strict=True))


@pytest.mark.parametrize("mode, seen_later", [("last", 3.0), ("mean", 2.0), ("first", 1.0)])
def test_entries_that_tokens_see_in_a_shared_cache(mode: CacheMode, seen_later: float) -> None:
    """A token has entries 1, 2, 3 in its three loops. It sees each itself; the next token sees what the mode says."""
    cache = KVCache(MLA, mode, 2, 3, torch.float32, DEVICE)
    width = MLA.kv_lora_rank + MLA.qk_rope_head_dim
    cache.reserve(2)
    for loop in range(3):
        entry = torch.full((1, 1, width), loop + 1.0, device=DEVICE)
        assert look(cache, [1], [loop], [0], entry).unique().tolist() == [loop + 1.0]
    later = look(cache, [1, 0], [0, 0], [1, 1], torch.zeros(1, 2, width, device=DEVICE))
    assert later[0, 0].unique().tolist() == [seen_later]
    assert not later[1].any(), "the other row"
    mixed = look(cache, [0, 1], [0, 2], [2, 1], torch.ones(1, 2, width, device=DEVICE))
    assert mixed[1, 0].unique().tolist() == [seen_later] and mixed[1, 1].unique().tolist() == [1.0]


def look(
    cache: KVCache, rows: list[int], loops: list[int], positions: list[int], entry_1NW: torch.Tensor
) -> torch.Tensor:
    """Return the entries of layer 0 that tokens see during a pass."""
    index = cache.index(rows, loops, positions)
    seen_NTW, blended = cache.write(0, index, entry_1NW)
    seen_NTW = seen_NTW.clone()
    if blended is not None:
        cache.replace(0, index, blended)
    return seen_NTW


def test_growing_by_blocks_keeps_the_entries() -> None:
    cache = KVCache(MLA, "per_loop", 2, 2, torch.float32, DEVICE, block=4)
    width = MLA.kv_lora_rank + MLA.qk_rope_head_dim
    entry_SNW = torch.randn(3, 2, width, device=DEVICE)
    cache.reserve(3)
    assert cache.layers_XTW[0].size(1) == 4
    for loop in range(2):
        cache.write_prompt(1, loop, 0, entry_SNW + loop)
    cache.reserve(9)
    assert cache.layers_XTW[0].size(1) == 12
    new_1NW = torch.randn(1, 2, width, device=DEVICE)
    seen_NTW, _ = cache.write(1, cache.index([0, 1], [1, 1], [3, 3]), new_1NW)
    assert torch.equal(seen_NTW.transpose(0, 1), torch.cat((entry_SNW + 1, new_1NW)))


def measured_bytes_per_token(config: ModelConfig, mode: CacheMode, dtype: torch.dtype) -> int:
    """Return bytes per token, from a real allocation of one block for one row."""
    cache = KVCache(config, mode, 1, config.num_loops, dtype, DEVICE, block=16)
    cache.reserve(1)
    caches, allocated = config.num_loops if mode == "per_loop" else 1, sum(layer.nbytes for layer in cache.layers_XTW)
    assert allocated == cache_values_per_token(config, caches) * dtype.itemsize * cache.layers_XTW[0].size(1)
    return allocated // cache.layers_XTW[0].size(1)


@pytest.mark.parametrize("mode", ["per_loop", "last", "mean", "first"])
def test_layers_outside_the_loops_keep_one_entry_of_a_token(mode: CacheMode) -> None:
    config = READ_OUTS["mla-prelude-coda"]
    caches = config.num_loops if mode == "per_loop" else 1
    layers = caches * config.num_layers + config.prelude_layers + config.coda_layers
    assert measured_bytes_per_token(config, mode, torch.float32) == 4 * layers * (12 + 6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["last", "mean", "first"])
def test_a_shared_cache_takes_the_memory_of_one_loop(variant: str, mode: CacheMode) -> None:
    per_loop = measured_bytes_per_token(VARIANTS[variant], "per_loop", torch.float32)
    assert measured_bytes_per_token(VARIANTS[variant], mode, torch.float32) * VARIANTS[variant].num_loops == per_loop


def test_memory_of_latents_and_sharing_at_ouros_sizes() -> None:
    ouro = measured_bytes_per_token(ModelConfig(**OURO, attention="mha"), "per_loop", torch.bfloat16)
    ours = measured_bytes_per_token(ModelConfig(**OURO, kv_lora_rank=512, qk_rope_head_dim=64), "last", torch.bfloat16)
    assert ouro == 768 * 1024
    assert ours * 25 <= ouro


def test_training_works_after_generation(single_process: ProcessGroupCollection) -> None:
    """No tensor made in inference mode may remain in the model's own caches."""
    model = build(MLA, GateConfig(), single_process)
    ids_BS, _ = teacher_forced(model, ExitRule(max_depth=4, threshold=0.5), "last")
    model(ids_BS).hidden[-1].sum().backward()
    assert all(p.grad is not None for p in model.decoder.parameters())


def test_rotations_of_far_positions_are_exact(single_process: ProcessGroupCollection) -> None:
    """bf16 holds whole numbers up to 256 only."""
    stack = LoopedStack(LoopLM(MLA, GATES["lru"], single_process, torch.bfloat16))
    position, width = torch.tensor([0, 257, 1500]), MLA.qk_rope_head_dim
    angle = position[:, None] / MLA.rope_base ** (torch.arange(0, width, 2) / width)
    expected = torch.stack((angle.cos(), angle.sin()), -1).bfloat16().float()
    found = torch.view_as_real(stack.turns(position, 1501)[:, 0])
    torch.testing.assert_close(found.reshape(expected.shape).cpu(), expected, atol=8e-3, rtol=0)
    assert torch.equal(found, found.bfloat16().float()), "rounded to the model's dtype, as in training"
