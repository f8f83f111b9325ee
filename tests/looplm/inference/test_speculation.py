"""Self-speculation: the text is the same as by all loops, in fewer passes."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.failures import UserError
from looplm.inference import GenerationConfig, Generator, Request, speculation
from looplm.inference.batch import TextBatch
from looplm.inference.sampling import probabilities
from tests.support.generation_oracle import GATES, READ_OUTS, VARIANTS, build, byte_tokenizer
from tests.support.observe import observed

TOKENIZER = byte_tokenizer()
GREEDY = GenerationConfig(temperature=0.0, max_new_tokens=24, batch_size=8)


def twenty_requests() -> list[Request]:
    """Return 20 prompts of mixed lengths."""
    dice = random.Random(2)
    return [Request([dice.randrange(256) for _ in range(dice.choice([1, 4, 9, 33]))]) for _ in range(20)]


@pytest.fixture(scope="module")
def generator(single_process: ProcessGroupCollection) -> Generator:
    return generator_of("mla", single_process)


def generator_of(variant: str, groups: ProcessGroupCollection) -> Generator:
    """Return a generator whose drafts are often, but not always, accepted."""
    model = build((VARIANTS | READ_OUTS)[variant], GATES["lru"], groups)
    return Generator(model, TOKENIZER, eos_ids=-1)


@pytest.mark.parametrize(
    "variant, settings",
    [
        ("mla", {"speculate": 4}),
        ("mla", {"speculate": 3, "draft_depth": 3, "repetition_penalty": 1.5}),
        ("mla", {"speculate": 1, "depth": 2}),
        ("gqa", {"speculate": 5, "draft_depth": 2}),
        ("mla-prelude-coda", {"speculate": 4, "draft_depth": 2}),
        ("mla-prelude-linear-injection", {"speculate": 3, "draft_depth": 2}),
        ("mla-step-embedding", {"speculate": 3, "draft_depth": 2, "depth": 5}),
        ("gqa-head-gate", {"speculate": 3, "draft_depth": 2}),
        ("mla-query-latent", {"speculate": 2, "draft_depth": 5, "depth": 6}),
    ],
)
def test_greedy_text_equals_full_depth(
    variant: str, settings: dict[str, Any], single_process: ProcessGroupCollection
) -> None:
    """20 prompts of mixed lengths run in 8 rows. Some drafts are accepted and some are not."""
    generator, config = generator_of(variant, single_process), replace(GREEDY, **settings)
    drafted = generator.generate(iter(twenty_requests()), config)
    plain = generator.generate(iter(twenty_requests()), replace(config, speculate=0, draft_depth=1))
    assert [g.ids for g in drafted] == [g.ids for g in plain]
    assert [g.depths for g in drafted] == [g.depths for g in plain]
    assert 0 < sum(g.accepted for g in drafted) < sum(g.drafted for g in drafted)


def test_drafts_save_passes(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """If every draft is accepted, k tokens take k d + R - d passes instead of k R."""
    passes: list[int] = []
    run_pass = observed(TextBatch.run_pass, lambda _, h, *__: passes.append(len(h)))
    monkeypatch.setattr(TextBatch, "run_pass", run_pass)
    monkeypatch.setattr(speculation, "check_drafts", _accept_all)
    generator.generate(["abc"], replace(GREEDY, speculate=4, max_new_tokens=9))
    assert passes == ([1] * 4 + [4] * 3) * 2


def _accept_all(sampler, rows, drafted_kN, p_kNV, q_kNV):
    return [([ids_N[n] for ids_N in drafted_kN], len(drafted_kN)) for n in range(len(rows))]


@pytest.mark.parametrize("settings", [{"top_p": 1.0}, {"top_k": 5, "top_p": 0.8, "repetition_penalty": 2.0}])
def test_sampled_tokens_are_distributed_as_without_a_draft(settings: dict[str, Any], generator: Generator) -> None:
    """The second and third token of many samples, with drafts and without."""
    config = replace(GREEDY, temperature=0.7, max_new_tokens=3, batch_size=500, **settings)
    requests = [Request("ab", seed=seed) for seed in range(1000)]
    drafted = generator.generate(requests, replace(config, speculate=2))
    plain = generator.generate(requests, config)
    assert 0 < sum(g.accepted for g in drafted) < sum(g.drafted for g in drafted)
    for place in (1, 2):
        ours, theirs = (
            torch.tensor([g.ids[place] for g in batch]).bincount(minlength=259) / len(batch)
            for batch in (drafted, plain)
        )
        # Total variation of two samples of one distribution: for each id about its standard deviation.
        noise = (2 * (ours + theirs) / 2 / len(requests)).sqrt().sum() / 2
        assert (ours - theirs).abs().sum() / 2 < 1.2 * noise


def test_checking_follows_the_rejection_rule() -> None:
    """For two distributions over four ids, the result is distributed as p, and a share of min(p, q) are drafts."""
    p, q = torch.tensor([0.1, 0.4, 0.5, 0.0]).double(), torch.tensor([0.4, 0.4, 0.1, 0.1]).double()
    dice = random.Random(0)

    class Dice:
        def uniform(self, rows: list[int]) -> torch.Tensor:
            return torch.tensor([dice.random() for _ in rows], dtype=torch.float64)

    n = 6000
    drafts = [torch.multinomial(q, n, replacement=True, generator=torch.Generator().manual_seed(1)).tolist()]
    p_1NV, q_1NV = p.expand(1, n, -1), q.expand(1, n, -1)
    checked = speculation.check_drafts(Dice(), range(n), drafts, p_1NV, q_1NV)  # type: ignore[arg-type]
    frequency = torch.tensor([ids[0] for ids, _ in checked]).bincount(minlength=4) / n
    torch.testing.assert_close(frequency.double(), p, rtol=0, atol=0.025)
    accepted = sum(accepted for _, accepted in checked) / n
    assert accepted == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.025)


def test_probabilities_add_up_to_1() -> None:
    logits = torch.randn(3, 50)
    for settings in ({}, {"top_k": 7}, {"top_p": 0.4}, {"top_k": 7, "top_p": 0.4}):
        torch.testing.assert_close(probabilities(logits, 0.7, **settings).sum(-1), torch.ones(3).double())
    assert torch.equal(probabilities(logits, 0.0).argmax(-1), logits.argmax(-1))


def test_a_draft_ends_with_the_text(generator: Generator) -> None:
    """If end of text, a stop string or the length limit falls into a draft, the rest of it is dropped."""
    [plain] = generator.generate(["abc"], GREEDY)
    eos = Generator(generator.model, TOKENIZER, eos_ids=plain.ids[5])
    for config in (GREEDY, replace(GREEDY, stop=(plain.text[3:5],)), replace(GREEDY, max_new_tokens=7)):
        [expected] = eos.generate(["abc"], config)
        [drafted] = eos.generate(["abc"], replace(config, speculate=4))
        assert (drafted.text, drafted.finish) == (expected.text, expected.finish)
    [full] = generator.generate(["x" * 120], replace(GREEDY, speculate=6))
    assert (full.finish, len(full.tokens)) == ("context", 8)


def test_a_row_that_is_not_finite_ends_alone(single_process: ProcessGroupCollection) -> None:
    generator = generator_of("mla", single_process)
    config = replace(GREEDY, speculate=3, batch_size=2)
    [expected] = generator.generate(["abc"], config)
    with torch.no_grad():
        generator.model.embedding.word_embeddings.weight[TOKENIZER.encode("~").ids] = float("nan")
    generations = generator.generate(iter(["a~b", "abc", "abc"]), config)
    assert [g.finish for g in generations] == ["error", "length", "length"]
    assert generations[1].ids == generations[2].ids == expected.ids


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"speculate": -1}, "speculate"),
        ({"speculate": 2, "kv_cache": "last"}, "speculate"),
        ({"speculate": 2, "exit_threshold": 0.5}, "speculate"),
        ({"speculate": 2, "draft_depth": 4}, "draft_depth"),
        ({"speculate": 2, "draft_depth": 2, "depth": 2}, "draft_depth"),
        ({"speculate": 2, "draft_depth": 0}, "draft_depth"),
        ({"draft_depth": 2}, "draft_depth"),
    ],
)
def test_invalid_settings(settings: dict[str, Any], key: str, generator: Generator) -> None:
    with pytest.raises(UserError, match=rf"^{key}: "):
        generator.generate(["a"], GenerationConfig(**settings))
